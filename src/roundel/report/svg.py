"""The report's figures as inline SVG: a trade-off plot, bars per layer, blocks of memory, lines over samples; no scripts.

Every string goes through `markupsafe`, so a hostile layer name cannot leave its text node. Colours are CSS classes of the
page, so one drawing serves light, dark and paper. Lengths are SVG user units, about one pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from .text import number, short

WIDTH = 720
_CHAR = 6.2  # a label's width per character at 11 units of type: enough for collision boxes

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """One mark of the trade-off plot: both values finite, ``series`` picks its shape and colour."""

    name: str
    x: float
    y: float
    series: str = ""


@dataclass(frozen=True)
class Block:
    """A value in memory: its first byte and how many, from ``start`` to ``stop`` in calls, each one long, the first from 0 to 1."""

    name: str
    offset: int
    nbytes: int
    start: float
    stop: float


@dataclass(frozen=True)
class Axis:
    """A data interval laid on pixels; ``log`` needs ``lo > 0``."""

    lo: float
    hi: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.lo), self.hi)
        lo, hi, v = (math.log(t) for t in (self.lo, self.hi, value)) if self.log else (self.lo, self.hi, value)
        return self.start + (self.stop - self.start) * (v - lo) / (hi - lo)

    def ticks(self) -> list[float]:
        return _log_ticks(self.lo, self.hi) if self.log else _linear_ticks(self.lo, self.hi)


def axis(values: Sequence[float], start: float, stop: float, *, log: bool) -> Axis:
    """An axis that holds ``values`` with a margin; a log axis puts zeros at its lower end."""
    if log:
        positive = [v for v in values if v > 0] or [1.0]
        lo, hi = min(positive), max(positive)
        margin = max((hi / lo) ** 0.06, 1.15)
        lo = lo / margin**2 if len(positive) < len(values) else lo / margin
        return Axis(lo, hi * margin, start, stop, True)
    lo, hi = min(values), max(values)
    margin = (hi - lo) * 0.06 or abs(hi) * 0.1 or 1.0
    return Axis(lo - margin, hi + margin, start, stop)


def _log_ticks(lo: float, hi: float) -> list[float]:
    decades = math.log10(hi / lo)
    steps = (1, 2, 5) if decades < 2.5 else (1,)
    exponents = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in steps if lo <= m * 10.0**e <= hi]
    return ticks if len(ticks) >= 2 else [lo, hi]


def _linear_ticks(lo: float, hi: float, wanted: int = 5) -> list[float]:
    raw = (hi - lo) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(lo / step), math.floor(hi / step) + 1)]


def tick_label(value: float) -> str:
    """A power of ten below 0.001 as such, anything else plain."""
    if value <= 0 or value >= 1e-3:
        return f"{value:.10g}".replace("-", "−")
    exponent = math.floor(math.log10(value) + 1e-9)
    power = "10" + f"{exponent}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if round(value / 10.0**exponent) == 1 else f"{value / 10.0**exponent:.0f}·{power}"


def front(points: Sequence[Point], *, larger_is_better: bool = False) -> list[Point]:
    """The Pareto front: from the smallest up, each strictly better than every smaller one."""
    sign = -1.0 if larger_is_better else 1.0
    best, kept = math.inf, []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if sign * point.y < best:
            best = sign * point.y
            kept.append(point)
    return kept


def tradeoff(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str] = tick_label,
    x_log: bool = False,
    y_log: bool = False,
    larger_is_better: bool = False,
    reference: Point | None = None,
) -> Markup:
    """Marks, their Pareto front as a staircase, and as many names as fit without touching; every mark has its name as a tooltip.

    ``reference`` (the float model) is a broken line at its size, and across at its value unless the y axis is a distance to it.
    """
    left, right, top, bottom = 64.0, WIDTH - 16.0, 30.0, 372.0
    across = reference if reference is not None and not y_log else None
    xs = [p.x for p in points] + ([reference.x] if reference else [])
    ys = [p.y for p in points] + ([across.y] if across else [])
    x, y = axis(xs, left, right, log=x_log), axis(ys, bottom, top, log=y_log)
    best = front(points, larger_is_better=larger_is_better)

    out: list[Markup] = []
    for tick in x.ticks():
        out.append(_line("grid", x(tick), top, x(tick), bottom) + _text(x(tick), bottom + 17, x_text(tick), "tick", "middle"))
    for tick in y.ticks():
        out.append(_line("grid", left, y(tick), right, y(tick)) + _text(left - 8, y(tick) + 4, y_text(tick), "tick", "end"))
    out.append(_line("axis", left, bottom, right, bottom) + _line("axis", left, top, left, bottom))
    out.append(_text((left + right) / 2, bottom + 38, x_label, "label", "middle"))
    out.append(_text(left - 48, top - 14, y_label, "label", "start"))

    taken: list[Box] = []
    if reference is not None:
        out.append(_line("float", x(reference.x), top, x(reference.x), bottom))
        note = short(reference.name)
        out.append(_text(x(reference.x) - 6, top + 11, note, "float", "end"))
        taken.append((x(reference.x) - 6 - _CHAR * len(note), top, x(reference.x), top + 14))
        if across:
            out.append(_line("float", left, y(across.y), right, y(across.y)))
            taken.append((left, y(across.y) - 1, right, y(across.y) + 1))
    if best:
        steps = f"M{x(best[0].x):.1f} {y(best[0].y):.1f}" + "".join(f"H{x(p.x):.1f}V{y(p.y):.1f}" for p in best[1:])
        end = max(x(reference.x) if reference else right, x(best[-1].x))
        corners = [*((x(p.x), y(p.y)) for p in best), (end, y(best[-1].y))]
        for (x1, y1), (x2, y2) in pairwise(corners):
            taken += [(x1, y1 - 1, x2, y1 + 1), (x2 - 1, min(y1, y2), x2 + 1, max(y1, y2))]
        out.append(Markup('<path class="front" d="{}H{:.1f}"/>').format(steps, end))

    series = list(dict.fromkeys(p.series for p in points))
    on_front = set(map(id, best))
    taken += [(x(p.x) - 5, y(p.y) - 5, x(p.x) + 5, y(p.y) + 5) for p in points]
    for p in points:
        mark = _mark(x(p.x), y(p.y), series.index(p.series), filled=id(p) in on_front)
        tip = f"{p.name}: {x_text(p.x)}, {number(p.y)}" + (f" ({p.series})" if p.series else "")
        out.append(Markup("<g>{}<title>{}</title></g>").format(mark, short(tip, 96)))
    named: list[tuple[str, float, float]] = []
    for p in [*best, *(p for p in points if id(p) not in on_front)]:
        name = short(p.name, 28)
        if any(name == other and math.hypot(x(p.x) - at_x, y(p.y) - at_y) < 60 for other, at_x, at_y in named):
            continue  # its neighbour says the same, and the shapes tell them apart
        place = _place(x(p.x), y(p.y), _CHAR * len(name), taken, (left, top, right, bottom))
        if place is not None:
            box, anchor, at = place
            taken.append(box)
            named.append((name, x(p.x), y(p.y)))
            out.append(_text(at, box[3] - 3, name, "name best" if id(p) in on_front else "name", anchor))
    if len(series) > 1:
        at = right
        for i, name in reversed(list(enumerate(series))):
            out.append(_text(at, top - 14, name, "label", "end"))
            at -= 7 * len(name) + 12
            out.append(_mark(at, top - 18, i, filled=True))
            at -= 18
    return _svg(bottom + 46, f"{y_label} against {x_label}", out)


def _place(x: float, y: float, width: float, taken: list[Box], frame: Box) -> tuple[Box, str, float] | None:
    """The first free spot around a mark for a name of that width: (its box, text anchor, anchor's x)."""
    for dx, dy, anchor in (
        (8, 0, "start"), (-8, 0, "end"), (0, -13, "middle"), (0, 14, "middle"),
        (7, -10, "start"), (7, 11, "start"), (-7, -10, "end"), (-7, 11, "end"),
    ):  # fmt: skip
        start = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (start, y + dy - 7, start + width, y + dy + 7)
        inside = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] - 8 <= box[1] and box[3] <= frame[3]
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            return box, anchor, x + dx
    return None


def bars(layers: Sequence[tuple[str, float]], *, label: str, worst: int = 3) -> Markup:
    """One bar per (name, decibels), in the order given; the ``worst`` lowest stand out. Beyond 48 they become thin columns.

    A value of +inf (nothing was lost) fills the frame and says "exact"; NaN is drawn as an empty bar.
    """
    finite = [v for _, v in layers if math.isfinite(v)]
    low = set(sorted(range(len(layers)), key=lambda i: _rank(layers[i][1]))[:worst]) if len(layers) > worst else set()
    hi, lo = max([*finite, 1.0]), min([*finite, 0.0])
    return (_rows if len(layers) <= 48 else _columns)(layers, label, low, lo, hi * 1.04)


def _rank(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _rows(layers: Sequence[tuple[str, float]], label: str, low: set[int], lo: float, hi: float) -> Markup:
    names = [short(name, 34) for name, _ in layers]
    left = 16 + _CHAR * max(map(len, names), default=0)
    right, top, pitch = WIDTH - 48.0, 30.0, 17.0
    bottom = top + pitch * len(layers) + 4
    x = Axis(lo, hi, left, right)
    out = [_line("grid", x(t), top, x(t), bottom) + _text(x(t), bottom + 15, tick_label(t), "tick", "middle") for t in x.ticks()]
    for i, (name, value) in enumerate(layers):
        y = top + pitch * i + 4
        end = x(hi if math.isinf(value) and value > 0 else lo if not math.isfinite(value) else value)
        start, end = sorted((x(0.0), end))
        text = "exact" if value == math.inf else f"{number(value)} dB"
        bar = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="11"><title>{}</title></rect>').format(
            "bar low" if i in low else "bar", start, y, end - start, f"{short(name, 72)}: {text}"
        )
        out.append(bar + _text(left - 8, y + 9.5, names[i], "name best" if i in low else "name", "end"))
        out.append(_text(end + 5, y + 9.5, text, "tick"))
    out.append(_line("axis", x(0.0), top, x(0.0), bottom))
    out.append(_text(left, top - 10, label, "label", "start"))
    return _svg(bottom + 22, label, out)


def _columns(layers: Sequence[tuple[str, float]], label: str, low: set[int], lo: float, hi: float) -> Markup:
    left, right, top, bottom = 48.0, WIDTH - 16.0, 30.0, 250.0
    lump = -(-len(layers) // 350)  # more columns than that would merge on the page
    places = "layers, first to last"
    if lump > 1:
        kept = [min(range(i, min(i + lump, len(layers))), key=lambda j: _rank(layers[j][1])) for i in range(0, len(layers), lump)]
        low = {at for at, i in enumerate(kept) if i in low}
        layers = [layers[i] for i in kept]
        places += f", the lowest of every {lump}"
    y = Axis(lo, hi, bottom, top)
    out = [_line("grid", left, y(t), right, y(t)) + _text(left - 8, y(t) + 4, tick_label(t), "tick", "end") for t in y.ticks()]
    pitch = (right - left) / len(layers)
    stems: dict[bool, list[str]] = {False: [], True: []}
    for i, (_, value) in enumerate(layers):
        top_at = y(hi if value == math.inf else lo if not math.isfinite(value) else value)
        stems[i in low].append(f"M{left + pitch * (i + 0.5):.1f} {y(0.0):.0f}V{top_at:.0f}")
    for is_low, parts in stems.items():
        path = Markup('<path class="{}" d="{}" stroke-width="{:.1f}"/>')
        out.append(path.format("stem low" if is_low else "stem", "".join(parts), max(pitch * 0.7, 0.3)))
    taken: list[Box] = []
    for i in sorted(low, key=lambda i: _rank(layers[i][1])):
        name, at = short(layers[i][0], 34), left + pitch * (i + 0.5)
        end = y(layers[i][1]) if math.isfinite(layers[i][1]) else bottom
        place = _place(at, end - 6, _CHAR * len(name), taken, (left, top, right, bottom))
        if place is not None:
            taken.append(place[0])
            out.append(_text(place[2], place[0][3] - 3, name, "name best", place[1]))
    out.append(_line("axis", left, y(0.0), right, y(0.0)))
    out.append(_text(0, top - 14, label, "label", "start") + _text((left + right) / 2, bottom + 22, places, "label", "middle"))
    return _svg(bottom + 30, label, out)


def arena(blocks: Sequence[Block], *, calls: int, nbytes: int, bound: int) -> Markup:
    """A rectangle per block, bytes over calls, its name and size where they fit; the arena's top and its lower bound as lines."""
    left, right, top, bottom = 64.0, WIDTH - 16.0, 30.0, 330.0
    x, y = Axis(0, max(calls, 1), left, right), Axis(0, 1.06 * max(nbytes, bound, 1), bottom, top)
    out = [_line("grid", left, y(t), right, y(t)) + _text(left - 8, y(t) + 4, f"{t:,.0f}", "tick", "end") for t in y.ticks()]
    for call in (t for t in x.ticks() if t.is_integer() and t < calls):
        out.append(_text((x(call) + x(call + 1)) / 2, bottom + 15, f"{call:.0f}", "tick", "middle"))
    for b in blocks:
        x1, x2, y1, y2 = x(b.start), x(b.stop), y(b.offset + b.nbytes), y(b.offset)
        form = '<rect class="block" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
        tip = f"{short(b.name, 72)}: {b.nbytes:,} B at {b.offset:,}, calls {math.floor(b.start)} to {math.ceil(b.stop) - 1}"
        out.append(Markup(form).format(x1, y1, x2 - x1, y2 - y1, tip))
        lines = [short(b.name, 24), f"{b.nbytes:,} B"]
        lines = [" ".join(lines)] if _CHAR * len(" ".join(lines)) < x2 - x1 - 4 else lines
        if _CHAR * max(map(len, lines)) < x2 - x1 - 4 and 13 * len(lines) < y2 - y1:
            for i, line in enumerate(lines):
                out.append(_text((x1 + x2) / 2, (y1 + y2) / 2 + 4 + 13 * (i - (len(lines) - 1) / 2), line, "inside", "middle"))
    out.append(_line("axis", left, bottom, right, bottom) + _line("axis", left, top, left, bottom))
    out.append(
        _line("edge", left, y(nbytes), right, y(nbytes)) + _text(right, y(nbytes) - 5, f"arena {nbytes:,} B", "name best", "end")
    )
    out.append(_line("float", left, y(bound), right, y(bound)))
    out.append(_text(left + 6, y(max(nbytes, bound)) - 5, f"lower bound {bound:,} B", "name"))
    out.append(_text(left - 48, top - 14, "bytes", "label") + _text((left + right) / 2, bottom + 34, "calls", "label", "middle"))
    return _svg(bottom + 42, "the arena over the calls", out)


def lines(series: Sequence[tuple[str, Sequence[float]]], *, samples: int, label: str, named: int = 3) -> Markup:
    """A line per (name, positive values evenly spread over ``samples``), on a log axis; the first ``named`` stand out, by name."""
    left, right, top, bottom = 64.0, WIDTH - 150.0, 30.0, 270.0
    x, y = Axis(0, max(samples, 1), left, right), axis([v for _, values in series for v in values], bottom, top, log=True)
    out = [_line("grid", left, y(t), right, y(t)) + _text(left - 8, y(t) + 4, tick_label(t), "tick", "end") for t in y.ticks()]
    out += [_text(x(t), bottom + 15, f"{t:,.0f}", "tick", "middle") for t in x.ticks()]
    taken: list[Box] = []
    for i, (name, values) in reversed(list(enumerate(series))):  # what stands out lies on top
        step = (right - left) / max(1, len(values) - 1)
        path = "M" + "L".join(f"{left + step * at:.1f} {y(v):.1f}" for at, v in enumerate(values))
        form = '<path class="{}" d="{}"><title>{}</title></path>'
        out.append(Markup(form).format("line low" if i < named else "line", path, short(name, 72)))
    for name, values in series[:named]:
        place = _place(right, y(values[-1]), _CHAR * len(short(name, 22)), taken, (left, top, WIDTH, bottom))
        if place is not None:
            taken.append(place[0])
            out.append(_text(place[2], place[0][3] - 3, short(name, 22), "name best", place[1]))
    out.append(_line("axis", left, bottom, right, bottom) + _line("axis", left, top, left, bottom))
    out.append(_text(left - 48, top - 14, label, "label") + _text((left + right) / 2, bottom + 34, "samples", "label", "middle"))
    return _svg(bottom + 42, label, out)


def _mark(x: float, y: float, series: int, *, filled: bool) -> Markup:
    r = 4.2
    shapes = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r:.1f} 0a{r} {r} 0 1 0 {-2 * r:.1f} 0z",
        f"M{x - 3.8:.1f} {y - 3.8:.1f}h7.6v7.6h-7.6z",
        f"M{x:.1f} {y - 5:.1f}l4.7 8.4h-9.4z",
        f"M{x:.1f} {y - 5.4:.1f}l5.4 5.4l-5.4 5.4l-5.4 -5.4z",
    )
    kind = series % len(shapes)
    return Markup('<path class="mark s{}{}" d="{}"/>').format(kind, "" if filled else " open", shapes[kind])


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _svg(height: float, title: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(WIDTH, height, title)
    return head + Markup("\n").join(parts) + Markup("</svg>")
