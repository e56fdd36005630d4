"""One function per integer operation: the TFLite operators that compute it, or a PlanError that says why none does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import PlanError
from ...graph import Graph, Node
from ...integer.dialect import Ints, quantize_multiplier
from ...integer.fixed import exp_table
from ...integer.ops import levels, numbers
from ...qmodel import Note, QModel
from .draft import Draft
from .layout import Order, channels_last, is_relabelling, moved, orders, plain, relative, same_elements, sized
from .units import Units, agree, same, units

#: A spatial axis's padding, (before, after).
Pad = tuple[int, int]
Bools = NDArray[np.bool_]


@dataclass
class Translation:
    """A file in the making and where the graph's values are in it: ``place[name]`` maps an order of axes to a tensor."""

    q: QModel
    graph: Graph
    widen: bool = False
    draft: Draft = field(default_factory=Draft)
    place: dict[str, dict[Order, int]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.orders = orders(self.graph)
        self.all_units = units(self.q, self.graph)
        self.producers = self.q.structure.producers() if isinstance(self.q.structure, Graph) else {}

    def units(self, name: str) -> Units:
        if name not in self.all_units:
            raise PlanError(f"the scale of {name!r} is not known to the model")
        return self.all_units[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return sized(self.graph, name)

    def rank(self, name: str) -> int:
        return len(self.graph.values[name].shape)

    def batched(self, name: str) -> bool:
        shape = self.graph.values[name].shape
        return bool(shape) and isinstance(shape[0], str)

    # -- values -------------------------------------------------------------------------------------------------------

    def value(self, name: str, order: Order | None = None) -> int:
        """The tensor of a value, or of a constant in a value's place, with its axes in ``order`` (its own where None)."""
        if name in self.graph.constants and name not in self.place:
            order = order or plain(self.rank(name))
            at = self.units(name)
            data = numbers(self.graph, name).transpose(order)
            return self.draft.constant(name, at.type, data, scale=(at.scale,), zero=at.zero)
        known = self.place[name]
        order = order or self.orders[name]
        if order not in known:
            have = self.orders[name]
            perm = relative(have, order)
            made = self.like(name, f"{name}.turned", order)
            known[order] = self.turn(known[have], made, moved(self.shape(name), have), perm)
        return known[order]

    def like(self, name: str, as_name: str, order: Order, shape: Sequence[int] | None = None, of: str | None = None) -> int:
        """A new tensor of the shape of value ``name`` (or ``shape``, in the file's order), in the units of ``of``."""
        at = self.units(of or name)
        shape = moved(self.shape(name), order) if shape is None else shape
        batched = self.batched(name) and order[0] == 0
        return self.draft.tensor(as_name, at.type, shape, scale=(at.scale,), zero=at.zero, batched=batched)

    def result(self, node: Node, order: Order | None = None) -> int:
        """The tensor that an operator writes ``node``'s value to with axes in ``order``; its own order is made of it later."""
        own = self.orders[node.name]
        order = order or own
        made = self.like(node.name, node.name if order == own else f"{node.name}.raw", order)
        self.place.setdefault(node.name, {})[order] = made
        return made

    def settle(self, node: Node) -> None:
        """After ``node``'s operators: its value in its own order, by a transpose where it was written in another."""
        known, own = self.place[node.name], self.orders[node.name]
        if own not in known:
            have, made = next(iter(known.items()))
            turned = self.like(node.name, node.name, own)
            known[own] = self.turn(made, turned, moved(self.shape(node.name), have), relative(have, own))

    def alias(self, node: Node, tensor: int) -> None:
        """``node``'s value is a tensor that is there already."""
        self.place[node.name] = {self.orders[node.name]: tensor}

    def turn(self, x: int, made: int, shape: Sequence[int], perm: Order) -> int:
        if is_relabelling(shape, perm):
            return self.reshape(x, made)
        return self.draft.step("TRANSPOSE", 2, [x, self.ints("perm", perm)], made, "TransposeOptions")

    def reshape(self, x: int, made: int) -> int:
        entry = self.draft.tensors[made]
        shape = [-1 if entry.batched else entry.shape[0], *entry.shape[1:]] if entry.shape else []
        return self.draft.step("RESHAPE", 1, [x, self.ints("shape", shape)], made, "ReshapeOptions", newShape=shape)

    def ints(self, name: str, values: ArrayLike) -> int:
        """A small int32 constant, shared between all that need the same numbers."""
        data = np.asarray(values, np.int32)
        for i, entry in enumerate(self.draft.tensors):
            if entry.data is not None and entry.type == "INT32" and not entry.scale and np.array_equal(entry.data, data):
                return i
        return self.draft.constant(name, "INT32", data)

    def padded(self, name: str, x: int, pads: Sequence[Pad], as_name: str, code: int | None = None) -> int:
        """``x``, value ``name`` in the file's order, with ``pads`` of every axis around it, of ``code`` or the zero point."""
        if all(pad == (0, 0) for pad in pads):
            return x
        if min(min(pad) for pad in pads) < 0:
            raise PlanError("its padding is negative, which TFLite does not have")
        at, entry = self.units(name), self.draft.tensors[x]
        shape = [n + sum(pad) for n, pad in zip(entry.shape, pads)]
        made = self.draft.tensor(as_name, at.type, shape, scale=(at.scale,), zero=at.zero, batched=entry.batched)
        margins = self.ints("margins", np.array(pads))
        if code is None or code == at.zero:
            return self.draft.step("PAD", 2, [x, margins], made, "PadOptions")
        filler = self.draft.constant(f"{as_name}.code", at.type, np.array([code]), scale=(at.scale,), zero=at.zero)
        return self.draft.step("PADV2", 2, [x, margins, filler], made, "PadV2Options")


# -- weighted ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Codes (out, ...), bias (out,) and scales (out,) of a layer and the type that holds the codes."""

    codes: Ints
    bias: Ints
    scale: NDArray[np.float64]
    type: str


def _weights(t: Translation, node: Node) -> Weights:
    """The layer's weights as TFLite wants them.

    A row of negative scale is turned around with its bias, which no rounding can tell. Where that would make 8 of a -8 in 4 bits
    the scale stays negative: TFLite Micro and LiteRT's own kernels compute with it, XNNPACK leaves the layer to them; but none
    takes a linear layer whose one scale is negative, so that one is held as int8.
    """
    x, y = t.units(node.inputs[0]), t.units(node.name)
    name, kind = node.inputs[1], t.graph.values[node.inputs[1]].dtype
    codes, bias, multiplier, shift = (numbers(t.graph, i) for i in node.inputs[1:5])
    stored = t.q.tensors[name].params.scale
    if len(node.inputs) > 5:  # what one level is worth follows from the multiplier
        unit = np.ldexp(multiplier.astype(np.float64), (shift - 31).astype(np.int32))
        scale = (unit * y.scale / x.scale).astype(np.float32).astype(np.float64)
        codes, kind = levels(codes, numbers(t.graph, node.inputs[5])), f"{kind} indices"
        if np.abs(codes).max(initial=0) > 127:
            raise PlanError("its weights are a table of levels finer than int8")
    else:
        scale = np.ones(len(codes)) if stored is None else np.broadcast_to(stored.double().numpy().reshape(-1), len(codes))
    rows = codes.reshape(len(codes), -1)
    empty: Bools = np.logical_not(np.any(rows, axis=1))
    scale = np.where(empty & (scale == 0), np.float32(y.scale / x.scale), scale)  # its sum is its bias, whatever the scale
    stuck: Bools = (scale < 0) & np.any(rows == -8, axis=1)
    one = node.op == "linear" and not np.ptp(scale)
    packed = kind == "int4" and x.type == "INT8" and not t.widen and not (one and stuck.any())
    turn = np.where((scale < 0) & ~(packed & stuck), -1, 1)
    codes, bias, multiplier, scale = codes * turn.reshape(-1, *[1] * (codes.ndim - 1)), bias * turn, multiplier * turn, scale * turn
    real = np.float64(x.scale) * scale / np.float64(y.scale)
    for i in range(len(codes)):
        sums = (int(bias[i]), int(bias[i])) if empty[i] else None
        if not agree(node, (multiplier[i], shift[i]), real[i], sums):
            raise PlanError(f"no float32 scale of output {i} gives its multiplier {multiplier[i]} and shift {shift[i]}")
    if packed and (scale < 0).any():
        count = int((scale < 0).sum())
        t.notes.append(Note(name, f"{count} of {len(scale)} scales are negative: XNNPACK leaves the layer to LiteRT's own kernels"))
    if packed and node.op == "linear" and np.ptp(scale):
        t.notes.append(Note(name, "TFLite Micro takes 4-bit weights of a linear layer with one scale alone: int4/tensor, or int8"))
    if kind != "int8" and not packed:
        t.notes.append(
            Note(name, f"its {kind} codes are held as int8" if kind[0] == "i" else f"its {kind} are written out as int8")
        )
    return Weights(codes, bias, scale, "INT4" if packed else "INT8")


def _enter(t: Translation, node: Node, w: Weights, codes: Ints, axis: int) -> tuple[int, int]:
    """The tensors of weights (``codes`` in the file's order) and bias."""
    x, name = t.units(node.inputs[0]), node.inputs[1]
    scale = w.scale[:1] if (w.scale == w.scale[0]).all() and node.op == "linear" else w.scale
    weight = t.draft.constant(name, w.type, codes, scale=tuple(scale.tolist()), axis=axis if len(scale) > 1 else 0)
    unit = tuple((np.float32(x.scale) * scale.astype(np.float32)).tolist())
    bias = t.draft.constant(node.inputs[2], "INT32" if x.type == "INT8" else "INT64", w.bias, scale=unit)
    return weight, bias


def _conv(t: Translation, node: Node) -> None:
    """CONV_2D, DEPTHWISE_CONV_2D where each group is one channel; a 1-D one is 2-D of height 1."""
    a, w = node.attrs, _weights(t, node)
    codes, line = w.codes, w.codes.ndim == 3
    if line:
        codes = codes[:, :, None]
    stride, dilation = ([1] * line + list(a[key]) for key in ("stride", "dilation"))
    x = _places(t, node, [(k - 1) * d + 1 for k, d in zip(codes.shape[2:], dilation)], stride)
    depthwise = a["groups"] > 1 and codes.shape[1] == 1
    fields = {"strideH": x.stride[0], "strideW": x.stride[1], "dilationHFactor": dilation[0], "dilationWFactor": dilation[1],
              "fusedActivationFunction": _act(t, node)}  # fmt: skip
    if depthwise:
        weight, bias = _enter(t, node, w, codes.transpose(1, 2, 3, 0), 3)
        kind, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        fields["depthMultiplier"] = len(codes) // a["groups"]
    else:
        weight, bias = _enter(t, node, w, codes.transpose(0, 2, 3, 1), 0)
        kind, options = "CONV_2D", "Conv2DOptions"
    _place(t, node, lambda made: t.draft.step(kind, 3, [x.tensor, weight, bias], made, options, padding=x.padding, **fields))


@dataclass(frozen=True)
class Places:
    """An operand of a convolution or pool, N, H, W, C, TFLite's padding of it (0 SAME, 1 VALID), and the steps of its windows."""

    tensor: int
    padding: int
    stride: Sequence[int] = (1, 1)


def _places(t: Translation, node: Node, reach: Sequence[int], stride: Sequence[int], code: int | None = None,
            pad: bool = True) -> Places:  # fmt: skip
    """The operand of ``node`` for windows of ``reach``: padded by an operator of its own where neither SAME nor VALID says it."""
    name = node.inputs[0]
    order = channels_last(t.rank(name))
    x, shape = t.value(name, order), moved(t.shape(name), order)
    flat = node.attrs.get("padding", [0, 0] * (len(shape) - 2))
    pads: list[Pad] = list(zip(flat[::2], flat[1::2]))[::-1]
    if len(shape) == 3:
        shape, pads = (shape[0], 1, *shape[1:]), [(0, 0), *pads]
        x = t.reshape(x, t.like(name, f"{node.name}.rows", plain(3), shape))
    if any(map(any, pads)) and pads == [_same(n, k, s) for n, k, s in zip(shape[1:3], reach, stride)]:
        return Places(x, 0, stride)
    if any(map(any, pads)) and not pad:
        raise PlanError(f"its padding {flat} is left out of the mean and is not TFLite's SAME")
    x = t.padded(name, x, [(0, 0), *pads, (0, 0)], f"{node.name}.padded", code)
    sizes = t.draft.tensors[x].shape[1:3]  # a window as large as its axis has no next one, and NPUs want small steps
    return Places(x, 1, [1 if n == k else s for n, k, s in zip(sizes, reach, stride)])


def _same(size: int, reach: int, stride: int) -> Pad:
    """TFLite's SAME padding of one axis."""
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def _place(t: Translation, node: Node, step: Callable[[int], int]) -> None:
    """Write ``node``'s value, N, H, W, C; one of three axes loses its height of 1 again."""
    rank = t.rank(node.name)
    order = channels_last(rank)
    made = t.result(node, order)
    if rank == 4:
        step(made)
        return
    shape = moved(t.shape(node.name), order)
    t.reshape(step(t.like(node.name, f"{node.name}.rows", plain(3), (shape[0], 1, *shape[1:]))), made)


def _act(t: Translation, node: Node) -> int:
    return {"NONE": 0, "RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}[t.units(node.name).act(node)]


def _linear(t: Translation, node: Node) -> None:
    w, x = _weights(t, node), t.value(node.inputs[0], plain(t.rank(node.inputs[0])))
    weight, bias = _enter(t, node, w, w.codes, 0)
    rank = t.rank(node.name)
    t.draft.step("FULLY_CONNECTED", 4 if np.ptp(w.scale) == 0 else 12, [x, weight, bias], t.result(node, plain(rank)),
                 "FullyConnectedOptions", fusedActivationFunction=_act(t, node), keepNumDims=rank > 2)  # fmt: skip


# -- two operands -----------------------------------------------------------------------------------------------------


def _operands(t: Translation, node: Node) -> list[int]:
    """Both operands with their axes as the result has them; of fewer axes only where that order is plain."""
    own, rank = t.orders[node.name], t.rank(node.name)
    made = []
    for name in node.inputs:
        if t.rank(name) != rank and own != plain(rank):
            raise PlanError(f"{name!r} has {t.rank(name)} axes and is spread over {rank} with channels last")
        made.append(t.value(name, own if t.rank(name) == rank else plain(t.rank(name))))
    return made


def _add(t: Translation, node: Node) -> None:
    a, b, y = (t.units(name) for name in (*node.inputs, node.name))
    unit, left = 2 * max(a.scale, b.scale), node.attrs["left"]
    real = [a.scale / unit, b.scale / unit, unit / (2.0**left * y.scale)]
    if y.type != "INT8" or left != 20 or not agree(node, _factor(node), real):
        raise PlanError("no scales give its three multipliers")
    kind = "ADD" if node.op == "add" else "SUB"
    t.draft.step(kind, 2, _operands(t, node), t.result(node), f"{kind.title()}Options", fusedActivationFunction=_act(t, node),
                 potScaleInt16=False)  # fmt: skip


def _mul(t: Translation, node: Node) -> None:
    a, b, y = (t.units(name) for name in (*node.inputs, node.name))
    if not agree(node, _factor(node), np.float64(a.scale) * np.float64(b.scale) / np.float64(y.scale)):
        raise PlanError("no scales give its multiplier")
    t.draft.step("MUL", 2, _operands(t, node), t.result(node), "MulOptions", fusedActivationFunction=_act(t, node))


# -- rescaled sums ----------------------------------------------------------------------------------------------------


def _factor(node: Node) -> tuple[Any, Any]:
    return node.attrs["multiplier"], node.attrs["shift"]


def _sum_pool(t: Translation, node: Node) -> None:
    """DEPTHWISE_CONV_2D by ones, which computes as every convolution; SUM and MEAN do it another way in each runtime."""
    a, line = node.attrs, t.rank(node.name) == 3
    kernel, stride = [1] * line + list(a["kernel"]), [1] * line + list(a["stride"])
    scale = _factor_scale(t, node)
    if scale is None:
        whole = list(t.shape(node.inputs[0])[2:]) == list(a["kernel"]) and not any(a["padding"])
        return _reduce(t, node, list(range(2, t.rank(node.name))) if whole else [], True)
    x = _places(t, node, kernel, stride)
    _place(t, node, lambda made: _ones(t, node, scale, t.shape(node.name)[1], kernel, x, made))


def _sum(t: Translation, node: Node) -> None:
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
    left = tuple(axis for axis in have if axis not in axes)
    t.reshape(made, t.result(node, have if a["keepdim"] else tuple(sorted(left).index(axis) for axis in left)))


def _adjacent(order: Order, axes: Sequence[int]) -> bool:
    at = sorted(order.index(axis) for axis in axes)
    return bool(at) and at == list(range(at[0], at[0] + len(at)))


def _factor_scale(t: Translation, node: Node) -> float | None:
    """A float32 weight scale, near the node's factor, whose multiplier gives the node's code for every sum; None if none does."""
    source, y = t.units(node.inputs[0]), t.units(node.name)
    have = _factor(node)
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
                        fusedActivationFunction=_act(t, node))  # fmt: skip


def _reduce(t: Translation, node: Node, axes: Sequence[int], keep: bool) -> None:
    """SUM or MEAN, whichever rescales as the node does. MEAN divides the multiplier of SUM by the count, in integers."""
    name = node.inputs[0]
    source, y, have, sums = t.units(name), t.units(node.name), _factor(node), tuple(node.attrs["acc"])
    multiplier, shift = (int(part) for part in quantize_multiplier(np.float64(source.scale) / np.float64(y.scale)))
    count = math.prod(t.shape(name)[axis] for axis in axes)
    more = min(count.bit_length() - 1, 32, 31 + shift)
    if same(node, have, (multiplier, shift), sums):
        kind = "SUM"
    elif same(node, have, ((multiplier << more) // count, shift - more), sums):
        kind = "MEAN"
    else:
        raise PlanError(f"no float32 scale gives its multiplier {have[0]} and shift {have[1]} or the same codes")
    if not axes or y.act(node) != "NONE":
        raise PlanError(f"no float32 scale gives its multiplier {have[0]} and shift {have[1]}, and {kind} is not for it")
    rank = t.rank(name)
    order = t.orders[name] if keep else plain(rank)
    where = t.ints("axes", sorted(order.index(axis) for axis in axes))
    made = t.result(node, order if keep else plain(t.rank(node.name)))
    t.draft.step(kind, 2, [t.value(name, order), where], made, "ReducerOptions", keepDims=keep)


def _rescale(t: Translation, node: Node) -> None:
    """QUANTIZE, or RELU where it clamps at zero."""
    source, y = t.units(node.inputs[0]), t.units(node.name)
    if not agree(node, _factor(node), np.float64(source.scale) / np.float64(y.scale), tuple(node.attrs["acc"])):
        raise PlanError("no scales give its multiplier")
    act = y.act(node)
    x, made = t.value(node.inputs[0], t.orders[node.name]), t.result(node)
    if act == "NONE":
        t.draft.step("QUANTIZE", 2, [x], made, "QuantizeOptions")
    elif act == "RELU" or source == y:
        t.draft.step(act, 2, [x], made)
    else:
        raise PlanError(f"{act} on its own, in units that change, is no operator of TFLite")


# -- pools ------------------------------------------------------------------------------------------------------------


def _pool(t: Translation, node: Node) -> None:
    line = t.rank(node.name) == 3
    kernel, stride = ([1] * line + list(node.attrs[key]) for key in ("kernel", "stride"))
    mean = node.op == "avg_pool"
    x = _places(t, node, kernel, stride, code=t.units(node.name).range[0], pad=not mean)
    kind = "AVERAGE_POOL_2D" if mean else "MAX_POOL_2D"
    act = _act(t, node)
    _place(t, node, lambda made: t.draft.step(
        kind, 2, [x.tensor], made, "Pool2DOptions", padding=x.padding, strideH=x.stride[0], strideW=x.stride[1],
        filterHeight=kernel[0], filterWidth=kernel[1], fusedActivationFunction=act))  # fmt: skip


# -- tables -----------------------------------------------------------------------------------------------------------


def _softmax(t: Translation, node: Node) -> None:
    """SOFTMAX, over the file's last axis."""
    source, y = t.units(node.inputs[0]), t.units(node.name)
    low, high = source.range
    table = numbers(t.graph, node.inputs[1])
    if (y.scale, y.zero) != (1 / 256, -128) or not np.array_equal(table, exp_table(source.scale, high - low + 1)):
        raise PlanError("TFLite's SOFTMAX gives int8 in units of 1/256 with zero point -128")
    if t.units(node.name).act(node) != "NONE":
        raise PlanError("SOFTMAX of TFLite has no clamp")
    rank = t.rank(node.name)
    axis = node.attrs["axis"] % rank
    order = t.orders[node.name]
    if order[-1] != axis:
        order = (*(i for i in range(rank) if i != axis), axis)
    t.draft.step("SOFTMAX", 2, [t.value(node.inputs[0], order)], t.result(node, order), "SoftmaxOptions", beta=1.0)


#: Operations that TFLite computes into one result scale and zero point, code for code the nearest.
_FUNCTIONS = {"sigmoid": ("LOGISTIC", Units(1 / 256, -128)), "tanh": ("TANH", Units(1 / 128, 0))}


def _table(t: Translation, node: Node) -> None:
    """LOGISTIC or TANH; any other function of int8 looks itself up: CAST, ADD, GATHER."""
    order, name = t.orders[node.name], node.inputs[0]
    x, made, source = t.value(name, order), t.result(node), t.producers.get(node.name)
    kind, wanted = _FUNCTIONS.get(source.op if source else "", ("", None))
    if t.units(node.name) == wanted:
        t.draft.step(kind, 2, [x], made)
        return
    if node.attrs["first"] != -128 or t.units(name).type != "INT8":
        raise PlanError(f"its table starts at code {node.attrs['first']}, not at -128")
    entry, at = t.draft.tensors[x], t.units(node.name)
    wide, index = (t.draft.tensor(f"{node.name}.{word}", "INT32", entry.shape, batched=entry.batched) for word in ("wide", "index"))
    t.draft.step("CAST", 1, [x], wide, "CastOptions", inDataType=9, outDataType=2)
    t.draft.step("ADD", 1, [wide, t.ints("first", [128])], index, "AddOptions", fusedActivationFunction=0)
    table = t.draft.constant(node.inputs[1], at.type, numbers(t.graph, node.inputs[1]), scale=(at.scale,), zero=at.zero)
    t.draft.step("GATHER", 2, [table, index], made, "GatherOptions", axis=0)
    t.notes.append(Note(node.name, "a look-up by GATHER, which NPUs leave to the processor"))


# -- moving codes -----------------------------------------------------------------------------------------------------


def _reshape(t: Translation, node: Node) -> None:
    name = node.inputs[0]
    source, target = t.shape(name), t.shape(node.name)
    have, want = t.orders[name], t.orders[node.name]
    if not same_elements(source, have, target, want):
        have, want = plain(len(source)), want if is_relabelling(target, want) else plain(len(target))
    _renamed(t, node, name, have, want)


def _transpose(t: Translation, node: Node) -> None:
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


def _slice(t: Translation, node: Node) -> None:
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


def _concat(t: Translation, node: Node) -> None:
    order = t.orders[node.name]
    for name in node.inputs:
        if t.units(name) != t.units(node.name):
            raise PlanError(f"{name!r} is in other units than the result")
    axis = order.index(node.attrs["axis"] % len(order))
    parts = [t.value(name, order) for name in node.inputs]
    t.draft.step("CONCATENATION", 2, parts, t.result(node), "ConcatenationOptions", axis=axis)


def _pad(t: Translation, node: Node) -> None:
    name, order = node.inputs[0], t.orders[node.name]
    flat = node.attrs["padding"]
    pairs: list[Pad] = [(0, 0)] * (len(order) - len(flat) // 2) + list(zip(flat[::2], flat[1::2]))[::-1]
    x = t.value(name, order)
    made = t.padded(name, x, [pairs[axis] for axis in order], node.name, node.attrs["code"])
    t.alias(node, made)


#: Integer operation -> what writes it.
TRANSLATE: dict[str, Callable[[Translation, Node], Any]] = {
    "conv": _conv, "linear": _linear, "add": _add, "sub": _add, "mul": _mul, "rescale": _rescale, "sum": _sum,
    "sum_pool": _sum_pool, "avg_pool": _pool, "max_pool": _pool, "softmax": _softmax, "table": _table, "reshape": _reshape,
    "transpose": _transpose, "slice": _slice, "concat": _concat, "pad": _pad,
}  # fmt: skip
