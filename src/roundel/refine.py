"""Weights solved anew and biases corrected in order of execution, after rounding to nearest; what stays is not decided here."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .data import Batch
from .formats.qtensor import QTensor
from .graph import Graph, GraphModule, Node
from .graph.module import Env
from .network.layer import PackedWeight
from .network.run import QGraphModule
from .network.sweep import MATRIX, channel_sums, columns, second_moment, sweep
from .network.walk import Leaf, member
from .network.watch import watching
from .qmodel import Constants, QModel

#: (name of the weight, its Hessian) -> codes.
Solve = Callable[[str, Tensor], QTensor]

Pairs = Sequence[tuple[Env, Env]]


def refine(q: QModel, real: GraphModule, batches: Sequence[Batch], solve: Solve | None = None, bias: bool = True) -> QModel:
    """``q`` with its weights solved anew and its biases corrected, layer by layer, on the inputs that the quantized layers
    before it leave.

    ``solve`` is called for every quantized convolution and linear layer with the second moment of its inputs. ``bias`` moves
    each bias by the mean difference of its layer's outputs, per channel ("empirical bias correction", Nagel et al. 2019,
    "Data-Free Quantization through Weight Equalization and Bias Correction"); layers without a bias are left alone. ``q``
    holds a graph; ``real`` is the float network that it was made of.
    """
    if not isinstance(q.structure, Graph):
        raise TypeError("only a quantized graph can be swept")
    tensors, rest = dict(q.tensors), {name: t.clone() for name, t in q.rest.items()}
    module = QGraphModule(q.structure, tensors, q.activations, rest).eval()
    done: set[str] = set()  # a tensor that is used twice is refined where it is used first, or not at all if that is a look-up
    with torch.no_grad():
        for node, pairs in sweep(real, module, batches):
            weight, offset = (*node.inputs[1:], "")[:2]
            if weight in done:
                continue
            done.add(weight)
            if node.op not in MATRIX or weight not in tensors:
                continue
            if solve:
                hessian = sum((second_moment(columns(node.op, node.attrs, now[node.inputs[0]], tensors[weight].shape))
                               for _, now in pairs), torch.zeros(()))  # fmt: skip
                tensors[weight] = solve(weight, hessian)
                module.put(weight, PackedWeight(tensors[weight]))
            if bias and offset in rest and offset not in done:  # a computed bias is no constant to move
                done.add(offset)
                rest[offset] = rest[offset] + _shift(node, real, module, pairs).to(rest[offset].dtype)
                module.move(offset, rest[offset])
    structure = replace(q.structure, constants=Constants({**tensors, **rest}))
    return replace(q, structure=structure, tensors=tensors, rest=rest)


def _shift(node: Node, real: GraphModule, quantized: QGraphModule, pairs: Pairs) -> Tensor:
    """By how much the float layer's outputs, before its activation function, exceed the quantized layer's, per channel."""
    bare = Node(node.op, node.inputs, node.outputs, {key: value for key, value in node.attrs.items() if key != "act"})
    total, count = torch.zeros((), dtype=torch.float64), 0
    for before, now in pairs:
        wanted, places = channel_sums(node.op, real.compute(bare, before))
        got, _ = channel_sums(node.op, quantized.compute(bare, now))
        total, count = total + wanted - got, count + places
    return (total / max(1, count)).float()


def hessians(module: nn.Module, found: Mapping[str, Leaf], batches: Sequence[Batch], only: Container[str]) -> dict[str, Tensor]:
    """Second moments of the inputs of weighted leaf modules, by the name of the weight: one pass over ``batches``."""
    layers = {member(name, "input"): (member(name, "weight"), one) for name, one in found.items()}
    moments: dict[str, Tensor] = {}

    def note(site: str, value: Tensor) -> None:
        weight, one = layers.get(site, ("", None))
        if one is None or one.op not in MATRIX or weight not in only:
            return
        moment = second_moment(columns(one.op, one.attrs, value.detach(), one.weight.shape))
        moments[weight] = moments[weight] + moment if weight in moments else moment

    with torch.no_grad(), watching(module, note):
        for batch in batches:
            module(*batch.args, **batch.named)
    return moments
