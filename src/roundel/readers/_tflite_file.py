"""The bytes of a .tflite file as plain checked values (`File`, `Tensor`, `Operator`); it knows nothing of what operators mean.

A flatbuffer has no checksums and its offsets may point anywhere, several vectors into one place included. So only what is
needed is read, every count is held against the file's size before a loop, and whatever the low-level reader raises on
damaged offsets leaves here as one `InputError`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError

#: More operators, operands of one operator, or axes than any real model has.
MOST_OPERATORS, MOST_OPERANDS, MOST_AXES = 20_000, 4096, 8

_NUMPY = {
    "FLOAT32": "<f4", "FLOAT16": "<f2", "FLOAT64": "<f8", "BOOL": "?",
    "INT8": "i1", "UINT8": "u1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "INT4": "i1",
}  # fmt: skip
_DAMAGE = (struct.error, IndexError, ValueError, TypeError, OverflowError, AttributeError, KeyError, AssertionError)


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table; ``scale`` is empty where it is not quantized, ``trouble`` names what cannot be read."""

    name: str
    type: str
    shape: tuple[int, ...]
    dynamic: bool
    buffer: int
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    trouble: str


@dataclass(frozen=True)
class Operator:
    """One operator: TFLite's own name of it, operand and result tensor indices (-1: absent) and its option fields."""

    index: int
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class File:
    """The main subgraph of a file; ``data(tensor)`` gives a constant's bytes, or None for a computed tensor."""

    path: Path
    size: int
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    subgraphs: int
    data: Callable[[Tensor], memoryview | None]


def read_file(path: Path) -> File:
    """Raises `InputError` where the file is missing, is no .tflite file, or is damaged."""
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as err:
        raise InputError("reading .tflite files needs the extra `tflite`: pip install -e '.[tflite]' in Roundel's folder") from err
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror}") from err
    if raw[4:8] != b"TFL3":
        raise InputError(f"{path}: not a .tflite file (bytes 4 to 8 must be 'TFL3'; they are {raw[4:8]!r})")
    return guarded(path, lambda: _read(path, raw, schema))


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """The one place where what damaged offsets raise becomes an `InputError`."""
    try:
        return read()
    except _DAMAGE as err:
        raise InputError(f"{path}: the file is damaged: {type(err).__name__}: {str(err)[:200]}") from err


def _read(path: Path, raw: bytes, schema: Any) -> File:
    model = schema.Model.GetRootAs(raw, 0)
    if model.Version() != 3:
        raise InputError(f"{path}: schema version {model.Version()}; only 3 is known")
    if model.SubgraphsLength() < 1:
        raise InputError(f"{path}: holds no subgraph")
    graph = model.Subgraphs(0)
    tensors = _count(path, raw, "tensors", graph.TensorsLength())
    operators = _count(path, raw, "operators", graph.OperatorsLength(), MOST_OPERATORS)
    codes = [
        _code(model.OperatorCodes(i), schema) for i in range(_count(path, raw, "operator codes", model.OperatorCodesLength(), 4096))
    ]
    types = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    table = tuple(_tensor(path, graph.Tensors(i), i, types) for i in range(tensors))
    return File(
        path,
        len(raw),
        table,
        tuple(_operator(path, graph.Operators(i), i, codes, tensors, schema) for i in range(operators)),
        _indices(path, "inputs", graph.InputsAsNumpy(), tensors),
        _indices(path, "outputs", graph.OutputsAsNumpy(), tensors),
        model.SubgraphsLength(),
        partial(_data, path, raw, model),
    )


def _count(path: Path, raw: bytes, what: str, count: int, most: int | None = None) -> int:
    """Every entry of a vector takes at least four bytes of the file."""
    limit = min(len(raw) // 4, most or len(raw))
    if count > limit:
        raise InputError(f"{path}: claims {count} {what}; at most {limit} are possible")
    return count


def _indices(path: Path, what: str, found: Any, tensors: int) -> tuple[int, ...]:
    found = () if isinstance(found, int) else found
    if len(found) > MOST_OPERANDS:
        raise InputError(f"{path}: {what}: {len(found)} tensors; at most {MOST_OPERANDS} are possible")
    indices = tuple(int(i) for i in found)
    if wrong := [i for i in indices if not -1 <= i < tensors]:
        raise InputError(f"{path}: {what}: tensor {wrong[0]} of {tensors} does not exist")
    return indices


def _code(entry: Any, schema: Any) -> str:
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    code = max(entry.BuiltinCode(), entry.DeprecatedBuiltinCode())
    if names.get(code) == "CUSTOM":
        return f"CUSTOM {_text(entry.CustomCode())!r}"
    return names.get(code, f"operator code {code}")


def _text(raw: bytes | None) -> str:
    return (raw or b"")[:200].decode("utf-8", "replace")


def _tensor(path: Path, entry: Any, index: int, types: Mapping[int, str]) -> Tensor:
    if entry.ShapeLength() > MOST_AXES or entry.ShapeSignatureLength() > MOST_AXES:
        raise InputError(f"{path}: tensor {index} claims {entry.ShapeLength()} axes; at most {MOST_AXES} are possible")
    shape = tuple(int(n) for n in entry.ShapeAsNumpy()) if entry.ShapeLength() else ()
    signature = entry.ShapeSignatureAsNumpy() if entry.ShapeSignatureLength() else ()
    if any(n < 0 for n in shape) or math.prod(shape) > 2**31:
        raise InputError(f"{path}: tensor {index} claims the shape {list(shape)}")
    grid, scale, zero, axis, trouble = entry.Quantization(), np.empty(0, "<f4"), np.empty(0, "<i8"), 0, ""
    if grid is not None:
        axis = grid.QuantizedDimension()
        if grid.ScaleLength():
            scale = grid.ScaleAsNumpy()
        if grid.ZeroPointLength():
            zero = grid.ZeroPointAsNumpy()
        if grid.DetailsType():
            trouble = "blockwise or custom quantization"
    if entry.Sparsity() is not None:
        trouble = "sparse storage"
    if entry.IsVariable():
        trouble = "a state kept between runs"
    if entry.ExternalBuffer():
        trouble = "data kept outside the file"
    kind = types.get(entry.Type(), f"type {entry.Type()}")
    return Tensor(_text(entry.Name()), kind, shape, any(n < 0 for n in signature), entry.Buffer(), scale, zero, axis, trouble)


def _operator(path: Path, entry: Any, index: int, codes: list[str], tensors: int, schema: Any) -> Operator:
    if not entry.OpcodeIndex() < len(codes):
        raise InputError(f"{path}: operator {index} has code {entry.OpcodeIndex()} of {len(codes)}")
    options = schema.BuiltinOptionsCreator(entry.BuiltinOptionsType(), entry.BuiltinOptions())
    return Operator(
        index,
        codes[entry.OpcodeIndex()],
        _indices(path, f"operator {index} reads", entry.InputsAsNumpy(), tensors),
        _indices(path, f"operator {index} makes", entry.OutputsAsNumpy(), tensors),
        vars(options) if options is not None else {},
    )


def _data(path: Path, raw: bytes, model: Any, tensor: Tensor) -> memoryview | None:
    if not tensor.buffer:
        return None
    if tensor.buffer >= model.BuffersLength():
        raise InputError(f"{path}: buffer {tensor.buffer} of {model.BuffersLength()} does not exist")
    entry = model.Buffers(tensor.buffer)
    if entry.Offset() > 1:
        if entry.Offset() + entry.Size() > len(raw):
            raise InputError(f"{path}: buffer {tensor.buffer} ends beyond the end of the file")
        return memoryview(raw)[entry.Offset() : entry.Offset() + entry.Size()]
    return memoryview(entry.DataAsNumpy()).cast("B") if entry.DataLength() else None


def numbers(path: Path, tensor: Tensor, data: memoryview) -> torch.Tensor:
    """A constant as it is stored (integer codes stay codes), in its own shape. Raises `InputError` on a wrong size."""
    if tensor.type not in _NUMPY:
        raise InputError(f"{path}: the constant {tensor.name!r} has type {tensor.type}; possible are {', '.join(_NUMPY)}")
    if tensor.trouble:
        raise InputError(f"{path}: the constant {tensor.name!r} has {tensor.trouble}, which is not supported")
    dtype, count = np.dtype(_NUMPY[tensor.type]), math.prod(tensor.shape)
    size = (count + 1) // 2 if tensor.type == "INT4" else count * dtype.itemsize
    if len(data) != size:
        raise InputError(
            f"{path}: the constant {tensor.name!r} of shape {list(tensor.shape)} needs {size} bytes; it has {len(data)}"
        )
    flat = np.frombuffer(data, dtype)
    if tensor.type == "INT4":  # two's complement, the low half of a byte first
        flat = np.stack([flat << 4 >> 4, flat >> 4], 1).reshape(-1)[:count]
    return torch.from_numpy(flat.reshape(tensor.shape).copy())


def expand(path: Path, tensor: Tensor, codes: torch.Tensor) -> torch.Tensor:
    """(code - zero point) x scale in float32: one rounding, so the values are exactly the grid's."""
    scale, zero = (torch.from_numpy(np.array(a)) for a in (tensor.scale, tensor.zero_point))
    shape = [1] * codes.ndim
    if len(scale) > 1:
        if not 0 <= tensor.axis < codes.ndim or codes.shape[tensor.axis] != len(scale):
            raise InputError(
                f"{path}: the constant {tensor.name!r} of shape {list(codes.shape)} has {len(scale)} scales on axis {tensor.axis}"
            )
        shape[tensor.axis] = len(scale)
    if len(zero) not in (0, 1, len(scale)):
        raise InputError(f"{path}: the constant {tensor.name!r} has {len(scale)} scales and {len(zero)} zero points")
    if not bool(torch.isfinite(scale).all()):
        raise InputError(f"{path}: the constant {tensor.name!r} has a scale that is no finite number")
    centred = codes.to(torch.float32)
    if bool(zero.any()):
        centred = (codes.to(torch.int64) - zero.reshape(shape if len(zero) > 1 else [1] * codes.ndim)).to(torch.float32)
    return centred * scale.reshape(shape)
