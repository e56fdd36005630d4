"""Solvers: (weight, Format, what the data says) -> QTensor. One file each; none knows a network."""

from collections.abc import Callable

from ..formats.qtensor import QTensor
from .gptq import gptq
from .rtn import rtn

#: name -> solver, as `quantize(solver=...)` takes it.
SOLVERS: dict[str, Callable[..., QTensor]] = {"rtn": rtn, "gptq": gptq}

#: Those whose third argument is the Hessian of the weight's inputs, so that they need data.
NEED_HESSIAN = frozenset(["gptq"])

__all__ = ["NEED_HESSIAN", "SOLVERS", "gptq", "rtn"]
