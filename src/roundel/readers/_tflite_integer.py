"""`read_integer`: a fully quantized int8 .tflite file as an integer graph that computes as TFLite's kernels do; no float model.

Everything a file says is checked as in `_tflite_file`. Left out: uint8 and int16 activations, control flow, state, and operators
without a row in `READ`; all of them are named at once.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..errors import InputError, RoundelError
from ..graph import Graph
from ..integer.check import check_integer
from ._tflite_codes import Reading
from ._tflite_file import File, guarded, read_file
from ._tflite_integer_ops import READ


def read_integer(path: str | Path) -> Graph:
    """See `roundel.readers.read_integer`, which is this."""
    file = read_file(Path(path))
    graph: Graph = guarded(file.path, lambda: _graph(file))
    return graph


def _graph(file: File) -> Graph:
    unknown = Counter(operator.op for operator in file.operators if operator.op not in READ)
    if unknown:
        listed = ", ".join(f"{op} ({count})" for op, count in sorted(unknown.items()))
        raise InputError(f"{file.path}: operators that have no integer definition here: {listed}")
    made = Reading(file)
    for index in file.inputs:
        made.door(index)
    for operator in file.operators:
        try:
            READ[operator.op](made, operator)
        except KeyError as err:
            raise InputError(f"{file.path}: operator {operator.index} ({operator.op}) lacks its option {err}") from err
        except RoundelError as err:
            text = str(err).removeprefix(f"{file.path}: ")
            raise InputError(f"{file.path}: operator {operator.index} ({operator.op}): {text}") from err
    outputs = tuple(made.real(index) for index in file.outputs)
    if not outputs:
        raise InputError(f"{file.path}: has no outputs")
    inputs = tuple(node.inputs[0] for node in made.nodes if node.op == "quantize")
    graph = Graph(inputs, outputs, tuple(made.nodes), made.constants, made.values, opset="integer").with_nodes(made.nodes)
    check_integer(graph)
    return graph
