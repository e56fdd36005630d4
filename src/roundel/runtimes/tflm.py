"""TFLite Micro, as its Python package runs it, in a child process: reference kernels on one example at a time."""

from __future__ import annotations

import subprocess
import sys
import tempfile
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

#: Seconds that one run may take.
PATIENCE = 600


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

    Raises `PlanError` for what cannot be exported, `CheckError` where TFLite Micro refuses the file or dies of it.
    """
    if why := absent():
        raise InputError(why)
    written = write(q, graph, folder / "model.tflite")
    given = inputs_of(graph, codes)
    arrays = {str(port): to_file(batch, written.inputs[name], dtype) for port, (name, (batch, dtype)) in enumerate(given.items())}
    tensors = np.array(sorted({place.tensor for place in written.places.values()}))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, results = Path(scratch) / "arrays.npz", Path(scratch) / "results.npz"
        np.savez(source, tensors=tensors, **arrays)  # type: ignore[arg-type]
        _child(str(written.path), str(source), str(results))
        with np.load(results) as seen:
            made = {str(tensor): seen[str(tensor)] for tensor in tensors if str(tensor) in seen.files}
    return {name: from_file(made[str(place.tensor)], place) for name, place in written.places.items() if made}


def _child(*paths: str) -> None:
    """Run `_tflm_child` on files: TFLite Micro ends its whole process where a kernel does not like what it gets."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("_tflm_child.py")), *paths]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except subprocess.TimeoutExpired as err:
        raise CheckError(f"TFLite Micro took more than {PATIENCE} seconds") from err
    said = " ".join(line for line in done.stderr.splitlines() if line and not line.startswith(("Traceback", " ")))[-500:]
    if done.returncode < 0:
        raise CheckError(f"TFLite Micro ended by signal {-done.returncode} while it ran the exported file: {said}")
    if done.returncode:
        raise CheckError(f"TFLite Micro refuses the exported file: {said}")
