"""Formats that differ from weight to weight within one size: the bytes are kept, the loss is the least, and the data decide."""

import itertools
import random
import sys
import time

import pytest
import torch
import transformers
from torch import nn

import roundel as rd
from roundel.data import Batch
from roundel.fisher import hessians
from roundel.formats.format import Format
from roundel.plan import Plan, Rule, size_of
from roundel.quantize import steps
from roundel.quantize.mixed import EVEN, FREE, Option, allocate, mixed
from roundel.quantize.networks import ModuleNetwork, find_network
from roundel.quantize.steps import STEPS, Means, Rung
from roundel.solvers import rtn

FORMATS = [Format.parse(f"int{b}") for b in range(2, 9)]


def loss(chosen: tuple[Option, ...]) -> float:
    return sum(one.loss for one in chosen)


@pytest.mark.proves("names.bits-mixed")
@pytest.mark.parametrize("seed", range(20))
def test_bytes_are_kept_and_spent_where_they_save_most(seed: int) -> None:
    """Against every choice there is: within the bytes, and no worse than any that leaves room for one more step."""
    draw = random.Random(seed)
    weights = [[Option(fmt, draw.randint(1, 30), draw.uniform(0, 50)) for fmt in FORMATS[:4]] for _ in range(4)]
    room = draw.randint(10, 80)
    found = allocate(weights, room)
    every = [chosen for chosen in itertools.product(*weights) if sum(one.nbytes for one in chosen) <= room]
    if not every:
        assert not found
        return
    mine = tuple(
        min((o for o in options if o.format == fmt), key=lambda o: o.loss) for options, fmt in zip(weights, found, strict=True)
    )
    assert sum(one.nbytes for one in mine) <= room
    step = max(max(o.nbytes for o in options) - min(o.nbytes for o in options) for options in weights)
    less = [loss(chosen) for chosen in every if sum(one.nbytes for one in chosen) <= room - step]
    assert min(map(loss, every)) <= loss(mine) <= min(less, default=loss(mine)) + 1e-9


@pytest.mark.proves("names.bits-mixed")
@pytest.mark.parametrize(("law", "text"), [(FREE, "cb{k}/tensor"), (EVEN, "uint{b}/channel*fp32-fp32")])
def test_the_law_is_what_normal_numbers_lose(law: tuple[float, ...], text: str) -> None:
    w = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        q = rtn(w, Format.parse(text.format(b=bits, k=2**bits)))
        lost = float((q.dequantize() - w).square().mean() / w.square().mean())
        assert lost == pytest.approx(law[bits - 1], rel=0.15)


@pytest.mark.proves("names.bits-mixed")
@pytest.mark.parametrize("activations", [None, "int8"])
def test_bytes_go_where_the_loss_is(activations: str | None) -> None:
    """Sensitive weights get more bits within the same size, in graphs and in modules; the plan says which, and gives them again."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.normal_()
    x = torch.randn(256, 32)
    q = rd.quantize(model, "4.5 bits", activations, data=x, effort="best", budget="4s")
    told = [n.text for n in q.notes if n.text.startswith("mixed formats")]
    assert len(told) == 1
    assert "mixed formats kept" in told[0], told
    bits = {name: t.format.bits for name, t in q.tensors.items()}
    assert len(set(bits.values())) > 1
    assert bits["4.weight"] > bits["2.weight"]  # few numbers, on which as much depends
    size = 8 * sum(t.nbytes for t in q.tensors.values()) / sum(t.codes.shape[0] * t.matrix[1] for t in q.tensors.values())
    assert size <= 4.5
    assert not any(size_of(rule.weight) for rule in q.plan.rules)
    again = rd.quantize(model, activations=None, plan=q.plan, data=x)
    assert {name: t.format for name, t in again.tensors.items()} == {name: t.format for name, t in q.tensors.items()}


@pytest.mark.proves("names.bits-mixed")
def test_a_mix_that_overdraws_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales beyond fp16 are stored as fp32; where the mix then takes more than the size, one format stays."""
    steps = sys.modules[Means.__module__]
    monkeypatch.setattr(steps, "mixed", lambda *given: {"2.weight": Format.parse("int8/g16*fp32")})
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(64, 32)
    q = rd.quantize(model, "3.5 bits", data=x, effort="best", budget="2s")
    assert len({str(t.format) for t in q.tensors.values()}) == 1
    assert any("scales had to be stored wider" in n.text for n in q.notes)


@pytest.mark.proves("names.bits-mixed")
def test_weights_that_are_one_matter_once() -> None:
    """A tied head and the rows of an embedding stay in the one format; what is linear alone differs, and the size holds for all."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.ndim == 2 else 1)
    data = [torch.randint(64, (1, 24)) for _ in range(40)]
    q = rd.quantize(model, "3.5 bits", data=data, effort="best", budget="0.1s")
    assert any(n.text.startswith("the budget was over") for n in q.notes)
    assert q.tied
    assert len({t.format.bits for t in q.tensors.values()}) > 1
    assert 8 * sum(t.nbytes for t in q.tensors.values()) <= 3.5 * sum(torch.Size(t.shape).numel() for t in q.tensors.values())
    again = rd.quantize(model, plan=q.plan)
    assert {name: t.format for name, t in again.tensors.items()} == {name: t.format for name, t in q.tensors.items()}


class Twice(nn.Module):
    """Two layers that are one weight, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 6)
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


@pytest.mark.proves("names.bits-mixed")
def test_a_plan_names_a_shared_weight_by_all_its_names() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 16)
    q = rd.quantize(model, "3.5 bits", data=x, effort="best", budget="2s")
    assert {"b.weight", "c.weight"} <= {rule.pattern for rule in q.plan.rules}
    again = rd.quantize(model, plan=q.plan, data=x)
    assert {name: t.format for name, t in again.tensors.items()} == {name: t.format for name, t in q.tensors.items()}


@pytest.mark.proves("names.bits-mixed")
def test_gradients_beyond_the_models_numbers_leave_one_format() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.normal_().mul_(3)
    q = rd.quantize(model.half(), "4.5 bits", data=torch.randn(64, 32).half() / 20, effort="best", budget="2s")
    told = [n.text for n in q.notes if "no mix of formats was tried" in n.text or n.text.startswith("mixed formats")]
    assert len(told) == 1
    assert 8 * sum(t.nbytes for t in q.tensors.values()) <= 4.5 * sum(torch.Size(t.shape).numel() for t in q.tensors.values())


@pytest.mark.proves("names.bits-mixed")
@pytest.mark.parametrize(("size", "within"), [(12.5, 0.93), (9.5, 0.93), (2.2, 0.8)])
def test_a_size_is_used_up_at_any_width(size: float, within: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval(), torch.randn(64, 64)
    network = find_network(model, [Batch((x,))], [])
    q = rd.quantize(model, f"{size} bits", data=x)
    plan = Plan((Rule("*", weight=f"{size} bits"),))
    with torch.no_grad():
        found = mixed(plan, q.plan, q.tensors, network, hessians(network.module, [Batch((x,))], guided=True))
        nothing = mixed(plan, q.plan, q.tensors, network, {name: torch.zeros(1, 1, 1) for name in q.tensors})
    took = sum(fmt.nbytes(q.tensors[name].matrix) for name, fmt in found.items())
    assert within * size <= 8 * took / (64 * 96 + 96 * 32) <= size
    assert nothing == {}


@pytest.mark.proves("effort.budget")
def test_a_budget_ends_hessians_and_solving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its share of the time a weight keeps its codes, which is said, and one batch is all that Hessians are made of."""
    monkeypatch.setattr(steps, "SOLVING", 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    data = [Batch((torch.randn(16, 32),)) for _ in range(8)]
    network = ModuleNetwork(model, [])
    q = rd.quantize(model, "int3", data=data)
    late = Means(lambda _: q, q.plan, q.plan, data, time.monotonic() + 60)
    for step in ("GPTQ", "guided descent"):
        rung = STEPS[step].make(Rung(network, q), late)
        assert rung is not None
        assert all(rung.q.tensors[name] is tensor for name, tensor in q.tensors.items())
        assert sum("not solved, the budget's share for it was over" in note.text for note in rung.q.notes) == len(q.tensors)
    once = hessians(model, data, guided=True, end=time.monotonic())
    assert all(torch.equal(once[name], moment) for name, moment in hessians(model, data[:1], guided=True).items())
