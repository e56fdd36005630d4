"""The self-contained report page: figures, tables, notes and provenance; it measures nothing and loads nothing from outside.

One HTML file under 100 kB: styles and figures are inline, there is no script, and a content policy forbids both scripts and
requests, so names taken from a hostile model stay text. It follows the reader's light or dark setting and prints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from . import svg, text
from .memory import Memory, memory

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..network.running import Course
    from ..qmodel import QModel

__all__ = ["Layer", "Memory", "Report", "Row", "memory", "render", "report", "row", "write_report"]

#: Largest page, in bytes, and how many of the worst layers it names.
MAX_BYTES, MAX_WORST = 100_000, 10


@dataclass(frozen=True)
class Row:
    """One measured model: sizes in bytes, ``bits`` per parameter, ``kl`` in nats, ``flips`` a share, ``latency`` in seconds.

    ``difference`` is the metric's against the float model (for perplexity relative), ``interval`` its paired 95 % interval.
    ``series`` groups marks of one shape (such as the mode); ``reference`` marks the float model.
    """

    name: str
    nbytes: int
    bits: float | None = None
    metric: float | None = None
    kl: float | None = None
    flips: float | None = None
    latency: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    series: str = ""
    reference: bool = False


@dataclass(frozen=True)
class Layer:
    """How much of one layer's signal is left: ``sqnr`` in dB of its output against the float model's, +inf for no loss."""

    name: str
    sqnr: float
    format: str = ""
    nbytes: int | None = None


@dataclass(frozen=True)
class Report:
    """All that a page says. ``notes`` are (subject, sentence) pairs; ``layers`` belong to the row named ``layers_of``.

    ``memory``: the arena of the model in C, or why it has none. ``ranges``: what running ranges did over the data, site by site.
    """

    title: str
    rows: tuple[Row, ...]
    layers: tuple[Layer, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)
    metric_name: str = "metric"
    layers_of: str = ""
    summary: str = ""
    memory: Memory | None = None
    ranges: Mapping[str, Course] = field(default_factory=dict)


def row(name: str, measured: Evaluation, *, series: str = "", bits: float | None = None) -> Row:
    """A `Row` from what `roundel.evaluate` returned."""
    return Row(
        name,
        measured.nbytes,
        bits,
        measured.metric,
        measured.kl,
        measured.flips,
        measured.latency.median if measured.latency else None,
        measured.difference,
        measured.interval,
        series,
    )


def float_row(measured: Evaluation, name: str = "float") -> Row:
    """The reference `Row` of the float model that ``measured`` was compared with."""
    latency = measured.latency_float.median if measured.latency_float else None
    return Row(name, measured.nbytes_float, 32.0, measured.metric_float, latency=latency, reference=True)


def layers(q: QModel, measured: Evaluation) -> tuple[Layer, ...]:
    """One `Layer` per site that was measured, in network order, with its weight's format where it has one."""
    found = []
    for site, sqnr in measured.layers.items():
        weight = q.tensors.get(f"{site}.weight")
        found.append(Layer(site, sqnr, str(weight.format) if weight else "", weight.nbytes if weight else None))
    return tuple(found)


def report(q: QModel, measured: Evaluation, *, title: str, name: str) -> Report:
    """The page of one quantized model against its float original."""
    return Report(
        title=title,
        rows=(float_row(measured), row(name, measured, bits=q.bits)),
        layers=layers(q, measured),
        notes=(*((note.subject, note.text) for note in q.notes), *(("evaluate", sentence) for sentence in measured.notes)),
        provenance=q.provenance,
        metric_name=measured.metric_name,
        layers_of=name,
        memory=memory(q),
        ranges=measured.ranges,
    )


def write_report(path: str | os.PathLike[str], page: Report) -> None:
    """Write `render` of ``page`` to ``path``, whole or not at all."""
    from ..files import atomic_write  # here, because it loads torch and the command line wants this package's words without

    atomic_write(path, [render(page).encode()])


def render(page: Report) -> str:
    """The page as HTML. What would not fit in 100 kB is counted on it instead of shown: rows, notes and provenance by halves."""
    for most in (80, 40, 20, 10, 5):
        html = _render(page, most)
        if len(html.encode()) < MAX_BYTES:
            break
    return html


def _render(page: Report, most: int) -> str:
    """The page with ``most`` rows, notes and lines of provenance at most."""
    import jinja2

    rows, arena = page.rows[:most], page.memory
    blocks = sorted(arena.blocks, key=lambda b: -b.nbytes * (b.stop - b.start))[: 2 * most] if arena else []
    reference = next((row for row in rows if row.reference), None)
    ranked = sorted((layer for layer in page.layers if layer.sqnr != math.inf), key=lambda layer: _lowest(layer.sqnr))
    courses = sorted(page.ranges.items(), key=lambda named: -named[1].moved)
    figures = (_kl_figure(rows, reference), _metric_figure(rows, reference, page.metric_name))
    env = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for word in (text.inert, text.short, text.size, text.number, text.percent, text.seconds, text.change):
        env.filters[word.__name__] = word
    return env.get_template("page.html.jinja").render(
        page=page,
        reference=reference,
        figures=[figure for figure in figures if figure],
        bars=svg.bars([(layer.name, layer.sqnr) for layer in page.layers], label="SQNR of the layer's output, dB"),
        worst=ranked[:MAX_WORST],
        arena=svg.arena(blocks, calls=arena.calls, nbytes=arena.nbytes, bound=arena.bound) if arena and blocks else None,
        undrawn=len(arena.blocks) - len(blocks) if arena else 0,
        ranges=_ranges_figure(courses[:most]),
        drawn=min(most, len(courses)),
        courses=courses[:MAX_WORST],
        rows=rows,
        notes=page.notes[:most],
        shows={name: any(getattr(row, name) is not None for row in rows) for name in Row.__dataclass_fields__},
        provenance=_flat(page.provenance)[:most],
        count=text.count,
    )


def _lowest(sqnr: float) -> float:
    return -math.inf if math.isnan(sqnr) else sqnr


def _kl_figure(rows: Sequence[Row], reference: Row | None) -> tuple[Markup, str] | None:
    return _figure(rows, reference, "kl", "mean KL(float ‖ quantized), nats", "lower is better", y_log=True)


def _metric_figure(rows: Sequence[Row], reference: Row | None, name: str) -> tuple[Markup, str] | None:
    if name in ("perplexity", "mse"):
        return _figure(rows, reference, "metric", name, "lower is better")
    return _figure(rows, reference, "metric", text.short(name), "higher is better", larger_is_better=True)


def _ranges_figure(courses: Sequence[tuple[str, Course]]) -> Markup | None:
    """The width of each range over the samples, in widths of where it started."""
    series = []
    for name, course in courses:
        start = course.start[1] - course.start[0]
        series.append((name, [(high - low) / start for low, high in zip(course.low, course.high, strict=True)]))
    if not series:
        return None
    return svg.lines(series, samples=courses[0][1].samples, label="width of the range, in widths of the one it started from")


def _figure(
    rows: Sequence[Row],
    reference: Row | None,
    value_of: str,
    y_label: str,
    sense: str,
    *,
    y_log: bool = False,
    larger_is_better: bool = False,
) -> tuple[Markup, str] | None:
    """A trade-off plot of one field against size and the sentence below it, or None when no row has the field."""
    measured = [(row, getattr(row, value_of)) for row in rows if not row.reference]
    finite = [(row, value) for row, value in measured if value is not None and math.isfinite(value)]
    points = [svg.Point(row.name, row.nbytes, value, row.series) for row, value in finite]
    if not points:
        return None
    value = getattr(reference, value_of) if reference else None
    drawn = None
    if reference and (y_log or (value is not None and math.isfinite(value))):
        drawn = svg.Point(reference.name, reference.nbytes, value or 0.0)
    sizes = [p.x for p in points] + ([drawn.x] if drawn else [])
    figure = svg.tradeoff(
        points,
        x_label="size of the model, all bytes counted",
        y_label=y_label,
        x_text=lambda nbytes: text.size(nbytes, "{:.4g}".format),
        x_log=max(sizes) > 4 * max(min(sizes), 1),
        y_log=y_log,
        larger_is_better=larger_is_better,
        reference=drawn,
    )
    words = [f"Size against {y_label}; {sense}. Filled marks and the staircase are the Pareto front."]
    if zeros := sum(y_log and p.y <= 0 for p in points):
        words.append(f"{text.count(zeros, 'row')} of exactly zero at the lower edge.")
    if lost := sum(value is not None for _, value in measured) - len(points):
        words.append(f"{text.count(lost, 'row')} without a finite value not drawn.")
    return figure, " ".join(words)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as (dotted name, short text) lines."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", text.short(value, 160)))
    return lines
