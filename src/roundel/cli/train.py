"""The command that trains an artifact."""

from __future__ import annotations

import click

from ..report.text import inert, number, size
from . import options
from .text import notes, progress_bars


@click.command("tune")
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--against", metavar="MODEL", required=True, help="The float model that ARTIFACT was made of: it teaches.")
@options.data(required=True)
@options.preprocess
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Batches to train on; 200 without --budget.")
@click.option("--budget", metavar="T", help="Train as long as this instead, such as 90s, 5min or 1h.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Whatever is drawn at random starts here.")
@options.state
@options.inputs
@click.option("-o", "--output", "out", metavar="OUT", required=True, help="The artifact to write.")
def tune_command(
    artifact: str, against: str, data: str, preprocess: str | None, steps: int | None, budget: str | None, seed: int,
    state: str | None, inputs: tuple[str, ...], out: str,
) -> None:  # fmt: skip
    """Train ARTIFACT towards the answers of the float model.

    No labels are needed. Formats and bytes stay; where examples held out say that it is not nearer afterwards, OUT is
    ARTIFACT as it was, and a note says so.
    """
    options.check_output(out)
    from ..data import Preprocess
    from ..qat import tune

    model = options.read_model(against, state, inputs)
    q = options.load_artifact(artifact, into=lambda: model)
    stored = q.provenance.get("preprocess")
    steps_of_data = options.steps_of(preprocess) or (Preprocess.from_dict(stored, artifact) if stored else None)
    batches = options.read_data(data, steps_of_data, against)
    with progress_bars() as progress:
        tuned = tune(q, model, data=batches, steps=steps, budget=budget, seed=seed, progress=progress)
    tuned.save(out)
    notes([(note.subject, note.text) for note in tuned.notes[len(q.notes) :]])
    click.echo(f"{inert(out)}: {size(tuned.nbytes)}, {number(tuned.bits)} bits per parameter")


COMMANDS = (tune_command,)
