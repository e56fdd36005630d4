"""onnxruntime's 4-bit matrix products: round to nearest in blocks, or HQQ; rows are padded to whole blocks, which is counted."""

from __future__ import annotations

from typing import Any

import onnxruntime
from hf import linears, load, shapes
from lm_onnx import exported, head_of, runner
from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer
from task import Quantized, Refused, Task, fitting, onnx_runner


def quantize(task: Task) -> Quantized:
    bits = int(task.size)
    if bits != 4:
        raise Refused(f"no weights of {bits} bits")
    model = load(task)
    layers = linears(model)
    symmetric = task.setting == "default"
    grid = fitting(shapes(layers), task.size, (16, 32, 64, 128, 256), zero=0 if symmetric else 4, padded=True)
    made, length = exported(model, task)
    given = {"bits": 4, "block_size": grid.group, "is_symmetric": symmetric}
    if task.setting == "hqq":
        given = {"algo_config": HQQWeightOnlyQuantConfig(block_size=grid.group, bits=4)}
    tool = MatMulNBitsQuantizer(made, nodes_to_exclude=head_of(made), **given)
    tool.process()
    done = tool.model.model
    count = sum(node.op_type == "MatMulNBits" for node in done.graph.node)
    if count != len(layers):
        raise RuntimeError(f"{count} of {len(layers)} layers were quantized")
    run: Any = onnx_runner(done.SerializeToString())
    note = f"onnxruntime {onnxruntime.__version__}, blocks of {grid.group}{'' if symmetric else ', asymmetric'}"
    return Quantized(runner(run, length), note=note, size=grid.size(shapes(layers)))
