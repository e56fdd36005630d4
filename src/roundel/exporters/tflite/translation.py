"""`Translation`: a file in the making and where the graph's values are in it; what each operation becomes is in `ops`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...errors import PlanError
from ...graph import Graph, Node
from ...integer.ops import numbers
from ...qmodel import Note, QModel
from .draft import Draft
from .layout import Order, is_relabelling, moved, orders, plain, relative, sized
from .units import Units, units

#: Places before and after along one axis.
Pad = tuple[int, int]


@dataclass
class Translation:
    """A file in the making and where the graph's values are in it: ``place[name]`` maps an order of axes to a tensor."""

    q: QModel
    graph: Graph
    widen: bool = False
    draft: Draft = field(default_factory=Draft)
    place: dict[str, dict[Order, int]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.orders = orders(self.graph)
        self.all_units = units(self.q, self.graph)
        self.producers = self.q.structure.producers() if isinstance(self.q.structure, Graph) else {}

    def units(self, name: str) -> Units:
        if name not in self.all_units:
            raise PlanError(f"the scale of {name!r} is not known to the model")
        return self.all_units[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return sized(self.graph, name)

    def rank(self, name: str) -> int:
        return len(self.graph.values[name].shape)

    def batched(self, name: str) -> bool:
        shape = self.graph.values[name].shape
        return bool(shape) and isinstance(shape[0], str)

    # -- values -------------------------------------------------------------------------------------------------------

    def value(self, name: str, order: Order | None = None) -> int:
        """The tensor of a value, or of a constant in a value's place, with its axes in ``order`` (its own where None)."""
        if name in self.graph.constants and name not in self.place:
            order = order or plain(self.rank(name))
            at = self.units(name)
            data = numbers(self.graph, name).transpose(order)
            return self.draft.constant(name, at.type, data, scale=(at.scale,), zero=at.zero)
        known = self.place[name]
        order = order or self.orders[name]
        if order not in known:
            have = self.orders[name]
            perm = relative(have, order)
            made = self.like(name, f"{name}.turned", order)
            known[order] = self.turn(known[have], made, moved(self.shape(name), have), perm)
        return known[order]

    def like(self, name: str, as_name: str, order: Order, shape: Sequence[int] | None = None, of: str | None = None) -> int:
        """A new tensor of the shape of value ``name`` (or ``shape``, in the file's order), in the units of ``of``."""
        shape = moved(self.shape(name), order) if shape is None else shape
        batched = self.batched(name) and order[0] == 0
        if self.graph.values[name].dtype == "int32":  # an index, which has no units
            return self.draft.tensor(as_name, "INT32", shape, batched=batched)
        at = self.units(of or name)
        return self.draft.tensor(as_name, at.type, shape, scale=(at.scale,), zero=at.zero, batched=batched)

    def result(self, node: Node, order: Order | None = None) -> int:
        """The tensor that an operator writes ``node``'s value to with axes in ``order``; its own order is made of it later."""
        own = self.orders[node.name]
        order = order or own
        made = self.like(node.name, node.name if order == own else f"{node.name}.raw", order)
        self.place.setdefault(node.name, {})[order] = made
        return made

    def settle(self, node: Node) -> None:
        """After ``node``'s operators: its value in its own order, by a transpose where it was written in another."""
        known, own = self.place[node.name], self.orders[node.name]
        if own not in known:
            have, made = next(iter(known.items()))
            turned = self.like(node.name, node.name, own)
            known[own] = self.turn(made, turned, moved(self.shape(node.name), have), relative(have, own))

    def alias(self, node: Node, tensor: int) -> None:
        """``node``'s value is a tensor that is there already."""
        self.place[node.name] = {self.orders[node.name]: tensor}

    def turn(self, x: int, made: int, shape: Sequence[int], perm: Order) -> int:
        if is_relabelling(shape, perm):
            return self.reshape(x, made)
        return self.draft.step("TRANSPOSE", 2, [x, self.ints("perm", perm)], made, "TransposeOptions")

    def reshape(self, x: int, made: int) -> int:
        entry = self.draft.tensors[made]
        shape = [-1 if entry.batched else entry.shape[0], *entry.shape[1:]] if entry.shape else []
        return self.draft.step("RESHAPE", 1, [x, self.ints("shape", shape)], made, "ReshapeOptions", newShape=shape)

    def cut(self, x: int, made: int, begin: Sequence[int], end: Sequence[int], strides: Sequence[int]) -> int:
        """STRIDED_SLICE forwards from ``begin`` to ``end``; an axis whose end is 0 is taken whole."""
        mask = sum(1 << i for i, n in enumerate(end) if n == 0)
        operands = [self.ints(word, values) for word, values in (("begin", begin), ("end", end), ("strides", strides))]
        return self.draft.step("STRIDED_SLICE", 2, [x, *operands], made, "StridedSliceOptions", beginMask=mask, endMask=mask)

    def ints(self, name: str, values: ArrayLike) -> int:
        """A small int32 constant, shared between all that need the same numbers."""
        data = np.asarray(values, np.int32)
        for i, entry in enumerate(self.draft.tensors):
            if entry.data is not None and entry.type == "INT32" and not entry.scale and np.array_equal(entry.data, data):
                return i
        return self.draft.constant(name, "INT32", data)

    def padded(self, name: str, x: int, pads: Sequence[Pad], as_name: str, code: int | None = None) -> int:
        """``x``, value ``name`` in the file's order, with ``pads`` of every axis around it, of ``code`` or the zero point."""
        if all(pad == (0, 0) for pad in pads):
            return x
        if min(min(pad) for pad in pads) < 0:
            raise PlanError("its padding is negative, which TFLite does not have")
        at, entry = self.units(name), self.draft.tensors[x]
        shape = [n + sum(pad) for n, pad in zip(entry.shape, pads)]
        made = self.draft.tensor(as_name, at.type, shape, scale=(at.scale,), zero=at.zero, batched=entry.batched)
        margins = self.ints("margins", np.array(pads))
        if code is None or code == at.zero:
            return self.draft.step("PAD", 2, [x, margins], made, "PadOptions")
        filler = self.draft.constant(f"{as_name}.code", at.type, np.array([code]), scale=(at.scale,), zero=at.zero)
        return self.draft.step("PADV2", 2, [x, margins, filler], made, "PadV2Options")


def act(t: Translation, node: Node) -> int:
    return {"NONE": 0, "RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}[t.units(node.name).act(node)]


def factor(node: Node) -> tuple[Any, Any]:
    return node.attrs["multiplier"], node.attrs["shift"]
