"""The `Graph` value, its text, its operations against their definitions in numpy, and the interpreter that trains."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SmallCNN, TransformerBlock, settle
from numpy.typing import NDArray
from torch import Tensor

import roundel as rd
from roundel.graph import ACTS, BATCH, OPS, Graph, GraphModule, Node, Spec

Array = NDArray[Any]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- every operation against a definition that torch has no part in ---------------------------------------------------


def pad_nchw(x: Array, pads: list[int], value: float = 0.0) -> Array:
    pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    return np.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs, constant_values=value)


def windows(x: Array, kernel: list[int], stride: list[int]) -> Array:
    """(n, c, h', w', kh, kw)"""
    axes = tuple(range(2, x.ndim))
    seen = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=axes)
    return seen[(slice(None), slice(None), *[slice(None, None, s) for s in stride])]


def conv(x: Array, w: Array, b: Array, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Array:
    x = pad_nchw(x, padding)
    wide = np.zeros((*w.shape[:2], *[(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilation, strict=True)]))
    wide[(slice(None), slice(None), *[slice(None, None, d) for d in dilation])] = w
    parts = np.split(windows(x, list(wide.shape[2:]), stride), groups, axis=1)
    sub = "ncx...k,ock->nox..." if w.ndim == 3 else "ncxyhk,ochk->noxy"
    sub = "ncxk,ock->nox" if w.ndim == 3 else sub
    out = np.concatenate([np.einsum(sub, p, q) for p, q in zip(parts, np.split(wide, groups), strict=True)], 1)
    return out + b.reshape(-1, *[1] * (w.ndim - 2))


def conv_transpose(x: Array, w: Array, b: Array, stride: int, padding: int, groups: int) -> Array:
    n, inner, height, width = x.shape
    _, out, kh, kw = w.shape
    y = np.zeros((n, out * groups, (height - 1) * stride + kh, (width - 1) * stride + kw))
    for c, i, j in np.ndindex(inner, height, width):
        at = c // (inner // groups) * out
        y[:, at : at + out, i * stride : i * stride + kh, j * stride : j * stride + kw] += x[:, c, i, j, None, None, None] * w[c]
    return y[:, :, padding : y.shape[2] - padding, padding : y.shape[3] - padding] + b[:, None, None]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def normal(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


erf = np.vectorize(math.erf)
A, B, P = rows(2, 3, 4).numpy(), rows(2, 3, 4, seed=1).numpy(), np.abs(rows(2, 3, 4).numpy()) + 0.5
I4, W4, B4 = rows(2, 4, 7, 6).numpy(), rows(6, 4, 3, 2, seed=1).numpy(), rows(6, seed=2).numpy()
G4, T4 = rows(6, 2, 3, 2, seed=1).numpy(), rows(4, 3, 3, 3, seed=1).numpy()
ODD = {"stride": [2, 1], "padding": [1, 0, 2, 1], "dilation": [1, 2]}
CH = rows(4, seed=3).numpy()
ids = np.array([[2, 0], [1, 2]])


def case(op: str, want: Array | tuple[Array, ...], *operands: Array | None, **attrs: Any) -> Any:
    return pytest.param(op, want, operands, attrs, id=f"{op}{len(attrs) or ''}")


CASES = [
    case("conv", conv(I4, W4, B4, [2, 1], [1, 0, 2, 1], [1, 2], 1), I4, W4, B4, **ODD),
    case("conv", np.maximum(conv(I4, G4, B4, [1, 1], [0] * 4, [1, 1], 2), 0), I4, G4, B4, stride=[1, 1], padding=[0] * 4,
         dilation=[1, 1], groups=2, act="relu"),
    case("conv", conv(A, rows(5, 3, 2).numpy(), B4[:5], [1], [1, 0], [1], 1), A, rows(5, 3, 2).numpy(), B4[:5],
         stride=[1], padding=[1, 0], dilation=[1], groups=1),
    case("conv_transpose", conv_transpose(I4, T4, B4[:3], 2, 1, 1), I4, T4, B4[:3], stride=[2, 2], padding=[1, 1],
         output_padding=[0, 0], dilation=[1, 1]),
    case("conv_transpose", conv_transpose(I4, T4, B4, 1, 0, 2), I4, T4, B4, stride=[1, 1], padding=[0, 0],
         output_padding=[0, 0], dilation=[1, 1], groups=2),
    case("linear", A @ rows(5, 4).numpy().T + B4[:5], A, rows(5, 4).numpy(), B4[:5]),
    case("linear", np.clip(A @ rows(5, 4).numpy().T * 1.0, 0, 6), A, rows(5, 4).numpy(), act="relu6"),
    case("embedding", rows(3, 5).numpy()[ids], ids, rows(3, 5).numpy()),
    case("matmul", A @ B.swapaxes(1, 2), A, np.ascontiguousarray(B.swapaxes(1, 2))),
    case("matmul", A @ B.swapaxes(1, 2), A, B, transpose_b=True),
    case("add", A + B, A, B), case("add", np.maximum(A + B, 0), A, B, act="relu"), case("sub", A - B, A, B),
    case("mul", A * B, A, B),
    case("div", A / P, A, P), case("maximum", np.maximum(A, B), A, B), case("minimum", np.minimum(A, B), A, B),
    case("squared_difference", (A - B) ** 2, A, B), case("pow", P**B, P, B), case("where", np.where(A > 0, A, B), A > 0, A, B),
    *[case("compare", fn(A, B), A, B, how=how) for how, fn in
      {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}.items()],
    case("attention", softmax(A @ B.swapaxes(1, 2) * 0.3) @ P, A, B, P, scale=0.3),
    case("attention", softmax(np.where(np.tri(3) > 0, A @ B.swapaxes(1, 2) * 0.3, -np.inf)) @ P, A, B, P, scale=0.3,
         causal=True),
    case("attention", softmax(A @ B.swapaxes(1, 2) + 0.5 * np.tri(3)) @ P, A, B, P,
         (0.5 * np.tri(3)).astype(np.float32), scale=1.0),
    case("identity", A, A), case("relu", np.maximum(A, 0), A), case("relu6", np.clip(A * 9, 0, 6), A * 9),
    case("leaky_relu", np.where(A > 0, A, 0.2 * A), A, slope=0.2),
    case("prelu", np.where(I4 > 0, I4, CH[:, None, None] * I4), I4, CH),
    case("elu", np.where(A > 0, A, 2 * np.expm1(A)), A, alpha=2.0),
    case("hardswish", A * 5 * np.clip(A * 5 + 3, 0, 6) / 6, A * 5), case("hardsigmoid", np.clip(A * 5 + 3, 0, 6) / 6, A * 5),
    case("hardtanh", np.clip(A, -0.5, 0.25), A, lo=-0.5, hi=0.25),
    case("hardtanh", np.minimum(A, 0.25), A, lo=None, hi=0.25),
    case("gelu", A * 0.5 * (1 + erf(A / math.sqrt(2))), A),
    case("gelu", 0.5 * A * (1 + np.tanh(math.sqrt(2 / math.pi) * (A + 0.044715 * A**3))), A, approximate="tanh"),
    case("silu", A * sigmoid(A), A), case("sigmoid", sigmoid(A), A), case("tanh", np.tanh(A), A), case("exp", np.exp(A), A),
    case("log", np.log(P), P), case("erf", erf(A), A), case("sqrt", np.sqrt(P), P), case("rsqrt", 1 / np.sqrt(P), P),
    case("abs", np.abs(A), A), case("neg", -A, A), case("sin", np.sin(A), A), case("cos", np.cos(A), A),
    case("cast", A.astype(np.int64), A, dtype="int64"), case("cast", ids.astype(np.float32), ids, dtype="float32"),
    case("batch_norm", (I4 - CH[:, None, None]) / np.sqrt(np.abs(CH)[:, None, None] + 0.1) * 2 + 1, I4, CH, np.abs(CH),
         np.full(4, 2, np.float32), np.ones(4, np.float32), eps=0.1),
    case("layer_norm", normal(A, (2,), 0.1) * CH + 1, A, CH, np.ones(4, np.float32), eps=0.1),
    case("rms_norm", A / np.sqrt((A**2).mean(-1, keepdims=True) + 0.1) * CH, A, CH, eps=0.1),
    case("group_norm", normal(I4.reshape(2, 2, -1), (2,), 0.1).reshape(I4.shape) * CH[:, None, None] + 1, I4, CH,
         np.ones(4, np.float32), groups=2, eps=0.1),
    case("softmax", softmax(A, 1), A, axis=1), case("log_softmax", np.log(softmax(A)), A),
    case("max_pool", windows(pad_nchw(I4, [1, 0, 0, 1], -np.inf), [2, 3], [2, 1]).max((4, 5)), I4, kernel=[2, 3], stride=[2, 1],
         padding=[1, 0, 0, 1]),
    case("avg_pool", windows(I4, [2, 3], [2, 1]).mean((4, 5)), I4, kernel=[2, 3], stride=[2, 1], padding=[0] * 4),
    case("avg_pool", windows(pad_nchw(I4, [1, 1, 0, 1]), [2, 2], [1, 2]).mean((4, 5)), I4, kernel=[2, 2], stride=[1, 2],
         padding=[1, 1, 0, 1], count_pad=True),
    case("avg_pool", np.nanmean(windows(pad_nchw(I4, [1, 1, 0, 1], np.nan), [2, 2], [1, 2]), (4, 5)), I4, kernel=[2, 2],
         stride=[1, 2], padding=[1, 1, 0, 1]),
    case("mean", A.mean((1, 2)), A, axes=[1, -1]), case("sum", A.sum((0,), keepdims=True), A, axes=[0], keepdim=True),
    case("amax", A.max((1, 2)), A, axes=[1, 2]), case("argmax", A.argmax(1), A, axis=1),
    case("reshape", A.reshape(2, 12), A, shape=[0, -1]), case("transpose", A.transpose(2, 0, 1), A, perm=[2, 0, 1]),
    case("slice", A[:, 1:], A, axis=1, start=1), case("slice", A[..., 3:0:-2], A, axis=-1, start=3, stop=0, step=-2),
    case("slice", A[..., :-1:2], A, axis=2, stop=-1, step=2), case("concat", np.concatenate([A, B], 1), A, B, axis=1),
    case("split", (A[:, :1], A[:, 1:]), A, sizes=[1, 2], axis=1),
    case("pad", pad_nchw(A, [1, 2, 0, 1], 7.0), A, padding=[1, 2, 0, 1], value=7.0),
    case("pad", np.pad(I4, [(0, 0), (0, 0), (2, 1), (1, 2)], mode="reflect"), I4, padding=[1, 2, 2, 1], mode="reflect"),
    case("expand", np.broadcast_to(A[:, :1], (2, 5, 4)), np.ascontiguousarray(A[:, :1]), shape=[-1, 5, -1]),
    case("expand_batch", np.repeat(A[:1], 2, 0), A[:1], B), case("gather", A[:, ids], A, ids, axis=1),
    case("resize", I4.repeat(2, 2).repeat(3, 3), I4, size=[14, 18], mode="nearest"),
    case("resize", np.stack([I4[..., 0], (I4[..., 2] + I4[..., 3]) / 2, I4[..., 5]], -1), I4, size=[7, 3],
         mode="bilinear", align_corners=True),
    case("depth_to_space", I4.reshape(2, 1, 2, 2, 7, 6).transpose(0, 1, 4, 2, 5, 3).reshape(2, 1, 14, 12), I4, block=2),
]  # fmt: skip


@pytest.mark.proves("graph.ops")
@pytest.mark.parametrize(("op", "want", "operands", "attrs"), CASES)
def test_operation_against_its_definition(op: str, want: Any, operands: Any, attrs: dict[str, Any]) -> None:
    """Through a graph and its JSON, as everything else uses it."""
    names = tuple(f"x{i}" if x is not None else "" for i, x in enumerate(operands))
    outs = tuple(f"y{i}" for i in range(len(want) if isinstance(want, tuple) else 1))
    graph = Graph(names, outs, (Node(op, names, outs, attrs),))
    module = GraphModule(Graph.from_json(graph.to_json(), {}))
    got = module(*[torch.from_numpy(np.array(x)) for x in operands])
    for a, b in zip(got if isinstance(want, tuple) else [got], want if isinstance(want, tuple) else [want], strict=True):
        assert a.shape == b.shape
        assert np.allclose(a.numpy(), b, rtol=1e-5, atol=1e-5)
        assert a.dtype in (torch.float32, torch.int64, torch.bool)
        assert a.is_floating_point() == (np.asarray(b).dtype.kind == "f")


@pytest.mark.proves("graph.ops")
def test_the_list_is_closed_and_every_operation_is_tested() -> None:
    assert {param.values[0] for param in CASES} == set(OPS)
    assert set(ACTS) == {"relu", "relu6"}
    with pytest.raises(rd.InputError, match="operation 'eval' of 'y' is not one of: abs, add, "):
        Graph(("x",), ("y",), (Node("eval", ("x",), ("y",)),))


# -- the value and its text -------------------------------------------------------------------------------------------


def small() -> Graph:
    torch.manual_seed(0)
    nodes = (Node("linear", ("x", "fc.weight", ""), ("fc",), {"act": "relu"}), Node("softmax", ("fc",), ("y",), {"axis": -1}))
    return Graph(("x",), ("y",), nodes, {"fc.weight": torch.randn(3, 4)}, {"x": Spec((BATCH, 4)), "y": Spec((BATCH, 3))})


@pytest.mark.proves("graph.json")
def test_json_by_hand() -> None:
    assert json.loads(small().to_json()) == {
        "inputs": ["x"],
        "outputs": ["y"],
        "nodes": [
            {"op": "linear", "inputs": ["x", "fc.weight", ""], "outputs": ["fc"], "attrs": {"act": "relu"}},
            {"op": "softmax", "inputs": ["fc"], "outputs": ["y"], "attrs": {"axis": -1}},
        ],
        "values": {"x": {"shape": ["N", 4], "dtype": "float32"}, "y": {"shape": ["N", 3], "dtype": "float32"}},
    }


@pytest.mark.proves("graph.json")
def test_equal_graphs_give_equal_bytes() -> None:
    """Whatever the order in which attributes and values were put in; no blanks, sorted keys."""
    a = small()
    shuffled = {name: a.values[name] for name in reversed(a.values)}
    pad = {"stride": [1, 1], "padding": [0] * 4, "act": None, "kernel": [2, 2]}
    b = Graph(a.inputs, a.outputs, a.nodes, a.constants, shuffled)
    assert a.to_json() == b.to_json()
    one, two = (
        Graph(("x",), ("y",), (Node("max_pool", ("x",), ("y",), dict(items)),)) for items in (pad.items(), reversed(pad.items()))
    )
    assert one.to_json() == two.to_json()
    assert b" " not in a.to_json()
    assert a.to_json() == json.dumps(json.loads(a.to_json()), sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.proves("graph.json")
@pytest.mark.parametrize("net", [SmallCNN, TransformerBlock])
def test_round_trip_of_real_graphs(net: Callable[[], Any]) -> None:
    x = rows(2, 3, 16, 16) if net is SmallCNN else rows(2, 7, 16)
    graph = rd.fuse(rd.capture(settle(net()), x))
    again = Graph.from_json(graph.to_json(), graph.constants)
    assert again.to_json() == graph.to_json()
    assert again.nodes == graph.nodes
    assert torch.equal(GraphModule(again)(x), GraphModule(graph)(x))


@pytest.mark.proves("graph.json")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("nodes"), "missing required field `nodes`"),
        (lambda d: d["nodes"][0].update(op="system"), "operation 'system' of 'fc' is not one of"),
        (lambda d: d["nodes"][1].update(inputs=["z"]), r"'y' \(softmax\) reads 'z' before any node makes it"),
        (lambda d: d["nodes"].reverse(), "reads 'fc' before"),
        (lambda d: d["nodes"][1].update(outputs=["fc"]), "'fc' is made twice"),
        (lambda d: d["nodes"][0].update(outputs=["x"]), "'x' is made twice"),
        (lambda d: d.update(outputs=["other"]), "output 'other' is made by no node"),
        (lambda d: d.update(inputs=["x", "fc.weight"]), "share one name"),
        (lambda d: d.update(inputs="x"), "Expected `array`"),
        (lambda d: d["values"].update(x={"shape": [1.5]}), "not readable"),
        (lambda d: d["nodes"][0].update(attrs=[]), "not readable"),
        (lambda d: d["nodes"][0].update(outputs=[]), "operation 'linear' makes no value"),
        (lambda d: d["nodes"][0].update(attrs={"act": "selu"}), r"'fc' \(linear\) has an unknown activation 'selu'"),
        (lambda d: d["nodes"][1].update(attrs={"axes": 1}), r"'y' \(softmax\) has no attribute 'axes'"),
        (lambda d: d["nodes"][0].update(op="mean", attrs={}), "lacks the attribute 'axes'"),
        (lambda d: d["values"].update(x={"shape": ["N", 4], "dtype": "load"}), "'x' is of no type that torch has: 'load'"),
    ],
)
def test_damaged_text_is_named(change: Callable[[dict[str, Any]], object], says: str) -> None:
    document = json.loads(small().to_json())
    change(document)
    with pytest.raises(rd.InputError, match=says):
        Graph.from_json(json.dumps(document), small().constants)


@pytest.mark.proves("graph.json")
@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"null", b"\xff\xfe", b'{"inputs": 3}'])
def test_what_is_no_graph_at_all(text: bytes) -> None:
    with pytest.raises(rd.InputError, match="description is not readable"):
        Graph.from_json(text, {})


@pytest.mark.proves("graph.json")
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 255))
def test_a_changed_byte_is_an_input_error_or_another_graph(where: int, byte: int) -> None:
    text = bytearray(small().to_json())
    text[where % len(text)] = byte
    with contextlib.suppress(rd.InputError):
        GraphModule(Graph.from_json(bytes(text), small().constants))(rows(2, 4))


@pytest.mark.parametrize(("op", "attrs"), [("compare", {"how": "save"}), ("cast", {"dtype": "load"}), ("softmax", {"axis": "x"}),
                                           ("mean", {"axes": 9**99}), ("split", {"sizes": [1, 2], "axis": 1})])  # fmt: skip
def test_attributes_reach_nothing_but_the_operation(op: str, attrs: dict[str, Any]) -> None:
    names = ("x", "x") if op == "compare" else ("x",)
    module = GraphModule(Graph(("x",), ("y",), (Node(op, names, ("y",), attrs),)))
    with pytest.raises(rd.InputError, match=rf"'y' \({op}\) cannot take operands"):
        module(rows(2, 3))


def test_looking_around_and_dropping_the_dead() -> None:
    graph = small()
    assert graph.producers()["y"].op == "softmax"
    assert [node.name for node in graph.consumers()["fc"]] == ["y"]
    assert (graph.users("y"), graph.users("x"), graph.users("nothing")) == (1, 1, 0)
    dead = Node("relu", ("x",), ("dead",))
    kept = graph.with_nodes((dead, *graph.nodes), {"unused": torch.zeros(1)})
    assert (kept.nodes, set(kept.constants)) == (graph.nodes, {"fc.weight"})


# -- the interpreter --------------------------------------------------------------------------------------------------


@pytest.mark.proves("graph.train")
def test_the_interpreter_trains() -> None:
    """The same steps of SGD from the same start as the module that it was captured from."""
    import copy

    net, x, y = settle(SmallCNN()), rows(8, 3, 16, 16), torch.arange(8)
    graph = rd.capture(net, x)
    ours, theirs = GraphModule(graph), copy.deepcopy(net)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    ours_was = GraphModule(Graph.from_json(graph.to_json(), {name: t.clone() for name, t in graph.constants.items()}))
    for module in (ours_was, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    assert torch.allclose(ours_was(x), theirs(x), atol=1e-4)
    assert not torch.allclose(ours_was(x), net(x), atol=1e-2)
    live = ours_was.graph.constants
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(live[name], parameter, atol=1e-4), name
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    state = ours_was.state_dict()
    ours.load_state_dict(state)
    assert torch.equal(ours(x), ours_was(x))


@pytest.mark.proves("graph.train")
def test_integers_are_held_and_do_not_train() -> None:
    graph = Graph(("x",), ("y",), (Node("gather", ("x", "pick"), ("y",), {"axis": 1}),), {"pick": torch.tensor([2, 0])})
    module = GraphModule(graph)
    assert [p.requires_grad for p in module.parameters()] == [False]
    assert torch.equal(module(rows(2, 3)), rows(2, 3)[:, [2, 0]])


def test_inputs_that_do_not_fit() -> None:
    module = GraphModule(small())
    assert torch.equal(module(rows(2, 4)), module(x=rows(2, 4)))
    for args, named, says in (
        ((), {}, r"takes inputs \['x'\]; got 0 positional"),
        ((rows(2, 4), rows(2, 4)), {}, "got 2 positional"),
        ((), {"z": rows(2, 4)}, r"got 0 positional and \['z'\] named"),
        ((rows(2, 5),), {}, r"must have shape \['N', 4\]; got \[2, 5\]"),
        ((rows(2, 4).long(),), {}, "must be float32; got int64"),
    ):
        with pytest.raises(rd.InputError, match=says):
            module(*args, **named)
    loose = Graph(("x",), ("y",), (Node("linear", ("x", "w"), ("y",)),), {"w": torch.zeros(3, 4)})
    with pytest.raises(rd.InputError, match=r"'y' \(linear\) cannot take operands of shapes \[\(2, 5\), \(3, 4\)\]"):
        GraphModule(loose)(rows(2, 5))


def test_watching_sees_every_value_once() -> None:
    module, seen = GraphModule(small()), []
    module.watch = lambda name, value: seen.append((name, tuple(value.shape)))
    module(rows(2, 4))
    assert seen == [("x", (2, 4)), ("fc", (2, 3)), ("y", (2, 3))]
