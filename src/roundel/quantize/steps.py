"""What may follow rounding to nearest, step by step, each kept only where the gate says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..calibrate import Progress
from ..data import Batch
from ..errors import InputError
from ..formats.qtensor import QTensor
from ..gate import LEAST, judge, losses, split
from ..network.sweep import MATRIX
from ..qmodel import Note, QModel
from ..solvers import NEED_HESSIAN, SOLVERS
from .networks import GraphNetwork, ModuleNetwork, some

#: What ``effort`` does after rounding to nearest: the weights' solver, or none.
EFFORTS: dict[str, str | None] = {"fast": None, "default": "gptq"}

#: Examples that a step learns from, and as many that judge it, at most: all their values at one node are in memory together.
EXAMPLES = 256


def refined(network: GraphNetwork | ModuleNetwork, q: QModel, items: list[Batch], solver: str | None, effort: str,
            progress: Progress | None, notes: list[Note]) -> QModel:  # fmt: skip
    """``q`` after the steps that ``effort`` names, those that were measured to help; a solver that was named is not judged."""
    learn, held = (_limited(part, network.whole) for part in split(items, whole=network.whole))
    judges = sum(map(len, held))
    if solver in NEED_HESSIAN:
        rounded, q = q, network.refined(q, learn if judges >= LEAST else items, SOLVERS[solver], False, progress)
        if left := [name for name, tensor in q.tensors.items() if tensor is rounded.tensors[name]]:
            unseen = [name for name in left if network.ops[name] in MATRIX]
            notes += [Note(name, f"no example reached it: rounded to nearest, not by {solver}", fallback=True) for name in unseen]
            if others := [name for name in left if name not in unseen]:
                told = f"{len(others)} weights are rounded to nearest: {some(others)}"
                notes.append(Note("model", f"{told}; {solver} solves convolutions and linear layers"))
    ladder: list[tuple[str, Callable[..., QTensor] | None, bool]]
    ladder = [(name.upper(), SOLVERS[name], False) for name in [EFFORTS[effort]] if name and solver is None]
    if isinstance(network, GraphNetwork):
        ladder.append(("bias correction", None, True))
    if not ladder:
        return q
    if judges < LEAST:
        told = f"{sum(map(len, items))} examples are too few to judge by ({4 * LEAST} would do)"
        notes.append(Note("model", f"{' and '.join(name for name, *_ in ladder)} not tried: {told}"))
        return q
    try:
        loss = losses(network.module, q.module, held)
    except InputError as err:
        notes.append(Note("model", f"{' and '.join(name for name, *_ in ladder)} not tried: there is nothing to judge by, {err}"))
        return q
    for name, solve, bias in ladder:
        new = network.refined(q, learn, solve, bias, progress)
        try:
            new_loss = losses(network.module, new.module, held)
        except InputError as err:
            notes.append(Note("model", f"{name} not kept: {err}"))
            continue
        verdict = judge(loss, new_loss)
        notes.append(Note("model", f"{name} {'kept' if verdict.kept else 'not kept'}: {verdict}"))
        if verdict.kept:
            q, loss = new, new_loss
            if solve is not None:
                q = replace(q, provenance={**q.provenance, "solver": name.lower()})
    return q


def _limited(batches: list[Batch], whole: bool) -> list[Batch]:
    """The first `EXAMPLES` examples, or the batches that hold them."""
    out, left = [], EXAMPLES
    for batch in batches:
        if left > 0:
            out.append(batch if whole or len(batch) <= left else batch.take(torch.arange(left)))
            left -= len(batch)
    return out
