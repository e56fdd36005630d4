"""A quantized model as integer hardware computes it: biases of 32 bits, and, on x86 without VNNI, sums of two products in 16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats.grid import Uniform
from ..formats.qtensor import QTensor
from ..graph import Graph, Node
from ..graph.module import bind_inputs
from ..graph.ops import ACTS
from ..network.layer import Activation, output_scale
from ..network.run import QGraphModule
from ..network.sites import find_sites
from ..qmodel import QModel
from .edits import with_tensors

#: Largest sum of 32 bits and of 16.
WORD, HALF = 2.0**31 - 1, 2.0**15 - 1


@dataclass(frozen=True, eq=False)
class Meeting:
    """A weighted node whose quantized weight meets a static input of one scale."""

    node: Node
    weight: QTensor
    input: Activation
    #: (outputs,): the scale of its sums.
    unit: Tensor


def meetings(q: QModel) -> list[Meeting]:
    """Every weighted node that integer hardware runs; a module path has none."""
    if not isinstance(q.structure, Graph):
        return []
    root, found = find_sites(q.structure).root, []
    for node in q.structure.nodes:
        weight = q.tensors.get(node.inputs[1]) if node.op in ("conv", "linear", "conv_transpose") else None
        input = q.activations.get(root.get(node.inputs[0], "")) if weight else None
        if weight is None or input is None or input.params is None or input.params.scale is None or input.params.scale.numel() > 1:
            continue
        scale = output_scale(weight.format, weight.params, weight.matrix[0])
        if scale is not None:
            unit = scale.double().reshape(-1) * float(input.params.scale)
            found.append(Meeting(node, weight, input, unit.expand(weight.matrix[0])))
    return found


def overflowing(q: QModel, meeting: Meeting) -> Tensor | None:
    """(outputs,): where its bias does not fit 32 bits at the scale of its sums; None without a bias that is stored."""
    name = (*meeting.node.inputs, "", "")[2]
    bias = q.rest.get(name)
    if bias is None or bias.numel() != len(meeting.unit):
        return None
    return (meeting.unit > 0) & (bias.double().reshape(-1).abs() > WORD * meeting.unit)


def as_computed(q: QModel, vnni: bool) -> nn.Module:
    """The module of ``q`` with its biases cut to 32 bits and, without ``vnni``, its pairs to 16."""
    rest = {}
    for meeting in meetings(q):
        over = overflowing(q, meeting)
        if over is not None and bool(over.any()):
            bias = q.rest[meeting.node.inputs[2]]
            bound = torch.where(meeting.unit > 0, WORD * meeting.unit, torch.inf)
            rest[meeting.node.inputs[2]] = bias.double().clamp(-bound, bound).to(bias.dtype)
    cut = with_tensors(q, rest=rest) if rest else q
    return cut.module if vnni else Paired(cut)


class Paired(nn.Module):
    """A quantized graph on x86 without VNNI: ``vpmaddubsw`` adds two products of an unsigned activation and a signed weight in 16
    bits, saturating. Pairs are neighbours in the order (kernel row, kernel column, input channel); depthwise layers add none."""

    def __init__(self, q: QModel) -> None:
        super().__init__()
        self.inner = q.module
        self.pairs = {one.node.name: one for one in meetings(q) if pairing(one)}

    def forward(self, *args: Tensor, **named: Tensor) -> Any:
        assert isinstance(self.inner, QGraphModule)
        bind_inputs(self.inner.structure, args, named)
        waiting: tuple[str, Tensor] | None = None
        env: dict[str, Any] = {}
        for node, env in self.inner.steps(*args, **named):
            if waiting:
                env[waiting[0]] = waiting[1]
            one = self.pairs.get(node.name)
            waiting = (node.name, self._saturated(one, env)) if one else None
        if waiting:
            env[waiting[0]] = waiting[1]
        outs = tuple(env[name] for name in self.inner.structure.outputs)
        return outs[0] if len(outs) == 1 else outs

    def _saturated(self, one: Meeting, env: dict[str, Any]) -> Tensor:
        node = one.node
        plain = msgspec.structs.replace(node, attrs={k: v for k, v in node.attrs.items() if k != "act"})
        out = self.inner.compute(plain, env)  # type: ignore[operator]
        lost = lost_in_pairs(one, env[node.inputs[0]])
        spread = [1] * out.ndim
        spread[1 if node.op == "conv" else -1] = -1
        out = out + (lost * one.unit.reshape(spread)).to(out.dtype)
        act = node.attrs.get("act")
        return self.inner.settled(node.name, ACTS[act](out) if act else out)  # type: ignore[operator]


def pairing(one: Meeting) -> bool:
    """Whether the layer runs on pairs of 8-bit codes."""
    small = all(isinstance(f.grid, Uniform) and f.bits == 8 for f in (one.weight.format, one.input.format))
    return small and (one.node.op == "linear" or (one.node.op == "conv" and len(one.weight.shape) == 4
                      and one.node.attrs.get("groups", 1) == 1))  # fmt: skip


def lost_in_pairs(one: Meeting, x: Tensor) -> Tensor:
    """What saturating takes from the sums of the layer for the input ``x``, in units of its sums, in the shape of its output."""
    code, _ = one.input.codes(x)
    params = one.input.params
    assert params is not None
    low = one.input.format.extremes[0]
    zero = 0.0 if params.offset is None else float(params.offset)
    level = one.weight.unpack().float().reshape(one.weight.shape)
    if one.node.op == "linear":
        flat = code.float() + (zero - low)
        return _cut(flat.reshape(-1, flat.shape[-1]), level).reshape(*flat.shape[:-1], -1)
    attrs = one.node.attrs
    kernel = level.shape[2:]
    pads = list(attrs.get("padding", [0, 0, 0, 0]))
    wide = F.pad(code.float(), pads if len(pads) == 4 else [pads[1], pads[1], pads[0], pads[0]])
    columns = F.unfold(wide, kernel, attrs.get("dilation", 1), 0, attrs.get("stride", 1)) + (zero - low)
    n, _, places = columns.shape
    columns = columns.reshape(n, level.shape[1], -1, places).permute(0, 3, 2, 1).reshape(n * places, -1)
    lost = _cut(columns, level.flatten(2).permute(0, 2, 1).flatten(1))
    height = (wide.shape[2] - (kernel[0] - 1) * _pair(attrs.get("dilation", 1))[0] - 1) // _pair(attrs.get("stride", 1))[0] + 1
    return lost.reshape(n, places, -1).permute(0, 2, 1).reshape(n, len(level), height, -1)


def _cut(x: Tensor, w: Tensor) -> Tensor:
    """(rows, outputs): the sums of pairs of ``x`` (rows, k) times ``w`` (outputs, k) cut to 16 bits, less the exact ones."""
    if x.shape[1] % 2:
        x, w = F.pad(x, (0, 1)), F.pad(w, (0, 1))
    out = torch.zeros(len(x), len(w), dtype=torch.float64)
    for k in range(0, x.shape[1], 2):
        worst = float(w[:, k : k + 2].abs().sum(1).amax()) * 255
        if worst > HALF:
            pair = x[:, k, None] * w[:, k] + x[:, k + 1, None] * w[:, k + 1]
            out += pair.clamp(-HALF - 1, HALF) - pair
    return out


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
