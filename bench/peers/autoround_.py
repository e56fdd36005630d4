"""AutoRound: sign-SGD on roundings and ranges, block after block; the setting says iterations, `ext` its algorithm extension."""

from __future__ import annotations

import copy
from typing import Any

import auto_round.compressors.layer_config_resolver as resolver
import torch
from auto_round import AutoRound
from hf import answered, groups, linears, load, proven, shapes, told
from task import Quantized, Task, fitting
from transformers import AutoTokenizer

LENGTH = 256
_special_cases = resolver.apply_layer_config_special_cases


def _all_layers(given: dict[str, Any], model: Any, default: dict[str, Any], *more: Any, **named: Any) -> Any:
    """Without its rule that layers whose sizes 32 does not divide stay float: it has kernels in mind."""
    asked = copy.deepcopy(given)
    found, *others = _special_cases(given, model, default, *more, **named)
    for name in linears(model):
        if name in found:
            found[name].update(asked.get(name, default))
    return found, *others


resolver.apply_layer_config_special_cases = _all_layers


def quantize(task: Task) -> Quantized:
    model = load(task)
    layers = linears(model)
    iterations, *forms = task.setting.split("-")
    asymmetric = "asym" in forms
    grid = fitting(shapes(layers), task.size, zero=-1 if asymmetric else 0)
    found = groups(layers, grid)
    rows = [row[None] for row in torch.from_numpy(task.chunks(LENGTH))]
    most = max(found, key=lambda columns: len(found[columns]))
    others = {
        name: {"bits": grid.bits, "group_size": columns} for columns, names in found.items() if columns != most for name in names
    }
    tool = AutoRound(
        model, AutoTokenizer.from_pretrained(task.folder), bits=grid.bits, group_size=most, sym=not asymmetric,
        layer_config=others or None, iters=int(iterations), nsamples=len(rows), seqlen=LENGTH, batch_size=8, dataset=rows,
        device_map="cpu", amp=False, enable_torch_compile=False, enable_alg_ext="ext" in forms, seed=task.seed,
    )  # fmt: skip
    done = tool.quantize()
    made = (done[0] if isinstance(done, tuple) else done).float()
    proven(linears(made), grid)
    return answered(made, grid.size(shapes(layers)), told(grid, found))
