"""Weights and activations under training: gradients against the papers' formulas and finite differences, and the stored form equal
to what was trained on, on every format of the catalogue; no loops, no networks."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_seam import CATALOGUE, weights
from torch import Tensor

from roundel import Format, FormatError, InputError
from roundel.formats.codec import spread
from roundel.formats.grid import Levels, Real, Uniform
from roundel.network.layer import Activation, PackedWeight
from roundel.solvers import gptq, rtn
from roundel.tune.tunable import TunableActivation, TunableWeight, grid_units

SCALARS = [t for t in CATALOGUE if Format.parse(t).step == 1]
LEARNED = ["int4/channel", "int3/tensor", "uint4/g32", "uint4/g32*fp16~uint4", "uint4/g32*fp16-fp16", "int4/b8x16", "fp4",
           "fp4/g16*fp16", "nf4/g32", "log4", "ternary", "nvfp4", "cb16/channel", "cb16/tensor", "cb16/g32*int8", "cb16x2",
           "int8/g32*e8m0"]  # fmt: skip


def same(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> bool:
    scales = a[1] is b[1] is None or (a[1] is not None and b[1] is not None and torch.equal(a[1], b[1]))
    return torch.equal(a[0], b[0]) and scales


def stir(module: torch.nn.Module, size: float = 0.02) -> None:
    """Move every parameter a little, as training would."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=draw))


# -- stored form ------------------------------------------------------------------------------------------------------


@pytest.mark.proves("qat.stored")
@pytest.mark.parametrize("text", CATALOGUE)
@pytest.mark.parametrize("rounding", ["straight", "sigmoid", "sign"])
def test_what_is_stored_is_what_it_computes_with(text: str, rounding: str) -> None:
    """Before and after its parameters moved; straight and sign in training mode too."""
    fmt = Format.parse(text)
    if rounding != "straight" and (isinstance(fmt.grid, Real) or fmt.step > 1):
        with pytest.raises(FormatError, match="no two neighbours"):
            TunableWeight(rtn(weights(8, 64), fmt), weights(8, 64), rounding)  # type: ignore[arg-type]
        return
    w = weights(16, 72)
    start = rtn(w, fmt)
    live = TunableWeight(start, w, rounding)  # type: ignore[arg-type]
    if rounding != "sigmoid":
        assert torch.equal(live.values(), start.dequantize())
        assert torch.equal(live.eval().hard().codes, start.codes)
    for size in (0.0, 0.03, 0.2):
        stir(live, size)
        hard = PackedWeight(live.hard())
        for mode in (False,) if rounding == "sigmoid" else (True, False):
            live.train(mode)
            assert torch.equal(live.values(), hard.values())
            assert same(live.levels(), hard.levels())
            with torch.no_grad():
                assert torch.equal(live.values(), hard.values())
                assert same(live.levels(), hard.levels())
            index = torch.tensor([[3, 3], [0, 15]])
            assert torch.equal(live.rows(index), hard.rows(index))
    assert live.hard().nbytes == start.nbytes
    assert live.hard().format == fmt
    changed = not torch.equal(live.hard().dequantize(), start.dequantize())
    assert changed or (isinstance(fmt.grid, Uniform) and fmt.bits == 1 and rounding != "straight")


@pytest.mark.parametrize(("shape", "axis"), [((6, 4, 3, 3), 0), ((4, 6, 2, 2), 1), ((5, 8), 0)])
@pytest.mark.parametrize("text", ["int4", "cb16/channel", "uint4/g32*fp16~uint4", "cb16x2"])
def test_any_shape_and_output_axis(shape: tuple[int, ...], axis: int, text: str) -> None:
    w = torch.randn(shape)
    live = TunableWeight(rtn(w, Format.parse(text), axis=axis), w)
    stir(live)
    hard = PackedWeight(live.hard())
    assert torch.equal(live.values(), hard.values())
    assert same(live.levels(), hard.levels())
    live.values().square().sum().backward()
    assert live.weight.grad is not None
    assert live.weight.grad.shape == shape


def test_codes_of_a_solver_are_where_it_starts() -> None:
    """GPTQ's codes are not the nearest: the start keeps them, and the real weight wherever both agree."""
    w = weights(16, 64)
    x = torch.randn(256, 64) @ (torch.eye(64) + 0.3 * torch.randn(64, 64))
    q = gptq(w, Format.parse("int3"), (x.T @ x)[None])
    live = TunableWeight(q, w)
    assert not torch.equal(q.codes, rtn(w, q.format).codes)
    assert torch.equal(live.hard().codes, q.codes)
    agree = q.format.encode(w, q.params) == q.unpack()
    assert 0.5 < agree.float().mean() < 1
    assert torch.equal(live.weight.detach()[agree], w[agree])


# -- gradients by the formulas ----------------------------------------------------------------------------------------


def by_hand(w: np.ndarray, scale: float, zero: float, low: int, high: int, up: np.ndarray) -> tuple[np.ndarray, float, float]:
    """LSQ and LSQ+ in a plain loop: gradients of the weight, the scale and the zero point under upstream gradients ``up``."""
    grad, step, shift = np.zeros_like(w), 0.0, 0.0
    for i, (x, g) in enumerate(zip(w, up, strict=True)):
        u = x / scale + zero
        if low <= u <= high:
            grad[i] = g
            step += g * (round(u) - zero - x / scale)  # Python rounds ties to even, as torch does
        else:
            bound = low if u < low else high
            step += g * (bound - zero)
            shift -= g * scale
    return grad, step, shift


@pytest.mark.proves("qat.lsq")
@pytest.mark.parametrize("text", ["int4/channel*fp32", "int3/tensor*fp32", "uint4/g16*fp32~uint4", "int2/g16*fp32"])
def test_uniform_gradients_are_those_of_the_papers(text: str) -> None:
    w, up, fmt = weights(4, 32), torch.randn(4, 32), Format.parse(text)
    live = TunableWeight(rtn(w * 0.8, fmt), w)
    with torch.no_grad():
        live.weight.copy_(w)
    (live.values() * up).sum().backward()
    params, (low, high) = live.tensor.params, fmt.extremes
    rows, cols = fmt.share.block((4, 32))
    count = rows * cols
    gain = 1 / np.sqrt(count * max(abs(low), abs(high)))
    assert params.scale is not None
    assert live.steps.log_scale is not None
    assert live.weight.grad is not None
    for i, j in itertools.product(range(4 // rows), range(32 // cols)):
        block = slice(i * rows, i * rows + rows), slice(j * cols, j * cols + cols)
        scale = float(params.scale[i, j])
        zero = float(params.offset[i, j]) if params.offset is not None else 0.0
        inside, above = (t[block].double().flatten().numpy() for t in (w, up))
        grad, step, shift = by_hand(inside, scale, zero, int(low), int(high), above)
        np.testing.assert_allclose(live.weight.grad[block].flatten(), grad, rtol=1e-5, atol=1e-6)
        assert live.steps.log_scale.grad is not None
        np.testing.assert_allclose(live.steps.log_scale.grad[i, j], step * scale * gain, rtol=1e-4, atol=1e-5)
        if live.steps.offset is not None and live.steps.offset.grad is not None:
            np.testing.assert_allclose(live.steps.offset.grad[i, j], shift * (high - low) * gain, rtol=1e-4, atol=1e-5)


def test_minimum_moves_by_what_is_beyond_the_range() -> None:
    """value = level * scale - min; u = (w + min) / scale: d/dmin = -1 + inside."""
    w, fmt = weights(4, 32), Format.parse("uint3/g32*fp32-fp32")
    live = TunableWeight(rtn(w * 0.5, fmt), w)
    with torch.no_grad():
        live.weight.copy_(w)
    live.values().sum().backward()
    u = grid_units(fmt, w, live.tensor.params)
    outside = ((u < 0) | (u > 7)).sum(1, keepdim=True)
    assert outside.sum() > 4
    assert live.steps.offset is not None
    assert live.steps.offset.grad is not None
    unit = 7 * live.tensor.params.scale.abs() / np.sqrt(32 * 7)  # type: ignore[union-attr]
    torch.testing.assert_close(live.steps.offset.grad, -outside * unit)


@pytest.mark.proves("qat.tables")
@pytest.mark.parametrize("text", ["cb16/channel", "cb8/tensor", "cb16/g32*int8", "cb16x2@tensor/channel*fp16", "cb5@tensor/g32"])
def test_a_table_gets_the_sum_over_each_cluster(text: str) -> None:
    w, up, fmt = weights(8, 64), torch.randn(8, 64), Format.parse(text)
    live = TunableWeight(rtn(w, fmt), w)
    (live.values() * up).sum().backward()
    codes, params, dim = live.tensor.unpack(), live.tensor.params, fmt.step
    table = params.table
    assert table is not None
    assert live.steps.table is not None
    assert live.steps.table.grad is not None
    scale = spread(fmt, params.scale, w).expand(8, 64) if params.scale is not None else torch.ones(8, 64)
    want = torch.zeros_like(table)
    for r, c in itertools.product(range(8), range(64)):
        want[r if len(table) > 1 else 0, codes[r, c // dim], c % dim] += up[r, c] * scale[r, c]
    torch.testing.assert_close(live.steps.table.grad, want * table.abs().amax(1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(live.weight.grad, up)  # nothing is beyond a learned table


def test_a_fitted_logarithmic_table_keeps_its_law() -> None:
    w = weights(8, 64)
    live = TunableWeight(rtn(w, Format.parse("log4:fit")), w)
    (live.values() * torch.randn(8, 64)).sum().backward()
    assert live.steps.law is not None
    assert live.steps.law.grad is not None
    assert (live.steps.law.grad != 0).all()
    with torch.no_grad():
        live.steps.law.copy_(torch.tensor([[[0.1], [0.05]]]))
    before, after = live.tensor.params.table[0, :, 0], live.hard().params.table[0, :, 0]  # type: ignore[index]
    ratio = (after[-1] / after[8:-1].flip(0)).log() / torch.arange(1, 7)
    old = (before[-1] / before[8:-1].flip(0)).log() / torch.arange(1, 7)
    torch.testing.assert_close(ratio, old + 0.05, rtol=0, atol=2e-3)
    assert after[7] == 0
    assert torch.equal(after[:7], -after[8:].flip(0))
    torch.testing.assert_close(after[-1] / before[-1], torch.tensor(0.1).exp(), rtol=1e-3, atol=0)


# -- gradients by finite differences ----------------------------------------------------------------------------------


def surrogate(live: TunableWeight, theta: dict[str, Tensor], codes: Tensor, residual: Tensor, inside: Tensor) -> Tensor:
    """What the straight-through rule differentiates, made smooth: inside, rounding is the adding of a fixed residual; outside, the
    code is fixed. Float64, from the definition of each format and not through the codec."""
    fmt, start = live.tensor.format, live.tensor.params
    w = theta["weight"]
    scale, offset = start.scale, start.offset
    like = torch.empty(w.shape)
    one = torch.ones((), dtype=torch.float64)
    s = spread(fmt, scale, like).double() * spread(fmt, theta["log_scale"].exp(), like) if scale is not None else one
    o = 0 * one
    if offset is not None:
        low, high = fmt.extremes
        unit = (high - low) * (spread(fmt, scale.abs(), like) if fmt.min is not None and scale is not None else one)
        o = spread(fmt, offset, like).double() + unit * spread(fmt, theta["offset"], like)
    u = (w + o) / s if fmt.min is not None else w / s + (o if fmt.zero is not None else 0)
    level = torch.where(inside, u + residual, residual)
    if "table" in theta and start.table is not None:
        table = start.table.double() + theta["table"] * start.table.double().abs().amax(1, keepdim=True)
        row = torch.arange(w.shape[0])[:, None] if len(table) > 1 else torch.zeros(1, 1, dtype=torch.int64)
        found = table[row, codes.long()].flatten(1)[:, : w.shape[1]]
        level = found + u - u.detach()
    value = (level - o) * s if fmt.zero is not None else level * s
    return value - o if fmt.min is not None else value


@pytest.mark.proves("qat.lsq", "qat.tables")
@pytest.mark.parametrize("text", LEARNED)
def test_gradients_against_finite_differences_of_a_smooth_surrogate(text: str) -> None:
    """Codes, residuals and who is inside are frozen; along any direction of all parameters the slope is the gradient's."""
    w, fmt = weights(8, 64), Format.parse(text)
    live = TunableWeight(rtn(w * 0.8, fmt), w)
    with torch.no_grad():
        live.weight.copy_(w)
    params = live.tensor.params
    target = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    out = live.values()
    (out * target + 0.5 * out.square()).sum().backward()
    codes = fmt.encode(w, params)
    u = grid_units(fmt, w, params).double()
    fixed = isinstance(fmt.grid, Uniform | Levels)
    low, high = fmt.extremes
    inside = (u >= low) & (u <= high) if fixed else torch.ones_like(u, dtype=torch.bool)
    plain = replace(params, scale=None if params.scale is None else torch.ones_like(params.scale))
    level = fmt.decode(codes, plain)[:, :64].double()
    if fmt.zero is not None or fmt.min is not None:
        level = level + spread(fmt, params.offset, w)
    residual = torch.where(inside, level - u, level)
    theta = {"weight": w.double()} | {n: p.detach().double() for n, p in live.steps.named_parameters()}
    top = live.steps.top
    grads = {"weight": live.weight.grad} | {n: p.grad for n, p in live.steps.named_parameters()}
    damp = np.sqrt(max(1.0, live.count * top))
    if fixed:
        assert 0 < (~inside).sum() < inside.sum()

    def loss(eps: float, way: dict[str, Tensor]) -> float:
        moved = {n: t + eps * way[n] for n, t in theta.items()}
        if fixed:
            value = surrogate(live, moved, codes, residual, inside)
        else:  # around a table a number moves its level one for one: written with the two ends of the step
            value = surrogate(live, moved, codes, residual, inside)
            s = spread(fmt, params.scale, w).double() if params.scale is not None else torch.ones((), dtype=torch.float64)
            if params.scale is not None:
                s_now = s * spread(fmt, moved["log_scale"].exp(), w)
                value = value + s_now * (moved["weight"] / s_now - w.double() / s)
            else:
                value = value + moved["weight"] - w.double()
        return float((value * target + 0.5 * value.square()).sum())

    for name in theta:  # one kind at a time, so that none hides behind another
        for seed in range(3):
            draw = torch.Generator().manual_seed(seed)
            way = {n: torch.randn(t.shape, generator=draw, dtype=torch.float64) * (n == name) for n, t in theta.items()}
            slope = (loss(1e-5, way) - loss(-1e-5, way)) / 2e-5
            gain = damp if name in ("log_scale", "offset") else 1.0
            assert grads[name] is not None
            got = float((grads[name].double() * way[name]).sum()) * gain  # type: ignore[union-attr]
            assert got == pytest.approx(slope, rel=2e-3, abs=2e-3 * float(grads[name].abs().sum()) * gain / 50 + 1e-4), name  # type: ignore[union-attr]


# -- the two other roundings ------------------------------------------------------------------------------------------


@pytest.mark.proves("qat.adaround")
@pytest.mark.parametrize("text", [t for t in SCALARS if "bf16" not in t])
def test_sigmoid_rounding_starts_at_the_real_weight_between_its_two_neighbours(text: str) -> None:
    fmt, w = Format.parse(text), weights(8, 64)
    live = TunableWeight(rtn(w, fmt), w, "sigmoid")
    low, high = (fmt.decode(c, live.tensor.params) for c in (live.low, live.high))  # type: ignore[arg-type]
    lo, hi = torch.minimum(low, high), torch.maximum(low, high)
    want = torch.minimum(torch.maximum(w, lo), hi)
    torch.testing.assert_close(live.values().detach(), want, rtol=1e-4, atol=1e-5 * float(w.abs().max()))
    nearest = live.tensor.dequantize()
    assert ((nearest == low) | (nearest == high)).all()  # the nearest level is one of the two
    with torch.no_grad():
        live.v.fill_(9.0)  # type: ignore[union-attr]
        torch.testing.assert_close(live.values(), high)
        assert float(live.regulariser(2.0)) == 0
        live.v.fill_(-9.0)  # type: ignore[union-attr]
        assert torch.equal(live.values(), low)
        live.v.fill_(0.0)  # type: ignore[union-attr]
        assert float(live.regulariser(3.0)) == pytest.approx(w.numel() * (1 - 0.0**3))


def test_sigmoid_gradient_is_the_gap_times_the_slope() -> None:
    w, up, fmt = weights(4, 32), torch.randn(4, 32), Format.parse("nf4/g32")
    live = TunableWeight(rtn(w, fmt), w, "sigmoid")
    (live.values() * up).sum().backward()
    v = live.v.detach().double()  # type: ignore[union-attr]
    low, high = (fmt.decode(c, live.tensor.params).double() for c in (live.low, live.high))  # type: ignore[arg-type]
    sigmoid = 1 / (1 + (-v).exp())
    h = 1.2 * sigmoid - 0.1
    slope = torch.where((h >= 0) & (h <= 1), 1.2 * sigmoid * (1 - sigmoid), torch.zeros_like(h))
    sure = (h > 1e-5) & (h < 1 - 1e-5)  # at a wall either side's slope is right
    torch.testing.assert_close(live.v.grad.double()[sure], (up * (high - low) * slope)[sure], rtol=1e-3, atol=1e-5)  # type: ignore[union-attr]
    assert live.weight.grad is None
    assert live.kinds()["weights"] == []


@pytest.mark.proves("qat.autoround")
@pytest.mark.parametrize("text", ["int4", "uint4/g32~uint4", "nf4/g32", "cb16/channel", "ternary", "fp4/g16"])
def test_sign_rounding_moves_a_number_by_half_a_step_at_most(text: str) -> None:
    fmt, w = Format.parse(text), weights(8, 64)
    live = TunableWeight(rtn(w, fmt), w, "sign")
    params = live.tensor.params
    near, low, high = live.hard().unpack(), live.low, live.high
    with torch.no_grad():
        for push, wall in ((0.5, high), (-0.5, low), (7.0, high), (-7.0, low)):
            live.v.fill_(push)  # type: ignore[union-attr]
            codes = live.hard().unpack()
            got = fmt.decode(codes, params)
            at_near, at_wall = got == fmt.decode(near, params), got == fmt.decode(wall, params)  # type: ignore[arg-type]
            assert (at_near | at_wall).all() or not isinstance(fmt.grid, Uniform)  # half a wide gap can pass a narrow one
            assert at_wall.float().mean() > 0.75
        live.v.zero_()  # type: ignore[union-attr]
    live.values().sum().backward()
    assert live.v.grad is not None  # type: ignore[union-attr]
    inside = live.v.grad != 0  # type: ignore[union-attr]
    gap = fmt.decode(high, params) - fmt.decode(low, params)  # type: ignore[arg-type]
    torch.testing.assert_close(live.v.grad[inside], gap[inside])  # type: ignore[union-attr]
    assert inside.float().mean() > 0.4


# -- activations ------------------------------------------------------------------------------------------------------


def site(text: str, low: float = -1.0, high: float = 3.0) -> Activation:
    fmt = Format.parse(text, "activation")
    return Activation(fmt, "static", fmt.store(fmt.from_range(torch.full((1, 1), low), torch.full((1, 1), high))))


ACTIVATIONS = ["int8", "int8s", "uint8", "int4", "int2", "int16", "fp8", "nf4", "log4", "uint6*fp16", "uint4*fp32-fp32", "fp16"]


@pytest.mark.proves("qat.stored")
@pytest.mark.parametrize("text", ACTIVATIONS)
@pytest.mark.parametrize("learn", ["step", "clip", "ema", "none"])
@pytest.mark.parametrize("settled", [False, True])
def test_a_site_computes_with_what_it_stores(text: str, learn: str, settled: bool) -> None:
    base, x = site(text), torch.randn(4, 3, 5) * 2
    live = TunableActivation(base, learn, settled=settled)  # type: ignore[arg-type]
    for step in range(3):
        for mode in (True, False):
            live.train(mode and step > 0)
            value = live.quantize(x)  # in training mode ema moves here
            hard = live.hard()
            assert torch.equal(value, hard.quantize(x))
            grid = value.detach().clone()
            code, scale = live.codes(grid if settled else x)
            if not (learn == "ema" and live.training):
                assert same((code.detach(), scale), hard.codes(grid if settled else x))
        if step == 0:
            assert torch.equal(live.quantize(x), base.quantize(x))
        stir(live, 0.05)
    assert live.format == base.format
    assert live.when == "static"


@pytest.mark.proves("qat.lsq", "qat.pact")
@pytest.mark.parametrize("text", ["int4", "int4s", "uint8", "fp4", "int8s"])
@pytest.mark.parametrize("settled", [False, True])
def test_activation_gradients_are_those_of_the_papers(text: str, settled: bool) -> None:
    """Through quantize and codes both, as a graph calls them, or codes alone; LSQ(+) and PACT beside a loop over numbers."""
    x, up = torch.randn(6, 20) * 2, torch.randn(6, 20)
    for learn in ("step", "clip"):
        base = site(text)
        live, real = TunableActivation(base, learn, settled=settled), x.clone().requires_grad_()  # type: ignore[arg-type]
        code, scale = live.codes(live.quantize(real) if settled else real)
        assert scale is not None
        (code * scale * up).sum().backward()
        s = float(base.params.scale)  # type: ignore[union-attr, arg-type]
        z = float(base.params.offset) if base.params.offset is not None else 0.0  # type: ignore[union-attr]
        low, high = base.format.extremes
        level = base.quantize(x) / s
        step = shift = 0.0
        grad = torch.zeros_like(x)
        for i in itertools.product(range(6), range(20)):
            u = float(x[i]) / s + z
            if low <= u <= high:
                grad[i] = up[i]
                step += float(up[i]) * ((float(level[i]) - float(x[i]) / s) if learn == "step" else 0.0)
            else:
                step += float(up[i]) * ((low if u < low else high) - z)
                shift -= float(up[i]) * s
        gain = 1 / np.sqrt(20 * max(abs(low), abs(high)))
        torch.testing.assert_close(real.grad, grad)
        assert live.steps is not None
        assert float(live.steps.log_scale.grad) == pytest.approx(step * s * gain, rel=1e-3, abs=1e-4)  # type: ignore[union-attr, arg-type]
        if live.steps.offset is not None:
            assert float(live.steps.offset.grad) == pytest.approx(shift * (high - low) * gain, rel=1e-3, abs=1e-4)  # type: ignore[arg-type]


def test_an_offset_that_clips_nothing_gets_no_gradient_at_all() -> None:
    """Exactly 0, no residue of two sums: Adam would walk along it."""
    live, x = TunableActivation(site("int8", -8, 8)), torch.randn(50, 50)
    (live.quantize(x) * torch.randn(50, 50)).sum().backward()
    assert float(live.steps.offset.grad) == 0  # type: ignore[union-attr, arg-type]
    w = weights(16, 64)
    held = TunableWeight(rtn(w, Format.parse("uint8/g32*fp32-fp32")), w.clamp(-0.5, 0.5))
    (held.values() * torch.randn(16, 64)).sum().backward()
    inside = ((u := grid_units(held.tensor.format, held.weight.detach(), held.tensor.params)) >= 0) & (u <= 255)
    clean = inside.reshape(16, 2, 32).all(2)
    assert clean.any()
    assert (held.steps.offset.grad[clean] == 0).all()  # type: ignore[union-attr, index]


@pytest.mark.proves("qat.ema")
def test_a_moving_range_follows_the_extremes_until_it_is_frozen() -> None:
    live = TunableActivation(site("int8", -1.0, 1.0), "ema", momentum=0.1)
    low, high = float(live.low), float(live.high)
    assert (low, high) == (pytest.approx(-1, abs=0.01), pytest.approx(1, abs=0.01))
    for i in range(20):
        x = torch.randn(64) * (1 + i)
        live.train().quantize(x)
        low, high = low + 0.1 * (float(x.min()) - low), high + 0.1 * (float(x.max()) - high)
        live.eval().quantize(100 * x)  # evaluation moves nothing
        assert float(live.low) == pytest.approx(low, rel=1e-4)
        assert float(live.high) == pytest.approx(high, rel=1e-4)
    span = float(live.hard().params.scale) * 255  # type: ignore[union-attr, arg-type]
    assert span == pytest.approx(high - low, rel=1e-3)
    live.freeze()
    live.train().quantize(torch.full((4,), 1e4))
    assert float(live.high) == pytest.approx(high, rel=1e-4)
    twin = TunableActivation(site("int8", -1.0, 1.0), "ema", momentum=0.1)
    twin.load_state_dict(live.state_dict())
    twin.train().quantize(torch.full((4,), 1e4))  # a checkpoint remembers that it is frozen
    assert float(twin.high) == float(live.high)


@pytest.mark.proves("qat.qdrop")
@pytest.mark.parametrize("settled", [False, True])
def test_a_share_of_numbers_passes_unquantized_in_training_alone(settled: bool) -> None:
    live, x = TunableActivation(site("int3"), "step", drop=0.3, settled=settled), torch.rand(100, 100) * 2
    code, scale = live.codes(live.quantize(x) if settled else x)
    value = code * scale  # type: ignore[operator]
    real = torch.isclose(value, x, rtol=1e-5, atol=1e-6)
    hard = live.hard().quantize(x)
    assert 0.28 < real.float().mean() < 0.34
    torch.testing.assert_close(value[~real], hard[~real])
    assert torch.equal(live.eval().quantize(x), hard)


def test_dynamic_sites_have_nothing_to_learn_but_drop() -> None:
    base, x = Activation(Format.parse("int4/token", "activation"), "dynamic"), torch.randn(8, 16)
    live = TunableActivation(base, "step", drop=0.5)
    assert not any(live.kinds().values())
    assert live.hard() is base
    assert torch.equal(live.eval().quantize(x), base.quantize(x))
    assert 0.3 < torch.isclose(live.train().quantize(x), x).float().mean() < 0.8


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_numbers_that_are_no_longer_finite_are_named() -> None:
    w = weights(4, 32)
    live = TunableWeight(rtn(w, Format.parse("int4")), w)
    with torch.no_grad():
        live.weight[1, 2] = torch.nan
    with pytest.raises(InputError, match=r"shape \[4, 32\].*no longer finite"):
        live.hard()
    live = TunableWeight(rtn(w, Format.parse("int4")), w)
    with torch.no_grad():
        live.steps.log_scale.fill_(torch.inf)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no longer finite"):
        live.values()
    with pytest.raises(InputError, match=r"\[3, 3\].*\[4, 32\]"):
        TunableWeight(rtn(w, Format.parse("int4")), torch.zeros(3, 3))
    with torch.no_grad():
        live.steps.log_scale.fill_(20.0)  # type: ignore[union-attr]
    with pytest.raises(FormatError, match="outside fp16"):
        live.hard()


def test_a_pruned_row_stays_and_harms_no_gradient() -> None:
    w = weights(4, 32)
    w[2] = 0
    live = TunableWeight(rtn(w, Format.parse("int4")), w)
    assert float(live.tensor.params.scale[2]) == 0  # type: ignore[index]
    live.values().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in live.parameters() if p.grad is not None)
    stir(live)
    assert torch.equal(live.values()[2], torch.zeros(32))
