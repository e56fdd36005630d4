"""Analytic bias correction (Nagel et al. 2019, arXiv 1906.04721, 4.2): what rounded weights add on average, taken back from means
that need no sweep; the empirical form is in `refine`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..graph import Graph
from ..network.sweep import MATRIX
from ..qmodel import Constants, Note, QModel


def correct_bias(q: QModel, weights: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> tuple[QModel, tuple[Note, ...]]:
    """``q`` with each bias moved by (W - W') E[x]: ``weights`` are the float ones by name, ``means`` the mean of each input
    channel of
    a layer, by the name of its weight. Layers without a bias, or whose mean is not known, stay. A weight that two layers share is
    corrected with the first.

    >>> from roundel import capture, fuse, quantize
    >>> net, x = torch.nn.Sequential(torch.nn.Linear(2, 1)), torch.ones(8, 2)
    >>> q = quantize(net, "int2", data=[x[:4]])
    >>> right, _ = correct_bias(q, {"0.weight": net[0].weight}, {"0.weight": torch.ones(2)})
    >>> torch.allclose(right.module(x), net(x), atol=1e-5)
    True
    """
    if not isinstance(q.structure, Graph):
        return q, (Note("model", "biases not corrected: that takes a graph"),)
    rest, done, skipped = dict(q.rest), set[str](), 0
    for node in q.structure.nodes:
        weight, bias = (*node.inputs[1:], "", "")[:2]
        if node.op not in MATRIX or weight not in q.tensors or bias in done:
            continue
        if bias not in rest or weight not in means or weight not in weights:
            skipped += 1
            continue
        done.add(bias)
        lost = weights[weight].detach().double() - q.tensors[weight].dequantize().double()
        lost = lost.flatten(2).sum(2) if lost.ndim > 2 else lost
        groups = node.attrs.get("groups", 1)
        mean = means[weight].double().reshape(groups, -1).repeat_interleave(len(lost) // groups, 0)
        rest[bias] = rest[bias] + (lost * mean).sum(1).to(rest[bias].dtype)
    structure = replace(q.structure, constants=Constants({**q.tensors, **rest}))
    told = f"{len(done)} biases corrected from the means of their inputs" + (f", {skipped} layers left" if skipped else "")
    return replace(q, structure=structure, rest=rest), (Note("model", told),)


def clipped_mean(mean: Tensor, deviation: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """E[clip(x, low, high)] for x normal: what a ReLU (0, inf) or a ReLU6 (0, 6) leaves on average (the paper's appendix C).

    >>> round(float(clipped_mean(torch.zeros(()), torch.ones(()))), 4)  # 1 / sqrt(2 pi)
    0.3989
    """
    mean, deviation = mean.double(), deviation.double().clamp(min=1e-12)
    density = lambda z: torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    share = torch.special.ndtr
    a = (low - mean) / deviation
    out = low * share(a) + mean * (1 - share(a)) + deviation * density(a)
    if math.isfinite(high):
        b = (high - mean) / deviation
        out = out - (mean - high) * (1 - share(b)) - deviation * density(b)
    return out


def norm_means(graph: Graph) -> dict[str, Tensor]:
    """Weight -> mean of each input channel, without data: from the batch norms of a captured graph that is not yet fused.

    A batch norm leaves a normal with its shift as mean and its gain as deviation; a ReLU or ReLU6 clips it (`clipped_mean`);
    averages
    over places keep the mean. Layers whose input comes otherwise are not in the answer. Fusing keeps the names of the weights.
    """
    known: dict[str, tuple[Tensor, Tensor | None]] = {}  # mean and, while it is normal, deviation
    means: dict[str, Tensor] = {}
    for node in graph.nodes:
        x = known.get(node.inputs[0]) if node.inputs else None
        if node.op == "batch_norm" and len(node.inputs) > 4 and all(name in graph.constants for name in node.inputs[3:5]):
            gain, shift = (graph.constants[name].detach().double() for name in node.inputs[3:5])
            known[node.name] = shift, gain.abs()
        elif x is None:
            continue
        elif node.op in ("relu", "relu6") and x[1] is not None:
            known[node.name] = clipped_mean(x[0], x[1], 0.0, 6.0 if node.op == "relu6" else math.inf), None
        elif node.op in ("identity", "avg_pool"):
            known[node.name] = x
        elif node.op in MATRIX and node.inputs[1] in graph.constants:
            weight = graph.constants[node.inputs[1]]
            if len(x[0]) == (weight.shape[1] * node.attrs.get("groups", 1)):
                means.setdefault(node.inputs[1], x[0].float())
    return means
