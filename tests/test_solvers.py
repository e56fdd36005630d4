"""Solvers over the whole catalogue: never worse than where they start, monotone, optimal where that can be checked by hand."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_gptq import tilted
from test_seam import CATALOGUE, hessian, plain, weights
from torch import Tensor

from roundel import FormatError
from roundel.formats import Format, QTensor
from roundel.solvers import NEED_HESSIAN, SOLVERS, alternate, descent, gptq, hqq, rtn, solved
from roundel.solvers.gptq import _turn
from roundel.solvers.quadratic import damped, lost

alternating = importlib.import_module("roundel.solvers.alternate")


def cost(w: Tensor, q: QTensor, h: Tensor) -> float:
    """sum of d^T H d, H damped, by a plain loop over rows."""
    firm = damped(h)[0].numpy()
    d = (q.matrix_values() - w).double().numpy()
    each = len(w) // len(firm)
    return float(sum(row @ firm[i // each] @ row for i, row in enumerate(d)))


@pytest.mark.proves("solvers.descent", "solvers.alternate")
@pytest.mark.parametrize("text", CATALOGUE)
def test_each_rung_is_no_worse_than_the_one_before_in_every_format(text: str) -> None:
    w, h, fmt = weights(4, 29), tilted(29, seed=3), Format.parse(text)
    near, carried, moved, turned = plain(w, fmt, damped(h)[0]), gptq(w, fmt, h), descent(w, fmt, h), alternate(w, fmt, h)
    found = [cost(w, q, h) for q in (carried, moved, turned)]
    assert found[1] <= found[0] * (1 + 1e-9)
    assert found[1] <= cost(w, near, h) * (1 + 1e-6)
    assert found[2] <= found[1] * (1 + 1e-9)
    assert turned.nbytes == moved.nbytes == carried.nbytes == fmt.nbytes((4, 29))
    assert torch.isfinite(turned.dequantize()).all()


@pytest.mark.proves("solvers.descent")
@pytest.mark.parametrize("text", ["int2/g32", "cb8/channel", "cb16x2"])
def test_every_sweep_lowers_the_error(text: str) -> None:
    w, h, fmt = weights(8, 140), hessian(140), Format.parse(text)
    found = [cost(w, descent(w, fmt, h, sweeps=n), h) for n in range(5)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(found))
    assert found[4] < found[0]


@pytest.mark.proves("solvers.alternate")
@pytest.mark.parametrize(
    "text", ["int2/g32", "uint3/g32*fp16-fp16", "cb8@tensor/channel*int8", "cb4/channel", "cb16x2", "q4_k", "int3"]
)
def test_every_round_lowers_the_error(text: str) -> None:
    w, h, fmt = weights(8, 48), hessian(48), Format.parse(text)
    found = [cost(w, alternate(w, fmt, h, rounds=n), h) for n in range(4)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(found))
    assert found[3] < found[0]


@pytest.mark.proves("solvers.descent")
@pytest.mark.parametrize(
    "text", ["int2/channel", "int3/g4", "nf4/g8", "cb4@tensor/channel", "cb8x2@tensor/channel", "uint2/g4*fp16-fp16"]
)
def test_after_descent_no_single_code_can_be_improved(text: str) -> None:
    """Every other code at every place is tried."""
    fmt, w, h = Format.parse(text), weights(4, 12), hessian(12).double()
    q = descent(w, fmt, h, sweeps=50)
    codes, base = q.unpack(), lost(q.matrix_values() - w, damped(h)[0])
    low, high = (
        map(int, fmt.extremes) if text.startswith(("int", "uint")) else (0, min(1 << fmt.bits, getattr(fmt.grid, "k", 16)) - 1)
    )
    for place, code in itertools.product(range(codes.shape[1]), range(low, high + 1)):
        other = codes.clone()
        other[:, place] = code
        assert (lost(fmt.decode(other, q.params)[:, :12] - w, damped(h)[0]) >= base * (1 - 1e-6) - 1e-12).all()


@pytest.mark.proves("solvers.descent", "solvers.alternate")
def test_on_tiny_cases_descent_comes_near_the_best_of_all_codes() -> None:
    fmt, best, found, start = Format.parse("int2/channel"), 0.0, 0.0, 0.0
    for seed in range(8):
        w, h = weights(2, 5, seed), hessian(5, seed=seed).double() + 0.8 * torch.ones(5, 5)
        q = descent(w, fmt, h)
        options = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.int32)
        firm = damped(h)[0]
        for row in range(2):
            every = fmt.decode(options, q.params, rows=torch.full((len(options),), row))
            best += float(lost(every - w[row], firm).min())
        found += cost(w, q, h)
        start += cost(w, gptq(w, fmt, h), h)
    assert best <= found < start
    assert found < 1.03 * best


# -- least squares against numpy ---------------------------------------------------------------------------------------


def whitened(h: Tensor) -> np.ndarray:
    return np.linalg.cholesky(damped(h)[0].numpy()[0]).T


@pytest.mark.proves("solvers.alternate")
@pytest.mark.parametrize(
    "text", ["int4/g8*fp32", "int3/channel*fp32", "uint3/g8*fp32-fp32", "int3/tensor*fp32", "int4/b3x8*fp32", "uint4/g8*fp32~uint4"]
)
def test_scales_are_those_of_least_squares(text: str) -> None:
    """The whitened problem, one column per scale and per minimum, solved by numpy's lstsq."""
    fmt, w, h = Format.parse(text), weights(7, 22), hessian(22)
    params = fmt.store(fmt.fit(w))
    codes = fmt.encode(w, params)
    got = alternating._scales(w, fmt, params, codes, damped(h)[0])
    grid, names = params.scale.shape, ("scale", "offset") if fmt.min is not None else ("scale",)  # type: ignore[union-attr]
    columns = []
    root = whitened(h)
    zero = fmt.decode(codes, replace_parts(params, torch.zeros(grid), torch.zeros(grid) if fmt.min is not None else params.offset))
    for name, i, j in itertools.product(names, range(grid[0]), range(grid[1])):
        one = torch.zeros(grid)
        one[i, j] = 1
        if fmt.min is not None:
            parts = (one, torch.zeros(grid)) if name == "scale" else (torch.zeros(grid), one)
        else:
            parts = (one, params.offset)
        columns.append(((fmt.decode(codes, replace_parts(params, *parts)) - zero).double().numpy() @ root.T).ravel())
    wanted = np.linalg.lstsq(np.stack(columns, 1), (w.double().numpy() @ root.T).ravel(), rcond=None)[0]
    flat = torch.cat([getattr(got, name).flatten() for name in names]).double().numpy()
    if fmt.min is None or fmt.min.signed:
        np.testing.assert_allclose(flat, wanted, rtol=2e-3, atol=1e-4)


def replace_parts(params: object, scale: Tensor, offset: Tensor | None) -> object:
    return replace(params, scale=scale, offset=offset)  # type: ignore[type-var]


@pytest.mark.proves("solvers.alternate", "solvers.tables")
@pytest.mark.parametrize("text", ["cb5@tensor/g8*fp32", "cb4/channel", "cb4x2@tensor/channel*fp32", "cb8x3@tensor/g9*fp32"])
def test_tables_are_those_of_least_squares(text: str) -> None:
    fmt, w, h = Format.parse(text), weights(6, 22), hessian(22)
    params = fmt.store(fmt.fit(w))
    codes = fmt.encode(w, params)
    got = alternating._table(w, fmt, params, codes, damped(h)[0]).table
    root, shape, columns = whitened(h), params.table.shape, []  # type: ignore[union-attr]
    for place in range(params.table.numel()):  # type: ignore[union-attr]
        one = torch.zeros(params.table.numel())  # type: ignore[union-attr]
        one[place] = 1
        value = fmt.decode(codes, replace(params, table=one.view(shape)))[:, :22]
        columns.append((value.double().numpy() @ root.T).ravel())
    basis, target = np.stack(columns, 1), (w.double().numpy() @ root.T).ravel()
    used = np.abs(basis).sum(0) > 0
    wanted = np.linalg.lstsq(basis[:, used], target, rcond=None)[0]
    residual = ((basis[:, used] @ wanted - target) ** 2).sum()
    ours = ((basis @ got.double().numpy().ravel() - target) ** 2).sum()
    assert ours == pytest.approx(residual, rel=1e-4)
    np.testing.assert_array_equal(got.numpy().ravel()[~used], params.table.numpy().ravel()[~used])  # type: ignore[union-attr]


@pytest.mark.proves("solvers.alternate")
def test_a_learned_table_stays_sorted_and_a_given_one_stays() -> None:
    w, h = weights(8, 32), hessian(32)
    for text in ("cb8@tensor/channel*int8", "cb8/channel"):
        q = alternate(w, Format.parse(text), h)
        assert (q.params.table[..., 0].diff(dim=1) >= 0).all()  # type: ignore[index]
        assert torch.equal(q.format.encode(q.matrix_values(), q.params), q.unpack()) or text.endswith("int8")
    given = torch.tensor([-2.0, -0.5, 0.5, 2.0]).view(1, 4, 1)
    q = alternate(w, Format.parse("cb4/tensor"), h, table=given)
    assert set(q.dequantize().unique().tolist()) <= {-2.0, -0.5, 0.5, 2.0}


# -- HQQ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("solvers.hqq")
@pytest.mark.parametrize("text", CATALOGUE)
def test_hqq_is_no_worse_than_rounding_in_its_own_norm(text: str) -> None:
    w, fmt = weights(6, 37), Format.parse(text)
    found, near = hqq(w, fmt), rtn(w, fmt)
    norm = [float((q.dequantize() - w).double().abs().pow(0.7).sum()) for q in (found, near)]
    assert norm[0] <= norm[1] * (1 + 1e-9)
    assert found.nbytes == near.nbytes


@pytest.mark.proves("solvers.hqq")
def test_hqq_gives_up_an_outlier_for_the_many() -> None:
    """Numbers near a grid of step 0.1, one in 32 far out: the sum of |error|^0.7 falls though that of squares does not."""
    torch.manual_seed(0)
    w = torch.randint(-7, 8, (8, 32)) * 0.1 + 0.01 * torch.randn(8, 32)
    w[:, 5] = 1.6
    for text in ("int4/g32*fp32", "uint4/g32*fp16-fp16"):
        found, near = (q.dequantize() - w for q in (hqq(w, Format.parse(text)), rtn(w, Format.parse(text))))
        assert found.abs().pow(0.7).sum() < 0.97 * near.abs().pow(0.7).sum()
        assert found.square().sum() >= near.square().sum() * (1 - 1e-6)


# -- order, account, refusals ------------------------------------------------------------------------------------------


@pytest.mark.proves("solvers.gptq-order")
def test_group_aware_order_by_hand() -> None:
    """Groups {0, 1}, {2, 3}, {4}: the heaviest column, 3, pulls its group to the front; inside, the heavier goes first."""
    diagonal = torch.tensor([[5.0, 6.0, 1.0, 9.0, 7.0]])
    fmt = Format.parse("int4/g2")
    assert _turn(diagonal, fmt, "group").tolist() == [3, 2, 4, 1, 0]
    assert _turn(diagonal, fmt, "heavy").tolist() == [3, 4, 1, 0, 2]
    assert _turn(diagonal, fmt, "none").tolist() == [0, 1, 2, 3, 4]
    assert _turn(diagonal, Format.parse("cb4x2@tensor/channel"), "group").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.proves("solvers.gptq-order")
@pytest.mark.parametrize("text", ["int3/g16", "cb16x2", "nf4/g16"])
def test_every_order_beats_rounding(text: str) -> None:
    w, h, fmt = weights(16, 64), tilted(64, rising=True), Format.parse(text)
    near = cost(w, plain(w, fmt, damped(h)[0]), h)
    for order in ("heavy", "group", "none"):
        assert cost(w, gptq(w, fmt, h, order=order), h) < near  # type: ignore[arg-type]


@pytest.mark.proves("solvers.account")
@pytest.mark.parametrize("name", sorted(NEED_HESSIAN))
def test_the_account_of_a_solver(name: str) -> None:
    w, h, fmt = weights(8, 40), hessian(40), Format.parse("int3")
    h[:, 7] = h[:, :, 7] = 0
    found = solved(SOLVERS[name], w, fmt, h)
    firm = damped(h)[0][0]
    whole = float(((w.double() @ firm) * w).sum())
    assert found.after == pytest.approx(cost(w, found.tensor, h) / whole, rel=1e-6)
    assert found.after < found.before < 1
    assert found.dead == 1
    assert found.damping == 0.01
    assert found.seconds > 0
    assert "1 inputs always 0" in str(found)
    crooked = hessian(40) - 0.05 * torch.eye(40) * hessian(40).diagonal(dim1=1, dim2=2).mean() * 10
    assert solved(SOLVERS[name], w, fmt, crooked).damping > 0.01


@pytest.mark.proves("solvers.account")
def test_empty_weights_have_an_empty_account() -> None:
    for solve in (gptq, descent, alternate):
        found = solved(solve, torch.zeros(0, 3), Format.parse("int4"), torch.zeros(1, 3, 3))
        assert (found.before, found.after, found.tensor.shape) == (0.0, 0.0, (0, 3))


@pytest.mark.proves("inputs.hessian")
@pytest.mark.parametrize("solve", [descent, alternate])
def test_hessians_that_fit_nothing_are_refused(solve: object) -> None:
    with pytest.raises(FormatError, match="a weight of 4 rows and 8 columns cannot use a Hessian of shape"):
        solve(weights(4, 8), Format.parse("int4"), torch.zeros(1, 7, 7))  # type: ignore[operator]
    with pytest.raises(FormatError, match="not positive definite, however damped"):
        solve(weights(4, 8), Format.parse("int4"), hessian(8) * float("nan"))  # type: ignore[operator]


@pytest.mark.proves("solvers.descent", "seam.depthwise")
@pytest.mark.parametrize("solve", [descent, alternate])
@pytest.mark.parametrize("text", ["int3/g4", "cb4/tensor", "cb4x3@tensor/channel"])
def test_groups_of_a_convolution(solve: object, text: str) -> None:
    w, fmt = weights(12, 45), Format.parse(text)
    h = (hessian(45, 4) + 0.3) * torch.linspace(0.1, 3, 4)[:, None, None]
    q = solve(w.view(12, 5, 3, 3), fmt, h)  # type: ignore[operator]
    assert q.shape == (12, 5, 3, 3)
    assert cost(w, q, h) <= cost(w, gptq(w, fmt, h), h)
