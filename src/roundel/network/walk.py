"""The module path: weighted leaf modules of an ordinary network, found, described and replaced; no graph is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.qtensor import QTensor
from ..plan import Slot
from .layer import FloatWeight, PackedWeight, QLayer, Site, Weight


@dataclass(frozen=True, eq=False)
class Leaf:
    """A weighted leaf module: which operation it is, its attributes, its weight and bias."""

    name: str
    op: str
    attrs: Mapping[str, Any]
    weight: Tensor
    bias: Tensor | None

    @property
    def axis(self) -> int:
        """Output axis of the weight."""
        return 1 if self.op == "conv_transpose" and self.attrs["groups"] == 1 else 0


def member(layer: str, what: str) -> str:
    """The dotted name of a layer's ``weight``, ``bias`` or ``input``; the network's own root has no name."""
    return f"{layer}.{what}" if layer else what


def _sequence(value: int | tuple[int, ...], n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value)


def leaf(name: str, module: Any) -> Leaf | None:
    """What ``module`` computes, or None where Roundel has no quantized counterpart of it."""
    kind = type(module)
    if kind in (nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros":
        n = 1 if kind is nn.Conv1d else 2
        pads = list(module._reversed_padding_repeated_twice)  # (before, after) from the last axis on, "same" worked out
        attrs = {
            "stride": _sequence(module.stride, n),
            "padding": pads,
            "dilation": _sequence(module.dilation, n),
            "groups": module.groups,
        }
        return Leaf(name, "conv", attrs, module.weight, module.bias)
    if kind in (nn.ConvTranspose1d, nn.ConvTranspose2d):
        n = 1 if kind is nn.ConvTranspose1d else 2
        keys = ("stride", "padding", "output_padding", "dilation")
        attrs = {key: _sequence(getattr(module, key), n) for key in keys} | {"groups": module.groups}
        return Leaf(name, "conv_transpose", attrs, module.weight, module.bias)
    if kind is nn.Linear:  # not the subclass inside MultiheadAttention, whose weight is used without calling it
        return Leaf(name, "linear", {}, module.weight, module.bias)
    if kind.__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2 layer: y = x W + b with W (in, out)
        return Leaf(name, "linear", {}, module.weight.t(), module.bias)
    if isinstance(module, nn.Embedding) and module.max_norm is None and type(module).forward is nn.Embedding.forward:
        return Leaf(name, "embedding", {}, module.weight, None)
    return None


def leaves(module: nn.Module) -> dict[str, Leaf]:
    """Name -> weighted leaf, in the order of the modules. Left alone: modules whose weight is computed (parametrized), and hooked
    ones, whose hooks a replacement would lose."""
    found = {}
    for name, child in module.named_modules():
        if "weight" not in child._parameters or child._forward_hooks or child._forward_pre_hooks:
            continue
        if (one := leaf(name, child)) is not None and one.weight.is_floating_point():
            found[name] = one
    return found


def leaf_slots(found: Mapping[str, Leaf]) -> list[Slot]:
    """What a plan decides on the module path: every weight and every weighted layer's input."""
    out = [Slot(member(name, "weight"), name, "weight") for name in found]
    return out + [Slot(member(name, "input"), name, "activation") for name, one in found.items() if one.op != "embedding"]


def install(
    module: nn.Module,
    tensors: Mapping[str, QTensor],
    ties: Mapping[str, str],
    activations: Mapping[str, Site],
    weight: Callable[[QTensor], Weight] = PackedWeight,
) -> nn.Module:
    """Replace the weighted leaves of ``module`` that have a packed tensor or a quantized input, in place and wherever they are
    used; tied layers share one packed weight. Returns the module, or what stands for it where it is itself a leaf."""
    shared: dict[str, Weight] = {}
    places: dict[nn.Module, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        places.setdefault(child, []).append(path)
    for name, one in leaves(module).items():
        key = ties.get(member(name, "weight"), member(name, "weight"))
        if key not in tensors and member(name, "input") not in activations:
            continue
        if key not in shared:
            shared[key] = weight(tensors[key]) if key in tensors else FloatWeight(one.weight)
            shared[key].dtype = one.weight.dtype
        layer = QLayer(one.op, one.attrs, shared[key], one.bias, activations.get(member(name, "input")))
        if not name:
            return layer
        for path in places[module.get_submodule(name)]:
            parent, _, child_name = path.rpartition(".")
            setattr(module.get_submodule(parent), child_name, layer)
    return module


def state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each shared tensor once."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    out = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and not tensor.is_meta and key in seen:
            continue
        seen.add(key)
        out[name] = tensor.detach()
    return out
