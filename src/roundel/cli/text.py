"""What the commands print: tables, pairs, notes, JSON and bars, all inert; what they say is decided elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ..report.text import inert, number


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> None:
    """A table for people; in a pipe the same columns padded with blanks, never wrapped or cut. ``align``: l or r per column."""
    cells = [[inert(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name, side in zip(head, align, strict=True):
            shown.add_column(name, justify="right" if side == "r" else "left", overflow="fold")
        for row in cells:
            shown.add_row(*map(Text, row))
        return Console().print(shown)
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    for row in [list(head), *cells]:
        padded = (c.rjust(w) if side == "r" else c.ljust(w) for c, w, side in zip(row, widths, align, strict=True))
        click.echo("  ".join(padded).rstrip())
    return None


def pairs(lines: Sequence[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {inert(value)}")


def notes(notes: Sequence[tuple[str, str]]) -> None:
    """Notes go to stderr: they are for people, whatever stdout is piped into."""
    for subject, sentence in notes:
        click.echo(f"note: {inert(subject)}: {inert(sentence)}", err=True)


def print_json(value: object) -> None:
    """JSON of finite numbers, others as null, so every reader takes it; ASCII, so no terminal obeys a name in it."""
    click.echo(json.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def said(value: object) -> str:
    """A value of a pair in words."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "; ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def interval_text(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar per stage with the time left, on stderr, when that is a terminal; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    words = [TextColumn(text, markup=False) for text in ("{task.description}", "{task.completed}/{task.total}")]
    with Progress(words[0], BarColumn(), words[1], TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def step(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(inert(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield step
