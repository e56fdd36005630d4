"""Where the codes of each value lie: an order of its axes in memory, chosen so that little moves; no addresses yet (`arena`).

A batch is one example: the symbolic axis has size 1. Windowed operations want their places before their channels (channels last);
everything else computes in whatever order its operand has. Transposes only rename axes, and so do reshapes that split or merge
axes that lie side by side; the others copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import PlanError
from ...graph import BATCH, Graph, Node, Spec

#: Operations that look at windows of places.
WINDOWED = ("conv", "conv_transpose", "avg_pool", "max_pool", "sum_pool", "resize")

#: Operations on rows that lie side by side, over the last axis.
LAST = ("linear", "norm")

#: Operations that leave out axes.
REDUCING = ("sum", "amax", "argmax")

#: Operations whose operands may all be constants in the place of values.
FLOWING = ("add", "sub", "mul", "concat", "matmul")

#: Operations that only say how memory is read.
RENAMING = ("reshape", "transpose", "expand_batch")


@dataclass(frozen=True)
class Place:
    """Codes of ``sizes``, ``order`` naming the axes from the slowest to the fastest in memory, in the buffer ``root``."""

    root: str
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def steps(self) -> tuple[int, ...]:
        """How far apart neighbours along each axis lie, in codes."""
        steps, step = [0] * len(self.sizes), 1
        for axis in reversed(self.order):
            steps[axis] = step
            step *= self.sizes[axis]
        return tuple(steps)

    def lies(self, order: Sequence[int]) -> bool:
        """Whether memory is also in ``order``: axes of size 1 lie anywhere."""
        return [a for a in self.order if self.sizes[a] > 1] == [a for a in order if self.sizes[a] > 1]


@dataclass(frozen=True)
class Step:
    """One kernel call: ``node``, or where it is None a copy of ``inputs[0]`` into another order."""

    node: Node | None
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Layout:
    """``places`` of every value, ``steps`` in order; ``inputs`` and ``outputs``: graph name -> the value of codes at the door."""

    places: dict[str, Place]
    steps: tuple[Step, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]

    @property
    def moved(self) -> int:
        """Codes that are copied only to lie differently."""
        return sum(self.places[step.output].count for step in self.steps if step.node is None)


def lay(graph: Graph) -> Layout:
    """The layout of an integer graph that copies least, over the orders that its inputs could come in.

    Raises `PlanError` where a size is not known.
    """
    doors = [node for node in graph if node.op == "quantize"]
    choices = [(False, True) if len(graph.values[door.name].shape) == 4 else (False,) for door in doors]
    best: Layout | None = None
    for choice in itertools.islice(itertools.product(*choices), 64):
        found = _Laying(graph, dict(zip((door.name for door in doors), choice))).run()
        if best is None or found.moved < best.moved:
            best = found
    assert best is not None  # a product of nothing is one empty choice
    return best


def sizes_of(name: str, spec: Spec) -> tuple[int, ...]:
    """The sizes of one example; `PlanError` for a symbol other than the batch."""
    if unknown := [size for size in spec.shape if isinstance(size, str) and size != BATCH]:
        raise PlanError(f"{name!r} has the size {unknown[0]!r}, which firmware must know")
    return tuple(1 if isinstance(size, str) else size for size in spec.shape)


def channels_last(rank: int) -> tuple[int, ...]:
    """Batch, places, channels."""
    return (0, *range(2, rank), 1)


class _Laying:
    """One pass over a graph, front to back."""

    def __init__(self, graph: Graph, last: dict[str, bool]) -> None:
        self.graph, self.last = graph, last
        self.places: dict[str, Place] = {}
        self.steps: list[Step] = []
        self.copies: dict[tuple[str, tuple[int, ...]], str] = {}

    def run(self) -> Layout:
        inputs, outputs = {}, {}
        quantized = {node.inputs[0] for node in self.graph if node.op == "quantize"}
        for name in self.graph.inputs:
            if name not in quantized:  # ids, which come as they are
                self.put(name, range(len(self.graph.values[name].shape)))
                inputs[name] = name
        for node in self.graph:
            if node.op == "quantize":
                rank = len(self.graph.values[node.name].shape)
                order = channels_last(rank) if self.last[node.name] else tuple(range(rank))
                self.put(node.name, order)
                inputs[node.inputs[0]] = node.name
            elif node.op == "dequantize":
                outputs[node.name] = node.inputs[0]
            elif node.op in RENAMING:
                self.rename(node)
            else:
                self.compute(node)
        return Layout(self.places, tuple(self.steps), inputs, outputs)

    def put(self, name: str, order: Sequence[int]) -> None:
        """A value in a buffer of its own."""
        spec = self.graph.values[name]
        self.places[name] = Place(name, sizes_of(name, spec), tuple(order), spec.dtype)

    def operand(self, name: str) -> Place:
        if name in self.graph.constants and name not in self.places:
            self.put(name, range(len(self.graph.values[name].shape)))
        return self.places[name]

    def ordered(self, name: str, order: Sequence[int]) -> str:
        """``name``, or a copy of it that lies in ``order``."""
        place = self.operand(name)
        if place.lies(order):
            self.places[name] = replace(place, order=tuple(order))
            return name
        if (key := (name, tuple(order))) not in self.copies:
            self.copies[key] = copy = f"{name}, axes {' '.join(map(str, order))}"
            self.places[copy] = replace(place, root=copy, order=tuple(order))
            self.steps.append(Step(None, (name,), copy))
        return self.copies[key]

    def rename(self, node: Node) -> None:
        source = node.inputs[0]
        sizes = sizes_of(node.name, self.graph.values[node.name])
        if node.op == "transpose":
            perm = [axis % len(sizes) for axis in node.attrs["perm"]]
            order: list[int] | None = [perm.index(axis) for axis in self.operand(source).order]
        elif node.op == "expand_batch":  # one example needs one copy
            order = list(self.operand(source).order)
        else:
            order = regrouped(self.operand(source), sizes)
            if order is None:
                source = self.ordered(source, range(len(self.places[source].sizes)))
                order = list(range(len(sizes)))
        place = self.places[source]
        self.places[node.name] = Place(place.root, sizes, tuple(order or ()), place.dtype)

    def compute(self, node: Node) -> None:
        inputs = [name for name in node.inputs if self.is_value(node, name)]
        rank = len(self.graph.values[node.name].shape)
        if node.op in WINDOWED:
            order = channels_last(rank)
            inputs = [self.ordered(name, order) for name in inputs]
        elif node.op in LAST:
            own = [axis for axis in self.operand(inputs[0]).order if axis != rank - 1]
            inputs, order = [self.ordered(inputs[0], [*own, rank - 1])], (*own, rank - 1)
        elif node.op in ("matmul", "attention"):
            order = self.common(inputs[:1], rank)
        elif node.op == "embedding":
            order = (*self.operand(inputs[0]).order, rank - 1)
        elif node.op in REDUCING:
            order = self.left_by(node, inputs[0], rank)
        elif node.op == "expand" and len(self.operand(inputs[0]).sizes) != rank:
            order = tuple(range(rank))
        else:
            order = self.common(inputs, rank)
        self.put(node.name, order)
        self.steps.append(Step(node, tuple(inputs), node.name))

    def is_value(self, node: Node, name: str) -> bool:
        """Whether an operand is a value that flows, or a constant in the place of one, rather than a parameter of the operation."""
        return name not in self.graph.constants or node.op in FLOWING or (node.op == "embedding" and name == node.inputs[0])

    def common(self, inputs: Sequence[str], rank: int) -> tuple[int, ...]:
        """The order of the largest operand of that rank; its own where there is none."""
        flows = [place for place in map(self.operand, inputs) if len(place.sizes) == rank]
        return max(flows, key=lambda place: place.count).order if flows else tuple(range(rank))

    def left_by(self, node: Node, name: str, rank: int) -> tuple[int, ...]:
        """The order that is left when axes are summed away."""
        place = self.operand(name)
        axes = node.attrs["axes"] if "axes" in node.attrs else [node.attrs["axis"]]
        gone = {axis % len(place.sizes) for axis in axes}
        if node.attrs["keepdim"]:
            return place.order
        kept = [axis for axis in range(len(place.sizes)) if axis not in gone]
        return tuple(kept.index(axis) for axis in place.order if axis in kept)


def regrouped(place: Place, sizes: Sequence[int]) -> list[int] | None:
    """The order of the same memory under new ``sizes``; None where a reshape has to move codes.

    Sizes fall into the smallest groups of equal products; a group stays where it is if its axes lie side by side.

    >>> regrouped(Place("x", (1, 6, 4), (0, 2, 1), "int8"), (1, 3, 2, 4))
    [0, 3, 1, 2]
    """
    before = [axis for axis, size in enumerate(place.sizes) if size != 1]
    after = [axis for axis, size in enumerate(sizes) if size != 1]
    order = [axis for axis in place.order if place.sizes[axis] != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while before and after:
        one, two = [before.pop(0)], [after.pop(0)]
        while (a := math.prod(place.sizes[i] for i in one)) != (b := math.prod(sizes[i] for i in two)):
            (one if a < b else two).append((before if a < b else after).pop(0))
        groups.append((one, two))
    out: list[int] = [axis for axis, size in enumerate(sizes) if size == 1]
    for one, two in sorted(groups, key=lambda pair: order.index(pair[0][0])):
        at = order.index(one[0])
        if order[at : at + len(one)] != one:
            return None
        out += two
    return out
