"""The rounding dialects against ties worked by hand, exact fractions in Python's own integers, and the measured distances."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

from roundel import InputError
from roundel.integer.dialect import INTEGER, RULES, quantize_multiplier, rescaled
from roundel.integer.fixed import SUM_BITS, exp_table, reciprocal


def up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def away(x: Fraction) -> int:
    return up(x) if x >= 0 else -up(-x)


def exact(rule: str, acc: int, q: int, s: int) -> int:
    """The rules of numerics in exact arithmetic; float32 by way of its bytes."""
    if rule in ("R1", "R3"):
        first = up(Fraction(acc * 2 ** max(s, 0) * q, 2**31))
        return (away if rule == "R1" else up)(Fraction(first, 2 ** max(-s, 0)))
    if rule == "R4":

        def f32(x: float) -> float:
            return struct.unpack("f", struct.pack("f", x))[0]

        return round(f32(f32(acc) * f32(math.ldexp(q, s - 31))))  # 48 bits: the product is exact before f32
    return (up if rule == "R2" else away)(Fraction(acc * q, 2 ** (31 - s)))


@pytest.mark.proves("integer.dialects")
@pytest.mark.parametrize(
    ("acc", "real", "want"),  # want: R1, R2, R2a, R3, R4
    [
        (3, 0.5, (2, 2, 2, 2, 2)),  # 1.5: a tie that all take up
        (-3, 0.5, (-1, -1, -2, -1, -2)),  # -1.5: q = 2^30, s = 0, so R1 and R3 round in the high multiplication alone, up
        (5, 0.5, (3, 3, 3, 3, 2)),  # 2.5: R4 goes to the even number
        (5, 0.25, (2, 1, 1, 2, 1)),  # 1.25: twice rounded, 2.5 -> 3 -> 1.5 -> 2
        (6, 0.25, (2, 2, 2, 2, 2)),  # 1.5
        (-6, 0.25, (-2, -1, -2, -1, -2)),  # -1.5: R1 away in its shift, R3 up
        (-7, 0.25, (-2, -2, -2, -1, -2)),  # -1.75 -> -3.5 -> -3 -> -1.5
        (7, 3.0, (21, 21, 21, 21, 21)),
        (-3, -0.5, (2, 2, 2, 2, 2)),  # a negative factor: as 3 by 0.5
        (100, 0.0, (0, 0, 0, 0, 0)),
    ],
)
def test_ties_by_hand(acc: int, real: float, want: tuple[int, ...]) -> None:
    q, s = quantize_multiplier(real)
    assert tuple(int(rescaled(np.array(acc), q, s, rule)) for rule in ("R1", "R2", "R2a", "R3", "R4")) == want


def draws() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums, multipliers and shifts: at random, at their ends, negative, at powers of two where ties live."""
    rng = np.random.default_rng(0)
    s = rng.integers(-31, 31, 6000)
    q = rng.integers(2**30, 2**31, 6000) * rng.choice([1, 1, 1, -1], 6000)
    q[::3] = 2**30
    q[1::50], q[2::50] = 2**31 - 1, -(2**30)
    bound = 2**31 >> np.maximum(s, 0)
    acc = np.where(rng.random(6000) < 0.5, rng.integers(-bound, bound), rng.integers(-300, 300) % (2 * bound) - bound)
    acc[5::40], acc[6::40] = -bound[5::40], bound[6::40] - 1
    return acc, q, s


@pytest.mark.proves("integer.dialects")
@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_exact_arithmetic(rule: str) -> None:
    acc, q, s = draws()
    got = rescaled(acc, q, s, rule)
    want = [exact(rule, *one) for one in zip(acc.tolist(), q.tolist(), s.tolist(), strict=True)]
    assert np.count_nonzero(got != np.array(want)) == 0


@pytest.mark.proves("integer.dialects")
def test_every_small_sum_at_every_small_shift() -> None:
    """Brute force: all ties of every kind."""
    acc, s = np.meshgrid(np.arange(-260, 261), np.arange(-9, 3))
    for q in (2**30, 3 * 2**29, 2**30 + 1):
        for rule in INTEGER:
            got = rescaled(acc, np.array(q), s, rule)
            want = np.vectorize(lambda a, t, q=q, rule=rule: exact(rule, int(a), q, int(t)))(acc, s)
            assert np.array_equal(got, want), (rule, q)


def test_dialects_are_one_unit_apart() -> None:
    """At scales as layers have them, R1 and R2 part on under 1 % of values at random scales, on more at powers of two."""
    rng = np.random.default_rng(1)
    acc = rng.integers(-(2**17), 2**17, 200_000)
    for real, least, most in ((rng.uniform(0.002, 0.02, 200_000), 0.001, 0.01), (np.full(200_000, 2.0**-4), 0.01, 0.1)):
        one, two = (rescaled(acc, *quantize_multiplier(real), rule) for rule in ("R1", "R2"))
        share = float(np.mean(one != two))
        assert np.abs(one - two).max() == 1
        assert least < share < most, share


@pytest.mark.proves("integer.dialects")
def test_multipliers_hold_31_bits() -> None:
    """Random factors to 2^-31 relative, both signs; a mantissa that rounds up to one; what is too small, and what is too large."""
    rng = np.random.default_rng(2)
    real = np.exp2(rng.uniform(-30, 29, 2000)) * rng.choice([-1, 1], 2000)
    for x, q, s in zip(real.tolist(), *(part.tolist() for part in quantize_multiplier(real)), strict=True):
        assert 2**30 <= abs(q) < 2**31
        assert abs(Fraction(q) * Fraction(2) ** (s - 31) - Fraction(x)) <= abs(Fraction(x)) / 2**31
    assert [int(part) for part in quantize_multiplier(1 - 2.0**-40)] == [2**30, 1]
    assert [int(part) for part in quantize_multiplier(2.0**-32)] == [2**30, -31]
    assert [int(part) for part in quantize_multiplier(2.0**-33)] == [0, 0]
    for bad in (2.0**30, -(2.0**31), math.inf, math.nan, 2.0**30 - 2.0**-30):
        with pytest.raises(InputError, match="outside integer arithmetic"):
            quantize_multiplier(bad)


@pytest.mark.parametrize("scale", [1e-4, 0.02, 0.161, 1.0, 31.0, 1e9])
def test_table_of_exp(scale: float) -> None:
    """Within 2^-22 of exp, and never rising."""
    table = exp_table(scale, 256)
    assert table[0] == 2**31 - 1
    assert (np.diff(table) <= 0).all()
    assert np.abs(table / 2**31 - np.exp(-scale * np.arange(256))).max() < 2**-22


def test_reciprocal() -> None:
    """All sizes of sum: within 2^-27, relative."""
    total = np.unique(np.geomspace(2**SUM_BITS, 2**31 - 1, 20_000).astype(np.int64))
    q, s = reciprocal(total)
    assert (q < 2**31).all()
    assert np.abs(q * np.exp2(s - 31.0) * (total / 2**SUM_BITS) - 1).max() < 2**-27
