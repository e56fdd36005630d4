"""How many clusters each layer's weights share: a plan for a size or an error, from measured errors and bytes; keeps no codes."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from .calibrate import evaluating, list_of_batches, one_thread
from .data import batches
from .errors import FormatError, PlanError
from .formats.entropy import compress
from .formats.format import MODEL, Format
from .formats.grid import Codebook
from .formats.qtensor import QTensor, to_matrix
from .plan import FLOAT, Plan, Rule
from .quantize.networks import GraphNetwork, Target, find_network
from .quantize.sizes import lost_share, mean_squares
from .solvers import rtn

#: Numbers of clusters that are tried.
CLUSTERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def share_plan(
    model: nn.Module,
    *,
    bits: float | None = None,
    error: float | None = None,
    data: Any = None,
    format: str = "cb{k}/tensor",
    entropy: bool = False,
    importance: Mapping[str, Tensor] | None = None,
) -> Plan:
    """A plan of ``format`` with a number of clusters k of its own for every weight of ``model``.

    The error of a weight is sum h (w - q)^2 / sum h w^2, 0 being exact; h is the mean square of each input over ``data``, or what
    ``importance`` says for the weight's name ((columns,) or (rows, columns)), or 1. With ``error`` every weight gets the smallest
    choice whose error is no larger. With ``bits``, the size of all these weights, tables and scales included, over their number,
    the sum of errors is the least that such a size allows (a multiple-choice knapsack, solved exactly). ``entropy`` counts codes as
    `QModel.save` with ``entropy`` stores them. Raises `PlanError` where no choice is small or exact enough.

    >>> torch.manual_seed(0)
    <torch._C.Generator ...>
    >>> plan = share_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), bits=3.3)
    >>> [rule.weight for rule in plan.rules]
    ['float', 'cb8/tensor', 'cb16/tensor']
    """
    if (bits is None) == (error is None):
        raise PlanError("share_plan takes bits=, the size to reach, or error=, the error to stay under: one of them")
    _check(format)
    items = None if data is None else list_of_batches(batches(data))
    with one_thread(), torch.no_grad(), evaluating(model):
        network = find_network(model, items, [])
        weigh = mean_squares(network, items or []) | dict(importance or {})
        targets = [target for target in network.targets if target.weight.numel()]
        tried = {target.name: _tried(target, format, weigh.get(target.name), entropy) for target in targets}
    if not tried:
        raise PlanError("the model has no layer to quantize: no linear, convolution or embedding layer with real weights")
    count = sum(target.weight.numel() for target in targets)
    chosen = _least(tried, error) if error is not None else _knapsack(tried, float(bits or 0) / 8 * count, count)
    ties = {a: n.inputs[1] for a, n in network.tied.items()} if isinstance(network, GraphNetwork) else network.tied
    names = chosen | {alias: chosen[first] for alias, first in ties.items() if first in chosen}
    return Plan((Rule("*", FLOAT), *(Rule(glob.escape(name), format.format(k=k)) for name, k in names.items())))


def _check(format: str) -> None:
    try:
        parsed = Format.parse(format.format(k=16))
    except (KeyError, IndexError, ValueError) as err:
        raise FormatError(f"{format!r} is no format with {{k}} for the number of clusters, such as 'cb{{k}}/tensor'") from err
    if "{k}" not in format or not isinstance(parsed.grid, Codebook) or parsed.table == MODEL:
        raise FormatError(f"{format!r} should be a learned table of {{k}} clusters for each weight, such as 'cb{{k}}/tensor'")


#: (k, bytes, error), by rising k.
Tried = list[tuple[int, int, float]]


def _tried(target: Target, format: str, weigh: Tensor | None, entropy: bool) -> Tried:
    w = to_matrix(target.weight, target.axis).float()
    h = None if weigh is None else weigh.float().expand(w.shape)
    out = []
    for k in CLUSTERS:
        try:
            q = rtn(target.weight, Format.parse(format.format(k=k)), h, target.axis)
        except FormatError:  # more clusters than the table's whole numbers, or a scale that fp16 cannot hold
            continue
        out.append((k, _size(q, entropy), lost_share(w, q, h)))
    if not out:
        raise FormatError(f"{target.name}, shape {list(target.weight.shape)}: no number of clusters fits {format!r}")
    return out


def _size(q: QTensor, entropy: bool) -> int:
    stream = compress(q) if entropy else None
    return q.nbytes - (q.codes.numel() - stream.nbytes if stream is not None else 0)


def _least(tried: Mapping[str, Tried], error: float) -> dict[str, int]:
    chosen = {}
    for name, choices in tried.items():
        enough = [(size, k) for k, size, lost in choices if lost <= error]
        if not enough:
            k, _, best = min(choices, key=lambda choice: choice[2])
            raise PlanError(f"{name}: no number of clusters brings the error to {error:g}; {k} bring it to {best:.2g}")
        chosen[name] = min(enough)[1]
    return chosen


def _knapsack(tried: Mapping[str, Tried], budget: float, count: int) -> dict[str, int]:
    least = sum(min(size for _, size, _ in choices) for choices in tried.values())
    if least > budget:
        raise PlanError(
            f"{8 * budget / count:.4g} bits are too few: the smallest choice of every weight takes {8 * least / count:.4g}"
        )
    flat = [(name, *choice) for name, choices in tried.items() for choice in choices]
    size, lost = np.array([c[2] for c in flat], float), np.array([c[3] for c in flat])
    one_each = np.array([[c[0] == name for c in flat] for name in tried], float)
    rules = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / budget, -np.inf, 1)]
    found = milp(lost / max(lost.max(), 1e-30), integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=rules)
    return {c[0]: c[1] for c, taken in zip(flat, found.x, strict=True) if taken > 0.5}
