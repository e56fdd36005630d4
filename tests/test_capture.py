"""`capture` against the module itself: each operation, whole networks, names, notes, refusals, a module left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_data
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ResNet20, SmallCNN, TransformerBlock, resnet20, settle
from torch import Tensor, nn

from roundel.errors import InputError
from roundel.graph import BATCH, Graph, GraphModule
from roundel.network.capture import capture


class Fn(nn.Module):
    """A function as a module, with a few parameters at hand."""

    def __init__(self, fn: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) and part.is_floating_point() else part)

    def forward(self, *args: Tensor) -> Any:
        return self.fn(self, *args)


def flat(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, Mapping) else out) for t in flat(part)]


def draw(shape: Sequence[int], batch: int) -> Tensor:
    return torch.randn(batch, *shape)


def check(module: nn.Module, *shapes: Sequence[int], batches: Sequence[int] = (1, 2, 5), tolerance: float = 1e-5) -> Graph:
    """Capture on a batch of 2; the graph must give the module's outputs at every batch size."""
    module.eval()
    graph = capture(module, tuple(draw(s, 2) for s in shapes))
    runner = GraphModule(graph)
    for n in batches:
        xs = [draw(s, n) for s in shapes]
        with torch.no_grad():
            want, got = flat(module(*[x.clone() for x in xs])), flat(runner(*xs))
        assert len(want) == len(got)
        for w, g in zip(want, got, strict=True):
            assert w.shape == g.shape
            assert w.dtype == g.dtype
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)
    return graph


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph]


IMAGE = (4, 8, 8)
ROWS = (6, 8)
M = torch.linspace(-1, 1, 64).reshape(8, 8).sin()
CAUSAL = torch.ones(6, 6).tril().bool()

#: name -> (function, shape of one example, the operations the graph must have)
CASES: dict[str, tuple[Callable[[Tensor], Any], Sequence[int], str]] = {
    "conv2d same": (lambda x: F.conv2d(x, torch.ones(2, 4, 4, 3), padding="same", dilation=(1, 2)), IMAGE, "conv"),
    "conv1d": (lambda x: F.conv1d(x, torch.ones(2, 3, 3), stride=2, padding=1, groups=2), ROWS, "conv"),
    "conv_transpose1d": (lambda x: F.conv_transpose1d(x, torch.ones(6, 2, 3), stride=2, output_padding=1), ROWS, ""),
    "matmul by a parameter": (lambda x: x @ torch.ones(8, 3), ROWS, "linear"),
    "matmul": (lambda x: x @ x.transpose(1, 2), ROWS, "transpose matmul"),
    "bmm": (lambda x: torch.bmm(x, x.permute(0, 2, 1)), ROWS, "transpose matmul"),
    "baddbmm": (lambda x: torch.baddbmm(x, x[:, :, :6], x, beta=0.5, alpha=2.0), ROWS, "slice matmul mul mul add"),
    "addmm": (lambda x: torch.addmm(torch.arange(3.0), x, torch.ones(8, 3)), (8,), "linear"),
    "einsum": (lambda x: torch.einsum("bnd,bmd->bnm", x, x), ROWS, ""),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (2, 6, 8), "attention"),
    "attention mask": (lambda x: F.scaled_dot_product_attention(x, x, x, CAUSAL, scale=0.3), (2, 6, 8), "attention"),
    "arithmetic": (lambda x: (1 - x) * 2 + x / 3 - x.add(x, alpha=2).sub(1), ROWS, "sub mul div add mul add sub sub"),
    "powers": (lambda x: (x**2) ** 0.5 + (x * x + 1) ** -0.5 + (x.abs() + 1) ** 3 + 1 / (x * x + 1), ROWS, ""),
    "square reciprocal": (lambda x: (x.square() + 1).reciprocal() + 2 ** (x * 0.1), ROWS, "mul add div mul pow add"),
    "functions": (lambda x: x.abs().add(1).log() + x.exp().sqrt() + x.erf() + x.sin().cos() - (-x).tanh(), ROWS, ""),
    "rsqrt": (lambda x: torch.rsqrt(x * x + 1), ROWS, "mul add rsqrt"),
    "log1p expm1": (lambda x: torch.log1p(x * x) + torch.expm1(x), ROWS, "mul add log exp sub add"),
    "in place": (lambda x: x.add(1).mul_(2).relu_().add_(x), ROWS, "add mul relu add"),
    "in place on a copy": (lambda x: x.clone().add_(1) + x, ROWS, "add add"),
    "clamp": (lambda x: x.clamp(-0.5, 0.5) + x.clamp(max=0.1) + x.clamp_min(0.0) + F.hardtanh(x, 0, 6), ROWS, ""),
    "clamp by tensors": (lambda x: torch.clamp(x, torch.zeros(8), torch.ones(8)), ROWS, "maximum minimum"),
    "relu6 relu": (lambda x: F.relu6(x * 9) + F.relu(x), ROWS, "mul relu6 relu add"),
    "activations": (lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.hardswish(x) + F.hardsigmoid(x), ROWS, ""),
    "more activations": (lambda x: F.leaky_relu(x, 0.2) + F.elu(x, 0.7) + F.celu(x, 0.5) + F.selu(x) + F.mish(x), ROWS, ""),
    "rare activations": (lambda x: F.softplus(x) + F.glu(x.repeat(1, 1, 2), -1) + F.softsign(x) + F.logsigmoid(x), ROWS, ""),
    "prelu": (lambda x: F.prelu(x, torch.arange(6.0) / 6), ROWS, "prelu"),
    "softmax": (lambda x: x.softmax(1) + F.log_softmax(x, -1), ROWS, "softmax log_softmax add"),
    "layer_norm": (lambda x: F.layer_norm(x, (8,)), ROWS, "layer_norm"),
    "layer_norm over two": (lambda x: F.layer_norm(x, (6, 8), M[:6], M[2:]), ROWS, "reshape layer_norm reshape"),
    "rms_norm": (lambda x: F.rms_norm(x, (8,), M[0]), ROWS, "rms_norm"),
    "group_norm": (lambda x: F.group_norm(x, 2, M[0, :4], M[1, :4]), IMAGE, "group_norm"),
    "instance_norm": (lambda x: F.instance_norm(x), IMAGE, "group_norm"),
    "batch_norm": (lambda x: F.batch_norm(x, M[0, :4], M[1, :4].abs() + 1), IMAGE, "batch_norm"),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE, "max_pool"),
    "max_pool ceil": (lambda x: (F.max_pool2d(x, 3, 2, ceil_mode=True), F.max_pool2d(x, (2, 3), 2, 1, ceil_mode=True)), IMAGE, ""),
    "max_pool ceil that drops a window": (lambda x: F.max_pool2d(x, 2, 3, 1, ceil_mode=True), IMAGE, "max_pool"),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), ROWS, ""),
    "avg_pool": (lambda x: F.avg_pool2d(x, 3, 1, 1) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), IMAGE, ""),
    "avg_pool ceil": (lambda x: F.avg_pool2d(x, 3, ceil_mode=True), IMAGE, "avg_pool"),
    "avg_pool by size": (lambda x: F.avg_pool2d(x, x.size()[3]), IMAGE, "avg_pool"),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), ROWS, ""),
    "adaptive to one": (lambda x: F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1), IMAGE, "mean amax add"),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (4, 2)) + F.adaptive_max_pool2d(x, (4, 2)), IMAGE, "avg_pool max_pool add"),
    "reductions": (lambda x: x.mean(1) + x.sum(1) + x.amax(1) + x.amin(1) + x.mean((1, 2))[:, None], ROWS, ""),
    "var std": (lambda x: x.var(-1, unbiased=False) + x.std(2) + torch.var_mean(x, 2)[1], ROWS, ""),
    "norm": (lambda x: F.normalize(x, dim=-1), ROWS, ""),
    "max argmax": (lambda x: (x.max(1), x.argmax(2), x.argmax(1, keepdim=True)), ROWS, ""),
    "compare where": (lambda x: torch.where(x > 0, x, -x) + (x >= 1).float() + x.masked_fill(x.lt(0), 3.0), ROWS, ""),
    "logic": (lambda x: torch.where((x > 0) & ~(x > 1) | (x < -1), x, 0.0), ROWS, ""),
    "maximum": (lambda x: torch.maximum(x, -x) + torch.min(x, x * 2) + torch.max(x, x), ROWS, ""),
    "reshapes": (lambda x: x.flatten(1).view(-1, 2, 24).unflatten(2, (4, 6)).unsqueeze(1).reshape(x.shape[0], -1), ROWS, ""),
    "batch joins another axis": (lambda x: x.reshape(-1, 8).view(x.shape[0] * 2, 3, 8), ROWS, "reshape reshape"),
    "transposes": (lambda x: x.permute(2, 0, 1).transpose(0, 1) + x.mT, ROWS, ""),
    "slices": (lambda x: x[:, ::2, 1:-1] + x[:, :3, :6] + x[..., 1, None, 2:], ROWS, ""),
    "option A": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0), IMAGE, "slice slice pad"),
    "pads": (lambda x: F.pad(x, (1, 2), value=3.0).sum(2) + F.pad(x, (1, 2), mode="reflect").mean(2), ROWS, ""),
    "pad replicate": (lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), IMAGE, "pad"),
    "select unbind": (lambda x: x[:, 2] + x.select(1, -1) + x.unbind(1)[3], ROWS, ""),
    "cat stack": (lambda x: torch.stack([torch.cat([x, x * 2], -1), torch.cat([x, x], 2)], 1), ROWS, ""),
    "chunk split": (lambda x: x.chunk(2, 1)[1] + x.split([2, 3, 1], 1)[1] + x.split(3, 1)[0], ROWS, ""),
    "expand repeat": (lambda x: x[:, :1].expand(-1, 6, -1) + x[:, 1:2].repeat(1, 6, 1) + x.repeat(1, 2, 1)[:, 6:], ROWS, ""),
    "class token": (lambda x: torch.cat([torch.ones(1, 1, 8).expand(x.shape[0], -1, -1), x], 1), ROWS, "expand_batch concat"),
    "constructors": (lambda x: torch.zeros(x.shape[0], 6, 1) + torch.ones_like(x) + x.new_full((x.shape[0], 1, 8), 2.0), ROWS, ""),
    "arange": (lambda x: x + torch.arange(8) * torch.full((6, 1), 0.5), ROWS, "add"),
    "index": (lambda x: x[:, [2, 0, 5]] + x.index_select(1, torch.tensor([1, 1, 4])), ROWS, "gather gather add"),
    "embedding": (lambda x: F.embedding((x > 0).long().sum(1), M), ROWS, ""),
    "flip roll": (lambda x: x.flip([1, 2]) + x.roll(2, 1), ROWS, ""),
    "casts": (lambda x: x.double().float() + x.to(torch.float32) + (x > 0).int().float(), ROWS, ""),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, size=(16, 16)), IMAGE, "resize resize add"),
    "bilinear": (lambda x: F.interpolate(x, (5, 16), mode="bilinear", align_corners=True), IMAGE, "resize"),
    "bilinear by factor": (lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), IMAGE, "resize"),
    "pixel_shuffle": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), IMAGE, ""),
    "no-ops": (lambda x: F.dropout(x.contiguous().clone(), training=False) + x.detach(), ROWS, "add"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operation(name: str) -> None:
    fn, shape, expected = CASES[name]
    graph = check(Fn(lambda m, x: fn(x)), shape)
    if expected:
        assert ops(graph) == expected.split()
    assert not [note for note in graph.notes if "only" in note]
    assert all(graph.values[name].shape[0] == BATCH for name in graph.inputs)


def test_embedding_takes_ids() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids) + torch.arange(ids.shape[1])[:, None])

    module = Words().eval()
    graph = capture(module, {"ids": torch.randint(0, 11, (2, 5))})
    ids = torch.randint(0, 11, (3, 5))
    torch.testing.assert_close(GraphModule(graph)(ids=ids), module(ids))
    assert graph.values["ids"].shape == (BATCH, 5)
    assert [n for n in graph.constants if n.endswith("weight")] == ["table.weight"]  # tied: one constant
    assert [n.name for n in graph] == ["table", "add", "head"]


# -- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.proves("graph.capture")
def test_small_cnn_and_its_names() -> None:
    graph = check(settle(SmallCNN()), (3, 16, 16))
    names = [node.name for node in graph]
    assert names[:5] == ["stem.0", "stem.1", "stem.2", "depth", "depth_bn"]
    assert {"relu6", "add", "max_pool", "concat", "fc2"} <= set(names)
    assert {"stem.0.weight", "stem.1.running_mean", "fc2.bias"} <= set(graph.constants)
    assert graph.inputs == ("x",)
    assert graph.outputs == ("fc2",)
    assert graph.values["fc2"].shape == (BATCH, 10)


@pytest.mark.proves("graph.capture")
def test_transformer_block() -> None:
    graph = check(TransformerBlock(), (7, 16))
    assert ops(graph).count("attention") == 1
    assert "token" in graph.constants


def test_multihead_attention_module_names_its_projections() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    graph = check(Net(), ROWS)
    assert [n.name for n in graph if n.op == "linear"] == ["attn.in_proj", "attn.out_proj"]
    assert graph.constants["attn.in_proj_weight"].shape == (24, 8)


@needs_data
@pytest.mark.proves("graph.capture")
def test_resnet20_with_its_trained_weights() -> None:
    graph = check(resnet20(), (3, 32, 32))
    assert ops(graph).count("conv") == 19
    assert ops(graph).count("pad") == 2
    assert {"layer1.0.conv1", "layer1.0.add", "layer2.0.shortcut", "linear"} <= {n.name for n in graph}


@st.composite
def small_cnns(pick: st.DrawFn) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 4
    for _ in range(pick(st.integers(1, 4))):
        kind = pick(st.sampled_from(["conv", "depthwise", "bn", "act", "pool", "norm"]))
        if kind == "conv":
            out = pick(st.sampled_from([4, 6, 8]))
            layers.append(nn.Conv2d(channels, out, pick(st.sampled_from([1, 3])), padding=1, bias=pick(st.booleans())))
            channels = out
        elif kind == "depthwise":
            layers.append(
                nn.Conv2d(
                    channels,
                    channels,
                    3,
                    padding=(0, 1),
                    groups=channels,
                    padding_mode=pick(st.sampled_from(["zeros", "circular"])),
                )
            )
        elif kind == "pool":
            layers.append(
                pick(st.sampled_from([nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2, padding=1), nn.MaxPool2d(3, 1, 1)]))
            )
        else:
            made = {
                "bn": nn.BatchNorm2d(channels),
                "norm": nn.GroupNorm(2, channels),
                "act": pick(st.sampled_from([nn.ReLU(True), nn.Hardswish(), nn.ReLU6()])),
            }
            layers.append(made[kind])
    return settle(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)))  # fmt: skip


@pytest.mark.proves("graph.capture")
@settings(max_examples=5, deadline=None, derandomize=True)
@given(small_cnns())
def test_any_small_cnn(model: nn.Module) -> None:
    torch.manual_seed(0)
    graph = check(model, (4, 12, 12))
    assert set(graph.constants) <= {*model.state_dict(), *(n for n in graph.constants if n.endswith("value"))}


# -- batches, inputs, outputs -----------------------------------------------------------------------------------------


@pytest.mark.proves("graph.capture")
def test_batch_of_one_is_still_symbolic() -> None:
    graph = capture(nn.Linear(4, 3), torch.randn(1, 4))
    assert graph.values[graph.inputs[0]].shape == (BATCH, 4)
    assert [n.name for n in graph] == ["linear"]
    assert set(graph.constants) == {"weight", "bias"}


def test_model_that_fixes_its_batch_is_captured_for_it_with_a_note() -> None:
    module = Fn(lambda m, x: x.reshape(1, 3, 2) * 2)
    graph = capture(module, torch.randn(1, 6))
    assert graph.values[graph.inputs[0]].shape == (1, 6)
    assert "batch of 1 only" in graph.notes[0]
    torch.testing.assert_close(GraphModule(graph)(torch.ones(1, 6)), torch.full((1, 3, 2), 2.0))


def test_two_inputs_share_the_batch_and_a_third_may_not() -> None:
    class Net(nn.Module):
        def forward(self, a: Tensor, b: Tensor, table: Tensor) -> dict[str, Tensor]:
            return {"sum": a + b, "rows": a @ table}

    graph = capture(Net(), {"a": torch.randn(2, 4), "b": torch.randn(2, 4), "table": torch.randn(4, 3)})
    assert [graph.values[n].shape for n in ("a", "b", "table")] == [(BATCH, 4), (BATCH, 4), (4, 3)]
    assert any("dict" in note for note in graph.notes)
    a, b, table = torch.randn(5, 4), torch.randn(5, 4), torch.randn(4, 3)
    total, rows = GraphModule(graph)(a=a, b=b, table=table)
    torch.testing.assert_close(total, a + b)
    torch.testing.assert_close(rows, a @ table)


def test_a_branch_on_the_batch_size_is_told() -> None:
    graph = capture(Fn(lambda m, x: x * 2 if x.shape[0] > 3 else x), torch.randn(8, 4))
    assert any("batch sizes 4 to" in note for note in graph.notes), graph.notes


def test_graph_module_gives_its_graph() -> None:
    graph = capture(nn.Linear(2, 2), torch.randn(2, 2))
    assert capture(GraphModule(graph), torch.randn(2, 2)).to_json() == graph.to_json()


def test_repeated_module_gets_numbered_names() -> None:
    module = Fn(lambda m, x: m.act(m.fc(m.act(m.fc(x)))), fc=nn.Linear(4, 4), act=nn.ReLU())
    assert [n.name for n in check(module, (4,))] == ["fc", "act", "fc_1", "act_1"]


def test_scalars_are_constants_of_their_node() -> None:
    graph = check(Fn(lambda m, x: x * 0.5 + 1), (4,))
    assert {n: t.item() for n, t in graph.constants.items()} == {"mul.value": 0.5, "add.value": 1.0}


def test_strided_weight_equals_its_contiguous_copy() -> None:
    module = nn.Linear(6, 4)
    module.weight.data = torch.randn(6, 4).t()
    graph = capture(module, torch.randn(2, 6))
    assert graph.constants["weight"].is_contiguous()
    assert torch.equal(graph.constants["weight"], module.weight)


# -- the module is left alone -----------------------------------------------------------------------------------------


@pytest.mark.proves("inputs.parametrization")
@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weight_is_folded(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = nn.Sequential(wrap(nn.Conv2d(4, 4, 3)), nn.ReLU())
    graph = check(module, IMAGE)
    assert [n.name for n in graph] == ["0", "1"]
    assert set(graph.constants) == {"0.weight", "0.bias"}
    torch.testing.assert_close(graph.constants["0.weight"], module[0].weight)
    assert any(note.startswith("0.weight is computed from 0.parametrizations.weight.original") for note in graph.notes)
    assert (
        "parametrizations.weight.original0" in dict(module[0].named_parameters())
        or wrap is not nn.utils.parametrizations.weight_norm
    )


@pytest.mark.proves("inputs.parametrization")
def test_training_mode_hooks_and_numbers_survive() -> None:
    def run(fail: bool) -> None:
        module = settle(SmallCNN())
        module.train()
        module.drop.eval()
        calls: list[int] = []
        handle = module.fc1.register_forward_hook(lambda *_: calls.append(1))
        if fail:
            module.forward = lambda x: torch.fft.fft(x)  # type: ignore[method-assign]
        modes, state = {n: m.training for n, m in module.named_modules()}, {k: v.clone() for k, v in module.state_dict().items()}
        if fail:
            with pytest.raises(InputError):
                capture(module, torch.randn(2, 3, 16, 16))
        else:
            capture(module, torch.randn(2, 3, 16, 16))
        assert modes == {n: m.training for n, m in module.named_modules()}
        assert handle.id in module.fc1._forward_hooks
        assert all(torch.equal(v, module.state_dict()[k]) for k, v in state.items())
        assert all(p.requires_grad and p.grad is None for p in module.parameters())

    run(fail=False)
    run(fail=True)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("inputs.data-dependent-if")
def test_branch_on_data_names_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(InputError, match=r'test_capture\.py:\d+ \("if x\.sum\(\) > 0:"\).*torch\.where') as caught:
        capture(Gate(), torch.randn(2, 3))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_unsupported_operations_are_told_all_at_once() -> None:
    module = nn.Sequential(
        Fn(lambda m, x: torch.fft.fft(x).real), Fn(lambda m, x: torch.cumsum(x, 1)), Fn(lambda m, x: torch.rand_like(x))
    )
    with pytest.raises(InputError, match=r"no counterpart.*fft.* in 0; .*in 1; .*in 2") as caught:
        capture(module, torch.randn(2, 8))
    assert "cumsum" in str(caught.value)
    assert "rand" in str(caught.value)


def test_adaptive_pool_that_does_not_divide_says_so() -> None:
    with pytest.raises(
        InputError, match=r"_?adaptive_avg_pool2d \(from \[8, 8\] to \[3, 3\], which does not divide\) in the model itself"
    ):
        capture(Fn(lambda m, x: F.adaptive_avg_pool2d(x, 3)), torch.randn(2, 4, 8, 8))


def test_write_into_a_buffer_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * 2

    with pytest.raises(InputError, match="write into a buffer in seen"):
        capture(Counter(), torch.randn(2, 3))


@pytest.mark.proves("inputs.meta")
def test_one_tensor_given_for_two_inputs_stands_for_two() -> None:
    """torch.export would read the second input for both."""
    x = torch.randn(3, 4)
    graph = capture(Fn(lambda m, a, b: a.relu() - b.sigmoid()), (x, x))
    assert [node.inputs for node in graph][:2] == [(graph.inputs[0],), (graph.inputs[1],)]


def test_meta_tensors_are_named() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(InputError, match=r"7 tensors have no numbers.*0\.weight, 0\.bias"):
        capture(module, torch.randn(2, 4))


@pytest.mark.parametrize("example", [(), (torch.randn(2, 4), 3), {"x": [1]}])
def test_examples_that_hold_no_tensors(example: Any) -> None:
    with pytest.raises(InputError, match="tensor"):
        capture(nn.Linear(4, 4), example)


def test_example_that_does_not_fit_says_what_torch_said() -> None:
    with pytest.raises(InputError, match="cannot be traced on the example"):
        capture(ResNet20(), torch.randn(2, 5))
