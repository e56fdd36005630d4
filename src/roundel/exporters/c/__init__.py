"""The C99 exporter: an integer graph as firmware source, without library calls, allocation or floating point."""

from .project import Written, write

__all__ = ["Written", "write"]
