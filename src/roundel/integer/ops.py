"""The integer operations: the definition of each in NumPy int64, which every faster or compiled version equals bit for bit.

Values are codes, real = scale * (code - zero); scales themselves appear only at the doors, `quantize` and `dequantize`. Layout is
PyTorch's, as in the real graph. Operations that sum take ``acc``, the proven range of their sums, and hold to it. What is not
here: how a real graph becomes these (`lower`), how ranges are proven (`check`).

A rescale is ``clip(rule(sums, multiplier, shift) + y_zero, low, high)`` with the rule that ``rounding`` names in `dialect`; a
fused ReLU or ReLU6 is in ``low`` and ``high``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import CheckError, InputError
from ..formats.pack import unpack
from ..graph import Spec
from .dialect import LEAST, Ints, rescaled, shift_away
from .fixed import SUM_BITS, reciprocal

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


# -- the doors --------------------------------------------------------------------------------------------------------


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


# -- weighted ---------------------------------------------------------------------------------------------------------


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
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero: int,
    acc: Range,
    sums: Callable[..., Ints] = conv_sums,
    **out: Any,
) -> Ints:
    """1-D or 2-D convolution; ``bias``, ``multiplier`` and ``shift`` (out,). Padding stands for the real number 0."""
    bias, multiplier, shift = (part.reshape(-1, *[1] * (x.ndim - 2)) for part in (bias, multiplier, shift))
    return requantize(within(sums(x - x_zero, w, stride, padding, dilation, groups) + bias, acc), multiplier, shift, **out)


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
    *,
    x_zero: int,
    acc: Range,
    sums: Callable[..., Ints] = linear_sums,
    **out: Any,
) -> Ints:
    """x (..., in) by w (out, in); ``bias``, ``multiplier`` and ``shift`` (out,)."""
    return requantize(within(sums(x - x_zero, w) + bias, acc), multiplier, shift, **out)


# -- rescaled sums ----------------------------------------------------------------------------------------------------


@op
def add(a: Ints, b: Ints, *, a_zero: int, b_zero: int, left: int, multiplier: Sequence[int], shift: Sequence[int], acc: Range,
        **out: Any) -> Ints:  # fmt: skip
    """Both operands in one finer unit (``left`` bits and a factor below 1 each), summed, then rescaled: TFLite's ADD."""
    terms = (a - a_zero) << left, (b - b_zero) << left
    finer = [rescaled(term, q, s, out["rounding"]) for term, q, s in zip(terms, multiplier, shift)]
    return requantize(within(finer[0] + finer[1], acc), multiplier[2], shift[2], **out)


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
def rescale(x: Ints, *, x_zero: int, multiplier: int, shift: int, acc: Range, **out: Any) -> Ints:
    """The same numbers in other units; a ReLU that stands alone is this with a clamp."""
    return requantize(within(x - x_zero, acc), multiplier, shift, **out)


# -- pools in their own units -----------------------------------------------------------------------------------------


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


# -- tables -----------------------------------------------------------------------------------------------------------


@op
def softmax(x: Ints, table: Ints, *, axis: int, bits: int, acc: Range, **out: Any) -> Ints:
    """Each term rescaled by the reciprocal of their sum, in units of 2^-bits: in R1, TFLite's int8 SOFTMAX.

    ``table[d]`` is exp(-d * scale) in Q0.31, d being the difference from the largest code (`fixed.exp_table`).
    """
    terms = table[x.max(axis, keepdims=True) - x]
    total = within(shift_away(terms, 31 - SUM_BITS).sum(axis, keepdims=True), acc)
    multiplier, shift = reciprocal(total)
    shift = shift + bits - 31
    return requantize(terms, np.where(shift < LEAST, 0, multiplier), np.maximum(shift, LEAST), **out)


# -- moving codes -----------------------------------------------------------------------------------------------------


@op
def reshape(x: Ints, *, shape: Sequence[int]) -> Ints:
    """At most one -1; 0 keeps the input's size at that place."""
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


@op
def transpose(x: Ints, *, perm: Sequence[int]) -> Ints:
    return x.transpose(tuple(perm))


@op
def slice_(x: Ints, *, axis: int, start: int = 0, stop: int | None = None, step: int = 1) -> Ints:
    """As in Python."""
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, stop, step),)]


@op
def concat(*xs: Ints, axis: int) -> Ints:
    return np.concatenate(xs, axis)


@op
def pad(x: Ints, *, padding: Sequence[int], code: int) -> Ints:
    return padded(x, padding, code)


# -- constants --------------------------------------------------------------------------------------------------------


class Pool(Protocol):
    """Where constants and the shapes and types of values are found: a `Graph`, or one in the making."""

    @property
    def constants(self) -> Mapping[str, Tensor]: ...

    @property
    def values(self) -> Mapping[str, Spec]: ...


def extremes(dtype: str) -> Range:
    """Smallest and largest integer of ``int8``, ``uint4``, ``int32`` ...

    >>> extremes("int4"), extremes("uint8")
    ((-8, 7), (0, 255))
    """
    if not (match := re.fullmatch(r"(u?)int([1-9]|[12]\d|3[0-2])", dtype)):
        raise InputError(f"{dtype} is no integer type of up to 32 bits")
    bits = int(match[2])
    return (0, 2**bits - 1) if match[1] else (-(2**bits >> 1), (2**bits >> 1) - 1)


def numbers(pool: Pool, name: str) -> Ints:
    """A constant as int64 of its shape. Those of up to 8 bits are stored packed, one bit stream per row, as in a `QTensor`."""
    if name not in pool.values:
        raise InputError(f"the type of constant {name!r} is not known")
    stored, spec = pool.constants[name], pool.values[name]
    low, high = extremes(spec.dtype)
    shape = tuple(int(size) for size in spec.shape)
    try:
        if high > 255:
            return stored.numpy().astype(np.int64).reshape(shape)
        rows = shape[0] if len(shape) > 1 else 1
        codes = unpack(stored, (high - low).bit_length(), math.prod(shape) // max(rows, 1)).numpy().astype(np.int64)
    except ValueError as err:
        raise InputError(f"constant {name!r} is not {spec.dtype} of shape {list(shape)}: {err}") from err
    return np.where(codes > high, codes + 2 * low, codes).reshape(shape)
