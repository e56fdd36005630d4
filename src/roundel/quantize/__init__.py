"""`quantize`: a float network, a plan and some data become a `QModel`; every decision is in the plan or in the notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..calibrate import Progress, evaluating, list_of_batches, one_thread
from ..data import Batch, Data, Preprocess, batches
from ..errors import CheckError, PlanError
from ..network.huggingface import hf_config
from ..network.layer import Activation
from ..plan import FLOAT, Choice, Plan
from ..qmodel import Note, QModel
from ..ranges import static_activation
from .checks import check_float, check_numbers, check_weights, refuse
from .ladder import EFFORTS, climb
from .networks import Network, find_network
from .weights import round_weights

__all__ = ["EFFORTS", "quantize"]


def quantize(
    model: nn.Module,
    weights: str | None = "int8",
    activations: str | None = None,
    *,
    data: Any = None,
    effort: str = "fast",
    solver: str | None = None,
    ranges: str = "mse",
    exclude: Iterable[str] = (),
    plan: Plan | None = None,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
) -> QModel:
    """Quantize ``model`` after training.

    ``weights`` is a format text. ``activations`` is None (computed in float), a format text (static: ranges from ``data``), or one
    with ``:dynamic`` (ranges at run time, of the inputs of weighted layers) such as ``int8:dynamic`` and ``int8/token:dynamic``.
    ``effort`` is fast (round to nearest, seconds) or default (GPTQ, minutes); both then correct the biases of a graph. Such a step
    is kept only if it brings the model nearer to the float one on every fourth example of ``data``, which it did not learn from;
    the notes say what was measured. ``solver``, rtn or gptq, names the weights' solver outright. ``ranges`` is minmax, average,
    percentile[:P], mse or kl. ``exclude`` names layers to leave float, as shell wildcards; ``plan`` gives rules per layer in place
    of both formats. ``seed`` is recorded; nothing here is drawn at random yet.
    Labels in ``data`` are used to check that the float model works at all.

    With ``strict`` anything that is left float unasked, or done in another way, is a `CheckError`. Raises `PlanError` for a plan
    that does not fit the model, `InputError` for bad data or weights, `FormatError` for numbers that a format cannot hold.

    >>> import torch
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(64, 10)), weights="int4/g32", data=[torch.randn(8, 64)])
    >>> q.tensors["0.weight"].bits, q.module(torch.randn(2, 64)).shape
    (4.5, torch.Size([2, 10]))
    """
    refuse(model, solver, effort, data is not None)
    plan = _rules(weights, activations, exclude, plan)
    items = None if data is None else list_of_batches(batches(data, preprocess=preprocess))
    notes: list[Note] = []
    with one_thread(), torch.no_grad(), evaluating(model):
        check_numbers(model)
        network = find_network(model, items, notes)
        plan = network.widened(plan, notes)
        table = network.resolve(plan)
        if not network.targets and any(rule.weight not in (None, FLOAT) for rule in plan.rules):
            raise PlanError("the model has no layer to quantize: no linear, convolution or embedding layer with real weights")
        if any(c and c.when == "static" for name, c in table.items() if name in network.sites) and items is None:
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
        provenance = {
            "roundel": __version__,
            "torch": str(torch.__version__),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "effort": effort,
            "solver": solver or "rtn",
            "ranges": ranges,
            "seed": seed,
            "calibration_batches": len(items) if items is not None else 0,
        }
        applied = preprocess or (data.preprocess if isinstance(data, Data) else None)
        if applied is not None and applied != Preprocess():
            provenance["preprocess"] = applied.to_dict()

        def near(network: Network) -> QModel:
            """Ranges from the data, weights rounded to nearest: the ladder's foot, also of a network that was transformed."""
            told: list[Note] = []
            chosen = _activations(network, table, items or [], ranges, progress, told)
            tensors = round_weights(network, table, progress, told)
            return network.finish(tensors, chosen, plan, provenance, tuple(told))

        q = near(network)
    with one_thread(), evaluating(model):
        if items is None and effort != "fast" and solver is None:
            notes.append(Note("model", f"{' and '.join(EFFORTS[effort])} not tried: there is no data to learn from"))
        if items is not None and q.tensors:
            q = climb(network, q, near, items, solver, effort, progress, notes)
    q = replace(q, notes=q.notes + tuple(notes))
    undone = [n for n in q.notes if n.fallback]
    if strict and undone:
        raise CheckError("strict: " + "; ".join(f"{n.subject}: {n.text}" for n in undone[:5])
                         + (f"; and {len(undone) - 5} more" if len(undone) > 5 else ""))  # fmt: skip
    return q


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
    static = {name for name, c in wanted.items() if c.when == "static"}
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
