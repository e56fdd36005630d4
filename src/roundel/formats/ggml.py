"""Blocks of ggml's quantized types as `QTensor`s of the same values: layouts only, no GGUF container and no quantizer.

ggml stores a row as consecutive blocks, each a C struct of scales and codes (ggml-common.h); here the same numbers are codes and
scales of a `Format` in Roundel's own bit order. Little-endian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .codec import Stored
from .format import Format
from .qtensor import QTensor, packed


@dataclass(frozen=True)
class Plane:
    """A field of codes' bits: bytes in runs of ``run``, each run holding the same ``bits`` of 8/bits consecutive runs of codes."""

    field: str
    bits: int
    run: int


@dataclass(frozen=True)
class Layout:
    """One ggml type: its `Format`, the struct's fields with their bytes, and how codes lie in them.

    ``planes`` give each code's bits, lowest first; ``bias`` is subtracted from the code. The parameters are found by the name of
    their field: d and m fp16 scale and minimum (``added``: the minimum is added, not subtracted), e an e8m0 scale, scales int8 in
    units of d, k six-bit scales in units of d and minima in units of m.
    """

    format: str
    numbers: int
    fields: dict[str, int]
    planes: tuple[Plane, ...]
    bias: int = 0
    added: bool = False


LAYOUTS = {
    "Q4_0": Layout("int4/g32*fp16", 32, {"d": 2, "qs": 16}, (Plane("qs", 4, 16),), 8),
    "Q4_1": Layout("uint4/g32*fp16-fp16", 32, {"d": 2, "m": 2, "qs": 16}, (Plane("qs", 4, 16),), added=True),
    "Q5_0": Layout("int5/g32*fp16", 32, {"d": 2, "qh": 4, "qs": 16}, (Plane("qs", 4, 16), Plane("qh", 1, 1)), 16),
    "Q5_1": Layout("uint5/g32*fp16-fp16", 32, {"d": 2, "m": 2, "qh": 4, "qs": 16}, (Plane("qs", 4, 16), Plane("qh", 1, 1)),
                   added=True),
    "Q8_0": Layout("int8/g32*fp16", 32, {"d": 2, "qs": 32}, (Plane("qs", 8, 32),)),
    "Q4_K": Layout("uint4/g32*uint6/g8*fp16-uint6/g8*fp16", 256, {"d": 2, "m": 2, "k": 12, "qs": 128}, (Plane("qs", 4, 32),)),
    "Q5_K": Layout("uint5/g32*uint6/g8*fp16-uint6/g8*fp16", 256, {"d": 2, "m": 2, "k": 12, "qh": 32, "qs": 128},
                   (Plane("qs", 4, 32), Plane("qh", 1, 32))),
    "Q6_K": Layout("int6/g16*int8/g16*fp16", 256, {"ql": 128, "qh": 64, "scales": 16, "d": 2},
                   (Plane("ql", 4, 64), Plane("qh", 2, 32)), 32),
    "IQ4_NL": Layout("iq4nl/g32*fp16", 32, {"d": 2, "qs": 16}, (Plane("qs", 4, 16),)),
    "MXFP4": Layout("fp4/g32*e8m0", 32, {"e": 1, "qs": 16}, (Plane("qs", 4, 16),)),
}  # fmt: skip


def from_blocks(raw: bytes | Tensor, kind: str, shape: tuple[int, ...]) -> QTensor:
    """ggml blocks of type ``kind`` (a key of `LAYOUTS`) as the `QTensor` of ``shape``, last axis innermost, of equal values.

    ``raw`` is bytes or a flat uint8 tensor. Raises `InputError` for an unknown type, a last axis that is not whole blocks, a wrong
    number of bytes, and scales that are not finite or so large that the values would not be.
    """
    if kind not in LAYOUTS:
        raise InputError(f"there is no layout for ggml type {kind!r}; there are {', '.join(LAYOUTS)}")
    layout, fields = LAYOUTS[kind], LAYOUTS[kind].fields
    shape = tuple(shape)
    if not shape or min(shape) < 0 or shape[-1] % layout.numbers:
        raise InputError(f"{kind} holds rows of whole blocks of {layout.numbers} numbers; a shape of {shape} is not that")
    data = raw if isinstance(raw, Tensor) else torch.frombuffer(bytearray(raw) or bytearray(1), dtype=torch.uint8)[: len(raw)]
    size, expected = sum(fields.values()), math.prod(shape) // layout.numbers * sum(fields.values())
    if data.dtype != torch.uint8 or data.numel() != expected:
        raise InputError(f"{kind} of shape {shape} is {expected} bytes; found {data.numel()} of {data.dtype}")
    rows = shape[0] if len(shape) > 1 else 1
    parts = data.reshape(rows, expected // size // max(rows, 1), size).split(list(fields.values()), dim=-1)
    block = dict(zip(fields, parts))
    codes, low = torch.tensor(-layout.bias, dtype=torch.int32), 0
    for plane in layout.planes:
        codes = codes + (_codes(block[plane.field], plane) << low)
        low += plane.bits
    format = Format.parse(layout.format)
    q = _tensor(format, codes, shape, *_parameters(format, block, layout.added))
    top = max(abs(level) for level in format.extremes)
    for name, part in (("scale", q.params.scale), ("minimum", q.params.offset)):
        wrong = None if part is None else ~(part * top).isfinite()
        if wrong is not None and wrong.any():
            first, count = tuple(wrong.nonzero()[0].tolist()), int(wrong.sum())
            raise InputError(f"{kind}: {count} of {wrong.numel()} {name}s give numbers that are not finite, the first at {first}")
    return q


def _codes(data: Tensor, plane: Plane) -> Tensor:
    """The codes' bits (rows, numbers) from bytes (rows, blocks, bytes)."""
    shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8)[:, None]
    runs = data.reshape(*data.shape[:2], data.shape[2] // plane.run, 1, plane.run) >> shifts & ((1 << plane.bits) - 1)
    return runs.flatten(1).to(torch.int32)


def _parameters(format: Format, block: dict[str, Tensor], added: bool) -> tuple[QTensor, QTensor | None]:
    """Stored scale and minimum of a tensor from the fields of its blocks, each (rows, blocks, bytes)."""
    assert format.scale is not None
    if "e" in block:
        return _tensor(format.scale, block["e"][..., 0]), None
    d, m = _half(block["d"]), _half(block["m"]) if "m" in block else None
    if "scales" in block:
        return _tensor(format.scale, block["scales"].flatten(1).view(torch.int8), None, d), None
    if format.min is None or m is None:
        return d, None
    if "k" in block:  # scales 0-3 and minima 0-3 in 6 bits each, 4-7 as nibbles whose high bits lie above the first four
        scale, minimum, low = block["k"].split(4, dim=-1)
        scale, minimum = (torch.cat([first & 63, nibble | first >> 6 << 4], -1)
                          for first, nibble in ((scale, low & 15), (minimum, low >> 4)))  # fmt: skip
        return _tensor(format.scale, scale.flatten(1), None, d), _tensor(format.min, minimum.flatten(1), None, m)
    return d, _half(block["m"], negate=added)


def _half(data: Tensor, negate: bool = False) -> QTensor:
    """A QTensor of the fp16 numbers (rows, blocks) that two bytes each spell."""
    bits = data[..., 0].to(torch.int32) | data[..., 1].to(torch.int32) << 8
    return _tensor(Format.parse("fp16"), bits ^ 0x8000 if negate else bits)


def _tensor(
    format: Format, codes: Tensor, shape: tuple[int, ...] | None = None, scale: QTensor | None = None, offset: QTensor | None = None
) -> QTensor:
    return packed(format, codes.to(torch.int32), Stored(parts=(scale, offset, None)), shape or tuple(codes.shape))
