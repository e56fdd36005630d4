"""Reductions: sums and means over axes and windows, the largest of a window, the place of the largest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dialect import Ints
from .base import Range, op, requantize, within
from .moves import padded, windows


@op
def sum_(x: Ints, *, axes: Sequence[int], keepdim: bool, x_zero: int, multiplier: int, shift: int, acc: Range, **out: Any) -> Ints:
    """Sum over ``axes``; a mean is the same with 1/n in the multiplier."""
    return requantize(within((x - x_zero).sum(tuple(axes), keepdims=keepdim), acc), multiplier, shift, **out)


@op
def sum_pool(
    x: Ints,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    x_zero: int,
    multiplier: int,
    shift: int,
    acc: Range,
    **out: Any,
) -> Ints:
    """Sums over windows, padding counted as 0; an average pool that changes its units is this with 1/n in the multiplier."""
    seen = windows(padded(x - x_zero, padding, 0), kernel, stride)
    return requantize(within(seen.sum(tuple(range(-len(kernel), 0))), acc), multiplier, shift, **out)


@op
def avg_pool(
    x: Ints, *, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], acc: Range, low: int, high: int
) -> Ints:
    """Mean of codes, half away from zero, padded places left out; the parameters do not change: TFLite's AVERAGE_POOL_2D."""
    over = tuple(range(-len(kernel), 0))
    total = within(windows(padded(x, padding, 0), kernel, stride).sum(over), acc)
    count = windows(padded(np.ones_like(x[:1, :1]), padding, 0), kernel, stride).sum(over)
    return np.clip(np.sign(total) * ((np.abs(total) + count // 2) // count), low, high)


@op
def max_pool(x: Ints, *, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], low: int, high: int) -> Ints:
    """Largest code; padded places never win."""
    seen = windows(padded(x, padding, np.iinfo(np.int64).min), kernel, stride)
    return np.clip(seen.max(tuple(range(-len(kernel), 0))), low, high)


@op
def amax(x: Ints, *, axes: Sequence[int], keepdim: bool) -> Ints:
    """Largest code over ``axes``."""
    return x.max(tuple(axes), keepdims=keepdim)


@op
def argmax(x: Ints, *, axis: int, keepdim: bool) -> Ints:
    """Index of the largest code along ``axis``, the first of equals; int32."""
    return np.argmax(x, axis, keepdims=keepdim)
