"""A quantized network as an ONNX graph: sites behind QuantizeLinear, weights behind DequantizeLinear, or QLinear operators.

A value lives as codes where its site is quantized, and is dequantized where someone reads it as a real number. ``qdq`` computes
every operation on reals; ``qoperator`` computes those that runtimes have integer kernels for on codes, the others as ``qdq`` does.
What neither style holds, such as activations whose parameters vary by token, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ...errors import PlanError, RoundelError
from ...formats.grid import Real, Uniform
from ...graph import Graph, Node
from ...graph.build import with_values
from ...network.layer import WEIGHTED, Activation
from ...network.sites import find_sites
from ...qmodel import Note, QModel
from . import qlinear
from .model import Model
from .operators import OPERATORS, Shape, element, flat
from .site import Site, site
from .weights import Weights, by_output, per_row

#: A bias beyond this is no int32.
INT32 = 2**31 - 1


@dataclass
class Network:
    """The ONNX graph of a quantized model in the making; the ``Writer`` of `operators`."""

    q: QModel
    graph: Graph
    model: Model
    style: str
    signed: bool
    dequantized: bool
    notes: list[Note] = field(default_factory=list)
    #: Value of the real graph -> its name as codes, as a real number, and its site.
    codes: dict[str, str] = field(default_factory=dict)
    reals: dict[str, str] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    made_weights: dict[tuple[str, bool], str] = field(default_factory=dict)
    #: Value -> the ONNX name kept for it; value -> its site.
    names: dict[str, str] = field(default_factory=dict)
    root: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = Weights(self.model, self.dequantized, self.note)
        self.root = find_sites(self.graph).root

    @classmethod
    def of(cls, q: QModel, opset: int, style: str, signed: bool, dequantized: bool) -> Network:
        """The whole network; `PlanError` with every node that ONNX cannot express, and why."""
        if not isinstance(q.structure, Graph):
            raise PlanError(f"only a graph can be exported, and this model's structure is {type(q.structure).__name__}: "
                            "quantize with data=, so that it can be captured")  # fmt: skip
        made = cls(q, with_values(q.structure), Model(opset), style, signed, dequantized)
        made.write()
        if made.refused:
            told = "".join(f"\n  {', '.join(names)}: {why}" for why, names in made.refused.items())
            raise PlanError(f"{sum(map(len, made.refused.values()))} nodes of this model cannot be written to ONNX:{told}")
        return made

    def note(self, subject: str, text: str) -> None:
        self.notes.append(Note(subject, text))

    # -- the Writer of the operators --------------------------------------------------------------------------------

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attrs: Any) -> str:
        return self.model.node(op, inputs, outputs, domain, **attrs)

    def temporary(self, node: Node, word: str) -> str:
        return self.model.name(f"{node.name}.{word}")

    def small(self, value: ArrayLike, dtype: str = "float32") -> str:
        return self.model.constant("constant", np.asarray(value, dtype))

    def shape(self, name: str) -> Shape:
        if name in self.graph.constants:
            return tuple(self.graph.constants[name].shape)
        if name not in self.graph.values:
            raise PlanError(f"the shape of {name!r} is not known")
        return self.graph.values[name].shape

    def integers(self, name: str) -> bool:
        if name in self.graph.constants:
            return not self.graph.constants[name].is_floating_point()
        return name in self.graph.values and "float" not in self.graph.values[name].dtype

    # -- the whole ---------------------------------------------------------------------------------------------------

    def write(self) -> None:
        graph = self.graph
        names = {name: self.model.name(name) for name in (*graph.inputs, *(out for node in graph for out in node.outputs))}
        self.names = names
        for name in graph.inputs:
            self._guarded(Node("input", (name,), (name,)), self._input)
        for node in graph:
            self._guarded(node, self._node)
        for name in graph.outputs:
            self._guarded(Node("output", (name,), (name,)), self._output)

    def _guarded(self, node: Node, work: Callable[[Node], None]) -> None:
        """Note why ``node`` cannot be written, and look at those after it."""
        try:
            work(node)
        except RoundelError as err:
            self.refused.setdefault(str(err), []).append(f"{node.name} ({node.op})")
            self.reals |= {name: self.names[name] for name in node.outputs}

    def _input(self, node: Node) -> None:
        name = node.name
        spec = self.graph.values[name]
        if "float" in spec.dtype and spec.dtype != "float32":
            raise PlanError(f"its numbers are {spec.dtype}; networks are exported in float32")
        self.model.inputs.append((self.names[name], _kind(spec.dtype), spec.shape))
        self.reals[name] = self.names[name]
        self._settle(name, self.names[name])

    def _output(self, node: Node) -> None:
        name = node.name
        if name not in self.graph.values:
            raise PlanError("it is a constant: an output of a network is computed from its inputs")
        spec = self.graph.values[name]
        real = self.real(name)
        if real != self.names[name] or name in self.graph.inputs:  # an alias of another value
            fresh = self.model.name(f"{name}.output")
            real = self.node("Identity", [real], [fresh])
        self.model.outputs.append((real, _kind(spec.dtype), spec.shape))

    def _node(self, node: Node) -> None:
        if node.op == "identity":
            return self._alias(node.name, node.inputs[0])
        if self.style == "qoperator" and qlinear.write(self, node):
            return
        if node.op not in OPERATORS:
            raise PlanError("it has no ONNX form yet")
        if self._packed(node):
            operands = self._weighted(node)
        else:
            turned = node.op == "linear" and not flat(self, node)
            operands = [self.swapped(n) if turned and i == 1 else self.operand(node, i) for i, n in enumerate(node.inputs)]
            operands[0] = self._dynamic(node, operands[0])
        outs = [self._bare(name) for name in node.outputs]
        OPERATORS[node.op](self, self._saturating(node), operands, outs)
        for name, out in zip(node.outputs, outs, strict=True):
            self._settle(name, out)

    def _saturating(self, node: Node) -> Node:
        """``node`` without a ReLU that saturation does anyway, 0 being the least code: runtimes fuse the rest more often."""
        found = self.static(node.name)
        if node.attrs.get("act") != "relu" or found is None or not isinstance(found.format.grid, Uniform):
            return node
        at = site(found, self.signed)
        if at.zero != at.low:
            return node
        return Node(node.op, node.inputs, node.outputs, {key: value for key, value in node.attrs.items() if key != "act"})

    def _alias(self, name: str, source: str) -> None:
        if self.code(source) is not None:
            self.codes[name], self.sites[name] = self.codes[source], self.sites[source]
        self.reals[name] = self.real(source)

    def _bare(self, name: str) -> str:
        """Where a result goes before it is quantized."""
        return self.model.name(f"{name}.float") if self.static(name) is not None else self.names[name]

    def static(self, name: str) -> Activation | None:
        found = self.q.activations.get(self.root.get(name, ""))
        return found if found is not None and found.when == "static" else None

    # -- values ------------------------------------------------------------------------------------------------------

    def _settle(self, name: str, bare: str) -> None:
        """A computed value: onto its grid if it has one."""
        found = self.static(name)
        if found is None or self.integers(name):
            self.reals[name] = bare
            return
        if isinstance(found.format.grid, Real):
            low = self.node("Cast", [bare], [self.model.name(f"{name}.low")], to=element(_TORCH[found.format.grid.name]))
            target = self.names[name] if bare != self.names[name] else self.model.name(f"{name}.dequantized")
            self.reals[name] = self.node("Cast", [low], [target], to=element("float32"))
            return
        at = site(found, self.signed)
        limits = [at.low, at.high]
        if not at.full and at.kind.endswith("16"):  # onnxruntime clips no codes of 16 bits
            bare = self.node(
                "Clip", [bare, *(self.small(at.scale * np.float32(n - at.zero)) for n in limits)], [self.model.name(f"{name}.in")]
            )
        codes = self.node("QuantizeLinear", [bare, *self.params(at)], [self.model.name(f"{name}.codes")])
        if not at.full and at.kind.endswith("8"):
            codes = self.node("Clip", [codes, *(self.small(n, at.kind) for n in limits)], [self.model.name(f"{name}.codes")])
        self.made(name, codes, at)

    def made(self, name: str, codes: str, at: Site) -> None:
        """Enter the codes of a value; its real twin is made when it is read."""
        self.codes[name], self.sites[name] = codes, at
        self.reals.pop(name, None)
        self.model.infos[codes] = (at.kind.upper(), self.shape(name))

    def params(self, at: Site) -> tuple[str, str]:
        """Scale and zero point of a site."""
        return self.small(at.scale), self.small(at.zero, at.kind)

    def operand(self, node: Node, i: int) -> str:
        """An operand of a node as a real number; "" where it is left out."""
        return self.real(node.inputs[i]) if node.inputs[i] else ""

    def real(self, name: str) -> str:
        """A value, or a constant, as a real number (or as the integers that it holds)."""
        if name not in self.reals:
            if name in self.codes:
                target = self.names[name] if name not in self.graph.inputs else self.model.name(f"{name}.dequantized")
                self.reals[name] = self.node("DequantizeLinear", [self.codes[name], *self.params(self.sites[name])], [target])
            elif name in self.q.tensors:
                self.reals[name] = self.weight(name)
            else:
                self._constant(name)
        return self.reals[name]

    def _constant(self, name: str) -> None:
        if self.q.rest[name].dtype == torch.bfloat16:
            raise PlanError(f"constant {name!r} is bfloat16; networks are exported in float32")
        values: NDArray[Any] = self.q.rest[name].detach().numpy()
        if values.dtype.kind == "f" and values.dtype != np.float32:
            raise PlanError(f"constant {name!r} is {values.dtype}; networks are exported in float32")
        found = self.static(name)
        if found is None or values.dtype.kind != "f" or isinstance(found.format.grid, Real):
            self.reals[name] = self.model.tensor(name, values)
            return
        at = site(found, self.signed)
        codes = np.clip(np.rint(values / at.scale) + at.zero, at.low, at.high).astype(at.kind)
        self.names[name] = self.model.name(name)
        self.codes[name], self.sites[name] = self.model.tensor(f"{name}.codes", codes), at
        self.real(name)

    def swapped(self, name: str) -> str:
        """Codes are exchanged before they become real numbers: onnxruntime 1.32 mistypes a Transpose behind DequantizeLinear."""
        rank, codes = len(self.shape(name)), self.code(name)
        perm = [*range(rank - 2), rank - 1, rank - 2]
        if codes is None:
            return self.node("Transpose", [self.real(name)], [self.model.name(f"{name}.swapped")], perm=perm)
        turned = self.node("Transpose", [codes], [self.model.name(f"{name}.swapped.codes")], perm=perm)
        return self.node("DequantizeLinear", [turned, *self.params(self.sites[name])], [self.model.name(f"{name}.swapped")])

    def code(self, name: str) -> str | None:
        """A value, or a constant on a site, as codes; None where it has none."""
        if name not in self.codes and name in self.q.rest and self.static(name) is not None:
            self.real(name)
        return self.codes.get(name)

    # -- weights -----------------------------------------------------------------------------------------------------

    def weight(self, name: str, swapped: bool = False) -> str:
        """A packed weight as a real number, written once for each way that it lies."""
        if (name, swapped) not in self.made_weights:
            self.made_weights[name, swapped] = self.weights.value(name, self.q.tensors[name], swapped)
        return self.made_weights[name, swapped]

    def _packed(self, node: Node) -> bool:
        return node.op in WEIGHTED and node.inputs[1] in self.q.tensors

    def _weighted(self, node: Node) -> list[str]:
        """Operands of a layer with a packed weight: that behind DequantizeLinear, the bias too where the input is quantized."""
        x, name = self._dynamic(node, self.operand(node, 0)), node.inputs[1]
        weight = self.weight(name, swapped=node.op == "linear" and not flat(self, node))
        if len(node.inputs) < 3 or not node.inputs[2]:
            return [x, weight]
        bias = self.bias(node)
        if bias is None:
            return [x, weight, self.real(node.inputs[2])]
        codes, unit = bias
        inputs = [self.model.tensor(f"{node.inputs[2]}.codes", codes), self.model.tensor(f"{node.inputs[2]}.scale", unit)]
        return [x, weight, self.node("DequantizeLinear", inputs, [self.model.name(node.inputs[2])], axis=0)]

    def _dynamic(self, node: Node, x: str) -> str:
        """The input of a layer on the grid that its own numbers span, if its plan is dynamic."""
        found = self.q.activations.get(f"{node.name}.input")
        if found is None:
            return x
        if str(found.format) not in ("int8/tensor*fp32~int8", "uint8/tensor*fp32~uint8"):
            raise PlanError(f"its input is {found.format}:dynamic; ONNX's DynamicQuantizeLinear is int8/tensor alone")
        parts = [self.temporary(node, f"input.{word}") for word in ("codes", "scale", "zero")]
        self.node("DynamicQuantizeLinear", [x], parts)
        return self.node("DequantizeLinear", parts, [self.temporary(node, "input")])

    def bias(self, node: Node) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
        """The bias in int32 at s_x * s_w and that unit; None where input or weight have no such unit, or it would not fit."""
        at, q = self.sites.get(node.inputs[0]), self.q.tensors[node.inputs[1]]
        if at is None or node.op not in ("conv", "linear") or not by_output(q):
            return None
        scale, _ = per_row(q)
        bias = self.q.rest[node.inputs[2]].detach().double().numpy()
        unit = np.broadcast_to(np.float64(at.scale) * scale.astype(np.float64), bias.shape)
        codes = np.rint(bias / np.where(unit == 0, 1.0, unit))
        if (unit == 0).any() or np.abs(codes).max(initial=0) > INT32:
            self.note(node.inputs[2], "left float: in units of the sums it is no int32")
            return None
        return codes.astype(np.int32), unit.astype(np.float32)


_TORCH = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def _kind(dtype: str) -> str:
    """ONNX's name of a torch dtype."""
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(element(dtype)))
