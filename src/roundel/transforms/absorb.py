"""`absorb`: high biases moved into the next layer (Nagel et al. 2019, arXiv 1906.04721, 4.1.3), on graphs; it judges nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..calibrate import evaluating, list_of_batches, one_thread, run
from ..data import Batch
from ..graph import Graph, Node
from ..network.sweep import MATRIX
from ..network.watch import watching
from ..qmodel import Note
from .networks import Network, graph_of, like, module_of, proven

#: f(x - c) = f(x) - c where all channels of a value lose a constant; a mean of equals is the same.
_PASS = ("identity", "max_pool", "avg_pool", "mean")


def absorb(network: Network, data: Iterable[object], *, sigmas: float | None = None) -> tuple[Network, tuple[Note, ...]]:
    """An equal graph in which what a ReLU never cuts off lies nearer to zero.

    Channel j of a layer before a ReLU loses c_j of its bias, and every reader's bias gains W c: relu(z - c) + c = relu(z) where z
    >=
    c >= 0. c_j is the smallest number that ``data`` shows there, so that nothing changes on it; with ``sigmas`` it is the mean
    less so
    many standard deviations, the paper's 3, and whatever lies below is clipped. A reader that pads with zeros is left alone, for
    the
    padding would have to be -c. Ordinary modules come back as they are, with a note.

    >>> from roundel import capture, fuse
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
    >>> net[0].bias.data, net[2].bias.data = torch.tensor([100.0]), torch.tensor([0.0])
    >>> x = torch.zeros(4, 1)
    >>> low, notes = absorb(fuse(capture(net, x)), [x])
    >>> low.constants["0.bias"].tolist(), bool(low.constants["2.bias"] == 100 * low.constants["2.weight"])
    ([0.0], True)
    """
    graph = graph_of(network)
    if graph is None:
        return network, (Note("model", "no bias absorbed: that takes a graph, and this network is an ordinary module"),)
    items = list_of_batches(data)
    pairs = {node.name: readers for node in graph.nodes if (readers := _readers(graph, node))}
    if not pairs:
        return network, (Note("model", "bias absorption found no layer with a ReLU between it and all its readers"),)
    low, total, square = _seen(graph, set(pairs), items)
    constants, notes = dict(graph.constants), []
    for node in graph.nodes:
        if node.name not in pairs:
            continue
        count, mean = total[node.name][0], total[node.name][1] / total[node.name][0]
        deviation = (square[node.name] / count - mean.square()).clamp(min=0).sqrt()
        most = low[node.name] if sigmas is None else mean - sigmas * deviation
        c = most.clamp(min=0).float()
        if not bool((c > 0).any()):
            continue
        constants[node.inputs[2]] = constants[node.inputs[2]] - c
        for reader in pairs[node.name]:
            constants[reader.inputs[2]] = constants[reader.inputs[2]] + _gained(constants[reader.inputs[1]], reader, c)
        notes.append(Note(node.name, f"{int((c > 0).sum())} of {len(c)} biases absorbed, {float(c.max()):.3g} at most"))
    if not notes:
        return network, (Note("model", "no bias is high enough to absorb"),)
    new = like(network, replace(graph, constants=constants))
    return (new, tuple(notes)) if sigmas is not None else proven(network, new, items, notes, "bias absorption")


def _readers(graph: Graph, node: Node) -> list[Node]:
    """The layers that take up what ``node`` gives off; none where something else reads it."""
    consumers = graph.consumers()
    uses: dict[str, int] = {}
    for other in graph.nodes:
        for name in other.inputs:
            uses[name] = uses.get(name, 0) + 1
    own = lambda name: name in graph.constants and uses[name] == 1  # noqa: E731 - a tensor that no other layer shares
    if node.op not in MATRIX or len(node.inputs) < 3 or not own(node.inputs[2]) or node.attrs.get("act") not in ("relu", None):
        return []
    todo, found = [node.name], []
    cut = node.attrs.get("act") == "relu"
    if not cut:
        after = consumers.get(node.name, [])
        if len(after) != 1 or after[0].op not in ("relu", "leaky_relu", "prelu") or node.name in graph.outputs:
            return []
        todo = [after[0].name]
    while todo:
        name = todo.pop()
        if name in graph.outputs:
            return []
        for reader in consumers.get(name, []):
            padded = any(reader.attrs.get("padding", ()))
            flat = reader.op == "reshape" and graph.values.get(name) is not None and _flattens(graph, name, reader)
            if flat or (reader.op in _PASS and (not padded or reader.op == "max_pool") and not reader.attrs.get("act")):
                if reader.op == "mean" and {axis % len(graph.values[name].shape) for axis in reader.attrs["axes"]} & {0, 1}:
                    return []
                todo.append(reader.name)
            elif reader.op in MATRIX and reader.inputs[0] == name and len(reader.inputs) > 2 and not padded \
                    and reader.inputs[1] in graph.constants and own(reader.inputs[2]) and name not in reader.inputs[1:]:  # fmt: skip  # noqa: E501
                found.append(reader)
            else:
                return []
    return found


def _flattens(graph: Graph, name: str, node: Node) -> bool:
    """(N, C, 1, ...) to (N, C)."""
    before, after = graph.values[name].shape, graph.values.get(node.name)
    return after is not None and len(after.shape) == 2 and before[1] == after.shape[1] and all(n == 1 for n in before[2:])


def _gained(weight: Tensor, reader: Node, c: Tensor) -> Tensor:
    """W c, per output of the reader."""
    summed = weight.double().flatten(2).sum(2) if weight.ndim > 2 else weight.double()
    groups = reader.attrs.get("groups", 1)
    wide = c.double().reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return (summed * wide).sum(1).to(weight.dtype)


def _seen(graph: Graph, names: set[str], items: list[Batch]) -> tuple[dict[str, Tensor], dict[str, tuple[int, Tensor]], dict[str, Tensor]]:  # fmt: skip  # noqa: E501
    """Per layer, before its ReLU and per channel: the smallest number, (how many, their sum), the sum of their squares."""
    bare = tuple(
        Node(n.op, n.inputs, n.outputs, {k: v for k, v in n.attrs.items() if k != "act"}) if n.name in names else n
        for n in graph.nodes
    )
    low: dict[str, Tensor] = {}
    total: dict[str, tuple[int, Tensor]] = {}
    square: dict[str, Tensor] = {}
    watched = module_of(replace(graph, nodes=bare))
    acts = {n.name: n.attrs.get("act") for n in graph.nodes if n.name in names}
    linear = {n.name for n in graph.nodes if n.op == "linear"}

    def note(name: str, value: Tensor) -> None:
        if name in names:
            axis = value.ndim - 1 if name in linear else 1
            rows = value.detach().double().movedim(axis, 0).flatten(1)
            low[name] = torch.minimum(low.get(name, rows.amin(1)), rows.amin(1))
            count, sums = total.get(name, (0, torch.zeros(len(rows), dtype=torch.float64)))
            total[name] = count + rows.shape[1], sums + rows.sum(1)
            square[name] = square.get(name, torch.zeros(len(rows), dtype=torch.float64)) + rows.square().sum(1)
            if acts[name]:
                value.relu_()  # its readers are to see what the network gives them

    with one_thread(), torch.no_grad(), evaluating(watched), watching(watched, note):
        for batch in items:
            run(watched, batch)
    return low, total, square
