"""The `Graph` value: SSA nodes over named values, with its canonical JSON; it computes nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch

from ..errors import InputError

#: The name of the symbolic batch dimension in a `Spec.shape`.
BATCH = "N"

#: The integer op set: what `integer.lower` writes, as `integer.ops` defines it. The real one is `OPS`.
INTEGER_OPS = frozenset(
    ["quantize", "dequantize", "conv", "conv_transpose", "linear", "embedding", "matmul", "attention", "norm",
     "softmax", "add", "sub", "mul", "rescale", "prelu", "table", "sum", "sum_pool", "avg_pool", "max_pool", "amax",
     "argmax", "resize", "depth_to_space", "reshape", "transpose", "slice", "concat", "pad", "expand",
     "expand_batch", "gather"]
)  # fmt: skip


class Spec(msgspec.Struct, frozen=True):
    """Shape and dtype of a value; a dimension is a size or a symbol such as ``"N"``."""

    shape: tuple[int | str, ...]
    dtype: str = "float32"


class Node(msgspec.Struct, frozen=True):
    """One operation: ``outputs = op(*inputs, **attrs)``; an absent optional operand is ``""``.

    A node is named by its first output, so a site (a value) and the layer that makes it share one name.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self.outputs[0]


class _Wire(msgspec.Struct, omit_defaults=True):
    """What `Graph.to_json` writes: everything but the constants' numbers."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    values: dict[str, Spec]
    opset: str = "real"


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as data.

    ``nodes`` are in execution order, each value is made once. ``constants`` maps a name such as ``conv1.weight`` to its
    tensor; ``values`` gives the `Spec` of the inputs and, where known, of every other value. ``notes`` are sentences that a
    reader or a pass wants the user to see. ``opset`` names the list of operations: ``"real"``, or ``"integer"`` once lowered.

    >>> graph = Graph(("x",), ("y",), (Node("relu", ("x",), ("y",)),))
    >>> Graph.from_json(graph.to_json(), {}).to_json() == graph.to_json()
    True
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    values: Mapping[str, Spec] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    opset: str = "real"

    def __post_init__(self) -> None:
        from .ops import OPS, misfit

        ops = {"real": OPS.keys(), "integer": INTEGER_OPS}.get(self.opset)
        if ops is None:
            raise InputError(f"there is no op set {self.opset!r}; there are real and integer")
        known = {"", *self.inputs, *self.constants}
        if len(known) != 1 + len(self.inputs) + len(self.constants):
            raise InputError("a graph input and a constant share one name")
        for node in self.nodes:
            if not node.outputs:
                raise InputError(f"a node of operation {node.op!r} makes no value")
            if node.op not in ops:
                raise InputError(f"operation {node.op!r} of {node.name!r} is not one of: {', '.join(sorted(ops))}")
            if missing := [name for name in node.inputs if name not in known]:
                raise InputError(f"{node.name!r} ({node.op}) reads {missing[0]!r} before any node makes it")
            if self.opset == "real" and (wrong := misfit(node.op, node.attrs)):
                raise InputError(f"{node.name!r} ({node.op}) {wrong}")
            for out in node.outputs:
                if out in known:
                    raise InputError(f"{out!r} is made twice in the graph")
                known.add(out)
        if odd := [name for name, spec in self.values.items() if not isinstance(getattr(torch, spec.dtype, None), torch.dtype)]:
            raise InputError(f"value {odd[0]!r} is of no type that torch has: {self.values[odd[0]].dtype!r}")
        if missing := [name for name in self.outputs if name not in known]:
            raise InputError(f"the graph's output {missing[0]!r} is made by no node")

    # -- looking around -------------------------------------------------------------------------------------------

    def producers(self) -> dict[str, Node]:
        """Value name -> the node that makes it (inputs and constants have none)."""
        return {out: node for node in self.nodes for out in node.outputs}

    def consumers(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it, in order, each once."""
        uses: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                uses.setdefault(name, []).append(node)
        return uses

    def users(self, name: str) -> int:
        """How many readers a value has, the graph's own outputs counted."""
        return len(self.consumers().get(name, [])) + self.outputs.count(name)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    # -- changing: every change is a new graph --------------------------------------------------------------------

    def with_nodes(self, nodes: Iterable[Node], constants: Mapping[str, torch.Tensor] | None = None) -> Graph:
        """The same inputs and outputs over other nodes; dead nodes and unused constants are dropped."""
        nodes = tuple(nodes)
        pool = {**self.constants, **(constants or {})}
        live, kept = set(self.outputs), []
        for node in reversed(nodes):
            if live.intersection(node.outputs):
                kept.append(node)
                live.update(node.inputs)
        made = {out for node in kept for out in node.outputs}
        return replace(
            self,
            nodes=tuple(reversed(kept)),
            constants={k: v for k, v in pool.items() if k in live},
            values={k: v for k, v in self.values.items() if k in made or k in live or k in self.inputs},
        )

    # -- text -----------------------------------------------------------------------------------------------------

    def to_json(self) -> bytes:
        """Canonical JSON (sorted keys, no blanks): equal graphs give equal bytes. The constants' numbers are not in it."""
        wire = _Wire(self.inputs, self.outputs, self.nodes, dict(self.values), self.opset)
        return msgspec.json.encode(wire, order="sorted")

    @classmethod
    def from_json(cls, text: bytes | str, constants: Mapping[str, torch.Tensor]) -> Graph:
        """Read `to_json` back over the given constants; raises `InputError` on anything else."""
        try:
            wire = msgspec.json.decode(text, type=_Wire)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise InputError(f"the graph's description is not readable: {err}") from err
        return cls(wire.inputs, wire.outputs, wire.nodes, constants, wire.values, opset=wire.opset)
