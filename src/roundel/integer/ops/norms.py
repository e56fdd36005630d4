"""Softmax, attention, layer and RMS norm: exponentials by tables, reciprocals and square roots by Newton steps (`fixed`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..dialect import LEAST, Ints, rescaled, shift_away
from ..fixed import SUM_BITS, exp_steps, reciprocal, reciprocal_root
from .base import Range, op, requantize, within
from .weighted import product_sums


def shares(terms: Ints, axis: int, bits: int, acc: Range, **out: Any) -> Ints:
    """Each term (Q0.31) divided by their sum along ``axis``, in units of 2^-bits."""
    total = within(shift_away(terms, 31 - SUM_BITS).sum(axis, keepdims=True), acc)
    multiplier, shift = reciprocal(total)
    shift = shift + bits - 31
    return requantize(terms, np.where(shift < LEAST, 0, multiplier), np.maximum(shift, LEAST), **out)


def exponentials(far: Ints, table: Ints, reach: int, multiplier: int, shift: int, rounding: str) -> Ints:
    """exp of -``far`` in Q0.31: rescaled to units of 2^-16, of which ``table`` gives exp by steps; 0 beyond ``reach``."""
    units = rescaled(np.minimum(far, reach), multiplier, shift, rounding)
    return np.where(far <= reach, exp_steps(units, table), 0)


@op
def softmax(
    x: Ints,
    table: Ints,
    *,
    axis: int,
    bits: int,
    acc: Range,
    reach: int | None = None,
    multiplier: int = 0,
    shift: int = 0,
    **out: Any,
) -> Ints:
    """Each term rescaled by the reciprocal of their sum, in units of 2^-bits: in R1, TFLite's int8 SOFTMAX.

    ``table[d]`` is exp(-d * scale) in Q0.31, d being the difference from the largest code (`fixed.exp_table`). Codes of 16 bits
    have ``reach``, ``multiplier`` and ``shift`` as in `attention`, and its table.
    """
    far = x.max(axis, keepdims=True) - x
    terms = table[far] if reach is None else exponentials(far, table, reach, multiplier, shift, out["rounding"])
    return shares(terms, axis, bits, acc, **out)


@op
def attention(
    q: Ints,
    k: Ints,
    v: Ints,
    table: Ints,
    keep: Ints | None = None,
    *,
    causal: bool,
    q_zero: int,
    k_zero: int,
    v_zero: int,
    reach: int,
    multiplier: Sequence[int],
    shift: Sequence[int],
    bits: int,
    acc: Sequence[int],
    wide: bool = False,
    sums: Callable[..., Ints] = product_sums,
    **out: Any,
) -> Ints:
    """softmax(q k^T * scale) v over the last two axes; scores and results are int32, or int64 where ``wide``.

    Probabilities are in units of 2^-bits. The first of ``multiplier`` and ``shift`` brings differences from a row's largest score,
    those up to ``reach``, to units of 2^-16, of which ``table`` gives exp (`fixed.exp_steps`); larger ones have no weight. The
    second rescales the sums. ``keep`` is 0 where a key is not seen; ``causal``: nor are later keys. ``acc`` has the ranges of
    scores, of sums of exp, and of results.
    """
    scores = within(sums(q - q_zero, (k - k_zero).swapaxes(-1, -2)), (acc[0], acc[1]))
    seen = np.ones(scores.shape[-2:], bool)
    if causal:
        seen = np.tril(seen)
    if keep is not None:
        seen = seen & (keep != 0)
    far = np.where(seen, np.where(seen, scores, np.iinfo(np.int64).min).max(-1, keepdims=True) - scores, reach + 1)
    terms = exponentials(far, table, reach, multiplier[0], shift[0], out["rounding"])
    parts = shares(terms, -1, bits, (acc[2], acc[3]), y_zero=0, low=0, high=(1 << bits) - 1, rounding=out["rounding"])
    return requantize(within(sums(parts, v - v_zero), (acc[4], acc[5])), multiplier[1], shift[1], **out)


@op
def norm(
    x: Ints,
    weight: Ints,
    bias: Ints,
    *,
    centred: bool,
    eps: int,
    bits: int,
    x_zero: int,
    multiplier: int,
    shift: int,
    acc: Sequence[int],
    wide: bool = False,
    **out: Any,
) -> Ints:
    """Layer norm over the last axis, or RMS norm where not ``centred``, by an integer 1 / sqrt.

    With n numbers x, all multiplied by n so that the mean is whole: c = n x - sum(x), v = n sum(x^2) - sum(x)^2 (int64; without the
    sum where not centred), and c / sqrt(v + eps) in units of 2^-bits, at most sqrt(n) 2^bits, times ``weight`` plus ``bias`` (n,).
    ``eps`` is in the units of v. ``acc`` has the ranges of c and of the weighted results.
    """
    x, n = x - x_zero, x.shape[-1]
    total = x.sum(-1, keepdims=True) if centred else 0
    centre = within(n * x - total, (acc[0], acc[1]))
    spread = n * (x * x).sum(-1, keepdims=True) - total * total
    q, s = reciprocal_root(np.maximum(spread + eps, 1))
    unit = rescaled(centre, q, s + bits, out["rounding"])
    return requantize(within(unit * weight + bias, (acc[2], acc[3])), multiplier, shift, **out)
