"""optimum-quanto: qint4 and qint2 in the groups that it takes by itself, a scale and a shift for each; it sees no data."""

from __future__ import annotations

from hf import answered, linears, load, shapes
from optimum.quanto import freeze, qint2, qint4
from optimum.quanto import quantize as quanto
from task import Grid, Quantized, Refused, Task

TYPES = {4: qint4, 2: qint2}


def group_of(columns: int) -> int:
    """Its rule: 128 columns, or 96, 64 or 32; a row of up to 128, or that none of them divides, is one group."""
    return next((group for group in (128, 96, 64, 32) if columns > 128 and columns % group == 0), columns)


def quantize(task: Task) -> Quantized:
    bits = int(task.size)
    if bits not in TYPES:
        raise Refused(f"no weights of {bits} bits")
    model = load(task)
    whole = shapes(linears(model))
    numbers = sum(r * c for r, c in whole)
    size = sum(Grid(bits, group_of(c), zero=16).size([(r, c)]) * r * c for r, c in whole) / numbers
    quanto(model, weights=TYPES[bits], exclude="lm_head")
    freeze(model)
    return answered(model, size, f"qint{bits}, groups of {' and '.join(map(str, sorted({group_of(c) for _, c in whole})))}")
