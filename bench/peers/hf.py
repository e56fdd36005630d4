"""A folder of a language model in a peer's environment: loaded, its linear layers found and replaced, run; no quantization here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from task import Array, Grid, Ids, Quantized, Shape, Task
from torch import nn
from transformers import AutoModelForCausalLM

Linears = dict[str, nn.Linear]


def load(task: Task) -> Any:
    """The float model, in float32 and evaluation mode; whatever is drawn from here on starts at the task's seed."""
    torch.manual_seed(task.seed)
    np.random.seed(task.seed)
    return AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32).eval()


def linears(model: Any) -> Linears:
    """The linear layers by name, without the head."""
    head = model.get_output_embeddings()
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}


def shapes(layers: Linears) -> list[Shape]:
    return [(part.weight.shape[0], part.weight.shape[1]) for part in layers.values()]


def replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> list[nn.Module]:
    """Every linear layer but the head replaced in place; what took their places."""
    made = []
    for name, layer in linears(model).items():
        made.append(make(layer))
        model.set_submodule(name, made[-1])
    return made


def groups(layers: Linears, grid: Grid) -> Mapping[int, list[str]]:
    """Names of layers by the columns of a group, which are not the same where rows have other lengths."""
    found: dict[int, list[str]] = {}
    for name, part in layers.items():
        found.setdefault(grid.columns(part.weight.shape[1]), []).append(name)
    return found


def told(grid: Grid, found: Mapping[int, list[str]]) -> str:
    """A grid in words.

    >>> told(Grid(4, 32, 16, 4), {32: ["a"], 43: ["b"]})
    'int4 asymmetric, groups of 32 and 43'
    """
    return f"int{grid.bits}{' asymmetric' if grid.zero else ''}, groups of {' and '.join(map(str, sorted(found)))}"


def proven(layers: Linears, grid: Grid) -> None:
    """Raises `RuntimeError` where a group of a layer holds more values than its codes can tell apart: some toolkits leave layers
    float that their kernels cannot take, and say so only in a log."""
    for name, layer in layers.items():
        rows = layer.weight.detach().reshape(-1, grid.columns(layer.weight.shape[1]))
        most = int((rows.sort(1).values.diff(dim=1) != 0).sum(1).max()) + 1
        if most > 2**grid.bits:
            raise RuntimeError(f"{name}: {most} values in a group of {grid.bits} bits, so it was left float")


def answered(model: Any, size: float, note: str, backprop: bool = False) -> Quantized:
    """The model as a function from the ids of a document to its logits."""

    def run(ids: Ids) -> Array:
        with torch.no_grad():
            y = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
        return np.asarray(y.float())

    return Quantized(run, note=note, size=size, backprop=backprop)
