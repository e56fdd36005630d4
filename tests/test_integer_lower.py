"""Lowering and simulation: real networks against the float side, proofs that bite, refusals that name every node, round trips."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, needs_data
from models import resnet20
from numpy.typing import NDArray
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch, Preprocess, batches, load_data
from roundel.evaluate.scores import FLOOR
from roundel.formats.qtensor import QTensor
from roundel.graph import Graph, GraphModule, Node, Spec
from roundel.graph.build import with_values
from roundel.integer import check_integer, in_dialect
from roundel.integer.check import accumulators
from roundel.integer.ops import INTEGER, numbers
from roundel.integer.simulate import FAST
from roundel.qmodel import QModel

Ints = NDArray[np.int64]


# -- real networks ------------------------------------------------------------------------------------------------------


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) of probabilities, in nats."""
    p, q = (t.double().clamp_min(FLOOR) / t.double().clamp_min(FLOOR).sum(1, keepdim=True) for t in (p, q))
    return float((p * (p / q).log()).sum(1).mean())


def outputs(run: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([torch.as_tensor(run(part)) for part in inputs.split(64)])


@dataclass(frozen=True, eq=False)
class Network:
    """A statically quantized network, its scoring inputs, and what the float module and the float side of int8 say to them."""

    q: QModel
    inputs: Tensor
    real: Tensor
    static: Tensor

    @classmethod
    def of(cls, module: nn.Module, calibrate: list[Tensor], score: Tensor) -> "Network":
        torch.set_num_threads(1)
        q = rd.quantize(module, "int8", "int8", data=calibrate)
        return cls(q, score, outputs(module, score), outputs(q.module, score))


@pytest.fixture(scope="module")
def ds_cnn() -> Network:
    """The 2,200 scoring clips."""
    clips = np.load(DATA / "speech_commands_v2_test" / "shared_mfcc49x10_f16.npz")
    x = torch.from_numpy(clips["x"].astype(np.float32))[..., None]
    return Network.of(rd.read(DATA / "mlperf_kws" / "kws_ref_model_float32.tflite"), [x[::10]], x[np.arange(len(x)) % 10 != 0])


@pytest.fixture(scope="module")
def resnet() -> Network:
    """300 scoring images; a quarter of the calibration images, for time."""
    steps = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    calibrate, score = (
        [batch.args[0] for batch in batches(load_data(f"{DATA / 'cifar10_jpg' / name}", preprocess=steps))]
        for name in ("calib_train_50perclass.zip[::4]", "shared_test_300perclass.zip[::10]")
    )
    return Network.of(resnet20(), calibrate, torch.cat(score))


@needs_data
@pytest.mark.proves("integer.ds-cnn")
@pytest.mark.parametrize("dialect", ["R1", "R2"])
def test_ds_cnn_in_integers(ds_cnn: Network, dialect: str) -> None:
    """All 2,200 clips: at most 1.1 of the divergence that static quantization costs anyway."""
    graph = rd.lower(ds_cnn.q, dialect)
    one = divergence(ds_cnn.real, ds_cnn.static)
    two = divergence(ds_cnn.real, outputs(partial(rd.simulate, graph), ds_cnn.inputs))
    print(f"DS-CNN {dialect}: KLD {two:.5f}, float side {one:.5f}, ratio {two / one:.3f}")
    assert len(ds_cnn.inputs) == 2200
    assert 0.001 < two <= 1.1 * one


@needs_data
@pytest.mark.proves("integer.resnet20")
def test_resnet20_in_integers(resnet: Network) -> None:
    graph = rd.lower(resnet.q)
    assert {node.op for node in graph} >= {"conv", "add", "pad", "slice", "linear"}
    integer = outputs(partial(rd.simulate, graph), resnet.inputs)
    one, two = (divergence(resnet.real.softmax(1), t.softmax(1)) for t in (resnet.static, integer))
    print(f"ResNet-20: KLD {two:.5f}, float side {one:.5f}, ratio {two / one:.3f}")
    assert len(resnet.inputs) == 300
    assert 0.0005 < two <= 1.1 * one


def codes_of(q: QModel, *inputs: Tensor) -> dict[str, Ints]:
    """Value -> its codes, as the float side has them."""
    seen: dict[str, Ints] = {}

    def watch(name: str, value: Tensor) -> None:
        if name not in q.module._root:  # type: ignore[operator]
            return
        params = q.module.activations[q.module._root[name]].params  # type: ignore[union-attr, index]
        seen[name] = np.rint(value.numpy() / float(params.scale)).astype(np.int64) + int(params.offset)

    q.module.watch = watch  # type: ignore[assignment]
    with torch.no_grad():
        q.module(*inputs)
    q.module.watch = None  # type: ignore[assignment]
    return seen


@needs_data
@pytest.mark.proves("integer.one-unit")
@pytest.mark.parametrize("network", ["ds_cnn", "resnet"])
def test_each_operation_is_one_unit_from_the_float_side(network: str, request: pytest.FixtureRequest) -> None:
    """Fed the float side's codes, every operation gives its codes but for a unit here and there, where bias and factor were
    rounded; left to run, small differences spread, and the histogram shows how far."""
    chosen: Network = request.getfixturevalue(network)
    alone, chained = apart(chosen.q, chosen.inputs[:50])
    print(f"{network}: off by, each operation alone {alone}; in a chain {sorted(chained.items())}")
    assert set(alone) <= {-1, 0, 1}
    assert sum(n for off, n in chained.items() if abs(off) > 3) <= 0.01 * chained.total()


def apart(q: QModel, x: Tensor) -> tuple[Counter[int], Counter[int]]:
    """How many codes are how many units from the float side's: each operation fed the float side's codes, and left to run."""
    graph, theirs = rd.lower(q), codes_of(q, x)
    theirs |= {f"{name}.codes": theirs[name] for name in graph.inputs}
    alone, chained = Counter[int](), Counter[int]()
    ours: dict[str, Ints] = {}
    rd.simulate(graph, x, watch=ours.__setitem__)
    for node in graph:
        if node.op not in ("quantize", "dequantize"):
            operands = [theirs[name] if name in theirs else numbers(graph, name) for name in node.inputs]
            off = (INTEGER | FAST)[node.op](*operands, **node.attrs) - theirs[node.name]
            assert np.count_nonzero(off) <= 0.01 * off.size, node.name
            alone.update(off.ravel().tolist())
            chained.update((ours[node.name] - theirs[node.name]).ravel().tolist())
    return alone, chained


@needs_data
@pytest.mark.proves("integer.simulate")
def test_fast_is_the_definition_and_repeats(ds_cnn: Network) -> None:
    graph, x = rd.lower(ds_cnn.q), ds_cnn.inputs[:24]
    codes = rd.simulate(graph, x, codes=True, fast=False)
    assert np.array_equal(codes, rd.simulate(graph, x, codes=True))
    assert np.array_equal(codes, np.concatenate([rd.simulate(graph, part, codes=True) for part in x.split(5)]))
    assert rd.lower(ds_cnn.q).to_json() == graph.to_json()
    assert np.array_equal(rd.simulate(graph, x), ((codes + 128) / 256).astype(np.float32))


@needs_data
@pytest.mark.proves("integer.json")
def test_graph_and_model_come_back_from_their_files(ds_cnn: Network, tmp_path: Any) -> None:
    q, x = ds_cnn.q, ds_cnn.inputs
    graph = rd.lower(q)
    again = Graph.from_json(graph.to_json(), graph.constants)
    assert again.opset == "integer"
    assert again.to_json() == graph.to_json()
    assert np.array_equal(rd.simulate(again, x[:8], codes=True), rd.simulate(graph, x[:8], codes=True))
    q.save(tmp_path / "m.safetensors")
    assert rd.lower(rd.load(tmp_path / "m.safetensors")).to_json() == graph.to_json()
    assert b"opset" not in q.structure.to_json()  # type: ignore[union-attr]


# -- small networks -----------------------------------------------------------------------------------------------------


def graph_of(*nodes: Node, constants: dict[str, Tensor]) -> GraphModule:
    """A real graph from x (N, 4, 6, 6) to the last node, shapes worked out."""
    return GraphModule(with_values(Graph(("x",), nodes[-1].outputs, nodes, constants, {"x": Spec(("N", 4, 6, 6))})))


def conv(w: Tensor, b: Tensor | None = None, act: str | None = None, name: str = "conv") -> tuple[Node, dict[str, Tensor]]:
    attrs = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1, "act": act}
    constants = {f"{name}.weight": w} | ({f"{name}.bias": b} if b is not None else {})
    return Node("conv", ("x", *constants), (name,), attrs), constants


def quantized(module: nn.Module, x: Tensor, weights: str | None = "int8", activations: str = "int8") -> QModel:
    return rd.quantize(module, weights, activations, data=[Batch((x,), {}, None)])


@pytest.mark.proves("integer.widths")
@pytest.mark.parametrize("weights", ["int8", "int8/tensor", "int6", "int4", "int3", "int2"])
@pytest.mark.parametrize("act", [None, "relu", "relu6"])
def test_weights_of_every_width(weights: str, act: str | None) -> None:
    """Narrow grids choose negative scales, which become negative multipliers. The bias is whole in units of the sums, which are
    coarser the fewer bits a weight has: that moves the result by up to half the factor."""
    torch.manual_seed(0)
    node, constants = conv(torch.randn(7, 4, 3, 3), torch.randn(7), act)
    x = torch.randn(32, 4, 6, 6)
    q = quantized(graph_of(node, constants=constants), x, weights)
    graph = rd.lower(q)
    theirs = codes_of(q, x)["conv"]
    off = rd.simulate(graph, x, codes=True) - theirs
    factor = np.abs(numbers(graph, "conv.multiplier")) * np.exp2(numbers(graph, "conv.shift") - 31.0)
    assert np.abs(off).max() <= 1
    assert np.count_nonzero(off) <= (0.01 + factor.mean() / 2) * off.size
    assert len(np.unique(theirs)) > 32
    assert graph.constants["conv.weight"] is q.tensors["conv.weight"].codes
    if weights in ("int4", "int3", "int2"):
        assert (numbers(graph, "conv.multiplier") < 0).any()


@pytest.mark.parametrize("activations", ["int8", "int8s", "uint8", "int6", "int4"])
def test_activations_of_every_width(activations: str) -> None:
    torch.manual_seed(0)
    node, constants = conv(torch.randn(7, 4, 3, 3), torch.randn(7), "relu")
    x = torch.randn(32, 4, 6, 6)
    try:
        q = quantized(graph_of(node, constants=constants), x, "int8", activations)
    except rd.RoundelError as err:
        pytest.fail(str(err))
    graph = rd.lower(q)
    real, ours = q.module(x).detach().numpy(), rd.simulate(graph, x)
    step = graph.nodes[-1].attrs["scale"]
    assert np.abs(real - ours).max() <= 1.01 * step
    assert np.count_nonzero(np.abs(real - ours) > 0.5 * step) <= 0.01 * real.size


class Mixed(nn.Module):
    """What the two networks above do not have: max-pool, mean, concat, transpose, a lone ReLU, ReLU6, an added constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)
        self.place = nn.Parameter(torch.randn(1, 12, 1))
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool1d(self.conv(x), 2)
        x = torch.cat([x, torch.nn.functional.relu6(x)], 1) + self.place
        x = torch.relu(torch.cat([x, x[:, ::3]], 1))[:, :12].transpose(1, 2)
        return torch.softmax(self.linear(x.mean(1)), -1)


def test_the_other_operations() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4, 18)
    q = quantized(Mixed().eval(), x)
    graph, theirs = rd.lower(q), codes_of(q, x)
    assert {node.op for node in graph} >= {"max_pool", "concat", "rescale", "transpose", "sum", "add", "softmax"}
    ours: dict[str, Ints] = {}
    rd.simulate(graph, x, watch=ours.__setitem__)
    for name in theirs.keys() & ours.keys():
        off = ours[name] - theirs[name]
        assert np.abs(off).max() <= 3, name
        assert np.count_nonzero(off) <= 0.1 * off.size, name


def test_a_dead_site_and_a_channel_without_weights() -> None:
    """A ReLU that never fires says 0 whatever comes; an output whose weights are all 0 is its bias."""
    w, b = torch.randn(3, 4, 3, 3), torch.tensor([0.5, -0.25, 1.5])
    w[1] = 0
    node, constants = conv(w, b)
    dead = Node("conv", ("x", "dead.weight", "dead.bias"), ("dead",), {**node.attrs, "act": "relu"})
    total = Node("add", ("conv", "dead"), ("sum",))
    x = torch.randn(16, 4, 6, 6)
    constants |= {"dead.weight": w, "dead.bias": -torch.nn.functional.conv2d(x, w, padding=1).amax((0, 2, 3)) - 0.1}
    q = quantized(graph_of(node, dead, total, constants=constants), x)
    graph = rd.lower(q)
    assert np.abs(rd.simulate(graph, x) - q.module(x).detach().numpy()).max() < 2.1 * graph.nodes[-1].attrs["scale"]
    seen: dict[str, Ints] = {}
    rd.simulate(graph, x.sign() * 9, watch=seen.__setitem__)  # here it would fire
    assert len(np.unique(seen["dead"])) == 1
    assert len(np.unique(seen["conv"][:, 1])) == 1


def test_relu6_ends_at_six_where_its_site_goes_further() -> None:
    node, constants = conv(torch.randn(3, 4, 3, 3), act="relu6")
    x = 10 * torch.randn(16, 4, 6, 6)
    q = quantized(graph_of(node, constants=constants), x)
    q = replace(q, activations={"x": q.activations["x"], "conv": q.activations["x"]})
    graph = rd.lower(q)
    got = rd.simulate(graph, x)
    assert got.min() == 0
    assert abs(got.max() - 6) <= graph.nodes[-1].attrs["scale"] / 2
    assert np.abs(got - q.module(x).detach().numpy()).max() <= 1.01 * graph.nodes[-1].attrs["scale"]


# -- proofs -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("integer.proofs")
def test_proven_ranges_are_reached() -> None:
    """The worst input of each output channel gives the ends of the proof, so it is a bound and no guess."""
    torch.manual_seed(0)
    x = torch.randn(8, 30) + 0.5
    graph = rd.lower(quantized(nn.Linear(30, 5), x))
    node = graph.nodes[1]
    w, bias = (numbers(graph, name) for name in node.inputs[1:3])
    worst = np.where(w > 0, 127, -128) - node.attrs["x_zero"], np.where(w > 0, -128, 127) - node.attrs["x_zero"]
    high, low = (worst[0] * w).sum(1) + np.maximum(bias, 0), (worst[1] * w).sum(1) + np.minimum(bias, 0)
    assert node.attrs["acc"] == [low.min(), high.max()]


@pytest.mark.proves("integer.proofs")
def test_sums_that_may_leave_int32_are_wide() -> None:
    """70,000 products of 127 * 255 do not fit; 60,000 do. Those that do not are summed in 64 bits, and the node says so."""
    for width, fits in ((60_000, True), (70_000, False)):
        x = torch.cat([torch.zeros(1, width), torch.ones(1, width)])
        q = quantized(nn.Linear(width, 1, bias=False), x)
        q.tensors["weight"].codes.fill_(127)
        graph = rd.lower(q, "R1")
        node = graph.nodes[1]
        assert node.attrs["acc"] == [-255 * 127 * width * (node.attrs["x_zero"] == 127), 255 * 127 * width]
        assert node.attrs.get("wide", False) is not fits
        assert node.attrs["rounding"] == ("R1" if fits else "R2")
        assert graph.values["linear.bias"].dtype == ("int32" if fits else "int64")
        got, want = rd.simulate(graph, x), q.module(x).detach().numpy()
        assert np.abs(got - want).max() <= graph.nodes[-1].attrs["scale"]
        check_integer(in_dialect(graph, "R2a"))
        if not fits:
            for attrs, message in (({"rounding": "R1"}, "rescales wide sums by R1"), ({"wide": False}, "past int32")):
                with pytest.raises(rd.CheckError, match=message):
                    check_integer(tampered(graph, "linear", **attrs))


@pytest.fixture(scope="module")
def small() -> Graph:
    torch.manual_seed(0)
    node, constants = conv(torch.randn(3, 4, 3, 3), torch.randn(3), "relu")
    return rd.lower(quantized(graph_of(node, constants=constants), torch.randn(16, 4, 6, 6)))


def tampered(graph: Graph, at: str, **attrs: Any) -> Graph:
    nodes = (Node(n.op, n.inputs, n.outputs, {**n.attrs, **attrs}) if n.name == at else n for n in graph)
    return replace(graph, nodes=tuple(nodes))


def bad_graphs(graph: Graph) -> Iterator[tuple[Graph, str]]:
    yield tampered(graph, "conv", acc=[-5, 5]), r"conv \(conv\) records sums in \[-5, 5\], its weights prove"
    yield tampered(graph, "conv", x_zero=400), "the zero point 400 of 'x.codes' is no int8"
    yield in_dialect(graph, "R4"), r"conv \(conv\) rounds by R4, which is float arithmetic"
    heavy = {**graph.constants, "conv.bias": torch.full((3,), 2**31 - 1, dtype=torch.int32)}
    yield replace(graph, constants=heavy), "its sums reach .* past int32"
    steep = {**graph.constants, "conv.shift": torch.full((3,), 25, dtype=torch.int32)}
    yield replace(graph, constants=steep), "its sums reach .* past int32"
    real = {**graph.constants, "conv.bias": torch.zeros(3)}
    yield replace(graph, constants=real), "conv.bias: a constant of torch.float32"
    yield tampered(graph, "conv", x_zero=1.0), r"conv \(conv\) has the attribute 'x_zero' = 1.0, which is no integer"
    yield tampered(graph, "conv", stride=[1, 1.5]), r"has the attribute 'stride' = \[1, 1.5\]"
    yield replace(graph, values={**graph.values, "conv": Spec(("N",), "int64")}), "conv: values have at most 32 bits"
    yield replace(graph, values={**graph.values, "conv": Spec(("N",), "float16")}), "conv: float16 is no integer type"
    door, layer, out = graph.nodes
    inner = Node("dequantize", ("conv",), ("y",), out.attrs), Node("rescale", ("y",), ("z",), {})
    yield replace(graph, nodes=(door, layer, *inner), outputs=("z",)), r"z \(rescale\) computes with 'y', which is real"
    again = Node("quantize", ("conv",), ("y",), door.attrs)
    yield replace(graph, nodes=(door, layer, again), outputs=("y",)), r"y \(quantize\) is inside the network"
    yield Graph((), (), ()), "holds real operations"


@pytest.mark.proves("integer.proofs")
def test_the_verifier_refuses(small: Graph) -> None:
    check_integer(small)
    assert accumulators(small, small.nodes[0]) is None
    for graph, message in bad_graphs(small):
        with pytest.raises(rd.CheckError, match=message):
            check_integer(graph)


def test_simulation_refuses(small: Graph) -> None:
    x = np.zeros((2, 4, 6, 6), np.float32)
    assert np.array_equal(rd.simulate(small, x), rd.simulate(small, x=torch.from_numpy(x)))
    with pytest.raises(rd.InputError, match="must have shape"):
        rd.simulate(small, x[:, :3])
    with pytest.raises(rd.InputError, match="NaN"):
        rd.simulate(small, x * np.nan)
    with pytest.raises(rd.InputError, match="holds real operations"):
        rd.simulate(Graph((), (), ()))
    with pytest.raises(rd.CheckError, match="leave the proven range"):
        rd.simulate(tampered(small, "conv", acc=[-5, 5]), x + 3)
    with pytest.raises(rd.InputError, match=r"roundel\.simulate runs it"):
        GraphModule(small)
    with pytest.raises(rd.InputError, match="no op set 'complex'"):
        replace(small, opset="complex")


def test_each_operation_may_have_its_dialect() -> None:
    torch.manual_seed(0)
    graph = rd.lower(quantized(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(40, 3)), torch.randn(8, 4, 12)))
    mixed = in_dialect(graph, {"conv": "R1", "linear": "R2a"})
    assert [node.attrs.get("rounding") for node in mixed] == [None, "R1", None, "R2a", None]
    assert [node.attrs.get("rounding") for node in in_dialect(graph, {"linear": "R3"})] == [None, "R2", None, "R3", None]
    for bad, message in (
        ("R9", "no dialect 'R9'"),
        ({"conv": "R9"}, "no dialect 'R9'"),
        ({"gelu": "R1"}, "no integer operation 'gelu'"),
    ):
        with pytest.raises(rd.PlanError, match=message):
            in_dialect(graph, bad)


def test_a_planted_float_operation_is_refused(small: Graph) -> None:
    door, layer, out = small.nodes
    with pytest.raises(rd.InputError, match="operation 'gelu' of 'z' is not one of"):
        replace(small, nodes=(door, layer, Node("gelu", ("conv",), ("z",)), out))


def test_dialects_differ_by_a_unit_here_and_there(small: Graph) -> None:
    x = torch.randn(200, 4, 6, 6)
    two = rd.simulate(small, x, codes=True)
    for dialect in ("R1", "R2a", "R3", "R4"):
        off = np.abs(rd.simulate(in_dialect(small, dialect), x, codes=True) - two)
        assert off.max() <= 1
        assert np.count_nonzero(off) <= 0.01 * off.size


# -- refusals -----------------------------------------------------------------------------------------------------------


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.c(torch.rsqrt(self.b(self.a(x)).abs() + 1)) / x, 1)


@pytest.mark.proves("integer.refused")
def test_every_node_in_the_way_is_named() -> None:
    plan = rd.Plan(tuple(rd.plan.Rule(*rule) for rule in [
        ("*", "int8", "int8"), ("a", "cb16x2", None), ("b", "int4/g16", None), ("c", "float", None),
    ]))  # fmt: skip
    q = rd.quantize(Refused(), plan=plan, data=[torch.randn(64, 32)])
    with pytest.raises(rd.PlanError) as err:
        rd.lower(q)
    text = str(err.value)
    assert text.startswith("5 nodes of this model cannot be lowered to integers:")
    for part in ("a (linear): its weight is cb16x2@", "b (linear): its weight is int4/g16", "c (linear): its weight is float",
                 "div (div): it depends on 'x' too: a table is a function of one value",
                 "log_softmax (log_softmax): there is no integer definition of it yet"):  # fmt: skip
        assert part in text, text


@pytest.mark.proves("integer.refused")
@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        ("int8", None, "site 'input' has no static parameters"),
        ("int8", "int8:dynamic", "site 'input' has no static parameters"),
        ("int8", "nf4", r"site 'input' is nf4/.*activations are integers with one scale"),
        ("uint8", "int8", r"its weight is uint8.*symmetric integers"),
        ("nf4/g16", "int8", r"its weight is nf4/g16.*one scale per tensor or per output"),
        ("int12", "int8", r"its weight is int12.*symmetric integers"),
    ],
)
def test_formats_in_the_way(weights: str, activations: str | None, message: str) -> None:
    q = rd.quantize(nn.Linear(32, 8), weights, activations, data=[torch.randn(64, 32)])
    with pytest.raises(rd.PlanError, match=message):
        rd.lower(q)


def test_arguments_in_the_way() -> None:
    q = rd.quantize(nn.Linear(32, 8), "int8", "int8", data=[torch.randn(64, 32)])
    with pytest.raises(rd.PlanError, match="there are R1, R2, R2a, R3"):
        rd.lower(q, "R9")
    with pytest.raises(rd.PlanError, match="It is float arithmetic: see in_dialect"):
        rd.lower(q, "R4")
    loose: dict[str, QTensor] = {}
    with pytest.raises(rd.PlanError, match="only a graph can be lowered, and this model's structure is External"):
        rd.lower(replace(rd.quantize(nn.Linear(32, 8), "int8"), tensors=loose))
