"""GPTQ: columns rounded one step at a time, each error carried into the columns that are still free; any format, no network.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". Parameters are fixed
before the first column ("static groups"), so columns may go in any order: the heaviest inputs first ("act-order").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats.format import Format
from ..formats.qtensor import QTensor, packed, to_matrix
from .rtn import rtn

#: Shares of the Hessian's mean diagonal that are added to it, in turn, until it is positive definite.
DAMPING = (0.01, 0.1, 1.0, 10.0)

#: Columns whose errors are gathered before the rest of the matrix is touched.
BLOCK = 128


def gptq(weight: Tensor, format: Format, hessian: Tensor, axis: int = 0, table: Tensor | None = None) -> QTensor:
    """Quantize ``weight`` so that sum d^T H d over its rows is small, d being the error of a row.

    ``hessian`` (groups, columns, columns) is the second moment of the inputs, one for each equal run of rows (a convolution's
    groups), in any unit. Inputs that were always 0 are rounded to nearest. Raises `FormatError` for a Hessian of another shape,
    or one that no damping makes positive definite.

    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> gptq(torch.randn(4, 8), Format.parse("int4"), (x.T @ x)[None] / 64).dequantize().shape
    torch.Size([4, 8])
    """
    w = to_matrix(weight.detach(), axis).float()
    rows, cols = w.shape
    if not w.numel():
        return rtn(weight, format, axis=axis, table=table)
    if hessian.ndim != 3 or hessian.shape[1:] != (cols, cols) or not len(hessian) or rows % len(hessian):
        raise FormatError(f"a weight of {rows} rows and {cols} columns cannot use a Hessian of shape {list(hessian.shape)}")
    groups = len(hessian)
    diagonal = hessian.diagonal(dim1=1, dim2=2).double()
    params = format.store(format.fit(w, _importance(diagonal, rows), table))
    order = _order(diagonal, format.step)
    u = _factor(hessian[:, order][:, :, order])
    work = w.double()[:, order]
    codes: dict[int, Tensor] = {}
    width = BLOCK // format.step * format.step or format.step
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        errors = torch.zeros(groups, rows // groups, stop - start, dtype=torch.float64)
        for at in torch.arange(start, stop).split(format.step):
            original = order[at]
            code = format.encode(work[:, at].float(), params, original)
            codes[int(original[0])] = code
            lost = (work[:, at] - format.decode(code, params, original).double()).view(groups, -1, len(at))
            error = torch.linalg.solve_triangular(u[:, at][..., at], lost, upper=True, left=False)
            errors[..., at - start] = error
            rest = torch.arange(int(at[-1]) + 1, stop)
            work[:, rest] -= (error @ u[:, at][..., rest]).reshape(rows, -1)
        work[:, stop:] -= (errors @ u[:, start:stop, stop:]).reshape(rows, -1)
    ordered = torch.cat([codes[first] for first in sorted(codes)], 1)
    return packed(format, ordered, params, tuple(weight.shape), axis)


def _importance(diagonal: Tensor, rows: int) -> Tensor | None:
    """What each number's squared error counts when the scales are fitted: the damped diagonal, in a unit that float32 holds."""
    damped = diagonal + DAMPING[0] * diagonal.mean()  # what no input has touched yet may be touched later
    peak = damped.amax()
    if not peak > 0:
        return None
    return (damped / torch.exp2(torch.frexp(peak).exponent.double())).float().repeat_interleave(rows // len(diagonal), 0)


def _order(diagonal: Tensor, step: int) -> Tensor:
    """Columns by falling mean of their step's diagonal; a short last step stays last, so that steps stay whole."""
    cols = diagonal.shape[1]
    whole = torch.arange(cols // step * step).view(-1, step)
    heavy = diagonal.mean(0)[whole].mean(1).argsort(descending=True, stable=True)
    return torch.cat([whole[heavy].flatten(), torch.arange(whole.numel(), cols)])


def _factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of each damped Hessian, float64."""
    h = hessian.double().clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0  # an input that is always 0 says nothing: its column stands alone
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mean == 0, 1.0, mean)
    diagonal += torch.where(dead, mean, 0.0)
    for share in DAMPING:
        damped = h + torch.diag_embed((share * mean).expand_as(diagonal))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any():
                return upper
    raise FormatError("the Hessian is not positive definite, however damped: the calibration data overflows")
