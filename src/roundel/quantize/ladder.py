"""The ladder: what may follow rounding to nearest, step by step, each kept only where the gate says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..calibrate import Progress
from ..data import Batch
from ..errors import InputError
from ..gate import LEAST, Losses, choose, losses, split
from ..graph import Graph
from ..network.sweep import MATRIX
from ..qmodel import Constants, Note, QModel
from ..solvers import NEED_HESSIAN, SOLVERS
from ..transforms.equalize import equalize
from .networks import GraphNetwork, Network, some

#: What ``effort`` does after rounding to nearest, in order.
EFFORTS: dict[str, tuple[str, ...]] = {
    "fast": ("bias correction",),
    "default": ("equalization", "GPTQ", "bias correction"),
}

#: Examples that a step learns from, and as many that judge it, at most: all their values at one node are in memory together.
EXAMPLES = 256

#: Measurements that `choose` may spend on the parts of one step.
PASSES = 16


@dataclass(frozen=True, eq=False)
class Rung:
    """A float network, perhaps transformed, and its quantized form."""

    network: Network
    q: QModel


@dataclass(frozen=True, eq=False)
class Step:
    """``make`` gives the next rung, or None where there is nothing to do; ``parts`` says whether layers of it can stay alone."""

    name: str
    make: Callable[[Rung], Rung | None]
    parts: bool = False


#: The foot of the ladder for any network: ranges from the data, weights rounded to nearest.
Near = Callable[[Network], QModel]


def climb(network: Network, q: QModel, near: Near, items: list[Batch], solver: str | None, effort: str,
          progress: Progress | None, notes: list[Note]) -> QModel:  # fmt: skip
    """``q``, which is ``near(network)``, after the steps that ``effort`` names, those that were measured to help; a solver that was
    named is not judged."""
    learn, held = (_limited(part, network.whole) for part in split(items, whole=network.whole))
    judges = sum(map(len, held))
    if solver in NEED_HESSIAN:
        q = _solved(network, q, learn if judges >= LEAST else items, solver, progress, notes)
    steps = [step for step in _steps(near, learn, progress) if step.name in EFFORTS[effort]]
    steps = [step for step in steps if solver is None or step.name.lower() not in SOLVERS]
    if not isinstance(network, GraphNetwork):
        steps = [step for step in steps if step.name not in GRAPH_ONLY]
    if not steps:
        return q
    names = " and ".join(step.name for step in steps)
    if judges < LEAST:
        told = f"{sum(map(len, items))} examples are too few to judge by ({4 * LEAST} would do)"
        notes.append(Note("model", f"{names} not tried: {told}"))
        return q
    try:
        loss = losses(network.module, q.module, held)
    except InputError as err:
        notes.append(Note("model", f"{names} not tried: there is nothing to judge by, {err}"))
        return q
    rung = Rung(network, q)
    for step in steps:
        new = step.make(rung)
        if new is None:
            continue
        try:
            rung, loss = _judged(step, rung, new, lambda q: losses(network.module, q.module, held), loss, notes)
        except InputError as err:
            notes.append(Note("model", f"{step.name} not kept: {err}"))
    return rung.q


#: Steps that need to know how values flow.
GRAPH_ONLY = frozenset(["equalization", "bias correction"])


def _steps(near: Near, learn: list[Batch], progress: Progress | None) -> list[Step]:
    """Every step there is, in the order in which they are of use to each other."""

    def equalized(rung: Rung) -> Rung | None:
        assert isinstance(rung.network, GraphNetwork)
        graph, told = equalize(rung.network.graph)
        if graph is rung.network.graph:
            return None
        network = GraphNetwork(graph, [])
        q = near(network)
        return Rung(network, replace(q, notes=q.notes + told))

    def solve(name: str) -> Callable[[Rung], Rung]:
        def make(rung: Rung) -> Rung:
            q = rung.network.refined(rung.q, learn, SOLVERS[name], False, progress)
            return Rung(rung.network, replace(q, provenance={**q.provenance, "solver": name}))

        return make

    def correct(rung: Rung) -> Rung:
        return Rung(rung.network, rung.network.refined(rung.q, learn, None, True, progress))

    return [Step("equalization", equalized), Step("GPTQ", solve("gptq"), parts=True), Step("bias correction", correct, parts=True)]


def _judged(step: Step, old: Rung, new: Rung, measure: Callable[[QModel], Losses], loss: Losses,
            notes: list[Note]) -> tuple[Rung, Losses]:  # fmt: skip
    """The rung that stays, with its losses."""
    layers = _changed(old.q, new.q) if step.parts else []
    passes = min(PASSES, 2 * len(layers) - 2)
    kept, best, verdict = choose(layers or ["model"], lambda chosen: measure(_mixed(old.q, new.q, chosen, layers)), loss, passes)
    notes.append(Note("model", f"{step.name} {'kept' if verdict.kept else 'not kept'}: {verdict}"))
    if other := [name for name in layers if (name in kept) != verdict.kept]:
        done = "taken back, the model is nearer without it" if verdict.kept else "kept here, where it helps"
        notes += [Note(name, f"{step.name} {done}") for name in other]
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
    if left := [name for name, tensor in new.tensors.items() if tensor is q.tensors[name]]:
        unseen = [name for name in left if network.ops[name] in MATRIX]
        notes += [Note(name, f"no example reached it: rounded to nearest, not by {solver}", fallback=True) for name in unseen]
        if others := [name for name in left if name not in unseen]:
            told = f"{len(others)} weights are rounded to nearest: {some(others)}"
            notes.append(Note("model", f"{told}; {solver} solves convolutions and linear layers"))
    return new


def _limited(batches: list[Batch], whole: bool) -> list[Batch]:
    """The first `EXAMPLES` examples, or the batches that hold them."""
    out, left = [], EXAMPLES
    for batch in batches:
        if left > 0:
            out.append(batch if whole or len(batch) <= left else batch.take(torch.arange(left)))
            left -= len(batch)
    return out
