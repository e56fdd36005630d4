"""Weights solved anew and biases corrected in order of execution, after rounding to nearest; what stays is not decided here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .data import Batch
from .formats.qtensor import QTensor
from .graph import Graph, GraphModule, Node
from .graph.module import Env
from .network.layer import WEIGHTED, PackedWeight
from .network.run import QGraphModule
from .network.sweep import MATRIX, channel_sums, columns, second_moment, sweep
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
    # A tensor that is used twice is refined where it is used first, or not at all if that is a look-up; one that all steps of a
    # recurrent layer use learns from all of them, and changes at the last.
    left: Counter[str] = Counter()
    for node in q.structure.nodes:
        if node.op in WEIGHTED:
            left.update(name for name in node.inputs[1:3] if node.attrs.get("site") or name not in left)
    moments: dict[str, Tensor] = {}
    shifts: dict[str, tuple[Tensor, int]] = {}
    with torch.no_grad():
        for node, pairs in sweep(real, module, batches):
            weight, offset = (*node.inputs[1:], "")[:2]
            left.subtract((weight, offset))
            if node.op not in MATRIX or weight not in tensors or left[weight] < 0:
                continue
            if solve:
                moment = sum((second_moment(columns(node.op, node.attrs, now[node.inputs[0]], tensors[weight].shape))
                              for _, now in pairs), torch.zeros(()))  # fmt: skip
                moments[weight] = moments.get(weight, torch.zeros(())) + moment
            if solve and not left[weight]:
                tensors[weight] = solve(weight, moments.pop(weight))
                module.put(weight, PackedWeight(tensors[weight]))
            if bias and offset in rest and left[offset] >= 0:  # a computed bias is no constant to move
                total, count = _shift(node, real, module, pairs)
                before, places = shifts.get(offset, (torch.zeros((), dtype=torch.float64), 0))
                shifts[offset] = before + total, places + count
                if not left[offset]:
                    mean = (shifts[offset][0] / max(1, shifts[offset][1])).float()
                    rest[offset] = rest[offset] + mean.to(rest[offset].dtype)
                    module.move(offset, rest[offset])
    structure = replace(q.structure, constants=Constants({**tensors, **rest}))
    return replace(q, structure=structure, tensors=tensors, rest=rest)


def _shift(node: Node, real: GraphModule, quantized: QGraphModule, pairs: Pairs) -> tuple[Tensor, int]:
    """By how much the float layer's outputs, before its activation function, exceed the quantized layer's, per channel: the sum
    over all places, and how many they are."""
    bare = Node(node.op, node.inputs, node.outputs, {key: value for key, value in node.attrs.items() if key != "act"})
    total, count = torch.zeros((), dtype=torch.float64), 0
    for before, now in pairs:
        wanted, places = channel_sums(node.op, real.compute(bare, before))
        got, _ = channel_sums(node.op, quantized.compute(bare, now))
        total, count = total + wanted - got, count + places
    return total, count
