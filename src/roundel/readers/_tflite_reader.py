"""`Reader`: the state while a .tflite file is translated, with what every translation needs; it knows no operator by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..graph import OPS
from ..graph.build import Builder
from ._tflite_file import MOST_OPERANDS, File, Operator, expand, numbers

_FUSED = {0: "", 1: "relu", 2: "hardtanh", 3: "relu6", 4: "tanh"}
DTYPES = {"FLOAT32": "float32", "FLOAT16": "float32", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8",
           "INT16": "int16", "BOOL": "bool"}  # fmt: skip


class Reader:
    """The graph in the making and where each tensor of the file is in it."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.builder = Builder()
        self.place: dict[int, str] = {}
        self.rearranged: dict[tuple[str, tuple[int, ...]], str] = {}
        self.stored: dict[str, str] = {}
        #: Bytes that constants may still take once they are expanded and folded: a small file cannot ask for gigabytes.
        self.left = 8 * file.size + 2**26

    # -- values ---------------------------------------------------------------------------------------------------

    def input(self, index: int) -> str:
        tensor = self.file.tensors[index]
        if tensor.type not in DTYPES or 0 in tensor.shape:
            raise InputError(
                f"{self.file.path}: input {tensor.name!r} is {tensor.type} {list(tensor.shape)}, which is not supported"
            )
        words = tensor.name.removesuffix(":0") if index in self.file.inputs else ""  # inner tensors have long names of no use
        name = re.sub(r"\W+", "_", words, flags=re.ASCII).strip("_")[:60] or "input"
        if re.match(rf"({'|'.join(OPS)})_\d", name) or name[0].isdigit():
            name = f"input_{name}"
        self.place[index] = self.builder.input(self.builder.unique(name), tensor.shape, DTYPES[tensor.type])
        return self.place[index]

    def value(self, index: int, name: str = "constant") -> str:
        """The graph's name of a tensor; a constant is read on its first use and then called ``name``."""
        if index < 0:
            return ""
        if index not in self.place:
            tensor = self.file.tensors[index]
            data = self.file.data(tensor)
            if data is None:
                raise InputError(f"{self.file.path}: tensor {index} ({tensor.name!r}) is read before any operator makes it")
            made = numbers(self.file.path, tensor, data)
            self.spend(4 * made.numel(), tensor.name)
            name = self.builder.unique(name)
            if not made.is_floating_point() and len(tensor.scale):
                made = expand(self.file.path, tensor, made)
                self.stored[name] = f"{tensor.type.lower()} with {_scales(len(tensor.scale))}"
            elif made.dtype == torch.float16:
                self.stored[name] = "float16"
            made = made.to(torch.float32) if made.is_floating_point() else made
            self.place[index] = self.builder.constant(name, made)
        return self.place[index]

    def spend(self, size: int, name: str) -> None:
        self.left -= size
        if self.left < 0:
            raise InputError(f"{self.file.path}: its constants would take far more memory than the file has bytes (at {name!r})")

    def notes(self) -> list[str]:
        """One sentence on the constants that the file stores in fewer bits than float32."""
        used = {name for node in self.builder.nodes for name in node.inputs}
        kept = [f"{name} ({how})" for name, how in self.stored.items() if name in used]
        return [f"stored in fewer bits and expanded to float32, value for value: {', '.join(kept)}"] if kept else []

    # -- one operator ---------------------------------------------------------------------------------------------

    def translate(self, op: Operator, translation: Translation) -> None:
        if not op.outputs or min(op.outputs) < 0:
            raise InputError(f"{self.file.path}: operator {op.index} ({op.op}) makes nothing")
        before = len(self.builder.nodes)
        try:
            translation(self, op)
        except KeyError as err:
            raise InputError(f"{self.file.path}: operator {op.index} ({op.op}) lacks its option {err}") from err
        except InputError as err:
            text = str(err)
            raise (
                err if text.startswith(str(self.file.path)) else InputError(f"{self.file.path}: operator {op.index}: {text}")
            ) from err
        if all(self.place.get(i, "") in ("", *self.builder.constants) for i in op.inputs):
            self.fold(before)
        for index in op.outputs:
            tensor, shape = self.file.tensors[index], self.builder.shape(self.place[index])
            if tensor.shape and not tensor.dynamic and shape != tensor.shape:
                raise InputError(
                    f"{self.file.path}: operator {op.index} ({op.op}) makes {list(shape)}; the file says {list(tensor.shape)}"
                )

    def fold(self, first: int) -> None:
        """Nodes from ``first`` on depend on constants alone: their results become constants."""
        builder = self.builder
        for node in builder.nodes[first:]:
            self.spend(sum(8 * prod(builder.shape(out)) for out in node.outputs), node.name)
            made = OPS[node.op](*[builder.constants[i] if i else None for i in node.inputs], **node.attrs)
            for out, tensor in zip(node.outputs, made if isinstance(made, tuple) else (made,)):
                builder.constants[out] = tensor.contiguous()
                del builder.makers[out]
        del builder.nodes[first:]

    def operand(self, op: Operator, i: int, name: str = "constant") -> str:
        """Operand ``i``, or "" where it is absent and may be."""
        return self.value(op.inputs[i], name) if i < len(op.inputs) else ""

    def needed(self, op: Operator, i: int, name: str = "constant") -> str:
        if not (found := self.operand(op, i, name)):
            raise InputError(f"{op.op} lacks operand {i}")
        return found

    def constant(self, op: Operator, i: int) -> Tensor:
        name = self.needed(op, i)
        if name not in self.builder.constants:
            raise InputError(f"{op.op} needs a constant as operand {i}; here it is computed")
        return self.builder.constants[name]

    def ints(self, op: Operator, i: int) -> list[int]:
        made = self.constant(op, i)
        if made.is_floating_point() or made.numel() > MOST_OPERANDS:
            raise InputError(f"{op.op} needs a short list of integers as operand {i}")
        return [int(n) for n in made.reshape(-1)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.builder.shape(name)

    def rank(self, name: str, rank: int) -> str:
        if len(self.shape(name)) != rank:
            raise InputError(f"{name!r} must have {rank} axes; it has shape {list(self.shape(name))}")
        return name

    def axis(self, axis: int, rank: int) -> int:
        if not -rank <= axis < rank:
            raise InputError(f"axis {axis} does not exist among {rank}")
        return axis % rank

    def emit(self, op: str, inputs: Sequence[str], name: str, /, **attrs: Any) -> str:
        return self.builder.emit(op, inputs, self.builder.unique(name), attrs)

    def put(self, op: Operator, name: str, i: int = 0) -> None:
        if i >= len(op.outputs):
            raise InputError(f"{op.op} makes {i + 1} results; {len(op.outputs)} are named")
        self.place[op.outputs[i]] = name

    def permuted(self, name: str, perm: Sequence[int], as_name: str) -> str:
        """Axes in another order: a constant at once (under its own name, where this is its first use), others by a node."""
        self.rank(name, len(perm))
        if name not in self.builder.constants:
            return self.emit("transpose", [name], as_name, perm=list(perm))
        key = name, tuple(perm)
        if key not in self.rearranged:
            tensor = self.builder.constants[name].permute(*perm).contiguous()
            self.spend(4 * tensor.numel(), name)
            self.rearranged[key] = self.builder.constant(self.builder.unique(as_name), tensor)
            if name in self.stored:
                self.stored[self.rearranged[key]] = self.stored[name]
        return self.rearranged[key]

    def reshaped(self, name: str, shape: Sequence[int], as_name: str) -> str:
        if self.shape(name) == tuple(shape):
            return name
        if any(n < 1 for n in shape) or prod(shape) != prod(self.shape(name)):
            raise InputError(f"{name!r} of shape {list(self.shape(name))} cannot take the shape {list(shape)}")
        return self.emit("reshape", [name], as_name, shape=list(shape))

    def with_act(self, op: Operator, kind: str, inputs: Sequence[str], **attrs: Any) -> str:
        """The node ``{kind}_{index}`` with the operator's fused activation: relu and relu6 inside it, others behind it."""
        act = _FUSED.get(op.options.get("fusedActivationFunction", 0))
        if act is None:
            raise InputError(f"{op.op} has the fused activation {op.options['fusedActivationFunction']}, which is not supported")
        name = f"{kind}_{op.index}"
        inside = act in ("relu", "relu6") and kind != "concat"
        made = self.emit(kind, inputs, name, **attrs, **({"act": act} if inside else {}))
        if act and not inside:
            made = self.emit(act, [made], f"{name}_{act}", **({"lo": -1.0, "hi": 1.0} if act == "hardtanh" else {}))
        return made


def _scales(count: int) -> str:
    return "one scale" if count == 1 else f"{count} scales"


#: What one TFLite operator becomes.
Translation = Callable[[Reader, Operator], None]
