"""Integer-only networks: lowering of quantized graphs, the operations' definitions, their simulation and the proofs about them."""

from .check import check_integer
from .dialect import RULES, quantize_multiplier
from .lower import in_dialect, lower
from .simulate import simulate

__all__ = ["RULES", "check_integer", "in_dialect", "lower", "quantize_multiplier", "simulate"]
