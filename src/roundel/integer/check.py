"""Proofs about an integer graph: no sum leaves int32, whatever the input; nothing between the doors is float. It runs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import CheckError, InputError, RoundelError
from ..graph import Graph, Node
from .dialect import INTEGER, Ints, rescaled, shift_away
from .fixed import SUM_BITS
from .ops import Pool, Range, extremes, numbers

INT32 = extremes("int32")


def accumulators(pool: Pool, node: Node) -> Range | None:
    """Lowest and highest sum that ``node`` can ever hold, in any order of adding; None for one that does not sum.

    A bound over every input that the codes can express, not over data: each product lies in an interval around 0, so partial sums
    lie within the whole. Raises `InputError` where it, or what a rescale shifts left, does not fit int32.
    """
    a = node.attrs
    if "rounding" not in a and node.op != "avg_pool":
        return None
    shift = np.asarray(a.get("shift", 0), np.int64)
    if node.op in ("conv", "linear"):
        w, bias, shift = (numbers(pool, node.inputs[i]) for i in (1, 2, 4))
        w = w.reshape(w.shape[0], -1)
        x_low, x_high = _around(pool, node.inputs[0], a["x_zero"])
        plus, minus = np.maximum(w, 0).sum(1), np.minimum(w, 0).sum(1)
        ends = np.stack([plus * x_low + minus * x_high + np.minimum(bias, 0), plus * x_high + minus * x_low + np.maximum(bias, 0)])
    elif node.op == "add":
        ends = np.zeros(2, np.int64)
        for i, zero in enumerate((a["a_zero"], a["b_zero"])):
            term = np.array(_around(pool, node.inputs[i], zero)) << a["left"]
            _fits(term, shift[i])
            ends += np.sort(rescaled(term, a["multiplier"][i], shift[i], a["rounding"]))
        shift = shift[2:]
    elif node.op == "softmax":
        largest = shift_away(numbers(pool, node.inputs[1]), 31 - SUM_BITS).max()
        ends = np.array([0, largest * size(pool, node.inputs[0], [a["axis"]])])
    else:
        count = size(pool, node.inputs[0], a["axes"]) if node.op == "sum" else math.prod(a.get("kernel", ()))
        ends = np.array(_around(pool, node.inputs[0], a.get("x_zero", 0))) * count
    _fits(ends, shift)
    return int(ends.min()), int(ends.max())


def _fits(ends: Ints, shift: Ints) -> None:
    shifted = ends << np.maximum(shift, 0)
    if shifted.min() < INT32[0] or shifted.max() > INT32[1]:
        raise InputError(f"its sums reach {shifted.min():,} to {shifted.max():,}, past int32")


def _around(pool: Pool, name: str, zero: int) -> Range:
    """What code - zero can be."""
    low, high = extremes(pool.values[name].dtype)
    if not low <= zero <= high:
        raise InputError(f"the zero point {zero} of {name!r} is no {pool.values[name].dtype}")
    return low - zero, high - zero


def size(pool: Pool, name: str, axes: Sequence[int]) -> int:
    """How many elements of a value lie along ``axes``."""
    sizes = [pool.values[name].shape[axis] for axis in axes]
    if symbolic := [n for n in sizes if isinstance(n, str)]:
        raise InputError(f"it sums over {symbolic[0]!r}, whose size is not known")
    return math.prod(int(n) for n in sizes)


def check_integer(graph: Graph) -> None:
    """Raise `CheckError` with every reason why ``graph`` is not integer arithmetic between its doors.

    The doors are `quantize`, which reads graph inputs alone, and `dequantize`, which nothing reads. Every rescale names an integer
    dialect, every value and constant is an integer of at most 32 bits, every sum keeps to int32, and the range each node records
    (``acc``) is the one that its weights prove.
    """
    if graph.opset != "integer":
        raise CheckError("this graph holds real operations; roundel.lower makes an integer graph of a quantized model")
    stored = (torch.uint8, torch.int32)
    wrong = [f"{name}: a constant of {tensor.dtype}" for name, tensor in graph.constants.items() if tensor.dtype not in stored]
    reals = {name for node in graph if node.op == "dequantize" for name in node.outputs} | set(graph.inputs)
    for name in graph.values.keys() - reals:
        try:
            extremes(graph.values[name].dtype)
        except InputError as err:
            wrong.append(f"{name}: {err}")
    for node in graph:
        if node.op != "quantize" and (read := reals.intersection(node.inputs)):
            wrong.append(f"{node.name} ({node.op}) computes with {min(read)!r}, which is real")
        if node.op == "quantize" and node.inputs[0] not in graph.inputs:
            wrong.append(f"{node.name} (quantize) is inside the network")
        if (rounding := node.attrs.get("rounding", "R1")) not in INTEGER:
            wrong.append(f"{node.name} ({node.op}) rounds by {rounding}, which is float arithmetic")
        try:
            proven = accumulators(graph, node)
        except (RoundelError, KeyError, IndexError, TypeError, ValueError) as err:
            wrong.append(f"{node.name} ({node.op}): {err}")
            continue
        if proven and tuple(node.attrs.get("acc", ())) != proven:
            wrong.append(f"{node.name} ({node.op}) records sums in {node.attrs.get('acc')}, its weights prove {list(proven)}")
    if wrong:
        raise CheckError(f"{len(wrong)} things in this graph are not integer arithmetic:\n  " + "\n  ".join(wrong))
