"""Lowering of what has a stored weight: integers and tables of them stay packed; a product that int32 cannot hold is ``wide``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import PlanError
from ...formats.grid import Codebook, Levels, Uniform
from ...formats.grid import table as level_table
from ...formats.qtensor import QTensor, from_matrix
from ...graph import Node, Spec
from .. import ops
from ..check import INT32, size, weighted_ends
from ..dialect import quantize_multiplier, quantize_wide
from .making import Lowering


def lower_weighted(made: Lowering, node: Node) -> None:
    """A convolution or linear layer: packed weight, int32 bias at the scale of its sums, one multiplier per output."""
    x, y = made.affine(node.inputs[0]), made.affine(node.name)
    stored, w_scale = _weight(made, node.inputs[1], node)
    unit = x.scale * w_scale
    unit = np.where(unit == 0, y.scale, unit)  # an output without weights is its bias
    biased = len(node.inputs) > 2 and node.inputs[2]
    real = made.number(node.inputs[2]) if biased else np.zeros(len(unit))
    bias = np.rint(np.clip(real / unit, -(2.0**46), 2.0**46)).astype(np.int64)
    multiplier, shift = quantize_multiplier(unit / y.scale)
    ends = weighted_ends(_levels(made, stored), bias, x.reach) << np.maximum(shift, 0)
    wide = x.bits > 8 or bool(ends.min() < INT32[0] or ends.max() > INT32[1])
    if wide:
        multiplier, shift = quantize_wide(unit / y.scale)
    attrs = {key: value for key, value in node.attrs.items() if key != "act"}
    parts = [made.constant(f"{node.name}.bias", bias, "int64" if wide else "int32"),
             made.constant(f"{node.name}.multiplier", multiplier), made.constant(f"{node.name}.shift", shift)]  # fmt: skip
    made.emit(node.op, [node.inputs[0]], node.name, y.dtype, (stored[0], *parts, *stored[1:]), x_zero=x.zero, **attrs,
              **made.rescaled(y, node.attrs.get("act"), wide))  # fmt: skip


def _levels(made: Lowering, stored: Sequence[str]) -> NDArray[np.int64]:
    """What the codes of a weight stand for."""
    w, *table = (ops.numbers(made, name) for name in stored)
    return ops.levels(w, *table) if table else w


def _weight(made: Lowering, name: str, node: Node) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Enter a packed weight as it is, and its table where it has one; the scale of each output."""
    q = made.q.tensors.get(name)
    if q is None:
        raise PlanError("its weight is float")
    fmt = q.format
    table, scale = _table_of(q) if isinstance(fmt.grid, Codebook | Levels) else (None, np.ones(1))
    if table is None and (not isinstance(fmt.grid, Uniform) or not fmt.grid.signed or not 2 <= fmt.bits <= 8):
        raise PlanError(f"its weight is {fmt}; weights are symmetric integers of 2 to 8 bits, int8 to int2, or tables of numbers")
    stored = q.params.scale.double().numpy() if q.params.scale is not None else np.ones((1, 1))
    if stored.shape[1] != 1 or fmt.share.rows > 1 or fmt.zero or fmt.min:
        raise PlanError(f"its weight is {fmt}; weights are symmetric, with one scale per tensor or per output")
    scale = scale * stored.reshape(-1)
    rows = q.matrix[0]
    if table is None and q.unpack()[torch.from_numpy(np.broadcast_to(scale == 0, rows).copy())].any():
        raise PlanError("its weight has codes whose scale is 0")
    dtype = f"uint{fmt.bits}" if table is not None else str(fmt.grid)
    if node.op == "conv_transpose":
        scale = _turned(made, q, name, dtype, scale, node.attrs.get("groups", 1), table)
    elif q.axis != 0:
        raise PlanError(f"its weight is stored by axis {q.axis}, not by output")
    else:
        made.constants[name], made.values[name] = q.codes, Spec(q.shape, dtype)
    names: tuple[str, ...] = (name,)
    if table is not None:
        names = (name, made.constant(f"{name}.table", table, "int16" if np.abs(table).max() > 127 else "int8"))
    return names, np.broadcast_to(scale, int(made.values[name].shape[0])).astype(np.float64)


def _turned(made: Lowering, q: QTensor, name: str, dtype: str, scale: NDArray[np.float64], groups: int,
            table: NDArray[np.int64] | None) -> NDArray[np.float64]:  # fmt: skip
    """Enter a transposed convolution's weight (in, out/groups, kernel) as (out, in/groups, kernel); the scale of each output."""
    if (len(scale) > 1 and q.axis != 1) or (table is not None and len(table) > 1):
        raise PlanError(f"its weight is {q.format} by input; a transposed convolution has one scale per tensor or per output")
    codes = from_matrix(q.unpack(), q.shape, q.axis).numpy()
    parts = codes.reshape(groups, -1, *codes.shape[1:]).swapaxes(1, 2)
    made.constant(name, parts.reshape(-1, *parts.shape[2:]), dtype)
    return np.tile(scale, groups) if len(scale) > 1 else scale


#: Levels of a table of weights that are no whole numbers: its largest entry, 12 bits with the sign.
FINE = 2047


def _table_of(q: QTensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A weight's table as integers (tables, 2^bits), and what one of them is worth: exactly where some grid of up to 127 steps
    holds every entry, else to within 1/4094 of the largest."""
    fmt, base = q.format, q.format.grid
    if fmt.step > 1 or fmt.bits > 8:
        raise PlanError(f"its weight is {fmt}; tables have up to 256 single numbers")
    if isinstance(base, Levels):
        real = np.array([level_table(base.name).decode])
    else:
        assert q.params.table is not None
        real = q.params.table.double().numpy()[..., 0]
    real = np.where(np.isfinite(real), real, 0.0)
    real = np.pad(real, [(0, 0), (0, (1 << fmt.bits) - real.shape[1])])
    peak = np.maximum(np.abs(real).max(1, keepdims=True), np.finfo(np.float32).tiny)
    for top in (*range(1, 128), FINE):
        levels = real * (top / peak)
        if top == FINE or np.abs(levels - np.rint(levels)).max() < 1e-6 * top:
            break
    return np.rint(levels).astype(np.int64), (peak / top)[:, 0]


def lower_embedding(made: Lowering, node: Node) -> None:
    """Rows of a packed table by id, rescaled."""
    y = made.affine(node.name)
    stored, scale = _weight(made, node.inputs[1], node)
    factor = scale[:1] if (scale == scale[0]).all() else scale
    multiplier, shift = quantize_multiplier(factor / y.scale)
    parts = [made.constant(f"{node.name}.multiplier", multiplier), made.constant(f"{node.name}.shift", shift)]
    made.emit("embedding", [node.inputs[0]], node.name, y.dtype, (stored[0], *parts, *stored[1:]), **made.rescaled(y))


def lower_matmul(made: Lowering, node: Node) -> None:
    """A product of two activations."""
    (a, b), y = map(made.affine, node.inputs), made.affine(node.name)
    depth = size(made.source, node.inputs[0], [-1]) if node.inputs[0] in made.source.values else 1
    multiplier, shift = (int(part) for part in quantize_multiplier(a.scale * b.scale / y.scale))
    reach = int(np.abs(np.outer(a.reach, b.reach)).max()) * depth << max(shift, 0)
    wide = max(a.bits, b.bits) > 8 or reach > INT32[1]
    if wide:
        multiplier, shift = (int(part) for part in quantize_wide(a.scale * b.scale / y.scale))
    made.emit("matmul", list(node.inputs), node.name, y.dtype, transpose_b=node.attrs.get("transpose_b", False), a_zero=a.zero,
              b_zero=b.zero, multiplier=multiplier, shift=shift, **made.rescaled(y, wide=wide))  # fmt: skip
