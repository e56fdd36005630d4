"""One translation per TFLite operator, each into the operations of a `Graph` for a single example; nothing is simplified here.

Images are N, H, W, C in the file: convolutions, pools and resizes stand between two explicit transposes. Meaning of the
operators and of their options: TensorFlow Lite's schema and kernels' documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from ..errors import InputError
from ._tflite_file import MOST_OPERANDS, Operator
from ._tflite_reader import DTYPES, Reader, Translation

#: TFLite operator -> its translation.
TRANSLATE: dict[str, Translation] = {}

_TO_IMAGE, _FROM_IMAGE = [0, 3, 1, 2], [0, 2, 3, 1]


def translates(*names: str) -> Callable[[Translation], Translation]:
    def enter(fn: Translation) -> Translation:
        TRANSLATE.update(dict.fromkeys(names, fn))
        return fn

    return enter


# -- weighted ---------------------------------------------------------------------------------------------------------


def _windows(options: Mapping[str, Any], size: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(stride, dilation, padding left right top bottom) of a window over (H, W). SAME puts the odd one after."""
    stride = [int(options["strideH"]), int(options["strideW"])]
    dilation = [int(options.get("dilationHFactor", 1)), int(options.get("dilationWFactor", 1))]
    if min(*stride, *dilation, *kernel) < 1 or options["padding"] not in (0, 1):
        raise InputError(f"a window of {list(kernel)} with stride {stride}, dilation {dilation}, padding {options['padding']}")
    sides = []
    for n, k, s, d in zip(size, kernel, stride, dilation):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) if options["padding"] == 0 else 0
        sides.append([total // 2, total - total // 2])
    return stride, dilation, [*sides[1], *sides[0]]


def _to_image(r: Reader, x: str, name: str) -> str:
    return r.permuted(r.rank(x, 4), _TO_IMAGE, f"{name}_in")


def _from_image(r: Reader, op: Operator, made: str, name: str) -> None:
    r.put(op, r.emit("transpose", [made], f"{name}_out", perm=_FROM_IMAGE))


@translates("CONV_2D", "DEPTHWISE_CONV_2D")
def _conv(r: Reader, op: Operator) -> None:
    """Weights (out, kh, kw, in/groups), depthwise (1, kh, kw, out)."""
    name, deep = f"conv_{op.index}", op.op == "CONV_2D"
    x = r.rank(r.needed(op, 0, f"{name}.input"), 4)
    w = r.permuted(r.rank(r.needed(op, 1, f"{name}.stored"), 4), [0, 3, 1, 2] if deep else [3, 0, 1, 2], f"{name}.weight")
    channels, (_, per_group, *kernel) = r.shape(x)[3], r.shape(w)
    if channels % per_group:
        raise InputError(f"{channels} channels do not divide into groups of {per_group}")
    stride, dilation, padding = _windows(op.options, r.shape(x)[1:3], kernel)
    inputs = [_to_image(r, x, name), w, r.operand(op, 2, f"{name}.bias")]
    made = r.with_act(op, "conv", inputs, stride=stride, padding=padding, dilation=dilation, groups=channels // per_group)
    _from_image(r, op, made, name)


@translates("TRANSPOSE_CONV")
def _conv_transpose(r: Reader, op: Operator) -> None:
    """Operands: shape of the result, weights (out, kh, kw, in), x, bias. Uneven padding is cut off afterwards."""
    name = f"conv_transpose_{op.index}"
    w = r.permuted(r.needed(op, 1, f"{name}.stored"), [3, 0, 1, 2], f"{name}.weight")
    x, want = r.rank(r.needed(op, 2, f"{name}.input"), 4), r.ints(op, 0)
    kernel, size = r.shape(w)[2:], r.shape(x)[1:3]
    if len(want) != 4 or min(want) < 1:
        raise InputError(f"the result's shape {want}")
    stride, _, sides = _windows(op.options, want[1:3], kernel)
    before = [sides[2], sides[0]]
    # The whole result of n steps has (n - 1) s + k rows; `before` of them go in front, what is left over behind.
    after = [(n - 1) * s + k - b - out for n, s, k, b, out in zip(size, stride, kernel, before, want[1:3])]
    even = all(0 <= b - a < s for a, b, s in zip(after, before, stride))
    attrs = {"stride": stride, "dilation": [1, 1], "groups": 1}
    fit = {"padding": before, "output_padding": [b - a for a, b in zip(after, before)]} if even else {}
    inputs = [_to_image(r, x, name), w, r.operand(op, 3, f"{name}.bias")]
    made = r.with_act(op, "conv_transpose", inputs, **attrs, **(fit or {"padding": [0, 0], "output_padding": [0, 0]}))
    if not even:
        if min(after) < 0:
            raise InputError(f"the result's shape {want} is larger than the operation makes")
        for axis, (start, out) in enumerate(zip(before, want[1:3]), 2):
            made = r.emit("slice", [made], f"{name}_cut", axis=axis, start=start, stop=start + out)
    _from_image(r, op, made, name)


@translates("FULLY_CONNECTED")
def _linear(r: Reader, op: Operator) -> None:
    """x (..., in) by weights (out, in); a computed second operand makes it a matrix product."""
    if op.options.get("weightsFormat", 0):
        raise InputError("FULLY_CONNECTED with shuffled weights is not supported")
    name = f"linear_{op.index}"
    x, w, b = r.needed(op, 0, f"{name}.input"), r.rank(r.needed(op, 1, f"{name}.weight"), 2), r.operand(op, 2, f"{name}.bias")
    out, width = r.shape(w)
    rows = prod(r.shape(x)) // max(width, 1)
    result = [*r.shape(x)[:-1], out] if op.options.get("keepNumDims") else [rows, out]
    if w in r.builder.constants:
        if r.shape(x)[-1:] != (width,):
            x = r.reshaped(x, [rows, width], f"{name}_in")
        made = r.with_act(op, "linear", [x, w, b])
    else:
        name = f"matmul_{op.index}"
        x = r.reshaped(x, [rows, width], f"{name}_in")
        made = r.emit("matmul", [x, w], name, transpose_b=True)
        if b:
            made = r.emit("add", [made, b], f"{name}_bias")
        if op.options.get("fusedActivationFunction", 0):
            raise InputError("FULLY_CONNECTED with computed weights and a fused activation is not supported")
    r.put(op, r.reshaped(made, result, f"{name}_out"))


@translates("BATCH_MATMUL")
def _matmul(r: Reader, op: Operator) -> None:
    name = f"matmul_{op.index}"
    a, b = r.needed(op, 0, f"{name}.input"), r.needed(op, 1, f"linear_{op.index}.stored")
    flip = bool(op.options.get("adjY"))
    if op.options.get("adjX"):
        a = r.permuted(a, _swapped(len(r.shape(a))), f"{name}_a")
    if b in r.builder.constants and len(r.shape(b)) == 2:
        w = r.permuted(b, [0, 1] if flip else [1, 0], f"linear_{op.index}.weight")
        r.put(op, r.emit("linear", [a, w], f"linear_{op.index}"))
    else:
        r.put(op, r.emit("matmul", [a, b], name, transpose_b=flip))


def _swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


@translates("EMBEDDING_LOOKUP")
def _embedding(r: Reader, op: Operator) -> None:
    name = f"embedding_{op.index}"
    r.put(op, r.emit("embedding", [r.needed(op, 0), r.needed(op, 1, f"{name}.weight")], name))


@translates("GATHER")
def _gather(r: Reader, op: Operator) -> None:
    x, index = r.needed(op, 0, f"embedding_{op.index}.weight"), r.needed(op, 1, f"gather_{op.index}.index")
    axis = r.axis(op.options.get("axis", 0), len(r.shape(x)))
    if op.options.get("batchDims", 0):
        raise InputError("GATHER with batch dimensions is not supported")
    if x in r.builder.constants and index not in r.builder.constants and axis == 0 and len(r.shape(x)) == 2:
        r.put(op, r.emit("embedding", [index, x], f"embedding_{op.index}"))
    else:
        r.put(op, r.emit("gather", [x, index], f"gather_{op.index}", axis=axis))


# -- elementwise ------------------------------------------------------------------------------------------------------

_BINARY = {"ADD": "add", "SUB": "sub", "MUL": "mul", "DIV": "div", "MAXIMUM": "maximum", "MINIMUM": "minimum", "POW": "pow",
           "SQUARED_DIFFERENCE": "squared_difference"}  # fmt: skip
_UNARY = {"RSQRT": "rsqrt", "SQRT": "sqrt", "EXP": "exp", "LOG": "log", "TANH": "tanh", "LOGISTIC": "sigmoid", "RELU": "relu",
          "RELU6": "relu6", "ELU": "elu", "HARD_SWISH": "hardswish", "NEG": "neg", "ABS": "abs", "SIN": "sin",
          "COS": "cos"}  # fmt: skip
_COMPARE = {"EQUAL": "eq", "NOT_EQUAL": "ne", "LESS": "lt", "LESS_EQUAL": "le", "GREATER": "gt", "GREATER_EQUAL": "ge"}


@translates(*_BINARY)
def _binary(r: Reader, op: Operator) -> None:
    kind = _BINARY[op.op]
    r.put(op, r.with_act(op, kind, [r.needed(op, i, f"{kind}_{op.index}.constant") for i in (0, 1)]))


@translates(*_UNARY)
def _unary(r: Reader, op: Operator) -> None:
    r.put(op, r.emit(_UNARY[op.op], [r.needed(op, 0)], f"{_UNARY[op.op]}_{op.index}"))


@translates(*_COMPARE)
def _compare(r: Reader, op: Operator) -> None:
    name = f"compare_{op.index}"
    r.put(op, r.emit("compare", [r.needed(op, i, f"{name}.constant") for i in (0, 1)], name, how=_COMPARE[op.op]))


@translates("SELECT", "SELECT_V2")
def _where(r: Reader, op: Operator) -> None:
    name = f"where_{op.index}"
    c, a, b = (r.needed(op, i, f"{name}.constant") for i in range(3))
    if op.op == "SELECT" and len(r.shape(c)) == 1:  # one choice for each row
        c = r.reshaped(c, [*r.shape(c), *[1] * (len(r.shape(a)) - 1)], f"{name}_rows")
    r.put(op, r.emit("where", [c, a, b], name))


@translates("SQUARE")
def _square(r: Reader, op: Operator) -> None:
    x = r.needed(op, 0)
    r.put(op, r.emit("mul", [x, x], f"mul_{op.index}"))


@translates("RELU_N1_TO_1", "RELU_0_TO_1")
def _clamp(r: Reader, op: Operator) -> None:
    lo = -1.0 if op.op == "RELU_N1_TO_1" else 0.0
    r.put(op, r.emit("hardtanh", [r.needed(op, 0)], f"hardtanh_{op.index}", lo=lo, hi=1.0))


@translates("LEAKY_RELU")
def _leaky_relu(r: Reader, op: Operator) -> None:
    r.put(op, r.emit("leaky_relu", [r.needed(op, 0)], f"leaky_relu_{op.index}", slope=float(op.options["alpha"])))


@translates("GELU")
def _gelu(r: Reader, op: Operator) -> None:
    how = "tanh" if op.options.get("approximate") else "none"
    r.put(op, r.emit("gelu", [r.needed(op, 0)], f"gelu_{op.index}", approximate=how))


@translates("PRELU")
def _prelu(r: Reader, op: Operator) -> None:
    """One slope per channel of an image becomes a `prelu`; any other broadcast is max(x, 0) + slope min(x, 0)."""
    name = f"prelu_{op.index}"
    x, slope = r.needed(op, 0), r.constant(op, 1)
    channels = r.shape(x)[-1:]
    if len(r.shape(x)) == 4 and slope.shape[-1:] == channels and slope.numel() == channels[0]:
        w = r.builder.constant(f"{name}.weight", slope.reshape(-1))
        return _from_image(r, op, r.emit("prelu", [_to_image(r, x, name), w], name), name)
    zero = r.builder.constant(f"{name}.zero", torch.zeros(()))
    low = r.emit("minimum", [x, zero], f"{name}_low")
    scaled = r.emit("mul", [low, r.needed(op, 1)], f"{name}_scaled")
    return r.put(op, r.emit("add", [r.emit("relu", [x], f"{name}_high"), scaled], name))


@translates("CAST")
def _cast(r: Reader, op: Operator) -> None:
    kind = r.file.tensors[op.outputs[0]].type
    if kind not in DTYPES:
        raise InputError(f"CAST to {kind} is not supported")
    r.put(op, r.emit("cast", [r.needed(op, 0)], f"cast_{op.index}", dtype=DTYPES[kind]))


@translates("DEQUANTIZE")
def _dequantize(r: Reader, op: Operator) -> None:
    """Of a constant: reading it has already expanded it."""
    r.constant(op, 0)
    r.put(op, r.needed(op, 0))


@translates("SOFTMAX")
def _softmax(r: Reader, op: Operator) -> None:
    x, name = r.needed(op, 0), f"softmax_{op.index}"
    beta = float(op.options["beta"])
    if beta != 1.0:
        x = r.emit("mul", [x, r.builder.constant(f"{name}.beta", torch.tensor(beta))], f"{name}_scaled")
    r.put(op, r.emit("softmax", [x], name, axis=-1))


@translates("LOG_SOFTMAX")
def _log_softmax(r: Reader, op: Operator) -> None:
    r.put(op, r.emit("log_softmax", [r.needed(op, 0)], f"log_softmax_{op.index}", axis=-1))


# -- pooling, reduction, images ---------------------------------------------------------------------------------------


@translates("AVERAGE_POOL_2D", "MAX_POOL_2D")
def _pool(r: Reader, op: Operator) -> None:
    kind = "avg_pool" if op.op == "AVERAGE_POOL_2D" else "max_pool"
    name, x = f"{kind}_{op.index}", r.rank(r.needed(op, 0), 4)
    kernel = [int(op.options["filterHeight"]), int(op.options["filterWidth"])]
    stride, _, padding = _windows(op.options, r.shape(x)[1:3], kernel)
    made = r.with_act(op, kind, [_to_image(r, x, name)], kernel=kernel, stride=stride, padding=padding)
    _from_image(r, op, made, name)


@translates("MEAN", "SUM", "REDUCE_MAX")
def _reduce(r: Reader, op: Operator) -> None:
    kind = {"MEAN": "mean", "SUM": "sum", "REDUCE_MAX": "amax"}[op.op]
    x = r.needed(op, 0)
    axes = sorted({r.axis(axis, len(r.shape(x))) for axis in r.ints(op, 1)})
    r.put(op, r.emit(kind, [x], f"{kind}_{op.index}", axes=axes, keepdim=bool(op.options.get("keepDims"))))


@translates("ARG_MAX")
def _argmax(r: Reader, op: Operator) -> None:
    x, axes = r.needed(op, 0), r.ints(op, 1)
    if len(axes) != 1:
        raise InputError(f"ARG_MAX over the axes {axes}; it takes one")
    made = r.emit("argmax", [x], f"argmax_{op.index}", axis=r.axis(axes[0], len(r.shape(x))))
    if r.file.tensors[op.outputs[0]].type == "INT32":
        made = r.emit("cast", [made], f"argmax_{op.index}_int32", dtype="int32")
    r.put(op, made)


@translates("RESIZE_BILINEAR")
def _bilinear(r: Reader, op: Operator) -> None:
    corners, half = bool(op.options.get("alignCorners")), bool(op.options.get("halfPixelCenters"))
    if not corners and not half:
        raise InputError("RESIZE_BILINEAR without align_corners or half_pixel_centers is not supported")
    name, size = f"resize_{op.index}", _size(r, op)
    made = r.emit("resize", [_to_image(r, r.needed(op, 0), name)], name, size=size, mode="bilinear", align_corners=corners)
    _from_image(r, op, made, name)


def _size(r: Reader, op: Operator) -> list[int]:
    size = r.ints(op, 1)
    if len(size) != 2 or not all(1 <= n <= 2**16 for n in size):
        raise InputError(f"{op.op} to the size {size}")
    return size


@translates("RESIZE_NEAREST_NEIGHBOR")
def _nearest(r: Reader, op: Operator) -> None:
    """Plain: row floor(i in / out). With half-pixel centres floor((i + 0.5) in / out); aligned corners: nearest, up at .5."""
    corners, half = bool(op.options.get("alignCorners")), bool(op.options.get("halfPixelCenters"))
    name, size, x = f"resize_{op.index}", _size(r, op), r.rank(r.needed(op, 0), 4)
    if not corners and not half:
        return _from_image(r, op, r.emit("resize", [_to_image(r, x, name)], name, size=size, mode="nearest"), name)
    for axis, (have, want) in enumerate(zip(r.shape(x)[1:3], size), 1):
        at = torch.arange(want, dtype=torch.float64) + (0.5 if half else 0.0)
        at = at * ((have - 1) / (want - 1) if corners and want > 1 else have / want)
        index = torch.floor(at + 0.5 if corners else at).clamp(0, have - 1).to(torch.int64)
        index_name = r.builder.constant(f"{name}.index_{axis}", index)
        x = r.emit("gather", [x, index_name], f"{name}_{'hw'[axis - 1]}", axis=axis)
    return r.put(op, x)


@translates("DEPTH_TO_SPACE")
def _depth_to_space(r: Reader, op: Operator) -> None:
    """The file counts block positions before channels, a `Graph` channels before positions: a gather between."""
    name, block = f"depth_to_space_{op.index}", int(op.options["blockSize"])
    x = r.rank(r.needed(op, 0), 4)
    if block < 1 or r.shape(x)[3] % block**2:
        raise InputError(f"{r.shape(x)[3]} channels do not divide into blocks of {block} x {block}")
    r.spend(8 * r.shape(x)[3], name)
    order = torch.arange(r.shape(x)[3]).reshape(block**2, -1).T.reshape(-1)
    ordered = r.emit("gather", [x, r.builder.constant(f"{name}.order", order)], f"{name}_ordered", axis=3)
    _from_image(r, op, r.emit("depth_to_space", [_to_image(r, ordered, name)], name, block=block), name)


# -- moving values ----------------------------------------------------------------------------------------------------


@translates("RESHAPE")
def _reshape(r: Reader, op: Operator) -> None:
    """The target is operand 1, else the option."""
    x = r.needed(op, 0)
    given = len(op.inputs) > 1 and op.inputs[1] >= 0
    target = r.ints(op, 1) if given else [int(n) for n in op.options["newShape"]]
    if target.count(-1) == 1 and (rest := -prod(target)) > 0:
        target[target.index(-1)] = prod(r.shape(x)) // rest
    r.put(op, r.reshaped(x, target, f"reshape_{op.index}"))


@translates("SQUEEZE")
def _squeeze(r: Reader, op: Operator) -> None:
    x = r.needed(op, 0)
    shape, listed = r.shape(x), op.options.get("squeezeDims")
    given = [] if listed is None or isinstance(listed, int) else [int(n) for n in listed]
    axes = {r.axis(n, len(shape)) for n in given} or {i for i, n in enumerate(shape) if n == 1}
    r.put(op, r.reshaped(x, [n for i, n in enumerate(shape) if i not in axes], f"reshape_{op.index}"))


@translates("EXPAND_DIMS")
def _expand_dims(r: Reader, op: Operator) -> None:
    x, axes = r.needed(op, 0), r.ints(op, 1)
    shape = list(r.shape(x))
    shape.insert(r.axis(axes[0], len(shape) + 1), 1)
    r.put(op, r.reshaped(x, shape, f"reshape_{op.index}"))


@translates("TRANSPOSE")
def _transpose(r: Reader, op: Operator) -> None:
    x = r.needed(op, 0)
    perm = [r.axis(axis, len(r.shape(x))) for axis in r.ints(op, 1)]
    r.put(op, r.emit("transpose", [x], f"transpose_{op.index}", perm=perm))


@translates("SHAPE")
def _shape(r: Reader, op: Operator) -> None:
    shape = torch.tensor(r.shape(r.needed(op, 0)), dtype=torch.int32)
    r.put(op, r.builder.constant(f"shape_{op.index}", shape))


@translates("CONCATENATION")
def _concat(r: Reader, op: Operator) -> None:
    xs = [r.needed(op, i, f"concat_{op.index}.constant") for i in range(len(op.inputs))]
    r.put(op, r.with_act(op, "concat", xs, axis=r.axis(op.options["axis"], len(r.shape(xs[0])))))


@translates("PACK")
def _pack(r: Reader, op: Operator) -> None:
    name = f"concat_{op.index}"
    xs = [r.needed(op, i, f"{name}.constant") for i in range(len(op.inputs))]
    shape = list(r.shape(xs[0]))
    axis = r.axis(op.options["axis"], len(shape) + 1)
    shape.insert(axis, 1)
    r.put(op, r.emit("concat", [r.reshaped(x, shape, f"{name}_in") for x in xs], name, axis=axis))


@translates("UNPACK")
def _unpack(r: Reader, op: Operator) -> None:
    x = r.needed(op, 0)
    axis = r.axis(op.options["axis"], len(r.shape(x)))
    if r.shape(x)[axis] != len(op.outputs):
        raise InputError(f"UNPACK of {r.shape(x)[axis]} values into {len(op.outputs)}")
    for i in range(len(op.outputs)):
        part = r.emit("slice", [x], f"slice_{op.index}_{i}", axis=axis, start=i, stop=i + 1)
        r.put(op, r.reshaped(part, [n for a, n in enumerate(r.shape(x)) if a != axis], f"slice_{op.index}_{i}_out"), i)


@translates("SPLIT", "SPLIT_V")
def _split(r: Reader, op: Operator) -> None:
    """SPLIT has the axis first and equal parts, SPLIT_V x, sizes and axis."""
    equal = op.op == "SPLIT"
    x, axes = r.needed(op, 1 if equal else 0), r.ints(op, 0 if equal else 2)
    axis, count = r.axis(axes[0], len(r.shape(x))), len(op.outputs)
    whole = r.shape(x)[axis]
    sizes = [whole // count] * count if equal else r.ints(op, 1)
    sizes = [whole - sum(sizes) - 1 if n == -1 else n for n in sizes]
    if min(sizes) < 1 or sum(sizes) != whole or len(sizes) != count:
        raise InputError(f"{op.op} of {whole} values into {sizes}")
    names = [r.builder.unique(f"split_{op.index}" + (f"_{i}" if i else "")) for i in range(count)]
    r.builder.emit("split", [x], names, {"sizes": sizes, "axis": axis})
    for i, name in enumerate(names):
        r.put(op, name, i)


def _sliced(r: Reader, x: str, axis: int, picks: slice, name: str) -> str:
    """One axis of a slice, left out where it takes everything; never empty."""
    size = r.shape(x)[axis]
    start, stop, step = picks.indices(size)
    if not len(range(start, stop, step)) or (step < 0 and size > 2**20):
        raise InputError(f"{name!r}: the slice {start}:{stop}:{step} of {size} values")
    if (start, stop, step) == (0, size, 1):
        return x
    end = None if stop < 0 or (step > 0 and stop == size) else stop
    return r.emit("slice", [x], name, axis=axis, start=start, stop=end, step=step)


@translates("SLICE")
def _slice(r: Reader, op: Operator) -> None:
    x, begin, size = r.needed(op, 0), r.ints(op, 1), r.ints(op, 2)
    if not len(begin) == len(size) == len(r.shape(x)):
        raise InputError(f"SLICE of {len(r.shape(x))} axes by {len(begin)} and {len(size)} numbers")
    for axis, (start, count) in enumerate(zip(begin, size)):
        stop = None if count == -1 else start + count
        x = _sliced(r, x, axis, slice(start, stop), f"slice_{op.index}")
    r.put(op, x)


@translates("STRIDED_SLICE")
def _strided_slice(r: Reader, op: Operator) -> None:
    """Masks are bits by position: begin and end ignore that number, shrink takes one value and drops the axis."""
    x, options = r.needed(op, 0), op.options
    begin, end, stride = (r.ints(op, i) for i in (1, 2, 3))

    def bit(mask: str, i: int) -> bool:
        return bool(int(options.get(mask, 0)) >> i & 1)

    if not len(begin) == len(end) == len(stride) or 0 in stride:
        raise InputError(f"STRIDED_SLICE from {begin} to {end} by {stride}")
    spread = len(r.shape(x)) - sum(not bit("newAxisMask", i) and not bit("ellipsisMask", i) for i in range(len(begin)))
    axis = 0
    shape: list[int] = []
    for i, (first, last, step) in enumerate(zip(begin, end, stride)):
        if bit("ellipsisMask", i):
            shape += r.shape(x)[axis : axis + max(spread, 0)]
            axis += max(spread, 0)
            continue
        if bit("newAxisMask", i):
            shape.append(1)
            continue
        if axis >= len(r.shape(x)):
            raise InputError(f"STRIDED_SLICE names more axes than the {len(r.shape(x))} there are")
        if bit("shrinkAxisMask", i):
            x = _sliced(r, x, axis, slice(first, first + 1 or None), f"slice_{op.index}")
        else:
            stop = first + last if options.get("offset") else last
            picks = slice(None if bit("beginMask", i) else first, None if bit("endMask", i) else stop, step)
            x = _sliced(r, x, axis, picks, f"slice_{op.index}")
            shape.append(r.shape(x)[axis])
        axis += 1
    r.put(op, r.reshaped(x, [*shape, *r.shape(x)[axis:]], f"slice_{op.index}_out"))


def _margins(r: Reader, op: Operator, x: str) -> list[tuple[int, int]]:
    flat = r.ints(op, 1)
    if len(flat) != 2 * len(r.shape(x)) or min(flat, default=0) < 0 or max(flat, default=0) > 2**24:
        raise InputError(f"{op.op} of {len(r.shape(x))} axes by {flat}")
    return list(zip(flat[::2], flat[1::2]))


@translates("PAD", "PADV2")
def _pad(r: Reader, op: Operator) -> None:
    x = r.needed(op, 0)
    value = float(r.constant(op, 2).reshape(-1)[0]) if len(op.inputs) > 2 else 0.0
    padding = [n for pair in reversed(_margins(r, op, x)) for n in pair]
    r.put(op, r.emit("pad", [x], f"pad_{op.index}", padding=padding, value=value))


@translates("MIRROR_PAD")
def _mirror_pad(r: Reader, op: Operator) -> None:
    """REFLECT leaves the edge itself out of its mirror, SYMMETRIC repeats it; both are a gather along each padded axis."""
    x, name = r.needed(op, 0), f"pad_{op.index}"
    edge = int(op.options["mode"])
    for axis, (before, after) in enumerate(_margins(r, op, x)):
        size = r.shape(x)[axis]
        if max(before, after) > size - 1 + edge:
            raise InputError(f"MIRROR_PAD of {size} values by {before} and {after}")
        if before or after:
            r.spend(8 * (before + size + after), name)
            inner = torch.arange(size)
            front, back = inner[1 - edge : 1 - edge + before].flip(0), inner.flip(0)[1 - edge : 1 - edge + after]
            index = r.builder.constant(f"{name}.index_{axis}", torch.cat([front, inner, back]))
            x = r.emit("gather", [x, index], name, axis=axis)
    r.put(op, x)


@translates("TILE")
def _tile(r: Reader, op: Operator) -> None:
    """An axis of one value is broadcast, others are joined to themselves."""
    x, times = r.needed(op, 0), r.ints(op, 1)
    shape = r.shape(x)
    if len(times) != len(shape) or not all(1 <= n <= MOST_OPERANDS or (n > 0 and s == 1) for n, s in zip(times, shape)):
        raise InputError(f"TILE of {list(shape)} by {times}")
    if any(n > 1 and s == 1 for n, s in zip(times, shape)):
        x = r.emit("expand", [x], f"expand_{op.index}", shape=[n if s == 1 else s for n, s in zip(times, shape)])
    for axis, (n, s) in enumerate(zip(times, shape)):
        if n > 1 and s > 1:
            x = r.emit("concat", [x] * n, f"concat_{op.index}", axis=axis)
    r.put(op, x)


@translates("BROADCAST_TO")
def _broadcast_to(r: Reader, op: Operator) -> None:
    x, shape = r.needed(op, 0), r.ints(op, 1)
    if min(shape, default=1) < 1:
        raise InputError(f"BROADCAST_TO the shape {shape}")
    r.put(op, r.emit("expand", [x], f"expand_{op.index}", shape=shape))
