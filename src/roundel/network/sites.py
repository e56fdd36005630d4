"""Sites of a graph: which values are quantized together, which operations only move values, and what a plan can decide."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import Graph, Node
from ..plan import Slot
from .layer import WEIGHTED

#: Operations whose result holds only numbers of their first operand: it inherits that operand's parameters.
MOVES = frozenset(
    [
        "identity",
        "reshape",
        "transpose",
        "slice",
        "split",
        "pad",
        "expand",
        "expand_batch",
        "gather",
        "max_pool",
        "amax",
        "depth_to_space",
    ]
)

#: Operations whose operands and result share one set of parameters.
SHARED = frozenset(["concat", "where"])

#: Operands by position that hold parameters of the operation, not activations: never sites.
_PARAMETERS = {"conv": (1, 2), "conv_transpose": (1, 2), "linear": (1, 2), "embedding": (0, 1), "batch_norm": (1, 2, 3, 4),
               "layer_norm": (1, 2), "rms_norm": (1,), "group_norm": (1, 2), "prelu": (1,), "pow": (1,), "gather": (1,),
               "expand_batch": (1,), "attention": (3,)}  # fmt: skip

#: Operations whose result is not a real number.
_DISCRETE = frozenset(["argmax", "compare"])


@dataclass(frozen=True)
class Sites:
    """``root[value]`` is the site that a value belongs to; ``origin[site]`` are the values that are computed there, in order."""

    root: dict[str, str]
    origin: dict[str, list[str]]


def find_sites(graph: Graph) -> Sites:
    """Group the real-valued edges of a fused graph (constants that meet activations included) into sites."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    def join(a: str, b: str) -> None:
        # the earlier name stands for the group
        a, b = find(a), find(b)
        parent[b] = a

    real = {name for name in graph.inputs if (spec := graph.values.get(name)) is None or "float" in spec.dtype}
    parent.update({name: name for name in graph.inputs if name in real})
    moved: set[str] = set()
    marked: dict[str, str] = {}
    for node in graph.nodes:
        operands = [name for name in edges(node) if name]
        for name in operands:
            if name in graph.constants and graph.constants[name].is_floating_point():
                parent.setdefault(name, name)
        if node.op in _DISCRETE or (node.op == "cast" and "float" not in node.attrs["dtype"]):
            continue
        if node.op in MOVES and operands and operands[0] not in parent:
            continue  # moves whole numbers (ids, masks)
        for out in node.outputs:
            parent[out] = out
            if node.op in MOVES:
                join(operands[0], out)
                if node.op != "pad" or not 0 < abs(node.attrs.get("value", 0.0)) < float("inf"):  # a border may widen the range
                    moved.add(out)
            if key := node.attrs.get("site"):
                join(marked.setdefault(key, out), out)
        if node.op in SHARED:
            for name in operands[1 if node.op == "where" else 0 :]:
                if name in parent:
                    join(name, node.outputs[0])  # an operand is made before the result
            moved.update(node.outputs)
    root = {name: find(name) for name in parent}
    origin: dict[str, list[str]] = {}
    for name in parent:
        if name not in moved:
            origin.setdefault(root[name], []).append(name)
    return Sites(root, origin)


def fine_sites(graph: Graph) -> list[str]:
    """Sites with results that are marked ``fine``: what a recurrent cell adds to, step after step."""
    root = find_sites(graph).root
    return list(dict.fromkeys(root[out] for node in graph.nodes if node.attrs.get("fine") for out in node.outputs))


def edges(node: Node) -> list[str]:
    """Operands of a node that are activations (or constants in an activation's place), not parameters."""
    skip = _PARAMETERS.get(node.op, ())
    return [name for i, name in enumerate(node.inputs) if i not in skip]


def find_weights(graph: Graph) -> dict[str, Node]:
    """Weight constant -> the first node that computes with it."""
    found: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op in WEIGHTED and node.inputs[1] in graph.constants and graph.constants[node.inputs[1]].is_floating_point():
            found.setdefault(node.inputs[1], node)
    return found


def find_slots(graph: Graph, static: bool) -> list[Slot]:
    """What a plan decides: every weight; then every site, or, for dynamic plans, the input of every weighted layer."""
    out = [Slot(name, node.name, "weight") for name, node in find_weights(graph).items()]
    if static:
        sites = find_sites(graph)
        readers: dict[str, list[str]] = {name: [] for name in sites.origin}
        for node in graph.nodes:
            if node.op in WEIGHTED and node.inputs[0] in sites.root:
                readers[sites.root[node.inputs[0]]].append(f"{node.name}.input")
        out += [Slot(name, name, "activation", tuple(readers[name])) for name in sites.origin]
    else:
        out += [Slot(f"{node.name}.input", node.name, "activation") for node in graph.nodes
                if node.op in WEIGHTED and node.op != "embedding"]  # fmt: skip
    return out
