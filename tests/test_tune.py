"""`rd.tune` and `roundel tune`: an artifact trained towards its float model; the loop itself is proven in test_endtoend."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import settle
from torch import nn

import roundel as rd
from roundel.data import Batch
from roundel.gate import losses


@pytest.fixture(scope="module")
def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return settle(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                                nn.Linear(128, 6)))  # fmt: skip


@pytest.mark.proves("qat.tune")
def test_an_artifact_is_trained_nearer_at_equal_bytes(convolutions: nn.Module) -> None:
    """On a network whose answers hang on the input: those of the fixture alone differ by less than chance."""
    convolutions = copy.deepcopy(convolutions)
    with torch.no_grad():
        convolutions[6].weight *= 5
    torch.manual_seed(2)
    x, unseen = torch.randn(240, 1, 8, 8), [Batch((torch.randn(300, 1, 8, 8),))]
    q = rd.quantize(convolutions, "int2", "int8", data=[x])
    before = {name: t.codes.clone() for name, t in q.tensors.items()}
    tuned = rd.tune(q, convolutions, data=list(x.split(40)), steps=60)
    assert tuned.notes[-1].text.startswith("end-to-end tuning of 60 steps kept: KL")
    assert tuned.nbytes == q.nbytes
    kl = [float(losses(convolutions, one.module, unseen)[0].mean()) for one in (q, tuned)]  # type: ignore[union-attr]
    assert kl[1] < 0.8 * kl[0]
    assert all(torch.equal(before[name], t.codes) for name, t in q.tensors.items())
    again = rd.tune(q, convolutions, data=list(x.split(40)), steps=60)
    assert all(torch.equal(tuned.tensors[name].codes, again.tensors[name].codes) for name in before)


@pytest.mark.proves("qat.tune")
def test_what_cannot_be_trained_is_named(convolutions: nn.Module) -> None:
    x = torch.rand(80, 1, 8, 8)
    q = rd.quantize(convolutions, "int4", data=[x])
    other = copy.deepcopy(convolutions)
    with torch.no_grad():
        other[3].weight.copy_(torch.randn_like(other[3].weight))
    with pytest.raises(rd.InputError, match=r"codes of '3\.weight' are not those of the model's weight"):
        rd.tune(q, other, data=[x])
    with pytest.raises(rd.InputError, match="its graph has other nodes"):
        rd.tune(q, nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), data=[x])
    with pytest.raises(rd.InputError, match="39 examples are too few to teach and judge by"):
        rd.tune(q, convolutions, data=[x[:39]])
    with pytest.raises(rd.PlanError, match="steps or a budget"):
        rd.tune(q, convolutions, data=[x], steps=3, budget="5s")
    with pytest.raises(rd.PlanError, match="a budget is a time"):
        rd.tune(q, convolutions, data=[x], budget="soon")


@pytest.mark.proves("qat.tune")
def test_a_model_that_is_no_graph_is_trained_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu() if x.sum() < 1e9 else self.a(x))

    torch.manual_seed(1)
    model, x = Branching().eval(), torch.randn(120, 8)
    q = rd.quantize(model, "int2", data=[x])
    tuned = rd.tune(q, model, data=list(x.split(20)), steps=40)
    assert "end-to-end tuning of 40 steps" in tuned.notes[-1].text
    assert tuned.tensors.keys() == q.tensors.keys()


NETS = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
"""


@pytest.mark.proves("cli.tune")
def test_the_command_trains_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from roundel.cli import cli

    (tmp_path / "tune_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    np.savez("x.npz", x=np.random.default_rng(0).normal(size=(160, 8)).astype(np.float32))
    cli.main(["quantize", "tune_nets:make", "--weights", "int2", "--data", "x.npz", "-o", "q.safetensors"], standalone_mode=False)
    more = ["tune", "q.safetensors", "--against", "tune_nets:make", "--data", "x.npz", "--steps", "5", "-o", "t.safetensors"]
    cli.main(more, standalone_mode=False)
    told = capsys.readouterr()
    assert "end-to-end tuning of 5 steps" in told.err
    assert "t.safetensors" in told.out
    assert rd.load("t.safetensors").nbytes == rd.load("q.safetensors").nbytes
