"""What the codes of an activation stand for in the file; which activations ONNX can quantize to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import PlanError
from ...formats.grid import Uniform
from ...network.layer import Activation


@dataclass(frozen=True)
class Site:
    """What the codes in the file stand for: scale * (code - zero), clamped to low .. high; ``shift`` is file code - own code."""

    scale: np.float32
    zero: int
    low: int
    high: int
    kind: str
    shift: int

    @property
    def full(self) -> bool:
        """Whether saturation alone keeps to low .. high."""
        info = np.iinfo(self.kind)
        return (self.low, self.high) == (info.min, info.max)

    def clamp(self, act: str | None) -> tuple[int, int]:
        """The bounds in codes that a fused activation leaves."""
        top = self.high
        if act == "relu6":
            top = int(np.clip(np.rint(np.float32(6.0) / self.scale) + self.zero, self.low, self.high))
        return (max(self.low, self.zero), top) if act else (self.low, self.high)


def site(found: Activation, signed: bool) -> Site:
    """The parameters of a static site; `PlanError` for what ONNX does not quantize to."""
    fmt = found.format
    if found.params is None or not isinstance(fmt.grid, Uniform) or fmt.min is not None or fmt.share.word != "tensor":
        raise PlanError(f"its activations are {fmt}; ONNX takes integers of up to 16 bits with one scale, and fp16")
    scale = np.float32(found.params.scale.reshape(()).item() if found.params.scale is not None else 1.0)
    zero = int(found.params.offset.reshape(()).item()) if found.params.offset is not None else 0
    low, high = (int(end) for end in fmt.extremes)
    bits = 8 if fmt.bits <= 8 else 16
    shift = 0
    if fmt.grid.signed != signed:
        shift = 2 ** (bits - 1) if fmt.grid.signed else -(2 ** (bits - 1))
    if scale == 0:  # a site that was 0 throughout calibration says 0 and nothing else
        scale, low, high = np.float32(1.0), zero, zero
    return Site(scale, zero + shift, low + shift, high + shift, f"{'' if signed else 'u'}int{bits}", shift)
