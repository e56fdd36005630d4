"""TFLite Micro, as its Python package runs it: reference kernels on one example at a time."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..errors import CheckError, InputError
from ..exporters.tflite import write
from ..graph import Graph
from ..integer.dialect import Ints
from ..qmodel import QModel
from ._tflite import from_file, inputs_of, to_file

NAME = "tflm"

#: Bytes of the arena; only the host's memory bounds it here.
ARENA = 1 << 26


def absent(name: str = NAME) -> str | None:
    """Why this runtime cannot run here, or None."""
    if find_spec("tflite_micro") is None:
        return "the package tflite-micro is not installed: pip install -e '.[edge]' in Roundel's folder"
    return (
        None if find_spec("ai_edge_litert") else "writing .tflite files needs LiteRT: pip install -e '.[edge]' in Roundel's folder"
    )


def dialects(name: str = NAME) -> str:
    """Its rounding: gemmlowp's, everywhere."""
    return "R1"


def run(q: QModel, graph: Graph, codes: Mapping[str, Ints], folder: Path, name: str = NAME) -> dict[str, Ints]:
    """Export ``graph`` into ``folder`` and run it: every value of the graph, name -> codes (N, ...) in PyTorch's layout.

    Raises `PlanError` for what cannot be exported, `CheckError` where TFLite Micro refuses the file.
    """
    if why := absent():
        raise InputError(why)
    from tflite_micro.python.tflite_micro import runtime

    written = write(q, graph, folder / "model.tflite")
    given = inputs_of(graph, codes)
    try:
        interpreter = runtime.Interpreter.from_file(
            str(written.path), arena_size=ARENA, intrepreter_config=runtime.InterpreterConfig.kPreserveAllTensors
        )
    except RuntimeError as err:
        raise CheckError(f"TFLite Micro refuses the exported file: {err}") from err
    made: dict[str, list[Ints]] = {name: [] for name in written.places}
    for i in range(len(next(iter(given.values()))[0])):
        for port, (name, (batch, dtype)) in enumerate(given.items()):
            interpreter.set_input(to_file(batch[i : i + 1], written.inputs[name], dtype), port)
        interpreter.invoke()
        for name, place in written.places.items():
            made[name].append(from_file(interpreter.GetTensor(place.tensor, 0)["tensor_data"], place))
    return {name: np.concatenate(parts) for name, parts in made.items() if parts}
