"""`GraphModule`: the interpreter of a `Graph`, an ordinary trainable `nn.Module`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .graph import Graph, Node
from .ops import MISFIT, OPS

#: The values alive during a run, and the constants.
Env = dict[str, Any]


class Interpreter(nn.Module, ABC):
    """Runs the nodes of a `Graph` in order; what a constant, an operation and a made value are is for its two kinds to say.

    Inputs are positional, in the graph's order, or named. One output comes back bare, several as a tuple.
    """

    #: Called as ``watch(name, value)`` on every input and every result as it is made.
    watch: Callable[[str, Tensor], None] | None = None

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        if graph.opset != "real":
            raise InputError(f"this graph holds {graph.opset} operations; roundel.simulate runs it")
        self.structure = graph

    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """The constants that operations find under their names."""

    @abstractmethod
    def compute(self, node: Node, env: Env) -> Any:
        """The result of one node."""

    def settled(self, name: str, value: Any) -> Any:
        """What an input or result is to those who read it."""
        return value

    def forward(self, *args: Tensor, **named: Tensor) -> Any:
        env = bind_inputs(self.structure, args, named)
        for _ in self._steps(env):
            pass
        outs = tuple(env[name] for name in self.structure.outputs)
        return outs[0] if len(outs) == 1 else outs

    def steps(self, *args: Tensor, **named: Tensor) -> Iterator[tuple[Node, Env]]:
        """The run of one batch, stopping before each node, with the values alive at that point."""
        return self._steps(bind_inputs(self.structure, args, named))

    def _steps(self, env: Env) -> Iterator[tuple[Node, Env]]:
        graph = self.structure
        for name in graph.inputs:
            self._enter(env, name, env[name])
        env |= self.constants()
        env[""] = None
        last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        for i, node in enumerate(graph.nodes):
            yield node, env
            try:
                result = self.compute(node, env)
                made = dict(zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=True))
            except MISFIT as err:
                shapes = [tuple(env[n].shape) for n in node.inputs if env.get(n) is not None]
                raise InputError(f"{node.name!r} ({node.op}) cannot take operands of shapes {shapes}: {err}") from err
            for name, value in made.items():
                self._enter(env, name, value)
            for name in node.inputs:
                if name and last_use[name] == i and name not in graph.outputs and name not in graph.constants:
                    env.pop(name, None)

    def _enter(self, env: Env, name: str, value: Any) -> None:
        env[name] = self.settled(name, value)
        if self.watch:
            self.watch(name, env[name])


class GraphModule(Interpreter):
    """Runs a `Graph`; floating constants are parameters, others buffers, so training and `state_dict` work as usual."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.weights = nn.ParameterDict()
        self._keys = {name: name.replace(".", "\x1f") for name in graph.constants}
        for name, tensor in graph.constants.items():
            self.weights[self._keys[name]] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())

    @property
    def graph(self) -> Graph:
        """The graph with the constants as they are now (after training, say)."""
        live = {name: self.weights[key].detach() for name, key in self._keys.items()}
        return replace(self.structure, constants=live)

    def constants(self) -> dict[str, Any]:
        return {name: self.weights[key] for name, key in self._keys.items()}

    def compute(self, node: Node, env: Env) -> Any:
        return OPS[node.op](*[env[name] for name in node.inputs], **node.attrs)


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
