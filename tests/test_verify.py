"""`verify` and `verify_log`: a runtime that computes wrongly is found at the right value by the right amount; data of all forms."""

import json
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import roundel as rd
from roundel import runtimes
from roundel.integer import simulate
from roundel.runtimes import hostc
from roundel.verify import Verification, _joined, vectors

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))


class Two(nn.Module):
    """Two inputs and a constant that is added, so that values differ in kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(5, 6)
        self.register_buffer("shift", torch.randn(1, 6))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.relu(self.a(left) + self.b(right)) + self.shift


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def two() -> rd.QModel:
    data = [{"left": draw(32, 8), "right": draw(32, 5, seed=1)}]
    return rd.quantize(Two().eval(), "int8", "int8", data=data)


@pytest.fixture(scope="module")
def net() -> rd.QModel:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
    return rd.quantize(model, "int8", "int8", data=[draw(64, 1, 6, 6)])


def named_pairs(*sizes: int) -> list[dict[str, Tensor]]:
    return [{"left": draw(n, 8, seed=n), "right": draw(n, 5, seed=n + 50)} for n in sizes]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Put a runtime called "played" beside the others: it computes what `simulate` does, then ``spoil`` has its codes."""

    def as_runtime(spoil: Any = None, hidden: tuple[str, ...] = (), why: str | None = None) -> None:
        def run(q: Any, graph: Any, codes: Any, folder: Path, name: str) -> dict[str, Any]:
            doors = {node.inputs[0]: node.attrs for node in graph if node.op == "quantize"}
            real = {x: ((c - doors[x]["zero"]) * np.float32(doors[x]["scale"])).astype(np.float32) for x, c in codes.items()}
            seen: dict[str, Any] = {}
            simulate(graph, watch=lambda name, made: seen.__setitem__(name, made.copy()), **real)
            if spoil:
                spoil(seen)
            return {name: made for name, made in seen.items() if name not in hidden}

        module = types.ModuleType("roundel.runtimes.played")
        vars(module).update(absent=lambda name: why, dialects=lambda name: "R2", run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(runtimes.RUNTIMES, "played", ("played", "R2"))

    return as_runtime


# -- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("verify.finds")
def test_three_codes_off_by_one_are_found_where_they_are(two: rd.QModel, play) -> None:  # type: ignore[no-untyped-def]
    """Sizes, counts and the histogram by hand: 7 and 5 examples of 6 codes at each of a, b, add, and the output."""

    def spoil(seen: dict[str, Any]) -> None:
        assert list(seen)[-1] == "add_1.real"
        flat = seen["add"].reshape(-1)
        flat[[0, 41, 71]] += [1, 1, -1]
        seen["add_1"][3, 2] -= 7

    play(spoil)
    found = rd.verify(two, ["played"], named_pairs(7, 5))["played"]
    assert (found.differing, found.total, found.examples) == (4, 12 * 6 * 4, 12)
    assert found.first_op == "add"
    assert found.histogram == {-1: 1, 1: 2}
    assert found.values == {"add": 3, "add_1": 1}
    assert not found.exact
    assert str(found).startswith(
        "played: 4 of 288 elements differ over 12 inputs; the first in 'add', off by -1: 1, +1: 2; cosine "
    )


@pytest.mark.proves("verify.finds")
def test_a_difference_at_the_last_code_of_the_last_batch_is_found(two: rd.QModel, play) -> None:  # type: ignore[no-untyped-def]
    def spoil(seen: dict[str, Any]) -> None:
        seen["b"].reshape(-1)[-1] += 1

    play(spoil)
    found = rd.verify(two, "played", named_pairs(3, 1, 2))["played"]
    assert (found.differing, found.first_op, found.histogram, found.values) == (1, "b", {1: 1}, {"b": 1})


def test_an_exact_runtime_is_exact_and_what_it_hides_is_said(two: rd.QModel, play) -> None:  # type: ignore[no-untyped-def]
    play(hidden=("a", "add"))
    found = rd.verify(two, ["played"], named_pairs(4))["played"]
    assert (found.exact, found.differing, found.total) == (True, 0, 4 * 6 * 2)
    assert found.notes == ("2 values inside are not shown by the runtime",)
    assert found.metric == found.metric_simulated == pytest.approx(1)


def test_codes_of_another_shape_are_no_result(two: rd.QModel, play) -> None:  # type: ignore[no-untyped-def]
    """(1, 6) would be compared with every row by NumPy's broadcasting."""
    play(lambda seen: seen.__setitem__("a", seen["a"][:1]))
    found = rd.verify(two, ["played"], named_pairs(4))["played"]
    assert not found.exact
    assert "'a' the shape [1, 6]; [4, 6] is right" in str(found.why)


@needs_cc
@pytest.mark.proves("verify.finds")
def test_a_kernel_that_rounds_down_is_found(net: rd.QModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from roundel.exporters.c import emit

    right, half = emit._text, " + 1) >> 1;"
    assert half in right("round_R2")
    assert rd.verify(net, ["host-c"], [draw(16, 1, 6, 6)])["host-c"].exact
    monkeypatch.setattr(emit, "_text", lambda file: right(file).replace(half, ") >> 1;"))
    found = rd.verify(net, ["host-c"], [draw(16, 1, 6, 6)])["host-c"]
    first = next(node.name for node in rd.lower(net) if node.op == "conv")
    assert found.first_op == first
    assert set(found.histogram) == {-1}
    assert found.histogram[-1] == found.values[first]
    assert 0.1 < found.values[first] / (16 * 4 * 16) < 0.6  # half of the sums are rounded up, less those that ReLU clamps
    assert found.differing == sum(found.values.values())


# -- runtimes that do not run -----------------------------------------------------------------------------------------


@pytest.mark.proves("verify.absent")
def test_what_is_absent_or_refuses_is_named_and_the_others_run(two: rd.QModel, play, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    play()
    monkeypatch.setattr("roundel.runtimes.tflm.absent", lambda name: "it is on the moon")

    def refuse(*_: object) -> None:
        raise rd.CheckError("too large for me")

    monkeypatch.setattr("roundel.runtimes.hostc.absent", lambda name: None)
    monkeypatch.setattr("roundel.runtimes.hostc.run", refuse)
    found = rd.verify(two, ["tflm", "host-c", "played"], named_pairs(2))
    assert list(found) == ["tflm", "host-c", "played"]
    assert (found["tflm"].absent, found["tflm"].exact, found["tflm"].why) == (True, False, "it is on the moon")
    assert (found["host-c"].absent, found["host-c"].exact) == (False, False)
    assert str(found["host-c"]) == "host-c: no result: too large for me"
    assert found["played"].exact


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_every_runtime_says_whether_it_is_here(name: str) -> None:
    module, dialect = runtimes.runtime(name)
    assert dialect in ("R1", "R2")
    why = module.absent(name)
    assert why is None or len(why) > 10
    assert hasattr(module, "place") or (module.dialects(name) is not None and module.run)


def test_names_that_are_not(two: rd.QModel) -> None:
    with pytest.raises(rd.PlanError, match="no runtime 'host_c'; did you mean 'host-c'"):
        rd.verify(two, ["host_c"], named_pairs(2))
    with pytest.raises(rd.PlanError, match="nothing to compare with"):
        rd.verify(two, [], named_pairs(2))
    with pytest.raises(rd.PlanError, match="no metric 'accuracy'; there are top1"):
        rd.verify(two, ["host-c"], named_pairs(2), metric="accuracy")


def test_vela_counts_operators(net: rd.QModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from roundel.runtimes import vela

    placed = vela.Placement("ethos-u55-128", 5, (("SOFTMAX", "s", "it is large"),))
    monkeypatch.setattr(vela, "absent", lambda name: None)
    monkeypatch.setattr(vela, "place", lambda *_: placed)
    found = rd.verify(net, ["vela-ethos-u55"], [draw(1, 1, 6, 6)])["vela-ethos-u55"]
    assert (found.differing, found.total, found.first_op, found.exact) == (1, 5, "s", False)
    assert found.notes == ("SOFTMAX that makes 's' is not on the NPU: it is large",)
    assert "1 of 5 operators are not on the NPU" in str(found)


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("verify.data")
def test_data_of_every_form_is_the_same_data(two: rd.QModel, play) -> None:  # type: ignore[no-untyped-def]
    """dicts, tuples, batches of many sizes, and one of each example: the same codes at the doors."""
    play()
    whole = named_pairs(9)[0]
    pieces = [{name: x[i : i + n] for name, x in whole.items()} for i, n in ((0, 1), (1, 5), (6, 3))]
    forms = {"dict": [whole], "dicts": pieces, "tuples": [(d["left"], d["right"]) for d in pieces]}
    for data in forms.values():
        found = rd.verify(two, ["played"], data)["played"]
        assert (found.exact, found.total, found.examples) == (True, 9 * 6 * 4, 9)
        for name, codes in vectors(two, data, 9).items():
            assert np.array_equal(codes, vectors(two, [whole], 9)[name])


@pytest.mark.proves("verify.data")
@pytest.mark.parametrize(("limit", "used"), [(1, 1), (4, 4), (5, 5), (12, 12), (99, 12), (None, 12)])
def test_limit(two: rd.QModel, play, limit: int | None, used: int) -> None:  # type: ignore[no-untyped-def]
    play()
    found = rd.verify(two, ["played"], named_pairs(4, 5, 3), limit=limit)["played"]
    assert (found.examples, found.total) == (used, used * 24)


def test_batches_after_the_limit_are_not_made(two: rd.QModel, play) -> None:  # type: ignore[no-untyped-def]
    class Endless:
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield named_pairs(4)[0]
            pytest.fail("a second batch was made")

    play()
    assert rd.verify(two, ["played"], Endless(), limit=4)["played"].examples == 4


def test_batches_are_joined_where_the_batch_axis_is() -> None:
    parts = [np.arange(6).reshape(3, 2), np.arange(6, 9).reshape(3, 1)]
    assert np.array_equal(_joined(parts, (3, "N")), [[0, 1, 6], [2, 3, 7], [4, 5, 8]])
    same = np.arange(4)
    assert np.array_equal(_joined([same, same], (4,)), same)


def test_vectors_are_codes_by_the_rule_of_the_door(two: rd.QModel) -> None:
    """code = clamp(round to even(x / scale) + zero), in float32, by hand."""
    data = named_pairs(2, 3)
    codes = vectors(two, data, 4)
    for node in rd.lower(two):
        if node.op == "quantize":
            x = torch.cat([d[node.inputs[0]] for d in data])[:4].numpy()
            by_hand = np.clip(np.round(x / np.float32(node.attrs["scale"])) + node.attrs["zero"], -128, 127)
            assert np.array_equal(codes[node.inputs[0]], by_hand)
    assert set(codes) == {"left", "right"}


@pytest.mark.parametrize(
    ("data", "limit", "words"),
    [
        ([], None, "no batches"),
        (named_pairs(2), 0, "1 or more; got 0"),
        ([{"left": draw(2, 8)}], None, r"takes inputs \['left', 'right'\]"),
        ([{"left": draw(2, 7), "right": draw(2, 5)}], None, r"must have shape \['N', 8\]; got \[2, 7\]"),
    ],
)
def test_data_that_does_not_fit_is_refused(two: rd.QModel, data: Any, limit: int | None, words: str) -> None:
    with pytest.raises(rd.InputError, match=words):
        rd.verify(two, ["host-c"], data, limit=limit)


@pytest.mark.proves("verify.metric")
def test_the_metric_is_that_of_the_runtimes_own_outputs(net: rd.QModel, play) -> None:  # type: ignore[no-untyped-def]
    """A runtime whose every output is the same code of class 2 gives top1 = the share of label 2."""
    x = draw(40, 1, 6, 6, seed=9)
    out = next(node.inputs[0] for node in rd.lower(net) if node.op == "dequantize")
    simulated = torch.from_numpy(rd.simulate(rd.lower(net), x)).argmax(1)
    labels = torch.where(torch.arange(40) < 10, (simulated + 1) % 4, simulated)

    def spoil(seen: dict[str, Any]) -> None:
        seen[out][:] = [0, 1, 2, 0]

    play(spoil)
    found = rd.verify(net, ["played"], [(x[:25], labels[:25]), (x[25:], labels[25:])])["played"]
    assert found.metric_name == "top1"
    assert found.metric_simulated == pytest.approx(30 / 40)
    assert found.metric == pytest.approx((labels == 2).float().mean().item())


@pytest.mark.proves("verify.json")
def test_json_keys_are_the_attributes(two: rd.QModel, play) -> None:  # type: ignore[no-untyped-def]
    play(lambda seen: seen["a"].__iadd__(1))
    found = rd.verify(two, ["played"], named_pairs(2))["played"]
    told = json.loads(json.dumps(found.to_dict()))
    assert set(told) == {f.name for f in fields(Verification)} | {"exact"}
    assert {key: getattr(found, key) for key in ("differing", "total", "first_op", "exact")} == {
        "differing": 12, "total": 48, "first_op": "a", "exact": False
    }  # fmt: skip
    assert told["histogram"] == {"1": 12}


# -- models that have no integers -------------------------------------------------------------------------------------


def test_weights_alone_are_refused_in_words() -> None:
    q = rd.quantize(Two().eval(), "int8", data=named_pairs(8))
    with pytest.raises(rd.PlanError, match="site 'left' has no static parameters: quantize it with an activation format such as"):
        rd.verify(q, ["host-c"], named_pairs(2))


# -- logs of a board --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(net: rd.QModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the self-test of `export` prints here."""
    import subprocess

    if (why := hostc.absent()) is not None:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("board") / "fw"
    rd.export(net, folder, "c")
    cc = str(hostc.compiler())
    subprocess.run([cc, "-std=c99", "-DFW_WATCH=fw_watch", "main.c", "fw.c", "-o", "board"], cwd=folder, check=True)
    return subprocess.run([folder / "board"], capture_output=True, text=True, check=True).stdout


@pytest.mark.proves("verify.log")
def test_a_good_log_is_exact(net: rd.QModel, log: str) -> None:
    calls = log.count(" crc ")
    found = rd.verify_log(net, log)
    assert (found.exact, found.differing, found.total) == (True, 0, calls)
    noisy = f"boot 3.1 ok\r\n\x00\x1b[2J{log.replace(chr(10), chr(13) + chr(10))}watchdog fine\r\n"
    assert rd.verify_log(net, noisy).exact
    assert rd.verify_log(net, log.lower()).exact


@pytest.mark.proves("verify.log")
def test_one_checksum_changed_names_its_value(net: rd.QModel, log: str) -> None:
    """Of the three calls the second copies the convolution's result into the order that flattening wants."""
    crcs = [line.split()[4] for line in log.splitlines() if " crc " in line]
    for crc, value in zip(crcs, ("0", "0", "3"), strict=True):
        found = rd.verify_log(net, log.replace(crc, f"{int(crc, 16) ^ 1:08X}"))
        assert (found.differing, found.first_op, found.values, found.exact) == (1, value, {value: 1}, False)
        assert str(found) == f"board-log: 1 of 3 calls differ by their checksums; the first in {value!r}"


@pytest.mark.proves("verify.log")
def test_a_cut_log_and_one_of_another_model_are_refused(net: rd.QModel, two: rd.QModel, log: str) -> None:
    first = log.index(" crc ")
    for cut in ("", log[:first], log[: log.index(" crc ", first + 5) + 9]):
        with pytest.raises(rd.CheckError, match=r"the log holds \d checksums, the model has \d calls: was it cut"):
            rd.verify_log(net, cut)
    with pytest.raises(rd.CheckError, match="another model's"):
        rd.verify_log(two, log)
    other = rd.quantize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval(), "int8", "int8",
                        data=[draw(64, 1, 6, 6)])  # fmt: skip
    found = rd.verify_log(other, log)
    assert found.differing == found.total
    assert "another model's log" in found.notes[0]


@pytest.mark.proves("verify.log")
def test_the_last_of_several_runs_counts(net: rd.QModel, log: str) -> None:
    crc = log.split(" crc ")[1][:8]
    bad = log.replace(crc, "00000000")
    assert rd.verify_log(net, bad + log).exact
    assert not rd.verify_log(net, log + bad).exact


# -- models and data at the edge --------------------------------------------------------------------------------------


class Head(nn.Module):
    """A linear layer and what ``finish`` makes of it."""

    def __init__(self, finish: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.finish = nn.Linear(8, 6), finish

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.layer(x))


def headed(finish: Any) -> rd.QModel:
    return rd.quantize(Head(finish).eval(), "int8", "int8", data=[draw(32, 8)])


@pytest.mark.proves("verify.data")
def test_an_output_of_whole_numbers(play) -> None:  # type: ignore[no-untyped-def]
    play()
    found = rd.verify(headed(lambda y: y.argmax(-1)), ["played"], [draw(8, 8)])["played"]
    assert (found.exact, found.metric) == (True, None)


@pytest.mark.proves("verify.data")
def test_an_output_that_is_not_shown_is_not_exact_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = types.SimpleNamespace(absent=lambda name: None, dialects=lambda name: {}, run=lambda *a: {})
    monkeypatch.setitem(sys.modules, "roundel.runtimes.blind", blind)  # type: ignore[arg-type]
    monkeypatch.setitem(runtimes.RUNTIMES, "blind", ("blind", "R2"))
    found = rd.verify(headed(torch.relu), ["blind"], [draw(8, 8)])["blind"]
    assert not found.exact
    assert any("the output" in note and "was not compared" in note for note in found.notes)


@pytest.mark.proves("verify.data")
def test_batches_that_are_empty_half_precise_or_want_gradients(play) -> None:  # type: ignore[no-untyped-def]
    play()
    q, x = headed(torch.relu), draw(8, 8)
    for data in ([x, x[:0], x], [x.clone().requires_grad_()] * 2):
        found = rd.verify(q, ["played"], data)["played"]
        assert (found.exact, found.examples) == (True, 16)
    assert np.array_equal(rd.simulate(rd.lower(q), x.bfloat16()), rd.simulate(rd.lower(q), x.bfloat16().float()))


@pytest.mark.parametrize("gamma", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_whose_result_is_constant_is_lowered(gamma: Any, play) -> None:  # type: ignore[no-untyped-def]
    play()
    norm = gamma(8)
    nn.init.zeros_(norm.weight)
    q = rd.quantize(nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 4)).eval(), "int8", "int8", data=[draw(32, 8)])
    assert rd.verify(q, ["played"], [draw(8, 8)])["played"].exact


def test_a_batch_that_is_fixed_is_refused_in_words() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).reshape(16, 8)

    q = rd.quantize(Fixed().eval(), "int8", "int8", data=[draw(16, 8), draw(16, 8)])
    with pytest.raises(rd.PlanError, match="its batch is fixed at 16"):
        rd.lower(q)


def test_an_id_below_zero_is_refused() -> None:
    ids = torch.arange(40).reshape(10, 4) % 10
    q = rd.quantize(nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)).eval(), "int8", "int8", data=[ids])
    with pytest.raises(rd.InputError, match="the id -1 is negative"):
        rd.simulate(rd.lower(q), torch.tensor([[1, -1, 2, 3]]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: rd.verify(nn.Linear(2, 2), ["host-c"], [draw(2, 2)]), "got Linear"),  # type: ignore[arg-type]
        (lambda q: rd.export(nn.Linear(2, 2), "x.onnx"), "got Linear"),  # type: ignore[arg-type]
        (lambda q: rd.verify(q, None, [draw(2, 8)]), "got NoneType"),  # type: ignore[arg-type]
        (lambda q: rd.verify(q, ["host-c"], [draw(2, 8)], limit="5"), "got '5'"),  # type: ignore[arg-type]
        (lambda q: rd.export(q, "x.onnx", style="qoperator"), "no option 'style'"),
    ],
)
def test_wrong_kinds_are_told_in_words(call: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rd.RoundelError, match=words):
        call(headed(torch.relu))
    assert not list(tmp_path.iterdir())
