"""`fuse`: the same function with fewer, larger nodes, so that what is left are sites worth quantizing; it trains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..graph import OPS, Graph, Node
from ..graph.build import with_values
from .batchfirst import batch_first
from .pattern import Binding, Constant, Letter, Pattern, View, op, product


def fuse(graph: Graph) -> Graph:
    """An equal graph: float outputs differ by rounding alone (relative 1e-4 at most).

    Constants are computed, no-ops dropped, then layer norm, RMS norm, GELU, SiLU, hard-swish, hard-sigmoid, softmax and
    attention that arrive taken apart become one node each, batch norms and per-channel constants go into the layer before
    them, and ReLU or ReLU6 becomes its producer's ``act``. A pattern keeps the name of the value that leaves it; a layer
    keeps its own name, whatever is folded into it. Nothing is fused whose inner values are read from elsewhere. The batch
    comes first in every value where moves alone put it elsewhere.

    >>> import torch
    >>> from roundel import capture
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> [(node.op, node.attrs["act"]) for node in fuse(capture(net, torch.randn(1, 3, 8, 8)))]
    [('conv', 'relu')]
    """
    graph = batch_first(graph)
    for matchers in (_CLEAN, _PATTERNS + _CLEAN, _FOLDS, _ACTS):
        while (smaller := _sweep(graph, matchers)) is not graph:
            graph = smaller
    return with_values(graph) if all(name in graph.values for name in graph.inputs) else graph


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """What `fuse` folds into a layer, as it was before: the layer's weight and bias, the norm's running ``mean`` and ``var``, its
    ``gain`` and ``shift``. ``folded`` is the name of the bias that all of it goes into."""

    folded: str
    weight: Tensor
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    gain: Tensor | None
    shift: Tensor | None
    eps: float


def batch_norms(graph: Graph) -> dict[str, BatchNorm]:
    """The name that `fuse` gives to a layer's weight -> the batch norm that it folds into it. Norms of which more than their own
    layer's weight depends, or whose layer takes another factor too, are left out.

    >>> import torch
    >>> from roundel import capture
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> [(name, norm.folded) for name, norm in batch_norms(capture(net, torch.randn(1, 3, 8, 8))).items()]
    [('0.weight', '0.bias')]
    """
    fused = fuse(graph).constants
    graph = batch_first(graph)
    for matchers in (_CLEAN, _PATTERNS + _CLEAN, (_affine_but_norms,)):
        while (smaller := _sweep(graph, matchers)) is not graph:
            graph = smaller
    view, found = View(graph), dict[str, BatchNorm]()
    for node in graph:
        swap = _affine(view, node) if node.op == "batch_norm" else None
        if swap is None or _between(view, node, swap) is None:
            continue
        if any(name not in fused or not torch.equal(fused[name], tensor) for name, tensor in swap.constants.items()):
            continue
        (_, weight, bias), layer = swap.nodes[0].inputs, view.maker[node.inputs[0]].inputs
        own = [view.constant(name) for name in (*layer[1:], "")[:2]]
        mean, var, gain, shift = (view.constant(name) for name in (*node.inputs[1:], "", "")[:4])
        assert own[0] is not None
        assert mean is not None
        assert var is not None
        found[weight] = BatchNorm(bias, own[0], own[1], mean, var, gain, shift, node.attrs["eps"])
    return found


# -- replacing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swap:
    """``nodes`` for everything between their inputs and the node that was matched; ``value`` is what its readers read now."""

    nodes: tuple[Node, ...]
    value: str
    constants: Mapping[str, Tensor] = field(default_factory=dict)


Matcher = Callable[[View, Node], Swap | None]


def _sweep(graph: Graph, matchers: Sequence[Matcher]) -> Graph:
    """One pass from the outputs backwards, larger patterns before the smaller ones inside; ``graph`` itself if nothing fits."""
    view = View(graph)
    swaps: dict[str, Swap] = {}
    gone: set[str] = set()
    for root in reversed(graph.nodes):
        for matcher in matchers if root.name not in gone else ():
            swap = matcher(view, root)
            inner = _between(view, root, swap) if swap else None
            if swap and inner is not None and not inner & gone:
                swaps[root.name] = swap
                gone |= inner
                break
    if not swaps:
        return graph
    renamed = {root: swap.value for root, swap in swaps.items() if root != swap.value}
    nodes: list[Node] = []
    for node in graph:
        kept = swaps[node.name].nodes if node.name in swaps else () if node.name in gone else (node,)
        nodes += [Node(n.op, tuple(_follow(renamed, name) for name in n.inputs), n.outputs, n.attrs) for n in kept]
    constants = {name: tensor for swap in swaps.values() for name, tensor in swap.constants.items()}
    outputs = tuple(_follow(renamed, name) for name in graph.outputs)
    made = replace(graph, nodes=tuple(nodes), outputs=outputs, constants={**graph.constants, **constants})
    return made.with_nodes(made.nodes)


def _follow(renamed: Mapping[str, str], name: str) -> str:
    while name in renamed:
        name = renamed[name]
    return name


def _between(view: View, root: Node, swap: Swap) -> set[str] | None:
    """Names of the nodes that ``swap`` replaces; None where one of their values is read elsewhere."""
    made = {out for node in swap.nodes for out in node.outputs}
    stop = {name for node in swap.nodes for name in node.inputs} - made
    if not swap.nodes:
        stop.add(swap.value)
    inner, todo = {root.name}, [root]
    while todo:
        for name in todo.pop().inputs:
            maker = view.maker.get(name)
            if name not in stop and maker is not None and maker.name not in inner:
                inner.add(maker.name)
                todo.append(maker)
            elif name in view.graph.inputs and name not in stop:
                return None  # the pattern reads an input that its replacement does not
    values = {out for name in inner - {root.name} for out in view.maker[name].outputs}
    return inner if all(view.only_read_by(value, inner) for value in values) else None


def _named(root: Node, name: str, inputs: Sequence[str], constants: Mapping[str, Tensor] | None = None, /, **attrs: Any) -> Swap:
    """One node that takes the root's place and name."""
    return Swap((Node(name, tuple(inputs), (root.name,), attrs),), root.name, constants or {})


def _rule(pattern: Pattern, build: Callable[[View, Node, Binding], Swap | None]) -> Matcher:
    def matcher(view: View, root: Node) -> Swap | None:
        for bound in pattern.match(view, root.name, {}):
            swap = build(view, root, bound)
            if swap is not None and _between(view, root, swap) is not None:
                return swap
        return None

    return matcher


def _unary(name: str, **attrs: Any) -> Callable[[View, Node, Binding], Swap]:
    return lambda view, root, b: _named(root, name, [b["x"]], **attrs)


# -- tidying ----------------------------------------------------------------------------------------------------------


def _constant(view: View, root: Node) -> Swap | None:
    """What depends on constants alone is computed now, unless it names a site; broadcasts stay operations, or small constants would
    become large."""
    known = [view.constant(name) for name in root.inputs if name]
    if len(root.outputs) > 1 or root.name in view.graph.outputs or root.op == "expand" or root.attrs.get("site") or not known:
        return None
    if any(tensor is None for tensor in known):
        return None
    with torch.no_grad():
        result = OPS[root.op](*[view.constant(name) for name in root.inputs], **root.attrs)
    return Swap((), root.name, {root.name: result})


def _no_op(view: View, root: Node) -> Swap | None:
    """identity, x + 0, x - 0, x * 1, x / 1, and casts and reshapes that change nothing, unless they name a site."""
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}
    if root.attrs.get("site"):
        return None
    if root.op == "identity":
        return Swap((), root.inputs[0])
    if root.op in ("reshape", "cast"):
        spec = view.graph.values.get(root.inputs[0])
        return Swap((), root.inputs[0]) if spec is not None and spec == view.graph.values.get(root.name) else None
    if root.op not in neutral or root.attrs.get("act"):
        return None
    for x, other in [root.inputs, root.inputs[::-1]][: 2 if root.op in ("add", "mul") else 1]:
        shape = view.shape(x)
        if (
            view.number(other) == neutral[root.op]
            and shape is not None
            and len(view.shape(other) or ()) <= len(shape)
            and view.floating(x)
        ):
            return Swap((), x)
    return None


def _reshapes(view: View, root: Node) -> Swap | None:
    """A reshape of a reshape; a 0 of the second looks through to the first."""
    first = view.maker.get(root.inputs[0]) if root.op == "reshape" else None
    if first is None or first.op != "reshape":
        return None
    inner = first.attrs["shape"]
    shape = [inner[i] if n == 0 else n for i, n in enumerate(root.attrs["shape"])]
    return _named(root, "reshape", first.inputs, shape=shape) if shape.count(-1) <= 1 else None


def _matmul(view: View, root: Node) -> Swap | None:
    """A constant second operand makes it a linear layer; a transposed one is read as it lies."""
    if root.op != "matmul":
        return None
    a, b = root.inputs
    flip = bool(root.attrs.get("transpose_b", False))
    weight, maker = view.constant(b), view.maker.get(b)
    if weight is not None and weight.ndim == 2:
        name = view.fresh(f"{root.name}.weight")
        return _named(root, "linear", [a, name], {name: weight if flip else weight.t().contiguous()})
    if maker is not None and maker.op == "transpose" and (perm := list(maker.attrs["perm"])) == _flipped(len(perm)):
        return _named(root, "matmul", [a, maker.inputs[0]], transpose_b=not flip)
    return None


def _flipped(rank: int) -> list[int]:
    """The permutation that exchanges the last two axes."""
    return [*range(rank - 2), rank - 1, rank - 2]


def _clamp(view: View, root: Node) -> Swap | None:
    """A clamp that is ReLU or ReLU6 under another name."""
    bounds = root.attrs.get("lo"), root.attrs.get("hi")
    if root.op == "hardtanh" and bounds[0] == 0 and bounds[1] in (None, math.inf, 6):
        return _named(root, "relu6" if bounds[1] == 6 else "relu", root.inputs)
    return None


# -- patterns ---------------------------------------------------------------------------------------------------------


def _last_axis(view: View, node: Node) -> bool:
    """A reduction over the last axis that keeps it."""
    shape = view.shape(node.inputs[0])
    last = [-1] if shape is None else [-1, len(shape) - 1]
    return node.attrs.get("keepdim", False) and len(node.attrs["axes"]) == 1 and node.attrs["axes"][0] in last


def _softmax_last(view: View, node: Node) -> bool:
    shape = view.shape(node.inputs[0])
    return node.attrs["axis"] in ([-1] if shape is None else [-1, len(shape) - 1])


_x, _gain, _shift = Letter("x"), Constant("gain"), Constant("shift")
_eps = Constant("eps", single=True)


def _root(v: Pattern) -> Pattern:
    return op("sqrt", v) | op("pow", v, 0.5)


def _inverse_root(v: Pattern) -> Pattern:
    return op("rsqrt", v) | op("pow", v, -0.5) | op("div", 1.0, _root(v))


_mean = Letter("mean", op("mean", _x, check=_last_axis))
_centred = _x - _mean
_square = op("squared_difference", _x, _mean) | op("squared_difference", _mean, _x) | _centred * _centred | op("pow", _centred, 2.0)
_variance = op("mean", _square, check=_last_axis) + _eps
_factor = Letter("factor", _inverse_root(_variance) * _gain | _inverse_root(_variance))
_normal = _centred * _factor | _centred / _root(_variance)
# Keras and TFLite: x * factor + (shift - mean * factor).
_keras = _x * _factor + (_shift - _mean * _factor) | _x * _factor - _mean * _factor
LAYER_NORM = _keras | _normal * _gain + _shift | _normal + _shift | _normal * _gain | _normal

_mean_square = op("mean", _x * _x | op("pow", _x, 2.0), check=_last_axis) + _eps
_unit = _x * _inverse_root(_mean_square) | _x / _root(_mean_square)
RMS_NORM = _unit * _gain | _x * (_inverse_root(_mean_square) * _gain) | _unit

_cube = op("pow", _x, 3.0) | product(_x, _x, _x)
_inner = (_x + _cube * 0.044715) * 0.7978846 | product(_x, 0.7978846, (_x * _x | op("pow", _x, 2.0)) * 0.044715 + 1.0)
GELU_TANH = product(_x, 0.5, op("tanh", _inner) + 1.0)
GELU = product(_x, 0.5, op("erf", _x * 0.70710678 | _x / 1.41421356) + 1.0)

SILU = _x * op("sigmoid", _x)
_ramp = op("relu6", _x + 3.0) | op("add", _x, 3.0, act="relu6")
HARDSIGMOID = _ramp / 6.0 | _ramp * (1 / 6)
HARDSWISH = product(_x, _ramp, 1 / 6) | (_x * _ramp) / 6.0 | _x * (HARDSIGMOID | op("hardsigmoid", _x))
RELU = op("maximum", _x, 0.0)
RELU6 = op("minimum", op("relu", _x) | RELU, 6.0) | op("relu", op("minimum", _x, 6.0))

_exp = Letter("exp", op("exp", _x - Letter("top", op("amax", _x))) | op("exp", _x))
SOFTMAX = _exp / Letter("total", op("sum", _exp))

_product = Letter("product", op("matmul", Letter("q"), Letter("k")))
_scores = _product | _product * Constant("scale", single=True) | _product / Constant("divisor", single=True)
_fill = Constant("fill", single=True)
_masked = _scores + Letter("mask") | op("where", Constant("hidden"), _fill, _scores) | op("where", Constant("seen"), _scores, _fill)
ATTENTION = op("matmul", op("softmax", _scores | _masked, check=_softmax_last), Letter("v"))


def _along_last(tensor: Tensor | None, size: int) -> Tensor | None:
    """A constant as a vector over the last axis of ``size``; None where it varies along another."""
    if tensor is None or tensor.numel() not in (1, size) or (tensor.numel() == size > 1 and tensor.shape[-1] != size):
        return None
    return tensor.reshape(-1).expand(size).contiguous()


def _norm(name: str) -> Callable[[View, Node, Binding], Swap | None]:
    """layer_norm or rms_norm, its constants named after the value that leaves it."""

    def build(view: View, root: Node, b: Binding) -> Swap | None:
        shape, eps = view.shape(b["x"]), view.number(b["eps"])
        if shape is None or not isinstance(shape[-1], int) or eps is None:
            return None
        inputs = [b["x"]]
        constants: dict[str, Tensor] = {}
        for letter, role in (("gain", "weight"), ("shift", "bias")):
            vector = _along_last(view.constant(b.get(letter, "")), shape[-1])
            if vector is None and letter in b:
                return None
            inputs.append("" if vector is None else view.fresh(f"{root.name}.{role}", vector))
            constants |= {} if vector is None else {inputs[-1]: vector}
        while not inputs[-1]:
            inputs.pop()
        return _named(root, name, inputs, constants, eps=eps)

    return build


def _softmax(view: View, root: Node, b: Binding) -> Swap | None:
    reductions = [view.maker[b[letter]].attrs for letter in ("total", "top") if letter in b]
    rank = len(view.shape(b["x"]) or ())
    axes = {axis % rank if rank else axis for attrs in reductions for axis in attrs["axes"]}
    if len(axes) != 1 or not all(attrs.get("keepdim", False) for attrs in reductions):
        return None
    axis = axes.pop()
    return _named(root, "softmax", [b["x"]], axis=-1 if axis == rank - 1 else axis)


def _attention(view: View, root: Node, b: Binding) -> Swap | None:
    """Operands must share their leading axes: attention broadcasts nothing."""
    shapes = [view.shape(b[letter]) for letter in "qkv"]
    if any(s is None or len(s) < 3 or s[:-2] != (shapes[0] or ())[:-2] for s in shapes):
        return None
    operands, nodes = [b["q"], b["k"], b["v"]], []
    upright = {1: bool(view.maker[b["product"]].attrs.get("transpose_b")), 2: not root.attrs.get("transpose_b")}
    for i, fits in upright.items():
        if not fits:
            name = view.fresh(f"{root.name}.transpose")
            nodes.append(Node("transpose", (operands[i],), (name,), {"perm": _flipped(len(shapes[i] or ()))}))
            operands[i] = name
    scale = view.number(b["scale"]) if "scale" in b else 1 / view.number(b["divisor"]) if "divisor" in b else 1.0  # type: ignore[operator]
    mask, constants = [b["mask"]] if "mask" in b else [], {}
    if "fill" in b:
        seen = view.graph.constants[b["seen"]] if "seen" in b else ~view.graph.constants[b["hidden"]]
        if (view.number(b["fill"]) or 0.0) > -1e4 or not seen.any(-1).all():  # a row of which nothing is seen is no number, or any
            return None
        mask = [view.fresh(f"{root.name}.mask", seen)]
        constants = {mask[0]: seen}
    nodes.append(Node("attention", (*operands, *mask), (root.name,), {"scale": scale, "causal": False}))
    return Swap(tuple(nodes), root.name, constants)


# -- folding into the layer before ------------------------------------------------------------------------------------

_LAYERS = ("conv", "conv_transpose", "linear")
_WITH_ACT = (*_LAYERS, "add", "sub", "mul", "div", "max_pool", "avg_pool")


def _act(view: View, root: Node) -> Swap | None:
    """ReLU and ReLU6 become their producer's ``act``; the producer's name stays."""
    maker = view.maker.get(root.inputs[0]) if root.op in ("relu", "relu6") else None
    if maker is None or maker.op not in _WITH_ACT or maker.attrs.get("act"):
        return None
    return Swap((Node(maker.op, maker.inputs, maker.outputs, {**maker.attrs, "act": root.op}),), maker.name)


def _affine(view: View, root: Node) -> Swap | None:
    """A batch norm, or a constant per output channel that is added, subtracted or multiplied, goes into the weights before it."""
    if root.op not in ("batch_norm", "add", "sub", "mul"):
        return None
    for x, other in [root.inputs[:2], root.inputs[1::-1]][: 2 if root.op in ("add", "mul") else 1]:
        layer = view.maker.get(x)
        if layer is None or layer.op not in _LAYERS or layer.attrs.get("act"):
            continue
        tensors = [view.constant(name) for name in layer.inputs[1:] if name]
        if any(t is None or not t.is_floating_point() for t in tensors):
            continue
        weight = view.graph.constants[layer.inputs[1]]
        channels = weight.shape[1] * layer.attrs["groups"] if layer.op == "conv_transpose" else weight.shape[0]
        change = _per_channel(view, root, other, layer, channels)
        if change is not None:
            return _folded(view, root, layer, *change)
    return None


def _affine_but_norms(view: View, root: Node) -> Swap | None:
    return None if root.op == "batch_norm" else _affine(view, root)


def _per_channel(view: View, root: Node, other: str, layer: Node, channels: int) -> tuple[Tensor, Tensor] | None:
    """(factor, summand), a float64 number per channel each, that ``root`` applies to the layer's output."""
    one, zero = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    rank = view.graph.constants[layer.inputs[1]].ndim if layer.op != "linear" else len(view.shape(layer.name) or ())
    if root.op == "batch_norm":
        if layer.op == "linear" and rank != 2:  # its channels are not on axis 1
            return None
        mean, var, gain, shift = (view.constant(name) for name in (*root.inputs[1:], "", "")[:4])
        if mean is None or var is None or ("", None) in zip(root.inputs[3:], (gain, shift)):
            return None
        factor = (one if gain is None else gain.double()) / (var.double() + root.attrs["eps"]).sqrt()
        return factor, (zero if shift is None else shift.double()) - mean.double() * factor
    constant = view.constant(other)
    at = rank - 1 if layer.op == "linear" else 1  # the channels' axis
    if root.op not in ("add", "sub", "mul") or constant is None or constant.numel() != channels or constant.ndim > rank:
        return None
    if ([1] * (rank - constant.ndim) + list(constant.shape))[at] != channels:
        return None
    vector = constant.double().reshape(-1)
    return {"add": (one, vector), "sub": (one, -vector), "mul": (vector, zero)}[root.op]


def _folded(view: View, root: Node, layer: Node, factor: Tensor, summand: Tensor) -> Swap:
    weight, bias = view.graph.constants[layer.inputs[1]], view.constant((*layer.inputs, "")[2])
    wide = weight.double()
    if layer.op == "conv_transpose":  # (in, out / groups, ...): a group's inputs lead to that group's outputs
        groups = layer.attrs["groups"]
        by_group = wide.reshape(groups, -1, *wide.shape[1:]).transpose(1, 2)
        by_group = by_group * factor.reshape(groups, -1, *[1] * (wide.ndim - 1))
        wide = by_group.transpose(1, 2).reshape(weight.shape)
    else:
        wide = wide * factor.reshape(-1, *[1] * (wide.ndim - 1))
    summand = summand if bias is None else summand + bias.double() * factor

    def own(name: str, otherwise: str) -> str:
        return name if name and view.only_read_by(name, {layer.name}) else view.fresh(otherwise)

    w = own(layer.inputs[1], f"{layer.name}.weight")
    stem = layer.inputs[1].removesuffix("weight") if layer.inputs[1].endswith("weight") else f"{layer.name}."
    b = own((*layer.inputs, "")[2], f"{stem}bias")
    attrs = {**layer.attrs, "act": root.attrs["act"]} if root.attrs.get("act") else layer.attrs
    node = Node(layer.op, (layer.inputs[0], w, b), layer.outputs, attrs)
    return Swap((node,), layer.name, {w: wide.to(weight.dtype), b: summand.to(weight.dtype)})


_CLEAN: tuple[Matcher, ...] = (
    _constant,
    _no_op,
    _reshapes,
    _matmul,
    _clamp,
    _rule(RELU6, _unary("relu6")),
    _rule(RELU, _unary("relu")),
)
_PATTERNS: tuple[Matcher, ...] = (
    _rule(LAYER_NORM, _norm("layer_norm")),
    _rule(RMS_NORM, _norm("rms_norm")),
    _rule(GELU_TANH, _unary("gelu", approximate="tanh")),
    _rule(GELU, _unary("gelu", approximate="none")),
    _rule(HARDSWISH, _unary("hardswish")),
    _rule(HARDSIGMOID, _unary("hardsigmoid")),
    _rule(SILU, _unary("silu")),
    _rule(SOFTMAX, _softmax),
    _rule(ATTENTION, _attention),
)
_FOLDS: tuple[Matcher, ...] = (_affine,)
_ACTS: tuple[Matcher, ...] = (_act,)
