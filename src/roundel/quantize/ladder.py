"""The ladder: what may follow rounding to nearest, step by step, each kept only where the gate says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..calibrate import Progress
from ..data import Batch
from ..errors import InputError
from ..gate import LEAST, Losses, choose, losses, split
from ..graph import Graph
from ..network.sweep import MATRIX
from ..plan import Plan
from ..qmodel import Constants, Note, QModel
from ..solvers import NEED_HESSIAN, SOLVERS
from .networks import GraphNetwork, Network, solved_guided, some
from .steps import EFFORTS, STEPS, Means, Rung

#: Examples that a step learns from, and as many that judge it, at most: all their values at one node are in memory together.
EXAMPLES = 512

#: Measurements that `choose` may spend on the parts of one step.
PASSES = 16


@dataclass(frozen=True)
class Effort:
    """How far to climb: the steps of ``level``, with a ``solver`` in place of those that solve; within ``seconds``; no farther than
    to a ``loss``, the mean KL divergence from the float model on held-out examples, or squared error where outputs are no
    classes."""

    level: str = "fast"
    solver: str | None = None
    seconds: float | None = None
    loss: float | None = None
    seed: int = 0
    guided: bool = False


def climb(
    network: Network,
    near: Callable[[Network], QModel],
    plan: Plan,
    items: list[Batch],
    effort: Effort,
    progress: Progress | None,
    notes: list[Note],
) -> QModel:
    """``near(network)`` after the steps of ``effort``, those that were measured to help; a solver that was named is not judged."""
    end = None if effort.seconds is None else time.monotonic() + effort.seconds
    rung = Rung(network, near(network))
    if not rung.q.tensors:
        return rung.q
    learn, held = (_limited(part, network.whole) for part in split(items, whole=network.whole))
    names = [name for name in EFFORTS[effort.level] if isinstance(network, GraphNetwork) or not STEPS[name].graph]
    if effort.solver is not None:
        names = [name for name in names if name.split()[-1].lower() not in SOLVERS]

    def solved(rung: Rung) -> Rung:
        if effort.solver not in NEED_HESSIAN:
            return rung
        return Rung(rung.network, _solved(rung.network, rung.q, learning(items, network.whole), effort, progress, notes))

    def measured(q: QModel) -> Losses:
        return losses(network.module, q.module, held)

    if not names:
        return solved(rung).q
    if (judges := sum(map(len, held))) < LEAST:
        told = f"{sum(map(len, items))} examples are too few to judge by ({4 * LEAST} would do)"
        notes.append(Note("model", f"{listed(names)} not tried: {told}"))
        return solved(rung).q
    try:
        loss = measured(rung.q)
    except InputError as err:
        notes.append(Note("model", f"{listed(names)} not tried: there is nothing to judge by, {err}"))
        return solved(rung).q
    means, ready = Means(near, plan, learn, end, effort.seed, progress), effort.solver not in NEED_HESSIAN
    while True:
        if not ready and not (names and STEPS[names[0]].anew):
            rung, ready = solved(rung), True
            loss = measured(rung.q)
        if not names or (ready and _enough(loss, effort.loss)):
            break
        name, *names = names
        new = STEPS[name].make(rung, means)
        if new is None:
            continue
        try:
            rung, loss = _judged(name, rung, new, measured, loss, notes)
        except InputError as err:
            notes.append(Note("model", f"{name} not kept: {err}"))
    if effort.loss is not None:
        now = f"it is {_mean(loss):.3g} on {judges} held-out examples"
        if not _enough(loss, effort.loss):
            notes.append(Note("model", f"the loss of {effort.loss:g} that was asked for is missed: {now}", fallback=True))
        elif names:
            notes.append(Note("model", f"{listed(names)} not needed for a loss of {effort.loss:g}: {now}"))
    return rung.q


def _mean(loss: Losses) -> float:
    kl, error = loss
    return float((error if kl is None else kl).mean())


def _enough(loss: Losses, wanted: float | None) -> bool:
    return wanted is not None and _mean(loss) <= wanted


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _judged(name: str, old: Rung, new: Rung, measure: Callable[[QModel], Losses], loss: Losses,
            notes: list[Note]) -> tuple[Rung, Losses]:  # fmt: skip
    """The rung that stays, with its losses."""
    layers = _changed(old.q, new.q) if STEPS[name].parts else []
    passes = min(PASSES, 2 * len(layers) - 2)
    kept, best, verdict = choose(layers or ["model"], lambda chosen: measure(_mixed(old.q, new.q, chosen, layers)), loss, passes)
    notes.append(Note("model", f"{name} {'kept' if verdict.kept else 'not kept'}: {verdict}"))
    if other := [layer for layer in layers if (layer in kept) != verdict.kept]:
        done = "taken back, the model is nearer without it" if verdict.kept else "kept here, where it helps"
        notes += [Note(layer, f"{name} {done}") for layer in other]
    return (Rung(new.network, _mixed(old.q, new.q, kept, layers)) if kept else old), best


def _changed(old: QModel, new: QModel) -> list[str]:
    """Layers in which two forms of one network differ, in order."""
    tensors = [name for name, tensor in new.tensors.items() if tensor is not old.tensors[name]]
    rest = [name for name, value in new.rest.items() if not torch.equal(value, old.rest[name])]
    return list(dict.fromkeys(_layer(name) for name in [*tensors, *rest]))


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
