"""`quantize` in all its modes against naive integer loops, its fake-quantized twin, and what users get wrong; no files."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import SmallCNN, TransformerBlock, settle
from numpy.typing import NDArray
from torch import Tensor, nn

import roundel as rd
from roundel.graph import GraphModule
from roundel.network import watching
from roundel.network.sites import find_sites
from roundel.plan import Plan, Rule

Array = NDArray[Any]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def notes_of(q: rd.QModel) -> str:
    return " | ".join(f"{note.subject}: {note.text}" for note in q.notes)


# -- an oracle in numpy integers: it shares no code with the package, and reads the packed bytes itself ---------------


def stored_weight(q: rd.QModel, name: str) -> tuple[Array, Array]:
    """int8 codes in the weight's own shape, and the scale of each output, from the bytes."""
    tensor = q.tensors[name]
    assert str(tensor.format) == "int8/channel*fp16"
    assert tensor.scale is not None
    codes = tensor.codes.numpy().view(np.int8).astype(np.int64)
    matrix = codes.reshape(tensor.shape[tensor.axis], *np.delete(tensor.shape, tensor.axis))
    return np.moveaxis(matrix, 0, tensor.axis), tensor.scale.codes.numpy().view(np.float16).astype(np.float32).reshape(-1)


def stored_site(q: rd.QModel, site: str) -> tuple[np.float32, int]:
    """Scale and zero point of a static site, from the bytes."""
    params = q.activations[site].params
    assert params is not None
    scale, zero, _ = params.parts
    return scale.codes.numpy().view(np.float32).item(), zero.codes.numpy().view(np.int8).item()


def to_codes(x: Array, scale: float, zero: int) -> Array:
    return np.clip(np.rint(x / np.float32(scale)) + zero, -128, 127).astype(np.int64)


def settled(y: Array, scale: float, zero: int) -> Array:
    """The value that leaves a static site."""
    return (to_codes(y, scale, zero) - zero).astype(np.float32) * np.float32(scale)


def conv_sums(x: Array, w: Array, stride: int, padding: int, groups: int) -> Array:
    """The definition of a convolution, one output at a time, in int64."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    n, _, height, width = x.shape
    out, inner, kh, kw = w.shape
    y = np.zeros((n, out, (height - kh) // stride + 1, (width - kw) // stride + 1), np.int64)
    for o, i, j in np.ndindex(*y.shape[1:]):
        first = o // (out // groups) * inner
        window = x[:, first : first + inner, i * stride : i * stride + kh, j * stride : j * stride + kw]
        y[:, o, i, j] = (window * w[o]).sum((1, 2, 3))
    return y


def transposed_sums(x: Array, w: Array, stride: int) -> Array:
    """The definition of a transposed convolution: every input adds its kernel."""
    n, inner, height, width = x.shape
    _, out, kh, kw = w.shape
    y = np.zeros((n, out, (height - 1) * stride + kh, (width - 1) * stride + kw), np.int64)
    for c, i, j in np.ndindex(inner, height, width):
        y[:, :, i * stride : i * stride + kh, j * stride : j * stride + kw] += x[:, c, i, j, None, None, None] * w[c]
    return y


def finish(sums: Array, x_scale: Any, w_scale: Array, bias: Array) -> Array:
    """acc * (scale_w * scale_x) + bias in float32, channels on axis 1; sums here are far below 2^24."""
    assert np.abs(sums).max() < 2**24
    over = (slice(None), *[None] * (sums.ndim - 2))
    return sums.astype(np.float32) * (w_scale[over] * np.asarray(x_scale, np.float32)) + bias[over]


SAMPLES = rows(4, 6, 9, 9)
CONVS = {
    "plain": (nn.Conv2d(6, 4, 3, padding=1), (1, 1, 1)),
    "strided": (nn.Conv2d(6, 4, 3, stride=2), (2, 0, 1)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (1, 0, 2)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (1, 1, 6)),
}


@pytest.mark.proves("mode.static", "mode.on-codes")
@pytest.mark.parametrize("name", CONVS)
def test_static_convolution_equals_integers(name: str) -> None:
    layer, how = CONVS[name]
    q = rd.quantize(nn.Sequential(layer), "int8", "int8", data=[SAMPLES])
    (site_in, site_out), (w, w_scale) = ("input", "0"), stored_weight(q, "0.weight")
    x_scale, x_zero = stored_site(q, site_in)
    sums = conv_sums(to_codes(SAMPLES.numpy(), x_scale, x_zero) - x_zero, w, *how)
    want = settled(finish(sums, x_scale, w_scale, layer.bias.detach().numpy()), *stored_site(q, site_out))
    assert len(np.unique(want)) > 100
    assert np.array_equal(q.module(SAMPLES).detach().numpy(), want)


@pytest.mark.proves("mode.on-codes")
def test_static_transposed_convolution_equals_integers() -> None:
    layer, x = nn.ConvTranspose2d(6, 4, 3, stride=2), SAMPLES[:, :, :5, :5]
    q = rd.quantize(nn.Sequential(layer), "int8", "int8", data=[x])
    (w, w_scale), (x_scale, x_zero) = stored_weight(q, "0.weight"), stored_site(q, "input")
    sums = transposed_sums(to_codes(x.numpy(), x_scale, x_zero) - x_zero, w, 2)
    want = settled(finish(sums, x_scale, w_scale, layer.bias.detach().numpy()), *stored_site(q, "0"))
    assert np.array_equal(q.module(x).detach().numpy(), want)


@pytest.mark.proves("mode.static", "mode.on-codes")
def test_static_linear_equals_integers() -> None:
    layer, x = nn.Linear(40, 7), rows(5, 40)
    q = rd.quantize(nn.Sequential(layer, nn.ReLU()), "int8", "int8", data=[x])
    (w, w_scale), (x_scale, x_zero) = stored_weight(q, "0.weight"), stored_site(q, "input")
    sums = (to_codes(x.numpy(), x_scale, x_zero) - x_zero) @ w.T
    y = np.maximum(finish(sums, x_scale, w_scale, layer.bias.detach().numpy()), 0)
    assert np.array_equal(q.module(x).detach().numpy(), settled(y, *stored_site(q, "0")))


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@pytest.mark.proves("mode.on-codes")
def test_static_product_of_two_activations_equals_integers() -> None:
    a, b = rows(2, 5, 16), rows(2, 16, 3, seed=1)
    q = rd.quantize(Product(), None, "int8", data=[(a, b)])
    sites = [stored_site(q, name) for name in ("a", "b", "matmul")]
    codes = [to_codes(x.numpy(), *site) - site[1] for x, site in zip((a, b), sites, strict=False)]
    y = (codes[0] @ codes[1]).astype(np.float32) * (np.float32(sites[0][0]) * np.float32(sites[1][0]))
    assert np.array_equal(q.module(a, b).numpy(), settled(y, *sites[2]))


class Means(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(F.avg_pool2d(x, 3)).mean((2, 3))


@pytest.mark.proves("mode.on-codes")
def test_static_means_equal_integers() -> None:
    """Sums of codes are exact; an activation that fusion put into the pooling comes after the scale."""
    x = SAMPLES * 20
    q = rd.quantize(Means(), None, "int8", data=[x])
    assert isinstance(q.structure, rd.Graph)
    pool, last = (node.name for node in q.structure.nodes[-2:])
    (in_scale, in_zero), pooled = stored_site(q, "x"), stored_site(q, pool)
    seen: dict[str, Array] = {}
    with watching(q.module, lambda name, value: seen.update({name: value.numpy()})):
        q.module(x)
    codes = to_codes(x.numpy(), in_scale, in_zero) - in_zero
    y = codes.reshape(4, 6, 3, 3, 3, 3).sum((3, 5)).astype(np.float64) / 9
    y = np.clip(y.astype(np.float32) * np.float32(in_scale), 0, 6)
    assert 5 < y.max() <= 6  # codes go far above 6, so clipping codes would show
    assert np.array_equal(seen[pool], settled(y, *pooled))
    mean = ((to_codes(seen[pool], *pooled) - pooled[1]).sum((2, 3)) / 9).astype(np.float32) * np.float32(pooled[0])
    assert np.array_equal(seen[last], settled(mean, *stored_site(q, last)))


def dynamic_codes(x: Array) -> tuple[Array, Array]:
    """int8 codes less their zero point and scale of each row, ranges taken from the row and held open for zero."""
    lo, hi = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = (hi - lo) / np.float32(255)
    zero = np.clip(np.rint(-128 - lo / scale), -128, 127)
    return np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int64) - zero.astype(np.int64), scale


@pytest.mark.proves("mode.dynamic-tensor", "mode.on-codes", "api.activations")
def test_dynamic_per_tensor_equals_integers() -> None:
    layer, x = nn.Linear(40, 7), rows(5, 40) * torch.tensor([[1.0], [8.0], [0.1], [1.0], [3.0]])
    q = rd.quantize(nn.Sequential(layer), "int8", "int8:dynamic", data=[x[:1]])
    (w, w_scale), (codes, scale) = stored_weight(q, "0.weight"), dynamic_codes(x.numpy().reshape(1, -1))
    want = finish(codes.reshape(5, 40) @ w.T, scale[0, 0], w_scale, layer.bias.detach().numpy())
    assert np.array_equal(q.module(x).detach().numpy(), want)


@pytest.mark.proves("mode.dynamic-token", "mode.on-codes", "api.activations")
@pytest.mark.parametrize("text", ["int8/token:dynamic", "int8:token"])
@pytest.mark.parametrize("graph", [True, False])
def test_dynamic_per_token_equals_integers(text: str, graph: bool) -> None:
    layer, x = nn.Linear(40, 7), rows(5, 40) * torch.tensor([[1.0], [8.0], [0.1], [1.0], [3.0]])
    q = rd.quantize(nn.Sequential(layer), "int8", text, data=[x[:1]] if graph else None)
    (w, w_scale), (codes, scale) = stored_weight(q, "0.weight"), dynamic_codes(x.numpy())
    want = (codes @ w.T).astype(np.float32) * (w_scale[None] * scale) + layer.bias.detach().numpy()
    assert np.array_equal(q.module(x).detach().numpy(), want)


@pytest.mark.proves("mode.dynamic-token")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "layer", [nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3), nn.ConvTranspose1d(6, 4, 3)], ids=lambda m: type(m).__name__
)
def test_token_of_a_convolution_is_a_sample(layer: nn.Module, batched: bool) -> None:
    """One scale per sample, whatever its rank and whether or not there is a batch axis: each sample alone gives the same."""
    x = rows(3, 6, 9, 9) * torch.tensor([1.0, 30.0, 0.01]).reshape(3, 1, 1, 1)
    x = x if isinstance(layer, nn.Conv2d) else x[..., 0]
    for data in (None, [x]):
        q = rd.quantize(nn.Sequential(layer), "int8", "int8:token", data=data)
        for i, together in enumerate(q.module(x)):
            alone = q.module(x[i : i + 1])[0] if batched or data else q.module(x[i])
            assert torch.equal(alone, together)
            assert (together - layer(x[i : i + 1])[0]).abs().max() < 0.02 * together.abs().max()


@pytest.mark.proves("mode.on-codes")
def test_sums_above_two_to_the_24_are_exact() -> None:
    """20,001 products of up to 127 x 255: sums near 1.6e8, where float32 has steps of 16 and loses some at every addition."""
    layer, x = nn.Linear(20_001, 16, bias=False), torch.rand(4, 20_001)
    layer.weight.data = torch.rand(16, 20_001)
    q = rd.quantize(nn.Sequential(layer), "int8", "int8:dynamic", data=[x])
    (w, w_scale), (codes, scale) = stored_weight(q, "0.weight"), dynamic_codes(x.numpy().reshape(1, -1))
    sums = codes.reshape(4, -1) @ w.T
    assert sums.min() > 2**26
    want = sums.astype(np.float64) * (w_scale.astype(np.float64) * np.float64(scale[0, 0]))
    assert np.array_equal(q.module(x).detach().numpy(), want.astype(np.float32))


@pytest.mark.proves("mode.weight-only")
def test_weight_only_is_the_float_network_over_dequantized_weights() -> None:
    net, x = settle(SmallCNN()), rows(3, 3, 16, 16)
    for data in (None, [x]):
        q = rd.quantize(net, "int4/g32", data=data)
        assert not q.activations
        twin = copy.deepcopy(net) if data is None else rd.quantize(net, None, data=data).module
        with torch.no_grad():
            for name, tensor in q.tensors.items():
                if data is None:
                    twin.get_parameter(name).copy_(tensor.dequantize())
                else:
                    twin.rest[name.replace(".", "\x1f")].copy_(tensor.dequantize())
            assert torch.equal(q.module(x), twin(x))
        assert q.nbytes < 0.6 * sum(p.nbytes for p in net.parameters())


# -- every edge, and shared parameters --------------------------------------------------------------------------------


def edges_on_their_grids(q: rd.QModel, *args: Tensor) -> dict[str, float]:
    """Run and assert that every real number on every edge is (code - zero) * scale of its site; returns edge -> scale."""
    assert isinstance(q.structure, rd.Graph)
    root, scales = find_sites(q.structure).root, {}

    def check(name: str, value: Tensor) -> None:
        if not value.is_floating_point():
            return
        scale, zero = stored_site(q, root[name])
        codes = np.rint(value.numpy() / np.float32(scale)).astype(np.int64)
        assert codes.min() + zero >= -128
        assert codes.max() + zero <= 127
        assert np.array_equal(codes.astype(np.float32) * np.float32(scale), value.numpy()), name
        scales[name] = scale

    with torch.no_grad(), watching(q.module, check):
        q.module(*args)
    return scales


@pytest.mark.proves("mode.static")
@pytest.mark.parametrize("net", [SmallCNN, TransformerBlock])
def test_every_edge_is_quantized(net: Callable[[], nn.Module]) -> None:
    model, x = settle(net()), rows(3, 3, 16, 16) if net is SmallCNN else rows(3, 7, 16)
    q = rd.quantize(model, "int8", "int8", data=[x])
    seen = edges_on_their_grids(q, x)
    assert isinstance(q.structure, rd.Graph)
    assert seen.keys() >= {*q.structure.inputs, *q.structure.outputs}
    assert len(seen) == len(q.structure.inputs) + sum(len(node.outputs) for node in q.structure.nodes)


class Moves(nn.Module):
    """Two convolutions of very different range that meet in a concat, then every way of moving values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.big, self.small = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.big(x) * 50, self.small(x)], 1)
        padded = F.pad(F.max_pool2d(both, 2), (1, 1, 0, 0))
        return padded[:, 2:].transpose(2, 3).reshape(x.shape[0], -1), F.pad(torch.sigmoid(x), (1, 1), value=7.0)


@pytest.mark.proves("mode.shared-params")
def test_moved_values_inherit_and_a_concat_shares() -> None:
    x = rows(2, 3, 8, 8)
    q = rd.quantize(Moves(), "int8", "int8", data=[x])
    assert isinstance(q.structure, rd.Graph)
    nodes = {node.op: node for node in q.structure.nodes}
    made = q.structure.producers()
    root = find_sites(q.structure).root
    shared = {root[name] for op in ("concat", "max_pool", "slice", "transpose", "reshape") for name in nodes[op].outputs}
    shared |= {root[name] for name in nodes["concat"].inputs}
    first_pad = next(node for node in q.structure.nodes if node.op == "pad")
    assert made[first_pad.inputs[0]].op == "max_pool"
    shared |= {root[first_pad.name]}
    assert len(shared) == 1
    assert len(q.activations) == len(set(root.values()))
    scales = edges_on_their_grids(q, x)
    assert {scales[name] for name in nodes["concat"].inputs} == {scales[nodes["reshape"].name]}
    float_out, out = Moves()(x), q.module(x)
    assert (out[0] - float_out[0]).abs().max() <= 2 * scales[nodes["reshape"].name]
    assert out[1].max() > 6.9  # the border that a pad brings widens the range it shares


@pytest.mark.proves("mode.shared-params")
def test_residual_addition_keeps_its_own_parameters() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x) + x)

    x = rows(2, 3, 8, 8)
    q = rd.quantize(Residual(), "int8", "int8", data=[x])
    assert len(set(edges_on_their_grids(q, x).values())) == len(q.activations) == 3


# -- precisions, rules ------------------------------------------------------------------------------------------------


@pytest.mark.proves("mode.mixed")
@pytest.mark.parametrize(("weights", "activations"), [("int2", "int8"), ("nf4/g4", "int12"), ("int16", "uint4"), ("fp8", "fp8")])
def test_weights_and_activations_differ(weights: str, activations: str) -> None:
    x = rows(16, 8)
    q = rd.quantize(mlp(), weights, activations, data=[x], ranges="minmax")
    assert {str(t.format) for t in q.tensors.values()} == {str(rd.Format.parse(weights))}
    assert {str(a.format) for a in q.activations.values()} == {str(rd.Format.parse(activations, "activation"))}
    assert torch.equal(q.module(x), rd.fake(q)(x))


@pytest.mark.proves("mode.mixed")
def test_more_bits_are_closer() -> None:
    x, net = rows(64, 8), GraphModule(rd.capture(mlp(), rows(64, 8)))
    errors = {(w, a): (rd.quantize(net, f"int{w}", f"int{a}", data=[x], ranges="minmax").module(x) - net(x)).square().mean().item()
              for w, a in itertools.product((3, 6, 12), (3, 6, 12))}  # fmt: skip
    assert errors[3, 12] > errors[6, 12] > errors[12, 12]
    assert errors[12, 3] > errors[12, 6] > errors[12, 12]


@pytest.mark.proves("mode.rules")
def test_last_rule_wins() -> None:
    plan = Plan((Rule("*", "int4", "int8"), Rule("2", "int8"), Rule("2.weight", "uint4/g4~uint4"), Rule("0", activation="uint6")))
    q = rd.quantize(mlp(), plan=plan, data=[rows(4, 8)])
    assert {name: str(t.format) for name, t in q.tensors.items()} == {
        "0.weight": "int4/channel*fp16",
        "2.weight": "uint4/g4*fp16~uint4",
    }
    formats = {name: str(a.format) for name, a in q.activations.items()}
    assert formats == {"input": "int8/tensor*fp32~int8", "0": "uint6/tensor*fp32~uint6", "2": "int8/tensor*fp32~int8"}
    assert q.plan == plan


@pytest.mark.proves("mode.rules")
@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (Rule("2.input", activation="int4"), {"input": "int8", "0": "int4", "2": "int8"}),
        (Rule("2.input", activation="float"), {"input": "int8", "2": "int8"}),
        (Rule("2.input", activation="int8:dynamic"), {"input": "int8", "2": "int8", "2.input": "int8 dynamic"}),
        (Rule("2", activation="int4:dynamic"), {"input": "int8", "0": "int8", "2.input": "int4 dynamic"}),
    ],
)
def test_the_input_of_a_layer_names_the_site_before_it(rule: Rule, want: dict[str, str]) -> None:
    x = rows(4, 8)
    q = rd.quantize(mlp(), plan=Plan((Rule("*", "int8", "int8"), rule)), data=[x])
    got = {name: str(a.format).split("/")[0] + (" dynamic" if a.when == "dynamic" else "") for name, a in q.activations.items()}
    assert got == want
    assert torch.equal(q.module(x), rd.fake(q)(x))


@pytest.mark.proves("mode.exclude", "api.quantize")
def test_excluded_layers_stay_float() -> None:
    x, net = rows(4, 8), mlp()
    q = rd.quantize(net, "int4", "int8", data=[x], exclude=["2"])
    assert list(q.tensors) == ["0.weight"]
    assert set(q.activations) == {"input", "0"}
    assert torch.equal(q.rest["2.weight"], net[2].weight)
    hidden: dict[str, Tensor] = {}
    with watching(q.module, lambda name, value: hidden.update({name: value})):
        out = q.module(x)
    assert torch.equal(out, net[2](hidden["0"]))
    assert list(rd.quantize(net, exclude="2*", data=[x]).tensors) == ["0.weight"]  # a bare text is one pattern
    both = rd.quantize(net, plan=Plan((Rule("*", "int4"),)), exclude=["0"])
    assert list(both.tensors) == ["2.weight"]  # and follows the rules of a plan


# -- the fake-quantized twin ------------------------------------------------------------------------------------------

WEIGHTS = ["int8", "int3/tensor", "int4/g32", "uint4/g8~uint4", "uint5/g8*fp16-fp16", "nf4/g32", "log4", "cb16/channel",
           "cb16/g32*int8", "cb16x2@tensor/channel", "mxfp4", "fp8", "ternary", "binary", "int12"]  # fmt: skip
ACTIVATIONS = [None, "int8", "uint4", "int8s", "fp8", "int8:dynamic", "int8:token", "int8/g4:dynamic", "int8/channel:dynamic"]


class Everything(nn.Module):
    """Grouped, depthwise, transposed and 1-D convolutions, linear, product, residual add, concat, pad and both poolings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.grouped, self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.up2 = nn.ConvTranspose2d(8, 4, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2, groups=2)
        self.seq = nn.Conv1d(8, 6, 3, padding="same")
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.relu(self.grouped(x))
        a = self.depthwise(a) + a
        a = torch.cat([self.up(a), self.up2(a)], 1)
        a = F.avg_pool2d(F.pad(F.max_pool2d(a, 2), (1, 1, 1, 1)), 2)
        s = self.norm(self.seq(a.flatten(2)).transpose(1, 2))
        return self.head(s), torch.softmax(s @ s.transpose(1, 2), -1)


@pytest.mark.proves("mode.fake-twin", "api.graph")
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("graph", [True, False])
def test_twin_is_bit_equal(activations: str | None, graph: bool) -> None:
    net, x = Everything().eval(), rows(3, 4, 6, 6)
    static = activations is not None and ":" not in activations
    if graph:
        net = GraphModule(rd.capture(net, x)).eval()
    elif static:
        net = _Branching(net)  # cannot be captured, so static ranges go to the inputs of its layers
    for weights in WEIGHTS if activations in (None, "int8", "int8:token") and graph else WEIGHTS[::3]:
        q = rd.quantize(net, weights, activations, data=[x] if graph or static else None, ranges="minmax")
        assert isinstance(q.structure, rd.Graph) is graph
        with torch.no_grad():
            packed, twin = q.module(x), rd.fake(q)(x)
        assert all(torch.equal(a, b) for a, b in zip(packed, twin, strict=True)), weights
        assert not any(torch.equal(a, b) for a, b in zip(packed, net(x), strict=True))


class _Branching(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) if float(x.sum()) < 1e30 else x


@pytest.mark.proves("mode.fake-twin")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_twin_of_an_embedding(weights: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 20, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.words(ids).mean(1))

    ids, net = torch.arange(15).reshape(3, 5), Words()
    for data, activations in itertools.product((None, [ids]), (None, "int8:token")):
        q = rd.quantize(net, weights, activations, data=data)
        assert len(q.tensors) == 1  # the tie is kept
        assert torch.equal(q.module(ids), rd.fake(q)(ids))


@pytest.mark.proves("mode.fake-twin", "mode.on-codes")
@pytest.mark.parametrize("activations", ["int8", "int8:token"])
@pytest.mark.parametrize("weights", ["int8", "nf4/g32", "cb16/channel"])
def test_threads_do_not_matter(weights: str, activations: str) -> None:
    torch.manual_seed(0)
    x = rows(8, 8, 12, 12)
    net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 64)).eval()
    net = GraphModule(rd.capture(net, x))
    outs, sums = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        q = rd.quantize(net, weights, activations, data=[x])
        with torch.no_grad():
            outs += [q.module(x), rd.fake(q)(x)]
        sums.append(b"".join(t.codes.numpy().tobytes() for t in q.tensors.values()))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert sums[0] == sums[1]
    assert all(torch.equal(outs[0], other) for other in outs[1:])


@pytest.mark.proves("mode.on-codes")
def test_a_batch_is_its_samples_one_by_one() -> None:
    net, x = settle(SmallCNN()), rows(5, 3, 16, 16)
    q = rd.quantize(net, "int8", "int8", data=[x])
    with torch.no_grad():
        assert torch.equal(q.module(x), torch.cat([q.module(row[None]) for row in x]))


@pytest.mark.proves("mode.fake-twin")
@pytest.mark.parametrize(
    ("graph", "activations"), [(True, None), (True, "int8:dynamic"), (True, "int8"), (False, None), (False, "int8:dynamic")]
)
def test_twin_trains_and_nothing_else_changes(graph: bool, activations: str | None) -> None:
    net, x = Everything().eval(), rows(3, 4, 6, 6)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    q = rd.quantize(net, "int4", activations, data=[x] if graph else None)
    first = [y.detach() for y in q.module(x)]
    twin = rd.fake(q).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (twin(x)[0] - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    weights = [p for name, p in twin.named_parameters() if name.endswith("weight") and p.ndim > 1]
    assert len(weights) == len(q.tensors) == 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(first, q.module(x), strict=True))
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_the_model_may_change_afterwards() -> None:
    """A quantized model shares no memory with the float one, on either path."""
    x = rows(4, 8)
    for data in (None, [x]):
        net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        q = rd.quantize(net, data=data)
        with torch.no_grad():
            first = q.module(x)
            for p in net.parameters():
                p.add_(1)
            assert torch.equal(rd.fake(q)(x), first)


# -- what users do ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("api.quantize")
def test_model_is_left_as_it_was() -> None:
    """Parameters, buffers, and the mode of every module by itself: a batch norm that is frozen in training stays frozen."""
    net, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)), rows(4, 8)
    net.train()
    net[1].eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    for action in (
        lambda: rd.quantize(net, data=[x]),
        lambda: rd.quantize(net, "int4", "int8:dynamic"),
        lambda: rd.quantize(net, "int8", "int8", data=[x * torch.nan]),
        lambda: rd.calibrate(net, [x]),
    ):
        with contextlib.suppress(rd.InputError):
            action()
        assert [m.training for m in net.modules()] == [True, True, False, True, True]
        assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in net.parameters())


WRONG: dict[str, tuple[Callable[[nn.Module, Tensor], object], type[Exception], str]] = {
    "no module": (lambda m, x: rd.quantize(b"m"), rd.PlanError, r"torch\.nn\.Module, got bytes; roundel\.read\(path\)"),
    "no file": (lambda m, x: rd.quantize("m.tflite"), rd.InputError, "'m.tflite' does not exist"),
    "a class": (lambda m, x: rd.quantize(nn.Linear), rd.PlanError, "got type"),
    "a number of bits": (lambda m, x: rd.quantize(m, 8), rd.PlanError, "weights is a format text such as 'int4/g32'.*got int"),
    "a parsed format": (lambda m, x: rd.quantize(m, "int8", rd.Format.parse("int8")), rd.PlanError, "activations is a format text"),
    "no such format": (lambda m, x: rd.quantize(m, "int99"), rd.FormatError, "1 to 16 bits"),
    "no such timing": (lambda m, x: rd.quantize(m, "int8", "int8:later", data=[x]), rd.FormatError, "int8:later"),
    "running without data": (lambda m, x: rd.quantize(m, "int8", "int8:running"), rd.PlanError, "need calibration data"),
    "dynamic weights": (lambda m, x: rd.quantize(m, "int8:dynamic", data=[x]), rd.PlanError, "takes no ':dynamic'"),
    "static tokens": (lambda m, x: rd.quantize(m, "int8", "int8/token", data=[x]), rd.PlanError, "use /tensor, or ':dynamic'"),
    "learned activations": (lambda m, x: rd.quantize(m, "int8", "cb16", data=[x]), rd.PlanError, "learns its table"),
    "static, no data": (lambda m, x: rd.quantize(m, "int8", "int8"), rd.PlanError, "need calibration data"),
    "no batches": (lambda m, x: rd.quantize(m, data=[]), rd.InputError, "no batches"),
    "a number as data": (lambda m, x: rd.quantize(m, data=5), rd.InputError, "type int"),
    "a path as data": (lambda m, x: rd.quantize(m, data="x.npz"), rd.InputError, "load_data"),
    "data of another shape": (lambda m, x: rd.quantize(m, "int8", data=[x[:, :7]]), rd.InputError, r"batch of float32 \[4, 7\]"),
    "the second batch": (lambda m, x: rd.quantize(m, "int8", "int8", data=[x, x[:, :7]]), rd.InputError, r"\[4, 7\]"),
    "data of another type": (lambda m, x: rd.quantize(m, "int8", "int8", data=[x.double()]), rd.InputError, "same dtype"),
    "NaN in data": (lambda m, x: rd.quantize(m, "int8", "int8", data=[x, x * torch.nan]), rd.InputError, "batch 1"),
    "unknown input": (lambda m, x: rd.quantize(m, data=[{"wrong": x}]), rd.InputError, "wrong"),
    "solver": (lambda m, x: rd.quantize(m, solver="best"), rd.PlanError, "no solver 'best'; there are rtn"),
    "ranges": (lambda m, x: rd.quantize(m, "int8", "int8", data=[x], ranges="best"), rd.PlanError, "'best' is not one of: minmax"),
    "exclude nothing": (lambda m, x: rd.quantize(m, data=[x], exclude=["head"]), rd.PlanError, "matches the pattern 'head'"),
    "exclude a number": (lambda m, x: rd.quantize(m, data=[x], exclude=[3]), rd.PlanError, "got 3"),
    "plan as a path": (lambda m, x: rd.quantize(m, data=[x], plan="p.toml"), rd.PlanError, r"Plan\.read\(path\)"),
    "plan and activations": (lambda m, x: rd.quantize(m, "int8", "int8", plan=Plan(())), rd.PlanError, "activations= away"),
    "quantized already": (lambda m, x: rd.quantize(rd.quantize(m)), rd.PlanError, "quantized already"),
    "its module": (lambda m, x: rd.quantize(rd.quantize(m, data=[x]).module), rd.PlanError, "quantized already"),
    "its twin": (lambda m, x: rd.quantize(rd.fake(rd.quantize(m))), rd.PlanError, "quantized already"),
    "lazy": (lambda m, x: rd.quantize(nn.Sequential(nn.LazyLinear(4)), data=[x]), rd.InputError, "lazy modules"),
    "no layers": (lambda m, x: rd.quantize(nn.ReLU(), data=[x]), rd.PlanError, "no layer"),
    "strict": (lambda m, x: rd.quantize(_Branching(m), data=[x], strict=True), rd.CheckError, "cannot be captured"),
}  # fmt: skip


@pytest.mark.proves("api.quantize", "api.errors")
@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    action, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        action(mlp(), rows(4, 8))
    assert issubclass(error, rd.RoundelError)
    assert capfd.readouterr() == ("", "")  # torch's own chatter is no part of the answer


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return self.a(u) + self.b(v)


@pytest.mark.proves("api.quantize")
@pytest.mark.parametrize("named", [True, False])
def test_two_inputs(named: bool) -> None:
    u, v = rows(4, 8), rows(4, 6, seed=1)
    q = rd.quantize(Two(), "int8", "int8", data=[{"u": u, "v": v}] if named else [(u, v)])
    assert set(q.activations) == {"u", "v", "a", "b", "add"}
    assert torch.equal(q.module(u=u, v=v), q.module(u, v))
    with pytest.raises(rd.InputError, match=r"takes inputs \['u', 'v'\]"):
        q.module(u)


@pytest.mark.proves("api.quantize")
def test_tuples_and_dicts_come_out() -> None:
    class Pair(nn.Module):
        def __init__(self, as_dict: bool) -> None:
            super().__init__()
            self.a, self.b, self.as_dict = nn.Linear(8, 4), nn.Linear(8, 2), as_dict

        def forward(self, x: Tensor) -> Any:
            return {"p": self.a(x), "q": self.b(x)} if self.as_dict else (self.a(x), self.b(x))

    x = rows(4, 8)
    for as_dict in (False, True):
        q = rd.quantize(Pair(as_dict), "int8", "int8", data=[x])
        assert [tuple(y.shape) for y in q.module(x)] == [(4, 4), (4, 2)]
        assert ("returns a dict" in notes_of(q)) is as_dict
    assert set(rd.quantize(Pair(True)).module(x)) == {"p", "q"}  # on the module path the code itself runs


@pytest.mark.parametrize("activations", [None, "int8", "int8:dynamic", "int8:token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, activations: str | None) -> None:
    net, x = mlp().to(dtype), rows(4, 8).to(dtype)
    q = rd.quantize(net, "int8", activations, data=[x])
    with torch.no_grad():
        out = q.module(x)
        assert out.dtype == dtype
        assert torch.equal(out, rd.fake(q)(x))
        assert (out - net(x)).abs().max() < 0.02


def test_a_module_used_twice() -> None:
    """Under two names or twice in a row, graph or not: one packed weight, and no use of it stays float."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.c(self.a(x))))

    net, x = Twice(), rows(4, 8)
    for data in (None, [x]):
        q = rd.quantize(net, "int2", data=data)
        assert set(q.tensors) == {"a.weight", "c.weight"}
        want = copy.deepcopy(net)
        with torch.no_grad():
            for name, tensor in q.tensors.items():
                want.get_parameter(name).copy_(tensor.dequantize())
            assert torch.equal(q.module(x), want(x))
        q = rd.quantize(net, "int8", "int8:dynamic", data=data)
        assert torch.equal(q.module(x), rd.fake(q)(x))


def test_a_bare_layer() -> None:
    """A network that is one layer has names without a dot, and it is replaced as a whole."""
    layer, x = nn.Linear(8, 4), rows(2, 8)
    q = rd.quantize(layer, "int2")
    assert set(q.tensors) == {"weight"}
    assert torch.equal(q.module(x), F.linear(x, q.tensors["weight"].dequantize(), layer.bias))
    assert set(rd.quantize(layer, "int2", "int8:dynamic").activations) == {"input"}


def test_two_views_of_one_memory_are_two_weights() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = nn.Parameter(self.a.weight.data.t())

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    net, x = Transposed(), rows(4, 8)
    for data in (None, [x]):
        q = rd.quantize(net, data=data)
        assert set(q.tensors) == {"a.weight", "b.weight"}
        assert (q.module(x) - net(x)).abs().max() < 0.02 * net(x).abs().max()


def test_hooks_are_kept() -> None:
    """A hook may change the output: a graph holds what it did, and without one a hooked layer stays float and is listed."""
    net, x = mlp(), rows(4, 8)
    net[0].register_forward_hook(lambda module, args, out: out * 2)
    with torch.no_grad():
        assert (rd.quantize(net, data=[x]).module(x) - net(x)).abs().max() < 0.02
        q = rd.quantize(net)
        assert set(q.tensors) == {"2.weight"}
        assert "0.weight" in notes_of(q)
        assert (q.module(x) - net(x)).abs().max() < 0.02


def test_layers_that_others_read_past() -> None:
    """torch's encoder layer uses its attention's projection without calling it, and has a fused form that calls no layer."""
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), rows(2, 5, 16)
    q = rd.quantize(net, "int8", "int3:dynamic")
    assert set(q.tensors) == {"linear1.weight", "linear2.weight"}
    assert "self_attn.out_proj.weight" in notes_of(q)
    with torch.no_grad():
        fused = q.module(x)
        weight_only = rd.quantize(net, "int8").module(x)
    far = (fused - weight_only).abs().mean()
    assert far > 0.01
    assert (fused - q.module(x)).abs().mean() < 0.1 * far  # with gradients nothing is fused
    assert torch.equal(q.module.linear1.weight, q.tensors["linear1.weight"].dequantize())


def test_odd_weights() -> None:
    """0-d and empty tensors, integers in the graph, weights that are computed or not real: kept, and listed where it matters."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.one = nn.Parameter(torch.tensor(2.0)), nn.Linear(1, 1)
            self.left = nn.Parameter(rows(8, 1))
            self.register_buffer("pick", torch.tensor([2, 0, 1]))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x @ self.left)[self.pick] * self.gain

    x = rows(3, 8)
    q = rd.quantize(Odd(), "int8", "int8", data=[x])
    assert q.rest["gain"].shape == ()
    assert q.rest["pick"].dtype == torch.int64
    assert torch.equal(q.module(x), rd.fake(q)(x))
    layer = nn.Linear(8, 4)
    layer.weight, layer.bias = nn.Parameter(torch.zeros(0, 8)), nn.Parameter(torch.zeros(0))
    empty = rd.quantize(nn.Sequential(layer), data=[x])
    assert "it is empty" in notes_of(empty)
    assert empty.module(x).shape == (3, 0)


@pytest.mark.proves("api.calibrate")
def test_calibrate_gives_the_ranges_of_every_site() -> None:
    x, net = rows(16, 8), mlp()
    graph = rd.capture(net, x)
    for stats, site in ((rd.calibrate(net, [x[:5], x[5:]]), "2.input"), (rd.calibrate(GraphModule(rd.fuse(graph)), [x]), "0")):
        hidden = net[1](net[0](x))
        assert (stats[site].min, stats[site].max) == (hidden.min().item(), hidden.max().item())
        assert stats[site].count == hidden.numel()
    assert set(rd.calibrate(net, [x], only=["0.input"])) == {"0.input"}
    with pytest.raises(rd.InputError, match="batch 1"):
        rd.calibrate(net, [x, x * torch.inf])


@pytest.mark.proves("api.graph")
def test_capture_fuse_quantize_fake() -> None:
    net, x = settle(SmallCNN()), rows(2, 3, 16, 16)
    graph = rd.fuse(rd.capture(net, x))
    assert isinstance(graph, rd.Graph)
    assert not any(node.op in ("batch_norm", "relu") for node in graph)
    a, b = rd.quantize(GraphModule(graph), "int8", "int8", data=[x]), rd.quantize(net, "int8", "int8", data=[x])
    assert torch.equal(a.module(x), b.module(x))


@pytest.mark.proves("api.evaluate")
def test_evaluate_measures_the_damage() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 3)), rows(60, 8)
    y = net(x).argmax(1)
    found = [
        rd.evaluate(rd.quantize(net, w, data=[x]), against=net, data=[(x, y)], metric="top1", latency=False)
        for w in ("int8", "int2")
    ]
    fine, coarse = found
    assert 0 <= fine.kl < 1e-4 < coarse.kl
    assert fine.flips <= coarse.flips
    assert fine.metric_float == 1
    assert coarse.metric == pytest.approx(1 - coarse.flips)
    assert fine.sqnr > coarse.sqnr + 20
    low, high = coarse.interval
    assert low <= coarse.metric - coarse.metric_float <= high


# -- corners that a review found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [True, False])
def test_a_quantized_input_counts_under_a_float_weight_too(graph: bool) -> None:
    net, x = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), rows(5, 8)
    q = rd.quantize(net, None, "int4:dynamic", data=[x] if graph else None)
    step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 15
    zero = (-8 - x.min().clamp(max=0) / step).round()
    on_grid = (((x / step).round() + zero).clamp(-8, 7) - zero) * step
    assert torch.allclose(q.module(x), net(on_grid), atol=1e-5)
    assert not torch.allclose(q.module(x), net(x), atol=1e-3)


@pytest.mark.parametrize("activations", [None, "int8:dynamic", "int8"])
def test_a_pruned_row_gives_the_twin_no_nan_gradient(activations: str | None) -> None:
    net, x = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval(), rows(5, 8)
    with torch.no_grad():
        net[0].weight[2] = 0
    twin = rd.fake(rd.quantize(net, "int4", activations, data=[x]))
    twin(x).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in twin.parameters())


def test_a_half_precision_transformer_runs_and_comes_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
    )
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config).eval().bfloat16()
    ids = torch.arange(8)[None]
    q = rd.quantize(net, "int8")
    logits = q.module(ids).logits
    assert logits.dtype == torch.bfloat16
    q.save(tmp_path / "half.safetensors")
    assert torch.equal(rd.load(tmp_path / "half.safetensors").module(ids).logits, logits)


def test_a_short_group_with_a_minimum_is_fitted_to_its_own_numbers() -> None:
    w = rows(8, 40) * 0.1 + 5.5
    q = rd.quantize(linear_of(w), "uint4/g32*fp16-fp16")
    error = (q.tensors["weight"].dequantize() - w).square()
    assert error[:, 32:].mean() < 2 * error[:, :32].mean()


def linear_of(w: torch.Tensor) -> torch.nn.Linear:
    net = torch.nn.Linear(w.shape[1], w.shape[0])
    net.weight.data = w.clone()
    return net


def test_what_the_data_went_through_is_stored(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((8, 16), np.float32))
    net = nn.Sequential(nn.Linear(16, 4))
    data = rd.load_data(tmp_path / "x.npz", preprocess=rd.Preprocess(scale=2.0))
    assert rd.quantize(net, "int8", "int8", data=data).provenance["preprocess"] == {"scale": 2.0}
    assert "preprocess" not in rd.quantize(net, "int8", "int8", data=rd.load_data(tmp_path / "x.npz")).provenance
