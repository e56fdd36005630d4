"""HQQ's own linear layer, scale and zero point per group in 16 bits; it sees no data."""

from __future__ import annotations

import torch
from hf import answered, linears, load, replaced, shapes
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from task import Quantized, Task


def quantize(task: Task) -> Quantized:
    model = load(task)
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    whole = shapes(linears(model))
    # its groups run on from row to row, so a group need not divide the row
    bits = int(task.size)
    group = next(g for g in (8, 16, 32, 64, 128, 256) if bits + 32 / g <= task.size and all(r * c % g == 0 for r, c in whole))
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    replaced(model, lambda layer: HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False))
    return answered(model, bits + 32 / group, f"int{bits} asymmetric, groups of {group}")
