"""One function per operator of an integer .tflite file: the integer operations that compute it, after a check of all it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from ..errors import InputError
from ..graph import BATCH
from ..integer.dialect import Ints, quantize_multiplier
from ..integer.fixed import exp_table
from ._tflite_codes import Reading
from ._tflite_file import MOST_OPERANDS, Operator

#: Axes N, C, H, W of a value in the order that the file has them.
LAST = (0, 2, 3, 1)

#: Longest reach of a kernel, its dilation counted: past any real one, and short enough to pad by.
_FAR = 4096


def _weighted(r: Reading, op: Operator, kind: str, codes: Ints, axis: int, **attrs: Any) -> list[str]:
    """The constants of a layer with weights ``codes`` (out, ...), whose scales lie on ``axis`` of the file's tensor."""
    x, y, w = r.units(op.inputs[0]), r.units(op.outputs[0]), r.tensor(op.inputs[1])
    out = len(codes)
    if w.trouble or len(w.scale) not in (1, out) or (len(w.scale) > 1 and w.axis != axis) or np.any(w.zero_point):
        raise InputError(f"weights {w.name!r} need one scale, or {out} on axis {axis}, and no zero point")
    if not np.isfinite(w.scale).all():
        raise InputError(f"weights {w.name!r} have a scale that is no finite number")
    scale = np.broadcast_to(w.scale.astype(np.float64), out)
    bias = np.zeros(out, np.int64)
    if len(op.inputs) > 2 and op.inputs[2] >= 0:
        bias = r.stored(op, 2, ("INT32",)).reshape(-1)
        if len(bias) != out:
            raise InputError(f"{len(bias)} biases for {out} outputs")
    multiplier, shift = quantize_multiplier(np.float64(x.scale) * scale / np.float64(y.scale))
    name = f"{kind}_{op.index}"
    return [
        r.constant(f"{name}.weight", codes, "int4" if w.type == "INT4" else "int8"),
        r.constant(f"{name}.bias", bias),
        r.constant(f"{name}.multiplier", multiplier),
        r.constant(f"{name}.shift", shift),
    ]


def _padding(r: Reading, op: Operator, reach: Sequence[int], stride: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The padding of H and W as the graph writes it: last axis first, (before, after)."""
    if op.options["padding"] == 1:
        return [0, 0, 0, 0]
    if op.options["padding"] != 0:
        raise InputError(f"padding {op.options['padding']} is neither SAME nor VALID")
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sizes, reach, stride)]
    return [n for total in reversed(totals) for n in (total // 2, total - total // 2)]


def _positive(op: Operator, *names: str) -> list[int]:
    found = [int(op.options[name]) for name in names]
    if not all(1 <= n <= 2**16 for n in found):
        raise InputError(f"{', '.join(names)} are {found}")
    return found


def _sizes(r: Reading, index: int) -> list[int]:
    """H and W of a tensor N, H, W, C."""
    shape = r.tensor(index).shape
    if len(shape) != 4:
        raise InputError(f"tensor {index} has shape {list(shape)}; N, H, W, C is needed")
    return list(shape[1:3])


def _operands(op: Operator, least: int, most: int | None = None) -> None:
    if not least <= len(op.inputs) <= (most or least):
        raise InputError(f"it has {len(op.inputs)} operands")


def _conv(r: Reading, op: Operator) -> None:
    _operands(op, 2, 3)
    deep = op.op == "DEPTHWISE_CONV_2D"
    w = r.stored(op, 1, ("INT8", "INT4"))
    sizes, channels = _sizes(r, op.inputs[0]), r.tensor(op.inputs[0]).shape[3]
    if w.ndim != 4 or 0 in w.shape:
        raise InputError(f"weights of shape {list(w.shape)}")
    codes = w.transpose(3, 0, 1, 2) if deep else w.transpose(0, 3, 1, 2)
    groups = channels if deep else max(1, channels // codes.shape[1])
    if (deep and w.shape[0] != 1) or groups * codes.shape[1] != channels or len(codes) % groups:
        raise InputError(f"weights of shape {list(w.shape)} for {channels} channels")
    stride = _positive(op, "strideH", "strideW")
    dilation = _positive(op, "dilationHFactor", "dilationWFactor")
    reach = [(k - 1) * d + 1 for k, d in zip(codes.shape[2:], dilation)]
    padding = _padding(r, op, reach, stride, sizes)
    names = _weighted(r, op, "conv", codes, 3 if deep else 0)
    _fits(r, op, reach, stride, padding, len(codes))
    r.put(op, "conv", [r.value(op.inputs[0], LAST), *names], LAST, stride=stride, padding=padding, dilation=dilation,
          groups=groups, x_zero=r.units(op.inputs[0]).zero, **r.rescaled(op))  # fmt: skip


def _fits(r: Reading, op: Operator, reach: Sequence[int], stride: Sequence[int], padding: Sequence[int], channels: int) -> None:
    """The result's shape in the file is the one that its windows make."""
    if max(reach) > _FAR:
        raise InputError(f"its windows reach over {list(reach)} places; {_FAR} are possible")
    pads = (sum(padding[2:]), sum(padding[:2]))
    made = [(n + pad - k) // s + 1 for n, pad, k, s in zip(_sizes(r, op.inputs[0]), pads, reach, stride)]
    if list(r.tensor(op.outputs[0]).shape) != [1, *made, channels]:
        raise InputError(
            f"its result is [1, {made[0]}, {made[1]}, {channels}]; the file says {list(r.tensor(op.outputs[0]).shape)}"
        )


def _linear(r: Reading, op: Operator) -> None:
    _operands(op, 2, 3)
    w, shape = r.stored(op, 1, ("INT8", "INT4")), r.tensor(op.inputs[0]).shape
    if w.ndim != 2 or op.options["weightsFormat"] or 0 in w.shape:
        raise InputError(f"weights of shape {list(w.shape)} in format {op.options['weightsFormat']}")
    x, rank = r.value(op.inputs[0]), len(shape)
    if not (op.options["keepNumDims"] or rank == 2):
        if prod(shape[1:]) != w.shape[1]:
            raise InputError(f"it mixes the batch of {list(shape)} with other axes")
        x, shape = (
            r.node("reshape", [x], r.free(f"linear_{op.index}.in"), [BATCH, w.shape[1]], shape=[0, w.shape[1]]),
            (1, w.shape[1]),
        )
    result = r.tensor(op.outputs[0]).shape
    if shape[-1] != w.shape[1] or result != (*shape[:-1], len(w)):
        raise InputError(f"weights of shape {list(w.shape)} for operand {list(shape)} and result {list(result)}")
    names = _weighted(r, op, "linear", w, 0)
    r.put(op, "linear", [x, *names], x_zero=r.units(op.inputs[0]).zero, **r.rescaled(op))


def _pair(r: Reading, op: Operator) -> None:
    """ADD, SUB and MUL of two computed values."""
    _operands(op, 2)
    a, b, y = (r.units(index) for index in (*op.inputs, op.outputs[0]))
    shapes = [r.tensor(index).shape for index in (*op.inputs, op.outputs[0])]
    if len({*map(len, shapes)}) > 1 or np.broadcast_shapes(*shapes[:2]) != shapes[2]:
        raise InputError(f"operands {[list(s) for s in shapes[:2]]} and result {list(shapes[2])}")
    order, kind = r.common(op.inputs), op.op.lower()
    if kind == "mul":
        multiplier, shift = quantize_multiplier([np.float64(a.scale) * np.float64(b.scale) / np.float64(y.scale)])
        place: dict[str, Any] = {"multiplier": int(multiplier[0]), "shift": int(shift[0])}
    else:
        unit = 2 * max(a.scale, b.scale)
        multiplier, shift = quantize_multiplier([a.scale / unit, b.scale / unit, unit / (2.0**20 * y.scale)])
        place = {"left": 20, "multiplier": multiplier.tolist(), "shift": shift.tolist()}
    r.put(op, kind, [r.value(index, order) for index in op.inputs], order, a_zero=a.zero, b_zero=b.zero, **place, **r.rescaled(op))


def _pool(r: Reading, op: Operator) -> None:
    _operands(op, 1)
    x, y = r.units(op.inputs[0]), r.units(op.outputs[0])
    if x != y:
        raise InputError("a pool whose result is in other units")
    kernel, stride = _positive(op, "filterHeight", "filterWidth"), _positive(op, "strideH", "strideW")
    padding = _padding(r, op, kernel, stride, _sizes(r, op.inputs[0]))
    _fits(r, op, kernel, stride, padding, r.tensor(op.inputs[0]).shape[3])
    bounds = {key: value for key, value in r.rescaled(op).items() if key in ("low", "high")}
    kind = "avg_pool" if op.op == "AVERAGE_POOL_2D" else "max_pool"
    r.put(op, kind, [r.value(op.inputs[0], LAST)], LAST, kernel=kernel, stride=stride, padding=padding, **bounds)


def _softmax(r: Reading, op: Operator) -> None:
    _operands(op, 1)
    x, y = r.units(op.inputs[0]), r.units(op.outputs[0])
    if (y.scale, y.zero) != (1 / 256, -128) or not 0 < op.options["beta"] <= 2**10:
        raise InputError(f"beta {op.options['beta']}, result in units of {y.scale} from {y.zero}; 1/256 from -128 is TFLite's int8")
    if r.tensor(op.inputs[0]).shape != r.tensor(op.outputs[0]).shape:
        raise InputError("operand and result have different shapes")
    table = r.constant(f"softmax_{op.index}.table", exp_table(float(np.float64(op.options["beta"]) * x.scale), 256))
    r.put(op, "softmax", [r.value(op.inputs[0]), table], axis=-1, bits=8, **r.rescaled(op, fused=False))


def _reshape(r: Reading, op: Operator) -> None:
    """The shape of the result is the file's word for it; the batch stays in front."""
    _operands(op, 1, 2)
    _kept(r, op)
    have, want = r.tensor(op.inputs[0]).shape, r.shape(op.outputs[0])
    if prod(have) != prod(r.tensor(op.outputs[0]).shape):
        raise InputError(f"{list(have)} as {list(want)}")
    r.put(op, "reshape", [r.value(op.inputs[0])], shape=[0, *want[1:]])


def _kept(r: Reading, op: Operator) -> None:
    """Operand and result hold the same units."""
    if r.units(op.inputs[0]) != r.units(op.outputs[0]):
        raise InputError("its result is in other units")


def _pad(r: Reading, op: Operator) -> None:
    """PAD by the zero point; PADV2 by a constant in the operand's units."""
    _operands(op, 2 + (op.op == "PADV2"))
    _kept(r, op)
    shape, flat, code = r.tensor(op.inputs[0]).shape, r.integers(op, 1), r.units(op.inputs[0]).zero
    if op.op == "PADV2":
        if r.units(op.inputs[2]) != r.units(op.inputs[0]) or (filler := r.stored(op, 2, ("INT8",))).size != 1:
            raise InputError("it pads by something else than one number in its operand's units")
        code = int(filler.reshape(()))
    if len(flat) != 2 * len(shape) or min(flat, default=0) < 0 or any(flat[:2]):
        raise InputError(f"padding {flat} of {list(shape)}")
    pairs = list(zip(flat[::2], flat[1::2]))
    if r.tensor(op.outputs[0]).shape != tuple(n + sum(pair) for n, pair in zip(shape, pairs)):
        raise InputError(f"padding {flat} of {list(shape)} is not {list(r.tensor(op.outputs[0]).shape)}")
    order = r.order(op.inputs[0])
    padding = [n for axis in reversed(range(1, len(shape))) for n in pairs[order.index(axis)]]
    r.put(op, "pad", [r.value(op.inputs[0], order)], order, padding=padding, code=code)


def _slice(r: Reading, op: Operator) -> None:
    """STRIDED_SLICE forwards along one axis that is not the batch."""
    _operands(op, 4)
    _kept(r, op)
    shape, o = r.tensor(op.inputs[0]).shape, op.options
    begin, end, steps = (r.integers(op, i) for i in (1, 2, 3))
    if not len(begin) == len(end) == len(steps) == len(shape) or min(steps) < 1:
        raise InputError(f"from {begin} to {end} by {steps} of {list(shape)}")
    if o["ellipsisMask"] or o["newAxisMask"] or o["shrinkAxisMask"] or o["offset"]:
        raise InputError("it drops, adds or skips axes, or counts its ends from its starts")
    picks = [
        slice(None if o["beginMask"] >> i & 1 else begin[i], None if o["endMask"] >> i & 1 else end[i], steps[i]).indices(n)
        for i, n in enumerate(shape)
    ]
    cut = [i for i, n in enumerate(shape) if picks[i] != (0, n, 1)] or [len(shape) - 1]
    if len(cut) != 1 or cut[0] == 0:
        raise InputError(f"it slices axes {cut} of {list(shape)}; one axis, not the batch, is possible")
    if r.tensor(op.outputs[0]).shape != tuple(len(range(*pick)) for pick in picks):
        raise InputError(f"its result is {[len(range(*pick)) for pick in picks]}, not {list(r.tensor(op.outputs[0]).shape)}")
    order, (start, stop, step) = r.order(op.inputs[0]), picks[cut[0]]
    r.put(op, "slice", [r.value(op.inputs[0], order)], order, axis=order[cut[0]], start=start, stop=stop, step=step)


def _rescale(r: Reading, op: Operator) -> None:
    """QUANTIZE from int8 to int8, RELU."""
    _operands(op, 1)
    x, y = r.units(op.inputs[0]), r.units(op.outputs[0])
    if r.tensor(op.inputs[0]).shape != r.tensor(op.outputs[0]).shape:
        raise InputError("operand and result have different shapes")
    multiplier, shift = (int(part) for part in quantize_multiplier(np.float64(x.scale) / np.float64(y.scale)))
    low, high = y.clamp("relu" if op.op == "RELU" else "")
    order = r.order(op.inputs[0])
    r.put(op, "rescale", [r.value(op.inputs[0], order)], order, x_zero=x.zero, multiplier=multiplier, shift=shift, y_zero=y.zero,
          low=low, high=high, rounding="R1")  # fmt: skip


def _transpose(r: Reading, op: Operator) -> None:
    _operands(op, 2)
    _kept(r, op)
    shape, perm = r.tensor(op.inputs[0]).shape, r.integers(op, 1)
    if sorted(perm) != list(range(len(shape))) or perm[0] != 0:
        raise InputError(f"{list(shape)} by {perm}; the batch must stay in front")
    if r.tensor(op.outputs[0]).shape != tuple(shape[axis] for axis in perm):
        raise InputError(f"{list(shape)} by {perm} is not {list(r.tensor(op.outputs[0]).shape)}")
    r.put(op, "transpose", [r.value(op.inputs[0])], perm=perm)


def _concat(r: Reading, op: Operator) -> None:
    _operands(op, 1, MOST_OPERANDS)
    shapes, result = [r.tensor(index).shape for index in op.inputs], r.tensor(op.outputs[0]).shape
    axis = op.options["axis"] + (len(result) if op.options["axis"] < 0 else 0)
    if not 0 < axis < len(result) or any(len(s) != len(result) for s in shapes):
        raise InputError(f"operands {[list(s) for s in shapes]} on axis {axis}")
    joined = [sum(s[axis] for s in shapes) if i == axis else n for i, n in enumerate(shapes[0])]
    if list(result) != joined or any(s[:axis] != shapes[0][:axis] or s[axis + 1 :] != shapes[0][axis + 1 :] for s in shapes):
        raise InputError(f"operands {[list(s) for s in shapes]} and result {list(result)}")
    if any(r.units(index) != r.units(op.outputs[0]) for index in op.inputs) or op.options["fusedActivationFunction"]:
        raise InputError("its operands and result are in different units, or it has a fused activation")
    order = r.common(op.inputs)
    r.put(op, "concat", [r.value(index, order) for index in op.inputs], order, axis=order[axis])


#: Operator -> what reads it.
READ: Mapping[str, Callable[[Reading, Operator], None]] = {
    "CONV_2D": _conv, "DEPTHWISE_CONV_2D": _conv, "FULLY_CONNECTED": _linear, "ADD": _pair, "SUB": _pair, "MUL": _pair,
    "AVERAGE_POOL_2D": _pool, "MAX_POOL_2D": _pool, "SOFTMAX": _softmax, "RESHAPE": _reshape, "TRANSPOSE": _transpose,
    "PAD": _pad, "PADV2": _pad, "STRIDED_SLICE": _slice, "CONCATENATION": _concat, "QUANTIZE": _rescale, "RELU": _rescale,
}  # fmt: skip
