"""`QGraphModule` runs a quantized graph from packed weights; `quantized_module` puts packed layers into an ordinary network.

Both compute through `layer.weighted`, and both make the fake-quantized twin by taking `FakeWeight` for `PackedWeight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.qtensor import QTensor
from ..graph import Graph, Node
from ..graph.module import Env, Interpreter
from ..graph.ops import ACTS, OPS
from .layer import WEIGHTED, Activation, FakeWeight, FloatWeight, PackedWeight, exact_dtype, span, weighted
from .sites import find_sites

#: Linear operations of one operand: sums of codes are exact, so they run on codes and are scaled after.
_SUMS = frozenset(["mean", "avg_pool", "sum"])


class QGraphModule(Interpreter):
    """The interpreter of a quantized graph: sites are put on their grids, weighted layers compute on codes.

    ``activations`` maps a site (static) or ``layer.input`` (dynamic) to its `Activation`.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, QTensor],
        activations: Mapping[str, Activation],
        rest: Mapping[str, Tensor],
        weight: Callable[[QTensor], PackedWeight | FakeWeight] = PackedWeight,
    ) -> None:
        super().__init__(graph)
        self.activations = dict(activations)
        self.weights = nn.ModuleDict({_key(name): weight(q) for name, q in tensors.items()})
        self.rest = nn.ParameterDict(
            {_key(name): nn.Parameter(t.detach(), requires_grad=t.is_floating_point()) for name, t in rest.items()}
        )
        for node in graph.nodes:
            spec = graph.values.get(node.name)
            if node.op == "embedding" and spec is not None and _key(node.inputs[1]) in self.weights:
                self.weights[_key(node.inputs[1])].dtype = getattr(torch, spec.dtype)
        self._root = find_sites(graph).root

    def put(self, name: str, weight: PackedWeight | FakeWeight) -> None:
        """Take another weight under ``name``."""
        self.weights[_key(name)] = weight

    def move(self, name: str, value: Tensor) -> None:
        """Give a constant that is not packed another value, in runs that have begun too."""
        self.rest[_key(name)].data.copy_(value)

    def constants(self) -> dict[str, Any]:
        found = {name: self.rest[_key(name)] for name in self.structure.constants if _key(name) in self.rest}
        return {name: self.settled(name, value) if name in self._root else value for name, value in found.items()}

    def settled(self, name: str, value: Any) -> Any:
        site = self._static(name)
        return site.quantize(value) if site is not None and value.is_floating_point() else value

    def compute(self, node: Node, env: Env) -> Any:
        op = node.op
        dynamic = self.activations.get(f"{node.name}.input")
        if op in WEIGHTED and (dynamic or _key(node.inputs[1]) in self.weights):
            key = _key(node.inputs[1])
            weight = self.weights[key] if key in self.weights else FloatWeight(env[node.inputs[1]])
            x, bias = self._value(env, node.inputs[0]), env[node.inputs[2]] if len(node.inputs) > 2 else None
            return weighted(op, node.attrs, x, weight, bias, dynamic or self._static(node.inputs[0]))  # type: ignore[arg-type]
        operands = [self._value(env, name) for name in node.inputs]
        if op in _SUMS and (site := self._static(node.inputs[0])):
            code, scale = site.codes(operands[0])
            if scale is not None and scale.ndim == 0:
                attrs = {k: v for k, v in node.attrs.items() if k != "act"}
                out = OPS[op](code.double(), **attrs).to(code.dtype) * scale
                return ACTS[act](out) if (act := node.attrs.get("act")) else out
        if op == "matmul" and (a := self._static(node.inputs[0])) and (b := self._static(node.inputs[1])):
            (code_a, scale_a), (code_b, scale_b) = a.codes(operands[0]), b.codes(operands[1])
            if scale_a is not None and scale_b is not None:
                dtype = exact_dtype(span(a.format) * span(b.format) * code_a.shape[-1])
                out = OPS[op](code_a.to(dtype), code_b.to(dtype), **node.attrs)
                return (out * (scale_a * scale_b).to(dtype)).to(operands[0].dtype)
        return OPS[op](*operands, **node.attrs)

    def _value(self, env: dict[str, Any], name: str) -> Any:
        """An operand; a packed weight that is read outside a weighted operation is dequantized for that use."""
        if name not in env and _key(name) in self.weights:
            return self.weights[_key(name)].values()  # type: ignore[operator]
        return env[name]

    def _static(self, name: str) -> Activation | None:
        found = self.activations.get(self._root.get(name, ""))
        return found if found is not None and found.when == "static" else None


def _key(name: str) -> str:
    """Module and parameter names may not hold dots."""
    return name.replace(".", "\x1f")
