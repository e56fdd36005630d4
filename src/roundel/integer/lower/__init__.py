"""`lower`: a statically quantized graph as a graph of integers, every factor between scales a multiplier and a shift.

What it takes: weights of 2 to 8 bits, and tables of up to 256 numbers, with one scale per tensor or output; activations of up to 16
bits with static parameters. What it leaves out, and refuses by name: groups, and every operation without a row in `rules.RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...errors import PlanError, RoundelError
from ...graph import Graph, Node
from ...graph.ops import MARKS
from ...qmodel import QModel
from .. import ops
from ..check import accumulators, check_integer
from ..dialect import INTEGER, RULES
from . import rules
from .making import Lowering

__all__ = ["in_dialect", "lower"]


def lower(q: QModel, dialect: str = "R2") -> Graph:
    """The integer graph of ``q``: between its doors no float operation and no sum that could leave its type.

    ``dialect`` is the rounding of every rescale: R1 (gemmlowp, TFLite Micro), R2 (one multiplication and shift, ties up), R2a (ties
    away), R3 (ruy); see docs/integer.md. Values keep the names of their sites and PyTorch's layout; weights stay packed. Raises
    `PlanError` with every node that cannot be lowered and why.

    >>> import torch
    >>> from roundel import quantize, simulate
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU()), "int4", "int8", data=[torch.randn(64, 16)])
    >>> graph = lower(q)
    >>> [node.op for node in graph], graph.nodes[1].attrs["rounding"]
    (['quantize', 'linear', 'dequantize'], 'R2')
    """
    if not isinstance(q.structure, Graph):
        raise PlanError(f"only a graph can be lowered, and this model's structure is {type(q.structure).__name__}: "
                        "quantize with data=, so that it can be captured")  # fmt: skip
    if dialect not in INTEGER:
        known = " It is float arithmetic: see in_dialect." if dialect in RULES else ""
        raise PlanError(f"there is no integer dialect {dialect!r}; there are {', '.join(INTEGER)}.{known}")
    made = Lowering(q, q.structure, dialect)
    for node in (*made.doors(), *map(_bare, q.structure.nodes)):
        try:
            if node.op not in rules.RULES:
                raise PlanError("there is no integer definition of it yet")
            rules.RULES[node.op](made, node)
        except RoundelError as err:
            made.refuse(node, str(err))
    if made.refused:
        told = "".join(f"\n  {', '.join(names)}: {why}" for why, names in made.refused.items())
        count = sum(map(len, made.refused.values()))
        raise PlanError(f"{count} nodes of this model cannot be lowered to integers:{told}")
    outputs = tuple(made.real(name) for name in q.structure.outputs)
    graph = Graph(q.structure.inputs, outputs, tuple(made.nodes), made.constants, made.values, q.structure.notes, "integer")
    check_integer(graph)
    return graph


def _bare(node: Node) -> Node:
    """A node without the marks that say what shares parameters: the integer graph has the parameters."""
    return Node(node.op, node.inputs, node.outputs, {key: value for key, value in node.attrs.items() if key not in MARKS})


def in_dialect(graph: Graph, dialect: str | Mapping[str, str]) -> Graph:
    """The same integer graph under another rounding, or under that of each operation: ``{"conv": "R1", "linear": "R2a"}``.

    Operations that the mapping leaves out keep theirs; so do ``wide`` sums, which have one rule. R4 is float arithmetic, for
    comparison with onnxruntime and XNNPACK. Raises `PlanError` for a dialect or an operation that there is not.
    """
    chosen = dict.fromkeys(ops.INTEGER, dialect) if isinstance(dialect, str) else dict(dialect)
    if odd := [f"dialect {name!r}" for name in chosen.values() if name not in RULES]:
        raise PlanError(f"there is no {odd[0]}; there are {', '.join(RULES)}")
    if odd := [f"operation {name!r}" for name in chosen if name not in ops.INTEGER]:
        raise PlanError(f"there is no integer {odd[0]}; there are {', '.join(sorted(ops.INTEGER))}")

    def renamed(node: Node) -> Node:
        if "rounding" not in node.attrs or node.attrs.get("wide") or node.op not in chosen:
            return node
        new = Node(node.op, node.inputs, node.outputs, {**node.attrs, "rounding": chosen[node.op]})
        if (acc := accumulators(graph, new)) is not None:  # terms rounded by another rule sum to a little more or less
            new = Node(new.op, new.inputs, new.outputs, {**new.attrs, "acc": list(acc)})
        return new

    return replace(graph, nodes=tuple(map(renamed, graph)))
