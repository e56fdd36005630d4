"""Proofs about an integer graph: no sum leaves its type, whatever comes; nothing between the doors is float. It runs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import CheckError, InputError, RoundelError
from ..graph import Graph, Node
from . import running
from .dialect import INTEGER, Ints, rescaled, shift_away
from .fixed import SUM_BITS
from .ops import Pool, Range, extremes, levels, numbers

INT32 = extremes("int32")

#: Sums of a node marked ``wide``: 64-bit accumulators of which 48 are used, so that their product with a multiplier fits.
WIDE = (-(1 << 47), (1 << 47) - 1)


def accumulators(pool: Pool, node: Node) -> tuple[int, ...] | None:
    """Lowest and highest sum that ``node`` can ever hold, in any order of adding; None for one that does not sum.

    A bound over every input that the codes can express, not over data: each product lies in an interval around 0, so partial sums
    lie within the whole. Operations of several sums give a pair for each. Raises `InputError` where one, or what a rescale shifts
    left, does not fit int32 (2^47 for ``wide`` sums).
    """
    if "rounding" not in node.attrs and node.op != "avg_pool":
        return None
    return _SUMS.get(node.op, _places)(pool, node)


def _fits(ends: Ints, shift: Any, wide: bool = False) -> tuple[int, int]:
    """The ends of what lies in ``ends``, which fits even shifted left as a rescale by ``shift`` does it."""
    shifted = ends if wide else ends << np.maximum(shift, 0)
    low, high = WIDE if wide else INT32
    if shifted.min() < low or shifted.max() > high:
        raise InputError(f"its sums reach {shifted.min():,} to {shifted.max():,}, past {'2^47' if wide else 'int32'}")
    return int(ends.min()), int(ends.max())


def _around(pool: Pool, name: str, zero: int) -> Range:
    """What code - zero can be."""
    low, high = extremes(pool.values[name].dtype)
    if not low <= zero <= high:
        raise InputError(f"the zero point {zero} of {name!r} is no {pool.values[name].dtype}")
    return low - zero, high - zero


def _products(a: Range, b: Range) -> Ints:
    """Ends of what a product of two such numbers can be."""
    found = np.outer(a, b)
    return np.array([found.min(), found.max()])


def size(pool: Pool, name: str, axes: Sequence[int]) -> int:
    """How many elements of a value lie along ``axes``."""
    sizes = [pool.values[name].shape[axis] for axis in axes]
    if symbolic := [n for n in sizes if isinstance(n, str)]:
        raise InputError(f"it sums over {symbolic[0]!r}, whose size is not known")
    return math.prod(int(n) for n in sizes)


# -- the sums of each operation -----------------------------------------------------------------------------------------


def weighted_ends(w: Ints, bias: Ints, x: Range) -> Ints:
    """Lowest and highest sum (2, out) of rows of w with numbers of the range x, and of ``bias``."""
    w = w.reshape(w.shape[0], -1)
    plus, minus = np.maximum(w, 0).sum(1), np.minimum(w, 0).sum(1)
    return np.stack([plus * x[0] + minus * x[1] + np.minimum(bias, 0), plus * x[1] + minus * x[0] + np.maximum(bias, 0)])


def _weighted(pool: Pool, node: Node) -> tuple[int, ...]:
    w, bias, shift = (numbers(pool, node.inputs[i]) for i in (1, 2, 4))
    w = levels(w, numbers(pool, node.inputs[5]) if len(node.inputs) > 5 else None)
    more, finer = running.widest(node)
    ends = weighted_ends(w, bias << finer, _around(pool, node.inputs[0], node.attrs["x_zero"]))
    return _fits(ends, shift + more, node.attrs.get("wide", False))


def _embedding(pool: Pool, node: Node) -> tuple[int, ...]:
    w, shift = numbers(pool, node.inputs[1]), numbers(pool, node.inputs[3])
    rows = levels(w, numbers(pool, node.inputs[4]) if len(node.inputs) > 4 else None)
    return _fits(np.stack([np.minimum(rows, 0).min(1), np.maximum(rows, 0).max(1)]), shift)


def _matmul(pool: Pool, node: Node) -> tuple[int, ...]:
    a = node.attrs
    pair = _products(*(_around(pool, name, zero) for name, zero in zip(node.inputs, (a["a_zero"], a["b_zero"]), strict=True)))
    return _fits(pair * size(pool, node.inputs[0], [-1]), a["shift"], a.get("wide", False))


def _mul(pool: Pool, node: Node) -> tuple[int, ...]:
    a = node.attrs
    pair = _products(*(_around(pool, name, zero) for name, zero in zip(node.inputs, (a["a_zero"], a["b_zero"]), strict=True)))
    return _fits(pair, a["shift"] + running.widest(node)[0])


def _two_terms(pool: Pool, node: Node) -> tuple[int, ...]:
    a, ends = node.attrs, np.zeros(2, np.int64)
    for i, zero in enumerate((a["a_zero"], a["b_zero"])):
        term = np.array(_around(pool, node.inputs[i], zero)) << a["left"]
        _fits(term, a["shift"][i])
        finer = np.sort(rescaled(term, a["multiplier"][i], a["shift"][i], a["rounding"]))
        ends = ends - finer[::-1] if node.op == "sub" and i else ends + finer
    return _fits(ends, a["shift"][2] + running.widest(node)[0])


def _softmax(pool: Pool, node: Node) -> tuple[int, ...]:
    largest = shift_away(numbers(pool, node.inputs[1]), 31 - SUM_BITS).max()
    _fits(np.array([0, node.attrs.get("reach", 0)]), node.attrs.get("shift", 0))
    return _fits(np.array([0, largest * size(pool, node.inputs[0], [node.attrs["axis"]])]), 0)


def _attention(pool: Pool, node: Node) -> tuple[int, ...]:
    """Of the scores; of the sums of exp, in Q12.19; of the results, whose probabilities sum to 1 but for their rounding."""
    a, (q, k, v) = node.attrs, node.inputs[:3]
    keys, wide = size(pool, k, [-2]), a.get("wide", False)
    scores = _fits(_products(_around(pool, q, a["q_zero"]), _around(pool, k, a["k_zero"])) * size(pool, q, [-1]), 0, wide)
    _fits(np.array([0, scores[1] - scores[0]]), 0, wide)
    _fits(np.array([0, a["reach"]]), a["shift"][0], wide)
    totals = _fits(np.array([0, keys << SUM_BITS]), 0)
    one = (1 << a["bits"]) + (1 << max(a["bits"] - 7, 0)) + 2 * keys
    return *scores, *totals, *_fits(one * np.array(_around(pool, v, a["v_zero"])), a["shift"][1], wide)


def _norm(pool: Pool, node: Node) -> tuple[int, ...]:
    """Of the centred numbers; of the weighted results, no number being further than sqrt(n) of its mean's deviations."""
    a, n = node.attrs, size(pool, node.inputs[0], [-1])
    low, high = _around(pool, node.inputs[0], a["x_zero"])
    reach = high - low if a["centred"] else max(high, -low)
    centre = _fits(n * np.array([-reach, reach]), 0)
    if n * n * max(high, -low) ** 2 + a["eps"] >= 1 << 62 or a["eps"] < 0:
        raise InputError("its sums of squares reach past 2^62")
    weight, bias = (numbers(pool, name) for name in node.inputs[1:3])
    most = norm_reach(n, a["bits"]) * np.abs(weight)
    return *centre, *_fits(np.stack([np.minimum(bias, 0) - most, np.maximum(bias, 0) + most]), a["shift"], a.get("wide", False))


def norm_reach(n: int, bits: int) -> int:
    """What (x - mean) / deviation of n numbers is at most, in units of 2^-bits: sqrt(n), and what is rounded."""
    return math.isqrt(n << 2 * bits) + 2


def _places(pool: Pool, node: Node) -> tuple[int, ...]:
    """Sums, pools, and what sums nothing but a zero point."""
    a, shift = node.attrs, np.asarray(node.attrs.get("shift", 0)) + running.widest(node)[0]
    if node.op == "prelu":
        shift = numbers(pool, node.inputs[2]).max()
    count = size(pool, node.inputs[0], a["axes"]) if node.op == "sum" else math.prod(a.get("kernel", ()))
    count <<= 2 * a["bits"] if node.op == "resize" else 0
    return _fits(np.array(_around(pool, node.inputs[0], a.get("x_zero", 0))) * count, shift)


_SUMS: dict[str, Callable[[Pool, Node], tuple[int, ...]]] = {
    "conv": _weighted, "conv_transpose": _weighted, "linear": _weighted, "embedding": _embedding, "matmul": _matmul, "mul": _mul,
    "add": _two_terms, "sub": _two_terms, "softmax": _softmax, "attention": _attention, "norm": _norm,
}  # fmt: skip


# -- the whole graph ----------------------------------------------------------------------------------------------------


def check_integer(graph: Graph) -> None:
    """Raise `CheckError` with every reason why ``graph`` is not integer arithmetic between its doors.

    The doors are `quantize`, which reads graph inputs alone, and `dequantize`, which nothing reads. Every rescale names an integer
    dialect; every value is an integer of at most 32 bits, every constant and attribute an integer; every sum keeps to int32, or to
    2^47 in a node marked ``wide``; and the range each node records (``acc``) is the one that its weights prove.
    """
    if graph.opset != "integer":
        raise CheckError("this graph holds real operations; roundel.lower makes an integer graph of a quantized model")
    stored = (torch.uint8, torch.int32, torch.int64)
    wrong = [f"{name}: a constant of {tensor.dtype}" for name, tensor in graph.constants.items() if tensor.dtype not in stored]
    reals = {name for node in graph if node.op == "dequantize" for name in node.outputs}
    reals |= {name for name in graph.inputs if name not in graph.values or "float" in graph.values[name].dtype}
    for name in graph.values.keys() - reals:
        try:
            if extremes(graph.values[name].dtype)[1] > 2**32 and name not in graph.constants:
                wrong.append(f"{name}: values have at most 32 bits, not {graph.values[name].dtype}")
        except InputError as err:
            wrong.append(f"{name}: {err}")
    for node in graph:
        wrong += [f"{node.name} ({node.op}) {why}" for why in _faults(graph, node, reals)]
    if wrong:
        raise CheckError(f"{len(wrong)} things in this graph are not integer arithmetic:\n  " + "\n  ".join(wrong))


def _faults(graph: Graph, node: Node, reals: set[str]) -> list[str]:
    """What is not integer arithmetic in one node."""
    wrong = []
    door = node.op in ("quantize", "dequantize")
    if node.op != "quantize" and (read := reals.intersection(node.inputs)):
        wrong.append(f"computes with {min(read)!r}, which is real")
    if node.op == "quantize" and node.inputs[0] not in graph.inputs:
        wrong.append("is inside the network")
    if not door and (odd := [key for key, value in node.attrs.items() if not _whole(value)]):
        wrong.append(f"has the attribute {odd[0]!r} = {node.attrs[odd[0]]!r}, which is no integer")
    if (rounding := node.attrs.get("rounding", "R1")) not in INTEGER:
        wrong.append(f"rounds by {rounding}, which is float arithmetic")
    if node.attrs.get("wide") and rounding != "R2":
        wrong.append(f"rescales wide sums by {rounding}; there is R2 alone")
    try:
        proven = accumulators(graph, node)
    except (RoundelError, KeyError, IndexError, TypeError, ValueError) as err:
        return [*wrong, str(err)]
    if proven and tuple(node.attrs.get("acc", ())) != proven:
        wrong.append(f"records sums in {node.attrs.get('acc')}, its weights prove {list(proven)}")
    return wrong


def _whole(value: Any) -> bool:
    """Integers, lists of them, and what is no number."""
    return all(map(_whole, value)) if isinstance(value, list | tuple) else not isinstance(value, float | complex)
