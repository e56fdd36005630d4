"""Every weight rounded to nearest, and what that did to unusual ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..calibrate import Progress
from ..errors import FormatError
from ..formats.codec import shared_table
from ..formats.format import MODEL, Format, with_real
from ..formats.grid import Levels, Uniform
from ..formats.qtensor import QTensor, to_matrix
from ..plan import Choice
from ..qmodel import Note
from ..solvers import NEED_HESSIAN, SOLVERS, rtn
from .networks import Network, Target
from .pieces import PIECE, by_rows

#: A number is an outlier when it is this many times the usual (median) magnitude of its tensor.
OUTLIER = 1e4


def round_weights(
    network: Network, table: Mapping[str, Choice | None], progress: Progress | None, notes: list[Note], solver: str | None = None
) -> dict[str, QTensor]:
    """Every weight rounded to nearest, or by a ``solver`` that needs no data; those in one format whose table is the model's
    (``@model``) by one table learned of all."""
    tensors: dict[str, QTensor] = {}
    shared = _model_tables(network, table)
    for i, target in enumerate(network.targets):
        if (choice := table.get(target.name)) is not None:
            tensors |= round_weight(target, choice.format, notes, shared.get(choice.format), solver)
        if progress:
            progress("quantize", i + 1, len(network.targets))
    return tensors


def round_weight(target: Target, fmt: Format, notes: list[Note], table: Tensor | None = None,
                 solver: str | None = None) -> dict[str, QTensor]:  # fmt: skip
    """One weight rounded to nearest, or by a ``solver`` that needs no data, by its name; nothing where it is empty."""
    if target.weight.numel() == 0:
        notes.append(Note(target.name, f"it is empty, shape {list(target.weight.shape)}; it stays as it is"))
        return {}
    rounded = _rounded(target, fmt, notes, rtn if solver is None or solver in NEED_HESSIAN else SOLVERS[solver], table)
    _tell_outlier(target, rounded, notes)
    return {target.name: rounded}


def _model_tables(network: Network, table: Mapping[str, Choice | None]) -> dict[Format, Tensor]:
    """Format -> the table that all its tensors share, for formats with a table of the model."""
    users: dict[Format, list[Tensor]] = {}
    for target in network.targets:
        choice = table.get(target.name)
        if choice is not None and choice.format.table == MODEL:
            users.setdefault(choice.format, []).append(to_matrix(target.weight.detach(), target.axis))
    return {fmt: shared_table(fmt, matrices) for fmt, matrices in users.items()}


def _rounded(target: Target, fmt: Format, notes: list[Note], solve: Callable[..., QTensor], table: Tensor | None = None) -> QTensor:
    """One weight rounded; scales are kept as fp32, with a note, where fp16 cannot hold them or would lose the tensor's own grid."""
    wide = with_real(fmt, "fp32")
    if wide != fmt and isinstance(fmt.grid, Uniform | Levels) and _on_grid(target, wide):
        kept = by_rows(rtn, target.weight, wide, axis=target.axis)
        if torch.equal(kept.dequantize(), target.weight.float()):
            narrow = by_rows(rtn, target.weight, fmt, axis=target.axis)
            if torch.equal(narrow.dequantize(), target.weight.float()):
                return narrow
            notes.append(
                Note(
                    target.name,
                    f"its numbers already lie on the grid of {wide}: the scale is kept as fp32, so that they come back exactly",
                )
            )
            return kept
    try:
        return by_rows(partial(solve, table=table), target.weight, fmt, axis=target.axis)
    except FormatError as err:
        if wide == fmt:
            raise FormatError(f"{target.name}, shape {list(target.weight.shape)}: {err}") from err
        notes.append(Note(target.name, f"{err}; done, as {wide}", fallback=True))
        return by_rows(partial(solve, table=table), target.weight, wide, axis=target.axis)


def _tell_outlier(target: Target, q: QTensor, notes: list[Note]) -> None:
    """One huge number costs those that share its scale their codes; say where it is and how many."""
    w = to_matrix(target.weight, target.axis)
    usual = w.flatten()[:: max(1, w.numel() >> 12)].abs().float()
    usual = usual[usual > 0]
    tops = [float(part.abs().amax()) for part in w.split(max(1, PIECE // max(1, w.shape[1])))]
    if not usual.numel() or max(tops) <= OUTLIER * float(usual.median()):
        return
    w = w.float()
    row, col = divmod(int(w.abs().argmax()), w.shape[1])
    high, wide = q.format.share.block(q.matrix)
    rows, cols = (slice(i // n * n, i // n * n + n) for i, n in ((row, high), (col, wide)))
    real, kept = w[rows, cols], to_matrix(q.dequantize(), q.axis)[rows, cols]
    lost = int(((real - kept).abs() >= real.abs()).logical_and(real != 0).sum())
    if lost:
        where = tuple(int(i) for i in torch.unravel_index(target.weight.abs().argmax(), target.weight.shape))
        said = f"an outlier of {float(w[row, col]):.3g} at {where} costs {lost} of the {real.numel()} numbers that share its scale"
        notes.append(Note(target.name, f"{said} their codes; repair it, exclude the layer or take smaller groups"))


def _on_grid(target: Target, fmt: Format) -> bool:
    """Whether a few rows of a tensor come back exactly, so that trying the whole is worth it."""
    rows = to_matrix(target.weight, target.axis)[:4].float()
    try:
        return torch.equal(rtn(rows, fmt).dequantize(), rows)
    except FormatError:
        return False
