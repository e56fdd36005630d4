"""The command that explains: `roundel diagnose`, what makes an artifact worse than its float model; it finds nothing itself."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import click

from ..report.text import number, percent
from . import options
from .text import notes, print_json, table

if TYPE_CHECKING:
    from ..diagnose import Finding


@click.command("diagnose")
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--against", metavar="MODEL", required=True, help="The float model that ARTIFACT was made from.")
@options.data(required=True)
@options.preprocess
@options.inputs
@options.state
@click.option("--no-vnni", is_flag=True, help="Judge as x86 without VNNI computes: pairs of u8 x s8 products in 16 bits.")
@click.option("--apply", "output", metavar="OUT", help="Apply the first finding's cure and write what it makes here.")
@options.as_json
def diagnose_command(
    artifact: str, against: str, data: str, preprocess: str | None, inputs: tuple[str, ...], state: str | None, no_vnni: bool,
    output: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Find out why ARTIFACT is worse than MODEL.

    Each cure was made and measured: a line says how much of the loss it takes away, on examples it
    was not made from. Findings exclude each other more often than they add up, so apply the first
    and diagnose again. A healthy artifact has none. The keys of the JSON are the attributes of
    roundel.diagnose.Finding.
    """
    if output is not None:
        options.check_output(output)
    from ..data import Preprocess
    from ..diagnose import diagnose
    from ..errors import CheckError

    q = options.load_artifact(artifact, into=lambda: options.read_model(against, state, inputs))
    stored = q.provenance.get("preprocess")
    steps = options.steps_of(preprocess) or (Preprocess.from_dict(stored, artifact) if stored else None)
    batches = options.read_data(data, steps, against)
    module = options.read_model(against, state, inputs)
    notes(options.read_notes(against, module))
    found = diagnose(q, module, batches, vnni=not no_vnni)
    if as_json:
        print_json([{f.name: getattr(one, f.name) for f in fields(one) if f.name not in ("model", "mend")} for one in found])
    elif found:
        table(("layer", "cause", "loss", "with the cure", "gain", "cure"), [_row(one) for one in found], "llrrrl")
    else:
        click.echo("nothing found")
    if output is None:
        return
    if not found:
        raise CheckError("there is nothing to apply: no cure was found that clears the noise")
    if found[0].mend is not None:
        notes([(found[0].layer, f"the data have to be prepared otherwise, which no artifact can do: {found[0].cure}")])
    found[0].model.save(output)


def _row(one: Finding) -> tuple[str, ...]:
    return (
        one.layer,
        one.cause,
        f"{number(one.before)} {one.unit}",
        number(one.after),
        percent(one.gain / one.before, 0),
        one.cure,
    )


COMMANDS = (diagnose_command,)
