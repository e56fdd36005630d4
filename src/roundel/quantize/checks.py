"""What is refused before any work starts: models, numbers, formats and data that cannot end well."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..calibrate import run
from ..data import Batch
from ..errors import InputError, PlanError
from ..evaluate import near_chance, predictions
from ..formats.qtensor import to_matrix
from ..graph import GraphModule
from ..plan import Choice
from ..qmodel import Note, QModel
from ..solvers import NEED_HESSIAN, SOLVERS
from .networks import Network, some


def refuse(model: object, solver: str | None, effort: str, efforts: Collection[str], data: bool) -> None:
    """Models and options that cannot be quantized with."""
    if isinstance(model, QModel):
        raise PlanError("this model is quantized already; start from the float model")
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"a model is a torch.nn.Module, got {type(model).__name__}; roundel.read(path) makes one from a file or folder"
        )
    if solver is not None and solver not in SOLVERS:
        raise PlanError(f"there is no solver {solver!r}; there are {', '.join(SOLVERS)}")
    if effort not in efforts:
        raise PlanError(f"there is no effort {effort!r}; there are {', '.join(efforts)}")
    if solver in NEED_HESSIAN and not data:
        raise PlanError(f"the solver {solver} learns from the inputs of each layer: pass data=")
    for name, child in model.named_modules():
        where = type(child).__module__
        if (
            "quantized" in where
            or where.startswith(("bitsandbytes", "torchao", "auto_gptq", "gptqmodel"))
            or where.startswith("roundel.network")
        ):
            raise PlanError(
                f"{name or 'the model'} is a {type(child).__name__}: it is quantized already; start from the float model"
            )


def refuse_streamed(effort: str, solver: str | None, budget: object, loss: object, guided: bool) -> None:
    """What a folder that is quantized block by block into a file cannot have: whatever looks at the whole model."""
    wanted = {"budget=": budget is not None, "loss=": loss is not None, f"effort={effort!r}": effort == "best" or
              (effort != "fast" and solver is None)}  # fmt: skip
    if asked := [name for name, given in wanted.items() if given]:
        raise PlanError(
            f"{' and '.join(asked)} compares models, which needs them in memory, and a folder with output= is quantized block by "
            "block, each once: name a solver instead, solver='gptq' or the slower 'descent' or 'alternate'; or leave output= away"
        )
    if guided:
        raise PlanError("guided Hessians take a backward pass of the whole model: leave output= or guided= away")


def seconds_of(budget: str | float | None, effort: str) -> float | None:
    """Seconds of a budget text such as 90s, 5min or 1.5h, or of a number of seconds.

    >>> seconds_of("5min", "best")
    300.0
    """
    if budget is None:
        return None
    if effort != "best":
        raise PlanError(f"budget={budget!r} is the time that effort='best' may take; effort={effort!r} takes what it needs")
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|sec|min|m|h)?", str(budget).strip())
    seconds = float(found[1]) * {"h": 3600, "m": 60}.get((found[2] or "s")[:1], 1) if found else 0.0
    if not seconds:
        raise PlanError(f"a budget is a time such as '90s', '5min' or '1h', got {budget!r}")
    return seconds


def check_numbers(model: nn.Module) -> None:
    """Every number is there and finite, those that stay float included; -inf in a buffer or constant is a mask."""
    graph = model.graph.constants if isinstance(model, GraphModule) else {}
    parameters = {} if graph else dict(model.named_parameters())
    tensors = parameters | (dict(graph) if graph else dict(model.named_buffers()))
    if lazy := [name for name, t in tensors.items() if is_lazy(t)]:
        raise InputError(f"{some(lazy)} have no shape yet (lazy modules): run the model once on a batch before quantizing it")
    if missing := [name for name, t in tensors.items() if t.is_meta]:
        raise InputError(f"{len(missing)} tensors have no numbers (meta device): {some(missing)}; load the weights first")
    for name, t in tensors.items():
        if t.is_floating_point() or t.is_complex():
            check_finite(name, t.detach(), mask=name not in parameters)


def check_finite(name: str, w: Tensor, mask: bool = False) -> None:
    """`InputError` for numbers that are not finite, with the first; -inf passes in a ``mask``."""
    w = w if w.is_complex() else w.float()
    bad = ~torch.isfinite(w)
    if mask and not w.is_complex():
        bad &= w != -torch.inf
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise InputError(f"{name}: {int(bad.sum())} of {w.numel()} numbers are not finite (in float32), the first at {first}; "
                         "repair the model")  # fmt: skip


def check_weights(network: Network, table: Mapping[str, Choice | None], notes: list[Note]) -> None:
    """Numbers that are not finite, formats that cannot apply, groups that do not divide: all before the work starts."""
    short: dict[int, list[str]] = {}
    for target in network.targets:
        w = target.weight
        if not w.is_meta:
            check_finite(target.name, w)
        choice = table.get(target.name)
        if choice is None:
            continue
        cols = to_matrix(w, target.axis).shape[1]
        group = choice.format.share.cols
        if group and cols % group:
            short.setdefault(group, []).append(target.name)
    for group, names in short.items():
        notes.append(
            Note(
                "groups",
                f"groups of {group} do not divide the rows of {some(names)}: the last group of each row is short",
            )
        )


def check_float(module: nn.Module, items: list[Batch]) -> None:
    """Where there are labels, the float model must know more than chance, or its inputs are not what it was trained on."""
    right = total = classes = 0
    for batch in items:
        if batch.target is None or batch.target.ndim != 1 or batch.target.is_floating_point():
            return
        scores = predictions(run(module, batch))
        if scores.ndim != 2 or scores.shape[0] != batch.target.shape[0]:
            return
        classes = scores.shape[1]
        right += int((scores.argmax(1) == batch.target).sum())
        total += batch.target.shape[0]
    if total and near_chance(right / total, classes, total):
        raise InputError(f"the float model itself gets {right} of {total} right ({classes} classes), which is chance: "
                         "check the preprocessing (mean, std, scale, channel order) and the labels before quantizing")  # fmt: skip
