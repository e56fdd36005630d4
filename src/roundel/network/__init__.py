"""Networks: captured as graphs or walked as modules, fused, and run quantized; no files and no decisions about formats."""

from .capture import capture
from .fuse import fuse
from .layer import Activation
from .run import QGraphModule
from .watch import watching

__all__ = ["Activation", "QGraphModule", "capture", "fuse", "watching"]
