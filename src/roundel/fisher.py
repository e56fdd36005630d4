"""Hessians of layers, also weighted by how much the end loss depends on each place; nothing is solved here.

The guided Hessian of a layer is X^T diag(s) X, s_i being the mean over outputs j of (dL/dY_ij)^2 (Kim et al. 2025,
"GuidedQuant"). L is the loss on labels drawn from the network's own answers: that gives the Fisher information, without labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import evaluating, one_thread
from .data import Batch
from .errors import InputError
from .evaluate.scores import Scores
from .graph import Graph, GraphModule, Node
from .network.sweep import MATRIX, columns, second_moment
from .network.walk import leaves, member
from .network.watch import first_tensor, watching

#: Gradients are this much larger than they are, so that their squares stay clear of float32's smallest numbers.
SCALE = 1e3


def hessians(module: nn.Module, batches: Sequence[Batch], only: Container[str] | None = None, guided: bool = False,
             seed: int = 0, end: float | None = None) -> dict[str, Tensor]:  # fmt: skip
    """Second moments (groups, columns, columns) of the inputs of convolutions and linear layers, by name of the weight, float64.

    ``guided`` weighs each place by how much the end loss depends on the layer's outputs there, which takes one backward pass a
    batch; ``seed`` draws the labels. A graph's layers go by its nodes, those of any other network by its leaf modules; ``only``
    names the weights wanted; after ``end`` on the monotonic clock no further batch is begun. The same bytes whatever the number of
    threads. Raises `InputError` where a network gives no gradient.

    >>> net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3)
    >>> {name: list(h.shape) for name, h in hessians(net, [Batch((x,))], guided=True).items()}
    {'0.weight': [1, 3, 3], '2.weight': [1, 4, 4]}
    """
    found = _layers(module)
    if isinstance(module, GraphModule):
        module = GraphModule(_bare(module.graph)).eval()
    wanted = {name: one for name, one in found.items() if only is None or one.weight in only}
    takes, gives = _sites(wanted)
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    with one_thread(), evaluating(module), torch.set_grad_enabled(guided):
        for batch in batches:
            inputs: dict[str, list[Tensor]] = {}
            outputs: dict[str, list[Tensor]] = {}

            def see(site: str, value: Tensor, inputs: dict[str, list[Tensor]] = inputs,
                    outputs: dict[str, list[Tensor]] = outputs) -> None:  # fmt: skip
                for name in takes.get(site, ()):
                    inputs.setdefault(name, []).append(value.detach())
                for name in gives.get(site, ()):
                    outputs.setdefault(name, []).append(value)

            with watching(module, see):
                answer = module(*batch.args, **batch.named)
            slopes = _slopes(batch, answer, outputs, generator) if guided else {}
            for name, one in wanted.items():
                for i, x in enumerate(inputs.get(name, [])):
                    rows = columns(one.op, one.attrs, x, one.shape)
                    moment = second_moment(rows, _importance(one, slopes[name][i], rows) if guided else None)
                    sums[one.weight] = sums[one.weight] + moment if one.weight in sums else moment
            if end is not None and time.monotonic() > end:
                break
    return sums


def backward_bytes(module: nn.Module, batches: Sequence[Batch], only: Container[str] | None = None) -> int:
    """How many bytes guided `hessians` take at most, beside the network: what a forward pass over the longest batch keeps for the
    way back, the gradients there, and the Hessians. Nothing is kept to find out.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> backward_bytes(net, [Batch((torch.randn(8, 3),))]) == 4 * 8 * (3 + 4 + 4) + 4 * 8 * (4 + 2) + 8 * (3 * 3 + 4 * 4)
    True
    """
    wanted = {name: one for name, one in _layers(module).items() if only is None or one.weight in only}
    _, gives = _sites(wanted)
    weights = {p.data_ptr() for p in module.parameters()}
    total = 0

    def keep(value: Tensor) -> None:
        nonlocal total
        total += value.numel() * value.element_size() * (value.data_ptr() not in weights)

    def see(site: str, value: Tensor) -> None:
        if site in gives:
            keep(value)

    longest = max(batches, key=lambda batch: next(iter([*batch.args, *batch.named.values()])).numel())
    with evaluating(module), torch.enable_grad(), watching(module, see), torch.autograd.graph.saved_tensors_hooks(keep, _never):
        module(*longest.args, **longest.named)
    for one in wanted.values():
        cols = math.prod(one.shape[1:])
        total += 8 * cols * cols * int(one.attrs.get("groups", 1))
    return total


def _never(_: None) -> Tensor:
    raise RuntimeError("this pass keeps nothing to go back with")


@dataclass(frozen=True)
class _Layer:
    """A weighted layer, with the sites that `watching` reports of what it takes and gives."""

    op: str
    attrs: Mapping[str, Any]
    weight: str
    shape: tuple[int, ...]
    takes: str
    gives: str


def _layers(module: nn.Module) -> dict[str, _Layer]:
    if isinstance(module, GraphModule):
        constants = module.structure.constants
        return {
            node.name: _Layer(node.op, node.attrs, node.inputs[1], tuple(constants[node.inputs[1]].shape), node.inputs[0],
                              _before_act(node))
            for node in module.structure.nodes if node.op in MATRIX and node.inputs[1] in constants
        }  # fmt: skip
    return {
        name: _Layer(one.op, one.attrs, member(name, "weight"), tuple(one.weight.shape),
                     member(name, "input"), member(name, "output"))
        for name, one in leaves(module).items() if one.op in MATRIX
    }  # fmt: skip


def _sites(layers: dict[str, _Layer]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Site -> the layers that take it, and those that give it."""
    takes: dict[str, list[str]] = {}
    gives: dict[str, list[str]] = {}
    for name, one in layers.items():
        takes.setdefault(one.takes, []).append(name)
        gives.setdefault(one.gives, []).append(name)
    return takes, gives


def _before_act(node: Node) -> str:
    return f"{node.outputs[0]}.bare" if node.attrs.get("act") else node.outputs[0]


def _bare(graph: Graph) -> Graph:
    """The same network with the activation functions of layers as nodes of their own, so that what is before them shows."""
    nodes: list[Node] = []
    for node in graph.nodes:
        act = node.attrs.get("act") if node.op in MATRIX else None
        if not act:
            nodes.append(node)
            continue
        attrs = {key: value for key, value in node.attrs.items() if key != "act"}
        nodes += [Node(node.op, node.inputs, (_before_act(node),), attrs), Node(act, (_before_act(node),), node.outputs, {})]
    return replace(graph, nodes=tuple(nodes))


def _slopes(batch: Batch, answer: Any, outputs: dict[str, list[Tensor]], generator: torch.Generator) -> dict[str, list[Tensor]]:
    """Gradients of the loss on drawn labels at the layers' outputs, `SCALE` times as large."""
    flat = [value for values in outputs.values() for value in values]
    if not flat or not all(value.requires_grad for value in flat):
        raise InputError("guided Hessians need gradients, and this network computes without: its parameters must require them")
    found = torch.autograd.grad(SCALE * _loss(batch, answer, generator), flat, allow_unused=True)
    slopes = iter(torch.zeros_like(value) if slope is None else slope for value, slope in zip(flat, found, strict=True))
    return {name: [next(slopes) for _ in values] for name, values in outputs.items()}


def _loss(batch: Batch, answer: Any, generator: torch.Generator) -> Tensor:
    """Minus log-likelihood, summed, of labels drawn from the answer: classes or tokens, else a unit normal around each number."""
    kind = Scores.like(Batch(batch.args, batch.named), answer, None).kind
    y = getattr(answer, "logits", None)
    y = y if isinstance(y, Tensor) else getattr(answer, "last_hidden_state", None)
    y = y if isinstance(y, Tensor) else first_tensor(answer)
    assert y is not None
    mask = batch.named.get("attention_mask")
    if mask is not None and y.ndim == 3 and mask.shape == y.shape[:2]:
        y = y[mask.bool()]
    if kind == "values":
        return (y * torch.randn(y.shape, generator=generator)).sum()
    rows = y.reshape(-1, y.shape[-1]).float()
    labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(rows, labels, reduction="sum")


def _importance(one: _Layer, slope: Tensor, rows: Tensor) -> Tensor:
    """s (groups, n): the mean over a group's outputs of the squared gradient at each place, in the order of `columns`."""
    square = slope.detach().double().square()
    if one.op == "linear":
        return square.reshape(1, -1, square.shape[-1]).mean(-1)
    square = square if square.ndim == len(one.shape) else square[None]
    groups = len(rows)
    return square.reshape(len(square), groups, square.shape[1] // groups, -1).mean(2).movedim(1, 0).reshape(groups, -1)
