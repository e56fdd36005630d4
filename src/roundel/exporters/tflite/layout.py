"""Which values lie channels-last in the file, and what reshapes and transposes become there; it writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...graph import Graph

#: Axes of a graph's value in the order that the file keeps them in.
Order = tuple[int, ...]

#: Operations over places: TFLite has them on N, H, W, C alone.
PLACES = frozenset(["conv", "conv_transpose", "sum_pool", "avg_pool", "max_pool", "resize", "depth_to_space"])

#: Operations whose axes need not be in any order: their operands and result keep to one.
_ANY = frozenset(["add", "sub", "mul", "rescale", "table", "pad", "slice", "concat", "gather"])


def channels_last(rank: int) -> Order:
    """Where axis 1 holds the channels: (0, 2, 3, 1)."""
    return (0, *range(2, rank), 1)


def plain(rank: int) -> Order:
    return tuple(range(rank))


def orders(graph: Graph) -> dict[str, Order]:
    """The order of every input and computed value of an integer graph.

    Values that a convolution or a pool reads or makes are channels-last, and so is what elementwise operations tie to them;
    all others are as they are in the graph. So transposes are needed only where the graph itself changes its meaning.
    """
    rank = {name: len(graph.values[name].shape) for name in (*graph.inputs, *(name for node in graph for name in node.outputs))}
    parent = {name: name for name in rank}

    def find(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    pinned = set()
    for node in graph:
        tied = [name for name in node.inputs if name in rank and rank[name] == rank[node.name]]
        if node.op in PLACES:
            pinned |= {node.name, *tied}
        elif node.op in _ANY or (node.op == "sum" and node.attrs["keepdim"]):
            for name in tied:
                parent[find(name)] = find(node.name)
    last = {find(name) for name in pinned}
    return {name: channels_last(n) if find(name) in last and n > 2 else plain(n) for name, n in rank.items()}


def moved(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    """A shape with its axes in ``order``."""
    return tuple(shape[axis] for axis in order)


def relative(have: Order, want: Order) -> Order:
    """The permutation that takes a value kept in ``have`` to ``want``."""
    return tuple(have.index(axis) for axis in want)


def is_relabelling(shape: Sequence[int], perm: Order) -> bool:
    """True where transposing by ``perm`` leaves the elements in their places: only sizes of 1 change theirs."""
    kept = [axis for axis in perm if shape[axis] != 1]
    return kept == sorted(kept)


def same_elements(source: Sequence[int], have: Order, target: Sequence[int], want: Order) -> bool:
    """True where a graph's reshape from ``source`` to ``target`` is one in the file too, kept in ``have`` and ``want``."""
    if is_relabelling(source, have) and is_relabelling(target, want):
        return True
    flat = np.arange(math.prod(source))
    return bool((flat.reshape(source).transpose(have).reshape(-1) == flat.reshape(target).transpose(want).reshape(-1)).all())


def sized(graph: Graph, name: str) -> tuple[int, ...]:
    """The shape of a value for a batch of one."""
    return tuple(1 if isinstance(n, str) else n for n in graph.values[name].shape)
