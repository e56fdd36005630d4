"""Coordinate descent: after GPTQ, every code in turn moves to the level that is best given all the others; any format.

Parameters stay. Each move lowers the damped quadratic, so a sweep never makes it worse (Behdin et al. 2023, "QuantEase").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.codec import Stored
from ..formats.format import Format
from ..formats.qtensor import QTensor
from .frame import framed
from .gptq import BLOCK, carried
from .quadratic import damped, lost

#: Sweeps over all columns; a sweep that moves nothing is the last.
SWEEPS = 4

#: Numbers that the search over a vector codebook holds at a time.
CHUNK = 1 << 22


def descent(weight: Tensor, format: Format, hessian: Tensor, axis: int = 0, table: Tensor | None = None,
            sweeps: int = SWEEPS) -> QTensor:  # fmt: skip
    """Quantize ``weight`` by GPTQ or to nearest, each row by the better of the two, and let its codes descend from there.

    Arguments and errors as in `gptq`; the error d^T H d, H damped, is never above that of GPTQ or of rounding, in any row.

    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> descent(torch.randn(4, 8), Format.parse("int4"), (x.T @ x)[None] / 64).dequantize().shape
    torch.Size([4, 8])
    """

    def choose(w: Tensor, params: Stored) -> tuple[Tensor, Stored]:
        return start(w, format, params, hessian, damped(hessian)[0], sweeps), params

    return framed(choose, weight, format, hessian, axis, table)


def start(w: Tensor, format: Format, params: Stored, hessian: Tensor, firm: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """The codes of `descent` under fixed parameters."""
    near, solved = format.encode(w, params), carried(w, format, params, hessian)
    before, after = (lost(format.decode(c, params)[:, : w.shape[1]] - w, firm) for c in (near, solved))
    return descended(w, format, params, torch.where((after < before)[:, None], solved, near), firm, sweeps)


def descended(w: Tensor, format: Format, params: Stored, codes: Tensor, firm: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """``codes`` after at most ``sweeps`` over all columns, one step of columns after the other."""
    for _ in range(sweeps):
        moved = _sweep(w, format, params, codes, firm)
        if torch.equal(moved, codes):
            break
        codes = moved
    return codes


def _sweep(w: Tensor, format: Format, params: Stored, codes: Tensor, firm: Tensor) -> Tensor:
    (rows, cols), groups = w.shape, len(firm)
    codes = codes.clone()
    values = format.decode(codes, params)[:, :cols].double()
    slope = (values - w).view(groups, -1, cols) @ firm  # half the gradient
    width = BLOCK // format.step * format.step or format.step
    for first in range(0, cols, width):
        block = slice(first, min(first + width, cols))
        near, moved = slope[..., block].clone(), torch.zeros(groups, rows // groups, block.stop - first, dtype=torch.float64)
        for at in torch.arange(first, block.stop).split(format.step):
            own = firm[:, at][..., at]
            pull = near[..., at - first]
            wish = values[:, at] - (pull / own if len(at) == 1 else torch.linalg.solve(own, pull, left=False)).reshape(rows, -1)
            code = _best(format, params, wish, own, at)
            step = (format.decode(code, params, at).double() - values[:, at]).view(groups, -1, len(at))
            gain = ((step @ own) * step + 2 * step * pull).sum(-1).reshape(rows, 1)
            better = gain < 0
            step = torch.where(better.view(groups, -1, 1), step, 0.0)
            place = slice(int(at[0]) // format.step, int(at[0]) // format.step + 1)
            codes[:, place] = torch.where(better, code, codes[:, place])
            near += step @ firm[:, at, block]
            moved[..., at - first] = step
        slope += moved @ firm[:, block]
    return codes


def _best(format: Format, params: Stored, wish: Tensor, own: Tensor, at: Tensor) -> Tensor:
    """The code nearest to ``wish`` (rows, step): for vectors in the metric ``own``, over all entries."""
    if format.step == 1 or len(at) < format.step:
        return format.encode(wish.float(), params, at)
    count, found = 1 << format.bits, []
    count = min(count, getattr(format.grid, "k", count))
    every = torch.arange(count, dtype=torch.int32)
    root = torch.linalg.cholesky(own).repeat_interleave(len(wish) // len(own), 0)
    for rows in torch.arange(len(wish)).split(max(1, CHUNK // (count * len(at)))):
        levels = format.decode(every.expand(len(rows), -1), params, at.repeat(count), rows).double()
        off = levels.view(len(rows), count, len(at)) - wish[rows, None]
        found.append((off @ root[rows]).square().sum(-1).argmin(1, keepdim=True).to(torch.int32))
    return torch.cat(found)
