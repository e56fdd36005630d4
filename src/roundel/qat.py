"""`prepare` and `tune`: quantization-aware training from a float model, as a module for any loop, or by a loop that is here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import nn

from .calibrate import Progress, evaluating, list_of_batches, one_thread
from .data import Data, Preprocess, batches
from .errors import InputError, PlanError
from .gate import LEAST, split
from .graph import Graph, GraphModule
from .plan import Plan
from .qmodel import Note, QModel
from .quantize import quantize
from .quantize.checks import seconds_of
from .quantize.networks import GraphNetwork, ModuleNetwork, find_network
from .tune.endtoend import Teaching, tune_model
from .tune.prepare import Choices
from .tune.prepare import prepare as prepare_quantized

__all__ = ["prepare", "tune"]

#: Steps of `tune` where neither a number nor a budget is given.
STEPS = 200

#: Relative distance of a float weight from its codes from which on they are not the same network's.
APART = 0.95


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
    progress: Progress | None = None,
    **choices: Unpack[Choices],
) -> nn.Module:
    """``model`` quantized as `quantize` does it (rounding to nearest), as an ordinary module in training mode that starts there.

    The arguments that have names are those of `quantize`, ``choices`` those of `roundel.tune.prepare`, which makes a `QModel` that
    is there already trainable: learn, rounding, scales, tables, drop, norms, momentum. Train it in any loop, then `convert` it.
    Raises what those two raise.

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
    applied = preprocess or (data.preprocess if isinstance(data, Data) else None)
    if applied is not None and applied != Preprocess():
        q = replace(q, provenance={**q.provenance, "preprocess": applied.to_dict()})
    if choices.get("norms") == "live" and isinstance(network, GraphNetwork):
        return prepare_quantized(q, GraphModule(network.captured), **choices)
    return prepare_quantized(q, {target.name: target.weight for target in network.targets}, **choices)


def tune(
    q: QModel,
    model: nn.Module,
    *,
    data: Any,
    steps: int | None = None,
    budget: str | float | None = None,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> QModel:
    """``q`` trained so that it answers as ``model`` does, the float network that it was made of; formats and bytes stay.

    Four fifths of ``data`` teach, without labels, for ``steps`` batches or a ``budget`` such as "5min"; the rest judges, and ``q``
    comes back as it was, with a note, where it is not nearer then. Loops of your own start from `prepare`. Raises `InputError`
    for too few examples and for a model that ``q`` was not made of, an equalized one included: ``effort="best"`` trains that.

    >>> net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(80, 8)
    >>> q = tune(quantize(net, "int2", data=[x]), net, data=list(x.split(16)), steps=3)
    >>> q.notes[-1].text.split(":")[0] in ("end-to-end tuning of 3 steps kept", "end-to-end tuning of 3 steps not kept")
    True
    """
    if steps is not None and budget is not None:
        raise PlanError("give steps or a budget, not both")
    if steps is not None and steps < 1:
        raise PlanError(f"steps={steps}: training takes at least one")
    seconds = seconds_of(budget, "best")
    items = list_of_batches(batches(data, preprocess=preprocess))
    notes: list[Note] = []
    with one_thread(), torch.no_grad(), evaluating(model):
        network = find_network(model, items, notes) if isinstance(q.structure, Graph) else ModuleNetwork(model, notes)
        _made_of(q, network)
    learn, held = split(items, 5, whole=network.whole)
    if (judges := sum(map(len, held))) < LEAST:
        told = f"{sum(map(len, items))} examples are too few to teach and judge by"
        raise InputError(f"{told}: give at least {5 * LEAST}, so that {LEAST} judge and not {judges}")
    how = Teaching(steps or (STEPS if seconds is None else None), seconds, seed=seed)
    return tune_model(q, network.module, learn, held, how, progress)


def _made_of(q: QModel, network: GraphNetwork | ModuleNetwork) -> None:
    """`InputError` where the codes of ``q`` are not those of the network's weights."""
    real = {target.name: target.weight for target in network.targets}
    module = network.module
    if isinstance(q.structure, Graph) and not (isinstance(module, GraphModule) and module.structure.nodes == q.structure.nodes):
        raise InputError("the model is not the one that was quantized: its graph has other nodes")
    for name, tensor in q.tensors.items():
        if name not in real or tuple(real[name].shape) != tensor.shape:
            raise InputError(f"the model has no weight {name!r} of shape {list(tensor.shape)}, which the artifact has")
        w = real[name].detach().float()
        if float((tensor.dequantize() - w).norm()) > APART * float(w.norm()):
            told = f"the codes of {name!r} are not those of the model's weight: the artifact was made of another model"
            raise InputError(f"{told}, or of this one equalized, which quantize trains with effort='best'")
