"""`quantize`: a float network, a plan and some data become a `QModel`; every decision is in the plan or in the notes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..calibrate import Progress, evaluating, list_of_batches, one_thread
from ..data import Batch, Data, Preprocess, batches
from ..errors import CheckError, PlanError
from ..executor import Executor
from ..files import AnyPath
from ..network.huggingface import hf_config
from ..network.layer import Activation
from ..plan import FLOAT, Choice, Plan
from ..qmodel import Note, QModel
from ..ranges import static_activation
from ..solvers import NEED_HESSIAN
from .checks import check_float, check_numbers, check_weights, refuse, refuse_streamed, seconds_of
from .ladder import Effort, climb, learning, listed
from .networks import Network, find_network
from .running import followed
from .sizes import fitted, overdrawn
from .steps import EFFORTS
from .weights import round_weights

__all__ = ["EFFORTS", "quantize"]


def quantize(
    model: nn.Module | str | os.PathLike[str],
    weights: str | None = "int8",
    activations: str | None = None,
    *,
    data: Any = None,
    effort: str = "fast",
    budget: str | float | None = None,
    loss: float | None = None,
    solver: str | None = None,
    guided: bool = False,
    ranges: str = "mse",
    exclude: Iterable[str] = (),
    plan: Plan | None = None,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    strict: bool = False,
    memory: str | int | None = None,
    output: AnyPath | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> QModel:
    """Quantize ``model`` after training.

    ``weights`` is a format text, or a size such as "4.25 bits" (all bytes of the quantized weights * 8 / their number), within
    which the format is taken that loses least of them, as the notes tell; effort best then tries one for each weight.
    ``activations`` is None (computed in float), a format text (static: ranges from ``data``), or one with ``:dynamic`` (ranges at
    run time, of the inputs of weighted layers) such as ``int8:dynamic`` and ``int8/token:dynamic``, or with ``:running`` (static
    ones that then follow what passes, see docs/adaptive.md).
    ``effort`` is fast (round to nearest, seconds), default (equalization, 16 bits where parts of very different size are joined,
    GPTQ; minutes) or best (then each block is trained towards the float block's outputs, for as long as ``budget`` says, such as
    "5min"); all correct the biases of a graph. Such a step is kept only if it brings the model nearer to the float one on every
    fourth example of ``data``, which it did not learn from; the notes say what was measured. ``loss`` ends the climb as soon as the
    divergence on those is no more. ``solver`` names what chooses the weights' codes outright; with ``guided`` its Hessians count
    each place by how much the loss depends on it, where a backward pass fits in memory. ``ranges`` is minmax, average,
    percentile[:P], mse or kl. ``exclude`` names layers to leave float, as shell wildcards; ``plan`` gives rules per layer in place
    of both formats. ``seed`` is where whatever is drawn at random starts.
    Labels in ``data`` are used to check that the float model works at all.

    ``model`` is a module, or what `roundel.read` takes. The Hugging Face folder of a language model is never held in memory where
    ``output`` names the file to write: block after block is read, solved and written, at most ``memory`` (such as "2GB") is
    resident, and the same call goes on where an earlier one was stopped. ``executor`` runs layers elsewhere (`roundel.executor`).

    With ``strict`` anything that is left float unasked, or done in another way, is a `CheckError`. Raises `PlanError` for a plan
    that does not fit the model, `InputError` for bad data or weights, `FormatError` for numbers that a format cannot hold.

    >>> import torch
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(64, 10)), weights="int4/g32", data=[torch.randn(8, 64)])
    >>> q.tensors["0.weight"].bits, q.module(torch.randn(2, 64)).shape
    (4.5, torch.Size([2, 10]))
    """
    path = model if isinstance(model, str | os.PathLike) else None
    if output is None and (memory is not None or executor is not None):
        raise PlanError("memory= and executor= are for a folder that is quantized into a file: name it, output=")
    if path is not None and output is None:
        from ..readers import read

        model, path = read(path), None
    refuse(model if path is None else nn.Module(), solver, effort, EFFORTS, data is not None)
    if guided and solver not in NEED_HESSIAN:
        raise PlanError(f"guided=True is about the Hessians of a solver: name one, {' or '.join(sorted(NEED_HESSIAN))}")
    if path is not None:
        refuse_streamed(effort, solver, budget, loss, guided)
    seconds = seconds_of(budget, effort)
    end = None if seconds is None else time.monotonic() + seconds
    if loss is not None and not (isinstance(loss, int | float) and loss > 0):
        raise PlanError(f"loss={loss!r}: the divergence to stop at is a number above 0")
    plan = _rules(weights, activations, exclude, plan)
    items = None if data is None else list_of_batches(batches(data, preprocess=preprocess))
    applied = preprocess or (data.preprocess if isinstance(data, Data) else None)
    provenance = _provenance(effort, solver, ranges, seed, items, applied) | ({"guided": True} if guided else {})
    if path is not None and output is not None:
        from .folder import quantize_folder

        return quantize_folder(path, plan, items, provenance, output=output, memory=memory, solver=solver, executor=executor,
                               strict=_strict if strict else None, progress=progress)  # fmt: skip
    if output is not None or not isinstance(model, nn.Module):
        raise PlanError("output= is for a folder that is quantized block by block; save what this returns: q.save(path)")
    notes: list[Note] = []
    with one_thread(), torch.no_grad(), evaluating(model):
        check_numbers(model)
        network = find_network(model, items, notes)
        asked, plan = plan, fitted(plan, network, notes, learning(items or [], network.whole))
        table = network.resolve(network.widened(plan, []))
        if not network.targets and any(rule.weight not in (None, FLOAT) for rule in plan.rules):
            raise PlanError("the model has no layer to quantize: no linear, convolution or embedding layer with real weights")
        if any(c and c.when != "dynamic" for name, c in table.items() if name in network.sites) and items is None:
            raise PlanError("static activations need calibration data (data=, --data); or use ':dynamic' ranges, or weights alone")
        check_weights(network, table, notes)
        if items is not None:
            check_float(network.module, items)
        if hf_config(model) is not None and any(c and c.when == "static" for n, c in table.items() if n in network.sites):
            notes.append(
                Note(
                    "model", "only the inputs of its weighted layers are quantized, what lies between them is float", fallback=True
                )
            )

        @torch.no_grad()
        def near(network: Network) -> QModel:
            """Ranges from the data, weights rounded to nearest: the ladder's foot, also of a network that was transformed."""
            told: list[Note] = []
            wide = network.widened(plan, told)
            table = network.resolve(wide)
            chosen = _activations(network, table, items or [], ranges, progress, told)
            tensors = round_weights(network, table, progress, told, solver)
            return network.finish(tensors, chosen, wide, provenance, tuple(told))

    with one_thread(), evaluating(model):
        if items is not None:
            q = climb(network, near, plan, asked, items, Effort(effort, solver, end, loss, seed, guided), progress, notes)
        else:
            q = near(network)
            if effort != "fast" and solver is None:
                notes.append(Note("model", f"{listed(EFFORTS[effort])} not tried: there is no data to learn from"))
            if loss is not None:
                told = f"the loss of {loss:g} that was asked for was not measured: there is no data"
                notes.append(Note("model", told, fallback=True))
        q = followed(q, table, network.known(), items or [])
    notes += overdrawn(asked, plan, network, q.tensors)
    q = replace(q, notes=q.notes + tuple(notes))
    if strict:
        _strict(q.notes)
    return q


def _strict(notes: Sequence[Note]) -> None:
    """`CheckError` for anything that is left undone, or was done in another way than asked."""
    undone = [n for n in notes if n.fallback]
    if undone:
        raise CheckError("strict: " + "; ".join(f"{n.subject}: {n.text}" for n in undone[:5])
                         + (f"; and {len(undone) - 5} more" if len(undone) > 5 else ""))  # fmt: skip


def _provenance(effort: str, solver: str | None, ranges: str, seed: int, items: list[Batch] | None,
                preprocess: Preprocess | None) -> dict[str, Any]:  # fmt: skip
    """What a file says of how it was made."""
    provenance: dict[str, Any] = {
        "roundel": __version__,
        "torch": str(torch.__version__),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "effort": effort,
        "solver": solver or "rtn",
        "ranges": ranges,
        "seed": seed,
        "calibration_batches": len(items) if items is not None else 0,
    }
    if preprocess is not None and preprocess != Preprocess():
        provenance["preprocess"] = preprocess.to_dict()
    return provenance


def _rules(weights: str | None, activations: str | None, exclude: Iterable[str], plan: Plan | None) -> Plan:
    """The plan that the arguments ask for; ``exclude`` comes after the rules of a given plan."""
    for name, text in (("weights", weights), ("activations", activations)):
        if text is not None and not isinstance(text, str):
            raise PlanError(f"{name} is a format text such as 'int4/g32', or None; got {type(text).__name__}")
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
    if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise PlanError(f"exclude holds names of layers, as shell wildcards; got {odd[0]!r}")
    if plan is None:
        return Plan.of(weights, activations, patterns)
    if not isinstance(plan, Plan):
        raise PlanError(f"plan is a Plan, got {type(plan).__name__}; Plan.read(path) makes one of a TOML or JSON file")
    if activations is not None or weights not in ("int8", FLOAT, None):
        raise PlanError(
            "the plan says how weights and activations are treated; leave weights= and activations= away, or add a rule"
        )
    return Plan((*plan.rules, *Plan.of(None, None, patterns).rules[1:]))


def _activations(
    network: Network,
    table: Mapping[str, Choice | None],
    items: list[Batch],
    ranges: str,
    progress: Progress | None,
    notes: list[Note],
) -> dict[str, Activation]:
    wanted = {name: c for name, c in table.items() if name in network.sites and c is not None}
    static = {name for name, c in wanted.items() if c.when != "dynamic"}
    stats = network.stats(items, static, progress) if static else {}
    fixed = network.known()
    chosen: dict[str, Activation] = {}
    for name, choice in wanted.items():
        if choice.when == "dynamic":
            chosen[name] = Activation(choice.format, "dynamic")
        elif name in stats:
            chosen[name] = static_activation(name, choice.format, stats[name], ranges, fixed.get(name))
        else:
            notes.append(Note(name, "no value passed here during calibration; it stays float", fallback=True))
    return chosen
