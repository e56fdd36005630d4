"""Round to nearest: never worse than taking the range, and parameters that went through their own formats, outer first."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from roundel import Format, FormatError
from roundel.cli import CATALOGUE
from roundel.formats import Codebook, Params, Real
from roundel.formats.qtensor import packed
from roundel.solvers import rtn

TEXTS = [text for _, texts in CATALOGUE for text in texts]
SCALED = [text for text in TEXTS if not isinstance(Format.parse(text).grid, Codebook | Real)]


def heavy(rows: int, cols: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(11)
    return torch.randn(rows, cols, generator=draw) * torch.rand(rows, cols, generator=draw).exp()


@pytest.mark.proves("seam.rtn", "solvers.rtn")
@pytest.mark.parametrize("text", SCALED)
def test_never_worse_than_the_range(text: str) -> None:
    fmt, w = Format.parse(text), heavy(32, 256)
    rows, cols = fmt.share.grid((32, 256))
    blocks = w.reshape(rows, 32 // rows, cols, 256 // cols)
    params = fmt.store(fmt.from_range(blocks.amin((1, 3)), blocks.amax((1, 3))))
    naive = packed(fmt, fmt.encode(w, params), params, (32, 256)).dequantize()
    searched = rtn(w, fmt).dequantize()
    assert (searched - w).square().sum() <= (naive - w).square().sum() * (1 + 1e-6)


@pytest.mark.proves("solvers.rtn")
@pytest.mark.parametrize("text", TEXTS)
def test_error_falls_with_the_bits_as_theory_says(text: str) -> None:
    """On a Gaussian; formats that are near to uniform stay within 12 times the rate-distortion bound 2^-2b."""
    fmt, w = Format.parse(text), torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    loss = float((rtn(w, fmt).dequantize() - w).square().mean())
    levels = math.log2(fmt.grid.k) / fmt.step if isinstance(fmt.grid, Codebook) else fmt.bits
    assert loss < {1: 0.5, 2: 0.25, 3: 0.08}.get(round(levels), 0.05)
    if text.startswith(("int", "uint", "nf4", "cb16", "mxint")):
        assert loss < 12 * 4.0**-levels


@pytest.mark.proves("seam.store")
def test_scales_of_scales_by_hand() -> None:
    """nvfp4: the tensor's scale is stored first, as fp32, each block's scale as the nearest fp8 multiple of it."""
    fmt = Format.parse("nvfp4")
    scales = torch.tensor([[0.013, 0.7, 3.1, 0.2]])
    stored = fmt.store(Params(scale=scales))
    part = stored.parts[0]
    outer = part.scale.dequantize()
    assert part.scale.format == Format.parse("fp32")
    nearest = (scales / outer).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert torch.equal(stored.scale, torch.from_numpy(nearest) * outer)


@pytest.mark.proves("seam.store")
def test_fp16_scales_are_rounded_or_refused() -> None:
    fmt = Format.parse("int4/channel")
    stored = fmt.store(Params(scale=torch.tensor([[0.1], [3.0]])))
    assert stored.scale.flatten().tolist() == [float(np.float16(0.1)), 3.0]
    with pytest.raises(FormatError, match=r"65504|6\.55e\+04"):
        fmt.store(Params(scale=torch.tensor([[70000.0]])))
