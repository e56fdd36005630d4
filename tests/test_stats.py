"""`Stats` against sorting, brute force and hand-worked cases; what calibration makes of the ranges is tested elsewhere."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.errors import InputError, PlanError
from roundel.stats import BINS, FINEST, METHODS, Stats, _Kl, _Mse, find_range

SAMPLES = {
    "normal": lambda g: torch.randn(40_000, generator=g) * 3 + 1,
    "relu": lambda g: torch.randn(40_000, generator=g).relu(),
    "lognormal": lambda g: torch.randn(40_000, generator=g).exp() - 0.5,
    "negative": lambda g: -torch.rand(40_000, generator=g) - 0.25,
}


def sample(name: str) -> torch.Tensor:
    return SAMPLES[name](torch.Generator().manual_seed(3))


def taken(x: torch.Tensor) -> Stats:
    stats = Stats()
    stats.update(x)
    return stats


def everything_but_average(stats: Stats) -> tuple[object, ...]:
    return stats.counts.tobytes(), stats.exponent, stats.count, stats.zeros, np.float64([stats.min, stats.max]).tobytes()


# -- the histogram ----------------------------------------------------------------------------------------------------

floats = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=12)


@pytest.mark.proves("ranges.merge")
@given(st.lists(floats, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_every_split_and_order_gives_the_same_bytes(parts: list[list[float]], random: object) -> None:
    whole = taken(torch.tensor([v for part in parts for v in part]))
    shuffled = parts.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    updated, merged = Stats(), Stats()
    for part in shuffled:
        updated.update(torch.tensor(part))
        left = taken(torch.tensor(part))
        left.merge(merged)
        merged = left
    assert everything_but_average(updated) == everything_but_average(whole) == everything_but_average(merged)
    assert whole.counts.sum() == whole.count == sum(map(len, parts))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_bins_hold_what_a_naive_loop_puts_there(values: list[float]) -> None:
    stats = taken(torch.tensor(values))
    naive = np.zeros(2 * BINS, np.int64)
    for v in values:
        k = math.trunc(math.ldexp(v, -stats.exponent))  # float64 here: exact
        naive[BINS + k - (v < 0)] += 1
    assert (stats.counts == naive).all()
    assert stats.zeros == values.count(0.0)
    largest = max(abs(v) for v in values)
    assert stats.exponent == FINEST or BINS // 2 <= largest / stats.width < BINS


def test_signed_zeros_in_any_order() -> None:
    for first, second in ((0.0, -0.0), (-0.0, 0.0)):
        stats = taken(torch.tensor([first]))
        stats.update(torch.tensor([second]))
        assert everything_but_average(stats) == everything_but_average(taken(torch.zeros(2)))


def test_hand_worked_bins() -> None:
    stats = taken(torch.tensor([-1.0, -0.0, 0.0, 1.0, 4095.5, -1e-30]))
    assert stats.width == 1.0
    assert {int(i) - BINS: int(stats.counts[i]) for i in np.flatnonzero(stats.counts)} == {-2: 1, -1: 1, 0: 2, 1: 1, 4095: 1}
    stats.update(torch.tensor([-9000.0]))  # four times the width
    assert stats.width == 4.0
    assert {int(i) - BINS: int(stats.counts[i]) for i in np.flatnonzero(stats.counts)} == {-2251: 1, -1: 2, 0: 3, 1023: 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_other_types_count_as_their_float32_values(dtype: torch.dtype) -> None:
    x = (torch.randn(1000) * 5).to(dtype)
    assert everything_but_average(taken(x)) == everything_but_average(taken(x.float()))


def test_layout_does_not_matter() -> None:
    x = torch.randn(4, 6, 5, 3)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(0, 2), x.flip(1)):
        assert everything_but_average(taken(view)) == everything_but_average(taken(x))
    assert taken(x[:1].expand(3, 6, 5, 3)).count == 3 * 90
    assert taken(torch.tensor(2.5)).max == 2.5  # 0-d


def test_extreme_magnitudes() -> None:
    top = torch.finfo(torch.float32).max
    stats = taken(torch.tensor([top, -top, 1e-45, -1e-45, 0.0]))
    assert (stats.min, stats.max, stats.zeros, stats.counts[BINS - 1], stats.counts[BINS]) == (-top, top, 1, 1, 2)
    assert find_range(taken(torch.tensor([1e-45])), "minmax", -128, 127) == (0.0, torch.tensor(1e-45).item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_counted_and_change_nothing(bad: float) -> None:
    stats = taken(torch.randn(10))
    before = everything_but_average(stats), stats.average, stats.batches
    with pytest.raises(InputError, match="2 of 6 values are not finite"):
        stats.update(torch.tensor([1.0, bad, 2.0, 3.0, bad, 100.0]))
    assert (everything_but_average(stats), stats.average, stats.batches) == before
    with pytest.raises(InputError, match="1 of 2 values are not finite in float32"):
        stats.update(torch.tensor([1e300, 1.0], dtype=torch.float64))
    with pytest.raises(InputError, match="complex"):
        stats.update(torch.zeros(2, dtype=torch.complex64))


def test_empty_batches_are_no_batches() -> None:
    stats = taken(torch.zeros(0, 4))
    assert stats.batches == stats.count == 0
    with pytest.raises(InputError, match="no value was seen"):
        find_range(stats, "minmax", -128, 127)


def test_memory_is_bounded_whatever_the_data() -> None:
    code = """
import resource, torch
from roundel.stats import METHODS, Stats, find_range
torch.set_num_threads(1)
x = torch.randn(24_000_000)
stats = Stats()
stats.update(x[:1000])
[find_range(stats, m, -128, 127) for m in METHODS]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stats.update(x.view(2, 3, 1000, 4000).permute(0, 2, 3, 1))
stats.update(x.view(3, -1).T)
for i in range(50):
    stats.update(x[:1000] * 10.0 ** (i - 20))
[find_range(stats, m, lo, hi) for m in METHODS for lo, hi in ((-128, 127), (0, 65535))]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kilobytes = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert kilobytes < 24_000  # the data are 96 MB, and permuted: a copy would show
    assert sum(v.nbytes for v in vars(Stats()).values() if isinstance(v, np.ndarray)) == 65536


# -- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("ranges.minmax", "ranges.average")
def test_minmax_and_average_hold_zero() -> None:
    stats = Stats()
    for batch in ([1.0, 2.0], [3.0, 6.0], [2.0, 4.0]):
        stats.update(torch.tensor(batch))
    assert stats.average == pytest.approx((2.0, 4.0))
    assert find_range(stats, "minmax", -128, 127) == (0.0, 6.0)
    assert find_range(stats, "average", -128, 127) == pytest.approx((0.0, 4.0))
    assert find_range(stats, "average", -127, 127) == pytest.approx((-4.0, 4.0))
    assert find_range(stats, "minmax", -128, 127, symmetric=True) == (-6.0, 6.0)


@pytest.mark.proves("ranges.average")
def test_average_follows_torch_after_the_first_hundred() -> None:
    torch.manual_seed(1)
    batches = [torch.randn(20) for _ in range(160)]
    stats = Stats()
    lo = hi = 0.0
    for i, x in enumerate(batches):
        stats.update(x)
        if i < 100:
            lo, hi = (float(np.mean([f(b).item() for b in batches[: i + 1]])) for f in (torch.min, torch.max))
        else:
            lo, hi = lo + 0.01 * (x.min().item() - lo), hi + 0.01 * (x.max().item() - hi)
    assert stats.average == pytest.approx((lo, hi))
    halves = Stats(), Stats()
    for i, x in enumerate(batches[:90]):
        halves[i % 3 == 0].update(x)
    halves[0].merge(halves[1])
    plain = [float(np.mean([f(b).item() for b in batches[:90]])) for f in (torch.min, torch.max)]
    assert halves[0].average == pytest.approx(plain)


@pytest.mark.proves("ranges.percentile")
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("p", [100.0, 99.99, 99.0, 60.0])
def test_percentile_is_numpys_within_a_bin(name: str, p: float) -> None:
    x = sample(name)
    stats = taken(x)
    lo, hi = find_range(stats, f"percentile:{p}", -128, 127)
    want = np.percentile(x.double().numpy(), [(100 - p) / 2, (100 + p) / 2])
    assert lo == pytest.approx(min(want[0], 0), abs=stats.width)
    assert hi == pytest.approx(max(want[1], 0), abs=stats.width)
    lo, hi = find_range(stats, f"percentile:{p}", -127, 127)
    assert hi == -lo == pytest.approx(np.percentile(x.abs().double().numpy(), p), abs=stats.width)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), st.floats(1, 100))
@settings(max_examples=300, deadline=None)
def test_percentile_of_few_values(values: list[float], p: float) -> None:
    stats = taken(torch.tensor(values))
    lo, hi = find_range(stats, f"percentile:{p}", -128, 127)
    want = np.percentile(values, [(100 - p) / 2, (100 + p) / 2])
    assert lo == pytest.approx(min(want[0], 0), abs=1.001 * stats.width)
    assert hi == pytest.approx(max(want[1], 0), abs=1.001 * stats.width)


def test_percentile_default_is_99_99() -> None:
    stats = taken(sample("lognormal"))
    assert find_range(stats, "percentile", -128, 127) == find_range(stats, "percentile:99.99", -128, 127)
    assert find_range(stats, "percentile:100", -128, 127) == (stats.min, stats.max)


def squared_error(x: np.ndarray, lo: float, hi: float, lo_code: int, hi_code: int, symmetric: bool) -> float:
    """Mean squared error of quantizing the samples themselves, written the plain way."""
    if symmetric:
        scale, zero = hi / hi_code, 0.0
    else:
        scale = (hi - lo) / (hi_code - lo_code)
        zero = np.clip(np.round(lo_code - lo / scale), lo_code, hi_code)
    codes = np.clip(np.round(x / scale) + zero, lo_code, hi_code)
    return float(np.mean(((codes - zero) * scale - x) ** 2))


@pytest.mark.proves("ranges.mse")
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(("lo_code", "hi_code"), [(-8, 7), (-7, 7), (0, 3), (-128, 127)])
def test_mse_is_as_good_as_brute_force(name: str, lo_code: int, hi_code: int) -> None:
    x = sample(name)
    if hi_code > 100:
        x = x[:5000]
    stats, symmetric = taken(x), lo_code == -hi_code
    values = x.double().numpy()
    lo, hi = find_range(stats, "mse", lo_code, hi_code)
    got = squared_error(values, lo, hi, lo_code, hi_code, symmetric)
    bottom, top = find_range(stats, "minmax", lo_code, hi_code)
    shares = np.arange(1, 41) / 40
    ends = {(a * bottom, b * top) for a in shares for b in shares if a == b or not symmetric}
    assert got <= 1.01 * min(squared_error(values, a, b, lo_code, hi_code, symmetric) for a, b in ends)


@pytest.mark.parametrize("codes", [(-8, 7), (-128, 127), (0, 1023), (0, 65535)])
def test_expected_error_is_the_samples_error(codes: tuple[int, int]) -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) + 0.3
    cost = _Mse(taken(x), *codes, symmetric=False)
    for lo, hi in ((-8.0, 9.0), (-4.0, 5.0), (-1.5, 2.0), (-0.5, 3.0)):
        lo, hi = cost.settle(lo, hi)
        expected = cost(np.array([lo]), np.array([hi]))[0] * cost.width**2 / len(x)
        assert expected == pytest.approx(squared_error(x.double().numpy(), lo, hi, *codes, False), rel=0.02)


def test_mse_keeps_values_that_lie_on_a_grid() -> None:
    x = torch.arange(-8, 8).float().repeat(100) / 4
    lo, hi = find_range(taken(x), "mse", -8, 7)
    assert squared_error(x.double().numpy(), lo, hi, -8, 7, False) < 1e-4


def test_mse_zero_point_is_whole() -> None:
    lo, hi = find_range(taken(sample("lognormal")), "mse", -8, 7)
    zero = -8 - lo / ((hi - lo) / 15)
    assert zero == pytest.approx(round(zero), abs=1e-9)


def histogram(counts: list[int], first: int = 0) -> Stats:
    """`Stats` with whole-width bins of these counts, the first at ``first``."""
    stats = Stats(exponent=0, count=sum(counts), min=float(first), max=float(first + len(counts)))
    stats.counts[BINS + first : BINS + first + len(counts)] = counts
    return stats


@pytest.mark.proves("ranges.kl")
def test_kl_hand_worked_as_in_the_paper() -> None:
    # Migacz, GTC 2017, p. 38: eight bins and two codes give Q = [2, 0, 2, 2, 4, 4, 4, 4].
    p = np.array([1, 0, 2, 3, 5, 3, 1, 7])
    q = np.array([2, 0, 2, 2, 4, 4, 4, 4])
    for first in (0, -3):
        kl = _Kl(histogram(p.tolist(), first), codes=2)
        got = kl.divergence(np.array([BINS + first]), np.array([BINS + first + 8]))[0]
        assert got == pytest.approx(scipy.special.rel_entr(p / 22, q / 22).sum(), rel=1e-12)


def naive_kl(n: list[int], first: int, last: int, codes: int) -> float:
    p = np.array(n[first:last], float)
    q = np.zeros(last - first)
    cuts = [round(k * (last - first) / codes) for k in range(codes + 1)]
    p[0] += sum(n[:first])
    p[-1] += sum(n[last:])
    for a, b in itertools.pairwise(cuts):
        there = p[a:b] > 0
        if there.any():
            q[a:b][there] = (sum(n[first + a : first + b]) or 1e-4) / there.sum()
    return float(scipy.special.rel_entr(p / p.sum(), q / q.sum()).sum())


@pytest.mark.proves("ranges.kl")
@given(st.lists(st.integers(0, 6), min_size=10, max_size=24), st.integers(2, 5), st.data())
@settings(max_examples=300, deadline=None)
def test_kl_of_every_window_is_the_naive_loops(n: list[int], codes: int, data: st.DataObject) -> None:
    n[0] = n[-1] = 1
    zero = data.draw(st.integers(0, len(n)))
    first = data.draw(st.integers(0, len(n) - codes))
    last = data.draw(st.integers(first + codes, len(n)))
    got = _Kl(histogram(n, -zero), codes).divergence(np.array([BINS - zero + first]), np.array([BINS - zero + last]))[0]
    assert got == pytest.approx(naive_kl(n, first, last, codes), rel=1e-9, abs=1e-9)


def test_kl_clips_a_far_outlier_and_keeps_a_flat_range() -> None:
    g = torch.Generator().manual_seed(0)
    bulk = torch.rand(300_000, generator=g)
    assert find_range(taken(bulk), "kl", 0, 255)[1] > 0.95
    lo, hi = find_range(taken(torch.cat([bulk * 2 - 1, torch.tensor([-40.0, 60.0])])), "kl", -128, 127)
    assert -8 < lo < -0.9
    assert 0.9 < hi < 8


def test_kl_both_ends_move_on_their_own() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(300_000, generator=g) * 3 - 1, torch.full((3,), 30.0)])
    lo, hi = find_range(taken(x), "kl", -128, 127)
    assert lo == pytest.approx(-1, abs=0.05)
    assert 1.9 < hi < 8
    x = -x
    assert find_range(taken(x), "kl", -128, 127) == pytest.approx((-hi, -lo), rel=0.05)


def test_kl_zeros_have_no_say() -> None:
    x = sample("lognormal")
    zeros = torch.zeros(200_000)
    assert find_range(taken(torch.cat([x, zeros])), "kl", -8, 7) == find_range(taken(x), "kl", -8, 7)


def test_kl_with_more_codes_than_bins_is_minmax() -> None:
    stats = taken(sample("normal"))
    assert find_range(stats, "kl", -32768, 32767) == (stats.min, stats.max)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("codes", [(-128, 127), (-127, 127), (0, 1)])
@pytest.mark.parametrize("values", [[0.0], [3.0], [-2.0, -2.0], [1e-40], [1e30, 1.0, -1.0], [5e-31, -5e-31]])
def test_degenerate_data_have_a_range(method: str, codes: tuple[int, int], values: list[float]) -> None:
    stats = taken(torch.tensor(values))
    lo, hi = find_range(stats, method, *codes)
    assert math.isfinite(lo)
    assert math.isfinite(hi)
    assert lo <= 0 <= hi
    assert (lo < hi) == (values != [0.0])


def test_asked_for_what_does_not_exist() -> None:
    stats = taken(torch.ones(3))
    for method in ("entropy", "minmax:3", "percentile:x", "percentile:0", "percentile:101", "percentile:nan", ""):
        with pytest.raises(PlanError, match="not one of: minmax, average, percentile, mse, kl"):
            find_range(stats, method, -128, 127)
