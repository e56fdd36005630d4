"""`Builder`: grows a graph node by node and knows every shape at once, by running each operation on shape-only tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .graph import BATCH, Graph, Node, Spec
from .ops import OPS

#: The size that stands for the symbolic batch while shapes are worked out: a prime that no real dimension has.
PROBE = 1_000_003
#: No value of a graph may have more elements than this per example.
LARGEST = 2**31


class Builder:
    """Nodes and constants in the making. A shape is a tuple of sizes in which `PROBE` stands for the batch."""

    def __init__(self, graph: Graph | None = None) -> None:
        """Empty, or with the inputs and constants of ``graph``, whose inputs must have a `Spec`."""
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.makers: dict[str, Node] = {}
        self.meta: dict[str, Tensor | None] = {"": None}
        if graph is not None:
            for name in graph.inputs:
                if name not in graph.values:
                    raise InputError(f"the shape of the graph's input {name!r} must be known here")
                spec = graph.values[name]
                self.input(name, [PROBE if size == BATCH else size for size in spec.shape], spec.dtype)
            for name, tensor in graph.constants.items():
                self.constant(name, tensor)

    def input(self, name: str, shape: Sequence[int | str], dtype: str = "float32") -> str:
        self.meta[name] = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")  # type: ignore[arg-type]
        return name

    def constant(self, name: str, tensor: Tensor) -> str:
        self.constants[name] = tensor
        self.meta[name] = tensor.to("meta")
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._known(name).shape)

    def dtype(self, name: str) -> str:
        return str(self._known(name).dtype).removeprefix("torch.")

    def _known(self, name: str) -> Tensor:
        tensor = self.meta[name]
        assert tensor is not None
        return tensor

    def unique(self, name: str) -> str:
        """``name``, or the first of ``name_2``, ``name_3``, ... that is free."""
        free, n = name, 2
        while free in self.meta:
            free, n = f"{name}_{n}", n + 1
        return free

    def emit(self, op: str, inputs: Sequence[str], name: str | Sequence[str], attrs: Mapping[str, Any] | None = None) -> str:
        """Add one node; returns its first output. Raises `InputError` where the operation cannot take these shapes."""
        names = (name,) if isinstance(name, str) else tuple(name)
        attrs = dict(attrs or {})
        try:
            made = OPS[op](*[self.meta[i] for i in inputs], **attrs)
        except (RuntimeError, IndexError, ValueError, TypeError, OverflowError, ZeroDivisionError, AssertionError) as err:
            shapes = [list(self.shape(i)) if i else None for i in inputs]
            raise InputError(f"{names[0]!r} ({op}) cannot take operands of shapes {shapes}: {str(err).splitlines()[0]}") from err
        made = made if isinstance(made, tuple) else (made,)
        if len(made) != len(names):
            raise InputError(f"{names[0]!r} ({op}) makes {len(made)} values; {len(names)} are named")
        node = Node(op, tuple(inputs), names, attrs)
        for out, value in zip(names, made, strict=True):
            if out in self.meta:
                raise InputError(f"{out!r} is made twice in the graph")
            if prod(size if size % PROBE else size // PROBE for size in value.shape) > LARGEST:
                raise InputError(f"{out!r} ({op}) would have shape {list(value.shape)}: more than {LARGEST} elements")
            self.meta[out], self.makers[out] = value, node
        self.nodes.append(node)
        return names[0]

    def reshape(self, source: str, shape: Sequence[int], name: str) -> str:
        """``source`` in another shape, through earlier reshapes and without a node where nothing changes."""
        tries = [source]
        while (maker := self.makers.get(tries[-1])) and maker.op == "reshape":
            tries.append(maker.inputs[0])
        for origin in reversed(tries):
            if self.shape(origin) == tuple(shape):
                return origin
            if (target := _target(self.shape(origin), shape)).count(-1) <= 1:
                return self.emit("reshape", [origin], name, {"shape": target})
        raise InputError(f"{name!r}: a reshape to {list(shape)} would need two unknown sizes")

    def graph(self, inputs: Sequence[str], outputs: Sequence[str], notes: Iterable[str] = ()) -> Graph:
        """The finished graph, dead nodes dropped, with the `Spec` of every value whose batch is not mixed with other sizes."""
        live, kept = set(outputs), []
        for node in reversed(self.nodes):
            if live.intersection(node.outputs):
                kept.append(node)
                live.update(node.inputs)
        names = [*inputs, *(out for node in reversed(kept) for out in node.outputs)]
        values = {
            name: Spec(tuple(BATCH if size == PROBE else size for size in self.shape(name)), self.dtype(name))
            for name in names
            if all(size == PROBE or size % PROBE or not size for size in self.shape(name))
        }
        constants = {k: v for k, v in self.constants.items() if k in live}
        return Graph(tuple(inputs), tuple(outputs), tuple(reversed(kept)), constants, values, tuple(notes))


def _target(have: Sequence[int], want: Sequence[int]) -> list[int]:
    """The ``shape`` attribute of a reshape: 0 keeps the batch at its place, -1 stands for any other size made with it."""

    def size(i: int) -> int:
        if want[i] % PROBE or not want[i]:
            return want[i]
        return 0 if i < len(have) and have[i] == want[i] else -1

    return [size(i) for i in range(len(want))]


def with_values(graph: Graph) -> Graph:
    """``graph`` with the `Spec` of every value that one can be given; its inputs must have theirs."""
    builder = Builder(graph)
    for node in graph:
        builder.emit(node.op, node.inputs, node.outputs, node.attrs)
    return builder.graph(graph.inputs, graph.outputs, graph.notes)
