"""Operations that move codes: shapes, axes, slices, padding."""

from __future__ import annotations

from ....errors import PlanError
from ....graph import Node
from ..layout import Order, channels_last, is_relabelling, moved, plain, relative, same_elements
from ..translation import Pad, Translation


def reshape(t: Translation, node: Node) -> None:
    name = node.inputs[0]
    source, target = t.shape(name), t.shape(node.name)
    have, want = t.orders[name], t.orders[node.name]
    if not same_elements(source, have, target, want):
        have, want = plain(len(source)), want if is_relabelling(target, want) else plain(len(target))
    _renamed(t, node, name, have, want)


def transpose(t: Translation, node: Node) -> None:
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
    begin, end, strides = [0] * rank, list(moved(t.shape(name), order)), [1] * rank
    begin[where], end[where], strides[where] = start, stop, step
    mask = sum(1 << i for i in range(rank) if i != where)
    inputs = [x, *(t.ints(word, values) for word, values in (("begin", begin), ("end", end), ("strides", strides)))]
    t.draft.step("STRIDED_SLICE", 2, inputs, t.result(node), "StridedSliceOptions", beginMask=mask, endMask=mask)


def concat(t: Translation, node: Node) -> None:
    order = t.orders[node.name]
    for name in node.inputs:
        if t.units(name) != t.units(node.name):
            raise PlanError(f"{name!r} is in other units than the result")
    axis = order.index(node.attrs["axis"] % len(order))
    parts = [t.value(name, order) for name in node.inputs]
    t.draft.step("CONCATENATION", 2, parts, t.result(node), "ConcatenationOptions", axis=axis)


def pad(t: Translation, node: Node) -> None:
    name, order = node.inputs[0], t.orders[node.name]
    flat = node.attrs["padding"]
    pairs: list[Pad] = [(0, 0)] * (len(order) - len(flat) // 2) + list(zip(flat[::2], flat[1::2]))[::-1]
    x = t.value(name, order)
    made = t.padded(name, x, [pairs[axis] for axis in order], node.name, node.attrs["code"])
    t.alias(node, made)
