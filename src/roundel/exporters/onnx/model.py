"""An ONNX file in the making: safe unique names, tensors made only while they are written, external data; no network in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckError, InputError
from ...files import AnyPath, atomic_write, check_writable, show

#: Total bytes of tensors from which they lie beside the model: protobuf ends at 2 GiB, and structure needs room too.
EXTERNAL_ABOVE = 1 << 30

#: A tensor below this many bytes stays in the model file always: shapes and scalars, which shape inference must see.
INLINE = 1024

#: Alignment of external tensors, a page, so that a runtime can map them.
PAGE = 4096

#: NumPy has no name for these: (ONNX name, bits of an element).
BITS = {"INT4": 4, "UINT4": 4, "FLOAT8E4M3FN": 8, "FLOAT8E5M2": 8, "FLOAT16": 16, "BFLOAT16": 16, "FLOAT": 32}

#: The domain of onnxruntime's own operators.
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Blob:
    """A tensor to be written: ``kind`` is ONNX's type name, ``chunks()`` its bytes, made anew at each call."""

    kind: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[bytes]]

    @classmethod
    def of(cls, array: NDArray[Any]) -> Blob:
        """A small array as it is."""
        kind = {"float32": "FLOAT", "float16": "FLOAT16", "float64": "DOUBLE"}.get(str(array.dtype), str(array.dtype).upper())
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        return cls(kind, array.shape, len(data), lambda: [data])


def nibbles(codes: NDArray[Any]) -> bytes:
    """4-bit codes, two in a byte, the first in the low half; an odd count ends with 0 (ONNX's int4 and uint4)."""
    flat = codes.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return (flat[0::2] | flat[1::2] << 4).tobytes()


@dataclass
class Model:
    """Nodes, tensors and names of an ONNX graph. Names given out are unique and harmless, whatever was asked for."""

    opset: int
    inputs: list[tuple[str, str, tuple[int | str, ...]]] = field(default_factory=list)
    outputs: list[tuple[str, str, tuple[int | str, ...] | None]] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    blobs: dict[str, Blob] = field(default_factory=dict)
    infos: dict[str, tuple[str, tuple[int | str, ...]]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    shared: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def name(self, wanted: str) -> str:
        """A fresh name as near to ``wanted`` as is safe: letters, digits and ``_ . : / -``, at most 200 of them."""
        plain = re.sub(r"[^\w.:/-]", "_", wanted)[:200] or "_"
        free, n = plain, 2
        while free in self.taken:
            free, n = f"{plain}_{n}", n + 1
        self.taken.add(free)
        if free != wanted:
            self.renamed[free] = wanted
        return free

    def tensor(self, wanted: str, value: Blob | NDArray[Any]) -> str:
        """Enter a tensor; its name."""
        name = self.name(wanted)
        self.blobs[name] = value if isinstance(value, Blob) else Blob.of(value)
        return name

    def constant(self, wanted: str, value: NDArray[Any]) -> str:
        """A small tensor that equal ones share."""
        key = (f"{value.dtype}{value.shape}", value.tobytes())
        if key not in self.shared:
            self.shared[key] = self.tensor(wanted, value)
        return self.shared[key]

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attrs: Any) -> str:
        """Add a node under the name of its first result, which is returned."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), name=outputs[0], domain=domain, **attrs))
        return outputs[0]

    # -- the file -----------------------------------------------------------------------------------------------------

    def proto(self, beside: str | None, metadata: Mapping[str, str]) -> Any:
        """The `ModelProto`; with ``beside``, every tensor from `INLINE` bytes on refers to the file of that name."""
        from onnx import TensorProto, helper

        tensors, offset = [], 0
        for name, blob in self.blobs.items():
            tensor = TensorProto(name=name, data_type=getattr(TensorProto, blob.kind), dims=blob.shape)
            if beside is not None and blob.nbytes >= INLINE:
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", beside), ("offset", offset), ("length", blob.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                offset += -(-blob.nbytes // PAGE) * PAGE
            else:
                tensor.raw_data = b"".join(blob.chunks())
            tensors.append(tensor)

        def info(name: str, kind: str, shape: tuple[int | str, ...] | None) -> Any:
            return helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)

        graph = helper.make_graph(
            self.nodes, "roundel", [info(*i) for i in self.inputs], [info(*o) for o in self.outputs], tensors,
            value_info=[info(name, *known) for name, known in self.infos.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, producer_name="roundel", opset_imports=opsets)
        model.ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)])
        helper.set_model_props(model, dict(sorted(metadata.items())))
        return model

    def data(self) -> Iterator[bytes]:
        """The bytes of the external file, in the order that `proto` refers to."""
        for blob in self.blobs.values():
            if blob.nbytes >= INLINE:
                yield from blob.chunks()
                yield b"\0" * (-blob.nbytes % PAGE)

    def save(self, path: AnyPath, external: bool | None, metadata: Mapping[str, str], check: Callable[[Path], None]) -> list[Path]:
        """Write the model, and its tensors beside it where ``external`` (None: where they are large); the files written.

        Both are made in a fresh folder beside the target, judged there by `verify_file` and ``check``, and moved only then: what
        fails leaves the old files as they were.
        """
        check_writable(path)
        target = Path(os.path.realpath(os.fsdecode(path)))
        if any(0xDC80 <= ord(character) <= 0xDCFF for character in str(target)):  # a byte that is no UTF-8
            raise InputError(f"cannot write {show(path)}: the package onnx takes only paths in UTF-8")
        total = sum(blob.nbytes for blob in self.blobs.values())
        beside = self._beside(target.name) if (total > EXTERNAL_ABOVE if external is None else external) else None
        if self.renamed:
            metadata = {**metadata, "roundel.names": json.dumps(self.renamed)}
        folder = Path(tempfile.mkdtemp(prefix=".roundel-", dir=target.parent))
        try:
            model = self.proto(beside, metadata)
            atomic_write(folder / target.name, [model.SerializeToString(deterministic=True)])
            if beside is not None:
                atomic_write(folder / beside, self.data(), size=total)
            self.verify_file(folder / target.name, model)
            check(folder / target.name)
            files = [target.parent / beside, target] if beside is not None else [target]
            for file in files:  # the tensors first, and under a name of their own: no model ever refers to those of another
                os.replace(folder / file.name, file)
            for old in target.parent.iterdir():
                if re.fullmatch(re.escape(target.name) + r"\.[0-9a-f]{8}\.data", old.name) and old.name != beside:
                    old.unlink()
        except OSError as err:
            raise InputError(f"cannot write {show(path)}: {err.strerror or err}") from err
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return files

    def _beside(self, name: str) -> str:
        """The name of the external file, which says what is in it."""
        digest = hashlib.sha256()
        for part in self.data():
            digest.update(part)
        return f"{name}.{digest.hexdigest()[:8]}.data"

    def verify_file(self, path: Path, written: Any) -> None:
        """`CheckError` unless ``path`` is sound ONNX, its shapes can be inferred, and it reads back as what was written."""
        import onnx
        from google.protobuf.message import DecodeError

        try:
            onnx.checker.check_model(str(path), full_check=True)
            read = onnx.load(str(path), load_external_data=False)
            inferred = onnx.shape_inference.infer_shapes(read, check_type=True, strict_mode=True, data_prop=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError, RuntimeError) as err:
            raise CheckError(f"the ONNX file made is not sound, and was removed: {err}") from err
        if read.SerializeToString(deterministic=True) != written.SerializeToString(deterministic=True):
            raise CheckError("the ONNX file made does not read back as what was written; it was removed")
        for (name, kind, shape), value in zip(self.outputs, inferred.graph.output, strict=True):
            found = value.type.tensor_type
            sizes = tuple(d.dim_param or d.dim_value for d in found.shape.dim)
            if found.elem_type != getattr(onnx.TensorProto, kind) or (shape is not None and sizes != shape):
                raise CheckError(f"output {name!r} should be {kind} of {shape}, is inferred to be {sizes}; the file was removed")
        for tensor in read.graph.initializer:
            if tensor.HasField("data_location") and tensor.data_location == onnx.TensorProto.EXTERNAL:
                self._verify_external(path, tensor)

    def _verify_external(self, path: Path, tensor: Any) -> None:
        place = {entry.key: entry.value for entry in tensor.external_data}
        with open(path.parent / place["location"], "rb") as file:
            file.seek(int(place["offset"]))
            for chunk in self.blobs[tensor.name].chunks():
                if file.read(len(chunk)) != chunk:
                    raise CheckError(f"tensor {tensor.name!r} does not read back from {place['location']!r}; it was removed")
