"""Codes of 1 to 16 bits to bytes and back, in the one bit order that every artifact uses; knows no grids and no scales."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

#: codes handled at once by the general path, so that its working memory stays near 64 MB whatever the tensor
CHUNK = 1 << 22


def packed_columns(cols: int, bits: int) -> int:
    """Bytes that one row of `cols` codes of `bits` bits takes."""
    return -(-cols * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (rows, cols), integers 0..2^bits-1, into uint8 (rows, ceil(cols*bits/8)).

    The bit order: bit b of column c is bit (c*bits + b) of its row, and bit i of a row is bit i%8 of its byte i//8: a little-endian
    stream, least significant bit first. Every row starts on a byte and its unused trailing bits are zero, so `packed[i]` is row i
    packed alone. Raises ValueError for codes outside the range: callers hand over bit patterns, never signed levels.
    """
    _check(codes, bits)
    rows, cols = codes.shape
    if codes.numel():
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= 1 << bits:
            raise ValueError(f"codes of {bits} bits lie in 0..{(1 << bits) - 1}, found {low}..{high}")
    if bits == 8:
        return codes.to(torch.uint8, memory_format=torch.contiguous_format)
    if bits == 16:
        return codes.to(torch.int32).to(torch.int16).contiguous().view(torch.uint8)
    out = torch.empty(rows, packed_columns(cols, bits), dtype=torch.uint8, device=codes.device)
    many, size = _period(bits)
    for part in _row_chunks(rows, cols):
        block = _pad(codes[part].to(torch.uint8 if bits < 8 else torch.int32), many).view(-1, many)
        words = torch.zeros(len(block), size, dtype=block.dtype, device=codes.device)
        for code, byte, shift in _overlaps(bits):
            words[:, byte] |= block[:, code] << shift if shift >= 0 else block[:, code] >> -shift
        out[part] = words.to(torch.uint8).view(len(out[part]), -1)[:, : out.shape[1]]  # the cast drops bits above the byte
    return out


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse: uint8 (rows, ceil(cols*bits/8)) to int32 codes (rows, cols).

    Rows are byte aligned, so `unpack(packed[index], bits, cols)` decodes just those rows.
    """
    _check(packed, bits)
    rows, width = packed.shape
    if packed.dtype != torch.uint8 or width != packed_columns(cols, bits):
        expected = packed_columns(cols, bits)
        raise ValueError(f"{cols} codes of {bits} bits are uint8 rows of {expected}, found {packed.dtype} of {width}")
    if bits == 8:
        return packed.to(torch.int32)
    if bits == 16:
        return packed.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    out = torch.empty(rows, cols, dtype=torch.int32, device=packed.device)
    many, size = _period(bits)
    for part in _row_chunks(rows, cols):
        block = _pad(packed[part].to(torch.uint8 if bits < 8 else torch.int32), size).view(-1, size)
        codes = torch.zeros(len(block), many, dtype=block.dtype, device=packed.device)
        for code, byte, shift in _overlaps(bits):
            codes[:, code] |= block[:, byte] >> shift if shift >= 0 else block[:, byte] << -shift
        out[part] = (codes & ((1 << bits) - 1)).view(len(out[part]), -1)[:, :cols]
    return out


def _check(matrix: Tensor, bits: int) -> None:
    if matrix.dim() != 2 or matrix.is_floating_point() or matrix.is_complex():
        raise ValueError(f"packing takes a matrix of integers, found {matrix.dtype} of shape {tuple(matrix.shape)}")
    if not 1 <= bits <= 16:
        raise ValueError(f"packing is defined for 1 to 16 bits, asked for {bits}")


def _period(bits: int) -> tuple[int, int]:
    """The shortest run of codes that ends on a byte: (codes, bytes)."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """Which (code, byte) of one period share bits, and how far left the code moves to land in the byte."""
    many, size = _period(bits)
    pairs = ((code, byte) for byte in range(size) for code in range(many))
    return [(c, b, c * bits - 8 * b) for c, b in pairs if c * bits < 8 * b + 8 and 8 * b < (c + 1) * bits]


def _pad(matrix: Tensor, multiple: int) -> Tensor:
    """Zero columns up to a multiple, contiguous."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % multiple)).contiguous()


def _row_chunks(rows: int, cols: int) -> list[slice]:
    step = max(1, CHUNK // max(cols, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]
