"""A journal beside an output file: what long work has finished, so that the same command takes it up again; it does not know what
the work is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from ..errors import InputError
from ..files import AnyPath, Slice, check_writable, read_header, show, slices, write_safetensors

#: What the journal's folder adds to the name of the output.
SUFFIX = ".journal"

#: What is added to that once the work is done, before the folder is removed: a journal is there whole or not at all.
DONE = ".done"

#: The key of an entry's metadata.
KEY = "entry"


@dataclass(frozen=True)
class Journal:
    """Entries of one run in a folder: each has a name, tensors, and a text of facts, and is there whole or not at all."""

    folder: Path

    def bind(self, run: Mapping[str, Any], output: AnyPath) -> None:
        """Tie the journal to a run: ``run`` says what decides the bytes, as a JSON table; tables in it are compared field by field.

        Raises `InputError` where the journal belongs to another run, with the field that differs.
        """
        now = msgspec.json.decode(msgspec.json.encode(dict(run)))
        if not self.has("_run"):
            return self.write("_run", {}, now)
        if differs := list(_differences(self.facts("_run"), now, "")):
            name, old, new = differs[0]
            more = f" (and {len(differs) - 1} more)" if len(differs) > 1 else ""
            raise InputError(
                f"an unfinished run for {show(output)} differs in {name}{more}: it has {old}, this one {new}; run it as it was, or "
                f"remove {show(self.folder)} to start anew"
            )
        return None

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, tensors: Mapping[str, Tensor | Slice], facts: Any = None) -> None:
        """Add an entry, or write it again."""
        write_safetensors(self._path(name), tensors, {KEY: msgspec.json.encode(facts).decode()})

    def facts(self, name: str) -> Any:
        return msgspec.json.decode(read_header(self._path(name))[1][KEY])

    def tensors(self, name: str) -> dict[str, Slice]:
        """The tensors of an entry, unread."""
        return slices(self._path(name))

    def remove(self, name: str) -> None:
        """Leave an entry out; it need not be there."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.entry"


@contextmanager
def journal(output: AnyPath) -> Iterator[Journal]:
    """The journal of ``output``, for this process alone; removed where the block ends well or nothing was
    entered but what begins with an underscore, else kept.

    Raises `InputError` where the folder cannot be written, and where another process is writing the same output.
    """
    check_writable(output)
    target = Path(os.path.realpath(os.fsdecode(output)))
    folder = target.with_name(_short(target.name) + SUFFIX)
    with _alone(folder, output):
        gone = folder.with_name(folder.name + DONE)
        shutil.rmtree(gone, ignore_errors=True)  # of a process that was killed, as are:
        for left in folder.glob(".roundel-*.tmp"):
            left.unlink(missing_ok=True)
        done = False
        try:
            yield Journal(folder)
            done = True
        finally:
            if done or not any(path.name[0] != "_" for path in folder.glob("*.entry")):
                try:
                    os.replace(folder, gone)
                except OSError:  # something of another's stands there
                    gone = folder
                shutil.rmtree(gone, ignore_errors=True)


def _short(name: str) -> str:
    """Short enough that the suffixes still fit into 255 bytes."""
    return os.fsdecode(os.fsencode(name)[: 255 - len(SUFFIX + DONE)])


@contextmanager
def _alone(folder: Path, output: AnyPath) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: exclusive creation is not enough, as it outlives a killed process
        fcntl = None  # type: ignore[assignment]
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the one before us has just removed it
            continue
        except OSError as err:
            raise InputError(f"cannot write {show(folder)}: {err.strerror}") from err
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    break
        except BlockingIOError as err:
            os.close(handle)
            raise InputError(
                f"another process is writing {show(output)} (it holds {show(path)}); wait for it, or name another output"
            ) from err
        os.close(handle)  # the lock of a folder that is gone
    try:
        yield
    finally:
        os.close(handle)


def _differences(a: Any, b: Any, name: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, _shown(a), _shown(b)


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
