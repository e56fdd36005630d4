"""Sums of products: convolutions, linear layers, embeddings with stored weights, and the matrix product of two activations.

A weight is ``w`` itself, or, with the operand ``table``, an index into integer levels (`levels`). Operations marked ``wide`` may
leave int32: their sums are int64 within 2^47 and their multipliers have 15 bits, so that one 64-bit product rescales them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import InputError
from ..dialect import Ints
from .base import Range, op, requantize, within
from .moves import padded, windows

Sums = Callable[..., Ints]


def levels(w: Ints, table: Ints | None) -> Ints:
    """The weights that the codes ``w`` (rows, ...) stand for: themselves, or the entries of ``table`` (1 or rows, k)."""
    if table is None:
        return w
    row = np.arange(len(w)) if len(table) > 1 else np.zeros(len(w), np.int64)
    return table[row.reshape(-1, *[1] * (w.ndim - 1)), w]


def conv_sums(x: Ints, w: Ints, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Ints:
    """Grouped convolution of x (N, C, places) with w (out, C/groups, kernel), zeros around the places."""
    seen = windows(padded(x, padding, 0), w.shape[2:], stride, dilation)
    seen = seen.reshape(seen.shape[0], groups, -1, *seen.shape[2:])
    w = w.reshape(groups, -1, *w.shape[1:])
    at, tap = "hw"[: w.ndim - 3], "yx"[: w.ndim - 3]
    out = np.einsum(f"ngi{at}{tap},goi{tap}->ngo{at}", seen, w)
    return out.reshape(out.shape[0], -1, *out.shape[3:])


@op
def conv(
    x: Ints,
    w: Ints,
    bias: Ints,
    multiplier: Ints,
    shift: Ints,
    table: Ints | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero: int,
    acc: Range,
    wide: bool = False,
    sums: Sums = conv_sums,
    **out: Any,
) -> Ints:
    """1-D or 2-D convolution; ``bias``, ``multiplier`` and ``shift`` (out,). Padding stands for the real number 0."""
    bias, multiplier, shift = (part.reshape(-1, *[1] * (x.ndim - 2)) for part in (bias, multiplier, shift))
    total = sums(x - x_zero, levels(w, table), stride, padding, dilation, groups)
    return requantize(within(total + bias, acc), multiplier, shift, **out)


def spread(x: Ints, stride: Sequence[int], reach: Sequence[int], padding: Sequence[int], output_padding: Sequence[int]) -> Ints:
    """x (N, C, places) as the transposed convolution's kernel sees it: ``stride`` - 1 zeros between places, ``reach`` - padding
    around them (``reach`` is the kernel's size, dilation counted, less one), and ``output_padding`` more at the end."""
    out = np.zeros((*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True))), np.int64)
    out[:, :, *(slice(None, None, s) for s in stride)] = x
    ends = [(r - p, r - p + more) for r, p, more in zip(reach, padding, output_padding, strict=True)]
    return padded(out, [n for pair in ends[::-1] for n in pair], 0)


@op
def conv_transpose(
    x: Ints,
    w: Ints,
    bias: Ints,
    multiplier: Ints,
    shift: Ints,
    table: Ints | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero: int,
    acc: Range,
    wide: bool = False,
    sums: Sums = conv_sums,
    **out: Any,
) -> Ints:
    """Place p of x adds x[p] * w[tap] to place p * stride + tap * dilation - padding. w is (out, in/groups, kernel), as in `conv`;
    ``padding`` is one number per axis."""
    taps = levels(w, table)
    reach = [(k - 1) * d for k, d in zip(taps.shape[2:], dilation, strict=True)]
    seen, plain = spread(x - x_zero, stride, reach, padding, output_padding), [1] * len(reach)
    flipped = taps[:, :, *[slice(None, None, -1)] * len(reach)]
    bias, multiplier, shift = (part.reshape(-1, *[1] * (x.ndim - 2)) for part in (bias, multiplier, shift))
    total = sums(seen, flipped, plain, [0] * 2 * len(reach), dilation, groups)
    return requantize(within(total + bias, acc), multiplier, shift, **out)


def linear_sums(x: Ints, w: Ints) -> Ints:
    """x (..., in) @ w (out, in)^T."""
    return x @ w.T


@op
def linear(
    x: Ints,
    w: Ints,
    bias: Ints,
    multiplier: Ints,
    shift: Ints,
    table: Ints | None = None,
    *,
    x_zero: int,
    acc: Range,
    wide: bool = False,
    sums: Sums = linear_sums,
    **out: Any,
) -> Ints:
    """x (..., in) by w (out, in); ``bias``, ``multiplier`` and ``shift`` (out,)."""
    return requantize(within(sums(x - x_zero, levels(w, table)) + bias, acc), multiplier, shift, **out)


@op
def embedding(ids: Ints, w: Ints, multiplier: Ints, shift: Ints, table: Ints | None = None, *, acc: Range, **out: Any) -> Ints:
    """Rows ``ids`` of w (vocabulary, dim), rescaled; ``multiplier`` and ``shift`` (1,) or (vocabulary,)."""
    if ids.size and ids.min() < 0:
        raise InputError(f"the id {ids.min()} is negative")
    rows = levels(w, table)[ids]
    factor = [(part[ids] if len(part) > 1 else part[0] + 0 * ids)[..., None] for part in (multiplier, shift)]
    return requantize(within(rows, acc), *factor, **out)


def product_sums(a: Ints, b: Ints) -> Ints:
    """a (..., m, k) @ b (..., k, n)."""
    return a @ b


@op
def matmul(
    a: Ints,
    b: Ints,
    *,
    transpose_b: bool,
    a_zero: int,
    b_zero: int,
    multiplier: int,
    shift: int,
    acc: Range,
    wide: bool = False,
    sums: Sums = product_sums,
    **out: Any,
) -> Ints:
    """a (..., m, k) by b (..., k, n), or (..., n, k) where ``transpose_b``; leading axes broadcast."""
    b = b.swapaxes(-1, -2) if transpose_b else b
    return requantize(within(sums(a - a_zero, b - b_zero), acc), multiplier, shift, **out)
