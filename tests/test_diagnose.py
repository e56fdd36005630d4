"""`roundel.diagnose`: planted faults are found and cures keep their promise, healthy models are left in peace; parts by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import roundel as rd
from roundel.cli import cli
from roundel.data import Batch
from roundel.diagnose import Finding, _ranked, promise
from roundel.diagnose.edits import with_tensors
from roundel.diagnose.evidence import bad_batches, parts, watched
from roundel.diagnose.loss import apart, kind_of
from roundel.diagnose.machine import Paired, as_computed, meetings
from roundel.errors import InputError, PlanError
from roundel.qmodel import QModel

FAST = ["detector, boxes to 640", "MLP, dead channel", "MLP, data 0..255", "MLP, bias overflow", "MLP, pairs saturate"]


# -- the bank ---------------------------------------------------------------------------------------------------------


@cache
def diagnosed(name: str, seed: int = 0) -> tuple[faults.Fault, list[Finding]]:
    """A fault of the bank, and what is told of it."""
    torch.set_num_threads(1)
    plant = {**faults.FAULTS, **faults.LAST}[name](seed)
    return plant, rd.diagnose(plant.q, plant.model, plant.data, vnni=plant.vnni)


def judged(name: str, seed: int = 0) -> tuple[bool, float, float]:
    """(right layer and cause first, gain kept over gain promised, the same as shares of the loss)."""
    plant, found = diagnosed(name, seed)
    if not found:
        return False, 0.0, 0.0
    told = found[0]
    before, after = promise(told, plant.q, plant.model, plant.fresh, vnni=plant.vnni)
    right = told.layer in plant.layers and told.cause == plant.cause
    return right, (before - after) / told.gain, (1 - after / before) / (told.gain / told.before)


@pytest.mark.proves("diagnose.bank")
@pytest.mark.parametrize("name", FAST)
def test_a_planted_fault_is_told_first_and_its_cure_keeps_its_promise(name: str) -> None:
    right, ratio, share = judged(name)
    assert right
    assert 0.7 <= ratio <= 1.4  # a divergence is decided by few examples; the counts of the whole bank are those of the soak test
    assert 0.8 <= share <= 1.2


@pytest.mark.soak
@pytest.mark.proves("diagnose.bank")
@pytest.mark.parametrize("seed", [0, 3])
def test_the_bank(seed: int) -> None:
    assert len(faults.FAULTS) == 30
    results = {name: judged(name, seed) for name in faults.FAULTS}
    assert sum(right for right, _, _ in results.values()) >= 27, results
    assert sum(abs(share - 1) <= 0.2 for _, _, share in results.values()) >= 27, results
    assert sum(abs(ratio - 1) <= 0.2 for _, ratio, _ in results.values()) >= 24, results


@pytest.mark.proves("diagnose.quiet")
@pytest.mark.parametrize(
    "one", [h for h in faults.HEALTHY if str(h) in ("mlp 0 int8 int8", "mlp 1 int4 int8", "apart 0 int8 int8")], ids=str
)
def test_a_healthy_model_has_no_findings(one: faults.Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["roundel.diagnose"], "LEAST", 0.0)  # nor is it only that nothing is lost
    assert rd.diagnose(*one.make()) == []


@pytest.mark.soak
@pytest.mark.proves("diagnose.quiet")
@pytest.mark.parametrize("one", faults.HEALTHY, ids=str)
def test_no_healthy_model_has_findings(one: faults.Healthy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(faults.HEALTHY) == 20
    assert rd.diagnose(*one.make()) == []
    monkeypatch.setattr(sys.modules["roundel.diagnose"], "LEAST", 0.0)
    assert rd.diagnose(*one.make()) == []


@pytest.mark.soak
def test_the_last_resort_is_a_layer_with_too_few_bits() -> None:
    assert judged("CNN, one layer at 2 bits")[0]


# -- the cure ---------------------------------------------------------------------------------------------------------


def test_a_cured_model_is_diagnosed_healthy_and_says_what_was_done() -> None:
    plant, (first, *_) = diagnosed("MLP, dead channel")
    assert first.model.notes[-1].subject == "fc1"
    assert first.model.notes[-1].text.startswith("dead channel: output 5 never changes")
    assert not first.model.tensors["fc1.weight"].dequantize()[5].any()
    assert rd.diagnose(first.model, plant.model, plant.data) == []


def test_an_edit_is_in_the_plan_so_that_the_model_can_be_made_again() -> None:
    plant, found = diagnosed("detector, boxes to 640")
    cured = found[0].model
    again = rd.quantize(plant.model, plan=cured.plan, data=plant.data[:1])
    assert {s: str(a.format) for s, a in again.activations.items()} == {s: str(a.format) for s, a in cured.activations.items()}
    assert sum("int16" in str(a.format) for a in cured.activations.values()) == 1


def test_a_model_whose_file_holds_no_structure_is_diagnosed_too() -> None:
    model = faults.net("mlp")
    faults._stretch(model.fc1, model.fc2, 7, 100.0)
    q = rd.quantize(model, "int6/tensor")
    found = rd.diagnose(q, model, faults.images(faults.SEEN))
    assert (found[0].layer, found[0].cause) == ("fc1", "outlier channel")
    assert not isinstance(q.structure, rd.Graph)


def test_findings_worth_the_same_are_told_by_how_much_they_explain() -> None:
    def finding(layer: str, gain: float) -> Finding:
        return Finding(layer, "c", "", gain, 1.0, 1 - gain, 0.0, "nats", None)  # type: ignore[arg-type]

    told = _ranked(
        [(4, finding("narrow", 0.80)), (1, finding("wide", 0.75)), (0, finding("small", 0.3)), (4, finding("narrow", 0.79))]
    )
    assert [f.layer for f in told] == ["wide", "narrow", "small"]
    assert told[1].gain == 0.80


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_boxes_in_pixels_do_not_hide_scores() -> None:
    """By hand: variances 100^2 and 0.1^2; the box is off by 10, the score by 0.05: (0.01 + 0.25) / 2."""
    real = torch.tensor([[-100.0, -0.1, 7.0], [100.0, 0.1, 7.0]])[:, :, None, None]
    made = real + torch.tensor([10.0, 0.05, 3.0])[:, None, None]
    batch = [Batch((torch.zeros(2, 1),))]
    torch.testing.assert_close(apart(batch, [real], [made]), torch.full((2,), 0.13, dtype=torch.float64), rtol=1e-5, atol=0)
    assert kind_of(batch, [real]) == "of the outputs' variance"
    torch.testing.assert_close(
        apart(batch, [(real[:, :1], real[:, 1:])], [(made[:, :1], made[:, 1:])]), apart(batch, [real], [made])
    )


def test_classes_are_compared_by_divergence() -> None:
    real, made = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    p = real.double().softmax(1)
    wanted = (p * (p / made.double().softmax(1)).log()).sum(1)
    torch.testing.assert_close(apart([Batch((real,))], [real], [made]), wanted)


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    batch = [Batch((torch.zeros(2, 1),))]
    with pytest.raises(InputError, match="not finite"):
        apart(batch, [torch.randn(2, 3, 1, 1)], [torch.full((2, 3, 1, 1), torch.nan)])
    with pytest.raises(InputError, match="the same output for every example"):
        apart(batch, [torch.ones(2, 3, 1, 1)], [torch.ones(2, 3, 1, 1)])


# -- the machine ------------------------------------------------------------------------------------------------------


def saturated(x: list[int], w: list[int]) -> int:
    """The sum of two products at a time in 16 bits, one lane of vpmaddubsw after the other."""
    total = 0
    for k in range(0, len(x), 2):
        pair = sum(a * b for a, b in zip(x[k : k + 2], w[k : k + 2], strict=True))
        total += max(-32768, min(32767, pair))
    return total


@pytest.mark.proves("diagnose.machine")
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_pairs_saturate_as_in_a_naive_loop(kind: str) -> None:
    torch.manual_seed(1)
    x = torch.rand(3, 7) if kind == "linear" else torch.rand(2, 3, 5, 4)
    layer: nn.Module = nn.Linear(7, 4) if kind == "linear" else nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0))
    layer.weight.data = layer.weight.data.abs() + 0.2
    q = rd.quantize(nn.Sequential(layer), "int8", "int8", data=[x, x])
    (one,) = meetings(q)
    weight = one.weight.unpack().reshape(one.weight.shape)
    code, _ = one.input.codes(x)
    zero = float(one.input.params.offset)  # type: ignore[union-attr]
    u8, point = (code + zero + 128).long(), int(zero) + 128
    bias = q.rest["0.bias"]
    sums = torch.zeros(layer(x).shape)
    for place in np.ndindex(*sums.shape):
        if kind == "linear":
            xs, ws, out = u8[place[0]].tolist(), weight[place[1]].tolist(), place[1]
        else:
            n, out, i, j = place
            padded = torch.nn.functional.pad(u8, (0, 0, 1, 1), value=point)
            xs = padded[n, :, 2 * i : 2 * i + 3, j : j + 2].permute(1, 2, 0).flatten().tolist()  # row, column, channel
            ws = weight[out].permute(1, 2, 0).flatten().tolist()
        sums[place] = (saturated(xs, ws) - point * sum(ws)) * float(one.unit[out]) + float(bias[out])
    site = q.activations[q.structure.outputs[0]]  # type: ignore[union-attr]
    got = Paired(q)(x).detach()
    torch.testing.assert_close(got, site.quantize(sums), rtol=0, atol=float(site.params.scale) * 1.01)  # type: ignore[union-attr]
    assert float((got - q.module(x).detach()).abs().max()) > 3 * float(site.params.scale)  # type: ignore[union-attr]


def test_a_model_without_overflow_is_computed_as_it_is() -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(4, 3)), "int8", "int8", data=torch.rand(8, 4))
    assert as_computed(q, True) is q.module


@pytest.mark.proves("diagnose.machine")
def test_a_bias_beyond_32_bits_is_cut_to_them() -> None:
    """By hand: the limit is 2^31 - 1 times the scale of the sums."""
    q = rd.quantize(nn.Sequential(nn.Linear(4, 3)), "int8/channel*fp32", "int8:static", data=torch.rand(8, 4))
    (one,) = meetings(q)
    rest = {"0.bias": torch.tensor([1e15, -1e15, 0.25])}
    cut = as_computed(with_tensors(q, rest=rest), True).floats()["0.bias"]  # type: ignore[operator]
    limit = one.unit * (2**31 - 1)
    assert cut.tolist() == pytest.approx([float(limit[0]), -float(limit[1]), 0.25], rel=1e-6)


# -- evidence ---------------------------------------------------------------------------------------------------------


def test_every_third_example_makes_cures_and_no_example_is_lost() -> None:
    batches = [Batch((torch.arange(5),)), Batch((torch.arange(5, 12),))]
    learn, held = parts(batches, False)
    ids = [torch.cat([b.args[0] for b in part]).tolist() for part in (learn, held)]
    assert ids[0] == [0, 3, 6, 9]
    assert sorted(ids[0] + ids[1]) == list(range(12))


def test_bad_batches_are_few_and_far_off() -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(4, 3)), "int8", "int8", data=torch.rand(8, 4))

    def bad(scales: list[float]) -> tuple[int, ...]:
        data = [Batch((torch.rand(2, 4) * scale + scale,)) for scale in scales]
        return bad_batches(q, watched(replace(q, activations={}).module, q.rest, data)[0], len(data))

    assert bad([1, 1, 1, 30, 1]) == (3,)
    assert bad([1, 1, 30, 30, 1]) == ()  # two of five are no exception
    assert bad([1, 1.5, 2, 1]) == ()
    assert bad([1, 30]) == ()


def test_what_cannot_be_diagnosed_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    q = rd.quantize(model, "int8", "int8", data=torch.rand(8, 4))
    with pytest.raises(PlanError, match="takes a QModel and the float model"):
        rd.diagnose(model, model, torch.rand(8, 4))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 examples are too few"):
        rd.diagnose(q, model, torch.rand(1, 4))


# -- the command line -------------------------------------------------------------------------------------------------


FACTORY = """
import torch
from torch import nn
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    model[0].weight.data[3] *= {factor}
    model[2].weight.data[:, 3] /= {factor}
    return model
"""


def prepared(folder: Path, factor: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    name = f"stretched{int(factor)}"
    (folder / f"{name}.py").write_text(FACTORY.replace("{factor}", str(factor)))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    np.savez("x.npz", x=np.random.default_rng(0).random((256, 16), dtype=np.float32))
    rd.quantize(__import__(name).net(), "int8/tensor", data=rd.load_data("x.npz")).save("q.safetensors")
    return ["diagnose", "q.safetensors", "--against", f"{name}:net", "--data", "x.npz"]


@pytest.mark.proves("diagnose.cli")
def test_the_command_tells_and_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = prepared(tmp_path, 300.0, monkeypatch)
    shown = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert "outlier channel" in shown.stdout
    told = CliRunner().invoke(cli, [*args, "--json", "--apply", "better.safetensors"], catch_exceptions=False)
    first = json.loads(told.stdout)[0]
    assert (first["layer"], first["cause"], first["unit"]) == ("0", "outlier channel", "nats")
    assert set(first) == {"layer", "cause", "cure", "gain", "before", "after", "error", "unit"}
    assert isinstance(rd.load("better.safetensors"), QModel)
    again = CliRunner().invoke(cli, ["diagnose", "better.safetensors", *args[2:]], catch_exceptions=False)
    assert again.stdout == "nothing found\n"


def test_there_is_nothing_to_apply_to_a_healthy_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = prepared(tmp_path, 1.0, monkeypatch)
    with pytest.raises(rd.CheckError, match="nothing to apply"):
        CliRunner().invoke(cli, [*args, "--apply", "out.safetensors"], catch_exceptions=False)
    assert not Path("out.safetensors").exists()
