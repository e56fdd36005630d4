"""Every lowered operation by itself against the float side of the same quantized graph: on the same codes, a unit apart at most."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from test_integer_lower import codes_of
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.graph import Graph, Node
from roundel.integer.ops import INTEGER, levels, numbers
from roundel.integer.simulate import FAST
from roundel.qmodel import QModel

Ints = NDArray[np.int64]


class Net(nn.Module):
    def __init__(self, fn: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.fn, self.layers = fn, nn.ModuleList(layers)

    def forward(self, *xs: Tensor) -> Any:
        return self.fn(*self.layers, *xs)


def both(
    module: nn.Module, *xs: Tensor, weights: str = "int8", activations: str = "int8", dialect: str = "R2"
) -> tuple[QModel, Graph]:
    """The float side, and the integer side of it."""
    layers = any(p.ndim > 1 for p in module.parameters())
    q = rd.quantize(module, weights if layers else None, activations, data=[Batch(xs, {}, None)])
    return q, rd.lower(q, dialect)


def off_by(q: QModel, graph: Graph, *xs: Tensor) -> Ints:
    """Integer codes less the float side's for all values, each operation fed the float side's codes."""
    theirs = codes_of(q, *xs)
    theirs |= {f"{name}.codes": theirs[name] for name in graph.inputs if name in theirs}
    theirs |= {name: x.numpy() for name, x in zip(graph.inputs, xs, strict=True) if not x.is_floating_point()}
    off = []
    for node in graph:
        if node.op not in ("quantize", "dequantize"):
            operands = [theirs[name] if name in theirs else numbers(graph, name) for name in node.inputs]
            definition = INTEGER[node.op](*operands, **node.attrs)
            assert np.array_equal(definition, (INTEGER | FAST)[node.op](*operands, **node.attrs)), node.name
            assert definition.shape == theirs[node.name].shape
            off.append((definition - theirs[node.name]).ravel())
    return np.concatenate(off)


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (16, 4, 6, 6)), generator=torch.Generator().manual_seed(seed))


def heads(seed: int) -> Tensor:
    return 2 * images(seed, 8, 3, 10, 8) + 0.3


def attend(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **more)


def norm(layer: Any) -> Any:
    for i, p in enumerate(layer.parameters()):
        p.data = images(90 + i, *p.shape) * 2
    return layer


SEEN = torch.ones(10, 10, dtype=torch.bool).tril(2)
X, Y = images(0), 2 * images(1) + 1

#: Module, inputs, the operations it becomes, the largest share of codes that may be a unit off.
CASES: list[tuple[nn.Module, tuple[Tensor, ...], list[str], float]] = [
    (Net(lambda a, b: torch.relu(a - b)), (X, Y), ["sub"], 0),
    (Net(lambda a, b: a * b), (X, Y), ["mul"], 0),
    (Net(lambda a: a * torch.arange(1.0, 7)), (X,), ["mul"], 0),
    (Net(lambda a: torch.arange(1.0, 7) - a), (X,), ["sub"], 0),
    (Net(lambda a: a / 3.0), (X,), ["table"], 0),
    (Net(lambda a: a.clamp(min=0.3)), (X,), ["table"], 0),
    (Net(lambda a, b: a @ b), (X, Y), ["matmul"], 0.001),
    (Net(lambda a, b: a @ b.transpose(-1, -2)), (X, Y), ["matmul"], 0.001),
    (Net(lambda a: torch.cat(a.split([1, 3], 1)[::-1], 1)), (X,), ["slice", "slice", "concat"], 0),
    (Net(lambda a: a.amax((2, 3))), (X,), ["amax"], 0),
    (Net(lambda a: a[:, [2, 0, 1]]), (X,), ["gather"], 0),
    (Net(lambda a: a.flip(3)), (X,), ["slice"], 0),
    (nn.PixelShuffle(2), (X,), ["depth_to_space"], 0),
    (nn.LeakyReLU(0.2), (X,), ["table"], 0),
    (nn.PReLU(), (X,), ["table"], 0),
    (norm(nn.PReLU(4)), (X,), ["prelu"], 0),
    (Net(lambda a: F.interpolate(a, size=(13, 4))), (X,), ["resize"], 0),
    (Net(lambda a: F.interpolate(a, size=(9, 13), mode="bilinear")), (X,), ["resize"], 0.02),
    (Net(lambda a: F.interpolate(a, size=(1, 12), mode="bilinear", align_corners=True)), (X,), ["resize"], 0.02),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (X,), ["conv_transpose"], 0.005),
    (nn.ConvTranspose1d(4, 6, 4, stride=3), (X[:, :, 0],), ["conv_transpose"], 0.005),
    (norm(nn.LayerNorm(6)), (Y,), ["norm"], 0.01),
    (norm(nn.LayerNorm(48)), (images(3, 64, 48),), ["norm"], 0.01),
    (norm(nn.RMSNorm(48, eps=1e-5)), (images(3, 64, 48) + 0.5,), ["norm"], 0.01),
    (Net(attend), (heads(0), heads(1), heads(2)), ["attention"], 0.005),
    (Net(lambda *x: attend(*x, is_causal=True)), (heads(0), heads(1), heads(2)), ["attention"], 0.005),
    (Net(lambda *x: attend(*x, attn_mask=SEEN)), (heads(0), heads(1), heads(2)), ["attention"], 0.005),
    (Net(lambda m, i: m(i) + 1, nn.Embedding(50, 8)), (torch.arange(50).reshape(10, 5),), ["embedding", "add"], 0.005),
]  # fmt: skip


@pytest.mark.proves("integer.one-unit")
@pytest.mark.parametrize(("module", "xs", "ops", "share"), CASES, ids=lambda part: "-".join(part) if isinstance(part, list) else "")
@pytest.mark.parametrize("dialect", ["R1", "R2"])
def test_against_the_float_side(module: nn.Module, xs: tuple[Tensor, ...], ops: list[str], share: float, dialect: str) -> None:
    """R1 rounds twice, and first to a whole number of what may be a sum of one small code: that alone moves many results."""
    q, graph = both(module, *xs, dialect=dialect)
    assert [node.op for node in graph if node.op not in ("quantize", "dequantize")] == ops
    off = off_by(q, graph, *xs)
    assert np.abs(off).max() <= 1
    assert np.count_nonzero(off) <= (share if dialect == "R2" else 0.15) * off.size
    simulated = rd.simulate(graph, *xs)
    assert simulated.shape == q.module(*xs).shape


TABLES: list[tuple[str, dict[str, Any]]] = [
    ("gelu", {}), ("gelu", {"approximate": "tanh"}), ("silu", {}), ("sigmoid", {}), ("tanh", {}), ("exp", {}), ("erf", {}),
    ("abs", {}), ("neg", {}), ("sin", {}), ("cos", {}), ("elu", {"alpha": 0.7}), ("hardswish", {}), ("hardsigmoid", {}),
    ("hardtanh", {"lo": -0.5, "hi": 2.0}), ("hardtanh", {"lo": -0.5, "hi": None}), ("leaky_relu", {"slope": 0.1}),
]  # fmt: skip


@pytest.mark.proves("integer.tables")
@pytest.mark.parametrize(("op", "attrs"), TABLES, ids=lambda part: part if isinstance(part, str) else "")
def test_tables(op: str, attrs: dict[str, Any]) -> None:
    """At all 256 codes the nearest code of the function's value."""
    from roundel.graph import OPS, GraphModule, Spec
    from roundel.graph.build import with_values

    real = Graph(("x",), ("y",), (Node(op, ("x",), ("y",), attrs),), {}, {"x": Spec(("N", 8))})
    q, graph = both(GraphModule(with_values(real)), 3 * images(5, 64, 8))
    door, node, out = graph.nodes
    table, every = numbers(graph, node.inputs[1]), np.arange(-128, 128)
    assert node.op == "table"
    assert graph.constants[node.inputs[1]].numel() == 256
    number = torch.from_numpy((every - door.attrs["zero"]) * door.attrs["scale"])
    want = OPS[op](number, **attrs).numpy() / out.attrs["scale"] + out.attrs["zero"]
    got = INTEGER["table"](every, table, **node.attrs)
    assert np.abs(got - np.clip(want, -128, 127)).max() <= 0.5 + 1e-9
    assert len(np.unique(got)) > 2
    assert np.count_nonzero(off_by(q, graph, 3 * images(6, 64, 8))) == 0


TABLES = {
    "log4": True, "fp4/channel": True, "iq4nl/channel": True, "apot4": True, "ternary": True, "binary/channel": True,
    "cb16": False, "cb16@tensor/channel": False, "nf4/channel": False, "cb4": False, "cb256": False,
}  # fmt: skip
LAYERS = {"conv": nn.Conv2d(4, 6, 3), "linear": nn.Linear(6, 5), "up": nn.ConvTranspose2d(4, 6, 2)}

#: A codebook per channel has one table per input in a transposed convolution: refused by name.
PAIRS = [(name, text) for name in LAYERS for text in TABLES if not (name == "up" and text.startswith("cb") and "@" not in text)]


@pytest.mark.proves("integer.codebooks")
@pytest.mark.parametrize(("name", "weights"), PAIRS)
def test_weights_in_tables(name: str, weights: str) -> None:
    """Codes stay as they were packed; the table holds their numbers exactly, or as 2,047 steps of its largest, to half of one."""
    layer, exact = LAYERS[name], TABLES[weights]
    q, graph = both(layer, X, weights=weights)
    node = graph.nodes[1]
    codes, table = node.inputs[1], node.inputs[-1]
    if node.op != "conv_transpose":
        assert graph.constants[codes] is q.tensors["weight"].codes
    whole = levels(numbers(graph, codes), numbers(graph, table)).astype(float)
    real = q.tensors["weight"].dequantize().double().numpy()
    real = real.swapaxes(0, 1) if node.op == "conv_transpose" else real
    whole, real = whole.reshape(len(whole), -1), real.reshape(len(real), -1)
    unit = (whole * real).sum(1, keepdims=True) / np.maximum((whole * whole).sum(1, keepdims=True), 1)  # by least squares
    error = np.abs(whole * unit - real) / np.where(unit == 0, 1, np.abs(unit))
    if exact:
        assert np.abs(whole * unit - real).max() < 1e-6 * np.abs(real).max()
    else:
        assert np.abs(numbers(graph, table)).max() >= 2047
        assert error.max() < 2047 / 3000  # half a step, and what the fit of the unit adds
    assert graph.values[table].dtype == ("int8" if exact else "int16")
    off = off_by(q, graph, X)
    assert np.abs(off).max() <= 1
    factor = np.abs(numbers(graph, node.inputs[3])) * np.exp2(numbers(graph, node.inputs[4]) - 31.0)
    assert np.count_nonzero(off) <= (0.02 + factor.mean()) * off.size  # the bias is whole in units of the sums


@pytest.mark.proves("integer.int16")
@pytest.mark.parametrize(
    ("module", "xs", "op"),
    [
        (nn.Conv2d(4, 6, 3), (X,), "conv"),
        (nn.Linear(6, 3), (X,), "linear"), (nn.ConvTranspose2d(4, 6, 3), (X,), "conv_transpose"),
        (Net(lambda a, b: a @ b), (X, Y), "matmul"), (norm(nn.LayerNorm(48)), (images(3, 64, 48),), "norm"),
        (Net(lambda a, b: a + b), (X, Y), "add"),
        (Net(lambda a, b: a - b), (X, Y), "sub"), (Net(lambda a, b: a * b), (X, Y), "mul"),
        (Net(lambda a: a.mean((2, 3))), (X,), "sum"), (nn.LeakyReLU(0.2), (X,), "prelu"), (nn.ReLU(), (X,), "rescale"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_sixteen_bit_activations(module: nn.Module, xs: tuple[Tensor, ...], op: str) -> None:
    """Where sums are 64 bits wide, multipliers have 15 bits: a unit of 65,536 on a part of the codes."""
    q, graph = both(module, *xs, activations="int16")
    node = next(n for n in graph if n.op not in ("quantize", "dequantize"))
    off = off_by(q, graph, *xs)
    assert node.op == op
    assert node.attrs.get("wide", False) is (op in ("conv", "linear", "conv_transpose", "matmul", "norm"))
    assert np.abs(off).max() <= 1
    assert np.count_nonzero(off) <= (0.25 if node.attrs.get("wide") else 0.005) * off.size


@pytest.mark.proves("integer.int16")
@pytest.mark.parametrize("fn", [F.gelu, torch.tanh, torch.sigmoid, F.hardswish], ids=lambda fn: fn.__name__)
def test_sixteen_bits_through_tables(fn: Callable[[Tensor], Tensor]) -> None:
    """513 entries and lines between: a quarter of a second difference is what a line misses, at a kink too."""
    q, graph = both(Net(lambda x: fn(x)), 3 * X, activations="int16")
    table = numbers(graph, graph.nodes[1].inputs[1])
    off = off_by(q, graph, 3 * X)
    assert graph.nodes[1].op == "table"
    assert table.shape == (513,)
    assert np.abs(off).max() <= 1.5 + np.abs(np.diff(table, 2)).max() / 4
    assert np.abs(off).max() <= 40  # of 65,536


@pytest.mark.proves("integer.int16")
@pytest.mark.parametrize("op", ["attention", "softmax"])
def test_sixteen_bits_through_exponentials(op: str) -> None:
    module, xs = (Net(attend), (heads(0), heads(1), heads(2))) if op == "attention" else (nn.Softmax(-1), (X,))
    q, graph = both(module, *xs, activations="int16")
    off = off_by(q, graph, *xs)
    assert [node.op for node in graph if "quantize" not in node.op] == [op]
    assert np.abs(off).max() <= 2
    assert np.count_nonzero(off) <= 0.25 * off.size


def test_integers_go_in_and_out() -> None:
    """Ids come as they are, an index goes out as it is: neither has a door."""
    module = Net(lambda m, i: m(i).argmax(-1), nn.Embedding(50, 8))
    ids = torch.arange(50).reshape(10, 5)
    _, graph = both(module, ids)
    assert [node.op for node in graph] == ["embedding", "argmax"]
    got = rd.simulate(graph, ids)
    codes: dict[str, Ints] = {}
    rd.simulate(graph, ids, watch=codes.__setitem__)
    assert np.array_equal(got, codes[graph.nodes[0].name].argmax(-1))
    assert np.mean(got == module(ids).numpy()) > 0.9
    with pytest.raises(rd.InputError, match="must be int32"):
        rd.simulate(graph, ids.float())


def test_refusals() -> None:
    for module, xs, message in [
        (Net(lambda a, b: a / b), (X, Y.abs() + 1), "a table is a function of one value"),
        (
            Net(lambda q, k, v, m: attend(q, k, v, attn_mask=m)),
            (heads(0), heads(1), heads(2), images(1, 8, 3, 10, 10)),
            "is computed",
        ),
        (Net(lambda *x: attend(*x, attn_mask=SEEN * 2.0)), (heads(0), heads(1), heads(2)), "adds numbers to scores"),
        (Net(lambda *x: attend(*x, attn_mask=SEEN & False)), (heads(0), heads(1), heads(2)), "hides every key"),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (X,), "by input"),
        (Net(lambda a: torch.minimum(a, torch.arange(1.0, 5).reshape(4, 1, 1))), (X,), "minimum.*depends on .* too"),
    ]:
        with pytest.raises(rd.PlanError, match=message):
            both(module, *xs)
    with pytest.raises(rd.PlanError, match="it is no number at 128 of the 256 codes of"):
        both(Net(torch.sqrt), X.abs() + 1, activations="int8s")
