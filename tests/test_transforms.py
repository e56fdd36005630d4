"""Transforms: what they leave unchanged, over random graphs and modules of every kind they know, and what they do, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import SmallCNN, TransformerBlock, settle
from scipy import integrate, stats
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.graph import Graph, GraphModule, Node
from roundel.graph.build import Builder
from roundel.transforms import absorb, clipped_mean, correct_bias, equalize, hadamard, insert_rotations, norm_means, rotate, smooth
from roundel.transforms.channels import find_channels, scaled_graph
from roundel.transforms.probe import probe_channels


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(graph: Graph, *x: Tensor) -> Tensor:
    with torch.no_grad():
        return GraphModule(graph).eval()(*x)


def close(a: Tensor, b: Tensor, share: float = 2e-5) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= share * float(a.abs().max()) + 1e-7


# -- one property over random graphs ----------------------------------------------------------------------------------


def random_graph(seed: int) -> tuple[Graph, Tensor]:
    """(a convolutional graph with residuals, depthwise layers, clips, pools, concats, constants, shared weights; its input)."""
    rng, to = np.random.default_rng(seed), Builder()
    x = to.input("x", (1_000_003, 4, 8, 8))

    def conv(x: str, name: str, groups: int = 1, out: int = 4, weight: str | None = None) -> str:
        inner, k = to.shape(x)[1], int(rng.choice([1, 3]))
        w = weight or to.constant(f"{name}.w", gaussian(out, inner // groups, k, k, seed=seed + len(to.nodes)) * 0.5)
        b = [to.constant(f"{name}.b", gaussian(out, seed=seed + 50 + len(to.nodes)) * 2)] if rng.random() < 0.8 else []
        act = rng.choice(["relu", "relu6", "none"])
        attrs: dict[str, Any] = {"stride": [1, 1], "padding": [(to.shape(w)[2] - 1) // 2] * 4, "dilation": [1, 1], "groups": groups}
        return to.emit("conv", [x, w, *b], name, attrs | ({"act": str(act)} if act != "none" else {}))

    x = conv(x, "stem")
    for i in range(7):
        kind, name = (
            rng.choice(["conv", "depth", "add", "pool", "concat", "mul", "leaky", "twice", "gelu", "shift", "prelu"]),
            f"n{i}",
        )
        if kind == "depth":
            x = conv(x, name, groups=4)
        elif kind == "add":
            x = to.emit(str(rng.choice(["add", "sub", "maximum"])), [conv(x, f"{name}.a"), x], name)
        elif kind == "pool":
            op = str(rng.choice(["max_pool", "avg_pool"]))
            x = to.emit(op, [x], name, {"kernel": [2, 2], "stride": [1, 1], "padding": [1, 0, 1, 0]})
        elif kind == "concat":
            x = to.emit("concat", [x, conv(x, f"{name}.a")], f"{name}.c", {"axis": 1})
            x = to.emit("slice", [x], name, {"axis": 1, "start": 1, "stop": 5})
        elif kind == "mul":
            gate = to.emit("sigmoid", [conv(x, f"{name}.a")], f"{name}.s")
            x = to.emit("mul", [gate, x] if rng.random() < 0.5 else [x, gate], name)
        elif kind == "twice":
            w = to.constant(f"{name}.w", gaussian(4, 4, 1, 1, seed=seed + 99))
            x = conv(conv(x, f"{name}.a", weight=w), name, weight=w)
        elif kind == "shift":
            c = to.constant(f"{name}.k", gaussian(1, 4, 1, 1, seed=seed + i))
            x = to.emit("add", [x, c], f"{name}.p")
            x = to.emit("mul", [x, c], name) if rng.random() < 0.3 else x
        elif kind == "prelu":
            x = to.emit("prelu", [x, to.constant(f"{name}.slope", gaussian(4, seed=i).abs())], name)
        elif kind in ("leaky", "gelu"):
            x = to.emit("leaky_relu", [x], name, {"slope": 0.1}) if kind == "leaky" else to.emit("gelu", [x], name)
        else:
            x = conv(x, name)
    size = to.shape(x)
    if rng.random() < 0.5:
        x = to.emit("mean", [x], "mean", {"axes": [2, 3]})
    else:
        x = to.emit("reshape", [x], "flat", {"shape": [0, size[1] * size[2] * size[3]]})
    x = to.emit(
        "linear", [x, to.constant("head.w", gaussian(5, to.shape(x)[1], seed=seed)), to.constant("head.b", gaussian(5))], "head"
    )
    return to.graph(["x"], [x]), gaussian(6, 4, 8, 8, seed=seed)


TRANSFORMS: dict[str, Callable[[Any, Tensor], tuple[Any, tuple[Any, ...]]]] = {
    "equalize": lambda net, x: equalize(net, [x]),
    "equalize streams and clips": lambda net, x: equalize(net, [x], clips=True, streams=True),
    "smooth": lambda net, x: smooth(net, [x], "int4", "int8", grid=(0.5, 1.0)),
    "awq": lambda net, x: smooth(net, [x], "int3", None, by="mean", grid=(0.5, 1.0)),
    "absorb": lambda net, x: absorb(net, [x]),
    "rotate": lambda net, x: rotate(net, [x]),
}


@pytest.mark.proves("transforms.equal")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_compute_what_they_did(name: str, seed: int) -> None:
    graph, x = random_graph(seed)
    before = {key: tensor.clone() for key, tensor in graph.constants.items()}
    new, notes = TRANSFORMS[name](graph, x)
    assert isinstance(new, Graph)
    assert notes
    assert not any("undone" in note.text for note in notes)
    close(run(graph, x), run(new, x), 1e-4)
    assert all(torch.equal(before[key], tensor) for key, tensor in graph.constants.items())


@pytest.mark.proves("transforms.equal")
@pytest.mark.parametrize("clips", [False, True])
def test_any_factors_at_all(clips: bool) -> None:
    found = 0
    for seed in range(40):
        graph, x = random_graph(seed)
        channels = find_channels(graph, clips)
        factor = 10 ** (2 * torch.rand(channels.count, generator=torch.Generator().manual_seed(seed)) - 1)
        new = scaled_graph(graph, channels, factor)
        close(run(graph, x), run(new, x), 1e-4)
        found += channels.count > 1
    assert found > 25


@pytest.mark.proves("transforms.equal")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("make", [SmallCNN, TransformerBlock])
def test_captured_networks(name: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = gaussian(4, 3, 16, 16) if make is SmallCNN else gaussian(4, 7, 16)
    with torch.no_grad():
        model = settle(make())
        graph = rd.fuse(rd.capture(model, x))
        new, _ = TRANSFORMS[name](graph, x)
        close(model(x), run(new, x), 1e-4)


class Gated(nn.Module):
    """(N, T, 12) -> (N, T, 12): pre-norm grouped attention with two value heads for four, a gated MLP; no name says so."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.n3 = nn.RMSNorm(16), nn.RMSNorm(16), nn.RMSNorm(16)
        self.table = nn.Embedding(20, 16)
        self.a, self.b, self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.n1(x)
        q, k, v = (f(y).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.a, self.b, self.c))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + self.d(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.n2(x)
        x = x + self.down(self.up(y) * nn.functional.silu(self.gate(y)))
        return self.head(self.n3(x))


def gated() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad():
        for norm in (model.n1, model.n2, model.n3):
            norm.weight.copy_(torch.rand(16) + 0.2)
    return model, torch.randint(20, (4, 9))


@pytest.mark.proves("transforms.modules")
def test_a_module_is_probed_and_what_reads_what_is_found() -> None:
    model, ids = gated()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    channels, notes = probe_channels(model, Batch((ids,)))
    read = {r.layer: p.layer for p in channels.made for r in channels.readers if int(p.index.min()) == int(r.classes.min())}
    assert read == {"a": "n1", "b": "n1", "c": "n1", "up": "n2", "gate": "n2", "head": "n3", "d": "c", "down": "up"}
    assert not notes
    heads = next(r.classes for r in channels.readers if r.layer == "d")
    heads = heads - heads.min()
    assert heads.tolist() == [*range(4), *range(4), *range(4, 8), *range(4, 8)]  # each value head is read twice
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.proves("transforms.modules", "transforms.equal")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_modules_compute_what_they_did(name: str) -> None:
    model, ids = gated()
    new, notes = TRANSFORMS[name](model, ids)
    assert notes
    assert type(new) is Gated
    with torch.no_grad():
        close(model(ids), new(ids), 1e-4)
    moved = [key for key, t in new.state_dict().items() if not torch.equal(t, model.state_dict()[key])]
    assert bool(moved) == (name != "absorb")
    if name == "rotate":
        assert {"table.weight", "d.weight", "down.weight", "head.weight", "n1.weight", "a.weight"} <= set(moved)


@pytest.mark.proves("transforms.modules")
def test_what_cannot_be_proven_is_left_with_a_note() -> None:
    model, ids = gated()
    model.head.weight = model.table.weight  # tied: no longer free
    channels, notes = probe_channels(model, Batch((ids,)))
    assert "head" not in {reader.layer for reader in channels.readers}
    assert any(note.subject == "n3" and "not folded into head" in note.text for note in notes)
    turned, notes = rotate(model, [ids])
    assert any("1 tied weights are now tensors of their own" in note.text for note in notes)
    with torch.no_grad():
        close(model(ids), turned(ids), 1e-4)

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.other = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.one(x) if x.shape[0] < 100 else self.other(x)

    channels, notes = probe_channels(Expert().eval(), Batch((gaussian(8, 4),)))
    assert channels.count == 1
    assert "the probe reached 1 layers not, other" in notes[0].text


# -- each by hand -----------------------------------------------------------------------------------------------------


def pair(act: str = "relu") -> tuple[Graph, Tensor]:
    to = Builder()
    to.input("x", (1_000_003, 2))
    w = to.constant("a.w", torch.tensor([[1.0, 0.5], [64.0, -16.0], [0.0, 0.0]]))
    to.emit("linear", ["x", w, to.constant("a.b", torch.tensor([1.0, 8.0, 0.0]))], "a", {"act": act})
    to.emit("linear", ["a", to.constant("b.w", torch.tensor([[4.0, 0.25, 1.0], [-1.0, 1.0, 1.0]]))], "b")
    return to.graph(["x"], ["b"]), torch.tensor([[1.0, 1.0], [0.05, -0.1], [3.0, 2.0]])


@pytest.mark.proves("transforms.equalize")
def test_equalization_by_hand() -> None:
    graph, x = pair()
    new, notes = equalize(graph)
    s = torch.tensor([0.5, 8.0, 1.0])  # sqrt(1 / 4), sqrt(64 / 1), and a dead channel
    torch.testing.assert_close(new.constants["a.w"], graph.constants["a.w"] / s[:, None])
    torch.testing.assert_close(new.constants["a.b"], graph.constants["a.b"] / s)
    torch.testing.assert_close(new.constants["b.w"], graph.constants["b.w"] * s)
    assert notes[0].text == "2 channels equalized by factors from 0.5 to 8"
    close(run(graph, x), run(new, x))


@pytest.mark.proves("transforms.relu6")
def test_relu6_moves_its_bound_or_stays_unless_it_never_cuts() -> None:
    graph, x = pair("relu6")
    assert equalize(graph)[0] is graph
    moved, _ = equalize(graph, clips=True)
    assert [node.op for node in moved] == ["linear", "minimum", "linear"]
    torch.testing.assert_close(moved.constants["a.bound"].flatten(), torch.tensor([12.0, 0.75, 6.0]))
    close(run(graph, x), run(moved, x))
    first = Node("sigmoid", ("x",), ("s",))
    bounded = Graph(("x",), ("b",), (first, Node("linear", ("s", "a.w", "a.b"), ("a",), {"act": "relu6"}), graph.nodes[1]),
                    {**graph.constants, "a.w": graph.constants["a.w"] / 20}, {**graph.values, "s": graph.values["x"]})  # fmt: skip
    assert equalize(bounded)[0] is bounded  # 64 / 20 + 8 may exceed 6
    small = Graph(bounded.inputs, bounded.outputs, bounded.nodes, {**bounded.constants, "a.b": torch.ones(3)}, bounded.values)
    free, _ = equalize(small)
    assert free is not small
    close(run(small, 50 * x), run(free, 50 * x))


@pytest.mark.proves("transforms.smooth")
def test_the_two_formulas_of_smoothing() -> None:
    to = Builder()
    to.input("x", (1_000_003, 4))
    to.emit("layer_norm", ["x", to.constant("n.w", torch.tensor([1.0, 80.0, 0.5, 2.0]))], "n", {"eps": 1e-5})
    weight = gaussian(6, 4) * torch.tensor([1.0, 0.02, 1.0, 1.0])
    graph = to.graph(["x"], [to.emit("linear", ["n", to.constant("l.w", weight)], "l")])
    x = gaussian(200, 4, seed=3)
    seen = nn.functional.layer_norm(x, (4,), graph.constants["n.w"], None, 1e-5).double().abs()
    for by, a in (("max", 0.5), ("max", 1.0), ("mean", 0.5)):
        activations = "int8" if by == "max" else None
        new, _ = smooth(graph, [x], "int8" if by == "max" else "int3", activations, by=by, grid=[a])  # type: ignore[arg-type]
        reach = weight.double().abs().amax(0)
        s = seen.amax(0) ** a / reach ** (1 - a) if by == "max" else seen.mean(0) ** a
        s = s / s.log().mean().exp()
        torch.testing.assert_close(new.constants["n.w"], (graph.constants["n.w"].double() / s).float(), rtol=1e-5, atol=0)
        torch.testing.assert_close(new.constants["l.w"], (weight.double() * s).float(), rtol=1e-5, atol=1e-9)


@pytest.mark.proves("transforms.smooth")
def test_smoothing_that_helps_no_layer_is_not_done() -> None:
    graph, x = pair()
    same, notes = smooth(graph, [x], "fp32", None)
    assert same is graph
    assert notes[-1].text == "smoothing would lower no layer's error"


@pytest.mark.proves("transforms.absorb")
def test_bias_absorption_by_hand_and_by_deviations() -> None:
    graph, _ = pair()
    x = torch.tensor([[2.0, 1.0], [3.0, 1.0], [4.0, 1.0]])
    reads = Node("linear", ("a", "b.w", "b.b"), ("b",))
    graph = Graph(("x",), ("b",), (graph.nodes[0], reads), {**graph.constants, "b.b": torch.zeros(2)}, graph.values)
    new, notes = absorb(graph, [x])
    c = torch.tensor([3.5, 120.0, 0.0])  # the smallest of x a.w + a.b
    torch.testing.assert_close(new.constants["a.b"], graph.constants["a.b"] - c)
    torch.testing.assert_close(new.constants["b.b"], graph.constants["b.w"] @ c)
    assert notes[0].text == "2 of 3 biases absorbed, 120 at most"
    close(run(graph, x), run(new, x))
    wide, _ = absorb(graph, [x], sigmas=1.0)
    assert float(graph.constants["a.b"][0] - wide.constants["a.b"][0]) == pytest.approx(4.5 - (2 / 3) ** 0.5, rel=1e-5)
    _, notes = absorb(nn.Sequential(nn.Linear(2, 2)), [x])
    assert "ordinary module" in notes[0].text


@pytest.mark.proves("transforms.rotate")
@pytest.mark.parametrize(("size", "block", "side"), [(64, None, 64), (172, 128, 4), (256, 128, 128), (7, None, 1)])
def test_hadamard_matrices_are_orthogonal_and_flat_in_their_blocks(size: int, block: int | None, side: int) -> None:
    matrix = hadamard(size, block)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert set((matrix.abs() * side**0.5).round(decimals=9).unique().tolist()) <= {0.0, 1.0}
    assert int((matrix[0] != 0).sum()) == side
    with pytest.raises(rd.PlanError, match="a Hadamard block is a power of two"):
        hadamard(8, 6)


@pytest.mark.proves("transforms.rotate")
def test_an_inserted_rotation_spreads_an_outlier() -> None:
    to = Builder()
    to.input("x", (1_000_003, 64))
    for name in "ab":
        to.emit("linear", ["x", to.constant(f"{name}.w", gaussian(8, 64))], name)
    graph = to.graph(["x"], ["a", "b"])
    x = gaussian(32, 64)
    x[:, 5] *= 100
    new, notes = insert_rotations(graph)
    assert [node.name for node in new] == ["a.rotation", "a", "b"]  # one for both
    assert "4,096 multiplications" in notes[0].text
    with torch.no_grad():
        for old, now in zip(GraphModule(graph)(x), GraphModule(new)(x), strict=True):
            close(old, now)
    assert (x @ new.constants["a.rotation.weight"].T).abs().max() < 0.2 * x.abs().max()
    with pytest.raises(rd.PlanError, match="'c' is no linear layer"):
        insert_rotations(graph, ["c"])


@pytest.mark.proves("transforms.bias")
@pytest.mark.parametrize(("mean", "deviation", "high"), [(0.0, 1.0, 6.0), (-1.0, 2.0, np.inf), (5.0, 2.0, 6.0), (1.0, 0.1, np.inf)])
def test_the_mean_of_a_clipped_normal(mean: float, deviation: float, high: float) -> None:
    wanted, _ = integrate.quad(lambda z: min(max(z, 0.0), high) * stats.norm.pdf(z, mean, deviation), mean - 12 * deviation,
                               mean + 12 * deviation, points=[0.0, min(high, 50.0)], limit=200)  # fmt: skip
    got = clipped_mean(torch.tensor(mean), torch.tensor(deviation), 0.0, high)
    assert float(got) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.proves("transforms.bias")
def test_analytic_bias_correction_from_batch_norms() -> None:
    torch.manual_seed(0)
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1)))
    graph = rd.capture(model, gaussian(2, 3, 4, 4))
    means = norm_means(graph)
    assert list(means) == ["3.weight"]
    draws = model[1].bias + model[1].weight.abs() * gaussian(200_000, 8)
    torch.testing.assert_close(means["3.weight"], draws.clamp(0, 6).mean(0).detach(), rtol=0, atol=5e-3)
    q = rd.quantize(nn.Sequential(model[3]), "int2", data=[gaussian(2, 8, 4, 4)])
    right, notes = correct_bias(q, {"0.weight": model[3].weight}, {"0.weight": means["3.weight"]})
    assert notes[0].text == "1 biases corrected from the means of their inputs"
    x = draws.clamp(0, 6)[:48_000].reshape(3000, 4, 4, 8).permute(0, 3, 1, 2).detach()
    with torch.no_grad():
        wanted = model[3](x).mean((0, 2, 3))
        was, now = ((one.module(x).mean((0, 2, 3)) - wanted).abs().max() for one in (q, right))
    assert now < 0.02 < was
