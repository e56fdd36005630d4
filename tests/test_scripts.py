"""The scripts that CI and the docs rest on: instruction counts held to their record, and the compatibility page; no figure here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compatibility
import instructions
import pytest
import torch
from compatibility import COLUMNS, PAGE, ROWS, Footnotes, formats, head, page, reason
from conftest import ROOT, needs_data
from instructions import Count, by_kind, compare
from measure import _some, ds_cnn
from torch import nn

import roundel as rd
from roundel.data import Batch
from roundel.exporters.c.emit import emit
from roundel.runtimes import hostc, qemu

# -- instruction counts -----------------------------------------------------------------------------------------------


def counts(**kinds: int) -> dict[str, Count]:
    return {name: Count(1, 0, n) for name, n in kinds.items()}


@pytest.mark.proves("c.counts")
@pytest.mark.parametrize(
    ("now", "wrong"),
    [
        ({"conv": 1020, "linear": 100}, []),  # 2 % to the instruction
        ({"conv": 1021, "linear": 100}, ["int8, conv: 1,021 instructions, +2.1% of the 1,000 on record"]),
        ({"conv": 1000, "linear": 50}, []),
        ({"conv": 1000}, ["int8, linear: 100 instructions on record, and no such call any more"]),
        ({"conv": 1000, "linear": 100, "add": 7}, ["int8, add: 7 instructions, and none on record"]),
    ],
)
def test_two_percent_more_than_the_record_is_a_failure(now: dict[str, int], wrong: list[str]) -> None:
    assert compare({"int8": counts(**now)}, {"int8": {"conv": 1000, "linear": 100}}) == wrong


def test_a_model_on_record_that_nobody_counts_is_a_failure() -> None:
    assert compare({}, {"int4": {"conv": 3}}) == ["int4, conv: 3 instructions on record, and no such call any more"]


@pytest.mark.proves("c.counts")
def test_calls_are_counted_by_kind() -> None:
    """Multiplications by hand: outputs times the weights that make one."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 1), nn.Flatten(),
        nn.Linear(96, 5),
    )  # fmt: skip
    graph = rd.lower(rd.quantize(net.eval(), "int8", "int8", data=[torch.randn(8, 3, 6, 6)]))
    source = emit(graph)
    found = by_kind(graph, source, [10**i for i in range(len(source.watched))])
    at = {step.output: 10**i for i, step in enumerate(source.layout.steps)}
    assert found["conv"] == Count(1, 36 * 8 * 27, at["0"])
    assert found["conv, depthwise"] == Count(1, 16 * 8 * 9, at["1"])
    assert found["conv, pointwise"] == Count(2, 16 * 4 * 8 + 16 * 6 * 4, at["2"] + at["3"])
    assert found["linear"] == Count(1, 96 * 5, at["5"])
    assert list(found)[-1] == "in all"
    assert found["in all"].instructions == sum(at.values())


@pytest.mark.proves("c.counts")
def test_the_record_is_whole() -> None:
    record = json.loads(instructions.RECORD.read_text())
    assert set(record["counts"]) == set(instructions.KINDS)
    assert "arm-none-eabi-gcc" in record["compiler"]
    for kinds in record["counts"].values():
        assert kinds["in all"] == sum(n for name, n in kinds.items() if name != "in all")


@pytest.mark.parametrize(("strict", "status"), [("0", 0), ("1", 1)])
def test_without_data_nothing_is_counted_and_it_says_so(strict: str, status: int, tmp_path: Path) -> None:
    env = {"PATH": "", "ROUNDEL_DATA": str(tmp_path / "none"), "ROUNDEL_STRICT_SKIPS": strict}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "instructions.py")], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith("instructions not counted: no data here: set ROUNDEL_DATA")


def test_some_examples_lie_at_equal_distances() -> None:
    """7 examples in uneven batches, 3 of them asked for: the first, third and fifth, labels with them."""
    x = torch.arange(7.0)[:, None]
    score = [Batch((x[:4],), {}, x[:4, 0].long()), Batch((x[4:],), {}, x[4:, 0].long())]
    kept = _some(score, 3, size=2)
    assert [b.args[0].flatten().tolist() for b in kept] == [[0, 2], [4]]
    assert [b.target.tolist() for b in kept if b.target is not None] == [[0, 2], [4]]
    assert sum(map(len, _some(score, None))) == 7


@pytest.mark.proves("ci.tools")
def test_ci_installs_every_tool_that_is_missing_before_it_tests(tmp_path: Path) -> None:
    """In a folder of its own for a PATH, where nothing is but stand-ins that write down how they are called."""
    bash, log = shutil.which("bash"), tmp_path / "log"
    assert bash
    for name in ("apt-get", "make", "chmod", "git"):
        (tmp_path / name).write_text(f'#!{bash}\necho "{name} $* strict=${{ROUNDEL_STRICT_SKIPS-}}" >>{log}\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    done = subprocess.run(
        [bash, str(ROOT / ".ci" / "run")], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    calls = [line for line in log.read_text().splitlines() if not line.startswith("chmod")]
    assert calls[0].startswith("apt-get update")
    assert calls[1].startswith(
        "apt-get install -qq -y --no-install-recommends cmake gcc clang gcc-arm-none-eabi gcc-aarch64-linux-gnu"
    )
    for package in ("gcc-riscv64-unknown-elf", "qemu-system-arm", "qemu-system-misc", "qemu-user", "python3.11-venv"):
        assert package in calls[1].split()
    assert calls[2:] == [f"make {target} strict=1" for target in ("lint", "test", "counts")]


@needs_data
def test_the_mixed_row_keeps_its_first_and_last_layer_at_8_bits() -> None:
    bits = [q.format.bits for name, q in ds_cnn("mixed").tensors.items() if name.endswith(".weight")]
    assert bits[0] == bits[-1] == 8
    assert set(bits[1:-1]) == {4}


# -- the compatibility page -------------------------------------------------------------------------------------------


@pytest.mark.proves("verify.page")
@pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))
def test_two_rows_of_the_page_by_running() -> None:
    """A convolution is exact in C whatever its weights, ONNX refuses none but the codebook, and the reason stands below."""
    told: list[str] = []
    made = page([row for row in ROWS if row.name in ("linear", "softmax")], ("host-c", "onnxruntime"), told.append)
    lines = [line for line in made.splitlines() if line.startswith(("| linear", "| softmax"))]
    assert lines == told
    assert [line.split(" | ")[3] for line in lines] == ["exact"] * 7
    assert lines[0] == "| linear | int8 | int8 | exact | exact |"
    assert lines[3] == "| linear | cb16/channel | int8 | exact | refused (1) |"
    assert re.search(r"## Reasons\n\n1\. its weight is cb16@channel.*, and ONNX dequantizes integers", made)


@pytest.mark.proves("verify.page")
def test_the_committed_page_is_of_this_script() -> None:
    """Its head, as where every runtime is, and its rows in their order; what the cells say is only known by running."""
    lines = PAGE.read_text().splitlines()
    want = head(COLUMNS)
    assert lines[: len(want)] == want
    labels = [line.split(" | ")[:3] for line in lines[len(want) :] if line.startswith("| ")]
    assert labels == [[f"| {row.name}", w or "", a] for row in ROWS for w, a in formats(row)]
    cited = {int(n) for n in re.findall(r"(?:refused|not lowered) \((\d+)\)", "\n".join(lines))}
    given = [int(line.partition(".")[0]) for line in lines if re.match(r"\d+\. ", line)]
    assert given == list(range(1, len(given) + 1)) == sorted(cited)


def test_reasons_lose_what_changes_from_run_to_run() -> None:
    notes = Footnotes()
    said = "LiteRT refuses it: tflite/kernels/conv.cc:37 weights->type != kTfLiteInt8 (INT4 != INT8)Node number 0 (CONV) failed"
    assert reason(f"{said} to prepare.") == "LiteRT refuses it: weights->type != kTfLiteInt8 (INT4 != INT8)"
    assert reason("1 nodes of this model cannot be in a .tflite file:\n  conv (conv): its weights are fine | rare") == (
        "its weights are fine \\| rare"
    )
    assert notes.mark("x (add): its sums reach 12,345") == notes.mark("y (add): its sums reach -1") == "(1)"
    assert notes.mark("y (mul): its factors reach -1") == "(2)"
    assert list(notes.found.values()) == ["its sums reach 12,345", "its factors reach -1"]


def test_columns_are_runtimes() -> None:
    assert set(COLUMNS) <= set(compatibility.RUNTIMES)
    assert qemu.NAME in COLUMNS
