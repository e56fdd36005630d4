"""Sizes in place of formats: every byte counted, the least error taken, and what cannot be met refused with what can."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

import roundel as rd
from roundel import CheckError, FormatError, PlanError
from roundel.cli import main
from roundel.errors import RoundelError
from roundel.formats.format import Format
from roundel.plan import Choice, Plan, Rule, size_of
from roundel.quantize.sizes import FAMILIES, candidates
from roundel.solvers import rtn

sys.path.insert(0, str(ROOT / "scripts"))
from random_llama import SIZES, random_llama

SHAPES = [(8, 64), (6, 37), (1, 5)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 32, bias=False), nn.ReLU(), nn.Linear(32, 8))


def bits(q: rd.QModel, names: list[str] | None = None) -> float:
    """Counted from what is stored."""
    chosen = [t for name, t in q.tensors.items() if names is None or name in names]

    def stored(t: rd.formats.QTensor | None) -> int:
        return 0 if t is None else t.codes.nbytes + stored(t.scale) + stored(t.offset) + (0 if t.table is None else t.table.nbytes)

    return 8 * sum(map(stored, chosen)) / sum(torch.Size(t.shape).numel() for t in chosen)


def said(q: rd.QModel, what: str = "within") -> list[str]:
    return [note.text for note in q.notes if what in note.text]


@pytest.mark.proves("names.bits-size")
@pytest.mark.parametrize("size", [1.5, 2.25, 3.3, 4.5, 8.5, 16.5])
def test_the_result_is_within_the_size_and_near_it(size: float) -> None:
    q = rd.quantize(net(), f"{size:g} bits")
    assert 0.6 * min(size, 16) < bits(q) <= size
    assert q.plan.rules[0].weight == str(q.tensors["0.weight"].format)


@pytest.mark.proves("names.bits-size")
def test_what_was_counted_beforehand_is_what_is_stored() -> None:
    """Every format of the families, by shape."""
    seen = set()
    for shape in SHAPES:
        w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for size in (2.2, 3.4, 4.6, 8.9, 40):
            try:
                offers = candidates({shape: 1}, size)
            except PlanError:
                continue
            for offer in offers:
                q = rtn(w, offer.format)
                assert 8 * q.nbytes / w.numel() == offer.bits <= size
                seen.add(offer.format)
    assert {str(f.grid).strip("0123456789") for f in seen} == {"int", "uint", "cb", "fp", "nf"}
    assert len(seen) > 25


@pytest.mark.proves("names.bits-size")
def test_the_least_error_of_all_that_fit_wins() -> None:
    """Against a search over every text of the families, none left out, on whole weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 8))
    weights = [model[0].weight.detach(), model[2].weight.detach()]
    for size in (3.5,):
        best = {}
        for text, share, b in ((text, share, b) for text, shares, most in FAMILIES for share in shares for b in range(1, most + 1)):
            try:
                fmt = Format.parse(text.format(share=share, b=b, k=2**b))
            except FormatError:
                continue
            if 8 * sum(fmt.nbytes((w.shape[0], w.shape[1])) for w in weights) <= size * sum(w.numel() for w in weights):
                done = [rtn(w, fmt).dequantize() for w in weights]
                best[float(sum(((q - w) ** 2).sum() / (w**2).sum() for q, w in zip(done, weights, strict=True)))] = fmt
        assert len(best) > 20
        assert rd.quantize(model, f"{size:g} bits").tensors["0.weight"].format == best[min(best)]


@pytest.mark.proves("names.bits-size")
def test_data_say_what_each_number_counts() -> None:
    """The error in the note, against the sums written out."""
    model, x = net(), torch.randn(16, 64) * torch.where(torch.arange(64) < 4, 1.0, 1e-2)
    x = x.repeat_interleave(4, 0)  # every fourth judges
    with torch.no_grad():
        model[0].weight[:, 4:] *= torch.randint(1, 50, (24, 60))  # large where little passes
        inputs = {"0.weight": x, "2.weight": model[:2](x), "4.weight": model[:4](x)}
        q = rd.quantize(model, "4.3 bits", data=x)
        lost = []
        for name, given in inputs.items():
            w, h = model.get_parameter(name), given.square().mean(0)
            error = rtn(w, q.tensors[name].format, h).dequantize() - w
            lost.append(float((h * error**2).sum() / (h * w**2).sum()))
    told = float(said(q)[0].split(" bits ")[1].split(" of error, the least (weighted by the inputs' mean squares)")[0])
    assert told == pytest.approx(sum(lost) / 3, rel=0.01)
    assert "of error, the least (all numbers alike)" in said(rd.quantize(model, "4.3 bits"))[0]
    assert bits(q) <= 4.3


@pytest.mark.proves("names.bits-size")
def test_the_note_names_all_that_were_tried_with_bits_and_error() -> None:
    q = rd.quantize(net(), "4.25 bits")
    (text,) = said(q)
    shapes = Counter((t.shape[0], t.shape[1]) for t in q.tensors.values())
    for offer in candidates(shapes, 4.25):
        assert f"{offer.format} {offer.bits:.4g} bits" in text
    assert f"{q.tensors['0.weight'].format} {bits(q):.4g} bits" in text.split(" of error, the least")[0]
    errors = [
        float(part.split(" bits ")[1].split()[0].rstrip(",")) for part in text.split(" within ")[1].split("; ")[1].split(", ")
    ]
    assert errors == sorted(errors)


@pytest.mark.proves("names.bits-small")
def test_too_small_a_size_is_refused_with_the_smallest() -> None:
    with pytest.raises(
        PlanError, match=r"0.5 bits are too few: the smallest format for these weights is (\S+), which takes"
    ) as err:
        rd.quantize(net(), "0.5 bits")
    words = str(err.value).split()
    least, takes = words[words.index("is") + 1].rstrip(","), words[words.index("takes") + 1]
    q = rd.quantize(net(), f"{float(takes) + 1e-3:.4f} bits")
    assert (str(q.tensors["0.weight"].format), f"{bits(q):.5g}") == (least, takes)


@pytest.mark.proves("names.bits-text")
def test_texts_that_are_sizes_and_texts_that_are_not() -> None:
    for text, size in {
        "4.25 bits": 4.25,
        "4.25bits": 4.25,
        " 4.25 BIT ": 4.25,
        "3bit": 3,
        "0.5 Bits": 0.5,
        "32 bits\n": 32,
    }.items():
        assert size_of(text) == size
    assert [size_of(text) for text in (None, "float", "int4", "int4/g32", "bits/g32", "")] == [None] * 6
    hostile = ["bits", "0 bits", "-4 bits", "4,25 bits", "nan bits", "inf bits", "1e3 bits", "4.25.1 bits", "9" * 999 + " bits",
               "\u096a bits", "4 bits bits", "4. bits", ".5 bits", "\x1b[31m4 bits", "int4 bits", "4.25 bits/g32 bits",
               "0.0000 bits"]  # fmt: skip
    for text in hostile:
        with pytest.raises(PlanError, match="number of bits per weight") as err:
            rd.quantize(net(), text)
        assert len(str(err.value)) < 250
    for text in ("4.25 bits/g32", "4.25", "4.25 bytes", "4.25 bits per weight"):
        with pytest.raises(RoundelError):
            rd.quantize(net(), text)


@pytest.mark.proves("names.bits-text")
def test_a_size_where_a_format_is_needed_is_refused() -> None:
    with pytest.raises(PlanError, match="is a size"):
        rd.quantize(net(), "int8", "8 bits", data=torch.randn(8, 64))
    for role in ("weight", "activation"):
        with pytest.raises(PlanError, match="here a format is needed"):
            Choice.parse("4 bits", role)


@pytest.mark.proves("names.bits-plan")
def test_rules_of_a_plan_have_sizes_of_their_own() -> None:
    plan = Plan((Rule("*", weight="3 bits"), Rule("0", weight="6.1 bits"), Rule("4", weight="int8")))
    q = rd.quantize(net(), plan=plan)
    assert bits(q, ["2.weight"]) <= 3 < 4 < bits(q, ["0.weight"]) <= 6.1
    assert str(q.tensors["4.weight"].format) == "int8/channel*fp16"
    assert [text.split(" bits")[0] for text in said(q)] == ["* within 3", "0 within 6.1"]
    again = rd.quantize(net(), plan=q.plan)
    assert [t.codes.tolist() for t in again.tensors.values()] == [t.codes.tolist() for t in q.tensors.values()]
    every = Plan((Rule("*", weight="3 bits"), Rule("*", weight="float")))  # a size that decides nothing
    assert not rd.quantize(net(), plan=every).tensors
    with pytest.raises(PlanError, match="no layer matches the pattern 'head'"):
        rd.quantize(net(), plan=Plan((Rule("*", weight="int8"), Rule("head", weight="3 bits"))))


@pytest.mark.proves("names.bits-plan")
def test_what_is_left_out_counts_in_no_size() -> None:
    q = rd.quantize(net(), "4.25 bits", exclude=["0"])
    assert set(q.tensors) == {"2.weight", "4.weight"}
    assert bits(q) <= 4.25


@pytest.mark.proves("names.bits-static")
@pytest.mark.parametrize("size", ["2.7 bits", "8.4 bits"])
def test_static_activations_take_formats_that_integers_compute_with(size: str) -> None:
    from roundel.integer import lower

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 10))
    x = torch.randn(16, 3, 4, 4)
    q = rd.quantize(model, size, "int8", data=x)
    assert bits(q) <= float(size.split()[0])
    assert "of those that integers compute with" in said(q)[0]
    assert lower(q)
    for offer in candidates(Counter(t.matrix for t in q.tensors.values()), float(size.split()[0]), whole=True):
        assert lower(rd.quantize(model, str(offer.format), "int8", data=x))


@pytest.mark.proves("names.bits-static")
def test_dynamic_activations_take_any_format() -> None:
    q = rd.quantize(net(), "4.6 bits", "int8:dynamic", data=torch.randn(16, 64))
    assert bits(q) <= 4.6
    assert "integers compute" not in said(q)[0]


@pytest.mark.proves("names.bits-solver")
@pytest.mark.parametrize("named", [{"solver": "gptq"}, {"effort": "default"}])
def test_solvers_and_efforts_keep_the_format(named: dict[str, str]) -> None:
    q = rd.quantize(net(), "3.3 bits", data=torch.randn(128, 64), **named)  # type: ignore[arg-type]
    assert bits(q) <= 3.3
    assert {str(t.format) for t in q.tensors.values()} == {q.plan.rules[0].weight}


@pytest.mark.proves("names.bits-size")
def test_scales_that_had_to_be_wider_are_told() -> None:
    """Weights that lie on a grid of fp32 scales keep them, which costs more than was counted."""
    model = nn.Sequential(nn.Linear(32, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-127, 128, (64, 32)) * (torch.rand(64, 1) + 0.1))
    q = rd.quantize(model, "8.5 bits")
    assert (str(q.tensors["0.weight"].format), q.plan.rules[0].weight) == ("int8/g32*fp32", "int8/g32*fp16")
    assert said(q, "takes 9 bits, more than the 8.5 asked for: scales are wider in 0.weight")
    with pytest.raises(CheckError, match=r"more than the 8\.5"):
        rd.quantize(model, "8.5 bits", strict=True)
    assert not said(rd.quantize(model, "9 bits", strict=True), "more than the")


@pytest.mark.proves("names.bits-size")
def test_a_format_that_cannot_hold_a_layer_is_told_and_left_out() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight *= 1e9  # beyond fp16 scales
    q = rd.quantize(model, "4.3 bits")
    assert any(note.subject == "2.weight" and "was not tried further" in note.text for note in q.notes)
    assert bits(q) <= 4.3


@pytest.mark.proves("names.bits-cli")
def test_the_command_takes_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 8))\n"
    (tmp_path / "sized_nets.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    main(["quantize", "sized_nets:make", "--weights", "4.25 bits", "-o", "out"])
    assert "within 4.25 bits" in "".join(capsys.readouterr())
    q = rd.load(tmp_path / "out", into=__import__("sized_nets").make())
    assert bits(q) <= 4.25
    for text in ("0 bits", "many bits"):
        with pytest.raises(SystemExit) as ended:
            main(["quantize", "sized_nets:make", "--weights", text, "-o", "other"])
        assert ended.value.code
        assert "number of bits per weight" in capsys.readouterr().err


@pytest.mark.proves("names.bits-folder")
def test_a_folder_is_given_the_format_that_its_model_in_memory_is_given(tmp_path: Path) -> None:
    """Streamed, without data, and with the same words; with data the inputs are not known when the format is chosen."""
    small = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
    random_llama(tmp_path / "model", SIZES["tiny"] | small)
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    wanted = rd.quantize(rd.read(tmp_path / "model"), "4.25 bits", exclude=["lm_head"])
    wanted.save(tmp_path / "wanted")
    got = rd.quantize(tmp_path / "model", "4.25 bits", exclude=["lm_head"], output=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "wanted").read_bytes()
    assert got.notes == wanted.notes
    assert bits(wanted) <= 4.25
    solved = rd.quantize(
        tmp_path / "model", "4.25 bits", exclude=["lm_head"], data=[ids], solver="gptq", output=tmp_path / "solved"
    )
    assert solved.plan == got.plan
    assert "all numbers alike" in said(solved)[0]
    with pytest.raises(PlanError, match="are too few"):
        rd.quantize(tmp_path / "model", "0.5 bits", output=tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "solved", "wanted"]
