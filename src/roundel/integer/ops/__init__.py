"""The integer operations: the definition of each in NumPy int64, which every faster or compiled version equals bit for bit.

Values are codes, real = scale * (code - zero); scales themselves appear only at the doors, `quantize` and `dequantize`. Layout is
PyTorch's, as in the real graph. Operations that sum take ``acc``, the proven range of their sums, and hold to it. What is not
here: how a real graph becomes these (`lower`), how ranges are proven (`check`).

A rescale is ``clip(rule(sums, multiplier, shift) + y_zero, low, high)`` with the rule that ``rounding`` names in `dialect`; a
fused ReLU or ReLU6 is in ``low`` and ``high``.
"""

from . import norms, pointwise, pools
from .base import INTEGER, Range, Reals, op, quantize, requantize, within
from .moves import padded, windows
from .store import Pool, extremes, numbers
from .weighted import conv_sums, levels, linear_sums, product_sums

__all__ = [
    "INTEGER", "Pool", "Range", "Reals", "conv_sums", "extremes", "levels", "linear_sums", "norms", "numbers", "op", "padded",
    "pointwise", "pools", "product_sums", "quantize", "requantize", "windows", "within",
]  # fmt: skip
