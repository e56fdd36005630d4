"""`sweep`: a float network and its quantized form walked side by side over the same batches; what is done at a node is not here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Batch
from ..graph import GraphModule, Node
from ..graph.module import Env
from .layer import WEIGHTED
from .run import QGraphModule

#: Weighted operations whose inputs can be laid out as a matrix.
MATRIX = ("conv", "linear")


def sweep(real: GraphModule, quantized: QGraphModule, batches: Sequence[Batch]) -> Iterator[tuple[Node, list[tuple[Env, Env]]]]:
    """Each weighted node in order of execution, with the values alive in both networks just before it, one pair per batch.

    What is changed in ``quantized`` at a node holds from that node on, so every later one sees the inputs that it will really
    have. Both graphs have the same nodes. Memory is that of the values alive at one node, over all batches.
    """
    runs = [zip(real.steps(*b.args, **b.named), quantized.steps(*b.args, **b.named), strict=True) for b in batches]
    for together in zip(*runs, strict=True):
        node = together[0][0][0]
        if node.op in WEIGHTED:
            yield node, [(before, now) for (_, before), (_, now) in together]


def columns(op: str, attrs: Mapping[str, Any], x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inputs of a weighted operation as (groups, n, columns): each row what one output place multiplies by its weights.

    ``shape`` is the weight's. n counts every place of every example.
    """
    if op == "linear":
        return x.reshape(1, -1, x.shape[-1])
    kernel, groups = list(shape[2:]), attrs.get("groups", 1)
    x = x if x.ndim == len(shape) else x[None]
    stride, dilation, padding = (list(attrs[key]) for key in ("stride", "dilation", "padding"))
    if len(kernel) == 1:  # a row of an image
        x, kernel, stride, dilation, padding = x[:, :, None], [1, *kernel], [1, *stride], [1, *dilation], [*padding, 0, 0]
    seen = F.unfold(F.pad(x, padding), tuple(kernel), tuple(dilation), 0, tuple(stride))  # (N, C * kernel, places)
    seen = seen.reshape(len(x), groups, -1, seen.shape[-1])
    return seen.permute(1, 0, 3, 2).reshape(groups, -1, seen.shape[2])


def channel_sums(op: str, out: Tensor) -> tuple[Tensor, int]:
    """(sum over all but the output channels in float64, how many places that is)."""
    axis = out.ndim - 1 if op == "linear" else 1
    sums = out.detach().double().sum([i for i in range(out.ndim) if i != axis])
    return sums, out.numel() // max(1, out.shape[axis])


def second_moment(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """Sum of x^T x over rows of (groups, n, columns), float64, in fixed units of rows so that threads change nothing.
    ``importance`` (groups, n) is what each row counts."""
    total = torch.zeros(x.shape[0], x.shape[2], x.shape[2], dtype=torch.float64)
    for start in range(0, x.shape[1], 4096):
        part = x[:, start : start + 4096].double()
        heavy = part if importance is None else part * importance[:, start : start + 4096, None].double()
        total += part.mT @ heavy
    return total
