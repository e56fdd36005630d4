"""Vela, Arm's compiler for Ethos-U: which operators of the exported file it places on the NPU; it computes no codes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import CheckError, InputError, PlanError
from ..exporters.tflite import write
from ..graph import Graph
from ..qmodel import QModel
from ..readers._tflite_file import read_file

NAME = "vela-ethos-u55"

#: Name -> the accelerator that Vela compiles for.
ACCELERATORS = {"vela-ethos-u55": "ethos-u55-128", "vela-ethos-u65": "ethos-u65-256", "vela-ethos-u85": "ethos-u85-256"}

#: Seconds that one compilation may take.
PATIENCE = 600


@dataclass(frozen=True)
class Placement:
    """What Vela did with a file's ``total`` operators: ``off`` names those left to the processor, (operator, result, why) each."""

    accelerator: str
    total: int
    off: tuple[tuple[str, str, str], ...]


def absent(name: str = NAME) -> str | None:
    """Why Vela cannot run here, or None."""
    return None if find_spec("ethosu") else "Vela is not installed: pip install -e '.[edge]' in Roundel's folder"


def place(q: QModel, graph: Graph, folder: Path, name: str = NAME) -> Placement:
    """Export ``graph`` into ``folder`` with int8 weights and compile it.

    Raises `PlanError` for what cannot be exported or an accelerator that is not, `CheckError` where Vela fails.
    """
    if why := absent():
        raise InputError(why)
    if name not in ACCELERATORS:
        raise PlanError(f"there is no accelerator {name!r} here; there are {', '.join(ACCELERATORS)}")
    written = write(q, graph, folder / "model.tflite", widen=True)
    command = [sys.executable, "-m", "ethosu.vela", f"--accelerator-config={ACCELERATORS[name]}", f"--output-dir={folder}"]
    try:
        done = subprocess.run([*command, str(written.path)], capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except subprocess.TimeoutExpired as err:
        raise CheckError(f"Vela took more than {PATIENCE} seconds") from err
    compiled = folder / "model_vela.tflite"
    if done.returncode or not compiled.exists():
        raise CheckError(f"Vela fails on the exported file: {(done.stderr or done.stdout)[-500:]}")
    said, file = done.stdout + done.stderr, read_file(compiled)
    left = [op for op in file.operators if op.op != "CUSTOM 'ethos-u'"]
    off = tuple((op.op, result, _reason(said, result)) for op in left for result in [file.tensors[op.outputs[0]].name])
    return Placement(ACCELERATORS[name], len(read_file(written.path).operators), off)


def _reason(said: str, result: str) -> str:
    """Vela's own words about the operator that makes ``result``."""
    found = re.search(rf"ofm: '{re.escape(result)}'\s*\n\W*Reason: (.*)", said)
    return found[1].strip() if found else "Vela gives no reason"
