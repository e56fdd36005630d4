"""The quadratic that solvers minimise: sum of d^T H d over a weight's rows, d the error of a row; no codes are chosen here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import FormatError

#: Shares of the Hessian's mean diagonal that are added to it, in turn, until it is positive definite.
DAMPING = (0.01, 0.1, 1.0, 10.0)


def check(w: Tensor, hessian: Tensor) -> None:
    """Refuse a Hessian that is no batch of (columns, columns), one for each equal run of rows of ``w`` (rows, columns)."""
    rows, cols = w.shape
    if hessian.ndim != 3 or hessian.shape[1:] != (cols, cols) or not len(hessian) or rows % len(hessian):
        raise FormatError(f"a weight of {rows} rows and {cols} columns cannot use a Hessian of shape {list(hessian.shape)}")


def damped(hessian: Tensor) -> tuple[Tensor, float]:
    """(positive definite Hessian, float64; the share of its mean diagonal that was added). Inputs that were always 0 have that
    mean on the diagonal: their columns stand alone. Raises `FormatError` where no share of `DAMPING` is enough.

    >>> h, share = damped(torch.eye(2)[None])
    >>> h[0].tolist(), share
    ([[1.01, 0.0], [0.0, 1.01]], 0.01)
    """
    turn = torch.arange(hessian.shape[1])
    for share, diagonal in _ladder(hessian):
        if _inverse_factor(hessian, turn, diagonal) is not None:
            return _firm(hessian, turn, diagonal), share
    raise FormatError(OVERFLOW)


def inverse_factor(hessian: Tensor, turn: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, its columns in the order ``turn``, float64.

    At most three matrices of its size are held beside it. Raises `FormatError` as `damped` does.
    """
    for _, diagonal in _ladder(hessian):
        if (upper := _inverse_factor(hessian, turn, diagonal)) is not None:
            return upper
    raise FormatError(OVERFLOW)


#: What is said where no damping helps.
OVERFLOW = "the Hessian is not positive definite, however damped: the calibration data overflows"


def _ladder(hessian: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Shares of the mean diagonal, and the diagonal (groups, columns) with each added."""
    diagonal = hessian.diagonal(dim1=1, dim2=2).double()
    dead = diagonal == 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mean == 0, 1.0, mean)
    alive = diagonal + torch.where(dead, mean, 0.0)
    return ((share, alive + share * mean) for share in DAMPING)


def _firm(hessian: Tensor, turn: Tensor, diagonal: Tensor) -> Tensor:
    firm = hessian[:, turn[:, None], turn].double()
    firm.diagonal(dim1=1, dim2=2).copy_(diagonal[:, turn])
    return firm


def _inverse_factor(hessian: Tensor, turn: Tensor, diagonal: Tensor) -> Tensor | None:
    """None where it or its inverse is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(_firm(hessian, turn, diagonal))
    if failed.any():
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed.any() else upper


def lost(d: Tensor, hessian: Tensor) -> Tensor:
    """d^T H d of every row of the errors ``d`` (rows, columns), float64.

    >>> lost(torch.tensor([[1.0, 2.0]]), torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])).tolist()
    [18.0]
    """
    d = d.double().view(len(hessian), -1, d.shape[1])
    return ((d @ hessian.double()) * d).sum(-1).flatten()


def importance(hessian: Tensor, rows: int) -> Tensor | None:
    """What each number's squared error counts when parameters are fitted: the damped diagonal, in a unit that float32 holds."""
    diagonal = hessian.diagonal(dim1=1, dim2=2).double()
    firm = diagonal + DAMPING[0] * diagonal.mean()  # what no input has touched yet may be touched later
    peak = firm.amax()
    if not peak > 0:
        return None
    return (firm / torch.exp2(torch.frexp(peak).exponent.double())).float().repeat_interleave(rows // len(diagonal), 0)
