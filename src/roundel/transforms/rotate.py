"""`rotate`: block-Hadamard rotations (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456), which spread outliers over a block of
channels;
folded into the residual stream of a module, or put as an operation before the linear layers of a graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import evaluating, list_of_batches, one_thread
from ..data import Batch
from ..errors import PlanError
from ..graph import Graph, Node
from ..network.walk import Leaf, leaves, member
from ..qmodel import Note
from .networks import Network, few, graph_of, like, proven
from .probe import TOLERANCE, apart, probe_channels, run_once, stored


def hadamard(size: int, block: int | None = None) -> Tensor:
    """An orthogonal (size, size) float64 matrix: equal Hadamard blocks on its diagonal, Sylvester's, over the root of their size.

    A block is the largest power of two that divides ``size``, and at most ``block``. Raises `PlanError` for a ``block`` that is no
    power of two.

    >>> (hadamard(2) * 2**0.5).round().tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    >>> [int((hadamard(size, 16)[0] != 0).sum()) for size in (64, 172, 7)]
    [16, 4, 1]
    """
    if block is not None and (block < 1 or block & (block - 1)):
        raise PlanError(f"a Hadamard block is a power of two, such as 64 or 128; got {block}")
    side = size & -size if block is None else min(size & -size, block)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < side:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return torch.block_diag(*[matrix] * (size // side))


def insert_rotations(graph: Graph, layers: Iterable[str] | None = None, block: int = 128) -> tuple[Graph, tuple[Note, ...]]:
    """An equal graph in which the inputs of linear ``layers`` (all by default) are rotated by an operation of its own.

    That operation is a linear layer ``NAME.rotation`` with a matrix of Hadamard blocks, shared by layers that read one value; it
    costs in x in multiplications per row, as much as a square layer, for there is no faster operation in a graph. Layers whose
    inputs have an odd
    size stay. A plan should leave the rotation's weight at 8 bits or float.

    >>> from roundel import capture, fuse
    >>> graph, _ = insert_rotations(fuse(capture(nn.Linear(8, 4), torch.zeros(1, 8))))
    >>> [(node.op, list(graph.constants[node.inputs[1]].shape)) for node in graph]
    [('linear', [8, 8]), ('linear', [4, 8])]
    """
    known = {node.name for node in graph.nodes if node.op == "linear" and node.inputs[1] in graph.constants}
    wanted = known if layers is None else set(layers)
    if odd := sorted(wanted - known):
        near = ", ".join(sorted(known)[:6])
        raise PlanError(f"{odd[0]!r} is no linear layer with a stored weight; there are {near}")
    uses: dict[str, set[str]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            uses.setdefault(name, set()).add(node.name)
    constants, nodes, notes = dict(graph.constants), [], []
    values, turned = dict(graph.values), dict[str, str]()
    for node in graph.nodes:
        weight = graph.constants.get((*node.inputs, "", "")[1])
        ok = node.name in wanted and weight is not None and weight.shape[1] % 2 == 0
        if not ok or weight is None or len(uses[node.inputs[1]]) > 1:
            nodes.append(node)
            if node.name in wanted:
                notes.append(Note(node.name, "not rotated: its inputs are an odd number, or another layer has the same weight"))
            continue
        x, matrix = node.inputs[0], hadamard(weight.shape[1], block)
        if x not in turned:
            turned[x] = f"{node.name}.rotation"
            constants[f"{turned[x]}.weight"] = matrix.to(weight.dtype)
            nodes.append(Node("linear", (x, f"{turned[x]}.weight"), (turned[x],)))
            if x in values:
                values[turned[x]] = values[x]
            notes.append(Note(node.name, f"its input is rotated at {weight.shape[1] ** 2:,} multiplications per row"))
        constants[node.inputs[1]] = (weight.detach().double() @ matrix.T).to(weight.dtype)
        nodes.append(Node(node.op, (turned[x], *node.inputs[1:]), node.outputs, node.attrs))
    return replace(graph, nodes=tuple(nodes), constants=constants, values=values), tuple(notes)


def rotate(network: Network, data: Iterable[object], *, block: int | None = None) -> tuple[Network, tuple[Note, ...]]:
    """An equal network whose residual stream is rotated, with no operation more.

    On an ordinary module with RMS norms: the norms' gains go into the layers that read them; what reads a norm, and what is as
    wide as
    the stream and reads none, writes to it (embeddings too). The stream's basis is turned by blocks of Hadamard matrices. All of
    this
    is a guess from shapes and a probe of who reads which norm; it stays only if the outputs on ``data`` are what they were, else
    the
    network comes back as it is, with a note. A tied head is untied, for its embedding then is another matrix, and the note says so.

    A graph gets the rotation as an operation before every linear layer (`insert_rotations`), which costs time.
    """
    items = list_of_batches(data)
    graph = graph_of(network)
    if graph is not None:
        turned, notes = insert_rotations(graph, block=block or 128)
        return proven(network, like(network, turned), items, notes, "rotation")
    assert isinstance(network, nn.Module)
    shared = len(leaves(network)) - len({one.weight.data_ptr() for one in leaves(network).values()})
    new: Any = _untied(copy.deepcopy(network))
    with one_thread(), torch.no_grad(), evaluating(new):
        told = _turn(new, items, block)
    if isinstance(told, str):
        return network, (Note("model", f"not rotated: {told}"),)
    if shared:
        told.append(Note("model", f"{shared} tied weights are now tensors of their own, for a rotated network needs them apart"))
    return proven(network, new, items, told, "rotation")


def _untied(module: nn.Module) -> nn.Module:
    """Every weighted leaf with a weight of its own."""
    seen: set[int] = set()
    for name in leaves(module):
        child = module.get_submodule(name)
        if isinstance(child.weight, nn.Parameter):
            if child.weight.data_ptr() in seen:
                child.weight = nn.Parameter(child.weight.detach().clone())
            seen.add(child.weight.data_ptr())
    config: Any = getattr(module, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return module


def _turn(module: nn.Module, items: Sequence[Batch], block: int | None) -> str | list[Note]:
    """Turn the stream in place; a sentence where there is none to turn."""
    batch, tensors, found = few(items), stored(module), leaves(module)
    channels, _ = probe_channels(module, batch)
    norms = {p.layer: p for p in channels.made if tensors[p.name].ndim == 1 and p.layer not in found}
    sizes = {tensors[p.name].numel() for p in norms.values()}
    if len(sizes) != 1:
        return "no norm is read by linear layers alone" if not sizes else f"its norms have several sizes, {sorted(sizes)}"
    size = sizes.pop()
    if any(member(layer, "bias") in tensors for layer in norms):
        return "its norms take a mean away (they have a bias), which a rotation does not leave alone"
    first = {layer: int(p.index.min()) for layer, p in norms.items()}
    readers = {r.layer: layer for r in channels.readers for layer, at in first.items() if at <= int(r.classes.min()) < at + size}
    writers = {name: one for name, one in found.items() if name not in readers and one.weight.shape[_side(one)] == size}
    if any(one.op not in ("linear", "embedding") for one in writers.values()):
        return "a convolution is as wide as the stream"
    matrix = hadamard(size, block)
    gains = {layer: tensors[member(layer, "weight")].double().clone() for layer in norms}
    before, _ = run_once(module, batch, {})
    for name, layer in readers.items():
        weight = found[name].weight
        weight.copy_((weight.double() * gains[layer]) @ matrix.T)
    for layer in norms:
        tensors[member(layer, "weight")].fill_(1.0)
    for one in writers.values():
        weight = one.weight
        weight.copy_(weight.double() @ matrix.T if one.op == "embedding" else matrix @ weight.double())
        if one.bias is not None:
            one.bias.copy_(matrix @ one.bias.double())
    after, _ = run_once(module, batch, {})
    far = apart(before, after)
    if far > TOLERANCE:
        return f"the outputs would differ by {far:.2g} of the largest"
    return [
        Note("model", f"a residual stream of {size} channels is rotated: {len(writers)} layers write it, {len(readers)} read it")
    ]


def _side(one: Leaf) -> int:
    """The axis of a weight along which it writes to the stream."""
    return 1 if one.op == "embedding" else 0
