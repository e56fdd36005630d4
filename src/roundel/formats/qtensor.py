"""`QTensor`: a tensor as packed codes and stored parameters; it does not know who chose the codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import codec
from .format import Format
from .grid import Uniform
from .pack import pack, unpack

#: Numbers decoded at a time: the temporaries stay in cache, and small whatever the tensor.
CHUNK = 1 << 16


def to_matrix(w: Tensor, axis: int = 0) -> Tensor:
    """The (rows, columns) view every format works on: ``axis`` first, the rest flattened; 0-d and 1-d tensors are one row."""
    return (
        w.reshape(1, -1) if w.ndim < 2 else w.movedim(axis, 0).reshape(w.shape[axis], math.prod(w.shape) // max(1, w.shape[axis]))
    )


def from_matrix(m: Tensor, shape: tuple[int, ...], axis: int = 0) -> Tensor:
    """Inverse of `to_matrix`."""
    if len(shape) < 2:
        return m.reshape(shape)
    return m.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]).movedim(0, axis)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A tensor of ``shape`` stored in ``format``.

    ``codes`` (rows, bytes) uint8: one bit stream per row, least significant bit first, each row starting on a byte. ``scale``
    and ``offset`` (zero point or minimum) are QTensors of one entry per block, ``table`` (tables, k * dim) the learned entries
    in the type they are stored in. ``axis`` is the output axis, the rows of the matrix view.

    >>> import torch
    >>> from roundel.solvers.rtn import rtn
    >>> q = rtn(torch.tensor([[1.0, -2.0, 3.0, 7.0]]), Format.parse("int4"))
    >>> q.dequantize().tolist(), q.nbytes
    ([[1.0, -2.0, 3.0, 7.0]], 4)
    """

    shape: tuple[int, ...]
    format: Format
    codes: Tensor
    scale: QTensor | None = None
    offset: QTensor | None = None
    table: Tensor | None = None
    axis: int = 0

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the (rows, columns) view."""
        if len(self.shape) < 2:
            return 1, math.prod(self.shape)
        rows = self.shape[self.axis]
        return rows, math.prod(self.shape) // rows if rows else 0

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, offsets and tables, padding included."""
        parts = (part.nbytes for part in (self.scale, self.offset) if part is not None)
        return self.codes.numel() + sum(parts) + (self.table.nbytes if self.table is not None else 0)

    @property
    def bits(self) -> float:
        """Bits per number, everything counted; 0 for an empty tensor."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    @cached_property
    def params(self) -> codec.Stored:
        """The stored parameters as values."""
        return codec.Stored(
            scale=self.scale.matrix_values() if self.scale is not None else None,
            offset=self.offset.matrix_values() if self.offset is not None else None,
            table=self.table.float().unflatten(1, (-1, self.format.step)) if self.table is not None else None,
            parts=(self.scale, self.offset, self.table),
        )

    def unpack(self, rows: Tensor | None = None) -> Tensor:
        """Codes (rows, columns/step) as int32: the signed integer on `Uniform` grids, the bit pattern or index elsewhere."""
        packed = self.codes if rows is None else self.codes[rows]
        if self.format.bits == 32:  # a stored fp32 is its own four bytes
            return packed.contiguous().view(torch.int32)
        codes = unpack(packed, self.format.bits, -(-self.matrix[1] // self.format.step))
        if isinstance(self.format.grid, Uniform) and self.format.grid.signed:
            half = 1 << (self.format.bits - 1)
            codes = (codes ^ half) - half
        return codes

    def matrix_values(self, rows: Tensor | None = None) -> Tensor:
        """Values of the matrix view, or of some of its rows, float32; decoded a few rows at a time, to hold little more."""
        count, cols = self.matrix
        index = torch.arange(count) if rows is None else rows
        step = max(1, CHUNK // max(1, cols))
        if len(index) <= step:
            return codec.decode(self.format, self.unpack(rows), self.params, None, rows)[:, :cols]
        out = torch.empty(len(index), cols)
        for i in range(0, len(index), step):
            part = index[i : i + step]
            out[i : i + step] = codec.decode(self.format, self.unpack(part), self.params, None, part)[:, :cols]
        return out

    def dequantize(self) -> Tensor:
        """Values in the original shape, float32."""
        return from_matrix(self.matrix_values(), self.shape, self.axis)


def packed(format: Format, codes: Tensor, params: codec.Stored, shape: tuple[int, ...], axis: int = 0) -> QTensor:
    """Codes and stored parameters as a `QTensor` of ``shape``."""
    if isinstance(format.grid, Uniform) and format.grid.signed:
        codes = codes & ((1 << format.bits) - 1)
    scale, offset, table = params.parts
    table = None if table is None else table.flatten(1)
    data = codes.contiguous().view(torch.uint8) if format.bits == 32 else pack(codes, format.bits)
    return QTensor(tuple(shape), format, data, scale, offset, table, axis)
