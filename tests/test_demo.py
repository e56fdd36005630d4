"""The demo: disjoint data, a float model worth quantizing, one screen of honest numbers, and a next command that runs."""

import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch

import roundel as rd
from roundel import cli
from roundel.demo import RECIPES, DigitsNet, digits, train


def test_the_three_sets_are_disjoint_and_repeat() -> None:
    from sklearn.datasets import load_digits

    sets = digits(0)
    parts = [sets.train, sets.calibrate, sets.score]
    assert [len(y) for _, y in parts] == [1000, 100, 697]
    assert sum(y.sum().item() for _, y in parts) == load_digits().target.sum()
    everything = torch.cat([x for x, _ in parts]).reshape(1797, 64) * 16
    raw = torch.tensor(load_digits().data, dtype=torch.float32)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, raw.tolist()))  # each digit exactly once
    assert torch.equal(digits(0).score[0], sets.score[0])
    assert not torch.equal(digits(1).score[0], sets.score[0])


def test_training_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    data = digits(0).train
    torch.manual_seed(11)
    before = torch.get_rng_state()
    a, b = train(data, epochs=1, seed=4).state_dict(), train(data, epochs=1, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(train(data, epochs=1, seed=5).state_dict()["linear.weight"], a["linear.weight"])


class Screen:
    """What one run of `roundel demo` printed and wrote."""

    def __init__(self, folder: Path, out: str, cpu: float) -> None:
        self.folder, self.out, self.cpu = folder, out, cpu
        self.rows = out.partition("\n\n")[0].splitlines()[2:]  # below the head and the float model


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    """One whole run, with one thread as everywhere in the tests."""
    import contextlib
    import io

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "a folder"
    before, out, started = signal.getsignal(signal.SIGTERM), io.StringIO(), time.process_time()
    try:
        with contextlib.redirect_stdout(out):
            cli.main(["demo", "-o", str(folder)])
    finally:
        signal.signal(signal.SIGTERM, before)
    return Screen(folder, out.getvalue(), time.process_time() - started)


@pytest.mark.proves("cli.demo")
def test_every_mode_and_width_has_a_row(screen: Screen) -> None:
    wanted = [(weights, mode) for mode, _, formats in RECIPES for weights in formats]
    assert [tuple(line.split()[:2]) for line in screen.rows] == wanted
    assert {mode for _, mode in wanted} == {"weight-only", "dynamic", "static"}
    widths = {rd.Format.parse(weights).bits for weights, _ in wanted}
    assert {8, 4, 3, 2} <= widths
    names = {weights for weights, _ in wanted}
    assert {"int8", "int4", "int4/g32", "nf4/g32", "log4", "cb16/channel", "int3", "int2", "ternary"} <= names


@pytest.mark.proves("cli.demo")
def test_it_takes_at_most_a_minute(screen: Screen) -> None:
    """In processor time: with one thread that is the wall clock of an idle machine, and a busy one cannot spoil it."""
    assert screen.cpu <= 60


@pytest.mark.proves("cli.demo")
def test_it_fits_one_screen(screen: Screen) -> None:
    lines = screen.out.splitlines()
    assert len(lines) <= 40
    assert max(len(line) for line in lines[: len(screen.rows) + 2]) <= 100


@pytest.mark.proves("cli.demo")
def test_the_float_model_is_good_and_int8_keeps_it(screen: Screen) -> None:
    sets, net = digits(0), DigitsNet()
    float_line = next(line for line in screen.out.splitlines() if line.startswith("float"))
    assert float(re.search(r"([\d.]+) %", float_line)[1]) >= 97.0  # type: ignore[index]
    kept = next(line for line in screen.rows if line.split()[:2] == ["int8", "weight-only"])
    assert float(re.findall(r"([\d.]+) %", kept)[-1]) <= 0.5  # flips
    net.load_state_dict(rd.read("roundel.demo:DigitsNet", state=screen.folder / "digits-float.safetensors").state_dict())
    with torch.no_grad():
        share = (net.eval()(sets.score[0]).argmax(1) == sets.score[1]).float().mean().item()
    assert f"{100 * share:.1f} %" in float_line


@pytest.mark.proves("cli.demo")
def test_what_it_saves_loads_and_is_smaller(screen: Screen) -> None:
    small = screen.folder / "digits-small.safetensors"
    q = rd.load(small)
    x, y = digits(0).score
    with torch.no_grad():
        share = (q.module(x).argmax(1) == y).float().mean().item()
    assert share >= 0.96
    assert q.nbytes * 3 < 28_842 * 4
    page = (screen.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "nf4/g32" in page
    assert sorted(p.name for p in screen.folder.iterdir()) == [
        "digits-calibrate.npz", "digits-float.safetensors", "digits-score.npz", "digits-small.safetensors", "report.html",
    ]  # fmt: skip


@pytest.mark.proves("cli.demo")
def test_the_next_command_runs_as_printed(screen: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.split(screen.out[screen.out.index("quantize roundel.demo:") :].replace("\\\n", " "))
    before = signal.getsignal(signal.SIGTERM)
    try:
        cli.main(command)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "bits per parameter" in capsys.readouterr().out
    mine, small = rd.load(screen.folder / "mine.safetensors"), rd.load(screen.folder / "digits-small.safetensors")
    assert mine.nbytes == small.nbytes
    x = digits(0).score[0]
    assert torch.equal(mine.module(x), small.module(x))
    (screen.folder / "mine.safetensors").unlink()
