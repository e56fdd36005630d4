"""The exported C with and without CMSIS-NN, whose source is the user's: codes that differ, and instructions layer by layer.

    python scripts/cmsis_nn.py /path/to/CMSIS-NN [--model ResNet-20] [--board qemu-cortex-m55] [--dialect R1] [--level -O3]

CMSIS-NN (Apache-2.0, Arm) is compiled from the folder given, rounding as the network does, and called where docs/firmware.md says;
QEMU counts both. It keeps nothing of CMSIS-NN.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import click
import instructions
import measure
import numpy as np
import torch

import roundel as rd
from roundel.exporters.c.cmsis import BUILDS
from roundel.exporters.c.emit import Source, emit
from roundel.exporters.c.project import examples, simulated
from roundel.runtimes import hostc, qemu

#: Folders of CMSIS-NN's Source that its convolutions need.
ROOMS = ("ConvolutionFunctions", "FullyConnectedFunctions", "NNSupportFunctions", "PadFunctions", "TransposeFunctions")

_STRING = "#include <stddef.h>\nvoid *memcpy(void *, const void *, size_t);\nvoid *memset(void *, int, size_t);\n"


def flags(source: Path, rounding: str, folder: Path) -> list[str]:
    """What a file that includes CMSIS-NN's headers is compiled with; ``folder`` gets a string.h, which bare compilers lack."""
    (folder / "string.h").write_text(_STRING)
    single = ["-DCMSIS_NN_USE_SINGLE_ROUNDING"] if BUILDS[rounding][0] else []
    return [*single, "-isystem", str(source / "Include"), "-isystem", str(folder)]


def library(source: Path, rounding: str, name: str, folder: Path, level: str = "-O2") -> Path:
    """CMSIS-NN of the folder ``source`` for the board ``name``, rounding as R1 or R2, as a library in ``folder``."""
    board = qemu.BOARDS[name]
    code = [
        str(p) for room in ROOMS for p in sorted((source / "Source" / room).glob("*.c")) if not p.stem.endswith(("_f16", "_f32"))
    ]
    options = ["-std=gnu99", level, "-w", "-ffunction-sections", "-fno-tree-loop-distribute-patterns"]
    command = [board.compiler, *board.core, *options, *flags(source, rounding, folder), "-c", *code]
    subprocess.run(command, cwd=folder, check=True)
    archive = [board.compiler.replace("gcc", "ar"), "rcs", "cmsis_nn.a", *(p.name for p in folder.glob("arm_*.o"))]
    subprocess.run(archive, cwd=folder, check=True)
    return folder / "cmsis_nn.a"


def differing(graph: rd.Graph, source: Source, codes: dict[str, np.ndarray], elf: Path, name: str) -> tuple[int, int]:
    """(codes of the board's that `simulate` does not have, all)."""
    raw, _ = qemu.play(elf, qemu.counted(source, hostc.inputs_of(source, codes)), name)
    got, want = hostc.values(source, graph, codes, raw), simulated(graph, codes)
    names = [node.name for node in graph if node.op != "dequantize"]
    return sum(int(np.count_nonzero(got[n] != want[n])) for n in names), sum(want[n].size for n in names)


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="DS-CNN", type=click.Choice(["DS-CNN", "ResNet-20"]), help="The network.")
@click.option("--board", default=qemu.NAME, help="The board.")
@click.option("--dialect", default="R2", type=click.Choice(list(BUILDS)), help="The rounding, of the network and of CMSIS-NN.")
@click.option("--level", default="-O2", help="The compiler's optimisation, for both.")
def main(source: Path, model: str, board: str, dialect: str, level: str) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    case = measure.CASES[model]
    graph = rd.lower(rd.quantize(case.model(), "int8", "int8", data=case.calibrate()), dialect)
    made = emit(graph)
    if made.cmsis is None or made.cmsis_arena is None:
        raise click.ClickException("no call of this network can go to CMSIS-NN")
    codes = {name: some[:1] for name, some in examples(graph).items()}
    sent = hostc.inputs_of(made, codes)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, tempfile.TemporaryDirectory() as three:
        built = library(source.resolve(), dialect, board, Path(one), level)
        options = (level, "-DROUNDEL_CMSIS_NN", *flags(source.resolve(), dialect, Path(one)))
        ours = qemu.count(made, sent, Path(two), board, (level,))[0]
        other = qemu.count(made, sent, Path(three), board, options, ["-Wl,--gc-sections", built])[0]
        elf = qemu.link([made], Path(three), board, options, libraries=["-Wl,--gc-sections", built])
        wrong, total = differing(graph, made, codes, elf, board)
    command = f"python scripts/cmsis_nn.py CMSIS-NN --model {model} --board {board} --dialect {dialect} --level {level}"
    click.echo(f"`{command}`\n\n| layer | multiplications | ours | per MAC | CMSIS-NN | per MAC | ratio |\n|" + " --- |" * 7)
    totals = [0, 0, 0]
    for step, port, a, b in zip(made.layout.steps, made.watched, ours, other):
        if step.output not in made.cmsis.sent:
            continue
        macs = instructions.macs(graph, step.node, port.place.count)
        totals = [totals[0] + macs, totals[1] + a, totals[2] + b]
        click.echo(f"| {step.output} | {macs:,} | {a:,} | {a / macs:.2f} | {b:,} | {b / macs:.2f} | {a / b:.2f} |")
    macs, a, b = totals
    click.echo(f"| together | {macs:,} | {a:,} | {a / macs:.2f} | {b:,} | {b / macs:.2f} | {a / b:.2f} |")
    click.echo(f"| all calls | | {sum(ours):,} | | {sum(other):,} | | {sum(ours) / sum(other):.2f} |\n")
    click.echo(f"{wrong} of {total:,} codes differ. Arena {made.arena.nbytes:,} bytes, {made.cmsis_arena.nbytes:,} with CMSIS-NN.")


if __name__ == "__main__":
    main()
