"""The bench's harness with stand-ins for toolkits: what each may do wrong is a row, and the table is made of frozen figures."""

import json
import math
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import click
import click.testing
import distil
import harness
import numpy as np
import onnxruntime
import pytest
import suites
import torch
from conftest import needs_data
from harness import Peer, Row, Setting, beaten, lines, page, peers, read, run, score, sentence, write
from task import bits_of
from torch import nn

from roundel.data import Batch
from roundel.errors import InputError

N, CLASSES = 40, 5


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three numbers; the float model's outputs are a fixed matrix times them."""
    folder = tmp_path_factory.mktemp("suite")
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(N, 3)).astype("f4"), draw.normal(size=(3, CLASSES)).astype("f4")
    np.save(folder / "score.npy", x)
    np.save(folder / "calibrate-1.npy", x[:7])
    np.save(folder / "matrix.npy", w)
    np.savez(folder / "truth.npz", outputs=x @ w, labels=(x @ w).argmax(1))
    return folder


def peer(tmp_path: Path, body: str, limit: float = 60.0) -> Peer:
    """A peer whose ``quantize(task)`` is ``body``, in the environment of this process."""
    file = tmp_path / "fake.py"
    start = "import os, sys, time\nimport numpy as np\nfrom task import Quantized, Refused\n\ndef quantize(task):\n"
    file.write_text(start + textwrap.indent(textwrap.dedent(body), "    "))
    return Peer(file, "Fake", "numpy", (), {"default": Setting("", ("W4A8",), suites=("tiny",), limit=limit)}, Path(sys.executable))


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


ROW = Row("tiny", "fake", "default", "W4A8", 1)

HONEST = """
    assert not (task.suite / "told.json").exists() and "truth" not in str(vars(task))
    w = np.load(task.suite / "matrix.npy")
    w = np.round(w * task.weights) / task.weights
    assert (task.even(5), task.even(7), task.even(50)) == (1, 7, 7)
    env = [os.environ["OMP_NUM_THREADS"], os.environ["HF_HUB_OFFLINE"]]
    told = [*env, len(task.calibrate()), task.activations, task.seed, task.minutes]
    return Quantized(lambda x: x @ w, {task.weights: 1}, {task.activations: 2}, " ".join(map(str, told)))
"""


@pytest.mark.proves("bench.cnn")
def test_a_peer_that_answers_is_scored_by_the_harness(suite: Path, tmp_path: Path) -> None:
    """Against sums written out here; it runs on one thread and is told not to look at the network."""
    found = run(ROW, peer(tmp_path, HONEST), suite, minutes=0.5)
    assert (found.status, found.reason, found.note) == ("ok", "", "1 1 7 8 1 0.5")
    x, w = np.load(suite / "score.npy"), np.load(suite / "matrix.npy")
    real, made = x @ w, x @ (np.round(w * 4) / 4)
    p, q = (np.exp(y.astype("f8")) / np.exp(y.astype("f8")).sum(1, keepdims=True) for y in (real, made))
    divergences = [sum(a * math.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    assert found.kl == pytest.approx(sum(divergences) / N, rel=1e-5)
    assert found.flips == pytest.approx(float((real.argmax(1) != made.argmax(1)).mean()))
    assert found.top1 == pytest.approx(1 - found.flips)
    assert found.interval is not None
    assert found.interval[0] < found.kl < found.interval[1]
    assert (dict(found.weights), dict(found.activations)) == ({"4": 1}, {"8": 2})
    assert found.version == np.__version__
    assert found.seconds is not None
    assert 0 <= found.seconds < 10
    assert found.peak is not None
    assert found.peak > 1e6


WRONG = {
    "raises": ("raise RuntimeError('no kernel for this')", "failed", "RuntimeError: no kernel for this"),
    "raises, and a progress bar ends after that": (
        "print('ValueError: bad scale', file=sys.stderr); print('100%|###|'); sys.exit(3)", "failed", "ValueError: bad scale"),
    "dies": ("os.kill(os.getpid(), 9)", "failed", "exit status -9, nothing printed"),
    "imports what is not there": ("import no_such_toolkit", "failed", "ModuleNotFoundError: No module named 'no_such_toolkit'"),
    "gives nothing back": ("return None", "failed", "AttributeError: 'NoneType' object has no attribute 'run'"),
    "leaves without an answer": ("print('{}'); os._exit(0)", "rubbish", "no answer to read: FileNotFoundError"),
    "writes words for figures": (
        "(task.scratch / 'told.json').write_text('fine'); os._exit(0)", "rubbish", "no answer to read: JSONDecodeError"),
    "writes a list": ("(task.scratch / 'told.json').write_text('[1]'); os._exit(0)", "rubbish", "no answer to read: TypeError"),
    "answers too few": (
        "return Quantized(lambda x: x[:1])", "rubbish", f"outputs of shape [1, 3] and type float32; asked for [{N}, 5]"),
    "answers NaN": (f"return Quantized(lambda x: np.full((len(x), {CLASSES}), np.nan))", "rubbish", "batch 0: 200 of 200 outputs"),
    "has no such thing": ("raise Refused('no weights of 4 bits')", "refused", "no weights of 4 bits"),
}  # fmt: skip


@pytest.mark.proves("bench.cnn")
@pytest.mark.parametrize("what", WRONG)
def test_what_a_peer_does_wrong_is_a_row(what: str, suite: Path, tmp_path: Path) -> None:
    body, status, reason = WRONG[what]
    found = run(ROW, peer(tmp_path, body), suite)
    assert found.status == status, found
    assert found.reason.startswith(reason), found.reason
    assert (found.kl, found.seconds, found.key) == (None, None, ROW.key)


@pytest.mark.proves("bench.cnn")
def test_a_peer_that_hangs_is_stopped_with_its_children(suite: Path, tmp_path: Path) -> None:
    body = f"""
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        time.sleep(60)
    """
    found = run(ROW, peer(tmp_path, body, limit=5.0), suite)
    assert (found.status, found.reason) == ("too long", "over 5 s")
    pid, end = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:  # a signal that was sent takes a moment
        time.sleep(0.05)
    assert not alive(pid)


def test_no_peer_outlives_a_harness_that_is_stopped(suite: Path, tmp_path: Path) -> None:
    given = peer(tmp_path, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '.')\ntime.sleep(60)")
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "tiny").symlink_to(suite)
    (suite / "suite.json").write_text("{}")
    code = textwrap.dedent(f"""
        import sys; sys.path[:0] = [{str(harness.HERE)!r}]
        import harness, suites
        from pathlib import Path
        setting = harness.Setting("", ("W4A8",), suites=("tiny",))
        fake = harness.Peer(Path({str(given.file)!r}), "Fake", "numpy", (), {{"default": setting}}, Path(sys.executable))
        harness.peers, suites.SUITES = lambda *a, **k: {{"fake": fake}}, {{"tiny": None}}
        harness.cli(["run", "--cache", {str(tmp_path)!r}, "--record", {str(tmp_path / "r.json")!r}, "--seed", "1"])
    """)
    main = subprocess.Popen([sys.executable, "-c", code])
    pid, end = tmp_path / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text().endswith(".")) and time.monotonic() < end:
        time.sleep(0.1)
    main.terminate()
    assert main.wait(30) == 143
    state = Path("/proc") / pid.read_text().rstrip(".") / "stat"
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.proves("bench.cnn")
def test_a_peer_that_is_not_installed_is_a_row_that_says_how(suite: Path, tmp_path: Path) -> None:
    given = peer(tmp_path, HONEST)
    found = run(ROW, Peer(given.file, "Fake", "fake", (), given.settings, tmp_path / "none" / "bin" / "python"), suite)
    assert (found.status, found.reason) == ("missing", "not installed: python bench/harness.py install --peer fake")


def test_outputs_of_another_type_are_refused(suite: Path) -> None:
    with pytest.raises(InputError, match="float64; asked for"):
        score(np.zeros((N, CLASSES)), suite)


@pytest.mark.proves("bench.cnn")
def test_a_run_on_record_is_not_repeated(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake that counts its calls: once, then not, then --again; a failing one does not stop the next."""
    good = peer(tmp_path, HONEST.replace("w = np", f"open({str(tmp_path / 'calls')!r}, 'a').write('x')\n    w = np", 1))
    (tmp_path / "bad").mkdir()
    bad = peer(tmp_path / "bad", "raise RuntimeError('boom')")
    monkeypatch.setattr(harness, "peers", lambda table=None, cache=None: {"bad": bad, "good": good})
    monkeypatch.setattr(suites, "SUITES", {"tiny": None})
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "tiny").symlink_to(suite)
    (suite / "suite.json").write_text(json.dumps(ABOUT["suites"]["tiny"]))  # type: ignore[index]
    record = tmp_path / "out" / "r.json"

    def call(*more: str) -> click.testing.Result:
        given = ["run", "--cache", str(tmp_path), "--record", str(record), "--seed", "1", *more]
        return click.testing.CliRunner().invoke(harness.cli, given)

    for more, calls in (((), 1), ((), 1), (("--again",), 2), (("--bits", "W8A8", "--again"), 2), (("--kind", "qat", "--again"), 2)):
        done = call(*more)
        assert done.exit_code == 0, done.output
        assert len((tmp_path / "calls").read_text()) == calls
    assert [(r.peer, r.status) for r in read(record)] == [("bad", "failed"), ("good", "ok")]
    assert record.with_suffix(".md").read_text() == page(record)
    assert "RuntimeError: boom" in record.with_suffix(".md").read_text()
    assert "none: there is only bad, good" in call("--peer", "none").output


# -- the record and the table -----------------------------------------------------------------------------------------

ABOUT = {
    "title": "T", "command": "`make bench-cnn`", "date": "2026-11-23", "machine": "m",
    "suites": {"tiny": {"weights": 2, "sites": 3, "calibrate": 7, "score": N, "top1": 0.5}},
}  # fmt: skip


def row(who: str, kl: float | None, seconds: float | None, seed: int = 1, setting: str = "default", **more: object) -> Row:
    given: dict[str, object] = {"kl": kl, "seconds": seconds}
    if kl is not None:
        given |= {"flips": 0.1, "top1": 0.5, "interval": (0.9 * kl, 1.1 * kl), "peak": 5_000_000}
        given |= {"weights": {"4": 2}, "activations": {"8": 3}}
    return Row("tiny", who, setting, "W4A8", seed, version="1.0", **(given | more))  # type: ignore[arg-type]


@pytest.mark.proves("bench.cnn")
def test_the_table_is_made_of_the_frozen_file(tmp_path: Path) -> None:
    """Means over the seeds that came through, every failure by name, sites that stayed float marked."""
    rows = [
        row("ours", 0.02, 10.0), row("ours", 0.04, 20.0, seed=2),
        row("fake", 0.5, 1.0, activations={"8": 2}, note="a | b"), row("fake", None, None, seed=2, status="failed", reason="boom"),
        row("lost", None, None, status="missing", reason="not installed"),
    ]  # fmt: skip
    path = tmp_path / "r.json"
    write(path, reversed(rows), ABOUT)
    assert {r.key for r in read(path)} == {r.key for r in rows}
    assert [r for r in read(path) if r.peer == "ours"] == rows[:2]
    text = page(path)
    assert (
        "| ours 1.0 | default | 2 | 0.0300 [0.0180, 0.0440] | 10.00 % | 50.00 % | 15.0 | 5 | 2 x 4 of 2 | 3 x 8 of 3 |  |" in text
    )
    assert (
        "| fake 1.0 | default | 1 | 0.5000 [0.4500, 0.5500] | 10.00 % | 50.00 % | 1.0 | 5 | 2 x 4 of 2 | 2 x 8 of 3 † | a / b |"
        in text
    )
    assert "| lost 1.0 | default | 0 | missing | | | | | | | not installed |" in text
    assert "W4A8: of what was run, no peer is at once better in KLD and faster than any of ours (default): true." in text
    before = path.read_bytes()
    write(path, rows, ABOUT)
    assert path.read_bytes() == before  # in whatever order the runs came
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {12}


@pytest.mark.proves("bench.cnn")
@pytest.mark.parametrize(
    ("kl", "seconds", "wins"), [(0.01, 5.0, True), (0.01, 10.0, False), (0.02, 5.0, False), (0.01, 15.0, False), (0.5, 1.0, False)]
)
def test_a_peer_wins_only_where_it_is_better_and_faster(kl: float, seconds: float, wins: bool) -> None:
    found = lines([row("ours", 0.02, 10.0), row("fake", kl, seconds), row("lost", None, None, status="failed", reason="x")])
    assert [[them.name for them in better] for _, better in beaten(found)] == [["fake default"] if wins else []]
    told = sentence(found, "W4A8")
    assert told.endswith(": true.") is not wins
    if wins:
        assert told.endswith("**false**: fake default (0.0100 in 5.0 s) over ours default (0.0200 in 10.0 s).")


def test_intervals_that_meet_are_named() -> None:
    """Ours is 0.02 in [0.018, 0.022]; intervals reach a tenth to both sides."""
    for kl, meet in ((0.0170, True), (0.0160, False)):
        told = sentence(lines([row("ours", 0.02, 10.0), row("fake", kl, 5.0)]), "W4A8")
        assert ("over ours default (0.0200 in 10.0 s, intervals overlap)." in told) is meet
        assert "**false**" in told


def test_each_of_our_settings_is_judged() -> None:
    found = lines([row("ours", 0.02, 10.0), row("ours", 0.3, 2.0, setting="fast"), row("fake", 0.2, 1.0)])
    assert "over ours fast" in sentence(found, "W4A8")
    assert "over ours default" not in sentence(found, "W4A8")
    assert sentence(lines([row("fake", 0.2, 1.0)]), "W4A8") == "W4A8: nothing to compare."


@pytest.mark.proves("bench.cnn")
def test_the_frozen_table_is_what_its_file_says() -> None:
    for path in sorted(harness.RESULTS.glob("*.json")):
        assert path.with_suffix(".md").read_text() == page(path), f"python bench/harness.py table --record {path.name}"


@pytest.mark.proves("bench.cnn")
def test_every_peer_is_pinned_and_every_width_can_be_read() -> None:
    table = tomllib.loads((harness.HERE / "peers.toml").read_text())
    found = peers()
    images = {name for name, given in found.items() if any(setting.bits for setting in given.settings.values())}
    assert images == {"ours", "onnxruntime", "nncf", "aimet", "brevitas", "torchao", "mct"}
    assert table["torch"]
    for name, given in found.items():
        assert given.file.is_file(), name
        assert given.tokens is not None
        assert given.tokens.is_file(), name
        assert given.package.split("==")[0] in " ".join(given.requires) or name == "ours"
        assert all("==" in text or text in ("sympy", "tqdm", "accelerate", "gguf") for text in given.requires), given.requires
        for setting in given.settings.values():
            assert all(bits_of(text)[0] <= 8 for text in setting.bits)
            assert all(2 < float(text) < 9 for text in setting.sizes)
            assert setting.bits or setting.sizes
            assert set(setting.suites) <= {*suites.SUITES, *suites.TEXTS}
    with pytest.raises(ValueError, match="written as in W4A8"):
        bits_of("4/8")


def test_environments_lie_outside_the_repository() -> None:
    assert suites.ROOT not in harness.CACHE.parents
    for name, given in peers(cache=Path("/elsewhere")).items():
        assert given.python == (Path(sys.executable) if name == "ours" else Path("/elsewhere") / name / "bin" / "python")


# -- suites -----------------------------------------------------------------------------------------------------------


def test_a_suite_needs_nothing_of_roundel(tmp_path: Path) -> None:
    """The model runs in a process without this package, and as ONNX; every draw is the same images in another order."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.randn(12, 1, 8, 8)
    made = suites.Suite(
        lambda: net, lambda: [Batch((x[i : i + 1],)) for i in range(8)], lambda: [Batch((x,), {}, torch.arange(12) % 3)]
    )
    suites.make(made, tmp_path)
    code = (
        "import sys, torch, numpy as np; m = torch.load('model.pt', weights_only=False).eval(); x = np.load('score.npy'); "
        "np.save('y.npy', m(torch.from_numpy(x)).detach().numpy()); assert 'roundel' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    real = np.load(tmp_path / "truth.npz")["outputs"]
    assert np.allclose(np.load(tmp_path / "y.npy"), real, atol=1e-6)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(["y"], {"x": x.numpy()})[0], real, atol=1e-4)
    draws = [np.load(tmp_path / f"calibrate-{seed}.npy") for seed in suites.SEEDS]
    assert not np.array_equal(draws[0], draws[1])
    for draw in draws:
        assert np.array_equal(np.sort(draw, axis=0), np.sort(x[:8].numpy(), axis=0))
    told = json.loads((tmp_path / "suite.json").read_text())
    assert (told["weights"], told["calibrate"], told["score"]) == (2, 8, 12)


@needs_data
@pytest.mark.parametrize("name", suites.SUITES)
def test_the_plain_networks_are_the_models_that_they_stand_for(name: str) -> None:
    made = suites.SUITES[name]
    case = suites.CASES[{"resnet20": "ResNet-20", "dscnn": "DS-CNN"}[name]]
    with torch.no_grad():
        real = case.model()(*case.score()[0].args)
        plain = made.model()(*made.score()[0].args)
    if name == "dscnn":
        plain = plain.softmax(1)  # left out of the suite: toolkits quantize it or do not
    assert torch.allclose(plain, real, atol=1e-5)
    assert all(type(m).__module__.startswith(("torch.", "suites")) for m in made.model().modules())


# -- the training loop ------------------------------------------------------------------------------------------------


def test_a_shift_of_none_is_the_image_or_its_mirror() -> None:
    x = torch.randn(50, 2, 6, 6)
    seen = distil.shaken(x, torch.Generator().manual_seed(0), shift=0)
    same = [(torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(seen, x, strict=True)]
    assert all(a != b for a, b in same)
    assert {a for a, _ in same} == {True, False}


def test_a_student_learns_for_the_time_that_it_is_given() -> None:
    """Half a second brings a network nearer to another of its kind; parameters of two axes move by their own size."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, 6, 6)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval() for _ in range(2))

    def apart() -> float:
        with torch.no_grad():
            return float(
                nn.functional.kl_div(student(x).log_softmax(1), teacher(x).log_softmax(1), log_target=True, reduction="batchmean")
            )

    before, rates = apart(), distil.plain_groups(student)
    rms = float(student[1].weight.detach().square().mean().sqrt())
    assert [group["lr"] for group in rates] == pytest.approx([3e-3 * rms, 1e-3])
    assert distil.distil(student, teacher, x, [{**group, "lr": 1e-2} for group in rates], 0.5, seed=1) > 5
    assert apart() < 0.7 * before
