"""GPTQModel's GPTQ, symmetric; the packed file is loaded again, its weights computed with in float32, not its bfloat16."""

from __future__ import annotations

import os

os.cpu_count = lambda: 8  # 7.6.0 cannot build its thread pool on two cores

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQConfig, GPTQModel  # noqa: E402
from hf import answered, linears, load, shapes  # noqa: E402
from task import Quantized, Task, fitting  # noqa: E402

LENGTH = 256


def quantize(task: Task) -> Quantized:
    sizes = shapes(linears(load(task)))
    # its file has a zero point per group, of the codes' bits, also where it is symmetric
    grid = fitting(sizes, task.size, (16, 32, 64, 128, 256), zero=-1, padded=True)
    rows = task.chunks(LENGTH).tolist()
    data = [{"input_ids": row, "attention_mask": [1] * LENGTH} for row in rows]
    model = GPTQModel.load(
        str(task.folder),
        GPTQConfig(bits=grid.bits, group_size=grid.group, device="cpu", offload_to_disk=False),
        dtype=torch.float32,
    )
    model.quantize(data, batch_size=4)
    model.save(str(task.scratch / "made"))
    loaded = GPTQModel.load(str(task.scratch / "made"), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.bfloat16).model
    real = load(task)
    for name, layer in linears(real).items():
        packed = loaded.get_submodule(name)
        packed.post_init()
        with torch.no_grad():
            layer.weight.copy_(packed.dequantize_weight().T[: layer.out_features, : layer.in_features])
    return answered(real, grid.size(sizes), f"int{grid.bits}, groups of {grid.group}")
