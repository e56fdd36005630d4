"""HQQ: half-quadratic quantization, without data: a few large errors are allowed so that the many others get smaller; any format.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Theirs moves a real zero point; here whatever
the format lets one refit (scale, minimum, table) follows the weight less its sparse error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats.format import Format
from ..formats.qtensor import QTensor, packed, to_matrix
from .rtn import rtn

#: The power of the error, as in the paper; its weight at the start, in units of the error of rounding; by how much that grows
#: each round; rounds at most.
POWER, BETA, GROWTH, ROUNDS = 0.7, 3.0, 1.05, 20


def hqq(weight: Tensor, format: Format, importance: Tensor | None = None, axis: int = 0, table: Tensor | None = None) -> QTensor:
    """Quantize ``weight`` so that sum |error|^0.7 is small; what is found is never worse in that than rounding to nearest.

    Arguments and errors as in `rtn`.

    >>> hqq(torch.randn(4, 64), Format.parse("uint4/g32*fp16-fp16")).dequantize().shape
    torch.Size([4, 64])
    """
    w = to_matrix(weight.detach(), axis).float()
    if not w.numel() or table is not None:
        return rtn(weight, format, importance, axis, table)
    params = format.store(format.fit(w, importance))
    codes = format.encode(w, params)
    unit = (format.decode(codes, params)[:, : w.shape[1]] - w).square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    best, least, beta = (codes, params), _cost(format.decode(codes, params)[:, : w.shape[1]] - w), BETA
    for _ in range(ROUNDS):
        error = (w - format.decode(codes, params)[:, : w.shape[1]]) / unit
        size = error.abs()
        sparse = error.sign() * (size - size.clamp(min=1e-8).pow(POWER - 1) / beta).clamp(min=0) * unit
        try:
            params = format.store(format.refit(w - sparse, codes, params, importance))
        except FormatError:  # what the refit asks for is beyond the stored type; the best so far stands
            break
        codes = format.encode(w, params)
        cost = _cost(format.decode(codes, params)[:, : w.shape[1]] - w)
        if cost < least:
            best, least = (codes, params), cost
        beta *= GROWTH
    return packed(format, *best, tuple(weight.shape), axis)


def _cost(error: Tensor) -> float:
    return float(error.double().abs().pow(POWER).sum())
