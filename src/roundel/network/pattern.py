"""Patterns over graph values, written as formulas (``x * sigmoid(x)``), and the search for them; it rewrites nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import torch

from ..graph import Graph, Node

#: Letter -> value name.
Binding = dict[str, str]
Check = Callable[["View", Node], bool]


class View:
    """A graph with the questions that matching asks of it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.maker = graph.producers()
        self.readers = graph.consumers()

    @cached_property
    def names(self) -> set[str]:
        return {*self.graph.inputs, *self.graph.constants, *self.maker}

    def constant(self, name: str) -> torch.Tensor | None:
        return self.graph.constants.get(name)

    def number(self, name: str) -> float | None:
        """The value of a constant that holds one number."""
        tensor = self.constant(name)
        return tensor.item() if tensor is not None and tensor.numel() == 1 else None

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        tensor, spec = self.constant(name), self.graph.values.get(name)
        return tuple(tensor.shape) if tensor is not None else spec.shape if spec else None

    def floating(self, name: str) -> bool:
        """Known to hold floating point numbers."""
        tensor, spec = self.constant(name), self.graph.values.get(name)
        return tensor.is_floating_point() if tensor is not None else bool(spec and getattr(torch, spec.dtype).is_floating_point)

    def fresh(self, name: str, tensor: torch.Tensor | None = None) -> str:
        """``name``, or the first of ``name_1``, ``name_2``, ... that is free or already holds this very tensor."""
        free, n = name, 0
        while free in self.names and not (
            tensor is not None and free in self.graph.constants and _same(self.graph.constants[free], tensor)
        ):
            n += 1
            free = f"{name}_{n}"
        return free

    def only_read_by(self, name: str, nodes: set[str]) -> bool:
        return name not in self.graph.outputs and all(reader.name in nodes for reader in self.readers.get(name, []))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


class Pattern:
    """A formula; ``|`` separates alternatives, numbers stand for constants of that value."""

    def match(self, view: View, name: str, bound: Binding) -> Iterator[Binding]:
        """Every way to bind the letters so that the value ``name`` is this formula."""
        raise NotImplementedError

    def __add__(self, other: Formula) -> Pattern:
        return Op("add", (self, _formula(other)))

    def __sub__(self, other: Formula) -> Pattern:
        return Op("sub", (self, _formula(other)))

    def __mul__(self, other: Formula) -> Pattern:
        return Op("mul", (self, _formula(other)))

    def __truediv__(self, other: Formula) -> Pattern:
        return Op("div", (self, _formula(other)))

    def __or__(self, other: Pattern) -> Pattern:
        return Either(self, other)


Formula = Pattern | float


def _formula(x: Formula) -> Pattern:
    return x if isinstance(x, Pattern) else Number(x)


@dataclass(frozen=True)
class Letter(Pattern):
    """Any value, the same wherever the letter stands; ``of`` says what it must be."""

    name: str
    of: Pattern | None = None

    def match(self, view: View, name: str, bound: Binding) -> Iterator[Binding]:
        if self.name in bound:
            if bound[self.name] == name:
                yield bound
        elif self.of is None:
            yield {**bound, self.name: name}
        else:
            yield from self.of.match(view, name, {**bound, self.name: name})


@dataclass(frozen=True)
class Constant(Pattern):
    """Any constant, or with ``single`` any that holds one number."""

    name: str
    single: bool = False

    def match(self, view: View, name: str, bound: Binding) -> Iterator[Binding]:
        found = view.constant(name)
        if found is not None and bound.get(self.name, name) == name and (found.numel() == 1 or not self.single):
            yield {**bound, self.name: name}


@dataclass(frozen=True)
class Number(Pattern):
    """A constant of this value, to the four digits that exporters agree on."""

    value: float

    def match(self, view: View, name: str, bound: Binding) -> Iterator[Binding]:
        found = view.number(name)
        if found is not None and math.isclose(found, self.value, rel_tol=1e-4):
            yield bound


@dataclass(frozen=True)
class Either(Pattern):
    """One formula or the other, tried in this order."""

    one: Pattern
    other: Pattern

    def match(self, view: View, name: str, bound: Binding) -> Iterator[Binding]:
        yield from self.one.match(view, name, bound)
        yield from self.other.match(view, name, bound)


@dataclass(frozen=True)
class Op(Pattern):
    """The result of one operation; add, mul, maximum and minimum take their operands in any order."""

    op: str
    args: tuple[Pattern, ...]
    check: Check | None = None
    act: str | None = None

    def match(self, view: View, name: str, bound: Binding) -> Iterator[Binding]:
        node = view.maker.get(name)
        if node is None or node.op != self.op or len(node.inputs) != len(self.args) or node.attrs.get("act") != self.act:
            return
        if self.check is not None and not self.check(view, node):
            return
        either_way = self.op in ("add", "mul", "maximum", "minimum")
        for operands in permutations(node.inputs) if either_way else [node.inputs]:
            yield from self._operands(view, operands, bound)

    def _operands(self, view: View, names: tuple[str, ...], bound: Binding, at: int = 0) -> Iterator[Binding]:
        if at == len(self.args):
            yield bound
            return
        for found in self.args[at].match(view, names[at], bound):
            yield from self._operands(view, names, found, at + 1)


def op(name: str, *args: Formula, check: Check | None = None, act: str | None = None) -> Pattern:
    """``op("tanh", x)``: the operation on these operands."""
    return Op(name, tuple(map(_formula, args)), check, act)


def product(a: Formula, b: Formula, c: Formula) -> Pattern:
    """a b c, multiplied in any order."""
    a, b, c = _formula(a), _formula(b), _formula(c)
    return (a * b) * c | (a * c) * b | (b * c) * a
