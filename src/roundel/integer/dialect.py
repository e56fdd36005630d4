"""Rescaling int32 sums by a real factor: how the factor becomes integers, and the five roundings that runtimes use.

A runtime's kernels round in their own way; that way is part of a model, so every rescale names its rule. What the rules differ in
is one unit at most. Clamping, zero points and everything that is not a rescale are in `ops`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError

Ints = NDArray[np.int64]

#: ``rule(acc, multiplier, shift)``: acc * multiplier * 2^(shift - 31), rounded. The three broadcast.
Rule = Callable[[Ints, Ints, Ints], Ints]

#: Shifts that `quantize_multiplier` gives; a smaller one makes the multiplier 0, a larger one is an error.
LEAST, MOST = -31, 30


def quantize_multiplier(real: ArrayLike) -> tuple[Ints, Ints]:
    """Real factors as (multiplier, shift): real = multiplier * 2^(shift - 31), 2^30 <= |multiplier| < 2^31.

    The mantissa of ``frexp``, in double, rounds half away from zero, as TFLite's `QuantizeMultiplier` does. A factor under 2^-32
    becomes (0, 0). A negative factor (a weight scale may be negative) has a negative multiplier. Raises `InputError` for factors of
    2^30 and more, or not finite.

    >>> [int(part) for part in quantize_multiplier(0.75)]
    [1610612736, 0]
    """
    real = np.asarray(real, np.float64)
    mantissa, exponent = np.frexp(real)
    q, s = (np.sign(mantissa) * np.floor(np.abs(mantissa) * 2.0**31 + 0.5)), exponent.astype(np.int64)
    full = np.abs(q) == 2.0**31  # a mantissa that rounded up to 1
    q, s = np.where(full, q / 2, q), np.where(full, s + 1, s)
    if not np.isfinite(real).all() or (s > MOST).any():
        raise InputError(f"a rescale by {np.abs(real).max():.3g} is outside integer arithmetic, which reaches 2^{MOST}")
    gone = s < LEAST
    return np.where(gone, 0, q).astype(np.int64), np.where(gone, 0, s)


def quantize_wide(real: ArrayLike) -> tuple[Ints, Ints]:
    """As `quantize_multiplier` with 15 bits, as TFLite rescales int64 sums: by rule R2, sums of up to 2^47 and |multiplier| < 2^15
    make one product in 64 bits. Raises `InputError` for factors of 2^14 and more."""
    q, s = quantize_multiplier(real)
    if (s > MOST - 16).any():
        raise InputError(f"a rescale of wide sums by {np.abs(real).max():.3g} is past what they take, 2^{MOST - 16}")
    return np.sign(q) * np.minimum((np.abs(q) + (1 << 15)) >> 16, (1 << 15) - 1), np.where(q == 0, 0, s + 16)


def multiply_high(a: Ints, b: Ints | int) -> Ints:
    """a * b / 2^31, ties up: gemmlowp's rounding doubling high multiplication."""
    return (a * b + (1 << 30)) >> 31


def shift_away(x: Ints, bits: ArrayLike) -> Ints:
    """x / 2^bits, ties away from zero: gemmlowp's rounding right shift."""
    bits = np.asarray(bits, np.int64)
    ones = (np.int64(1) << bits) - 1
    return (x >> bits) + ((x & ones) > (ones >> 1) + (x < 0))


def double_rounding(acc: Ints, multiplier: Ints, shift: Ints) -> Ints:
    """R1, gemmlowp: a rounding doubling high multiplication (ties up), then a right shift with ties away from zero.

    TFLite Micro, CMSIS-NN by default, LiteRT's reference convolution.
    """
    return shift_away(multiply_high(acc << np.maximum(shift, 0), multiplier), np.maximum(-shift, 0))


def single_up(acc: Ints, multiplier: Ints, shift: Ints) -> Ints:
    """R2: one multiplication in 64 bits and one shift, ties up. CMSIS-NN with CMSIS_NN_USE_SINGLE_ROUNDING; the cheapest."""
    total = 31 - shift
    return (acc * multiplier + (np.int64(1) << (total - 1))) >> total


def single_away(acc: Ints, multiplier: Ints, shift: Ints) -> Ints:
    """R2a: as R2, ties away from zero. LiteRT's reference fully connected layer."""
    product, total = acc * multiplier, 31 - shift
    half = np.int64(1) << (total - 1)
    return np.where(product < 0, -((half - product) >> total), (half + product) >> total)


def double_up(acc: Ints, multiplier: Ints, shift: Ints) -> Ints:
    """R3: the multiplication of R1, then a right shift with ties up. ruy, LiteRT without its default delegates on x86."""
    high, right = multiply_high(acc << np.maximum(shift, 0), multiplier), np.maximum(-shift, 0)
    half: Ints = (1 << right) // 2
    return (high + half) >> right


def float_even(acc: Ints, multiplier: Ints, shift: Ints) -> Ints:
    """R4: a float32 product, ties to even. onnxruntime, XNNPACK. Not integer arithmetic: for comparison only."""
    scale = (multiplier * np.exp2(shift - 31.0)).astype(np.float32)
    return np.rint(acc.astype(np.float32) * scale).astype(np.int64)


#: Name of a dialect -> its rule.
RULES: dict[str, Rule] = {"R1": double_rounding, "R2": single_up, "R2a": single_away, "R3": double_up, "R4": float_even}

#: Those that are integer arithmetic from end to end.
INTEGER = ("R1", "R2", "R2a", "R3")


def rescaled(acc: Ints, multiplier: ArrayLike, shift: ArrayLike, rounding: str) -> Ints:
    """``acc`` times multiplier * 2^(shift - 31) by the rule that ``rounding`` names."""
    return RULES[rounding](acc, np.asarray(multiplier, np.int64), np.asarray(shift, np.int64))
