"""Running ranges: a site whose range follows the ends of what passes; not how it starts (`quantize.running`).

A batch is its samples one after the other: sample i is coded by what samples before i have left, so one batch of 50 and 50 batches
of one give the same bits and leave the same state. The state is explicit, in buffers, and `reset` goes back to the stored start.

    seen   each end e of [a, b] += rate * clip(sample's end - e, +-bound * (b - a))
    new    the range that lies to [a, b] as at the start; an end of 0 stays 0, for a ReLU has no numbers below
    moves  where, ``patience`` samples in a row, an end of the new range lies further than ``margin`` widths from the old one; then
           with every sample, until the new range is within a quarter of the margin
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from ..formats.codec import Stored
from ..formats.format import Format
from ..plan import When
from .layer import Activation

#: The share of the margin below which a range that moves comes to rest.
SETTLED = 1 / 4

#: A range grows and shrinks by at most this factor.
FAR = 2.0**12


@dataclass(frozen=True)
class Tracker:
    """How a range follows: ``low`` and ``high`` are the means of calibration's smallest and largest numbers, sample by sample.

    ``rate`` is the weight of one sample, ``bound`` the furthest that one counts (in widths of what was seen), ``margin`` the share
    of the range that an end must be off, ``patience`` for how many samples in a row.
    """

    low: float
    high: float
    rate: float = 1 / 16
    bound: float = 1.0
    margin: float = 1 / 8
    patience: int = 4


@dataclass(frozen=True)
class State:
    """Where a tracker is: the ends seen and the range, in real numbers; for how many samples a better one was offered, how often it
    has moved."""

    a: float
    b: float
    low: float
    high: float
    drift: int = 0
    moves: int = 0


def advance(tracker: Tracker, start: tuple[float, float], at: State, low: float, high: float) -> State:
    """The state after a sample from ``low`` to ``high``; ``start`` is the starting range.

    >>> at = State(-0.4, 0.4, -0.5, 0.5)
    >>> for _ in range(60):
    ...     at = advance(Tracker(-0.4, 0.4), (-0.5, 0.5), at, -0.8, 0.8)  # everything doubles
    >>> round(at.high, 1), at.moves > 0
    (0.9, True)
    """
    reach, furthest = tracker.bound * (at.b - at.a), FAR * (tracker.high - tracker.low)
    a, b = (
        end + tracker.rate * min(max(min(max(new, -furthest), furthest) - end, -reach), reach)
        for end, new in ((at.a, low), (at.b, high))
    )
    at, width = replace(at, a=a, b=max(a, b)), at.high - at.low
    low, high = _offered(tracker, start, at)
    margin = tracker.margin * (SETTLED if at.drift >= tracker.patience else 1)
    small = high - low < (start[1] - start[0]) / FAR
    if small or max(abs(low - at.low), abs(high - at.high)) <= margin * width:
        return replace(at, drift=0)
    drift = min(at.drift + 1, tracker.patience)
    if drift < tracker.patience:
        return replace(at, drift=drift)
    return replace(at, drift=drift, low=low, high=high, moves=at.moves + 1)


def _offered(tracker: Tracker, start: tuple[float, float], at: State) -> tuple[float, float]:
    """The range that lies to the ends seen as the starting one lay to those of calibration; it holds 0."""
    stretch = (at.b - at.a) / (tracker.high - tracker.low)
    low, high = (at.a + (end - tracker.low) * stretch for end in start)
    return min(low, 0.0) if start[0] else 0.0, max(high, 0.0) if start[1] else 0.0


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
    what only moves them, by the parameters found then. Without a tracker it stays where it is and records `extremes` (`quantize`).

    Buffers: ``seen`` (the ends), ``range`` (low, high), float64; ``counts``, int64: samples, those in a row that were
    offered a better range (up to ``patience``), moves, numbers, numbers beyond the range.
    """

    seen: Tensor
    range: Tensor
    counts: Tensor
    when: When = "running"

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.base = replace(activation, when="static")
        self.tracker = activation.tracker
        self.start = ends(self.base)
        self.recorded: list[Tensor] = []
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("range", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
        self.reset()

    @property
    def format(self) -> Format:
        return self.base.format

    def extra_repr(self) -> str:
        return f"{self.format}:running, {self.tracker}"

    def reset(self) -> None:
        """Back to the range of calibration, as if nothing had passed."""
        found = (self.tracker.low, self.tracker.high) if self.tracker else (0.0, 0.0)
        self.seen.copy_(torch.tensor(found, dtype=torch.float64))
        self.range.copy_(torch.tensor(self.start, dtype=torch.float64))
        self.counts.zero_()
        self.live = self.base

    def follow(self, x: Tensor) -> Tensor:
        """``x`` (N, ...) on the grids that its samples meet, one after the other."""
        found = extremes(x)
        if self.tracker is None:
            self.recorded.append(found)
            return self.quantize(x)
        count, drift, moves, *_ = self.counts.tolist()
        (a, b), (low, high) = self.seen.tolist(), self.range.tolist()
        at, met = State(a, b, low, high, drift, moves), []
        for low, high in found.tolist():
            met.append((at.low, at.high))
            at = advance(self.tracker, self.start, at, low, high)
        self.live = self._coding(met) if met else self.base
        limits = torch.tensor(met, dtype=x.dtype, device=x.device).reshape(-1, 2, *[1] * (x.ndim - 1))
        slack = (limits[:, 1] - limits[:, 0]) / 2 ** (self.format.bits + 1)  # rounds to the end
        beyond = int(((x < limits[:, 0] - slack) | (x > limits[:, 1] + slack)).sum())
        self.seen.copy_(torch.tensor([at.a, at.b], dtype=torch.float64))
        self.range.copy_(torch.tensor([at.low, at.high], dtype=torch.float64))
        past = self.counts[3:] + torch.tensor([x.numel(), beyond])
        self.counts.copy_(torch.cat([torch.tensor([count + len(met), at.drift, at.moves]), past]))
        return self.quantize(x)

    def _coding(self, met: list[tuple[float, float]]) -> Activation:
        """What codes a batch whose samples meet these ranges: one set of parameters, or one per sample."""
        parts = [(self._stored(pair), len(list(same))) for pair, same in groupby(met)]
        if len(parts) == 1:
            return replace(self.base, params=parts[0][0])
        format = Format.parse(str(self.format).replace("/tensor", "/token", 1))
        scale, offset = (
            None if getattr(parts[0][0], name) is None else torch.cat([getattr(p, name).expand(n, 1) for p, n in parts])
            for name in ("scale", "offset")
        )
        return Activation(format, "static", Stored(scale, offset))

    def _stored(self, pair: tuple[float, float]) -> Stored:
        """The parameters of a range: those of the file as long as it has not moved."""
        if pair == self.start and self.base.params is not None:
            return self.base.params
        low, high = (torch.full((1, 1), end) for end in pair)
        return self.format.store(self.format.from_range(low, high))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(code - zero, scale) under what the batch met; the scale is one number, or one per sample (N, 1, ...)."""
        if self.live.format is self.base.format:
            return self.live.codes(x)
        code, scale = self.live.codes(x.flatten(1) if x.ndim > 1 else x[:, None])
        return code.reshape(x.shape), None if scale is None else scale.reshape(-1, *[1] * (x.ndim - 1))

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid that its batch met, in its own units."""
        code, scale = self.codes(x)
        return (code if scale is None else code * scale).to(x.dtype)

    def told(self) -> str | None:
        """How the range moved since `reset`; None where it did not."""
        count, _, moves, numbers, beyond = self.counts.tolist()
        if not moves:
            return None
        (a, b), (low, high) = self.start, self.range.tolist()
        share = beyond / max(1, numbers)
        return (f"its range moved {moves} times in {count} samples, from {a:.3g} to {b:.3g} to {low:.3g} to {high:.3g}; "
                f"{share:.2%} of its numbers lay beyond")  # fmt: skip


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
