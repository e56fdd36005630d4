"""The commands that measure: `roundel evaluate`, and `roundel demo` with its table."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import CheckError, InputError
from ..report.text import change, inert, number, percent, seconds, size
from . import options
from .text import notes, pairs, print_json, progress_bars, table

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..report import Row


@click.command("evaluate")
@click.argument("artifact", metavar="OUT")
@click.option("--against", metavar="MODEL", required=True, help="The float model that OUT was made from.")
@options.data(required=True)
@options.preprocess
@options.metric
@options.inputs
@options.state
@options.as_json
@click.option("--report", "page", metavar="FILE.html", help="Also write a self-contained report.")
@click.option("--max-kl", type=float, metavar="NATS", help="Exit 1 when the mean KL divergence is above this.")
@click.option("--max-flips", type=float, metavar="SHARE", help="Exit 1 when more than this share of predictions changed.")
def evaluate_command(
    artifact: str, against: str, data: str, preprocess: str | None, metric: str | None, inputs: tuple[str, ...],
    state: str | None, as_json: bool, page: str | None, max_kl: float | None, max_flips: float | None,
) -> None:  # fmt: skip
    """Measure what OUT cost against the float MODEL.

    The keys of the JSON are the attributes of roundel.Evaluation: sizes in bytes, KL in nats, SQNR
    in dB, shares of 1, latencies in seconds per forward of one example.
    """
    if page is not None:
        options.check_output(page)
    from ..data import Preprocess
    from ..evaluate import evaluate

    q = options.load_artifact(artifact, into=lambda: options.read_model(against, state, inputs))
    stored = q.provenance.get("preprocess")
    steps = options.steps_of(preprocess) or (Preprocess.from_dict(stored, artifact) if stored else None)
    batches = options.read_data(data, steps, against)
    module = options.read_model(against, state, inputs)
    measured = evaluate(q, against=module, data=batches, metric=metric)
    notes(options.read_notes(against, module))
    if page is not None:
        from ..report import report, write_report

        title = f"{Path(artifact).name} against {Path(against).name}"
        write_report(page, report(q, measured, title=title, name=Path(artifact).name))
    if as_json:
        print_json(measured.to_dict())
    else:
        pairs(_measures(measured))
        notes([("evaluate", sentence) for sentence in measured.notes])
    for name, value, limit in (("KL divergence", measured.kl, max_kl), ("share of flips", measured.flips, max_flips)):
        if limit is not None and not (value is not None and value <= limit):
            raise CheckError(f"the {name} is {number(value)}, above the limit {number(limit)}")


def _measures(measured: Evaluation) -> list[tuple[str, str]]:
    """The lines that `roundel evaluate` prints."""
    disk = f", on disk {size(measured.disk)}" if measured.disk is not None else ""
    lines = [("size", f"{size(measured.nbytes)}, float {size(measured.nbytes_float)}{disk}")]
    if measured.metric is not None:
        name = measured.metric_name
        low, high = measured.interval or (None, None)
        lines.append((name, f"{number(measured.metric, 4)}, float {number(measured.metric_float, 4)}"))
        lines.append(("difference", f"{change(measured.difference, name)} [{change(low, name)}, {change(high, name)}] (95 %)"))
    if measured.kl is not None:
        lines.append(("KL divergence", f"{number(measured.kl)} nats, 99th percentile {number(measured.kl_p99)}"))
    if measured.flips is not None:
        lines.append(("flips", percent(measured.flips)))
    if measured.sqnr is not None:
        lines.append(("SQNR", f"{number(measured.sqnr)} dB end to end"))
    worst = sorted(measured.layers.items(), key=lambda item: item[1])[:3]
    if worst:
        lines.append(("worst layers", ", ".join(f"{name} {number(sqnr)} dB" for name, sqnr in worst)))
    if measured.latency and measured.latency_float:
        times = [f"{seconds(t.median)} (p99 {seconds(t.p99)})" for t in (measured.latency, measured.latency_float)]
        lines.append(("latency", ", float ".join(times)))
    if measured.peak_memory is not None:
        lines.append(("peak memory", size(measured.peak_memory)))
    return lines


@click.command("demo")
@click.option("-o", "--output", "folder", metavar="FOLDER", default="out", show_default=True, help="Where its files go.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Whatever is drawn at random starts here.")
def demo_command(folder: str, seed: int) -> None:
    """Train, quantize and measure on real digits.

    A small network, three modes, 8 to 2 bits: what each format costs in size, accuracy and time.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except FileExistsError as err:
        raise InputError(f"cannot use {inert(folder)} as a folder: it is a file") from err
    options.check_output(str(Path(folder) / "report.html"))
    from ..demo import activations_of, demo

    with progress_bars() as progress:
        done = demo(folder, seed=seed, progress=progress)
    head = ("weights", "mode", "size", "top1", "difference, 95 % interval", "KL, nats", "flips", "latency")
    table(head, [_demo_row(row) for row in done.rows], "llrrrrrr")
    best = done.best
    activations = activations_of(best.series)
    flags = f"--weights {best.name}" + (f" --activations {activations}" if activations else "")
    chosen = f"{best.name}, {best.series} ({size(best.nbytes)})"
    click.echo(f"\n{done.seconds:.0f} s. Smallest with at most 1 % of predictions changed: {chosen}.")
    click.echo(f"Saved as {inert(done.artifact)}; figures and layers in {inert(done.report)}.")
    click.echo("Next, a model of your own: put it and its data in place of these (roundel quantize --help says more):\n")
    click.echo(f"  {_command()} quantize roundel.demo:DigitsNet --state {_quoted(done.state)} {flags} \\")
    click.echo(f"    --data {_quoted(done.calibration)} --metric top1 -o {_quoted(done.artifact.with_name('mine.safetensors'))}")


def _demo_row(row: Row) -> tuple[str, ...]:
    low, high = row.interval or (None, None)
    spread = (
        f"{change(row.difference, 'top1')} [{change(low, 'top1')}, {change(high, 'top1')}]" if row.difference is not None else ""
    )
    return (row.name, row.series, size(row.nbytes), percent(row.metric, 1), spread, number(row.kl) if row.kl is not None else "",
            percent(row.flips, 1) if row.flips is not None else "", seconds(row.latency))  # fmt: skip


def _quoted(path: Path) -> str:
    return shlex.quote(inert(path))


def _command() -> str:
    """How a shell here starts this program: by name where that is found, else by its path."""
    script = Path(sys.executable).with_name("roundel")
    if shutil.which("roundel") or not script.exists():
        return "roundel"
    return _quoted(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


COMMANDS = (evaluate_command, demo_command)
