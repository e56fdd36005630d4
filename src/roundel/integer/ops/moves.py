"""Operations that move codes without changing them, and resizing, which weighs neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dialect import Ints
from .base import Range, op, requantize, within


def padded(x: Ints, padding: Sequence[int], code: int) -> Ints:
    """``padding`` runs from the last axis backwards, (before, after) each; negative numbers cut off."""
    pairs = [(0, 0)] * (x.ndim - len(padding) // 2) + list(zip(padding[::2], padding[1::2], strict=True))[::-1]
    x = x[tuple(slice(max(0, -a), size - max(0, -b)) for (a, b), size in zip(pairs, x.shape, strict=True))]
    return np.pad(x, [(max(0, a), max(0, b)) for a, b in pairs], constant_values=code)


def windows(x: Ints, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] | None = None) -> Ints:
    """View of x (N, C, places) as (N, C, windows, kernel)."""
    dilation = dilation or [1] * len(kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(range(2, 2 + len(kernel))))
    picks = [slice(None, None, step) for step in (*stride, *dilation)]
    return seen[:, :, *picks]


@op
def reshape(x: Ints, *, shape: Sequence[int]) -> Ints:
    """At most one -1; 0 keeps the input's size at that place."""
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


@op
def transpose(x: Ints, *, perm: Sequence[int]) -> Ints:
    return x.transpose(tuple(perm))


@op
def slice_(x: Ints, *, axis: int, start: int = 0, stop: int | None = None, step: int = 1) -> Ints:
    """As in Python, negative steps included."""
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, stop, step),)]


@op
def concat(*xs: Ints, axis: int) -> Ints:
    return np.concatenate(xs, axis)


@op
def pad(x: Ints, *, padding: Sequence[int], code: int) -> Ints:
    return padded(x, padding, code)


@op
def expand(x: Ints, *, shape: Sequence[int]) -> Ints:
    """Broadcast to ``shape``; -1 keeps a size."""
    kept = [1] * (len(shape) - x.ndim) + list(x.shape)
    return np.broadcast_to(x, [old if new == -1 else new for old, new in zip(kept, shape, strict=True)])


@op
def expand_batch(x: Ints, like: Ints) -> Ints:
    """x (1, ...), repeated along axis 0 to the batch of ``like``."""
    return np.broadcast_to(x, (len(like), *x.shape[1:]))


@op
def gather(x: Ints, index: Ints, *, axis: int) -> Ints:
    """Whole slices of x along ``axis`` by ``index`` of any rank."""
    return np.take(x, index, axis)


@op
def depth_to_space(x: Ints, *, block: int) -> Ints:
    """(N, C b b, H, W) -> (N, C, H b, W b), channel-major as `torch.nn.PixelShuffle`."""
    n, channels, height, width = x.shape
    x = x.reshape(n, channels // block**2, block, block, height, width).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, channels // block**2, height * block, width * block)


@op
def resize(
    x: Ints, rows: Ints, columns: Ints, *, bits: int, x_zero: int, multiplier: int, shift: int, acc: Range, **out: Any
) -> Ints:
    """Rows and columns of x (..., H, W) by ``rows`` and ``columns`` (out, 2): an index, and the weight of its next neighbour (the
    last has none) in units of 2^-bits. Nearest is the same without weights, bits = 0."""
    for axis, pick in ((-2, rows), (-1, columns)):
        at, part = pick[:, 0], pick[:, 1].reshape(-1, 1) if axis == -2 else pick[:, 1]
        after = np.minimum(at + 1, x.shape[axis] - 1)
        near, far = (np.take(x, index, axis) - (x_zero if axis == -2 else 0) for index in (at, after))
        x = near * ((1 << bits) - part) + far * part
    return requantize(within(x, acc), multiplier, shift, **out)
