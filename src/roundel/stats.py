"""`Stats`: what passes over an activation leave behind in bounded memory, and the ranges found in it; no layers, no formats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import InputError, PlanError

__all__ = ["METHODS", "Stats", "find_range"]

#: Ways to find a range; ``percentile`` also takes its own share, as in ``percentile:99.9``.
METHODS = ("minmax", "average", "percentile", "mse", "kl")

#: Bins on each side of zero are 2**LOG_BINS. Widths are powers of two, never finer than 2**FINEST.
LOG_BINS, FINEST = 12, -100
BINS = 1 << LOG_BINS

#: A batch moves the average by this much (torch's `MovingAverageMinMaxObserver`), and by 1/n while that is more.
MOVING = 0.01

#: Values binned at a time: the temporaries stay in cache, and small whatever the tensor.
CHUNK = 1 << 16

Array = NDArray[np.float64]


@dataclass(eq=False)
class Stats:
    """A histogram, the exact extremes and a moving average of each batch's extremes; the one value that changes in place.

    Bin ``BINS + k`` counts values in [k w, (k + 1) w) for w = 2**exponent, bin ``BINS - 1 - k`` those in (-(k + 1) w, -k w]. The
    width follows from the largest magnitude seen alone, and bins merge in whole pairs, so every split of the same values over
    `update` and `merge` ends in the same numbers. Only ``average``, whose unit is the batch, depends on order.

    >>> stats = Stats()
    >>> stats.update(torch.tensor([-1.0, 0.0, 3.0]))
    >>> stats.count, stats.zeros, stats.min, stats.max, stats.width
    (3, 1, -1.0, 3.0, 0.0009765625)
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    exponent: int = FINEST
    count: int = 0
    zeros: int = 0
    min: float = math.inf
    max: float = -math.inf
    batches: int = 0
    average: tuple[float, float] = (0.0, 0.0)

    @property
    def width(self) -> float:
        """Width of a bin: at most 2**-11 of the largest magnitude seen."""
        return math.ldexp(1.0, self.exponent)

    def update(self, x: Tensor) -> None:
        """Take in one batch: a real tensor of any shape. A value that is not finite raises `InputError` and changes nothing."""
        if x.is_complex():
            raise InputError("complex values have no range; quantize their real and imaginary parts")
        if x.numel() == 0:
            return
        x = x.detach()
        x = x if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x.float()
        x = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)  # memory order, which copies least
        lo, hi = (float(end) + 0.0 for end in x.aminmax())  # + 0.0 turns -0.0, which a split could lose, into 0.0
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise InputError(f"{int((~x.isfinite()).sum())} of {x.numel()} values are not finite in float32")
        self._coarsen(_exponent(max(abs(lo), abs(hi))))
        for part in x.split(CHUNK):
            bins = (part.float() * math.ldexp(1.0, -self.exponent)).to(torch.int32)  # exact product; the cast cuts towards zero
            bins += BINS - (part < 0).int()
            self.counts += torch.bincount(bins, minlength=2 * BINS).cpu().numpy()
        self.count += x.numel()
        self.zeros += x.numel() - int(torch.count_nonzero(x))
        self.min, self.max = min(self.min, lo), max(self.max, hi)
        self.batches += 1
        self._average(lo, hi, max(1 / self.batches, MOVING))

    def merge(self, other: Stats) -> None:
        """Take in what ``other`` saw; the two averages are weighted by their numbers of batches."""
        self._coarsen(other.exponent)
        self.counts += _coarser(other.counts, self.exponent - other.exponent)
        self.count += other.count
        self.zeros += other.zeros
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)
        self.batches += other.batches
        if other.batches:
            self._average(*other.average, other.batches / self.batches)

    def _coarsen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def _average(self, lo: float, hi: float, share: float) -> None:
        old_lo, old_hi = self.average
        self.average = (old_lo + share * (lo - old_lo), old_hi + share * (hi - old_hi))


def _exponent(largest: float) -> int:
    """The finest power-of-two width at which ``largest`` still has a bin."""
    return max(FINEST, math.frexp(largest)[1] - LOG_BINS) if largest else FINEST


def _coarser(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """The same values in bins 2**doublings as wide, zero staying an edge."""
    step = 1 << min(doublings, LOG_BINS)
    merged = np.zeros_like(counts)
    merged[BINS : BINS + BINS // step] = counts[BINS:].reshape(-1, step).sum(1)
    merged[BINS - BINS // step : BINS] = counts[:BINS].reshape(-1, step).sum(1)
    return merged


# -- ranges -----------------------------------------------------------------------------------------------------------


def find_range(stats: Stats, method: str, lo_code: int, hi_code: int, symmetric: bool | None = None) -> tuple[float, float]:
    """The real range (lo, hi), lo <= 0 <= hi, that the codes lo_code..hi_code should span; all-zero data gives (0.0, 0.0).

    * ``minmax``: the extremes.
    * ``average``: the moving average of each batch's extremes: the plain mean of up to 100 batches, then 1 % per batch.
    * ``percentile[:p]``: p percent of the values lie inside (default 99.99), the rest is shared by the two ends.
    * ``mse``: least expected squared error of the uniform grid, its zero point rounded, over the histogram.
    * ``kl``: least divergence between the values, those outside moved to the edge, and what the codes can tell apart of those
      inside (Migacz, GTC 2017), over both ends at once. Values of exactly zero, which every range holds, have no say; with fewer
      occupied bins than codes it is ``minmax``.

    ``symmetric`` asks for lo == -hi (default: whether lo_code == -hi_code). Raises `PlanError` for an unknown method, `InputError`
    when no value was seen.

    >>> stats = Stats()
    >>> stats.update(torch.linspace(-1, 3, 1001))
    >>> find_range(stats, "minmax", -128, 127), find_range(stats, "minmax", -127, 127)
    ((-1.0, 3.0), (-3.0, 3.0))
    """
    name, _, share = method.partition(":")
    inside = _percent(share) if name == "percentile" else None
    if name not in METHODS or (share and inside is None):
        raise PlanError(f"ranges {method!r} is not one of: {', '.join(METHODS)}, percentile:P with 0 < P <= 100")
    if stats.count == 0:
        raise InputError("no value was seen here, so it has no range; give calibration data that reaches it")
    symmetric = lo_code == -hi_code if symmetric is None else symmetric
    lo, hi = _ends(*(stats.average if name == "average" else (stats.min, stats.max)), symmetric)
    if lo == hi or name in ("minmax", "average"):
        return lo, hi
    if inside is not None:
        return _percentile(stats, inside, symmetric)
    cost = _Mse(stats, lo_code, hi_code, symmetric) if name == "mse" else _Kl(stats, hi_code - lo_code + 1)
    return cost.settle(*_search(cost, lo, hi, symmetric))


def _percent(text: str) -> float | None:
    try:
        p = float(text or 99.99)
    except ValueError:
        return None
    return p if 0 < p <= 100 else None


def _ends(lo: float, hi: float, symmetric: bool) -> tuple[float, float]:
    """Widened to hold zero, and to mirror itself where asked."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    return (-max(-lo, hi), max(-lo, hi)) if symmetric else (lo, hi)


def _percentile(stats: Stats, p: float, symmetric: bool) -> tuple[float, float]:
    """Each end is within one bin's width of what sorting all values would give."""
    at = np.arange(-BINS, BINS + 1.0)
    counts = stats.counts.copy()
    counts[BINS] -= stats.zeros
    # Zeros are a bin of no width between the two sides.
    left, right, counts = np.insert(at[:-1], BINS, 0), np.insert(at[1:], BINS, 0), np.insert(counts, BINS, stats.zeros)
    if symmetric:
        left, right = left[BINS:], right[BINS:]
        counts = counts[BINS:] + np.concatenate([[0], counts[BINS - 1 :: -1]])
    below = np.concatenate([[0], np.cumsum(counts)])
    least, largest = (0.0, max(-stats.min, stats.max)) if symmetric else (stats.min, stats.max)

    def at_rank(rank: int) -> float:
        i = int(np.searchsorted(below, rank, side="right")) - 1
        value = left[i] + (right[i] - left[i]) * (rank - below[i] + 0.5) / counts[i]
        return min(max(float(value) * stats.width, least), largest)

    def quantile(q: float) -> float:
        if q in (0, 1):
            return largest if q else least
        rank = q * (stats.count - 1)
        whole = math.floor(rank)
        a, b = at_rank(whole), at_rank(min(whole + 1, stats.count - 1))
        return a + (b - a) * (rank - whole)

    if symmetric:
        return _ends(0.0, quantile(p / 100), True)
    return _ends(quantile((1 - p / 100) / 2), quantile((1 + p / 100) / 2), False)


# Shares of the full range to try first, widest first so that a tie keeps the range; below 1/32 a few octaves for heavy tails.
_FIRST = np.concatenate([np.arange(32, 0, -1) / 32, 0.5 ** np.arange(6, 13)])
_NEAR = np.array([0.0, 0.75, 0.5, 0.25, -0.25, -0.5, -0.75])


def _search(cost: Callable[[Array, Array], Array], lo: float, hi: float, symmetric: bool) -> tuple[float, float]:
    """The (lo, hi) of least cost within the full range, found coarse to fine, both ends together."""

    def best(a: Array, b: Array) -> tuple[float, float]:
        pairs = (b, b) if symmetric else (np.repeat(a, len(b)), np.tile(b, len(a)))
        i = int(np.argmin(cost(pairs[0] * lo, pairs[1] * hi)))
        return float(pairs[0][i]), float(pairs[1][i])

    one = np.ones(1)
    a, b = best(_FIRST if lo else one, _FIRST if hi else one)
    for step in (1.0, 0.25, 0.0625):
        near = [share + min(1 / 32, share / 2) * step * _NEAR for share in (a, b)]
        a, b = best(*(shares[shares <= 1] if end else one for shares, end in zip(near, (lo, hi), strict=True)))
    return a * lo, b * hi


class _Mse:
    """Expected squared error of a uniform grid over the histogram, taken as flat within each bin, with its zeros at zero."""

    def __init__(self, stats: Stats, lo_code: int, hi_code: int, symmetric: bool) -> None:
        self.width, self.lo_code, self.hi_code, self.symmetric = stats.width, lo_code, hi_code, symmetric
        self.density = stats.counts.astype(np.float64)
        self.density[BINS] -= stats.zeros
        edges = np.arange(-BINS, BINS + 1.0)
        self.below = [np.concatenate([[0.0], np.cumsum(self.density * np.diff(edges**k) / k)]) for k in (1, 2, 3)]

    def grid(self, lo: Array, hi: Array) -> tuple[Array, Array]:
        """Step and zero point."""
        if self.symmetric:
            return hi / min(self.hi_code, -self.lo_code), np.zeros_like(hi)
        step = (hi - lo) / (self.hi_code - self.lo_code)
        return step, np.clip(np.rint(self.lo_code - lo / step), self.lo_code, self.hi_code)

    def settle(self, lo: float, hi: float) -> tuple[float, float]:
        """The range as the rounded zero point leaves it."""
        if self.symmetric:
            return lo, hi
        step, zero = (float(v[0]) for v in self.grid(np.array([lo]), np.array([hi])))
        return (self.lo_code - zero) * step, (self.hi_code - zero) * step

    def moments(self, t: Array) -> tuple[Array, Array, Array]:
        """Integrals of 1, x and x^2 up to ``t``, in bins."""
        t = np.clip(t, -BINS, BINS)
        i = np.minimum(np.floor(t), BINS - 1)
        at = i.astype(np.int64) + BINS
        m0, m1, m2 = (self.below[k][at] + self.density[at] * (t ** (k + 1) - i ** (k + 1)) / (k + 1) for k in range(3))
        return m0, m1, m2

    def __call__(self, lo: Array, hi: Array) -> Array:
        step, zero = self.grid(lo / self.width, hi / self.width)
        codes = np.arange(self.lo_code, self.hi_code + 1.0)
        if len(codes) > BINS:  # steps are no wider than bins: the error of those inside is step^2 / 12
            codes = codes[[0, -1]]
            ends = (codes - zero[:, None]) * step[:, None]
            m = self.moments(np.concatenate([np.full_like(ends[:, :1], -BINS), ends, np.full_like(ends[:, :1], BINS)], 1))
            d0, d1, d2 = (np.diff(v, axis=1) for v in m)
            out = [d2[:, j] - 2 * ends[:, e] * d1[:, j] + ends[:, e] ** 2 * d0[:, j] for j, e in ((0, 0), (2, 1))]
            return out[0] + out[1] + d0[:, 1] * step**2 / 12
        costs = []
        for rows in np.array_split(np.arange(len(step)), -(-len(step) * len(codes) // CHUNK)):
            level = (codes - zero[rows, None]) * step[rows, None]
            cut = np.full((len(rows), len(codes) + 1), -float(BINS))
            cut[:, 1:-1], cut[:, -1] = (level[:, 1:] + level[:, :-1]) / 2, BINS
            d0, d1, d2 = (np.diff(v, axis=1) for v in self.moments(cut))
            costs.append((d2 - 2 * level * d1 + level**2 * d0).sum(1))
        return np.concatenate(costs)


class _Kl:
    """KL(values || what ``codes`` equal segments of a range can tell of them), over whole bins; Migacz's calibration with two ends.

    The reference keeps every value: those outside move into the outermost bins. The candidate drops them, averages each segment
    over its occupied bins, and is renormalised; a segment left empty by that counts as ``EMPTY`` of a value. Segments are cut at
    the nearest bin edge; a range of fewer bins than codes costs infinity.
    """

    EMPTY = 1e-4

    def __init__(self, stats: Stats, codes: int) -> None:
        self.width, self.codes = stats.width, codes
        n = stats.counts.astype(np.float64)
        n[BINS] -= stats.zeros
        self.n = n
        self.below, self.occupied, self.entropy = (np.concatenate([[0.0], np.cumsum(v)]) for v in (n, n > 0, _xlogx(n)))

    def settle(self, lo: float, hi: float) -> tuple[float, float]:
        """The range as it was found."""
        return lo, hi

    def __call__(self, lo: Array, hi: Array) -> Array:
        reach = [np.where(end > 0, np.minimum(np.floor(end / self.width) + 1, BINS), 0).astype(np.int64) for end in (-lo, hi)]
        first, last = BINS - reach[0], BINS + reach[1]
        costs = np.full(len(lo), np.inf)
        wide = np.flatnonzero(last - first >= self.codes)
        for rows in np.array_split(wide, max(1, -(-len(wide) * self.codes // CHUNK))):
            costs[rows] = self.divergence(first[rows], last[rows])
        return costs

    def divergence(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> Array:
        """For each candidate of the bins first..last-1, in nats."""
        total = self.below[-1]
        cuts = first[:, None] + np.rint(np.arange(self.codes + 1) * (last - first)[:, None] / self.codes).astype(np.int64)
        kept, spread = np.diff(self.below[cuts], axis=1), np.diff(self.occupied[cuts], axis=1)
        held = kept.copy()
        p_log_p = self.entropy[last] - self.entropy[first]
        for outside, edge, segment in ((self.below[first], first, 0), (total - self.below[last], last - 1, -1)):
            held[:, segment] += outside
            spread[:, segment] += (self.n[edge] == 0) & (outside > 0)
            p_log_p += _xlogx(self.n[edge] + outside) - _xlogx(self.n[edge])
        kept = np.where((kept == 0) & (held > 0), self.EMPTY, kept)
        log_q = np.log(np.where(held > 0, kept, 1) / np.maximum(spread, 1)) - np.log(kept.sum(1, keepdims=True))
        return (p_log_p - (held * log_q).sum(1)) / total - math.log(total)


def _xlogx(x: Array) -> Array:
    return x * np.log(np.where(x > 0, x, 1.0))
