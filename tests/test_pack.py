"""Packing against ten lines of integer arithmetic, for every width; no formats."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.formats import pack as module
from roundel.formats.pack import pack, packed_columns, unpack


def naive(rows: list[list[int]], bits: int) -> list[list[int]]:
    """Each row as one big integer, code c at bit c * bits, written little-endian."""
    packed = []
    for row in rows:
        number = sum(code << (i * bits) for i, code in enumerate(row))
        packed.append(list(number.to_bytes((len(row) * bits + 7) // 8, "little")))
    return packed


def codes(rows: int, cols: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.proves("seam.pack")
@given(st.integers(1, 16), st.integers(0, 5), st.integers(0, 70), st.integers(0, 2**32), st.integers(1, 100))
@settings(deadline=None, max_examples=300)
def test_every_width_and_shape_equals_the_naive_stream(bits: int, rows: int, cols: int, seed: int, chunk: int) -> None:
    original = codes(rows, cols, bits, seed)
    whole, module.CHUNK = module.CHUNK, chunk  # rows per pass must not show
    try:
        packed = pack(original, bits)
        back = unpack(packed, bits, cols)
    finally:
        module.CHUNK = whole
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(cols, bits))
    assert packed.tolist() == naive(original.tolist(), bits)
    assert back.dtype == torch.int32
    assert torch.equal(back, original)


@pytest.mark.proves("seam.pack")
def test_by_hand() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]
    assert pack(torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1]]), 1).tolist() == [[0b1101, 1]]
    assert pack(torch.tensor([[5, 6, 7]]), 3).tolist() == [[0b11_110_101, 0b1]]
    assert pack(torch.tensor([[0x123, 0xABC]]), 12).tolist() == [[0x23, 0xC1, 0xAB]]
    assert pack(torch.tensor([[0x8001]]), 16).tolist() == [[0x01, 0x80]]


@pytest.mark.parametrize("bits", range(1, 17))
def test_extremes_of_every_width(bits: int) -> None:
    top = (1 << bits) - 1
    original = torch.tensor([[0, top, 0, top, top, 0, 1 << (bits - 1)] * 3])
    assert torch.equal(unpack(pack(original, bits), bits, original.shape[1]), original.int())


@pytest.mark.parametrize("bits", [3, 4, 8, 11, 16])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_layout_and_integer_type_do_not_show(bits: int, dtype: torch.dtype) -> None:
    original = codes(6, 10, min(bits, 15)).to(dtype)
    assert torch.equal(pack(original.T, bits), pack(original.T.contiguous(), bits))
    assert torch.equal(pack(original[:, ::2], bits), pack(original[:, ::2].contiguous(), bits))
    packed = pack(original, bits)
    wide = torch.stack([packed, packed], -1)[..., 0]
    assert torch.equal(unpack(wide, bits, 10), original.int())


@pytest.mark.parametrize("bits", range(1, 17))
def test_rows_are_byte_aligned(bits: int) -> None:
    original = codes(9, 13, bits)
    packed, index = pack(original, bits), torch.tensor([7, 0, 7])
    assert torch.equal(unpack(packed[index], bits, 13), original[index])
    assert torch.equal(packed[4:5], pack(original[4:5], bits))


@pytest.mark.parametrize(
    ("bad", "bits", "text"),
    [
        (torch.tensor([[0, 16]]), 4, r"0\.\.15, found 0\.\.16"),
        (torch.tensor([[-1, 3]]), 4, r"found -1\.\.3"),
        (torch.tensor([[65536]]), 16, r"0\.\.65535, found 65536"),
        (torch.tensor([[1.0]]), 4, "integers"),
        (torch.tensor([1]), 4, "matrix"),
        (torch.tensor([[1]]), 0, "1 to 16 bits"),
        (torch.tensor([[1]]), 17, "1 to 16 bits"),
    ],
)
def test_wrong_codes_are_refused(bad: torch.Tensor, bits: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pack(bad, bits)


def test_wrong_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"9 codes of 4 bits are uint8 rows of 5, found torch\.uint8 of 4"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)
    with pytest.raises(ValueError, match=r"found torch\.int32"):
        unpack(torch.zeros(2, 4, dtype=torch.int32), 4, 8)


def test_speed() -> None:
    """12 million codes at 4 bits; 0.1 s on a free core, and room here for a busy one."""
    original = codes(3000, 4000, 4)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        pack(original, 4)
        best = min(best, time.perf_counter() - start)
    assert best < 0.4
