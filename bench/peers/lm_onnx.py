"""A language model as ONNX of one fixed length, for toolkits that quantize ONNX; documents are padded at the end, which a causal
model does not look at."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from task import Array, Ids, Task
from torch import Tensor, nn


class _Logits(nn.Module):
    """The causal mask is given as numbers: what transformers makes of none cannot be exported."""

    mask: Tensor

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        model.set_attn_implementation("eager")
        self.model = model
        self.register_buffer("mask", torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=self.mask, use_cache=False).logits
        return logits


def exported(model: Any, task: Task) -> tuple[onnx.ModelProto, int]:
    """The model as ONNX, from ``ids`` (1, length) to ``y``, and the length: that of the longest document."""
    length = max(map(len, [*task.questions(), *task.documents()]))
    held: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = torch.zeros(1, length, dtype=torch.int64)
        torch.onnx.export(
            _Logits(model, length), (ids,), held, dynamo=False, input_names=["ids"], output_names=["y"], opset_version=17
        )
    return onnx.load_from_string(held.getvalue()), length


def padded(ids: Ids, length: int) -> Ids:
    return np.pad(ids, (0, length - len(ids)))[None]


def runner(call: Callable[[Ids], Array], length: int) -> Callable[[Ids], Array]:
    return lambda ids: np.asarray(call(padded(ids, length)))[0, : len(ids)]


def head_of(made: onnx.ModelProto) -> list[str]:
    """The node that gives the logits."""
    return [node.name for node in made.graph.node if made.graph.output[0].name in node.output]
