"""Blocks of ggml from raw bytes against the `gguf` package; no containers."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from roundel import InputError
from roundel.formats import Format
from roundel.formats.ggml import LAYOUTS, from_blocks
from roundel.solvers import rtn

SIZES = {name: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in LAYOUTS}


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes (count, bytes of a block) whose scales are finite."""
    data = np.random.default_rng(seed).integers(0, 256, (count, SIZES[kind][1]), dtype=np.uint8)
    place = 0
    for name, size in LAYOUTS[kind].fields.items():
        if name in ("d", "m"):
            half = data[:, place : place + 2].copy().view(np.float16)
            data[:, place : place + 2] = np.where(np.isfinite(half), half, np.float16(0.125)).view(np.uint8)
        if name == "e":
            data[:, place] %= 253
        place += size
    return data


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    return np.array_equal(ours.numpy().view(np.int32).ravel(), np.ascontiguousarray(theirs).view(np.int32).ravel())


def test_layouts_agree_with_the_sizes_of_ggml() -> None:
    for kind, (numbers, size) in SIZES.items():
        assert (LAYOUTS[kind].numbers, sum(LAYOUTS[kind].fields.values())) == (numbers, size)


@pytest.mark.proves("seam.q4_k", "seam.q6_k", "seam.mxfp4", "seam.iq4_nl")
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("shape", [(1024,), (64, 512), (2, 3, 4, 256), (1, 256)])
def test_random_bytes_give_the_values_of_gguf(kind: str, shape: tuple[int, ...]) -> None:
    blocks = random_blocks(kind, int(np.prod(shape)) // SIZES[kind][0], seed=len(shape))
    q = from_blocks(blocks.tobytes(), kind, shape)
    assert q.shape == shape
    theirs = dequantize(blocks, GGMLQuantizationType[kind])
    if kind == "MXFP4":  # fp4 has a negative zero; gguf's table of doubled integers reads it as +0
        theirs = np.where(theirs == 0, q.dequantize().numpy().reshape(theirs.shape), theirs)
        assert (dequantize(blocks, GGMLQuantizationType[kind]) == theirs).all()
    assert same_bits(q.dequantize(), theirs)
    assert q.nbytes == blocks.size  # not a byte more than ggml's own
    assert torch.equal(from_blocks(torch.from_numpy(blocks.ravel()), kind, shape).dequantize(), q.dequantize())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_format_is_the_one_that_the_text_names(kind: str) -> None:
    q = from_blocks(random_blocks(kind, 2).tobytes(), kind, (2 * SIZES[kind][0],))
    assert q.format == Format.parse(LAYOUTS[kind].format)
    assert q.format.nbytes(q.matrix) == q.nbytes
    for part, form in ((q.scale, q.format.scale), (q.offset, q.format.min)):
        assert (part is None) == (form is None)
        assert part is None or part.format == form


@pytest.mark.proves("seam.iq4_nl")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "IQ4_NL"])
def test_every_code_by_hand(kind: str) -> None:
    """One block whose scale is 1: byte i holds number i (and number 16 + i in its high half)."""
    half = np.float16(1).tobytes()
    if kind == "Q8_0":
        raw, expected = half + bytes([0x81, 0x80, *range(30)]), [-127, -128, *range(30)]
    else:
        raw, levels = half + bytes(i | (15 - i) << 4 for i in range(16)), LEVELS[kind]
        expected = [*levels, *reversed(levels)]
    assert from_blocks(raw, kind, (32,)).dequantize().tolist() == expected


LEVELS = {"Q4_0": [*range(-8, 8)], "IQ4_NL": [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]}


def test_a_tensor_of_blocks_is_coded_again_to_equal_values() -> None:
    blocks = random_blocks("Q4_0", 64)
    values = from_blocks(blocks.tobytes(), "Q4_0", (8, 256)).dequantize()
    assert torch.equal(rtn(values, Format.parse("q4_0")).dequantize(), values)


@pytest.mark.parametrize(
    ("kind", "shape", "size", "text"),
    [
        ("Q4_9", (32,), 18, "no layout for ggml type 'Q4_9'; there are Q4_0"),
        ("Q4_0", (40,), 18, "whole blocks of 32 numbers"),
        ("Q4_0", (), 18, "whole blocks"),
        ("Q4_0", (-32,), 18, "whole blocks"),
        ("Q4_0", (64,), 18, "is 36 bytes; found 18"),
        ("Q6_K", (2**40, 256), 210, "bytes; found 210"),
    ],
)
def test_wrong_input_is_refused(kind: str, shape: tuple[int, ...], size: int, text: str) -> None:
    with pytest.raises(InputError, match=text):
        from_blocks(bytes(size), kind, shape)


@pytest.mark.parametrize(
    ("kind", "place", "value"), [("Q4_0", 0, b"\x00\x7c"), ("Q4_K", 2, b"\x01\x7e"), ("MXFP4", 0, b"\xff"), ("MXFP4", 0, b"\xfe")]
)
def test_scales_that_are_not_finite_are_refused(kind: str, place: int, value: bytes) -> None:
    block = bytearray(b"\x11" * SIZES[kind][1])
    block[place : place + len(value)] = value
    with pytest.raises(InputError, match=r"[18] of .* give numbers that are not finite, the first at"):
        from_blocks(bytes(block), kind, (SIZES[kind][0],))


def test_empty() -> None:
    assert from_blocks(b"", "Q4_K", (4, 0)).dequantize().shape == (4, 0)
    assert from_blocks(b"", "Q4_K", (0, 256)).dequantize().shape == (0, 256)
