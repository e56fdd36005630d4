"""How far a model's outputs lie from wanted ones, example by example: a divergence, or a share of their variance; no causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate import run
from ..data import Batch
from ..errors import InputError
from ..evaluate.scores import Scores, predictions

#: An output whose variance is this share of the largest is taken for a constant: nothing of it can be lost.
CONSTANT = 1e-10


def outputs(module: nn.Module, batches: Sequence[Batch]) -> list[Any]:
    """What ``module`` gives for every batch, labels left away."""
    with torch.no_grad():
        return [run(module, bare(batch)) for batch in batches]


def bare(batch: Batch) -> Batch:
    return Batch(batch.args, batch.named)


def kind_of(batches: Sequence[Batch], wanted: Sequence[Any]) -> str:
    """What a loss is measured in."""
    return "of the outputs' variance" if _scores(batches, wanted) is None else "nats"


def apart(batches: Sequence[Batch], wanted: Sequence[Any], got: Sequence[Any]) -> Tensor:
    """(examples,), float64: KL(wanted || got) in nats where outputs are classes or tokens. Else the mean over all numbers of the
    outputs of their squared error as a share of that number's own variance over the examples, at most 1: of boxes in pixels and
    scores below one, neither hides the other.

    Raises `InputError` where they cannot be compared.
    """
    scores = _scores(batches, wanted)
    if scores is not None:
        for number, (batch, one, other) in enumerate(zip(batches, wanted, got, strict=True)):
            scores.take(number, bare(batch), one, other)
        return torch.cat(scores.kl_rows) / torch.cat(scores.sizes).clamp(min=1)
    pairs = [_flat(one, other) for one, other in zip(wanted, got, strict=True)]
    real, made = (torch.cat(part) for part in zip(*pairs, strict=True))
    if not bool(made.isfinite().all()):
        raise InputError("outputs of the quantized model are not finite")
    spread = real.var(0, correction=0)
    moving = spread > CONSTANT * spread.max()
    if not bool(moving.any()):
        raise InputError("the float model gives the same output for every example: nothing tells models apart")
    return ((made - real).square()[:, moving] / spread[moving]).clamp(max=1.0).mean(1)


def to_labels(batches: Sequence[Batch], got: Sequence[Any]) -> Tensor:
    """(examples,), float64: cross entropy of class scores (N, C) against the labels, nats."""
    return torch.cat([
        F.cross_entropy(predictions(out).double(), batch.target.long(), reduction="none")
        for batch, out in zip(batches, got, strict=True) if batch.target is not None
    ])  # fmt: skip


def labelled(batches: Sequence[Batch], got: Sequence[Any]) -> bool:
    """Whether there is a class label for every example, and class scores to go with it."""
    return all(
        batch.target is not None and batch.target.ndim == 1 and not batch.target.is_floating_point()
        and (scores := predictions(out)).ndim == 2 and len(scores) == len(batch.target)
        and int(batch.target.max()) < scores.shape[1]
        for batch, out in zip(batches, got, strict=True)
    )  # fmt: skip


def _scores(batches: Sequence[Batch], wanted: Sequence[Any]) -> Scores | None:
    """The scores of classes or tokens, None of other outputs."""
    scores = Scores.like(bare(batches[0]), wanted[0], None)
    return None if scores.kind == "values" else scores


def _flat(one: Any, other: Any) -> tuple[Tensor, Tensor]:
    """All real numbers of two outputs as (examples, numbers), float64."""
    first, second = list(_reals(one)), list(_reals(other))
    if not first or [x.shape for x in first] != [x.shape for x in second]:
        raise InputError(
            f"the float model gives {[list(x.shape) for x in first]}, the quantized one {[list(x.shape) for x in second]}"
        )
    n = len(first[0])
    whole = [(a, b) for a, b in zip(first, second, strict=True) if len(a) == n]
    a, b = (torch.cat([x.reshape(n, -1).double() for x in part], 1) for part in zip(*whole, strict=True))
    return a, b


def _reals(output: Any) -> list[Tensor]:
    """The real tensors in what a model returned, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.ndim else []
    inside = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [x for part in inside for x in _reals(part)]
