"""Roundel makes neural networks small enough for the device at hand, and proves that they still work there."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from .errors import CheckError, FormatError, InputError, PlanError, RoundelError

__version__ = "0.1.0"

#: public name -> module that has it. Loaded at first use: `import roundel` and the format language load no torch.
_WHERE = {
    "Evaluation": "evaluate",
    "Format": "formats",
    "Graph": "graph",
    "Plan": "plan",
    "Preprocess": "data",
    "QModel": "qmodel",
    "QTensor": "formats",
    "calibrate": "calibrate",
    "capture": "network",
    "convert": "tune",
    "diagnose": "diagnose",
    "diff": "evaluate",
    "evaluate": "evaluate",
    "export": "exporters",
    "fake": "qmodel",
    "fuse": "network",
    "inspect": "inspect",
    "load": "qmodel",
    "load_data": "data",
    "lower": "integer",
    "prepare": "qat",
    "quantize": "quantize",
    "read": "readers",
    "read_integer": "readers",
    "share_plan": "sharing",
    "simulate": "integer",
    "tune": "qat",
    "verify": "verify",
    "verify_log": "verify",
}

__all__ = ["CheckError", "FormatError", "InputError", "PlanError", "RoundelError", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'roundel' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """Keeps `roundel.quantize` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
