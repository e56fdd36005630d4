"""Run one-operation models in every runtime that is here and write docs/compatibility.md: exact, off by n, refused, or not run.

    python scripts/compatibility.py [--write] [--only OPERATION]

Each cell is one run of `roundel.verify`: weights and activations of the row's formats, calibrated on random inputs, against the
simulation of the runtime's own rounding. It judges nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.runtimes import RUNTIMES, runtime
from roundel.verify import Verification

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

#: (weights, activations) of a row with weights, and of one without.
WEIGHTED = (("int8", "int8"), ("int4", "int8"), ("int2", "int8"), ("cb16/channel", "int8"), ("int8", "int16s"))
PLAIN = ((None, "int8"), (None, "int16s"))

#: What is run, in this order; boards by two of them, the rest runs in `make verify-boards`.
COLUMNS = ("host-c", "qemu-cortex-m4", "qemu-riscv32", "tflm", "litert-ref", "litert-builtin", "litert", "onnxruntime",
           "onnxruntime-qdq", "vela-ethos-u55")  # fmt: skip

EXAMPLES = 16


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *xs: Tensor) -> Tensor:
        return self.fn(*xs)


class Outputs(nn.Module):
    """A recurrent layer without its last states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((4, 8, 8),)
    weighted: bool = False


def _fn(name: str, fn: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Row:
    return Row(name, lambda: Fn(fn), shapes or ((4, 8, 8),))


ROWS = (
    Row("conv", lambda: nn.Conv2d(4, 6, 3, padding=1), weighted=True),
    Row("conv, strided", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), weighted=True),
    Row("conv, dilated", lambda: nn.Conv2d(4, 6, 3, dilation=2), weighted=True),
    Row("conv, grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), weighted=True),
    Row("conv, depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), weighted=True),
    Row("conv, 1-D", lambda: nn.Conv1d(4, 6, 3), ((4, 16),), True),
    Row("conv, transposed", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), weighted=True),
    Row("linear", lambda: nn.Linear(16, 6), ((16,),), True),
    _fn("matmul", lambda a, b: a @ b, (3, 4, 8), (3, 8, 5)),
    _fn("add", lambda a, b: a + b, (4, 8, 8), (4, 8, 8)),
    _fn("sub", lambda a, b: a - b, (4, 8, 8), (4, 8, 8)),
    _fn("mul", lambda a, b: a * b, (4, 8, 8), (4, 8, 8)),
    _fn("concat", lambda a, b: torch.cat([a, b], 1), (4, 8, 8), (2, 8, 8)),
    _fn("split", lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1)),
    _fn("slice", lambda x: x[:, 1:3]),
    _fn("pad", lambda x: F.pad(x, (1, 2, 0, 1))),
    _fn("transpose", lambda x: x.transpose(1, 2), (4, 8)),
    _fn("mean", lambda x: x.mean((2, 3))),
    _fn("max_pool", lambda x: F.max_pool2d(x, 2)),
    _fn("avg_pool", lambda x: F.avg_pool2d(x, 2)),
    _fn("resize, nearest", lambda x: F.interpolate(x, scale_factor=2.0)),
    _fn("resize, bilinear", lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
    _fn("depth to space", lambda x: F.pixel_shuffle(x, 2)),
    _fn("relu", F.relu),
    _fn("relu6", F.relu6),
    _fn("leaky_relu", lambda x: F.leaky_relu(x, 0.1)),
    Row("prelu", lambda: nn.PReLU(4)),
    _fn("hard_swish", F.hardswish),
    _fn("sigmoid", torch.sigmoid),
    _fn("tanh", torch.tanh),
    _fn("gelu", F.gelu),
    _fn("silu", F.silu),
    _fn("exp", torch.exp),
    _fn("softmax", lambda x: x.softmax(-1), (10,)),
    Row("layer_norm", lambda: nn.LayerNorm(16), ((5, 16),)),
    Row("rms_norm", lambda: nn.RMSNorm(16), ((5, 16),)),
    _fn("attention", F.scaled_dot_product_attention, (2, 5, 8), (2, 5, 8), (2, 5, 8)),
    Row("gru", lambda: Outputs(nn.GRU(6, 8, batch_first=True)), ((3, 6),), True),
    Row("lstm", lambda: Outputs(nn.LSTM(6, 8, batch_first=True)), ((3, 6),), True),
)


# -- cells ------------------------------------------------------------------------------------------------------------


@dataclass
class Footnotes:
    """Reasons in the order in which they came up, each once; texts that differ in numbers alone are one reason."""

    found: dict[str, str] = field(default_factory=dict)

    def mark(self, why: str) -> str:
        """The reason's number, from 1, in brackets."""
        text = reason(why)
        kind = re.sub(r"-?\d[\d,.]*", "0", text)
        self.found.setdefault(kind, text)
        return f"({list(self.found).index(kind) + 1})"


def reason(why: str) -> str:
    """What an error says about the one node that there is: without the node, without where the runtime keeps its sources."""
    line = why.strip().splitlines()[-1].strip()
    line = re.sub(r"^(\S+ \(\w+\), )*\S+ \(\w+\): ", "", line)
    line = line.removeprefix("the .tflite file that was made is not what was meant, and was not kept: ")
    line = re.sub(r"(tensorflow/lite/micro|tflite)/kernels/\w+\.cc:\d+ ", "", line)
    line = re.sub(r"\.? ?Node (number 0 \(\w+\)|\w+ \(number 0\)) failed to .*", "", line)
    return line.rstrip(".").replace("|", "\\|")


def formats(row: Row) -> Sequence[tuple[str | None, str]]:
    return WEIGHTED if row.weighted else PLAIN


def cells(row: Row, weights: str | None, activations: str, columns: Sequence[str], notes: Footnotes) -> list[str]:
    """What each runtime makes of one operation in one pair of formats."""
    torch.manual_seed(0)
    examples = tuple(torch.randn(64, *shape) for shape in row.shapes)
    try:
        q = rd.quantize(row.make().eval(), weights or "float", activations, data=[Batch(examples)])
        found = rd.verify(q, columns, [Batch(tuple(x[:EXAMPLES] for x in examples))])
    except rd.RoundelError as err:
        return [f"not lowered {notes.mark(str(err))}"] * len(columns)
    return [said(found[name], notes) for name in columns]


def said(v: Verification, notes: Footnotes) -> str:
    if v.why is not None:
        return f"refused {notes.mark(v.why)}"
    if v.runtime.startswith("vela"):
        return "on the NPU" if v.exact else f"{v.differing} of {v.total} not on the NPU"
    if v.exact:
        return "exact"
    return f"off by {max(map(abs, v.histogram))}: {v.differing:,} of {v.total:,}"


# -- the page ---------------------------------------------------------------------------------------------------------


def head(columns: Sequence[str]) -> list[str]:
    """The page down to the head of its table, as run with these runtimes."""
    lines = [
        "# Compatibility",
        "",
        "`python scripts/compatibility.py --write`",
        "",
        f"Each cell is a run of one operation with {EXAMPLES} random inputs, every code that the runtime shows compared with the",
        "simulation of its own rounding (docs/integer.md): *exact*, or *off by n* at most and how many codes differ.",
        "*Refused*: the exporter or the runtime says no; *not lowered*: there is no integer form; the number is the reason's,",
        "below. vela-ethos-u55 runs nothing: it says what it would place on the NPU. int16s is symmetric int16, as TFLite has it.",
    ]
    if missing := [name for name in COLUMNS if name not in columns]:
        lines.append(f"Not run here: {', '.join(missing)}.")
    lines += [f"Runtimes that are not in the table: {', '.join(name for name in RUNTIMES if name not in COLUMNS)}.", ""]
    return [*lines, "| operation | weights | activations | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 3)]


def rows(chosen: Sequence[Row], columns: Sequence[str], notes: Footnotes) -> Iterator[str]:
    """The lines of the table."""
    for row in chosen:
        for weights, activations in formats(row):
            found = cells(row, weights, activations, columns, notes)
            yield f"| {row.name} | {weights or ''} | {activations} | " + " | ".join(found) + " |"


def page(chosen: Sequence[Row], columns: Sequence[str], tell: Callable[[str], None]) -> str:
    """The whole page; ``tell`` hears every line of the table as it is made."""
    notes, lines = Footnotes(), head(columns)
    for line in rows(chosen, columns, notes):
        tell(line)
        lines.append(line)
    reasons = [f"{i}. {text}" for i, text in enumerate(notes.found.values(), 1)]
    return "\n".join([*lines, "", "## Reasons", "", *reasons] if reasons else lines) + "\n"


@click.command(help=__doc__)
@click.option("--write", is_flag=True, help="Put the page in its place in docs/.")
@click.option("--only", multiple=True, type=click.Choice([row.name for row in ROWS]), help="Only this operation; not with --write.")
def main(write: bool, only: tuple[str, ...]) -> None:
    if write and only:
        raise click.UsageError("--write writes the whole page: leave --only out")
    torch.set_num_threads(1)
    here = [name for name in COLUMNS if runtime(name)[0].absent(name) is None]
    text = page([row for row in ROWS if not only or row.name in only], here, click.echo)
    click.echo(text.partition("## Reasons")[2])
    if write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
