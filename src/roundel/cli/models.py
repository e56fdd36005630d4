"""The commands that look at a model, take its ranges, quantize it, and compare two artifacts."""

from __future__ import annotations

import json

import click

from ..errors import InputError
from ..report.text import inert, number, size
from . import options
from .text import interval_text, notes, print_json, progress_bars, shape_text, table

#: What `roundel.quantize` knows by name, written again because it lives with torch.
EFFORTS = ("fast", "default", "best")
SOLVERS = ("rtn", "hqq", "gptq", "descent", "alternate")


@click.command("inspect")
@options.model
@options.state
@options.inputs
@options.as_json
def inspect_command(model: str, state: str | None, inputs: tuple[str, ...], as_json: bool) -> None:
    """List the tensors of a model or artifact.

    Their shapes, sizes, ranges and formats, the quantized activations, and whatever is odd about them.
    """
    from ..inspect import inspect

    found = inspect(options.load_artifact(model) if options.is_artifact(model) else options.read_model(model, state, inputs))
    if as_json:
        return print_json(found.to_dict())
    lines = [(r.name, r.op, shape_text(r.shape), size(r.nbytes), interval_text(r.low, r.high), r.format) for r in found.tensors]
    table(("tensor", "read by", "shape", "size", "range", "format"), lines, "lllrll")
    if found.sites:
        click.echo()
        table(("activation", "when", "format"), [(s.name, s.when, s.format) for s in found.sites], "lll")
    if found.ops:
        ranked = sorted(found.ops.items(), key=lambda item: (-item[1], item[0]))
        click.echo("\n" + ", ".join(f"{n} {inert(op)}" for op, n in ranked))
    click.echo(f"\n{found.parameters:,} parameters, {size(found.nbytes)}, {number(found.bits)} bits per parameter")
    notes(found.notes)
    return None


@click.command("calibrate")
@options.model
@options.data(required=True)
@options.preprocess
@options.state
@options.inputs
@click.option("-o", "--output", "out", metavar="RANGES.json", help="Save the ranges here.")
def calibrate_command(
    model: str, data: str, preprocess: str | None, state: str | None, inputs: tuple[str, ...], out: str | None
) -> None:
    """Show the range of every activation of MODEL over FILE."""
    if out is not None:
        options.check_output(out)
    from ..calibrate import calibrate

    batches = options.read_data(data, options.steps_of(preprocess), model)
    module = options.read_model(model, state, inputs)
    with progress_bars() as progress:
        ranges = calibrate(module, batches, progress=progress)
    rows = {site: {"min": float(stats.min), "max": float(stats.max), "count": int(stats.count)} for site, stats in ranges.items()}
    lines = [(site, number(r["min"]), number(r["max"]), f"{r['count']:,}") for site, r in rows.items()]
    table(("site", "min", "max", "values"), lines, "lrrr")
    notes(options.read_notes(model, module))
    if out is not None:
        from ..files import atomic_write

        atomic_write(out, [(json.dumps(rows, indent=1) + "\n").encode()])


@click.command("quantize")
@options.model
@click.option("--weights", metavar="F", help="Format of the weights, such as int4/g32 or cb16/channel, or a size: '4.25 bits'.")
@click.option("--activations", metavar="F", help="Format of the activations: int8 (static), int8:dynamic, int8/token:dynamic.")
@options.data(required=False)
@options.preprocess
@options.metric
@options.inputs
@click.option("--exclude", metavar="P", multiple=True, help="Leave layers of this name pattern float; may be repeated.")
@click.option("--plan", metavar="FILE", help="Rules per layer, TOML or JSON; the last match wins.")
@click.option("--ranges", metavar="M", default="mse", show_default=True, help="minmax, average, percentile[:P], mse or kl.")
@click.option(
    "--effort", metavar="E", type=click.Choice(EFFORTS), default="fast", show_default=True,
    help="fast: round to nearest, seconds; default: GPTQ, minutes; best: blocks are trained too.",
)  # fmt: skip
@click.option("--budget", metavar="T", help="When --effort best is to end, such as 90s, 5min or 1h; judging it is not cut short.")
@click.option("--loss", type=float, metavar="X", help="Go no farther than to this divergence from the float model.")
@click.option("--solver", metavar="S", type=click.Choice(SOLVERS), help="Name what chooses the codes outright.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Whatever is drawn at random starts here.")
@click.option("--strict", is_flag=True, help="A layer left float, a fall-back or a widened format is an error.")
@click.option("--memory", metavar="SIZE", help="Read, solve and write a folder block by block in at most this much, such as 2GB.")
@click.option("--entropy", is_flag=True, help="Store the codes entropy-coded: a smaller file of the same model, slower to read.")
@options.state
@click.option("-o", "--output", "out", metavar="OUT", required=True, help="The artifact to write, one safetensors file.")
def quantize_command(
    model: str, weights: str | None, activations: str | None, data: str | None, preprocess: str | None, metric: str | None,
    inputs: tuple[str, ...], exclude: tuple[str, ...], plan: str | None, ranges: str, effort: str, budget: str | None,
    loss: float | None, solver: str | None, seed: int, strict: bool, memory: str | None, entropy: bool, state: str | None, out: str,
) -> None:  # fmt: skip
    """Quantize MODEL into OUT.

    MODEL is a file, a folder, or package.module:factory with its weights in --state. Where DATA
    has labels, or with --metric, both models are scored on it as well. With --memory the same command,
    run again, goes on where it was stopped.
    """
    options.check_output(out)
    if memory is not None and (metric or state or inputs or entropy):
        raise InputError("--memory streams a folder that is never held whole: leave --metric, --state, --inputs, --entropy away")
    if metric is not None and data is None:
        raise InputError("--metric scores the models on data: give --data as well")
    if plan is not None and not weights is activations is None:
        raise InputError(
            "--plan says how weights and activations are treated: leave --weights and --activations away, or add a rule"
        )
    chosen = weights is None and plan is None
    weights = "int8" if chosen else weights
    from ..plan import Plan, size_of

    if size_of(weights) is None:
        options.check_format(weights, "weight")
    options.check_format(activations, "activation")
    from ..quantize import quantize

    rules = Plan.read(plan) if plan is not None else None
    steps = options.steps_of(preprocess)
    batches = options.read_data(data, steps, model) if data is not None else None
    module = options.read_model(model, state, inputs) if memory is None else None
    scoring = options.scoring_of(metric, module, batches) if module is not None else None
    with progress_bars() as progress:
        q = quantize(
            model if module is None else module,
            weights or "float",
            activations,
            data=batches,
            effort=effort,
            budget=budget,
            loss=loss,
            solver=solver,
            ranges=ranges,
            exclude=exclude,
            plan=rules,
            preprocess=steps,
            seed=seed,
            strict=strict,
            memory=memory,
            output=None if module is not None else out,
            progress=progress,
        )
    seen = None
    if scoring is not None and module is not None:
        from ..evaluate import evaluate

        seen = evaluate(q, against=module, data=batches, metric=scoring, latency=False, layers=False)
    if module is not None:
        q.save(out, entropy=entropy)
    said = [("weights", "no format was named, so int8 was chosen; roundel formats lists them")] if chosen else []
    if options.given("ranges") and not any(a.when == "static" for a in q.activations.values()):
        said.append(("ranges", f"--ranges {ranges} had no effect: no activation is static"))
    if effort != "fast" and batches is None:
        said.append(("effort", f"--effort {effort} had no effect: it learns from --data, and there is none"))
    read = options.read_notes(model, module) if module is not None else []
    notes([*read, *said, *((note.subject, note.text) for note in q.notes)])
    click.echo(f"{inert(out)}: {size(q.nbytes)}, {number(q.bits)} bits per parameter")
    if memory is not None:
        from ..quantize.memory import bytes_of, peak

        most = peak()
        click.echo(f"at most {size(most)} of memory was in use, of {memory} allowed", err=True)
        if most > bytes_of(memory):
            click.echo(f"warning: that is {size(most - bytes_of(memory))} more than --memory allows; the file is whole", err=True)
    if seen is not None:
        notes([("data", sentence) for sentence in seen.notes])
        click.echo(f"{seen.metric_name} on the calibration data {number(seen.metric, 4)}, float {number(seen.metric_float, 4)}; "
                   "roundel evaluate measures it on data of its own")  # fmt: skip


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.as_json
def diff_command(first: str, second: str, as_json: bool) -> None:
    """Compare two artifacts tensor by tensor."""
    from ..evaluate import diff

    found = diff(options.load_artifact(first), options.load_artifact(second))
    if as_json:
        return print_json([one.to_dict() for one in found])
    if not found:
        click.echo("No difference.")
        return None
    head = ("what", "name", "A", "B", "bytes A", "bytes B", "max difference", "relative")
    rows = [
        (d.kind, d.name, d.a or "–", d.b or "–", f"{d.bytes_a:,}", f"{d.bytes_b:,}", number(d.max_abs), number(d.relative))
        for d in found
    ]
    table(head, rows, "llllrrrr")
    return None


COMMANDS = (inspect_command, calibrate_command, quantize_command, diff_command)
