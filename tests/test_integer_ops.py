"""The integer operations against naive loops and torch, the fast sums against the definition, packed constants against bytes."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from roundel import CheckError, InputError
from roundel.graph import OPS, Spec
from roundel.graph.graph import INTEGER_OPS
from roundel.integer.lower.rules import _neighbours
from roundel.integer.ops import INTEGER, conv_sums, extremes, levels, linear_sums, numbers, padded, product_sums
from roundel.integer.simulate import FAST, _conv_sums, _linear_sums, _product_sums

Ints = NDArray[np.int64]

#: A rescale that changes nothing, and keeps every number.
SAME: dict[str, Any] = {"multiplier": 1 << 30, "shift": 1, "y_zero": 0, "low": -(2**40), "high": 2**40, "rounding": "R2",
                        "acc": (-(2**40), 2**40)}  # fmt: skip


def draw(*shape: int, low: int = -128, high: int = 127, seed: int = 0) -> Ints:
    return np.random.default_rng(seed).integers(low, high, shape, endpoint=True)


def naive_conv(x: Ints, w: Ints, stride: Any, padding: Any, dilation: Any, groups: int) -> Ints:
    """Every product by itself; ``padding`` from the last axis backwards."""
    n, _, h, wide = x.shape
    o, per, kh, kw = w.shape
    left, right, top, bottom = padding
    oh = (h + top + bottom - (kh - 1) * dilation[0] - 1) // stride[0] + 1
    ow = (wide + left + right - (kw - 1) * dilation[1] - 1) // stride[1] + 1
    out = np.zeros((n, o, oh, ow), np.int64)
    for at in itertools.product(range(n), range(o), range(oh), range(ow)):
        for i, y, z in itertools.product(range(per), range(kh), range(kw)):
            row, col = at[2] * stride[0] - top + y * dilation[0], at[3] * stride[1] - left + z * dilation[1]
            if 0 <= row < h and 0 <= col < wide:
                channel = at[1] // (o // groups) * per + i
                out[at] += x[at[0], channel, row, col] * w[at[1], i, y, z]
    return out


SHAPES = [
    ((2, 3, 6, 5), (4, 3, 3, 2), [1, 1], [0, 0, 0, 0], [1, 1], 1),
    ((1, 4, 7, 7), (4, 1, 3, 3), [2, 2], [1, 1, 1, 1], [1, 1], 4),
    ((2, 4, 8, 6), (6, 2, 2, 3), [1, 2], [1, 2, 0, 3], [2, 1], 2),
    ((1, 2, 5, 5), (4, 1, 1, 1), [3, 1], [0, 0, 0, 0], [1, 1], 2),
]


@pytest.mark.proves("integer.ops")
@pytest.mark.parametrize(("x", "w", "stride", "padding", "dilation", "groups"), SHAPES)
def test_convolution_sums(x: Any, w: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> None:
    codes, weight = draw(*x, low=-255, high=255), draw(*w, seed=1)
    want = naive_conv(codes, weight, stride, padding, dilation, groups)
    for sums in (conv_sums, _conv_sums):
        assert np.array_equal(sums(codes, weight, stride, padding, dilation, groups), want)


def test_one_dimensional_convolution() -> None:
    x, w = draw(2, 4, 20), draw(6, 2, 5, seed=1)
    want = naive_conv(x[:, :, None], w[:, :, None], [1, 2], [3, 1, 0, 0], [1, 2], 2)[:, :, 0]
    assert np.array_equal(conv_sums(x, w, [2], [3, 1], [2], 2), want)
    assert np.array_equal(_conv_sums(x, w, [2], [3, 1], [2], 2), want)


@pytest.mark.proves("integer.simulate")
@pytest.mark.parametrize("peak", [2**3, 2**12, 2**25, 2**40], ids=["float32", "edge", "float64", "definition"])
def test_fast_sums_equal_the_definition(peak: int) -> None:
    """Whatever floating type carries them, or none, sums are the same; the inputs sit at their ends, where float32 would round."""
    rng = np.random.default_rng(3)
    x = rng.choice([-peak, peak, peak - 1], (4, 32, 6, 6))
    w = rng.choice([-127, 127, 126, 0], (8, 32, 3, 3))
    place: Any = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    assert np.array_equal(_conv_sums(x, w, *place), conv_sums(x, w, *place))
    assert np.array_equal(_linear_sums(x[..., 0], w[0, :6, :, 0].repeat(2, 1)), linear_sums(x[..., 0], w[0, :6, :, 0].repeat(2, 1)))
    a, b = x[:, :4, 0], x[:, :5, 0].swapaxes(-1, -2)
    assert np.array_equal(_product_sums(a, b), product_sums(a, b))
    assert set(FAST) == {"conv", "conv_transpose", "linear", "matmul", "attention"}


@pytest.mark.proves("integer.simulate")
@pytest.mark.parametrize(("low", "digits"), [(450, 24), (2**38, 53)])
def test_fast_sums_just_past_a_floating_type(low: int, digits: int) -> None:
    """Odd sums above 2^24, which float32 does not hold, and above 2^53, which float64 does not."""
    x, w = draw(64, 288, low=low, high=low + 61), np.full((2, 288), 127)
    sums = linear_sums(x, w)
    assert ((sums % 2 == 1) & (sums > 2**digits)).any()
    assert np.array_equal(_linear_sums(x, w), sums)
    assert np.array_equal(_conv_sums(x[:, :, None, None], w[:, :, None, None], [1, 1], [0] * 4, [1, 1], 1)[:, :, 0, 0], sums)


@pytest.mark.proves("integer.ops")
def test_linear() -> None:
    x, w, bias = draw(2, 3, 7), draw(5, 7, seed=1), draw(5, low=-9999, high=9999)
    one = {**SAME, "multiplier": None, "shift": None}
    del one["multiplier"], one["shift"]
    got = INTEGER["linear"](x, w, bias, np.full(5, 1 << 30), np.full(5, 1), x_zero=-4, **one)
    assert np.array_equal(got, ((x[..., None, :] + 4) * w).sum(-1) + bias)


def test_rescale_clamps_and_moves_the_zero_point() -> None:
    x = np.arange(-128, 128)
    got = INTEGER["rescale"](x, x_zero=-128, **{**SAME, "shift": 0, "y_zero": -10, "low": -10, "high": 100})
    assert np.array_equal(got, np.clip((x + 128 + 1) // 2 - 10, -10, 100))


@pytest.mark.proves("integer.ops")
def test_addition_in_a_finer_unit() -> None:
    """Nearest real sum, but for a slip in the 20th bit; both operands' factors count."""
    a, b = draw(4000), draw(4000, seed=1)
    from roundel.integer.dialect import quantize_multiplier

    sa, sb, sy = 0.031, 0.07, 0.083
    q, s = quantize_multiplier([sa / (2 * sb), 0.5, 2 * sb / (2**20 * sy)])
    got = INTEGER["add"](a, b, a_zero=3, b_zero=-7, left=20, **{**SAME, "multiplier": q.tolist(), "shift": s.tolist()})
    real = (sa * (a - 3) + sb * (b + 7)) / sy
    assert np.abs(got - real).max() < 0.5001


@pytest.mark.proves("integer.ops")
@pytest.mark.parametrize("padding", [[0, 0, 0, 0], [1, 0, 1, 1]])
def test_pools(padding: list[int]) -> None:
    x = draw(2, 3, 8, 9)
    place: Any = {"kernel": [3, 2], "stride": [2, 3], "padding": padding}
    real = torch.from_numpy(x).double()
    largest = OPS["max_pool"](real, **place).numpy()
    assert np.array_equal(INTEGER["max_pool"](x, **place, low=-128, high=127), largest)
    assert np.array_equal(INTEGER["max_pool"](x, **place, low=50, high=100), np.clip(largest, 50, 100))
    mean = OPS["avg_pool"](real, **place).numpy()
    near = np.sign(mean) * np.floor(np.abs(mean) + 0.5 + 1e-9)
    assert np.array_equal(INTEGER["avg_pool"](x, **place, acc=(-768, 762), low=-128, high=127), near)
    total = F.avg_pool2d(F.pad(real + 5, padding), (3, 2), (2, 3), divisor_override=1).numpy()
    assert np.array_equal(INTEGER["sum_pool"](x, **place, x_zero=-5, **SAME), total)


@pytest.mark.proves("integer.ops")
def test_sum() -> None:
    x = draw(2, 3, 4, 5)
    assert np.array_equal(INTEGER["sum"](x, axes=[2, 3], keepdim=True, x_zero=7, **SAME), (x - 7).sum((2, 3), keepdims=True))
    assert INTEGER["sum"](x, axes=[-1], keepdim=False, x_zero=7, **SAME).shape == (2, 3, 4)


def naive_transpose(x: Ints, w: Ints, stride: Any, padding: Any, more: Any, dilation: Any, groups: int) -> Ints:
    """Every product put where it belongs; w (out, in/groups, kh, kw)."""
    n, channels, *places = x.shape
    out_channels, per, *kernel = w.shape
    size = [
        (p - 1) * s - 2 * pad + d * (k - 1) + m + 1 for p, s, pad, d, k, m in zip(places, stride, padding, dilation, kernel, more)
    ]
    out = np.zeros((n, out_channels, *size), np.int64)
    for at in itertools.product(range(n), range(out_channels), range(per), *map(range, (*places, *kernel))):
        to = [p * s + t * d - pad for p, s, t, d, pad in zip(at[3:5], stride, at[5:], dilation, padding)]
        if all(0 <= t < whole for t, whole in zip(to, size)):
            channel = at[1] // (out_channels // groups) * per + at[2]
            out[at[0], at[1], to[0], to[1]] += x[at[0], channel, at[3], at[4]] * w[at[1], at[2], at[5], at[6]]
    assert channels == per * groups
    return out


@pytest.mark.proves("integer.ops")
@settings(max_examples=30)
@given(st.data(), st.integers(0, 10**9))
def test_transposed_convolution(data: st.DataObject, seed: int) -> None:
    """Any stride, padding, dilation and groups, against naive loops."""

    def two(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=2, max_size=2))

    groups, stride, dilation, kernel = data.draw(st.integers(1, 2)), two(1, 3), two(1, 2), two(1, 3)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    padding = [data.draw(st.integers(0, r // 2 + 1)) for r in reach]
    more = [data.draw(st.integers(0, s - 1)) for s in stride]
    x, w = draw(2, 2 * groups, *two(3, 5), seed=seed), draw(3 * groups, 2, *kernel, seed=seed + 1)
    channels = np.zeros(3 * groups, np.int64)
    rest = {key: value for key, value in SAME.items() if key not in ("multiplier", "shift")}
    got = INTEGER["conv_transpose"](
        x + 5, w, channels, channels + (1 << 30), channels + 1, stride=stride, padding=padding, output_padding=more,
        dilation=dilation, groups=groups, x_zero=5, **rest)  # fmt: skip
    assert np.array_equal(got, naive_transpose(x, w, stride, padding, more, dilation, groups))


@pytest.mark.proves("integer.ops")
@pytest.mark.parametrize("transpose", [False, True])
def test_product_of_two_values(transpose: bool) -> None:
    """Each result by itself, both zero points taken out; leading axes broadcast."""
    a, b = draw(2, 3, 4, 5), draw(3, 5, 6, seed=1)
    got = INTEGER["matmul"](a, b.swapaxes(-1, -2) if transpose else b, transpose_b=transpose, a_zero=-7, b_zero=9, **SAME)
    want = np.zeros((2, 3, 4, 6), np.int64)
    for n, h, i, j in np.ndindex(want.shape):
        want[n, h, i, j] = sum((int(a[n, h, i, k]) + 7) * (int(b[h, k, j]) - 9) for k in range(5))
    assert np.array_equal(got, want)


@pytest.mark.proves("integer.ops")
def test_difference_product_and_signed_factors() -> None:
    a, b = draw(2, 3, 9), draw(3, 1, seed=1)
    assert np.array_equal(INTEGER["mul"](a, b, a_zero=3, b_zero=-4, **SAME), (a - 3) * (b + 4))
    same = {**SAME, "multiplier": [1 << 30] * 3, "shift": [1, 1, -19]}
    assert np.array_equal(INTEGER["sub"](a, b, a_zero=3, b_zero=-4, left=20, **same), (a - 3) - (b + 4))
    factors = np.array([[1 << 30] * 3, [1 << 30, -(1 << 30), 0]]), np.array([[1] * 3, [2, 1, 0]])
    rest = {key: value for key, value in SAME.items() if key not in ("multiplier", "shift")}
    x = a - 3
    want = np.where(x >= 0, x, x * np.array([2, -1, 0])[:, None])
    assert np.array_equal(INTEGER["prelu"](a, *factors, x_zero=3, **rest), want)


@pytest.mark.proves("integer.ops")
def test_rows_of_an_embedding() -> None:
    w, ids, table = draw(9, 4, low=0, high=3), draw(2, 5, low=0, high=8), draw(9, 4, seed=2)
    rest = {key: value for key, value in SAME.items() if key not in ("multiplier", "shift")}
    shift = np.arange(9) % 3
    for codes, looked in ((None, w), (table[:1], table[0][w]), (table, np.take_along_axis(table, w, 1))):
        assert np.array_equal(levels(w, codes), looked)
        one = INTEGER["embedding"](ids, w, np.array([1 << 30]), np.array([2]), *([] if codes is None else [codes]), **rest)
        assert np.array_equal(one, 2 * looked[ids])
        each = INTEGER["embedding"](ids, w, np.full(9, 1 << 30), shift + 1, *([] if codes is None else [codes]), **rest)
        assert np.array_equal(each, (looked << shift[:, None])[ids])


@pytest.mark.proves("integer.ops")
@pytest.mark.parametrize("old", [(1, 1), (5, 7), (4, 3)])
@pytest.mark.parametrize("new", [(1, 1), (9, 5), (12, 3)])
@pytest.mark.parametrize(("mode", "corners"), [("nearest", False), ("bilinear", False), ("bilinear", True)])
def test_resize(old: tuple[int, int], new: tuple[int, int], mode: str, corners: bool) -> None:
    """Nearest is exact; neighbours are weighted in units of 2^-10, each axis, so a result is within 255 * 2^-10 of torch's."""
    x, bits = draw(2, 3, *old), 0 if mode == "nearest" else 10
    picks = [_neighbours(m, n, bits, corners) for m, n in zip(old, new, strict=True)]
    got = INTEGER["resize"](x, *picks, bits=bits, x_zero=-9, **SAME)
    more = {"align_corners": corners} if mode == "bilinear" else {}
    want = F.interpolate(torch.from_numpy(x + 9).double(), new, mode=mode, **more).numpy()
    assert np.abs(got / 4.0**bits - want).max() <= (255 * 2.0**-bits if bits else 0)


MOVES: list[tuple[str, dict[str, Any]]] = [
    ("reshape", {"shape": [0, -1, 4]}),
    ("transpose", {"perm": [0, 3, 1, 2]}),
    ("slice", {"axis": 2, "start": 1, "stop": None, "step": 2}),
    ("slice", {"axis": -1, "start": -3, "stop": -1}),
    ("pad", {"padding": [1, 2, 0, 0, 3, 0]}),
    ("pad", {"padding": [-1, 2, 0, -2]}),
    ("slice", {"axis": 3, "start": -1, "stop": None, "step": -1}),
    ("expand", {"shape": [5, 2, -1, -1, 4]}),
    ("amax", {"axes": [1, -1], "keepdim": False}),
    ("amax", {"axes": [2], "keepdim": True}),
    ("argmax", {"axis": 1, "keepdim": True}),
]


@pytest.mark.proves("integer.ops")
@pytest.mark.parametrize(("name", "attrs"), MOVES)
def test_moves_equal_the_real_ones(name: str, attrs: dict[str, Any]) -> None:
    x = draw(2, 3, 4, 4)
    want = OPS[name](torch.from_numpy(x), **attrs, **({"value": 9} if name == "pad" else {}))
    assert np.array_equal(INTEGER[name](x, **attrs, **({"code": 9} if name == "pad" else {})), want.numpy())


def test_moves_of_two_operands() -> None:
    x, index = draw(2, 8, 4, 3), draw(3, 2, low=0, high=2)
    assert np.array_equal(INTEGER["gather"](x, index, axis=-1), x[..., index])
    assert np.array_equal(INTEGER["depth_to_space"](x, block=2), F.pixel_shuffle(torch.from_numpy(x), 2).numpy())
    assert np.array_equal(INTEGER["expand_batch"](x[:1], draw(5, 1)), np.repeat(x[:1], 5, 0))
    assert np.array_equal(INTEGER["table"](np.array([[-3, 2]]), np.arange(100, 108), first=-4), [[101, 106]])


def test_concat() -> None:
    x, y = draw(2, 3, 4), draw(2, 1, 4, seed=1)
    assert np.array_equal(INTEGER["concat"](x, y, axis=1), np.concatenate([x, y], 1))


@pytest.mark.proves("integer.ops")
@pytest.mark.parametrize("rounding", ["R1", "R2", "R2a", "R3"])
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 20.0])
def test_softmax_is_near_the_real_one(rounding: str, scale: float) -> None:
    from roundel.integer.fixed import exp_table

    x = draw(500, 9)
    got = INTEGER["softmax"](x, exp_table(scale, 256), axis=-1, bits=8, y_zero=-128, low=-128, high=127, rounding=rounding,
                             acc=(0, 2**31 - 1))  # fmt: skip
    want = np.clip(torch.softmax(torch.from_numpy(x * scale), -1).numpy() * 256 - 128, -128, 127)
    assert np.abs(got - want).max() < 0.52


@pytest.mark.parametrize("rounding", ["R1", "R2", "R2a", "R3"])
def test_softmax_of_very_many(rounding: str) -> None:
    """2,000 equal terms are 0.13 units each: nothing, although their reciprocal shifts further than a multiplier says."""
    table = np.full(256, 2**31 - 1)
    got = INTEGER["softmax"](np.zeros((1, 2000), np.int64), table, axis=-1, bits=8, y_zero=-128, low=-128, high=127,
                             rounding=rounding, acc=(0, 2**31 - 1))  # fmt: skip
    assert (got == -128).all()


def test_doors() -> None:
    """Ties to even before the zero point, then the clamp; infinity clamps, NaN is refused."""
    x = np.array([0.5, 1.5, -0.5, 1e30, -np.inf], np.float32)
    got = INTEGER["quantize"](x, scale=1.0, zero=3, low=-128, high=127)
    assert got.tolist() == [3, 5, 3, 127, -128]
    assert INTEGER["dequantize"](got, scale=0.25, zero=3).tolist() == [0, 0.5, 0, 31, -32.75]
    with pytest.raises(InputError, match="1 of 2 input numbers are NaN"):
        INTEGER["quantize"](np.array([1, np.nan]), scale=1.0, zero=0, low=-128, high=127)


def test_sums_hold_to_their_proof() -> None:
    with pytest.raises(CheckError, match="leave the proven range -5 to 5"):
        INTEGER["rescale"](np.array([6]), x_zero=0, **{**SAME, "acc": (-5, 5)})


@pytest.mark.parametrize("dtype", ["int2", "int3", "int4", "int7", "int8", "uint4", "uint8"])
def test_packed_constants(dtype: str) -> None:
    """Against Python's own integers: bit b of column c is bit (c * bits + b) of its row."""
    low, high = extremes(dtype)
    bits = int(dtype.strip("uint"))
    codes = draw(3, 11, low=low, high=high)
    row_bytes = -(-11 * bits // 8)
    rows = [sum((int(code) % 2**bits) << (bits * i) for i, code in enumerate(row)).to_bytes(row_bytes, "little") for row in codes]
    stored = torch.tensor([list(row) for row in rows], dtype=torch.uint8)
    pool = SimpleNamespace(constants={"w": stored}, values={"w": Spec((3, 11), dtype)})
    assert np.array_equal(numbers(pool, "w"), codes)
    with pytest.raises(InputError, match="constant 'w' is not"):
        numbers(SimpleNamespace(constants={"w": stored[:, 1:]}, values=pool.values), "w")


def test_the_list_is_closed() -> None:
    assert set(INTEGER) == INTEGER_OPS
    with pytest.raises(InputError, match="no integer type of up to 32 bits"):
        extremes("float32")
    assert padded(np.ones((1, 1)), [0, 0], 0).shape == (1, 1)
