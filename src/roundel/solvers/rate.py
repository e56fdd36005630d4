"""Rounding that counts bits: the error of each code against its length under the tensor's own code statistics; knows no coder.

Entropy-constrained quantization (Chou, Lookabaugh and Gray 1989): codes are chosen under the lengths that their own frequencies
give them, -log2 of each code's share, then scales or table are fitted to the codes, and again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats.codec import Stored
from ..formats.format import Format
from ..formats.grid import Codebook, Levels, Uniform
from ..formats.grid import table as catalogue
from ..formats.qtensor import QTensor, packed, to_matrix
from .rtn import rtn

#: Rounds of codes, lengths and parameters.
ROUNDS = 3
#: Integers of more bits than this look at the codes this near to the nearest one alone.
ALL, NEAR = 6, 4


def rate(weight: Tensor, format: Format, importance: Tensor | None = None, axis: int = 0, table: Tensor | None = None,
         bits_weigh: float = 1.0) -> QTensor:  # fmt: skip
    """Quantize ``weight`` so that (weighted squared error + lambda * bits of entropy-coded codes) is small.

    ``bits_weigh`` is lambda in units of the mean weighted squared error of a code rounded to nearest: 1 lets a code that is one bit
    shorter cost as much error as rounding costs on average; 0 is rounding to nearest. Other arguments and errors as in `rtn`; a
    ``table`` that is given stays. `FormatError` also for grids of more than 8 bits, whose codes no stream holds.

    >>> w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> near, cheap = (entropy(rate(w, Format.parse("int4"), bits_weigh=weigh)) for weigh in (0.0, 8.0))
    >>> cheap < near - 0.1
    True
    """
    first = rtn(weight, format, importance, axis, table)
    if not first.codes.numel() or bits_weigh <= 0:
        return first
    w = to_matrix(weight.detach(), axis).float()
    h = torch.ones_like(w) if importance is None else importance.float().expand(w.shape)
    params, codes = first.params, first.unpack()
    alphabet = _alphabet(format)
    unit = float(_error(format, codes, params, w, h).mean())
    if not unit > 0:  # nothing is lost, so no bit can be bought
        return first
    for _ in range(ROUNDS):
        length = _lengths(codes, alphabet)
        codes = _choose(format, codes, params, w, h / unit, alphabet, bits_weigh * length)
        if table is not None:
            continue
        try:
            new = format.store(format.refit(w, codes, params, h))
        except FormatError:  # a least-squares solution may leave what the stored type holds; the old one stays
            continue
        if float(_error(format, codes, new, w, h).sum()) < float(_error(format, codes, params, w, h).sum()):
            params = new
    return packed(format, codes, params, tuple(weight.shape), axis)


def entropy(q: QTensor) -> float:
    """Bits per code that the frequencies of the codes of ``q`` leave: what an ideal coder without context would take."""
    count = q.unpack().unique(return_counts=True)[1].double()
    return float(-(count / count.sum() * (count / count.sum()).log2()).sum())


def _alphabet(format: Format) -> Tensor:
    """Every code, rising."""
    grid = format.grid
    if format.bits > 8:
        raise FormatError(f"{format}: rounding by rate knows grids of up to 8 bits")
    if isinstance(grid, Uniform):
        low, high = (int(end) for end in format.extremes)
        return torch.arange(low, high + 1, dtype=torch.int32)
    if isinstance(grid, Levels):
        return torch.tensor(sorted(catalogue(grid.name).codes), dtype=torch.int32)
    assert isinstance(grid, Codebook)
    return torch.arange(grid.k, dtype=torch.int32)


def _lengths(codes: Tensor, alphabet: Tensor) -> Tensor:
    """Bits of each code of the alphabet; one that never came is as long as half a code would be."""
    count = torch.zeros(len(alphabet)).index_add_(0, torch.searchsorted(alphabet, codes.flatten()), torch.ones(codes.numel()))
    share = (count + 0.5) / (count + 0.5).sum()
    return -share.log2()


def _error(format: Format, codes: Tensor, params: Stored, w: Tensor, h: Tensor) -> Tensor:
    """Weighted squared error of each code (rows, codes of a row)."""
    each = h * (format.decode(codes, params)[:, : w.shape[1]] - w).square()
    return torch.nn.functional.pad(each, (0, -w.shape[1] % format.step)).unflatten(1, (-1, format.step)).sum(2)


def _choose(format: Format, codes: Tensor, params: Stored, w: Tensor, h: Tensor, alphabet: Tensor, price: Tensor) -> Tensor:
    """The code of least error plus price, everywhere: of all codes, or of those near the nearest and the cheapest."""
    if format.bits <= ALL or not isinstance(format.grid, Uniform):
        offers = [torch.full_like(codes, int(code)) for code in alphabet]
    else:
        near = format.encode(w, params)
        offers = [(near + by).clamp(int(alphabet[0]), int(alphabet[-1])) for by in range(-NEAR, NEAR + 1)]
    best, least = codes, torch.full(codes.shape, torch.inf)
    for offer in offers:
        cost = _error(format, offer, params, w, h) + price[torch.searchsorted(alphabet, offer)]
        best, least = torch.where(cost < least, offer, best), torch.minimum(cost, least)
    return best
