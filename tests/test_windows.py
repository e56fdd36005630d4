"""Windows of a graph: where it can be cut, that its parts are the whole, and what each may train."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conftest import DATA, needs_data
from models import SmallCNN, TransformerBlock, resnet20, settle
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.errors import InputError, PlanError
from roundel.graph import Graph, GraphModule, Node
from roundel.graph.module import Interpreter
from roundel.network.layer import WEIGHTED, PackedWeight
from roundel.tune.reconstruct import _State
from roundel.tune.windows import Kind, Window, advance, cuts, entries, joined, needed, windows


class Twice(nn.Module):
    """(N, 6) -> (N, 6): one layer that runs twice, in blocks of its own, and an input that is read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return self.c(torch.relu(self.a(y))) + x


class Over(nn.Module):
    """(N, 6) -> (N, 6): a skip from before the first layer, over everything."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        start = torch.tanh(x)
        return torch.tanh(self.layers(start) + start)


NETS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "cnn": (settle(SmallCNN()), (8, 3, 16, 16)),
    "transformer": (settle(TransformerBlock()), (8, 7, 16)),
    "twice": (Twice().eval(), (8, 6)),
    "over": (Over().eval(), (8, 6)),
}
KINDS: tuple[Kind, ...] = ("layer", "block", "model")


@cache
def fused(name: str) -> tuple[Graph, Tensor]:
    torch.manual_seed(5)
    net, shape = NETS[name]
    x = torch.randn(shape)
    return rd.fuse(rd.capture(net, (x,))), x


@cache
def quantized(name: str, activations: str | None) -> tuple[rd.QModel, Tensor]:
    graph, x = fused(name)
    return rd.quantize(GraphModule(graph).eval(), "int4", activations, data=[x]), x


def ops(part: Window) -> list[str]:
    return [node.op for node in part.graph]


def run_through(parts: list[Window], modules: list[Interpreter], values: list[dict[str, Tensor]], keep: list[set[str]]) -> Tensor:
    for module, names in zip(modules, keep, strict=True):
        values = advance(module, values, names)
    assert len(parts) == len(modules)
    assert all(len(env) == 1 for env in values)  # nothing but the answer is left
    return torch.cat([next(iter(env.values())) for env in values])


# -- cuts -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("tune.windows")
def test_a_cut_is_a_value_that_carries_everything() -> None:
    nodes = (
        Node("relu", ("x",), ("a",)),
        Node("tanh", ("a",), ("b",)),
        Node("relu", ("b",), ("c",)),  # b is alive beside c
        Node("add", ("b", "c"), ("d",)),
        Node("add", ("d", "k"), ("e",)),  # a constant carries nothing
        Node("add", ("e", "x"), ("f",)),  # nor does an input
    )
    graph = Graph(("x",), ("f",), nodes, {"k": torch.ones(())})
    assert cuts(graph) == ["a", "b", "d", "e", "f"]
    early = Graph(("x",), ("b", "f"), nodes, {"k": torch.ones(())})  # b leaves the network, so it is always there
    assert cuts(early) == ["a", "b"]


@pytest.mark.proves("tune.windows")
def test_cuts_by_a_naive_rule_on_every_network() -> None:
    """A value is a cut if the nodes after it can be run from it, the constants and the inputs."""
    for name in NETS:
        graph, _ = fused(name)
        found = []
        for i, node in enumerate(graph.nodes):
            for out in node.outputs:
                known = {"", out, *graph.inputs, *graph.constants}
                for later in graph.nodes[i + 1 :]:
                    if not set(later.inputs) <= known:
                        break
                    known |= set(later.outputs)
                else:
                    found += [out] if set(graph.outputs) <= known else []
        assert cuts(graph) == found


@pytest.mark.proves("tune.windows")
def test_a_skip_over_everything_leaves_one_block() -> None:
    graph, _ = fused("over")
    assert len(windows(graph, "block")) == 1
    assert len(windows(graph, "layer")) == 4


@needs_data
@pytest.mark.proves("tune.windows")
def test_blocks_of_resnet20_are_its_residual_blocks() -> None:
    graph = rd.fuse(rd.capture(resnet20(), (torch.zeros(2, 3, 32, 32),)))
    blocks = [f"layer{stage}.{i}.add" for stage in (1, 2, 3) for i in range(3)]
    assert set(blocks) <= set(cuts(graph))
    parts = windows(graph, "block")
    assert [part.name for part in parts] == [*blocks, "linear"]
    assert [part.weights for part in parts] == [3] + [2] * 8 + [1]  # the first convolution goes with the first block
    assert [part.graph.inputs for part in parts] == [("x",), *((name,) for name in blocks)]
    layers = windows(graph, "layer")
    assert [part.weights for part in layers] == [1] * 20
    assert ops(layers[2]) == ["conv", "add"]
    assert set(layers[2].graph.inputs) == {"layer1.0.conv1", "conv1"}
    assert [part.graph.nodes for part in windows(graph, "model")] == [graph.nodes]


@needs_data
@pytest.mark.proves("tune.windows")
def test_blocks_of_ds_cnn_and_kwt1() -> None:
    ds = rd.read(DATA / "mlperf_kws" / "kws_ref_model_float32.tflite")
    kwt = rd.read(DATA / "kwt1" / "kwt1.tflite", inputs=[214])
    graph = rd.fuse(ds.graph)
    assert [part.weights for part in windows(graph, "block")] == [2] * 5
    assert [part.weights for part in windows(graph, "layer")] == [1] * 10
    graph = rd.fuse(kwt.graph)
    parts = windows(graph, "block")
    assert sum(part.weights for part in parts) == sum(node.op in WEIGHTED for node in graph)
    assert all(len(part.graph.inputs) == 1 for part in parts)  # through one value, in each of twelve blocks
    attention = ["layer_norm", "linear", "linear", "linear", "attention", "linear", "add"]
    mlp = ["layer_norm", "linear", "gelu", "linear", "add"]
    assert [ops(part) for part in parts[1:-1]] == [mlp, *[attention, mlp] * 11]


# -- parts and the whole ----------------------------------------------------------------------------------------------


@pytest.mark.proves("tune.windows")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_windows_one_after_the_other_are_the_network(name: str, kind: Kind) -> None:
    graph, x = fused(name)
    parts = windows(graph, kind)
    assert [node for part in parts for node in part.graph] == list(graph.nodes)
    assert all(part.weights for part in parts)
    modules: list[Interpreter] = [GraphModule(part.graph).eval() for part in parts]
    batches = [Batch((x[:5],)), Batch((x[5:],))]
    got = run_through(parts, modules, entries(graph, batches), needed(parts, graph.outputs))
    whole = GraphModule(graph).eval()
    assert torch.equal(got, torch.cat([whole(x[:5]), whole(x[5:])]))


@pytest.mark.proves("tune.windows")
@pytest.mark.parametrize("activations", ["int8", "int8:dynamic", "int4", None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_windows_of_a_quantized_network_are_the_network(name: str, kind: Kind, activations: str | None) -> None:
    q, x = quantized(name, activations)
    graph = q.structure
    assert isinstance(graph, Graph)
    parts = windows(graph, kind)
    state = _State(q)
    modules: list[Interpreter] = [state.packed(part) for part in parts]
    assert all(isinstance(weight, PackedWeight) for module in modules for weight in module.packed().values())  # type: ignore[operator]
    got = run_through(parts, modules, entries(graph, [Batch((x,))]), needed(parts, graph.outputs))
    assert torch.equal(got, q.module(x))


@pytest.mark.proves("tune.windows")
def test_a_weight_belongs_to_the_first_window_that_reads_it() -> None:
    graph, _ = fused("twice")
    parts = windows(graph, "layer")
    assert [sorted(part.trained) for part in parts] == [["a.bias", "a.weight"], ["b.bias", "b.weight"], [], ["c.bias", "c.weight"]]
    assert "a.weight" in parts[2].graph.constants
    assert [sorted(names) for names in needed(parts, graph.outputs)][-1] == list(graph.outputs)
    assert all("x" in names for names in needed(parts, graph.outputs)[:-1])  # the last addition reads it


@pytest.mark.proves("tune.windows")
def test_examples_are_joined_only_where_they_lie_along_the_first_axis() -> None:
    graph, x = fused("cnn")
    values = entries(graph, [Batch((x[:5],)), Batch((x[5:],))])
    (one,) = joined(graph, values)
    assert torch.equal(one["x"], x)
    apart = [{"x": x[:5], "unknown": torch.ones(1, 4)}, {"x": x[5:], "unknown": torch.ones(1, 4)}]
    assert joined(graph, apart) == apart


def test_what_there_is_not_is_said() -> None:
    graph, _ = fused("over")
    with pytest.raises(PlanError, match="window='stage': there are layer, block, model"):
        windows(graph, "stage")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no examples to tune on"):
        entries(graph, [])
    bare = Graph(("x",), ("y",), (Node("relu", ("x",), ("y",)),))
    assert [ops(part) for part in windows(bare, "layer")] == [["relu"]]
