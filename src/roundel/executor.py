"""Where independent pieces of work run: in this process, or on Ray workers; the results are the same bytes in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch

from .errors import InputError

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """``map`` applies a function of one argument, which must be picklable, and gives the results in order as they are asked for."""

    def map(self, fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``fn`` of every item, in order."""


class Here:
    """One after the other in this process.

    >>> list(Here().map(abs, [-1, 2]))
    [1, 2]
    """

    def map(self, fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``fn`` of every item, when its result is asked for."""
        return map(fn, items)


class Ray:
    """Each item is a task of a Ray cluster: the one that ``address`` names, the one this process is in, or ``workers`` processes
    on this machine. A task whose worker dies is run again, and because tasks are pure functions on one thread each, nothing of that
    is seen in the results."""

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as err:
            raise InputError("more than one process needs Ray: pip install -e '.[ray]' in Roundel's folder") from err
        self.ray: Any = ray
        if not ray.is_initialized():
            ray.init(address=address, num_cpus=None if address else workers, include_dashboard=False, log_to_driver=False)

    def map(self, fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``fn`` of every item; all are under way at once."""
        task = self.ray.remote(num_cpus=1, max_retries=5)(_alone)
        waiting = [task.remote(fn, item) for item in items]
        while waiting:
            yield self.ray.get(waiting.pop(0))


def _alone(fn: Callable[[T], R], item: T) -> R:
    """One task, on one thread as in one process."""
    torch.set_num_threads(1)
    with torch.no_grad():
        return fn(item)
