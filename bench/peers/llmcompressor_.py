"""llm-compressor: round to nearest, GPTQ or AWQ in one shot, group scales of 16 bits; asymmetric where the setting says so."""

from __future__ import annotations

from typing import Any

import llmcompressor.pipelines.cache as cache
from datasets import Dataset
from hf import answered, groups, linears, load, shapes, told
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from task import Quantized, Task, fitting

MODIFIERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "awq": AWQModifier}
LENGTH = 256

cache.IntermediatesCache.pin_memory = lambda *a, **k: None  # 0.14.0.1 pins memory where there is no accelerator, and dies of it


def quantize(task: Task) -> Quantized:
    model = load(task)
    layers = linears(model)
    kind, _, form = task.setting.partition("-")
    grid = fitting(shapes(layers), task.size, zero=-1 if form else 0)
    found = groups(layers, grid)
    config = {
        f"group_{columns}": {
            "targets": names,
            "weights": {"num_bits": grid.bits, "type": "int", "symmetric": not form, "strategy": "group", "group_size": columns},
        }
        for columns, names in found.items()
    }
    given: dict[str, Any] = {}
    if kind != "rtn":
        rows = task.chunks(LENGTH).tolist()
        given = {"dataset": Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * LENGTH] * len(rows)}),
                 "num_calibration_samples": len(rows), "max_seq_length": LENGTH, "shuffle_calibration_samples": False}  # fmt: skip
    oneshot(model=model, recipe=[MODIFIERS[kind](config_groups=config, ignore=["lm_head"])], **given)
    if left := [name for name in layers if not hasattr(model.get_submodule(name), "quantization_scheme")]:
        raise RuntimeError(f"{left[0]} and {len(left) - 1} others were left float")
    return answered(model, grid.size(shapes(layers)), told(grid, found))
