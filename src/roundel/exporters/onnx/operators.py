"""Every operation of the real graph in standard ONNX operators; it knows nothing of quantization.

Each function adds the ONNX nodes of one graph node: ``x`` are the names of its operands, "" for one left out, ``out`` those of its
results. Operations that only move numbers do so for codes as for reals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ...errors import PlanError
from ...graph import Node

Shape = tuple[int | str, ...]


class Writer(Protocol):
    """What an operation needs of the model in the making."""

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attrs: Any) -> str:
        """Add a node; its first result."""

    def temporary(self, node: Node, word: str) -> str:
        """A fresh name for something between."""

    def small(self, value: ArrayLike, dtype: str = "float32") -> str:
        """A small constant."""

    def shape(self, name: str) -> Shape:
        """The shape of a value or constant of the real graph; `PlanError` where it is not known."""

    def integers(self, name: str) -> bool:
        """Whether a value of the real graph holds integers or truth values."""

    def swapped(self, name: str) -> str:
        """A value of the real graph as a real number, its last two axes exchanged."""


Emit = Callable[[Writer, Node, Sequence[str], Sequence[str]], None]

#: Operation of the real graph -> its writer.
OPERATORS: dict[str, Emit] = {}


def op(fn: Emit) -> Emit:
    """Enter a function in `OPERATORS` under its name, less a trailing underscore."""
    OPERATORS[fn.__name__.rstrip("_")] = fn
    return fn


def _step(made: Writer, node: Node, op: str, inputs: Sequence[str], **attrs: Any) -> str:
    return made.node(op, inputs, [made.temporary(node, op)], **attrs)


def _acted(made: Writer, node: Node, out: Sequence[str]) -> tuple[Sequence[str], Callable[[], None]]:
    """Where to write a result that a fused activation follows, and what adds that activation."""
    act = node.attrs.get("act")
    if act is None:
        return out, lambda: None
    bare = [made.temporary(node, "bare")]

    def add() -> None:
        if act == "relu":
            made.node("Relu", bare, out)
        else:
            made.node("Clip", [*bare, made.small(0.0), made.small(6.0)], out)

    return bare, add


def spatial(padding: Sequence[int]) -> list[int]:
    """ONNX's pads (all beginnings, then all ends, first axis first) of torch's (before, after) from the last axis backwards."""
    return [*padding[::2][::-1], *padding[1::2][::-1]]


def padded(made: Writer, node: Node, x: str, padding: Sequence[int], value: float) -> str:
    """``x`` behind a Pad over its last axes."""
    before, after = padding[::2][::-1], padding[1::2][::-1]
    fixed = [0] * (len(made.shape(node.inputs[0])) - len(before))
    pads = made.small([*fixed, *before, *fixed, *after], "int64")
    return _step(made, node, "Pad", [x, pads, made.small(value)])


# -- weighted ---------------------------------------------------------------------------------------------------------


@op
def conv(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    a, (bare, act) = node.attrs, _acted(made, node, out)
    source, padding = x[0], list(a["padding"])
    if any(n < 0 for n in padding):
        source, padding = padded(made, node, source, padding, 0.0), [0] * len(padding)
    made.node("Conv", [source, *x[1:]], bare, **window(made, node, padding), group=a.get("groups", 1))
    act()


def window(made: Writer, node: Node, padding: Sequence[int]) -> dict[str, Any]:
    """kernel_shape, strides, dilations and pads of a convolution."""
    a = node.attrs
    kernel = [int(n) for n in made.shape(node.inputs[1])[2:]]
    return {"kernel_shape": kernel, "strides": list(a["stride"]), "dilations": list(a["dilation"]), "pads": spatial(padding)}


@op
def conv_transpose(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    a, (bare, act) = node.attrs, _acted(made, node, out)
    attrs = window(made, node, [n for n in reversed(a["padding"]) for _ in range(2)])
    made.node("ConvTranspose", x, bare, **attrs, output_padding=list(a["output_padding"]), group=a.get("groups", 1))
    act()


@op
def linear(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    """``x[1]`` is (out, in) under a Gemm, which takes two axes, and already (in, out) under a MatMul: see `flat`."""
    bare, act = _acted(made, node, out)
    if flat(made, node):
        made.node("Gemm", [name for name in x if name], bare, transB=1)
    elif len(x) > 2 and x[2]:
        made.node("Add", [_step(made, node, "MatMul", x[:2]), x[2]], bare)
    else:
        made.node("MatMul", x[:2], bare)
    act()


def flat(made: Writer, node: Node) -> bool:
    """Whether a linear layer's input has two axes."""
    return len(made.shape(node.inputs[0])) == 2


@op
def embedding(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Gather", [x[1], x[0]], out, axis=0)


# -- two activations --------------------------------------------------------------------------------------------------


@op
def matmul(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("MatMul", [x[0], made.swapped(node.inputs[1]) if node.attrs.get("transpose_b") else x[1]], out)


def _binary(name: str) -> Emit:
    def emit(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
        bare, act = _acted(made, node, out)
        made.node(name, x, bare)
        act()

    return emit


OPERATORS |= {"add": _binary("Add"), "sub": _binary("Sub"), "mul": _binary("Mul"), "div": _binary("Div"), "pow": _binary("Pow"),
              "maximum": _binary("Max"), "minimum": _binary("Min")}  # fmt: skip


@op
def squared_difference(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    d = _step(made, node, "Sub", x)
    made.node("Mul", [d, d], out)


@op
def where(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Where", [_truth(made, node, x[0]), *x[1:]], out)


def _truth(made: Writer, node: Node, x: str) -> str:
    from onnx import TensorProto

    return _step(made, node, "Cast", [x], to=TensorProto.BOOL)


@op
def compare(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    how = node.attrs["how"]
    names = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
    if how == "ne":
        made.node("Not", [_step(made, node, "Equal", x)], out)
    else:
        made.node(names[how], x, out)


@op
def attention(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    """MatMul, Softmax, MatMul: runtimes place these on any device, and the Attention operator needs opset 23."""
    q, _, v, mask = (*x, "")[:4]
    logits = _step(made, node, "MatMul", [q, made.swapped(node.inputs[1])])
    logits = _step(made, node, "Mul", [logits, made.small(float(node.attrs["scale"]))])
    if mask and made.integers(node.inputs[3]):
        logits = _step(made, node, "Where", [_truth(made, node, mask), logits, made.small(-np.inf)])
    elif mask:
        logits = _step(made, node, "Add", [logits, mask])
    if node.attrs.get("causal"):
        rows, cols = made.shape(node.inputs[0])[-2], made.shape(node.inputs[1])[-2]
        if isinstance(rows, str) or isinstance(cols, str):
            raise PlanError("its causal mask needs a known length of queries and keys")
        logits = _step(made, node, "Add", [logits, made.small(np.triu(np.full((rows, cols), -np.inf), 1))])
    made.node("MatMul", [_step(made, node, "Softmax", [logits], axis=-1), v], out)


# -- elementwise ------------------------------------------------------------------------------------------------------


def _plain(name: str, **attrs: Any) -> Emit:
    """An operation that ONNX has as it is, with fixed ``attrs``."""

    def emit(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
        made.node(name, x, out, **attrs)

    return emit


OPERATORS |= {
    "identity": _plain("Identity"), "relu": _plain("Relu"), "sigmoid": _plain("Sigmoid"), "tanh": _plain("Tanh"),
    "exp": _plain("Exp"), "log": _plain("Log"), "erf": _plain("Erf"), "sqrt": _plain("Sqrt"), "abs": _plain("Abs"),
    "neg": _plain("Neg"), "sin": _plain("Sin"), "cos": _plain("Cos"), "hardswish": _plain("HardSwish"),
    "hardsigmoid": _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
}  # fmt: skip


@op
def relu6(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Clip", [x[0], made.small(0.0), made.small(6.0)], out)


@op
def hardtanh(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    ends = ["" if end is None or math.isinf(end) else made.small(float(end)) for end in (node.attrs["lo"], node.attrs["hi"])]
    made.node("Clip", [x[0], *ends], out)


@op
def leaky_relu(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("LeakyRelu", x, out, alpha=float(node.attrs["slope"]))


@op
def prelu(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    """torch's slopes lie along axis 1, ONNX's broadcast from the last."""
    behind = len(made.shape(node.inputs[0])) - 2
    slope = _step(made, node, "Reshape", [x[1], made.small([-1, *[1] * max(behind, 0)], "int64")])
    made.node("PRelu", [x[0], slope], out)


@op
def elu(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Elu", x, out, alpha=float(node.attrs.get("alpha", 1.0)))


@op
def gelu(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Gelu", x, out, approximate=node.attrs.get("approximate", "none"))


@op
def silu(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Mul", [x[0], _step(made, node, "Sigmoid", x)], out)


@op
def rsqrt(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Reciprocal", [_step(made, node, "Sqrt", x)], out)


@op
def cast(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Cast", x, out, to=element(node.attrs["dtype"]))


def element(dtype: str) -> int:
    """The ONNX number of a torch dtype."""
    from onnx import TensorProto

    number = getattr(TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper()), None)
    if number is None:
        raise PlanError(f"ONNX has no type {dtype}")
    return int(number)


# -- normalisation and softmax ----------------------------------------------------------------------------------------


def _ones(made: Writer, node: Node, axis: int) -> str:
    size = made.shape(node.inputs[0])[axis]
    if isinstance(size, str):
        raise PlanError("its norm has no weight and an unknown size")
    return made.small(np.ones(size))


@op
def batch_norm(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    source, mean, var, weight, bias = (*x, "", "")[:5]
    weight = weight or _ones(made, node, 1)
    bias = bias or _step(made, node, "Sub", [weight, weight])
    made.node("BatchNormalization", [source, weight, bias, mean, var], out, epsilon=float(node.attrs["eps"]))


@op
def layer_norm(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    source, weight, bias = (*x, "", "")[:3]
    inputs = [source, weight or _ones(made, node, -1), *([bias] if bias else [])]
    made.node("LayerNormalization", inputs, out, axis=-1, epsilon=float(node.attrs["eps"]))


@op
def rms_norm(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    """In parts: RMSNormalization needs opset 23."""
    eps = np.finfo(np.float32).eps if node.attrs.get("eps") is None else node.attrs["eps"]
    square = _step(made, node, "Mul", [x[0], x[0]])
    mean = _step(made, node, "ReduceMean", [square, made.small([-1], "int64")], keepdims=1)
    root = _step(made, node, "Sqrt", [_step(made, node, "Add", [mean, made.small(float(eps))])])
    if len(x) > 1 and x[1]:
        made.node("Mul", [_step(made, node, "Div", [x[0], root]), x[1]], out)
    else:
        made.node("Div", [x[0], root], out)


@op
def group_norm(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    source, weight, bias = (*x, "", "")[:3]
    weight = weight or _ones(made, node, 1)
    bias = bias or _step(made, node, "Sub", [weight, weight])
    made.node("GroupNormalization", [source, weight, bias], out, num_groups=node.attrs["groups"], epsilon=float(node.attrs["eps"]))


@op
def softmax(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Softmax", x, out, axis=node.attrs.get("axis", -1))


@op
def log_softmax(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("LogSoftmax", x, out, axis=node.attrs.get("axis", -1))


# -- pooling and reduction --------------------------------------------------------------------------------------------


@op
def max_pool(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    a, (bare, act) = node.attrs, _acted(made, node, out)
    source, padding = x[0], list(a["padding"])
    if not fits(padding, a["kernel"]):
        source, padding = padded(made, node, source, padding, -np.inf), [0] * len(padding)
    made.node("MaxPool", [source], bare, **(places(node) | {"pads": spatial(padding)}))
    act()


def places(node: Node) -> dict[str, Any]:
    """kernel_shape, strides and pads of a pool."""
    a = node.attrs
    return {"kernel_shape": list(a["kernel"]), "strides": list(a["stride"]), "pads": spatial(a["padding"])}


def fits(padding: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether a pool itself can pad so: by less than its window."""
    return all(0 <= n < size for pair, size in zip(zip(padding[::2], padding[1::2]), reversed(kernel)) for n in pair)


def covers(made: Writer, node: Node) -> bool:
    """Whether a pool's one window is the whole picture."""
    return not any(node.attrs["padding"]) and tuple(node.attrs["kernel"]) == made.shape(node.inputs[0])[2:]


@op
def avg_pool(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    a, (bare, act) = node.attrs, _acted(made, node, out)
    source, padding = x[0], list(a["padding"])
    if covers(made, node):
        made.node("GlobalAveragePool", [source], bare)
        return act()
    if not fits(padding, a["kernel"]):
        if not a.get("count_pad"):
            raise PlanError("it leaves padding out of the mean that is as wide as its window")
        source, padding = padded(made, node, source, padding, 0.0), [0] * len(padding)
    attrs = places(node) | {"pads": spatial(padding), "count_include_pad": int(a.get("count_pad", False))}
    made.node("AveragePool", [source], bare, **attrs)
    act()


def _reduction(name: str) -> Emit:
    def emit(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
        axes = made.small(list(node.attrs["axes"]), "int64")
        made.node(name, [x[0], axes], out, keepdims=int(node.attrs.get("keepdim", False)))

    return emit


OPERATORS |= {"mean": _reduction("ReduceMean"), "sum": _reduction("ReduceSum"), "amax": _reduction("ReduceMax")}


@op
def argmax(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("ArgMax", x, out, axis=node.attrs["axis"], keepdims=int(node.attrs.get("keepdim", False)))


# -- moving values ----------------------------------------------------------------------------------------------------


@op
def reshape(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Reshape", [x[0], made.small(list(node.attrs["shape"]), "int64")], out)


@op
def transpose(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Transpose", x, out, perm=list(node.attrs["perm"]))


@op
def slice_(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    a = node.attrs
    step, start, stop = a.get("step", 1), a.get("start", 0), a.get("stop")
    if stop is None:
        stop = 2**63 - 1 if step > 0 else -(2**63) + 1
    made.node("Slice", [x[0], *(made.small([n], "int64") for n in (start, stop, a["axis"], step))], out)


@op
def concat(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Concat", x, out, axis=node.attrs["axis"])


@op
def split(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Split", [x[0], made.small(list(node.attrs["sizes"]), "int64")], out, axis=node.attrs["axis"])


@op
def pad(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    """torch's reflect, replicate and circular are ONNX's reflect, edge and wrap."""
    a = node.attrs
    before, after = a["padding"][::2][::-1], a["padding"][1::2][::-1]
    fixed = [0] * (len(made.shape(node.inputs[0])) - len(before))
    pads = made.small([*fixed, *before, *fixed, *after], "int64")
    mode = {"replicate": "edge", "circular": "wrap"}.get(a.get("mode", "constant"), a.get("mode", "constant"))
    value = [made.small(float(a.get("value", 0.0)))] if mode == "constant" else []
    made.node("Pad", [x[0], pads, *value], out, mode=mode)


@op
def expand(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    """ONNX's Expand broadcasts both ways, so a size that is kept is 1."""
    made.node("Expand", [x[0], made.small([1 if n == -1 else n for n in node.attrs["shape"]], "int64")], out)


@op
def expand_batch(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    batch = _step(made, node, "Shape", [x[1]], start=0, end=1)
    ones = made.small([1] * (len(made.shape(node.inputs[0])) - 1), "int64")
    made.node("Expand", [x[0], _step(made, node, "Concat", [batch, ones], axis=0)], out)


@op
def gather(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("Gather", x, out, axis=node.attrs["axis"])


@op
def resize(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    """torch's nearest rounds down on asymmetric coordinates; bilinear counts from the middle of a pixel unless corners align."""
    a, shape = node.attrs, made.shape(node.inputs[0])
    batch = _step(made, node, "Shape", [x[0]], start=0, end=2)
    sizes = _step(made, node, "Concat", [batch, made.small(list(a["size"]), "int64")], axis=0)
    if a["mode"] == "nearest":
        attrs = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    elif a["mode"] == "bilinear" and len(shape) == 4:
        attrs = {"mode": "linear", "coordinate_transformation_mode": "align_corners" if a.get("align_corners") else "half_pixel"}
    else:
        raise PlanError(f"its mode {a['mode']!r} over {len(shape)} axes is not written yet")
    made.node("Resize", [x[0], "", "", sizes], out, **attrs)


@op
def depth_to_space(made: Writer, node: Node, x: Sequence[str], out: Sequence[str]) -> None:
    made.node("DepthToSpace", x, out, blocksize=node.attrs["block"], mode="CRD")
