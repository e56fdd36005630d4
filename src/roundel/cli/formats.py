"""`roundel formats`: the catalogue, and one format explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..report.text import number
from . import options
from .text import pairs, print_json, said, table

if TYPE_CHECKING:
    from ..formats import Format

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

#: When an activation's ranges are found.
WHEN = {"static": "ranges are stored, from calibration data", "dynamic": "ranges are those of each input, at run time"}


@click.command("formats")
@click.argument("format_text", metavar="[FORMAT]", required=False)
@options.as_json
def formats_command(format_text: str | None, as_json: bool) -> None:
    """List the formats, or explain one.

    N in intN and uintN runs from 1 to 16; any grid goes with any sharing and any stored
    scale. The explanation gives levels, what is stored beside the codes, and bits per weight. A
    FORMAT that ends in :static, :dynamic or :token is one of activations.
    """
    if format_text is None:
        rows = [(kind, text, *_facts(text)) for kind, texts in CATALOGUE for text in texts]
        if as_json:
            keys = ("kind", "format", "canonical", "bits_per_weight", "levels")
            return print_json([dict(zip(keys, row, strict=True)) for row in rows])
        lines = [(text, canonical, number(bits, 4), str(levels)) for _, text, canonical, bits, levels in rows]
        table(("format", "canonical form", "bits/weight", "levels"), lines, "llrr")
        click.echo("\nbits/weight is for a matrix of 4096 x 4096, every stored byte counted. roundel formats FORMAT explains one.")
        return None
    explained = _explain(format_text)
    if as_json:
        return print_json(explained)
    pairs([(key.replace("_", " "), said(value)) for key, value in explained.items()])
    return None


def _facts(text: str, role: str = "weight") -> tuple[str, float, int | str]:
    """(canonical form, stored bits per weight on 4096 x 4096, number of levels) of a format text."""
    from ..formats import Format

    parsed = Format.parse(text, "weight" if role == "weight" else "activation")
    side = 4096
    return str(parsed), 8 * parsed.nbytes((side, side)) / side**2, _levels(parsed)[0]


def _levels(parsed: Format) -> tuple[int | str, str]:
    """How many levels a format's grid has, and the levels themselves in words."""
    from ..formats import grid as grids
    from ..formats.grid import Codebook, Levels, Uniform

    grid = parsed.grid
    if isinstance(grid, Uniform):
        low, high = (int(v) for v in parsed.extremes)
        return high - low + 1, f"integers {low} to {high}"
    if isinstance(grid, Levels):
        values = grids.table(grid.name).values
        if len(values) > 32:
            return len(values), f"{len(values)} from {values[0]:g} to {values[-1]:g}"
        return len(values), " ".join(f"{v:.4g}" for v in values)
    if isinstance(grid, Codebook):
        rule = "0 and +-b^-i with a fitted base b" if grid.law else "learned from the weights"
        return grid.k, f"{grid.k} {rule}" + (f", {grid.dim} numbers each" if grid.dim > 1 else "") + f", stored as {grid.entry}"
    return f"2^{grid.bits}", f"every {grid.name} number"


def _explain(text: str) -> dict[str, Any]:
    """What `roundel formats FORMAT` says, as plain data."""
    from ..formats import Format
    from ..plan import Choice

    timed = text.rpartition(":")[2] in (*WHEN, "running", "token")
    choice = Choice.parse(text, "activation" if timed else "weight")
    parsed = choice.format
    canonical, bits, levels = _facts(str(parsed))
    weight = {"as_activation": "" if timed else str(Format.parse(text, "activation")), "bits_per_weight": bits}
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
        "canonical": canonical + (f":{choice.when}" if timed else ""),
        **({"when": WHEN[choice.when]} if timed else weight),
        "code_bits": parsed.bits / parsed.step,
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


COMMANDS = (formats_command,)
