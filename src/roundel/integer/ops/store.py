"""Constants of an integer graph as numbers: how they are packed, and what integers a type holds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from ...errors import InputError
from ...formats.pack import unpack
from ...graph import Spec
from ..dialect import Ints
from .base import Range


class Pool(Protocol):
    """Where constants and the shapes and types of values are found: a `Graph`, or one in the making."""

    @property
    def constants(self) -> Mapping[str, Tensor]: ...

    @property
    def values(self) -> Mapping[str, Spec]: ...


def extremes(dtype: str) -> Range:
    """Smallest and largest integer of ``int8``, ``uint4``, ``int32`` ...

    >>> extremes("int4"), extremes("uint8")
    ((-8, 7), (0, 255))
    """
    if not (match := re.fullmatch(r"(u?)int([1-9]|[12]\d|3[0-2]|64)", dtype)):
        raise InputError(f"{dtype} is no integer type of up to 32 bits, or 64")
    bits = int(match[2])
    return (0, 2**bits - 1) if match[1] else (-(2**bits >> 1), (2**bits >> 1) - 1)


def numbers(pool: Pool, name: str) -> Ints:
    """A constant as int64 of its shape. Those of up to 8 bits are stored packed, one bit stream per row, as in a `QTensor`."""
    if name not in pool.values:
        raise InputError(f"the type of constant {name!r} is not known")
    stored, spec = pool.constants[name], pool.values[name]
    low, high = extremes(spec.dtype)
    shape = tuple(int(size) for size in spec.shape)
    try:
        if high > 255:
            return stored.numpy().astype(np.int64).reshape(shape)
        rows = shape[0] if len(shape) > 1 else 1
        codes = unpack(stored, (high - low).bit_length(), math.prod(shape) // max(rows, 1)).numpy().astype(np.int64)
    except ValueError as err:
        raise InputError(f"constant {name!r} is not {spec.dtype} of shape {list(shape)}: {err}") from err
    return np.where(codes > high, codes + 2 * low, codes).reshape(shape)
