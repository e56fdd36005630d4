"""Brevitas: the post-training flow of its image classification example (fx), at its defaults and with all it recommends; QAT."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.proxy import ActQuantProxyFromInjectorBase, WeightQuantProxyFromInjectorBase
from brevitas_examples.imagenet_classification.ptq import ptq_common
from distil import distil, plain_groups
from task import Quantized, Task, torch_runner

#: The example's own defaults, and the settings that its list of best configurations has in common.
DEFAULT: dict[str, Any] = {"weight_quant_granularity": "per_tensor", "act_quant_type": "sym", "weight_param_method": "stats"}
BEST: dict[str, Any] = {"weight_quant_granularity": "per_channel", "act_quant_type": "asym", "weight_param_method": "mse"}


def quantize(task: Task) -> Quantized:
    torch.manual_seed(task.seed)
    best = task.setting in ("best", "qat")
    data = [(torch.from_numpy(x), None) for x in task.batches(64)]  # pairs, as its loops take them
    model = preprocess_for_quantize(task.model(), equalize_iters=20, equalize_merge_bias=True, merge_bn=True)
    made = quantize_fx(model, task, BEST if best else DEFAULT)
    with torch.no_grad():
        made(data[0][0])
    ptq_common.calibrate(data, made)
    if task.setting == "qat":
        images = torch.cat([x for x, _ in data])
        steps = distil(made.train(), task.model(), images, plain_groups(made), 60 * task.minutes, task.seed)
        return described(made.eval(), f"{steps} steps in {task.minutes:g} min")
    if best:
        ptq_common.apply_gptq(data, made, act_order=True, use_quant_activations=True)
    ptq_common.apply_bias_correction(data, made)
    return described(made.eval())


def quantize_fx(model: torch.nn.Module, task: Task, chosen: dict[str, Any]) -> torch.nn.Module:
    """Every layer at the widths asked for, the first and last too, as the fx backend does."""
    found: torch.nn.Module = ptq_common.quantize_model(
        model, "fx", task.weights, task.activations, 32, act_quant_percentile=99.999, scale_factor_type="float_scale",
        quant_format="int", **chosen,
    )  # fmt: skip
    return found


def described(made: torch.nn.Module, note: str = "") -> Quantized:
    """A quantized module with the quantizers that are on, each instance once."""
    weights, activations = Counter[int](), Counter[int]()
    for part in made.modules():
        for kind, found in ((WeightQuantProxyFromInjectorBase, weights), (ActQuantProxyFromInjectorBase, activations)):
            if isinstance(part, kind) and part.is_quant_enabled:
                width = part.bit_width()
                found[int(width) if width is not None else 0] += 1
    return Quantized(torch_runner(made), weights, activations, note)
