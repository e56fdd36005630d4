"""GPTQ against an unblocked oracle, over every format; degenerate Hessians; a case small enough to try every code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_seam import CATALOGUE, hessian, lost, plain, weights
from test_seam import gptq as unblocked
from torch import Tensor

from roundel import FormatError
from roundel.formats import Format, QTensor
from roundel.formats.qtensor import packed
from roundel.solvers import gptq, rtn


def by_elimination(w: Tensor, fmt: Format, h: Tensor, share: float = 0.01) -> QTensor:
    """Optimal brain quantization (Frantar et al. 2022, eq. 2 and 3) of w (rows, cols) with damped h (batch, cols, cols).

    After each step the free columns take the values that minimise d^T H d given every error so far, from the inverse of the
    Hessian itself, from which what is done is eliminated. No Cholesky factor, no blocks; heaviest steps first.
    """
    rows, cols = w.shape
    h = h.double()
    damping = share * h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(cols)
    importance = (h + share * h.diagonal(dim1=1, dim2=2).mean() * torch.eye(cols)).diagonal(dim1=1, dim2=2)
    params = fmt.store(fmt.fit(w, importance.float().repeat_interleave(rows // len(h), 0)))
    inverse = torch.linalg.inv(h + damping)
    steps = [list(range(i, min(i + fmt.step, cols))) for i in range(0, cols, fmt.step)]
    heavy = {tuple(s): float(h.diagonal(dim1=1, dim2=2)[:, s].mean()) for s in steps}
    order = sorted(steps, key=lambda s: (len(s) < fmt.step, -heavy[tuple(s)]))
    work, codes = w.double().clone(), {}
    for step in order:
        at = torch.tensor(step)
        codes[step[0]] = fmt.encode(work[:, at].float(), params, at)
        error = (work[:, at] - fmt.decode(codes[step[0]], params, at).double()).view(len(h), -1, len(step))
        own = torch.linalg.inv(inverse[:, at][..., at])
        work -= (error @ own @ inverse[:, at]).reshape(rows, cols)
        inverse = inverse - inverse[..., at] @ own @ inverse[:, at]
    return packed(fmt, torch.cat([codes[i] for i in sorted(codes)], 1), params, tuple(w.shape))


def tilted(cols: int, batch: int = 1, seed: int = 0, rising: bool = False) -> Tensor:
    """A Hessian whose diagonal falls (or rises) from 16 to 1/16 of itself."""
    weight = torch.logspace(2, -2, cols, 2).flip(0) if rising else torch.logspace(2, -2, cols, 2)
    h = hessian(cols, batch, seed)
    size = h.diagonal(dim1=1, dim2=2).sqrt()
    return h / (size[:, :, None] * size[:, None]) * weight[:, None] * weight


@pytest.mark.proves("solvers.gptq")
@pytest.mark.parametrize("text", CATALOGUE)
def test_blocks_and_factors_change_no_code(text: str) -> None:
    """More columns than a block holds, a short last step for vector codes, every format."""
    w, h, fmt = weights(8, 149), hessian(149), Format.parse(text)
    found, wanted = gptq(w, fmt, h), by_elimination(w, fmt, h)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.dequantize(), wanted.dequantize())


@pytest.mark.proves("solvers.gptq", "seam.depthwise")
@pytest.mark.parametrize("text", ["int4", "int3/g4", "nf4", "cb4/tensor", "cb4x3@tensor/channel", "int4/tensor"])
@pytest.mark.parametrize(("shape", "groups"), [((24, 1, 3, 3), 24), ((12, 5, 3, 3), 4), ((8, 16, 3, 3), 2)])
def test_each_group_of_a_convolution_has_its_own_hessian(text: str, shape: tuple[int, ...], groups: int) -> None:
    w, fmt = weights(shape[0], math.prod(shape[1:])), Format.parse(text)
    h = (hessian(w.shape[1], groups) + 0.5) * torch.linspace(0.1, 3, groups)[:, None, None]  # neighbouring places are alike
    found = gptq(w.view(shape), fmt, h)
    assert found.shape == shape
    assert torch.equal(found.codes, by_elimination(w, fmt, h).codes)
    assert lost(w, found.dequantize().view(w.shape), h) < lost(w, plain(w, fmt, h).dequantize(), h)


def test_where_the_order_is_the_columns_own_it_is_the_solver_of_the_seam() -> None:
    """The seam's takes columns as they come and a Hessian that is damped already; a falling diagonal makes both do the same."""
    w, h = weights(16, 140), tilted(140)
    damped = h + 0.01 * h.diagonal(dim1=1, dim2=2).mean() * torch.eye(140)
    for text in ("int4", "uint4/g32", "nvfp4", "int3/g32"):
        assert torch.equal(gptq(w, Format.parse(text), h).codes, unblocked(w, Format.parse(text), damped).codes)


@pytest.mark.proves("solvers.gptq")
@pytest.mark.parametrize("text", CATALOGUE)
@pytest.mark.parametrize("rising", [False, True])
def test_it_beats_rounding_in_every_format_whichever_columns_are_heavy(text: str, rising: bool) -> None:
    w, fmt = weights(24, 64), Format.parse(text)
    h = tilted(64, rising=rising)
    solved, near = gptq(w, fmt, h), plain(w, fmt, h)
    assert torch.isfinite(solved.dequantize()).all()
    assert solved.nbytes == near.nbytes
    assert lost(w, solved.dequantize(), h) < lost(w, near.dequantize(), h)


@pytest.mark.proves("solvers.gptq")
@pytest.mark.parametrize("text", ["int4", "int3/g32", "nf4/g32"])
def test_heavy_columns_first_is_the_better_order(text: str) -> None:
    """Act-order at work: where the last columns are heavy, taking columns as they come costs more."""
    w, h, fmt = weights(24, 96), tilted(96, rising=True), Format.parse(text)
    damped = h + 0.01 * h.diagonal(dim1=1, dim2=2).mean() * torch.eye(96)
    assert lost(w, gptq(w, fmt, h).dequantize(), h) < lost(w, unblocked(w, fmt, damped).dequantize(), h)


@pytest.mark.proves("seam.vector-gptq", "seam.short-group")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("text", "cols"), [("cb16x2", 37), ("cb256x2@tensor/channel", 131), ("cb64x4@tensor/g32", 61)])
def test_a_short_last_step_of_a_vector_code_stays_whole(text: str, cols: int, seed: int) -> None:
    """Its columns are the heaviest, so that an order by weight alone would move it to the front and cut every other step in two."""
    w, h, fmt = weights(16, cols, seed), tilted(cols, seed=seed, rising=True), Format.parse(text)
    assert lost(w, gptq(w, fmt, h).dequantize(), h) < lost(w, plain(w, fmt, h).dequantize(), h)


def test_a_layout_with_outputs_on_another_axis() -> None:
    w, h, fmt = weights(12, 40), hessian(40), Format.parse("int4")
    turned = gptq(w.T.contiguous(), fmt, h, axis=1)
    assert turned.shape == (40, 12)
    assert torch.equal(turned.dequantize().T, gptq(w, fmt, h).dequantize())


def test_a_table_that_is_given_is_kept() -> None:
    w, h, fmt = weights(8, 40), hessian(40), Format.parse("cb4/tensor")
    q = gptq(w, fmt, h, table=torch.tensor([-2.0, -0.5, 0.5, 2.0]).view(1, 4, 1))
    assert set(q.dequantize().unique().tolist()) <= {-2.0, -0.5, 0.5, 2.0}


# -- small enough to check by hand or by trying everything -----------------------------------------------------------------


@pytest.mark.proves("solvers.gptq")
def test_a_hand_worked_example() -> None:
    """Whole numbers, both weights 0.4, two inputs that mostly move together: H = [[10, 9], [9, 9]], damped by 0.095.

    Column 0 is heavier: 0.4 -> 0, and its error moves column 1 by 0.4 * 9 / 9.095, to 0.796 -> 1. The errors (0.4, -0.6) cost
    10 * 0.16 - 2 * 9 * 0.24 + 9 * 0.36 = 0.52; rounding to nearest leaves (0.4, 0.4), 37 * 0.16 = 5.92.
    """
    w, h, fmt = torch.tensor([[0.4, 0.4]]), torch.tensor([[[10.0, 9.0], [9.0, 9.0]]]), Format.parse("int4/tensor*one")
    q = gptq(w, fmt, h)
    assert q.dequantize().tolist() == [[0.0, 1.0]]
    assert lost(w, q.dequantize(), h) == pytest.approx(0.52, rel=1e-5)
    assert lost(w, rtn(w, fmt).dequantize(), h) == pytest.approx(5.92, rel=1e-5)
    turned = gptq(w.flip(1), fmt, h.flip(1, 2))  # the heavier column still goes first
    assert turned.dequantize().tolist() == [[1.0, 0.0]]


@pytest.mark.proves("solvers.gptq")
@pytest.mark.parametrize("text", ["int2/channel", "int2/tensor*fp32", "uint2/channel"])
def test_on_a_tiny_case_it_lies_between_the_optimum_and_rounding(text: str) -> None:
    """Every assignment of 2-bit codes to a 2 x 4 weight is tried: nothing beats the best, and the gap to it closes mostly."""
    fmt, gained, possible = Format.parse(text), 0.0, 0.0
    for seed in range(12):
        w, h = weights(2, 4, seed), hessian(4, seed=seed).double() + 0.8 * torch.ones(4, 4)
        q = gptq(w, fmt, h)
        near = fmt.decode(fmt.encode(w, q.params), q.params)
        low, high = map(int, fmt.extremes)
        options = torch.tensor(list(itertools.product(range(low, high + 1), repeat=4)), dtype=torch.int32)
        best = 0.0
        for row in range(2):
            index = torch.full((len(options),), row)
            values = fmt.decode(options, q.params, rows=index)
            best += min(lost(w[row : row + 1], value[None], h) for value in values)
        solved = lost(w, q.dequantize(), h)
        assert solved >= best * (1 - 1e-9)
        gained += lost(w, near, h) - solved
        possible += lost(w, near, h) - best
    assert possible > 0
    assert gained > 0.4 * possible


# -- Hessians that are not as they should be -----------------------------------------------------------------------------


@pytest.mark.proves("inputs.hessian")
@pytest.mark.parametrize("text", ["int4", "int4/g32", "cb16/channel", "cb16x2", "nvfp4"])
def test_inputs_that_were_always_zero_are_rounded_to_nearest(text: str) -> None:
    w, fmt = weights(16, 64), Format.parse(text)
    x = torch.randn(200, 64) @ (torch.eye(64) + 0.2 * torch.randn(64, 64))
    dead = torch.tensor([0, 1, 6, 7, 40, 41, 62, 63])
    x[:, dead] = 0
    h = (x.T @ x)[None]
    q = gptq(w, fmt, h)
    assert torch.equal(q.unpack()[:, dead[:: fmt.step] // fmt.step], fmt.encode(w, q.params)[:, dead[:: fmt.step] // fmt.step])
    assert lost(w, q.dequantize(), h) < lost(w, fmt.decode(fmt.encode(w, q.params), q.params), h)
    # and not at any price: they may be alive in use
    near = rtn(w, fmt).dequantize()
    assert (q.dequantize() - w)[:, dead].square().sum() < 6 * (near - w)[:, dead].square().sum()


@pytest.mark.proves("inputs.hessian")
def test_dead_inputs_do_not_change_what_the_others_get() -> None:
    """Nine of ten inputs are dead: the damping of the live ones is still a share of their own mean."""
    w, x, fmt = weights(16, 300), torch.randn(24, 30), Format.parse("int4/tensor*one")
    h = torch.zeros(1, 300, 300)
    h[0, :30, :30] = x.T @ x
    assert torch.equal(gptq(w, fmt, h).unpack()[:, :30], gptq(w[:, :30], fmt, h[:, :30, :30]).unpack())
    assert torch.equal(gptq(w, fmt, h).unpack()[:, 30:], rtn(w[:, 30:], fmt).unpack())


@pytest.mark.proves("inputs.hessian")
@pytest.mark.parametrize("text", ["int4", "cb16/channel", "int4/g32"])
def test_a_group_of_rows_without_any_input_is_rounded_as_if_alone(text: str) -> None:
    w, fmt, h = weights(8, 40), Format.parse(text), hessian(40, 2)
    h[1] = 0
    assert torch.equal(gptq(w, fmt, h).dequantize()[4:], rtn(w[4:], fmt).dequantize())
    assert torch.equal(gptq(w, fmt, 0 * h).dequantize(), rtn(w, fmt).dequantize())


@pytest.mark.proves("inputs.hessian")
@pytest.mark.parametrize("text", ["int4", "int3/g32", "nf4", "cb16x2"])
@pytest.mark.parametrize("samples", [1, 5, 40])
def test_fewer_samples_than_columns(text: str, samples: int) -> None:
    """Rank-deficient: damped, solved, and never worse on what was seen."""
    w, fmt, x = weights(16, 64), Format.parse(text), torch.randn(samples, 64)
    h = (x.T @ x)[None]
    q = gptq(w, fmt, h)
    assert torch.isfinite(q.dequantize()).all()
    assert lost(w, q.dequantize(), h) < 0.7 * lost(w, plain(w, fmt, h + 0.01 * torch.eye(64) * samples).dequantize(), h)
    assert torch.equal(q.codes, by_elimination(w, fmt, h).codes)


@pytest.mark.proves("inputs.hessian")
@pytest.mark.parametrize(("below", "share"), [(0.05, 0.1), (0.5, 1.0), (5.0, 10.0)])
def test_an_indefinite_hessian_climbs_the_ladder_of_damping(below: float, share: float) -> None:
    """Its lowest eigenvalue is -below of the mean diagonal: the first rung above that is the one that holds."""
    start = torch.randn(16, 16, dtype=torch.float64)
    start[:, 0] = 1  # the lowest direction takes from all columns alike, so that the diagonal stays positive
    vectors = torch.linalg.qr(start)[0]
    values = torch.linspace(0.8, 1.2, 16, dtype=torch.float64)
    values[0] = -below
    values[1:] *= (16 + below) / values[1:].sum()  # the mean is 1
    h = ((vectors * values) @ vectors.T)[None]
    w, fmt = weights(8, 16), Format.parse("int4")
    importance = h.diagonal(dim1=1, dim2=2) + 0.01 * h.diagonal(dim1=1, dim2=2).mean()
    assert (importance > 0).all()
    q = gptq(w, fmt, h)
    params = fmt.store(fmt.fit(w, importance.float().expand(8, -1)))
    assert torch.equal(q.params.scale, params.scale)  # type: ignore[arg-type]
    damped = h + share * torch.eye(16)
    work, order = w.double().clone(), h[0].diagonal().argsort(descending=True).tolist()
    inverse, wanted = torch.linalg.inv(damped[0]), torch.zeros(8, 16, dtype=torch.int32)
    for col in order:
        at = torch.tensor([col])
        wanted[:, at] = fmt.encode(work[:, at].float(), params, at)
        error = work[:, at] - fmt.decode(wanted[:, at], params, at)
        work -= error / inverse[col, col] * inverse[col]
        inverse = inverse - torch.outer(inverse[:, col], inverse[col]) / inverse[col, col]
    assert torch.equal(q.unpack(), wanted)


@pytest.mark.proves("inputs.hessian")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    w, fmt = weights(4, 12), Format.parse("int4")
    whole, one, diagonal = hessian(12, 2) * bad, hessian(12, 2), hessian(12, 2)
    one[1, 3, 5] = one[1, 5, 3] = bad
    diagonal[1, 4, 4] = bad
    for h in (whole, one, diagonal, -hessian(12, 2)):
        with pytest.raises(FormatError, match="not positive definite, however damped"):
            gptq(w, fmt, h)


@pytest.mark.proves("inputs.hessian")
def test_the_unit_of_the_hessian_does_not_matter() -> None:
    """Sums over many or few samples, of tiny or huge inputs, a dead one among them; float32 would hold no 1e-60 and no 1e60."""
    w, h = weights(8, 37), hessian(37).double()
    h[:, 5] = h[:, :, 5] = 0
    for text in ("int4", "cb16/channel", "int3/g8", "cb16x2"):
        usual = gptq(w, Format.parse(text), h).codes
        for power in (-200, -30, 30, 200):
            assert torch.equal(gptq(w, Format.parse(text), h * 2.0**power).codes, usual)


@pytest.mark.parametrize("shape", [(), (8,), (8, 8), (1, 8, 7), (3, 8, 8), (0, 8, 8), (1, 4, 4), (1, 1, 8, 8)])
def test_a_hessian_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="a weight of 4 rows and 8 columns cannot use a Hessian of shape"):
        gptq(weights(4, 8), Format.parse("int4"), torch.zeros(shape))


@pytest.mark.proves("inputs.empty-tensor", "inputs.scalar")
def test_empty_and_small_weights() -> None:
    for shape, cols in [((0, 3), 3), ((3, 0), 0), ((0,), 0), ((2, 3, 0, 1), 0)]:
        assert gptq(torch.zeros(shape), Format.parse("int4"), torch.zeros(1, cols, cols)).shape == shape
    for text in ("int4", "uint4/g32", "nf4", "cb16/channel", "cb16x2", "nvfp4"):
        for shape, cols in [((1, 1), 1), ((5,), 5), ((7, 1), 1), ((1, 7), 7)]:
            w = torch.randn(shape)
            assert torch.isfinite(gptq(w, Format.parse(text), hessian(cols)).dequantize()).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = weights(4, 8)
    w[2, 5] = bad
    with pytest.raises(FormatError, match=r"1 of 32 numbers are not finite, the first at \(2, 5\)"):
        gptq(w, Format.parse("int4"), hessian(8))


@pytest.mark.proves("file.sha256")
def test_one_and_two_threads_choose_the_same_codes_and_nothing_given_is_changed() -> None:
    w, h = weights(32, 140), hessian(140)
    before = w.clone(), h.clone()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([gptq(w, Format.parse(text), h) for text in ("int4/g32", "cb16x2")])
    torch.set_num_threads(1)
    for a, b in zip(*found):
        assert torch.equal(a.codes, b.codes)
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])
