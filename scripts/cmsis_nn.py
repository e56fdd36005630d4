"""Instructions on a Cortex-M4, layer by layer: the exported C against CMSIS-NN, whose source is the user's.

    python scripts/cmsis_nn.py /path/to/CMSIS-NN [--level -O2]

CMSIS-NN (Apache-2.0, Arm) is compiled from the folder given, with its single rounding, and called on layers of the same sizes; both
are counted by QEMU. It compares no codes, and keeps nothing of CMSIS-NN.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import measure
import torch

import roundel as rd
from roundel.exporters.c.emit import emit
from roundel.exporters.c.project import examples
from roundel.graph import Graph, Node
from roundel.runtimes import hostc, qemu

BOARD = qemu.BOARDS["qemu-cortex-m4"]
PLAIN = [BOARD.compiler, *BOARD.core, "-ffreestanding"]

_MAIN = """\
#include "arm_nnfunctions.h"
#include "semihosting.h"
static int8_t x[65536], w[65536], y[65536];
static int32_t bias[512], multiplier[512], shift[512], buffer[65536];
__attribute__((noinline)) void watch(void);
void watch(void) { __asm__ volatile(""); }
/* By words, as a C library does it: the M4 reads words at any address. */
void *memcpy(void *to, const void *from, size_t n)
{
    uint32_t *a = to;
    const uint32_t *b = from;
    for (; n >= 16; n -= 16, a += 4, b += 4) { a[0] = b[0]; a[1] = b[1]; a[2] = b[2]; a[3] = b[3]; }
    for (; n >= 4; n -= 4) { *a++ = *b++; }
    char *c = (char *)a;
    for (const char *d = (const char *)b; n; n--) { *c++ = *d++; }
    return to;
}
void *memset(void *to, int value, size_t n)
{
    uint32_t *a = to;
    const uint32_t word = (unsigned char)value * 0x01010101u;
    for (; n >= 4; n -= 4) { *a++ = word; }
    for (char *c = (char *)a; n; n--) { *c++ = (char)value; }
    return to;
}
int main(void)
{
    int i;
    for (i = 0; i < 512; i++) { multiplier[i] = 1 << 30; shift[i] = -8; }
    open_file("out", 5);
    watch();
@calls@
    return 0;
}
"""


def _dims(n: int, h: int, w: int, c: int) -> str:
    return f"&(cmsis_nn_dims){{{n}, {h}, {w}, {c}}}"


def call(graph: Graph, node: Node) -> tuple[str, int] | None:
    """(the call into CMSIS-NN for a node, its multiplications), or None for an operation that is not compared."""
    a: dict[str, Any] = node.attrs
    x, y = graph.values[node.inputs[0]].shape, graph.values[node.name].shape
    ctx = "&(cmsis_nn_context){buffer, sizeof buffer}"
    if node.op == "linear":
        rows, cols = (int(n) for n in graph.values[node.inputs[1]].shape)
        params = "&(cmsis_nn_fc_params){128, 0, -128, {-128, 127}}"
        quant = "&(cmsis_nn_per_tensor_quant_params){1 << 30, -8}"
        text = f"arm_fully_connected_s8({ctx}, {params}, {quant}, {_dims(1, 1, 1, cols)}, x, "
        text += f"{_dims(cols, 1, 1, rows)}, w, {_dims(1, 1, 1, rows)}, bias, {_dims(1, 1, 1, rows)}, y)"
        return f"arm_vector_sum_s8(buffer, {cols}, {rows}, w, 128, 0, bias);\n    watch();\n    {text}", rows * cols
    if node.op != "conv":
        return None
    _, c, h, wide = (int(n) if not isinstance(n, str) else 1 for n in x)
    _, out, oh, ow = (int(n) if not isinstance(n, str) else 1 for n in y)
    kh, kw = (int(n) for n in graph.values[node.inputs[1]].shape[2:])
    tile = f"{{{a['stride'][1]}, {a['stride'][0]}}}, {{{a['padding'][0]}, {a['padding'][2]}}}, {{1, 1}}, {{-128, 127}}"
    quant = "&(cmsis_nn_per_channel_quant_params){multiplier, shift}"
    ends = f"{_dims(1, 1, 1, out)}, bias, {_dims(1, oh, ow, out)}, y)"
    if a["groups"] == 1:
        params = f"&(cmsis_nn_conv_params){{128, -128, {tile}}}"
        text = f"arm_convolve_wrapper_s8({ctx}, {params}, {quant}, {_dims(1, h, wide, c)}, x, {_dims(out, kh, kw, c)}, w, {ends}"
        return text, out * oh * ow * kh * kw * c
    params = f"&(cmsis_nn_dw_conv_params){{128, -128, 1, {tile}}}"
    text = f"arm_depthwise_conv_wrapper_s8({ctx}, {params}, {quant}, {_dims(1, h, wide, c)}, x, {_dims(1, kh, kw, c)}, w, {ends}"
    return text, out * oh * ow * kh * kw


def theirs(graph: Graph, source: Path, level: str, folder: Path) -> dict[str, int]:
    """Layer -> instructions of CMSIS-NN."""
    calls = {node.name: made[0] for node in graph if (made := call(graph, node))}
    (folder / "main.c").write_text(_MAIN.replace("@calls@", "\n".join(f"    {text};\n    watch();" for text in calls.values())))
    for name in ("semihosting.h", "semihosting.c", "link.ld", "cortex_m.c", "icount.c"):
        (folder / name).write_text((files("roundel.runtimes") / "boards" / name).read_text())
    calls_file = (folder / "semihosting.c").read_text().replace("*memcpy(", "*slow_memcpy(").replace("*memset(", "*slow_memset(")
    (folder / "semihosting.c").write_text(calls_file)
    rooms = ("ConvolutionFunctions", "FullyConnectedFunctions", "NNSupportFunctions")
    code = [
        str(path)
        for room in rooms
        for path in sorted((source / "Source" / room).glob("*.c"))
        if not path.stem.endswith(("_f16", "_f32"))
    ]
    freestanding = ["-std=gnu99", "-O1", "-fno-builtin", "-fno-tree-loop-distribute-patterns"]

    def run(*words: str) -> None:
        subprocess.run(words, cwd=folder, check=True)

    run(*PLAIN, *freestanding, "-c", "semihosting.c", "cortex_m.c")
    include = ["-I", str(source / "Include"), "-I", str(folder)]
    (folder / "string.h").write_text(
        "#include <stddef.h>\nvoid *memcpy(void *, const void *, size_t);\nvoid *memset(void *, int, size_t);\n"
    )
    sections = ["-ffunction-sections", "-DCMSIS_NN_USE_SINGLE_ROUNDING", level, "-fno-tree-loop-distribute-patterns"]
    hosted = [word for word in PLAIN if word != "-ffreestanding"]  # with it, gcc would call memcpy for each word that they read
    run(*hosted, "-std=gnu99", *sections, *include, "-w", "-c", "main.c", *code)
    memory = [f"-Wl,--defsym={key}={value:#x}" for key, value in qemu._memory(BOARD).items()]
    objects = [path.name for path in folder.glob("*.o")]
    run(*PLAIN, "-nostdlib", *memory, "-Wl,--gc-sections,-T,link.ld", *objects, "-lgcc", "-o", "board.elf")
    run("gcc", "-shared", "-fPIC", "-O2", "icount.c", "-o", "icount.so")
    symbols = subprocess.run([BOARD.compiler.replace("gcc", "nm"), "board.elf"], cwd=folder, capture_output=True, text=True)
    mark = next(int(line.split()[0], 16) & ~1 for line in symbols.stdout.splitlines() if line.endswith(" watch"))
    qemu.play(folder / "board.elf", b"", "qemu-cortex-m4", ["-plugin", f"file=./icount.so,out=counts,mark={mark:#x}"])
    totals = [int(line) for line in (folder / "counts").read_text().split()]
    spent = [after - before for before, after in itertools.pairwise(totals)]
    counts = {}
    for name, text in calls.items():
        if "watch();" in text:  # the sums of a matrix's rows, which CMSIS-NN computes once, when it is set up
            spent.pop(0)
        counts[name] = spent.pop(0)
    return counts


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--level", default="-O2", help="The compiler's optimisation, for both.")
def main(source: Path, level: str) -> None:
    """Print the table for DS-CNN."""
    torch.set_num_threads(1)
    case = measure.CASES["DS-CNN"]
    q = rd.quantize(case.model(), "int8", "int8", data=case.calibrate())
    graph = rd.lower(q)
    made = emit(graph)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        sent = hostc.inputs_of(made, {name: codes[:1] for name, codes in examples(graph).items()})
        ours = dict(zip((port.name for port in made.watched), qemu.count(made, sent, Path(one), options=(level,))[0]))
        other = theirs(graph, source.resolve(), level, Path(two))
    click.echo(f"`python scripts/cmsis_nn.py CMSIS-NN --level {level}`\n")
    click.echo("| layer | multiplications | ours | per MAC | CMSIS-NN | per MAC | ratio |\n|" + " --- |" * 7)
    totals = [0, 0, 0]
    for node in graph:
        if (found := call(graph, node)) is None:
            continue
        macs, a, b = found[1], ours[node.name], other[node.name]
        totals = [totals[0] + macs, totals[1] + a, totals[2] + b]
        click.echo(f"| {node.name} | {macs:,} | {a:,} | {a / macs:.2f} | {b:,} | {b / macs:.2f} | {a / b:.2f} |")
    macs, a, b = totals
    click.echo(f"| together | {macs:,} | {a:,} | {a / macs:.2f} | {b:,} | {b / macs:.2f} | {a / b:.2f} |")


if __name__ == "__main__":
    main()
