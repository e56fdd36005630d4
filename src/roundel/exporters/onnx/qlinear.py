"""Operations on codes: ONNX's QLinearConv and QLinearMatMul, onnxruntime's QLinear operators, and moves of codes as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...formats.grid import Uniform
from ...graph import Node
from .model import MICROSOFT
from .operators import OPERATORS, covers, fits, flat, places, window
from .site import Site, site
from .weights import by_output, container, per_row

if TYPE_CHECKING:
    from .network import Network

#: A writer on codes; False where it has no form for this node, which is then computed on reals between the two conversions.
Emit = Callable[["Network", Node, Site], bool]

#: Weights that stay within the 16-bit sums of two products that x86 without VNNI makes of uint8 activations: 2 * 255 * 64 < 2^15.
REDUCED = 64


def write(made: Network, node: Node) -> bool:
    """Write ``node`` on codes; False where it has to be computed on reals."""
    emit = QLINEAR.get(node.op)
    found = made.static(node.name)
    dynamic = made.q.activations.get(f"{node.name}.input")
    if emit is None or found is None or dynamic is not None or not isinstance(found.format.grid, Uniform):
        return False
    at = site(found, made.signed)
    return at.kind in ("int8", "uint8") and emit(made, node, at)


def _out(made: Network, node: Node, at: Site, op: str, inputs: Sequence[str], domain: str = "", **attrs: object) -> bool:
    """Add the node that makes the codes of ``node``, and what clamps them beyond saturation."""
    low, high = at.clamp(node.attrs.get("act"))
    limits = np.iinfo(at.kind)
    codes = made.model.name(f"{node.name}.codes")
    if (low, high) == (limits.min, limits.max):
        made.node(op, inputs, [codes], domain, **attrs)
    else:
        wide = made.node(op, inputs, [made.temporary(node, "wide")], domain, **attrs)
        made.node("Clip", [wide, made.small(low, at.kind), made.small(high, at.kind)], [codes])
    made.made(node.name, codes, at)
    return True


def _operand(made: Network, name: str) -> list[str] | None:
    """Codes, scale and zero point of an operand; None where it is real or of 16 bits."""
    codes = made.code(name)
    if codes is None or made.sites[name].kind not in ("int8", "uint8"):
        return None
    return [codes, *made.params(made.sites[name])]


def _weight(made: Network, node: Node) -> list[str] | None:
    """Codes, scale and zero point of the weight; None where it is float or its scales lie within outputs."""
    name = node.inputs[1]
    if name not in made.q.tensors or not by_output(made.q.tensors[name]):
        return None
    q = made.q.tensors[name]
    scale, zero = per_row(q)
    if zero.any():  # onnxruntime wants one zero point for all outputs
        return None
    kind = "uint8" if container(q.format).startswith("U") else "int8"
    codes = made.weights.codes(name, q, kind=kind.upper())
    return [codes, made.model.tensor(f"{name}.scale", scale), made.model.tensor(f"{name}.zero", zero.astype(kind))]


def _bias(made: Network, node: Node) -> list[str] | None:
    """The int32 bias, if there is one; None where it does not fit."""
    if len(node.inputs) < 3 or not node.inputs[2]:
        return []
    found = made.bias(node)
    return None if found is None else [made.model.tensor(f"{node.inputs[2]}.codes", found[0])]


def _conv(made: Network, node: Node, at: Site) -> bool:
    x, w, b = _operand(made, node.inputs[0]), _weight(made, node), _bias(made, node)
    if x is None or w is None or b is None or any(n < 0 for n in node.attrs["padding"]):
        return False
    attrs = window(made, node, list(node.attrs["padding"]))
    return _out(made, node, at, "QLinearConv", [*x, *w, *made.params(at), *b], **attrs, group=node.attrs.get("groups", 1))


def _linear(made: Network, node: Node, at: Site) -> bool:
    """onnxruntime's QGemm, which has a bias and two axes; more axes are folded into the first."""
    x, w, b = _operand(made, node.inputs[0]), _weight(made, node), _bias(made, node)
    shape = made.shape(node.inputs[0])
    if x is None or w is None or b is None or any(isinstance(n, str) for n in shape[1:]):
        return False
    gemm = [*w, *(b or [""]), *made.params(at)]
    if flat(made, node):
        return _out(made, node, at, "QGemm", [*x, *gemm], MICROSOFT, transB=1)
    rows = made.node("Reshape", [x[0], made.small([-1, shape[-1]], "int64")], [made.temporary(node, "rows")])
    result = made.node("QGemm", [rows, *x[1:], *gemm], [made.temporary(node, "gemm")], MICROSOFT, transB=1)
    return _out(made, node, at, "Reshape", [result, made.small([-1, *shape[1:-1], made.shape(node.name)[-1]], "int64")])


def _matmul(made: Network, node: Node, at: Site) -> bool:
    a, b = _operand(made, node.inputs[0]), _operand(made, node.inputs[1])
    if a is None or b is None:
        return False
    if node.attrs.get("transpose_b"):
        rank = len(made.shape(node.inputs[1]))
        perm = [*range(rank - 2), rank - 1, rank - 2]
        b[0] = made.node("Transpose", b[:1], [made.temporary(node, "swapped")], perm=perm)
    return _out(made, node, at, "QLinearMatMul", [*a, *b, *made.params(at)])


def _binary(op: str) -> Emit:
    def emit(made: Network, node: Node, at: Site) -> bool:
        a, b = _operand(made, node.inputs[0]), _operand(made, node.inputs[1])
        return a is not None and b is not None and _out(made, node, at, op, [*a, *b, *made.params(at)], MICROSOFT)

    return emit


def _avg_pool(made: Network, node: Node, at: Site) -> bool:
    x, a = _operand(made, node.inputs[0]), node.attrs
    if x is None or len(made.shape(node.inputs[0])) != 4 or not fits(a["padding"], a["kernel"]):
        return False
    if covers(made, node):
        return _out(made, node, at, "QLinearGlobalAveragePool", [*x, *made.params(at)], MICROSOFT, channels_last=0)
    return _out(made, node, at, "QLinearAveragePool", [*x, *made.params(at)], MICROSOFT, **places(node),
                count_include_pad=int(a.get("count_pad", False)))  # fmt: skip


def _mean(made: Network, node: Node, at: Site) -> bool:
    """A mean over both places of a picture."""
    x, rank = _operand(made, node.inputs[0]), len(made.shape(node.inputs[0]))
    if x is None or rank != 4 or sorted(axis % rank for axis in node.attrs["axes"]) != [2, 3]:
        return False
    inputs = [*x, *made.params(at)]
    if node.attrs.get("keepdim"):
        return _out(made, node, at, "QLinearGlobalAveragePool", inputs, MICROSOFT, channels_last=0)
    pooled = made.node("QLinearGlobalAveragePool", inputs, [made.temporary(node, "pooled")], MICROSOFT, channels_last=0)
    return _out(made, node, at, "Reshape", [pooled, made.small([0, -1], "int64")])


def _softmax(made: Network, node: Node, at: Site) -> bool:
    x = _operand(made, node.inputs[0])
    if x is None:
        return False
    return _out(made, node, at, "QLinearSoftmax", [*x, *made.params(at)], MICROSOFT, axis=node.attrs.get("axis", -1), opset=13)


def _table(op: str, **attrs: str) -> Emit:
    """Operators of one operand; ``attrs`` gives ONNX's name for a graph attribute."""

    def emit(made: Network, node: Node, at: Site) -> bool:
        x = _operand(made, node.inputs[0])
        given = {theirs: float(node.attrs[ours]) for ours, theirs in attrs.items()}
        return x is not None and _out(made, node, at, op, [*x, *made.params(at)], MICROSOFT, **given)

    return emit


def _move(made: Network, node: Node, at: Site) -> bool:
    """Codes in another place: the operation itself, on codes; operands and result are one site."""
    if any(made.code(name) is None for name in _moved(node)):
        return False
    shaped = node.op == "expand_batch"  # only the shape of the other operand is read
    names = [made.codes[n] if n in _moved(node) or (shaped and n in made.codes) else made.real(n) for n in node.inputs]
    outs = [made.model.name(f"{name}.codes") for name in node.outputs]
    OPERATORS[node.op](made, node, names, outs)
    for name, codes in zip(node.outputs, outs, strict=True):
        made.made(name, codes, at)
    return True


def _moved(node: Node) -> Sequence[str]:
    return node.inputs if node.op == "concat" else node.inputs[1:] if node.op == "where" else node.inputs[:1]


def _max_pool(made: Network, node: Node, at: Site) -> bool:
    x = _operand(made, node.inputs[0])
    if x is None or not fits(node.attrs["padding"], node.attrs["kernel"]):
        return False
    return _out(made, node, at, "MaxPool", x[:1], **places(node))


def _pad(made: Network, node: Node, at: Site) -> bool:
    x, a = _operand(made, node.inputs[0]), node.attrs
    if x is None or made.sites[node.inputs[0]] != at or a.get("mode", "constant") != "constant":
        return False
    before, after = a["padding"][::2][::-1], a["padding"][1::2][::-1]
    fixed = [0] * (len(made.shape(node.inputs[0])) - len(before))
    code = int(np.clip(np.rint(np.float32(a.get("value", 0.0)) / at.scale) + at.zero, at.low, at.high))
    pads = made.small([*fixed, *before, *fixed, *after], "int64")
    return _out(made, node, at, "Pad", [x[0], pads, made.small(code, at.kind)])


QLINEAR: dict[str, Emit] = {
    "conv": _conv, "linear": _linear, "matmul": _matmul, "add": _binary("QLinearAdd"), "mul": _binary("QLinearMul"),
    "avg_pool": _avg_pool, "mean": _mean, "softmax": _softmax, "sigmoid": _table("QLinearSigmoid"),
    "leaky_relu": _table("QLinearLeakyRelu", slope="alpha"), "max_pool": _max_pool, "pad": _pad,
    "reshape": _move, "transpose": _move, "slice": _move, "concat": _move, "split": _move, "expand": _move, "gather": _move,
    "expand_batch": _move, "depth_to_space": _move, "where": _move,
}  # fmt: skip
