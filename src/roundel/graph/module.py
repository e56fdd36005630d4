"""`GraphModule`: the one interpreter of a `Graph`, an ordinary trainable `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .graph import Graph
from .ops import MISFIT, OPS


class GraphModule(nn.Module):
    """Runs a `Graph`; floating constants are parameters, others buffers, so training and `state_dict` work as usual.

    Inputs are positional, in the graph's order, or named. One output comes back bare, several as a tuple.
    """

    #: Called as ``watch(name, value)`` on every input and every result as it is made.
    watch: Callable[[str, Tensor], None] | None = None

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        if graph.opset != "real":
            raise InputError(f"this graph holds {graph.opset} operations; roundel.simulate runs it")
        self.structure = graph
        self.weights = nn.ParameterDict()
        self._keys = {name: name.replace(".", "\x1f") for name in graph.constants}
        for name, tensor in graph.constants.items():
            self.weights[self._keys[name]] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())

    @property
    def graph(self) -> Graph:
        """The graph with the constants as they are now (after training, say)."""
        live = {name: self.weights[key].detach() for name, key in self._keys.items()}
        return Graph(
            self.structure.inputs, self.structure.outputs, self.structure.nodes, live, self.structure.values, self.structure.notes
        )

    def forward(self, *args: Tensor, **named: Tensor) -> Any:
        graph, watch = self.structure, self.watch
        env: dict[str, Any] = bind_inputs(graph, args, named)
        env[""] = None
        for name, key in self._keys.items():
            env[name] = self.weights[key]
        if watch:
            for name in graph.inputs:
                watch(name, env[name])
        last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        for i, node in enumerate(graph.nodes):
            try:
                result = OPS[node.op](*[env[name] for name in node.inputs], **node.attrs)
                results = result if isinstance(result, tuple) else (result,)
                made = dict(zip(node.outputs, results, strict=True))
            except MISFIT as err:
                shapes = [tuple(env[n].shape) if env[n] is not None else None for n in node.inputs]
                raise InputError(f"{node.name!r} ({node.op}) cannot take operands of shapes {shapes}: {err}") from err
            for name, value in made.items():
                env[name] = value
                if watch:
                    watch(name, value)
            for name in node.inputs:
                if last_use[name] == i and name not in graph.outputs and name not in graph.constants and name:
                    env.pop(name, None)
        outs = tuple(env[name] for name in graph.outputs)
        return outs[0] if len(outs) == 1 else outs


def bind_inputs(graph: Graph, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positional and named arguments -> {input name: tensor}; raises `InputError` naming what is missing or unknown."""
    env = dict(zip(graph.inputs, args, strict=False)) | named
    if len(args) > len(graph.inputs) or set(env) != set(graph.inputs):
        raise InputError(f"the model takes inputs {list(graph.inputs)}; got {len(args)} positional and {sorted(named)} named")
    for name, tensor in env.items():
        spec = graph.values.get(name)
        if spec is None:
            continue
        fits = tensor.ndim == len(spec.shape) and all(
            isinstance(want, str) or want == got for want, got in zip(spec.shape, tensor.shape, strict=False)
        )
        if not fits:
            raise InputError(f"input {name!r} must have shape {list(spec.shape)}; got {list(tensor.shape)}")
        if tensor.is_floating_point() != getattr(torch, spec.dtype).is_floating_point:
            raise InputError(f"input {name!r} must be {spec.dtype}; got {str(tensor.dtype).removeprefix('torch.')}")
    return env
