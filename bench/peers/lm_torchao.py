"""torchao's weight-only integers of any width; the int4 configuration that it recommends has no packing for CPUs."""

from __future__ import annotations

import torch
from hf import answered, groups, linears, load, shapes, told
from task import Quantized, Task, fitting
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

HQQ = {"intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY}


def quantize(task: Task) -> Quantized:
    model = load(task)
    layers = linears(model)
    sizes, asymmetric = shapes(layers), task.setting == "asym"
    grid = fitting(sizes, task.size, zero=-1 if asymmetric else 0)
    found = groups(layers, grid)
    for columns, names in found.items():
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{grid.bits}"), granularity=PerGroup(columns),
            mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC, **(HQQ if task.setting == "hqq" else {}),
        )  # fmt: skip
        quantize_(model, config, filter_fn=lambda _, name, names=names: name in names)
    return answered(model, grid.size(sizes), told(grid, found))
