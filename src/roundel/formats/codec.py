"""The numerics of a `Format` in torch: `fit`, `store`, `encode`, `decode`, `refit`, on matrices (rows, columns).

This is the plain definition that every faster path must equal bit for bit. All arithmetic is float32 in the order written
here. It knows no network and no solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from . import grid as grids
from .format import CHANNEL, Format
from .grid import Codebook, Levels, Real, Uniform

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

#: Elements that one pass of the scale search may hold at a time.
CHUNK = 1 << 22

#: Numbers that a table shared by several tensors is learned from, at most.
POINTS = 1 << 20

#: Elements that several ideas of a grid that is there are tried on in one pass.
FEW = 1 << 16

#: Shares of the range that scales are tried at under a learned table.
SHARES = tuple(1.15 - 0.05 * i for i in range(18) if i != 3)


@dataclass(frozen=True, eq=False)
class Params:
    """Real-valued parameters: ``scale`` and ``offset`` (one entry per block), ``table`` (tables, k, dim). The offset is a zero
    point in code units or a minimum that is subtracted, as the format says."""

    scale: Tensor | None = None
    offset: Tensor | None = None
    table: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Stored(Params):
    """The same after rounding through their own formats; ``parts`` are what is written: (scale, offset, table)."""

    parts: tuple[Any, Any, Tensor | None] = (None, None, None)


# -- levels and codes of one grid, no scale -----------------------------------------------------------------------------


@cache
def _tables(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(boundaries, code of each sorted level, value of each code, sorted levels). A tie goes to the even code, as in IEEE 754; in
    e8m0, which has no mantissa to be even, to the larger."""
    rows = grids.table(name)
    values = torch.tensor(rows.values, dtype=torch.float64)
    codes = torch.tensor(rows.codes, dtype=torch.int32)
    middle = ((values[1:] + values[:-1]) / 2).to(torch.float32)
    above = torch.nextafter(middle, torch.tensor(torch.inf))
    return torch.where((codes[1:] % 2 == 0) | (name == "e8m0"), middle, above), codes, torch.tensor(rows.decode), values.float()


def _round(fmt: Format, x: Tensor, table: Tensor | None, rows: Tensor | None) -> Tensor:
    """Nearest code of each scaled number; ``table`` (tables, k, dim) for learned grids."""
    base = fmt.grid
    if isinstance(base, Uniform):
        lo, hi = fmt.extremes
        return x.round().clamp(lo, hi).to(torch.int32)
    if isinstance(base, Levels):
        boundaries, codes, _, _ = _tables(base.name)
        return codes[torch.bucketize(x.contiguous(), boundaries, right=True)]
    if isinstance(base, Real):
        return _real_codes(base.name, x)
    assert table is not None
    if base.dim > 1:
        return _nearest_vector(x, table[0])
    middle = (table[:, 1:, 0] + table[:, :-1, 0]) / 2
    if table.shape[0] == 1:
        return torch.bucketize(x.contiguous(), middle[0], right=True).to(torch.int32)
    middle = middle if rows is None else middle[rows]
    return torch.searchsorted(middle.contiguous(), x.contiguous(), right=True).to(torch.int32)


def _real_codes(name: str, x: Tensor) -> Tensor:
    stored = x.to(DTYPES[name])
    view = stored.view(torch.int32) if name == "fp32" else stored.view(torch.int16).to(torch.int32) & 0xFFFF
    return view


def _nearest_vector(x: Tensor, table: Tensor) -> Tensor:
    """Index of the entry nearest to each run of ``dim`` columns; a short last run is completed with zeros."""
    k, dim = table.shape
    short = -x.shape[1] % dim
    points = torch.nn.functional.pad(x, (0, short)).reshape(-1, dim)
    out = torch.empty(points.shape[0], dtype=torch.int32)
    for i in range(0, points.shape[0], max(1, CHUNK // k)):
        part = points[i : i + max(1, CHUNK // k)]
        out[i : i + part.shape[0]] = ((part[:, None] - table[None]) ** 2).sum(-1).argmin(1).to(torch.int32)
    return out.reshape(x.shape[0], (x.shape[1] + short) // dim)


def _level(fmt: Format, codes: Tensor, table: Tensor | None, rows: Tensor | None) -> Tensor:
    """The level of each code, float32."""
    base = fmt.grid
    if isinstance(base, Uniform):
        return codes.to(torch.float32)
    if isinstance(base, Levels):
        return _tables(base.name)[2][codes.long()]
    if isinstance(base, Real):
        if base.name == "fp32":
            return codes.to(torch.int32).view(torch.float32)
        return codes.to(torch.int16).view(DTYPES[base.name]).float()
    assert table is not None
    if table.shape[0] == 1:
        return table[0][codes.long()].flatten(1)
    table = table[..., 0] if rows is None else table[rows, :, 0]
    return torch.gather(table, 1, codes.long())


# -- parameters spread over elements --------------------------------------------------------------------------------


def _spread(param: Tensor | None, fmt: Format, like: Tensor, cols: Tensor | None, rows: Tensor | None) -> Tensor:
    """One parameter per element of the matrix ``like``, or something that broadcasts to it; 0 where there is none."""
    if param is None:
        return torch.zeros(())
    n_rows, n_cols = like.shape
    share_rows, share_cols = fmt.share.rows or 0, fmt.share.cols or 0
    if param.shape[0] > 1:
        index = torch.arange(n_rows) if rows is None else rows
        param = param if share_rows == 1 and rows is None else param[index // max(1, share_rows)]
    if param.shape[1] > 1:
        if cols is None:
            return param.repeat_interleave(share_cols, 1)[:, :n_cols]
        return param[:, cols // share_cols]
    return param


def _scaled(fmt: Format, w: Tensor, params: Params, cols: Tensor | None, rows: Tensor | None) -> Tensor:
    """``w`` in units of the grid, zero point or minimum taken out; blocks whose scale is 0 give 0."""
    w = w.to(torch.float32)
    offset = _spread(params.offset, fmt, w, cols, rows)
    if fmt.min is not None:
        w = w + offset
    if params.scale is not None:
        scale = _spread(params.scale, fmt, w, cols, rows)
        w = torch.where(scale == 0, torch.zeros(()), w / scale)
    return w.round() + offset if fmt.zero is not None else w


def spread(fmt: Format, param: Tensor | None, like: Tensor) -> Tensor:
    """A parameter's value for each element of the matrix ``like``, or something that broadcasts to it; 0 where there is none."""
    return _spread(param, fmt, like, None, None)


def neighbours(fmt: Format, w: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """Codes of the two adjacent levels that ``w`` (rows, columns) lies between; of the last two at that end, where it lies beyond.

    Raises `FormatError` for vector codebooks and stored floats, which have no order or too many levels.
    """
    base = fmt.grid
    offset = _spread(params.offset, fmt, w, None, None)
    x = w + offset if fmt.min is not None else w
    if params.scale is not None:
        scale = _spread(params.scale, fmt, w, None, None)
        x = torch.where(scale == 0, torch.zeros(()), x / scale)
    if isinstance(base, Uniform):
        lo, hi = fmt.extremes
        low = (x + offset if fmt.zero is not None else x).floor().clamp(lo, hi - 1).to(torch.int32)
        return low, low + 1
    if isinstance(base, Real) or (isinstance(base, Codebook) and base.dim > 1):
        raise FormatError(f"{fmt}: its numbers have no two neighbours to choose between; train them straight-through")
    if isinstance(base, Levels):
        _, codes, _, levels = _tables(base.name)
        at = (torch.searchsorted(levels, x.contiguous(), right=True) - 1).clamp(0, len(levels) - 2)
        return codes[at], codes[at + 1]
    assert params.table is not None
    table = params.table[:, :, 0].contiguous().expand(x.shape[0], -1).contiguous()
    low = (torch.searchsorted(table, x.contiguous(), right=True) - 1).clamp(0, base.k - 2).to(torch.int32)
    return low, low + 1


# -- the seam ---------------------------------------------------------------------------------------------------------


def encode(fmt: Format, w: Tensor, params: Stored, cols: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """See `Format.encode`. Rows are worked in chunks, so memory stays bounded."""
    _need_stored(fmt, params)
    step = max(1, CHUNK // max(1, w.shape[1]))
    if w.shape[0] <= step:
        return _round(fmt, _scaled(fmt, w, params, cols, rows), params.table, rows)
    index = torch.arange(w.shape[0]) if rows is None else rows
    parts = [
        _round(fmt, _scaled(fmt, w[i : i + step], params, cols, index[i : i + step]), params.table, index[i : i + step])
        for i in range(0, w.shape[0], step)
    ]
    return torch.cat(parts)


def decode(fmt: Format, codes: Tensor, params: Stored, cols: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """See `Format.decode`: (code - zero) * scale, level * scale - min, or level * scale."""
    _need_stored(fmt, params)
    value = _level(fmt, codes, params.table, rows)
    value = value if cols is None else value[:, : len(cols)]  # a short last run of a vector code
    offset = _spread(params.offset, fmt, value, cols, rows)
    if fmt.zero is not None:
        value = value - offset
    if params.scale is not None:
        value = value * _spread(params.scale, fmt, value, cols, rows)
    return value - offset if fmt.min is not None else value


def _need_stored(fmt: Format, params: Params) -> None:
    if not isinstance(params, Stored):
        raise FormatError(f"{fmt}: encode and decode take stored parameters; call store() on what fit() returned")


def nearest(fmt: Format, w: Tensor) -> Any:
    """``w`` (rows, columns) rounded to ``fmt`` as a `QTensor`: fit, store, encode."""
    from .qtensor import packed

    params = store(fmt, fit(fmt, w))
    return packed(fmt, encode(fmt, w, params), params, tuple(w.shape))


def store(fmt: Format, params: Params) -> Stored:
    """See `Format.store`. The scale first, then the offset, then the table."""
    scale = _stored_part(fmt, fmt.scale, params.scale, "scale")
    offset = _stored_part(fmt, fmt.zero or fmt.min, params.offset, "zero point" if fmt.zero else "minimum")
    table = params.table
    if isinstance(fmt.grid, Codebook) and table is not None:
        if fmt.grid.whole:
            table = table.round().clamp(-fmt.grid.whole, fmt.grid.whole).to(torch.int8)
        else:
            _check_range(fmt, fmt.grid.entry, table, "table entry")
            table = table.to(DTYPES[fmt.grid.entry])
    return Stored(
        scale=scale.matrix_values() if scale is not None else None,
        offset=offset.matrix_values() if offset is not None else None,
        table=table.float() if table is not None else None,
        parts=(scale, offset, table),
    )


def _stored_part(fmt: Format, part: Format | None, values: Tensor | None, what: str) -> Any:
    if part is None or values is None:
        return None
    if isinstance(part.grid, Real):
        _check_range(fmt, part.grid.name, values, what)
        values = _clear_of_zero(values, part.grid.name)
    elif part.scale is None and what != "zero point":
        top = max(abs(x) for x in part.extremes)
        if values.numel() and values.abs().max() > top * (1 + 2.0**-4):
            raise FormatError(f"{fmt}: a {what} of {values.abs().max():.3g} is above {top:.3g}, the largest that {part} holds; "
                              f"store it as *{part}/tensor*fp32 or *fp32")  # fmt: skip
    return nearest(part, values)


def _check_range(fmt: Format, real: str, values: Tensor, what: str) -> None:
    """Refuse values that overflow the stored float, or that are all so small that it holds nothing of them."""
    peak = float(values.abs().max()) if values.numel() else 0.0
    tiny, top = grids.REALS[real]
    if peak > top or 0 < peak < 16 * tiny:
        raise FormatError(f"{fmt}: a {what} of {peak:.3g} is outside {real}, which holds {tiny:.1e} to {top:.4g}; store it as fp32")


def _clear_of_zero(values: Tensor, real: str) -> Tensor:
    """A scale that would underflow becomes the smallest the type holds, so that its block stays within one step."""
    tiny = grids.REALS[real][0]
    return torch.where((values != 0) & (values.abs() < tiny), torch.copysign(torch.tensor(tiny), values), values)


# -- fit --------------------------------------------------------------------------------------------------------------


def from_range(fmt: Format, lo: Tensor, hi: Tensor, flip: bool = False) -> Params:
    """See `Format.from_range`. ``flip`` asks for the negative scale (grids that reach further on one side)."""
    low, high = fmt.extremes
    lo, hi = lo.to(torch.float32), hi.to(torch.float32)
    if fmt.scale is None and fmt.zero is None and fmt.min is None:
        return Params()
    if fmt.zero is not None or fmt.min is not None:
        if fmt.zero is not None or not fmt.min.signed:  # type: ignore[union-attr]
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        scale = _step(fmt, lo, hi, high - low) if fmt.scale is not None else torch.ones_like(lo)
        if fmt.min is not None:
            return Params(scale, scale * low - lo)
        zero = torch.where(scale > 0, low - lo / scale, torch.zeros(())).round().clamp(low, high)
        return Params(scale, zero)
    over, under = hi.clamp(min=0), lo.clamp(max=0)
    if flip:
        over, under = -under, -over
    # A one-sided grid (uint8, int1) covers one side only.
    above = over / high if high > 0 else torch.zeros_like(over)
    below = under / low if low < 0 else torch.zeros_like(under)
    return Params(-torch.maximum(above, below) if flip else torch.maximum(above, below))


def _step(fmt: Format, lo: Tensor, hi: Tensor, steps: float) -> Tensor:
    """(hi - lo) / steps; `FormatError` where the span overflows, because then decoding would, or lose one end in silence."""
    wide = (hi - lo).isinf()
    if wide.any():
        raise FormatError(f"{fmt}: numbers from {float(lo[wide][0]):.3g} to {float(hi[wide][0]):.3g} span more than float32 holds; "
                          "a symmetric format, such as int4, can hold them")  # fmt: skip
    return (hi - lo) / steps


def block_ranges(fmt: Format, w: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each block of ``w``, in the shape of the scales."""
    blocks = _Blocks(fmt, w, None)
    if not w.numel():
        return torch.zeros(blocks.grid), torch.zeros(blocks.grid)
    return blocks.w.amin(1).reshape(blocks.grid), blocks.w.amax(1).reshape(blocks.grid)


def fit(fmt: Format, w: Tensor, importance: Tensor | None = None, table: Tensor | None = None) -> Params:
    """See `Format.fit`: the scale that minimises the weighted squared error over a search, then least squares; learned tables by
    exact 1-D k-means. A grid already present in the numbers is found and returned exactly (formats whose scale has no outer
    scale)."""
    w = w.to(torch.float32)
    bad = ~torch.isfinite(w)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise FormatError(f"{int(bad.sum())} of {w.numel()} numbers are not finite, the first at {first}")
    if isinstance(fmt.grid, Real):
        peak = float(w.abs().max()) if w.numel() else 0.0
        if peak > grids.REALS[fmt.grid.name][1]:
            top = grids.REALS[fmt.grid.name][1]
            raise FormatError(f"a number of {peak:.3g} is outside {fmt.grid.name}, which holds up to {top:.4g}")
        return Params()
    if importance is not None:
        importance = importance.to(torch.float32).expand(w.shape)
    if isinstance(fmt.grid, Codebook):
        return _fit_codebook(fmt, w, importance, table)
    if fmt.scale is None and fmt.zero is None and fmt.min is None:
        return Params()
    blocks = _Blocks(fmt, w, importance)
    step = max(1, CHUNK // max(1, blocks.size))
    found = [_search(fmt, *blocks.part(i, i + step)) for i in range(0, blocks.count, step)]
    if not found:
        empty = torch.zeros(blocks.grid)
        return Params(empty, empty if fmt.zero or fmt.min else None)
    scale = torch.cat([f.scale for f in found if f.scale is not None]).reshape(blocks.grid) if fmt.scale is not None else None
    offset = (
        torch.cat([f.offset for f in found if f.offset is not None]).reshape(blocks.grid) if found[0].offset is not None else None
    )
    return Params(scale, offset)


class _Blocks:
    """A matrix cut into the blocks that share a scale: (blocks, elements), short blocks completed by weightless repetition."""

    def __init__(self, fmt: Format, w: Tensor, weight: Tensor | None) -> None:
        rows, cols = w.shape
        self.grid = fmt.share.grid((rows, cols))
        self.block = fmt.share.block((rows, cols))
        self.count, self.size = self.grid[0] * self.grid[1], self.block[0] * self.block[1]
        fill = (0, self.grid[1] * self.block[1] - cols, 0, self.grid[0] * self.block[0] - rows)
        if any(fill) and w.numel():
            weight = torch.ones_like(w) if weight is None else weight
            # the last row and column again, so that no extreme is a number that is not there
            w = w[torch.arange(rows + fill[3]).clamp(max=rows - 1)][:, torch.arange(cols + fill[1]).clamp(max=cols - 1)]
        self.w = self._cut(w) if w.numel() else w.reshape(0, 0)
        self.weight = self._cut(torch.nn.functional.pad(weight, fill)) if weight is not None and w.numel() else None
        self.count = self.w.shape[0]

    def _cut(self, w: Tensor) -> Tensor:
        (gr, gc), (br, bc) = self.grid, self.block
        return w.reshape(gr, br, gc, bc).permute(0, 2, 1, 3).reshape(gr * gc, br * bc)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self.w[start:stop], self.weight[start:stop] if self.weight is not None else None


def _ratios(fmt: Format) -> list[float]:
    """Shares of the full range that the scale search tries."""
    if fmt.scale is not None and isinstance(fmt.scale.grid, Levels) and fmt.scale.grid.name == "e8m0":
        return [1.0, 0.5, 0.71, 1.42]
    if fmt.bits >= 7:
        # At 8 bits clipping gains next to nothing in squared error and shifts the outputs of a whole channel.
        return [1.0] if fmt.bits <= 8 else [1.0, 1 + 2.0**-10]  # a scale that fp16 rounds down would clip the peak
    return [1.0, 1.05, *(1 - 0.025 * i for i in range(1, 28))]


def _search(fmt: Format, x: Tensor, weight: Tensor | None) -> Params:
    """The best of a grid of ranges per block, then two rounds of least squares, each kept only where the error falls."""
    inner = replace(fmt, share=CHANNEL)  # one block is one row here
    lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    both = fmt.signed and fmt.extremes[0] != -fmt.extremes[1] and fmt.zero is None and fmt.min is None
    flips = (False, True) if both and (fmt.scale is None or fmt.scale.signed) else (False,)
    best = _settle(fmt, from_range(inner, lo, hi))
    error = _error(inner, x, weight, best)

    def offer(candidate: Params) -> None:
        nonlocal best, error
        candidate = _settle(fmt, candidate)
        new = _error(inner, x, weight, candidate)
        better = new < error
        best = Params(*(None if a is None or b is None else torch.where(better, a, b)
                        for a, b in ((candidate.scale, best.scale), (candidate.offset, best.offset))))  # fmt: skip
        error = torch.where(better, new, error)

    for candidate in _present(inner, x):
        offer(candidate)
    if not (error > 0).any():
        return best
    for ratio in _ratios(fmt):
        if ratio > 1 and not (hi * ratio - lo * ratio).isfinite().all():
            continue  # at the end of float32 there is no room to widen
        for flip in flips:
            offer(from_range(inner, lo * ratio, hi * ratio, flip))
    for _ in range(2 if fmt.bits < 7 else 0):
        offer(_least_squares(inner, x, _round(inner, _scaled(inner, x, best, None, None), None, None), best, weight))
    return best


def _settle(fmt: Format, params: Params) -> Params:
    """Round the scale and minimum as they will be stored, where that takes no outer scale; `store` refuses what is out of range."""

    def one(part: Format | None, values: Tensor | None) -> Tensor | None:
        if part is None or values is None or part.scale is not None:
            return values
        values = _clear_of_zero(values, part.grid.name) if isinstance(part.grid, Real) else values
        stored = _level(part, _round(part, values, None, None), None, None)
        return torch.where(stored.isinf(), values, stored)

    return Params(one(fmt.scale, params.scale), one(fmt.zero or fmt.min, params.offset))


def _error(fmt: Format, x: Tensor, weight: Tensor | None, params: Params) -> Tensor:
    """Weighted squared error of each row, (rows, 1)."""
    stored = Stored(params.scale, params.offset, params.table)
    diff = (decode(fmt, _round(fmt, _scaled(fmt, x, params, None, None), params.table, None), stored) - x).square()
    return (diff if weight is None else diff * weight).sum(1, keepdim=True)


def _present(fmt: Format, x: Tensor) -> list[Params]:
    """Parameters under which the rows may already lie on the grid; a sample decides which ideas are worth a pass over all of it.
    Integers of 15 and 16 bits are at the edge of what float32 products still tell apart."""
    sample = x[:: max(1, x.shape[0] // 64), :: max(1, x.shape[1] // 4096)]
    if isinstance(fmt.grid, Levels):  # rows of many different numbers lie on no table
        distinct = max((len(row.unique()) for row in sample), default=0)
        if distinct > len(_tables(fmt.grid.name)[3]) + 1 or distinct == sample.shape[1]:
            return []
    kept = _exact_somewhere(fmt, sample, _ideas(fmt, sample))
    every = _ideas(fmt, x) if kept else []
    return [every[i] for i in kept] if every else []  # all columns may lie closer than those of the sample


def _ideas(fmt: Format, x: Tensor) -> list[Params]:
    """The largest number over each level it can stand for and, for integers, the spacing of the numbers over 1 to 8."""
    peak = x.abs().amax(1, keepdim=True)
    lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scales: list[Tensor] = []
    if isinstance(fmt.grid, Levels):
        tops = sorted({abs(v) for v in _tables(fmt.grid.name)[3].tolist()} - {0.0})
        signs = (1.0,) if fmt.extremes[0] == -fmt.extremes[1] else (1.0, -1.0)
        scales = [each for top in tops for sign in signs for each in _neighbours(fmt, sign * peak / top)]
    elif isinstance(fmt.grid, Uniform):
        step = _spacing(x if fmt.min is not None else torch.cat([x, torch.zeros_like(peak)], 1), fmt.bits)
        reach = peak if fmt.min is None else hi - lo
        if not (reach / step).round().le(fmt.extremes[1] - fmt.extremes[0]).any():
            return []  # the numbers lie closer than the levels of any idea
        both = fmt.signed and fmt.zero is None and fmt.min is None and fmt.bits < 8
        for parts in range(1, 9):
            exact = torch.where(torch.isfinite(step), reach / (reach / step * parts).round().clamp(min=1), torch.zeros(()))
            scales += [*_neighbours(fmt, exact), *([-exact] if both else [])]
    low = fmt.extremes[0]
    found = []
    for scale in scales:
        if fmt.zero is not None:
            zero = torch.where(scale > 0, low - (lo.clamp(max=0) / scale), torch.zeros(())).round()
            found.append(Params(scale, zero.clamp(*fmt.extremes)))
        elif fmt.min is not None:
            found.append(Params(scale, scale * low - (lo if fmt.min.signed else lo.clamp(max=0))))
        else:
            found.append(Params(scale))
    return found


def _spacing(x: Tensor, bits: int) -> Tensor:
    """The common divisor (rows, 1) of the gaps between a row's numbers, by Euclid's algorithm on all of them at once; infinite
    where a row has one number. Remainders under a quarter of the smallest step that the bits allow are rounding."""
    inf = torch.tensor(torch.inf)
    gaps = x.sort(1).values.diff(dim=1)
    noise = gaps.sum(1, keepdim=True) * 2.0 ** -(bits + 2)
    left = torch.cat([torch.where(gaps > noise, gaps, inf), inf.expand(x.shape[0], 1)], 1)
    step = left.amin(1, keepdim=True)
    for _ in range(bits + 2):
        rest = (left - (left / step).round() * step).abs()
        left = torch.cat([torch.where(rest > noise, rest, inf), step], 1)
        smaller = torch.where(rest > noise, rest, inf).amin(1, keepdim=True)
        if smaller.isinf().all():
            break
        step = torch.minimum(step, smaller)
    count = (gaps / step).round().sum(1, keepdim=True)  # the mean over all gaps is the most precise
    return torch.where(count > 0, gaps.sum(1, keepdim=True) / count, inf)


def _neighbours(fmt: Format, scale: Tensor) -> list[Tensor]:
    """A scale, and the two beside it where it is stored as fp32: a quotient of rounded products may miss by one."""
    if fmt.scale is None or not isinstance(fmt.scale.grid, Real) or fmt.scale.grid.name != "fp32":
        return [scale]
    return [scale, *(torch.nextafter(scale, torch.tensor(bound)) for bound in (torch.inf, -torch.inf))]


def _exact_somewhere(fmt: Format, x: Tensor, ideas: list[Params]) -> list[int]:
    """Which of the ideas give some row of different numbers without error: of few numbers all in one pass, since `store` asks this
    of a few scales at every step of training; of many, one by one, since each pass takes the memory of them all."""
    spread = x.amax(1) > x.amin(1)

    def every(parts: list[Tensor | None]) -> Tensor | None:
        found = [part for part in parts if part is not None]
        return torch.cat(found) if found else None

    kept: list[int] = []
    at_once = max(1, FEW // max(1, x.numel()))
    for i in range(0, len(ideas), at_once):
        some = ideas[i : i + at_once]
        stacked = _settle(fmt, Params(every([idea.scale for idea in some]), every([idea.offset for idea in some])))
        error = _error(fmt, x.repeat(len(some), 1), None, stacked).view(len(some), -1)
        kept += (((error == 0) & spread).any(1).nonzero().flatten() + i).tolist()
    return kept


def _least_squares(fmt: Format, x: Tensor, codes: Tensor, params: Params, weight: Tensor | None) -> Params:
    """Scale (and minimum) of each row that fit ``x`` best given the codes; zero points stay."""
    level = _level(fmt, codes, params.table, None)
    h = torch.ones_like(x) if weight is None else weight
    if params.offset is not None and fmt.zero is not None:
        level = level - params.offset
    if fmt.scale is None or params.scale is None:
        return params
    if fmt.min is None:
        top, bottom = (h * level * x).sum(1, keepdim=True), (h * level * level).sum(1, keepdim=True)
        scale = torch.where(bottom > 0, top / bottom, params.scale)
        if not fmt.scale.signed:
            scale = torch.where(scale > 0, scale, params.scale)
        return Params(scale, params.offset)
    total = h.sum(1, keepdim=True)
    mean_l, mean_x = (h * level).sum(1, keepdim=True) / total, (h * x).sum(1, keepdim=True) / total
    cov, var = (h * (level - mean_l) * (x - mean_x)).sum(1, keepdim=True), (h * (level - mean_l).square()).sum(1, keepdim=True)
    scale = torch.where((var > 0) & (cov > 0), cov / var, params.scale)
    offset = scale * mean_l - mean_x
    return Params(scale, offset if fmt.min.signed else offset.clamp(min=0))


def _fit_codebook(fmt: Format, w: Tensor, weight: Tensor | None, table: Tensor | None) -> Params:
    """Each block scaled by its largest magnitude and the table learned of what results; then, where one table has many scales, the
    best scales for the table, the table anew, and the scales again."""
    base = fmt.grid
    assert isinstance(base, Codebook)
    params = Params(_peaks(fmt, w, table), None, table)
    alone = fmt.scale is not None and fmt.table != CHANNEL and base.dim == 1
    if not w.numel() or table is not None:
        tables = w.shape[0] if fmt.table == CHANNEL else 1
        if table is None:
            return replace(params, table=torch.zeros(tables, base.k, base.dim))
        return _best_scales(fmt, w, weight, params) if alone and w.numel() else params
    for _ in range(2 if alone else 1):
        params = replace(params, table=_learn(fmt, base, *_in_units(fmt, w, weight, params.scale)))
        params = _best_scales(fmt, w, weight, params) if alone else params
    return params


def _best_scales(fmt: Format, w: Tensor, weight: Tensor | None, params: Params) -> Params:
    """The scale of each block under a table of numbers that stays: a search over shares of the range, then two rounds of least
    squares, each kept only where the weighted squared error falls."""
    inner = replace(fmt, share=CHANNEL)  # one block is one row here
    blocks = _Blocks(fmt, w, weight)
    step, found = max(1, CHUNK // max(1, blocks.size)), []
    assert params.scale is not None
    for i in range(0, blocks.count, step):
        x, h = blocks.part(i, i + step)
        first = params.scale.reshape(-1, 1)[i : i + step]
        best, error = first, torch.full_like(first, torch.inf)
        for share in (1.0, *SHARES, None, None):
            old = Params(best, None, params.table)
            if share is None:
                new = _least_squares(inner, x, _round(inner, _scaled(inner, x, old, None, None), params.table, None), old, h)
            else:
                new = replace(old, scale=first * share)
            new = replace(_settle(fmt, new), table=params.table)
            lost = _error(inner, x, h, new)
            assert new.scale is not None
            best, error = torch.where(lost < error, new.scale, best), torch.minimum(lost, error)
        found.append(best)
    return replace(params, scale=torch.cat(found).reshape(params.scale.shape))


def shared_table(fmt: Format, matrices: Sequence[Tensor], importances: Sequence[Tensor | None] | None = None) -> Tensor:
    """One table (1, k, dim) for several matrices (rows, columns), each counting by its error relative to its own (weighted) size.

    It is what `fit` takes as ``table``. Of more than `POINTS` numbers an even share is looked at.
    """
    base = fmt.grid
    if not isinstance(base, Codebook):
        raise FormatError(f"{fmt} learns no table that could be shared")
    points, masses = [], []
    for w, importance in zip(matrices, importances or [None] * len(matrices), strict=True):
        if not w.numel():
            continue
        w = w.to(torch.float32)
        x, h = _in_units(fmt, w, None if importance is None else importance.float().expand(w.shape), _peaks(fmt, w, None))
        h = torch.ones_like(x) if h is None else h
        fill = (0, -x.shape[1] % base.dim)
        x, h = (torch.nn.functional.pad(t, fill).reshape(-1, base.dim) for t in (x, h))
        power = float((h.double() * x.double().square()).sum())
        points.append(x)
        masses.append(h * (x.numel() / power) if power else h)
    if not points:
        return torch.zeros(1, base.k, base.dim)
    x, h = torch.cat(points), torch.cat(masses)
    stride = -(-x.numel() // POINTS)
    return _learn(fmt, base, x[::stride].reshape(1, -1), h[::stride].reshape(1, -1))


def _peaks(fmt: Format, w: Tensor, table: Tensor | None) -> Tensor | None:
    """The scales that bring the largest magnitude of each block to the table's end: 1, the largest whole number, or its own."""
    assert isinstance(fmt.grid, Codebook)
    if fmt.scale is None:
        return None
    blocks = _Blocks(fmt, w, None)
    scale = blocks.w.abs().amax(1).reshape(blocks.grid) if blocks.count else torch.zeros(blocks.grid)
    end = table.abs().max() if table is not None and table.numel() else torch.tensor(float(fmt.grid.whole or 1))
    return scale / torch.where(end > 0, end, torch.ones(()))


def _in_units(fmt: Format, w: Tensor, weight: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``w`` over its stored scales, and what each number's error counts there: in the weight's units, so by the scale squared."""
    stored = Stored(_stored_scale(fmt, scale), None, None)
    x = _scaled(fmt, w, stored, None, None)
    if stored.scale is None:
        return x, weight
    spread = _spread(stored.scale, fmt, w, None, None)
    square = (spread / spread.abs().max().clamp(min=torch.finfo(torch.float32).tiny)).square().expand(w.shape)
    return x, square if weight is None else weight * square


def _stored_scale(fmt: Format, scale: Tensor | None) -> Tensor | None:
    part = _stored_part(fmt, fmt.scale, scale, "scale")
    return part.matrix_values() if part is not None else None


def _learn(fmt: Format, base: Codebook, x: Tensor, weight: Tensor | None) -> Tensor:
    """The table (tables, k, dim) of scaled numbers ``x``."""
    from .kmeans import kmeans, kmeans_vectors, kmeans_whole

    if base.law == "log":
        return _fit_log(base, x, weight, per_row=fmt.table == CHANNEL)
    if base.dim > 1:
        if fmt.table == CHANNEL:
            raise FormatError(f"{fmt}: vector codebooks are shared by @tensor or @model")
        short = -x.shape[1] % base.dim
        points = torch.nn.functional.pad(x, (0, short)).reshape(-1, base.dim)
        h = None if weight is None else torch.nn.functional.pad(weight, (0, short)).reshape(-1, base.dim).mean(1)
        return kmeans_vectors(points, h, base.k)[None]
    if fmt.table != CHANNEL:
        x, weight = x.reshape(1, -1), None if weight is None else weight.reshape(1, -1)
    if base.whole:
        return kmeans_whole(x, weight, base.k, base.whole)[..., None]
    return kmeans(x, weight, base.k)[..., None]


def _fit_log(base: Codebook, x: Tensor, weight: Tensor | None, per_row: bool) -> Tensor:
    """0 and +-top * b^-i with the base of least error, per row or for all rows; ``top`` is the largest magnitude."""
    rows = x if per_row else x.reshape(1, -1)
    h = None if weight is None else weight.reshape(rows.shape)
    top = rows.abs().amax(1, keepdim=True)
    powers = torch.arange((base.k - 1) // 2, dtype=torch.float32)
    best = error = None
    for b in [1.1 + 0.05 * i for i in range(29)]:
        half = top * torch.tensor(b) ** -powers
        table = torch.cat([-half, torch.zeros_like(top), half.flip(1)], 1)
        middle = (table[:, 1:] + table[:, :-1]) / 2
        near = torch.gather(table, 1, torch.searchsorted(middle, rows.contiguous(), right=True))
        diff = (near - rows).square()
        new = (diff if h is None else diff * h).sum(1, keepdim=True)
        best = table if best is None or error is None else torch.where(new < error, table, best)
        error = new if error is None else torch.minimum(new, error)
    assert best is not None
    return best[..., None]


def refit(fmt: Format, w: Tensor, codes: Tensor, params: Stored, importance: Tensor | None = None) -> Params:
    """See `Format.refit`: least-squares scales and minima per block; weighted means of a table's entries."""
    w = w.to(torch.float32)
    weight = None if importance is None else importance.to(torch.float32).expand(w.shape)
    level = _level(fmt, codes, params.table, None)[:, : w.shape[1]]
    if isinstance(fmt.grid, Codebook):
        return replace(Params(params.scale, params.offset, params.table), table=_refit_table(fmt, w, codes, params, weight))
    if params.scale is None:
        return Params(params.scale, params.offset, params.table)
    blocks, codes_of = _Blocks(fmt, w, weight), _Blocks(fmt, level, None)
    inner = replace(fmt, share=CHANNEL)
    flat = Params(params.scale.reshape(-1, 1), params.offset.reshape(-1, 1) if params.offset is not None else None)
    uniform = replace(inner, grid=Uniform(16))  # levels stand in for codes: they are already decoded
    found = _least_squares(uniform, blocks.w, codes_of.w, flat, blocks.weight)
    shape = params.scale.shape
    return Params(found.scale.reshape(shape) if found.scale is not None else None,
                  found.offset.reshape(shape) if found.offset is not None else None)  # fmt: skip


def _refit_table(fmt: Format, w: Tensor, codes: Tensor, params: Stored, weight: Tensor | None) -> Tensor:
    assert params.table is not None
    assert isinstance(fmt.grid, Codebook)
    x = _scaled(fmt, w, params, None, None)
    h = torch.ones_like(x) if weight is None else weight
    if params.scale is not None:
        h = h * _spread(params.scale, fmt, w, None, None).square()
    dim = fmt.grid.dim
    if fmt.grid.law:
        return params.table
    fill = (0, codes.shape[1] * dim - x.shape[1])
    x, h = (torch.nn.functional.pad(t, fill).reshape(x.shape[0], -1, dim) for t in (x, h))
    per_row = params.table.shape[0] > 1
    index = codes.long() + (torch.arange(codes.shape[0])[:, None] * fmt.grid.k if per_row else 0)
    size = params.table.shape[0] * fmt.grid.k
    total = torch.zeros(size, dim, dtype=torch.float64).index_add_(0, index.reshape(-1), (x * h).reshape(-1, dim).double())
    mass = torch.zeros(size, dim, dtype=torch.float64).index_add_(0, index.reshape(-1), h.reshape(-1, dim).double())
    old = params.table.reshape(size, dim).double()
    table = torch.where(mass > 0, total / mass, old).float().reshape(params.table.shape)
    return table.sort(1).values if dim == 1 else table
