"""Alternating optimisation: codes, scales and table in turn, each the best for the Hessian given the others; any format.

Under fixed codes a weight is linear in its scales and minima, and in its table: both are solved by least squares in the metric
of the whole Hessian, rounded as they are stored, and kept only where the error falls; codes then descend again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats.codec import Params, Stored
from ..formats.format import CHANNEL, Format
from ..formats.grid import Codebook
from ..formats.qtensor import QTensor
from .descent import descended, start
from .frame import framed
from .quadratic import damped, lost

#: Rounds of scales, table and codes; a round that gains less than `LEAST` of the error is the last.
ROUNDS = 3
LEAST = 1e-4

#: Numbers of the one-hot matrices that are held at a time.
CHUNK = 1 << 22


def alternate(weight: Tensor, format: Format, hessian: Tensor, axis: int = 0, table: Tensor | None = None,
              rounds: int = ROUNDS) -> QTensor:  # fmt: skip
    """Quantize ``weight`` by `descent`, then improve scales, table and codes in turn. A ``table`` that is given stays.

    Arguments and errors as in `gptq`; the error d^T H d, H damped and summed over rows, is never above that of `descent`.

    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> alternate(torch.randn(4, 8), Format.parse("cb4/tensor"), (x.T @ x)[None] / 64).dequantize().shape
    torch.Size([4, 8])
    """

    def choose(w: Tensor, params: Stored) -> tuple[Tensor, Stored]:
        firm = damped(hessian)[0]
        codes = start(w, format, params, hessian, firm)
        error = _error(w, format, params, codes, firm)
        for _ in range(rounds):
            last = error
            for solve in (_scales, _table) if table is None else (_scales,):
                try:
                    new = format.store(solve(w, format, params, codes, firm))
                except FormatError:  # a least-squares solution may leave what the stored type holds; the old one stays
                    continue
                new, sorted_codes = _in_order(format, new, codes)
                if (found := _error(w, format, new, sorted_codes, firm)) < error:
                    params, codes, error = new, sorted_codes, found
            codes = descended(w, format, params, codes, firm)
            error = _error(w, format, params, codes, firm)
            if not last - error > LEAST * last:
                break
        return codes, params

    return framed(choose, weight, format, hessian, axis, table)


def _error(w: Tensor, format: Format, params: Stored, codes: Tensor, firm: Tensor) -> float:
    return float(lost(format.decode(codes, params)[:, : w.shape[1]] - w, firm).sum())


def _in_order(format: Format, params: Stored, codes: Tensor) -> tuple[Stored, Tensor]:
    """The same values with the entries of a table of numbers sorted, as encoding needs them."""
    if params.table is None or format.step > 1:
        return params, codes
    table, order = params.table[..., 0].sort(dim=1, stable=True)
    rank = order.argsort(1).to(torch.int32)
    codes = rank[0][codes.long()] if len(rank) == 1 else rank.gather(1, codes.long())
    return format.store(Params(params.scale, params.offset, table[..., None])), codes


def _solve(normal: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """x of least x^T N x - 2 x^T r near ``old``: what the codes do not use stays as it was. (batch, n, n), (batch, n) twice."""
    size = normal.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * size.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    firm = normal + torch.diag_embed(ridge.expand_as(size))
    return old + torch.linalg.solve(firm, right - (normal @ old[..., None])[..., 0])


def _scales(w: Tensor, format: Format, params: Stored, codes: Tensor, firm: Tensor) -> Params:
    """Scales, and minima where the format has them, that minimise the error of all columns of a row together."""
    real = Params(params.scale, params.offset, params.table)
    if params.scale is None or format.scale is None:
        return real
    (rows, cols), one, none = w.shape, torch.ones(1, 1), torch.zeros(1, 1)
    bare = Stored(one, none if format.min is not None else params.offset, params.table, params.parts)
    level = format.decode(codes, bare)[:, :cols].double()
    shapes = [level] if format.min is None else [level, torch.full_like(level, -1)]
    (high, wide), blocks = format.share.block((rows, cols)), params.scale.shape
    group, band = torch.arange(cols) // wide, torch.arange(rows) // high
    batch, count = len(firm), blocks[1]

    def per_group(x: Tensor) -> Tensor:
        return torch.zeros(rows, count, dtype=torch.float64).index_add_(1, group, x.reshape(rows, cols))

    normal = torch.zeros(rows, len(shapes) * count, len(shapes) * count, dtype=torch.float64)
    for b, shape in enumerate(shapes):
        for g in range(count):
            at = slice(g * wide, min((g + 1) * wide, cols))
            pull = shape[:, at].view(batch, -1, at.stop - at.start) @ firm[:, at]
            for a, other in enumerate(shapes):
                normal[:, a * count : (a + 1) * count, b * count + g] = per_group(other * pull.reshape(rows, cols))
    target = (w.double().view(batch, -1, cols) @ firm).reshape(rows, cols)
    right = torch.cat([per_group(shape * target) for shape in shapes], 1)
    normal = torch.zeros(blocks[0], *normal.shape[1:], dtype=torch.float64).index_add_(0, band, normal)
    right = torch.zeros(blocks[0], right.shape[1], dtype=torch.float64).index_add_(0, band, right)
    old = torch.cat([t for t in (params.scale, params.offset if format.min is not None else None) if t is not None], 1).double()
    found = _solve(normal, right, old).float()
    scale = found[:, :count] if format.scale.signed else torch.where(found[:, :count] > 0, found[:, :count], params.scale)
    offset = params.offset
    if format.min is not None:
        offset = found[:, count:] if format.min.signed else found[:, count:].clamp(min=0)
    return replace(real, scale=scale, offset=offset)


def _table(w: Tensor, format: Format, params: Stored, codes: Tensor, firm: Tensor) -> Params:
    """The entries of a learned table that minimise the error of all rows that share it."""
    real, grid = Params(params.scale, params.offset, params.table), format.grid
    if params.table is None or not isinstance(grid, Codebook) or grid.law:
        return real
    (rows, cols), size = w.shape, grid.k * grid.dim
    shared = format.table != CHANNEL
    place = (codes.long().repeat_interleave(grid.dim, 1)[:, :cols]) * grid.dim + torch.arange(cols) % grid.dim
    ones = Stored(params.scale, None, torch.ones_like(params.table), params.parts)
    spread = format.decode(codes, ones)[:, :cols].double()  # the scale of each number
    firm = firm.expand(len(firm), cols, cols)
    normal = torch.zeros(1 if shared else rows, size, size, dtype=torch.float64)
    right = torch.zeros(1 if shared else rows, size, dtype=torch.float64)
    for part in torch.arange(rows).split(max(1, CHUNK // (cols * size))):
        hot = torch.zeros(len(part), cols, size, dtype=torch.float64)
        hot.scatter_(2, place[part, :, None], spread[part, :, None])
        own = firm[part // (rows // len(firm))]
        pull = own @ hot
        n, r = hot.mT @ pull, (w[part, None].double() @ pull)[:, 0]
        normal[0 if shared else part] += n.sum(0) if shared else n
        right[0 if shared else part] += r.sum(0) if shared else r
    old = params.table.reshape(len(normal), size).double()
    return replace(real, table=_solve(normal, right, old).float().view(params.table.shape))
