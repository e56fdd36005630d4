"""Operations on one place at a time: sums, differences and products of two values, other units, PReLU, and tables.

A table is any function of one value: sigmoid, GELU, hard swish, leaky ReLU, a power ... computed on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dialect import Ints, rescaled
from .base import Range, op, requantize, within


@op
def add(a: Ints, b: Ints, *, a_zero: int, b_zero: int, left: int, multiplier: Sequence[int], shift: Sequence[int], acc: Range,
        **out: Any) -> Ints:  # fmt: skip
    """Both operands in one finer unit (``left`` bits and a factor below 1 each), summed, then rescaled: TFLite's ADD."""
    one, other = finer(a - a_zero, b - b_zero, left, multiplier, shift, out["rounding"])
    return requantize(within(one + other, acc), multiplier[2], shift[2], **out)


@op
def sub(a: Ints, b: Ints, *, a_zero: int, b_zero: int, left: int, multiplier: Sequence[int], shift: Sequence[int], acc: Range,
        **out: Any) -> Ints:  # fmt: skip
    """`add` with a minus between the rescaled operands: TFLite's SUB."""
    one, other = finer(a - a_zero, b - b_zero, left, multiplier, shift, out["rounding"])
    return requantize(within(one - other, acc), multiplier[2], shift[2], **out)


def finer(a: Ints, b: Ints, left: int, multiplier: Sequence[int], shift: Sequence[int], rounding: str) -> tuple[Ints, Ints]:
    """Two operands in their common finer unit."""
    return (rescaled(a << left, multiplier[0], shift[0], rounding), rescaled(b << left, multiplier[1], shift[1], rounding))


@op
def mul(a: Ints, b: Ints, *, a_zero: int, b_zero: int, multiplier: int, shift: int, acc: Range, **out: Any) -> Ints:
    """The product, rescaled; operands broadcast. TFLite's MUL."""
    return requantize(within((a - a_zero) * (b - b_zero), acc), multiplier, shift, **out)


@op
def rescale(x: Ints, *, x_zero: int, multiplier: int, shift: int, acc: Range, **out: Any) -> Ints:
    """The same numbers in other units; a ReLU that stands alone is this with a clamp."""
    return requantize(within(x - x_zero, acc), multiplier, shift, **out)


@op
def prelu(x: Ints, multiplier: Ints, shift: Ints, *, x_zero: int, acc: Range, **out: Any) -> Ints:
    """x (N, C, ...), rescaled by row 0 of ``multiplier`` and ``shift`` (2, C) where positive, by row 1 where negative."""
    number = within(x - x_zero, acc)
    side = [part.reshape(2, -1, *[1] * (x.ndim - 2)) for part in (multiplier, shift)]
    return requantize(number, *(np.where(number >= 0, part[0], part[1]) for part in side), **out)


@op
def table(x: Ints, table: Ints, *, first: int, bits: int = 0) -> Ints:
    """``table[x - first]``, ``first`` being the smallest that x can be. Codes of 16 bits have an entry for every 2^bits of them and
    one more at the end, and between entries lies a line: TFLite's lookup of 513 entries."""
    at, part = (x - first) >> bits, (x - first) & ((1 << bits) - 1)
    if not bits:
        return table[at]
    return table[at] + (((table[at + 1] - table[at]) * part + (1 << bits >> 1)) >> bits)
