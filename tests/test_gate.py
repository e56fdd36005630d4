"""The gate: who judges, by what loss, when a step stays; bad steps planted in `quantize` are caught."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import settle
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.evaluate import predictions
from roundel.formats import Format, QTensor
from roundel.formats.qtensor import packed
from roundel.gate import LEAST, Losses, Paired, Verdict, answers, choose, judge, losses, split
from roundel.quantize import EFFORTS
from roundel.solvers import SOLVERS, gptq, rtn

# -- who judges -------------------------------------------------------------------------------------------------------


@pytest.mark.proves("gate.split")
@pytest.mark.parametrize("sizes", [[64], [1] * 13, [3, 5, 1, 7, 2], [4, 4, 4], [2], [3, 0, 9], []])
def test_every_fourth_example_judges_and_none_is_lost(sizes: list[int]) -> None:
    numbers = torch.arange(sum(sizes))
    given = [Batch((part[:, None],), {"mask": part[:, None] * 10, "table": torch.ones(100, 2)}, part * 100)
             for part in numbers.split(sizes)] if sizes else []  # fmt: skip
    learn, held = split(given)
    judging = torch.cat([batch.args[0][:, 0] for batch in held]) if held else numbers[:0]
    learning = torch.cat([batch.args[0][:, 0] for batch in learn]) if learn else numbers[:0]
    assert judging.tolist() == list(range(3, sum(sizes), 4))
    assert learning.tolist() == [i for i in range(sum(sizes)) if i % 4 != 3]
    for batch in [*learn, *held]:
        assert len(batch) > 0
        assert torch.equal(batch.named["mask"], batch.args[0] * 10)
        assert batch.named["table"].shape == (100, 2)  # no batch axis: given whole
        assert batch.target is not None
        assert torch.equal(batch.target, batch.args[0][:, 0] * 100)


@pytest.mark.proves("gate.split")
def test_batches_that_must_stay_whole_are_dealt_whole() -> None:
    given = [Batch((torch.full((3, 2), i),)) for i in range(9)]
    learn, held = split(given, whole=True)
    assert [int(batch.args[0][0, 0]) for batch in learn] == [0, 1, 2, 4, 5, 6, 8]
    assert [int(batch.args[0][0, 0]) for batch in held] == [3, 7]
    assert all(len(batch) == 3 for batch in [*learn, *held])


# -- by what ----------------------------------------------------------------------------------------------------------


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


@pytest.mark.proves("gate.loss")
def test_losses_are_the_divergence_that_evaluate_reports() -> None:
    model = classifier()
    x = torch.randn(50, 8)
    q = rd.quantize(model, "int3", data=[x[:8]])
    data = [Batch((part,)) for part in x.split([7, 30, 13])]
    kl, error = losses(model, q.module, data)
    assert kl is not None
    assert kl.dtype == error.dtype == torch.float64
    assert kl.shape == error.shape == (50,)
    assert float(kl.mean()) == pytest.approx(rd.evaluate(q, against=model, data=data, latency=False, layers=False).kl, rel=1e-9)
    with torch.no_grad():
        a, b = model(x).double(), q.module(x).double()
    torch.testing.assert_close(kl, F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="none").sum(1))
    torch.testing.assert_close(error, (b - a).var(1, unbiased=False))  # a constant added to all classes says nothing


class Tokens(nn.Module):
    """Ids (N, T) -> logits (N, T, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(F.relu(self.embed(input_ids) * attention_mask[..., None]))


@pytest.mark.proves("gate.loss")
def test_losses_of_tokens_are_means_over_those_not_masked() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    ids, mask = torch.randint(11, (6, 9)), (torch.arange(9) < torch.tensor([9, 5, 1, 7, 2, 9])[:, None]).long()
    batches = [Batch((), {"input_ids": ids[i], "attention_mask": mask[i]}) for i in (slice(0, 4), slice(4, 6))]
    q = rd.quantize(model, "int3", data=[dict(batch.named) for batch in batches])
    kl, _ = losses(model, q.module, batches)
    assert kl is not None
    with torch.no_grad():
        a, b = (m(input_ids=ids, attention_mask=mask).double().log_softmax(-1) for m in (model, q.module))
    each = (a.exp() * (a - b)).sum(-1) * mask
    torch.testing.assert_close(kl, each.sum(1) / mask.sum(1))
    reported = rd.evaluate(q, against=model, data=[dict(batch.named) for batch in batches], latency=False, layers=False).kl
    assert float((kl * mask.sum(1)).sum() / mask.sum()) == pytest.approx(reported, rel=1e-6)


@pytest.mark.proves("gate.loss")
@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 2, 3, 2)])
def test_losses_of_other_outputs_are_squared_errors(shape: tuple[int, ...]) -> None:
    """One number per example, one column, an image: no classes, no divergence."""

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 12 if len(shape) > 2 else 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).reshape(shape)

    model, x = Values().eval(), torch.randn(20, 8)
    q = rd.quantize(model, "int3", data=[x[:4]])
    kl, error = losses(model, q.module, [Batch((part,)) for part in x.split(13)])
    assert kl is None
    with torch.no_grad():
        wanted = (model(x).double() - q.module(x).double()).square().reshape(20, -1).mean(1)
    torch.testing.assert_close(error, wanted)


@pytest.mark.proves("gate.loss")
def test_answers_stand_for_the_model_that_gave_them() -> None:
    model, x = classifier(), torch.randn(30, 8)
    q, batches = rd.quantize(model, "int3", data=[x]), [Batch((part,), target=torch.zeros(len(part))) for part in x.split(13)]
    for one, other in zip(losses(model, q.module, batches), losses(answers(model, batches), q.module, batches), strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.proves("gate.loss")
def test_outputs_that_cannot_be_compared_are_an_error() -> None:
    x = [Batch((torch.randn(4, 3),))]
    with pytest.raises(rd.InputError, match="outputs of the quantized model are not finite"):
        losses(nn.Identity(), nn.Threshold(0.0, math.inf), x)
    assert losses(nn.Identity(), nn.Identity(), [])[1].shape == (0,)


# -- when a step stays ------------------------------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.proves("gate.verdict")
@pytest.mark.parametrize(
    ("kl", "output", "kept"),
    [
        ((1.0, 0.5, 0.4), (1.0, 1.0, 0.1), True),  # the divergence fell by more than its error
        ((1.0, 0.5, 0.6), (1.0, 1.0, 0.1), False),  # nothing is beyond the noise
        ((1.0, 0.5, 0.5), (1.0, 1.0, 0.1), False),  # just one standard error is not more
        ((1.0, 1.1, 0.2), (1.0, 0.5, 0.1), True),  # outputs nearer, divergence within its noise
        ((1.0, 1.3, 0.2), (1.0, 0.1, 0.1), False),  # outputs nearer but the divergence rose
        ((1.0, 1.0, 0.0), (1.0, 1.0, 0.0), False),  # nothing changed
        ((1.0, NAN, NAN), (1.0, 0.1, 0.1), False),
        ((1.0, math.inf, NAN), (1.0, 0.1, 0.1), False),
        ((1.0, 0.5, math.inf), (1.0, 0.5, math.inf), False),  # one example
        ((NAN, 0.5, NAN), (NAN, 0.5, NAN), False),
        (None, (1.0, 0.5, 0.4), True),
        (None, (1.0, 0.5, 0.6), False),
        (None, (1.0, NAN, NAN), False),
        (None, (1.0, 0.5, math.inf), False),
    ],
)
def test_a_step_stays_only_if_its_gain_clears_the_noise(
    kl: tuple[float, float, float] | None, output: tuple[float, float, float], kept: bool
) -> None:
    verdict = Verdict(None if kl is None else Paired(*kl), Paired(*output), 20)
    assert verdict.kept is kept
    assert "on 20 held-out examples" in str(verdict)
    assert ("KL" in str(verdict)) == (kl is not None)


@pytest.mark.proves("gate.verdict")
def test_the_error_is_that_of_the_paired_difference() -> None:
    """Losses differ much between examples and little by the step; unpaired, nothing would be seen."""
    before = torch.linspace(0, 100, 50, dtype=torch.float64)
    change = torch.linspace(-0.3, -0.1, 50, dtype=torch.float64)
    verdict = judge((before, before), (before + change, before + change))
    assert verdict.examples == 50
    assert verdict.output == verdict.kl
    assert verdict.output.before == pytest.approx(50)
    assert verdict.output.after == pytest.approx(49.8)
    deviation = math.sqrt(sum((float(c) + 0.2) ** 2 for c in change) / 49)
    assert verdict.output.error == pytest.approx(deviation / math.sqrt(50))
    assert verdict.kept
    assert not judge((before + change, before), (before, before)).kept
    assert judge((None, before), (None, before + change)).kl is None
    single = judge((before[:1], before[:1]), (before[:1] - 1, before[:1] - 1))
    assert single.output.error == math.inf
    assert not single.kept
    assert not judge((None, before[:0]), (None, before[:0])).kept


# -- which parts stay --------------------------------------------------------------------------------------------------


def additive(effects: dict[str, float], noise: float = 0.01) -> tuple[Callable[[frozenset[str]], Losses], list[frozenset[str]]]:
    """Losses of 100 examples to which each part adds its effect, give or take, and what was measured."""
    draw = torch.Generator().manual_seed(0)
    each = {name: effect + noise * torch.randn(100, generator=draw, dtype=torch.float64) for name, effect in effects.items()}
    base, asked = 10 + torch.randn(100, generator=draw, dtype=torch.float64), []

    def measure(parts: frozenset[str]) -> Losses:
        asked.append(parts)
        loss = base + sum((each[name] for name in parts), torch.zeros(()))
        return loss, loss

    return measure, asked


@pytest.mark.proves("gate.parts")
@pytest.mark.parametrize("bad", [0, 3, 5, 8])
@pytest.mark.parametrize(("harm", "whole"), [(0.3, True), (3.0, False)])
def test_one_bad_part_is_found_whether_the_whole_helps_or_not(bad: int, harm: float, whole: bool) -> None:
    effects = {f"layer{i}": harm if i == bad else -0.1 for i in range(9)}
    measure, asked = additive(effects)
    kept, best, verdict = choose(list(effects), measure, measure(frozenset()), passes=16)
    assert verdict.kept is whole
    assert kept == frozenset(effects) - {f"layer{bad}"}
    assert torch.equal(best[1], measure(kept)[1])
    assert len(asked) <= 1 + 1 + 16 + 1


@pytest.mark.proves("gate.parts")
def test_what_chance_alone_could_do_changes_nothing_and_passes_are_counted() -> None:
    effects = {f"layer{i}": 0.0 for i in range(40)}
    measure, asked = additive(effects, noise=1.0)
    kept, _, verdict = choose(list(effects), measure, measure(frozenset()), passes=7)
    assert kept in (frozenset(), frozenset(effects)) or len(kept) in (20, 10, 30)  # at most one lucky group
    assert len(asked) == 1 + 1 + 7
    healthy, asked = additive({f"layer{i}": -0.1 for i in range(8)})
    assert len(choose([f"layer{i}" for i in range(8)], healthy, healthy(frozenset()), passes=16)[0]) == 8
    one, asked = additive({"model": -1.0})
    assert choose(["model"], one, one(frozenset()), passes=0)[0] == {"model"}
    assert len(asked) == 2
    late, asked = additive(effects)
    choose(list(effects), late, late(frozenset()), passes=16, seconds=0.0)
    assert len(asked) == 2  # there was time for the whole alone
    assert verdict.examples == 100


# -- planted steps ----------------------------------------------------------------------------------------------------


def lopsided() -> nn.Module:
    """16 hidden units: the first has small weights and decides the classes, the others have large weights and hardly count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[0].weight[0] *= 0.1
        net[0].bias[0] = 0.2
        net[0].weight[1:] *= 20
        net[2].weight[:, 0] = torch.tensor([40.0, -40.0, 20.0, -20.0])
        net[2].weight[:, 1:] *= 1e-4
    return net


def gptq_that_drops_the_first_row(
    w: Tensor, format: Format, hessian: Tensor, axis: int = 0, table: Tensor | None = None
) -> QTensor:
    """Less weighted error than rounding over the first layer as a whole, all of what is left in its first row."""
    q = gptq(w, format, hessian, axis=axis)
    if tuple(w.shape) != (16, 8):
        return q
    codes = q.unpack()
    codes[0] = 0
    worse = packed(format, codes, q.params, tuple(w.shape), axis)
    cost = [float((((each.dequantize() - w).double() @ hessian[0]) * (each.dequantize() - w)).sum())
            for each in (rtn(w, format), worse)]  # fmt: skip
    assert cost[1] < cost[0]
    return worse


@pytest.mark.proves("gate.planted")
def test_a_solver_that_lowers_the_layers_error_and_raises_the_divergence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lopsided()
    mix = torch.ones(8, 8) + 0.5 * torch.randn(8, 8)  # inputs that move together, so that GPTQ has something to gain
    x, unseen = torch.randn(160, 8) @ mix, torch.randn(200, 8) @ mix
    fast = rd.quantize(model, "int4", data=[x])
    honest = rd.quantize(model, "int4", data=[x], solver="gptq")
    monkeypatch.setitem(SOLVERS, "gptq", gptq_that_drops_the_first_row)
    monkeypatch.setitem(EFFORTS, "default", ("GPTQ", "bias correction"))
    named = rd.quantize(model, "int4", data=[x], solver="gptq")  # a solver that was named is not judged
    q = rd.quantize(model, "int4", data=[x], effort="default", strict=True)

    def kl(one: rd.QModel) -> float:
        return float(losses(model, one.module, [Batch((unseen,))])[0].mean())  # type: ignore[union-attr]

    assert kl(named) > 10 * kl(fast)
    assert kl(honest) < 0.1 * kl(named)
    assert next(note.text.split(":")[0] for note in q.notes if "GPTQ" in note.text) == "GPTQ not kept"
    assert [n.text for n in q.notes if "bias" in n.text] == [n.text for n in fast.notes if "bias" in n.text]
    assert all(torch.equal(q.tensors[name].codes, fast.tensors[name].codes) for name in fast.tensors)
    assert all(torch.equal(q.rest[name], fast.rest[name]) for name in fast.rest)
    with torch.no_grad():
        assert torch.equal(q.module(unseen), fast.module(unseen))


@pytest.mark.proves("gate.planted", "refine.bias")
def test_a_bias_correction_learnt_from_other_inputs_than_those_that_judge_is_caught() -> None:
    """Every fourth example is of another kind: what is learnt from the rest does it harm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    x = torch.zeros(160, 8)
    x[:, 0] = 4 + torch.randn(160)
    x[3::4] = -x[3::4]
    skewed = rd.quantize(model, "int2", data=[x[:150], x[150:]], strict=True)
    assert [note.text.split(":")[0] for note in skewed.notes] == ["bias correction not kept"]
    plain = rd.quantize(model, "int2", data=[x[:8]])
    assert all(torch.equal(skewed.rest[name], plain.rest[name]) for name in plain.rest)
    even = rd.quantize(model, "int2", data=[x.abs()])
    assert [note.text.split(":")[0] for note in even.notes] == ["bias correction kept"]
    assert not torch.equal(even.rest["0.bias"], plain.rest["0.bias"])


@pytest.mark.proves("gate.few")
@pytest.mark.parametrize(
    ("effort", "names"), [("fast", "bias correction"), ("default", "equalization, widening, GPTQ and bias correction")]
)
def test_too_few_examples_judge_nothing_and_strict_does_not_mind(effort: str, names: str) -> None:
    model, x = classifier(), torch.randn(4 * LEAST, 8)
    few = rd.quantize(model, "int4", data=[x[:10], x[10:-1]], effort=effort, strict=True)
    assert [note.text for note in few.notes] == [
        f"{names} not tried: {4 * LEAST - 1} examples are too few to judge by ({4 * LEAST} would do)"
    ]
    near = rd.quantize(model, "int4")
    assert sorted(few.tensors[n].codes.sum().item() for n in few.tensors) == sorted(
        near.tensors[n].codes.sum().item() for n in near.tensors
    )
    enough = rd.quantize(model, "int4", data=[x], effort=effort, strict=True)
    verdicts = [note.text for note in enough.notes if "held-out" in note.text]
    said = [text.split(":")[0].removesuffix(" not kept").removesuffix(" kept") for text in verdicts]
    assert said == names.replace("widening, ", "").replace(" and ", ", ").split(", ")  # there is nothing to widen
    assert all(f"on {LEAST} held-out examples" in text for text in verdicts)


@pytest.mark.proves("gate.planted")
def test_what_is_kept_is_nearer_on_examples_that_no_one_saw() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.head(F.relu(self.b(x) + x).mean((2, 3)))

    torch.manual_seed(2)
    model = settle(Residual())
    x, unseen = torch.rand(240, 2, 6, 6), torch.rand(300, 2, 6, 6)
    near = rd.quantize(model, "int3", data=[x[:8]])
    full = rd.quantize(model, "int3", data=list(x.split(50)), effort="default")
    assert any(" kept" in note.text and "not kept" not in note.text for note in full.notes)
    with torch.no_grad():
        lost = [float((predictions(q.module(unseen)) - model(unseen)).square().mean()) for q in (near, full)]
    assert lost[1] < 0.5 * lost[0]


class OneSize(nn.Module):
    """Takes batches of four only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(-1).view(4, 6)


@pytest.mark.proves("gate.split")
@pytest.mark.parametrize("solver", [None, "gptq"])
def test_a_network_of_one_batch_size_is_learnt_from_and_judged_in_whole_batches(solver: str | None) -> None:
    data = [torch.randn(4, 8) for _ in range(12)]
    q = rd.quantize(OneSize().eval(), "int4", data=data, solver=solver)
    assert any("bias correction" in note.text and "on 12 held-out examples" in note.text for note in q.notes)
    one = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    q = rd.quantize(one, "int4", data=[torch.randn(8) for _ in range(40)], solver=solver)  # examples without a batch axis
    assert any("bias correction" in note.text for note in q.notes)


class Masked(nn.Module):
    """One class is ruled out by -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.mask


class Loss(nn.Module):
    """One number for a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


@pytest.mark.proves("gate.loss")
@pytest.mark.parametrize(("model", "why"), [(Masked, "not finite"), (Loss, r"gives shape \[\]")])
def test_outputs_that_cannot_be_compared_leave_the_step_untried(model: type[nn.Module], why: str) -> None:
    q = rd.quantize(model().eval(), "int4", data=[torch.randn(48, 8)], strict=True)
    assert [bool(re.search(f"bias correction not tried: .*{why}", note.text)) for note in q.notes] == [True]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


@pytest.mark.proves("gate.loss")
def test_every_output_counts() -> None:
    net = TwoHeads().eval()
    spoilt = copy.deepcopy(net)
    spoilt.two.bias.data += 2.0
    batches = [Batch((torch.randn(5, 8),))]
    kl, error = losses(net, spoilt, batches)
    assert kl is not None
    assert kl.abs().max() < 1e-12  # the first output is as it was
    torch.testing.assert_close(error, torch.full((5,), 4.0, dtype=torch.float64))


@pytest.mark.proves("gate.few")
def test_an_effort_that_needs_data_says_that_it_had_none() -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(8, 4)), "int4", effort="default")
    assert any(
        note.text == "equalization, widening, GPTQ and bias correction not tried: there is no data to learn from"
        for note in q.notes
    )


@pytest.mark.proves("gate.few")
def test_examples_without_a_batch_axis_end_in_a_note() -> None:
    q = rd.quantize(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), "int4", data=[torch.randn(3, 6, 6) for _ in range(40)])
    assert q.tensors


@pytest.mark.proves("gate.transforms", "transforms.gated")
def test_a_network_whose_channels_were_rescaled_is_equalized_and_quantized_by_the_same_plan() -> None:
    """Hidden units of sizes from 0.01 to 100, the same function: one scale for them all, and int4 weights read across them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        size = 10 ** torch.linspace(-2, 2, 32)
        broken[0].weight *= size[:, None]
        broken[0].bias *= size
        broken[2].weight /= size
    x, unseen = torch.randn(200, 16), torch.randn(100, 16)
    torch.testing.assert_close(broken(x), model(x), rtol=1e-3, atol=1e-4)
    sites = {}

    def error(network: nn.Module, effort: str) -> float:
        q = rd.quantize(network, "int8/tensor", "int8", data=[x], effort=effort)
        sites[effort] = {name: one.when for name, one in q.activations.items()}
        return float((q.module(unseen) - model(unseen)).square().mean())

    with torch.no_grad():
        collapsed, untouched, mended = error(broken, "fast"), error(model, "default"), error(broken, "default")
    assert collapsed > 20 * untouched
    assert mended < 1.2 * untouched
    assert sites["fast"] == sites["default"]
    assert len(sites["default"]) == 3


@pytest.mark.proves("effort.loss")
def test_a_loss_ends_the_climb_or_is_said_to_be_missed() -> None:
    model, x = classifier(), torch.randn(160, 8)
    whole = rd.quantize(model, "int3", data=[x], effort="default")
    done = {step for step in ("equalization", "GPTQ", "bias correction") if any(n.text.startswith(step) for n in whole.notes)}
    assert "GPTQ" in done
    at_once = rd.quantize(model, "int3", data=[x], effort="default", loss=1e3, strict=True)
    assert [note.text.split(":")[0] for note in at_once.notes] == [
        "equalization, widening, GPTQ and bias correction not needed for a loss of 1000"
    ]
    near = rd.quantize(model, "int3", data=[x])
    assert all(torch.equal(at_once.tensors[name].codes, near.tensors[name].codes) for name in near.tensors)
    missed = rd.quantize(model, "int3", data=[x], effort="default", loss=1e-9)
    assert missed.notes[-1].text.startswith("the loss of 1e-09 that was asked for is missed: it is ")
    assert all(torch.equal(missed.tensors[name].codes, whole.tensors[name].codes) for name in whole.tensors)
    with pytest.raises(rd.CheckError, match="is missed"):
        rd.quantize(model, "int3", data=[x], effort="default", loss=1e-9, strict=True)
    with pytest.raises(rd.PlanError, match="above 0"):
        rd.quantize(model, "int3", data=[x], loss=0.0)


@pytest.mark.proves("effort.default")
def test_a_solver_that_is_named_solves_the_network_that_the_transforms_leave() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        size = 10 ** torch.linspace(-1, 1, 32)
        model[0].weight *= size[:, None]
        model[2].weight /= size
    x = torch.randn(200, 16) @ torch.randn(16, 16)
    q = rd.quantize(model, "int3/tensor", data=[x], effort="default", solver="descent")
    assert next(note.text.split(":")[0] for note in q.notes if "kept" in note.text) == "equalization kept"
    near = rd.quantize(model, "int3/tensor", data=[x], effort="default", solver="rtn")
    assert any(not torch.equal(q.tensors[name].codes, near.tensors[name].codes) for name in q.tensors)
    assert q.provenance["solver"] == "descent"


@pytest.mark.proves("effort.budget")
@pytest.mark.parametrize(("budget", "text"), [("5 lightyears", "such as '90s'"), ("0s", "such as '90s'"), (-3, "such as '90s'")])
def test_a_budget_is_a_time(budget: str | float, text: str) -> None:
    with pytest.raises(rd.PlanError, match=text):
        rd.quantize(classifier(), "int4", data=[torch.randn(64, 8)], effort="best", budget=budget)
    with pytest.raises(rd.PlanError, match="effort='best' may take"):
        rd.quantize(classifier(), "int4", data=[torch.randn(64, 8)], budget="5min")


@pytest.mark.proves("effort.best", "effort.budget")
def test_best_effort_ends_nearer_than_default_within_its_budget() -> None:
    torch.manual_seed(3)
    model = settle(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6)))
    x, unseen = torch.rand(400, 1, 8, 8), [Batch((torch.rand(300, 1, 8, 8),))]
    begin = time.process_time()
    q = {effort: rd.quantize(model, "int2", "int4", data=[x], effort=effort, budget="8s" if effort == "best" else None)
         for effort in ("default", "best")}  # fmt: skip
    assert time.process_time() - begin < 30
    kl = {effort: float(losses(model, one.module, unseen)[0].mean()) for effort, one in q.items()}  # type: ignore[union-attr]
    assert kl["best"] <= kl["default"]
    assert any(note.text.startswith(("reconstruction", "end-to-end tuning")) for note in q["best"].notes)
    assert q["best"].nbytes == q["default"].nbytes
