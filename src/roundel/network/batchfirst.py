"""`batch_first`: the same function with the batch alone on the first axis of every value; it computes nothing.

Attention of torch runs over (steps, batch, features) and joins the batch with the heads or the steps. What counts is how many
numbers lie before the batch in memory: a reshape leaves that as it is, a transpose tells it anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import InputError
from ..graph import BATCH, Graph, Node
from ..graph.build import PROBE, Builder

#: Operations of one place at a time; operands of the same shape, or constants.
_PLACES = frozenset(["relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "exp", "erf", "neg", "abs", "sqrt", "rsqrt", "log",
                     "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "add", "sub", "mul", "div", "identity",
                     "cast"])  # fmt: skip
#: Operations along their last axis, or their last two.
_TAILS = {"linear": 1, "layer_norm": 1, "rms_norm": 1, "matmul": 2, "attention": 2}
#: Operations along the axis that they name.
_ALONG = frozenset(["slice", "split", "concat", "softmax"])
#: Operations over the axes that they name, which go.
_OVER = frozenset(["mean", "sum", "amax"])


@dataclass(frozen=True)
class _At:
    """Where the batch lies: in ``axis`` of ``shape``, ``before`` numbers of that axis in front of it."""

    shape: tuple[int, ...]
    axis: int
    before: int = 1

    @property
    def alone(self) -> bool:
        return self.shape[self.axis] == PROBE

    @property
    def first(self) -> bool:
        return self.alone and self.axis == 0

    def place(self, axis: int) -> int:
        """Where one of the other axes, or what else lies in the batch's own, goes when the batch is first."""
        return axis + 1 if axis < self.axis or not self.alone else axis

    def moved(self) -> tuple[int, ...]:
        """The shape with the batch first."""
        sizes = [size // PROBE if i == self.axis else size for i, size in enumerate(self.shape) if i != self.axis or not self.alone]
        return (PROBE, *sizes)


class _OutsideError(Exception):
    """A node that cannot be turned."""


def batch_first(graph: Graph) -> Graph:
    """An equal graph, or ``graph`` itself where the batch is first already or some operation cannot be turned.

    >>> import torch
    >>> from roundel import capture
    >>> layer = torch.nn.MultiheadAttention(4, 2, batch_first=True)
    >>> class Itself(torch.nn.Module):
    ...     def __init__(self): super().__init__(); self.attend = layer
    ...     def forward(self, x): return self.attend(x, x, x, need_weights=False)[0]
    >>> graph = capture(Itself(), torch.randn(3, 5, 4))
    >>> {batch_first(graph).values[node.name].shape[0] for node in batch_first(graph)}
    {'N'}
    """
    known = [graph.values.get(out) for node in graph for out in node.outputs]
    if all(spec is not None and BATCH not in spec.shape[1:] for spec in known) or any(i not in graph.values for i in graph.inputs):
        return graph
    try:
        return _turned(graph)
    except (InputError, _OutsideError):
        return graph


def _turned(graph: Graph) -> Graph:
    was, made = Builder(graph), Builder(graph)
    at: dict[str, _At] = {}
    now = {name: name for name in ("", *graph.inputs, *graph.constants)}
    for name in graph.inputs:
        if PROBE in was.shape(name):
            at[name] = _At(was.shape(name), was.shape(name).index(PROBE))
    for node in graph:
        was.emit(node.op, node.inputs, node.outputs, node.attrs)
        places = [at[name] for name in node.inputs if name in at]
        inputs = [now[name] for name in node.inputs]
        if not places and not any(size % PROBE == 0 and size for out in node.outputs for size in was.shape(out)):
            made.emit(node.op, inputs, node.outputs, node.attrs)
            now |= {out: out for out in node.outputs}
        elif node.op == "reshape":
            (out,), x = node.outputs, places[0]
            at[out] = _reshaped(x, was.shape(out))
            now[out] = made.reshape(inputs[0], at[out].moved(), out)
        elif node.op == "transpose":
            (out,), x, perm = node.outputs, places[0], node.attrs["perm"]
            at[out] = _At(was.shape(out), list(perm).index(x.axis), x.before)
            turned = [0, *(x.place(axis) for axis in perm if axis != x.axis or not x.alone)]
            stays = turned == [*range(len(turned))]
            now[out] = inputs[0] if stays else made.emit("transpose", inputs, out, {**node.attrs, "perm": turned})
        else:
            attrs = _attrs(node, places, [was.shape(name) if name else () for name in node.inputs], at)
            made.emit(node.op, inputs, node.outputs, attrs)
            for out in node.outputs:
                at[out] = _left(node, places[0], was.shape(out)) if places else _At(was.shape(out), 0)
                now[out] = out
                if made.shape(out) != at[out].moved():
                    raise _OutsideError
    if any(name not in at or not at[name].first for name in graph.outputs if PROBE in was.shape(name)):
        raise _OutsideError
    return made.graph(graph.inputs, [now[name] for name in graph.outputs], graph.notes)


def _reshaped(x: _At, shape: tuple[int, ...]) -> _At:
    left = prod(x.shape[: x.axis]) * x.before
    axis = next(i for i, size in enumerate(shape) if size % PROBE == 0)
    before, rest = divmod(left, prod(shape[:axis]))
    if rest or not before or (shape[axis] // PROBE) % before:
        raise _OutsideError
    return _At(shape, axis, before)


def _left(node: Node, x: _At, shape: tuple[int, ...]) -> _At:
    gone = [axis % len(x.shape) for axis in node.attrs["axes"]] if len(shape) < len(x.shape) and node.op in _OVER else []
    return _At(shape, x.axis - sum(axis < x.axis for axis in gone), x.before)


def _attrs(node: Node, places: Sequence[_At], shapes: Sequence[tuple[int, ...]], at: dict[str, _At]) -> dict[str, Any]:
    """The attributes of a node whose operands have the batch first, `_OutsideError` where that is another function."""
    if all(x.first for x in places):
        return dict(node.attrs)
    x, rank = places[0], len(places[0].shape)
    if any((y.axis, y.before, len(y.shape)) != (x.axis, x.before, rank) for y in places):
        raise _OutsideError
    if node.op in _ALONG:
        axis = node.attrs.get("axis", -1) % rank
        if axis == x.axis or len(places) < len(node.inputs):
            raise _OutsideError
        return {**node.attrs, "axis": x.place(axis)}
    if node.op in _OVER and x.axis not in [axis % rank for axis in node.attrs["axes"]]:
        return {**node.attrs, "axes": [x.place(axis % rank) for axis in node.attrs["axes"]]}
    if node.op in _TAILS and x.axis < rank - _TAILS[node.op]:
        if node.op in ("matmul", "attention") and len(places) < len(node.inputs):
            raise _OutsideError
        return dict(node.attrs)
    others = [shape for name, shape in zip(node.inputs, shapes, strict=True) if name not in at]
    if node.op in _PLACES and len({y.shape for y in places}) == 1 and all(len(shape) < rank - x.axis for shape in others):
        return dict(node.attrs)
    raise _OutsideError
