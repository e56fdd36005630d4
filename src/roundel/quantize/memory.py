"""What quantizing a folder takes at most, worked out before it starts, and what the process really holds; Linux counts it, other
systems give a peak alone."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlanError
from ..files import size_text

#: Copies in float32 of a piece of rows that rounding it holds at a time.
ROUNDING = 9

#: (copies of a Hessian in float64, itself counted; copies of a piece in float32) while it is inverted, and while codes are chosen.
SOLVING = ((3.3, 2), (3, 11))

#: What the allocator keeps to itself.
SLACK = 96 << 20

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def bytes_of(text: str | int) -> int:
    """A size as people write it.

    >>> bytes_of("2GB"), bytes_of("1.5 GiB"), bytes_of(4096)
    (2000000000, 1610612736, 4096)
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise PlanError(f"a size of memory is a number with a unit, such as '2GB' or '1500MiB'; got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def held() -> int:
    """Bytes of this process in memory now; 0 where the system does not say."""
    return _status("VmRSS")


def peak() -> int:
    """The most that this process ever had in memory, in bytes."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def settled() -> Iterator[None]:
    """Set aside every object there is now, so that `trim` has only those to look at that come after; all are looked at again at the
    end. A process that did so for reasons of its own is left alone."""
    if mine := not gc.get_freeze_count():
        gc.collect()  # what is garbage already would stay for as long
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


def trim() -> None:
    """Collect rings of objects that hold tensors, and give back to the system what the C library (GNU's) keeps of freed memory."""
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give_back is not None:
        give_back(0)


def _status(key: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


@dataclass(frozen=True)
class Need:
    """What is held all the time, and the stages one of which comes on top: (what it is, bytes)."""

    always: Sequence[tuple[str, float]]
    stages: Sequence[tuple[str, float]]

    @property
    def total(self) -> float:
        """Bytes at the largest moment."""
        return sum(size for _, size in self.always) + max((size for _, size in self.stages), default=0.0)

    def check(self, cap: float, instead: str = "") -> None:
        """`PlanError` where ``cap`` cannot be kept, with the largest parts."""
        if self.total <= cap:
            return
        parts = [*self.always, max(self.stages, key=lambda stage: stage[1])] if self.stages else list(self.always)
        shown = ", ".join(
            f"{size_text(size)} for {what}" for what, size in sorted(parts, key=lambda part: -part[1]) if size > 1 << 20
        )
        raise PlanError(f"{size_text(cap)} of memory cannot be kept: it takes about {size_text(self.total)} ({shown}){instead}")


def available() -> float:
    """Bytes that the system could still give out; infinite where it does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return float("inf")
    return int(found[1]) * 1024 if found else float("inf")
