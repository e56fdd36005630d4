"""`simplify`: the same function with fewer transposes and reshapes; layers and their numbers are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from .build import PROBE, Builder
from .graph import Graph, Node

Shape = tuple[int, ...]

#: A value seen as a rearranged base: entry i is the base's axis that stands at i, or None for an axis of size 1.
#: The base's own axes of size 1 are never named, so one arrangement has one form.
View = tuple[int | None, ...]


def simplify(graph: Graph) -> Graph:
    """One forward pass that puts every transpose and every reshape of ones off until an operation needs it.

    A value is carried as (base, `View`). Operations that do not care about the order of axes (elementwise, pad, concat,
    reductions, softmax ...) run on the base with their axes renumbered; the others get the value itself. So inverse
    transposes meet and vanish, a transpose that only moves axes of size 1 becomes a reshape, and constants are rearranged
    once, here. The graph's inputs and outputs keep their shapes.
    """
    walk = _Walk(graph)
    for node in graph:
        _RULES.get(node.op, _plain)(walk, node)
    return _own_names(walk.to.graph(graph.inputs, [walk.whole(name) for name in graph.outputs], graph.notes), walk.origin)


def _own_names(graph: Graph, origin: dict[str, str]) -> Graph:
    """Rearranged constants under their first name again, wherever the original is no longer in the graph."""
    new: dict[str, str] = {}
    for name in graph.constants:
        first = origin.get(name, name)
        if first not in graph.constants and first not in new.values():
            new[name] = first
    nodes = (msgspec.structs.replace(n, inputs=tuple(new.get(i, i) for i in n.inputs)) for n in graph.nodes)
    constants = {new.get(name, name): tensor for name, tensor in graph.constants.items()}
    return Graph(graph.inputs, graph.outputs, tuple(nodes), constants, graph.values, graph.notes)


# -- views ------------------------------------------------------------------------------------------------------------


def _shape(view: View, base: Shape) -> Shape:
    return tuple(1 if axis is None else base[axis] for axis in view)


def _canonical(view: View, base: Shape) -> View:
    return tuple(None if axis is None or base[axis] == 1 else axis for axis in view)


def _compose(outer: View, inner: View) -> View:
    """The view ``outer`` of something that is itself the view ``inner``."""
    return tuple(None if axis is None else inner[axis] for axis in outer)


def _inverse(view: View, rank: int) -> View:
    return tuple(view.index(axis) if axis in view else None for axis in range(rank))


def _padded(view: View, rank: int) -> View:
    """Broadcasting's way of raising the rank: ones in front."""
    return (None,) * (rank - len(view)) + view


def _named(view: View) -> list[int]:
    return [axis for axis in view if axis is not None]


def _cost(view: View, base: Shape) -> int:
    """Of making the value: nothing where it is the base, little for a reshape, much for a transpose (which moves data)."""
    if _named(view) != sorted(_named(view)):
        return 10
    return int(_shape(view, base) != base)


class _Walk:
    """The new graph so far, and for every value of the old one its base there and its view of it."""

    def __init__(self, graph: Graph) -> None:
        self.to = Builder(graph)
        self.place: dict[str, tuple[str, View]] = {}
        self.made: dict[tuple[str, View], str] = {}
        self.origin: dict[str, str] = {}
        for name in (*graph.inputs, *graph.constants):
            self.put(name, name)

    def put(self, name: str, base: str, view: View | None = None) -> None:
        shape = self.to.shape(base)
        self.place[name] = base, _canonical(tuple(range(len(shape))) if view is None else view, shape)

    def shape(self, name: str) -> Shape:
        base, view = self.place[name]
        return _shape(view, self.to.shape(base))

    def is_constant(self, name: str) -> bool:
        return self.place[name][0] in self.to.constants

    def whole(self, name: str) -> str:
        """The value itself, in its own order of axes."""
        return self.rearranged(*self.place[name], name=name) if name else name

    def rearranged(self, base: str, view: View, name: str) -> str:
        shape = self.to.shape(base)
        if not _cost(view, shape):
            return base
        if (base, view) in self.made:
            return self.made[base, view]
        spare = [axis for axis in range(len(shape)) if axis not in view]
        name = self.to.unique(f"{name}_permuted" if name == base else name)
        want = _shape(view, shape)
        maker = self.to.makers.get(base)
        if base in self.to.constants:
            made = self.to.constant(name, self.to.constants[base].permute([*_named(view), *spare]).reshape(want).contiguous())
            self.origin[made] = self.origin.get(base, base)
        elif maker and maker.op == "expand_batch" and maker.inputs[0] in self.to.constants and view[:1] == (0,):
            constant = self.to.constant(
                self.to.unique(f"{maker.inputs[0]}_permuted"),
                self.to.constants[maker.inputs[0]].permute([*_named(view), *spare]).reshape(1, *want[1:]).contiguous(),
            )
            self.origin[constant] = maker.inputs[0]
            made = self.to.emit("expand_batch", [constant, maker.inputs[1]], name)
        elif _cost(view, shape) == 1:
            made = self.to.reshape(base, want, name)
        elif len(view) == len(shape):
            made = self.to.emit("transpose", [base], name, {"perm": [spare.pop(0) if axis is None else axis for axis in view]})
        else:
            moved = self.to.emit("transpose", [base], self.to.unique(f"{name}_permuted"), {"perm": [*_named(view), *spare]})
            made = self.to.reshape(moved, want, name)
        self.made[base, view] = made
        return made

    def emit(self, node: Node, inputs: Sequence[str], view: View | None = None, **changed: Any) -> None:
        """The node on ``inputs``; its results are seen through ``view``."""
        self.to.emit(node.op, inputs, node.outputs, {**node.attrs, **changed})
        for out in node.outputs:
            self.put(out, out, view)

    def together(self, names: Sequence[str], free: int | None = None) -> tuple[list[str], View] | None:
        """The operands in one common order of axes, as cheap as can be, and the view that leads back from it.

        ``free`` is the axis on which their sizes may differ (concat). None: no order but their own.
        """
        rank = max(len(self.shape(name)) for name in names)
        views = [_padded(self.place[name][1], rank) for name in names]
        shapes = [self.to.shape(self.place[name][0]) for name in names]
        best = sum(_cost(self.place[n][1], s) for n, s in zip(names, shapes) if not self.is_constant(n))
        choice: tuple[list[View], View] | None = None
        for lead, (name, view) in enumerate(zip(names, views)):
            if self.is_constant(name) or len(self.place[name][1]) < rank or (free is not None and view[free] is None):
                continue
            back = _inverse(view, len(shapes[lead]))
            moved = [_compose(back, other) for other in views]
            if any(sorted(_named(m)) != sorted(_named(v)) for m, v in zip(moved, views)):
                continue  # an axis of the other operand has no place in this order
            if free is None:
                moved = [_trimmed(m, len(shape)) for m, shape in zip(moved, shapes)]
            price = sum(_cost(m, s) for n, m, s in zip(names, moved, shapes) if not self.is_constant(n))
            price += _cost(view, shapes[lead]) // 2
            if price < best:
                best, choice = price, (moved, view)
        if choice is None:
            return None
        return [self.rearranged(self.place[n][0], m, f"{n}_permuted") for n, m in zip(names, choice[0])], choice[1]


def _trimmed(view: View, rank: int) -> View:
    """Without the leading ones that broadcasting adds by itself, down to the base's own rank."""
    while view and view[0] is None and len(view) > max(rank, len(_named(view))):
        view = view[1:]
    return view


# -- one rule for each way of treating axes ---------------------------------------------------------------------------


def _plain(walk: _Walk, node: Node) -> None:
    """Operations that need their operands as they are."""
    walk.emit(node, [walk.whole(name) for name in node.inputs])


def _transpose(walk: _Walk, node: Node) -> None:
    base, view = walk.place[node.inputs[0]]
    walk.put(node.name, base, _compose(tuple(node.attrs["perm"]), view))


def _reshape(walk: _Walk, node: Node) -> None:
    base, view = walk.place[node.inputs[0]]
    shape = walk.shape(node.inputs[0])
    want = tuple(torch.empty(shape, device="meta").reshape(_literal(node.attrs["shape"], shape)).shape)
    real = [axis for axis, size in enumerate(shape) if size != 1]
    if [shape[axis] for axis in real] == [size for size in want if size != 1]:
        sources = iter(real)
        walk.put(node.name, base, _compose(tuple(None if size == 1 else next(sources) for size in want), view))
    else:
        walk.put(node.name, walk.to.reshape(walk.whole(node.inputs[0]), want, walk.to.unique(node.name)))


def _literal(target: Sequence[int], shape: Shape) -> list[int]:
    return [shape[i] if size == 0 else size for i, size in enumerate(target)]


def _identity(walk: _Walk, node: Node) -> None:
    walk.place[node.name] = walk.place[node.inputs[0]]


def _unary(walk: _Walk, node: Node) -> None:
    base, view = walk.place[node.inputs[0]]
    walk.emit(node, [base], view)


def _elementwise(walk: _Walk, node: Node) -> None:
    shared = walk.together(node.inputs)
    if shared is None:
        _plain(walk, node)
    else:
        walk.emit(node, *shared)


def _concat(walk: _Walk, node: Node) -> None:
    axis = node.attrs["axis"] % len(walk.shape(node.inputs[0]))
    shared = walk.together(node.inputs, axis)
    if shared is None:
        _plain(walk, node)
    else:
        operands, view = shared
        walk.emit(node, operands, view, axis=view[axis])


def _one_axis(walk: _Walk, node: Node) -> None:
    """softmax, slice, split, gather by a list: the axis stays, under the base's number."""
    x, *rest = node.inputs
    base, view = walk.place[x]
    axis = view[node.attrs["axis"]]
    if axis is None or any(len(walk.shape(name)) != 1 or not walk.is_constant(name) for name in rest):
        return _plain(walk, node)
    if axis == len(walk.to.shape(base)) - 1 and node.op in ("softmax", "log_softmax"):
        axis = -1
    return walk.emit(node, [base, *rest], view, axis=axis)


def _reduction(walk: _Walk, node: Node) -> None:
    base, view = walk.place[node.inputs[0]]
    given = node.attrs["axes"] if "axes" in node.attrs else [node.attrs["axis"]]
    axes = sorted(axis % len(view) for axis in given)
    gone = [axis for i in axes if (axis := view[i]) is not None]
    keep = node.attrs.get("keepdim", False)
    if node.op == "argmax" and not gone:
        return _plain(walk, node)
    left = tuple(None if i in axes else axis for i, axis in enumerate(view) if keep or i not in axes)
    if not gone:
        return walk.put(node.name, base, left)
    if not keep:
        left = tuple(None if axis is None else axis - sum(g < axis for g in gone) for axis in left)
    return walk.emit(node, [base], left, **({"axes": gone} if "axes" in node.attrs else {"axis": gone[0]}))


def _pad(walk: _Walk, node: Node) -> None:
    base, view = walk.place[node.inputs[0]]
    padding, rank = node.attrs["padding"], len(view)
    new = [0] * (2 * len(walk.to.shape(base)))
    for i in range(0, len(padding), 2):
        axis = view[rank - 1 - i // 2]
        if axis is not None:
            at = len(new) - 2 * (axis + 1)
            new[at : at + 2] = padding[i : i + 2]
        elif any(padding[i : i + 2]):
            return _plain(walk, node)
    while new and not any(new[-2:]):
        del new[-2:]
    return walk.emit(node, [base], view, padding=new) if new else walk.put(node.name, base, view)


def _last_axis(walk: _Walk, node: Node) -> None:
    x, *rest = node.inputs
    base, view = walk.place[x]
    if view[-1:] == (len(walk.to.shape(base)) - 1,):
        walk.emit(node, [base, *map(walk.whole, rest)], view)
    else:
        _plain(walk, node)


def _matmul(walk: _Walk, node: Node) -> None:
    """A second operand that would be transposed for it is taken as it is."""
    a, b = node.inputs
    base, view = walk.place[b]
    flipped = (*view[:-2], *view[:-3:-1])
    flip = len(view) > 1 and _cost(flipped, walk.to.shape(base)) < _cost(view, walk.to.shape(base))
    second = walk.rearranged(base, flipped, f"{b}_permuted") if flip else walk.whole(b)
    walk.emit(node, [walk.whole(a), second], transpose_b=node.attrs.get("transpose_b", False) != flip)


def _expand_batch(walk: _Walk, node: Node) -> None:
    """Only the batch of the second operand counts, wherever its other axes are."""
    x, like = node.inputs
    base, view = walk.place[like]
    same = view[:1] == (0,) and walk.to.shape(base)[0] == PROBE
    walk.emit(node, [walk.whole(x), base if same else walk.whole(like)])


_RULES: dict[str, Callable[[_Walk, Node], None]] = {
    op: rule
    for rule, ops in (
        (_transpose, "transpose"),
        (_reshape, "reshape"),
        (_identity, "identity"),
        (_unary, "relu relu6 leaky_relu elu hardswish hardsigmoid hardtanh gelu silu sigmoid tanh exp log erf sqrt rsqrt abs neg"),
        (_unary, "sin cos cast"),
        (_elementwise, "add sub mul div maximum minimum squared_difference pow where compare"),
        (_concat, "concat"),
        (_one_axis, "softmax log_softmax slice split gather"),
        (_reduction, "mean sum amax argmax"),
        (_pad, "pad"),
        (_last_axis, "linear layer_norm rms_norm"),
        (_matmul, "matmul"),
        (_expand_batch, "expand_batch"),
    )
    for op in ops.split()
}
