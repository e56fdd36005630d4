"""GPTQ: columns rounded one step at a time, each error carried into the columns that are still free; any format, no network.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". Parameters are fixed
before the first column ("static groups"), so columns may go in any order: the heaviest inputs first ("act-order"), or
group by group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..formats.codec import Stored
from ..formats.format import Format
from ..formats.qtensor import QTensor
from .frame import framed
from .quadratic import inverse_factor

#: Columns whose errors are gathered before the rest of the matrix is touched.
BLOCK = 128

#: heavy: by falling diagonal; group: groups that share a scale by their largest diagonal, so inside each too; none: as they come.
Order = Literal["heavy", "group", "none"]


def gptq(weight: Tensor, format: Format, hessian: Tensor, axis: int = 0, table: Tensor | None = None,
         order: Order = "heavy") -> QTensor:  # fmt: skip
    """Quantize ``weight`` so that sum d^T H d over its rows is small, d being the error of a row.

    ``hessian`` (groups, columns, columns) is the second moment of the inputs, one for each equal run of rows (a convolution's
    groups), in any unit. Inputs that were always 0 are rounded to nearest. Raises `FormatError` for a Hessian of another shape,
    or one that no damping makes positive definite.

    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> gptq(torch.randn(4, 8), Format.parse("int4"), (x.T @ x)[None] / 64).dequantize().shape
    torch.Size([4, 8])
    """

    def choose(w: Tensor, params: Stored) -> tuple[Tensor, Stored]:
        return carried(w, format, params, hessian, order), params

    return framed(choose, weight, format, hessian, axis, table)


def carried(w: Tensor, format: Format, params: Stored, hessian: Tensor, order: Order = "heavy") -> Tensor:
    """The codes of ``w`` (rows, columns) under fixed parameters."""
    rows, cols = w.shape
    groups = len(hessian)
    turn = _turn(hessian.diagonal(dim1=1, dim2=2).double(), format, order)
    u = inverse_factor(hessian, turn)
    work = w.double()[:, turn]
    codes: dict[int, Tensor] = {}
    width = BLOCK // format.step * format.step or format.step
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        errors = torch.zeros(groups, rows // groups, stop - start, dtype=torch.float64)
        for at in torch.arange(start, stop).split(format.step):
            original = turn[at]
            code = format.encode(work[:, at].float(), params, original)
            codes[int(original[0])] = code
            gone = (work[:, at] - format.decode(code, params, original).double()).view(groups, -1, len(at))
            own = u[:, at][..., at]
            error = gone / own if len(at) == 1 else torch.linalg.solve_triangular(own, gone, upper=True, left=False)
            errors[..., at - start] = error
            rest = torch.arange(int(at[-1]) + 1, stop)
            work[:, rest] -= (error @ u[:, at][..., rest]).reshape(rows, -1)
        work[:, stop:] -= (errors @ u[:, start:stop, stop:]).reshape(rows, -1)
    return torch.cat([codes[first] for first in sorted(codes)], 1)


def _turn(diagonal: Tensor, format: Format, order: Order) -> Tensor:
    """Columns in the order in which they are rounded; a short last step stays last, so that steps stay whole."""
    cols, step = diagonal.shape[1], format.step
    whole = torch.arange(cols // step * step).view(-1, step)
    weight = diagonal.mean(0)[whole].mean(1)
    if order == "none":
        weight = -torch.arange(len(whole), dtype=weight.dtype)
    elif order == "group":
        width = format.share.block((1, cols))[1]
        group = whole[:, 0] // width
        peak = torch.full((int(group.amax()) + 1 if len(group) else 0,), -torch.inf, dtype=weight.dtype)
        peak = peak.scatter_reduce(0, group, weight, "amax")
        inside = weight.argsort(descending=True, stable=True)
        first = inside[_rank(peak)[group[inside]].argsort(stable=True)]
        return torch.cat([whole[first].flatten(), torch.arange(whole.numel(), cols)])
    return torch.cat([whole[weight.argsort(descending=True, stable=True)].flatten(), torch.arange(whole.numel(), cols)])


def _rank(peak: Tensor) -> Tensor:
    """The place of each group when groups fall by ``peak``."""
    return peak.argsort(descending=True, stable=True).argsort()
