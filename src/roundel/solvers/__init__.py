"""Solvers: (weight, Format, Stats) -> QTensor. One file each; none knows a network."""

from .rtn import rtn

#: name -> solver, as `quantize(solver=...)` takes it.
SOLVERS = {"rtn": rtn}

__all__ = ["SOLVERS", "rtn"]
