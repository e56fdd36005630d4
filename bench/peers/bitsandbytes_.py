"""bitsandbytes' 4-bit layer with its table NF4, blocks of 64, block scales in float32 or themselves quantized; it sees no data."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from hf import answered, load, replaced
from task import Quantized, Task
from torch import nn


def quantize(task: Task) -> Quantized:
    model, nested = load(task), task.setting == "nested"

    def layer(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=torch.float32,
                                compress_statistics=nested, quant_type="nf4")  # fmt: skip
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", blocksize=64,
                                       compress_statistics=nested)  # fmt: skip
        return new

    made: list[Any] = list(replaced(model, layer))
    model.to("cpu")  # which is when it quantizes
    whole = sum(part.in_features * part.out_features for part in made)
    return answered(model, 8 * sum(stored(part.weight) for part in made) / whole, "NF4, blocks of 64")


def stored(weight: bnb.nn.Params4bit) -> int:
    """Bytes of codes and scales; the two tables, which are constants, are not counted."""
    state = weight.quant_state
    inner = 0 if state.state2 is None else state.state2.absmax.nbytes + 4
    return weight.data.nbytes + state.absmax.nbytes + inner
