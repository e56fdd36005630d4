"""What the file's scales must be so that a runtime computes the graph's own multipliers from them; PlanError where none do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ...errors import InputError, PlanError
from ...graph import Graph, Node
from ...integer.dialect import Ints, quantize_multiplier, quantize_wide, rescaled
from ...integer.ops import Range, extremes
from ...network.sites import find_sites
from ...qmodel import QModel

#: Most sums that are tried one by one.
_TRIED = 2**24

#: TFLite's fused activations, the least demanding first.
ACTS = ("NONE", "RELU", "RELU6", "RELU_N1_TO_1")


@dataclass(frozen=True)
class Units:
    """A value's codes stand for scale * (code - zero); ``type`` is TFLite's name of what holds them."""

    scale: float
    zero: int
    type: str = "INT8"

    @property
    def range(self) -> Range:
        return extremes(self.type.lower())

    def clamp(self, act: str) -> Range:
        """The bounds of a fused activation, as TFLite computes them: ties away from zero, in float32."""
        low, high = self.range

        def code(real: float) -> int:
            exact = np.float32(real) / np.float32(self.scale)
            return self.zero + int(math.copysign(math.floor(abs(float(exact)) + 0.5), exact))

        return {
            "NONE": (low, high),
            "RELU": (max(low, code(0.0)), high),
            "RELU6": (max(low, code(0.0)), min(high, code(6.0))),
            "RELU_N1_TO_1": (max(low, code(-1.0)), min(high, code(1.0))),
        }[act]

    def act(self, node: Node) -> str:
        """The activation that clamps as ``node`` does."""
        want = node.attrs["low"], node.attrs["high"]
        for name in ACTS:
            if self.clamp(name) == want:
                return name
        raise PlanError(f"its results are clamped to {want[0]} .. {want[1]}, which no activation of TFLite does")


def units(q: QModel, graph: Graph) -> dict[str, Units]:
    """The units of every computed value. Codes other than int8 and int16 have no place in a .tflite file."""
    structure = q.structure
    root: Mapping[str, str] = find_sites(structure).root if isinstance(structure, Graph) else {}
    doors = {node.name: node.inputs[0] for node in graph if node.op == "quantize"}
    found, wrong = {}, {}
    for name in (*(name for node in graph if node.op != "dequantize" for name in node.outputs), *graph.constants):
        source = doors.get(name, name)
        activation = q.activations.get(root.get(source, source))
        if activation is None or activation.params is None:
            continue  # weights and tables; a value without units is missed where it is asked for
        params, dtype = activation.params, graph.values[name].dtype
        if dtype not in ("int8", "int16"):
            wrong[name] = f"its codes are {dtype}; a .tflite file takes int8"
            continue
        scale = float(params.scale.reshape(())) if params.scale is not None else 1.0
        zero = int(params.offset.reshape(())) if params.offset is not None else 0
        found[name] = Units(scale or 1.0, zero, dtype.upper())
    if wrong:
        told = "".join(f"\n  {name}: {why}" for name, why in wrong.items())
        raise PlanError(f"{len(wrong)} values cannot be in a .tflite file:{told}")
    return found


def agree(node: Node, have: tuple[ArrayLike, ArrayLike], real: ArrayLike, sums: Range | None = None) -> bool:
    """True where a runtime that makes (multiplier, shift) of ``real`` rescales as ``node`` does with ``have``.

    Either both are the same numbers, or every sum that the node can hold, ``sums``, gives the same code.
    """
    try:
        made = (quantize_wide if node.attrs.get("wide") else quantize_multiplier)(real)
    except InputError:
        return False
    return same(node, have, made, sums)


def same(node: Node, have: tuple[ArrayLike, ArrayLike], made: tuple[ArrayLike, ArrayLike], sums: Range | None = None) -> bool:
    """True where two (multiplier, shift) are equal, or give the same codes for every sum from ``sums[0]`` to ``sums[1]``."""
    if all(np.array_equal(a, b) for a, b in zip(have, made)):
        return True
    if sums is None or sums[1] - sums[0] > _TRIED:
        return False
    every = np.arange(sums[0], sums[1] + 1, dtype=np.int64)
    return bool(np.array_equal(_codes(node, every, *have), _codes(node, every, *made)))


def _codes(node: Node, sums: Ints, multiplier: ArrayLike, shift: ArrayLike) -> Ints:
    a = node.attrs
    return np.clip(rescaled(sums, multiplier, shift, a["rounding"]) + a["y_zero"], a["low"], a["high"])
