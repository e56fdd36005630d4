"""Real networks as ONNX, run by onnxruntime: against the integer simulation code by code, and against the float side."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, needs_data
from models import resnet20
from numpy.typing import NDArray
from torch import Tensor

import roundel as rd
from roundel.data import Preprocess, batches, load_data
from roundel.errors import PlanError
from roundel.exporters.onnx import infer, write
from roundel.exporters.onnx.site import site
from roundel.graph import Graph
from roundel.graph.ops import OPS
from roundel.integer import in_dialect
from roundel.integer.ops import numbers
from roundel.qmodel import QModel
from roundel.runtimes import onnxruntime as runtime

pytest.importorskip("onnx", reason="the package onnx is not installed")
pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")

Ints = NDArray[np.int64]


def divergence(p: Any, q: Any) -> float:
    """Mean KL of the softmax of two outputs, in nats."""
    a, b = (torch.as_tensor(t).double().log_softmax(1) for t in (p, q))
    return float((a.exp() * (a - b)).sum(1).mean())


# -- real networks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Network:
    """A quantized network, its integer graph if it lowers, and inputs to run."""

    q: QModel
    inputs: Tensor

    def simulated(self) -> tuple[Graph, dict[str, Ints]]:
        """The integer graph in R4 and the codes of all its values."""
        graph, seen = in_dialect(rd.lower(self.q), "R4"), {}
        rd.simulate(graph, self.inputs, codes=True, watch=lambda name, codes: seen.update({name: codes}))
        doors = {node.name: node.inputs[0] for node in graph if node.op == "quantize"}
        real = {node.name for node in graph if node.op == "dequantize"}
        return graph, {doors.get(name, name): codes for name, codes in seen.items() if name not in real}


@pytest.fixture(scope="module")
def ds_cnn() -> Network:
    clips = np.load(DATA / "speech_commands_v2_test" / "shared_mfcc49x10_f16.npz")
    x = torch.from_numpy(clips["x"].astype(np.float32))[..., None]
    net = rd.read(DATA / "mlperf_kws" / "kws_ref_model_float32.tflite")
    return Network(rd.quantize(net, "int8", "int8", data=[x[::10]]), x[1::10])


@pytest.fixture(scope="module")
def resnet() -> Network:
    steps = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    calibrate, score = (
        [batch.args[0] for batch in batches(load_data(f"{DATA / 'cifar10_jpg' / name}", preprocess=steps))]
        for name in ("calib_train_50perclass.zip[::4]", "shared_test_300perclass.zip[::50]")
    )
    return Network(rd.quantize(resnet20(), "int8", "int8", data=calibrate), torch.cat(score)[:32])


@pytest.fixture(scope="module")
def kwt() -> Network:
    clips = np.load(DATA / "speech_commands_v2_test" / "shared_kwt98x40_f16.npz")
    x = torch.from_numpy(clips["x"].astype(np.float32))
    net = rd.read(DATA / "kwt1" / "kwt1.tflite", inputs=[214])
    return Network(rd.quantize(net, "int8", "int8", data=[x[::60]]), x[1::50])


def pair(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.proves(f"onnx.{name.replace('_', '-')}"))


@needs_data
@pytest.mark.parametrize("name", [pair("ds_cnn"), pair("resnet")])
@pytest.mark.parametrize("form", ["onnxruntime", "onnxruntime-qdq"])
def test_each_operation_equals_the_simulation(name: str, form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Fed the codes of the simulation in R4, every operation gives those of the next value, but for a few at ties."""
    net: Network = request.getfixturevalue(name)
    graph, codes = net.simulated()
    written = write(net.q, graph, tmp_path / "m.onnx", **runtime.FORMS[form])
    found = runtime.execute(written, codes, apart=True)
    assert found.keys() >= {node.name for node in graph if node.op not in ("quantize", "dequantize")}
    apart = {value: int((codes[value] != made).sum()) for value, made in found.items() if (codes[value] != made).any()}
    total = sum(made.size for made in found.values())
    largest = max(int(np.abs(codes[value] - made).max()) for value, made in found.items())
    print(f"{name} {form}: {sum(apart.values())} of {total:,} codes differ, at most by {largest}: {apart}")
    assert largest <= 1
    assert sum(apart.values()) <= 2e-5 * total
    for value in apart:
        assert explained(net.q, graph, value, codes, found[value]), value


def explained(q: QModel, graph: Graph, value: str, codes: Mapping[str, Ints], made: Ints) -> bool:
    """Whether every code of ``made`` is a rounding of the exact result: it then differs at a tie, to 1/2000."""
    node, root = graph.producers()[value], q.module._root
    source = {door.name: door.inputs[0] for door in graph if door.op == "quantize"}
    ins = [source.get(name, name) for name in node.inputs]
    y, low, high = site(q.activations[root[value]], True), node.attrs["low"], node.attrs["high"]  # type: ignore[index]
    at = [site(q.activations[root[name]], True) for name in ins if name in root]  # type: ignore[index, operator]
    terms = [(codes[name] - here.zero) * float(here.scale) for name, here in zip(ins, at)]
    if node.op == "add":
        real = terms[0] + terms[1]
    elif node.op == "softmax":
        real = torch.from_numpy(terms[0]).softmax(-1).numpy()
    else:
        layer = next(n for n in q.structure if n.name == value)  # type: ignore[union-attr]
        w = q.tensors[layer.inputs[1]].dequantize().double()
        unit = float(at[0].scale) * q.tensors[layer.inputs[1]].params.scale.double().reshape(-1)  # type: ignore[union-attr]
        bias = torch.from_numpy(numbers(graph, node.inputs[2])) * unit
        attrs = {key: n for key, n in layer.attrs.items() if key != "act"}
        real = OPS[node.op](torch.from_numpy(terms[0]), w, bias, **attrs).numpy()
    return bool((np.abs(np.clip(real / float(y.scale) + y.zero, low, high) - made) <= 0.5005).all())


@needs_data
@pytest.mark.proves("onnx.chain")
def test_ds_cnn_from_end_to_end(ds_cnn: Network, tmp_path: Path) -> None:
    """The whole network on 245 clips from codes to codes: in R4, one probability of 2,940 differs by 1/256."""
    graph, codes = ds_cnn.simulated()
    found = runtime.run(ds_cnn.q, graph, {"input_1": codes["input_1"]}, tmp_path)
    assert runtime.dialects() == "R4"
    assert runtime.absent() is None
    assert found.keys() == codes.keys()
    differ = {name: int((found[name] != codes[name]).sum()) for name in codes if (found[name] != codes[name]).any()}
    print(f"DS-CNN, QOperator: {differ} of {sum(c.size for c in codes.values()):,} codes differ")
    assert differ.keys() <= {"softmax_12"}
    assert sum(differ.values()) <= 1


@needs_data
@pytest.mark.proves("onnx.kwt")
def test_transformer_against_the_simulation(kwt: Network, tmp_path: Path) -> None:
    """KWT-1, each operation fed the codes of the simulation: sums as in R4 but at ties; onnxruntime's attention and layer norm are
    float32 and the simulation's are integers, one unit apart in a few of a thousand."""
    graph, codes = kwt.simulated()
    written = write(kwt.q, graph, tmp_path / "m.onnx", style="qoperator")
    found = runtime.execute(written, {name: made for name, made in codes.items() if name in written.codes}, apart=True)
    ops = {node.name: node.op for node in graph}
    apart: dict[str, list[int]] = {}
    for name, made in found.items():
        one = apart.setdefault(ops[name], [0, 0])
        one[0], one[1] = one[0] + int((made != codes[name]).sum()), one[1] + made.size
        assert np.abs(made - codes[name]).max() <= 1, name
    print(f"KWT-1, QOperator: codes that differ, of all: {apart}")
    assert apart.keys() >= {"linear", "add", "attention", "norm", "table"}
    for op, (differ, total) in apart.items():
        assert differ <= (0.005 if op in ("attention", "norm") else 5e-6) * total, op


@needs_data
@pytest.mark.parametrize(
    ("name", "divergent", "flips"),
    [pytest.param("ds_cnn", 1e-3, 0.02), pytest.param("resnet", 3e-3, 0.04), pytest.param("kwt", 3e-3, 0.0)],
)
@pytest.mark.proves("onnx.qdq")
def test_qdq_against_the_float_side(
    name: str, divergent: float, flips: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    net: Network = request.getfixturevalue(name)
    written = write(net.q, None, tmp_path / "m.onnx")
    found = infer(written.files[-1], {net.q.structure.inputs[0]: net.inputs.numpy()})[0]  # type: ignore[union-attr]
    with torch.no_grad():
        want = net.q.module(net.inputs).numpy()
    logits = [np.log(y + 1e-3) if name == "ds_cnn" else y for y in (want, found)]  # its outputs are probabilities
    kl = divergence(*logits)
    turned = float((found.argmax(1) != want.argmax(1)).mean())
    print(f"{name} QDQ, {len(want)} examples: largest difference {np.abs(found - want).max():.3g}, KL {kl:.2e}, flips {turned:.2%}")
    assert kl <= divergent
    assert turned <= flips


# -- unsigned activations -----------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.proves("onnx.u8s8")
def test_unsigned_activations_with_reduced_range(ds_cnn: Network, tmp_path: Path) -> None:
    """DS-CNN with 7-bit weights: every code of the uint8 file is that of the simulation, 128 higher, saturation or not."""
    with pytest.raises(PlanError, match=r"(?s)at most 64.*int7.*conv_0.weight \(int8/channel"):
        write(ds_cnn.q, None, tmp_path / "m.onnx", signed=False)
    net = rd.read(DATA / "mlperf_kws" / "kws_ref_model_float32.tflite")
    reduced = Network(rd.quantize(net, "int7", "int8", data=[ds_cnn.inputs]), ds_cnn.inputs[:64])
    graph, codes = reduced.simulated()
    written = write(reduced.q, graph, tmp_path / "u8.onnx", style="qoperator", signed=False)
    assert set(written.shifts.values()) == {128}
    found = runtime.execute(written, codes, apart=True)
    differ = sum(int((found[name] != codes[name]).sum()) for name in found)
    print(f"DS-CNN u8s8, int7 weights: {differ} of {sum(c.size for c in found.values()):,} codes differ")
    assert differ <= 5
