"""Windows: a graph taken apart into consecutive sub-graphs that can be run and tuned one by one; nothing is trained here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..data import Batch
from ..errors import InputError, PlanError
from ..graph import BATCH, Graph
from ..graph.module import Interpreter, bind_inputs
from ..network.layer import WEIGHTED

Kind = Literal["layer", "block", "model"]

#: Values by name: what stands at the border of a window, for some of the examples.
Values = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive nodes of a graph as a ``graph`` of their own. Its inputs are the values that it reads and does not make, its
    outputs those that it makes and others read, or that leave the network. ``trained`` are the constants that it is the first
    to read: a weight that several windows share belongs to the first."""

    graph: Graph
    trained: frozenset[str]

    @property
    def name(self) -> str:
        """The last value that it makes."""
        return self.graph.nodes[-1].name

    @property
    def weights(self) -> int:
        """How many weighted operations it holds."""
        return sum(node.op in WEIGHTED for node in self.graph.nodes)


def cuts(graph: Graph) -> list[str]:
    """The values through which everything passes: with one of them, the constants and the graph's inputs, the rest can be computed.

    >>> from roundel.graph import Node
    >>> graph = Graph(("x",), ("d",), (Node("relu", ("x",), ("a",)), Node("relu", ("a",), ("b",)), Node("add", ("a", "b"), ("c",)),
    ...                                Node("relu", ("c",), ("d",))))
    >>> cuts(graph)
    ['a', 'c', 'd']
    """
    return [next(iter(alive)) for _, alive in _alive(graph) if len(alive) == 1]


def _alive(graph: Graph) -> Iterator[tuple[int, set[str]]]:
    """After each node, by its number: the computed values that are still needed; outputs that were made are, to the end."""
    given = {"", *graph.inputs, *graph.constants}
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    alive: set[str] = set()
    for i, node in enumerate(graph.nodes):
        alive |= set(node.outputs) - given
        alive = {name for name in alive if last.get(name, -1) > i}
        yield i, alive


def windows(graph: Graph, kind: Kind = "block") -> list[Window]:
    """``graph`` as consecutive windows; each holds a weighted operation, where there is one at all, and run one after the other
    they are the graph.

    * layer: up to the next weighted operation, so a layer with what follows it (an addition, a norm, a pooling).
    * block: from one of the `cuts` to another, over at least two weighted operations, such as a residual block (BRECQ, Li et al.
      2021, arXiv 2102.05426); a skip over everything leaves one window.
    * model: all of it.

    >>> from torch import nn
    >>> from roundel import capture
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> [[node.op for node in window.graph] for window in windows(capture(net, (torch.ones(1, 4),)), "layer")]
    [['linear', 'relu'], ['linear', 'relu'], ['linear']]
    """
    if kind not in get_args(Kind):
        raise PlanError(f"window={kind!r}: there are {', '.join(get_args(Kind))}")
    nodes = graph.nodes
    heavy = [node.op in WEIGHTED for node in nodes]
    ends: list[int] = []  # each window is nodes[ends[i - 1] : ends[i]]
    start = 0
    for i, alive in _alive(graph):
        held, left = sum(heavy[start : i + 1]), sum(heavy[i + 1 :])
        if not left:
            break  # what is left holds no weight: it goes with the last window
        close = {"layer": held >= 1 and heavy[i + 1], "block": held >= 2 and len(alive) == 1, "model": False}[kind]
        if close:
            ends.append(i + 1)
            start = i + 1
    ends.append(len(nodes))
    seen: set[str] = set()
    found = []
    for begin, end in zip([0, *ends], ends, strict=False):
        part = _part(graph, begin, end)
        found.append(Window(part, frozenset(part.constants.keys() - seen)))
        seen |= part.constants.keys()
    return found


def _part(graph: Graph, begin: int, end: int) -> Graph:
    """Nodes ``begin`` to ``end`` as a graph, its inputs in the order in which they are first read."""
    nodes = graph.nodes[begin:end]
    made = {out for node in nodes for out in node.outputs}
    read = [name for node in nodes for name in node.inputs if name]
    inputs = [name for name in dict.fromkeys(read) if name not in made and name not in graph.constants]
    later = {name for node in graph.nodes[end:] for name in node.inputs} | set(graph.outputs)
    outputs = [out for node in nodes for out in node.outputs if out in later]
    # the constants are asked for by name: those of a packed graph are made when they are looked at
    constants = {name: graph.constants[name] for name in dict.fromkeys(read) if name in graph.constants}
    values = {name: spec for name, spec in graph.values.items() if name in made or name in inputs}
    return Graph(tuple(inputs), tuple(outputs), nodes, constants, values)


# -- values at the borders --------------------------------------------------------------------------------------------


def entries(graph: Graph, batches: Sequence[Batch]) -> list[Values]:
    """The network's inputs by name, one entry per batch. Raises `InputError` for batches that do not fit the graph."""
    if not batches:
        raise InputError("there are no examples to tune on: give at least one batch")
    return [dict(bind_inputs(graph, batch.args, dict(batch.named))) for batch in batches]


def advance(module: Interpreter, values: Sequence[Values], keep: set[str]) -> list[Values]:
    """``values`` after ``module``, a window, has run on each entry; only those named in ``keep`` stay.

    Memory is that of the values alive at one border, over all examples: 64 KiB per example for 16 x 32 x 32 float32.
    """
    out = []
    with torch.no_grad():
        for env in values:
            made = results(module, env)
            out.append({name: value for name, value in (env | made).items() if name in keep})
    return out


def results(module: Interpreter, env: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outputs of a window by name."""
    graph = module.structure
    made = module(*[env[name] for name in graph.inputs])
    return dict(zip(graph.outputs, made if isinstance(made, tuple) else (made,), strict=True))


def needed(parts: Sequence[Window], outputs: Sequence[str]) -> list[set[str]]:
    """For each window, the values that the windows after it read, and the network's outputs."""
    found = [set(outputs)]
    for part in reversed(parts[1:]):
        found.append(found[-1] | set(part.graph.inputs))
    return found[::-1]


def joined(graph: Graph, values: Sequence[Values]) -> list[Values]:
    """The entries as one where ``graph`` says that every value has its examples along its first axis, so that any of them make a
    batch; else as they are."""
    names = list(values[0])
    specs = [graph.values.get(name) for name in names]
    if not all(spec is not None and spec.shape[:1] == (BATCH,) for spec in specs):
        return list(values)
    return [{name: torch.cat([env[name] for env in values]) for name in names}]


__all__ = ["Kind", "Values", "Window", "advance", "cuts", "entries", "joined", "needed", "results", "windows"]
