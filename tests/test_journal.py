"""The journal: entries that are whole or not there, one writer at a time, and no journal of another run taken up."""

# ruff: noqa: PT012
import os
import signal
from pathlib import Path

import pytest
import torch

from roundel import InputError
from roundel.quantize.journal import SUFFIX, journal


def test_it_is_kept_where_work_stops_and_gone_where_it_ends(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / f"out{SUFFIX}"
    with pytest.raises(ZeroDivisionError), journal(out) as log:
        log.write("a", {"x": torch.arange(3)}, {"seen": [1, None]})
        _ = 1 / 0
    assert folder.is_dir()
    (folder / ".roundel-0000.tmp").write_bytes(b"of a process that was killed")
    with journal(out) as log:
        assert log.has("a")
        assert not log.has("b")
        assert log.tensors("a")["x"].read().tolist() == [0, 1, 2]
        assert log.facts("a") == {"seen": [1, None]}
        assert not list(folder.glob("*.tmp"))
        log.remove("a")
        log.remove("a")
        assert not log.has("a")
    assert not folder.exists()


def test_what_entered_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="NaN"), journal(tmp_path / "out") as log:
        log.bind({"plan": 1}, tmp_path / "out")
        raise InputError("NaN")
    assert not list(tmp_path.iterdir())


@pytest.mark.proves("resume.refused")
def test_another_run_is_refused_with_the_field(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = {"model": {"weights": "ab"}, "plan": {"rules": [1]}, "made by": {"seed": 0}}
    with pytest.raises(KeyError), journal(out) as log:
        log.bind(run, out)
        log.write("a", {})
        raise KeyError
    others = {"model.weights": {**run, "model": {"weights": "cd"}}, "plan.rules": {**run, "plan": {"rules": [2]}},
              "made by.seed": {**run, "made by": {"seed": 1}}, "data": {**run, "data": "x"}}  # fmt: skip
    for field, other in others.items():
        with pytest.raises(InputError, match=f"differs in {field}: it has"), journal(out) as log:
            log.bind(other, out)
    with journal(out) as log:
        log.bind(run, out)
        assert log.has("a")


@pytest.mark.proves("resume.refused")
def test_a_journal_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it is removed, it leaves nothing that another run could take up."""
    out = tmp_path / "out"

    def killed(folder: Path, **_: object) -> None:
        if folder.exists():
            (folder / "_run.entry").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        with journal(out) as log:
            log.bind({"plan": 1}, out)
            log.write("a", {})
    assert [path.name for path in tmp_path.iterdir()] == [f"out{SUFFIX}.done"]
    with journal(out) as log:
        log.bind({"plan": 2}, out)
        assert not log.has("a")
    assert not list(tmp_path.iterdir())


@pytest.mark.proves("resume.one-writer")
def test_two_writers_never_both_win(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with journal(out) as log:
        log.write("a", {})
        with pytest.raises(InputError, match="another process is writing"), journal(out):
            pass
        assert log.has("a")
    with journal(out):
        pass


@pytest.mark.proves("resume.one-writer")
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with journal(tmp_path / "out") as log:
            log.write("a", {})
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    with pytest.raises(InputError, match="another process"), journal(tmp_path / "out"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with journal(tmp_path / "out") as log:
        assert log.has("a")
    os.close(read)
    os.close(write)


def test_a_name_of_255_bytes_and_odd_ones(tmp_path: Path) -> None:
    for name in ("x" * 255, "with blanks", os.fsdecode(b"not-\xff-utf8")):
        with journal(tmp_path / name) as log:
            log.write("a", {"x": torch.ones(1)})
            assert log.has("a")
        assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file" / "out", tmp_path / "missing" / "out", tmp_path):
        with pytest.raises(InputError, match="cannot write"), journal(where):
            pass
