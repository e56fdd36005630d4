"""Layers solved and biases corrected in order, on what the quantized ones before leave; inputs as matrices; `quantize` whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_data
from models import settle
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.demo import digits, train
from roundel.formats import QTensor
from roundel.graph import GraphModule
from roundel.network.layer import PackedWeight
from roundel.network.run import QGraphModule
from roundel.network.sweep import channel_sums, columns, second_moment, sweep
from roundel.network.watch import watching
from roundel.refine import refine
from roundel.solvers import gptq, rtn


class Net(nn.Module):
    """(N, 3, 8, 8) -> (N, 6): a residual add, a depthwise layer, one that runs twice, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.twice = nn.Linear(8, 8)
        self.bare = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.relu(self.depth(x)).mean((2, 3))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(F.relu(self.bare(x)))


#: Node of the fused graph -> the module whose output is that layer's before its activation function.
BEFORE_ACT = {"conv1": "bn1", "conv2": "bn2", "depth": "depth", "head": "head"}


def net() -> Net:
    torch.manual_seed(3)
    made = settle(Net())
    assert isinstance(made, Net)
    return made


def images(count: int, seed: int = 0) -> list[Batch]:
    """Batches of uneven sizes."""
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.3
    return [Batch((part,)) for part in x.split([count // 2, count // 3, count - count // 2 - count // 3])]


def prepared(weights: str, activations: str | None, model: nn.Module | None = None) -> tuple[rd.QModel, GraphModule, list[Batch]]:
    """A model rounded to nearest whose steps were not tried (too few examples), its float graph, and examples to learn from."""
    model, few = model or net(), images(24, 7)
    q = rd.quantize(model, weights, activations, data=[batch.args[0] for batch in few])
    assert any("not tried" in note.text for note in q.notes)
    return q, GraphModule(rd.fuse(rd.capture(model, few[0].args))).eval(), images(48)


# -- inputs as a matrix -----------------------------------------------------------------------------------------------

CONVS: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("conv1d", (3, 4, 11), (6, 4, 3), {}),
    ("conv1d, padded on one side, strided, dilated", (2, 4, 17), (6, 4, 3), {"padding": [3, 0], "stride": [2], "dilation": [2]}),
    ("conv1d, depthwise", (3, 6, 9), (6, 1, 4), {"groups": 6, "padding": [1, 2]}),
    ("conv2d", (2, 3, 7, 6), (5, 3, 3, 2), {}),
    ("conv2d, strided", (2, 3, 9, 8), (5, 3, 3, 2), {"stride": [2, 3]}),
    ("conv2d, dilated", (2, 3, 11, 12), (5, 3, 3, 2), {"dilation": [2, 3]}),
    ("conv2d, padded unevenly", (2, 3, 5, 6), (5, 3, 3, 3), {"padding": [1, 0, 3, 2]}),
    ("conv2d, grouped", (2, 6, 5, 6), (8, 3, 3, 3), {"groups": 2, "padding": [1, 1, 1, 1]}),
    ("conv2d, depthwise", (2, 4, 5, 6), (8, 1, 3, 3), {"groups": 4, "stride": [2, 1]}),
    ("conv2d, everything", (3, 4, 13, 9), (6, 2, 3, 2),
     {"groups": 2, "padding": [2, 1, 0, 3], "stride": [3, 2], "dilation": [2, 1]}),
    ("conv2d, one example without a batch axis", (3, 7, 6), (5, 3, 3, 2), {"padding": [1, 0, 0, 0]}),
]  # fmt: skip


@pytest.mark.proves("refine.columns")
@pytest.mark.parametrize(("shape", "weight", "given"), [case[1:] for case in CONVS], ids=[case[0] for case in CONVS])
def test_columns_times_weights_are_the_convolution(shape: tuple[int, ...], weight: tuple[int, ...], given: dict[str, Any]) -> None:
    axes = len(weight) - 2
    attrs = {"groups": 1, "padding": [0] * 2 * axes, "stride": [1] * axes, "dilation": [1] * axes} | given
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)
    conv: Callable[..., Tensor] = F.conv1d if axes == 1 else F.conv2d
    wanted = conv(F.pad(x, attrs["padding"]), w, None, attrs["stride"], 0, attrs["dilation"], attrs["groups"])
    wanted = wanted if wanted.ndim == len(weight) else wanted[None]
    seen = columns("conv", attrs, x, weight)
    groups = attrs["groups"]
    found = seen @ w.view(groups, weight[0] // groups, -1).mT  # (groups, n, out / groups)
    torch.testing.assert_close(found.permute(1, 0, 2).reshape(-1, weight[0]), wanted.movedim(1, -1).reshape(-1, weight[0]))


@pytest.mark.proves("refine.columns")
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 7), (2, 3, 2, 7), (7,)])
def test_columns_of_a_linear_layer_are_its_tokens(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape), torch.randn(4, 7)
    torch.testing.assert_close((columns("linear", {}, x, w.shape)[0] @ w.T).view(*shape[:-1], 4), F.linear(x, w))


@pytest.mark.proves("refine.columns")
def test_the_second_moment_sums_over_every_row() -> None:
    x = torch.randn(2, 9001, 3)
    naive = torch.tensor([[[sum((group[:, i].double() * group[:, j].double()).tolist()) for j in range(3)] for i in range(3)]
                          for group in x], dtype=torch.float64)  # fmt: skip
    found = second_moment(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=1e-9)
    large = second_moment(torch.full((1, 2, 2), 1e30))
    torch.testing.assert_close(large, torch.full((1, 2, 2), 2e60, dtype=torch.float64), rtol=1e-6, atol=0)


def test_channel_sums_leave_the_output_channels() -> None:
    x = torch.randn(3, 4, 5, 6)
    for op, axis in (("conv", 1), ("linear", 3)):
        sums, places = channel_sums(op, x)
        torch.testing.assert_close(sums / places, x.double().mean([i for i in range(4) if i != axis]))


# -- the sweep --------------------------------------------------------------------------------------------------------


@pytest.mark.proves("refine.sweep")
def test_the_sweep_sees_what_was_changed_before() -> None:
    """Doubling a weight where it stands doubles what the next layer is given, in the quantized network alone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(40, 4)
    q = rd.quantize(model, "int8/channel*fp32", data=[x[:8]])
    real = GraphModule(rd.fuse(rd.capture(model, (x,)))).eval()
    module = QGraphModule(q.structure, q.tensors, q.activations, {n: t.clone() for n, t in q.rest.items()})
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        with watching(module, lambda site, value: before.setdefault(site, value.clone())):
            module(x)
        seen = []
        for node, pairs in sweep(real, module, [Batch((x[:25],)), Batch((x[25:],))]):
            now = torch.cat([env[node.inputs[0]] for _, env in pairs])
            seen.append(node.name)
            torch.testing.assert_close(now, before[node.inputs[0]] * (2 if len(seen) == 2 else 1))
            assert torch.equal(torch.cat([env[node.inputs[0]] for env, _ in pairs]),
                               model[: 2 * len(seen) - 2](x) if len(seen) > 1 else x)  # fmt: skip
            if len(seen) == 1:  # twice the weight, twice the bias
                old = q.tensors[node.inputs[1]]
                module.put(node.inputs[1], PackedWeight(rtn(2 * old.dequantize(), old.format)))
                module.move(node.inputs[2], 2 * q.rest[node.inputs[2]])
            if len(seen) == 2:
                break
    assert seen == ["0", "2"]


@pytest.mark.proves("refine.sweep")
def test_the_sweep_holds_only_what_is_still_read() -> None:
    q, real, learn = prepared("int4", "int8")
    assert isinstance(q.structure, rd.Graph)
    nodes, constants = q.structure.nodes, set(q.structure.constants) | {""}
    module = QGraphModule(q.structure, q.tensors, q.activations, q.rest)
    with torch.no_grad():
        for node, pairs in sweep(real, module, learn):
            at = [n.name for n in nodes].index(node.name)
            needed = {name for later in nodes[at:] for name in later.inputs} - {
                out for later in nodes[at:] for out in later.outputs
            }
            for env in (env for pair in pairs for env in pair):
                assert set(env) - constants == needed - constants


# -- refine -----------------------------------------------------------------------------------------------------------


def means_before_act(q: rd.QModel, learn: list[Batch]) -> dict[str, Tensor]:
    """Per-channel means of the layers' outputs before their activation functions: torch's own convolutions in float64 on what the
    quantized network gives them and on its dequantized weights."""
    assert isinstance(q.structure, rd.Graph)
    seen: dict[str, list[Tensor]] = {}
    with watching(q.module, lambda site, value: seen.setdefault(site, []).append(value.clone())), torch.no_grad():
        for batch in learn:
            q.module(*batch.args)
    means = {}
    for node in q.structure.nodes:
        if node.name in BEFORE_ACT:
            site = q.activations.get(f"{node.name}.input")
            x = torch.cat([site.quantize(part) if site else part for part in seen[node.inputs[0]]]).double()
            w, b = q.tensors[node.inputs[1]].dequantize().double(), q.rest[node.inputs[2]].double()
            if node.op == "linear":
                out = F.linear(x, w, b)
            else:
                out = F.conv2d(F.pad(x, node.attrs["padding"]), w, b, node.attrs["stride"], groups=node.attrs["groups"])
            means[node.name] = out.transpose(0, 1).flatten(1).mean(1)
    return means


def float_means(model: nn.Module, learn: list[Batch]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    hooks = [model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out))
             for name in BEFORE_ACT.values()]  # fmt: skip
    with torch.no_grad():
        for batch in learn:
            model(*batch.args)
    for hook in hooks:
        hook.remove()
    return {node: torch.cat(seen[name]).double().transpose(0, 1).flatten(1).mean(1) for node, name in BEFORE_ACT.items()}


@pytest.mark.proves("refine.bias")
@pytest.mark.parametrize("activations", [None, "int8", "int6:dynamic"])
@pytest.mark.parametrize("solved", [False, True])
def test_corrected_layers_have_the_float_networks_means(activations: str | None, solved: bool) -> None:
    model = net()
    q, real, learn = prepared("int3", activations, model)
    weights = dict(zip(q.tensors, (real.graph.constants[name] for name in q.tensors)))
    new = refine(q, real, learn, (lambda name, h: gptq(weights[name], q.tensors[name].format, h)) if solved else None)
    wanted, was, now = float_means(model, learn), means_before_act(q, learn), means_before_act(new, learn)
    for name in BEFORE_ACT:
        assert (was[name] - wanted[name]).abs().max() > 1e-3
        torch.testing.assert_close(now[name], wanted[name], rtol=0, atol=2e-5)


@pytest.mark.proves("refine.bias")
def test_what_is_refined_is_new_and_what_was_given_stays() -> None:
    q, real, learn = prepared("int4", "int8")
    rest, codes = {n: t.clone() for n, t in q.rest.items()}, {n: t.codes.clone() for n, t in q.tensors.items()}
    floats = {n: t.clone() for n, t in real.state_dict().items()}
    x = learn[0].args[0]
    outputs = q.module(x)
    corrected = refine(q, real, learn)
    assert all(corrected.tensors[n] is q.tensors[n] for n in codes)  # no solver: not a code is touched
    moved = {n for n in rest if not torch.equal(corrected.rest[n], rest[n])}
    assert moved == {"conv1.bias", "conv2.bias", "depth.bias", "twice.bias", "head.bias"}
    solved = refine(q, real, learn, lambda name, h: gptq(real.graph.constants[name], q.tensors[name].format, h), bias=False)
    assert {n for n in codes if not torch.equal(solved.tensors[n].codes, codes[n])} >= set(codes) - {"depth.weight"}
    for made in (corrected, solved):
        assert isinstance(made.structure, rd.Graph)
        assert set(made.structure.constants) == set(rest) | set(codes)
        assert all(torch.equal(made.structure.constants[n], t) for n, t in made.rest.items())
    assert all(torch.equal(solved.rest[n], rest[n]) for n in rest)
    assert all(torch.equal(q.rest[n], rest[n]) for n in rest)
    assert all(torch.equal(q.tensors[n].codes, codes[n]) for n in codes)
    assert all(torch.equal(t, floats[n]) for n, t in real.state_dict().items())
    assert torch.equal(q.module(x), outputs)


@pytest.mark.proves("refine.sweep")
@pytest.mark.parametrize("activations", [None, "int8"])
def test_every_layer_is_solved_once_on_the_inputs_it_then_has(activations: str | None) -> None:
    q, real, learn = prepared("int4", activations)
    asked: dict[str, Tensor] = {}

    def solve(name: str, hessian: Tensor) -> QTensor:
        assert name not in asked
        asked[name] = hessian
        return gptq(real.graph.constants[name], q.tensors[name].format, hessian)

    new = refine(q, real, learn, solve)
    assert set(asked) == set(q.tensors)
    seen: dict[str, list[Tensor]] = {}
    with watching(new.module, lambda site, value: seen.setdefault(site, []).append(value.clone())), torch.no_grad():
        for batch in learn:
            new.module(*batch.args)
    assert isinstance(new.structure, rd.Graph)
    checked = set()
    for node in new.structure.nodes:
        if len(node.inputs) > 1 and node.inputs[1] in asked and node.inputs[1] not in checked:
            weight = node.inputs[1]
            checked.add(weight)
            x = columns(node.op, node.attrs, torch.cat(seen[node.inputs[0]]), new.tensors[weight].shape).double()
            torch.testing.assert_close(asked[weight], x.mT @ x, rtol=1e-6, atol=1e-6)
    assert checked == set(asked)


class Odd(nn.Module):
    """Token ids (N, 5) -> (N, 5, 12): a head tied to the embedding, a bias that two layers share, one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.bias = self.one.bias
        self.three = nn.Linear(8, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = F.relu(self.two(F.relu(self.one(x))))
        x = F.linear(x, self.three.weight, x[0, 0] * 0.1)
        return F.linear(x, self.embed.weight)


@pytest.mark.proves("refine.bias", "inputs.tied")
def test_tied_shared_and_computed_tensors() -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    ids = [torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    q = rd.quantize(model, "int3", data=ids)
    real = GraphModule(rd.fuse(rd.capture(model, (ids[0],)))).eval()
    asked = []

    def solve(name: str, hessian: Tensor) -> QTensor:
        asked.append(name)
        return gptq(real.graph.constants[name], q.tensors[name].format, hessian)

    new = refine(q, real, [Batch((x,)) for x in ids], solve)
    assert asked == ["one.weight", "two.weight", "three.weight"]  # the embedding's rows are not what the head alone would have
    assert torch.equal(new.tensors["embed.weight"].codes, q.tensors["embed.weight"].codes)
    moved = [name for name in q.rest if not torch.equal(new.rest[name], q.rest[name])]
    assert moved == ["one.bias"]
    with torch.no_grad():  # moved once, for the layer where it is used first
        x = torch.cat([F.embedding(i, q.tensors["embed.weight"].dequantize()) for i in ids])
        now = F.linear(x, new.tensors["one.weight"].dequantize(), new.rest["one.bias"]).mean((0, 1))
        wanted = model.one(model.embed(torch.cat(ids))).mean((0, 1))
    torch.testing.assert_close(now, wanted, rtol=0, atol=1e-5)


@pytest.mark.proves("file.roundtrip", "mode.fake-twin", "refine.bias")
@pytest.mark.parametrize("activations", [None, "int8", "int8:dynamic"])
def test_a_refined_model_comes_back_and_has_its_twin(activations: str | None, tmp_path: Path) -> None:
    q, real, learn = prepared("int4", activations)
    new = refine(q, real, learn, lambda name, h: gptq(real.graph.constants[name], q.tensors[name].format, h))
    x = images(10, 5)[0].args[0]
    with torch.no_grad():
        wanted = new.module(x)
        new.save(tmp_path / "q.safetensors")
        assert torch.equal(rd.load(tmp_path / "q.safetensors").module(x), wanted)
        assert torch.equal(rd.fake(new)(x), wanted)
        assert not torch.equal(q.module(x), wanted)


def test_a_module_is_no_graph_to_sweep() -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(4, 2)), "int8")
    with pytest.raises(TypeError, match="only a quantized graph can be swept"):
        refine(q, GraphModule(rd.capture(nn.Sequential(nn.Linear(4, 2)), (torch.randn(2, 4),))), [])


# -- quantize, whole --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A digits network, images to calibrate with, images to score."""
    data = digits(0)
    model = train(data.train, epochs=6, seed=0)
    return model, list(data.train[0][:320].split(64)), [data.score[0]]


def kl(q: rd.QModel, model: nn.Module, score: list[Tensor]) -> float:
    found = rd.evaluate(q, against=model, data=score, latency=False, layers=False).kl
    assert found is not None
    return found


@pytest.mark.proves("effort.default")
@pytest.mark.parametrize(("weights", "activations"), [("int4", "int8"), ("int3", None)])
def test_default_effort_is_nearer_to_the_float_model(
    trained: tuple[nn.Module, list[Tensor], list[Tensor]], weights: str, activations: str | None
) -> None:
    model, calibrate, score = trained
    fast = rd.quantize(model, weights, activations, data=calibrate)
    default = rd.quantize(model, weights, activations, data=calibrate, effort="default")
    assert any(note.text.startswith("GPTQ kept") for note in default.notes)
    assert not any("GPTQ" in note.text for note in fast.notes)
    assert fast.provenance["effort"] == "fast"
    assert default.provenance["effort"] == "default"
    assert fast.nbytes == default.nbytes
    assert kl(default, model, score) < 0.8 * kl(fast, model, score)


@pytest.mark.proves("effort.default", "file.sha256")
def test_the_same_bytes_twice_and_under_two_threads(trained: tuple[nn.Module, list[Tensor], list[Tensor]], tmp_path: Path) -> None:
    model, calibrate, _ = trained
    found = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        rd.quantize(model, "int3", "int8", data=[x[:16] for x in calibrate], effort="default").save(tmp_path / "q.safetensors")
        found.append(hashlib.sha256((tmp_path / "q.safetensors").read_bytes()).hexdigest())
    torch.set_num_threads(1)
    assert len(set(found)) == 1


@pytest.mark.proves("solvers.gptq")
def test_what_gptq_needs_and_what_effort_may_be() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(rd.PlanError, match="the solver gptq learns from the inputs of each layer: pass data="):
        rd.quantize(model, "int4", solver="gptq")
    with pytest.raises(rd.PlanError, match="there is no effort 'heroic'; there are fast, default"):
        rd.quantize(model, "int4", effort="heroic")
    with pytest.raises(rd.PlanError, match="there is no solver 'magic'; there are rtn, hqq, gptq, descent, alternate"):
        rd.quantize(model, "int4", solver="magic")


@pytest.mark.proves("solvers.gptq")
def test_a_solver_that_is_named_is_used_unjudged_and_rtn_stays_rtn() -> None:
    model, x = net(), torch.randn(6, 3, 8, 8)
    near = rd.quantize(model, "int4", data=[x])
    named = rd.quantize(model, "int4", data=[x], solver="gptq")
    assert sum(torch.equal(q.codes, near.tensors[name].codes) for name, q in named.tensors.items()) <= 1
    assert named.provenance["solver"] == "gptq"
    assert not any("GPTQ" in note.text for note in named.notes)
    plain = rd.quantize(model, "int4", data=[x], solver="rtn", effort="default")
    assert all(torch.equal(q.codes, near.tensors[name].codes) for name, q in plain.tensors.items())


@pytest.mark.proves("solvers.gptq")
def test_the_module_path_is_solved_on_the_float_networks_inputs() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                                      max_position_embeddings=64)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = [torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    near = rd.quantize(model, "int3", data=ids)
    solved = rd.quantize(model, "int3", data=ids, solver="gptq")
    learnt = torch.cat(ids)[torch.arange(16) % 4 != 3]  # every fourth example is kept for judging
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        model(learnt)
    for hook in hooks:
        hook.remove()
    assert torch.equal(solved.tensors["model.embed_tokens.weight"].codes, near.tensors["model.embed_tokens.weight"].codes)
    linear = [name for name in solved.tensors if name != "model.embed_tokens.weight"]
    assert len(linear) == 14
    total = [0.0, 0.0]
    for name in linear:
        x, w = seen[name.removesuffix(".weight")].double().flatten(0, -2), model.get_parameter(name).detach().double()
        cost = [float(((q.tensors[name].dequantize().double() - w) @ x.T).square().sum()) for q in (near, solved)]
        assert cost[1] < 1.05 * cost[0]
        total = [sum(pair) for pair in zip(total, cost)]
    assert total[1] < 0.93 * total[0]
    default = rd.quantize(model, "int3", data=[*ids, *ids], effort="default")
    assert sum(note.text.startswith(("GPTQ kept: KL", "GPTQ not kept: KL")) for note in default.notes) == 1


# -- a real network ---------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.proves("result.resnet20")
def test_resnet20_on_a_thousand_images() -> None:
    """Weights and every edge; int8 rounded and corrected, int4 weights with GPTQ; one calibration draw."""
    from measure import CASES, _draw, _network

    case = CASES["ResNet-20"]
    model, pool = case.model(), case.calibrate()
    network, calibrate = _network(model, case, pool[0]), _draw(pool, 1)
    score = [batch.take(torch.arange(0, len(batch), 3)) for batch in case.score()]
    eight = rd.quantize(network, "int8", "int8", data=calibrate)
    four = rd.quantize(network, "int4", "int8", data=calibrate, effort="default")
    found = [rd.evaluate(q, against=model, data=score, metric="top1", latency=False, layers=False).kl for q in (eight, four)]
    assert found[0] is not None
    assert found[0] <= 0.0048
    assert found[1] is not None
    assert found[1] <= 0.035
