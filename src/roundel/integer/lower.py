"""`lower`: a statically quantized graph as a graph of integers, every factor between scales a multiplier and a shift.

What it takes: weights of 2 to 8 bits with one scale per tensor or output, activations of up to 8 bits with static parameters. What
it leaves out, and refuses by name: codebooks, groups, 16-bit activations, and every operation without a row in `_LOWER`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import PlanError, RoundelError
from ..formats.grid import Codebook, Uniform
from ..formats.pack import pack
from ..graph import Graph, Node, Spec
from ..network.sites import find_sites
from ..qmodel import QModel
from . import ops
from .check import INT32, accumulators, check_integer, size
from .dialect import INTEGER, RULES, quantize_multiplier
from .fixed import exp_table

#: Bits that both operands of an addition gain before they meet, as in TFLite.
FINER = 20


@dataclass(frozen=True)
class Affine:
    """What the codes of a site stand for: scale * (code - zero), low <= code <= high, held in ``dtype``."""

    scale: float
    zero: int
    low: int
    high: int
    dtype: str

    def clamp(self, act: str | None) -> tuple[int, int]:
        """The bounds that a fused activation leaves, in codes."""
        if act is None:
            return self.low, self.high
        top = self.high if act == "relu" else self.code(6.0)
        return max(self.low, self.zero), top

    def code(self, real: float) -> int:
        """The nearest code."""
        return int(ops.quantize(np.array(real, np.float32), **self.door))

    @property
    def door(self) -> dict[str, Any]:
        return {"scale": self.scale, "zero": self.zero, "low": self.low, "high": self.high}


def lower(q: QModel, dialect: str = "R2") -> Graph:
    """The integer graph of ``q``: between its doors no float operation and no sum that could leave int32.

    ``dialect`` is the rounding of every rescale: R1 (gemmlowp, TFLite Micro), R2 (one multiplication and shift, ties up), R2a (ties
    away), R3 (ruy); see docs/integer.md. Values keep the names of their sites and PyTorch's layout; weights stay packed. Raises
    `PlanError` with every node that cannot be lowered and why.

    >>> from roundel import quantize, simulate
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU()), "int4", "int8", data=[torch.randn(64, 16)])
    >>> graph = lower(q)
    >>> [node.op for node in graph], graph.nodes[1].attrs["rounding"]
    (['quantize', 'linear', 'dequantize'], 'R2')
    """
    if not isinstance(q.structure, Graph):
        raise PlanError(f"only a graph can be lowered, and this model's structure is {type(q.structure).__name__}: "
                        "quantize with data=, so that it can be captured")  # fmt: skip
    if dialect not in INTEGER:
        known = " It is float arithmetic: see in_dialect." if dialect in RULES else ""
        raise PlanError(f"there is no integer dialect {dialect!r}; there are {', '.join(INTEGER)}.{known}")
    made = _Lowering(q, q.structure, dialect)
    for node in (*made.doors(), *q.structure.nodes):
        try:
            if node.op not in _LOWER:
                raise PlanError("there is no integer definition of it yet")
            _LOWER[node.op](made, node)
        except RoundelError as err:
            made.refuse(node, str(err))
    if made.refused:
        told = "".join(f"\n  {', '.join(names)}: {why}" for why, names in made.refused.items())
        count = sum(map(len, made.refused.values()))
        raise PlanError(f"{count} nodes of this model cannot be lowered to integers:{told}")
    outputs = tuple(made.real(name) for name in q.structure.outputs)
    graph = Graph(q.structure.inputs, outputs, tuple(made.nodes), made.constants, made.values, q.structure.notes, "integer")
    check_integer(graph)
    return graph


def in_dialect(graph: Graph, dialect: str) -> Graph:
    """The same integer graph under another rounding; R4 too, for comparison with onnxruntime and XNNPACK, though it is float."""
    nodes = (Node(n.op, n.inputs, n.outputs, {**n.attrs, "rounding": dialect}) if "rounding" in n.attrs else n for n in graph)
    return replace(graph, nodes=tuple(nodes))


@dataclass
class _Lowering:
    """The integer graph in the making. ``renamed`` are values that became another one."""

    q: QModel
    source: Graph
    dialect: str
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Spec] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root: Mapping[str, str] = find_sites(self.source).root

    def doors(self) -> list[Node]:
        return [Node("input", (name,), (name,)) for name in self.source.inputs]

    def real(self, name: str) -> str:
        """The dequantized twin of an output."""
        if f"{name}.real" not in self.values:
            at = self.affine(name)
            self.emit("dequantize", [name], f"{name}.real", "float32", like=name, scale=at.scale, zero=at.zero)
        return f"{name}.real"

    def affine(self, name: str) -> Affine:
        """Parameters of the site of a value; `PlanError` where they are not static, per tensor, of at most 8 bits."""
        site = self.root.get(name, name)
        found = self.q.activations.get(site)
        if found is None or found.when != "static" or found.params is None:
            raise PlanError(f"site {site!r} has no static parameters: quantize it with an activation format such as int8")
        fmt = found.format
        if not isinstance(fmt.grid, Uniform) or fmt.bits > 8 or fmt.min is not None or fmt.share.word != "tensor":
            raise PlanError(f"site {site!r} is {fmt}; activations are integers of up to 8 bits with one scale yet")
        scale = float(found.params.scale.reshape(())) if found.params.scale is not None else 1.0
        zero = int(found.params.offset.reshape(())) if found.params.offset is not None else 0
        low, high = (int(end) for end in fmt.extremes)
        if scale == 0:  # a site that was 0 throughout calibration says 0 and nothing else
            return Affine(1.0, zero, zero, zero, str(fmt.grid))
        return Affine(scale, zero, low, high, str(fmt.grid))

    def constant(self, name: str, numbers: ArrayLike, dtype: str = "int32") -> str:
        """Enter a constant; those of up to 8 bits are packed."""
        codes = np.asarray(numbers, np.int64)
        if codes.size and (codes.min() < INT32[0] or codes.max() > INT32[1]):
            raise PlanError(f"{name} reaches {codes.min():,} to {codes.max():,}, past int32")
        self.values[name] = Spec(codes.shape, dtype)
        low, high = ops.extremes(dtype)
        if high > 255:
            self.constants[name] = torch.from_numpy(codes.astype(np.int32))
        else:
            rows = torch.from_numpy(codes & (high - low)).reshape(codes.shape[0] if codes.ndim > 1 else 1, -1)
            self.constants[name] = pack(rows, (high - low).bit_length())
        return name

    def operand(self, name: str) -> str:
        """The codes of a value; of a constant in a value's place, made here."""
        if name in self.source.constants and name not in self.constants:
            at, real = self.affine(name), self.q.rest[name] if name in self.q.rest else self.q.tensors[name].dequantize()
            self.constant(name, ops.quantize(real.detach().float().numpy(), **at.door), at.dtype)
        return self.renamed.get(name, name)

    def emit(
        self,
        op: str,
        inputs: list[str],
        name: str,
        dtype: str,
        constants: tuple[str, ...] = (),
        like: str | None = None,
        **attrs: Any,
    ) -> None:
        """Add one node that makes ``name``, of the shape of the real value ``like``; what it sums is proven to fit."""
        node = Node(op, (*(self.operand(i) for i in inputs), *constants), (name,), attrs)
        if unknown := [i for i in node.inputs if i not in self.values]:
            raise PlanError(f"it reads {unknown[0]!r}, whose shape is not known")
        if (acc := accumulators(self, node)) is not None:
            node = Node(op, node.inputs, node.outputs, {**attrs, "acc": list(acc)})
        self.nodes.append(node)
        self.values[name] = Spec(self.shape(like or name), dtype)

    def refuse(self, node: Node, why: str) -> None:
        """Note why ``node`` cannot be lowered; those after it are still looked at."""
        self.refused.setdefault(why, []).append(f"{node.name} ({node.op})")
        self.values |= {name: Spec(self.source.values[name].shape, "int8") for name in node.outputs if name in self.source.values}

    def rescaled(self, y: Affine, act: str | None) -> dict[str, Any]:
        """How sums become codes of ``y``."""
        low, high = y.clamp(act)
        return {"y_zero": y.zero, "low": low, "high": high, "rounding": self.dialect}

    def shape(self, name: str) -> tuple[int | str, ...]:
        if name not in self.source.values:
            raise PlanError(f"the shape of {name!r} is not known")
        return self.source.values[name].shape


# -- one function per operation of the real graph -----------------------------------------------------------------------


def _input(made: _Lowering, node: Node) -> None:
    at = made.affine(node.name)
    made.values[node.name] = Spec(made.shape(node.name))
    made.emit("quantize", [node.name], f"{node.name}.codes", at.dtype, like=node.name, **at.door)
    made.renamed[node.name] = f"{node.name}.codes"


def _weighted(made: _Lowering, node: Node) -> None:
    x, y = made.affine(node.inputs[0]), made.affine(node.name)
    weight, w_scale = _weight(made, node.inputs[1])
    unit = x.scale * w_scale
    unit = np.where(unit == 0, y.scale, unit)  # an output without weights is its bias
    biased = len(node.inputs) > 2 and node.inputs[2]
    bias = made.q.rest[node.inputs[2]].detach().double().numpy() if biased else np.zeros(len(unit))
    multiplier, shift = quantize_multiplier(unit / y.scale)
    parts = {"bias": np.rint(np.clip(bias / unit, -(2.0**40), 2.0**40)), "multiplier": multiplier, "shift": shift}
    attrs = {key: value for key, value in node.attrs.items() if key != "act"}
    made.emit(node.op, [node.inputs[0]], node.name, y.dtype,
              (weight, *(made.constant(f"{node.name}.{key}", value) for key, value in parts.items())),
              x_zero=x.zero, **attrs, **made.rescaled(y, node.attrs.get("act")))  # fmt: skip


def _weight(made: _Lowering, name: str) -> tuple[str, NDArray[np.float64]]:
    """Enter a packed weight as it is; its scale per output."""
    q = made.q.tensors.get(name)
    if q is None:
        raise PlanError("its weight is float")
    fmt = q.format
    if isinstance(fmt.grid, Codebook):
        raise PlanError(f"its weight is {fmt}: a codebook computes in integers once its entries lie on an integer grid, "
                        "which is not built yet")  # fmt: skip
    if not isinstance(fmt.grid, Uniform) or not fmt.grid.signed or not 2 <= fmt.bits <= 8 or fmt.zero or fmt.min:
        raise PlanError(f"its weight is {fmt}; weights are symmetric integers of 2 to 8 bits, int8 to int2")
    stored = q.params.scale if q.params.scale is not None else torch.ones(1, 1)
    if stored.shape[1] != 1 or fmt.share.rows > 1 or q.axis != 0:
        raise PlanError(f"its weight is {fmt}; weights have one scale per tensor or per output yet")
    scale = np.broadcast_to(stored.double().numpy().reshape(-1), q.shape[:1])
    if q.unpack()[torch.from_numpy(scale == 0)].any():
        raise PlanError("its weight has codes whose scale is 0")
    made.constants[name], made.values[name] = q.codes, Spec(q.shape, str(fmt.grid))
    return name, scale


def _add(made: _Lowering, node: Node) -> None:
    a, b, y = made.affine(node.inputs[0]), made.affine(node.inputs[1]), made.affine(node.name)
    unit = 2 * max(a.scale, b.scale)
    multiplier, shift = quantize_multiplier([a.scale / unit, b.scale / unit, unit / (2.0**FINER * y.scale)])
    made.emit("add", list(node.inputs), node.name, y.dtype, a_zero=a.zero, b_zero=b.zero, left=FINER,
              multiplier=multiplier.tolist(), shift=shift.tolist(), **made.rescaled(y, node.attrs.get("act")))  # fmt: skip


def _rescaled(made: _Lowering, node: Node, op: str, factor: float, act: str | None = None, **attrs: Any) -> None:
    """``op`` sums its one operand; the result is that sum times ``factor``."""
    x, y = made.affine(node.inputs[0]), made.affine(node.name)
    multiplier, shift = (int(part) for part in quantize_multiplier(x.scale * factor / y.scale))
    made.emit(op, [node.inputs[0]], node.name, y.dtype, **attrs, x_zero=x.zero, multiplier=multiplier, shift=shift,
              **made.rescaled(y, act))  # fmt: skip


def _relu(made: _Lowering, node: Node) -> None:
    _rescaled(made, node, "rescale", 1.0, act=node.op)


def _sum(made: _Lowering, node: Node) -> None:
    axes = list(node.attrs["axes"])
    count = size(made.source, node.inputs[0], axes) if node.op == "mean" else 1
    _rescaled(made, node, "sum", 1 / count, axes=axes, keepdim=node.attrs.get("keepdim", False))


def _avg_pool(made: _Lowering, node: Node) -> None:
    x, y, a = made.affine(node.inputs[0]), made.affine(node.name), node.attrs
    place: dict[str, Any] = {key: list(a[key]) for key in ("kernel", "stride", "padding")}
    ragged = any(a["padding"]) and not a.get("count_pad")
    if x == y and (ragged or not any(a["padding"])):
        low, high = y.clamp(a.get("act"))
        return made.emit("avg_pool", [node.inputs[0]], node.name, y.dtype, **place, low=low, high=high)
    if ragged:
        raise PlanError("its padding is left out of the mean while its parameters change, so its factor would vary by place")
    _rescaled(made, node, "sum_pool", 1 / math.prod(a["kernel"]), act=a.get("act"), **place)


def _max_pool(made: _Lowering, node: Node) -> None:
    y = made.affine(node.name)
    low, high = y.clamp(node.attrs.get("act"))
    place: dict[str, Any] = {key: list(node.attrs[key]) for key in ("kernel", "stride", "padding")}
    made.emit("max_pool", [node.inputs[0]], node.name, y.dtype, **place, low=low, high=high)


def _softmax(made: _Lowering, node: Node) -> None:
    x, y = made.affine(node.inputs[0]), made.affine(node.name)
    mantissa, exponent = math.frexp(y.scale)
    if mantissa != 0.5 or not 0 < 1 - exponent <= 16:
        raise PlanError(f"its result is in units of {y.scale:.6g}; an integer softmax gives a power of two such as 1/256")
    table = made.constant(f"{node.name}.table", exp_table(x.scale, x.high - x.low + 1))
    made.emit("softmax", [node.inputs[0]], node.name, y.dtype, (table,), axis=node.attrs.get("axis", -1), bits=1 - exponent,
              **made.rescaled(y, None))  # fmt: skip


def _move(made: _Lowering, node: Node) -> None:
    made.emit(node.op, list(node.inputs), node.name, made.affine(node.name).dtype, **node.attrs)


def _pad(made: _Lowering, node: Node) -> None:
    at = made.affine(node.name)
    if node.attrs.get("mode", "constant") != "constant":
        raise PlanError(f"padding by {node.attrs['mode']} has no integer definition yet")
    made.emit("pad", list(node.inputs), node.name, at.dtype, padding=list(node.attrs["padding"]),
              code=at.code(node.attrs.get("value", 0.0)))  # fmt: skip


def _identity(made: _Lowering, node: Node) -> None:
    made.renamed[node.name] = made.operand(node.inputs[0])


_LOWER: dict[str, Callable[[_Lowering, Node], None]] = {
    "input": _input, "identity": _identity,
    "conv": _weighted, "linear": _weighted, "add": _add, "mean": _sum, "sum": _sum,
    "avg_pool": _avg_pool, "max_pool": _max_pool, "relu": _relu, "relu6": _relu, "softmax": _softmax,
    "reshape": _move, "transpose": _move, "slice": _move, "concat": _move, "pad": _pad,
}  # fmt: skip
