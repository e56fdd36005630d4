"""NNCF on the ONNX model: `nncf.quantize` as it comes, and its accuracy-first settings; more than 8 bits of neither kind."""

from __future__ import annotations

import os

os.environ["NNCF_TELEMETRY"] = "0"

import nncf
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from task import Quantized, Refused, Task, onnx_runner, onnx_sites


def quantize(task: Task) -> Quantized:
    if (task.weights, task.activations) != (8, 8):
        raise Refused("nncf.quantize has 8 bits of weights and activations for ONNX models: it refuses num_bits=4")
    model = onnx.load(task.onnx)
    images = nncf.Dataset([{"x": x} for x in task.batches(1)])
    if task.setting == "default":
        made = nncf.quantize(model, images)
    else:
        chosen = AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.DISABLE, activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        )
        made = nncf.quantize(model, images, subset_size=len(task.calibrate()), preset=nncf.QuantizationPreset.MIXED,
                             advanced_parameters=chosen)  # fmt: skip
    weights, activations = onnx_sites(made)
    return Quantized(onnx_runner(made.SerializeToString()), weights, activations)
