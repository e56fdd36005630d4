"""Attention, layer norm and RMS norm in integers against double precision, with the bounds that their definitions promise."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from roundel.integer.dialect import INTEGER as DIALECTS
from roundel.integer.dialect import quantize_multiplier
from roundel.integer.fixed import exp_steps, reciprocal_root, step_table
from roundel.integer.ops import INTEGER

Ints = NDArray[np.int64]
WIDE: dict[str, Any] = {"y_zero": 0, "low": -(2**40), "high": 2**40}


def test_exponentials_by_steps() -> None:
    """All 2^21 arguments: within 2^-21 of exp, never rising by more than a unit of 2^-31, 0 at the end."""
    units = np.arange(2**21)
    got = exp_steps(units, step_table())
    assert np.abs(got / 2**31 - np.exp(-units / 2**16)).max() < 2**-21
    assert np.diff(got).max() <= 1
    assert got[-1] == 0


def test_reciprocal_square_root() -> None:
    """Every small number, all sizes of large ones and both sides of each power of two: within 2^-27, relative; 31 bits."""
    powers = 2 ** np.arange(62)
    v = np.unique(
        np.concatenate([np.arange(1, 9000), np.geomspace(1, 2.0**61.99, 30_000).astype(np.int64), powers, powers[1:] - 1])
    )
    q, s = reciprocal_root(v)
    assert ((q >= 2**30) & (q < 2**31)).all()
    assert np.abs(q * np.exp2(s - 31.0) * np.sqrt(v.astype(float)) - 1).max() < 2**-27


def real_norm(x: Ints, weight: Ints, bias: Ints, centred: bool, eps: int, bits: int) -> NDArray[np.float64]:
    """The definition's sums without rounding."""
    n = x.shape[-1]
    c = n * x - (x.sum(-1, keepdims=True) if centred else 0)
    v = (c.astype(object) ** 2).sum(-1, keepdims=True) // n + eps
    return (c / np.sqrt(np.maximum(v.astype(float), 1)) * 2.0**bits * weight + bias).astype(float)


@pytest.mark.proves("integer.norms")
@given(
    st.integers(0, 10**9), st.integers(1, 400), st.booleans(), st.integers(0, 10**6), st.integers(8, 14), st.sampled_from(DIALECTS)
)
def test_norms(seed: int, n: int, centred: bool, eps: int, bits: int, rounding: str) -> None:
    """Rows of every kind, constant and nearly constant ones too: the normalised number is within a unit of 2^-bits (half, where the
    dialect rounds once), so the result is within a weight's worth of the sums, rescaled, and its own rounding."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (20, n))
    x[:5], x[5:10, 1:], x[10:15] = rng.integers(-128, 128, (5, 1)), 7, rng.integers(-3, 3, (5, n))
    zero = int(rng.integers(-128, 128))
    weight, bias = rng.integers(-2047, 2048, n), rng.integers(-(2**20), 2**20, n)
    factor = float(rng.uniform(1e-5, 1e-2))
    q, s = (int(part) for part in quantize_multiplier(factor))
    got = INTEGER["norm"](x, weight, bias, centred=centred, eps=eps, bits=bits, x_zero=zero, multiplier=q, shift=s,
                          acc=[-(2**31), 2**31 - 1] * 2, rounding=rounding, **WIDE)  # fmt: skip
    want = real_norm(x - zero, weight, bias, centred, eps, bits) * factor
    unit = 0.5 if rounding in ("R2", "R2a") else 1.0
    assert (np.abs(got - want) <= 1.01 * unit * (1 + factor * np.abs(weight)) + 0.01).all()


def test_a_constant_row_is_its_bias() -> None:
    x, bias = np.full((1, 9), 5), np.arange(9) * 100
    for eps in (0, 3):
        got = INTEGER["norm"](x, np.full(9, 99), bias, centred=True, eps=eps, bits=10, x_zero=0, multiplier=1 << 30, shift=1,
                              acc=[-(2**31), 2**31 - 1] * 2, rounding="R2", **WIDE)  # fmt: skip
        assert np.array_equal(got, bias[None])


@pytest.mark.proves("integer.attention")
@given(st.integers(0, 10**9), st.integers(1, 90), st.sampled_from([1e-6, 1e-4, 1e-3, 0.02, 1.0]), st.booleans(), st.booleans(),
       st.sampled_from(DIALECTS))  # fmt: skip
def test_attention(seed: int, keys: int, scale: float, causal: bool, masked: bool, rounding: str) -> None:
    """Scores from all equal to one that takes all. A probability is within 2^-15 + 2^-13 of itself, so a result is within that of
    the sum of |v|, and its own rounding."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.integers(-128, 128, (2, 7, 12)), rng.integers(-128, 128, (2, keys, 12)), rng.integers(-128, 128, (2, keys, 5))
    keep = rng.integers(0, 2, (7, keys)) if masked else None
    if keep is not None:
        keep[:, 0] = 1
    units, out = scale * 2**16, float(rng.uniform(0.2, 2.0))
    reach = min(int((2**21 - 2) / units), 2**31 - 1)
    multiplier, shift = quantize_multiplier([units, out * 2**-15])
    operands = [q, k, v, step_table()] + ([keep] if keep is not None else [])
    got = INTEGER["attention"](
        *operands, causal=causal, q_zero=3, k_zero=-5, v_zero=17, reach=reach, multiplier=multiplier.tolist(), shift=shift.tolist(),
        bits=15, acc=[-(2**31), 2**31 - 1] * 3, rounding=rounding, **WIDE)  # fmt: skip
    scores = (q - 3) @ (k + 5).swapaxes(-1, -2) * scale
    seen = np.ones((7, keys), bool) if keep is None else keep > 0
    seen = np.tril(seen) if causal else seen
    weight = np.where(seen, np.exp(np.where(seen, scores, -np.inf) - np.where(seen, scores, -np.inf).max(-1, keepdims=True)), 0)
    share = weight / weight.sum(-1, keepdims=True)
    want = share @ (v - 17) * out
    slack = (np.where(seen, 2.0**-15, 0) + share * 2.0**-13) @ np.abs(v - 17) * out
    assert (np.abs(got - want) <= (0.5 if rounding in ("R2", "R2a") else 1.0) + slack).all()


def test_attention_to_one_key() -> None:
    """Far ahead of the others it takes all there is; a hidden one takes nothing, however large."""
    q, k, v = np.full((1, 1, 4), 100), np.array([[[1] * 4, [127] * 4, [2] * 4]]), np.array([[[10], [100], [-50]]])
    multiplier, shift = (part.tolist() for part in quantize_multiplier([2.0**16, 2.0**-15]))
    attrs = {"causal": False, "q_zero": 0, "k_zero": 0, "v_zero": 0, "reach": 31, "bits": 15, "acc": [-(2**31), 2**31 - 1] * 3,
             "multiplier": multiplier, "shift": shift, "rounding": "R2"}  # fmt: skip
    for keep, want in (([1, 1, 1], 100), ([1, 0, 1], -50), ([1, 0, 0], 10)):
        got = INTEGER["attention"](q, k, v, step_table(), np.array([keep]), **attrs, **WIDE)
        assert got.item() == want
