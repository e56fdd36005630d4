"""One real convolution in numpy integers against TFLite Micro and LiteRT's reference kernels: integer lowering can close.

The layer is the first of Google's int8 DS-CNN (10 x 4 kernel, stride 2, SAME padding, 64 output channels with a scale each,
ReLU) on real clips. The reference below is the whole definition; it shares no code with the package.
"""

from collections.abc import Callable
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as S
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from conftest import DATA, needs_data
from numpy.typing import NDArray
from tflite_micro.python.tflite_micro import runtime

MODEL = DATA / "mlperf_kws" / "kws_ref_model.tflite"
CLIPS = DATA / "speech_commands_v2_test" / "shared_mfcc49x10_f16.npz"

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]
Codes = NDArray[np.int8]
Rule = Callable[[Ints, Ints, Ints], Ints]


# -- the reference ----------------------------------------------------------------------------------------------------


def fixed_point(real: Reals) -> tuple[Ints, Ints]:
    """Positive real multiplier -> (q, s) with real = q * 2^(s - 31) and q in [2^30, 2^31)."""
    mantissa, exponent = np.frexp(real)
    q, s = np.floor(mantissa * 2.0**31 + 0.5).astype(np.int64), exponent.astype(np.int64)
    return np.where(q == 2**31, q // 2, q), np.where(q == 2**31, s + 1, s)


def double_rounding(acc: Ints, q: Ints, s: Ints) -> Ints:
    """gemmlowp's requantization (rule R1): a rounding doubling high multiplication, then a shift with ties away from zero."""
    left, right = np.maximum(s, 0), np.maximum(-s, 0)
    high = ((acc << left) * q + 2**30) >> 31
    remainder, half = high & ((1 << right) - 1), ((1 << right) - 1) >> 1
    return (high >> right) + (remainder > half + (high < 0))


def single_rounding(acc: Ints, q: Ints, s: Ints) -> Ints:
    """Rule R2, one multiply and one shift with ties up; what the test below must be able to tell from R1."""
    return (acc * q + (1 << (30 - s))) >> (31 - s)


def accumulate(x: Ints, w: Ints, bias: Ints, stride: tuple[int, int]) -> Ints:
    """SAME convolution of x (n, h, w, in), zero point already taken off, with w (out, kh, kw, in) -> (n, h', w', out)."""
    kernel = w.shape[1:3]
    pads = []
    for size, k, step in zip(x.shape[1:3], kernel, stride, strict=True):
        total = max((-(-size // step) - 1) * step + k - size, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, [(0, 0), *pads, (0, 0)])  # zero is the zero point here
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(1, 2))[:, :: stride[0], :: stride[1]]
    return np.einsum("nhwiyx,oyxi->nhwo", windows, w) + bias


# -- the layer --------------------------------------------------------------------------------------------------------


class Layer:
    """The first operation of the model: its numbers, and a model file of that operation alone."""

    def __init__(self, path: Path) -> None:
        model = S.ModelT.InitFromObj(S.Model.GetRootAsModel(path.read_bytes(), 0))
        graph = model.subgraphs[0]
        op = graph.operators[0]
        code = model.operatorCodes[op.opcodeIndex]
        assert max(code.builtinCode, code.deprecatedBuiltinCode) == S.BuiltinOperator.CONV_2D
        assert op.builtinOptions.padding == S.Padding.SAME
        assert op.builtinOptions.fusedActivationFunction == S.ActivationFunctionType.RELU
        self.stride = (op.builtinOptions.strideH, op.builtinOptions.strideW)
        x, w, bias = (graph.tensors[i] for i in op.inputs)
        y = graph.tensors[op.outputs[0]]
        self.w = np.frombuffer(bytes(model.buffers[w.buffer].data), np.int8).reshape(w.shape).astype(np.int64)
        self.bias = np.frombuffer(bytes(model.buffers[bias.buffer].data), "<i4").astype(np.int64)
        self.x_scale, self.x_zero = x.quantization.scale[0], int(x.quantization.zeroPoint[0])
        self.y_scale, self.y_zero = y.quantization.scale[0], int(y.quantization.zeroPoint[0])
        self.w_scale = w.quantization.scale
        graph.operators, graph.inputs, graph.outputs, model.signatureDefs = [op], op.inputs[:1], op.outputs, None
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        self.file = bytes(builder.Output())

    def quantize(self, x: NDArray[np.float32]) -> Codes:
        return np.clip(np.rint(x / self.x_scale) + self.x_zero, -128, 127).astype(np.int8)

    def reference(self, codes: Codes, requantize: Rule) -> Codes:
        acc = accumulate(codes.astype(np.int64) - self.x_zero, self.w, self.bias, self.stride)
        real = np.float64(self.x_scale) * self.w_scale.astype(np.float64) / np.float64(self.y_scale)
        y = requantize(acc, *fixed_point(real)) + self.y_zero
        return np.clip(y, max(-128, self.y_zero), 127).astype(np.int8)  # ReLU: nothing under the code of zero


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(MODEL)


@pytest.fixture(scope="module")
def codes(layer: Layer) -> Codes:
    clips = np.load(CLIPS)
    rows = [int(np.flatnonzero(clips["y"] == label)[0]) for label in (0, 2, 5, 9, 11)]
    return layer.quantize(clips["x"][rows].astype(np.float32)[..., None])


def tflite_micro(file: bytes, x: Codes) -> Codes:
    interpreter = runtime.Interpreter.from_bytes(file)
    interpreter.set_input(x, 0)
    interpreter.invoke()
    return interpreter.get_output(0)


def litert_reference(file: bytes, x: Codes) -> Codes:
    interpreter = Interpreter(model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


@needs_data
@pytest.mark.proves("thread.tflm-conv")
@pytest.mark.parametrize("oracle", [tflite_micro, litert_reference])
def test_first_convolution_equals_the_runtime(layer: Layer, codes: Codes, oracle: Callable[..., Codes]) -> None:
    want = np.concatenate([oracle(layer.file, clip[None]) for clip in codes])
    assert want.shape == (5, 25, 5, 64)
    assert len(np.unique(want)) > 64  # a layer that is alive, not one saturated or dead
    assert np.count_nonzero(layer.reference(codes, double_rounding) != want) == 0


@needs_data
def test_the_rounding_rule_shows(layer: Layer, codes: Codes) -> None:
    """The clips reach the values where the rules differ, by one unit, so equality above does name the rule."""
    one, two = (layer.reference(codes, rule).astype(int) for rule in (double_rounding, single_rounding))
    assert np.count_nonzero(one != two) > 0
    assert np.abs(one - two).max() == 1


@pytest.mark.parametrize(
    ("acc", "real", "want"),
    [(3, 0.5, 2), (-3, 0.5, -1), (5, 0.25, 2), (6, 0.25, 2), (-6, 0.25, -2), (-7, 0.25, -2), (100, 1.0, 100), (7, 3.0, 21)],
)
def test_double_rounding_by_hand(acc: int, real: float, want: int) -> None:
    """0.5 is q = 2^30, s = 0: the first step alone rounds, ties up. 0.25 has s = -1: 5 -> 2.5 -> 3 -> 1.5 -> 2, rounded twice."""
    q, s = fixed_point(np.array([real]))
    assert double_rounding(np.array([acc]), q, s)[0] == want
