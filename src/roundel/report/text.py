"""Words and numbers as people read them, for reports and terminals; `inert` disarms names from files, nothing here escapes HTML."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable

__all__ = ["change", "count", "inert", "number", "percent", "seconds", "short", "size"]


def inert(text: object) -> str:
    """``text`` on one line with nothing a terminal or a text layout would obey.

    Control characters become their pictures (ESC is shown as U+241B); invisible format characters, among them those that
    turn the writing direction, line separators and lone surrogates (a path that is not UTF-8) become U+FFFD.
    """
    return "".join(_picture(c) for c in str(text))


def _picture(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return "�" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char


def short(text: object, width: int = 40) -> str:
    """`inert`, with the middle cut out when longer than ``width``: the end of a layer's name tells most."""
    line = inert(text)
    if len(line) <= width:
        return line
    head = (width - 1) // 3
    return f"{line[:head]}…{line[len(line) - (width - 1 - head) :]}"


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits; an absent number is a dash."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    value = float(f"{value:.{digits - 1}e}")  # rounded first, so that 99.96 is 100 and not 100.0
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    places = max(0, digits - whole) if whole else digits - 1 - _exponent(value)
    return f"{value:.{places}f}".replace("-", "−")


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def size(nbytes: float | None, form: Callable[[float], str] = number) -> str:
    """Bytes in decimal units: 1 kB = 1,000 B; ``form`` writes the number before the unit."""
    if nbytes is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(nbytes) < 999.5 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{form(nbytes)} {unit}"


def percent(share: float | None, places: int = 2) -> str:
    """A share of 1 in percent."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.{places}f} %".replace("-", "−")


def change(value: float | None, metric: str) -> str:
    """A metric's difference, signed: top1 in percentage points, perplexity (a relative one) in percent, others as they are."""
    if value is None or math.isnan(value):
        return "–"
    if metric in ("top1", "perplexity"):
        return f"{100 * value:+.2f}".replace("-", "−") + (" %" if metric == "perplexity" else "")
    return ("+" if value >= 0 else "") + number(value)


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None or math.isnan(value):
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale or unit == "µs":
            break
    return f"{number(value / scale)} {unit}"


def count(n: int, thing: str) -> str:
    """'1 layer', '3 layers'."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"
