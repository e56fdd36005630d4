"""The integer graph in the making: parameters of sites, constants, nodes whose sums are proven; what becomes what is in `rules`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...errors import PlanError
from ...formats.grid import Uniform
from ...formats.pack import pack
from ...graph import Graph, Node, Spec
from ...network.sites import MOVES, find_sites
from ...qmodel import QModel
from .. import ops
from ..check import INT32, accumulators
from ..running import TAKEN, tracker

#: Operations that only move codes: they leave a running site what it is.
STAYING = MOVES

#: What to do about a running site that integers cannot have.
STILL = "give the site a static format, such as int8, by a rule of the plan"


@dataclass(frozen=True)
class Affine:
    """What the codes of a site stand for: scale * (code - zero), low <= code <= high, held in ``dtype``. ``site`` is the number of
    one that runs, which starts with that scale."""

    scale: float
    zero: int
    low: int
    high: int
    dtype: str
    site: int = -1

    def clamp(self, act: str | None) -> tuple[int, int]:
        """The bounds that a fused activation leaves, in codes."""
        if act is None:
            return self.low, self.high
        top = self.high if act == "relu" else self.code(6.0)
        if self.site >= 0 and act != "relu":
            raise PlanError(f"its range runs, and {act} ends at one code; {STILL}")
        return max(self.low, self.zero), top

    def code(self, real: float) -> int:
        """The nearest code."""
        return int(ops.quantize(np.array(real, np.float32), **self.door))

    @property
    def bits(self) -> int:
        return int(self.dtype.strip("uint"))

    @property
    def reach(self) -> ops.Range:
        """What code - zero can be, whatever the type holds."""
        low, high = ops.extremes(self.dtype)
        return low - self.zero, high - self.zero

    @property
    def door(self) -> dict[str, Any]:
        return {"scale": self.scale, "zero": self.zero, "low": self.low, "high": self.high}


@dataclass
class Lowering:
    """The integer graph in the making. ``renamed`` are values that became another one; ``steps`` is the table that
    attentions share."""

    q: QModel
    source: Graph
    dialect: str
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Spec] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    steps: str = ""
    known: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root: Mapping[str, str] = find_sites(self.source).root
        found = self.q.activations
        running = [site for site in dict.fromkeys(self.root.values()) if site in found and found[site].when == "running"]
        self.order = {site: i for i, site in enumerate(running)}

    def doors(self) -> list[Node]:
        return [Node("input", (name,), (name,)) for name in self.source.inputs]

    def real(self, name: str) -> str:
        """The dequantized twin of an output; one that is an integer, an index say, is its own."""
        if name not in self.root:
            return self.operand(name)
        if f"{name}.real" not in self.values:
            at = self.affine(name)
            self.emit("dequantize", [name], f"{name}.real", "float32", like=name, scale=at.scale, zero=at.zero)
        return f"{name}.real"

    def affine(self, name: str) -> Affine:
        """Parameters of the site of a value; `PlanError` where they are not static, per tensor, integers."""
        site = self.root.get(name, name)
        found = self.q.activations.get(site)
        if found is None or found.params is None:
            raise PlanError(f"site {site!r} has no static parameters: quantize it with an activation format such as int8")
        fmt = found.format
        if not isinstance(fmt.grid, Uniform) or fmt.min is not None or fmt.share.word != "tensor":
            raise PlanError(f"site {site!r} is {fmt}; activations are integers with one scale")
        scale = float(found.params.scale.reshape(())) if found.params.scale is not None else 1.0
        zero = int(found.params.offset.reshape(())) if found.params.offset is not None else 0
        low, high = (int(end) for end in fmt.extremes)
        if scale == 0:  # a site that was 0 throughout calibration says 0 and nothing else
            return Affine(1.0, zero, zero, zero, str(fmt.grid), self.running(name))
        if fmt.bits == 16 and zero == 0:
            low = -(1 << 15)  # 16-bit kernels clamp to the type, one code below where a symmetric format ends
        return Affine(scale, zero, low, high, str(fmt.grid), self.running(name))

    def running(self, name: str) -> int:
        """The number of the running site of a value, -1 where it is static."""
        return self.order.get(self.root.get(name, ""), -1)

    def constant(self, name: str, numbers: ArrayLike, dtype: str = "int32") -> str:
        """Enter a constant, and return its name: that of an equal one where there is one, as the steps of a recurrent layer have
        them. Those of up to 8 bits are packed."""
        codes = np.asarray(numbers, np.int64)
        key = (dtype, codes.shape, codes.tobytes())
        if name not in self.source.constants and (found := self.known.setdefault(key, name)) != name:
            return found
        low, high = ops.extremes(dtype)
        if codes.size and (codes.min() < low or codes.max() > high):
            raise PlanError(f"{name} reaches {codes.min():,} to {codes.max():,}, past {dtype}")
        self.values[name] = Spec(codes.shape, dtype)
        if high > 255:
            self.constants[name] = torch.tensor(codes, dtype=torch.int64 if high > INT32[1] else torch.int32)
        else:
            rows = torch.tensor(codes & (high - low)).reshape(codes.shape[0] if codes.ndim > 1 else 1, -1)
            self.constants[name] = pack(rows, (high - low).bit_length())
        return name

    def operand(self, name: str) -> str:
        """The codes of a value; of a constant in a value's place, made here."""
        if name in self.source.constants and name not in self.constants:
            at = self.affine(name)
            self.constant(name, ops.quantize(self.number(name).astype(np.float32), **at.door), at.dtype)
        return self.renamed.get(name, name)

    def number(self, name: str) -> NDArray[np.float64]:
        """A constant of the real graph."""
        real = self.q.rest[name] if name in self.q.rest else self.q.tensors[name].dequantize()
        return real.detach().double().numpy()

    def emit(
        self,
        op: str,
        inputs: list[str],
        name: str,
        dtype: str,
        constants: Sequence[str] = (),
        like: str | None = None,
        **attrs: Any,
    ) -> None:
        """Add one node that makes ``name``, of the shape of the real value ``like``; what it sums is proven to fit."""
        attrs |= self._runs(op, inputs, like or name, attrs)
        node = Node(op, (*(self.operand(i) for i in inputs), *constants), (name,), attrs)
        if unknown := [i for i in node.inputs if i not in self.values]:
            raise PlanError(f"it reads {unknown[0]!r}, whose shape is not known")
        if (acc := accumulators(self, node)) is not None:
            node = Node(op, node.inputs, node.outputs, {**attrs, "acc": list(acc)})
        self.nodes.append(node)
        self.values[name] = Spec(self.shape(like or name), dtype)

    def _runs(self, op: str, inputs: list[str], name: str, attrs: dict[str, Any]) -> dict[str, Any]:
        """The marks of a node that reads or makes codes of running sites; `PlanError` where its operation takes none."""
        sites = [self.running(i) for i in ([] if op == "quantize" else inputs)]
        sites.append(-1 if op == "dequantize" else self.running(name))
        if max(sites) < 0 or (op not in TAKEN and {*sites} == {sites[0]} and op in STAYING):
            return {}
        if op not in TAKEN:
            raise PlanError(f"it reads or makes a range that runs, and it takes no shift; {STILL}")
        if attrs.get("wide"):
            raise PlanError(f"it has a range that runs, and its sums have 64 bits; {STILL}")
        if sites[-1] < 0:
            return {"runs": sites}
        count = math.prod(n for n in self.shape(name)[1:] if isinstance(n, int))
        zero = attrs["zero" if op == "quantize" else "y_zero"]
        return {"runs": sites, "tracker": tracker(zero, attrs["low"], attrs["high"], count)}

    def refuse(self, node: Node, why: str) -> None:
        """Note why ``node`` cannot be lowered; those after it are still looked at."""
        self.refused.setdefault(why, []).append(f"{node.name} ({node.op})")
        self.values |= {name: Spec(self.source.values[name].shape, "int8") for name in node.outputs if name in self.source.values}

    def rescaled(self, y: Affine, act: str | None = None, wide: bool = False) -> dict[str, Any]:
        """How sums become codes of ``y``; ``wide`` ones have one rule."""
        low, high = y.clamp(act)
        place = {"y_zero": y.zero, "low": low, "high": high}
        return {**place, "rounding": "R2", "wide": True} if wide else {**place, "rounding": self.dialect}

    def shape(self, name: str) -> tuple[int | str, ...]:
        if name not in self.source.values:
            raise PlanError(f"the shape of {name!r} is not known")
        return self.source.values[name].shape
