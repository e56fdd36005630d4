"""Solvers: (weight, Format, what the data says) -> QTensor. One file each; none knows a network."""

from collections.abc import Callable

from ..formats.qtensor import QTensor
from .alternate import alternate
from .descent import descent
from .gptq import gptq
from .hqq import hqq
from .rtn import rtn
from .solved import Solved, solved

#: name -> solver, as `quantize(solver=...)` takes it.
SOLVERS: dict[str, Callable[..., QTensor]] = {"rtn": rtn, "hqq": hqq, "gptq": gptq, "descent": descent, "alternate": alternate}

#: Those whose third argument is the Hessian of the weight's inputs, so that they need data.
NEED_HESSIAN = frozenset(["gptq", "descent", "alternate"])

__all__ = ["NEED_HESSIAN", "SOLVERS", "Solved", "alternate", "descent", "gptq", "hqq", "rtn", "solved"]
