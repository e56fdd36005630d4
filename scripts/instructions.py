"""Count the instructions of DS-CNN on a Cortex-M4, one clip, and hold them to scripts/instructions.json: 2 % more is a failure.

    python scripts/instructions.py           print the table and compare
    python scripts/instructions.py --write   record what was counted

QEMU counts every instruction that the core runs, so two runs of one build agree to the last; they are not cycles. The record names
its compiler: another one's code differs by more than 2 %. Without the data, the compiler or QEMU it says so and ends well, or
badly where ROUNDEL_STRICT_SKIPS is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from measure import CASES, DATA, ds_cnn

import roundel as rd
from roundel.exporters.c.emit import Source, emit
from roundel.graph import Graph, Node
from roundel.integer.ops import numbers
from roundel.runtimes import hostc, qemu

RECORD = Path(__file__).with_name("instructions.json")
MORE = 1.02
KINDS = ("int8", "int4", "16 clusters")


@dataclass(frozen=True)
class Count:
    """Calls of one kind: how many, their multiplications, and instructions."""

    calls: int
    macs: int
    instructions: int

    def __add__(self, other: Count) -> Count:
        return Count(self.calls + other.calls, self.macs + other.macs, self.instructions + other.instructions)


def kind(graph: Graph, node: Node | None) -> str:
    """What a call is counted as: its operation, convolutions by their form; a copy has no node."""
    if node is None:
        return "copy"
    if node.op != "conv":
        return node.op
    weight = numbers(graph, node.inputs[1])
    if node.attrs["groups"] > 1:
        return "conv, depthwise" if node.attrs["groups"] == len(weight) else "conv, grouped"
    inputs = graph.values[node.inputs[0]].shape[1]
    return "conv, pointwise" if inputs == weight[0].size else "conv"


def macs(graph: Graph, node: Node | None, outputs: int) -> int:
    """Multiplications of a layer with weights: those of one output, times outputs; 0 for anything else."""
    return outputs * numbers(graph, node.inputs[1])[0].size if node is not None and node.op in ("conv", "linear") else 0


def by_kind(graph: Graph, source: Source, counts: list[int]) -> dict[str, Count]:
    """Instructions of every call, added up by `kind`, in running order, and "in all"."""
    found: dict[str, Count] = {}
    for step, port, n in zip(source.layout.steps, source.watched, counts, strict=True):
        one = Count(1, macs(graph, step.node, port.place.count), n)
        for name in (kind(graph, step.node), "in all"):
            found[name] = found.get(name, Count(0, 0, 0)) + one
    return {name: found[name] for name in sorted(found, key="in all".__eq__)}


def counted(q: rd.QModel, clip: torch.Tensor, folder: Path) -> dict[str, Count]:
    """`by_kind` of a quantized model in C on a Cortex-M4 for one input; the build stays in ``folder``."""
    graph = rd.lower(q)
    (door,) = (node for node in graph if node.op == "quantize")
    seen: dict[str, object] = {}
    rd.simulate(graph, clip, watch=seen.__setitem__)
    source = emit(graph)
    (counts,) = qemu.count(source, hostc.inputs_of(source, {door.inputs[0]: seen[door.name]}), folder)
    return by_kind(graph, source, counts)


def clip() -> torch.Tensor:
    """The first scoring clip."""
    return CASES["DS-CNN"].score()[0].args[0][:1]


def compiler() -> str:
    """The first line in which the board's compiler says what it is."""
    done = subprocess.run([qemu.BOARDS[qemu.NAME].compiler, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def compare(found: Mapping[str, Mapping[str, Count]], record: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for every count that is over 2 % above the record or not in it, and for what the record has and nobody counted."""
    wrong = []
    for model in sorted({*found, *record}):
        now, then = found.get(model, {}), record.get(model, {})
        for name in [*now, *(name for name in then if name not in now)]:
            if name not in then:
                wrong.append(f"{model}, {name}: {now[name].instructions:,} instructions, and none on record")
            elif name not in now:
                wrong.append(f"{model}, {name}: {then[name]:,} instructions on record, and no such call any more")
            elif now[name].instructions > MORE * then[name]:
                n = now[name].instructions
                wrong.append(f"{model}, {name}: {n:,} instructions, {n / then[name] - 1:+.1%} of the {then[name]:,} on record")
    return wrong


def table(found: Mapping[str, Mapping[str, Count]], record: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Markdown: a row per kind of call; per model its instructions, those per multiplication, and the change from the record."""
    names = list(dict.fromkeys(name for counts in found.values() for name in counts))
    lines = ["| calls | multiplications | " + " | ".join(found) + " |", "| --- | --- |" + " --- |" * len(found)]
    for name in names:
        counts = [counts.get(name) for counts in found.values()]
        first = next(c for c in counts if c is not None)
        cells = []
        for model, c in zip(found, counts):
            then = record.get(model, {}).get(name)
            per = f", {c.instructions / c.macs:.3f} each" if c and c.macs and name != "in all" else ""
            cells.append(f"{c.instructions:,}{per}" + (f" ({c.instructions / then - 1:+.2%})" if then else "") if c else "")
        lines.append(f"| {name}: {first.calls} | {first.macs:,} | " + " | ".join(cells) + " |")
    return lines


def absent() -> str | None:
    """Why nothing can be counted here."""
    if not DATA.is_dir():
        return "no data here: set ROUNDEL_DATA to the folder that docs/data.md describes"
    return qemu.absent(qemu.NAME)


@click.command(help=__doc__)
@click.option("--write", is_flag=True, help="Record these counts in scripts/instructions.json.")
def main(write: bool) -> None:
    if (why := absent()) is not None:
        click.echo(f"instructions not counted: {why}")
        sys.exit(int(os.environ.get("ROUNDEL_STRICT_SKIPS", "0") != "0"))
    torch.set_num_threads(1)
    found = {}
    for model in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            found[model] = counted(ds_cnn(model), clip(), Path(folder))
    old = json.loads(RECORD.read_text()) if RECORD.exists() else {"compiler": compiler(), "counts": {}}
    click.echo("DS-CNN on a Cortex-M4, one clip, gcc -O2: instructions (change from the record)\n")
    click.echo("\n".join(table(found, old["counts"])))
    if write:
        counts = {model: {name: c.instructions for name, c in kinds.items()} for model, kinds in found.items()}
        RECORD.write_text(json.dumps({"compiler": compiler(), "counts": counts}, indent=1) + "\n")
        return
    if compiler() != old["compiler"]:
        click.echo(f"\nThe record is of {old['compiler']}; this is {compiler()}.")
    if wrong := compare(found, old["counts"]):
        click.echo("\nMore than 2 % above scripts/instructions.json:\n  " + "\n  ".join(wrong))
        click.echo("Make it cheaper, or say in the change why it is worth it and run scripts/instructions.py --write.")
        sys.exit(1)


if __name__ == "__main__":
    main()
