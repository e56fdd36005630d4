"""`roundel export` and `roundel verify`: what they print, their exit status, lists, logs of boards, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import roundel as rd
from roundel import cli, runtimes
from roundel.exporters import TARGETS
from roundel.runtimes import hostc
from roundel.verify import Verification

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))

NETS = """
    import torch
    from torch import nn

    def conv():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(4)
            self.a, self.b = nn.Linear(8, 6), nn.Linear(5, 6)

        def forward(self, left, right):
            return self.a(left) + self.b(right)
"""


class Ran:
    """What one in-process call of `roundel` did."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def roundel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    before = signal.getsignal(signal.SIGTERM)

    def run(*args: object) -> Ran:
        status = 0
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as end:
            status = int(end.code or 0)
        return Ran(status, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts: net (static), weights (weight-only), two (two inputs), steps (with preprocessing), and their data."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "export_nets.py").write_text(textwrap.dedent(NETS))
    here = os.getcwd()
    try:
        os.chdir(folder)
        net, two = rd.read("export_nets:conv"), rd.read("export_nets:Two")
    finally:
        os.chdir(here)
    draw = torch.Generator().manual_seed(5)
    x, left, right = (torch.randn(*shape, generator=draw) for shape in ((40, 1, 6, 6), (24, 8), (24, 5)))
    with torch.no_grad():
        np.savez(folder / "data.npz", x=x.numpy(), y=net(x).argmax(1).numpy())
    np.savez(folder / "two.npz", left=left.numpy(), right=right.numpy())
    steps = rd.Preprocess(scale=0.5, mean=(0.25,))
    rd.quantize(net, "int8", "int8", data=[x]).save(folder / "net.safetensors")
    rd.quantize(net, "int8", data=[x]).save(folder / "weights.safetensors")
    rd.quantize(two, "int8", "int8", data=[{"left": left, "right": right}]).save(folder / "two.safetensors")
    rd.quantize(net, "int8", "int8", data=[x * 0.5 - 0.25], preprocess=None).save(folder / "plain.safetensors")
    rd.quantize(net, "int8", "int8", data=[x], preprocess=steps).save(folder / "steps.safetensors")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with the artifacts linked into it."""
    for file in made.glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(ran: Ran, *words: str, status: int = 2) -> None:
    """``status`` and one line on stderr that holds ``words``."""
    assert ran.status == status, ran.err
    last = ran.err.splitlines()[-1] + "\n"
    assert re.fullmatch(r"roundel: [^\n]+\n", last)
    assert "Traceback" not in ran.err
    if status == 2:
        assert (ran.out, ran.err) == ("", last)
    for word in words:
        assert word in last


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("cli.export")
def test_export_mirrors_the_api(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    ran = roundel("export", "net.safetensors", "fw", "--target", "cortex-m4")
    assert ran.status == 0, ran.err
    other = rd.export(rd.load("net.safetensors"), "again/fw", "cortex-m4")
    for file in other.files:
        assert (work / "fw" / file.name).read_bytes() == file.read_bytes()
        assert re.search(rf"^{re.escape(file.name)} +\S+ k?B$", ran.out, re.M)
    assert ran.out.splitlines()[-1].endswith(f"in {len(other.files)} files for cortex-m4")
    arena = {note.subject: note.text for note in other.notes}["arena"]
    assert f"note: arena: {arena}\n" in ran.err
    assert f"lower bound {other.details.bound:,}" in arena


@pytest.mark.proves("cli.export", "cli.mirror")
def test_export_json_has_the_attributes(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    from roundel.exporters import Exported

    ran = roundel("export", "net.safetensors", "fw", "--json")
    told = json.loads(ran.out)
    assert set(told) == {f.name for f in fields(Exported)} | {"nbytes"}
    assert told["target"] == "c"
    assert told["nbytes"] == sum(Path(file).stat().st_size for file in told["files"])
    assert told["details"]["arena"] >= told["details"]["bound"] > 0
    assert told["notes"][0]["subject"] == "arena"


@needs_cc
@pytest.mark.proves("cli.export")
def test_export_with_data_takes_golden_vectors_from_it(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    assert roundel("export", "net.safetensors", "fw", "--data", "data.npz", "--limit", 3).status == 0
    assert "#define EXAMPLES 3" in Path("fw/golden.h").read_text()
    assert roundel("export", "two.safetensors", "two", "--data", "two.npz").status == 0
    golden = Path("two/golden.h").read_text()
    assert "#define EXAMPLES 2" in golden
    assert "golden1[10]" in golden
    refused(roundel("export", "net.safetensors", "m.tflite", "--data", "data.npz"), "golden vectors; this target has none")
    refused(roundel("export", "net.safetensors", "fw", "--preprocess", "p.toml"), "give --data as well")
    refused(roundel("export", "net.safetensors", "fw3", "--data", "two.npz"), "left")


@pytest.mark.proves("cli.exit")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("export", "Missing argument 'MODEL.safetensors'"),
        ("export net.safetensors", "Missing argument 'OUT'"),
        ("export none.safetensors fw", "none.safetensors"),
        ("export data.npz fw", "data.npz"),
        ("export net.safetensors fw --target cortex-m44", "no target 'cortex-m44'; did you mean 'cortex-m4'?"),
        ("export net.safetensors fw.bin", "'fw.bin' does not say what to write"),
        ("export net.safetensors data.npz --target c", "it is not a folder"),
        ("export net.safetensors nowhere/m.tflite", "nowhere"),
        ("export net.safetensors fw --data none.npz", "none.npz"),
        ("export net.safetensors fw --data data.npz --limit 0", "limit"),
        ("export weights.safetensors fw", "has no static parameters: quantize it with an activation format such as int8"),
        ("verify", "Missing argument 'MODEL.safetensors'"),
        ("verify net.safetensors", "--against host-c,tflm"),
        ("verify net.safetensors --against ,", "--against host-c,tflm"),
        ("verify net.safetensors --against host-c", "give --data as well"),
        ("verify net.safetensors --against host_c --data data.npz", "no runtime 'host_c'; did you mean 'host-c'?"),
        ("verify net.safetensors --against host-c,,hostc --data data.npz", "no runtime 'hostc'"),
        ("verify net.safetensors --against host-c --data two.npz", "left"),
        ("verify net.safetensors --against host-c --data data.npz --limit -1", "limit"),
        ("verify net.safetensors --against host-c --data data.npz --metric accuracy", "top1"),
        ("verify net.safetensors --against host-c --preprocess p.toml", "give --data as well"),
        ("verify weights.safetensors --against host-c --data data.npz", "has no static parameters"),
        ("verify net.safetensors --board-log none.log", "none.log"),
        ("verify net.safetensors --board-log . ", "folder"),
        ("verify net.safetensors --board-log data.npz --against host-c", "leave --against"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_sentence_and_status_2(roundel, work: Path, args: str, words: str) -> None:  # type: ignore[no-untyped-def]
    before = sorted(work.iterdir())
    refused(roundel(*args.split()), words)
    assert sorted(work.iterdir()) == before


@pytest.mark.proves("inputs.read-only")
@pytest.mark.parametrize("out", ["fw", "a/b/fw", "m.tflite", "m.onnx"])
def test_a_read_only_place_is_refused_before_the_model_is_read(
    roundel, work: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("roundel.qmodel.load", lambda *a, **k: pytest.fail("the model was read"))
    (work / "a" / "b").mkdir(parents=True)

    def full(path: object, flags: int, *_: object, **__: object) -> int:
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        ran = roundel("export", "net.safetensors", out)
    refused(ran, "Read-only file system")


@needs_cc
@pytest.mark.proves("inputs.paths")
def test_strange_paths(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    """Blanks, what a shell or a terminal would obey, and bytes that are not UTF-8: works, and is printed inertly."""
    for name in ("with a blank", '$(x) */ "q"\'', "\x1b]0;owned\x07", os.fsdecode(b"caf\xe9")):
        source = work / f"{name.replace('/', '')}.safetensors"
        source.write_bytes((work / "net.safetensors").read_bytes())
        ran = roundel("export", source, name)
        assert ran.status == 0, ran.err
        assert (work / name / "golden.h").is_file()
        assert not {"\x1b", "\x07"} & set(ran.out + ran.err)
        assert roundel("verify", source, "--against", "host-c", "--data", "data.npz", "--limit", 1).status == 0


# -- verify -----------------------------------------------------------------------------------------------------------


@needs_cc
@pytest.mark.proves("cli.verify")
def test_verify_prints_a_line_for_each(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    ran = roundel("verify", "net.safetensors", "--against", "host-c", "--data", "data.npz")
    assert ran.status == 0, ran.err
    found = rd.verify(rd.load("net.safetensors"), ["host-c"], rd.load_data("data.npz"))["host-c"]
    assert ran.out == f"{found}\n"
    assert found.examples == 40
    assert "top1" in ran.out
    for data in (("net", "data.npz"), ("two", "two.npz")):
        ran = roundel("verify", f"{data[0]}.safetensors", "--against", " host-c ", "--data", data[1], "--limit", 7)
        assert (ran.status, "over 7 inputs" in ran.out) == (0, True)


@needs_cc
@pytest.mark.proves("cli.verify", "cli.mirror")
def test_verify_json_has_the_attributes(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    told = json.loads(roundel("verify", "net.safetensors", "--against", "host-c", "--data", "data.npz", "--json").out)
    assert list(told) == ["host-c"]
    assert set(told["host-c"]) == {f.name for f in fields(Verification)} | {"exact"}
    assert (told["host-c"]["exact"], told["host-c"]["differing"], told["host-c"]["examples"]) == (True, 0, 40)


@needs_cc
def test_preprocessing_of_the_artifact_is_used_again(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    """Labels are the float network's for x; at x / 2 - 1/4, as this artifact's preprocessing has it, they score another top1."""
    args = ("--against", "host-c", "--data", "data.npz", "--json")
    stored = json.loads(roundel("verify", "steps.safetensors", *args).out)["host-c"]
    (work / "p.toml").write_text("scale = 0.5\nmean = [0.25]\n")
    named = json.loads(roundel("verify", "steps.safetensors", *args, "--preprocess", "p.toml").out)["host-c"]
    (work / "none.toml").write_text("scale = 1.0\n")
    other = json.loads(roundel("verify", "steps.safetensors", *args, "--preprocess", "none.toml").out)["host-c"]
    assert stored["metric"] == named["metric"] != other["metric"]


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Have `verify` give these results, for the exit status alone."""

    def give(*found: Verification) -> tuple[str, ...]:
        monkeypatch.setattr(sys.modules["roundel.verify"], "verify", lambda *a, **k: {one.runtime: one for one in found})
        return ("verify", "net.safetensors", "--data", "data.npz", "--against", ",".join(one.runtime for one in found))

    return give


GOOD = Verification("host-c", 0, 10, examples=2)
BAD = Verification("tflm", 1, 10, "conv", {1: 1}, {"conv": 1}, 2)
REFUSES = Verification("litert", why="it takes no such model:\n  conv (conv)")
ABSENT = Verification("qemu-cortex-m4", why="qemu-system-arm not found", absent=True)


@pytest.mark.proves("cli.verify", "cli.exit")
@pytest.mark.parametrize(
    ("found", "strict", "status", "words"),
    [
        ((GOOD,), False, 0, ""),
        ((GOOD, ABSENT), False, 0, ""),
        ((GOOD, ABSENT), True, 1, "not exact: qemu-cortex-m4"),
        ((ABSENT,), False, 1, "nothing ran: qemu-cortex-m4 absent here"),
        ((GOOD, BAD), False, 1, "not exact: tflm"),
        ((GOOD, REFUSES, ABSENT), False, 1, "not exact: litert"),
        ((BAD, REFUSES, ABSENT), True, 1, "not exact: tflm, litert, qemu-cortex-m4"),
    ],
)
def test_exit_status(roundel, work: Path, outcomes, found: Any, strict: bool, status: int, words: str) -> None:  # type: ignore[no-untyped-def]
    """Every runtime has its line, whatever the status; reasons of several lines become one."""
    ran = roundel(*outcomes(*found), *(["--strict"] if strict else []))
    assert ran.status == status
    assert ran.out.splitlines() == [" ".join(str(one).split()) for one in found]
    if status:
        refused(ran, words, status=1)
    else:
        assert not ran.err


@needs_cc
def test_a_wrong_kernel_is_status_1(roundel, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from roundel.exporters.c import emit

    right = emit._text
    monkeypatch.setattr(emit, "_text", lambda file: right(file).replace(" + 1) >> 1;", ") >> 1;"))
    ran = roundel("verify", "net.safetensors", "--against", "host-c", "--data", "data.npz")
    refused(ran, "not exact: host-c", status=1)
    assert re.search(
        r"^host-c: [1-9][\d,]* of [\d,]+ elements differ over 40 inputs; the first in '0', off by -1: \d+; top1", ran.out
    )
    refused(roundel("export", "net.safetensors", "fw"), "does not compute what simulate computes", status=1)
    assert not (work / "fw").exists()


# -- logs of boards ---------------------------------------------------------------------------------------------------


def self_test(folder: Path) -> str:
    name = folder.name
    command = [str(hostc.compiler()), "-std=c99", f"-D{name.upper()}_WATCH={name}_watch", "main.c", f"{name}.c", "-o", "board"]
    subprocess.run(command, cwd=folder, check=True)
    return subprocess.run([folder / "board"], capture_output=True, text=True, check=True).stdout


@needs_cc
@pytest.mark.proves("cli.board-log")
def test_a_log_is_judged(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    assert roundel("export", "net.safetensors", "fw").status == 0
    log = self_test(work / "fw")
    judge = ("verify", "net.safetensors", "--board-log", "board.log")
    (work / "board.log").write_bytes(b"\xff\xfe boot\r\n" + log.encode())
    ran = roundel(*judge)
    assert (ran.status, ran.out) == (0, "board-log: 0 of 3 calls differ by their checksums\n")
    crc = log.splitlines()[2].split()[4]
    (work / "board.log").write_text(log.replace(crc, f"{int(crc, 16) ^ 1:08X}"))
    ran = roundel(*judge)
    refused(ran, "not exact: board-log", status=1)
    assert "1 of 3 calls differ by their checksums; the first in '3'" in ran.out
    told = json.loads(roundel(*judge, "--json").out)["board-log"]
    assert (told["differing"], told["first_op"], told["values"]) == (1, "3", {"3": 1})
    (work / "board.log").write_text(log[: log.index(crc)])
    refused(roundel(*judge), "the log holds 2 checksums, the model has 3 calls: was it cut", status=1)
    (work / "board.log").write_text(log)
    for other in ("two", "plain"):
        ran = roundel("verify", f"{other}.safetensors", "--board-log", "board.log")
        assert (ran.status, "another model's log" in ran.err) == (1, True)


@needs_cc
@pytest.mark.proves("cli.board-log")
def test_a_log_of_golden_vectors_needs_their_data(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    given = ("--data", "data.npz", "--limit", 3)
    assert roundel("export", "net.safetensors", "fw", *given).status == 0
    (work / "board.log").write_text(self_test(work / "fw"))
    judge = ("verify", "net.safetensors", "--board-log", "board.log")
    assert roundel(*judge, *given).status == 0
    ran = roundel(*judge)
    assert ran.status == 1
    assert "golden vectors that are missing here" in ran.err


# -- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("cli.lists")
def test_lists_say_what_is_absent(roundel, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("roundel.runtimes.tflm.absent", lambda name: "it is on the moon")
    monkeypatch.setattr("roundel.runtimes.litert.absent", lambda name: "no \x1b[2J LiteRT")
    rows = {row["runtime"]: row for row in json.loads(roundel("verify", "--list", "--json").out)}
    assert list(rows) == list(runtimes.RUNTIMES)
    assert rows["tflm"] == {"runtime": "tflm", "rounding": "R1", "here": "absent: it is on the moon"}
    plain = roundel("verify", "--list")
    assert (plain.status, plain.err) == (0, "")
    assert re.search(r"^tflm +R1 +absent: it is on the moon$", plain.out, re.M)
    assert "\x1b" not in plain.out
    rows = {row["target"]: row for row in json.loads(roundel("export", "--list", "--json").out)}
    assert list(rows) == list(TARGETS)
    assert rows["tflite"]["here"].startswith("absent: no ")
    assert rows["cortex-m4"]["writes"] == TARGETS["cortex-m4"].what
    assert re.search(r"^ethos-u55 +a \.tflite file .+ absent: no ", roundel("export", "--list").out, re.M)
