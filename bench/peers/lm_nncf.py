"""NNCF's weight compression of an ONNX file under OpenVINO: as it comes, or with AWQ, scale estimation or GPTQ."""

from __future__ import annotations

from collections.abc import Callable

import nncf
import onnx
import openvino as ov
from hf import groups, linears, load, shapes, told
from lm_onnx import exported, padded, runner
from task import Array, Ids, Quantized, Refused, Task, fitting

MODES = {4: ("INT4_SYM", "INT4_ASYM")}
EXTRA = {"gptq": {"gptq": True}, "estimate": {"awq": True, "scale_estimation": True}, "default": {}}


def quantize(task: Task) -> Quantized:
    bits = int(task.size)
    if bits not in MODES:
        raise Refused(f"no integer weights of {bits} bits")
    model = load(task)
    layers = linears(model)
    even = [g for g in (32, 64, 128) if all(c % g == 0 for _, c in shapes(layers))]
    grid = fitting(shapes(layers), task.size, (*even, 0))
    made, length = exported(model, task)
    file = task.scratch / "real.onnx"
    onnx.save(made, str(file))
    core = ov.Core()
    given = core.read_model(str(file))
    head = [op.get_friendly_name() for op in given.get_ops() if op.get_type_name() == "MatMul"][-1]
    rows = [padded(d[:length], length) for d in task.documents()]
    data = nncf.Dataset(rows) if EXTRA[task.setting] else None
    done = nncf.compress_weights(
        given, mode=nncf.CompressWeightsMode[MODES[bits][0]], group_size=grid.group or -1, ratio=1.0, all_layers=True,
        ignored_scope=nncf.IgnoredScope(names=[head], types=["Gather"]), dataset=data, subset_size=len(rows), **EXTRA[task.setting],
    )  # fmt: skip
    count = sum(op.get_type_name() == "Constant" and op.get_element_type().get_type_name() in ("i4", "u4") for op in done.get_ops())
    if count != len(layers):
        raise RuntimeError(f"{count} of {len(layers)} layers were quantized to {bits} bits")
    ready = core.compile_model(done, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})
    call: Callable[[Ids], Array] = lambda ids: ready(ids)[0]  # noqa: E731
    return Quantized(runner(call, length), note=told(grid, groups(layers, grid)), size=grid.size(shapes(layers)))
