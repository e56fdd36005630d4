"""exp, 1/x and 1/sqrt(x) in fixed point, by polynomials and Newton steps: integers from end to end, so tables depend on no libm.

Qm.n is an integer in units of 2^-n with m bits before the point. Only what softmax, attention and the norms need is here.
"""

from __future__ import annotations

import math

import numpy as np

from .dialect import Ints, multiply_high, quantize_multiplier, shift_away

#: 1.0 in Q0.31, as near as int32 comes.
ONE = 2**31 - 1

#: Bits after the point of the sums that `reciprocal` takes.
SUM_BITS = 19


def exp_table(scale: float, size: int) -> Ints:
    """exp(-d * scale) in Q0.31 for d = 0 .. size - 1, within 2^-22; 0 from about d * scale = 31, as in TFLite's softmax."""
    differences = np.arange(size, dtype=np.int64)
    if scale >= 16:
        return np.where(differences == 0, ONE, 0)
    multiplier, left = quantize_multiplier(scale * 2.0**26)
    near = differences <= math.floor(31 * 2.0**26 / 2.0 ** int(left))
    inputs = multiply_high(np.where(near, differences, 0) << max(int(left), 0), multiplier)
    return np.where(near, _exp(-inputs), 0)


#: `exp_steps` takes 0 <= units < 2^21, in steps of 2^-16: down to exp(-32).
STEP_BITS, UNIT_BITS = 7, 16


def step_table() -> Ints:
    """exp(-i * step) in Q0.31 for i = 0 .. 127 and the steps 1/4, 2^-9 and 2^-16 (3, 128), within 2^-22."""
    digits = np.arange(1 << STEP_BITS, dtype=np.int64)
    return np.stack([_exp(-(digits << 26 - UNIT_BITS + place)) for place in (2 * STEP_BITS, STEP_BITS, 0)])


def exp_steps(units: Ints, table: Ints) -> Ints:
    """exp(-units * 2^-16) in Q0.31 as the product of three entries of `step_table`, one for each 7 bits; within 2^-21."""
    mask = (1 << STEP_BITS) - 1
    high, middle, low = units >> 2 * STEP_BITS, units >> STEP_BITS & mask, units & mask
    return multiply_high(multiply_high(table[0][high], table[1][middle]), table[2][low])


def _exp(x: Ints) -> Ints:
    """exp of x <= 0 in Q5.26, as Q0.31: a polynomial on [-1/4, 0), then one factor for each bit above."""
    quarter = 1 << 24
    rest = (x & (quarter - 1)) - quarter
    out, left = _exp_near(rest << 5), rest - x
    for power in range(-2, 5):
        factor = round(math.exp(-(2.0**power)) * 2**31)
        out = np.where(left >> (26 + power) & 1, multiply_high(out, factor), out)
    return np.where(x == 0, ONE, out)


def _exp_near(x: Ints) -> Ints:
    """exp on [-1/4, 0), Q0.31: four terms around -1/8."""
    centre, third = round(math.exp(-1 / 8) * 2**31), round(2**31 / 3)
    x = x + (1 << 28)
    x2 = multiply_high(x, x)
    x3, x4 = multiply_high(x2, x), multiply_high(x2, x2)
    tail = shift_away(multiply_high(shift_away(x4, 2) + x3, third) + x2, 1)
    return centre + multiply_high(x + tail, centre)


def reciprocal(total: Ints) -> tuple[Ints, Ints]:
    """1 / total, for totals in Q12.19 of 1 and more, as (multiplier, shift): multiplier * 2^(shift - 31).

    Three Newton steps from 48/17 - 32/17 d, the best line on [1/2, 1].
    """
    spare = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)  # zeros in front of a 32-bit total
    half = (total << spare) >> 1  # total / 2, moved to [1/2, 1) in Q0.31
    x = round(48 / 17 * 2**29) + multiply_high(half, round(-32 / 17 * 2**29))  # Q2.29 from here
    for _ in range(3):
        x = x + (multiply_high(x, (1 << 29) - multiply_high(half, x)) << 2)
    return np.minimum(x << 1, ONE), spare - (31 - SUM_BITS)


def reciprocal_root(v: Ints) -> tuple[Ints, Ints]:
    """1 / sqrt(v) for 1 <= v < 2^62 as (multiplier, shift): multiplier * 2^(shift - 31), within 2^-27 relative.

    Four Newton steps y (3 - m y^2) / 2, m being v moved to [1/4, 1), from a line that is 8 % off at most.
    """
    length = np.zeros_like(v)
    for step in (32, 16, 8, 4, 2, 1):
        length += step * (v >> length + step - 1 > 0)
    even = length + (length & 1)
    m = np.where(even > 31, v >> np.maximum(even - 31, 0), v << np.maximum(31 - even, 0))  # Q0.31
    y = round(2.147 * 2**29) - (m * round(1.227 * 2**29) >> 31)  # Q2.29 from here
    for _ in range(4):
        y = y * (3 * 2**29 - (m * (y * y >> 29) >> 31)) >> 30
    return np.minimum(y << 1, ONE), 1 - even // 2
