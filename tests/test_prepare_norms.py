"""Batch norms that live beside a captured graph: against torch's own in training mode, in every format bit for bit once folded, and
through everything that a training does to a module. Norms that are modules of their own are in test_qat.py."""

import copy
import io
from functools import cache

import pytest
import torch
from loop import images, train
from torch import Tensor, nn

import roundel as rd
from roundel import InputError, PlanError
from roundel.graph import GraphModule
from roundel.qat import prepare
from roundel.tune import convert, freeze, kinds
from roundel.tune.prepare import prepare as prepare_quantized

#: One of each kind of scale, zero point, minimum and table; the whole catalogue is in test_qat.py.
FORMATS = ["int8", "int4", "int3/tensor", "int2", "uint4/g32", "uint4/g32~uint4", "uint4/g32*fp16-fp16", "int4/b8x16", "fp4",
           "nvfp4", "q4_k", "nf4/g32", "log4", "log4:fit", "ternary", "cb16/channel", "cb16/tensor", "cb16/g32*int8", "cb16x2",
           "int8/g32*e8m0", "fp32"]  # fmt: skip

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def settled(net: nn.Module, seed: int = 0) -> nn.Module:
    """``net`` with norms that have something to say."""
    draw = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(part, NORMS):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(generator=draw)
            part.running_var.uniform_(0.3, 2, generator=draw)
            if part.affine:
                part.weight.data.uniform_(-1.5, 1.5, generator=draw)
                part.bias.data.normal_(generator=draw)
    return net.eval()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return settled(nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                                 nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(16, 4)))  # fmt: skip


@cache
def captured() -> rd.Graph:
    """`cnn`, traced once: that takes longer than all that is tested here."""
    return rd.capture(cnn(), (images(2),))


def net() -> GraphModule:
    module = GraphModule(captured()).eval()
    for p in module.parameters():
        p.data = p.data.clone()
    return module


def norm_of(module: nn.Module, bias: str = "0.bias") -> nn.Module:
    return module.norms[bias.replace(".", "\x1f")]  # type: ignore[index, return-value]


# -- torch's own norm is the oracle -----------------------------------------------------------------------------------


LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 6, 3, padding=1, bias=False), lambda: nn.BatchNorm2d(6), (5, 3, 6, 6)),
    "conv with a bias": (lambda: nn.Conv2d(3, 6, 3), lambda: nn.BatchNorm2d(6, eps=1e-2), (5, 3, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.BatchNorm2d(8), (5, 4, 6, 6)),
    "conv 1-d": (lambda: nn.Conv1d(3, 6, 3), lambda: nn.BatchNorm1d(6), (5, 3, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 2, 2), lambda: nn.BatchNorm2d(6), (5, 3, 4, 4)),
    "linear": (lambda: nn.Linear(7, 6), lambda: nn.BatchNorm1d(6), (9, 7)),
    "no gain": (lambda: nn.Conv2d(3, 6, 3, bias=False), lambda: nn.BatchNorm2d(6, affine=False), (5, 3, 6, 6)),
}


@pytest.mark.proves("qat.bn-live")
@pytest.mark.parametrize("layer", LAYERS)
def test_with_float_formats_it_is_torchs_norm_in_training_and_frozen(layer: str) -> None:
    """Outputs, losses, gradients of everything, running statistics: four steps live, then two frozen, then evaluation."""
    torch.manual_seed(3)
    make, norm, shape = LAYERS[layer]
    model = settled(nn.Sequential(make(), norm(), nn.ReLU()))
    x = torch.randn(shape)
    y = torch.randn_like(model(x))
    module, twin = prepare(model, "fp32", data=[x], norms="live", momentum=0.1), copy.deepcopy(model).train()
    live = norm_of(module)
    pairs = [(p, twin[0].weight) for p in kinds(module)["weights"]]  # type: ignore[index]
    if twin[1].affine:  # type: ignore[index]
        pairs += [(live.gain, twin[1].weight), (live.shift, twin[1].bias)]  # type: ignore[index]
    optimizers = [torch.optim.SGD([p for pair in pairs for p in pair[i : i + 1]], lr=0.1) for i in (0, 1)]
    for step in range(6):
        if step == 4:  # late: the statistics stay, gains and weights go on
            freeze(module)
            twin[1].eval()  # type: ignore[index]
        outs = module(x), twin(x)
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
        for optimizer, out in zip(optimizers, outs, strict=True):
            optimizer.zero_grad()
            (out - y).square().mean().backward()
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(live.mean, twin[1].running_mean, rtol=1e-5, atol=1e-5)  # type: ignore[index]
        torch.testing.assert_close(live.var, twin[1].running_var, rtol=1e-5, atol=1e-5)  # type: ignore[index]
    torch.testing.assert_close(module.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(convert(module).module(x), module(x))


@pytest.mark.proves("qat.bn-live")
def test_quantized_sums_are_what_the_norm_sees() -> None:
    """By hand: fold under the running statistics, round, divide by the fold, and normalise by the batch."""
    x, model = images(), net()
    module = prepare(model, "int3", data=[x], norms="live", momentum=0.25)
    live = norm_of(module)
    w, gain, shift = kinds(module)["weights"][0].detach(), live.gain.detach(), live.shift.detach()  # type: ignore[operator]
    factor = gain / (live.var + live.eps).sqrt()  # type: ignore[operator]
    tensor = convert(module).tensors["0.weight"]
    torch.testing.assert_close(tensor.dequantize(), rd.quantize(model, "int3", data=[x]).tensors["0.weight"].dequantize())
    assert float((tensor.dequantize() / factor[:, None, None, None] - w).abs().max()) > 0.01  # it does round
    sums = nn.functional.conv2d(x, tensor.dequantize() / factor[:, None, None, None], padding=1)
    mean, var = sums.mean((0, 2, 3)), sums.var((0, 2, 3), correction=0)
    wanted = (sums - mean[:, None, None]) / (var + live.eps).sqrt()[:, None, None]  # type: ignore[operator]
    wanted = (wanted * gain[:, None, None] + shift[:, None, None]).relu()
    seen: dict[str, Tensor] = {}
    module.watch = lambda name, value: seen.setdefault(name, value)
    before = live.mean.clone()  # type: ignore[operator]
    module(x)
    torch.testing.assert_close(seen["0"], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(live.mean, 0.75 * before + 0.25 * mean)


# -- converted is what was trained ------------------------------------------------------------------------------------


@pytest.mark.proves("qat.bn-live", "qat.convert")
@pytest.mark.parametrize("text", FORMATS)
def test_live_and_frozen_convert_to_the_module_in_evaluation_mode(text: str) -> None:
    x, model = images(8), net()
    module = prepare(model, text, "int8", data=[x], norms="live", momentum=0.1)
    y = model(x).detach().roll(1, 0)
    if text in ("int4", "int3/tensor", "cb16/channel", "q4_k", "log4:fit", "fp32"):
        with torch.no_grad():
            assert torch.equal(module.eval()(x), rd.quantize(model, text, "int8", data=[x]).module(x))
    for late in (False, True):
        if late:
            freeze(module)
        train(module.train(), x, y, steps=1)
        q = convert(module)
        with torch.no_grad():
            assert torch.equal(q.module(x), module.eval()(x))
    assert q.provenance["trained"]["norms"] == "2 live"
    assert not [name for name in q.rest if "mean" in name or "var" in name]  # nothing of a norm is left


@pytest.mark.proves("qat.bn-live", "qat.lower")
def test_what_lived_goes_down_to_integers_and_into_a_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    x, model = images(), net()
    module = prepare(model, "int8", "int8", data=[x], norms="live")
    train(module, x, model(x).detach().roll(1, 0))
    q, path = convert(module), tmp_path_factory.mktemp("q") / "q.safetensors"
    q.save(path)
    with torch.no_grad():
        assert torch.equal(rd.load(path).module(x), module.eval()(x))
        step = float(q.activations[q.structure.outputs[0]].params.scale)
        out = torch.as_tensor(rd.simulate(rd.lower(q), x))
        assert float((out - q.module(x)).abs().max()) <= 2.01 * step


@pytest.mark.proves("qat.bn-live")
@pytest.mark.parametrize("text", ["int4", "uint4/g32~uint4", "uint4/g32*fp16-fp16", "cb16/channel", "ternary"])
def test_codes_do_not_shake_with_the_statistics(text: str) -> None:
    """A scale or table of one output carries the fold; under one of the whole tensor the folded weight is rounded anew."""
    x = images()
    module = prepare(net(), text, "int8", data=[x], norms="live")
    before, live = convert(module).tensors["0.weight"], norm_of(module)
    with torch.no_grad():
        live.var.mul_(torch.linspace(0.5, 0.9, 8))  # type: ignore[operator]
        live.gain.mul_(-1)  # type: ignore[operator]
        live.gain.mul_(-1.25)  # type: ignore[operator]
    after = convert(module).tensors["0.weight"]
    ratio = (live.factor() / module.weights["0\x1fweight"].begin[:, 0]).detach().float()  # type: ignore[operator]
    assert float((ratio - 1).abs().min()) > 0.01
    same = (before.unpack() == after.unpack()).float().mean()
    assert same > 0.99  # a scale that is rounded as it is stored may turn a tie
    torch.testing.assert_close(after.dequantize(), before.dequantize() * ratio[:, None, None, None], rtol=0.03, atol=1e-3)


@pytest.mark.proves("qat.bn-live")
def test_from_scratch_live_norms_learn_faster_than_folded_ones() -> None:
    """A network that knows nothing, its inputs far from where norms expect them: four numbers that can be told of an image."""
    torch.manual_seed(1)
    x = images(96) * 4 + 3
    y = torch.stack([x[:, 0].mean((1, 2)), x[:, 1].amax((1, 2)), x.std((1, 2, 3)), x[:, 0, 2, 2]], 1)
    y = (y - y.mean(0)) / y.std(0)
    fresh = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, bias=False),
                          nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()  # fmt: skip
    graph, left = rd.capture(fresh, (x[:2],)), {}
    for norms in ("live", "folded"):
        module = prepare(GraphModule(graph), "int4", "int8", data=[x], norms=norms, momentum=0.1)
        train(module, x, y, 25, 1e-2)
        freeze(module)
        train(module, x, y, 10, 2e-3)
        left[norms] = float((convert(module).module(x) - y).square().mean().detach())
    assert left["live"] < 0.7 * left["folded"]
    assert left["live"] < 0.25


# -- an ordinary module -----------------------------------------------------------------------------------------------


@pytest.mark.proves("qat.bn-live", "qat.resume")
@pytest.mark.parametrize("stop", [2, 4], ids=["live", "frozen"])
def test_a_checkpoint_resumes_in_the_middle(stop: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    x, model = images(), net()
    y = model(x).detach().roll(1, 0)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = prepare(model, "int4", "int8", data=[x], norms="live", momentum=0.1)
        return module, torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)

    def go(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            if step == 3:
                freeze(module)
            optimizer.zero_grad()
            (module(x) - y).square().mean().backward()
            optimizer.step()

    def saved(module: nn.Module) -> bytes:
        path = tmp_path_factory.mktemp("q") / "q.safetensors"
        convert(module).save(path)
        return path.read_bytes()

    module, optimizer = begin()
    go(module, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    go(module, optimizer, range(stop, 6))
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    again, optimizer = begin()
    again.load_state_dict(checkpoint["module"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert norm_of(again).frozen == (stop > 3)
    go(again, optimizer, range(stop, 6))
    assert saved(again) == saved(module)


@pytest.mark.proves("qat.bn-live")
@pytest.mark.parametrize("mode", [True, False], ids=["in training", "in evaluation"])
def test_the_mode_of_the_model_changes_nothing_and_stays(mode: bool) -> None:
    x, model = images(), cnn().train(mode)
    before = copy.deepcopy(model.state_dict())
    module = prepare(model, "int4", "int8", data=[x], norms="live")
    assert module.training
    assert {part.training for part in model.modules()} == {mode}
    with torch.no_grad():
        assert torch.equal(module.eval()(x), prepare(net(), "int4", "int8", data=[x], norms="live").eval()(x))
    train(module.train(), x, torch.randn(32, 4))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.proves("qat.bn-live", "qat.amp")
@pytest.mark.parametrize("activations", ["int8", None])
def test_under_autocast_statistics_stay_float32(activations: str | None) -> None:
    x, model = images(), net()
    module = prepare(model, "int4", activations, data=[x], norms="live", momentum=0.1)
    twin = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x).float().square().mean()
    loss.backward()
    twin(x)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)
    for name in ("mean", "var"):
        got, wanted = getattr(norm_of(module, "4.bias"), name), getattr(norm_of(twin, "4.bias"), name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=1e-6 if activations else 0.05, atol=1e-6 if activations else 0.05)


@pytest.mark.proves("qat.bn-live")
def test_copies_live_apart_and_evaluation_and_frozen_norms_follow_nothing() -> None:
    x = images()
    module = prepare(net(), "int4", "int8", data=[x], norms="live", momentum=0.5)
    twin, before = copy.deepcopy(module), convert(module).module(x)
    train(twin, 3 * x, before.detach().roll(1, 0))
    assert torch.equal(convert(module).module(x), before)
    assert not torch.equal(convert(twin).module(x), before)
    assert torch.equal(convert(twin).module(x), twin.eval()(x))
    mean = norm_of(module).mean.clone()  # type: ignore[operator]
    module.eval()(5 * x)
    freeze(module)
    module.train()(5 * x)
    assert torch.equal(norm_of(module).mean, mean)  # type: ignore[arg-type]
    freeze(module, on=False)
    module(5 * x)
    assert not torch.equal(norm_of(module).mean, mean)  # type: ignore[arg-type]
    names = {id(p) for p in kinds(module)["rest"]}
    assert {id(norm_of(module).gain), id(norm_of(module).shift)} <= names


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.proves("qat.bn-live")
def test_a_gain_of_zero_stays_and_harms_nothing() -> None:
    x, model = images(), cnn()
    with torch.no_grad():
        model[1].weight[3] = 0  # type: ignore[index]
    module = prepare(model, "int4", "int8", data=[x], norms="live", momentum=0.1)
    assert all(torch.isfinite(torch.tensor(train(module, x, torch.randn(32, 4), 4))))
    q = convert(module)
    assert float(q.tensors["0.weight"].dequantize()[3].abs().max()) == 0
    assert torch.equal(q.module(x), module.eval()(x))


@pytest.mark.proves("qat.bn-live")
def test_norms_that_cannot_live_alone_are_told() -> None:
    x = images()
    twice = settled(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()))
    module = prepare(twice, "int4", "int8", data=[x], norms="live")
    (note,) = (note for note in convert(module).notes if "stay folded" in note.text)
    assert note.text.startswith("2 batch norms")
    assert note.fallback
    grouped = settled(nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.BatchNorm2d(4)))
    assert "1 batch norms" in str(convert(prepare(grouped, "int4", data=[x], norms="live")).notes)
    assert "stay folded" not in str(convert(prepare(net(), "int4", data=[x], norms="live")).notes)
    first = nn.Sequential(settled(nn.BatchNorm2d(2)), nn.Conv2d(2, 4, 3)).eval()  # stands alone, and stays a node
    assert "stay folded" not in str(convert(prepare(first, "int4", data=[x], norms="live")).notes)


@pytest.mark.proves("qat.bn-live")
def test_choices_that_do_not_go_together_are_refused() -> None:
    x, model = images(), net()
    with pytest.raises(PlanError, match=r"rounding='sigmoid'.*live norm moves it"):
        prepare(model, "int4", data=[x], norms="live", rounding="sigmoid")
    with pytest.raises(PlanError, match=r"norms='thawed'.*folded, live"):
        prepare(model, "int4", data=[x], norms="thawed")
    with pytest.raises(PlanError, match=r"no choice 'norm'.*norms"):
        prepare(model, "int4", data=[x], norm="live")
    with pytest.raises(PlanError, match="before fuse"):
        prepare_quantized(rd.quantize(model, "int4", data=[x]), {}, norms="live")
    module = prepare(settled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), "int4", data=[torch.randn(8, 3)], norms="live")
    with pytest.raises(InputError, match=r"'0' \(linear\).*more than 1 value per channel"):
        module(torch.randn(1, 3))
    module = prepare(model, "int4", data=[x], norms="live")
    with torch.no_grad():
        norm_of(module).gain[0] = torch.nan  # type: ignore[operator]
    with pytest.raises(InputError, match=r"0\.weight: .*no longer finite"):
        convert(module)
