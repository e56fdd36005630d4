"""`prepare`, an ordinary training loop, `convert`: on graphs and module trees, in every format, resumed, under autocast, compiled.
The gradients of single tensors are in test_tunable.py."""

import copy
import io
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from loop import images, train
from test_seam import CATALOGUE
from torch import Tensor, nn

import roundel as rd
from roundel import Format, InputError, PlanError
from roundel.formats.grid import Codebook
from roundel.graph import GraphModule
from roundel.qat import prepare
from roundel.tune import convert, freeze, kinds
from roundel.tune.prepare import prepare as prepare_quantized

#: What activations are offered.
SITES = ["int8", "int4", "int8s", "uint8", "int16", "fp8", "nf4", "log4", "int8:dynamic", "int8/token:dynamic", "fp16", None]


@cache
def captured() -> rd.Graph:
    """A convolution with a norm, a pool that shares a site, and two linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(),
                          nn.Linear(16, 4)).eval()  # fmt: skip
    return rd.fuse(rd.capture(model, (images(2),)))


def net() -> nn.Module:
    """The network, captured once: tracing takes longer than all that is tested here."""
    graph = captured()
    return GraphModule(replace(graph, constants={name: t.clone() for name, t in graph.constants.items()})).eval()


def saved(q: rd.QModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("q") / "q.safetensors"
    q.save(path)
    return path.read_bytes()


# -- converted is what was trained ------------------------------------------------------------------------------------


@pytest.mark.proves("qat.convert")
@pytest.mark.parametrize("text", [*CATALOGUE, "fp16", "bf16", "fp32"])
def test_converted_is_the_trained_module_on_every_format(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    x, model = images(), net()
    y = model(x).detach().roll(1, 0)
    module = prepare(model, text, "int8", data=[x])
    begin = convert(module)
    assert torch.equal(begin.module(x), module.eval()(x))
    train(module.train(), x, y)
    q = convert(module)
    with torch.no_grad():
        out = module.eval()(x)
    assert torch.equal(q.module(x), out)
    assert not torch.equal(q.module(x), begin.module(x))
    path = tmp_path_factory.mktemp("q") / "q.safetensors"
    q.save(path)
    loaded = rd.load(path)
    assert torch.equal(loaded.module(x), out)
    assert torch.equal(rd.fake(loaded)(x), out)
    assert q.nbytes == begin.nbytes
    assert {str(t.format) for t in q.tensors.values()} == {str(t.format) for t in begin.tensors.values()}


@pytest.mark.proves("qat.convert", "qat.pact", "qat.ema")
@pytest.mark.parametrize("learn", ["step", "clip", "ema", "none"])
@pytest.mark.parametrize("activations", SITES)
def test_converted_is_the_trained_module_on_every_kind_of_site(activations: str | None, learn: str) -> None:
    x, model = images(), net()
    y = model(x).detach().roll(1, 0)
    module = prepare(model, "int4", activations, data=[x], learn=learn)  # type: ignore[arg-type]
    q = rd.quantize(model, "int4", activations, data=[x])
    with torch.no_grad():
        assert torch.equal(module.eval()(x), q.module(x)) or "correction kept" in str(q.notes)
    train(module.train(), x, y)
    q = convert(module)
    with torch.no_grad():
        assert torch.equal(q.module(x), module.eval()(x))


@pytest.mark.proves("qat.convert")
@pytest.mark.parametrize("rounding", ["sigmoid", "sign"])
def test_other_roundings_convert_too(rounding: str) -> None:
    x, model = images(), net()
    module = prepare(model, "int3", "int8", data=[x], rounding=rounding, drop=0.5)  # type: ignore[arg-type]
    train(module, x, model(x).detach(), rate=0.1)
    q = convert(module)
    with torch.no_grad():
        assert torch.equal(q.module(x), module.eval()(x))


@pytest.mark.proves("qat.loop")
@pytest.mark.parametrize(
    ("weights", "activations"), [("int3", "int4"), ("ternary", "int8"), ("cb4/channel", "int8"), ("log3", None)]
)
def test_training_brings_the_loss_down(weights: str, activations: str | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(128, 16)
    with torch.no_grad():
        y = model(x)
    module = prepare(model, weights, activations, data=[x])

    def lost() -> float:
        with torch.no_grad():
            return float((convert(module).module(x) - y).square().mean())

    before = lost()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)  # codes swing while the rate is high
    for _ in range(150):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert lost() < 0.9 * before


@pytest.mark.proves("qat.lower")
def test_a_trained_model_goes_down_to_integers() -> None:
    x, model = images(), net()
    module = prepare(model, "int8", "int8", data=[x])
    train(module, x, model(x).detach().roll(1, 0))
    q = convert(module)
    out = rd.simulate(rd.lower(q), x)
    got = torch.as_tensor(next(iter(out.values())) if isinstance(out, dict) else out).detach()
    step = float(q.activations[q.structure.outputs[0]].params.scale)  # type: ignore[union-attr, arg-type]
    assert float((got - q.module(x).detach()).abs().max()) <= 2.01 * step


# -- an ordinary module -----------------------------------------------------------------------------------------------


@pytest.mark.proves("qat.resume")
@pytest.mark.parametrize("learn", ["step", "ema"])
@pytest.mark.parametrize("text", ["int4", "cb16/channel", "uint4/g32~uint4"])
def test_a_checkpoint_resumes_to_the_same_bytes(text: str, learn: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    x, model = images(), net()
    y = model(x).detach().roll(1, 0)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad()
            (module(x) - y).square().mean().backward()
            optimizer.step()

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = prepare(model, text, "int8", data=[x], learn=learn)  # type: ignore[arg-type]
        return module, torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)

    module, optimizer = begin()
    step(module, optimizer, 2)
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    step(module, optimizer, 2)
    if learn == "ema":
        freeze(module)
    step(module, optimizer, 1)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    again, optimizer = begin()
    again.load_state_dict(checkpoint["module"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    step(again, optimizer, 2)
    if learn == "ema":
        freeze(again)
    step(again, optimizer, 1)
    assert saved(convert(again), tmp_path_factory) == saved(convert(module), tmp_path_factory)


@pytest.mark.proves("qat.amp")
def test_autocast_leaves_sums_of_codes_exact() -> None:
    """With every edge on codes nothing is left for bfloat16; weight-only layers do compute in it."""
    x, model = images(), net()
    module = prepare(model, "int4", "int8", data=[x]).eval()
    with torch.no_grad():
        plain = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), plain)
    module.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in kinds(module)["weights"])
    weights = prepare(model, "int4", data=[x]).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = weights(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), weights(x), rtol=0.05, atol=0.05)


@pytest.mark.proves("qat.compile")
@pytest.mark.filterwarnings("ignore")
def test_compiled_computes_and_trains_the_same() -> None:
    """Through dynamo and autograd's own tracing, on one layer: each costs seconds, and the second step is traced anew."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 2)), torch.randn(16, 8)
    y, module = torch.randn(16, 2), prepare(model, "int4", "int8", data=[x])
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(train(compiled, x, y), train(twin, x, y), rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
    torch.testing.assert_close(convert(compiled).module(x), convert(twin).module(x))  # type: ignore[arg-type]


def test_deep_copies_train_apart() -> None:
    x, model = images(), net()
    module = prepare(model, "int4", "int8", data=[x])
    twin = copy.deepcopy(module)
    before = convert(module).module(x)
    train(twin, x, model(x).detach().roll(1, 0))
    assert torch.equal(convert(module).module(x), before)
    assert torch.equal(convert(twin).module(x), twin.eval()(x))
    assert not torch.equal(convert(twin).module(x), before)


@pytest.mark.proves("qat.kinds")
def test_kinds_are_all_that_trains_each_once() -> None:
    x, model = images(), net()
    module = prepare(model, "cb16/g32*int8", "int8", data=[x])
    found = kinds(module)
    every = [id(p) for group in found.values() for p in group]
    assert len(every) == len(set(every))
    assert set(every) == {id(p) for p in module.parameters() if p.requires_grad}
    assert {kind: bool(group) for kind, group in found.items()} == {
        "weights": True, "rounding": False, "scales": True, "tables": True, "rest": True,
    }  # fmt: skip
    train(module, x, model(x).detach().roll(1, 0), steps=1)
    for kind, group in found.items():
        moved = [p.grad is not None and float(p.grad.abs().sum()) > 0 for p in group]
        assert sum(moved) >= 0.7 * len(moved), kind


def test_the_float_model_and_the_start_stay_as_they_were() -> None:
    x, model = images(), net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    q = rd.quantize(model, "int4", "int8", data=[x])
    out = q.module(x).detach()
    module = prepare_quantized(q)
    assert torch.equal(module(x), out)
    train(module, x, out.roll(1, 0))
    assert torch.equal(q.module(x), out)
    prepare(model, "int4", "int8", data=[x])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


# -- module trees -----------------------------------------------------------------------------------------------------


class Loops(nn.Module):
    """Cannot be captured: what it does depends on a number; with a norm of batches, a tied head and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.BatchNorm1d(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids).mean(1))
        if float(x.detach().sum()) > 1e9:
            x = -x
        return self.head(torch.relu(self.mix(x)))


@pytest.mark.proves("qat.modules", "qat.norms")
@pytest.mark.parametrize("activations", [None, "int8", "int8:dynamic"])
def test_module_trees_train_with_live_norms_until_they_are_frozen(activations: str | None) -> None:
    torch.manual_seed(0)
    model, ids = Loops().eval(), torch.randint(11, (32, 5))
    module = prepare(model, "int4", activations, data=[ids])
    y = torch.randn(32, 11)
    before = module.get_buffer("norm.running_mean").clone()
    train(module, ids, y)
    moved = module.get_buffer("norm.running_mean").clone()
    assert not torch.equal(before, moved)
    freeze(module.train())
    train(module, ids, y)
    assert torch.equal(module.get_buffer("norm.running_mean"), moved)
    q = convert(module)
    with torch.no_grad():
        assert torch.equal(q.module(ids), module.eval()(ids))
    assert torch.equal(q.rest["norm.running_mean"], moved)
    assert set(q.tied) == {"head.weight"}


@pytest.mark.proves("qat.modules")
def test_a_transformers_model_trains_on_the_module_path(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(64, (4, 12))
    module = prepare(model, "int3/g16", "int8:dynamic", data=[ids])
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    lost = []
    for _ in range(12):
        loss = F.cross_entropy(module(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lost.append(loss.item())
    assert lost[-1] < 0.9 * lost[0]
    q = convert(module)
    with torch.no_grad():
        out = module.eval()(ids).logits
        assert torch.equal(q.module(ids).logits, out)
        path = tmp_path_factory.mktemp("q") / "q.safetensors"
        q.save(path)
        assert torch.equal(rd.load(path).module(ids).logits, out)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_errors_say_which_layer_and_what_to_do() -> None:
    x, model = images(), net()
    with pytest.raises(PlanError, match="not made by prepare"):
        convert(model)
    q = rd.quantize(model, "int4", "int8", data=[x])
    with pytest.raises(PlanError, match="quantized already"):
        prepare(q)
    with pytest.raises(InputError, match=r"no weight '0\.weight'"):
        prepare_quantized(q, {})
    module = prepare(model, "int4", "int8", data=[x])
    with torch.no_grad():
        kinds(module)["weights"][1].fill_(torch.nan)
    with pytest.raises(InputError, match=r"4\.weight: .*no longer finite"):
        convert(module)
    vectors = [t for t in CATALOGUE if isinstance(Format.parse(t).grid, Codebook) and Format.parse(t).step > 1]
    with pytest.raises(rd.FormatError, match=r"0\.weight: .*no two neighbours"):
        prepare(model, vectors[0], data=[x], rounding="sigmoid")
