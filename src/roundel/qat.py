"""`prepare`: a float model and a plan become a trainable quantized module in one call, quantization after training included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .calibrate import Progress, evaluating, list_of_batches, one_thread
from .data import Preprocess, batches
from .errors import PlanError
from .plan import Plan
from .qmodel import Note, QModel
from .quantize import quantize
from .quantize.networks import GraphNetwork, find_network
from .tune.prepare import prepare as prepare_quantized
from .tune.tunable import Learn, Rounding

__all__ = ["prepare"]


def prepare(
    model: nn.Module | QModel,
    weights: str | None = "int8",
    activations: str | None = None,
    *,
    data: Any = None,
    plan: Plan | None = None,
    exclude: Iterable[str] = (),
    ranges: str = "mse",
    preprocess: Preprocess | None = None,
    learn: Learn = "step",
    rounding: Rounding = "straight",
    scales: bool = True,
    tables: bool = True,
    drop: float = 0.0,
    momentum: float = 0.01,
    progress: Progress | None = None,
) -> nn.Module:
    """``model`` quantized as `quantize` does it (rounding to nearest), as an ordinary module in training mode that starts there.

    ``weights``, ``activations``, ``data``, ``plan``, ``exclude``, ``ranges`` and ``preprocess`` are those of `quantize`; ``learn``,
    ``rounding``, ``scales``, ``tables``, ``drop`` and ``momentum`` those of `roundel.tune.prepare`, which makes a `QModel` that is
    there already trainable. Train it in any loop, then `convert` it. Raises what those two raise.

    >>> from roundel.tune import convert
    >>> net, x, y = nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8), torch.randn(64, 4)
    >>> module = prepare(net, "int2", "int8", data=[x])
    >>> optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    >>> for _ in range(20):
    ...     loss = (module(x) - net(x).detach()).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> torch.equal(convert(module).module(x), module.eval()(x))
    True
    """
    if isinstance(model, QModel):
        raise PlanError("this model is quantized already; roundel.tune.prepare(q, real) makes it trainable")
    items = None if data is None else list_of_batches(batches(data, preprocess=preprocess))
    notes: list[Note] = []
    with one_thread(), torch.no_grad(), evaluating(model):
        network = find_network(model, items, notes)
    start = network.module if isinstance(network, GraphNetwork) else model
    q = quantize(start, weights, activations, data=items, plan=plan, exclude=exclude, ranges=ranges, progress=progress)
    real = {target.name: target.weight for target in network.targets}
    return prepare_quantized(q, real, learn=learn, rounding=rounding, scales=scales, tables=tables, drop=drop, momentum=momentum)
