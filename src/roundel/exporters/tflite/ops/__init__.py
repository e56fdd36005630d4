"""One function per integer operation: the TFLite operators that compute it, or a PlanError that says why none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....graph import Node
from ..translation import Translation
from . import moves, pointwise, sums, weighted, windows

#: Integer operation -> what writes it.
TRANSLATE: Mapping[str, Callable[[Translation, Node], Any]] = {
    "conv": weighted.conv, "conv_transpose": weighted.conv_transpose, "linear": weighted.linear, "matmul": weighted.matmul,
    "embedding": weighted.embedding,
    "add": pointwise.add, "sub": pointwise.add, "mul": pointwise.mul, "rescale": pointwise.rescale, "prelu": pointwise.prelu,
    "softmax": pointwise.softmax, "table": pointwise.table,
    "sum": sums.sum_, "sum_pool": sums.sum_pool, "amax": sums.amax, "argmax": sums.argmax,
    "avg_pool": windows.pool, "max_pool": windows.pool,
    "reshape": moves.reshape, "transpose": moves.transpose, "slice": moves.slice_, "concat": moves.concat, "pad": moves.pad,
    "gather": moves.gather, "depth_to_space": moves.depth_to_space, "resize": moves.resize,
}  # fmt: skip
