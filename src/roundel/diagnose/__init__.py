"""`diagnose`: why a quantized model is worse than its float original, and what mending each cause was measured to be worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import evaluating, list_of_batches, one_thread
from ..data import Batch, batches
from ..errors import PlanError, RoundelError
from ..qmodel import Note, QModel
from .clues import CLUES, Suspect
from .evidence import Evidence, gather
from .inputs import against_labels, wrong_inputs
from .loss import apart, outputs
from .machine import as_computed

__all__ = ["Finding", "diagnose", "promise"]

#: Least loss before that is worth a word: nats, or the share of the outputs' variance.
LEAST = 1e-3

#: A finding takes away at least this share of the loss, beyond so many standard errors; too few bits is found where one layer
#: alone makes up half of it.
SHARE, ERRORS, ALONE = 0.25, 3.0, 0.5

#: Cures within this share of the best are worth the same: then the clue that explains most is told first.
SAME = 0.9


@dataclass(frozen=True, eq=False)
class Finding:
    """Something wrong in a quantized model.

    ``layer`` is a layer, site or input, ``cause`` one of a short list (docs/diagnosis.md), ``cure`` what to do, in words. ``gain``
    is the loss that the cure takes away, ``before - after``, measured on data that it was not made from, with the standard error
    ``error``. ``unit`` says in what: nats (KL divergence from the float model; against the labels where the inputs themselves are
    wrong) or the share of the outputs' variance. ``model`` is the quantized model with the cure applied, ``mend`` what has to be
    done to each batch of data, where that is the cure.
    """

    layer: str
    cause: str
    cure: str
    gain: float
    before: float
    after: float
    error: float
    unit: str
    model: QModel = field(repr=False)
    mend: Callable[[Batch], Batch] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.layer}: {self.cause}; {self.cure} (loss {self.before:.3g} to {self.after:.3g} {self.unit})"


def diagnose(q: QModel, model: nn.Module, data: Any, *, vnni: bool = True) -> list[Finding]:
    """Find out what makes ``q`` worse than the float ``model`` it came from, the costliest cause first.

    ``data`` is what it was calibrated with, or other examples; labels, where there are some, show wrong preprocessing. Clues in
    the stored numbers and in what passes through the networks name suspects, each with a cure. The cure is made from every
    third example and measured on the others. What gains less than a quarter of the loss, or less than three standard errors, is
    not told, so a healthy model has no findings. Findings exclude each other more often than they add up: apply the first
    (its ``model``), then diagnose again. ``vnni=False`` judges as x86 without VNNI computes uint8 activations, whose products are
    added in pairs of 16 bits.

    Raises `InputError` where the models cannot be compared on the data, `PlanError` for a ``q`` that is no `QModel`.

    >>> import torch
    >>> from roundel import quantize
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> net[0].weight.data[3] *= 1000
    >>> net[2].weight.data[:, 3] /= 1000
    >>> x = torch.rand(256, 16)
    >>> found = diagnose(quantize(net, "int8/tensor", data=x), net, x)
    >>> found[0].layer, found[0].cause
    ('0', 'outlier channel')
    """
    if not isinstance(q, QModel) or not isinstance(model, nn.Module):
        raise PlanError(
            f"diagnose takes a QModel and the float model it was made from, got {type(q).__name__} and {type(model).__name__}"
        )
    items = list_of_batches(batches(data))
    with one_thread(), torch.no_grad(), evaluating(model):
        wrong = wrong_inputs(q, model, items)
        if wrong is not None:  # no figure means anything on data that is not what the model was trained on
            before, after, error = _means(wrong.before, wrong.after)
            return [Finding(wrong.layer, "wrong preprocessing", wrong.cure, before - after, before, after, error, "nats",
                            wrong.model, wrong.mend)]  # fmt: skip
        evidence = gather(q, model, items, vnni)
        if float(evidence.before.mean()) < LEAST:
            return []
        tried = [(rank, finding) for rank, clue in enumerate(CLUES) for suspect in clue(evidence)
                 if (finding := _tried(evidence, suspect)) is not None]  # fmt: skip
    return _ranked(tried)


def promise(found: Finding, q: QModel, model: nn.Module, data: Any, *, vnni: bool = True) -> tuple[float, float]:
    """(loss of ``q``, loss with the cure of ``found``) on other data than it was found on, in the finding's own unit: what its
    ``gain`` promised, and what it kept.

    Raises `InputError` where the models cannot run on the data.
    """
    items = list_of_batches(batches(data))
    with one_thread(), torch.no_grad(), evaluating(model):
        if found.mend is not None:
            mended = [found.mend(batch) for batch in items]
            before, after = against_labels(q, items), against_labels(found.model, mended)
        else:
            wanted = outputs(model, items)
            before, after = (apart(items, wanted, outputs(as_computed(one, vnni), items)) for one in (q, found.model))
    return float(before.mean()), float(after.mean())


def _tried(e: Evidence, suspect: Suspect) -> Finding | None:
    """The suspect with its cure's measured gain, or None where it is not worth telling or cannot be made."""
    try:
        model = e.settled(suspect.make())
        after = e.loss(model)
        before = min((e.before, e.rival, *([e.loss(suspect.rival())] if suspect.rival else [])), key=lambda one: float(one.mean()))
    except RoundelError:  # a cure that does not fit this network is none
        return None
    mean, now, error = _means(before, after)
    share = ALONE if suspect.cause == "too few bits" else SHARE
    if not mean - now > max(ERRORS * error, share * mean):
        return None
    said = Note(suspect.layer, f"{suspect.cause}: {suspect.cure}")
    mean = float(e.before.mean())
    return Finding(suspect.layer, suspect.cause, suspect.cure, mean - now, mean, now, error, e.unit,
                   replace(model, notes=(*model.notes, said)))  # fmt: skip


def _means(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Both means and the standard error of the difference."""
    n = len(before)
    error = float((before - after).std()) / math.sqrt(n) if n > 1 else math.inf
    return float(before.mean()), float(after.mean()), error


def _ranked(tried: list[tuple[int, Finding]]) -> list[Finding]:
    """By gain; of those worth the same, by how much the clue explains. Of several cures for one thing the best stays."""
    best: dict[tuple[str, str], tuple[int, Finding]] = {}
    for rank, finding in tried:
        key = finding.layer, finding.cause
        if key not in best or finding.gain > best[key][1].gain:
            best[key] = rank, finding
    left, out = sorted(best.values(), key=lambda one: -one[1].gain), []
    while left:
        first = min((one for one in left if one[1].gain >= SAME * left[0][1].gain), key=lambda one: (one[0], -one[1].gain))
        left.remove(first)
        out.append(first[1])
    return out
