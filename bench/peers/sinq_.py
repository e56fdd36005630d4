"""SINQ: rows and columns of each matrix scaled by turns, then groups with a scale and a zero point; it sees no data."""

from __future__ import annotations

from typing import Any

# isort: off
import tashim  # noqa: F401 - both before transformers
import tvshim  # noqa: F401

# isort: on
import torch
from hf import answered, linears, load, replaced, shapes
from sinq.sinqlinear import SINQLinear, sinq_base_quant_config
from task import SLACK, Quantized, Refused, Task


def quantize(task: Task) -> Quantized:
    model = load(task)
    layers = linears(model)
    whole, bits = shapes(layers), int(task.size)

    def config(columns: int, group: int) -> Any:
        """One group for a row that ``group`` does not divide; its groups are multiples of 8."""
        return sinq_base_quant_config(bits, group if columns % group == 0 else columns, tiling_mode="1D", method=task.setting)

    def size(group: int) -> float:
        """With two 8-bit parameters a group and a 16-bit scale a column."""
        total = sum(r * c * bits + r * (c // group if c % group == 0 else 1) * 16 + 16 * c for r, c in whole)
        return total / sum(r * c for r, c in whole)

    group = next((g for g in (16, 32, 64, 128, 256) if size(g) <= task.size + SLACK), 0)
    if not group:
        raise Refused(f"no groups of {bits} bits fit within {task.size:g} bits")
    if odd := [columns for _, columns in whole if columns % group and columns % 8]:
        raise Refused(f"rows of {odd[0]}: its groups are multiples of 8 that divide the row")
    replaced(model, lambda layer: SINQLinear(layer, config(layer.in_features, group), compute_dtype=torch.float32, device="cpu",
                                             del_orig=False))  # fmt: skip
    return answered(model, size(group), f"int{bits}, groups of {group}")
