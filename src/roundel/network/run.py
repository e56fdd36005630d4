"""`QGraphModule` runs a quantized graph from packed weights; `quantized_module` puts packed layers into an ordinary network.

Both compute through `layer.weighted`, and both make a twin that trains by taking other weights and sites for the stored ones.
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
from .layer import WEIGHTED, Activation, FloatWeight, PackedWeight, Site, Weight, exact_dtype, exactly, span, weighted
from .running import Running
from .sites import find_sites

#: Linear operations of one operand: sums of codes are exact, so they run on codes and are scaled after.
_SUMS = frozenset(["mean", "avg_pool", "sum"])


class QGraphModule(Interpreter):
    """The interpreter of a quantized graph: sites are put on their grids, weighted layers compute on codes.

    ``activations`` maps a site (static) or ``layer.input`` (dynamic) to its `Activation`, or to a module that trains in its place.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, QTensor],
        activations: Mapping[str, Site],
        rest: Mapping[str, Tensor],
        weight: Callable[[QTensor], Weight] = PackedWeight,
    ) -> None:
        super().__init__(graph)
        self.activations = {name: _live(site) for name, site in activations.items()}
        self.sites = nn.ModuleDict({_key(name): site for name, site in self.activations.items() if isinstance(site, nn.Module)})
        self.weights = nn.ModuleDict({_key(name): weight(q) for name, q in tensors.items()})  # type: ignore[misc]
        self.rest = nn.ParameterDict(
            {_key(name): nn.Parameter(t.detach(), requires_grad=t.is_floating_point()) for name, t in rest.items()}
        )
        self.norms = nn.ModuleDict()
        for node in graph.nodes:
            spec = graph.values.get(node.name)
            if node.op == "embedding" and spec is not None and _key(node.inputs[1]) in self.weights:
                self.weights[_key(node.inputs[1])].dtype = getattr(torch, spec.dtype)
        found = find_sites(graph)
        self._root = found.root
        self._made = {name for names in found.origin.values() for name in names}

    def put(self, name: str, weight: Weight) -> None:
        """Take another weight under ``name``."""
        self.weights[_key(name)] = weight  # type: ignore[assignment]

    def norm(self, bias: str, live: nn.Module) -> None:
        """Take a batch norm under training in the place of a bias: ``live.operand()`` is the bias, or makes outputs of sums."""
        del self.rest[_key(bias)]
        self.norms[_key(bias)] = live

    def packed(self) -> dict[str, Any]:
        """The weights by name."""
        return {name.replace("\x1f", "."): weight for name, weight in self.weights.items()}

    def move(self, name: str, value: Tensor) -> None:
        """Give a constant that is not packed another value, in runs that have begun too."""
        self.rest[_key(name)].data.copy_(value)

    def floats(self) -> dict[str, Tensor]:
        """What is not packed, by name."""
        found = dict(self.rest.items()) | {name: norm.bias() for name, norm in self.norms.items()}  # type: ignore[operator]
        return {name.replace("\x1f", "."): value for name, value in found.items()}

    def constants(self) -> dict[str, Any]:
        found = {name: self.rest[_key(name)] for name in self.structure.constants if _key(name) in self.rest}
        found |= {name.replace("\x1f", "."): norm.operand() for name, norm in self.norms.items()}  # type: ignore[operator]
        return {name: self.settled(name, value) if name in self._root else value for name, value in found.items()}

    def settled(self, name: str, value: Any) -> Any:
        site = self._static(name)
        if site is None or not value.is_floating_point():
            return value
        if name in self._made and isinstance(site, Running):
            return site.follow(value)
        # what only moves numbers of a site leaves them on its grid; in training they may be off it on purpose
        return value if self.training and name not in self._made else site.quantize(value)

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
            if scale is not None and (scale.ndim == 0 or isinstance(site, Running)):
                attrs = {k: v for k, v in node.attrs.items() if k != "act"}
                out = OPS[op](code.double(), **attrs).to(code.dtype)
                out = out * (scale.reshape(-1, *[1] * (out.ndim - 1)) if scale.ndim else scale)
                return ACTS[act](out) if (act := node.attrs.get("act")) else out
        if op == "matmul" and (a := self._static(node.inputs[0])) and (b := self._static(node.inputs[1])):
            (code_a, scale_a), (code_b, scale_b) = a.codes(operands[0]), b.codes(operands[1])
            if scale_a is not None and scale_b is not None:
                dtype = exact_dtype(span(a.format) * span(b.format) * code_a.shape[-1])
                with exactly(code_a):
                    out = OPS[op](code_a.to(dtype), code_b.to(dtype), **node.attrs)
                return (out * (scale_a * scale_b).to(dtype)).to(operands[0].dtype)
        return OPS[op](*operands, **node.attrs)

    def _value(self, env: dict[str, Any], name: str) -> Any:
        """An operand; a packed weight that is read outside a weighted operation is dequantized for that use."""
        if name not in env and _key(name) in self.weights:
            return self.weights[_key(name)].values()  # type: ignore[operator]
        return env[name]

    def _static(self, name: str) -> Site | None:
        found = self.activations.get(self._root.get(name, ""))
        return found if found is not None and found.when != "dynamic" else None


def _live(site: Site) -> Site:
    """A stored site that follows its numbers, as the module that does it."""
    return Running(site) if isinstance(site, Activation) and site.when == "running" else site


def _key(name: str) -> str:
    """Module and parameter names may not hold dots."""
    return name.replace(".", "\x1f")
