"""Transforms: networks changed so that they round better, while what they compute in float stays as it is."""

from .absorb import absorb
from .bias import clipped_mean, correct_bias, norm_means
from .equalize import equalize
from .rotate import hadamard, insert_rotations, rotate
from .smooth import smooth
from .widen import widen

__all__ = [
    "absorb", "clipped_mean", "correct_bias", "equalize", "hadamard", "insert_rotations", "norm_means", "rotate", "smooth", "widen",
]  # fmt: skip
