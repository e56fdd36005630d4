"""Calibration: what passes over the sites of a network while it runs on data, as one `Stats` per site; it decides no ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .data import Batch, batches
from .errors import InputError
from .graph import GraphModule
from .network.sites import find_sites
from .network.walk import leaves, member
from .network.watch import watching
from .stats import Stats

Progress = Callable[[str, int, int], None]


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread: whatever decides stored bytes must not depend on the machine's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is back in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def calibrate(
    module: nn.Module, data: Iterable[object], *, only: Iterable[str] | None = None, progress: Progress | None = None
) -> dict[str, Stats]:
    """Run ``module`` on ``data`` and return site -> `Stats`, sites as they are named by `Sites` or ``layer.input``.

    ``only`` names the sites wanted. Raises `InputError` for empty data and for values that are not finite, with batch and site.

    >>> ranges = calibrate(nn.Sequential(nn.Linear(2, 1)), [torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]])])
    >>> ranges["0.input"].min, ranges["0.input"].max
    (-2.0, 3.0)
    """
    root: Mapping[str, str]
    constants: Mapping[str, Tensor] = {}
    if isinstance(module, GraphModule):
        found = find_sites(module.structure)
        root = {name: site for site, names in found.origin.items() for name in names}
        constants = module.graph.constants
    else:
        root = {site: site for site in (member(name, "input") for name in leaves(module))}
    wanted = set(only) if only is not None else None
    stats: dict[str, Stats] = {}
    number = 0

    def note(name: str, value: Tensor) -> None:
        site = root.get(name)
        if site is None or not value.is_floating_point() or (wanted is not None and site not in wanted):
            return
        try:
            stats.setdefault(site, Stats()).update(value)
        except InputError as err:
            raise InputError(f"calibration batch {number}, site {name!r}: {err}") from err

    items = list_of_batches(data)
    for name, constant in constants.items():
        note(name, constant)
    with one_thread(), torch.no_grad(), evaluating(module), watching(module, note):
        for number, batch in enumerate(items):
            run(module, batch)
            if progress:
                progress("calibrate", number + 1, len(items))
    return stats


def list_of_batches(data: Iterable[object]) -> list[Batch]:
    """The data as batches; `InputError` when there is none."""
    items = list(batches(data))
    if not any(map(len, items)):
        raise InputError("the calibration set is empty: give at least one batch (a few hundred samples are usual)")
    return items


def run(module: nn.Module, batch: Batch) -> object:
    """One forward pass. Raises `InputError` where the network cannot take the batch."""
    try:
        return module(*batch.args, **batch.named)
    except (RuntimeError, TypeError, ValueError, IndexError) as err:
        inputs = [*batch.args, *batch.named.values()]
        shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in inputs)
        why = str(err).splitlines()[0]
        if batch.named and isinstance(err, TypeError):
            why += f"; the data names its inputs {', '.join(map(repr, batch.named))}: call them x and y, or as the model does"
        raise InputError(f"the model cannot run on a batch of {shapes}: {why}") from err
