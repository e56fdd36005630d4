"""Running ranges: a site whose range follows the numbers that pass; not how it starts (`quantize.running`).

A batch is its samples one after the other: sample i meets what samples before i have left, so one batch of 50 and 50 batches of
one give the same bits and leave the same state. The state is explicit, in buffers, and `reset` goes back to the stored start.

    suits  a sample that lies within the range and fills at least 1 / ``room`` of it: it is coded by the range, which stays
    anew   any other is coded anew, by its own ends, and draws the ends of the range towards them, by ``rate`` widths at most

So no sample is clipped and none loses more than the bits of ``room``, whatever the range; that it follows saves the second coding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..formats.codec import Stored
from ..formats.format import Format
from ..plan import When
from .layer import Activation

#: A range grows and shrinks by at most this factor.
FAR = 2.0**12

#: Samples that a `Course` keeps.
POINTS = 100

#: A range has moved where an end lies this share of the wider range from where it started.
MOVED = 1 / 4


@dataclass(frozen=True)
class Tracker:
    """How a range follows: it starts at [``low``, ``high``], in real numbers; ``rate`` is the furthest that one sample moves an
    end, in widths of the range; a sample that fills less than 1 / ``room`` of the range does not suit it.

    ``room`` 1 codes every sample by its own ends: what lies in memory before it is coded, as inputs do.
    """

    low: float
    high: float
    rate: float = 1 / 16
    room: float = 1.5

    def __post_init__(self) -> None:
        if not (self.low < self.high and 0 < self.rate <= 1 <= self.room):
            raise ValueError(f"a range that runs needs low < high, 0 < rate <= 1 and room >= 1, got {self}")


@dataclass(frozen=True)
class State:
    """Where a range is, in real numbers; how many samples in a row it did not suit, and how many in all."""

    low: float
    high: float
    drift: int = 0
    anew: int = 0


def advance(tracker: Tracker, sides: tuple[bool, bool], at: State, low: float, high: float) -> tuple[tuple[float, float], State]:
    """The range that codes a sample from ``low`` to ``high``, and the state after it; ``sides``: whether the range had numbers
    below and above 0 in calibration; a side without stays closed, as below a ReLU, and what comes there becomes 0.

    >>> at = State(-0.5, 0.5)
    >>> for _ in range(30):
    ...     coded, at = advance(Tracker(-0.5, 0.5), (True, True), at, -0.8, 1.0)  # everything doubles
    >>> coded, at.drift, at.anew
    ((-0.8, 1.0), 0, 6)
    """
    wide, width = tracker.high - tracker.low, at.high - at.low
    low, high = (max(min(low, 0.0), -FAR * wide) if sides[0] else 0.0), (min(max(high, 0.0), FAR * wide) if sides[1] else 0.0)
    beyond, small = low < at.low or high > at.high, (high - low) * tracker.room < width
    if not (beyond or small) or high - low < wide / FAR:
        return (at.low, at.high), replace(at, drift=0)
    most = tracker.rate * width
    a, b = (end + min(max(new - end, -most), most) for end, new in ((at.low, low), (at.high, high)))
    if not small:  # what lies beyond on one side says nothing of the other
        a, b = min(a, at.low), max(b, at.high)
    return (low, high), State(a, b, at.drift + 1, at.anew + 1)


@dataclass(frozen=True)
class Course:
    """What a range did over a stream: its ends at `POINTS` samples at most, evenly spread, the first and the last among them; where
    it started; how many samples passed; the shares of them coded anew and of numbers that lay beyond; samples in a row at the end
    that it did not suit."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    start: tuple[float, float]
    samples: int
    anew: float
    beyond: float
    drift: int

    @property
    def moved(self) -> float:
        """How far the ends came from where they started, as a share of the wider of the two ranges."""
        (a, b), low, high = self.start, self.low[-1], self.high[-1]
        return max(abs(low - a), abs(high - b)) / max(b - a, high - low)


def extremes(x: Tensor) -> Tensor:
    """Smallest and largest number of each sample of x (N, ...): (N, 2), float64. What is no number counts as 0."""
    flat = torch.nan_to_num(x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None], 0.0)
    return torch.stack([flat.amin(1), flat.amax(1)], 1).double() if flat.numel() else torch.zeros(0, 2, dtype=torch.float64)


def ends(activation: Activation) -> tuple[float, float]:
    """The range that stored parameters hold, in real numbers."""
    low, high = activation.quantize(torch.tensor([-3e38, 3e38])).tolist()
    return low, high


class Running(nn.Module):
    """A site whose range follows its numbers. `follow` takes the values as they are made; `codes` and `quantize` code them, and
    what only moves them, by the ranges found then. Without a tracker it stays where it is and records `extremes` (`quantize`).

    Buffers: ``range`` (low, high), float64; ``counts``, int64: samples, those in a row that the range did not suit, those that were
    coded anew, numbers, numbers beyond the range. Where ``trace`` is a list, every sample adds the range that it met.
    """

    range: Tensor
    counts: Tensor
    when: When = "running"

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.base = replace(activation, when="static")
        self.tracker = activation.tracker
        low, high = ends(self.base)
        self.sides = low < 0, high > 0
        self.start = (self.tracker.low, self.tracker.high) if self.tracker else (low, high)
        self.by_sample = Format.parse(str(self.format).replace("/tensor", "/token", 1))
        self.recorded: list[Tensor] = []
        self.trace: list[tuple[float, float]] | None = None
        self.register_buffer("range", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
        self.reset()

    @property
    def format(self) -> Format:
        return self.base.format

    def extra_repr(self) -> str:
        return f"{self.format}:running, {self.tracker}"

    def reset(self) -> None:
        """Back to where the range starts, as if nothing had passed."""
        self.range.copy_(torch.tensor(self.start, dtype=torch.float64))
        self.counts.zero_()
        self.live, self.coded = self.base, list[tuple[float, float]]()

    def follow(self, x: Tensor) -> Tensor:
        """``x`` (N, ...) on the grids that its samples meet, one after the other."""
        found = extremes(x)
        if self.tracker is None:
            self.recorded.append(found)
        if self.tracker is None or not len(found):
            self.live, self.coded = self.base, []
            return self.quantize(x)
        (low, high), (count, drift, anew, *_) = self.range.tolist(), self.counts.tolist()
        at, met, coded = State(low, high, drift, anew), [], []
        for low, high in found.tolist():
            met.append((at.low, at.high))
            own, at = advance(self.tracker, self.sides, at, low, high)
            coded.append(own)
        if coded != self.coded:  # parameters of a range that stays are not made again
            self.coded, self.live = coded, Activation(self.by_sample, "static", self._stored(torch.tensor(coded)))
        if self.trace is not None:
            self.trace += met
        past = self.counts[3:] + torch.tensor([x.numel(), self._beyond(x, found, torch.tensor(met, dtype=torch.float64))])
        self.range.copy_(torch.tensor([at.low, at.high], dtype=torch.float64))
        self.counts.copy_(torch.cat([torch.tensor([count + len(met), at.drift, at.anew]), past]))
        return self.quantize(x)

    def _beyond(self, x: Tensor, found: Tensor, met: Tensor) -> int:
        """How many numbers the ranges that samples met would not hold; ends that round to the last code are held."""
        slack = (met[:, 1] - met[:, 0]) / 2 ** (self.format.bits + 1)
        low, high = met[:, 0] - slack, met[:, 1] + slack
        out = ((found[:, 0] < low) | (found[:, 1] > high)).to(x.device)
        if not out.any():
            return 0
        low, high = (end.to(x)[out].reshape(-1, *[1] * (x.ndim - 1)) for end in (low, high))
        return int(((x[out] < low) | (x[out] > high)).sum())

    def _stored(self, coded: Tensor) -> Stored:
        """The parameters of ranges (N, 2), each as if it were alone: scales that count in units of a shared one are."""
        fmt, shared = self.by_sample, self.format.scale is not None and self.format.scale.scale is not None
        parts = [fmt.store(fmt.from_range(*part.split(1, 1))) for part in coded.split(1 if shared else len(coded))]
        scale, offset = (
            None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
            for name in ("scale", "offset")
        )
        return Stored(scale, offset)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(code - zero, scale) under what the batch met; the scale is one number, or one per sample (N, 1, ...)."""
        if self.live is self.base:
            return self.live.codes(x)
        code, scale = self.live.codes(x.flatten(1) if x.ndim > 1 else x[:, None])
        return code.reshape(x.shape), None if scale is None else scale.reshape(-1, *[1] * (x.ndim - 1))

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid that its batch met, in its own units."""
        code, scale = self.codes(x)
        return (code if scale is None else code * scale).to(x.dtype)

    def course(self) -> Course:
        """What the range did since `reset`; between there and now only where it has a ``trace``."""
        count, drift, anew, numbers, beyond = self.counts.tolist()
        passed = [*(self.trace or [self.start]), tuple(self.range.tolist())]
        picked = [passed[round(i * (len(passed) - 1) / (POINTS - 1))] for i in range(POINTS)] if len(passed) > POINTS else passed
        low, high = zip(*picked, strict=True)
        return Course(low, high, self.start, count, anew / max(1, count), beyond / max(1, numbers), drift)

    def told(self) -> str | None:
        """How the range moved since `reset`; None where it did not."""
        course = self.course()
        if course.moved <= MOVED:
            return None
        (a, b), low, high = course.start, course.low[-1], course.high[-1]
        went = f"its range moved in {course.samples} samples from {a:.3g} to {b:.3g} to {low:.3g} to {high:.3g}"
        return f"{went}; {course.anew:.0%} of them were coded by their own ends, {course.beyond:.2%} of its numbers lay beyond"


def trackers(module: nn.Module) -> dict[str, Running]:
    """The running sites of a network, by name.

    >>> trackers(nn.Linear(2, 2))
    {}
    """
    found = ((name.rpartition("sites.")[2].replace("\x1f", "."), part) for name, part in module.named_modules())
    return {name: part for name, part in found if isinstance(part, Running)}


def reset(*modules: nn.Module) -> None:
    """Every running site of the networks back to its start."""
    for part in (part for module in modules for part in trackers(module).values()):
        part.reset()
