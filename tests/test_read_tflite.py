"""The .tflite reader against LiteRT: two real models, one small model per operator, and damaged files."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as S
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from conftest import DATA, needs_data

from roundel import InputError
from roundel.graph import Graph, GraphModule
from roundel.readers.tflite import read_tflite

KWS = DATA / "mlperf_kws"
KWT = DATA / "kwt1" / "kwt1.tflite"
SPEECH = DATA / "speech_commands_v2_test"

# -- writing .tflite by hand ------------------------------------------------------------------------------------------

_TYPE = {"float32": "FLOAT32", "float16": "FLOAT16", "int32": "INT32", "int64": "INT64", "int8": "INT8", "bool": "BOOL"}


class Net:
    """A .tflite model, operator by operator; the shapes of computed tensors are asked of LiteRT."""

    def __init__(self) -> None:
        self.graph = S.SubGraphT()
        self.graph.tensors, self.graph.operators, self.graph.inputs, self.graph.outputs = [], [], [], []
        self.buffers, self.codes = [S.BufferT()], []

    def tensor(
        self, shape: tuple[int, ...], dtype: str = "float32", data: bytes | None = None, scale: Any = None, axis: int = 0
    ) -> int:
        made = S.TensorT()
        made.shape, made.type, made.name = list(shape), getattr(S.TensorType, _TYPE[dtype]), f"t{len(self.graph.tensors)}"
        made.buffer = 0
        if data is not None:
            made.buffer = len(self.buffers)
            self.buffers.append(S.BufferT())
            self.buffers[-1].data = np.frombuffer(data, np.uint8)
        if scale is not None:
            made.quantization = S.QuantizationParametersT()
            made.quantization.scale = np.asarray(scale, np.float32).reshape(-1)
            made.quantization.zeroPoint = np.zeros(made.quantization.scale.size, np.int64)
            made.quantization.quantizedDimension = axis
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def input(self, *shape: int, dtype: str = "float32") -> int:
        self.graph.inputs.append(self.tensor(shape, dtype))
        return self.graph.inputs[-1]

    def const(self, values: Any, dtype: str = "float32", **grid: Any) -> int:
        array = np.asarray(values, dtype)
        return self.tensor(array.shape, dtype, array.tobytes(), **grid)

    def op(self, name: str, inputs: list[int], options: Any = None, dtype: str = "float32", outputs: int = 1, **fields: Any) -> int:
        """Returns the first result; others follow it."""
        code = S.OperatorCodeT()
        code.builtinCode = getattr(S.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), fields.pop("version", 1)
        self.codes.append(code)
        made = S.OperatorT()
        made.opcodeIndex, made.inputs = len(self.codes) - 1, inputs
        made.outputs = [self.tensor((), dtype) for _ in range(outputs)]
        if options:
            made.builtinOptionsType = getattr(S.BuiltinOptions, options)
            made.builtinOptions = getattr(S, f"{options}T")()
            for key, value in fields.items():
                assert hasattr(made.builtinOptions, key), key
                setattr(made.builtinOptions, key, value)
        self.graph.operators.append(made)
        self.graph.outputs = list(made.outputs)
        return made.outputs[0]

    def bytes(self, shapes: bool = True) -> bytes:
        if shapes:
            runtime = inspecting(model_content=self.bytes(shapes=False))
            runtime.allocate_tensors()
            for detail in runtime.get_tensor_details():
                if detail["index"] < len(self.graph.tensors):
                    self.graph.tensors[detail["index"]].shape = [int(n) for n in detail["shape"]]
        model = S.ModelT()
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [self.graph], self.buffers, self.codes
        return pack(model)


def pack(model: Any) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def inspecting(**model: Any) -> Interpreter:
    """A runtime whose inner tensors can be read."""
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter(**model, num_threads=1, experimental_preserve_all_tensors=True, experimental_op_resolver_type=plain)


def litert(content: bytes, *inputs: np.ndarray) -> list[np.ndarray]:
    runtime = Interpreter(model_content=content, num_threads=1)
    runtime.allocate_tensors()
    for detail, x in zip(runtime.get_input_details(), inputs, strict=True):
        runtime.set_tensor(detail["index"], x)
    runtime.invoke()
    return [runtime.get_tensor(detail["index"]).copy() for detail in runtime.get_output_details()]


def run(graph: Graph, *inputs: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        made = GraphModule(graph)(*map(torch.from_numpy, inputs))
    return [m.numpy() for m in (made if isinstance(made, tuple) else (made,))]


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph]


# -- DS-CNN -----------------------------------------------------------------------------------------------------------


def features() -> tuple[np.ndarray, np.ndarray]:
    file = np.load(SPEECH / "shared_mfcc49x10_f16.npz")
    return file["x"].astype(np.float32)[..., None], file["y"]


@needs_data
@pytest.mark.proves("read.tflite.ds-cnn")
def test_ds_cnn_gets_2246_of_2445() -> None:
    graph = read_tflite(KWS / "kws_ref_model_float32.tflite")
    x, y = features()
    assert int((run(graph, x)[0].argmax(1) == y).sum()) == 2246


@needs_data
@pytest.mark.proves("read.tflite")
def test_ds_cnn_has_no_transpose_and_speaking_names() -> None:
    graph = read_tflite(KWS / "kws_ref_model_float32.tflite")
    assert ops(graph) == ["reshape", *["conv"] * 9, "avg_pool", "reshape", "linear", "softmax"]
    assert graph.values[graph.inputs[0]].shape == ("N", 49, 10, 1)
    assert graph.nodes[1].inputs == ("conv_0_in", "conv_0.weight", "conv_0.bias")
    assert graph.nodes[1].attrs["padding"] == [1, 1, 4, 5]  # SAME at stride 2: the odd one goes below
    assert graph.constants["conv_1.weight"].shape == (64, 1, 3, 3)


@needs_data
@pytest.mark.proves("inputs.already-quantized")
def test_integer_constants_are_expanded_exactly_and_listed() -> None:
    path = KWS / "kws_ref_model_float32.tflite"
    graph = read_tflite(path)
    stored = S.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    tensor = stored.subgraphs[0].tensors[18]
    codes = stored.buffers[tensor.buffer].data.view(np.int8).reshape(tensor.shape).transpose(0, 3, 1, 2)
    want = codes.astype(np.float32) * np.float32(tensor.quantization.scale[0])
    assert np.array_equal(graph.constants["conv_2.weight"].numpy(), want)
    assert "conv_2.weight (int8 with one scale)" in graph.notes[0]
    assert "conv_1.weight" not in graph.notes[0]


@needs_data
@pytest.mark.proves("read.tflite.ds-cnn")
def test_ds_cnn_equals_litert_on_float_constants(tmp_path: Path) -> None:
    """LiteRT would quantize the activations of the hybrid file, so its constants are rewritten to float32 first."""
    path = KWS / "kws_ref_model_float32.tflite"
    model = S.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    for tensor in model.subgraphs[0].tensors:
        if tensor.type == S.TensorType.INT8:
            codes = model.buffers[tensor.buffer].data.view(np.int8).astype(np.float32)
            model.buffers[tensor.buffer].data = (codes * np.float32(tensor.quantization.scale[0])).view(np.uint8)
            tensor.type, tensor.quantization = S.TensorType.FLOAT32, None
    content = pack(model)
    x = features()[0][::50]
    want = np.concatenate([litert(content, one[None])[0] for one in x])
    np.testing.assert_allclose(run(read_tflite(path), x)[0], want, atol=1e-5)
    (tmp_path / "float.tflite").write_bytes(content)
    again = read_tflite(tmp_path / "float.tflite")
    assert again.notes == ()
    assert all(torch.equal(a, again.constants[name]) for name, a in read_tflite(path).constants.items())


@needs_data
@pytest.mark.proves("inputs.already-quantized")
def test_an_int8_model_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"already quantized: 14 of 14 activations are int8 \(the first is 'input_1'"):
        read_tflite(KWS / "kws_ref_model.tflite")


# -- KWT-1 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kwt() -> Graph:
    return read_tflite(KWT, inputs=[214])


@needs_data
@pytest.mark.proves("read.tflite.kwt1", "read.inputs")
def test_kwt_from_tensor_214_predicts_as_its_float_model(kwt: Graph) -> None:
    file = np.load(SPEECH / "shared_kwt98x40_f16.npz")
    made = run(kwt, file["x"].astype(np.float32))[0].argmax(1)
    assert np.array_equal(made, file["ref_pred"])
    heard = file["y"] != 0
    assert heard.sum() == 330
    assert (made == file["y"])[heard].sum() == 321  # 97.3 %


@needs_data
@pytest.mark.proves("read.tflite.kwt1")
def test_kwt_attention_keeps_no_rearrangement(kwt: Graph) -> None:
    assert kwt.values[kwt.inputs[0]].shape == ("N", 98, 40)
    assert "it takes ['N', 98, 40]" in kwt.notes[0]
    assert ops(kwt).count("matmul") == 24
    assert ops(kwt).count("linear") == 74  # 102 FULLY_CONNECTED, 4 of them before tensor 214, 24 computed
    assert ops(kwt).count("transpose") == 0
    assert ops(kwt).count("expand_batch") == 1
    assert all(spec.shape[0] == "N" for spec in kwt.values.values())


@needs_data
@pytest.mark.proves("read.tflite.kwt1", "read.batch")
def test_kwt_equals_litert_from_tensor_214(kwt: Graph) -> None:
    runtime = inspecting(model_path=str(KWT))
    runtime.allocate_tensors()
    rng, seen, logits = np.random.default_rng(0), [], []
    for _ in range(3):
        runtime.set_tensor(0, rng.normal(0, 0.1, (1, 16000)).astype(np.float32))
        runtime.invoke()
        seen.append(runtime.get_tensor(214).copy())
        logits.append(runtime.get_tensor(808)[0].copy())
    np.testing.assert_allclose(run(kwt, np.stack(seen))[0], np.stack(logits), atol=1e-5)


@needs_data
def test_the_whole_kwt_runs_from_audio() -> None:
    """Its front end needs no operator beyond those supported, so the file reads from its own input too."""
    x = np.random.default_rng(1).normal(0, 0.1, (2, 16000)).astype(np.float32)
    want = np.concatenate([litert(KWT.read_bytes(), one[None])[0] for one in x])
    np.testing.assert_allclose(run(read_tflite(KWT), x)[0], want, atol=1e-3)


@pytest.mark.proves("read.inputs")
@needs_data
def test_inputs_by_name_and_wrong_ones() -> None:
    name = S.ModelT.InitFromPackedBuf(KWT.read_bytes(), 0).subgraphs[0].tensors[214].name.decode()
    assert ops(read_tflite(KWT, inputs=[name])) == ops(read_tflite(KWT, inputs=["214"]))
    with pytest.raises(InputError, match="there is no tensor 5000 to start at; there are indices 0 to 808"):
        read_tflite(KWT, inputs=[5000])
    with pytest.raises(InputError, match=r"the outputs also need tensor 0 .* name it among `inputs` too"):
        read_tflite(KWT, inputs=[230])


# -- one operator at a time -------------------------------------------------------------------------------------------

rng = np.random.default_rng(7)


def weights(*shape: int) -> np.ndarray:
    return rng.normal(0, 0.5, shape).astype(np.float32)


CASES: dict[str, Callable[[Net], object]] = {}


def case(fn: Callable[[Net], object]) -> Callable[[Net], object]:
    CASES[fn.__name__] = fn
    return fn


def add_case(name: str, fn: Callable[[Net], object]) -> None:
    CASES[name] = fn


def conv(net: Net, x: int, out: int = 5, inner: int = 3, k: tuple[int, int] = (3, 3), **options: int) -> int:
    fields = {"strideH": 1, "strideW": 1, **options}
    return net.op("CONV_2D", [x, net.const(weights(out, *k, inner)), net.const(weights(out))], "Conv2DOptions", version=3, **fields)


for same in (0, 1):
    for stride in ((1, 1), (2, 2), (2, 3)):
        for k in ((3, 3), (1, 1), (2, 5)):
            add_case(
                f"conv_{'valid' if same else 'same'}_{stride[0]}{stride[1]}_{k[0]}{k[1]}",
                lambda n, p=same, s=stride, k=k: conv(n, n.input(1, 9, 8, 3), k=k, padding=p, strideH=s[0], strideW=s[1]),
            )
    add_case(
        f"conv_dilated_{same}", lambda n, p=same: conv(n, n.input(1, 9, 8, 3), padding=p, dilationHFactor=2, dilationWFactor=3)
    )
for act in (1, 2, 3):
    add_case(f"conv_fused_{act}", lambda n, a=act: conv(n, n.input(1, 5, 5, 3), fusedActivationFunction=a))
add_case("conv_grouped", lambda n: conv(n, n.input(1, 6, 6, 4), out=6, inner=2))
for multiplier in (1, 3):
    for stride in (1, 2):
        add_case(
            f"depthwise_{multiplier}_{stride}",
            lambda n, m=multiplier, s=stride: n.op(
                "DEPTHWISE_CONV_2D",
                [n.input(1, 8, 7, 4), n.const(weights(1, 3, 3, 4 * m)), n.const(weights(4 * m))],
                "DepthwiseConv2DOptions",
                strideH=s,
                strideW=s,
                depthMultiplier=m,
                fusedActivationFunction=3,
            ),
        )


@case
def three_convs_with_a_residual_and_concat(n: Net) -> None:
    x = conv(n, n.input(1, 6, 6, 3), out=4)
    y = conv(n, x, out=4, inner=4)
    total = n.op("ADD", [x, n.op("RELU", [y])], "AddOptions", version=1)
    both = n.op("CONCATENATION", [total, y, n.const(weights(1, 6, 6, 2))], "ConcatenationOptions", axis=3)
    padded = n.op("PAD", [both, n.const([[0, 0], [1, 0], [0, 2], [0, 0]], "int32")], "PadOptions")
    scaled = n.op("MUL", [padded, n.const(weights(10))], "MulOptions")
    halves = n.op("SPLIT", [n.const(3, "int32"), scaled], "SplitOptions", outputs=2, numSplits=2)
    z = conv(n, halves, out=3, inner=5)
    n.op("MEAN", [z, n.const([1, 2], "int32")], "ReducerOptions", keepDims=False)


@case
def squeeze_and_excite(n: Net) -> None:
    x = conv(n, n.input(1, 6, 6, 3), out=4)
    pooled = n.op("MEAN", [x, n.const([1, 2], "int32")], "ReducerOptions", keepDims=True)
    gate = n.op("LOGISTIC", [conv(n, pooled, out=4, inner=4, k=(1, 1))])
    conv(n, n.op("MUL", [x, gate], "MulOptions"), inner=4)


@case
def flatten_then_linear(n: Net) -> None:
    x = n.op("RESHAPE", [conv(n, n.input(1, 4, 4, 3), out=2), n.const([1, 32], "int32")], "ReshapeOptions")
    n.op("FULLY_CONNECTED", [x, n.const(weights(6, 32)), -1], "FullyConnectedOptions", fusedActivationFunction=1)


@case
def flatten_by_shape_pack(n: Net) -> None:
    x = n.input(1, 4, 4, 3)
    shape = n.op("SHAPE", [x], "ShapeOptions", dtype="int32", outType=S.TensorType.INT32)
    ends = [n.const([i], "int32") for i in (0, 1, 1)]
    first = n.op("STRIDED_SLICE", [shape, *ends], "StridedSliceOptions", dtype="int32", shrinkAxisMask=1)
    target = n.op("PACK", [first, n.const(48, "int32")], "PackOptions", dtype="int32", valuesCount=2)
    n.op("RESHAPE", [x, target], "ReshapeOptions")


@case
def softmax_over_channels_between_convs(n: Net) -> None:
    x = n.op("SOFTMAX", [conv(n, n.input(1, 5, 5, 3))], "SoftmaxOptions", beta=0.7)
    conv(n, x, inner=5)


for same in (0, 1):
    for name in ("AVERAGE_POOL_2D", "MAX_POOL_2D"):
        add_case(
            f"{name.lower()}_{same}",
            lambda n, name=name, p=same: n.op(
                name, [n.input(1, 8, 7, 3)], "Pool2DOptions", filterHeight=3, filterWidth=2, strideH=2, strideW=2, padding=p
            ),
        )
    for k, stride in ((3, 2), (2, 2), (4, 2), (3, 1), (5, 3)):
        out = [(6, 5), (6 * stride, 5 * stride)][1] if same == 0 else ((6 - 1) * stride + k, (5 - 1) * stride + k)
        add_case(
            f"transpose_conv_{same}_{k}_{stride}",
            lambda n, p=same, k=k, s=stride, o=out: n.op(
                "TRANSPOSE_CONV",
                [n.const([1, *o, 4], "int32"), n.const(weights(4, k, k, 3)), n.input(1, 6, 5, 3), n.const(weights(4))],
                "TransposeConvOptions",
                version=3,
                padding=p,
                strideH=s,
                strideW=s,
            ),
        )


@case
def transpose_conv_uneven(n: Net) -> None:
    operands = [n.const([1, 12, 15, 4], "int32"), n.const(weights(4, 5, 3, 3)), n.input(1, 6, 5, 3)]
    n.op("TRANSPOSE_CONV", operands, "TransposeConvOptions", strideH=2, strideW=3)


for keep in (False, True):
    add_case(
        f"linear_nd_{keep}",
        lambda n, keep=keep: n.op(
            "FULLY_CONNECTED",
            [n.input(1, 3, 4, 6), n.const(weights(5, 6)), n.const(weights(5))],
            "FullyConnectedOptions",
            keepNumDims=keep,
        ),
    )


@case
def linear_that_flattens(n: Net) -> None:
    n.op("FULLY_CONNECTED", [n.input(1, 3, 4), n.const(weights(5, 12)), n.const(weights(5))], "FullyConnectedOptions")


@case
def linear_with_float16_weights(n: Net) -> None:
    w = n.op("DEQUANTIZE", [n.const(weights(5, 6), "float16")], "DequantizeOptions", version=3)
    n.op("FULLY_CONNECTED", [n.input(1, 6), w, n.const(weights(5))], "FullyConnectedOptions")


@case
def linear_with_int8_weights_dequantized(n: Net) -> None:
    codes = n.const(rng.integers(-127, 128, (5, 6)), "int8", scale=[0.03])
    n.op(
        "FULLY_CONNECTED", [n.input(1, 6), n.op("DEQUANTIZE", [codes], "DequantizeOptions", version=2), -1], "FullyConnectedOptions"
    )


for flips in ((False, False), (True, False), (False, True)):
    for lead in ((1,), (1, 2), (2,)):
        a = (*lead, 4, 3) if not flips[0] else (*lead, 3, 4)
        b = (*lead, 3, 5) if not flips[1] else (*lead, 5, 3)
        add_case(
            f"batch_matmul_{flips}_{lead}",
            lambda n, a=a, b=b, f=flips: n.op(
                "BATCH_MATMUL", [n.input(*a), n.input(*b)], "BatchMatMulOptions", adjX=f[0], adjY=f[1]
            ),
        )


@case
def batch_matmul_by_a_constant(n: Net) -> None:
    n.op("BATCH_MATMUL", [n.input(1, 4, 3), n.const(weights(3, 5))], "BatchMatMulOptions")


for name, options in {
    "ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions", "DIV": "DivOptions", "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions", "SQUARED_DIFFERENCE": "SquaredDifferenceOptions",
}.items():  # fmt: skip
    add_case(f"{name.lower()}_computed", lambda n, name=name, o=options: n.op(name, [n.input(1, 3, 4), n.input(1, 1, 4)], o))
    add_case(f"{name.lower()}_rank", lambda n, name=name, o=options: n.op(name, [n.input(3, 4), n.input(2, 3, 4)], o))
    add_case(f"{name.lower()}_constant", lambda n, name=name, o=options: n.op(name, [n.const(weights(2, 3, 1)), n.input(1, 4)], o))
for name in [
    "TANH",
    "LOGISTIC",
    "RELU",
    "RELU6",
    "RELU_N1_TO_1",
    "EXP",
    "NEG",
    "ABS",
    "SQUARE",
    "ELU",
    "HARD_SWISH",
    "LOG_SOFTMAX",
]:
    add_case(name.lower(), lambda n, name=name: n.op(name, [n.input(1, 3, 4)]))
for name in ["SQRT", "RSQRT", "LOG"]:
    add_case(name.lower(), lambda n, name=name: n.op(name, [n.op("EXP", [n.input(1, 3, 4)])]))
for approximate in (False, True):
    add_case(f"gelu_{approximate}", lambda n, a=approximate: n.op("GELU", [n.input(1, 3, 4)], "GeluOptions", approximate=a))
add_case("leaky_relu", lambda n: n.op("LEAKY_RELU", [n.input(1, 3, 4)], "LeakyReluOptions", alpha=0.2))
add_case("pow", lambda n: n.op("POW", [n.input(1, 3), n.const(3.0)], "PowOptions"))
add_case("prelu_channels", lambda n: n.op("PRELU", [n.input(1, 4, 4, 3), n.const(weights(1, 1, 3))]))
add_case("prelu_any", lambda n: n.op("PRELU", [n.input(1, 4, 3), n.const(weights(4, 3))]))
for name in ("MEAN", "SUM", "REDUCE_MAX"):
    for axes in ([1, 2], [-1], [0], [0, 2]):
        for keep in (False, True):
            add_case(
                f"{name.lower()}_{axes}_{keep}",
                lambda n, name=name, a=axes, keep=keep: n.op(
                    name, [n.input(1, 3, 4, 5), n.const(a, "int32")], "ReducerOptions", keepDims=keep
                ),
            )
add_case(
    "argmax", lambda n: n.op("ARG_MAX", [n.input(1, 3, 4), n.const(-1, "int32")], "ArgMaxOptions", dtype="int64", outputType=4)
)
add_case(
    "argmax_image",
    lambda n: n.op("ARG_MAX", [conv(n, n.input(1, 5, 5, 3)), n.const(3, "int32")], "ArgMaxOptions", dtype="int32", outputType=2),
)
add_case("reshape_minus_one", lambda n: n.op("RESHAPE", [n.input(1, 4, 6), n.const([-1, 8], "int32")], "ReshapeOptions"))
add_case("reshape_by_option", lambda n: n.op("RESHAPE", [n.input(1, 4, 6)], "ReshapeOptions", newShape=[1, 2, 12]))
for perm in ([0, 2, 1, 3], [2, 0, 1, 3], [0, 3, 1, 2], [3, 2, 1, 0]):
    add_case(
        f"transpose_{perm}", lambda n, p=perm: n.op("TRANSPOSE", [n.input(1, 3, 4, 5), n.const(p, "int32")], "TransposeOptions")
    )
add_case("squeeze", lambda n: n.op("SQUEEZE", [n.input(1, 1, 4, 1)], "SqueezeOptions", squeezeDims=[1, 3]))
add_case("squeeze_all", lambda n: n.op("SQUEEZE", [n.input(1, 1, 4, 1)], "SqueezeOptions"))
add_case("expand_dims", lambda n: n.op("EXPAND_DIMS", [n.input(1, 3, 4), n.const([-1], "int32")], "ExpandDimsOptions"))
for axis in (0, 1, -1):
    shape = (1, 3, 4)
    add_case(
        f"concat_{axis}",
        lambda n, a=axis: n.op("CONCATENATION", [n.input(1, 3, 4), n.const(weights(1, 3, 4))], "ConcatenationOptions", axis=a),
    )
    add_case(f"pack_{axis}", lambda n, a=axis: n.op("PACK", [n.input(1, 3), n.input(1, 3)], "PackOptions", axis=a, valuesCount=2))
    add_case(
        f"gather_{axis}", lambda n, a=axis: n.op("GATHER", [n.input(1, 3, 4), n.const([0, 0], "int32")], "GatherOptions", axis=a)
    )
add_case("gather_table", lambda n: n.op("GATHER", [n.input(1, 3, 4), n.const([[0, 2], [1, 1]], "int32")], "GatherOptions", axis=1))
add_case("gather_rows", lambda n: n.op("GATHER", [n.const(weights(2, 5)), n.input(1, 3, dtype="int32")], "GatherOptions"))
add_case("embedding_lookup", lambda n: n.op("EMBEDDING_LOOKUP", [n.input(3, dtype="int32"), n.const(weights(2, 5))], version=1))
add_case(
    "split_v",
    lambda n: n.op(
        "SPLIT_V",
        [n.input(1, 7, 2), n.const([2, -1, 1], "int32"), n.const(1, "int32")],
        "SplitVOptions",
        outputs=3,
        numSplits=3,
        version=1,
    ),
)
add_case("unpack", lambda n: n.op("UNPACK", [n.input(1, 3, 4)], "UnpackOptions", outputs=3, num=3, axis=1))
add_case(
    "slice", lambda n: n.op("SLICE", [n.input(1, 7, 4), n.const([0, 2, 1], "int32"), n.const([-1, 3, 2], "int32")], "SliceOptions")
)
for name, (begin, end, step, masks) in {
    "plain": ([0, 1, 0], [1, 6, 4], [1, 2, 1], {}),
    "token": ([0, 0, 0], [0, 1, 0], [1, 1, 1], {"beginMask": 5, "endMask": 5, "shrinkAxisMask": 2}),
    "reverse": ([0, -1, 0], [1, -9, 4], [1, -1, 1], {"endMask": 2}),
    "negative": ([0, -3, 0], [1, -1, 4], [1, 1, 1], {}),
    "last": ([0, -1, 0], [1, 0, 4], [1, 1, 1], {"shrinkAxisMask": 2}),
    "ellipsis": ([0, 1], [0, 3], [1, 1], {"ellipsisMask": 1}),
    "new": ([0, 0, 2], [1, 0, 5], [1, 1, 1], {"newAxisMask": 2}),
}.items():
    add_case(
        f"strided_slice_{name}",
        lambda n, b=begin, e=end, s=step, m=masks: n.op(
            "STRIDED_SLICE", [n.input(1, 7, 4), *[n.const(v, "int32") for v in (b, e, s)]], "StridedSliceOptions", **m
        ),
    )
add_case(
    "padv2", lambda n: n.op("PADV2", [n.input(1, 3, 4), n.const([[0, 0], [1, 2], [0, 3]], "int32"), n.const(-2.5)], "PadV2Options")
)
add_case("pad_batch", lambda n: n.op("PAD", [n.input(1, 3), n.const([[1, 0], [0, 1]], "int32")], "PadOptions"))
for mode in (0, 1):
    add_case(
        f"mirror_pad_{mode}",
        lambda n, m=mode: n.op(
            "MIRROR_PAD", [n.input(1, 4, 5, 2), n.const([[0, 0], [2, 1], [1, 3], [0, 0]], "int32")], "MirrorPadOptions", mode=m
        ),
    )
add_case("tile", lambda n: n.op("TILE", [n.input(1, 3, 1), n.const([1, 2, 4], "int32")], "TileOptions"))
add_case(
    "broadcast_to", lambda n: n.op("BROADCAST_TO", [n.input(1, 1, 4), n.const([2, 3, 4], "int32")], "BroadcastToOptions", version=2)
)
add_case("cast", lambda n: n.op("CAST", [n.input(1, 3, dtype="int32")], "CastOptions"))
for name in ["EQUAL", "NOT_EQUAL", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL"]:
    add_case(name.lower(), lambda n, name=name: n.op(name, [n.input(1, 3), n.const([0.0, 0.3, -0.3])], dtype="bool"))


@case
def select(n: Net) -> None:
    x = n.input(1, 3, 4)
    n.op("SELECT_V2", [n.op("GREATER", [x, n.const(0.0)], dtype="bool"), x, n.const(weights(3, 1))], "SelectV2Options")


for corners, half in ((False, False), (True, False), (False, True)):
    if corners or half:
        add_case(
            f"bilinear_{corners}",
            lambda n, c=corners, h=half: n.op(
                "RESIZE_BILINEAR",
                [n.input(1, 4, 5, 2), n.const([7, 9], "int32")],
                "ResizeBilinearOptions",
                version=3,
                alignCorners=c,
                halfPixelCenters=h,
            ),
        )
    add_case(
        f"nearest_{corners}_{half}",
        lambda n, c=corners, h=half: n.op(
            "RESIZE_NEAREST_NEIGHBOR",
            [n.input(1, 4, 5, 2), n.const([7, 12], "int32")],
            "ResizeNearestNeighborOptions",
            version=3,
            alignCorners=c,
            halfPixelCenters=h,
        ),
    )
add_case("depth_to_space", lambda n: n.op("DEPTH_TO_SPACE", [n.input(1, 3, 2, 12)], "DepthToSpaceOptions", blockSize=2))


@pytest.mark.proves("read.tflite", "read.batch")
@pytest.mark.parametrize("name", CASES)
def test_operator_equals_litert_on_a_batch(name: str, tmp_path: Path) -> None:
    net = Net()
    CASES[name](net)
    content = net.bytes()
    path = tmp_path / "one.tflite"
    path.write_bytes(content)
    graph = read_tflite(path)
    draw = np.random.default_rng(3)
    examples = []
    for _ in range(3):
        example = []
        for index in net.graph.inputs:
            shape, integer = net.graph.tensors[index].shape, net.graph.tensors[index].type == S.TensorType.INT32
            example.append(draw.integers(0, 2, shape).astype(np.int32) if integer else draw.normal(0, 1, shape).astype(np.float32))
        examples.append(example)
    want = [litert(content, *example) for example in examples]
    shapes = [graph.values[n].shape for n in graph.inputs]
    assert all(shape[0] == "N" for shape in shapes), graph.notes
    batch = [np.stack(column).reshape(3, *shape[1:]) for column, shape in zip(zip(*examples), shapes)]
    made = run(graph, *batch)
    assert len(made) == len(want[0])
    for i, result in enumerate(made):
        expected = np.stack([w[i] for w in want])
        np.testing.assert_allclose(result.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_a_fused_tanh_becomes_a_node(tmp_path: Path) -> None:
    """The schema defines it and LiteRT's own convolution leaves it out, so the oracle is LiteRT without it, then tanh."""
    fused, plain = Net(), Net()
    state = rng.bit_generator.state
    conv(fused, fused.input(1, 5, 5, 3), fusedActivationFunction=4)
    rng.bit_generator.state = state
    conv(plain, plain.input(1, 5, 5, 3))
    graph = read(tmp_path, fused.bytes())
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(run(graph, x)[0], np.tanh(litert(plain.bytes(), x)[0]), atol=1e-5)
    assert [node.name for node in graph][1:3] == ["conv_0", "conv_0_tanh"]


def read(folder: Path, content: bytes, **how: Any) -> Graph:
    path = folder / "model.tflite"
    path.write_bytes(content)
    return read_tflite(path, **how)


def built(name: str) -> Net:
    net = Net()
    CASES[name](net)
    return net


# -- layout and batch -------------------------------------------------------------------------------------------------


@pytest.mark.proves("read.tflite")
@pytest.mark.parametrize(
    ("name", "transposes", "reshapes"),
    [
        ("three_convs_with_a_residual_and_concat", 1, 0),
        ("squeeze_and_excite", 2, 0),
        ("softmax_over_channels_between_convs", 2, 0),
        ("flatten_then_linear", 2, 1),  # the file's linear counts columns in H, W, C order
        ("flatten_by_shape_pack", 0, 1),
    ],
)
def test_only_the_ends_are_transposed(name: str, transposes: int, reshapes: int, tmp_path: Path) -> None:
    """Image in at N, H, W, C: one transpose; image out: one more; nothing between."""
    found = ops(read(tmp_path, built(name).bytes()))
    assert (found.count("transpose"), found.count("reshape")) == (transposes, reshapes)


def test_a_shared_batch_stays_fixed_where_it_must(tmp_path: Path) -> None:
    """Rows picked by a computed index have no form over a batch: the file's own size is kept, and said."""
    net = Net()
    net.op("GATHER", [net.input(1, 4, 2), net.input(3, dtype="int32")], "GatherOptions", axis=1)
    graph = read(tmp_path, net.bytes())
    assert graph.values[graph.inputs[0]].shape == (1, 4, 2)
    assert graph.notes == (
        "the batch stays at the file's own size: 'gather_0' (gather) has a computed index and no form over a batch",
    )
    x, index = np.arange(8, dtype=np.float32).reshape(1, 4, 2), np.array([3, 0, 3], np.int32)
    np.testing.assert_array_equal(run(graph, x, index)[0], x[:, [3, 0, 3]])


def test_per_channel_codes_are_expanded_along_their_axis(tmp_path: Path) -> None:
    net, codes = Net(), rng.integers(-127, 128, (5, 3, 3, 2)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, 5).astype(np.float32)
    net.op(
        "CONV_2D",
        [net.input(1, 6, 6, 2), net.const(codes, "int8", scale=scale, axis=0), -1],
        "Conv2DOptions",
        strideH=1,
        strideW=1,
        version=3,
    )
    net.graph.tensors[-1].shape = [1, 6, 6, 5]
    graph = read(tmp_path, net.bytes(shapes=False))
    want = codes.astype(np.float32) * scale[:, None, None, None]
    assert np.array_equal(graph.constants["conv_0.weight"].numpy(), want.transpose(0, 3, 1, 2))
    assert graph.notes[0].endswith("conv_0.weight (int8 with 5 scales)")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_every_unsupported_operator_is_named_at_once(tmp_path: Path) -> None:
    net = Net()
    x = net.input(1, 4)
    for name in ("ROUND", "FLOOR", "ROUND"):
        x = net.op(name, [x])
    with pytest.raises(InputError, match=r"not supported: FLOOR \(1\), ROUND \(2\)\. `inputs` can start after them"):
        read(tmp_path, net.bytes())


def test_quantize_nodes_around_activations_are_refused(tmp_path: Path) -> None:
    net = Net()
    x = net.op("QUANTIZE", [net.input(1, 4)], "QuantizeOptions", dtype="int8")
    net.graph.tensors[x].quantization = S.QuantizationParametersT()
    net.graph.tensors[x].quantization.scale, net.graph.tensors[x].quantization.zeroPoint = [0.1], [3]
    net.op("DEQUANTIZE", [x], "DequantizeOptions")
    with pytest.raises(InputError, match=r"already quantized: 1 of 3 activations are int8 \(the first is 't1'\)"):
        read(tmp_path, net.bytes(shapes=False))


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[tflite\]'"):
        read_tflite(tmp_path / "any.tflite")


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """torch imports much on its first shape-only operation; that once-only time is no file's fault."""
    for name in ("three_convs_with_a_residual_and_concat", "tile", "mirror_pad_0", "transpose_conv_0_3_2"):
        read(tmp_path_factory.mktemp("warm"), built(name).bytes())


def refused(folder: Path, content: bytes, seconds: float = 2.0) -> str:
    """The one error that may leave, in time; empty where the file still reads."""
    begin = time.perf_counter()
    try:
        read(folder, content)
        text = ""
    except InputError as err:
        text = str(err)
        assert "\n" not in text
    assert time.perf_counter() - begin < seconds
    return text


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_tflite(tmp_path / "absent.tflite")
    with pytest.raises(InputError, match="cannot be read"):
        read_tflite(tmp_path)
    assert "not a .tflite file" in refused(tmp_path, b"")
    assert "not a .tflite file" in refused(tmp_path, b"PK\3\4" * 9)
    assert "damaged" in refused(tmp_path, b"\xff\xff\xff\xffTFL3")


def rewritten(change: Callable[[Any], None]) -> bytes:
    model = S.ModelT.InitFromPackedBuf(built("linear_nd_False").bytes(), 0)
    change(model)
    return pack(model)


def set_shape(index: int, *shape: int) -> Callable[[Any], None]:
    return lambda model: setattr(model.subgraphs[0].tensors[index], "shape", list(shape))


def set_operands(*operands: int) -> Callable[[Any], None]:
    return lambda model: setattr(model.subgraphs[0].operators[0], "inputs", list(operands))


@pytest.mark.proves("inputs.tflite")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_shape(0, 2**31 - 1, 2**31 - 1), "claims the shape"),
        (set_shape(0, *[1] * 9), "claims 9 axes"),
        (set_shape(1, 2**20, 2**11), "needs 8589934592 bytes; it has 120"),
        (set_shape(0, 1, 5, 5), "cannot take the shape"),
        (set_shape(3, 3, 4), r"makes [12, 5]; the file says [3, 4]"),
        (set_operands(0, 1, 99), "tensor 99 of 4 does not exist"),
        (set_operands(3, 1, 2), "read before any operator makes it"),
        (set_operands(0, -1, 2), "lacks operand 1"),
        (set_operands(0), "lacks operand 1"),
        (lambda m: setattr(m.subgraphs[0].operators[0], "outputs", []), "also need tensor 3"),
        (lambda m: setattr(m.subgraphs[0].operators[0], "opcodeIndex", 7), "has code 7 of 1"),
        (lambda m: setattr(m.subgraphs[0].tensors[1], "buffer", 70), "buffer 70 of"),
        (lambda m: setattr(m.subgraphs[0].tensors[1], "isVariable", True), "a state kept between runs"),
        (lambda m: setattr(m.subgraphs[0].tensors[1], "type", S.TensorType.STRING), "has type STRING"),
        (lambda m: m.subgraphs[0].operators.append(m.subgraphs[0].operators[0]), "is made by operators 0 and 1"),
        (lambda m: setattr(m, "version", 2), "schema version 2"),
        (lambda m: setattr(m, "subgraphs", []), "no subgraph"),
    ],
)
def test_a_file_that_lies_is_refused(change: Callable[[Any], None], text: str, tmp_path: Path) -> None:
    assert text in refused(tmp_path, rewritten(change))


@pytest.mark.proves("inputs.tflite")
def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """Constants that broadcast to gigabytes, and slices of a huge input by a list of a billion places."""
    net = Net()
    big = net.op("BROADCAST_TO", [net.const([[1.0]]), net.const([2**15, 2**15], "int32")], "BroadcastToOptions")
    net.op("ADD", [net.input(1, 1), big], "AddOptions")
    assert "far more memory" in refused(tmp_path, net.bytes(shapes=False))
    net = Net()
    ends = [net.const([v], "int32") for v in (-1, -(2**30) - 1, -1)]
    net.op("STRIDED_SLICE", [net.input(2**30), *ends], "StridedSliceOptions")
    assert "the slice" in refused(tmp_path, net.bytes(shapes=False))
    net = Net()
    net.op("TILE", [net.input(1, 2**20), net.const([1, 2**12], "int32")], "TileOptions")
    assert "more than 2147483648 elements" in refused(tmp_path, net.bytes(shapes=False))


@pytest.mark.proves("inputs.tflite")
def test_claimed_counts_are_held_against_the_size(tmp_path: Path) -> None:
    content = bytearray(built("linear_nd_False").bytes())
    graph = S.Model.GetRootAs(content, 0).Subgraphs(0)
    at = graph._tab.Vector(graph._tab.Offset(10)) - 4  # the length of the operator vector
    content[at : at + 4] = (2**31 - 1).to_bytes(4, "little")
    assert "claims 2147483647 operators; at most" in refused(tmp_path, bytes(content))
    net = Net()
    net.op("MIRROR_PAD", [net.input(1, 2**30), net.const([[0, 0], [1, 1]], "int32")], "MirrorPadOptions")
    assert "far more memory" in refused(tmp_path, net.bytes(shapes=False))


@pytest.mark.proves("inputs.fuzz")
def test_300_damaged_files_give_one_error_in_time(tmp_path: Path) -> None:
    """Flipped bytes, sizes overwritten by extremes, cut ends: nothing but `InputError` leaves, none takes two seconds."""
    draw = np.random.default_rng(11)
    whole = [
        built(name).bytes() for name in ("three_convs_with_a_residual_and_concat", "flatten_by_shape_pack", "transpose_conv_0_3_2")
    ]
    extremes = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**16, 4]
    texts = []
    for turn in range(300):
        content = bytearray(whole[turn % len(whole)])
        if turn % 10 == 0:
            del content[int(draw.integers(8, len(content))) :]
        for _ in range(int(draw.integers(1, 6))):
            at = int(draw.integers(8, len(content) - 3)) if len(content) > 12 else 8
            if draw.random() < 0.5:
                content[at : at + 1] = bytes([int(draw.integers(256))])
            else:
                content[at // 4 * 4 : at // 4 * 4 + 4] = int(draw.choice(extremes)).to_bytes(4, "little")
        texts.append(refused(tmp_path, bytes(content)))
    assert sum(map(bool, texts)) > 150  # most damage is noticed; the rest hit a weight or a name
