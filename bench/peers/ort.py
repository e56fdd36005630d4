"""onnxruntime's own static quantization (QDQ); run node by node, so that its int8 kernels' saturation without VNNI is no matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from task import Array, Quantized, Refused, Task, onnx_runner, onnx_sites

#: What a setting changes; the default is what `quantize_static` does when asked for nothing.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"per_channel": True, "calibrate_method": CalibrationMethod.Entropy},
    "percentile": {"per_channel": True, "calibrate_method": CalibrationMethod.Percentile},
}


class Images(CalibrationDataReader):  # type: ignore[misc]
    """Calibration images once through, in batches of one size, which its histograms want."""

    def __init__(self, task: Task) -> None:
        self.batches: Iterator[Array] = task.batches(task.even(50))

    def get_next(self) -> dict[str, Array] | None:
        x = next(self.batches, None)
        return None if x is None else {"x": x}


def quantize(task: Task) -> Quantized:
    if task.activations != 8:
        raise Refused(f"onnxruntime has no activations of {task.activations} bits: int8, uint8, int16 and uint16 only")
    ready, made = task.scratch / "ready.onnx", task.scratch / "made.onnx"
    quant_pre_process(str(task.onnx), str(ready), skip_symbolic_shape=True)
    options = dict(SETTINGS[task.setting])
    if task.weights == 4:
        model = onnx.version_converter.convert_version(onnx.load(ready), 21)  # int4 tensors came with opset 21
        onnx.save(model, ready)
        options["weight_type"] = QuantType.QInt4
    quantize_static(str(ready), str(made), Images(task), **options)
    weights, activations = onnx_sites(onnx.load(made))
    return Quantized(onnx_runner(made), weights, activations)
