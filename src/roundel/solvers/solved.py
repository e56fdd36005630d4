"""`solved`: run a solver on one weight and say what it did there; the solvers themselves return tensors only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.format import Format
from ..formats.qtensor import QTensor, to_matrix
from .quadratic import damped, importance, lost
from .rtn import rtn

#: Numbers of a weight whose error is computed at a time.
CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Solved:
    """What a solver did to one weight: errors d^T H d summed over rows relative to w^T H w (0 = exact, 1 = all zeros), of rounding
    to nearest and of the solver; the share of the Hessian's mean diagonal that was added to it; inputs that were always 0."""

    tensor: QTensor
    before: float
    after: float
    damping: float
    dead: int
    seconds: float

    def __str__(self) -> str:
        more = f", damped by {self.damping:g}" if self.damping > 0.01 else ""
        return f"error {self.before:.3g} to {self.after:.3g}{more}" + (f", {self.dead} inputs always 0" if self.dead else "")


def solved(solve: Callable[..., QTensor], weight: Tensor, format: Format, hessian: Tensor, axis: int = 0,
           table: Tensor | None = None, near: QTensor | None = None) -> Solved:  # fmt: skip
    """``solve(weight, format, hessian)`` with its account, against ``near``: the weight rounded to nearest, or as it was before.
    Raises as the solver does.

    >>> import torch
    >>> from roundel.solvers import gptq
    >>> x, w = torch.randn(72, 16, generator=torch.Generator().manual_seed(0)).split([64, 8])
    >>> found = solved(gptq, w, Format.parse("int3"), ((x + 2 * x[:, :1]).T @ (x + 2 * x[:, :1]))[None])
    >>> found.after < found.before, found.damping, found.dead
    (True, 0.01, 0)
    """
    begin = time.perf_counter()
    tensor = solve(weight, format, hessian, axis=axis, table=table)
    seconds = time.perf_counter() - begin
    w = to_matrix(weight.detach(), axis)
    if not w.numel():
        return Solved(tensor, 0.0, 0.0, 0.0, 0, seconds)
    firm, share = damped(hessian)
    near = rtn(weight, format, importance(hessian, len(w)), axis, table) if near is None else near
    whole = _lost(w, None, firm) or 1.0
    before, after = (_lost(w, q, firm) / whole for q in (near, tensor))
    dead = int((hessian.diagonal(dim1=1, dim2=2) == 0).sum())
    return Solved(tensor, before, after, share, dead, seconds)


def _lost(w: Tensor, q: QTensor | None, firm: Tensor) -> float:
    """`lost` of what ``q`` makes of ``w``, or of ``w`` without it, summed over the rows, some of them at a time."""
    step = max(1, CHUNK // w.shape[1] // len(firm))
    parts = (part.flatten() for part in torch.arange(len(w)).view(len(firm), -1).split(step, 1))
    errors = (w[rows].float() if q is None else q.matrix_values(rows) - w[rows].float() for rows in parts)
    return sum(float(lost(d, firm).sum()) for d in errors)
