"""Shared tables, tables of whole numbers, numbers of clusters for a target, and rate-aware rounding; no file streams."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from read_artifact import read_artifact
from torch import nn

import roundel as rd
from roundel.formats.codec import shared_table
from roundel.formats.kmeans import kmeans_whole
from roundel.plan import Rule
from roundel.solvers import rtn
from roundel.solvers.rate import entropy, rate


def net(*scales: float) -> nn.Sequential:
    """Layers whose weights differ in size alone."""
    torch.manual_seed(1)
    layers = [nn.Linear(32, 32, bias=False) for _ in scales]
    with torch.no_grad():
        for layer, scale in zip(layers, scales, strict=True):
            layer.weight.normal_(std=scale)
    return nn.Sequential(*layers)


# -- tables of whole numbers ------------------------------------------------------------------------------------------


@pytest.mark.proves("formats.whole-tables")
@pytest.mark.parametrize(("k", "most"), [(2, 3), (3, 4), (4, 4), (9, 4)])
def test_whole_entries_are_the_best_of_all(k: int, most: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x, h = 2 * torch.randn(3, 30, generator=generator), torch.rand(3, 30, generator=generator)

    def lost(row: int, entries: tuple[int, ...]) -> float:
        return float((h[row] * (x[row, :, None] - torch.tensor(entries).float()).square().amin(1)).sum())

    for row, table in enumerate(kmeans_whole(x, h, k, most)):
        best = min(lost(row, entries) for entries in itertools.combinations(range(-most, most + 1), k))
        assert lost(row, tuple(table.int().tolist())) == pytest.approx(best, rel=1e-6)
        assert (table.diff() > 0).all()


@pytest.mark.proves("formats.whole-tables")
@pytest.mark.parametrize(
    "text", ["cb16:int7/g32*int8", "cb8:int6@tensor/channel", "cb4:int5/channel", "cb16x2:int7@tensor/channel"]
)
def test_whole_tables_are_small_integers_in_the_file(text: str, tmp_path: Path) -> None:
    q = rd.quantize(net(0.1, 3.0), text)
    most = 2 ** (int(text.split(":int")[1][0]) - 1) - 1
    q.save(tmp_path / "model")
    loaded = rd.load(tmp_path / "model")
    _, arrays = read_artifact(tmp_path / "model")
    for name, kept in q.tensors.items():
        assert kept.table is not None
        assert kept.table.dtype == torch.int8
        assert int(kept.table.abs().max()) <= most
        assert kept.nbytes == kept.format.nbytes(kept.matrix)
        assert torch.equal(loaded.tensors[name].dequantize(), kept.dequantize())
        assert np.array_equal(arrays[name], kept.dequantize().numpy())
    assert loaded.format_version == 2


def test_whole_tables_cost_next_to_nothing() -> None:
    """7 bits are enough for 16 levels of a normal weight: the constraint that kernels have loses under 3 % of squared error."""
    w = torch.randn(64, 256)
    free, whole = (
        float((rtn(w, rd.Format.parse(f"cb16{entry}@tensor/g32*fp16")).dequantize() - w).square().mean())
        for entry in (":fp32", ":int7")
    )
    assert whole < 1.03 * free


# -- one table for the model ------------------------------------------------------------------------------------------


@pytest.mark.proves("sharing.model-table")
@pytest.mark.parametrize(
    "text", ["cb16@model/channel", "cb8:int6@model/g8*int8", "cb16x2@model/channel", "log4:fit@model/channel*fp16"]
)
def test_a_table_of_the_model_is_one_in_memory_file_and_count(text: str, tmp_path: Path) -> None:
    q = rd.quantize(net(0.01, 1.0, 5.0), text)
    tables = [t.table for t in q.tensors.values() if t.table is not None]
    assert len(tables) == 3
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert q.nbytes == sum(t.nbytes for t in q.tensors.values()) - 2 * tables[0].nbytes
    q.save(tmp_path / "model")
    loaded = rd.load(tmp_path / "model")
    document, arrays = read_artifact(tmp_path / "model")
    assert document["format_version"] == 2
    assert [name for name in arrays if name.endswith(".table")] == []
    assert (tmp_path / "model").read_bytes().count(f"model:{q.tensors['0.weight'].format}.table".encode()) == 1
    for name, kept in q.tensors.items():
        assert torch.equal(loaded.tensors[name].dequantize(), kept.dequantize())
        assert np.array_equal(arrays[name], kept.dequantize().numpy())
    assert loaded.nbytes == q.nbytes
    assert not loaded.rest
    x = torch.randn(2, 32)
    assert torch.equal(rd.load(tmp_path / "model", into=net(1, 1, 1)).module(x), q.module(x))


def test_the_shared_table_serves_all_alike() -> None:
    """Layers whose weights differ in size alone get nearly the table, and nearly the error, that each has alone."""
    form = rd.Format.parse("cb16@model/channel")
    model = net(0.01, 1.0, 5.0)
    q = rd.quantize(model, str(form))
    for layer, kept in zip(model, q.tensors.values(), strict=True):
        w = layer.weight.detach()
        alone = rtn(w, rd.Format.parse("cb16@tensor/channel"))
        lost, least = (float((t.dequantize() - w).square().sum()) for t in (kept, alone))
        assert lost < 1.15 * least


def test_two_formats_have_two_tables_and_gptq_keeps_them() -> None:
    plan = rd.Plan((Rule("*", weight="cb16@model/channel"), Rule("1", weight="cb8@model/channel")))
    data = [torch.randn(16, 32) for _ in range(4)]
    q = rd.quantize(net(0.1, 0.1, 0.1), plan=plan, solver="gptq", data=data)
    first, second, third = q.tensors.values()
    assert first.table is not None
    assert second.table is not None
    assert third.table is not None
    assert torch.equal(first.table, third.table)
    assert second.table.shape == (1, 8)


def test_tables_that_differ_under_one_name_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    q = rd.quantize(net(0.1, 0.1), "cb4@model/channel")
    name, kept = next(iter(q.tensors.items()))
    assert kept.table is not None
    bad = replace(q, tensors={**q.tensors, name: replace(kept, table=kept.table + 1)})
    with pytest.raises(rd.InputError, match="whose table all tensors share"):
        bad.save(tmp_path / "model")


def test_only_learned_tables_are_shared() -> None:
    with pytest.raises(rd.FormatError, match="learns no table"):
        shared_table(rd.Format.parse("int4"), [torch.randn(2, 2)])


def test_an_empty_model_of_tables() -> None:
    assert shared_table(rd.Format.parse("cb4@model/channel"), [torch.zeros(0, 4)]).shape == (1, 4, 1)


# -- how many clusters ------------------------------------------------------------------------------------------------


def size(q: rd.QModel) -> float:
    return 8 * sum(t.nbytes for t in q.tensors.values()) / sum(math.prod(t.shape) for t in q.tensors.values())


@pytest.mark.proves("sharing.target")
def test_a_size_is_reached_and_better_than_one_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundel.sharing.CLUSTERS", (2, 4, 8, 16))
    model = net(0.1, 0.1, 0.1)
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight.sign() * 0.1)  # two values: two clusters are exact
    plan = rd.share_plan(model, bits=3.2)
    q = rd.quantize(model, plan=plan)
    assert size(q) <= 3.2
    assert plan.rules[2] == Rule("1.weight", "cb2/tensor")
    ks = {name: t.format.grid.k for name, t in q.tensors.items() if hasattr(t.format.grid, "k")}
    assert ks["0.weight"] >= 8

    def lost(plan: dict[str, int]) -> float:
        total = 0.0
        for layer, k in zip(model, plan.values(), strict=True):
            w = layer.weight.detach()
            total += float((rtn(w, rd.Format.parse(f"cb{k}/tensor")).dequantize() - w).square().sum() / w.square().sum())
        return total

    found = lost(ks)  # the exact optimum, by looking at every plan
    for choice in itertools.product((2, 4, 8, 16), repeat=3):
        other = dict(zip(ks, choice, strict=True))
        bytes_of = sum(rd.Format.parse(f"cb{k}/tensor").nbytes((32, 32)) for k in choice)
        if 8 * bytes_of / 3072 <= 3.2:
            assert found <= lost(other) * (1 + 1e-6)


@pytest.mark.proves("sharing.target")
def test_an_error_is_kept_in_every_layer_with_the_least_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundel.sharing.CLUSTERS", (2, 4, 8, 16, 32))
    model = net(0.1, 3.0)
    q = rd.quantize(model, plan=rd.share_plan(model, error=0.02))
    for layer, kept in zip(model, q.tensors.values(), strict=True):
        w = layer.weight.detach()
        assert float((kept.dequantize() - w).square().sum() / w.square().sum()) <= 0.02
        coarser = rtn(w, rd.Format.parse(f"cb{kept.format.grid.k // 2}/tensor"))  # type: ignore[union-attr]
        assert float((coarser.dequantize() - w).square().sum() / w.square().sum()) > 0.02


def test_data_moves_clusters_to_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are never 0 elsewhere decide: the columns that data leaves at 0 cost nothing."""
    monkeypatch.setattr("roundel.sharing.CLUSTERS", (2, 4, 8, 16))
    model = net(0.1, 0.1)
    with torch.no_grad():
        model[0].weight[:, :4] = model[0].weight[:, :4].sign() * 0.1  # what is used has two values
    data = [torch.cat([torch.randn(8, 4), torch.zeros(8, 28)], 1)]
    blind, seeing = (rd.share_plan(model, error=0.01, data=items).rules[1].weight for items in (None, data))
    assert (blind, seeing) == ("cb16/tensor", "cb2/tensor")


@pytest.mark.parametrize(
    ("asked", "said", "kind"),
    [
        ({}, "one of them", rd.PlanError), ({"bits": 3, "error": 0.1}, "one of them", rd.PlanError),
        ({"bits": 0.5}, "0.5 bits are too few", rd.PlanError), ({"error": 1e-9}, "no number of clusters brings", rd.PlanError),
        ({"bits": 4, "format": "int4"}, "learned table", rd.FormatError),
        ({"bits": 4, "format": "cb{x}"}, "no format", rd.FormatError),
        ({"bits": 4, "format": "cb{k}@model/channel"}, "for each weight", rd.FormatError),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_a_sentence(asked: dict, said: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundel.sharing.CLUSTERS", (2, 4))
    with pytest.raises(kind, match=said):
        rd.share_plan(net(0.1), **asked)


# -- rate-aware rounding ----------------------------------------------------------------------------------------------


@pytest.mark.proves("solvers.rate")
@pytest.mark.parametrize("text", ["int4", "int2", "uint3/g32", "nf4/g32", "fp4", "cb16@tensor/channel", "cb16:int7@tensor/channel",
                                  "cb16x2@tensor/channel", "int8", "log4:fit"])  # fmt: skip
def test_error_plus_length_falls(text: str) -> None:
    form, weigh = rd.Format.parse(text), 6.0
    w = torch.randn(32, 64)
    near, cheap = rtn(w, form), rate(w, form, bits_weigh=weigh)
    unit = float((near.dequantize() - w).square().sum())
    codes = w.numel() // form.step

    def cost(q: rd.QTensor) -> float:
        return float((q.dequantize() - w).square().sum()) / unit + weigh * entropy(q) * codes / w.numel() * form.step

    assert entropy(cheap) < entropy(near)
    assert cost(cheap) < cost(near)
    assert torch.equal(rate(w, form, bits_weigh=0).codes, near.codes)


@pytest.mark.proves("solvers.rate")
def test_codes_are_the_best_under_their_lengths() -> None:
    """One round by hand: two levels 0 and 1, 0 three times as frequent: 0.55 goes to 0, 1 does not."""
    w = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.55, 0.05]])
    q = rate(w, rd.Format.parse("uint1/tensor*one"), bits_weigh=6.0)
    assert q.unpack().tolist() == [[0, 0, 0, 1, 0, 0]]


def test_importance_protects() -> None:
    w, form = torch.randn(16, 64), rd.Format.parse("int4")
    heavy = torch.ones(64)
    heavy[:8] = 100
    q = rate(w, form, heavy, bits_weigh=8.0)
    lost = (q.dequantize() - w).square().mean(0)
    assert lost[:8].mean() < 0.5 * lost[8:].mean()


def test_rate_refuses_what_no_stream_holds() -> None:
    with pytest.raises(rd.FormatError, match="up to 8 bits"):
        rate(torch.randn(4, 4), rd.Format.parse("int12"))
