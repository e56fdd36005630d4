"""Layers with stored weights: scales and codes as TFLite wants them, convolutions, linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ....errors import PlanError
from ....graph import Node
from ....integer.dialect import Ints
from ....integer.ops import INTEGER, levels, numbers
from ....qmodel import Note
from ..layout import channels_last, moved, plain
from ..translation import Translation, act, factor
from ..units import agree
from .windows import place, places, same_padding

Bools = NDArray[np.bool_]


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
    if x.type == "INT8" and node.attrs.get("wide"):
        raise PlanError("its sums leave int32, in which TFLite adds products of int8")
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


def conv(t: Translation, node: Node) -> None:
    """CONV_2D, DEPTHWISE_CONV_2D where each group is one channel; a 1-D one is 2-D of height 1."""
    a, w = node.attrs, _weights(t, node)
    codes, line = w.codes, w.codes.ndim == 3
    if line:
        codes = codes[:, :, None]
    stride, dilation = ([1] * line + list(a[key]) for key in ("stride", "dilation"))
    x = places(t, node, [(k - 1) * d + 1 for k, d in zip(codes.shape[2:], dilation)], stride)
    depthwise = a["groups"] > 1 and codes.shape[1] == 1
    fields = {"strideH": x.stride[0], "strideW": x.stride[1], "dilationHFactor": dilation[0], "dilationWFactor": dilation[1],
              "fusedActivationFunction": act(t, node)}  # fmt: skip
    if depthwise:
        weight, bias = _enter(t, node, w, codes.transpose(1, 2, 3, 0), 3)
        kind, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        fields["depthMultiplier"] = len(codes) // a["groups"]
    else:
        weight, bias = _enter(t, node, w, codes.transpose(0, 2, 3, 1), 0)
        kind, options = "CONV_2D", "Conv2DOptions"
    place(t, node, lambda made: t.draft.step(kind, 3, [x.tensor, weight, bias], made, options, padding=x.padding, **fields))


def linear(t: Translation, node: Node) -> None:
    """FULLY_CONNECTED."""
    w, x = _weights(t, node), t.value(node.inputs[0], plain(t.rank(node.inputs[0])))
    weight, bias = _enter(t, node, w, w.codes, 0)
    rank = t.rank(node.name)
    t.draft.step("FULLY_CONNECTED", 4 if np.ptp(w.scale) == 0 else 12, [x, weight, bias], t.result(node, plain(rank)),
                 "FullyConnectedOptions", fusedActivationFunction=act(t, node), keepNumDims=rank > 2)  # fmt: skip


def conv_transpose(t: Translation, node: Node) -> None:
    """TRANSPOSE_CONV, SAME where that cuts off what the node cuts off, else VALID and a slice; a 1-D one is 2-D of height 1.

    TFLite has no dilation here: zeros between the taps are that.
    """
    a, w, name = node.attrs, _weights(t, node), node.inputs[0]
    if a["groups"] > 1:
        raise PlanError("TFLite's transposed convolution has no groups")
    codes, line = _dilated(w.codes, a["dilation"]), w.codes.ndim == 3
    if line:
        codes = codes[:, :, None]
    stride, cut, more = [1] * line + list(a["stride"]), [0] * line + list(a["padding"]), [0] * line + list(a["output_padding"])
    order = channels_last(t.rank(name))
    x, shape = t.value(name, order), moved(t.shape(name), order)
    if line:
        shape = (shape[0], 1, *shape[1:])
        x = t.reshape(x, t.like(name, f"{node.name}.rows", plain(3), shape))
    full = [(n - 1) * s + k for n, s, k in zip(shape[1:3], stride, codes.shape[2:])]
    kept = [n - 2 * c + m for n, c, m in zip(full, cut, more)]
    same = [same_padding(n, k, s)[0] for n, k, s in zip(kept, codes.shape[2:], stride)]
    whole = same != cut or [-(-n // s) for n, s in zip(kept, stride)] != list(shape[1:3])
    sizes = [max(c + n, m) for c, n, m in zip(cut, kept, full)] if whole else kept  # VALID wants no less than all of it
    weight, bias = _enter(t, node, w, codes.transpose(0, 2, 3, 1), 0)

    if t.batched(name):
        t.notes.append(Note(node.name, "TRANSPOSE_CONV holds the shape of its result: the file takes one example at a time"))

    def step(made: int) -> int:
        sliced = whole and any(cut)
        raw = t.like(node.name, f"{node.name}.whole", plain(3), (shape[0], *sizes, len(codes))) if sliced else made
        size = t.ints("size", [1, *sizes, len(codes)])
        t.draft.step("TRANSPOSE_CONV", 3, [size, weight, x, bias], raw, "TransposeConvOptions", padding=int(whole),
                     strideH=stride[0], strideW=stride[1], fusedActivationFunction=act(t, node))  # fmt: skip
        return t.cut(raw, made, [0, *cut, 0], [0, *(c + n for c, n in zip(cut, kept)), 0], [1] * 4) if sliced else made

    place(t, node, step)


def _dilated(codes: Ints, dilation: Sequence[int]) -> Ints:
    """Taps of (out, in, kernel) with zeros between them."""
    out = np.zeros((*codes.shape[:2], *((k - 1) * d + 1 for k, d in zip(codes.shape[2:], dilation))), np.int64)
    out[:, :, *(slice(None, None, d) for d in dilation)] = codes
    return out


def matmul(t: Translation, node: Node) -> None:
    """BATCH_MATMUL."""
    a, b, y = (t.units(name) for name in (*node.inputs, node.name))
    if a.type == "INT8" and node.attrs.get("wide"):
        raise PlanError("its sums leave int32, in which TFLite adds products of int8")
    if not agree(node, factor(node), np.float64(a.scale) * np.float64(b.scale) / np.float64(y.scale)):
        raise PlanError("no scales give its multiplier")
    if y.act(node) != "NONE":
        raise PlanError("BATCH_MATMUL of TFLite has no clamp")
    operands = [t.value(name, plain(t.rank(name))) for name in node.inputs]
    made = t.result(node, plain(t.rank(node.name)))
    t.draft.step("BATCH_MATMUL", 2 if a.type == "INT8" else 3, operands, made, "BatchMatMulOptions", adjX=False,
                 adjY=node.attrs["transpose_b"])  # fmt: skip


def embedding(t: Translation, node: Node) -> None:
    """GATHER of rows that are rescaled here already."""
    ids, name = node.inputs[:2]
    rows = np.arange(t.shape(name)[0])
    codes = INTEGER["embedding"](rows, *(numbers(t.graph, i) for i in node.inputs[1:]), **node.attrs)
    at, kind = t.units(node.name), t.graph.values[name].dtype
    table = t.draft.constant(name, at.type, codes, scale=(at.scale,), zero=at.zero)
    rank = t.rank(node.name)
    t.draft.step("GATHER", 2, [table, t.value(ids, plain(rank - 1))], t.result(node, plain(rank)), "GatherOptions", axis=0)
    t.notes.append(Note(name, f"its {kind} rows are held as {at.type.lower()}, in the units of its result"))
