"""Large weights solved a few rows at a time, where their format lets every row stand alone; small ones whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..formats.format import Format
from ..formats.grid import Codebook
from ..formats.qtensor import QTensor

#: Numbers solved at a time. Part of what decides the bytes, so it depends on no memory limit.
PIECE = 1 << 24


def by_rows(solve: Callable[..., QTensor], weight: Tensor, format: Format, *args: Any, axis: int = 0, **named: Any) -> QTensor:
    """``solve(weight, format, *args, axis=axis, **named)``, in pieces of whole rows where the weight is large and its format allows
    it; what else is given holds for every piece."""
    rows = rows_at_once(weight.shape, format, axis)
    if weight.ndim == 0 or rows >= weight.shape[0]:
        return solve(weight, format, *args, axis=axis, **named)
    return stacked([solve(part, format, *args, axis=axis, **named) for part in weight.split(rows)])


def rows_at_once(shape: Sequence[int], format: Format, axis: int = 0) -> int:
    """How many rows of a weight are solved together."""
    if len(shape) != 2 or axis or not rows_alone(format):
        return shape[0] if len(shape) else 1
    return max(1, PIECE // max(1, shape[1]))


def rows_alone(format: Format) -> bool:
    """Whether nothing that is stored belongs to more than one row.

    >>> rows_alone(Format.parse("int4/g32")), rows_alone(Format.parse("nvfp4")), rows_alone(Format.parse("cb16"))
    (True, False, False)
    """
    parts = [part for part in (format.scale, format.zero, format.min) if part is not None]
    scaled = bool(parts)
    return not isinstance(format.grid, Codebook) and (not scaled or format.share.rows == 1) and all(map(rows_alone, parts))


def stacked(parts: Sequence[QTensor]) -> QTensor:
    """Pieces of rows as one tensor."""
    first = parts[0]

    def joined(pieces: Sequence[QTensor | None]) -> QTensor | None:
        whole = [piece for piece in pieces if piece is not None]
        return stacked(whole) if whole else None

    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return replace(
        first,
        shape=shape,
        codes=torch.cat([part.codes for part in parts]),
        scale=joined([part.scale for part in parts]),
        offset=joined([part.offset for part in parts]),
    )
