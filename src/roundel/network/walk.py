"""The module path: weighted leaf modules of an ordinary network, found, described and replaced; no graph is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.qtensor import QTensor
from ..plan import Slot
from .layer import Activation, FakeWeight, PackedWeight, QLayer


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


def _sequence(value: int | tuple[int, ...], n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value)


def leaf(name: str, module: nn.Module) -> Leaf | None:
    """What ``module`` computes, or None where Roundel has no quantized counterpart of it."""
    kind = type(module)
    if kind in (nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        n = 1 if kind is nn.Conv1d else 2
        pads = [p for side in reversed(_sequence(module.padding, n)) for p in (side, side)]
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
    if kind is nn.Linear or kind.__name__ == "NonDynamicallyQuantizableLinear":
        return Leaf(name, "linear", {}, module.weight, module.bias)
    if kind.__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2 layer: y = x W + b with W (in, out)
        return Leaf(name, "linear", {}, module.weight.t(), module.bias)
    if isinstance(module, nn.Embedding) and module.max_norm is None and type(module).forward is nn.Embedding.forward:
        return Leaf(name, "embedding", {}, module.weight, None)
    return None


def leaves(module: nn.Module) -> dict[str, Leaf]:
    """Name -> weighted leaf, in the order of the modules; parametrized modules are left alone (their weight is computed)."""
    found = {}
    for name, child in module.named_modules():
        if hasattr(child, "parametrizations"):
            continue
        if (one := leaf(name, child)) is not None and one.weight.is_floating_point():
            found[name] = one
    return found


def tied(found: Mapping[str, Leaf]) -> dict[str, str]:
    """Weight name -> the earlier weight name it shares memory with."""
    first: dict[tuple[int, int], str] = {}
    ties = {}
    for name, one in found.items():
        key = (one.weight.data_ptr() if not one.weight.is_meta else id(one.weight), one.weight.numel())
        if key in first:
            ties[f"{name}.weight"] = first[key]
        else:
            first[key] = f"{name}.weight"
    return ties


def leaf_slots(found: Mapping[str, Leaf]) -> list[Slot]:
    """What a plan decides on the module path: every weight and every weighted layer's input."""
    out = [Slot(f"{name}.weight", name, "weight") for name in found]
    return out + [Slot(f"{name}.input", name, "activation") for name, one in found.items() if one.op != "embedding"]


def install(
    module: nn.Module,
    tensors: Mapping[str, QTensor],
    ties: Mapping[str, str],
    activations: Mapping[str, Activation],
    weight: Callable[[QTensor], PackedWeight | FakeWeight] = PackedWeight,
) -> nn.Module:
    """Replace the weighted leaves of ``module`` that have a packed tensor, in place; tied layers share one packed weight."""
    shared: dict[str, PackedWeight | FakeWeight] = {}
    for name, one in leaves(module).items():
        key = ties.get(f"{name}.weight", f"{name}.weight")
        if key not in tensors:
            continue
        if key not in shared:
            shared[key] = weight(tensors[key])
        layer = QLayer(one.op, one.attrs, shared[key], one.bias, activations.get(f"{name}.input"))
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)
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
