"""Exporters: a quantized model as files that other programs run; each reads only the `QModel` and its integer graph.

What a target is, and which rounding it gets, is the table here; how each file is written is in the rooms `c`, `tflite`, `onnx`.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..files import AnyPath, show
from ..integer import lower
from ..qmodel import Note, QModel


@dataclass(frozen=True)
class Target:
    """Where a file will run: the room that writes it, the rounding its integers get (None: it needs no integer graph), options."""

    room: str
    dialect: str | None
    options: Mapping[str, Any]
    what: str


def _c(what: str) -> Target:
    return Target("c", "R2", {}, f"a folder of C99 for {what}")


#: name -> target. The C is one for all cores; the compiler's own macros choose among its kernels.
TARGETS: dict[str, Target] = {
    "c": _c("any processor"),
    **{f"cortex-{core}": _c(f"an Arm Cortex-{core.upper()}") for core in ("m0", "m3", "m4", "m7", "m33", "m55")},
    "riscv32": _c("a 32-bit RISC-V"),
    "aarch64": _c("a 64-bit Arm"),
    "tflite": Target("tflite", "R1", {}, "a .tflite file for LiteRT and TFLite Micro"),
    "ethos-u55": Target("tflite", "R1", {"widen": True}, "a .tflite file whose weights are all int8, as Vela takes them"),
    "onnx": Target("onnx", None, {"style": "qdq"}, "an .onnx file with QuantizeLinear and DequantizeLinear"),
    "onnx-qoperator": Target("onnx", None, {"style": "qoperator"}, "an .onnx file with QLinear operators, int8 by int8"),
    "onnx-u8s8": Target("onnx", None, {"style": "qoperator", "signed": False}, "the same, uint8 by int7, for x86 without VNNI"),
}

#: Options of writers that a target's name decides.
FIXED = ("style", "signed")

#: What a path's ending says where no target is named; a path without one is a folder.
ENDINGS = {".tflite": "tflite", ".onnx": "onnx", "": "c"}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: ``files``, in ``target``'s form, and what to know about them; ``details`` are the writer's own."""

    target: str
    files: tuple[Path, ...]
    notes: tuple[Note, ...]
    details: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def export(q: QModel, path: AnyPath, target: str | None = None, **options: Any) -> Exported:
    """Write ``q`` for ``target``, a name in `roundel.exporters.TARGETS`; by default what the ending of ``path`` says.

    C targets make a folder: one .c and .h, a self-test with golden vectors, build files. The file is written aside, read again,
    checked and, where a compiler or runtime is at hand, run before it takes its place. ``options`` are the writer's: ``vectors``
    and ``name`` of C, ``widen`` of .tflite, ``opset``, ``external`` and ``float_for_unsupported`` of ONNX.

    Raises `PlanError` with every node that the target cannot express, `CheckError` where what was made fails its check, and
    `InputError` for a path that cannot be written; nothing is left then.

    >>> import torch
    >>> from roundel import quantize
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(16, 4)), "int8", "int8", data=[torch.randn(64, 16)])
    >>> [file.name for file in export(q, "firmware", "cortex-m4").files]
    ['firmware.c', 'firmware.h', 'golden.h', 'main.c', 'Makefile', 'CMakeLists.txt', 'README.md']
    """
    name, to = _target(path, target)
    room = import_module(f".{to.room}", __name__)
    writer: Callable[..., Any] = room.write
    if not isinstance(q, QModel):
        raise PlanError(f"what is exported is a quantized model (roundel.quantize, roundel.load); got {type(q).__name__}")
    known = [key for key in _options(writer) if key not in (*to.options, *FIXED)]
    if unknown := [key for key in options if key not in known]:
        raise PlanError(f"the target {name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if to.room != "c" and (running := [site for site, found in q.activations.items() if found.when == "running"]):
        raise PlanError(f"{len(running)} sites have ranges that run, the first is {running[0]!r}, and {name} has fixed ones: "
                        "quantize with static activations, such as int8")  # fmt: skip
    graph = lower(q, to.dialect) if to.dialect else None
    made = writer(q, graph, path, **{**to.options, **options})
    return Exported(name, _files(made, Path(os.fsdecode(path))), tuple(made.notes), made)


def _target(path: AnyPath, target: str | None) -> tuple[str, Target]:
    ending = Path(os.fsdecode(path)).suffix.lower()
    name = target if target is not None else ENDINGS.get(ending, "")
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, 1)
        asked = f"there is no target {name!r}" if target is not None else f"{show(path)} does not say what to write"
        raise PlanError(f"{asked}{f'; did you mean {near[0]!r}?' if near else ''}; there are {', '.join(TARGETS)}")
    return name, TARGETS[name]


def _options(writer: Callable[..., Any]) -> list[str]:
    found = inspect.signature(writer).parameters.values()
    return [parameter.name for parameter in found if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def _files(made: Any, path: Path) -> tuple[Path, ...]:
    names = getattr(made, "files", (path,))
    return tuple(name if isinstance(name, Path) else path / name for name in names)


__all__ = ["TARGETS", "Exported", "Target", "export"]
