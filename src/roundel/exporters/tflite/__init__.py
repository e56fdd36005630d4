"""`write`: a quantized model and its integer graph as a .tflite file, without TensorFlow; re-read and tried before it is there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckError, PlanError, RoundelError
from ...files import AnyPath, atomic_write, check_writable
from ...graph import Graph
from ...qmodel import Note, QModel
from .draft import Draft, schema
from .layout import Order
from .ops import TRANSLATE
from .translation import Translation


@dataclass(frozen=True)
class Place:
    """Where a value of the graph is in the file: tensor index, and the value's axes in the order that the file keeps them in."""

    tensor: int
    order: Order


@dataclass(frozen=True)
class Written:
    """What `write` made: the `Place` of every value of codes by name, of the graph's inputs, and of the codes of its outputs."""

    path: Path
    places: Mapping[str, Place]
    inputs: Mapping[str, Place]
    outputs: Mapping[str, Place]
    notes: tuple[Note, ...]
    nbytes: int


def write(q: QModel, graph: Graph, path: AnyPath, *, widen: bool = False) -> Written:
    """Write ``graph``, the integer graph of ``q``, as one .tflite file of codes in and out.

    Values over places are N, H, W, C in the file, inputs and outputs keep their names, and the batch is 1 with a free first axis in
    the shape signature. Weights of 4 bits stay packed unless ``widen``; those of other widths under 8 are held as int8; with notes.

    Scales are those of ``q``; that TFLite computes the graph's own multipliers from them is checked for every node. Raises
    `PlanError` with every node that TFLite cannot compute code for code, and `CheckError`, leaving no file, where the file does not
    read back or LiteRT does not take it.
    """
    schema()
    check_writable(path)
    made = Translation(q, graph, widen)
    refused: dict[str, list[str]] = {}
    ids = [name for name in graph.inputs if "float" not in graph.values[name].dtype]  # whole numbers, which come as they are
    for name in ids:
        made.place[name] = {made.orders[name]: made.like(name, name, made.orders[name])}
    for node in graph:
        try:
            if node.op == "quantize":
                made.place[node.name] = {made.orders[node.name]: made.like(node.name, node.inputs[0], made.orders[node.name])}
            elif node.op != "dequantize":
                if node.op not in TRANSLATE:
                    raise PlanError(f"TFLite has no {node.op} of these codes that Roundel writes")
                TRANSLATE[node.op](made, node)
                made.settle(node)
        except RoundelError as err:
            refused.setdefault(str(err), []).append(f"{node.name} ({node.op})")
            if node.name in made.all_units:
                made.place[node.name] = {made.orders[node.name]: made.like(node.name, node.name, made.orders[node.name])}
    if refused:
        told = "".join(f"\n  {', '.join(names)}: {why}" for why, names in refused.items())
        raise PlanError(f"{sum(map(len, refused.values()))} nodes of this model cannot be in a .tflite file:{told}")
    places = {name: Place(known[made.orders[name]], made.orders[name]) for name, known in made.place.items()}
    doors = {node.inputs[0]: node.name for node in graph if node.op == "quantize"}
    inputs = {name: places[doors.get(name, name)] for name in graph.inputs}
    places = {name: place for name, place in places.items() if name not in ids}
    source = {node.name: node.inputs[0] for node in graph if node.op == "dequantize"}
    outputs = {source.get(name, name): places[source.get(name, name)] for name in graph.outputs}
    indices = [place.tensor for place in inputs.values()], [place.tensor for place in outputs.values()]
    file = made.draft.file(*indices, "Roundel")
    _check(file, made.draft, *indices)
    atomic_write(path, [file], len(file))
    return Written(Path(os.fsdecode(path)), places, inputs, outputs, tuple(made.notes), len(file))


def _check(file: bytes, draft: Draft, inputs: list[int], outputs: list[int]) -> None:
    """Read the file as any other: the same operators over the same tensors, every constant byte for byte; LiteRT allocates it."""
    from ...readers._tflite_file import read_file

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.tflite"
        copy.write_bytes(file)
        read = read_file(copy)
    wrong = []
    if (list(read.inputs), list(read.outputs)) != (inputs, outputs):
        wrong.append("its inputs and outputs are others")
    steps = [(step.kind, step.inputs, step.outputs) for step in draft.steps]
    if [(op.op, op.inputs, op.outputs) for op in read.operators] != steps:
        wrong.append("its operators are others")
    for have, want in zip(read.tensors, draft.tensors, strict=True):
        data = read.data(have)
        same = (have.type, have.shape, bytes(data) if data is not None else b"") == (want.type, want.shape, want.raw)
        if not same or not np.array_equal(have.scale, np.array(want.scale, np.float32)) or any(have.zero_point != want.zero):
            wrong.append(f"tensor {want.name!r} reads back differently")
    if why := _unallocated(file):
        wrong.append(f"LiteRT refuses it: {why}")
    if wrong:
        raise CheckError("the .tflite file that was made is not what was meant, and was not kept: " + "; ".join(wrong))


def _unallocated(file: bytes) -> str:
    """Why LiteRT cannot prepare a file to run; empty where it can."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        made: Any = Interpreter(model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
        made.allocate_tensors()
    except (RuntimeError, ValueError) as err:
        return str(err)
    return ""
