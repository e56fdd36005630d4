"""What `quantize` does for networks of modules beyond rounding: solvers by name, guided Hessians, accounts, text that a model
writes itself, effort="best"; the solvers' own arithmetic is tested in test_solvers*.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.errors import CheckError, PlanError
from roundel.fisher import backward_bytes, hessians
from roundel.gate import Paired, Verdict
from roundel.plan import Plan, Rule
from roundel.quantize import networks
from roundel.quantize.networks import find_network
from roundel.quantize.steps import EFFORTS, STEPS, Means, Rung
from roundel.solvers import SOLVERS, gptq, hqq, rtn, solved
from roundel.tune import endtoend
from roundel.tune.endtoend import RATES, Teaching, _blended, tune_model
from roundel.tune.prepare import prepare
from roundel.tune.text import cut, enough_text, tokens, writes, written

FORMAT = "uint2/g8"


def llama(seed: int = 0) -> nn.Module:
    """A Llama of one layer whose answers are sure enough to be worth keeping."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, max_position_embeddings=32, **sizes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.mul_(40 if "embed" in name else 5)
    return model


def stories(count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [Batch((torch.randint(24, (1, 24), generator=generator),)) for _ in range(count)]


KEEP = ("model.embed_tokens", "lm_head")


# -- solvers by name -------------------------------------------------------------------------------------------------------


@pytest.mark.proves("solvers.hqq-named")
@pytest.mark.parametrize("text", ["uint3/g8*fp16-fp16", "cb4@tensor/channel*int8"])
def test_a_solver_without_data_is_what_quantize_uses(text: str) -> None:
    model = llama()
    q = rd.quantize(model, text, solver="hqq", exclude=KEEP)
    assert len(q.tensors) == 7
    for name, tensor in q.tensors.items():
        wanted = hqq(model.get_parameter(name), tensor.format)
        assert torch.equal(tensor.codes, wanted.codes)
        assert torch.equal(tensor.dequantize(), wanted.dequantize())
    assert any(not torch.equal(t.dequantize(), rtn(model.get_parameter(n), t.format).dequantize()) for n, t in q.tensors.items())
    assert q.provenance["solver"] == "hqq"


@pytest.mark.proves("solvers.hqq-named")
def test_a_folder_by_hqq_is_the_same_file(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    rd.quantize(rd.read(tmp_path / "model"), "int4/g8", solver="hqq").save(tmp_path / "wanted")
    rd.quantize(tmp_path / "model", "int4/g8", solver="hqq", output=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "wanted").read_bytes()


# -- accounts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("solvers.account-notes")
@pytest.mark.parametrize("solver", ["gptq", "alternate"])
def test_one_note_for_each_tensor_that_was_solved(solver: str) -> None:
    q = rd.quantize(llama(), FORMAT, data=stories(4), solver=solver, exclude=KEEP)
    told = {n.subject: n.text for n in q.notes if n.text.startswith(f"{solver}: error ")}
    assert list(told) == list(q.tensors)
    again = rd.quantize(llama(), FORMAT, data=stories(4), solver=solver, exclude=KEEP)
    assert again.notes == q.notes


@pytest.mark.proves("solvers.account-notes")
def test_a_graphs_notes_are_the_accounts_of_its_sweep() -> None:
    """The first layer's Hessian is that of the data."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(40, 6)
    q = rd.quantize(net, "int3", data=[x], solver="gptq")
    learn = x[torch.arange(40) % 4 != 3].double()
    name = next(iter(q.tensors))
    fmt = q.tensors[name].format
    wanted = solved(gptq, net[0].weight, fmt, (learn.T @ learn)[None], near=rtn(net[0].weight, fmt))
    assert [n.text for n in q.notes if n.subject == name] == [f"gptq: {wanted}"]


# -- guided Hessians -----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("solvers.guided-option")
@pytest.mark.parametrize("solver", ["gptq", "descent"])
def test_guided_solves_each_layer_on_guided_hessians(solver: str) -> None:
    model, data = llama(), stories(4)
    q = rd.quantize(model, FORMAT, data=data, solver=solver, guided=True, exclude=KEEP)
    assert not any(n.fallback for n in q.notes)
    assert any("solved on guided Hessians" in n.text for n in q.notes)
    moments = hessians(model, data, set(q.tensors), guided=True)
    for name, tensor in q.tensors.items():
        wanted = SOLVERS[solver](model.get_parameter(name), tensor.format, moments[name])
        assert torch.equal(tensor.codes, wanted.codes)
    plain = rd.quantize(model, FORMAT, data=data, solver=solver, exclude=KEEP)
    assert any(not torch.equal(plain.tensors[name].codes, t.codes) for name, t in q.tensors.items())


@pytest.mark.proves("solvers.guided-option")
def test_where_a_backward_pass_does_not_fit_the_sweep_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = llama(), stories(4)
    monkeypatch.setattr(networks, "available", lambda: 1000.0)
    q = rd.quantize(model, FORMAT, data=data, solver="gptq", guided=True, exclude=KEEP)
    plain = rd.quantize(model, FORMAT, data=data, solver="gptq", exclude=KEEP)
    assert all(torch.equal(t.codes, plain.tensors[name].codes) for name, t in q.tensors.items())
    assert [n.text for n in q.notes if n.fallback and "swept Hessians in place of guided ones" in n.text]
    with pytest.raises(CheckError, match="swept Hessians"):
        rd.quantize(model, FORMAT, data=data, solver="gptq", guided=True, exclude=KEEP, strict=True)


@pytest.mark.proves("solvers.guided-option")
def test_a_model_without_gradients_is_swept() -> None:
    model = llama()
    for p in model.parameters():
        p.requires_grad_(False)
    q = rd.quantize(model, FORMAT, data=stories(4), solver="gptq", guided=True, exclude=KEEP)
    assert any(n.fallback and "need gradients" in n.text for n in q.notes)


@pytest.mark.proves("solvers.guided-option")
def test_a_graph_on_guided_hessians() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(40, 6)
    q = rd.quantize(net, "int3", data=[x], solver="gptq", guided=True)
    assert torch.equal(q.module(x), rd.quantize(net, "int3", data=[x], solver="gptq", guided=True).module(x))
    name = next(iter(q.tensors))
    first, last = (t.dequantize() for t in q.tensors.values())
    torch.testing.assert_close(q.module(x), (x @ first.T + net[0].bias).relu() @ last.T + net[2].bias)
    learn = Batch((x[torch.arange(40) % 4 != 3],))
    moment = hessians(net, [learn], {"0.weight"}, guided=True)["0.weight"]
    assert torch.equal(q.tensors[name].codes, gptq(net[0].weight, q.tensors[name].format, moment).codes)


@pytest.mark.proves("solvers.guided-option")
def test_guided_where_it_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="guided=True is about the Hessians of a solver"):
        rd.quantize(llama(), FORMAT, data=stories(4), guided=True)
    llama().save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match="guided Hessians take a backward pass"):
        rd.quantize(tmp_path / "model", "int4", data=stories(4), solver="gptq", guided=True, output=tmp_path / "out")


@pytest.mark.proves("stats.guided")
def test_what_a_backward_pass_keeps() -> None:
    """By hand: per place the inputs of both layers, the output of tanh; two outputs; two Hessians. More places, more bytes."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    for n in (1, 10):
        assert backward_bytes(net, [Batch((torch.randn(n, 5),)), Batch((torch.randn(1, 5),))]) == (
            4 * n * (5 + 7 + 7) + 4 * n * (7 + 2) + 8 * (25 + 49)
        )
    assert backward_bytes(net, [Batch((torch.randn(3, 5),))], {"2.weight"}) == 4 * 3 * (5 + 7 + 7) + 4 * 3 * 2 + 8 * 49


# -- text --------------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("tune.own-text")
def test_a_model_writes_by_its_own_probabilities() -> None:
    """The second token of many examples that start alike against the model's own distribution; later ones against a plain loop."""
    model = llama()
    start = torch.full((2000,), 3)
    ids = written(model, start, 2)
    with torch.no_grad():
        p = model(torch.tensor([[3]])).logits[0, -1].softmax(-1)
    share = torch.bincount(ids[:, 1], minlength=24) / 2000
    assert float((share - p).abs().max()) < 0.05
    assert torch.equal(ids, written(model, start, 2))
    assert not torch.equal(ids, written(model, start, 2, seed=1))
    generator, wanted = torch.Generator().manual_seed(5), torch.tensor([[3], [7]])
    with torch.no_grad():
        for _ in range(6):
            p = model(wanted, use_cache=False).logits[:, -1].softmax(-1)
            wanted = torch.cat([wanted, torch.multinomial(p, 1, generator=generator)], 1)
    assert torch.equal(written(model, torch.tensor([3, 7]), 7, seed=5), wanted)


@pytest.mark.proves("tune.own-text")
def test_what_writes_and_what_does_not() -> None:
    assert writes(llama(), stories(1))
    assert not writes(nn.Linear(4, 4), [Batch((torch.randn(2, 4),))])
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "vocab_size": 24,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    both_ways = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, initializer_range=0.5)).eval()
    assert not writes(both_ways, stories(1))  # logits over tokens, but later tokens change earlier answers
    assert not writes(llama(), [Batch((), {"input_ids": torch.ones(1, 4).long(), "position_ids": torch.ones(1, 4).long()})])


@pytest.mark.proves("tune.own-text")
def test_text_is_cut_and_padding_left_out() -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    rows = tokens(Batch((), {"input_ids": ids, "attention_mask": mask}))
    assert rows is not None
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3], [7, 8, 9, 10, 11]]
    batches = cut(rows, seed=1, length=3, size=2)
    assert sorted(row.tolist() for b in batches for row in b.args[0]) == [[0, 1, 2], [3, 7, 8], [9, 10, 11]]
    found = enough_text(llama(), stories(3))
    assert found is not None
    assert found[1] == 12
    assert sum(b.args[0].numel() for b in found[0]) == (3 + 12) * 24


# -- effort="best" -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("effort.best-modules")
def test_best_on_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Means.__module__], "TEACHING_STEPS", 40)
    model, data = llama(), stories(40)
    before = copy.deepcopy(model.state_dict())
    foot = rd.quantize(model, FORMAT, exclude=KEEP)
    q = rd.quantize(model, FORMAT, data=data, effort="best", exclude=KEEP)
    text = " ".join(n.text for n in q.notes)
    for name in ("GPTQ", "guided descent", "end-to-end tuning"):
        assert f"{name} kept" in text or f"{name} not kept" in text
    assert "that the model wrote itself" in text
    assert q.nbytes == foot.nbytes
    score = [b.args[0] for b in stories(20, seed=9)]
    a, b = (rd.evaluate(m, against=model, data=score, latency=False, layers=False).kl for m in (foot, q))
    assert b < 0.8 * a  # type: ignore[operator]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.proves("effort.best-modules")
def test_the_step_is_for_modules_alone() -> None:
    assert "guided descent" in EFFORTS["best"]
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(40, 6)
    network = find_network(net, [Batch((x,))], [])
    q = rd.quantize(net, "int3", data=[x])
    assert STEPS["guided descent"].make(Rung(network, q), Means(lambda _: q, q.plan, q.plan, [Batch((x,))])) is None


@pytest.mark.proves("tune.endtoend")
def test_examples_are_blended_in_pairs() -> None:
    """Every input of an example by the same share of the same other one, the most of it its own; what has no examples stays."""
    one, each = torch.arange(6.0)[:, None], torch.eye(6)
    batch = Batch((each,), {"ten": 10 * one, "table": torch.ones(3)})
    how = Teaching(1, mix=0.4, seed=3)
    first, again = (list(_blended(iter([batch, batch]), how)) for _ in range(2))
    assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].args[0], first[1].args[0])
    for got in first:
        shares = got.args[0]
        torch.testing.assert_close(shares.sum(1), torch.ones(6))
        assert bool((shares.diagonal() >= 0.6 - 1e-6).all())
        assert bool(((shares > 0).sum(1) <= 2).all())
        torch.testing.assert_close(got.named["ten"], shares @ batch.named["ten"])
        assert torch.equal(got.named["table"], torch.ones(3))
    ids = Batch((torch.arange(6)[:, None],))
    assert next(_blended(iter([ids]), how)) is ids
    assert next(_blended(iter([batch]), Teaching(1))) is batch
    with pytest.raises(PlanError, match=r"from 0 to 0\.5"):
        Teaching(1, mix=0.7)


@pytest.mark.proves("tune.endtoend")
def test_training_starts_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """At rates of nearly nothing codes end as the solver's own, and float as the nearest ones."""
    monkeypatch.setattr(endtoend, "judge", lambda before, after: Verdict(None, Paired(2.0, 1.0, 0.0), 8))
    model, data = llama(), stories(4)
    q = rd.quantize(model, FORMAT, data=data, solver="descent", exclude=KEEP)
    seen: list[Tensor] = []
    rates = {"weights": 1e-9}
    for start in ("codes", "float"):
        new = tune_model(q, model, data, data, Teaching(1, rates=rates, start=start))  # type: ignore[arg-type]
        seen.append(torch.cat([t.unpack().flatten() for t in new.tensors.values()]))
    solver_codes = torch.cat([t.unpack().flatten() for t in q.tensors.values()])
    nearest = [t.format.encode(model.get_parameter(name), t.params).flatten() for name, t in q.tensors.items()]
    assert torch.equal(seen[0], solver_codes)
    assert torch.equal(seen[1], torch.cat(nearest))
    assert not torch.equal(seen[0], seen[1])
    assert Teaching(1, start="codes").rate("weights") == RATES["codes"]["weights"] < Teaching(1).rate("weights")
    with pytest.raises(PlanError, match="training starts at float or codes"):
        Teaching(1, start="nothing")  # type: ignore[arg-type]


@pytest.mark.proves("tune.endtoend")
def test_weights_move_by_the_way_to_their_next_level() -> None:
    """Adam's first step is the rate and a sign, whatever the gradient: a tenth, to warm up, of 3e-3 of the root mean square, times
    2^(4 - bits)."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(32, 16)
    plan = Plan((Rule("*", weight="int4"), Rule("2", weight="int2")))
    q = rd.quantize(net, plan=plan, data=[x])
    moved: dict[str, float] = {}
    module = prepare(q, net)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    endtoend._train(module, net, [Batch((x,))], Teaching(1, start="codes"), None)
    for name, p in module.named_parameters():
        if name.endswith("weight") and not torch.equal(p, before[name]):
            moved[name] = float((p.detach() - before[name]).abs().max() / before[name].square().mean().sqrt())
    assert sorted(moved.values()) == pytest.approx([3e-4, 1.2e-3], rel=1e-2)


@pytest.mark.proves("tune.endtoend")
def test_a_time_is_said_in_steps_that_make_the_same_bytes() -> None:
    model, data = llama(), stories(8)
    q = rd.quantize(model, FORMAT, data=data, exclude=KEEP)
    timed = tune_model(q, model, data, None, Teaching(seconds=1.5, start="codes"))
    steps = timed.provenance["tuned"]["steps"]
    assert steps > endtoend.WARM
    again = tune_model(q, model, data, None, Teaching(steps, start="codes"))
    assert all(torch.equal(t.codes, again.tensors[name].codes) for name, t in timed.tensors.items())


@pytest.mark.proves("tune.own-text")
def test_writing_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lot is begun whatever the time, and what there is of it is what there would be."""
    monkeypatch.setattr(sys.modules[written.__module__], "AT_ONCE", 2)
    starts = torch.arange(6)
    every, few = written(llama(), starts, 8), written(llama(), starts, 8, seconds=0.0)
    assert len(every) == 6
    assert torch.equal(few, every[:2, : few.shape[1]])
    assert few.shape[1] >= 2
