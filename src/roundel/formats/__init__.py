"""Number formats: grids, the text language, the seam to the solvers, packing and `QTensor`; no networks, no files."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .format import ALIASES, Format, Share
from .grid import Codebook, Levels, Real, Uniform

if TYPE_CHECKING:
    from .codec import Params, Stored
    from .qtensor import QTensor

__all__ = ["ALIASES", "Codebook", "Format", "Levels", "Params", "QTensor", "Real", "Share", "Stored", "Uniform"]

#: Names that need torch, loaded at first use.
_NUMERIC = {"QTensor": "qtensor", "Params": "codec", "Stored": "codec"}


def __getattr__(name: str) -> Any:
    if name not in _NUMERIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NUMERIC[name]}", __name__), name)
