"""`Reading`: the integer graph that is made of an integer .tflite file; what its operators become is in `_tflite_integer_ops`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..errors import InputError
from ..formats.pack import pack
from ..graph import BATCH, Node, Spec
from ..integer.check import accumulators
from ..integer.dialect import Ints
from ..integer.ops import INTEGER, extremes
from ._tflite_file import MOST_OPERANDS, File, Operator, Tensor
from ._tflite_file import numbers as stored_numbers

ACTS = {0: "", 1: "relu", 2: "clip", 3: "relu6"}


@dataclass(frozen=True)
class Units:
    scale: float
    zero: int

    def clamp(self, act: str) -> tuple[int, int]:
        """TFLite's bounds of a fused activation; ties of its own bounds round away from zero."""

        def code(real: float) -> int:
            exact = float(np.float32(real) / np.float32(self.scale))
            return self.zero + int(np.sign(exact) * np.floor(abs(exact) + 0.5))

        low = {"": -128, "relu": code(0.0), "relu6": code(0.0), "clip": code(-1.0)}[act]
        high = {"": 127, "relu": 127, "relu6": code(6.0), "clip": code(1.0)}[act]
        return max(-128, low), min(127, high)


@dataclass
class Reading:
    """The graph in the making; ``place`` maps a tensor of the file to a value, or to one with its axes in another order."""

    file: File
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Spec] = field(default_factory=dict)
    place: dict[tuple[int, tuple[int, ...]], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        #: Bytes that constants may still take: a small file cannot ask for gigabytes.
        self.left = 8 * self.file.size + 2**26

    # -- the file's tensors -----------------------------------------------------------------------------------------

    def tensor(self, index: int) -> Tensor:
        if index < 0:
            raise InputError("an operand is absent")
        return self.file.tensors[index]

    def units(self, index: int) -> Units:
        """Scale and zero point of an activation. Raises `InputError` where it is not int8 with one finite positive scale."""
        t = self.tensor(index)
        if t.type != "INT8" or len(t.scale) != 1 or len(t.zero_point) > 1 or t.trouble:
            what = t.trouble or f"{t.type} with {len(t.scale)} scales"
            raise InputError(f"tensor {index} ({t.name!r}) is {what}; activations are int8 with one scale here")
        scale, zero = float(t.scale[0]), int(t.zero_point[0]) if len(t.zero_point) else 0
        if not 0 < scale < float("inf") or not -128 <= zero <= 127:
            raise InputError(f"tensor {index} ({t.name!r}) has scale {scale} and zero point {zero}, which is no int8 quantization")
        return Units(scale, zero)

    def shape(self, index: int) -> tuple[int | str, ...]:
        """A value's shape over batches. Its first axis must be 1 in the file; it stands for the batch."""
        t = self.tensor(index)
        if not t.shape or t.shape[0] != 1 or 0 in t.shape:
            raise InputError(f"tensor {index} ({t.name!r}) has shape {list(t.shape)}; a batch of 1 comes first here")
        return (BATCH, *t.shape[1:])

    def integers(self, op: Operator, i: int, limit: int = MOST_OPERANDS) -> list[int]:
        """A short constant operand."""
        made = self.stored(op, i)
        if made.size > limit:
            raise InputError(f"operand {i} has {made.size} numbers; {limit} are possible")
        return [int(n) for n in made.reshape(-1)]

    def stored(self, op: Operator, i: int, types: Sequence[str] = ("INT32", "INT64")) -> Ints:
        """A constant operand's codes in its own shape."""
        if i >= len(op.inputs):
            raise InputError(f"operand {i} is missing")
        t = self.tensor(op.inputs[i])
        data = self.file.data(t)
        if data is None or t.type not in types:
            raise InputError(
                f"operand {i} must be a constant of {' or '.join(types)}; it is {t.type}{'' if data else ', computed'}"
            )
        self.left -= 8 * prod(t.shape)
        if self.left < 0:
            raise InputError("the constants would take far more memory than the file has bytes")
        return stored_numbers(self.file.path, t, data).numpy().astype(np.int64)

    # -- the graph --------------------------------------------------------------------------------------------------

    def free(self, name: str) -> str:
        taken, free, n = {*self.values, *self.constants}, name, 2
        while free in taken:
            free, n = f"{name}_{n}", n + 1
        return free

    def door(self, index: int) -> None:
        t, at = self.tensor(index), self.units(index)
        words = re.sub(r"\W+", "_", t.name.removesuffix(":0"), flags=re.ASCII).strip("_")[:60]
        if not words or words[0].isdigit() or (re.fullmatch(r"[a-z_]+_\d+", words) and words.rsplit("_", 1)[0] in INTEGER):
            words = f"input_{words}" if words else "input"
        name = self.free(words)
        self.values[name] = Spec(self.shape(index))
        self.place[index, plain(len(t.shape))] = self.node(
            "quantize", [name], f"{name}.codes", self.shape(index), scale=at.scale, zero=at.zero, low=-128, high=127
        )

    def real(self, index: int) -> str:
        name, at = self.value(index), self.units(index)
        if f"{name}.real" not in self.values:
            self.node("dequantize", [name], f"{name}.real", self.shape(index), dtype="float32", scale=at.scale, zero=at.zero)
        return f"{name}.real"

    def node(
        self, op: str, inputs: Sequence[str], name: str, sizes: Sequence[int | str], /, dtype: str = "int8", **attrs: Any
    ) -> str:
        """Add a node; what it sums is proven to fit int32."""
        made = Node(op, tuple(inputs), (name,), attrs)
        if (acc := accumulators(self, made)) is not None:
            made = Node(op, made.inputs, made.outputs, {**attrs, "acc": list(acc)})
        self.nodes.append(made)
        self.values[name] = Spec(tuple(sizes), dtype)
        return name

    def value(self, index: int, order: tuple[int, ...] | None = None) -> str:
        """A tensor's value with axis ``order[i]`` of it where the file has axis i; plain where None. Constants become codes."""
        t = self.tensor(index)
        order = order or plain(len(t.shape))
        if len(order) != len(t.shape):
            raise InputError(f"tensor {index} ({t.name!r}) has shape {list(t.shape)}; {len(order)} axes are needed")
        if (index, order) in self.place:
            return self.place[index, order]
        have = self.order(index)
        name = self.place[index, have]
        perm = [have[order.index(axis)] for axis in range(len(order))]
        shape = [self.values[name].shape[axis] for axis in perm]
        self.place[index, order] = self.node("transpose", [name], self.free(f"{name}.turned"), shape, perm=perm)
        return self.place[index, order]

    def order(self, index: int) -> tuple[int, ...]:
        """How a value was made; `InputError` where it was not."""
        for i, order in self.place:
            if i == index:
                return order
        raise InputError(f"tensor {index} ({self.tensor(index).name!r}) is read before any operator makes it, or is a constant")

    def common(self, indices: Sequence[int]) -> tuple[int, ...]:
        """The order that all these values were made in, or the plain one of the first."""
        found = {self.order(index) for index in indices}
        return found.pop() if len(found) == 1 else plain(len(self.tensor(indices[0]).shape))

    def put(self, op: Operator, kind: str, inputs: Sequence[str], order: tuple[int, ...] | None = None, /, **attrs: Any) -> None:
        """The operator's one result, its axes in ``order``."""
        if len(op.outputs) != 1:
            raise InputError(f"it makes {len(op.outputs)} results; 1 is expected")
        index = op.outputs[0]
        if any(i == index for i, _ in self.place):
            raise InputError(f"tensor {index} is made twice")
        shape = self.shape(index)
        order = order or plain(len(shape))
        if len(order) != len(shape):
            raise InputError(f"its result has {len(shape)} axes; {len(order)} are expected")
        self.place[index, order] = self.node(kind, inputs, self.free(f"{kind}_{op.index}"), in_order(shape, order), **attrs)

    def constant(self, name: str, codes: ArrayLike, dtype: str = "int32") -> str:
        found, name = np.asarray(codes, np.int64), self.free(name)
        low, high = extremes(dtype)
        if found.size and not low <= found.min() <= found.max() <= high:
            raise InputError(f"{name} reaches {found.min()} to {found.max()}, past {dtype}")
        self.values[name] = Spec(found.shape, dtype)
        if high > 255:
            self.constants[name] = torch.from_numpy(found.astype(np.int32))
        else:
            rows = torch.from_numpy(found & (high - low)).reshape(found.shape[0] if found.ndim > 1 else 1, -1)
            self.constants[name] = pack(rows, (high - low).bit_length())
        return name

    def rescaled(self, op: Operator, fused: bool = True) -> dict[str, Any]:
        """How sums become codes of the operator's result."""
        if not op.outputs:
            raise InputError("it makes nothing")
        y, act = self.units(op.outputs[0]), ACTS.get(op.options["fusedActivationFunction"] if fused else 0)
        if act is None:
            raise InputError(f"the fused activation {op.options['fusedActivationFunction']} is not supported")
        low, high = y.clamp(act)
        return {"y_zero": y.zero, "low": low, "high": high, "rounding": "R1"}


def plain(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))


def in_order(shape: Sequence[int | str], order: Sequence[int]) -> list[int | str]:
    """The shape of a value whose axis ``order[i]`` is the file's axis i."""
    return [shape[order.index(axis)] for axis in range(len(order))]
