"""`fuse` leaves the float output alone: every pattern in every spelling, every fold, the real KWT-1, and what must stay apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, needs_data
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SmallCNN, TransformerBlock, resnet20, settle
from torch import Tensor, nn

from roundel.graph import BATCH, Graph, GraphModule, Node, Spec
from roundel.graph.build import with_values
from roundel.network.capture import capture
from roundel.network.fuse import fuse


class Sketch:
    """A graph written down call by call: ``s("mul", "x", 0.5)`` gives the new value's name; numbers and tensors are constants."""

    def __init__(self, **inputs: Sequence[int]) -> None:
        self.values = {name: Spec((BATCH, *shape)) for name, shape in inputs.items()}
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}

    def __call__(self, op: str, *operands: str | float | Tensor, name: str | None = None, **attrs: Any) -> str:
        name = name or f"{op}{len(self.nodes)}"
        inputs = []
        for i, x in enumerate(operands):
            if not isinstance(x, str):
                self.constants[f"{name}.c{i}"] = torch.as_tensor(x, dtype=torch.float32) if isinstance(x, float) else x
            inputs.append(x if isinstance(x, str) else f"{name}.c{i}")
        self.nodes.append(Node(op, tuple(inputs), (name,), attrs))
        return name

    def graph(self, *outputs: str) -> Graph:
        return with_values(Graph(tuple(self.values), outputs, tuple(self.nodes), self.constants, self.values))


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph]


def draw(graph: Graph, batch: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(batch)
    return [torch.randn([batch, *map(int, graph.values[name].shape[1:])], generator=draw) for name in graph.inputs]


def fused(graph: Graph, *want: str, tolerance: float = 1e-4) -> Graph:
    """Fuse, compare the outputs at two batch sizes relative to their largest value, and the operations left if ``want``."""
    made = fuse(graph)
    assert len(made.outputs) == len(graph.outputs)
    assert made.inputs == graph.inputs
    for batch in (1, 3):
        xs = draw(graph, batch)
        with torch.no_grad():
            before, after = (GraphModule(g)(*xs) for g in (graph, made))
        for b, a in zip(*[x if isinstance(x, tuple) else (x,) for x in (before, after)], strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()
    if want:
        assert ops(made) == list(want)
    return made


# -- patterns, each spelling against torch's own function -------------------------------------------------------------

DIM = 6
GAIN, SHIFT = torch.linspace(0.5, 2, DIM), torch.linspace(-1, 1, DIM)
EPS = 0.01


def moments(s: Sketch, x: str, square: str = "squared_difference", axes: Sequence[int] = (-1,)) -> tuple[str, str]:
    """(mean, variance + eps), the square spelt one of four ways."""
    mean = s("mean", x, axes=list(axes), keepdim=True)
    if square == "squared_difference":
        squares = s("squared_difference", x, mean)
    else:
        centred = s("sub", x, mean)
        squares = s("pow", centred, 2.0) if square == "pow" else s("mul", centred, centred)
    return mean, s("add", s("mean", squares, axes=list(axes), keepdim=True), EPS)


def inverse(s: Sketch, v: str, how: str) -> str:
    return {
        "rsqrt": lambda: s("rsqrt", v),
        "pow": lambda: s("pow", v, -0.5),
        "div": lambda: s("div", 1.0, s("sqrt", v)),
    }[how]()


@pytest.mark.proves("fuse.layer-norm")
@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize("how", ["rsqrt", "pow", "div"])
def test_layer_norm_as_keras_writes_it(how: str, axis: int) -> None:
    s = Sketch(x=(4, DIM))
    mean, v = moments(s, "x", axes=[axis])
    factor = s("mul", inverse(s, v, how), GAIN)
    s("add", s("mul", "x", factor), s("sub", SHIFT, s("mul", mean, factor)), name="norm")
    made = fused(s.graph("norm"), "layer_norm")
    assert set(made.constants) == {"norm.weight", "norm.bias"}
    (x,) = draw(made, 3)
    torch.testing.assert_close(GraphModule(made)(x), F.layer_norm(x, (DIM,), GAIN, SHIFT, EPS))


@pytest.mark.parametrize("square", ["squared_difference", "mul", "pow"])
@pytest.mark.parametrize("affine", ["none", "gain", "shift", "both", "gain first"])
def test_layer_norm_as_it_is_defined(affine: str, square: str) -> None:
    s = Sketch(x=(4, DIM))
    mean, v = moments(s, "x", square)
    centred = s("sub", "x", mean)
    gain = GAIN if affine in ("gain", "both", "gain first") else None
    shift = SHIFT if affine in ("shift", "both") else None
    if affine == "gain first":
        out = s("mul", centred, s("mul", s("rsqrt", v), GAIN))
    else:
        out = s("div", centred, s("sqrt", v)) if square == "pow" else s("mul", s("rsqrt", v), centred)
        out = out if gain is None else s("mul", gain, out)
        out = out if shift is None else s("add", out, shift.reshape(1, 1, DIM))
    made = fused(s.graph(out), "layer_norm")
    (x,) = draw(made, 3)
    torch.testing.assert_close(GraphModule(made)(x), F.layer_norm(x, (DIM,), gain, shift, EPS))


@pytest.mark.proves("fuse.rms-norm")
@pytest.mark.parametrize("square", ["mul", "pow"])
@pytest.mark.parametrize("how", ["rsqrt", "pow", "div", "over", "gain first", "bare"])
def test_rms_norm(how: str, square: str) -> None:
    s = Sketch(x=(4, DIM))
    squares = s("mul", "x", "x") if square == "mul" else s("pow", "x", 2.0)
    v = s("add", s("mean", squares, axes=[-1], keepdim=True), EPS)
    if how == "over":
        s("mul", GAIN, s("div", "x", s("sqrt", v)), name="norm")
    elif how == "gain first":
        s("mul", "x", s("mul", s("rsqrt", v), GAIN), name="norm")
    elif how == "bare":
        s("mul", "x", s("rsqrt", v), name="norm")
    else:
        s("mul", s("mul", "x", inverse(s, v, how)), GAIN, name="norm")
    made = fused(s.graph("norm"), "rms_norm")
    (x,) = draw(made, 3)
    torch.testing.assert_close(GraphModule(made)(x), F.rms_norm(x, (DIM,), None if how == "bare" else GAIN, EPS))


def tanh_gelu(s: Sketch, cube: str, order: int) -> str:
    x = "x"
    x3 = s("pow", x, 3.0) if cube == "pow" else s("mul", s("mul", x, x), x)
    inner = s("mul", s("add", x, s("mul", 0.044715, x3)), math.sqrt(2 / math.pi))
    one = s("add", s("tanh", inner), 1.0)
    return [
        lambda: s("mul", s("mul", x, 0.5), one),
        lambda: s("mul", s("mul", x, one), 0.5),
        lambda: s("mul", x, s("mul", 0.5, one)),
    ][order]()


def erf_gelu(s: Sketch, scale: str, order: int) -> str:
    x = "x"
    one = s("add", 1.0, s("erf", s("mul", x, math.sqrt(0.5)) if scale == "mul" else s("div", x, math.sqrt(2))))
    return s("mul", s("mul", x, 0.5), one) if order == 0 else s("mul", s("mul", one, x), 0.5)


def hardswish(s: Sketch, how: str) -> str:
    ramp = s("add", "x", 3.0, act="relu6") if how.startswith("act") else s("relu6", s("add", "x", 3.0))
    if how == "clamp":
        ramp = s("hardtanh", s("add", "x", 3.0), lo=0.0, hi=6.0)
    if how == "sixth":
        return s("mul", s("mul", "x", ramp), 1 / 6)
    return s("div", s("mul", "x", ramp), 6.0) if how.endswith("last") else s("mul", "x", s("div", ramp, 6.0))


def softmax(s: Sketch, top: bool, axis: int) -> str:
    e = s("exp", s("sub", "x", s("amax", "x", axes=[axis], keepdim=True)) if top else "x")
    return s("div", e, s("sum", e, axes=[axis], keepdim=True))


#: spelling -> (how to write it down, the function it is, the operation it becomes)
SPELLINGS: dict[str, tuple[Callable[[Sketch], str], Callable[[Tensor], Tensor], str]] = {
    **{f"gelu tanh {c} {o}": (lambda s, c=c, o=o: tanh_gelu(s, c, o), lambda x: F.gelu(x, approximate="tanh"), "gelu")
       for c in ("pow", "mul") for o in range(3)},
    **{f"gelu erf {c} {o}": (lambda s, c=c, o=o: erf_gelu(s, c, o), F.gelu, "gelu") for c in ("mul", "div") for o in range(2)},
    "silu": (lambda s: s("mul", s("sigmoid", "x"), "x"), F.silu, "silu"),
    **{f"hardswish {how}": (lambda s, how=how: hardswish(s, how), F.hardswish, "hardswish")
       for how in ("last", "first", "act last", "act", "sixth", "clamp")},
    "hardsigmoid": (lambda s: s("mul", s("relu6", s("add", 3.0, "x")), 1 / 6), F.hardsigmoid, "hardsigmoid"),
    **{f"softmax {top} {axis}": (lambda s, t=top, a=axis: softmax(s, t, a), lambda x, a=axis: x.softmax(a), "softmax")
       for top in (True, False) for axis in (-1, 1)},
    "relu": (lambda s: s("maximum", 0.0, "x"), F.relu, "relu"),
    "relu6": (lambda s: s("minimum", s("maximum", "x", 0.0), 6.0), F.relu6, "relu6"),
}  # fmt: skip


@pytest.mark.proves("fuse.gelu", "fuse.silu", "fuse.hardswish", "fuse.softmax")
@pytest.mark.parametrize("name", SPELLINGS)
def test_activation_is_one_node_under_the_name_that_leaves(name: str) -> None:
    write, function, op = SPELLINGS[name]
    s = Sketch(x=(4, DIM))
    out = write(s)
    made = fused(s.graph(out), op)
    assert made.outputs == (out,)
    (x,) = draw(made, 3)
    torch.testing.assert_close(GraphModule(made)(x), function(x))


@pytest.mark.proves("fuse.attention")
@pytest.mark.parametrize("key", ["transpose_b", "transposed", "arrives transposed"])
@pytest.mark.parametrize("scale", [None, "mul", "div"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(key: str, scale: str | None, masked: bool) -> None:
    t, d = 5, 4
    upright = key != "arrives transposed"
    s = Sketch(q=(2, t, d), k=(2, t, d) if upright else (2, d, t), v=(2, t, d))
    k = s("transpose", "k", perm=[0, 1, 3, 2]) if key == "transposed" else "k"
    scores = s("matmul", "q", k, transpose_b=key == "transpose_b")
    scores = {None: lambda: scores, "mul": lambda: s("mul", scores, 0.3), "div": lambda: s("div", scores, 2.0)}[scale]()
    mask = torch.randn(t, t)
    scores = s("add", mask, scores) if masked else scores
    out = s("matmul", s("softmax", scores, axis=3), "v", name="out")
    made = fused(s.graph(out), *([] if upright else ["transpose"]), "attention")
    q, k, v = draw(made, 3)
    factor = {None: 1.0, "mul": 0.3, "div": 0.5}[scale]
    want = F.scaled_dot_product_attention(q, k if upright else k.mT, v, mask if masked else None, scale=factor)
    torch.testing.assert_close(GraphModule(made)(q, k, v), want)


def test_attention_does_not_broadcast() -> None:
    s = Sketch(q=(2, 5, 4), k=(1, 5, 4), v=(2, 5, 4))
    out = s("matmul", s("softmax", s("matmul", "q", "k", transpose_b=True), axis=-1), "v")
    fused(s.graph(out), "matmul", "softmax", "matmul")


# -- what must stay apart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_output", [False, True])
def test_inner_value_that_is_wanted_elsewhere_keeps_the_pattern_apart(as_output: bool) -> None:
    s = Sketch(x=(DIM,))
    s("mul", "x", s("sigmoid", "x", name="inner"), name="out")
    s("neg", "inner", name="also")
    fused(s.graph("out", "inner") if as_output else s.graph("out", "also"), *(["sigmoid", "mul"] + ["neg"] * (not as_output)))


@pytest.mark.parametrize("change", ["axis", "other x", "other mean"])
def test_near_misses_of_layer_norm_are_left(change: str) -> None:
    s = Sketch(x=(4, 4), y=(4, 4))
    mean, v = moments(s, "x", axes=[1 if change == "axis" else -1])
    mean = s("mean", "y", axes=[-1], keepdim=True) if change == "other mean" else mean
    out = s("mul", s("sub", "y" if change == "other x" else "x", mean), s("rsqrt", v))
    made = fused(s.graph(s("add", out, s("mul", "y", 0.5))))
    assert "layer_norm" not in ops(made)


def test_two_factors_that_differ_are_no_layer_norm() -> None:
    s = Sketch(x=(4, DIM))
    mean, v = moments(s, "x")
    root = s("rsqrt", v)
    out = s("add", s("mul", "x", s("mul", root, GAIN)), s("sub", SHIFT, s("mul", mean, s("mul", root, GAIN * 2))))
    assert "layer_norm" not in ops(fused(s.graph(out)))


def test_near_misses_of_activations_are_left() -> None:
    s = Sketch(x=(DIM,))
    out = s("mul", s("mul", "x", 0.5), s("add", s("erf", s("mul", "x", 0.8)), 1.0))
    assert "gelu" not in ops(fused(s.graph(out)))
    s = Sketch(x=(DIM, DIM))
    e = s("exp", s("sub", "x", s("amax", "x", axes=[1], keepdim=True)))
    out = s("div", e, s("sum", e, axes=[2], keepdim=True))
    assert ops(fused(s.graph(out))) == ["amax", "sub", "softmax"]  # the shift drops out of it, whatever its axis


# -- folding into layers ----------------------------------------------------------------------------------------------

BN = [
    torch.tensor([0.1, -0.2, 0.3, 0.5]),
    torch.tensor([0.5, 1.5, 2.0, 0.1]),
    torch.tensor([2.0, -1.0, 0.5, 1.0]),
    torch.tensor([0.0, 1.0, -1.0, 2.0]),
]
CONV = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}


@pytest.mark.proves("fuse.bn", "fuse.act")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["conv", "depthwise", "conv1d", "conv_transpose", "grouped transpose", "linear"])
def test_batch_norm_and_relu_go_into_the_layer(kind: str, bias: bool) -> None:
    layer, shape = {
        "conv": (nn.Conv2d(2, 4, 3, padding=1, bias=bias), (2, 5, 5)),
        "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=bias), (4, 5, 5)),
        "conv1d": (nn.Conv1d(2, 4, 3, bias=bias), (2, 5)),
        "conv_transpose": (nn.ConvTranspose2d(2, 4, 3, stride=2, bias=bias), (2, 5, 5)),
        "grouped transpose": (nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, bias=bias), (4, 3, 3)),
        "linear": (nn.Linear(3, 4, bias=bias), (3,)),
    }[kind]
    norm = nn.BatchNorm1d(4) if len(shape) < 3 else nn.BatchNorm2d(4)
    model = settle(nn.Sequential())
    model.add_module("layer", layer)
    model.add_module("norm", settle(norm))
    model.add_module("act", nn.ReLU6())
    model.eval()
    made = fused(capture(model, torch.randn(2, *shape)), layer_op(kind))
    assert made.outputs == ("layer",)
    assert set(made.constants) == {"layer.weight", "layer.bias"}
    assert made.nodes[0].attrs["act"] == "relu6"
    (x,) = draw(made, 3)
    torch.testing.assert_close(GraphModule(made)(x), model(x), rtol=1e-4, atol=1e-5)


def layer_op(kind: str) -> str:
    return "linear" if kind == "linear" else "conv_transpose" if "transpose" in kind else "conv"


def test_batch_norm_over_the_tokens_of_a_linear_layer_stays() -> None:
    s = Sketch(x=(4, 3))
    s("batch_norm", s("linear", "x", torch.randn(4, 3)), *BN, eps=1e-5, name="out")
    fused(s.graph("out"), "linear", "batch_norm")


def test_batch_norm_without_a_layer_stays() -> None:
    s = Sketch(x=(4, 3, 3))
    s("relu", s("batch_norm", "x", *BN[:2], eps=1e-5), name="out")
    fused(s.graph("out"), "batch_norm", "relu")


def test_layer_read_twice_keeps_its_batch_norm_apart() -> None:
    s = Sketch(x=(2, 5, 5))
    conv = s("conv", "x", torch.randn(4, 2, 3, 3), **CONV)
    s("add", s("batch_norm", conv, *BN, eps=1e-5), conv, name="out")
    fused(s.graph("out"), "conv", "batch_norm", "add")


def test_tied_weights_are_untied_by_their_own_batch_norms() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.b.weight = self.a.weight
            self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.nb(self.b(self.na(self.a(x))))

    graph = capture(settle(Tied()), torch.randn(2, 4, 6, 6))
    assert [n for n in graph.constants if n.endswith("weight") and n[0] in "ab"] == ["a.weight"]
    made = fused(graph, "conv", "conv")
    assert made.nodes[0].inputs[1] != made.nodes[1].inputs[1]


def test_per_channel_constants_go_into_the_layer() -> None:
    s = Sketch(x=(2, 5, 5))
    conv = s("conv", "x", torch.randn(4, 2, 3, 3), name="conv", **CONV)
    s("add", s("mul", BN[2].reshape(4, 1, 1), conv), BN[3].reshape(1, 4, 1, 1), name="out", act="relu")
    made = fused(s.graph("out"), "conv")
    assert made.nodes[0].attrs["act"] == "relu"
    s = Sketch(x=(5, 3))
    made = fused(s.graph(s("sub", s("linear", "x", torch.randn(4, 3)), BN[0])), "linear")
    s = Sketch(x=(4, 3))  # a constant along the tokens is none of the layer's business
    fused(s.graph(s("add", s("linear", "x", torch.randn(4, 3)), BN[0].reshape(4, 1))), "linear", "add")


@pytest.mark.proves("fuse.act")
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_relu_goes_into_elementwise_operations(op: str) -> None:
    s = Sketch(x=(DIM,), y=(DIM,))
    s("relu", s(op, "x", "y", name="both"))
    made = fused(s.graph("relu1"), op)
    assert made.outputs == ("both",)
    s = Sketch(x=(DIM,), y=(DIM,))
    s("neg", s("relu", s(op, "x", "y", name="both")), name="out")
    fused(s.graph("out", "both"), op, "relu", "neg")  # the value before the ReLU is wanted too


# -- tidying ----------------------------------------------------------------------------------------------------------


def test_constants_are_computed_and_no_ops_dropped() -> None:
    s = Sketch(x=(2, DIM))
    table = s("transpose", s("mul", torch.randn(DIM, 2), 2.0), perm=[1, 0], name="table")
    x = s("mul", 1.0, s("sub", s("add", "x", 0.0), 0.0))
    x = s("cast", s("identity", s("div", s("pow", x, 1.0), 1.0)), dtype="float32")
    made = fused(s.graph(s("mul", x, table, name="out")), "mul")
    assert set(made.constants) == {"table"}


def test_zero_that_broadcasts_or_promotes_is_kept() -> None:
    s = Sketch(x=(DIM,))
    fused(s.graph(s("add", "x", torch.zeros(1, 1, 1))), "add")


def test_reshapes_merge() -> None:
    s = Sketch(x=(4, 6))
    out = s("reshape", s("reshape", s("reshape", "x", shape=[0, 24]), shape=[0, 2, -1]), shape=[0, 0, 3, 4])
    assert fused(s.graph(out), "reshape").nodes[0].attrs == {"shape": [0, 2, 3, 4]}
    s = Sketch(x=(4, 6))
    fused(s.graph(s("neg", s("reshape", s("reshape", "x", shape=[0, 24]), shape=[0, 4, 6]))), "neg")


def test_matmul_by_a_constant_is_a_linear_layer_and_takes_its_bias() -> None:
    s = Sketch(x=(4, 3))
    made = fused(s.graph(s("add", s("matmul", "x", torch.randn(3, 5), name="dense"), torch.randn(5))), "linear")
    assert set(made.constants) == {"dense.weight", "dense.bias"}


# -- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SmallCNN, TransformerBlock])
def test_networks(make: Callable[[], nn.Module]) -> None:
    model = settle(make())
    x = torch.randn(2, 3, 16, 16) if make is SmallCNN else torch.randn(2, 7, 16)
    made = fused(capture(model, x))
    assert "batch_norm" not in ops(made)
    assert not {"relu", "relu6"} & set(ops(made))
    torch.testing.assert_close(GraphModule(made)(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(name in made.values for name in (*made.inputs, *(n.name for n in made)))


@needs_data
@pytest.mark.proves("fuse.bn", "fuse.act")
def test_resnet20() -> None:
    made = fused(capture(resnet20(), torch.randn(2, 3, 32, 32)))
    assert sorted(set(ops(made))) == ["add", "avg_pool", "conv", "linear", "pad", "reshape", "slice"]
    assert sum(node.attrs.get("act") == "relu" for node in made) == 19
    assert made.constants["conv1.bias"].shape == (16,)


@needs_data
@pytest.mark.proves("fuse.layer-norm", "fuse.gelu", "fuse.softmax", "fuse.attention")
def test_kwt1_comes_together() -> None:
    pytest.importorskip("ai_edge_litert")
    from roundel.readers.tflite import read_tflite

    graph = read_tflite(DATA / "kwt1" / "kwt1.tflite", inputs=[214])
    made = fuse(graph)
    count = {op: ops(made).count(op) for op in ops(made)}
    assert (count["layer_norm"], count["gelu"], count["attention"]) == (24, 12, 12)
    assert set(count) == {"linear", "add", "layer_norm", "gelu", "attention", "expand_batch", "concat", "slice", "reshape"}
    x = torch.from_numpy(np.load(DATA / "speech_commands_v2_test" / "shared_kwt98x40_f16.npz")["x"][:4]).float()
    with torch.no_grad():
        before, after = GraphModule(graph)(x), GraphModule(made)(x)
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()


@st.composite
def chains(pick: st.DrawFn) -> Graph:
    """Layers, norms, activations and constants in any order, with an inner value sometimes read once more."""
    s = Sketch(x=(4, 6, 6))
    seen = ["x"]
    for _ in range(pick(st.integers(2, 9))):
        x = pick(st.sampled_from(seen[-2:]))
        kind = pick(
            st.sampled_from(
                ["conv", "transpose", "bn", "relu", "relu6", "clamp", "gain", "shift", "add", "silu", "pool", "reshape"]
            )
        )
        draw = torch.Generator().manual_seed(len(seen))
        match kind:
            case "conv":
                x = s("conv", x, torch.randn(4, 2, 3, 3, generator=draw) / 4, **{**CONV, "groups": 2})
            case "transpose":
                attrs = {"stride": [1, 1], "padding": [1, 1], "output_padding": [0, 0], "dilation": [1, 1], "groups": 2}
                x = s("conv_transpose", x, torch.randn(4, 2, 3, 3, generator=draw) / 4, torch.randn(4, generator=draw), **attrs)
            case "bn":
                x = s("batch_norm", x, *BN, eps=1e-5)
            case "clamp":
                x = s("hardtanh", x, lo=0.0, hi=pick(st.sampled_from([None, 6.0, 2.0])))
            case "gain" | "shift":
                x = s("mul" if kind == "gain" else "add", x, pick(st.sampled_from([BN[2].reshape(4, 1, 1), 1.0, 0.0, 0.5])))
            case "add":
                x = s("add", x, pick(st.sampled_from(seen)))
            case "silu":
                x = s("mul", x, s("sigmoid", x))
            case "pool":
                x = s("max_pool", x, kernel=[3, 3], stride=[1, 1], padding=[1, 1, 1, 1])
            case "reshape":
                x = s("reshape", s("reshape", x, shape=[0, 4, 36]), shape=[0, 4, 6, 6])
            case _:
                x = s(kind, x)
        seen.append(x)
    return s.graph(*dict.fromkeys(pick(st.lists(st.sampled_from(seen[1:]), min_size=1, max_size=2)) + seen[-1:]))


@pytest.mark.proves("fuse.same-output")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(chains())
def test_float_output_is_unchanged(graph: Graph) -> None:
    made = fused(graph)
    again = fuse(made)
    assert again.to_json() == made.to_json(), "fuse is not idempotent"
