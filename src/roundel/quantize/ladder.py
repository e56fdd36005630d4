"""The ladder: what may follow rounding to nearest, step by step, each kept only where the gate says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..calibrate import Progress
from ..data import Batch
from ..errors import FormatError, InputError
from ..gate import LEAST, Losses, answers, choose, losses, split
from ..graph import Graph
from ..network.sweep import MATRIX
from ..plan import Plan
from ..qmodel import Constants, Note, QModel
from ..solvers import NEED_HESSIAN, SOLVERS
from .networks import GraphNetwork, Network, solved_guided, some
from .steps import EFFORTS, STEPS, Means, Rung

#: Examples that a step learns from, and as many that judge it, at most: all their values at one node are in memory together.
EXAMPLES = 512

#: Measurements that `choose` may spend on the parts of one step; fast takes steps whole or not at all.
PASSES = {"fast": 0, "default": 16, "best": 16}

#: What no budget ends.
UNCUT = "rounding, judging and a solver that was named"

#: Under a budget of time, the share of a step's time that `choose` may spend on its parts.
JUDGING = 0.3


@dataclass(frozen=True)
class Effort:
    """How far to climb: the steps of ``level``, with a ``solver`` in place of those that solve; until ``end`` on the
    monotonic clock, of which steps that solve or train take shares; no farther than to a ``loss``, the mean KL divergence from the
    float model on held-out examples, or squared error where outputs are no classes."""

    level: str = "fast"
    solver: str | None = None
    end: float | None = None
    loss: float | None = None
    seed: int = 0
    guided: bool = False


def climb(
    network: Network,
    near: Callable[[Network], QModel],
    plan: Plan,
    asked: Plan,
    items: list[Batch],
    effort: Effort,
    progress: Progress | None,
    notes: list[Note],
) -> QModel:
    """``near(network)`` after the steps of ``effort``, those that were measured to help. A solver that was named is not judged, and
    no step then chooses codes anew."""
    rung = Rung(network, near(network))
    if not rung.q.tensors:
        return rung.q
    learn, held = (_limited(part, network.whole) for part in split(items, whole=network.whole))
    judges, means = sum(map(len, held)), Means(near, plan, asked, learn, effort.end, effort.seed, progress)
    names = [name for name in EFFORTS[effort.level] if isinstance(network, GraphNetwork) or not STEPS[name].graph]
    names = [name for name in names if effort.solver is None or not STEPS[name].codes]

    @cache
    def wanted() -> list[Any]:
        return answers(network.module, held)

    def measured(q: QModel) -> Losses:
        return losses(wanted(), q.module, held)

    loss: Losses | None = None
    why = f"{sum(map(len, items))} examples are too few to judge by ({4 * LEAST} would do)" if judges < LEAST else ""
    if not why and (names or effort.loss is not None):
        try:
            loss = measured(rung.q)
        except InputError as err:
            why = f"there is nothing to judge by, {err}"
    if why and names:
        notes.append(Note("model", f"{listed(names)} not tried: {why}"))
        names = []
    named = [effort.solver] if effort.solver in NEED_HESSIAN else []  # after the transforms, which quantize anew
    queue = [name for name in names if STEPS[name].anew] + named + [name for name in names if not STEPS[name].anew]
    while queue and (effort.solver in queue or not _enough(loss, effort.loss)):
        name = queue.pop(0)
        if name == effort.solver:
            q = _solved(rung.network, rung.q, learning(items, network.whole), effort, progress, notes)
            rung, loss = replace(rung, q=q), None if loss is None else measured(q)
        elif loss is not None:
            rung, loss = _tried(name, rung, means, measured, loss, PASSES[effort.level], notes)
    if effort.loss is not None:
        told = f"the loss of {effort.loss:g} that was asked for"
        if loss is None:
            notes.append(Note("model", f"{told} was not measured: {why}", fallback=True))
        elif not _enough(loss, effort.loss):
            now = f"it is {_mean(loss):.3g} on {judges} held-out examples"
            notes.append(Note("model", f"{told} is missed: {now}", fallback=True))
        elif queue:
            now = f"it is {_mean(loss):.3g} on {judges} held-out examples"
            notes.append(Note("model", f"{listed(queue)} not needed for a loss of {effort.loss:g}: {now}"))
    if effort.end is not None and (late := time.monotonic() - effort.end) > 1:
        notes.append(Note("model", f"the budget was over {late:.0f} s before the end: {UNCUT} are not cut short"))
    return replace(rung.q, notes=(*rung.q.notes, *rung.told))


def _mean(loss: Losses) -> float:
    kl, error = loss
    return float((error if kl is None else kl).mean())


def _enough(loss: Losses | None, wanted: float | None) -> bool:
    return loss is not None and wanted is not None and _mean(loss) <= wanted


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _tried(name: str, old: Rung, means: Means, measure: Callable[[QModel], Losses], loss: Losses, most: int,
           notes: list[Note]) -> tuple[Rung, Losses]:  # fmt: skip
    """The rung that stays after a step, with its losses."""
    start = time.monotonic()
    try:
        new = STEPS[name].make(old, means)
        if new is None:
            return old, loss
        changed = _changed(old.q, new.q)
        if new.network is old.network:
            old = replace(old, moments=new.moments)  # whatever becomes of the step, they need not be found again
        if new.network is old.network and not changed:  # the step itself found that nothing helps, and says so
            notes += new.q.notes[len(old.q.notes) :]
            return old, loss
        layers = changed if STEPS[name].parts else []
        passes = min(most, 2 * len(layers) - 2)

        def measure_with(chosen: frozenset[str]) -> Losses:
            return measure(_mixed(old.q, new.q, chosen, layers))

        spare = math.inf if means.end is None else JUDGING * (time.monotonic() - start)
        kept, best, verdict = choose(layers or ["model"], measure_with, loss, passes, spare)
    except (InputError, FormatError) as err:
        notes.append(Note("model", f"{name} not kept: {err}"))
        return old, loss
    notes.append(Note("model", f"{name} {'kept' if verdict.kept else 'not kept'}: {verdict}"))
    if other := [layer for layer in layers if (layer in kept) != verdict.kept]:
        done = "taken back, the model is nearer without it" if verdict.kept else "kept here, where it helps"
        notes += [Note(layer, f"{name} {done}") for layer in other]
    return (replace(new, q=_mixed(old.q, new.q, kept, layers)) if kept else old), best


def _changed(old: QModel, new: QModel) -> list[str]:
    """Layers and sites in which two forms of one network differ, in order."""
    tensors = [name for name, tensor in new.tensors.items() if tensor is not old.tensors.get(name)]
    rest = [name for name, value in new.rest.items() if name not in old.rest or not torch.equal(value, old.rest[name])]
    sites = [name for name, site in new.activations.items() if site is not old.activations.get(name)]
    return list(dict.fromkeys(_layer(name) for name in [*tensors, *rest, *sites]))


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _mixed(old: QModel, new: QModel, chosen: frozenset[str], layers: Sequence[str]) -> QModel:
    """``old`` with the ``chosen`` layers of ``new``; without ``layers`` the one or the other."""
    if len(chosen) == max(1, len(layers)):
        return new
    if not chosen:
        return old
    tensors = {name: (new if _layer(name) in chosen else old).tensors[name] for name in old.tensors}
    rest = {name: (new if _layer(name) in chosen else old).rest[name] for name in old.rest}
    structure = new.structure
    if isinstance(structure, Graph):
        structure = replace(structure, constants=Constants({**tensors, **rest}))
    return replace(new, structure=structure, tensors=tensors, rest=rest)


def _solved(network: Network, q: QModel, items: list[Batch], effort: Effort, progress: Progress | None,
            notes: list[Note]) -> QModel:  # fmt: skip
    """Every weight by the solver that was named; those it could not solve are listed."""
    solver = effort.solver or ""
    if effort.guided:
        new = solved_guided(network, q, items, SOLVERS[solver], effort.seed, True, progress)
    else:
        new = network.refined(q, items, SOLVERS[solver], False, progress)
    notes += unsolved([name for name, tensor in new.tensors.items() if tensor is q.tensors[name]], network.ops, solver)
    return new


def learning(items: list[Batch], whole: bool) -> list[Batch]:
    """The examples that a solver which was named learns from: those that judge nothing, or all where they are too few to judge."""
    learn, held = (_limited(part, whole) for part in split(items, whole=whole))
    return learn if sum(map(len, held)) >= LEAST else items


def unsolved(left: Sequence[str], ops: Mapping[str, str], solver: str) -> list[Note]:
    """What is said of the weights that a solver which was named did not solve."""
    unseen = [name for name in left if ops[name] in MATRIX]
    notes = [Note(name, f"no example reached it: rounded to nearest, not by {solver}", fallback=True) for name in unseen]
    if others := [name for name in left if name not in unseen]:
        told = f"{len(others)} weights are rounded to nearest: {some(others)}"
        notes.append(Note("model", f"{told}; {solver} solves convolutions and linear layers"))
    return notes


def _limited(batches: list[Batch], whole: bool) -> list[Batch]:
    """The first `EXAMPLES` examples, or the batches that hold them."""
    out, left = [], EXAMPLES
    for batch in batches:
        if left > 0:
            out.append(batch if whole or len(batch) <= left else batch.take(torch.arange(left)))
            left -= len(batch)
    return out
