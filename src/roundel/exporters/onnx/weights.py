"""A packed weight as ONNX: integer codes behind DequantizeLinear, its scale and zero point as the format stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import PlanError
from ...formats.format import Format
from ...formats.grid import Levels, Real, Uniform
from ...formats.qtensor import QTensor, from_matrix
from .model import BITS, Blob, Model, nibbles

#: Numbers unpacked at a time.
CHUNK = 1 << 24

#: Grids whose codes are the bit patterns of an ONNX type.
FLOATS = {"fp8": "FLOAT8E4M3FN", "fp8_e5m2": "FLOAT8E5M2", "fp16": "FLOAT16", "bf16": "BFLOAT16", "fp32": "FLOAT"}


def missing(fmt: Format) -> str | None:
    """Why ONNX cannot hold a weight of this format as codes; None where it can."""
    if not isinstance(fmt.grid, Uniform | Real) and not (isinstance(fmt.grid, Levels) and fmt.grid.name in FLOATS):
        return f"its weight is {fmt}, and ONNX dequantizes integers and fp8, not {fmt.grid}"
    return None


def container(fmt: Format) -> str:
    """The ONNX type that holds the codes of a format and its zero points."""
    if isinstance(fmt.grid, Levels | Real):
        return FLOATS[str(fmt.grid)]
    grids = [part.grid for part in (fmt, fmt.zero) if part is not None and isinstance(part.grid, Uniform)]
    low = min(grid.bounds(full=True)[0] for grid in grids)
    high = max(grid.bounds(full=True)[1] for grid in grids)
    kinds = {
        "INT4": (-8, 7),
        "UINT4": (0, 15),
        "INT8": (-128, 127),
        "UINT8": (0, 255),
        "INT16": (-(2**15), 2**15 - 1),
        "UINT16": (0, 2**16 - 1),
    }
    return next(kind for kind, (least, most) in kinds.items() if least <= low and high <= most)


@dataclass(frozen=True)
class Weights:
    """Writes packed tensors into ``model``; with ``dequantized`` those in formats that ONNX lacks too, as floats."""

    model: Model
    dequantized: bool
    note: Callable[[str, str], None]

    def value(self, name: str, q: QTensor, swapped: bool = False) -> str:
        """The ONNX value of a weight, float32; of a matrix, ``swapped`` gives the transposed one (columns, rows)."""
        fmt = q.format
        if (why := missing(fmt)) is not None:
            if not self.dequantized:
                raise PlanError(f"{why}; float_for_unsupported=True writes it dequantized, as float32")
            self.note(name, f"written dequantized, as float32: {why}")
            values = q.dequantize().numpy()
            return self.model.tensor(name, np.ascontiguousarray(values.T if swapped else values))
        if isinstance(fmt.grid, Uniform) and fmt.bits not in (4, 8, 16):
            self.note(name, f"{fmt.grid} codes are written as {container(fmt).lower()}, which ONNX has")
        if isinstance(fmt.grid, Real):
            return self._real(name, q, swapped)
        whole = fmt.share.block(q.matrix)[1] >= q.matrix[1]  # one scale per row, or for all
        if whole and fmt.min is None and q.axis < len(q.shape):
            return self._by_row(name, q, swapped)
        flat = self._blocked(name, q, swapped)
        if swapped or (q.axis == 0 and len(q.shape) == 2):
            return flat
        order = [q.axis, *(i for i in range(len(q.shape)) if i != q.axis)]
        shape = np.array([q.shape[i] for i in order], np.int64)
        out = self.model.node("Reshape", [flat, self.model.constant("shape", shape)], [self.model.name(f"{name}.shaped")])
        if q.axis:
            out = self.model.node("Transpose", [out], [self.model.name(f"{name}.placed")], perm=[int(i) for i in np.argsort(order)])
        return out

    def codes(self, name: str, q: QTensor, swapped: bool = False, kind: str = "") -> str:
        """The codes alone, in the weight's own shape, as ``kind`` or the smallest type that holds them."""
        return self.model.tensor(f"{name}.codes", _blob(q, kind or container(q.format), matrix=False, swapped=swapped))

    def _real(self, name: str, q: QTensor, swapped: bool) -> str:
        """A weight stored as floats; those of 16 bits are cast in the graph."""
        from onnx import TensorProto

        codes = self.codes(name, q, swapped)
        return codes if q.format.bits == 32 else self.model.node("Cast", [codes], [self.model.name(name)], to=TensorProto.FLOAT)

    def _by_row(self, name: str, q: QTensor, swapped: bool) -> str:
        scale, zero = per_row(q)
        kind = container(q.format)
        inputs = [self.codes(name, q, swapped), self.model.tensor(f"{name}.scale", scale)]
        if zero.any():
            inputs.append(self.model.tensor(f"{name}.zero", _small(zero, kind)))
        axis = (1 - q.axis if swapped else q.axis) if scale.ndim else 0
        return self.model.node("DequantizeLinear", inputs, [self.model.name(name)], axis=axis)

    def _blocked(self, name: str, q: QTensor, swapped: bool) -> str:
        """The matrix view (rows, columns), blocks of columns under one scale, by opset 21's ``block_size``."""
        fmt, (rows, cols) = q.format, q.matrix
        block = fmt.share.block(q.matrix)
        kind, axis = container(fmt), 0 if swapped else 1
        inputs = [self.model.tensor(f"{name}.codes", _blob(q, kind, matrix=True, swapped=swapped))]
        inputs.append(self._part(f"{name}.scale", q, q.scale, swapped))
        if fmt.zero is not None:
            zero = _rows(q.params.offset, block[0], rows)
            inputs.append(self.model.tensor(f"{name}.zero", _small((zero.T if swapped else zero).astype(np.int64), kind)))
        out = self.model.node("DequantizeLinear", inputs, [self.model.name(name)], axis=axis, block_size=block[1])
        if fmt.min is None:
            return out
        count = -(-cols // block[1])
        if count * block[1] != cols:
            raise PlanError(f"its weight is {fmt}, whose minima cannot be subtracted from a short last group of {cols} columns")
        apart, low = ([count, block[1], rows], [count, 1, rows]) if swapped else ([rows, count, block[1]], [rows, count, 1])
        least = self._part(f"{name}.min", q, q.offset, swapped)
        left = self._reshaped(out, apart, f"{name}.grouped")
        right = self._reshaped(least, low, f"{name}.min.grouped")
        out = self.model.node("Sub", [left, right], [self.model.name(f"{name}.shifted")])
        return self._reshaped(out, [cols, rows] if swapped else [rows, cols], f"{name}.whole")

    def _reshaped(self, x: str, shape: list[int], name: str) -> str:
        return self.model.node("Reshape", [x, self.model.constant("shape", np.array(shape, np.int64))], [self.model.name(name)])

    def _part(self, name: str, q: QTensor, part: QTensor | None, swapped: bool) -> str:
        """Scales or minima of blocks as float32: packed ones dequantized in the graph, fp16 ones cast there."""
        rows, block = q.matrix[0], q.format.share.block(q.matrix)
        grid = q.format.share.grid(q.matrix)
        if part is None:
            values = np.ones((rows, grid[1]), np.float32)
        elif block[0] > 1 or missing(part.format) is not None:
            values = _rows(part.matrix_values(), block[0], rows)
        elif isinstance(part.format.grid, Real):
            values = part.matrix_values().numpy()
            if part.format.grid.name == "fp16":
                return self._real(name, part, swapped)
        else:
            return self.value(name, part, swapped) if part.matrix == part.shape else self._blocked(name, part, swapped)
        return self.model.tensor(name, np.ascontiguousarray(values.T if swapped else values))


def by_output(q: QTensor) -> bool:
    """Whether a weight is integers with one scale per output, or for all, so that sums of codes have a unit."""
    fmt = q.format
    integer = isinstance(fmt.grid, Uniform) and fmt.bits <= 8 and missing(fmt) is None and fmt.min is None
    return integer and q.axis == 0 and fmt.share.block(q.matrix)[1] >= q.matrix[1]


def per_row(q: QTensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scale and zero point of a tensor whose blocks are whole rows: scalars, or one of each per row."""
    rows, block = q.matrix[0], q.format.share.block(q.matrix)[0]

    def spread(values: torch.Tensor | None, none: float) -> NDArray[Any]:
        if values is None:
            return np.array(none, np.float32)
        if block >= rows and values.shape[0] == 1 and (rows > 1 or q.format.share.word == "tensor"):
            return np.array(float(values.reshape(())), np.float32)
        return _rows(values, block, rows).reshape(-1)

    scale, zero = spread(q.params.scale, 1.0), spread(q.params.offset, 0.0)
    shape = np.broadcast_shapes(scale.shape, zero.shape)
    return np.broadcast_to(scale, shape).astype(np.float32), np.broadcast_to(zero, shape).astype(np.int64)


def _rows(values: torch.Tensor | None, block: int, rows: int) -> NDArray[Any]:
    """Parameters of blocks of rows as one row of them per row."""
    assert values is not None
    found: NDArray[Any] = values.numpy()
    return np.repeat(found, block, 0)[:rows] if found.shape[0] < rows else found


def _small(codes: NDArray[Any], kind: str) -> Blob:
    dtype = f"uint{max(8, BITS[kind])}" if kind in BITS else kind.lower()
    data = nibbles(codes) if BITS.get(kind) == 4 else codes.astype(dtype).tobytes()
    return Blob(kind, codes.shape, len(data), lambda: [data])


def _blob(q: QTensor, kind: str, matrix: bool, swapped: bool) -> Blob:
    """The codes of a tensor, unpacked while they are written; a few rows at a time where their order is the file's."""
    shape = q.matrix if matrix else q.shape
    shape = shape[::-1] if swapped else shape
    bits = BITS[kind] if kind in BITS else 8 * np.dtype(kind.lower()).itemsize
    nbytes = -(-prod(shape) * bits // 8)
    straight = not swapped and (matrix or q.axis == 0 or len(q.shape) < 2)
    return Blob(kind, tuple(shape), nbytes, partial(_straight if straight else _placed, q, kind, matrix, swapped))


def _bytes(codes: NDArray[Any], kind: str) -> bytes:
    return _small(np.ascontiguousarray(codes), kind).chunks().__iter__().__next__()


def _straight(q: QTensor, kind: str, matrix: bool, swapped: bool) -> Iterator[bytes]:
    rows, cols = q.matrix
    step = max(2, CHUNK // max(1, cols)) // 2 * 2  # two rows end on a whole byte
    for i in range(0, rows, step):
        yield _bytes(q.unpack(torch.arange(i, min(rows, i + step))).numpy(), kind)


def _placed(q: QTensor, kind: str, matrix: bool, swapped: bool) -> Iterator[bytes]:
    codes = q.unpack()
    codes = codes if matrix else from_matrix(codes, q.shape, q.axis)
    yield _bytes((codes.T if swapped else codes).numpy(), kind)
