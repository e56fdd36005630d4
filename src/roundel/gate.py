"""The gate: is a quantized model nearer to the float one than another was, on examples that the step between did not learn from?"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import run
from .data import Batch
from .errors import InputError
from .evaluate.scores import Scores, predictions

#: Fewer examples than this cannot judge anything.
LEAST = 8


@dataclass(frozen=True)
class Paired:
    """Means of one loss before and after a step, and the standard error of their paired difference."""

    before: float
    after: float
    error: float

    def fell(self, beyond: float = 1.0) -> bool:
        """Whether the gain clears the noise: more than ``beyond`` standard errors."""
        return self.before - self.after > beyond * self.error

    def rose(self) -> bool:
        """Whether the loss rose by more than one standard error, or stopped being a number."""
        return not self.after - self.before <= self.error

    def __str__(self) -> str:
        return f"{self.before:.3g} to {self.after:.3g} ± {self.error:.1g}"


@dataclass(frozen=True)
class Verdict:
    """What a step did to two losses against the float model, over ``examples`` held out.

    ``kl`` is KL(float || quantized) where outputs are classes or tokens, else None. ``output`` is the squared error of the outputs,
    each less its mean over classes: few uncertain examples decide a divergence, while every example tells of this one.
    """

    kl: Paired | None
    output: Paired
    examples: int

    @property
    def kept(self) -> bool:
        """Whether the divergence fell, or the outputs came nearer while it did not rise; all beyond the noise."""
        if self.kl is None:
            return self.output.fell()
        return self.kl.fell() or (self.output.fell() and not self.kl.rose())

    @property
    def certain(self) -> bool:
        """Whether every loss fell by twice the noise. Parts must show that: many are tried, and chance favours some."""
        return self.output.fell(2.0) and (self.kl is None or self.kl.fell(2.0))

    def __str__(self) -> str:
        kl = f"KL {self.kl}, " if self.kl is not None else ""
        return f"{kl}squared error {self.output} on {self.examples} held-out examples"


Losses = tuple[Tensor | None, Tensor]


def answers(real: nn.Module, batches: Sequence[Batch]) -> list[Any]:
    """What a module returns for each batch, targets withheld."""
    with torch.no_grad():
        return [run(real, Batch(batch.args, batch.named)) for batch in batches]


def losses(real: nn.Module | Sequence[Any], quantized: nn.Module, batches: Sequence[Batch]) -> Losses:
    """(KL or None, squared error) of every example, float64; modules run in the mode they are in. ``real`` is a module, or its
    `answers` where several are compared with it.

    KL is of the first output, the squared error of all that are real. Raises `InputError` where outputs cannot be compared: none, a
    single number, whole numbers, or some that are not finite.
    """
    scores: Scores | None = None
    errors = []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            bare = Batch(batch.args, batch.named)
            wanted, got = run(real, bare) if isinstance(real, nn.Module) else real[number], run(quantized, bare)
            scores = scores or Scores.like(bare, wanted, None)
            scores.take(number, bare, wanted, got)
            if not predictions(wanted).is_floating_point():
                raise InputError("its first output are whole numbers, between which no distance says how near models are")
            lost = predictions(got).double() - predictions(wanted).double()
            if scores.kind != "values":
                lost = lost - lost.mean(-1, keepdim=True)
            error = lost.square().reshape(len(lost), -1).mean(1)
            for more, other in list(zip(_reals(wanted), _reals(got), strict=True))[1:]:
                if len(more) == len(error):
                    error = error + (other.double() - more.double()).square().reshape(len(error), -1).mean(1)
            errors.append(error)
    if scores is None:
        return None, torch.zeros(0, dtype=torch.float64)
    kl = None if scores.kind == "values" else torch.cat(scores.kl_rows) / torch.cat(scores.sizes).clamp(min=1)
    return kl, torch.cat(errors)


def _reals(output: Any) -> list[Tensor]:
    """The real tensors in what a model returned, the one that `predictions` takes first."""
    first = predictions(output)
    inside = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    reals = [x.detach() for x in inside if isinstance(x, Tensor) and x.is_floating_point()]
    return [first, *(x for x in reals if x.data_ptr() != first.data_ptr())]


def judge(before: Losses, after: Losses) -> Verdict:
    """The verdict on two models' `losses` over the same examples."""
    kl = None if before[0] is None or after[0] is None else _paired(before[0], after[0])
    return Verdict(kl, _paired(before[1], after[1]), len(before[1]))


def choose(
    parts: Sequence[str], measure: Callable[[frozenset[str]], Losses], none: Losses, passes: int, seconds: float = math.inf
) -> tuple[frozenset[str], Losses, Verdict]:
    """Which parts of a step stay: (those, the losses with them, the verdict on the whole step).

    ``measure`` gives the losses with some parts of the step in place, ``none`` are those without any. The whole is judged first.
    Then, by bisection, within ``passes`` measurements and ``seconds``, groups of parts are turned round, taken back from a step
    that stays or let in from one that does not, wherever the gain is certain, and each group is cut in two in its turn.
    """
    best, whole = none, measure(frozenset(parts))
    verdict, kept = judge(none, whole), frozenset[str]()
    if verdict.kept:
        best, kept = whole, frozenset(parts)
    groups, end = deque(_halves(parts)), time.monotonic() + seconds
    while groups and passes > 0 and time.monotonic() < end:
        group, passes = groups.popleft(), passes - 1
        turned = kept ^ frozenset(group)
        losses_turned = measure(turned)
        if judge(best, losses_turned).certain:
            best, kept = losses_turned, turned
        groups += _halves(group)
    return kept, best, verdict


def _halves(parts: Sequence[str]) -> list[Sequence[str]]:
    middle = len(parts) // 2
    return [parts[:middle], parts[middle:]] if middle else []


def _paired(before: Tensor, after: Tensor) -> Paired:
    n = len(before)
    error = float((before - after).std()) / math.sqrt(n) if n > 1 else math.inf
    return Paired(float(before.mean()), float(after.mean()), error)


def split(batches: Sequence[Batch], every: int = 4, whole: bool = False) -> tuple[list[Batch], list[Batch]]:
    """(what a step may learn from, what judges it): every fourth example judges, or every fourth batch where a network takes
    batches of one size only, which must stay ``whole``."""
    learn: list[Batch] = []
    held: list[Batch] = []
    start = 0
    for number, batch in enumerate(batches):
        if whole:
            (held if number % every == every - 1 else learn).append(batch)
            continue
        index = torch.arange(start, start + len(batch))
        start += len(batch)
        judging = index % every == every - 1
        for chosen, into in ((~judging, learn), (judging, held)):
            if chosen.any():
                into.append(batch.take(chosen.nonzero()[:, 0]))
    return learn, held
