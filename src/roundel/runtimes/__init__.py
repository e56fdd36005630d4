"""Runtimes: other programs that run what the exporters write, each behind the same names.

    absent(name)                          why it cannot run here, or None
    dialects(name)                        its rounding, as `in_dialect` takes it
    run(q, graph, codes, folder, name)    value -> codes, for every value that it lets one see

`vela` runs nothing: it has ``place`` in the place of ``run``.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from ..errors import PlanError

#: name -> (module, the rounding of the graph that its exporter takes)
RUNTIMES: dict[str, tuple[str, str]] = {
    "host-c": ("hostc", "R2"),
    "onnxruntime": ("onnxruntime", "R2"),
    "onnxruntime-qdq": ("onnxruntime", "R2"),
    "onnxruntime-u8s8": ("onnxruntime", "R2"),
    "litert": ("litert", "R1"),
    "litert-builtin": ("litert", "R1"),
    "litert-ref": ("litert", "R1"),
    "tflm": ("tflm", "R1"),
    **{f"qemu-{core}": ("qemu", "R2") for core in (*(f"cortex-{m}" for m in ("m0", "m3", "m4", "m7", "m33", "m55")), "riscv32",
                                                   "aarch64")},
    **{f"vela-ethos-{unit}": ("vela", "R1") for unit in ("u55", "u65", "u85")},
}  # fmt: skip


def runtime(name: str) -> tuple[Any, str]:
    """The module behind a runtime's name, and the rounding to lower with for it."""
    if name not in RUNTIMES:
        near = difflib.get_close_matches(name, RUNTIMES, 1)
        told = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"there is no runtime {name!r}{told}; there are {', '.join(RUNTIMES)}")
    module, dialect = RUNTIMES[name]
    return import_module(f".{module}", __name__), dialect
