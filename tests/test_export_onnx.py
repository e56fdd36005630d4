"""ONNX files: every operation and format run by onnxruntime against torch, checked, re-read, under hostile names, large."""

import importlib.util
import json
import os
import re
import resource
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import roundel as rd
from roundel.errors import CheckError, InputError, PlanError
from roundel.exporters.onnx import Written, infer, model, write
from roundel.exporters.onnx.operators import OPERATORS
from roundel.formats.format import Format
from roundel.graph import Graph, GraphModule, Node, Spec
from roundel.graph.ops import OPS
from roundel.network.layer import Activation
from roundel.network.sites import find_sites, find_weights
from roundel.plan import Plan
from roundel.qmodel import QModel
from roundel.runtimes import onnxruntime as runtime
from roundel.solvers.rtn import rtn

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")

Ints = NDArray[np.int64]


def outputs(written: Written, inputs: Iterable[Tensor]) -> list[NDArray[Any]]:
    """All outputs of a written model."""
    names = [i.name for i in onnx.load(written.files[-1], load_external_data=False).graph.input]
    return infer(written.files[-1], {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def run(written: Written, *inputs: Tensor) -> NDArray[Any]:
    """The first output of a written model."""
    return outputs(written, inputs)[0]


def float_side(q: QModel, *inputs: Tensor) -> NDArray[Any]:
    with torch.no_grad():
        answer: NDArray[Any] = q.module(*inputs).numpy()
    return answer


# -- every operation ----------------------------------------------------------------------------------------------------

S4, S3, S2 = ("N", 4, 6, 5), ("N", 6, 8), ("N", 8)
POOL = {"kernel": [3, 2], "stride": [2, 1], "padding": [1, 0, 1, 1]}

#: operation -> (shapes of the operands, of constants by a leading "=", attributes)
EXAMPLES: dict[str, list[tuple[list[Any], dict[str, Any]]]] = {
    "conv": [
        ([S4, "=6,2,3,2", "=6"], {"stride": [2, 1], "padding": [1, 0, 2, 1], "dilation": [1, 2], "groups": 2, "act": "relu"}),
        ([S3, "=4,6,3"], {"stride": [1], "padding": [1, -1], "dilation": [1], "groups": 1, "act": "relu6"}),
    ],
    "conv_transpose": [([S4, "=4,3,3,2", "=3"], {"stride": [2, 1], "padding": [1, 0], "output_padding": [1, 0],
                                                 "dilation": [1, 1]})],
    "linear": [([S2, "=3,8", "=3"], {"act": "relu"}), ([S3, "=3,8", "=3"], {}), ([S3, "=3,8"], {})],
    "embedding": [(["int:N,3", "=9,4"], {})],
    "matmul": [([S3, ("N", 8, 2)], {}), ([S3, S3], {"transpose_b": True})],
    "add": [([S3, S3], {"act": "relu"}), ([S3, "=8"], {})],
    "sub": [([S3, S3], {})], "mul": [([S3, S3], {})], "div": [([S3, "=1,6,8"], {})],
    "maximum": [([S3, S3], {})], "minimum": [([S3, S3], {})], "squared_difference": [([S3, S3], {})],
    "pow": [(["pos:N,6", "=6"], {})],
    "where": [(["bool:N,8", S2, S2], {})],
    "compare": [([S2, S2], {"how": how}) for how in ("eq", "ne", "lt", "le", "gt", "ge")],
    "attention": [([S3, S3, S3], {"scale": 0.3}), ([S3, S3, S3, "=6,6"], {"scale": 0.3, "causal": False}),
                  ([S3, S3, S3], {"scale": 0.3, "causal": True}), ([S3, S3, S3, "bool:N,6,6"], {"scale": 0.3})],
    "leaky_relu": [([S2], {"slope": 0.1})], "prelu": [([S4, "=4"], {}), ([S2, "=1"], {})], "elu": [([S2], {"alpha": 0.7})],
    "hardtanh": [([S2], {"lo": -0.5, "hi": 0.7}), ([S2], {"lo": None, "hi": 0.2})],
    "gelu": [([S2], {"approximate": "none"}), ([S2], {"approximate": "tanh"})],
    "log": [(["pos:N,8"], {})], "sqrt": [(["pos:N,8"], {})], "rsqrt": [(["pos:N,8"], {})],
    "cast": [([S2], {"dtype": "int32"}), (["int:N,3"], {"dtype": "float32"})],
    "batch_norm": [([S4, "=4", "=pos:4", "=4", "=4"], {"eps": 1e-3}), ([S4, "=4", "=pos:4"], {"eps": 1e-3})],
    "layer_norm": [([S3, "=8", "=8"], {"eps": 1e-3}), ([S3], {"eps": 1e-3})],
    "rms_norm": [([S3, "=8"], {"eps": 1e-3}), ([S3], {"eps": None})],
    "group_norm": [([S4, "=4", "=4"], {"groups": 2, "eps": 1e-3}), ([S4], {"groups": 2, "eps": 1e-3})],
    "softmax": [([S3], {"axis": 1})], "log_softmax": [([S3], {"axis": -1})],
    "max_pool": [([S4], POOL), ([S4], {**POOL, "padding": [3, 3, 1, 1]}),
                 ([S3], {"kernel": [2], "stride": [2], "padding": [0, 1]})],
    "avg_pool": [([S4], POOL), ([S4], {**POOL, "count_pad": True}), ([S4], {**POOL, "padding": [3, 3, 1, 1], "count_pad": True}),
                 ([S4], {"kernel": [6, 5], "stride": [6, 5], "padding": [0] * 4})],
    "mean": [([S4], {"axes": [2, 3]}), ([S3], {"axes": [1], "keepdim": True})], "sum": [([S3], {"axes": [-1]})],
    "amax": [([S3], {"axes": [1]})], "argmax": [([S3], {"axis": 1}), ([S3], {"axis": -1, "keepdim": True})],
    "reshape": [([S3], {"shape": [0, -1]})], "transpose": [([S3], {"perm": [0, 2, 1]})],
    "slice": [([S3], {"axis": 1, "start": 1, "stop": None, "step": 2}), ([S3], {"axis": -1, "start": -1, "stop": None, "step": -3}),
              ([S3], {"axis": 2, "start": -5, "stop": -1})],
    "concat": [([S3, ("N", 2, 8)], {"axis": 1})], "split": [([S3], {"sizes": [2, 4], "axis": 1})],
    "pad": [([S4], {"padding": [1, 2, 0, 1], "value": 0.5}), ([S4], {"padding": [1, 2, 2, 1], "mode": "reflect"}),
            ([S4], {"padding": [1, 2, 2, 1], "mode": "replicate"}), ([S4], {"padding": [-1, 2]})],
    "expand": [([("N", 1, 8)], {"shape": [-1, 5, 8]})], "expand_batch": [(["=1,3,8", S2], {})],
    "gather": [([S3, "=int:2"], {"axis": 1})],
    "resize": [([S4], {"size": [9, 10], "mode": "nearest"}), ([S4], {"size": [9, 10], "mode": "bilinear"}),
               ([S4], {"size": [9, 10], "mode": "bilinear", "align_corners": True})],
    "depth_to_space": [([S4], {"block": 2})],
}  # fmt: skip

SIMPLE = [name for name in OPERATORS if name not in EXAMPLES]


def example(op: str, operands: list[Any], attrs: dict[str, Any]) -> tuple[Graph, list[Tensor]]:
    """A graph of one node, and two examples for its inputs."""
    inputs, constants, values, feeds = [], {}, {}, []
    for i, wanted in enumerate(operands):
        text = wanted if isinstance(wanted, str) else ",".join(map(str, wanted))
        kind, _, sizes = text.lstrip("=").rpartition(":")
        shape = tuple("N" if n == "N" else int(n) for n in sizes.split(","))
        concrete = [2 if n == "N" else n for n in shape]
        x = torch.randn(concrete)
        x = {"pos": x.abs() + 0.1, "int": (x.abs() * 2).long(), "bool": x > 0, "": x}[kind]
        if text.startswith("="):
            constants[f"c{i}"] = x
        else:
            inputs.append(f"x{i}")
            feeds.append(x)
            values[f"x{i}"] = Spec(shape, str(x.dtype).removeprefix("torch."))
    names = [f"{'c' if isinstance(w, str) and w.startswith('=') else 'x'}{i}" for i, w in enumerate(operands)]
    outs = tuple(f"y{i}" for i in range(len(attrs.get("sizes", [1])) if op == "split" else 1))
    return Graph(tuple(inputs), outs, (Node(op, tuple(names), outs, attrs),), constants, values), feeds


def bare(graph: Graph, **parts: Any) -> QModel:
    """A model that leaves everything float."""
    return QModel(graph, {}, {}, Plan(()), dict(graph.constants), **parts)


def test_no_operation_is_forgotten() -> None:
    assert not OPS.keys() - OPERATORS.keys()
    assert len(SIMPLE) == 14


@pytest.mark.proves("onnx.operations")
@pytest.mark.parametrize("op", [*EXAMPLES, *SIMPLE])
def test_operation(op: str, tmp_path: Path) -> None:
    """Alone in a float graph, by onnxruntime against torch."""
    for operands, attrs in EXAMPLES.get(op, [([S2], {})]):
        graph, feeds = example(op, operands, attrs)
        found = outputs(write(bare(graph), None, tmp_path / "m.onnx"), feeds)
        with torch.no_grad():
            want = GraphModule(graph)(*feeds)
        for ours, theirs in zip(found, want if isinstance(want, tuple) else (want,), strict=True):
            assert tuple(ours.shape) == tuple(theirs.shape), (op, attrs)
            assert np.allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=2e-6), (op, attrs)


def static(graph: Graph, feeds: list[Tensor]) -> QModel:
    """Every site in int8 over the range of ``feeds``, every weight in int8; `roundel.quantize` wants a layer with a weight."""
    sites, seen = find_sites(graph), dict(graph.constants)
    module = GraphModule(graph)
    module.watch = lambda name, value: seen.update({name: value.detach()})
    module(*feeds)
    fmt, activations = Format.parse("int8", role="activation"), {}
    for name in sites.origin:
        values = torch.cat([seen[member].reshape(-1).float() for member, root in sites.root.items() if root == name])
        low, high = (end.reshape(1, 1) for end in (values.min(), values.max()))
        activations[name] = Activation(fmt, "static", fmt.store(fmt.from_range(low, high)))
    tensors = {name: rtn(graph.constants[name], Format.parse("int8")) for name in find_weights(graph)}
    rest = {name: tensor for name, tensor in graph.constants.items() if name not in tensors}
    return QModel(graph, tensors, activations, Plan(()), rest)


#: Operations whose result or operands are no activations, and one that `Small` has.
DISCRETE = {"compare", "argmax", "cast", "embedding", "pow", "where", "conv_transpose"}


@pytest.mark.proves("onnx.operations")
@pytest.mark.parametrize("style", ["qdq", "qoperator"])
@pytest.mark.parametrize("op", sorted({*EXAMPLES, *SIMPLE} - DISCRETE))
def test_quantized_operation(op: str, style: str, tmp_path: Path) -> None:
    """Alone between int8 sites, weights in int8, by onnxruntime against the float side: every number within one step."""
    for operands, attrs in EXAMPLES.get(op, [([S2], {})]):
        if any(isinstance(wanted, str) and "bool:" in wanted for wanted in operands) or attrs.get("padding") == [3, 3, 1, 1]:
            continue  # a mask is no activation, and a window that lies in the padding has no range
        graph, feeds = example(op, operands, attrs)
        q = static(graph, feeds)
        found = outputs(write(q, None, tmp_path / "m.onnx", style=style), feeds)  # type: ignore[arg-type]
        with torch.no_grad():
            want = q.module(*feeds)
        for name, ours, theirs in zip(graph.outputs, found, want if isinstance(want, tuple) else (want,), strict=True):
            site = q.activations[q.module._root[name]].params  # type: ignore[union-attr, index]
            assert site is not None
            assert site.scale is not None
            steps = np.abs(ours - theirs.detach().numpy()) / float(site.scale)
            assert steps.max() <= 1.001, (op, attrs)
            assert (steps > 0.5).mean() <= 0.05, (op, attrs)


# -- formats ------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Each kind of weighted layer: a convolution, a transposed one, linear layers on three and two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.back = nn.Conv2d(8, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.wide, self.head = nn.Linear(8, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(torch.relu(self.conv(x)))
        x = torch.relu(self.wide(x.mean(3).transpose(1, 2)))
        out: Tensor = self.head(x.mean(1))
        return out


@cache
def captured() -> tuple[GraphModule, Tensor]:
    torch.manual_seed(0)
    net, x = Small().eval(), torch.randn(8, 8, 6, 6)
    return GraphModule(rd.fuse(rd.capture(net, (x,)))).eval(), x


def small(weights: str = "int8", activations: str | None = None) -> tuple[QModel, Tensor]:
    """`Small` quantized, and an input for it."""
    net, x = captured()
    return rd.quantize(net, weights, activations, data=[x]), x


@pytest.mark.proves("onnx.weights")
@pytest.mark.parametrize(
    "text",
    ["int8", "int8/tensor", "int4", "int4/g8", "int4/g7", "uint4/g8~uint4", "uint4/g8~int8", "uint4/g8*fp16-fp16", "uint4/channel",
     "uint4/channel*fp16-fp16", "int3/g8", "int2", "int5", "uint8", "int16", "uint16", "q8_0", "q6_k", "int6/g8*int8/g4*fp16",
     "fp8", "fp8/g8", "fp8_e5m2", "mxfp8", "int8/b4x8", "int8/b4x72", "fp16", "bf16", "fp32"],
)  # fmt: skip
def test_weight_only(text: str, tmp_path: Path) -> None:
    """Codes, scales and zero points as the format stores them; the numbers are those of the packed model."""
    q, x = small(text)
    found, want = run(write(q, None, tmp_path / "m.onnx"), x), float_side(q, x)
    assert np.abs(found - want).max() <= 1e-6 * np.abs(want).max() + 1e-7


def test_a_small_matrix_is_stored_small(tmp_path: Path) -> None:
    """int4/g32 with fp16 scales: 4.5 bits a weight in the file, and the types of opset 21."""
    graph, _ = example("linear", [("N", 512), "=256,512"], {})
    q = rd.quantize(GraphModule(graph), "int4/g32")
    read = onnx.load(write(q, None, tmp_path / "m.onnx").files[-1])
    kinds = {onnx.TensorProto.DataType.Name(t.data_type): list(t.dims) for t in read.graph.initializer}
    assert kinds["INT4"] == [256, 512]
    assert kinds["FLOAT16"] == [256, 16]
    assert (tmp_path / "m.onnx").stat().st_size < 256 * 512 * 4.5 / 8 + 1500
    (blocked,) = [n for n in read.graph.node if n.op_type == "DequantizeLinear"]
    assert {a.name: a.i for a in blocked.attribute} == {"axis": 1, "block_size": 32}


@pytest.mark.proves("onnx.refused")
@pytest.mark.parametrize("text", ["cb16/channel", "nf4/g8", "log4", "mxfp4"])
def test_formats_that_onnx_lacks(text: str, tmp_path: Path) -> None:
    q, x = small(text)
    with pytest.raises(PlanError) as err:
        write(q, None, tmp_path / "m.onnx")
    assert "4 nodes" in str(err.value)
    assert all(f"{name} (" in str(err.value) for name in ("conv", "back", "wide", "head"))
    assert "float_for_unsupported=True" in str(err.value)
    assert not list(tmp_path.iterdir())
    written = write(q, None, tmp_path / "m.onnx", float_for_unsupported=True)
    assert {note.subject for note in written.notes} == set(q.tensors)
    assert np.abs(run(written, x) - float_side(q, x)).max() <= 1e-6


@pytest.mark.proves("onnx.activations")
@pytest.mark.parametrize("style", ["qdq", "qoperator"])
@pytest.mark.parametrize("activations", ["int8", "uint8", "int8s", "int4", "int6", "int16", "fp16", "int8:dynamic"])
def test_activations(activations: str, style: str, tmp_path: Path) -> None:
    """Within a rounding of each layer: at most 1 % of the outputs' size, and far less at 16 bits."""
    q, x = small("int8", activations)
    found, want = run(write(q, None, tmp_path / "m.onnx", style=style), x), float_side(q, x)  # type: ignore[arg-type]
    share = 2e-3 if "16" in activations else 0.13 if activations == "int4" else 0.02
    assert np.abs(found - want).max() <= share * np.abs(want).max()


def test_dynamic_by_token_is_refused(tmp_path: Path) -> None:
    q, _ = small("int8", "int8/token:dynamic")
    with pytest.raises(PlanError, match="DynamicQuantizeLinear is int8/tensor alone"):
        write(q, None, tmp_path / "m.onnx")


# -- the file -----------------------------------------------------------------------------------------------------------

HOSTILE = ["", " ", "a b", "a\nb", 'quote"', "*/ int main", "größe", "日本", "x" * 10_000, "x" * 10_001, "../../etc", "\ud800",
           "a\0b", "conv.codes", "conv.codes_2", "\u202e", "${HOME}"]  # fmt: skip


@pytest.mark.proves("onnx.names")
def test_hostile_names(tmp_path: Path) -> None:
    """A chain of linear layers under hostile names: unique, harmless, noted, and it runs."""
    names = [name for name in HOSTILE if name]
    nodes, constants, last = [], {}, "conv"
    for name in names:
        constants[f"{name}.weight"] = torch.randn(4, 4)
        nodes.append(Node("linear", (last, f"{name}.weight"), (name,)))
        last = name
    graph = Graph(("conv",), (last,), tuple(nodes), constants, {"conv": Spec(("N", 4))})
    q = rd.quantize(GraphModule(graph), "int8", "int8", data=[torch.randn(16, 4)])
    written = write(q, None, tmp_path / "m.onnx")
    read = onnx.load(written.files[-1])
    found = [*(out for node in read.graph.node for out in node.output), *(t.name for t in read.graph.initializer)]
    assert len(set(found)) == len(found)
    assert all(0 < len(name) <= 210 and name.isprintable() and not set(name) & set(" \"'*$\\{}") for name in found)
    assert written.names["größe"] == "größe"
    assert {note.subject for note in written.notes} > {"a\nb", "*/ int main", "x" * 10_000}
    kept = json.loads(next(p.value for p in read.metadata_props if p.key == "roundel.names"))
    assert "a\nb" in kept.values()
    x = torch.randn(5, 4)
    assert np.abs(run(written, x) - float_side(q, x)).max() <= 0.02 * np.abs(float_side(q, x)).max()


def test_dynamic_batch_and_plain_names(tmp_path: Path) -> None:
    q, x = small("int8", "int8")
    written = write(q, None, tmp_path / "m.onnx")
    read = onnx.load(written.files[-1])
    assert [d.dim_param or d.dim_value for d in read.graph.input[0].type.tensor_type.shape.dim] == ["N", 8, 6, 6]
    assert [d.dim_param or d.dim_value for d in read.graph.output[0].type.tensor_type.shape.dim] == ["N", 10]
    assert [i.name for i in read.graph.input] == list(q.structure.inputs)  # type: ignore[union-attr]
    assert [o.name for o in read.graph.output] == list(q.structure.outputs)  # type: ignore[union-attr]
    assert {"conv.weight", "conv.bias", "conv", "wide.weight"} <= {out for node in read.graph.node for out in node.output}
    for count in (1, 3, 8):
        assert run(written, x[:count]).shape == (count, 10)
    ends = {op: sum(n.op_type == op for n in read.graph.node) for op in ("QuantizeLinear", "DequantizeLinear")}
    assert ends["QuantizeLinear"] >= 6
    bias = next(n for n in read.graph.node if n.output[0] == "conv.bias")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in read.graph.initializer}
    assert bias.op_type == "DequantizeLinear"
    assert stored[bias.input[0]].dtype == np.int32
    x_scale = next(n for n in read.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == read.graph.input[0].name).input[1]
    w_scale = next(n for n in read.graph.node if n.output[0] == "conv.weight").input[1]
    assert np.allclose(stored[bias.input[1]], stored[x_scale] * stored[w_scale], rtol=1e-6)


@pytest.mark.parametrize("opset", [21, 22, 23, 24, 25])
def test_opsets(opset: int, tmp_path: Path) -> None:
    q, x = small("int4/g8", "int8")
    found = run(write(q, None, tmp_path / "m.onnx", opset=opset), x)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset
    assert np.abs(found - float_side(q, x)).max() <= 0.02


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    q, _ = small("int4/g8", "int8")
    for name in ("a", "b"):
        write(q, None, tmp_path / name / "m.onnx") if (tmp_path / name).mkdir() is None else None
    assert (tmp_path / "a" / "m.onnx").read_bytes() == (tmp_path / "b" / "m.onnx").read_bytes()
    q.save(tmp_path / "m.safetensors")
    write(rd.load(tmp_path / "m.safetensors"), None, tmp_path / "m.onnx")
    assert (tmp_path / "a" / "m.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


@pytest.mark.proves("onnx.external")
def test_tensors_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, or above the threshold: the same network from two files, which move together."""
    q, x = small("int8", "int8")
    one = write(q, None, tmp_path / "one.onnx")
    assert [file.name for file in one.files] == ["one.onnx"]
    monkeypatch.setattr(model, "EXTERNAL_ABOVE", 1000)
    monkeypatch.setattr(model, "INLINE", 64)
    two = write(q, None, tmp_path / "two.onnx")
    beside, inside = (file.name for file in two.files)
    assert re.fullmatch(r"two\.onnx\.[0-9a-f]{8}\.data", beside)
    assert inside == "two.onnx"
    assert write(q, None, tmp_path / "whole.onnx", external=False).files == (tmp_path / "whole.onnx",)
    read = onnx.load(two.files[-1], load_external_data=False)
    far = [t for t in read.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    places = [{e.key: e.value for e in t.external_data} for t in far]
    assert len(far) >= 4
    assert all(int(p["offset"]) % 4096 == 0 and p["location"] == beside for p in places)
    (tmp_path / "moved").mkdir()
    for file in two.files:
        file.rename(tmp_path / "moved" / file.name)
    moved = Written((tmp_path / "moved" / "two.onnx",), (), {}, {}, {})
    assert np.array_equal(run(moved, x), run(one, x))


@pytest.mark.proves("onnx.checked")
def test_a_file_that_fails_its_check_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = bare(example("relu", [S2], {})[0])
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def unsound(made: Any, node: Node, x: Any, out: Any) -> None:
        made.node("Softmax", x, out, axis=99)

    def unfinite(made: Any, node: Node, x: Any, out: Any) -> None:
        made.node("Log", [made.node("Neg", [made.node("Abs", x, ["a"])], ["b"])], out)

    def unknown(made: Any, node: Node, x: Any, out: Any) -> None:
        made.node("Relu", x, out, domain="org.example")

    def widened(made: Any, node: Node, x: Any, out: Any) -> None:
        made.node("Concat", [*x, *x], out, axis=1)

    for broken in (unsound, unfinite, unknown, widened):
        monkeypatch.setitem(OPERATORS, "relu", broken)
        with pytest.raises(CheckError, match="removed"):
            write(q, None, path)
        assert path.read_bytes() == b"old"
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_data_that_changes_on_its_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, _ = small("int8")
    whole = model.Model.data
    monkeypatch.setattr(model.Model, "data", lambda self: (bytes([chunk[0] ^ 1]) + chunk[1:] for chunk in whole(self)))
    with pytest.raises(CheckError, match="does not read back"):
        write(q, None, tmp_path / "m.onnx", external=True)
    assert not list(tmp_path.iterdir())


def test_what_is_asked_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, _ = small("int8", "int8")
    for asked, match in (({"style": "fancy"}, "qdq and qoperator"), ({"opset": 11}, "21 to 25")):
        with pytest.raises(PlanError, match=match):
            write(q, None, tmp_path / "m.onnx", **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        write(q, None, tmp_path / "no" / "m.onnx")
    with pytest.raises(PlanError, match="only a graph"):
        write(rd.quantize(Small(), "int8"), None, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="no runtime 'tflm'"):
        runtime.dialects("tflm")
    with pytest.raises(InputError, match="'nothing' is no value"):
        runtime.execute(write(q, None, tmp_path / "m.onnx"), {"nothing": np.zeros(1, np.int64)})
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else find(name, *a))
    with pytest.raises(InputError, match=r"pip install -e '\.\[onnx\]'"):
        write(q, None, tmp_path / "m.onnx")
    assert "onnx is not installed" in str(runtime.absent())


@pytest.mark.parametrize("style", ["qdq", "qoperator"])
def test_unsigned_activations(style: str, tmp_path: Path) -> None:
    """Refused with full weights, by name; with weights of 7 bits the numbers of the int8 file, in uint8."""
    wide, x = small("int8", "int8")
    with pytest.raises(PlanError, match=r"(?s)quantize with weights='int7'.*are 4:\n  .*conv.weight \(int8/channel\*fp16\)"):
        write(wide, None, tmp_path / "m.onnx", style=style, signed=False)  # type: ignore[arg-type]
    q, _ = small("int7", "int8")
    signed, unsigned = (write(q, None, tmp_path / f"{way}.onnx", style=style, signed=way) for way in (True, False))  # type: ignore[arg-type]
    assert np.abs(run(signed, x) - run(unsigned, x)).max() <= 1e-6
    kinds = {value.type.tensor_type.elem_type for value in onnx.load(unsigned.files[-1]).graph.value_info}
    assert kinds == {onnx.TensorProto.UINT8}


def test_another_models_integer_graph_is_noticed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(16, 8)
    qs = [rd.quantize(nn.Sequential(nn.Linear(8, 4)), "int8", "int8", data=[x]) for _ in range(2)]
    write(qs[0], rd.lower(qs[0]), tmp_path / "m.onnx")
    with pytest.raises(CheckError, match="was it lowered from this model"):
        write(qs[0], rd.lower(qs[1]), tmp_path / "m.onnx")


@pytest.mark.soak
def test_above_two_gigabytes(tmp_path: Path) -> None:
    """Nine layers of 256 MB of int8: the model is beyond protobuf's limit, is written, checked and run."""
    size, count = 16_384, 9
    nodes, constants, last = [], {}, "x"
    for i in range(count):
        constants[f"l{i}.weight"] = torch.empty(size, size, device="meta")
        nodes.append(Node("linear", (last, f"l{i}.weight"), (f"l{i}",)))
        last = f"l{i}"
    graph = Graph(("x",), (last,), tuple(nodes), constants, {"x": Spec(("N", size))})
    codes = torch.randint(0, 256, (size, size), dtype=torch.uint8)
    one = rd.quantize(GraphModule(example("linear", [("N", 4), "=4,4"], {})[0]), "int8/tensor*fp32").tensors["c1"]
    tensors = {name: replace(one, shape=(size, size), codes=codes) for name in constants}
    q = QModel(graph, tensors, {}, Plan(()), {})
    written = write(q, None, tmp_path / "m.onnx")
    total = sum(os.path.getsize(file) for file in written.files)
    print(f"{total:,} bytes, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    assert total > 2**31
    assert not run(written, torch.zeros(1, size)).any()


@pytest.mark.proves("onnx.sixteen")
@pytest.mark.parametrize("fn", [torch.tanh, nn.functional.gelu, torch.exp], ids=lambda fn: fn.__name__)
def test_functions_of_sixteen_bits_differ_by_the_lines_alone(fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an entry for every code instead of lines between 513, nothing but ties is left of the difference."""
    from roundel.integer.lower import rules

    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fn(x)

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    q = rd.quantize(Call(), None, "int16s", data=[x])
    lines = rd.verify(q, against=["onnxruntime"], data=[x[:16]])["onnxruntime"]
    monkeypatch.setattr(rules, "LINE", 0)
    every = rd.verify(q, against=["onnxruntime"], data=[x[:16]])["onnxruntime"]
    print(fn.__name__, lines.differing, lines.histogram, every.differing, every.histogram, "of", every.total)
    assert lines.differing > 100
    assert every.differing <= 0.003 * every.total
    assert all(abs(off) == 1 for off in every.histogram)
