"""Training what was quantized: windows of a graph, trainable weights and activations, and the one loop over them."""

from .prepare import convert, freeze, kinds, prepare
from .tunable import TunableActivation, TunableWeight

__all__ = ["TunableActivation", "TunableWeight", "convert", "freeze", "kinds", "prepare"]
