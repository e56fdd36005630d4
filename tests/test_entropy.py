"""Codes as an ANS stream: exact for any codes, decoded by an independent reader, hostile streams refused; no figures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_artifact import ans, read_artifact
from test_file_format import Net, rewrite

import roundel as rd
from roundel.files import read_safetensors, write_safetensors
from roundel.formats.entropy import MOST_CODES, compress, restore
from roundel.formats.pack import pack
from roundel.formats.qtensor import QTensor


def tensor(codes: torch.Tensor, bits: int, signed: bool = False) -> QTensor:
    return QTensor(tuple(codes.shape), rd.Format.parse(f"{'int' if signed else 'uint'}{bits}/tensor*one"), pack(codes, bits))


def drawn(rows: int, cols: int, bits: int, used: int, skew: float, seed: int) -> torch.Tensor:
    """Codes of ``used`` values, geometric by ``skew`` (0: even)."""
    weight = torch.exp(-skew * torch.arange(float(used)))
    picks = torch.multinomial(weight, rows * cols, True, generator=torch.Generator().manual_seed(seed))
    return (picks.reshape(rows, cols) % (1 << bits)).to(torch.int32)


@pytest.mark.proves("file.entropy")
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 256), st.sampled_from([0.0, 0.1, 1.0, 9.0]),
       st.booleans(), st.integers(0, 2**31))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_any_codes_come_back(rows: int, cols: int, bits: int, used: int, skew: float, signed: bool, seed: int) -> None:
    q = tensor(drawn(rows, cols, bits, used, skew, seed), bits, signed)
    words = compress(q)
    if words is not None:
        assert words.nbytes < q.codes.numel()
        assert torch.equal(restore(q, words), q.codes)
        flip = 1 << (bits - 1) if signed else 0
        by_hand = ans(words.numpy(), rows, cols, 1 << bits, flip)  # no library, no torch
        assert torch.equal(pack(torch.from_numpy(by_hand).to(torch.int32), bits), q.codes)


@pytest.mark.proves("file.entropy")
@pytest.mark.parametrize(("skew", "slack"), [(0.5, 1.03), (2.0, 1.05)])
def test_size_is_near_the_entropy(skew: float, slack: float) -> None:
    codes = drawn(256, 128, 4, 16, skew, 1)
    share = torch.bincount(codes.flatten().long()).double() / codes.numel()
    ideal = float(-(share[share > 0] * share[share > 0].log2()).sum()) * codes.numel() / 8
    words = compress(tensor(codes, 4))
    assert words is not None
    assert words.nbytes < slack * ideal + 16


def test_neighbours_that_are_alike_are_cheaper() -> None:
    smooth = (torch.randn(64, 90, generator=torch.Generator().manual_seed(0)).cumsum(1) * 1.5).round().long() % 16
    mixed = smooth[:, torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    near, far = (compress(tensor(codes.to(torch.int32), 4)) for codes in (smooth, mixed))
    assert near is not None
    assert far is None or near.nbytes < 0.9 * far.nbytes
    assert near.numpy()[0] == 1  # the context that was chosen


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (7, 100), (1, 1)])
def test_what_cannot_gain_stays_packed(shape: tuple[int, int]) -> None:
    assert compress(tensor(torch.zeros(shape, dtype=torch.int32), 4)) is None


def test_a_constant_tensor_pays_for_its_codes() -> None:
    assert compress(tensor(torch.zeros(4096, 4096, dtype=torch.int32)[:, :64], 4)) is None
    words = compress(tensor(torch.zeros(8, 100, dtype=torch.int32), 4))
    assert words is not None
    assert MOST_CODES * words.nbytes >= 800


def wild(text: str) -> Net:
    """Weights with many small numbers, so that codes are uneven."""
    torch.manual_seed(3)
    net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.pow_(3)
    net.linear = torch.nn.Linear(400, 64)
    torch.nn.init.trunc_normal_(net.linear.weight, std=0.1, a=-1, b=1)
    net.linear.weight.data[0, 0] = 1.5
    return net


@pytest.mark.proves("file.entropy")
@pytest.mark.parametrize("text", ["int4/tensor", "int4/g32*int8", "fp4/tensor", "cb16/tensor", "cb5@model/channel",
                                  "cb16:int7@model/channel",
                                  "uint4/g32~uint4", "cb256x2@tensor/channel", "int16", "fp16"])  # fmt: skip
def test_a_coded_file_is_the_same_model(text: str, tmp_path: Path) -> None:
    q = rd.quantize(wild(text), text)
    q.save(tmp_path / "plain")
    q.save(tmp_path / "coded", entropy=True)
    q.save(tmp_path / "again", entropy=True)
    plain, coded = rd.load(tmp_path / "plain"), rd.load(tmp_path / "coded")
    assert (tmp_path / "coded").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "coded").stat().st_size <= (tmp_path / "plain").stat().st_size
    assert coded.nbytes == plain.nbytes == q.nbytes
    _, arrays = read_artifact(tmp_path / "coded")
    for name, kept in plain.tensors.items():
        assert torch.equal(kept.codes, coded.tensors[name].codes)
        assert np.array_equal(arrays[name], kept.dequantize().numpy())
    coded.save(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "plain").read_bytes()
    if text == "int4/tensor":
        assert (coded.format_version, plain.format_version) == (2, 1)
        assert (tmp_path / "coded").stat().st_size < 0.9 * (tmp_path / "plain").stat().st_size


STREAM = "linear.weight.codes.ans"


def _claimed(cols: int) -> Callable[[Path], None]:
    return lambda path: rewrite(
        path, {"tensors": {"linear.weight": {"format": "int4/tensor*fp16", "shape": [64, cols], "axis": 0}}}
    )


def _words(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors, metadata = read_safetensors(path)
        write_safetensors(path, {**tensors, STREAM: change(tensors[STREAM])}, metadata)

    return damage


def _put(at: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(words: torch.Tensor) -> torch.Tensor:
        out = words.numpy().copy()
        out[at] = value
        return torch.from_numpy(out)

    return change


HOSTILE: dict[str, Callable[[Path], None]] = {
    "cut short": _words(lambda w: w[:-3]),
    "cut to one word": _words(lambda w: w[:1]),
    "one word more": _words(lambda w: torch.from_numpy(np.append(w.numpy(), np.uint32(7)))),
    "a word changed": _words(_put(20, 12345)),
    "another context": _words(lambda w: _put(0, 2 if w.numpy()[0] != 2 else 3)(w)),
    "another checksum": _words(_put(1, 1)),
    "a context beyond the row": _words(_put(0, 2**31)),
    "ends in zero": _words(_put(-1, 0)),
    "bytes for words": _words(lambda w: torch.from_numpy(w.numpy().view(np.uint8).copy())),
    "a matrix": _words(lambda w: torch.from_numpy(w.numpy()[: len(w) // 2 * 2].reshape(2, -1).copy())),
    "more columns": _claimed(401),
    "huge": _claimed(2**40),
}


@pytest.mark.proves("inputs.entropy")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_streams_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    rd.quantize(wild("int4/tensor"), "int4/tensor").save(path, entropy=True)
    rd.load(path)
    HOSTILE[case](path)
    with pytest.raises(rd.InputError, match="damaged"):
        rd.load(path)


@pytest.mark.proves("inputs.entropy")
def test_random_words_never_escape_the_one_error() -> None:
    random = np.random.default_rng(0)
    q = tensor(torch.zeros(16, 40, dtype=torch.int32), 4)
    for size in [1, 2, 3, 5, 50] * 40:
        words = torch.from_numpy(np.append([random.integers(0, 45)], random.integers(0, 2**32, size - 1)).astype(np.uint32))
        try:
            restore(q, words)
        except ValueError:
            continue
        raise AssertionError("random words passed for codes")


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = rd.quantize(wild("int4/tensor"), "int4/tensor")
    q.save(tmp_path / "coded", entropy=True)
    monkeypatch.setitem(sys.modules, "constriction", None)
    q.save(tmp_path / "plain")
    for work in (lambda: q.save(tmp_path / "other", entropy=True), lambda: rd.load(tmp_path / "coded")):
        with pytest.raises(rd.InputError, match=r"pip install 'roundel\[entropy\]'"):
            work()  # type: ignore[no-untyped-call]
    assert not (tmp_path / "other").exists()


def test_tables_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    rd.quantize(wild(""), "cb16@tensor/channel").save(path)
    tensors, metadata = read_safetensors(path)
    bad: dict[str, Any] = {**tensors, "linear.weight.table": tensors["linear.weight.table"][:, :9].contiguous()}
    write_safetensors(path, bad, metadata)
    with pytest.raises(rd.InputError, match=r"the table of linear\.weight should be"):
        rd.load(path)
