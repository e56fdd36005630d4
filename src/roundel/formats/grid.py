"""Grids: the sets of numbers that codes can stand for, as plain data; no torch, no scales, no algorithms.

`Uniform` is a run of integers, `Levels` a fixed table from a specification, `Codebook` a table learned from the tensor, and
`Real` a floating-point type that is stored as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from ..errors import FormatError


@dataclass(frozen=True)
class Uniform:
    """Integers of ``bits`` bits (1 to 16), signed two's complement or unsigned; the code is the integer itself."""

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise FormatError(f"integers have 1 to 16 bits; {self} asks for {self.bits}")

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    def bounds(self, full: bool) -> tuple[int, int]:
        """Smallest and largest integer. From 8 bits on, signed grids leave out -2^(bits-1) unless ``full``: 0 is central."""
        if not self.signed:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1)
        return (-top if full or self.bits < 8 else 1 - top), top - 1


@dataclass(frozen=True)
class Levels:
    """A fixed table of numbers, named as in the catalogue: ``fp4``, ``nf4``, ``log4:1.414`` ..."""

    name: str

    def __post_init__(self) -> None:
        table(self.name)

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        return table(self.name).bits


@dataclass(frozen=True)
class Codebook:
    """A learned table of ``k`` entries of ``dim`` consecutive numbers each; the code is the index in the sorted table.

    ``law="log"`` ties the entries to 0 and +-b^-i with a fitted base b. ``entry`` is the type an entry is stored in: a float, or
    ``intN``, whole numbers of N bits that the scale gives their unit.
    """

    k: int
    dim: int = 1
    law: str = ""
    entry: str = "fp16"

    def __post_init__(self) -> None:
        if not 2 <= self.k <= 65536 or not 1 <= self.dim <= 16:
            raise FormatError(f"a codebook has 2 to 65536 entries of 1 to 16 numbers; got {self.k} of {self.dim}")
        if self.whole and self.dim == 1 and self.k > self.whole + self.whole + 1:
            raise FormatError(f"{self}: there are {2 * self.whole + 1} whole numbers from {-self.whole} to {self.whole}, "
                              f"fewer than {self.k} entries")  # fmt: skip

    def __str__(self) -> str:
        entry = "" if self.entry == "fp16" else self.entry
        if self.law:
            return f"log{self.bits}:fit" + (f":{entry}" if entry else "")
        return f"cb{self.k}" + (f"x{self.dim}" if self.dim > 1 else "") + (f":{entry}" if entry else "")

    @property
    def bits(self) -> int:
        return (self.k - 1).bit_length()

    @property
    def whole(self) -> int:
        """The largest entry where entries are whole numbers, -whole to whole; 0 where they are floats."""
        return 2 ** (int(self.entry[3:]) - 1) - 1 if self.entry.startswith("int") else 0

    @property
    def entry_bytes(self) -> int:
        """Bytes that one number of an entry is stored in."""
        return 1 if self.whole else Real(self.entry).bits // 8


@dataclass(frozen=True)
class Real:
    """A number stored as a float: ``fp16``, ``bf16`` or ``fp32``; the code is its IEEE bit pattern."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        return 32 if self.name == "fp32" else 16


Grid = Uniform | Levels | Codebook | Real

#: Type -> (smallest positive, largest) value.
REALS = {"fp16": (2.0**-24, 65504.0), "bf16": (2.0**-133, 3.3895313892515355e38), "fp32": (2.0**-149, 3.4028234663852886e38)}


@dataclass(frozen=True)
class Table:
    """``values`` in increasing order, the code of each, and ``decode``: the value of every bit pattern (NaN where it has none)."""

    bits: int
    values: tuple[float, ...]
    codes: tuple[int, ...]
    decode: tuple[float, ...]


def _sorted(values: list[float], bits: int) -> Table:
    values = sorted(set(values))
    spare = 2**bits - len(values)
    return Table(bits, tuple(values), tuple(range(len(values))), tuple(values) + (float("nan"),) * spare)


def _minifloat(exponent: int, mantissa: int, *, infs: bool = False, nan_at_top: bool = False) -> Table:
    """OCP 8-bit and MX element types: sign, exponent with bias 2^(e-1)-1, mantissa, subnormals."""
    bias, bits = 2 ** (exponent - 1) - 1, 1 + exponent + mantissa
    decode = []
    for code in range(2**bits):
        sign = -1.0 if code >> (bits - 1) else 1.0
        e, m = (code >> mantissa) & (2**exponent - 1), code & (2**mantissa - 1)
        top = e == 2**exponent - 1
        if top and (infs or (nan_at_top and m == 2**mantissa - 1)):
            decode.append(sign * float("inf") if infs and m == 0 else float("nan"))
        elif e:
            decode.append(sign * (1 + m / 2**mantissa) * 2.0 ** (e - bias))
        else:
            decode.append(sign * m / 2**mantissa * 2.0 ** (1 - bias))
    finite = {value: code for code, value in reversed(list(enumerate(decode))) if abs(value) < float("inf")}
    pairs = sorted(finite.items())
    return Table(bits, tuple(v for v, _ in pairs), tuple(c for _, c in pairs), tuple(decode))


def _e8m0() -> Table:
    """OCP MX scale: 2^(code-127), code 255 is NaN."""
    values = tuple(2.0 ** (code - 127) for code in range(255))
    return Table(8, values, tuple(range(255)), (*values, float("nan")))


def _log(bits: int, base: float) -> Table:
    """0 and +-base^-i, i = 0 .. 2^(bits-1)-2 (Miyashita et al. 2016)."""
    return _sorted([0.0, *(s * base**-i for i in range(2 ** (bits - 1) - 1) for s in (-1, 1))], bits)


def _apot(bits: int) -> Table:
    """Additive powers of two (Li, Dong and Wang, ICLR 2020), signed, largest level 1."""
    terms, odd = divmod(bits - 1, 2)
    sums = {0.0}
    for j in range(terms):
        powers = [0.0, *(2.0 ** -(terms * i + j + 1 + (odd if i == 2 else 0)) for i in range(3))]
        sums = {s + p for s in sums for p in powers}
    if odd:
        sums = {s + p for s in sums for p in (0.0, 2.0 ** -(2 * terms + 1))}
    return _sorted([s * m / max(sums) + 0.0 for m in sums for s in (-1, 1)], bits)


#: NormalFloat-4, the quantiles of a standard normal scaled to [-1, 1] (Dettmers et al., QLoRA 2023, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

#: The table of ggml's IQ4_NL and IQ4_XS blocks.
_IQ4NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)

#: Rows of the catalogue of fixed tables; ``{N}`` rows take bits, ``:b`` a base.
TABLES: dict[str, Callable[[], Table]] = {
    "fp8": lambda: _minifloat(4, 3, nan_at_top=True),
    "fp8_e5m2": lambda: _minifloat(5, 2, infs=True),
    "fp6": lambda: _minifloat(2, 3),
    "fp6_e3m2": lambda: _minifloat(3, 2),
    "fp4": lambda: _minifloat(2, 1),
    "e8m0": _e8m0,
    "nf4": lambda: _sorted(list(_NF4), 4),
    "iq4nl": lambda: _sorted(list(_IQ4NL), 4),
    "ternary": lambda: _sorted([-1.0, 0.0, 1.0], 2),
    "binary": lambda: _sorted([-1.0, 1.0], 1),
}

#: Other spellings of a grid.
SPELLINGS = {
    "e4m3fn": "fp8", "fp8_e4m3fn": "fp8", "e5m2": "fp8_e5m2", "fp6_e2m3": "fp6", "e2m3": "fp6", "e3m2": "fp6_e3m2",
    "fp4_e2m1": "fp4", "e2m1": "fp4",
}  # fmt: skip


@cache
def table(name: str) -> Table:
    """The table of a `Levels` name; `FormatError` names what exists."""
    if name in TABLES:
        return TABLES[name]()
    if match := re.fullmatch(r"log(\d+)(?::(\d+(?:\.\d+)?))?", name):
        bits, base = int(match[1]), float(match[2] or 2)
        if 2 <= bits <= 8 and 1 < base <= 16 and base ** (2 - 2 ** (bits - 1)) > 2.0**-120:
            return _log(bits, base)
        raise FormatError(f"{name!r}: a logarithmic grid has 2 to 8 bits and a base above 1 whose smallest level is above 2^-120")
    if match := re.fullmatch(r"apot(\d+)", name):
        if 2 <= int(match[1]) <= 8:
            return _apot(int(match[1]))
        raise FormatError(f"{name!r}: an additive-powers-of-two grid has 2 to 8 bits")
    raise FormatError(f"there is no grid {name!r}; there are intN, uintN (N = 1 to 16), {', '.join(TABLES)}, "
                      "logN[:base], logN:fit, apotN, cbK[xD], fp16, bf16 and fp32")  # fmt: skip


def grid(text: str) -> Grid:
    """The grid that a word such as ``int4``, ``nf4``, ``cb256x2`` or ``log4:fit`` names."""
    text = SPELLINGS.get(text, text)
    if match := re.fullmatch(r"(u?)int(\d+)", text):
        return Uniform(int(match[2]), not match[1])
    if match := re.fullmatch(r"cb(\d+)(?:x(\d+))?(?::(\w+))?", text):
        return Codebook(int(match[1]), int(match[2] or 1), "", _entry(match[3]))
    if match := re.fullmatch(r"log(\d+):fit(?::(\w+))?", text):
        if not 2 <= int(match[1]) <= 8:
            raise FormatError(f"{text!r}: a logarithmic grid has 2 to 8 bits")
        return Codebook(2 ** int(match[1]) - 1, 1, "log", _entry(match[2]))
    return Real(text) if text in REALS else Levels(text)


def _entry(name: str | None) -> str:
    if name is not None and name not in REALS and not re.fullmatch("int[2-8]", name):
        raise FormatError(f"a codebook's entries are stored as {', '.join(REALS)}, or int2 to int8; not {name!r}")
    return name or "fp16"
