"""`batched`: turns a graph written for one example into the same graph over a symbolic batch; it optimises nothing.

Every computed value of shape S becomes (N, \\*S), and a leading 1 of S gives its place to N: (1, 99, 64) and (99, 64) both
become (N, 99, 64). So it does not matter which reshape of the original dropped, moved or restored the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InputError
from .build import PROBE, Builder
from .graph import Graph, Node

Shape = tuple[int, ...]


def batched(graph: Graph) -> Graph:
    """``graph``, whose shapes are all fixed, over a batch of any size: the first dimension of every value is then ``"N"``.

    A batch gives the results of its single examples, stacked. Raises `InputError` naming the first operation that has no
    such form.
    """
    lift = _Lift(graph)
    for node in graph:
        if (rule := _RULES.get(node.op)) is None:
            raise InputError(f"{node.name!r} ({node.op}) has no form over a batch")
        lift.one.emit(node.op, node.inputs, node.outputs, node.attrs)
        rule(lift, node)
    if loose := [name for name in graph.outputs if lift.is_constant(name)]:
        raise InputError(f"the output {loose[0]!r} depends on no input")
    return lift.to.graph(graph.inputs, [lift.name[name] for name in graph.outputs], graph.notes)


def _short(shape: Shape) -> Shape:
    """The shape of one example without the leading 1 that stood for the batch."""
    return shape[1:] if shape[:1] == (1,) else shape


class _Lift:
    """The graph as it was (``one``: the shapes of single examples) and as it becomes (``to``)."""

    def __init__(self, graph: Graph) -> None:
        self.one, self.to = Builder(graph), Builder()
        self.name = {name: name for name in ("", *graph.inputs, *graph.constants)}
        for name in graph.inputs:
            self.to.input(name, (PROBE, *_short(self.one.shape(name))), self.one.dtype(name))
        for name, tensor in graph.constants.items():
            self.to.constant(name, tensor)

    def is_constant(self, name: str) -> bool:
        """True for a constant and for an absent operand: neither has a batch."""
        return not name or name in self.to.constants

    def short(self, name: str) -> Shape:
        return _short(self.one.shape(name))

    def leads(self, name: str) -> bool:
        """True where N stands in the place of a leading 1, so that every axis keeps its number."""
        return self.one.shape(name)[:1] == (1,)

    def as_shape(self, name: str, shape: Shape) -> str:
        """The value under another shape per example; constants are left alone."""
        if self.is_constant(name):
            return name
        return self.to.reshape(self.name[name], (PROBE, *shape), self.to.unique(f"{name}_reshaped"))

    def full(self, name: str) -> str:
        """As (N, \\*S) with a leading 1 kept."""
        return self.as_shape(name, self.one.shape(name))

    def aligned(self, names: Sequence[str], rank: int) -> list[str]:
        """Each with ones after the batch, so that ``rank`` axes follow it and broadcasting pairs the right ones."""
        return [self.as_shape(n, (1,) * (rank - len(self.short(n))) + self.short(n)) if n else n for n in names]

    def emit(self, node: Node, inputs: Sequence[str], **changed: Any) -> None:
        """The node over the batch; results that come out as (N, 1, ...) are brought to (N, ...)."""
        self.to.emit(node.op, inputs, node.outputs, {**node.attrs, **changed})
        for out in node.outputs:
            self.settle(out, out)

    def settle(self, out: str, made: str) -> None:
        shape, want = self.to.shape(made), (PROBE, *self.short(out))
        if shape != want and shape != (PROBE, *self.one.shape(out)):
            raise InputError(f"{out!r} has no form over a batch: it would have shape {list(shape[1:])} per example")
        self.name[out] = self.to.reshape(made, want, self.to.unique(f"{out}_reshaped"))


# -- one rule for each way of treating axes ---------------------------------------------------------------------------


def _elementwise(lift: _Lift, node: Node) -> None:
    lift.emit(node, lift.aligned(node.inputs, len(lift.short(node.name))))


def _image(lift: _Lift, node: Node) -> None:
    """Operations over (batch, channel, ...): several images of one example join the batch for the while."""
    x, *rest = node.inputs
    if not all(lift.is_constant(name) for name in rest):
        raise InputError(f"{node.name!r} ({node.op}) has a computed parameter and no form over a batch")
    if lift.leads(x):
        return lift.emit(node, [lift.name[x], *rest])
    shape = lift.one.shape(x)
    merged = lift.to.reshape(lift.name[x], (PROBE * shape[0], *shape[1:]), lift.to.unique(f"{x}_merged"))
    made = lift.to.emit(node.op, [merged, *rest], lift.to.unique(f"{node.name}_merged"), node.attrs)
    lift.settle(node.name, lift.to.reshape(made, (PROBE, *lift.one.shape(node.name)), node.name))
    return None


def _last_axis(lift: _Lift, node: Node) -> None:
    x, *rest = node.inputs
    if not all(lift.is_constant(name) for name in rest):
        raise InputError(f"{node.name!r} ({node.op}) has a computed parameter and no form over a batch")
    lift.emit(node, [lift.name[x] if lift.short(x) else lift.full(x), *rest])


def _axes(lift: _Lift, node: Node) -> None:
    """Operations that name axes: those keep their numbers, or count one more where N was put before them."""
    x, rank, attrs = node.inputs[0], len(lift.one.shape(node.inputs[0])), node.attrs
    if "axes" in attrs:
        touched = [axis % rank for axis in attrs["axes"]]
    elif "axis" in attrs:
        touched = [attrs["axis"] % rank]
    else:  # pad: pairs from the last axis backwards, so the numbers never change
        touched = [rank - 1 - i // 2 for i, n in enumerate(attrs["padding"]) if n]
    kept = lift.leads(x) and 0 not in touched
    moved = touched if kept else [axis + 1 for axis in touched]
    changed = {"axes": moved} if "axes" in attrs else {"axis": moved[0]} if "axis" in attrs else {}
    lift.emit(node, [lift.name[x] if kept else lift.full(x)], **changed)


def _transpose(lift: _Lift, node: Node) -> None:
    x, perm = node.inputs[0], node.attrs["perm"]
    if lift.leads(x) and perm[0] == 0:
        lift.emit(node, [lift.name[x]])
    else:
        lift.emit(node, [lift.full(x)], perm=[0, *(axis + 1 for axis in perm)])


def _reshape(lift: _Lift, node: Node) -> None:
    made = lift.to.reshape(lift.name[node.inputs[0]], (PROBE, *lift.short(node.name)), node.name)
    lift.name[node.name] = made


def _expand(lift: _Lift, node: Node) -> None:
    short = lift.short(node.name)
    lift.emit(node, lift.aligned(node.inputs, len(short)), shape=[-1, *short])


def _concat(lift: _Lift, node: Node) -> None:
    axis = node.attrs["axis"] % len(lift.one.shape(node.name))
    kept = axis != 0 and all(lift.leads(x) for x in node.inputs)
    like = next(lift.name[x] for x in node.inputs if not lift.is_constant(x))

    def operand(x: str) -> str:
        if not lift.is_constant(x):
            return lift.name[x] if kept else lift.full(x)
        if not kept:
            x = lift.to.constant(lift.to.unique(f"{x}_full"), lift.to.constants[x][None])
        return lift.to.emit("expand_batch", [x, like], lift.to.unique(f"{node.name}_batch"))

    lift.emit(node, [operand(x) for x in node.inputs], axis=axis if kept else axis + 1)


def _matmul(lift: _Lift, node: Node) -> None:
    a, b = node.inputs
    rank = len(lift.short(node.name))
    if all(lift.is_constant(x) or len(lift.short(x)) >= 2 for x in (a, b)):
        return lift.emit(node, lift.aligned([a, b], rank))
    if lift.is_constant(b) and len(lift.one.shape(b)) == 2 and lift.short(a):  # rows of one matrix are as good as a batch
        return lift.emit(node, [lift.name[a], b])
    return lift.emit(node, [lift.full(a), lift.full(b)])


def _gather(lift: _Lift, node: Node) -> None:
    x, index = node.inputs
    if lift.is_constant(index):
        return _axes_with_index(lift, node)
    if lift.is_constant(x) and node.attrs["axis"] == 0:
        return lift.emit(node, [x, lift.name[index]])
    raise InputError(f"{node.name!r} (gather) has a computed index and no form over a batch")


def _axes_with_index(lift: _Lift, node: Node) -> None:
    x, index = node.inputs
    axis = node.attrs["axis"] % len(lift.one.shape(x))
    kept = lift.leads(x) and axis != 0
    lift.emit(node, [lift.name[x] if kept else lift.full(x), index], axis=axis if kept else axis + 1)


def _embedding(lift: _Lift, node: Node) -> None:
    ids, table = node.inputs
    if lift.is_constant(ids) or not lift.is_constant(table):
        raise InputError(f"{node.name!r} (embedding) has a computed table and no form over a batch")
    lift.emit(node, [lift.name[ids], table])


def _table(*rules: tuple[Callable[[_Lift, Node], None], str]) -> dict[str, Callable[[_Lift, Node], None]]:
    return {op: rule for rule, ops in rules for op in ops.split()}


_RULES = _table(
    (_elementwise, "add sub mul div maximum minimum squared_difference pow where compare identity relu relu6 leaky_relu elu"),
    (_elementwise, "hardswish hardsigmoid hardtanh gelu silu sigmoid tanh exp log erf sqrt rsqrt abs neg sin cos cast"),
    (_image, "conv conv_transpose max_pool avg_pool batch_norm group_norm prelu resize depth_to_space"),
    (_last_axis, "linear layer_norm rms_norm"),
    (_axes, "softmax log_softmax mean sum amax argmax slice split pad"),
    (_transpose, "transpose"),
    (_reshape, "reshape"),
    (_expand, "expand"),
    (_concat, "concat"),
    (_matmul, "matmul"),
    (_gather, "gather"),
    (_embedding, "embedding"),
)
