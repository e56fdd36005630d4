"""The command line: exit status, one-sentence errors, inert output, and the same results as the Python API."""

import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import roundel as rd
from roundel import cli
from roundel.cli import measure, models, options, text
from roundel.data import load_data
from roundel.formats import ALIASES
from roundel.formats.grid import TABLES

HOSTILE = "</script><img onerror=x>\x1b]0;owned\x07\x1b[31m"

NET = """
    import torch
    from torch import nn

    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))

    def hostile():
        net = nn.Module()
        net.register_module(%r, nn.Linear(3, 2))
        return net

    def broken():
        net = make()
        net[0].weight.data[1, 0, 2, 1] = float("nan")
        return net

    def slow():
        import time
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module that builds networks, and data whose labels are the float network's own answers."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "cli_nets.py").write_text(textwrap.dedent(NET % HOSTILE.replace(".", "")))
    here = os.getcwd()
    try:
        os.chdir(folder)
        net = rd.read("cli_nets:make")
    finally:
        os.chdir(here)
    x = torch.randn(96, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        y = net(x).argmax(1)
    np.savez(folder / "calibrate.npz", x=x[:32].numpy(), y=y[:32].numpy())
    np.savez(folder / "score.npz", x=x[32:].numpy(), y=y[32:].numpy())
    return folder


def np_batches(work: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stored = np.load(work / "calibrate.npz")
    return [(torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]))]


class Ran:
    """What one in-process call of `roundel` did."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def roundel(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(work)
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


def refused(ran: Ran, *words: str) -> None:
    """Exit status 2 and one line on stderr that holds ``words``."""
    assert (ran.status, ran.out) == (2, "")
    assert re.fullmatch(r"roundel: [^\n]+\n", ran.err)
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err


# -- help and formats -------------------------------------------------------------------------------------------------


@pytest.mark.proves("habits.help")
def test_every_command_has_help(roundel) -> None:  # type: ignore[no-untyped-def]
    assert {"formats", "inspect", "calibrate", "quantize", "evaluate", "diff", "demo", "export", "verify"} <= set(cli.cli.commands)
    assert roundel().out == roundel("--help").out
    for name, command in cli.cli.commands.items():
        ran = roundel(name, "--help")
        assert (ran.status, ran.err) == (0, "")
        assert name in ran.out
        assert command.help
        for option in command.params:
            shown = getattr(option, "help", None) or option.name in ("seed", "out")
            assert shown or option.param_type_name == "argument", f"{name}: {option.name} has no help"


@pytest.mark.proves("seam.torch-free")
def test_help_and_formats_load_no_torch() -> None:
    for args in (["--help"], ["quantize", "--help"], ["verify", "--help"], ["formats"], ["formats", "q4_k"]):
        code = (
            f"import sys, roundel.cli\ntry: roundel.cli.main({args})\nfinally: assert not {{'torch', 'numpy'}} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.proves("cli.formats")
def test_formats_lists_the_whole_catalogue(roundel) -> None:  # type: ignore[no-untyped-def]
    rows = json.loads(roundel("formats", "--json").out)
    grids = {str(rd.Format.parse(row["format"]).grid) for row in rows}
    assert set(TABLES) - {"e8m0"} <= grids  # e8m0 holds scales only
    texts = {row["format"] for row in rows}
    assert set(ALIASES) <= texts
    bits = {row["format"]: row["bits_per_weight"] for row in rows}
    side = 4096  # by hand: codes, then scales
    assert bits["int4/g32"] == 4 + 16 / 32
    assert bits["int8"] == 8 + 16 / side
    assert bits["cb16/channel"] == 4 + 16 * 16 / side
    assert bits["q4_k"] == 4.5
    plain = roundel("formats").out.splitlines()
    assert plain[0].split() == ["format", "canonical", "form", "bits/weight", "levels"]
    assert {line.split()[0] for line in plain[1:] if line and " " in line} >= texts


def test_formats_explains_one(roundel) -> None:  # type: ignore[no-untyped-def]
    told = json.loads(roundel("formats", "uint4/g128*fp16~uint4", "--json").out)
    assert told["canonical"] == "uint4/g128*fp16~uint4"
    assert (told["levels"], told["lowest"], told["highest"]) == (16, 0, 15)
    assert told["stored_beside_the_codes"] == [
        "one scale (fp16) per 128 columns of a row",
        "one zero point (uint4) per 128 columns of a row",
    ]
    assert "-1 -0.6962" in roundel("formats", "nf4").out
    refused(roundel("formats", "int4/gg"), "int4/gg", "position", "gN")
    refused(roundel("formats", "int4/g0"), "g32")


@pytest.mark.parametrize("text", ["int8:token", "int8/token:dynamic"])
def test_formats_explains_those_of_activations(roundel, text: str) -> None:  # type: ignore[no-untyped-def]
    told = json.loads(roundel("formats", text, "--json").out)
    assert told["canonical"] == "int8/token*fp32~int8:dynamic"
    assert "at run time" in told["when"]
    assert "one scale (fp32) per token" in told["stored_beside_the_codes"]
    assert "bits_per_weight" not in told


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("int4g32", "int4/g32"), ("itn4", "int4"), ("fp8e4m3", "fp8_e4m3fn"), ("INT8", "int8"), ("int4-g32", "int4/g32"),
        ("int4/32", "int4/g32"), ("nf4/32", "nf4/g32"), ("int4/g3 2", "int4/g32"), ("Q4K", "q4_k"),
    ],
)  # fmt: skip
def test_a_misspelt_format_is_answered_with_the_nearest(roundel, text: str, meant: str) -> None:  # type: ignore[no-untyped-def]
    rd.Format.parse(meant)
    refused(roundel("formats", text), f"; did you mean '{meant}'?\n")


@pytest.mark.parametrize(
    ("text", "meant"), [("int8:dynamik", "int8:dynamic"), ("static", "int8:static"), ("int8/dynamic", "int8:dynamic")]
)
def test_so_is_one_of_activations(roundel, text: str, meant: str) -> None:  # type: ignore[no-untyped-def]
    refused(roundel("quantize", "cli_nets:make", "--activations", text, "-o", "o.safetensors"), f"; did you mean '{meant}'?\n")


@pytest.mark.parametrize("text", ["int17", "log9", "int4/g0", "something"])
def test_what_is_no_slip_of_the_pen_is_not_guessed_at(text: str) -> None:
    with pytest.raises(rd.FormatError) as caught:
        rd.Format.parse(text)
    assert "did you mean" not in str(caught.value)


# -- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("cli.exit")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("quantise x", "quantize"),
        ("quantize", "MODEL"),
        ("quantize x --wieghts int8 -o y", "--weights"),
        ("quantize cli_nets:make", "--output"),
        ("quantize nowhere.tflite -o out.safetensors", "nowhere.tflite"),
        ("quantize cli_nets:make --weights int4/q32 -o out.safetensors", "gN"),
        ("quantize cli_nets:make --activations int8:often -o out.safetensors", "int8"),
        ("quantize cli_nets:make --data none.npz -o out.safetensors", "none.npz"),
        ("quantize cli_nets:nothing -o out.safetensors", "nothing"),
        ("quantize no_such_module:make -o out.safetensors", "no_such_module"),
        ("quantize cli_nets:make -o nowhere/out.safetensors", "nowhere"),
        ("quantize cli_nets -o out.safetensors", "cli_nets:factory"),
        ("quantize cli_nets --state score.npz -o out.safetensors", "cli_nets:factory"),
        ("quantize cli_nets:make --metric acc --data calibrate.npz -o out.safetensors", "'top1', 'perplexity'"),
        ("quantize cli_nets:make --metric top1 -o out.safetensors", "give --data"),
        ("quantize cli_nets:make --metric perplexity --data calibrate.npz -o out.safetensors", "use top1, cosine or mse"),
        ("quantize cli_nets:make --weights int8 --plan p.toml -o out.safetensors", "--plan says"),
        ("quantize cli_nets:make --activations int8 -o out.safetensors", "--data"),
        ("quantize cli_nets:make --seed x -o out.safetensors", "seed"),
        ("evaluate none.safetensors --against cli_nets:make --data score.npz", "none.safetensors"),
        ("inspect none.safetensors", "none.safetensors"),
        ("diff none.safetensors other.safetensors", "none.safetensors"),
        ("demo -o score.npz", "score.npz"),
        ("quantize cli_nets:make --effort much -o out.safetensors", "'fast', 'default'"),
        ("quantize cli_nets:make --solver magic -o out.safetensors", "'rtn', 'hqq', 'gptq'"),
        ("quantize cli_nets:make --solver gptq -o out.safetensors", "data"),
    ],
)
def test_bad_usage_is_one_sentence_and_status_2(roundel, work: Path, args: str, words: str) -> None:  # type: ignore[no-untyped-def]
    before = sorted(work.iterdir())
    refused(roundel(*args.split()), words)
    assert [p for p in sorted(work.iterdir()) if p.name != "__pycache__"] == [p for p in before if p.name != "__pycache__"]


@pytest.mark.proves("inputs.read-only")
def test_output_is_tried_before_any_work(roundel, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """With an output that cannot be written, the model is never opened."""
    monkeypatch.setattr("roundel.readers.read", lambda *a, **k: pytest.fail("the model was read"))
    refused(roundel("quantize", "cli_nets:make", "-o", tmp_path / "missing" / "o"), "missing")
    refused(roundel("quantize", "cli_nets:make", "-o", tmp_path), tmp_path.name)
    refused(
        roundel("evaluate", "a", "--against", "b", "--data", work / "score.npz", "--report", tmp_path / "missing" / "r.html"),
        "missing",
    )

    def full(path: object, flags: int, *_: object, **__: object) -> int:
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        ran = roundel("quantize", "cli_nets:make", "-o", tmp_path / "o")
    refused(ran, "Read-only file system")


def test_names_written_twice_are_the_same() -> None:
    from roundel.evaluate.scores import METRICS
    from roundel.quantize import EFFORTS
    from roundel.solvers import SOLVERS

    assert options.METRICS == METRICS
    assert tuple(EFFORTS) == models.EFFORTS
    assert tuple(SOLVERS) == models.SOLVERS


def test_a_shell_finds_the_command_of_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By name where it is on the path, else by where it lies, as in a `.venv` that nobody activated."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "roundel").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert measure._command() == ".venv/bin/roundel"
    monkeypatch.chdir(tools)
    monkeypatch.setenv("PATH", str(tools))
    assert measure._command() == "roundel"


def test_errors_name_hostile_paths_inertly(roundel) -> None:  # type: ignore[no-untyped-def]
    ran = roundel("inspect", f"{HOSTILE}.tflite")
    assert ran.status == 2
    assert "\x1b" not in ran.err
    assert "\x07" not in ran.err


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.proves("inputs.signals")
def test_signals(work: Path, sent: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "roundel.cli", "inspect", "cli_nets:slow"]
    with subprocess.Popen(
        command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test runner in the background ignores it
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.1)
        child.send_signal(sent)
        _, err = child.communicate(timeout=20)
    assert child.returncode == status
    assert re.fullmatch(r"\n?roundel: (interrupted|terminated)\n", err)


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m roundel.cli formats | head -n 1"
    ran = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    assert (ran.stdout.split()[0], ran.stderr) == ("format", "")


# -- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("cli.inspect", "api.inspect")
def test_inspect_a_module(roundel) -> None:  # type: ignore[no-untyped-def]
    found = json.loads(roundel("inspect", "cli_nets:make", "--json").out)
    net = rd.read("cli_nets:make")
    rows = {row["name"]: row for row in found["tensors"]}
    assert set(rows) == set(net.state_dict())
    weight = net.state_dict()["4.weight"]
    assert rows["4.weight"] == {
        "name": "4.weight", "op": "Linear", "shape": [4, 96], "format": "float32", "nbytes": 4 * 96 * 4,
        "low": weight.min().item(), "high": weight.max().item(),
    }  # fmt: skip
    assert found["nbytes"] == sum(t.nbytes for t in net.state_dict().values())
    assert found["ops"]["Conv2d"] == 1
    plain = roundel("inspect", "cli_nets:make").out
    assert re.search(r"^0\.weight +Conv2d +6x1x3x3 +216 B ", plain, re.M)


@pytest.mark.proves("inputs.names")
def test_hostile_layer_names_are_inert(roundel) -> None:  # type: ignore[no-untyped-def]
    for args in ((), ("--json",)):
        ran = roundel("inspect", "cli_nets:hostile", *args)
        assert ran.status == 0
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", ran.out + ran.err)
        assert "</script><img onerror=x>" in ran.out


def test_inspect_says_what_is_odd() -> None:
    net = torch.nn.Module()
    net.a = torch.nn.Parameter(torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]]))
    net.b = net.a
    net.empty = torch.nn.Parameter(torch.zeros(0, 4))
    net.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    net.register_buffer("count", torch.tensor(3))
    net.register_buffer("mask", torch.tensor([True, False]))
    net.far = torch.nn.Parameter(torch.empty(2, device="meta"))
    net.small = torch.nn.Parameter(torch.tensor([0.5, -1.5]).to(torch.float8_e4m3fn), requires_grad=False)
    found = rd.inspect(net)
    rows, notes = {row.name: row for row in found.tensors}, dict(found.notes)
    assert (rows["a"].low, rows["a"].high) == (-2.0, 1.0)
    assert notes["a"] == "holds 2 values that are not finite, the first at (0, 1)"
    assert found.notes.count(("b", "is tied to a: counted once")) == 1
    assert "empty" in notes["empty"]
    assert "complex" in notes["phase"]
    assert "meta" in notes["far"]
    assert (rows["count"].low, rows["mask"].low, rows["small"].low) == (3.0, 0.0, -1.5)
    assert found.nbytes == 16 + 0 + 16 + 8 + 2 + 8 + 2
    with pytest.raises(rd.InputError, match="got int"):
        rd.inspect(3)


def test_a_terminal_gets_a_table_and_a_pipe_gets_whole_names(roundel, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    long = "block." * 60 + "weight"
    monkeypatch.setenv("COLUMNS", "40")
    text.table(("name", "n"), [(long, "1"), ("x", "22")], "lr")
    plain = roundel("--version").out.splitlines()
    assert plain[:3] == [f"{'name':<{len(long)}}   n", f"{long}   1", f"{'x':<{len(long)}}  22"]


# -- the main job -----------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(roundel, work: Path) -> Path:  # type: ignore[no-untyped-def]
    out = work / "small.safetensors"
    if not out.exists():
        ran = roundel(
            "quantize", "cli_nets:make", "--weights", "int4/g32", "--data", "calibrate.npz", "--metric", "top1", "-o", out
        )
        assert ran.status == 0, ran.err
    return out


@pytest.mark.proves("cli.quantize", "cli.mirror")
def test_quantize_mirrors_the_api(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    out = work / "mirror.safetensors"
    ran = roundel(
        "quantize",
        "cli_nets:make",
        "--weights",
        "int4/g32",
        "--exclude",
        "4",
        "--data",
        "calibrate.npz",
        "--metric",
        "top1",
        "-o",
        out,
    )
    assert ran.status == 0, ran.err
    loaded, wanted = rd.load(out), rd.quantize(rd.read("cli_nets:make"), "int4/g32", exclude=("4",), data=np_batches(work))
    assert {n: str(t.format) for n, t in loaded.tensors.items()} == {n: str(t.format) for n, t in wanted.tensors.items()}
    for name, tensor in wanted.tensors.items():
        assert torch.equal(loaded.tensors[name].dequantize(), tensor.dequantize())
    assert f"{out}: " in ran.out
    assert "top1 on the calibration data" in ran.out
    assert "bits per parameter" in ran.out


@pytest.mark.proves("cli.default-format")
def test_without_a_format_int8_is_chosen_and_said(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    ran = roundel("quantize", "cli_nets:make", "-o", work / "default.safetensors")
    assert ran.status == 0, ran.err
    assert "note: weights: no format was named, so int8 was chosen" in ran.err
    assert {str(t.format) for t in rd.load(work / "default.safetensors").tensors.values()} == {"int8/channel*fp16"}


def test_static_activations_and_ranges(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    out = work / "static.safetensors"
    args = ("--weights", "int8", "--activations", "int8", "--ranges", "percentile:99.9", "--data", "calibrate.npz", "-o", out)
    ran = roundel("quantize", "cli_nets:make", *args)
    assert ran.status == 0, ran.err
    assert rd.load(out).activations
    assert "static" in roundel("inspect", out).out


def test_a_plan_file_decides(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    (work / "plan.toml").write_text('[[rules]]\npattern = "*"\nweight = "int8"\n[[rules]]\npattern = "4"\nweight = "nf4/g32"\n')
    ran = roundel("quantize", "cli_nets:make", "--plan", "plan.toml", "-o", work / "planned.safetensors")
    assert ran.status == 0, ran.err
    formats = {str(t.format) for t in rd.load(work / "planned.safetensors").tensors.values()}
    assert formats == {"int8/channel*fp16", "nf4/g32*fp16"}


def test_a_broken_weight_is_status_2_and_leaves_nothing(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    refused(roundel("quantize", "cli_nets:broken", "--weights", "int8", "-o", work / "broken.safetensors"), "weight", "1")
    assert not list(work.glob("*broken*"))


@pytest.mark.proves("cli.near-chance")
def test_a_float_model_near_chance_stops(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    stored = np.load(work / "calibrate.npz")
    np.savez(work / "wrong.npz", x=stored["x"], y=(stored["y"] + 1) % 4)
    refused(
        roundel("quantize", "cli_nets:make", "--data", "wrong.npz", "-o", "chance.safetensors"),
        "0 of 32",
        "chance",
        "preprocessing",
    )
    assert not (work / "chance.safetensors").exists()


@pytest.mark.proves("cli.strict", "cli.exit")
def test_strict_makes_a_fallback_an_error(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    """Weights of 1e-8 have no scale in fp16: fp32 with a note, or status 1 under --strict. A short group is no fall-back."""
    (work / "tiny_net.py").write_text(
        "import torch\n\ndef make():\n    net = torch.nn.Linear(9, 3)\n    net.weight.data.mul_(1e-8)\n    return net\n"
    )
    args = ("quantize", "tiny_net:make", "--weights", "int8", "-o", "strict.safetensors")
    ran = roundel(*args, "--strict")
    assert (ran.status, ran.out) == (1, "")
    assert re.fullmatch(r"roundel: strict: [^\n]+fp16[^\n]+\n", ran.err)
    assert not (work / "strict.safetensors").exists()
    ran = roundel(*args)
    assert ran.status == 0
    assert "fp32" in ran.err
    assert roundel(*args[:3], "int4/g32*fp32", *args[4:], "--strict").status == 0


def test_effort_and_solver_reach_the_artifact(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    """fast without a word; what was asked is in the artifact; effort that has no effect is said."""
    out = work / "effort.safetensors"
    args = ("quantize", "cli_nets:make", "--weights", "int3", "-o", out)

    def asked(*more: object) -> tuple[str, str]:
        ran = roundel(*args, *more)
        assert ran.status == 0, ran.err
        said.append("note: effort: --effort default had no effect" in ran.err)
        made = rd.load(out).provenance
        return str(made["effort"]), str(made["solver"])

    said: list[bool] = []
    assert asked() == ("fast", "rtn")
    assert asked("--data", "calibrate.npz", "--effort", "default")[0] == "default"
    assert asked("--data", "calibrate.npz", "--solver", "gptq") == ("fast", "gptq")
    assert said == [False, False, False]
    asked("--effort", "default")
    asked("--data", "calibrate.npz", "--effort", "default", "--solver", "rtn")
    assert said[3:] == [True, False]


@pytest.mark.proves("cli.preprocess", "file.preprocess")
def test_preprocessing_is_stored_and_used_again(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    (work / "steps.toml").write_text("scale = 2.0\nmean = [0.5]\n")
    stored = np.load(work / "calibrate.npz")
    np.savez(work / "unlabelled.npz", x=stored["x"])
    out = work / "steps.safetensors"
    ran = roundel(
        "quantize", "cli_nets:make", "--weights", "int3", "--data", "unlabelled.npz", "--preprocess", "steps.toml", "-o", out
    )
    assert ran.status == 0, ran.err
    q, net = rd.load(out), rd.read("cli_nets:make")
    assert q.provenance["preprocess"] == {"scale": 2.0, "mean": [0.5]}
    told = json.loads(roundel("evaluate", out, "--against", "cli_nets:make", "--data", "unlabelled.npz", "--json").out)
    x = torch.from_numpy(stored["x"]) * 2 - 0.5
    with torch.no_grad():
        p, r = net(x).log_softmax(1), q.module(x).log_softmax(1)
    assert told["kl"] == pytest.approx((p.exp() * (p - r)).sum(1).mean().item(), rel=1e-3)


@pytest.mark.proves("cli.preprocess")
def test_preprocessing_is_done_once(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    """Ranges are those of x * 2 - 0.5, as by hand; and it is stored without data, too."""
    (work / "steps.toml").write_text("scale = 2.0\nmean = [0.5]\n")
    x = np.load(work / "calibrate.npz")["x"]
    np.savez(work / "once.npz", x=x)
    out = work / "once.safetensors"
    more = ("--activations", "int8", "--ranges", "minmax", "--data", "once.npz")
    assert roundel("quantize", "cli_nets:make", "-o", out, "--preprocess", "steps.toml", *more).status == 0
    wanted = rd.quantize(rd.read("cli_nets:make"), "int8", "int8", data=[torch.from_numpy(x) * 2 - 0.5], ranges="minmax")
    site = rd.load(out).structure.inputs[0]
    one, two = (q.activations[site].params for q in (rd.load(out), wanted))
    assert one is not None
    assert torch.equal(one.scale, two.scale)
    assert roundel("quantize", "cli_nets:make", "-o", out, "--preprocess", "steps.toml").status == 0
    assert rd.load(out).provenance["preprocess"] == {"scale": 2.0, "mean": [0.5]}


def test_weights_that_no_file_gave_are_mentioned(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    torch.save(rd.read("cli_nets:make").state_dict(), work / "state.pt")
    out, said = work / "state.safetensors", "the weights are whatever cli_nets:make makes"
    assert said in roundel("quantize", "cli_nets:make", "-o", out).err
    assert said not in roundel("quantize", "cli_nets:make", "--state", "state.pt", "-o", out).err
    assert said in roundel("evaluate", out, "--against", "cli_nets:make", "--data", "score.npz", "--json").err


def test_labels_alone_make_quantize_say_the_score(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    x = np.load(work / "calibrate.npz")["x"]
    np.savez(work / "unlabelled.npz", x=x)
    args = ("quantize", "cli_nets:make", "-o", work / "score.safetensors", "--data")
    assert "top1 on the calibration data" in roundel(*args, "calibrate.npz").out.splitlines()[-1]
    assert "calibration data" not in roundel(*args, "unlabelled.npz").out


def test_an_option_without_effect_is_said(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    args = ("quantize", "cli_nets:make", "--data", "calibrate.npz", "-o", work / "ranges.safetensors", "--ranges", "minmax")
    assert "note: ranges: --ranges minmax had no effect" in roundel(*args).err
    assert "no effect" not in roundel(*args, "--activations", "int8").err
    assert "no effect" not in roundel(*args[:-2]).err


def test_inputs_of_another_scale_are_noticed(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    x, out = np.load(work / "score.npz")["x"], work / "scale.safetensors"
    np.savez(work / "bytes.npz", x=x * 64 + 128)
    np.savez(work / "named.npz", images=x)
    args = ("evaluate", out, "--against", "cli_nets:make", "--data")
    assert roundel("quantize", "cli_nets:make", "--activations", "int8", "--data", "calibrate.npz", "-o", out).status == 0
    assert "outside the calibrated range" in roundel(*args, "bytes.npz").err
    assert "calibrated" not in roundel(*args, "score.npz").err
    ran = roundel("quantize", "cli_nets:make", "--data", "named.npz", "-o", work / "named.safetensors")
    refused(ran, "names its inputs 'images': call them x and y")


@pytest.mark.proves("inputs.empty-calibration")
def test_empty_data_is_refused_before_the_model_is_read(roundel, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("roundel.readers.read", lambda *a, **k: pytest.fail("the model was read"))
    np.savez(work / "empty.npz", x=np.zeros((0, 1, 6, 6), np.float32))
    refused(roundel("quantize", "cli_nets:make", "--data", "empty.npz", "-o", work / "o.safetensors"), "empty.npz")


@pytest.mark.proves("inputs.paths")
def test_strange_paths_work(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    """Blanks, 255 bytes, and bytes that are not UTF-8."""
    for name in ("with a blank.safetensors", "n" * 243 + ".safetensors", os.fsdecode(b"caf\xe9.safetensors")):
        ran = roundel("quantize", "cli_nets:make", "-o", work / name)
        assert ran.status == 0, ran.err
        assert (work / name).exists()
        assert roundel("inspect", work / name).status == 0


@pytest.mark.proves("cli.mirror")
def test_every_option_is_an_argument_of_the_api() -> None:
    """What a command takes is what the functions it calls take; the rest is where and how to print."""
    from roundel.demo import demo
    from roundel.verify import vectors

    shown = {"out", "folder", "as_json", "page", "max_kl", "max_flips", "format_text", "listing"}
    calls = {
        "formats": [], "inspect": [rd.inspect, rd.read], "calibrate": [rd.calibrate, rd.read, load_data], "demo": [demo],
        "quantize": [rd.quantize, rd.read, rd.evaluate, rd.QModel.save],
        "tune": [rd.tune, rd.read], "evaluate": [rd.evaluate, rd.read, rd.load, load_data], "diff": [rd.diff],
        "export": [rd.export, vectors, load_data], "verify": [rd.verify, rd.verify_log, load_data],
    }  # fmt: skip
    renamed = {"artifact": "q", "first": "a", "second": "b", "board_log": "log"}
    for name, functions in calls.items():
        known = {p for function in functions for p in inspect.signature(function).parameters}
        wanted = {renamed.get(p.name, p.name) for p in cli.cli.commands[name].params} - shown
        wanted -= {"against"} if name == "tune" else set()  # the float model, by the name that evaluate has for it
        wanted -= {"strict"} if name == "verify" else set()  # what an absent runtime means is for the exit status
        model = {"model"} if name in ("quantize", "inspect", "calibrate") else set()
        assert wanted - known - model == set(), name


@pytest.mark.proves("cli.evaluate", "evaluate.json")
def test_evaluate(roundel, work: Path, artifact: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "report.html"
    args = ("evaluate", artifact, "--against", "cli_nets:make", "--data", "score.npz", "--metric", "top1")
    ran = roundel(*args, "--json", "--report", page, "--max-kl", 10, "--max-flips", 1)
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    net, q = rd.read("cli_nets:make"), rd.load(artifact)
    x = torch.from_numpy(np.load(work / "score.npz")["x"])
    with torch.no_grad():
        p, r = net(x).log_softmax(1), q.module(x).log_softmax(1)
    assert told["kl"] == pytest.approx((p.exp() * (p - r)).sum(1).mean().item(), rel=1e-3, abs=1e-7)
    assert told["flips"] == pytest.approx((p.argmax(1) != r.argmax(1)).float().mean().item())
    assert told["metric_float"] == 1.0
    assert artifact.name in page.read_text(encoding="utf-8")
    plain = roundel(*args).out
    for word in ("size", "top1", "difference", "KL divergence", "flips", "SQNR", "latency"):
        assert re.search(rf"^{word} +\S", plain, re.M), word


@pytest.mark.proves("cli.exit")
def test_a_missed_check_is_status_1(roundel, artifact: Path) -> None:  # type: ignore[no-untyped-def]
    args = ("evaluate", artifact, "--against", "cli_nets:make", "--data", "score.npz")
    ran = roundel(*args, "--max-kl", 1e-12)
    assert ran.status == 1
    assert re.fullmatch(r"roundel: the KL divergence is [^\n]+ above the limit [^\n]+", ran.err.splitlines()[-1])


@pytest.mark.proves("cli.inspect")
def test_inspect_an_artifact(roundel, artifact: Path) -> None:  # type: ignore[no-untyped-def]
    found = json.loads(roundel("inspect", artifact, "--json").out)
    assert found["kind"] == "quantized"
    assert "int4/g32*fp16" in {row["format"] for row in found["tensors"]}
    assert found["nbytes"] == rd.load(artifact).nbytes


@pytest.mark.proves("cli.diff")
def test_diff(roundel, artifact: Path, work: Path) -> None:  # type: ignore[no-untyped-def]
    other = work / "other.safetensors"
    assert roundel("quantize", "cli_nets:make", "--weights", "int3", "-o", other).status == 0
    ran = roundel("diff", artifact, other)
    assert ran.status == 0, ran.err
    assert "int4/g32*fp16" in ran.out
    assert "int3/channel*fp16" in ran.out
    assert json.loads(roundel("diff", artifact, other, "--json").out)


@pytest.mark.proves("cli.calibrate")
def test_calibrate(roundel, work: Path) -> None:  # type: ignore[no-untyped-def]
    ran = roundel("calibrate", "cli_nets:make", "--data", "calibrate.npz", "-o", "ranges.json")
    assert ran.status == 0, ran.err
    ranges = json.loads((work / "ranges.json").read_text())
    x = np.load(work / "calibrate.npz")["x"]
    spans = [(site["min"], site["max"]) for site in ranges.values()]
    assert any(low == pytest.approx(float(x.min())) and high == pytest.approx(float(x.max())) for low, high in spans)
    assert all(site in ran.out for site in ranges)


@pytest.mark.proves("cli.progress")
def test_progress_is_for_terminals_only(roundel, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A pipe sees nothing (the other tests compare stderr); on a terminal a bar says the stage and the time left."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with text.progress_bars() as step:
        assert step is not None
        step("calibrating\x1b[2J", 1, 4)
        step("calibrating\x1b[2J", 4, 4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with text.progress_bars() as step:
        assert step is None
