"""`export`: targets by name and by ending, options, what it returns, paths of all kinds, and refusals that leave nothing."""

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import roundel as rd
from roundel.exporters import ENDINGS, TARGETS
from roundel.runtimes import hostc, litert, onnxruntime
from roundel.verify import vectors

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))
needs = {
    "c": pytest.mark.skipif(False, reason=""),
    "tflite": pytest.mark.skipif(litert.absent() is not None, reason=str(litert.absent())),
    "onnx": pytest.mark.skipif(onnxruntime.absent() is not None, reason=str(onnxruntime.absent())),
}

X = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def small(weights: str) -> rd.QModel:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
    return rd.quantize(model, weights, "int8", data=[X])


@pytest.fixture(scope="module")
def net() -> rd.QModel:
    return small("int8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.proves("export.targets")
@pytest.mark.parametrize("target", [pytest.param(name, marks=needs[to.room]) for name, to in TARGETS.items()])
def test_every_target_writes_what_its_runtime_takes(net: rd.QModel, place: Path, target: str) -> None:
    ending = {"tflite": ".tflite", "onnx": ".onnx", "c": ""}[TARGETS[target].room]
    made = rd.export(small("int7") if target == "onnx-u8s8" else net, f"out{ending}", target)
    assert made.target == target
    assert all(file.is_file() for file in made.files)
    assert made.nbytes == sum(file.stat().st_size for file in made.files) > 500
    assert set(place.rglob("*")) - {place / "out"} == {place / file for file in made.files}
    first = made.files[0].read_bytes()
    assert {".tflite": first[4:8] == b"TFL3", ".onnx": b"onnx" in first or first[:1] == b"\x08", "": b"C99" in first}[ending]


@pytest.mark.proves("export.targets")
@pytest.mark.parametrize(
    ("path", "target"), [("a.tflite", "tflite"), ("A.TFLITE", "tflite"), ("b.onnx", "onnx"), ("firmware", "c")]
)
def test_the_ending_names_the_target(net: rd.QModel, place: Path, path: str, target: str) -> None:
    assert ENDINGS[Path(path).suffix.lower()] == target
    assert rd.export(net, path).target == target


@pytest.mark.parametrize(
    ("path", "target", "words"),
    [
        ("out", "cortex-m44", "there is no target 'cortex-m44'; did you mean 'cortex-m4'?; there are c, "),
        ("out", "TFLITE", "there is no target 'TFLITE'"),
        ("out", "", "there is no target ''"),
        ("out.bin", None, "'out.bin' does not say what to write; there are c, "),
    ],
)
def test_a_target_that_is_not(net: rd.QModel, place: Path, path: str, target: str | None, words: str) -> None:
    with pytest.raises(rd.PlanError, match=re.escape(words)):
        rd.export(net, path, target)
    assert not list(place.iterdir())


def test_an_option_that_the_target_has_not(net: rd.QModel, place: Path) -> None:
    with pytest.raises(rd.PlanError, match="the target c has no option 'opset'; it has vectors, name"):
        rd.export(net, "out", "c", opset=3)
    with pytest.raises(rd.PlanError, match="the target onnx has no option 'widen'"):
        rd.export(net, "out.onnx", widen=True)
    assert not list(place.iterdir())


@needs_cc
@pytest.mark.proves("export.vectors")
def test_golden_vectors_are_those_given(net: rd.QModel, place: Path) -> None:
    """Inputs lie in golden.h as codes; the self-test passes on them, and fails on others."""
    codes = vectors(net, [X], 3)
    made = rd.export(net, "fw", "c", vectors=codes)
    golden = Path("fw/golden.h").read_text()
    assert "#define EXAMPLES 3" in golden
    held = re.search(r"golden0\[\d+\] = \{(.*?)\}", golden, re.DOTALL)
    assert held
    assert [int(n) for n in re.findall(r"-?\d+", held[1])] == codes["input"].reshape(-1).tolist()
    assert made.details.checked
    assert {n.subject: n.text for n in made.notes}["arena"].startswith(f"{made.details.arena:,} bytes")
    cc = str(hostc.compiler())

    def self_test() -> int:
        subprocess.run([cc, "-std=c99", "-DFW_WATCH=fw_watch", "main.c", "fw.c", "-o", "t"], cwd="fw", check=True)
        return subprocess.run(["./t"], cwd="fw", stdout=subprocess.DEVNULL).returncode

    assert self_test() == 0
    Path("fw/golden.h").write_text(
        golden.replace("0x", "0xF", 1).replace("0xF", "0x", 1).replace(held[1], held[1].replace("1", "2", 1))
    )
    assert self_test() == 1


def test_vectors_of_another_input_are_refused(net: rd.QModel, place: Path) -> None:
    with pytest.raises(rd.RoundelError):
        rd.export(net, "fw", "c", vectors={"other": np.zeros((1, 1, 6, 6), np.int64)})
    assert not list(place.iterdir())


# -- paths ------------------------------------------------------------------------------------------------------------

NAMES = [
    "with a blank",
    'quote\'s "and" $(x)',
    "*/ int main",
    "9lives",
    "-o",
    "n" * 200,
    "ünï çode",
    "int",
    os.fsdecode(b"caf\xe9"),
]


@needs_cc
@pytest.mark.proves("export.paths")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_folders_of_strange_names(net: rd.QModel, place: Path, name: str) -> None:
    """The folder has the name that was asked for; the C inside has identifiers, and compiles without a warning."""
    made = rd.export(net, name, "c")
    assert (place / name).is_dir()
    assert all(file.is_file() and re.fullmatch(r"[\w.]+", file.name, re.ASCII) for file in made.files)
    sources = [str(file.resolve()) for file in made.files if file.suffix == ".c" and file.name != "main.c"]
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    subprocess.run([str(hostc.compiler()), *strict, "-c", *sources, "-o", place / "one.o"], check=True)


@pytest.mark.parametrize("ending", [pytest.param(".tflite", marks=needs["tflite"]), pytest.param(".onnx", marks=needs["onnx"])])
@pytest.mark.proves("export.paths")
def test_files_of_strange_names(net: rd.QModel, place: Path, ending: str) -> None:
    for name in (name.replace("/", "") for name in NAMES):
        if ending == ".onnx" and not name.isprintable():
            continue  # the onnx package takes no path that is not UTF-8
        made = rd.export(net, name + ending)
        assert (place / (name + ending)).is_file()
        assert made.nbytes == (place / (name + ending)).stat().st_size


def test_folders_are_made_on_the_way(net: rd.QModel, place: Path) -> None:
    assert rd.export(net, place / "a" / "b" / "fw", "c").files[0].parent == place / "a" / "b" / "fw"


@pytest.mark.proves("export.atomic")
@pytest.mark.parametrize(
    "path", ["fw", pytest.param("m.tflite", marks=needs["tflite"]), pytest.param("m.onnx", marks=needs["onnx"])]
)
def test_a_folder_that_cannot_be_written(net: rd.QModel, place: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, and nothing is left. (Root may write anywhere, so the system's refusal is played.)"""
    real_open, real_mkdir = os.open, os.mkdir

    def inside(target: object) -> bool:
        return isinstance(target, str | Path) and (place in Path(target).resolve().parents)

    def refuse(target: object, *args: object, **named: object) -> int:
        if inside(target):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        return real_open(target, *args, **named)  # type: ignore[call-overload,no-any-return]

    def no_folder(target: object, *args: object, **named: object) -> None:
        if inside(target):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        real_mkdir(target, *args, **named)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(os, "mkdir", no_folder)
        with pytest.raises(rd.InputError, match="Read-only file system"):
            rd.export(net, path)
    assert not list(place.iterdir())


@needs_cc
@pytest.mark.proves("export.atomic")
def test_what_was_there_stays_when_the_check_fails(net: rd.QModel, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from roundel.exporters.c import emit

    rd.export(net, "fw", "c")
    (place / "fw" / "mine.txt").write_text("kept")
    before = {file: file.read_bytes() for file in (place / "fw").iterdir()}
    right = emit._text
    monkeypatch.setattr(emit, "_text", lambda file: right(file).replace(" + 1) >> 1;", ") >> 1;"))
    with pytest.raises(rd.CheckError, match="does not compute what simulate computes"):
        rd.export(net, "fw", "c")
    with pytest.raises(rd.CheckError):
        rd.export(net, "new", "c")
    assert {file: file.read_bytes() for file in (place / "fw").iterdir()} == before
    assert not (place / "new").exists()


def test_without_a_compiler_the_note_says_so(net: rd.QModel, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    made = rd.export(net, "fw", "c")
    assert not made.details.checked
    assert {n.subject: n.text for n in made.notes}["self-test"] == "no C compiler here: the C was written and not run"


# -- models that have no integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [None, "int8:dynamic"])
def test_a_model_without_static_activations_is_refused(place: Path, activations: str | None) -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), "int8", activations, data=[torch.randn(8, 6)])
    for path, target in (("fw", "cortex-m4"), ("m.tflite", "tflite"), ("m.tflite", "ethos-u55")):
        with pytest.raises(rd.PlanError, match="has no static parameters: quantize it with an activation format such as int8"):
            rd.export(q, path, target)
    assert not list(place.iterdir())


def test_a_model_without_a_graph_is_refused(place: Path) -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(6, 4)), "int8")
    with pytest.raises(rd.PlanError, match="only a graph can be lowered"):
        rd.export(q, "fw")
    assert not list(place.iterdir())
