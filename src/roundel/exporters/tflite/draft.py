"""`Draft`: a .tflite file in the making, tensor by tensor and operator by operator; it knows nothing of graphs or quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

#: Type of a tensor -> its NumPy type in the file; int4 is packed, two in a byte, the first one low.
STORED = {"INT8": "i1", "INT4": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8"}


def schema() -> ModuleType:
    """The generated classes of the .tflite format; raises `InputError` where the extra is not installed."""
    try:
        import flatbuffers  # noqa: F401 - the classes need it when they pack
        from ai_edge_litert import schema_py_generated
    except ImportError as err:
        raise InputError("writing .tflite files needs the extra `edge`: pip install -e '.[edge]' in Roundel's folder") from err
    found: ModuleType = schema_py_generated
    return found


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor: ``shape`` begins with a batch of 1 where ``batched``; ``data`` holds a constant's numbers, unpacked."""

    name: str
    type: str
    shape: tuple[int, ...]
    scale: tuple[float, ...] = ()
    zero: int = 0
    axis: int = 0
    data: NDArray[Any] | None = None
    batched: bool = False

    @property
    def raw(self) -> bytes:
        """A constant's bytes as the file holds them."""
        if self.data is None:
            return b""
        flat = self.data.reshape(-1)
        if self.type == "INT4":
            nibbles = np.pad(flat, (0, flat.size % 2)) & 15
            return bytes((nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8))
        return flat.astype(STORED[self.type]).tobytes()


@dataclass(frozen=True)
class Step:
    """One operator by TFLite's name; -1 stands for an absent operand."""

    kind: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: str
    fields: Mapping[str, Any]


@dataclass
class Draft:
    """Tensors and operators in order; the index of a tensor is its place in ``tensors``."""

    tensors: list[Entry] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def tensor(self, name: str, type: str, shape: Sequence[int], **fields: Any) -> int:
        """Enter a tensor under a name that no other has; what UTF-8 cannot hold in it is escaped."""
        name = name.encode("utf-8", "backslashreplace").decode()
        free, count = name, 1
        while free in self.names:
            free, count = f"{name}_{count}", count + 1
        self.names.add(free)
        self.tensors.append(Entry(free, type, tuple(map(int, shape)), **fields))
        return len(self.tensors) - 1

    def constant(self, name: str, type: str, data: NDArray[Any], **fields: Any) -> int:
        return self.tensor(name, type, data.shape, data=data, **fields)

    def step(self, kind: str, version: int, inputs: Sequence[int], output: int, options: str = "", **fields: Any) -> int:
        """Enter an operator; ``options`` is the name of its table in the schema. Returns ``output``."""
        self.steps.append(Step(kind, version, tuple(inputs), (output,), options, fields))
        return output

    def file(self, inputs: Sequence[int], outputs: Sequence[int], description: str) -> bytes:
        """The whole file. Equal drafts give equal bytes. Specification: TensorFlow Lite's schema, version 3."""
        import flatbuffers

        S = schema()
        model, graph = S.ModelT(), S.SubGraphT()
        model.version, model.description, model.buffers = 3, description, [S.BufferT()]
        graph.tensors = [self._tensor(S, model.buffers, entry) for entry in self.tensors]
        kinds = list(dict.fromkeys((step.kind, step.version) for step in self.steps))
        model.operatorCodes = [_filled(S.OperatorCodeT(), builtinCode=code, deprecatedBuiltinCode=min(code, 127), version=version)
                               for code, version in ((getattr(S.BuiltinOperator, kind), v) for kind, v in kinds)]  # fmt: skip
        graph.operators = [self._operator(S, step, kinds.index((step.kind, step.version))) for step in self.steps]
        graph.inputs, graph.outputs, graph.name = list(inputs), list(outputs), "main"
        model.subgraphs, model.signatureDefs = [graph], [self._signature(S, inputs, outputs)]
        builder = flatbuffers.Builder(1024 + sum(len(entry.raw) for entry in self.tensors))
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _tensor(self, S: ModuleType, buffers: list[Any], entry: Entry) -> Any:
        made = _filled(S.TensorT(), name=entry.name, shape=list(entry.shape), type=getattr(S.TensorType, entry.type), buffer=0,
                       hasRank=True)  # fmt: skip
        if entry.batched:
            made.shapeSignature = [-1, *entry.shape[1:]]
        if entry.scale:
            zeros = [entry.zero] * len(entry.scale)
            made.quantization = _filled(S.QuantizationParametersT(), scale=list(entry.scale), zeroPoint=zeros,
                                        quantizedDimension=entry.axis)  # fmt: skip
        if entry.data is not None:
            made.buffer = len(buffers)
            buffers.append(_filled(S.BufferT(), data=np.frombuffer(entry.raw, np.uint8)))
        return made

    def _operator(self, S: ModuleType, step: Step, code: int) -> Any:
        made = _filled(S.OperatorT(), opcodeIndex=code, inputs=list(step.inputs), outputs=list(step.outputs))
        if step.options:
            made.builtinOptionsType = getattr(S.BuiltinOptions, step.options)
            made.builtinOptions = _filled(getattr(S, f"{step.options}T")(), **step.fields)
        return made

    def _signature(self, S: ModuleType, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        def maps(indices: Sequence[int]) -> list[Any]:
            return [_filled(S.TensorMapT(), name=self.tensors[i].name, tensorIndex=i) for i in indices]

        return _filled(
            S.SignatureDefT(), signatureKey="serving_default", subgraphIndex=0, inputs=maps(inputs), outputs=maps(outputs)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all constants."""
        return sum(len(entry.raw) for entry in self.tensors)


def _filled(table: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        if not hasattr(table, name):
            raise AttributeError(f"{type(table).__name__} has no field {name!r}")
        setattr(table, name, value)
    return table
