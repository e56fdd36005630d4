"""ONNX's own test vectors of its quantized operators, against this package's arithmetic and against onnxruntime."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from roundel.formats.format import Format
from roundel.formats.grid import table
from roundel.integer import ops as integer
from roundel.integer import quantize_multiplier
from roundel.network.layer import Activation

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")

OPERATORS = (
    "QuantizeLinear",
    "DequantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeLinear",
)

#: Vectors that onnxruntime does not give, and why; our definitions give them all.
DISPUTED = {"test_convinteger_with_padding": "onnxruntime 1.32 takes one zero point for all outputs of a ConvInteger"}

#: ONNX's float types -> the grid of ours with the same bit patterns.
FLOATS = {"FLOAT8E4M3FN": "fp8", "FLOAT8E5M2": "fp8_e5m2", "FLOAT4E2M1": "fp4"}


def cases() -> dict[str, Any]:
    """Test vectors of the quantized operators as the package onnx generates them; the expanded ones hold other operators."""
    from onnx.backend.test.case import node

    for name in OPERATORS:  # the whole collection takes long, and its import makes the vectors
        importlib.import_module(f"onnx.backend.test.case.node.{name.lower()}")
    nodes = {case.name: case for case in node._NodeTestCases if len(case.model.graph.node) == 1}
    return {name: case for name, case in sorted(nodes.items()) if case.model.graph.node[0].op_type in OPERATORS}


CASES = cases()


class Value:
    """An operand: ``codes`` as int64 or reals, and the ONNX type that it has."""

    def __init__(self, given: Any, kind: int) -> None:
        self.kind = onnx.TensorProto.DataType.Name(kind)
        if isinstance(given, onnx.TensorProto):
            given = onnx.numpy_helper.to_array(given)
        self.array: NDArray[Any] = np.asarray(given)
        if self.kind in FLOATS:
            self.array = self.array.view(np.uint8)


def same(found: Any, want: Any, kind: str) -> bool:
    """Equal, of floats to one part in a million."""
    want = Value(want, getattr(onnx.TensorProto, kind)).array
    if np.asarray(want).dtype.kind == "f":
        return bool(np.allclose(found, np.asarray(want, np.float64), rtol=1e-3 if want.dtype == np.float16 else 1e-6, atol=0))
    return bool((np.asarray(found, np.int64) == want.astype(np.int64)).all())


@pytest.mark.proves("onnx.node-tests")
@pytest.mark.parametrize("name", CASES)
def test_vectors(name: str) -> None:
    case = CASES[name]
    graph, node = case.model.graph, case.model.graph.node[0]
    for given, wanted in case.data_sets:
        named = {i.name: Value(x, i.type.tensor_type.elem_type) for i, x in zip(graph.input, given, strict=True)}
        operands = [named.get(i) for i in node.input]
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        kinds = [onnx.TensorProto.DataType.Name(o.type.tensor_type.elem_type) for o in graph.output]
        found = DEFINITIONS[node.op_type](operands, attrs, kinds[0])
        for ours, theirs, kind in zip(found, wanted, kinds, strict=True):
            assert same(ours, theirs, kind), (name, ours, theirs)


def test_every_operator_has_vectors() -> None:
    assert {case.model.graph.node[0].op_type for case in CASES.values()} == set(OPERATORS)
    assert len(CASES) >= 40


@pytest.mark.proves("onnx.node-tests")
def test_onnxruntime_disputes_what_is_listed() -> None:
    """onnxruntime on the vectors whose types NumPy has, at an opset that it has kernels for."""
    ort = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    settings, apart, run = ort.SessionOptions(), set(), 0
    settings.log_severity_level = 4
    for name, case in CASES.items():
        proto = onnx.ModelProto.FromString(case.model.SerializeToString())
        given, wanted = case.data_sets[0]
        if any(isinstance(x, onnx.TensorProto) for x in (*given, *wanted)):
            continue
        proto.ir_version, proto.opset_import[0].version = 10, min(21, proto.opset_import[0].version)
        session = ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        run += 1
        try:
            found = session.run(None, {i.name: np.asarray(x) for i, x in zip(proto.graph.input, given, strict=True)})
        except ort.capi.onnxruntime_pybind11_state.Fail:
            apart.add(name)
            continue
        kinds = [onnx.TensorProto.DataType.Name(o.type.tensor_type.elem_type) for o in proto.graph.output]
        if not all(map(same, found, wanted, kinds)):
            apart.add(name)
    assert run >= 20
    assert apart == DISPUTED.keys()


# -- the operators by our definitions -----------------------------------------------------------------------------------


def blocks(x: NDArray[Any], scale: NDArray[Any], attrs: dict[str, Any]) -> Iterator[tuple[tuple[slice, ...], tuple[int, ...]]]:
    """(part of x, index of its parameters) for one scale, one per slice of ``axis``, or blocks of ``block_size``."""
    axis = attrs.get("axis", 1)
    if scale.size == 1:
        yield (slice(None),) * x.ndim, (0,) * scale.ndim
    elif not attrs.get("block_size"):
        for i in range(x.shape[axis]):
            yield (*[slice(None)] * (axis % x.ndim), slice(i, i + 1)), (i,)
    else:
        step = attrs["block_size"]
        for at in np.ndindex(*scale.shape):
            yield tuple(slice(i * step, (i + 1) * step) if d == axis % x.ndim else slice(i, i + 1) for d, i in enumerate(at)), at


def quantize_linear(operands: list[Any], attrs: dict[str, Any], kind: str) -> list[NDArray[Any]]:
    x, scale = operands[0].array.astype(np.float32), operands[1].array.astype(np.float32)
    zero = operands[2].array.reshape(scale.shape) if len(operands) > 2 else np.zeros(scale.shape, np.int64)
    out = np.zeros(x.shape, np.int64)
    for part, at in blocks(x, scale, attrs):
        if kind in FLOATS:
            fmt = Format.parse(f"{FLOATS[kind]}/tensor*fp32")
            rows = torch.from_numpy(x[part].reshape(1, -1))
            params = fmt.store(type(fmt.from_range(*[torch.ones(1, 1)] * 2))(scale=torch.tensor([[float(scale[at])]])))
            out[part] = fmt.encode(rows, params).numpy().reshape(x[part].shape)
        else:
            low, high = integer.extremes(kind.lower())
            out[part] = integer.INTEGER["quantize"](x[part], scale=float(scale[at]), zero=int(zero[at]), low=low, high=high)
    return [out]


def dequantize_linear(operands: list[Any], attrs: dict[str, Any], kind: str) -> list[NDArray[Any]]:
    x, scale = operands[0], operands[1].array.astype(np.float32)
    zero = operands[2].array.reshape(scale.shape) if len(operands) > 2 else np.zeros(scale.shape, np.int64)
    out = np.zeros(x.array.shape, np.float32)
    for part, at in blocks(x.array, scale, attrs):
        if x.kind in FLOATS:
            levels = np.array(table(FLOATS[x.kind]).decode, np.float32)
            out[part] = levels[x.array[part]] * scale[at]
        else:
            codes = x.array[part].astype(np.int64)
            out[part] = integer.INTEGER["dequantize"](codes, scale=float(scale[at]), zero=int(zero[at]))
    return [out]


def affine(operands: list[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Codes, scale and zero point of three operands."""
    codes, scale, zero = (o.array for o in operands)
    return codes.astype(np.int64), scale.astype(np.float64).reshape(-1), zero.astype(np.int64).reshape(-1)


def requantized(x_scale: Any, w_scale: Any, y: list[Any]) -> dict[str, Any]:
    multiplier, shift = quantize_multiplier(x_scale * w_scale / y[0].array.astype(np.float64).reshape(-1))
    low, high = integer.extremes(y[1].kind.lower())
    return {"multiplier": multiplier, "shift": shift, "y_zero": int(y[1].array.reshape(())), "low": low, "high": high}


WIDE = [-(2**31), 2**31 - 1]


def qlinear_conv(operands: list[Any], attrs: dict[str, Any], kind: str) -> list[NDArray[Any]]:
    (x, x_scale, x_zero), (w, w_scale, w_zero) = affine(operands[:3]), affine(operands[3:6])
    scaled = requantized(x_scale, w_scale, operands[6:8])
    parts = [np.broadcast_to(scaled.pop(key), len(w)) for key in ("multiplier", "shift")]
    return [integer.INTEGER["conv"](x, w - w_zero.reshape(-1, *[1] * (w.ndim - 1)), np.zeros(len(w), np.int64), *parts,
                                    x_zero=int(x_zero[0]), rounding="R4", acc=WIDE, **place(w, attrs), **scaled)]  # fmt: skip


def place(w: NDArray[Any], attrs: dict[str, Any]) -> dict[str, Any]:
    axes = w.ndim - 2
    pads = attrs.get("pads", [0] * 2 * axes)
    padding = [pads[i + j * axes] for i in reversed(range(axes)) for j in (0, 1)]
    return {"stride": attrs.get("strides", [1] * axes), "dilation": attrs.get("dilations", [1] * axes),
            "groups": attrs.get("group", 1), "padding": padding}  # fmt: skip


def qlinear_matmul(operands: list[Any], attrs: dict[str, Any], kind: str) -> list[NDArray[Any]]:
    (a, a_scale, a_zero), (b, b_scale, b_zero) = affine(operands[:3]), affine(operands[3:6])
    scaled = requantized(a_scale, b_scale, operands[6:8])
    parts = [np.broadcast_to(scaled.pop(key), b.shape[-1]) for key in ("multiplier", "shift")]
    pairs = zip(a.reshape(-1, *a.shape[-2:]), (b - b_zero).reshape(-1, *b.shape[-2:]), strict=True)
    nothing = np.zeros(b.shape[-1], np.int64)
    out = [
        integer.INTEGER["linear"](x, w.T, nothing, *parts, x_zero=int(a_zero[0]), rounding="R4", acc=WIDE, **scaled)
        for x, w in pairs
    ]
    return [np.stack(out).reshape(*a.shape[:-1], b.shape[-1])]


def matmul_integer(operands: list[Any], attrs: dict[str, Any], kind: str) -> list[NDArray[Any]]:
    a, b = (operands[i].array.astype(np.int64) - operands[i + 2].array.astype(np.int64) for i in (0, 1))
    return [integer.linear_sums(a, b.T)]


def conv_integer(operands: list[Any], attrs: dict[str, Any], kind: str) -> list[NDArray[Any]]:
    x, w, x_zero, *rest = (o.array.astype(np.int64) for o in operands)
    w = w - (rest[0].reshape(-1, *[1] * (w.ndim - 1)) if rest else 0)
    a = place(w, attrs)
    return [integer.conv_sums(x - x_zero, w, a["stride"], a["padding"], a["dilation"], a["groups"])]


def dynamic_quantize_linear(operands: list[Any], attrs: dict[str, Any], kind: str) -> list[NDArray[Any]]:
    site = Activation(Format.parse("uint8/tensor*fp32~uint8"), "dynamic")
    x = torch.from_numpy(operands[0].array)
    params = site.measure(x.reshape(1, -1))
    assert params.scale is not None
    assert params.offset is not None
    level, scale = site.codes(x)
    zero = int(params.offset)
    assert scale is not None
    assert math.isclose(float(scale), float(params.scale))
    return [level.numpy() + zero, np.array(float(scale)), np.array(zero)]


DEFINITIONS: dict[str, Callable[..., list[NDArray[Any]]]] = {
    "QuantizeLinear": quantize_linear, "DequantizeLinear": dequantize_linear, "QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul, "MatMulInteger": matmul_integer, "ConvInteger": conv_integer,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
}  # fmt: skip
