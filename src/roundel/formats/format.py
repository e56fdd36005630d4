"""The `Format` value and its text language; the numerics behind its methods are in `codec`.

    GRID['@'TABLE_SHARE] '/' SHARE ['*' SCALE] ['-' MIN | '~' ZERO]

``print(parse(text))`` is the canonical long form. A text without ``*`` is sugar: its role fills in what is left out.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..errors import FormatError
from .grid import REALS, SPELLINGS, TABLES, Codebook, Grid, Levels, Real, Uniform, grid, table

if TYPE_CHECKING:
    from torch import Tensor

    from .codec import Params, Stored

Role = Literal["weight", "activation"]

#: Whole formats by the name their users know.
ALIASES = {
    "q4_k": "uint4/g32*uint6/g8*fp16-uint6/g8*fp16",
    "q6_k": "int6/g16*int8/g16*fp16",
    "q8_0": "int8/g32*fp16",
    "q4_0": "int4/g32*fp16",
    "iq4_nl": "iq4nl/g32*fp16",
    "nvfp4": "fp4/g16*fp8/tensor*fp32",
    "mxfp4": "fp4/g32*e8m0",
    "mxfp6": "fp6/g32*e8m0",
    "mxfp8": "fp8/g32*e8m0",
    "mxint8": "int8/g32*e8m0",
}


@dataclass(frozen=True)
class Share:
    """Who shares one parameter: a block of ``rows`` x ``cols`` of the matrix, 0 meaning all of them."""

    rows: int
    cols: int
    word: str = ""

    def __str__(self) -> str:
        return self.word or (f"g{self.cols}" if self.rows == 1 else f"b{self.rows}x{self.cols}")

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The block's size on a matrix of ``shape``, never larger than the matrix."""
        rows, cols = shape
        return max(1, min(self.rows or rows, rows)), max(1, min(self.cols or cols, cols))

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many blocks cover a matrix of ``shape``; a block that does not divide leaves a short last one."""
        (rows, cols), (r, c) = shape, self.block(shape)
        return -(-rows // r), -(-cols // c)


TENSOR, CHANNEL, TOKEN, MODEL = Share(0, 0, "tensor"), Share(1, 0, "channel"), Share(1, 0, "token"), Share(0, 0, "model")


@dataclass(frozen=True)
class Format:
    """How numbers are stored: a grid, who shares its table and its scale, and how scale, minimum and zero point are stored.

    A number is ``level * scale`` (plain), ``(code - zero) * scale`` (``~``) or ``level * scale - min`` (``-``). ``scale=None`` is
    a scale of one. It acts on matrices (rows, columns): a weight is (out, everything else), an activation (tokens, features).

    >>> str(Format.parse("int4/g32"))
    'int4/g32*fp16'
    >>> str(Format.parse("int8", role="activation"))
    'int8/tensor*fp32~int8'
    >>> Format.parse("nvfp4") == Format.parse("fp4/g16*fp8/tensor*fp32")
    True
    """

    grid: Grid
    share: Share = TENSOR
    table: Share | None = None
    scale: Format | None = None
    zero: Format | None = None
    min: Format | None = None

    def __post_init__(self) -> None:
        learned = isinstance(self.grid, Codebook)
        if learned != (self.table is not None):
            raise FormatError(f"{self}: '@' says who shares a learned table, so it goes with cbK and logN:fit only")
        if self.table is not None and self.table.word not in ("tensor", "channel", "model"):
            raise FormatError(f"{self}: a table is shared by @tensor, @channel or @model")
        if isinstance(self.grid, Codebook) and self.grid.dim > 1 and self.table == CHANNEL:
            raise FormatError(f"{self}: a table of {self.grid.dim}-vectors is shared by @tensor or @model, not by channel")
        if self.zero is not None and self.min is not None:
            raise FormatError(f"{self}: a minimum '-' or a zero point '~', not both")
        if self.zero is not None and not (isinstance(self.grid, Uniform) and isinstance(self.zero.grid, Uniform)):
            raise FormatError(f"{self}: a zero point is an integer on an integer grid; use '-' for a real minimum")
        if isinstance(self.grid, Real) and (self.scale or self.zero or self.min):
            raise FormatError(f"{self}: a stored float has no scale, minimum or zero point")
        if isinstance(self.grid, Codebook) and self.share.cols % self.grid.dim:
            raise FormatError(f"{self}: groups of {self.share.cols} do not hold whole entries of {self.grid.dim} numbers")
        if isinstance(self.grid, Codebook) and self.grid.whole and self.scale is None:
            raise FormatError(f"{self}: entries that are whole numbers need a scale, such as *fp16, to give them a unit")
        for part in (self.scale, self.zero, self.min):
            if part is not None and (part.table or part.zero or part.min):
                raise FormatError(f"{self}: a parameter's own format {part} has no learned table, minimum or zero point")

    # -- text -----------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str, role: Role = "weight") -> Format:
        """Read a format text; ``role`` says what sugar means. Raises `FormatError` with the place and what is possible.

        >>> str(Format.parse("cb16/g32*int8"))
        'cb16@tensor/g32*int8/tensor*fp32'
        """
        return _Parser(text, role).parse()

    def __str__(self) -> str:
        leaf = self.scale is None and self.share == TENSOR and self.table is None and self.zero is None and self.min is None
        if leaf and isinstance(self.grid, Real):
            return str(self.grid)
        at = f"@{self.table}" if self.table else ""
        scale = _part(self.scale) if self.scale else "one"
        if self.scale and self.scale.scale is None and isinstance(self.scale.grid, Uniform):
            scale = str(self.scale)  # a bare integer there is sugar for one that counts in units of an outer scale
        offset = f"~{_part(self.zero)}" if self.zero else f"-{_part(self.min)}" if self.min else ""
        return f"{self.grid}{at}/{self.share}*{scale}{offset}"

    # -- size -----------------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.grid.bits

    @property
    def step(self) -> int:
        """Consecutive columns that are coded together."""
        return self.grid.dim if isinstance(self.grid, Codebook) else 1

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a (rows, columns) matrix in this format: codes, scales, offsets, tables and padding.

        >>> Format.parse("int4/g32").nbytes((2, 64))
        72
        """
        rows, cols = shape
        size = rows * (-(-(-(-cols // self.step) * self.bits) // 8))
        for part in (self.scale, self.zero, self.min):
            if part is not None:
                size += part.nbytes(self.share.grid(shape))
        if isinstance(self.grid, Codebook):
            tables = rows if self.table == CHANNEL else 1
            size += tables * self.grid.k * self.grid.dim * self.grid.entry_bytes
        return size

    # -- levels ---------------------------------------------------------------------------------------------------

    @property
    def extremes(self) -> tuple[float, float]:
        """Lowest and highest level of the grid, in units of the scale (learned tables: -1 and 1)."""
        if isinstance(self.grid, Uniform):
            return self.grid.bounds(full=self.scale is None or self.zero is not None or self.min is not None)
        if isinstance(self.grid, Levels):
            values = table(self.grid.name).values
            return values[0], values[-1]
        return -1.0, 1.0

    @property
    def signed(self) -> bool:
        """Whether it can hold negative numbers without an offset."""
        return self.extremes[0] < 0

    # -- the seam to the solvers (see `codec`) --------------------------------------------------------------------

    def fit(self, w: Tensor, importance: Tensor | None = None, table: Tensor | None = None) -> Params:
        """Real-valued parameters for ``w`` (rows, columns), weighted by ``importance`` (columns,) or (rows, columns)."""
        from . import codec

        return codec.fit(self, w, importance, table)

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        """Real-valued parameters that just cover [lo, hi], one entry per block."""
        from . import codec

        return codec.from_range(self, lo, hi)

    def store(self, params: Params) -> Stored:
        """Each parameter rounded through its own format, outer first; `FormatError` when out of range."""
        from . import codec

        return codec.store(self, params)

    def encode(self, w: Tensor, params: Stored, cols: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Codes (rows, columns/step) of ``w``, whose columns and rows have the given ORIGINAL indices."""
        from . import codec

        return codec.encode(self, w, params, cols, rows)

    def decode(self, codes: Tensor, params: Stored, cols: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Values (rows, columns) of codes, float32, differentiable in the parameters."""
        from . import codec

        return codec.decode(self, codes, params, cols, rows)

    def refit(self, w: Tensor, codes: Tensor, params: Stored, importance: Tensor | None = None) -> Params:
        """Least-squares parameters for fixed codes, starting from ``params``."""
        from . import codec

        return codec.refit(self, w, codes, params, importance)


def _part(part: Format) -> str:
    """A nested format's text; a parameter that has no scale of its own is named by its grid alone."""
    return str(part.grid) if part.scale is None and part.share == TENSOR else str(part)


class _Parser:
    """Recursive descent over one text; ``pos`` is where the next error points."""

    def __init__(self, text: str, role: Role) -> None:
        self.source, self.role, self.pos = text, role, 0
        self.text = ALIASES.get(text.strip().lower(), text.strip())

    def fail(self, possible: str) -> FormatError:
        rest = self.text[self.pos :] or "the end"
        return FormatError(f"format {self.source!r}: at position {self.pos} ({rest!r}) expected {possible}")

    def meant(self) -> str:
        """What a misspelt text may have meant, as the end of a message; nothing where no known text is near."""
        near = difflib.get_close_matches(self.source.strip().lower(), _known(self.role), 1, 0.7)
        return f"; did you mean {near[0]!r}?" if near else ""

    def grid(self, word: str) -> Grid:
        try:
            return grid(word)
        except FormatError as err:
            if re.fullmatch(r"(u?int|log|apot|cb)[\d:.x]*\d", word):
                raise  # no slip of the pen: only its number is out of bounds
            raise FormatError(f"{err}{self.meant()}") from err

    def parse(self) -> Format:
        base = self.default()
        if self.pos < len(self.text):
            raise self.fail("'@', '/', '*', '~', '-' or the end" + self.meant())
        return base

    def take(self, char: str) -> bool:
        if self.text.startswith(char, self.pos):
            self.pos += 1
            return True
        return False

    def word(self) -> str:
        match = re.compile(r"[a-z][a-z0-9_]*(:[a-z0-9.]+)*").match(self.text, self.pos)
        if not match:
            raise self.fail("a grid such as int4, uint4, nf4, fp8, log4 or cb16" + self.meant())
        self.pos = match.end()
        return match[0]

    def share(self) -> Share:
        match = re.compile(r"tensor|channel|token|model|g(\d+)|b(\d+)x(\d+)").match(self.text, self.pos)
        if not match:
            raise self.fail("tensor, channel, token, gN or bMxN" + self.meant())
        if any(n is not None and int(n) < 1 for n in match.groups()):
            raise self.fail("a group of 1 or more, such as g32 or g128")
        self.pos = match.end()
        if match[1]:
            return Share(1, int(match[1]))
        if match[2]:
            return Share(int(match[2]), int(match[3]))
        return {"tensor": TENSOR, "channel": CHANNEL, "token": TOKEN, "model": MODEL}[match[0]]

    def default(self) -> Format:
        """The outermost format, with the role's sugar."""
        word = self.word()
        symmetric = bool(re.fullmatch(r"int\d+s", word))
        base = self.grid(word[:-1] if symmetric else word)
        at = self.share() if self.take("@") else None
        asked = self.share() if self.take("/") else None
        if asked == MODEL:
            raise FormatError(f"format {self.source!r}: only a table can be shared by the model ('@model'), a scale cannot")
        share = asked or (CHANNEL if self.role == "weight" else TENSOR)
        real = "fp16" if self.role == "weight" else "fp32"
        scale: Format | None = Format(Real(real))
        zero = minimum = None
        sugar = not self.take("*")
        if not sugar:
            scale = self.nested(scales=True)
        if self.take("~"):
            zero = self.nested(scales=False)
        elif self.take("-"):
            minimum = self.nested(scales=True)
        elif sugar and not symmetric and isinstance(base, Uniform) and (self.role == "activation" or not base.signed):
            zero = Format(base)
        if isinstance(base, Real):
            if not sugar and scale is not None:
                raise FormatError(f"format {self.source!r}: a stored float has no scale, minimum or zero point")
            share, scale = TENSOR, None
        if isinstance(base, Codebook) and at is None:
            own = share.word in ("tensor", "channel") and not base.law and base.dim == 1
            at = share if own and sugar else TENSOR
            scale = None if own and sugar and not base.whole else scale
        return Format(base, share, at, scale, zero, minimum)

    def nested(self, scales: bool) -> Format | None:
        """The format of a scale or minimum (``scales``), or of a zero point; ``one`` is None."""
        word = self.word()
        if word == "one":
            return None
        base = self.grid(word)
        if not self.take("/"):
            # An integer alone cannot be a scale: it counts in units of an outer one.
            return Format(base, TENSOR, None, Format(Real("fp32")) if scales and isinstance(base, Uniform) else None)
        share = self.share()
        return Format(base, share, None, self.nested(scales=True) if self.take("*") else Format(Real("fp16")))


def _known(role: Role) -> list[str]:
    """The usual texts, for telling what a misspelt one may have meant."""
    grids = [f"{sign}int{bits}" for bits in range(1, 17) for sign in ("", "u")]
    grids += [name for name in (*TABLES, *SPELLINGS) if name != "e8m0"] + ["log4", "apot4", "cb16", "cb256"]
    shares = ("", "/tensor", "/channel", "/g16", "/g32", "/g64", "/g128")
    whens = (":static", ":dynamic", ":token", "/token:dynamic") if role == "activation" else ()
    timed = (name + when for name in ("int4", "int8") for when in whens)
    return [*ALIASES, *REALS, *(name + share for name in grids for share in shares), *timed]


def with_real(fmt: Format, real: str) -> Format:
    """The same format with every stored float (innermost scales, minima and table entries) as ``real``."""

    def leaf(part: Format | None) -> Format | None:
        if part is None:
            return None
        return Format(Real(real)) if isinstance(part.grid, Real) else replace(part, scale=leaf(part.scale))

    base = replace(fmt.grid, entry=real) if isinstance(fmt.grid, Codebook) and not fmt.grid.whole else fmt.grid
    return replace(fmt, grid=base, scale=leaf(fmt.scale), min=leaf(fmt.min))
