"""Sums and means over axes and windows: depthwise convolutions by ones where scales give their factor, else SUM or
MEAN; the largest code and its place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ....errors import PlanError
from ....graph import Node
from ....integer.dialect import quantize_multiplier
from ..layout import Order, moved, plain
from ..translation import Translation, act, factor
from ..units import agree, same
from .windows import Places, place, places


def sum_pool(t: Translation, node: Node) -> None:
    """DEPTHWISE_CONV_2D by ones, which computes as every convolution; SUM and MEAN do it another way in each runtime."""
    a, line = node.attrs, t.rank(node.name) == 3
    kernel, stride = [1] * line + list(a["kernel"]), [1] * line + list(a["stride"])
    scale = _factor_scale(t, node)
    if scale is None:
        whole = list(t.shape(node.inputs[0])[2:]) == list(a["kernel"]) and not any(a["padding"])
        return _reduce(t, node, list(range(2, t.rank(node.name))) if whole else [], True)
    x = places(t, node, kernel, stride)
    place(t, node, lambda made: _ones(t, node, scale, t.shape(node.name)[1], kernel, x, made))


def sum_(t: Translation, node: Node) -> None:
    """A depthwise convolution by ones over (N, axes before, summed axes, axes after), summed in the middle."""
    a, name, rank = node.attrs, node.inputs[0], t.rank(node.inputs[0])
    axes = [axis % rank for axis in a["axes"]]
    scale = _factor_scale(t, node)
    if scale is None:
        return _reduce(t, node, axes, a["keepdim"])
    have = t.orders[name] if _adjacent(t.orders[name], axes) else plain(rank)
    if not _adjacent(have, axes) or have[0] in axes:
        raise PlanError(f"TFLite cannot sum over axes {axes} of {rank} at once")
    shape = moved(t.shape(name), have)
    first = min(have.index(axis) for axis in axes)
    outer, count, inner = (
        math.prod(part) for part in (shape[1:first], shape[first : first + len(axes)], shape[first + len(axes) :])
    )
    x = t.value(name, have)
    if (view := (shape[0], outer, count, inner)) != shape:
        x = t.reshape(x, t.like(name, f"{node.name}.view", plain(rank), view))
    made = t.like(name, f"{node.name}.sums", plain(rank), (shape[0], outer, 1, inner), of=node.name)
    _ones(t, node, scale, inner, [1, count], Places(x, 1), made)
    t.reshape(made, t.result(node, have if a["keepdim"] else without(have, axes)))


def _adjacent(order: Order, axes: Sequence[int]) -> bool:
    at = sorted(order.index(axis) for axis in axes)
    return bool(at) and at == list(range(at[0], at[0] + len(at)))


def _factor_scale(t: Translation, node: Node) -> float | None:
    """A float32 weight scale, near the node's factor, whose multiplier gives the node's code for every sum; None if none does."""
    source, y = t.units(node.inputs[0]), t.units(node.name)
    if source.type != "INT8":  # a convolution of int16 keeps 15 bits of its multiplier, these sums keep 31
        return None
    have = factor(node)
    near = np.float32(have[0] * 2.0 ** (have[1] - 31) * y.scale / source.scale)
    for scale in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
        real = np.float64(source.scale) * np.float64(scale) / np.float64(y.scale)
        if agree(node, have, real, tuple(node.attrs["acc"])):
            return float(scale)
    return None


def _ones(t: Translation, node: Node, scale: float, channels: int, kernel: Sequence[int], x: Places, made: int) -> int:
    """Sums over windows, rescaled."""
    ones = np.ones((1, *kernel, channels), np.int64)
    weight = t.draft.constant(f"{node.name}.ones", "INT8", ones, scale=(scale,) * channels, axis=3)
    unit = float(np.float32(t.units(node.inputs[0]).scale) * np.float32(scale))
    bias = t.draft.constant(f"{node.name}.bias", "INT32", np.zeros(channels, np.int64), scale=(unit,) * channels)
    return t.draft.step("DEPTHWISE_CONV_2D", 3, [x.tensor, weight, bias], made, "DepthwiseConv2DOptions", padding=x.padding,
                        strideH=x.stride[0], strideW=x.stride[1], dilationHFactor=1, dilationWFactor=1, depthMultiplier=1,
                        fusedActivationFunction=act(t, node))  # fmt: skip


def _reduce(t: Translation, node: Node, axes: Sequence[int], keep: bool) -> None:
    """SUM or MEAN, whichever rescales as the node does. MEAN divides the multiplier of SUM by the count, in integers."""
    name = node.inputs[0]
    source, y, have, sums = t.units(name), t.units(node.name), factor(node), tuple(node.attrs["acc"])
    multiplier, shift = (int(part) for part in quantize_multiplier(np.float64(source.scale) / np.float64(y.scale)))
    count = math.prod(t.shape(name)[axis] for axis in axes)
    more = min(count.bit_length() - 1, 32, 31 + shift)
    if same(node, have, (multiplier, shift), sums):
        kind = "SUM"
    elif same(node, have, ((multiplier << more) // count, shift - more), sums):
        kind = "MEAN"
    else:
        kind = ""
    if not kind or not axes or y.act(node) != "NONE":
        if source.type != "INT8":
            raise PlanError("TFLite sums int16 over whole axes alone, by the multiplier of SUM or of MEAN; this is neither")
        other = f", and {kind} is not for it" if kind else " or the same codes"
        raise PlanError(f"no float32 scale gives its multiplier {have[0]} and shift {have[1]}{other}")
    rank = t.rank(name)
    order = t.orders[name] if keep else plain(rank)
    where = t.ints("axes", sorted(order.index(axis) for axis in axes))
    made = t.result(node, order if keep else plain(t.rank(node.name)))
    t.draft.step(kind, 2, [t.value(name, order), where], made, "ReducerOptions", keepDims=keep)


def amax(t: Translation, node: Node) -> None:
    """REDUCE_MAX."""
    name, keep, rank = node.inputs[0], node.attrs["keepdim"], t.rank(node.inputs[0])
    axes, have = [axis % rank for axis in node.attrs["axes"]], t.orders[name]
    where = t.ints("axes", sorted(have.index(axis) for axis in axes))
    made = t.result(node, have if keep else without(have, axes))
    t.draft.step("REDUCE_MAX", 2, [t.value(name), where], made, "ReducerOptions", keepDims=keep)


def argmax(t: Translation, node: Node) -> None:
    """ARG_MAX, which drops its axis."""
    name, keep, rank = node.inputs[0], node.attrs["keepdim"], t.rank(node.inputs[0])
    if t.units(name).type != "INT8":
        raise PlanError("TFLite's ARG_MAX takes int8")
    axis, own = node.attrs["axis"] % rank, t.orders[node.name]
    fits = (order for order in (t.orders[name], plain(rank)) if own == (order if keep else without(order, [axis])))
    have = next(fits)  # the plain one does: an index, which TFLite Micro cannot transpose, lies as in the graph
    shape = tuple(n for i, n in zip(have, moved(t.shape(name), have)) if i != axis)
    made = t.result(node)
    raw = t.like(node.name, f"{node.name}.place", have, shape) if keep else made
    t.draft.step("ARG_MAX", 2, [t.value(name, have), t.ints("axis", [have.index(axis)])], raw, "ArgMaxOptions", outputType=2)
    if keep:
        t.reshape(raw, made)


def without(order: Order, axes: Sequence[int]) -> Order:
    """The order of a result that has lost ``axes``."""
    left = [axis for axis in order if axis not in axes]
    return tuple(sorted(left).index(axis) for axis in left)
