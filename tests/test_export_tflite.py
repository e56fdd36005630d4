"""Exported .tflite files against TFLite Micro and LiteRT, value by value; refusals that name every node; files that read back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, needs_data
from models import resnet20
from numpy.typing import NDArray
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch, Preprocess, load_data
from roundel.errors import CheckError, InputError, PlanError
from roundel.exporters.tflite import write
from roundel.exporters.tflite.draft import Draft
from roundel.graph import Graph, GraphModule, Node
from roundel.integer import in_dialect
from roundel.integer.ops import INTEGER, numbers
from roundel.qmodel import QModel
from roundel.readers._tflite_file import read_file
from roundel.runtimes import _tflm_child, litert, tflm
from roundel.runtimes._tflite import single

Ints = NDArray[np.int64]
Run = Callable[..., dict[str, Ints]]


# -- both sides of a model ----------------------------------------------------------------------------------------------


def quantized(module: nn.Module, *data: Tensor, weights: str | None = "int8") -> tuple[QModel, Graph]:
    torch.set_num_threads(1)
    q = rd.quantize(module, weights, "int8", data=[Batch(data, {}, None)], ranges="minmax")
    return q, rd.lower(q, "R1")


def simulated(graph: Graph, *inputs: Tensor) -> dict[str, Ints]:
    """Codes of every value, token ids among them."""
    seen: dict[str, Ints] = {}
    rd.simulate(graph, *inputs, codes=True, watch=seen.__setitem__)
    return {name: np.asarray(x) for name, x in zip(graph.inputs, inputs) if not x.is_floating_point()} | {
        name: codes for name, codes in seen.items() if codes.dtype == np.int64
    }


def at_doors(graph: Graph, seen: Mapping[str, Ints]) -> dict[str, Ints]:
    doors = {node.inputs[0]: node.name for node in graph if node.op == "quantize"}
    return {name: seen[doors.get(name, name)] for name in graph.inputs}


def differing(got: Mapping[str, Ints], want: Mapping[str, Ints]) -> dict[str, int]:
    assert all(got[name].shape == want[name].shape for name in got)
    return {name: count for name in got if (count := np.count_nonzero(got[name] != want[name]))}


def assert_tflm_equal(q: QModel, graph: Graph, folder: Path, *inputs: Tensor) -> dict[str, Ints]:
    """TFLite Micro gives the codes of `simulate` for every value of the graph."""
    want = simulated(graph, *inputs)
    got = tflm.run(q, graph, at_doors(graph, want), folder)
    assert set(got) == {name for node in graph if node.op != "dequantize" for name in node.outputs}
    assert differing(got, want) == {}
    return got


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """TFLite Micro without a process of its own, which takes five times as long; tests marked ``child`` have one."""

    def here(*paths: str) -> None:
        try:
            _tflm_child.main(*paths)
        except RuntimeError as err:
            raise CheckError(f"TFLite Micro refuses the exported file: {err}") from err

    if not hasattr(request.function, "child"):
        monkeypatch.setattr(tflm, "_child", here)


def child(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs TFLite Micro as users do."""
    test.child = True  # type: ignore[attr-defined]
    return test


# -- real networks ------------------------------------------------------------------------------------------------------


@cache
def ds_cnn() -> tuple[QModel, Graph, Tensor]:
    clips = str(DATA / "speech_commands_v2_test" / "shared_mfcc49x10_f16.npz")
    shape = Preprocess(shape=(49, 10, 1))
    pick = [list(load_data(f"{clips}[{part}]", preprocess=shape, batch_size=64)) for part in ("0::40", "1::110")]
    model = rd.read(DATA / "mlperf_kws" / "kws_ref_model_float32.tflite")
    q = rd.quantize(model, "int8", "int8", data=pick[0], ranges="minmax")
    return q, rd.lower(q, "R1"), torch.cat([b.args[0] for b in pick[1]])


@cache
def resnet() -> tuple[QModel, Graph, Tensor]:
    steps = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pick = [
        list(load_data(str(DATA / "cifar10_jpg" / name), preprocess=steps, batch_size=16, limit=16))
        for name in ("calib_train_50perclass.zip", "shared_test_300perclass.zip")
    ]
    q = rd.quantize(resnet20(), "int8", "int8", data=pick[0], ranges="minmax")
    return q, rd.lower(q, "R1"), torch.cat([b.args[0] for b in pick[1]])


@needs_data
@pytest.mark.proves("export.tflite.ds-cnn")
@child
def test_ds_cnn_equals_tflite_micro(tmp_path: Path) -> None:
    q, graph, clips = ds_cnn()
    got = assert_tflm_equal(q, graph, tmp_path, clips)
    assert len(np.unique(got["softmax_12"].argmax(1))) > 4  # alive
    file = read_file(tmp_path / "model.tflite")
    assert file.tensors[0].shape == (1, 49, 10, 1)
    layers = ["CONV_2D", *["DEPTHWISE_CONV_2D", "CONV_2D"] * 4]
    assert [op.op for op in file.operators] == [*layers, "DEPTHWISE_CONV_2D", "RESHAPE", "FULLY_CONNECTED", "SOFTMAX"]  # no PAD


@needs_data
@pytest.mark.proves("export.tflite.resnet-20")
def test_resnet20_equals_tflite_micro(tmp_path: Path) -> None:
    q, graph, images = resnet()
    got = assert_tflm_equal(q, graph, tmp_path, images[:8])
    assert len(np.unique(got["linear"].argmax(1))) > 1


@needs_data
@pytest.mark.proves("export.tflite.litert")
@pytest.mark.parametrize("network", [ds_cnn, resnet])
@pytest.mark.parametrize("kernels", litert.KERNELS)
def test_networks_in_litert(kernels: str, network: Callable[[], tuple[QModel, Graph, Tensor]], tmp_path: Path) -> None:
    """The whole batch at once, whose size the file leaves free. XNNPACK shows its outputs alone, and adds on its own."""
    q, graph, inputs = network()
    graph = in_dialect(graph, litert.dialects(kernels))
    want = simulated(graph, inputs[:8])
    got = litert.run(q, graph, at_doors(graph, want), tmp_path, kernels)
    if kernels == "litert":
        (name,) = got
        assert np.abs(got[name] - want[name]).max() <= 1
        assert np.count_nonzero(got[name] != want[name]) <= 0.1 * got[name].size
    else:
        assert len(got) == len(graph.nodes) - 1
        assert differing(got, want) == {}


# -- one operation at a time --------------------------------------------------------------------------------------------


class Of(nn.Module):
    """A function of its inputs as a module."""

    def __init__(self, fn: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.fn, self.parts = fn, nn.ModuleList(parts)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.fn(*self.parts, *xs)


def image(channels: int = 6, height: int = 9, width: int = 8) -> Tensor:
    return 3 * torch.randn(16, channels, height, width) + 0.5


#: name -> (module, inputs)
CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "conv": lambda: (nn.Conv2d(6, 12, (3, 2), stride=(2, 1)), (image(),)),
    "conv-same": lambda: (nn.Conv2d(6, 12, 3, padding=1), (image(),)),
    "conv-relu": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU()), (image(),)),
    "conv-relu6": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU6()), (image(),)),
    "conv-lopsided": lambda: (nn.Conv2d(6, 8, 3, stride=2, padding=1), (image(6, 8, 8),)),
    "conv-dilated": lambda: (nn.Conv2d(6, 8, 3, dilation=2, padding=2), (image(),)),
    "conv-grouped": lambda: (nn.Conv2d(6, 12, 3, groups=3), (image(),)),
    "conv-depthwise": lambda: (nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False), (image(),)),
    "conv-depthwise-2": lambda: (nn.Conv2d(6, 12, 3, groups=6), (image(),)),
    "conv-1d": lambda: (nn.Conv1d(6, 8, 5, padding=2), (torch.randn(16, 6, 20),)),
    "conv-1d-two": lambda: (nn.Sequential(nn.Conv1d(6, 8, 4, stride=2), nn.Conv1d(8, 8, 3, groups=8)), (torch.randn(16, 6, 20),)),
    "linear": lambda: (nn.Linear(20, 10), (torch.randn(64, 20),)),
    "linear-3d": lambda: (nn.Linear(20, 10), (torch.randn(16, 5, 20),)),
    "mlp": lambda: (nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4), nn.Softmax(-1)), (torch.randn(64, 20),)),
    "add": lambda: (Of(torch.add), (3 * torch.randn(64, 12), torch.randn(64, 12) + 1)),
    "sub": lambda: (Of(torch.sub), (3 * torch.randn(64, 12), torch.randn(64, 12) + 1)),
    "mul": lambda: (Of(torch.mul), (3 * torch.randn(64, 12), torch.randn(64, 12) + 1)),
    "gate": lambda: (Of(lambda c, x: x * torch.sigmoid(c(x)), nn.Conv2d(6, 6, 1)), (image(),)),
    "sigmoid": lambda: (nn.Sigmoid(), (3 * torch.randn(64, 12),)),
    "tanh": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.Tanh()), (image(),)),
    "gelu": lambda: (nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 4)), (torch.randn(64, 12),)),
    "hardswish": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.Hardswish()), (image(),)),
    "add-relu": lambda: (Of(lambda a, b: F.relu(a + b)), (image(), image() - 2)),
    "add-row": lambda: (Of(torch.add), (torch.randn(16, 5, 12), torch.randn(16, 1, 12) + 1)),
    "residual": lambda: (Of(lambda a, b, x: x + b(F.relu(a(x))), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)), (image(),)),
    "avg-pool": lambda: (nn.AvgPool2d(2), (image(),)),
    "avg-pool-conv": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.AvgPool2d(3, 2)), (image(),)),
    "global-pool": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), (image(),)),
    "max-pool": lambda: (nn.MaxPool2d(3, 2, padding=1), (image(),)),
    "max-pool-1d": lambda: (nn.MaxPool1d(2), (torch.randn(16, 6, 20),)),
    "mean": lambda: (Of(lambda x: x.mean((2, 3))), (image(),)),
    "mean-keep": lambda: (Of(lambda x: x.mean((2, 3), keepdim=True)), (image(),)),
    "sum": lambda: (Of(lambda x: x.sum(1)), (torch.randn(16, 5, 12),)),
    "relu": lambda: (nn.ReLU(), (torch.randn(64, 12),)),
    "softmax": lambda: (nn.Softmax(-1), (3 * torch.randn(64, 12),)),
    "softmax-channels": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.Softmax(1)), (image(),)),
    "softmax-middle": lambda: (nn.Softmax(1), (3 * torch.randn(16, 5, 12),)),
    "flatten": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(336, 5)), (image(),)),
    "patches": lambda: (
        Of(lambda c, f, x: f(c(x).flatten(2).transpose(1, 2)), nn.Conv2d(6, 8, 2, stride=2), nn.Linear(8, 5)), (image(6, 8, 8),),
    ),
    "unflatten": lambda: (Of(lambda c, x: c(x.reshape(-1, 6, 4, 5)), nn.Conv2d(6, 8, 2)), (torch.randn(16, 120),)),
    "transpose": lambda: (Of(lambda f, x: f(x.transpose(1, 2)), nn.Linear(5, 3)), (torch.randn(16, 5, 12),)),
    "slice": lambda: (Of(lambda c, x: c(x)[:, 1:7:2, 2:], nn.Conv2d(6, 8, 3)), (image(),)),
    "every-second": lambda: (Of(lambda c, x: c(x)[:, :, ::2, ::2], nn.Conv2d(6, 8, 3)), (image(),)),
    "concat": lambda: (Of(lambda a, b, x: torch.cat([a(x), b(x)], 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 1)), (image(),)),
    "pad": lambda: (Of(lambda c, x: F.pad(c(x), (1, 0, 0, 2)), nn.Conv2d(6, 4, 1)), (image(),)),
    "pad-channels": lambda: (Of(lambda c, x: F.pad(c(x), (0, 0, 0, 0, 2, 1)), nn.Conv2d(6, 4, 1)), (image(),)),
    "pad-other": lambda: (Of(lambda c, x: F.pad(c(x), (1, 1, 1, 1), value=0.75), nn.Conv2d(6, 4, 1)), (image(),)),
    "transposed": lambda: (nn.ConvTranspose2d(6, 5, 3, stride=2), (image(),)),
    "transposed-same": lambda: (nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1), (image(),)),
    "transposed-cut": lambda: (nn.Sequential(nn.ConvTranspose2d(6, 8, 3, 2, 1, 1), nn.ReLU()), (image(),)),
    "transposed-odd": lambda: (nn.ConvTranspose2d(6, 5, 5, 2, (2, 1)), (image(),)),
    "transposed-dilated": lambda: (nn.ConvTranspose2d(6, 5, (3, 2), stride=(1, 3), dilation=2, bias=False), (image(),)),
    "transposed-1d": lambda: (nn.ConvTranspose1d(6, 5, 4, stride=2, padding=1), (torch.randn(16, 6, 20),)),
    "nearest": lambda: (nn.Upsample(scale_factor=2), (image(),)),
    "nearest-odd": lambda: (nn.Sequential(nn.Conv2d(6, 4, 3), nn.Upsample(size=(11, 5)), nn.Conv2d(4, 3, 1)), (image(),)),
    "shuffle": lambda: (nn.Sequential(nn.Conv2d(6, 12, 3), nn.PixelShuffle(2)), (image(),)),
    "shuffle-one": lambda: (nn.Sequential(nn.Conv2d(6, 9, 1), nn.PixelShuffle(3)), (image(),)),
    "matmul": lambda: (Of(torch.matmul), (torch.randn(16, 3, 4, 8), torch.randn(16, 3, 8, 5) + 1)),
    "matmul-turned": lambda: (Of(lambda a, b: a @ b.transpose(-1, -2)), (torch.randn(16, 4, 8) - 1, torch.randn(16, 5, 8))),
    "scores": lambda: (Of(lambda a, b, x: a(x) @ b(x).transpose(1, 2), nn.Linear(8, 6), nn.Linear(8, 6)), (torch.randn(16, 5, 8),)),
    "embedding": lambda: (nn.Embedding(50, 8), (torch.randint(0, 50, (16, 7)),)),
    "token-net": lambda: (nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4), nn.ReLU()), (torch.randint(0, 50, (16, 7)),)),
    "gather": lambda: (Of(lambda x: x[:, torch.tensor([3, 0, 3])]), (torch.randn(16, 5, 12),)),
    "gather-channels": lambda: (Of(lambda c, x: c(x)[:, torch.tensor([3, 0, 3])], nn.Conv2d(6, 4, 3)), (image(),)),
    "argmax": lambda: (Of(lambda c, x: c(x).argmax(1), nn.Conv2d(6, 4, 3)), (image(),)),
    "argmax-keep": lambda: (Of(lambda c, x: c(x).argmax(-1, keepdim=True), nn.Conv2d(6, 4, 3)), (image(),)),
    "amax": lambda: (Of(lambda c, x: c(x).amax((2, 3)), nn.Conv2d(6, 4, 3)), (image(),)),
    "amax-channels": lambda: (Of(lambda c, x: c(x).amax(1), nn.Conv2d(6, 4, 3)), (image(),)),
    "prelu": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), slopes(8)), (image(),)),
    "prelu-2d": lambda: (nn.Sequential(nn.Linear(12, 8), slopes(8)), (torch.randn(64, 12),)),
    "leaky": lambda: (nn.Sequential(nn.Conv2d(6, 8, 3), nn.LeakyReLU(0.1)), (image(),)),
    "relu6": lambda: (nn.ReLU6(), (9 * torch.randn(64, 12),)),
    "relu6-one": lambda: (Of(lambda x: F.relu6(x) + x), (torch.randn(64, 12),)),
}  # fmt: skip


def slopes(channels: int) -> nn.PReLU:
    made = nn.PReLU(channels)
    nn.init.uniform_(made.weight, -0.5, 1.5)
    return made


@cache
def captured() -> dict[str, tuple[Graph, tuple[Tensor, ...]]]:
    """The float graph and inputs of every case: all captured side by side, which costs as little as a few, and cut apart."""
    cases = {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        cases[name] = make()
    ends = np.cumsum([0, *(len(inputs) for _, inputs in cases.values())]).tolist()
    spans = list(pairwise(ends))
    beside = Of(lambda *all: tuple(m(*all[len(spans) :][a:b]) for m, (a, b) in zip(all, spans)), *(m for m, _ in cases.values()))
    whole = rd.capture(beside.eval(), tuple(x[:8] for _, inputs in cases.values() for x in inputs))
    assert len(whole.outputs) == len(cases)
    return {
        name: (alone_in(whole, f"parts.{i}", whole.outputs[i], whole.inputs[a:b]), cases[name][1])
        for i, (name, (a, b)) in enumerate(zip(cases, spans))
    }


def alone_in(whole: Graph, stem: str, output: str, inputs: Sequence[str]) -> Graph:
    """What makes ``output``, its values named as if the module called ``stem`` were all there is."""
    makers, needed, nodes = whole.producers(), {output}, []
    for node in reversed(whole.nodes):
        if needed.intersection(node.outputs):
            nodes.append(node)
            needed.update(node.inputs, node.outputs)

    def new(name: str) -> str:
        if name in inputs:
            return "input" if len(inputs) == 1 else f"input_{inputs.index(name)}"
        return makers[name].op if name == stem else name.removeprefix(f"{stem}.")

    named = (Node(n.op, tuple(map(new, n.inputs)), tuple(map(new, n.outputs)), n.attrs) for n in reversed(nodes))
    maps = [{new(name): part[name] for name in part if name in needed} for part in (whole.constants, whole.values)]
    return Graph(tuple(map(new, inputs)), (new(output),), tuple(named), *maps)


@cache
def case(name: str, weights: str = "int8") -> tuple[QModel, Graph, tuple[Tensor, ...]]:
    graph, inputs = captured()[name]
    return *quantized(GraphModule(graph).eval(), *inputs, weights=weights if any_weights(graph) else None), inputs


def any_weights(graph: Graph) -> bool:
    return any(node.op in ("conv", "conv_transpose", "linear", "embedding") for node in graph)


@pytest.mark.proves("export.tflite.ops")
@pytest.mark.parametrize("name", CASES)
def test_operation_equals_tflite_micro(name: str, tmp_path: Path) -> None:
    q, graph, inputs = case(name)
    assert_tflm_equal(q, graph, tmp_path, *map(further, inputs))


def further(x: Tensor) -> Tensor:
    """Past the ends of the ranges too; token ids stay."""
    return 4 * x if x.is_floating_point() else x


def alone(q: QModel, graph: Graph, node: Node, seen: Mapping[str, Ints]) -> tuple[Graph, dict[str, Ints], list[Ints]]:
    """One node's graph, the codes at its doors, and its operands."""
    one = single(q, graph, node)
    doors = dict.fromkeys(name for name in node.inputs if name in seen)
    given = {door: seen[name] for door, name in zip(one.inputs, doors, strict=True)}
    return one, given, [seen[name] if name in seen else numbers(graph, name) for name in node.inputs]


def computed(node: Node, rounding: str, operands: Sequence[Ints]) -> Ints:
    """By the definition; the proven range of its sums is that of R1."""
    a = {**node.attrs, "rounding": rounding, "acc": (-(2**40), 2**40)}
    return INTEGER[node.op](*operands, **{key: value for key, value in a.items() if key in node.attrs})


@pytest.mark.proves("export.tflite.litert")
@pytest.mark.parametrize("name", CASES)
def test_operation_in_litert(name: str, tmp_path: Path) -> None:
    """Each operation on its own, fed with simulated codes: equal in the dialect of its kernels, or by the rule stated here."""
    q, graph, inputs = case(name)
    seen = simulated(graph, *map(further, inputs))
    for node in [n for n in graph if n.op not in ("quantize", "dequantize")]:
        one, given, operands = alone(q, graph, node, seen)
        for kernels in litert.KERNELS:
            rules = litert.dialects(kernels)
            want = computed(node, rules[node.op], operands)
            got = litert.run(q, one, given, tmp_path, kernels)[node.name]
            if kernels == "litert-builtin" and (eights := by_eights(one, tmp_path, want)) is not None:
                want = np.where(eights, want, computed(node, "R1", operands))
            if kernels == "litert":  # XNNPACK's factor has 8 bits where it rescales; elsewhere float32 has one tie in a thousand
                assert np.count_nonzero(got != want) < (0.1 if node.op in ("rescale", "resize") else 0.001) * got.size + 1
                assert np.abs(got - want).max(initial=0) <= 1
            else:
                assert np.count_nonzero(got != want) == 0, f"{node.name} ({node.op}) in {kernels}"


def by_eights(one: Graph, folder: Path, want: Ints) -> NDArray[np.bool_] | None:
    """Where ruy's rounding holds: in the first eights of a depthwise convolution's channels, nowhere in a grouped one."""
    file = read_file(folder / "model.tflite")
    for op in file.operators:
        weight = file.tensors[op.inputs[1]].shape if len(op.inputs) > 2 else ()
        if op.op == "DEPTHWISE_CONV_2D":
            channels = weight[3]
            whole = np.arange(channels) < channels // 8 * 8
            return whole.reshape(1, -1, *[1] * (want.ndim - 2)) if want.ndim > 1 and want.shape[1] == channels else whole[-1:]
        if op.op == "CONV_2D" and weight[3] != file.tensors[op.inputs[0]].shape[3]:
            return np.zeros(1, bool)
    return None


def test_operators_are_the_ones_meant(tmp_path: Path) -> None:
    """No transposes but where the file's layout needs one; SAME where it cuts off what the graph does."""
    want = {
        "transposed": ["TRANSPOSE_CONV"], "transposed-same": ["TRANSPOSE_CONV"], "nearest": ["RESIZE_NEAREST_NEIGHBOR"],
        "transposed-cut": ["TRANSPOSE_CONV", "STRIDED_SLICE"], "matmul-turned": ["BATCH_MATMUL"], "embedding": ["GATHER"],
        "shuffle": ["CONV_2D", "RESHAPE", "TRANSPOSE", "RESHAPE", "DEPTH_TO_SPACE"], "argmax": ["CONV_2D", "ARG_MAX"],
        "shuffle-one": ["CONV_2D", "DEPTH_TO_SPACE"], "amax-channels": ["CONV_2D", "REDUCE_MAX"],
        "gather-channels": ["CONV_2D", "GATHER"], "prelu-2d": ["FULLY_CONNECTED", "CAST", "ADD", "GATHER"],
    }  # fmt: skip
    for name, kinds in want.items():
        q, graph, _ = case(name)
        file = read_file(write(q, graph, tmp_path / "m.tflite").path)
        middle = [op.op for op in file.operators]
        while middle[0] == "TRANSPOSE" and name != "embedding":  # PyTorch's layout at the doors
            middle = middle[1:]
        assert middle[: len(kinds)] == kinds, name
        assert set(middle[len(kinds) :]) <= {"TRANSPOSE"}, name


# -- names, refusals, checks --------------------------------------------------------------------------------------------


def renamed(q: QModel, names: Mapping[str, str]) -> QModel:
    """The same model with values called otherwise, and all that is stored under their names."""

    def new(name: str) -> str:
        stem, dot, rest = name.partition(".")
        return names.get(name, names.get(stem, stem) + dot + rest)

    old = q.structure
    assert isinstance(old, Graph)
    nodes = (Node(n.op, tuple(map(new, n.inputs)), tuple(map(new, n.outputs)), n.attrs) for n in old)
    maps = [
        {new(name): value for name, value in part.items()} for part in (old.constants, old.values, q.tensors, q.activations, q.rest)
    ]
    structure = Graph(tuple(map(new, old.inputs)), tuple(map(new, old.outputs)), tuple(nodes), *maps[:2], old.notes)
    return replace(q, structure=structure, tensors=maps[2], activations=maps[3], rest=maps[4])


@pytest.mark.parametrize(
    "name", ["quote\" ' */", "line\nbreak\0nul", "\u202e\U0001f600", "\ud800", "x" * 10_000, "conv_1.padded", "0.bias"]
)
def test_hostile_names_are_only_names(name: str, tmp_path: Path) -> None:
    q, _, (x,) = case("residual")
    structure = q.structure
    assert isinstance(structure, Graph)
    hostile = renamed(q, {node.name: f"{name}{i}" for i, node in enumerate(structure.nodes)})
    assert_tflm_equal(hostile, rd.lower(hostile, "R1"), tmp_path, x)


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    q, graph, _ = case("residual")
    one, two = (write(q, graph, tmp_path / name).path.read_bytes() for name in ("a", "b"))
    assert one == two
    assert [p.name for p in tmp_path.iterdir()] == ["a", "b"] or len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "global-pool", "relu"])
def test_a_multiplier_that_no_scale_gives_is_refused(name: str, tmp_path: Path) -> None:
    """One unit in one multiplier is enough; the file that is there stays as it is."""
    q, graph, _ = case(name)
    (tmp_path / "m.tflite").write_bytes(b"old")
    node = next(n for n in graph if "rounding" in n.attrs)
    if len(node.inputs) > 4:
        changed = graph.constants[node.inputs[3]].clone()
        changed[-1] += 2**20
        other = replace(graph, constants={**graph.constants, node.inputs[3]: changed})
    else:
        found = node.attrs["multiplier"]
        bad = [*found[:-1], found[-1] + 1] if isinstance(found, list) else found + 2**20
        swap = Node(node.op, node.inputs, node.outputs, {**node.attrs, "multiplier": bad})
        other = replace(graph, nodes=tuple(swap if n is node else n for n in graph))
    with pytest.raises(PlanError, match=rf"^1 nodes of this model cannot be in a .tflite file:\n  {node.name} \({node.op}\): "):
        write(q, other, tmp_path / "m.tflite")
    assert (tmp_path / "m.tflite").read_bytes() == b"old"


def test_every_node_in_the_way_is_named(tmp_path: Path) -> None:
    """A batch that is sliced, a clamp that TFLite does not have: both, at once."""
    q, graph, _ = case("every-second")
    nodes = [
        Node(n.op, n.inputs, n.outputs, {**n.attrs, **({"low": -100} if n.op == "conv" else {"axis": 0})})
        if n.op in ("conv", "slice") else n for n in graph
    ]  # fmt: skip
    with pytest.raises(PlanError) as caught:
        write(q, replace(graph, nodes=tuple(nodes)), tmp_path / "m.tflite")
    text = str(caught.value)
    assert text.startswith("3 nodes of this model cannot be in a .tflite file:")
    assert "parts.0 (conv): its results are clamped to -100 .. 127, which no activation of TFLite does" in text
    assert text.count("(slice)") == 2
    assert not list(tmp_path.iterdir())


def test_codes_that_tflite_does_not_have_are_named(tmp_path: Path) -> None:
    q = rd.quantize(nn.Linear(8, 4), "int8", "uint8", data=[torch.rand(16, 8)])
    with pytest.raises(
        PlanError, match=r"2 values cannot be in a .tflite file:\n  input.codes: its codes are uint8; .* takes int8\n  linear"
    ):
        write(q, rd.lower(q, "R1"), tmp_path / "m.tflite")


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, graph, _ = case("linear")
    right = Draft.file

    def wrong(self: Draft, *args: Any) -> bytes:
        return right(replace(self, tensors=[replace(e, scale=tuple(2 * s for s in e.scale)) for e in self.tensors]), *args)

    monkeypatch.setattr(Draft, "file", wrong)
    with pytest.raises(CheckError, match="tensor 'input' reads back differently"):
        write(q, graph, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_a_file_that_litert_refuses_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, graph, _ = case("conv")
    right = Draft.step
    monkeypatch.setattr(Draft, "step", lambda self, kind, version, *args, **fields: right(self, kind, 99, *args, **fields))
    with pytest.raises(CheckError, match=r"LiteRT refuses it: .*CONV_2D"):
        write(q, graph, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_outputs_may_be_several_and_read_again(tmp_path: Path) -> None:
    """Two outputs, one of which the other is made of; the batch of LiteRT is free."""
    module = Of(lambda c, x: (F.relu(c(x)), c(x).mean((2, 3))), nn.Conv2d(6, 8, 3))
    torch.manual_seed(0)
    x = image()
    q, graph = quantized(module.eval(), x)
    got = assert_tflm_equal(q, graph, tmp_path, x)
    again = litert.run(q, graph, at_doors(graph, simulated(graph, x)), tmp_path, "litert-ref")
    assert differing(again, got) == {}
    with pytest.raises(InputError, match="codes of input 'xs_0' are missing"):
        tflm.run(q, graph, {}, tmp_path)
