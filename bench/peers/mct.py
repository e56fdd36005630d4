"""Sony's Model Compression Toolkit: post-training quantization as it comes, and its gradient-based form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

# isort: off
import tvshim  # noqa: F401 - before model_compression_toolkit

# isort: on
import model_compression_toolkit as mct
import torch
from mct_quantizers import PytorchActivationQuantizationHolder, PytorchQuantizationWrapper
from model_compression_toolkit.core import BitWidthConfig, CoreConfig
from model_compression_toolkit.core.common.network_editors import NodeTypeFilter
from task import Array, Quantized, Refused, Task, torch_runner

EPOCHS = 20


def quantize(task: Task) -> Quantized:
    torch.manual_seed(task.seed)
    if task.activations != 8:
        raise Refused("its platform description has activations of 8 and 16 bits only")

    def images() -> Iterator[list[Array]]:
        for x in task.batches(50):
            yield [x]

    width = BitWidthConfig()
    if task.weights != 8:
        for layer in (torch.nn.Conv2d, torch.nn.Linear):
            width.set_manual_weights_bit_width(NodeTypeFilter(layer), task.weights, "weight")
    config = CoreConfig(bit_width_config=width)
    if task.setting == "default":
        made, _ = mct.ptq.pytorch_post_training_quantization(task.model(), images, core_config=config)
    else:
        training = mct.gptq.get_pytorch_gptq_config(n_epochs=EPOCHS)
        made, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            task.model(), images, core_config=config, gptq_config=training
        )
    return described(made.eval())


def described(made: Any) -> Quantized:
    """A quantized module with its counts of weights and of activations."""
    weights, activations = Counter[int](), Counter[int]()
    for part in made.modules():
        if isinstance(part, PytorchQuantizationWrapper):
            weights.update(int(q.num_bits) for name, q in part.weights_quantizers.items() if name == "weight")
        if isinstance(part, PytorchActivationQuantizationHolder):
            activations[int(part.activation_holder_quantizer.num_bits)] += 1
    return Quantized(torch_runner(made), weights, activations)
