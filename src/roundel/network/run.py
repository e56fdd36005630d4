"""`QGraphModule` runs a quantized graph from packed weights; `quantized_module` puts packed layers into an ordinary network.

Both compute through `layer.weighted`, and both make the fake-quantized twin by taking `FakeWeight` for `PackedWeight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..formats.qtensor import QTensor
from ..graph import Graph
from ..graph.module import bind_inputs
from ..graph.ops import ACTS, MISFIT, OPS
from .layer import WEIGHTED, Activation, FakeWeight, FloatWeight, PackedWeight, exact_dtype, span, weighted
from .sites import find_sites

#: Linear operations of one operand: sums of codes are exact, so they run on codes and are scaled after.
_SUMS = frozenset(["mean", "avg_pool", "sum"])


class QGraphModule(nn.Module):
    """The interpreter of a quantized graph: sites are put on their grids, weighted layers compute on codes.

    ``activations`` maps a site (static) or ``layer.input`` (dynamic) to its `Activation`.
    """

    #: Called as ``watch(name, value)`` on every input and every result as it is made.
    watch: Callable[[str, Tensor], None] | None = None

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, QTensor],
        activations: Mapping[str, Activation],
        rest: Mapping[str, Tensor],
        weight: Callable[[QTensor], PackedWeight | FakeWeight] = PackedWeight,
    ) -> None:
        super().__init__()
        if graph.opset != "real":
            raise InputError(f"this graph holds {graph.opset} operations; roundel.simulate runs it")
        self.structure = graph
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

    def forward(self, *args: Tensor, **named: Tensor) -> Any:
        graph = self.structure
        env: dict[str, Any] = bind_inputs(graph, args, named)
        for name in graph.inputs:
            self._settle(env, name)
        for name in graph.constants:
            if _key(name) in self.rest:
                env[name] = self.rest[_key(name)]
                if name in self._root:
                    env[name] = self._on_grid(name, env[name])
        env[""] = None
        last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        for i, node in enumerate(graph.nodes):
            try:
                result = self._compute(node.op, node, env)
                made = dict(zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=True))
            except MISFIT as err:
                shapes = [tuple(env[n].shape) for n in node.inputs if env.get(n) is not None]
                raise InputError(f"{node.name!r} ({node.op}) cannot take operands of shapes {shapes}: {err}") from err
            for name, value in made.items():
                env[name] = value
                self._settle(env, name)
            for name in node.inputs:
                if name and last_use[name] == i and name not in graph.outputs and name not in graph.constants:
                    env.pop(name, None)
        outs = tuple(env[name] for name in graph.outputs)
        return outs[0] if len(outs) == 1 else outs

    def _compute(self, op: str, node: Any, env: dict[str, Any]) -> Any:
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

    def _on_grid(self, name: str, value: Tensor) -> Tensor:
        site = self._static(name)
        return site.quantize(value) if site is not None and value.is_floating_point() else value

    def _settle(self, env: dict[str, Any], name: str) -> None:
        env[name] = self._on_grid(name, env[name])
        if self.watch:
            self.watch(name, env[name])


def _key(name: str) -> str:
    """Module and parameter names may not hold dots."""
    return name.replace(".", "\x1f")
