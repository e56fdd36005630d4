"""Run one-operation models in every runtime that is here and write docs/compatibility.md: exact, off by n, refused, or not run.

    python scripts/compatibility.py [--write]

Each cell is one run of `roundel.verify`: weights and activations of the row's formats, calibrated on random inputs, against the
simulation of the runtime's own rounding. It judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
WEIGHTED = (("int8", "int8"), ("int4", "int8"), ("int2", "int8"), ("cb16/channel", "int8"), ("int8", "int16"))
PLAIN = ((None, "int8"), (None, "int16"))

#: What is run, in this order; boards by two of them, the rest runs in `make verify-boards`.
COLUMNS = ("host-c", "qemu-cortex-m4", "tflm", "litert-ref", "litert-builtin", "litert", "onnxruntime", "onnxruntime-qdq")


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *xs: Tensor) -> Tensor:
        return self.fn(*xs)


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
)


def cell(row: Row, weights: str | None, activations: str, columns: tuple[str, ...]) -> list[str]:
    """One line of the table."""
    torch.manual_seed(0)
    examples = tuple(torch.randn(64, *shape) for shape in row.shapes)
    model = row.make().eval()
    try:
        q = rd.quantize(model, weights or "float", activations, data=_data(examples))
        found = rd.verify(q, columns, _data(tuple(x[:16] for x in examples)))
    except rd.RoundelError as err:
        return [f"not lowered: {_why(str(err))}"] + [""] * (len(columns) - 1)
    return [_said(found[name]) for name in columns]


def _data(xs: tuple[Tensor, ...]) -> list[Batch]:
    return [Batch(xs)]


def _said(v: Verification) -> str:
    if v.why is not None:
        return "refused"
    if v.exact:
        return "exact"
    most = max(map(abs, v.histogram))
    return f"off by {most}: {v.differing:,} of {v.total:,}"


def _why(text: str) -> str:
    return text.splitlines()[-1].strip().partition(": ")[2] or text.splitlines()[0]


@click.command()
@click.option("--write", is_flag=True, help="Put the page in its place in docs/.")
def main(write: bool) -> None:
    """Print the table."""
    here = tuple(name for name in COLUMNS if runtime(name)[0].absent(name) is None)
    lines = ["# Compatibility", "", "`python scripts/compatibility.py --write`", ""]
    lines += [
        "Each cell is a run of one operation with 16 random inputs, compared code by code with the simulation of the runtime's own"
    ]
    lines += ["rounding (docs/integer.md). *Refused*: the exporter or the runtime says no, by name."]
    if missing := [name for name in COLUMNS if name not in here]:
        lines += [f"Not run here: {', '.join(missing)}."]
    lines += [f"Runtimes that are not in the table: {', '.join(name for name in RUNTIMES if name not in COLUMNS)}.", ""]
    lines += ["| operation | weights | activations | " + " | ".join(here) + " |", "|" + " --- |" * (len(here) + 3)]
    for row in ROWS:
        for weights, activations in WEIGHTED if row.weighted else PLAIN:
            cells = cell(row, weights, activations, here)
            lines.append(f"| {row.name} | {weights or ''} | {activations} | " + " | ".join(cells) + " |")
            click.echo(lines[-1])
    if write:
        PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
