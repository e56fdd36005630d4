"""What the .tflite runtimes share: codes into and out of the file's layout, and an integer graph cut down to one operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..exporters.tflite import Place
from ..exporters.tflite.units import units
from ..graph import Graph, Node, Spec
from ..integer.dialect import Ints
from ..integer.ops import extremes
from ..qmodel import QModel


def to_file(codes: Ints, place: Place, dtype: str) -> NDArray[Any]:
    """Codes in PyTorch's layout as the file has them. Raises `InputError` for codes that ``dtype`` does not hold."""
    codes = np.asarray(codes)
    low, high = extremes(dtype)
    if codes.size and not low <= codes.min() <= codes.max() <= high:
        raise InputError(f"codes from {codes.min()} to {codes.max()} are no {dtype}")
    return np.ascontiguousarray(codes.transpose(place.order).astype(dtype))


def from_file(codes: NDArray[Any], place: Place) -> Ints:
    """Codes as the file has them in PyTorch's layout, int64."""
    return codes.transpose(np.argsort(place.order)).astype(np.int64)


def inputs_of(graph: Graph, codes: Mapping[str, Ints]) -> dict[str, tuple[Ints, str]]:
    """(codes, type) of every input of the graph in order, int32 of token ids. Raises `InputError` where one is missing or batches
    differ."""
    kinds = {node.inputs[0]: graph.values[node.name].dtype for node in graph if node.op == "quantize"}
    doors = {name: kinds.get(name, "int32") for name in graph.inputs}
    if missing := [name for name in doors if name not in codes]:
        raise InputError(f"codes of input {missing[0]!r} are missing; the graph reads {', '.join(map(repr, doors))}")
    if len({len(codes[name]) for name in doors}) > 1:
        raise InputError("the inputs are of different batch sizes")
    return {name: (np.asarray(codes[name]), dtype) for name, dtype in doors.items()}


def single(q: QModel, graph: Graph, node: Node) -> Graph:
    """The integer graph of ``node`` alone between doors. Its inputs are named as its operands, less ``.codes``.

    A runtime fed with simulated codes then shows one operation's own differences, not those that it was handed.
    """
    at = units(q, graph)
    nodes, renamed, values = [], {}, dict(graph.values)
    operands = dict.fromkeys(name for name in node.inputs if name not in graph.constants)
    for name in operands:
        if name not in at:  # token ids, which come as they are
            continue
        source, door = name.removesuffix(".codes"), f"{name.removesuffix('.codes')}.codes"
        low, high = at[name].range
        attrs = {"scale": at[name].scale, "zero": at[name].zero, "low": low, "high": high}
        nodes.append(Node("quantize", (source,), (door,), attrs))
        renamed[name], values[source], values[door] = door, Spec(graph.values[name].shape), graph.values[name]
    inputs = tuple(renamed.get(name, name) for name in node.inputs)
    nodes.append(Node(node.op, inputs, node.outputs, node.attrs))
    if (out := at.get(node.name)) is not None:  # no index
        nodes.append(Node("dequantize", (node.name,), (f"{node.name}.real",), {"scale": out.scale, "zero": out.zero}))
        values[f"{node.name}.real"] = Spec(graph.values[node.name].shape)
    kept = {name: graph.constants[name] for name in node.inputs if name in graph.constants}
    named = {name for n in nodes for name in (*n.inputs, *n.outputs)}
    shapes = {name: spec for name, spec in values.items() if name in named}
    doors = tuple(renamed[name].removesuffix(".codes") if name in renamed else name for name in operands)
    return Graph(doors, (nodes[-1].name,), tuple(nodes), kept, shapes, opset="integer")
