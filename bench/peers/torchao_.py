"""torchao's PT2E flow with its quantizer for x86: an exported program quantized, or trained in that form."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from distil import distil, plain_groups
from task import Quantized, Task, torch_runner
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)


def quantizer(task: Task, qat: bool = False) -> X86InductorQuantizer:
    """The default configuration; other widths by the limits of its codes, which stay int8 and uint8."""
    config: Any = get_default_x86_inductor_quantization_config(is_qat=qat)
    for name, bits in (("weight", task.weights), ("input_activation", task.activations), ("output_activation", task.activations)):
        spec = getattr(config, name)
        if spec is not None and bits != 8:
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if spec.dtype == torch.int8 else (0, 2**bits - 1)
            config = replace(config, **{name: replace(spec, quant_min=low, quant_max=high)})
    return X86InductorQuantizer().set_global(config)


def quantize(task: Task) -> Quantized:
    torch.manual_seed(task.seed)
    data = [torch.from_numpy(x) for x in task.batches(50)]
    batch = torch.export.Dim("n", min=1, max=1024)
    program = torch.export.export(task.model(), (data[0],), dynamic_shapes=({0: batch},)).module()
    if task.setting == "qat":
        return trained(prepare_qat_pt2e(program, quantizer(task, qat=True)), data, task)
    prepared = prepare_pt2e(program, quantizer(task))
    with torch.no_grad():
        for x in data:
            prepared(x)
    return described(convert_pt2e(prepared), task)


def trained(prepared: Any, data: list[torch.Tensor], task: Task) -> Quantized:
    """After one pass that sets the ranges, which then follow the batches; batch norms keep their statistics."""
    with torch.no_grad():
        for x in data:
            prepared(x)
    steps = distil(prepared, task.model(), torch.cat(data), plain_groups(prepared), 60 * task.minutes, task.seed)
    return described(convert_pt2e(prepared), task, f"{steps} steps in {task.minutes:g} min")


def described(made: Any, task: Task, note: str = "") -> Quantized:
    """A converted program, and what it quantizes on its way."""
    called = Counter(
        str(node.target).split(".")[1] for node in made.graph.nodes if node.op == "call_function" and "." in str(node.target)
    )
    weights = called["dequantize_per_channel"]
    return Quantized(torch_runner(made), {task.weights: weights}, {task.activations: called["quantize_per_tensor"]}, note)
