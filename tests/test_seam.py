"""One solver over every format: what `Format` and a solver ask of each other, on every case that has broken such designs."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from roundel import FormatError
from roundel.formats import Codebook, Format, Levels, QTensor, Real, Stored, Uniform
from roundel.formats.grid import TABLES, table
from roundel.formats.qtensor import packed
from roundel.solvers import rtn

CATALOGUE = [
    *(f"int{n}" for n in range(1, 17)),
    *(f"uint{n}/g32" for n in range(1, 17)),
    *("int4/g32", "int4/tensor", "int4/b8x16", "int3/g16*bf16", "uint4/g128*fp16~uint4", "uint4/g32*fp16-fp16", "int8/g32*e8m0"),
    *("fp8", "fp8_e5m2", "fp6", "fp6_e3m2", "fp4", "fp8/b16x16*fp32", "nvfp4", "mxfp4", "mxfp6", "mxfp8", "mxint8"),
    *("q4_k", "q6_k", "q8_0", "q4_0", "iq4_nl", "nf4", "nf4/g32", "nf4/g64*fp8/tensor*fp32"),
    *("log3", "log4", "log4:1.414", "log4:fit", "log4:fit@channel/g32"),
    *("apot3", "apot4", "apot5", "ternary", "ternary/g32", "binary"),
    *("cb16/channel", "cb16/tensor", "cb16/g32*int8", "cb8/channel", "cb5@tensor/g32"),
    *("cb256x2@tensor/channel", "cb16x2", "cb64x4@tensor/g32"),
]  # fmt: skip


# -- the solver: nothing in it knows a format ------------------------------------------------------------------------


def gptq(w: Tensor, fmt: Format, h: Tensor) -> QTensor:
    """GPTQ (Frantar et al. 2022) on w (rows, cols); h (batch, cols, cols), one Hessian per equal run of rows."""
    params = fmt.store(fmt.fit(w, h.diagonal(dim1=1, dim2=2).repeat_interleave(len(w) // len(h), 0)))
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    work, codes = w.clone(), []
    for cols in torch.arange(w.shape[1]).split(fmt.step):
        codes.append(fmt.encode(work[:, cols], params, cols))
        error = (work[:, cols] - fmt.decode(codes[-1], params, cols)).view(len(h), -1, len(cols))
        error = torch.linalg.solve_triangular(u[:, cols][..., cols], error, upper=True, left=False)
        work -= (error @ u[:, cols]).view(w.shape)
    return packed(fmt, torch.cat(codes, 1), params, tuple(w.shape))


def hessian(cols: int, batch: int = 1, seed: int = 0) -> Tensor:
    """X^T X of correlated inputs, damped."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(cols) + 0.15 * torch.randn(batch, cols, cols, generator=generator)
    x = torch.randn(batch, 4 * cols, cols, generator=generator) @ mix
    h = x.mT @ x / (4 * cols)
    return h + 0.01 * h.diagonal(dim1=1, dim2=2).mean() * torch.eye(cols)


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    """A little heavy-tailed, as weights are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * (1 + 0.5 * torch.randn(rows, cols, generator=generator).abs())


def lost(w: Tensor, q: Tensor, h: Tensor) -> float:
    """sum of d^T H d over rows, d the error of a row."""
    d = (w - q).double().view(len(h), -1, w.shape[1])
    return float(((d @ h.double()) * d).sum())


def plain(w: Tensor, fmt: Format, h: Tensor) -> QTensor:
    """Round to nearest with the same parameters' fit."""
    return rtn(w, fmt, importance=h.diagonal(dim1=1, dim2=2).repeat_interleave(len(w) // len(h), 0))


@pytest.mark.proves("seam.gptq", "seam.gptq-nvfp4", "seam.vector-gptq", "seam.cb16-g32-int8", "formats.mx", "formats.nvfp4")
@pytest.mark.parametrize("text", CATALOGUE)
def test_one_gptq_beats_rounding_in_every_format(text: str) -> None:
    w, h, fmt = weights(32, 96), hessian(96), Format.parse(text)
    near, solved = plain(w, fmt, h), gptq(w, fmt, h)
    assert torch.isfinite(solved.dequantize()).all()
    assert lost(w, solved.dequantize(), h) < lost(w, near.dequantize(), h)
    assert solved.nbytes == near.nbytes == fmt.nbytes((32, 96))


@pytest.mark.proves("seam.short-group", "inputs.short-group")
@pytest.mark.parametrize(
    "text",
    ["int4/g32", "q4_k", "nvfp4", "mxfp4", "cb16/g32*int8", "uint4/g32*fp16-fp16", "int4/b8x16", "cb16x2", "cb64x4@tensor/g32"],
)
@pytest.mark.parametrize("shape", [(10, 37), (3, 5), (1, 1), (9, 65)])
def test_short_last_groups(text: str, shape: tuple[int, int]) -> None:
    fmt, w, h = Format.parse(text), weights(*shape), hessian(shape[1])
    solved = gptq(w, fmt, h)
    assert solved.dequantize().shape == shape
    assert solved.nbytes == fmt.nbytes(shape) == plain(w, fmt, h).nbytes
    assert lost(w, solved.dequantize(), h) <= 1.5 * lost(w, plain(w, fmt, h).dequantize(), h) + 1e-9


@pytest.mark.proves("seam.depthwise")
@pytest.mark.parametrize(("shape", "groups"), [((24, 1, 3, 3), 24), ((24, 4, 3, 3), 4), ((16, 8, 3, 1), 1)])
@pytest.mark.parametrize("text", ["int4", "int3/g4", "nf4", "cb4/channel", "fp4/g4*fp8/tensor*fp32"])
def test_convolutions_are_a_batch_of_matrices(shape: tuple[int, ...], groups: int, text: str) -> None:
    """Depthwise (out, 1, k, k) and grouped: rows are output channels, each run of them has its own Hessian."""
    w = weights(shape[0], math.prod(shape[1:]))
    h, fmt = hessian(w.shape[1], groups), Format.parse(text)
    assert lost(w, gptq(w, fmt, h).dequantize(), h) < lost(w, plain(w, fmt, h).dequantize(), h)
    q = rtn(w.view(shape), fmt)
    assert q.shape == shape
    assert torch.equal(q.dequantize(), rtn(w, fmt).dequantize().view(shape))


@pytest.mark.parametrize("text", ["int4/g32", "q4_k", "cb16/g32*int8", "nvfp4", "cb16/channel", "int4/b8x16", "uint4/g32"])
def test_columns_and_rows_keep_their_original_index(text: str) -> None:
    """Any selection, in any order, codes as it does in its place: reordering needs nothing else."""
    w, fmt = weights(24, 70), Format.parse(text)
    params = fmt.store(fmt.fit(w))
    codes, values = fmt.encode(w, params), fmt.decode(fmt.encode(w, params), params)
    order = torch.randperm(70)[:50]
    rows = torch.randperm(24)[:11]
    assert torch.equal(fmt.encode(w[:, order], params, order), codes[:, order])
    assert torch.equal(fmt.decode(codes[:, order], params, order), values[:, order])
    assert torch.equal(fmt.encode(w[rows], params, rows=rows), codes[rows])
    assert torch.equal(fmt.decode(codes[rows][:, order], params, order, rows), values[rows][:, order])
    assert torch.equal(rtn(w, fmt).matrix_values(rows), values[rows])


@pytest.mark.proves("seam.vector-gptq")
@pytest.mark.parametrize("text", ["cb256x2@tensor/channel", "cb16x2", "cb16x4"])
def test_vector_codes_move_in_steps(text: str) -> None:
    fmt, w = Format.parse(text), weights(16, 64)
    assert isinstance(fmt.grid, Codebook)
    params = fmt.store(fmt.fit(w))
    codes, dim = fmt.encode(w, params), fmt.step
    assert codes.shape == (16, 64 // dim)
    cols = torch.arange(dim * 3, dim * 4)
    assert torch.equal(fmt.encode(w[:, cols], params, cols), codes[:, 3:4])
    assert torch.equal(fmt.decode(codes[:, 3:4], params, cols), fmt.decode(codes, params)[:, cols])


@pytest.mark.proves("seam.store")
def test_encode_and_decode_take_stored_parameters_only() -> None:
    fmt, w = Format.parse("int4"), weights(2, 8)
    with pytest.raises(FormatError, match=r"call store\(\)"):
        fmt.encode(w, fmt.fit(w))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"call store\(\)"):
        fmt.decode(torch.zeros(2, 8, dtype=torch.int32), fmt.fit(w))  # type: ignore[arg-type]


@pytest.mark.proves("seam.uint8-zero")
@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_uint8_activations_with_zero_point_compute_on_integers(axis: int) -> None:
    """acc = sum (q_x - z_x) q_w exactly in integers, then scaled, is the product of the dequantized values."""
    fmt = Format.parse("uint8/channel", role="activation")
    x = torch.rand(40, 24) * torch.linspace(0.1, 30, 24) - torch.linspace(0, 4, 24)
    qx, qw = rtn(x, fmt, axis=axis), rtn(weights(8, 24), Format.parse("int8/tensor*fp32"))
    assert qx.scale is not None
    assert qx.offset is not None
    assert qw.scale is not None
    codes, zero, scale = qx.unpack(), qx.offset.unpack(), qx.scale.dequantize()
    assert codes.min() >= 0
    assert codes.max() <= 255
    assert zero.shape == scale.shape == (x.shape[axis], 1)
    centred = codes.long() - zero.long()
    assert torch.equal(qx.dequantize(), (centred.float() * scale).movedim(0, axis))
    assert (qx.dequantize() - x).abs().amax() <= scale.max() * 0.501
    if axis == 0:  # one scale a token: a pure integer product
        acc = centred @ qw.unpack().long().T
        exact = acc.double() * scale.double() * qw.scale.dequantize().double()
    else:  # one scale a channel: it multiplies what is summed
        exact = (centred.T.double() * scale.T.double()) @ (qw.unpack().double() * qw.scale.dequantize().double()).T
    torch.testing.assert_close(exact, qx.dequantize().double() @ qw.dequantize().double().T, rtol=1e-5, atol=1e-4)
    padded = rtn(torch.cat([x, torch.zeros(40, 24)], 1 - axis), fmt, axis=axis).dequantize()
    assert (padded.movedim(axis, 0)[:, -1] == 0).all()  # zero stays zero


# -- every format, number by number --------------------------------------------------------------------------------------


def value(q: QTensor, row: int, col: int) -> float:
    """One number of a stored tensor from its bits, with Python's integers and floats in float32 steps."""
    fmt = q.format
    word = int.from_bytes(bytes(q.codes[row].tolist()), "little") >> (col // fmt.step * fmt.bits) & (2**fmt.bits - 1)
    return float(scaled(q, np.float32(level(q, word, row, col % fmt.step)), row, col))


def level(q: QTensor, word: int, row: int, part: int) -> float:
    """What a code stands for before its scale."""
    grid = q.format.grid
    if isinstance(grid, Uniform):
        return float(word - 2**grid.bits if grid.signed and word >> (grid.bits - 1) else word)
    if isinstance(grid, Levels):
        return table(grid.name).decode[word]
    if isinstance(grid, Real):
        return float(
            np.array(word, np.uint32 if grid.bits == 32 else np.uint16).view(np.float32 if grid.bits == 32 else np.float16)
        )
    assert q.table is not None
    return float(q.table[row if len(q.table) > 1 else 0, word * grid.dim + part])


def scaled(q: QTensor, number: np.float32, row: int, col: int) -> np.float32:
    """The number after zero point, scale and minimum, each found by the share's own arithmetic."""
    rows, cols = q.format.share.rows or 10**9, q.format.share.cols or 10**9
    scale = np.float32(value(q.scale, row // rows, col // cols)) if q.scale else np.float32(1)
    offset = np.float32(value(q.offset, row // rows, col // cols)) if q.offset else np.float32(0)
    return (number - offset) * scale if q.format.zero else number * scale - offset


@pytest.mark.proves("seam.encode-decode", "seam.qtensor")
@pytest.mark.parametrize("text", [t for t in CATALOGUE if "bf16" not in t])
def test_every_format_decodes_to_what_its_bits_say(text: str) -> None:
    q = rtn(weights(10, 70), Format.parse(text))
    found = q.dequantize()
    for row, col in [(0, 0), (3, 31), (3, 32), (9, 69), (5, 64), (8, 17), (9, 1)]:
        assert float(found[row, col]) == value(q, row, col)


@pytest.mark.proves("seam.encode-decode")
@pytest.mark.parametrize("text", [t for t in CATALOGUE if Format.parse(t).bits <= 8])
def test_every_format_encodes_to_a_nearest_level(text: str) -> None:
    """No other code under the same parameters comes closer, in number or, for vectors, in distance."""
    fmt, w = Format.parse(text), weights(6, 64)
    params = fmt.store(fmt.fit(w))
    codes = fmt.encode(w, params)
    chosen = (fmt.decode(codes, params) - w).view(6, -1, fmt.step).square().sum(2)
    for code in _legal(fmt):
        other = fmt.decode(torch.full_like(codes, code), params)
        distance = torch.where(other.isfinite(), other - w, torch.inf).view(6, -1, fmt.step).square().sum(2)
        assert (chosen <= distance * (1 + 1e-5) + 1e-12).all()


def _legal(fmt: Format) -> range:
    """Every code that a grid may emit, and a float table's other patterns too."""
    if isinstance(fmt.grid, Uniform):
        return range(int(fmt.extremes[0]), int(fmt.extremes[1]) + 1)
    assert not isinstance(fmt.grid, Real)
    return range(fmt.grid.k if isinstance(fmt.grid, Codebook) else 2**fmt.bits)


# -- decode is differentiable ----------------------------------------------------------------------------------------


@pytest.mark.proves("seam.gradient")
@pytest.mark.parametrize(
    "text",
    [
        "int4/g8*fp32",
        "uint4/g8*fp32~uint4",
        "uint4/g8*fp32-fp32",
        "nf4/g8*fp32",
        "cb16/g8*fp32",
        "cb8x2@tensor/g8*fp32",
        "cb4@channel/channel*fp32",
        "int4/b4x8*fp32",
    ],
)
def test_decode_is_differentiable_in_its_parameters(text: str) -> None:
    fmt, w = Format.parse(text), weights(6, 20)
    stored = fmt.store(fmt.fit(w))
    codes, pull = fmt.encode(w, stored), torch.randn(6, 20)
    names = [name for name in ("scale", "offset", "table") if getattr(stored, name) is not None]
    leaves = {name: getattr(stored, name).clone().requires_grad_() for name in names}
    (fmt.decode(codes, Stored(**leaves))[:, :20] * pull).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        for index in list(itertools.product(*map(range, leaf.shape)))[:6]:
            ends = []
            for step in (0.5, -0.5):  # decode is linear in each parameter: a large step is exact
                moved = {n: v.detach().clone() for n, v in leaves.items()}
                moved[name][index] += step
                ends.append(float((fmt.decode(codes, Stored(**moved))[:, :20].double() * pull).sum()))
            assert float(leaf.grad[index]) == pytest.approx(ends[0] - ends[1], rel=1e-4, abs=1e-4)


# -- refit -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("seam.refit")
@pytest.mark.parametrize(
    "text",
    [
        "int4/g32*fp32",
        "uint4/g32*fp32-fp32",
        "nf4/g32*fp32",
        "cb16@tensor/g32*fp32",
        "cb16/channel",
        "cb16x2",
        "int4/b8x16*fp32",
        "uint4/g32*fp32~uint4",
    ],
)
def test_refit_never_raises_the_weighted_error(text: str) -> None:
    fmt, w = Format.parse(text), weights(16, 96)
    importance = torch.rand(96) ** 3
    params = fmt.store(fmt.from_range(*_ranges(fmt, w))) if not isinstance(fmt.grid, Codebook) else fmt.store(fmt.fit(w))
    codes = fmt.encode(w, params)
    again = fmt.store(fmt.refit(w, codes, params, importance))

    def error(p: Stored) -> float:
        return float(((fmt.decode(codes, p)[:, :96] - w).double().square() * importance).sum())

    assert error(again) <= error(params) * (1 + 2e-3)


def _ranges(fmt: Format, w: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = fmt.share.grid(tuple(w.shape))  # type: ignore[arg-type]
    blocks = w.reshape(rows, w.shape[0] // rows, cols, w.shape[1] // cols)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


# -- a grid that is already there ------------------------------------------------------------------------------------------

GRIDS = [t for t in CATALOGUE if not isinstance(Format.parse(t).grid, Codebook) and Format.parse(t).bits <= 14]


@pytest.mark.proves("seam.exact-grid")
@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_quantizing_again_changes_nothing(text: str, seed: int) -> None:
    fmt = Format.parse(text)
    w = weights(20, 128, seed) * 10.0 ** (2 * seed - 2)
    once = rtn(w, fmt).dequantize()
    assert torch.equal(rtn(once, fmt).dequantize(), once)


@pytest.mark.proves("seam.exact-grid")
@pytest.mark.parametrize(
    "text", ["int8/channel*fp32", "int8/tensor*fp32", "int6/channel*fp32", "uint8/channel*fp32~uint8", "int8", "int4/g32"]
)
@pytest.mark.parametrize("cols", [4, 9, 27, 576])
def test_integers_times_a_scale_are_found_whatever_part_of_the_range_they_use(text: str, cols: int) -> None:
    """As in files that hold integer constants: one scale for all, most rows far from the end of the range."""
    fmt = Format.parse(text)
    codes = (torch.randn(64, cols) * 2.0 ** (fmt.bits - 3)).round().clamp(*fmt.extremes)
    scale = torch.tensor(0.00731) if "fp32" in text else torch.tensor(0.00731).half().float()
    assert torch.equal(rtn(codes * scale, fmt).dequantize(), codes * scale)


@pytest.mark.parametrize("text", ["int15", "int16", "uint15/g32", "uint16/g32"])
def test_fifteen_bits_and_more_move_by_rounding_only(text: str) -> None:
    once = rtn(weights(20, 128), Format.parse(text)).dequantize()
    assert (rtn(once, Format.parse(text)).dequantize() - once).abs().max() < 2e-3 * once.abs().max() / 2**4


@pytest.mark.proves("seam.exact-grid")
@pytest.mark.parametrize("text", ["cb16/channel", "cb16/tensor", "cb4/channel", "cb256x2@tensor/channel*one"])
def test_few_values_are_returned_exactly(text: str) -> None:
    fmt = Format.parse(text)
    assert isinstance(fmt.grid, Codebook)
    levels = torch.randn(min(fmt.grid.k, 16)).half().float()
    w = levels[torch.randint(0, len(levels), (8, 60))]
    assert torch.equal(rtn(w, fmt).dequantize(), w)


# -- hostile tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.proves("inputs.nan-weight", "inputs.inf-weight")
@pytest.mark.parametrize("text", ["int8", "nf4/g32", "cb16/channel", "cb16x2", "fp16", "fp8/tensor*one", "q4_k"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_with_count_and_place(text: str, bad: float) -> None:
    w = weights(4, 64)
    w[2, 5] = w[3, 63] = bad
    with pytest.raises(FormatError, match=re.escape("2 of 256 numbers are not finite, the first at (2, 5)")):
        rtn(w, Format.parse(text))


def attempt(w: Tensor, fmt: Format) -> tuple[Tensor | None, str]:
    """What rounding gives, or the sentence that refuses it."""
    try:
        return rtn(w, fmt).dequantize(), ""
    except FormatError as error:
        return None, str(error)


@pytest.mark.proves("inputs.outlier")
@pytest.mark.parametrize("text", CATALOGUE)
@pytest.mark.parametrize("outlier", [1e30, -1e30])
def test_a_huge_outlier_gives_finite_values_or_one_sentence(text: str, outlier: float) -> None:
    w = weights(4, 64)
    w[1, 3] = outlier
    values, refusal = attempt(w, Format.parse(text))
    assert re.search("store it as|holds up to|fp32", refusal) if values is None else torch.isfinite(values).all()


@pytest.mark.proves("inputs.outlier")
@pytest.mark.parametrize("text", ["int8/channel*fp32", "int4/g32*fp32", "nf4/g32*fp32", "mxfp4", "uint4/g32*fp32-fp32"])
def test_a_huge_outlier_survives_where_its_scale_can_be_stored(text: str) -> None:
    w = weights(4, 64)
    w[1, 3] = 1e30
    values = rtn(w, Format.parse(text)).dequantize()
    assert torch.isfinite(values).all()
    assert float(values[1, 3]) == pytest.approx(1e30, rel=0.5)
    assert (values[[0, 2, 3]] - w[[0, 2, 3]]).abs().max() < 2  # other rows do not suffer


@pytest.mark.proves("inputs.outlier")
def test_a_span_beyond_float32_is_coded_within_a_step_or_refused() -> None:
    w = torch.tensor([[1e38, -3e38, 0.0, 2e38], [3.4e38, -3.4e38, 1.0, -1e38]])
    for text in ("int4/channel*fp32", "nf4/channel*fp32", "int8/tensor*fp32"):
        values = rtn(w, Format.parse(text)).dequantize()
        assert ((values - w).abs() <= 0.16 * w.abs().amax()).all()
    for text in ("uint3/channel*fp32-fp32", "uint4/channel*fp32~uint4", "uint8/channel*fp32~uint8"):
        with pytest.raises(FormatError, match=r"from -3e\+38 to 2e\+38 span more than float32 holds"):
            rtn(w, Format.parse(text))


#: Grids without an offset hold a constant within one of their own steps: half the widest gap, relative to the constant.
@pytest.mark.proves("inputs.constant-channel")
@pytest.mark.parametrize("text", CATALOGUE)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.013, -250.0])
def test_constant_rows_come_back_within_one_step(text: str, value: float) -> None:
    fmt = Format.parse(text)
    w = torch.full((4, 64), value)
    values, refusal = attempt(w, fmt)
    if values is None:  # 0.013 over 2^14 levels and more is below what a fp16 scale tells apart
        assert (value, fmt.extremes[1] > 2**13) == (0.013, True)
        assert "is outside fp16" in refusal
        return
    assert torch.isfinite(values).all()
    if value == 0 and fmt.grid != Levels("binary"):
        assert (values == 0).all()
    reach = 0.3 if isinstance(fmt.scale and fmt.scale.grid, Levels) and str(fmt.scale).startswith("e8m0") else 0.06
    one_sided = isinstance(fmt.grid, Uniform) and fmt.bits == 1 and not fmt.zero
    assert (values - w).abs().max() <= reach * abs(value) + (abs(value) if one_sided else 0)


@pytest.mark.proves("inputs.scalar", "inputs.empty-tensor", "seam.qtensor")
@pytest.mark.parametrize("text", CATALOGUE)
def test_small_and_empty_shapes(text: str) -> None:
    fmt = Format.parse(text)
    for shape in [(), (1,), (1, 1), (5,), (0, 4), (4, 0), (0,), (2, 3, 0, 1), (1, 7), (7, 1)]:
        q = rtn(torch.randn(shape), fmt)
        assert q.dequantize().shape == shape
        assert q.dequantize().dtype == torch.float32
        assert q.nbytes == fmt.nbytes(q.matrix)
        assert torch.isfinite(q.dequantize()).all()


@pytest.mark.proves("inputs.constant-channel")
@pytest.mark.parametrize("text", [t for t in CATALOGUE if "binary" not in t])
def test_zero_rows_and_zero_tensors_are_exact(text: str) -> None:
    fmt = Format.parse(text)
    assert (rtn(torch.zeros(4, 40), fmt).dequantize() == 0).all()
    w = weights(4, 64)
    w[1] = 0
    if str(fmt.grid) != "iq4nl" and not isinstance(fmt.grid, Codebook) and fmt.share.rows == 1:
        assert (rtn(w, fmt).dequantize()[1] == 0).all()


@pytest.mark.proves("inputs.strided")
@pytest.mark.parametrize("text", ["int4/g32", "q4_k", "cb16/channel", "cb16x2", "nvfp4", "uint4/g32", "fp16", "fp32"])
def test_layout_of_the_tensor_does_not_show(text: str) -> None:
    fmt, big = Format.parse(text), weights(64, 66)
    for view in (big.T, big[::2, 1::2], big[:, :1].expand(64, 33), big.view(8, 8, 66).permute(2, 0, 1)):
        a, b = rtn(view, fmt), rtn(view.contiguous(), fmt)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.dequantize(), b.dequantize())
    q = rtn(big, fmt, axis=1)
    assert torch.equal(q.dequantize(), rtn(big.T.contiguous(), fmt).dequantize().T)


NASTY = ["int8", "int4/g32", "uint4/g32", "uint3/g16*fp16-fp16", "int2/g8", "q4_k", "q6_k", "nvfp4", "mxfp4", "fp8", "nf4/g32",
         "log4", "apot4", "ternary", "binary", "cb16/channel", "cb8/tensor", "cb16/g32*int8", "cb16x2", "log4:fit", "int16*fp32",
         "uint8/tensor*fp32~uint8"]  # fmt: skip


def nasty(generator: torch.Generator) -> Tensor:
    """A small tensor of huge, tiny, subnormal, constant, zero, one-sided or two-scaled numbers."""

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator))

    shape = (1 + pick(4), 1 + pick(40))
    w = torch.randn(shape, generator=generator)
    kind = pick(9)
    if kind == 0:
        w = w * 10.0 ** (pick(76) - 38)
    elif kind == 1:
        w = w * 10.0 ** (torch.randint(-44, 37, shape, generator=generator))
    elif kind == 2:
        w = torch.full(shape, float(w[0, 0]) * 10.0 ** (pick(70) - 35))
    elif kind == 3:
        w = torch.where(torch.rand(shape, generator=generator) < 0.9, torch.zeros(()), w)
    elif kind == 4:
        w = w.abs() * (1 - 2 * pick(2)) + 1000 * pick(2)
    elif kind == 5:
        w[0, 0] = [3.4e38, -3.4e38, 1e30, 1e-45, 65504.0, 65520.0][pick(6)]
    elif kind == 6:
        w = w.sign() * [1e-45, 3.4e38, 6e-8, 65504.0][pick(4)]
    elif kind == 7:
        w = 1000 + w * 1e-4
    return w.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)


def one_by_one(count: int) -> None:
    """Tensors alone: a value that is finite, or a refusal in one sentence."""
    generator, refused = torch.Generator().manual_seed(0), 0
    forms = [Format.parse(text) for text in NASTY]
    for i in range(count):
        w, fmt = nasty(generator), forms[i % len(forms)]
        values, _ = attempt(w, fmt)
        refused += values is None
        assert values is None or torch.isfinite(values).all(), (fmt, w)
    assert refused < 0.6 * count


def side_by_side(count: int) -> None:
    """Tensors as the rows of larger ones, each with a scale of its own that can hold anything."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.nn.functional.pad(w.reshape(1, -1), (0, 164 - w.numel())) for w in (nasty(generator) for _ in range(count))]
    texts = ["int8/channel*fp32", "int4/g32*fp32", "uint4/g32*fp32~uint4", "uint3/g16*fp32-fp32", "int2/g8*fp32",
             "fp8/channel*fp32", "nf4/g32*fp32", "log4/channel*fp32", "binary/channel*fp32", "mxfp4"]  # fmt: skip
    for text, part in zip(texts, torch.cat(rows).chunk(len(texts))):
        part = part.clamp(-1.7e38, 1.7e38) if "~" in text or "-" in text else part  # a wider span is refused
        assert torch.isfinite(rtn(part, Format.parse(text)).dequantize()).all(), text


@pytest.mark.proves("inputs.finite")
def test_nasty_tensors_never_give_a_number_that_is_not_finite() -> None:
    side_by_side(10_000)
    one_by_one(110)


@pytest.mark.soak
def test_100_000_nasty_tensors() -> None:
    side_by_side(90_000)
    one_by_one(10_000)


def test_the_catalogue_covers_every_grid() -> None:
    grids = {str(Format.parse(text).grid) for text in CATALOGUE}
    assert set(TABLES) - {"e8m0"} <= grids  # a scale's grid, not a weight's
    assert {f"{u}int{n}" for u in ("", "u") for n in range(1, 17)} <= grids
    assert any(isinstance(Format.parse(t).grid, Codebook) for t in CATALOGUE)
    assert not any(isinstance(Format.parse(t).grid, Real) for t in CATALOGUE)
