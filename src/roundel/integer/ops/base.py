"""What every integer operation shares: the list of definitions, the rescale at their end, and the two doors to real numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import CheckError, InputError
from ..dialect import Ints, rescaled

Reals = NDArray[np.float32]
Range = tuple[int, int]

#: name -> function of the operands' codes and the node's attributes.
INTEGER: dict[str, Callable[..., Any]] = {}


def op(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a definition in the list under its own name, less a trailing underscore."""
    INTEGER[fn.__name__.rstrip("_")] = fn
    return fn


def requantize(sums: Ints, multiplier: ArrayLike, shift: ArrayLike, *, y_zero: int, low: int, high: int, rounding: str) -> Ints:
    """Sums in other units: rescaled by the rule ``rounding``, moved to the zero point, clamped."""
    return np.clip(rescaled(sums, multiplier, shift, rounding) + y_zero, low, high)


def within(sums: Ints, acc: Range) -> Ints:
    """``sums``, which the proof of the graph bounds by ``acc``; `CheckError` where they are not."""
    if sums.size and not acc[0] <= sums.min() <= sums.max() <= acc[1]:
        raise CheckError(f"sums of {sums.min()} to {sums.max()} leave the proven range {acc[0]} to {acc[1]}")
    return sums


@op
def quantize(x: Reals, *, scale: float, zero: int, low: int, high: int) -> Ints:
    """Real input to codes, in float32, ties to even: the last float operation before the outputs."""
    if np.isnan(x).any():
        raise InputError(f"{int(np.isnan(x).sum())} of {x.size} input numbers are NaN, which no code stands for")
    return np.clip(np.rint(x.astype(np.float32) / np.float32(scale)) + np.float32(zero), low, high).astype(np.int64)


@op
def dequantize(x: Ints, *, scale: float, zero: int) -> Reals:
    """Codes to real numbers, for whoever reads the outputs."""
    return (x - zero).astype(np.float32) * np.float32(scale)
