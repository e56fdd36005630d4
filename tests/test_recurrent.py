"""Recurrent layers: what capture makes of them against torch's own, what a plan says of their states, integers and C."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import roundel as rd
from roundel.graph import Graph, GraphModule, Node
from roundel.integer.check import check_integer
from roundel.network.capture import capture
from roundel.network.fuse import fuse
from roundel.network.sites import find_sites, fine_sites
from roundel.plan import Rule
from roundel.runtimes import hostc, qemu

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))
needs_board = pytest.mark.skipif(qemu.absent("qemu-cortex-m4") is not None, reason=str(qemu.absent("qemu-cortex-m4")))

LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm, projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "rnn, relu": (nn.RNN, {"nonlinearity": "relu"}),
}

#: Layers, both directions, batch first, biases, a state given: all pairs of the first two, both values of the others.
FORMS = [
    (1, False, True, True, False),
    (1, True, False, False, True),
    (2, False, False, True, True),
    (2, True, True, True, False),
    (2, True, True, False, True),
]

#: Every kind in every form; the ordinary run has each kind and each form once, and the LSTM twice.
PAIRS = [
    (name, form) if j == i or (i, j) == (0, 3) else pytest.param(name, form, marks=pytest.mark.soak)
    for i, name in enumerate(LAYERS)
    for j, form in enumerate(FORMS)
]


class Sequence(nn.Module):
    """(N, T, in), and states (N, layers, size), to the outputs and last states, batch first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        first = self.layer.batch_first
        given = tuple(state.transpose(0, 1) for state in states)
        out, last = self.layer(x if first else x.transpose(0, 1), (given if len(given) > 1 else given[0]) if given else None)
        return out if first else out.transpose(0, 1), *(last if isinstance(last, tuple) else (last,))


class Words(nn.Module):
    def __init__(self, layer: nn.Module, size: int = 12) -> None:
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Step(nn.Module):
    """One step: scores, and the states that the next one takes."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(12, 4)

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        out = self.cell(x, states if len(states) > 1 else states[0])
        states = out if isinstance(out, tuple) else (out,)
        return self.head(states[0]), *states


def nearest(module: nn.Module, graph: Graph, *xs: Tensor) -> float:
    """The largest difference between a module's outputs and those of its graph, before and after fusion."""
    with torch.no_grad():
        want = module(*xs)
        want = want if isinstance(want, tuple) else (want,)
        worst = 0.0
        for each in (graph, fuse(graph)):
            got = GraphModule(each)(*xs)
            got = got if isinstance(got, tuple) else (got,)
            assert [a.shape for a in want] == [a.shape for a in got]
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(want, got)))
    return worst


@pytest.mark.proves("capture.recurrent")
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("name", "form"), PAIRS, ids=str)
def test_a_captured_layer_is_torchs(name: str, form: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    layers, both, first, bias, given = form
    kind, more = LAYERS[name]
    more = more | {"dropout": 0.3} if layers > 1 else more
    module = Sequence(kind(5, 4, layers, bidirectional=both, batch_first=first, bias=bias, **more)).eval()

    def inputs(n: int) -> tuple[Tensor, ...]:
        count = layers * (1 + both)
        states = [torch.randn(n, count, more.get("proj_size", 4)), torch.randn(n, count, 4)]
        return torch.randn(n, 5, 5), *(states[: 2 if kind is nn.LSTM else 1] if given else [])

    graph = capture(module, inputs(3))
    assert nearest(module, graph, *inputs(6)) < 1e-6
    known = "linear slice split reshape transpose concat add sub mul sigmoid tanh relu cast identity"
    assert {node.op for node in graph} <= set(known.split())
    assert len([name for name in graph.constants if "weight" in name]) == len([n for n in module.state_dict() if "weight" in n])


@pytest.mark.proves("capture.recurrent")
@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_captured_cell_is_torchs_alone_and_in_a_loop(kind: str, bias: bool) -> None:
    torch.manual_seed(0)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(nn, kind)(5, 4, bias=bias)

        def forward(self, x: Tensor) -> Any:
            state = None
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return state

    module = Loop().eval()
    graph = capture(module, torch.randn(3, 4, 5))
    assert nearest(module, graph, torch.randn(6, 4, 5)) < 1e-6
    assert len({n.attrs["site"] for n in graph if "site" in n.attrs}) <= 6  # over all steps
    n = 2 if kind == "LSTMCell" else 1
    step = Step(getattr(nn, kind)(6, 12, bias=bias)).eval()
    graph = capture(step, (torch.randn(3, 6), *[torch.randn(3, 12)] * n))
    assert nearest(step, graph, torch.randn(5, 6), *torch.randn(n, 5, 12)) < 1e-6


def test_steps_on_the_first_axis_of_an_input_are_captured_as_they_are_with_a_note() -> None:
    layer, x = nn.LSTM(5, 4).eval(), torch.randn(7, 3, 5)
    graph = capture(layer, x)
    assert any("batch of 7 only" in note for note in graph.notes)
    with torch.no_grad():
        out, (h, c) = layer(x)
        got = GraphModule(graph)(x)
    for a, b in zip((out, h, c), got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.proves("quantize.recurrent")
def test_steps_share_parameters_and_states_are_16_bits_unless_a_rule_says_otherwise() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 2, 6)
    for kind, states in (("LSTM", {"gates", "sigmoid", "tanh", "cell"}), ("GRU", {"gates", "sigmoid", "tanh", "state", "change"})):
        model = Words(getattr(nn, kind)(6, 12, batch_first=True)).eval()
        q = rd.quantize(model, "int8", "int8", data=[x])
        formats = {name: a.format.bits for name, a in q.activations.items()}
        assert {n.removeprefix("rnn.l0.") for n, bits in formats.items() if bits == 16} == states
        assert formats["rnn.l0.hidden"] == formats["x"] == formats["head"] == 8
        assert len(formats) == len(states) + 3  # one site for both steps
        assert any("int16s, not int8" in note.text and "rnn.l0.gates" in note.text for note in q.notes)
        for name in ("rnn.l0.sigmoid", "rnn.l0.tanh"):  # TFLite's Q0.15
            params = q.activations[name].params
            assert params is not None
            assert params.scale is not None
            assert float(params.scale) == 2.0**-15
        own = rd.Plan((Rule("*", "int8", "int8"), Rule("rnn.l0.gates", activation="int8")))
        q = rd.quantize(model, data=[x], plan=own)
        assert q.activations["rnn.l0.gates"].format.bits == 8
        assert q.activations["rnn.l0.sigmoid"].format.bits == 16
        assert any(rule.pattern == "rnn.l0.sigmoid" for rule in q.plan.rules)  # what was done is in the plan
    assert all(a.format.bits == 16 for a in rd.quantize(model, "int8", "int16s", data=[x]).activations.values())
    assert not rd.quantize(model, "int8", data=[x]).activations


def test_marks_change_no_number_and_come_back_from_a_file(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 6)
    model = Words(nn.GRU(6, 12, batch_first=True)).eval()
    q = rd.quantize(model, "int8", "int8", data=[x])
    q.save(tmp_path / "m.safetensors")
    again = rd.load(tmp_path / "m.safetensors")
    assert torch.equal(q.module(x), again.module(x))
    assert np.array_equal(rd.simulate(rd.lower(q), x), rd.simulate(rd.lower(again), x))
    graph = fuse(capture(model, x))
    bare = [Node(n.op, n.inputs, n.outputs, {k: v for k, v in n.attrs.items() if k not in ("site", "fine")}) for n in graph]
    assert torch.equal(GraphModule(graph)(x), GraphModule(graph.with_nodes(bare))(x))
    assert len(find_sites(graph.with_nodes(bare)).origin) > 3 * len(find_sites(graph).origin)
    assert fine_sites(graph)
    assert not fine_sites(graph.with_nodes(bare))


@pytest.mark.proves("refine.recurrent")
def test_gptq_learns_from_every_step() -> None:
    """The Hessian of a weight that all steps use is that of all steps, which is what the solver is given."""
    from roundel.refine import refine

    torch.manual_seed(0)
    x = torch.randn(16, 4, 6)
    model = Words(nn.LSTM(6, 12, batch_first=True)).eval()
    q = rd.quantize(model, "int4", None, data=[x])
    assert isinstance(q.structure, Graph)
    given: dict[str, Tensor] = {}

    def keep(name: str, hessian: Tensor) -> Any:
        given[name] = hessian
        return q.tensors[name]

    real = GraphModule(fuse(capture(model, x)))
    refine(q, real, [rd.data.Batch((x,), {}, None)], keep, bias=False)
    seen: dict[str, Tensor] = {}
    module = q.module
    module.watch = lambda name, value: seen.setdefault(name, value.detach().clone())
    module(x)
    wanted = torch.zeros(12, 12, dtype=torch.float64)
    for node in q.structure:
        if node.op == "linear" and node.inputs[1] == "rnn.weight_hh_l0":
            h = seen[node.inputs[0]].double()
            wanted += h.T @ h
    assert set(given) == set(q.tensors)
    torch.testing.assert_close(given["rnn.weight_hh_l0"][0], wanted)
    assert wanted.abs().max() > 0


@cache
def small(kind: str) -> tuple[rd.QModel, Tensor]:
    torch.manual_seed(0)
    layer = nn.LSTM(6, 12, 2, batch_first=True) if kind == "LSTM" else getattr(nn, kind)(6, 6, batch_first=True, bidirectional=True)
    x = torch.randn(64, 3, 6)
    return rd.quantize(Words(layer).eval(), "int8", "int8", data=[x]), x


@pytest.mark.proves("integer.recurrent")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_integers_are_the_float_side_and_their_sums_are_proven(kind: str) -> None:
    q, x = small(kind)
    graph = rd.lower(q)
    check_integer(graph)
    with torch.no_grad():
        there = q.module(x)
    step = float(q.activations["head"].params.scale)
    assert np.abs(rd.simulate(graph, x) - there.numpy()).max() <= 3 * step
    dtypes = {graph.values[node.name].dtype for node in graph if node.op in ("add", "table")}
    assert "int16" in dtypes
    tables = [node.inputs[1] for node in graph if node.op == "table"]
    assert len(tables) > 2 * len(set(tables))  # steps share constants
    assert np.array_equal(rd.simulate(graph, x, codes=True), rd.simulate(graph, x, codes=True, fast=False))


@needs_cc
@pytest.mark.proves("c.recurrent")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_c_is_the_simulator_code_for_code(kind: str) -> None:
    q, x = small(kind)
    seen = rd.verify(q, against=["host-c"], data=[x[:6]])["host-c"]
    assert seen.differing == 0 < seen.total


@needs_board
@pytest.mark.proves("c.recurrent")
@pytest.mark.parametrize("board", [b if b == qemu.NAME else pytest.param(b, marks=pytest.mark.soak) for b in qemu.BOARDS])
def test_boards_are_the_simulator_code_for_code(board: str) -> None:
    if why := qemu.absent(board):
        pytest.skip(why)
    for kind in ("LSTM", "GRU"):
        q, x = small(kind)
        seen = rd.verify(q, against=[board], data=[x[:3]])[board]
        assert seen.differing == 0 < seen.total


@needs_cc
@pytest.mark.proves("c.streaming")
@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell"])
def test_fifty_steps_one_by_one_in_c_are_the_simulators(kind: str, tmp_path: Any) -> None:
    """The codes of a state that goes out are those that come in at the next step: no units change between them."""
    torch.manual_seed(0)
    model, n = Step(getattr(nn, kind)(6, 12)).eval(), 2 if kind == "LSTMCell" else 1
    xs, rows = torch.randn(50, 4, 6), []
    states: list[Tensor] = [torch.zeros(4, 12)] * n
    with torch.no_grad():
        for x in xs:
            rows.append((x, *states))
            states = list(model(x, *states)[1:])
    q = rd.quantize(model, "int8", "int8", data=[tuple(torch.cat(part) for part in zip(*rows))])
    graph = rd.lower(q)
    into = {node.inputs[0]: node for node in graph if node.op == "quantize"}
    out = {node.name: node for node in graph if node.op == "dequantize"}
    doors = list(zip(graph.inputs[1:], graph.outputs[1:], strict=True))
    for name, end in doors:
        assert (into[name].attrs["scale"], into[name].attrs["zero"]) == (out[end].attrs["scale"], out[end].attrs["zero"])
    codes = {name: np.zeros((4, 12), np.int64) + into[name].attrs["zero"] for name in graph.inputs[1:]}
    given, wanted = [], []
    for x in xs:
        door = into[graph.inputs[0]].attrs
        now = np.clip(np.rint(x.numpy() / np.float32(door["scale"])) + door["zero"], door["low"], door["high"]).astype(np.int64)
        real = [
            (code - into[name].attrs["zero"]).astype(np.float32) * np.float32(into[name].attrs["scale"])
            for name, code in codes.items()
        ]
        given.append({graph.inputs[0]: now, **codes})
        wanted.append(rd.simulate(graph, x, *real, codes=True))
        codes = dict(zip(graph.inputs[1:], wanted[-1][1:], strict=True))
    # every step from the codes that the one before left: equal steps make equal runs
    made = hostc.run(q, graph, {name: np.concatenate([step[name] for step in given]) for name in graph.inputs}, tmp_path)
    for end, parts in zip(graph.outputs, zip(*wanted), strict=True):
        assert np.array_equal(made[out[end].inputs[0]], np.concatenate(parts))
    assert all(len(np.unique(code)) > 20 for code in codes.values())


@pytest.mark.proves("integer.recurrent")
def test_an_int16_state_keeps_what_an_int8_one_loses() -> None:
    """A slow GRU, whose state moves by less than an int8 step at a time."""
    torch.manual_seed(0)
    layer = nn.GRU(4, 8, batch_first=True)
    with torch.no_grad():
        bias = layer.bias_ih_l0
        bias[8:16] = 5.0  # z near 1: the state keeps nearly all that it has
    model, x = Words(layer, 8).eval(), torch.randn(32, 8, 4)
    sites = fine_sites(fuse(capture(model, x)))
    coarse = rd.Plan((Rule("*", "int8", "int8"), *(Rule(site, activation="int8") for site in sites)))
    with torch.no_grad():
        real = model(x).numpy()
    errors = [float(np.square(rd.simulate(rd.lower(q), x) - real).mean()) for q in (
        rd.quantize(model, "int8", "int8", data=[x]), rd.quantize(model, data=[x], plan=coarse))]  # fmt: skip
    assert errors[0] < 0.25 * errors[1]
