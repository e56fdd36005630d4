"""The ladder: what may follow rounding to nearest, step by step, each kept only where the gate says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

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
from .networks import GraphNetwork, Network, some
from .steps import EFFORTS, STEPS, Means, Rung

#: Examples that a step learns from, and as many that judge it, at most: all their values at one node are in memory together.
EXAMPLES = 256

#: Measurements that `choose` may spend on the parts of one step.
PASSES = 16


def climb(
    network: Network,
    near: Callable[[Network], QModel],
    plan: Plan,
    items: list[Batch],
    solver: str | None,
    effort: str,
    budget: float | None,
    seed: int,
    progress: Progress | None,
    notes: list[Note],
) -> QModel:
    """``near(network)`` after the steps that ``effort`` names, those that were measured to help; a solver that was named is not
    judged. ``budget`` is in seconds: the last step takes what is left of it."""
    end = None if budget is None else time.monotonic() + budget
    q = near(network)
    learn, held = (_limited(part, network.whole) for part in split(items, whole=network.whole))
    judges = sum(map(len, held))
    if not q.tensors:
        return q
    if solver in NEED_HESSIAN:
        q = _solved(network, q, learning(items, network.whole), solver, progress, notes)
    names = [name for name in EFFORTS[effort] if isinstance(network, GraphNetwork) or not STEPS[name].graph]
    if solver is not None:
        names = [name for name in names if name.lower() not in SOLVERS]
    if not names:
        return q
    if judges < LEAST:
        told = f"{sum(map(len, items))} examples are too few to judge by ({4 * LEAST} would do)"
        notes.append(Note("model", f"{listed(names)} not tried: {told}"))
        return q
    try:
        loss = losses(network.module, q.module, held)
    except InputError as err:
        notes.append(Note("model", f"{listed(names)} not tried: there is nothing to judge by, {err}"))
        return q
    means, rung = Means(near, plan, learn, end, seed, progress), Rung(network, q)
    for name in names:
        new = STEPS[name].make(rung, means)
        if new is None:
            continue
        try:
            rung, loss = _judged(name, rung, new, lambda q: losses(network.module, q.module, held), loss, notes)
        except InputError as err:
            notes.append(Note("model", f"{name} not kept: {err}"))
    return rung.q


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


def _solved(network: Network, q: QModel, items: list[Batch], solver: str, progress: Progress | None,
            notes: list[Note]) -> QModel:  # fmt: skip
    """Every weight by the solver that was named; those it could not solve are listed."""
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
