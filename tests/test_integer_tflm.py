"""Single operations, quantized and lowered in R1, against TFLite Micro on the same codes: not one element differs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as S
from numpy.typing import NDArray
from tflite_micro.python.tflite_micro import runtime
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.integer.ops import INTEGER, numbers
from roundel.qmodel import QModel

Ints = NDArray[np.int64]
Codes = NDArray[np.int8]
OPS, ACTS = S.BuiltinOperator, S.ActivationFunctionType


# -- a .tflite file of one operation ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the file; ``data`` is None for inputs and outputs, of ``dtype``; ``axis`` is that of several scales."""

    shape: Sequence[int]
    scale: Sequence[float]
    zero: int = 0
    data: NDArray[Any] | None = None
    axis: int = 0
    dtype: str = "int8"


def file_of(code: int, version: int, options: Any, inputs: Sequence[Value], output: Value) -> bytes:
    model, graph = S.ModelT(), S.SubGraphT()
    model.version, model.buffers, graph.tensors = 3, [S.BufferT()], []
    for i, value in enumerate([*inputs, output]):
        tensor, tensor.quantization = S.TensorT(), S.QuantizationParametersT()
        tensor.name, tensor.shape, tensor.buffer = f"t{i}", list(value.shape), 0
        tensor.type = getattr(S.TensorType, (value.dtype if value.data is None else str(value.data.dtype)).upper())
        tensor.quantization.scale = list(value.scale)
        tensor.quantization.zeroPoint, tensor.quantization.quantizedDimension = [value.zero] * len(value.scale), value.axis
        if value.data is not None:
            tensor.buffer = len(model.buffers)
            model.buffers.append(S.BufferT())
            model.buffers[-1].data = np.frombuffer(value.data.tobytes(), np.uint8)
        graph.tensors.append(tensor)
    op, opcode = S.OperatorT(), S.OperatorCodeT()
    op.inputs, op.outputs = list(range(len(inputs))), [len(inputs)]
    op.builtinOptionsType = getattr(S.BuiltinOptions, type(options).__name__.removesuffix("T"))
    op.builtinOptions = options
    opcode.builtinCode, opcode.deprecatedBuiltinCode, opcode.version = code, min(code, 127), version
    graph.operators, model.operatorCodes, model.subgraphs = [op], [opcode], [graph]
    graph.inputs, graph.outputs = [i for i, value in enumerate(inputs) if value.data is None], [len(inputs)]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def tflite_micro(file: bytes, *inputs: Ints, dtype: str = "int8") -> Ints:
    interpreter = runtime.Interpreter.from_bytes(file, arena_size=1 << 20)
    for i, x in enumerate(inputs):
        interpreter.set_input(x.astype(dtype), i)
    interpreter.invoke()
    return interpreter.get_output(0).astype(np.int64)


def options(kind: Any, **fields: Any) -> Any:
    made = kind()
    for name, value in fields.items():
        assert hasattr(made, name), name
        setattr(made, name, value)
    return made


# -- from a torch module to both sides ----------------------------------------------------------------------------------


class Lowered:
    """A module of one operation, quantized on ``data`` and lowered in R1: its node and what each value's codes stand for."""

    def __init__(self, module: nn.Module, *data: Tensor, weights: str = "int8", activations: str = "int8", **sites: str) -> None:
        q: QModel = rd.quantize(module, weights if list(module.parameters()) else None, activations, data=[Batch(data, {}, None)])
        if sites:  # the second site takes the first one's parameters
            q = replace(q, activations={name: q.activations[sites.get(name, name)] for name in q.activations})
        self.q, self.graph = q, rd.lower(q, "R1")
        self.node = next(n for n in self.graph if n.op not in ("quantize", "dequantize"))

    def value(self, name: str, shape: Sequence[int]) -> Value:
        params = self.q.activations[name.removesuffix(".codes")].params
        assert params is not None
        zero = 0 if params.offset is None else int(params.offset)
        return Value(shape, [float(params.scale)], zero, dtype=self.graph.values[name].dtype)

    def run(self, *codes: Ints) -> Ints:
        constants = [numbers(self.graph, name) for name in self.node.inputs[len(codes) :]]
        return INTEGER[self.node.op](*codes, *constants, **self.node.attrs)

    def weight(self) -> tuple[Ints, list[float], Ints]:
        """(codes, scales, bias)."""
        name = self.node.inputs[1]
        return (
            numbers(self.graph, name),
            self.q.tensors[name].params.scale.flatten().tolist(),
            numbers(self.graph, self.node.inputs[2]),
        )


def draw(*shape: int, seed: int = 0) -> Ints:
    """Every code, evenly."""
    return np.random.default_rng(seed).integers(-128, 128, shape)


def nhwc(x: Ints) -> Ints:
    return x.transpose(0, 2, 3, 1)


def assert_equal(ours: Ints, theirs: Ints) -> None:
    assert ours.shape == theirs.shape
    assert len(np.unique(theirs)) > 8  # alive
    assert np.count_nonzero(ours != theirs) == 0, f"{np.count_nonzero(ours != theirs)} of {ours.size} differ"


@pytest.mark.proves("integer.tflm")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.ReLU6()], ids=["none", "relu", "relu6"])
def test_convolution(seed: int, act: nn.Module | None) -> None:
    torch.manual_seed(seed)
    one = Lowered(nn.Sequential(nn.Conv2d(5, 12, (3, 2), stride=(2, 1)), *([act] if act else [])), 4 * torch.randn(8, 5, 9, 8))
    w, scales, bias = one.weight()
    x = draw(6, 5, 9, 8, seed=seed)
    ours = nhwc(one.run(x))
    fused = {"ReLU": ACTS.RELU, "ReLU6": ACTS.RELU6}.get(type(act).__name__, ACTS.NONE)
    choice = options(S.Conv2DOptionsT, padding=S.Padding.VALID, strideH=2, strideW=1, dilationHFactor=1, dilationWFactor=1,
                     fusedActivationFunction=fused)  # fmt: skip
    source = one.value(one.node.inputs[0], nhwc(x).shape)
    file = file_of(OPS.CONV_2D, 3, choice, [
        source, Value(nhwc(w).shape, scales, data=nhwc(w).astype(np.int8)),
        Value(bias.shape, [source.scale[0] * s for s in scales], data=bias.astype(np.int32)),
    ], one.value(one.node.name, ours.shape))  # fmt: skip
    assert_equal(ours, tflite_micro(file, nhwc(x)))


@pytest.mark.proves("integer.tflm")
@pytest.mark.parametrize("seed", range(3))
def test_convolution_of_sixteen_bits(seed: int) -> None:
    """int16x8: sums and bias of 64 bits, multipliers of 15."""
    torch.manual_seed(seed)
    one = Lowered(nn.Conv2d(5, 12, (3, 2), stride=(2, 1)), 4 * torch.randn(8, 5, 9, 8), activations="int16s")
    w, scales, bias = one.weight()
    x = np.random.default_rng(seed).integers(-32767, 32768, (6, 5, 9, 8))
    ours = nhwc(one.run(x))
    choice = options(S.Conv2DOptionsT, padding=S.Padding.VALID, strideH=2, strideW=1, dilationHFactor=1, dilationWFactor=1)
    source = one.value(one.node.inputs[0], nhwc(x).shape)
    file = file_of(OPS.CONV_2D, 4, choice, [
        source, Value(nhwc(w).shape, scales, data=nhwc(w).astype(np.int8)),
        Value(bias.shape, [source.scale[0] * s for s in scales], data=bias),
    ], one.value(one.node.name, ours.shape))  # fmt: skip
    assert one.node.attrs["wide"]
    theirs = tflite_micro(file, nhwc(x), dtype="int16")
    assert_equal(ours, theirs)


@pytest.mark.proves("integer.tflm")
@pytest.mark.parametrize("seed", range(3))
def test_depthwise_convolution(seed: int) -> None:
    torch.manual_seed(seed)
    one = Lowered(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(8, 8, 7, 7) + 1)
    w, scales, bias = one.weight()
    x = draw(6, 8, 7, 7, seed=seed)
    ours = nhwc(one.run(x))
    choice = options(S.DepthwiseConv2DOptionsT, padding=S.Padding.SAME, strideH=1, strideW=1, depthMultiplier=1,
                     dilationHFactor=1, dilationWFactor=1)  # fmt: skip
    taps = w.transpose(1, 2, 3, 0)
    source = one.value(one.node.inputs[0], nhwc(x).shape)
    file = file_of(OPS.DEPTHWISE_CONV_2D, 3, choice, [
        source, Value(taps.shape, scales, data=taps.astype(np.int8), axis=3),
        Value(bias.shape, [source.scale[0] * s for s in scales], data=bias.astype(np.int32)),
    ], one.value(one.node.name, ours.shape))  # fmt: skip
    assert_equal(ours, tflite_micro(file, nhwc(x)))


@pytest.mark.proves("integer.tflm")
@pytest.mark.parametrize("seed", range(3))
def test_fully_connected(seed: int) -> None:
    torch.manual_seed(seed)
    one = Lowered(nn.Linear(64, 24), torch.randn(64, 64), weights="int8/tensor")
    w, scales, bias = one.weight()
    x = draw(50, 64, seed=seed)
    source = one.value(one.node.inputs[0], x.shape)
    file = file_of(OPS.FULLY_CONNECTED, 4, options(S.FullyConnectedOptionsT), [
        source, Value(w.shape, scales, data=w.astype(np.int8)),
        Value(bias.shape, [source.scale[0] * scales[0]], data=bias.astype(np.int32)),
    ], one.value(one.node.name, (50, 24)))  # fmt: skip
    assert_equal(one.run(x), tflite_micro(file, x))


class Plus(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(a + b)


@pytest.mark.proves("integer.tflm")
@pytest.mark.parametrize("seed", range(3))
def test_addition(seed: int) -> None:
    torch.manual_seed(seed)
    one = Lowered(Plus(), 3 * torch.randn(64, 32), torch.randn(64, 32) + 1)
    a, b = draw(256, 32, seed=seed), draw(256, 32, seed=seed + 10)
    values = [one.value(name, a.shape) for name in one.node.inputs]
    file = file_of(OPS.ADD, 2, options(S.AddOptionsT, fusedActivationFunction=ACTS.RELU), values, one.value(one.node.name, a.shape))
    assert_equal(one.run(a, b), tflite_micro(file, a, b))


class Function(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *xs: Tensor) -> Tensor:
        made: Tensor = self.fn(*xs)
        return made


SIMPLE = {
    "sub": (lambda a, b: torch.relu(a - b), OPS.SUB, 2, {"kind": S.SubOptionsT, "fusedActivationFunction": ACTS.RELU}),
    "mul": (lambda a, b: a * b, OPS.MUL, 2, {"kind": S.MulOptionsT, "fusedActivationFunction": ACTS.NONE}),
    "sigmoid": (torch.sigmoid, OPS.LOGISTIC, 2, {"kind": S.LogSoftmaxOptionsT}),
    "tanh": (torch.tanh, OPS.TANH, 2, {"kind": S.LogSoftmaxOptionsT}),
    "hardswish": (nn.functional.hardswish, OPS.HARD_SWISH, 1, {"kind": S.HardSwishOptionsT}),
}


@pytest.mark.proves("integer.tflm")
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("name", SIMPLE)
def test_pointwise(name: str, spread: float) -> None:
    """SUB and MUL are equal. Tables hold the nearest code; TFLite Micro works LOGISTIC, TANH and HARD_SWISH out in 16 bits, and
    HARD_SWISH is a unit off at 1 of the 256 codes here."""
    torch.manual_seed(0)
    fn, code, version, choice = SIMPLE[name]
    reals = (3 * spread * torch.randn(64, 32), spread * torch.randn(64, 32) + 1)[: 2 if name in ("sub", "mul") else 1]
    one = Lowered(Function(fn), *reals)
    codes = [draw(256, 32, seed=i) for i in range(len(reals))]
    assert one.node.op == (name if name in ("sub", "mul") else "table")
    values = [one.value(operand, (256, 32)) for operand in one.node.inputs[: len(reals)]]
    file = file_of(code, version, options(**choice), values, one.value(one.node.name, (256, 32)))
    ours, theirs = one.run(*codes), tflite_micro(file, *codes)
    if name == "hardswish":
        assert np.abs(ours - theirs).max() <= 1
        assert len(np.unique(codes[0][ours != theirs])) <= 1
    else:
        assert_equal(ours, theirs)


@pytest.mark.proves("integer.tflm")
def test_average_pool() -> None:
    one = Lowered(nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), torch.randn(8, 4, 9, 9), avg_pool="input")
    assert one.node.op == "avg_pool"
    x = draw(20, 4, 9, 9)
    choice = options(S.Pool2DOptionsT, padding=S.Padding.SAME, strideH=2, strideW=2, filterHeight=3, filterWidth=3)
    ours = nhwc(one.run(x))
    value = one.value(one.node.inputs[0], nhwc(x).shape)
    file = file_of(OPS.AVERAGE_POOL_2D, 2, choice, [value], replace(value, shape=ours.shape))
    assert_equal(ours, tflite_micro(file, nhwc(x)))


@pytest.mark.proves("integer.tflm")
@pytest.mark.parametrize("peak", [0.1, 2.0, 12.0, 60.0, 300.0])
@pytest.mark.parametrize("classes", [2, 12, 400])
def test_softmax(peak: float, classes: int) -> None:
    """Logits from nearly equal to far apart; TFLite Micro itself aborts where more than 511 terms are nearly equal."""
    one = Lowered(nn.Softmax(-1), torch.rand(64, classes) * peak)
    assert one.node.attrs["bits"] == 8
    x = draw(200, classes)
    x[:20] = x[:20] // 16 + 100
    x[20:30] = 5
    file = file_of(OPS.SOFTMAX, 2, options(S.SoftmaxOptionsT, beta=1.0), [one.value(one.node.inputs[0], x.shape)],
                   one.value(one.node.name, x.shape))  # fmt: skip
    ours, theirs = one.run(x), tflite_micro(file, x)
    assert np.count_nonzero(ours != theirs) == 0, f"{np.count_nonzero(ours != theirs)} of {ours.size} differ"


@pytest.mark.proves("integer.tflm")
def test_max_pool() -> None:
    one = Lowered(nn.MaxPool2d(2), torch.randn(8, 4, 8, 8))
    x = draw(20, 4, 8, 8)
    choice = options(S.Pool2DOptionsT, padding=S.Padding.VALID, strideH=2, strideW=2, filterHeight=2, filterWidth=2)
    ours = nhwc(one.run(x))
    value = one.value(one.node.inputs[0], nhwc(x).shape)
    file = file_of(OPS.MAX_POOL_2D, 2, choice, [value], replace(value, shape=ours.shape))
    assert_equal(ours, tflite_micro(file, nhwc(x)))
