"""Round to nearest: the scale of least weighted error by search and least squares, then each number to its nearest level."""

from __future__ import annotations

from torch import Tensor

from ..formats.format import Format
from ..formats.qtensor import QTensor, packed, to_matrix


def rtn(weight: Tensor, format: Format, importance: Tensor | None = None, axis: int = 0, table: Tensor | None = None) -> QTensor:
    """Quantize ``weight`` of any shape; ``axis`` is its output axis, ``importance`` (columns,) weighs the squared error.

    Raises `FormatError` for numbers that are not finite or that the format cannot hold.

    >>> import torch
    >>> rtn(torch.tensor([[0.5, -1.0], [2.0, 4.0]]), Format.parse("int8")).dequantize().shape
    torch.Size([2, 2])
    """
    matrix = to_matrix(weight.detach(), axis).float()
    params = format.store(format.fit(matrix, importance, table))
    return packed(format, format.encode(matrix, params), params, tuple(weight.shape), axis)
