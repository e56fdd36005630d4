"""The command line `roundel`: parses, calls the Python API of the same names, prints; it decides nothing itself.

Exit status: 0 fine, 1 a check missed, 2 usage or bad input (one sentence on stderr), 130 and 143 when interrupted.
torch is loaded by the commands that need it, so help and `roundel formats` answer at once.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from . import __version__
from .errors import CheckError, InputError, RoundelError
from .report.text import change, inert, number, percent, seconds, size

if TYPE_CHECKING:
    from torch import nn

    from .data import Data, Preprocess
    from .evaluate import Evaluation
    from .formats import Format
    from .qmodel import QModel
    from .report import Row

#: What `roundel formats` lists. Every N, b, K and g may be changed; any grid goes with any sharing and any stored scale.
CATALOGUE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("integers", ("int8", "int6", "int4", "int4/g32", "int3", "int2", "uint8", "uint4/g128*fp16~uint4")),
    ("floats", ("fp8", "fp8_e5m2", "fp6", "fp6_e3m2", "fp4")),
    ("microscaling", ("mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4")),
    ("tables and powers", ("nf4/g32", "iq4nl/g32", "log4", "log4:1.414", "apot4", "ternary", "binary")),
    ("learned codebooks", ("cb16/channel", "cb16/g32*int8", "cb256x2@tensor/channel", "log4:fit")),
    ("blocks of llama.cpp", ("q8_0", "q4_0", "q4_k", "q6_k", "iq4_nl")),
    ("stored floats", ("fp16", "bf16", "fp32")),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="roundel %(version)s")
def cli() -> None:
    """Make a trained model small, and prove that it still works."""


_model = click.argument("model", metavar="MODEL")
_state = click.option("--state", metavar="WEIGHTS", help="Weights for MODEL = package.module:factory, or for a bare checkpoint.")
_inputs = click.option("--inputs", metavar="T", multiple=True, help="Start at this tensor (index or name); may be repeated.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_preprocess = click.option("--preprocess", metavar="P.toml", help="How raw data becomes the model's input; stored in the artifact.")


def _data(required: bool) -> Callable[..., Any]:
    text = "Data: .npz (x and y, or named inputs), token ids (.json, .npy), text, a zip or folder of images by class."
    return click.option("--data", metavar="FILE", required=required, help=text)


# -- commands ---------------------------------------------------------------------------------------------------------


@cli.command("formats")
@click.argument("format_text", metavar="[FORMAT]", required=False)
@_json
def formats_command(format_text: str | None, as_json: bool) -> None:
    """List the formats, or explain one.

    N in intN and uintN runs from 1 to 16; any grid goes with any sharing and any stored
    scale. The explanation gives levels, what is stored beside the codes, and bits per weight.
    """
    if format_text is None:
        rows = [(kind, text, *_facts(text)) for kind, texts in CATALOGUE for text in texts]
        if as_json:
            keys = ("kind", "format", "canonical", "bits_per_weight", "levels")
            return _print_json([dict(zip(keys, row, strict=True)) for row in rows])
        lines = [(text, canonical, number(bits, 4), str(levels)) for _, text, canonical, bits, levels in rows]
        _table(("format", "canonical form", "bits/weight", "levels"), lines, "llrr")
        click.echo("\nbits/weight is for a matrix of 4096 x 4096, every stored byte counted. roundel formats FORMAT explains one.")
        return None
    explained = _explain(format_text)
    if as_json:
        return _print_json(explained)
    _pairs([(key.replace("_", " "), _said(value)) for key, value in explained.items()])
    return None


@cli.command("inspect")
@_model
@_state
@_inputs
@_json
def inspect_command(model: str, state: str | None, inputs: tuple[str, ...], as_json: bool) -> None:
    """List the tensors of a model or artifact.

    Their shapes, sizes, ranges and formats, the quantized activations, and whatever is odd about them.
    """
    from .inspect import inspect

    found = inspect(_load_artifact(model) if _is_artifact(model) else _read(model, state, inputs))
    if as_json:
        return _print_json(found.to_dict())
    lines = [(r.name, r.op, _shape(r.shape), size(r.nbytes), _interval(r.low, r.high), r.format) for r in found.tensors]
    _table(("tensor", "read by", "shape", "size", "range", "format"), lines, "lllrll")
    if found.sites:
        click.echo()
        _table(("activation", "when", "format"), [(s.name, s.when, s.format) for s in found.sites], "lll")
    if found.ops:
        ranked = sorted(found.ops.items(), key=lambda item: (-item[1], item[0]))
        click.echo("\n" + ", ".join(f"{n} {inert(op)}" for op, n in ranked))
    click.echo(f"\n{found.parameters:,} parameters, {size(found.nbytes)}, {number(found.bits)} bits per parameter")
    _notes(found.notes)
    return None


@cli.command("calibrate")
@_model
@_data(required=True)
@_preprocess
@_state
@_inputs
@click.option("-o", "--output", "out", metavar="RANGES.json", help="Save the ranges here.")
def calibrate_command(
    model: str, data: str, preprocess: str | None, state: str | None, inputs: tuple[str, ...], out: str | None
) -> None:
    """Show the range of every activation of MODEL over FILE."""
    if out is not None:
        _check_output(out)
    from .calibrate import calibrate

    batches = _load_data(data, _steps(preprocess), model)
    module = _read(model, state, inputs)
    with _progress() as progress:
        ranges = calibrate(module, batches, progress=progress)
    rows = {site: {"min": float(stats.min), "max": float(stats.max), "count": int(stats.count)} for site, stats in ranges.items()}
    lines = [(site, number(r["min"]), number(r["max"]), f"{r['count']:,}") for site, r in rows.items()]
    _table(("site", "min", "max", "values"), lines, "lrrr")
    if out is not None:
        from .files import atomic_write

        atomic_write(out, [(json.dumps(rows, indent=1) + "\n").encode()])


@cli.command("quantize")
@_model
@click.option("--weights", metavar="F", help="Format of the weights, such as int8, int4/g32, nf4/g32, cb16/channel.")
@click.option("--activations", metavar="F", help="Format of the activations: int8 (static), int8:dynamic, int8/token:dynamic.")
@_data(required=False)
@_preprocess
@click.option("--metric", metavar="M", help="Also score float and quantized model on the data by this, such as top1.")
@_inputs
@click.option("--exclude", metavar="P", multiple=True, help="Leave layers of this name pattern float; may be repeated.")
@click.option("--plan", metavar="FILE", help="Rules per layer, TOML or JSON; the last match wins.")
@click.option("--ranges", metavar="M", default="mse", show_default=True, help="minmax, average, percentile[:P], mse or kl.")
@click.option("--solver", metavar="S", default="rtn", show_default=True, help="How codes are chosen.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Whatever is drawn at random starts here.")
@click.option("--strict", is_flag=True, help="A layer left float, a fall-back or a widened format is an error.")
@_state
@click.option("-o", "--output", "out", metavar="OUT", required=True, help="The artifact to write, one safetensors file.")
def quantize_command(
    model: str, weights: str | None, activations: str | None, data: str | None, preprocess: str | None, metric: str | None,
    inputs: tuple[str, ...], exclude: tuple[str, ...], plan: str | None, ranges: str, solver: str, seed: int, strict: bool,
    state: str | None, out: str,
) -> None:  # fmt: skip
    """Quantize MODEL into OUT.

    MODEL is a file, a folder, or package.module:factory with its weights in --state.
    """
    _check_output(out)
    chosen = weights is None and plan is None
    weights = "int8" if chosen else weights
    _check_format(weights, "weight")
    _check_format(activations, "activation")
    from .plan import Plan
    from .quantize import quantize

    rules = Plan.read(plan) if plan is not None else None
    steps = _steps(preprocess)
    batches = _load_data(data, steps, model) if data is not None else None
    module = _read(model, state, inputs)
    with _progress() as progress:
        q = quantize(
            module,
            weights or "float",
            activations,
            data=batches,
            solver=solver,
            ranges=ranges,
            exclude=exclude,
            plan=rules,
            preprocess=steps,
            seed=seed,
            strict=strict,
            progress=progress,
        )
    q.save(out)
    said = [("weights", "no format was named, so int8 was chosen; roundel formats lists them")] if chosen else []
    _notes([*said, *((note.subject, note.text) for note in q.notes)])
    click.echo(f"{inert(out)}: {size(q.nbytes)}, {number(q.bits)} bits per parameter")
    if metric is not None and batches is not None:
        from .evaluate import evaluate

        seen = evaluate(q, against=module, data=batches, metric=metric, latency=False)
        click.echo(f"{inert(metric)} on the calibration data {number(seen.metric, 4)}, float {number(seen.metric_float, 4)}; "
                   "roundel evaluate measures it on data of its own")  # fmt: skip


@cli.command("evaluate")
@click.argument("artifact", metavar="OUT")
@click.option("--against", metavar="MODEL", required=True, help="The float model that OUT was made from.")
@_data(required=True)
@_preprocess
@click.option("--metric", metavar="M", help="Task metric, such as top1; without it KL, flips and SQNR only.")
@_inputs
@_state
@_json
@click.option("--report", "page", metavar="FILE.html", help="Also write a self-contained report.")
@click.option("--max-kl", type=float, metavar="NATS", help="Exit 1 when the mean KL divergence is above this.")
@click.option("--max-flips", type=float, metavar="SHARE", help="Exit 1 when more than this share of predictions changed.")
def evaluate_command(
    artifact: str, against: str, data: str, preprocess: str | None, metric: str | None, inputs: tuple[str, ...],
    state: str | None, as_json: bool, page: str | None, max_kl: float | None, max_flips: float | None,
) -> None:  # fmt: skip
    """Measure what OUT cost against the float MODEL."""
    if page is not None:
        _check_output(page)
    from .data import Preprocess
    from .evaluate import evaluate

    q = _load_artifact(artifact, into=lambda: _read(against, state, inputs))
    stored = q.provenance.get("preprocess")
    steps = _steps(preprocess) or (Preprocess.from_dict(stored, artifact) if stored else None)
    batches = _load_data(data, steps, against)
    measured = evaluate(q, against=_read(against, state, inputs), data=batches, metric=metric)
    if page is not None:
        from .report import report, write_report

        title = f"{Path(artifact).name} against {Path(against).name}"
        write_report(page, report(q, measured, title=title, name=Path(artifact).name))
    if as_json:
        _print_json(measured.to_dict())
    else:
        _pairs(_measures(measured))
        _notes([("evaluate", sentence) for sentence in measured.notes])
    for name, value, limit in (("KL divergence", measured.kl, max_kl), ("share of flips", measured.flips, max_flips)):
        if limit is not None and not (value is not None and value <= limit):
            raise CheckError(f"the {name} is {number(value)}, above the limit {number(limit)}")


@cli.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@_json
def diff_command(first: str, second: str, as_json: bool) -> None:
    """Compare two artifacts tensor by tensor."""
    from .evaluate import diff

    found = diff(_load_artifact(first), _load_artifact(second))
    if as_json:
        return _print_json([one.to_dict() for one in found])
    if not found:
        click.echo("No difference.")
        return None
    head = ("what", "name", "A", "B", "bytes A", "bytes B", "max difference", "relative")
    rows = [
        (d.kind, d.name, d.a or "–", d.b or "–", f"{d.bytes_a:,}", f"{d.bytes_b:,}", number(d.max_abs), number(d.relative))
        for d in found
    ]
    _table(head, rows, "llllrrrr")
    return None


@cli.command("demo")
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
    _check_output(str(Path(folder) / "report.html"))
    from .demo import activations_of, demo

    with _progress() as progress:
        done = demo(folder, seed=seed, progress=progress)
    head = ("weights", "mode", "size", "top1", "difference, 95 % interval", "KL, nats", "flips", "latency")
    _table(head, [_demo_row(row) for row in done.rows], "llrrrrrr")
    best = done.best
    activations = activations_of(best.series)
    flags = f"--weights {best.name}" + (f" --activations {activations}" if activations else "")
    chosen = f"{best.name}, {best.series} ({size(best.nbytes)})"
    click.echo(f"\n{done.seconds:.0f} s. Smallest with at most 1 % of predictions changed: {chosen}.")
    click.echo(f"Saved as {inert(done.artifact)}; figures and layers in {inert(done.report)}.")
    click.echo("Next, a model of your own: put it and its data in place of these (roundel quantize --help says more):\n")
    click.echo(f"  roundel quantize roundel.demo:DigitsNet --state {_quoted(done.state)} {flags} \\")
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


# -- between the commands and the API ---------------------------------------------------------------------------------


def _check_output(path: str) -> None:
    """Fail before any work when ``path`` cannot be written."""
    from .files import check_writable

    check_writable(path)


def _check_format(text: str | None, kind: Literal["weight", "activation"]) -> None:
    """Refuse a bad format text before the model is read."""
    from .plan import FLOAT, Choice

    if text is not None and text != FLOAT:
        Choice.parse(text, kind)


def _is_artifact(path: str) -> bool:
    """Whether a safetensors file says in its header that it is one of ours."""
    if not Path(path).is_file():
        return False
    from .files import open_regular, read_header

    with open_regular(path) as file:
        looks = file.read(9)[8:] == b"{"
    return looks and "roundel" in read_header(path)[1]


def _read(model: str, state: str | None, inputs: Sequence[str]) -> nn.Module:
    from .readers import read

    return read(model, inputs=[int(t) if t.lstrip("-").isdigit() else t for t in inputs] or None, state=state)


def _load_artifact(path: str, into: Callable[[], nn.Module] | None = None) -> QModel:
    """A saved model; ``into`` builds the network where the file says that only its own code can."""
    from .qmodel import External, load

    q = load(path)
    return load(path, into=into()) if into is not None and isinstance(q.structure, External) else q


def _load_data(path: str, preprocess: Preprocess | None, model: str) -> Data:
    """The data of a command line; text is cut into the tokens of the model's own folder."""
    from .data import load_data

    tokenizer = None
    if Path(model).is_dir() and path.endswith((".txt", ".txt.xz")):
        from .readers.huggingface import read_tokenizer

        tokenizer = read_tokenizer(model)
    data = load_data(path, preprocess=preprocess, tokenizer=tokenizer)
    _notes([(path, sentence) for sentence in data.notes])
    return data


def _steps(path: str | None) -> Preprocess | None:
    from .data import read_preprocess

    return read_preprocess(path) if path is not None else None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
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


# -- words ------------------------------------------------------------------------------------------------------------


def _facts(text: str, role: str = "weight") -> tuple[str, float, int | str]:
    """(canonical form, stored bits per weight on 4096 x 4096, number of levels) of a format text."""
    from .formats import Format

    parsed = Format.parse(text, "weight" if role == "weight" else "activation")
    side = 4096
    return str(parsed), 8 * parsed.nbytes((side, side)) / side**2, _levels(parsed)[0]


def _levels(parsed: Format) -> tuple[int | str, str]:
    """How many levels a format's grid has, and the levels themselves in words."""
    from .formats.grid import Codebook, Levels, Uniform, table

    grid = parsed.grid
    if isinstance(grid, Uniform):
        low, high = (int(v) for v in parsed.extremes)
        return high - low + 1, f"integers {low} to {high}"
    if isinstance(grid, Levels):
        values = table(grid.name).values
        if len(values) > 32:
            return len(values), f"{len(values)} from {values[0]:g} to {values[-1]:g}"
        return len(values), " ".join(f"{v:.4g}" for v in values)
    if isinstance(grid, Codebook):
        rule = "0 and +-b^-i with a fitted base b" if grid.law else "learned from the weights"
        return grid.k, f"{grid.k} {rule}" + (f", {grid.dim} numbers each" if grid.dim > 1 else "") + f", stored as {grid.entry}"
    return f"2^{grid.bits}", f"every {grid.name} number"


def _explain(text: str) -> dict[str, Any]:
    """What `roundel formats FORMAT` says, as plain data."""
    from .formats import Format

    parsed = Format.parse(text)
    canonical, bits, levels = _facts(text)
    activation = str(Format.parse(text, "activation"))
    stored = [("scale", parsed.scale), ("zero point", parsed.zero), ("minimum", parsed.min)]
    parts = [
        f"one {name} ({str(part).removesuffix('/tensor*one')}) {_shared(str(parsed.share))}"
        for name, part in stored
        if part is not None
    ]
    if parsed.table is not None:
        parts.insert(0, f"one table of {_levels(parsed)[1]} {_shared(str(parsed.table))}")
    low, high = parsed.extremes
    return {
        "format": text,
        "canonical": canonical,
        "as_activation": activation,
        "code_bits": parsed.bits / parsed.step,
        "bits_per_weight": bits,
        "levels": levels,
        "grid": _levels(parsed)[1],
        "lowest": low,
        "highest": high,
        "stored_beside_the_codes": parts,
    }


def _shared(share: str) -> str:
    words = {"tensor": "for the tensor", "channel": "per output channel", "token": "per token", "model": "for the whole model"}
    if share in words:
        return words[share]
    return f"per {share[1:]} columns of a row" if share.startswith("g") else f"per block of {share[1:]}"


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


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "; ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def _notes(notes: Sequence[tuple[str, str]]) -> None:
    """Notes go to stderr: they are for people, whatever stdout is piped into."""
    for subject, sentence in notes:
        click.echo(f"note: {inert(subject)}: {inert(sentence)}", err=True)


def _pairs(lines: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {inert(value)}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> None:
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


def _print_json(value: object) -> None:
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


# -- the way in and out -----------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with the status the file's docstring lists."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        cli.main(list(sys.argv[1:] if args is None else args) or ["--help"], prog_name="roundel", standalone_mode=False)
        sys.stdout.flush()
    except CheckError as err:
        _exit(1, str(err))
    except click.ClickException as err:
        hint = f" (see {err.ctx.command_path} --help)" if isinstance(err, click.UsageError) and err.ctx else ""
        _exit(2, err.format_message().rstrip(".") + hint)
    except (RoundelError, MemoryError) as err:
        _exit(2, str(err) or "there is not enough memory for this model")
    except (KeyboardInterrupt, click.Abort):
        _exit(130, "interrupted")
    except BrokenPipeError:
        # The reader of a pipe has gone, as `head` does; keep the interpreter from flushing into it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as err:
        place = f"{err.filename}: " if err.filename else ""
        _exit(2, f"{place}{err.strerror or err}")


def _terminated(*_: object) -> None:
    click.echo("roundel: terminated", err=True)
    sys.exit(143)


def _exit(status: int, sentence: str) -> None:
    click.echo(f"roundel: {inert(' '.join(sentence.split()))}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
