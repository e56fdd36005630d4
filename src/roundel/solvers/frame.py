"""What every solver with a Hessian does before and after it chooses codes: the matrix, the fitted parameters, the packing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..formats.codec import Stored
from ..formats.format import Format
from ..formats.qtensor import QTensor, packed, to_matrix
from .quadratic import check, importance
from .rtn import rtn

#: (weight as (rows, columns), parameters fitted to it) -> (codes, parameters): the latter the same, or better ones.
Choose = Callable[[Tensor, Stored], tuple[Tensor, Stored]]


def framed(choose: Choose, weight: Tensor, format: Format, hessian: Tensor, axis: int, table: Tensor | None) -> QTensor:
    """``weight`` in the codes that ``choose`` finds for it, parameters fitted under the Hessian's diagonal; arguments and errors
    as in `gptq`. An empty weight has none to choose."""
    w = to_matrix(weight.detach(), axis).float()
    if not w.numel():
        return rtn(weight, format, axis=axis, table=table)
    check(w, hessian)
    params = format.store(format.fit(w, importance(hessian, len(w)), table))
    return packed(format, *choose(w, params), tuple(weight.shape), axis)
