"""Codes and values of every grid against `ml_dtypes`, naive loops and hand-worked tables, and the text language; no solvers."""

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from roundel import FormatError
from roundel.formats import Codebook, Format, Levels, Real, Share, Stored, Uniform
from roundel.formats.grid import TABLES, table

# -- floating-point grids -----------------------------------------------------------------------------------------------

FLOATS = {
    "fp8": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def plain(name: str) -> Format:
    """A grid with a scale of one."""
    return Format.parse(f"{name}/tensor*one")


def levels(name: str) -> np.ndarray:
    """Every value that the codes of ml_dtypes' type stand for, float32, by code."""
    bits = plain(name).bits
    return np.arange(1 << bits, dtype=np.uint8).view(FLOATS[name]).astype(np.float32)


@pytest.mark.proves("formats.e4m3fn", "formats.e5m2", "formats.fp6", "formats.fp4", "formats.e8m0")
@pytest.mark.parametrize("name", FLOATS)
def test_every_code_decodes_as_in_ml_dtypes(name: str) -> None:
    expected = levels(name)
    codes = torch.arange(len(expected), dtype=torch.int32)[None]
    ours = plain(name).decode(codes, Stored())[0].numpy()
    assert np.array_equal(ours.view(np.int32)[~np.isnan(expected)], expected.view(np.int32)[~np.isnan(expected)])
    assert np.array_equal(np.isnan(ours), np.isnan(expected))


def probes(name: str) -> np.ndarray:
    """Every finite float16, every midpoint of neighbours and the float32 numbers around it."""
    values = np.unique(levels(name)[np.isfinite(levels(name))])
    middle = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middle, np.float32(bound)) for bound in (-np.inf, np.inf)]
    return np.concatenate([HALVES[np.isfinite(HALVES)], values, middle, *near])


@pytest.mark.proves("formats.e4m3fn", "formats.e5m2", "formats.fp6", "formats.fp4", "formats.e8m0")
@pytest.mark.parametrize("name", FLOATS)
def test_every_half_and_every_tie_rounds_as_in_ml_dtypes(name: str) -> None:
    values = levels(name)
    finite = values[np.isfinite(values)]
    x = probes(name)
    # float32 subnormals leave e8m0 out: ml_dtypes 0.6 rounds every one above 2^-127 up to 2^-126
    x = x[(x >= max(finite.min(), np.finfo(np.float32).tiny if name == "e8m0" else -np.inf)) & (x <= finite.max())]
    codes = plain(name).encode(torch.from_numpy(x)[None], Stored())[0].numpy()
    expected = x.astype(FLOATS[name]).view(np.uint8)
    assert np.array_equal(values[codes], values[expected])
    assert np.array_equal(codes[values[codes] != 0], expected[values[codes] != 0])  # zero: we emit one of the two codes


@pytest.mark.parametrize("name", FLOATS)
def test_beyond_the_range_it_saturates_and_never_gives_nan_or_inf(name: str) -> None:
    finite = levels(name)[np.isfinite(levels(name))]
    x = torch.tensor([[3e38, -3e38, float(finite.max()) * 1.3, float(HALVES[np.isfinite(HALVES)].max())]])
    values = plain(name).decode(plain(name).encode(x, Stored()), Stored())[0]
    assert values.tolist() == [finite.max(), finite.min(), finite.max(), min(finite.max(), 65504.0 if name != "e8m0" else 65536.0)]
    every = plain(name).encode(torch.from_numpy(HALVES[np.isfinite(HALVES)])[None], Stored())[0]
    assert np.isfinite(levels(name)[every.numpy()]).all()


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_stored_floats(name: str) -> None:
    dtype = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}[name]
    x = np.concatenate([HALVES[np.isfinite(HALVES)], np.float32([1 / 3, 1e-5, 1 + 2**-9, 1 + 2**-11, 65503.9])])
    form = Format.parse(name)
    values = form.decode(form.encode(torch.from_numpy(x)[None], Stored()), Stored())[0].numpy()
    assert np.array_equal(values.view(np.int32), x.astype(dtype).astype(np.float32).view(np.int32))


# -- integers -----------------------------------------------------------------------------------------------------------


def naive(x: np.ndarray, scale: np.ndarray, group: int, low: int, high: int, zero: np.ndarray | None) -> tuple[list, list]:
    """Codes and values number by number, in float32."""
    codes, values = [], []
    for r, row in enumerate(x):
        for c, number in enumerate(row):
            s = np.float32(scale[r, c // group])
            z = int(zero[r, c // group]) if zero is not None else 0
            code = 0 if s == 0 else round(float(np.float32(number) / s))  # Python rounds half to even
            code = max(low, min(high, code + z)) if s or zero is not None else 0
            codes.append(code)
            values.append(float(np.float32(code - z) * s))
    return codes, values


@pytest.mark.proves("formats.int", "formats.uint", "seam.encode-decode")
@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("kind", ["int", "uint", "uint~", "int~"])
def test_integers_against_a_naive_loop(bits: int, kind: str) -> None:
    rng = np.random.default_rng(bits)
    name = f"{kind.rstrip('~')}{bits}"
    signed, pointed = kind.startswith("int"), kind.endswith("~")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if signed and bits >= 8 and not pointed:
        low += 1  # weights keep 0 central
    form = Format.parse(f"{name}/g4*fp32" + (f"~{name}" if pointed else ""))
    scale = rng.choice([0.5, 0.013, 1.0, 0.0], (3, 3)).astype(np.float32)
    zero = rng.integers(low, high + 1, (3, 3)) if pointed else None
    x = (rng.integers(-2 * 2**bits, 2 * 2**bits, (3, 11)) * 0.25 * scale[:, np.arange(11) // 4]).astype(np.float32)
    params = Stored(torch.from_numpy(scale), None if zero is None else torch.from_numpy(zero).float())
    codes = form.encode(torch.from_numpy(x), params)
    expected, values = naive(x, scale, 4, low, high, zero)
    assert codes.flatten().tolist() == expected
    assert form.decode(codes, params).flatten().tolist() == values


@pytest.mark.proves("seam.encode-decode")
def test_minimum_by_hand() -> None:
    form = Format.parse("uint2/tensor*fp32-fp32")
    params = Stored(torch.tensor([[0.5]]), torch.tensor([[1.0]]))  # values -1, -0.5, 0, 0.5
    codes = form.encode(torch.tensor([[-9.0, -1.0, -0.6, -0.1, 0.26, 3.0]]), params)
    assert codes.tolist() == [[0, 0, 1, 2, 3, 3]]
    assert form.decode(codes, params).tolist() == [[-1.0, -1.0, -0.5, 0.0, 0.5, 0.5]]


def test_levels_of_weights_and_activations() -> None:
    assert Format.parse("int8").extremes == (-127, 127)
    assert Format.parse("int4").extremes == (-8, 7)
    assert Format.parse("int8", role="activation").extremes == (-128, 127)
    assert Format.parse("int8s", role="activation").extremes == (-127, 127)
    assert Format.parse("uint8", role="activation").extremes == (0, 255)
    assert Format.parse("int1").extremes == (-1, 0)
    assert Format.parse("int16").extremes == (-32767, 32767)


# -- tables by hand -----------------------------------------------------------------------------------------------------

APOT = {  # magnitudes of Li et al. 2020, eq. 5 (k = 2; odd widths have one 1-bit term), before division by the largest
    3: [0, 1 / 2, 1 / 4, 1 / 8],
    4: [a + b for a in (0, 1 / 2, 1 / 4, 1 / 16) for b in (0, 1 / 8)],
    5: [a + b for a in (0, 1 / 2, 1 / 8, 1 / 32) for b in (0, 1 / 4, 1 / 16, 1 / 64)],
    6: [a + b + c for a in (0, 1 / 2, 1 / 8, 1 / 64) for b in (0, 1 / 4, 1 / 16, 1 / 128) for c in (0, 1 / 32)],
}


@pytest.mark.proves("formats.ternary", "formats.binary", "formats.log")
def test_tables_by_hand() -> None:
    assert table("ternary").values == (-1, 0, 1)
    assert table("binary").values == (-1, 1)
    assert table("log3").values == (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)
    assert table("log4").values == (*(-(2.0**-i) for i in range(7)), 0, *(2.0 ** (i - 6) for i in range(7)))
    assert table("log2").values == (-1, 0, 1)
    root = table("log4:1.414").values
    assert len(root) == 15
    assert all(math.isclose(b / a, 1.414) for a, b in pairwise(root[8:]))
    assert table("iq4nl").values == (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@pytest.mark.proves("formats.apot")
@pytest.mark.parametrize("bits", APOT)
def test_additive_powers_of_two(bits: int) -> None:
    top = max(APOT[bits])
    expected = sorted({s * m / top + 0.0 for m in APOT[bits] for s in (-1, 1)})
    assert len(expected) == 2**bits - 1
    assert table(f"apot{bits}").values == tuple(expected)


@pytest.mark.proves("formats.nf4")
def test_nf4_is_the_quantiles_of_a_normal() -> None:
    """QLoRA, appendix E: 8 quantiles below and 9 above share the zero, scaled to [-1, 1]."""
    end = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above, below = norm.ppf(np.linspace(end, 0.5, 9)[:-1]), -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([above, [0], below])) / above.max()
    np.testing.assert_allclose(table("nf4").values, expected, atol=3e-7)


@pytest.mark.proves("seam.encode-decode")
@pytest.mark.parametrize(
    "name", ["nf4", "iq4nl", "ternary", "binary", "log3", "log4", "log8:1.02", "log4:1.414", "apot3", "apot4", "apot8"]
)
def test_tables_round_to_the_nearest_level(name: str) -> None:
    values = np.array(table(name).values)
    assert (np.diff(values) > 0).all()
    top = abs(values).max()
    x = np.random.default_rng(0).uniform(-1.2 * top, 1.2 * top, 4000).astype(np.float32)
    form = plain(name)
    found = form.decode(form.encode(torch.from_numpy(x)[None], Stored()), Stored())[0].numpy().astype(np.float64)
    best = abs(x[:, None].astype(np.float64) - values).min(1)
    np.testing.assert_allclose(abs(found - x), best, atol=1e-6 * top)
    codes = form.encode(torch.from_numpy(values.astype(np.float32))[None], Stored())[0]
    assert codes.tolist() == list(range(len(values)))  # the index in the sorted table


@pytest.mark.proves("seam.encode-decode", "formats.codebook")
def test_learned_tables_round_to_the_nearest_entry() -> None:
    form = Format.parse("cb4@channel/channel*one")
    params = Stored(None, None, torch.tensor([[[-1.0], [0.0], [1.0], [4.0]], [[0.0], [1.0], [2.0], [3.0]]]))
    x = torch.tensor([[-5.0, -0.4, 2.6, 2.4], [-5.0, 0.6, 1.4, 9.0]])
    codes = form.encode(x, params)
    assert codes.tolist() == [[0, 1, 3, 2], [0, 1, 1, 3]]
    assert form.decode(codes, params).tolist() == [[-1, 0, 4, 1], [0, 1, 1, 3]]
    assert form.encode(x[1:], params, rows=torch.tensor([1])).tolist() == [[0, 1, 1, 3]]
    vector = Format.parse("cb3x2@tensor/channel*one")
    params = Stored(None, None, torch.tensor([[[0.0, 0.0], [1.0, 2.0], [5.0, -5.0]]]))
    codes = vector.encode(torch.tensor([[0.9, 1.5, 4.0, -9.0, 0.1, -0.3]]), params)
    assert codes.tolist() == [[1, 2, 0]]
    assert vector.decode(codes, params).tolist() == [[1, 2, 5, -5, 0, 0]]


# -- the text language --------------------------------------------------------------------------------------------------

WEIGHT = {
    "int8": "int8/channel*fp16",
    "int4/g32": "int4/g32*fp16",
    "uint4": "uint4/channel*fp16~uint4",
    "uint4/g128*fp16~uint4": "uint4/g128*fp16~uint4",
    "uint4/g32*fp16-fp16": "uint4/g32*fp16-fp16",
    "nf4/g64": "nf4/g64*fp16",
    "e4m3fn": "fp8/channel*fp16",
    "e5m2/b128x128*fp32": "fp8_e5m2/b128x128*fp32",
    "q4_k": "uint4/g32*uint6/g8*fp16-uint6/g8*fp16",
    "Q6_K": "int6/g16*int8/g16*fp16",
    "nvfp4": "fp4/g16*fp8/tensor*fp32",
    "mxfp4": "fp4/g32*e8m0",
    "cb16/channel": "cb16@channel/channel*one",
    "cb16/tensor": "cb16@tensor/tensor*one",
    "cb16/g32*int8": "cb16@tensor/g32*int8/tensor*fp32",
    "cb256x2@tensor/channel": "cb256x2@tensor/channel*fp16",
    "cb16x2": "cb16x2@tensor/channel*fp16",
    "log4:1.414": "log4:1.414/channel*fp16",
    "log4:fit": "log4:fit@tensor/channel*fp16",
    "binary/g64*bf16": "binary/g64*bf16",
    "fp16": "fp16",
}
ACTIVATION = {
    "int8": "int8/tensor*fp32~int8",
    "int8s": "int8/tensor*fp32",
    "uint8": "uint8/tensor*fp32~uint8",
    "int8/token": "int8/token*fp32~int8",
    "int8s/token": "int8/token*fp32",
    "fp8/token": "fp8/token*fp32",
    "uint8/channel": "uint8/channel*fp32~uint8",
}


@pytest.mark.proves("seam.text", "api.format")
@pytest.mark.parametrize(
    ("role", "short", "long"), [("weight", *i) for i in WEIGHT.items()] + [("activation", *i) for i in ACTIVATION.items()]
)
def test_sugar_has_one_long_form(role: str, short: str, long: str) -> None:
    form = Format.parse(short, role=role)  # type: ignore[arg-type]
    assert str(form) == long
    for other in ("weight", "activation"):
        assert Format.parse(long, role=other) == form  # the long form means the same everywhere


uniform = st.builds(Uniform, st.integers(1, 16), st.booleans())
names = st.sampled_from([*TABLES, "log4", "log3:1.5", "log8:1.02", "apot4", "apot7"])
fixed = st.one_of(uniform, names.map(Levels))
learned = st.one_of(
    st.builds(Codebook, st.integers(2, 65536), st.integers(1, 16), st.just(""), st.sampled_from(["fp16", "bf16", "fp32"])),
    st.integers(2, 8).map(lambda bits: Codebook(2**bits - 1, 1, "log", "fp16")),
)
reals = st.sampled_from(["fp16", "bf16", "fp32"]).map(lambda name: Format(Real(name)))
shares = st.one_of(
    st.sampled_from([Share(0, 0, "tensor"), Share(1, 0, "channel"), Share(1, 0, "token")]),
    st.integers(1, 4096).map(lambda n: Share(1, n)),
    st.tuples(st.integers(2, 512), st.integers(1, 512)).map(lambda p: Share(*p)),
)
parts = st.recursive(
    reals,
    lambda inner: st.builds(Format, fixed, shares, scale=inner) | names.map(lambda n: Format(Levels(n), Share(0, 0, "tensor"))),
    max_leaves=3,
)


@st.composite
def formats(draw: st.DrawFn) -> Format:
    """Any legal format: the constructor says what is not."""
    base = draw(st.one_of(fixed, learned))
    at = (
        draw(st.sampled_from([Share(0, 0, "tensor"), Share(1, 0, "channel"), Share(0, 0, "model")]))
        if isinstance(base, Codebook)
        else None
    )
    offset = draw(st.sampled_from(["zero", "min", ""]))
    extra = {}
    if offset == "zero" and isinstance(base, Uniform):
        extra = {"zero": Format(draw(uniform))}
    elif offset == "min":
        extra = {"min": draw(parts)}
    share = draw(shares)
    if isinstance(base, Codebook) and share.cols % base.dim:
        share = Share(1, base.dim * draw(st.integers(1, 64)))
    if isinstance(base, Codebook) and base.dim > 1 and at == Share(1, 0, "channel"):
        at = Share(0, 0, "tensor")
    return Format(base, share, at, draw(st.none() | parts), **extra)


@pytest.mark.proves("seam.text", "api.format")
@given(formats())
@settings(deadline=None, max_examples=500)
def test_every_format_survives_its_text(form: Format) -> None:
    text = str(form)
    for role in ("weight", "activation"):
        assert Format.parse(text, role=role) == form
    assert str(Format.parse(text)) == text
    assert form.nbytes((3, 40)) > 0


@pytest.mark.proves("seam.text", "inputs.group-zero")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at position 0 .*expected a grid such as int4"),
        ("int4/", "at position 5 .*expected tensor, channel, token, gN or bMxN"),
        ("int4/g", "at position 5 "),
        ("int4/g0", "at position 5 .*a group of 1 or more"),
        ("int4/g-4", "at position 5 "),
        ("int4/b0x4", "at position 5 .*a group of 1 or more"),
        ("int4/g32*", "at position 9 .*expected"),
        ("int4/g32+fp16", r"at position 8 .*'\*'"),
        ("int4/g32 ", None),
        ("int4/g32 x", "at position 8 "),
        ("int4/g32*fp16~uint4-fp16", "at position 19 "),
        ("int17", "integers have 1 to 16 bits"),
        ("int0", "integers have 1 to 16 bits"),
        ("fp5", "there is no grid 'fp5'; there are intN"),
        ("nf4/channel~uint4", "a zero point is an integer on an integer grid"),
        ("int4@tensor/channel", "'@' .*learned table"),
        ("cb1", "2 to 65536 entries"),
        ("cb16x3/g32*fp16", "whole entries of 3"),
        ("cb16x2@channel/channel", "shared by @tensor or @model"),
        ("cb16x0", "1 to 16 numbers"),
        ("log1", "2 to 8 bits"),
        ("log9:fit", "2 to 8 bits"),
        ("log4:0.5", "a base above 1"),
        ("apot9", "2 to 8 bits"),
        ("fp16*fp16", "no scale"),
        ("int4/model", "only a table can be shared by the model"),
        ("cb16:int9", "fp16, bf16, fp32, or int2 to int8"),
        ("cb16:int4", "15 whole numbers from -7 to 7"),
        ("cb8:int5@tensor/channel*one", "need a scale"),
        ("INT4", None),
    ],
)
def test_a_wrong_text_says_where_and_what_is_possible(text: str, said: str | None) -> None:
    if said is None:
        if text.islower():
            assert str(Format.parse(text)) == "int4/g32*fp16"
        return
    with pytest.raises(FormatError, match=said):
        Format.parse(text)


@given(st.text(alphabet="intufpcbgxelogaknmr0123456789/*~-@:.s ", max_size=24))
@settings(deadline=None, max_examples=1000)
def test_no_text_escapes_the_one_error(text: str) -> None:
    try:
        form = Format.parse(text)
    except FormatError:
        return
    assert Format.parse(str(form)) == form
