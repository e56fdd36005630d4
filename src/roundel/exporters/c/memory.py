"""Codes in PyTorch's layout to bytes as they lie in memory, and back; the runtimes and the golden vectors share it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ...graph import BATCH
from ...integer.dialect import Ints
from .emit import Port

_DTYPES = {ctype: np.dtype(ctype.removesuffix("_t")) for ctype in ("int8_t", "uint8_t", "int16_t", "int32_t")}


def to_memory(port: Port, codes: Ints) -> NDArray[np.generic]:
    """Codes (N, ...) of PyTorch's layout as (N, count), each example as it lies in memory."""
    sizes = port.place.sizes
    if codes.shape[1:] != sizes[1:]:
        raise InputError(
            f"codes for {port.name!r} are {list(codes.shape)}; the network takes [N, {', '.join(map(str, sizes[1:]))}]"
        )
    dtype = _DTYPES[port.ctype]
    if codes.size and (codes.min() < np.iinfo(dtype).min or codes.max() > np.iinfo(dtype).max):
        raise InputError(f"codes for {port.name!r} reach {codes.min()} to {codes.max()}, which {port.ctype} does not hold")
    examples = codes.reshape(len(codes), *sizes).transpose(0, *(axis + 1 for axis in port.place.order))
    return np.ascontiguousarray(examples.reshape(len(codes), -1).astype(dtype))


def from_memory(port: Port, raw: NDArray[np.uint8], shape: Sequence[int | str]) -> Ints:
    """The inverse, for bytes (N, nbytes) of a value of that symbolic shape."""
    order, sizes = port.place.order, port.place.sizes
    codes = np.ascontiguousarray(raw).view(_DTYPES[port.ctype]).reshape(len(raw), *(sizes[axis] for axis in order))
    codes = codes.transpose(0, *(order.index(axis) + 1 for axis in range(len(order))))
    batch = list(shape).index(BATCH) if BATCH in shape else None
    out = codes[0] if batch is None else np.moveaxis(codes.squeeze(batch + 1), 0, batch)
    return out.astype(np.int64)
