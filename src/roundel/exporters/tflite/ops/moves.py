"""Operations that move codes: shapes, axes, slices, padding, look-ups of whole slices, and resizing to the nearest."""

from __future__ import annotations

import numpy as np

from ....errors import PlanError
from ....graph import Node
from ....integer.ops import numbers
from ..layout import Order, channels_last, is_relabelling, moved, plain, relative, same_elements
from ..translation import Pad, Translation, factor
from ..units import agree


def reshape(t: Translation, node: Node) -> None:
    """RESHAPE of elements that lie in the same order in the file, after a transpose where they do not."""
    name = node.inputs[0]
    source, target = t.shape(name), t.shape(node.name)
    have, want = t.orders[name], t.orders[node.name]
    if not same_elements(source, have, target, want):
        have, want = plain(len(source)), want if is_relabelling(target, want) else plain(len(target))
    _renamed(t, node, name, have, want)


def transpose(t: Translation, node: Node) -> None:
    """TRANSPOSE, or nothing where the file has the axes in that order already."""
    name = node.inputs[0]
    have, want = t.orders[name], t.orders[node.name]
    perm = relative(have, tuple(node.attrs["perm"][axis] for axis in want))
    if is_relabelling(moved(t.shape(name), have), perm):
        _renamed(t, node, name, have, want)
    else:
        t.turn(t.value(name), t.result(node), moved(t.shape(name), have), perm)


def _renamed(t: Translation, node: Node, name: str, have: Order, want: Order) -> None:
    """The same bytes under another shape; no operator where the shape is the same too."""
    if want == t.orders[node.name] and moved(t.shape(name), have) == moved(t.shape(node.name), want):
        t.alias(node, t.value(name, have))
    else:
        t.reshape(t.value(name, have), t.result(node, want))


def slice_(t: Translation, node: Node) -> None:
    """STRIDED_SLICE; every n-th place from the first is a max pool of 1 x 1, which NPUs have where they lack that."""
    name, order = node.inputs[0], t.orders[node.name]
    axis = node.attrs["axis"] % t.rank(name)
    size = t.shape(name)[axis]
    if axis == 0 and t.batched(name):
        raise PlanError("it slices the batch")
    start, stop, step = slice(node.attrs.get("start", 0), node.attrs.get("stop"), node.attrs.get("step", 1)).indices(size)
    if step < 1:
        raise PlanError(f"its step is {step}; TFLite's slices go forwards here")
    where, x = order.index(axis), t.value(name, order)
    if start == 0 and stop == size and step > 1 and order == channels_last(4) and where in (1, 2):
        stride = (step, 1) if where == 1 else (1, step)
        t.draft.step("MAX_POOL_2D", 2, [x], t.result(node), "Pool2DOptions", padding=1, strideH=stride[0], strideW=stride[1],
                     filterHeight=1, filterWidth=1)  # fmt: skip
        return
    rank = len(order)
    begin, end, strides = [0] * rank, [0] * rank, [1] * rank
    begin[where], end[where], strides[where] = start, stop, step
    t.cut(x, t.result(node), begin, end, strides)


def concat(t: Translation, node: Node) -> None:
    """CONCATENATION; operands and result share their units."""
    order = t.orders[node.name]
    for name in node.inputs:
        if t.units(name) != t.units(node.name):
            raise PlanError(f"{name!r} is in other units than the result")
    axis = order.index(node.attrs["axis"] % len(order))
    parts = [t.value(name, order) for name in node.inputs]
    t.draft.step("CONCATENATION", 2, parts, t.result(node), "ConcatenationOptions", axis=axis)


def pad(t: Translation, node: Node) -> None:
    """PAD by the zero point, PADV2 by another code."""
    name, order = node.inputs[0], t.orders[node.name]
    flat = node.attrs["padding"]
    pairs: list[Pad] = [(0, 0)] * (len(order) - len(flat) // 2) + list(zip(flat[::2], flat[1::2]))[::-1]
    x = t.value(name, order)
    made = t.padded(name, x, [pairs[axis] for axis in order], node.name, node.attrs["code"])
    t.alias(node, made)


def gather(t: Translation, node: Node) -> None:
    """GATHER by a constant index, or of a constant."""
    name, index = node.inputs
    rank, axis = t.rank(name), node.attrs["axis"] % t.rank(name)
    if axis == 0 and t.batched(name):
        raise PlanError("it picks from the batch")
    if index not in t.graph.constants and name not in t.graph.constants:
        raise PlanError("it picks from a computed value by a computed index")
    flat = t.rank(index) != 1  # the result has other axes
    order, made = (plain(rank), plain(t.rank(node.name))) if flat else (t.orders[node.name],) * 2
    if index in t.graph.constants:
        picks = t.ints(index, numbers(t.graph, index) % t.shape(name)[axis])
    else:
        picks = t.value(index, plain(t.rank(index)))
    t.draft.step("GATHER", 2, [t.value(name, order), picks], t.result(node, made), "GatherOptions", axis=order.index(axis))


def depth_to_space(t: Translation, node: Node) -> None:
    """DEPTH_TO_SPACE, whose channels are fastest where PyTorch's are slowest: a transpose stands before it."""
    name, block, order = node.inputs[0], node.attrs["block"], channels_last(4)
    if t.units(name).type != "INT8":
        raise PlanError("TFLite's DEPTH_TO_SPACE takes int8")
    x, (n, height, width, depth) = t.value(name, order), moved(t.shape(name), order)
    if (channels := depth // block**2) > 1:
        split, turned = (n, height * width, channels, block**2), (n, height * width, block**2, channels)
        x = t.reshape(x, t.like(name, f"{node.name}.split", order, split))
        x = t.turn(x, t.like(name, f"{node.name}.turned", order, turned), split, (0, 1, 3, 2))
        x = t.reshape(x, t.like(name, f"{node.name}.depth", order, (n, height, width, depth)))
    t.draft.step("DEPTH_TO_SPACE", 1, [x], t.result(node, order), "DepthToSpaceOptions", blockSize=block)


def resize(t: Translation, node: Node) -> None:
    """RESIZE_NEAREST_NEIGHBOR, and QUANTIZE where the units change."""
    name, order = node.inputs[0], channels_last(t.rank(node.inputs[0]))
    source, y = t.units(name), t.units(node.name)
    if node.attrs["bits"]:
        raise PlanError("TFLite's RESIZE_BILINEAR rounds in its operand's units, ties away from code 0, before any rescale")
    if len(order) != 4:
        raise PlanError("TFLite resizes over N, H, W, C alone")
    old, new = (moved(t.shape(i), order)[1:3] for i in (name, node.name))
    for m, n, picks in zip(old, new, node.inputs[1:]):
        at = np.floor(np.arange(n, dtype=np.float32) * (np.float32(m) / np.float32(n)))
        if not np.array_equal(np.minimum(at, m - 1), numbers(t.graph, picks)[:, 0]):
            raise PlanError(f"TFLite picks other neighbours for {n} of {m} places")
    if y.act(node) != "NONE" or not agree(
        node, factor(node), np.float64(source.scale) / np.float64(y.scale), tuple(node.attrs["acc"])
    ):
        raise PlanError("no scales give its multiplier, or it clamps")
    near = t.result(node, order) if source == y else t.like(name, f"{node.name}.near", order, (1, *new, t.shape(name)[1]))
    t.draft.step("RESIZE_NEAREST_NEIGHBOR", 2, [t.value(name, order), t.ints("size", new)], near,
                 "ResizeNearestNeighborOptions", alignCorners=False, halfPixelCenters=False)  # fmt: skip
    if source != y:
        t.draft.step("QUANTIZE", 2, [near], t.result(node, order), "QuantizeOptions")
