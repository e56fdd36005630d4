"""Files that are written whole or not at all, and safetensors read strictly; it knows nothing of formats or models."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

#: Largest header, in bytes: the safetensors library's own bound.
MAX_HEADER = 100_000_000

#: safetensors name -> torch dtype: all that the safetensors library exchanges with torch.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def show(path: AnyPath) -> str:
    """A path for a message: quoted, with control characters and undecodable bytes escaped."""
    return repr(os.fsdecode(path))


def size_text(nbytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    if nbytes < 1024:
        return f"{nbytes:.0f} bytes"
    power = min(int(math.log2(nbytes) // 10), 4)
    return f"{nbytes / 1024**power:.1f} {('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The known names most like ``name``, quoted, for an error message; all of them where nothing is like it."""
    known = list(names)
    found = difflib.get_close_matches(name, known, count, 0.5) or known[:count]
    return ", ".join(map(repr, found)) or "nothing"


# -- writing ----------------------------------------------------------------------------------------------------------


def check_writable(path: AnyPath) -> None:
    """Raise `InputError` where `atomic_write` could not write; call it before long work. Leaves nothing behind."""
    target = _target(path)
    probe = _beside(target)
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as err:
        raise InputError(f"cannot write {show(path)}: no file can be made in {show(target.parent)} ({err.strerror})") from err
    finally:
        with suppress(OSError):
            probe.unlink()


def atomic_write(path: AnyPath, chunks: Iterable[bytes | bytearray | memoryview], size: int | None = None) -> None:
    """Write ``chunks`` to ``path`` so that at every moment the file is the old one or the new one, whole.

    The bytes go to a temporary file beside the target, are forced to disk, and take the name in one step. On any failure,
    Ctrl-C included, the temporary file is removed and the old file is as it was; system errors become `InputError`. With
    ``size`` in bytes the free space is checked before the first byte is written.
    """
    target = _target(path)
    needed = f"; {size_text(size)} needed" if size is not None else ""
    if size is not None and (free := shutil.disk_usage(target.parent).free) < size:
        raise InputError(
            f"cannot write {show(path)}: {size_text(size)} needed, {size_text(free)} free; make room or choose another disk"
        )
    temporary = _beside(target)
    written = 0
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B") if memoryview(chunk).nbytes else memoryview(b"")
                while view:
                    done = os.write(handle, view)
                    view, written = view[done:], written + done
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, target)
    except OSError as err:
        reason = f"{err.strerror or err} after {size_text(written)}{needed}"
        raise InputError(f"cannot write {show(path)}: {reason}; the file there before, if any, is as it was") from err
    finally:
        with suppress(OSError):
            temporary.unlink()
    _sync_folder(target)


def _target(path: AnyPath) -> Path:
    """The real file to write: links followed, its folder there, no folder or device in its place."""
    target = Path(os.path.realpath(os.fsdecode(path)))
    try:
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"cannot write {show(path)}: it is a folder; name a file")
        if not stat.S_ISREG(mode):
            raise InputError(f"cannot write {show(path)}: it is not a regular file")
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise InputError(f"cannot write {show(path)}: the folder {show(target.parent)} does not exist; make it first") from None
    except OSError as err:
        raise InputError(f"cannot write {show(path)}: {err.strerror}") from err
    return target


def _beside(target: Path) -> Path:
    """A fresh short name in the same folder, so that a target name of 255 bytes works."""
    return target.parent / f".roundel-{secrets.token_hex(8)}.tmp"


def _sync_folder(target: Path) -> None:
    """Make the new name itself durable; file systems that cannot sync a folder (EINVAL) are left alone."""
    if os.name != "posix":
        return
    try:
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise InputError(
                f"{show(target)} is written whole, but its folder could not be synced ({err.strerror}); "
                "it may not survive a power cut: check the disk and save again"
            ) from err


# -- safetensors: writing ---------------------------------------------------------------------------------------------


def write_safetensors(path: AnyPath, tensors: Mapping[str, Tensor | Slice], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; equal names, numbers and metadata give equal bytes, whatever the order of the mappings.

    Tensors are written one by one straight from their storage, so no second copy of the model is made; a `Slice` is copied from its
    file a piece at a time. Data lie by falling item size, then name, which keeps each one aligned without holes. Raises
    `InputError` for a tensor that has no numbers (meta), is not strided, or whose dtype the format lacks, and for what
    `atomic_write` refuses.
    Source: the format section of the safetensors README.
    """
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    offsets, end = {}, 0
    for name in order:
        offsets[name] = [end, end := end + math.prod(tensors[name].shape) * tensors[name].dtype.itemsize]
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name in sorted(tensors):
        tensor = tensors[name]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets[name]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    try:
        head = text.encode()
    except UnicodeEncodeError as err:
        raise InputError(f"cannot write {show(path)}: a tensor name or metadata text is not valid Unicode ({err.reason})") from err
    head += b" " * (-len(head) % 8)
    if len(head) > MAX_HEADER:
        raise InputError(f"cannot write {show(path)}: names and metadata take {size_text(len(head))}, the format allows 100 MB")

    def chunks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(head)) + head
        for name in order:
            tensor = tensors[name]
            yield from tensor.pieces() if isinstance(tensor, Slice) else [_bytes(tensor)]

    atomic_write(path, chunks(), size=8 + len(head) + end)


def _check_storable(name: str, tensor: Tensor | Slice) -> None:
    if name == "__metadata__":
        raise InputError("a tensor cannot be named '__metadata__': safetensors keeps that name for itself")
    if isinstance(tensor, Slice):
        return
    if tensor.device.type == "meta":
        raise InputError(f"tensor {name!r} has no numbers (it is on the meta device); load its weights first")
    if tensor.layout is not torch.strided:
        raise InputError(f"tensor {name!r} is {tensor.layout}; make it dense first")
    if tensor.dtype not in _NAMES:
        raise InputError(f"tensor {name!r} is {tensor.dtype}; a safetensors file holds {', '.join(str(d) for d in _NAMES)}")


def _bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as little-endian bytes; copies only what is not contiguous on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


# -- safetensors: reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``offset`` in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Slice:
    """A tensor that lies in a safetensors file and is read when it is wanted.

    >>> write_safetensors("a.safetensors", {"x": torch.arange(3)})
    >>> slices("a.safetensors")["x"].read()
    tensor([0, 1, 2])
    """

    path: Path
    name: str
    entry: Entry

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        with open_regular(self.path) as file:
            return _read_tensor(self.path, file, self.name, self.entry)

    def pieces(self, size: int = 1 << 24) -> Iterator[bytes]:
        """Its bytes, at most ``size`` at a time, a multiple of the item size."""
        with open_regular(self.path) as file:
            file.seek(self.entry.offset)
            for start in range(0, self.entry.nbytes, size):
                piece = file.read(min(size, self.entry.nbytes - start))
                if len(piece) != min(size, self.entry.nbytes - start):
                    raise InputError(f"{show(self.path)} ends inside tensor {self.name!r}; it was cut off while being read")
                yield piece


def slices(path: AnyPath) -> dict[str, Slice]:
    """The tensors of a safetensors file, unread; strict as `read_header`."""
    return {name: Slice(Path(os.fsdecode(path)), name, entry) for name, entry in read_header(path)[0].items()}


def read_header(path: AnyPath) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors that a safetensors file holds, by name, and its metadata; reads no numbers.

    Strict: raises `InputError` for an overlap, a hole or a tail in the data, a name given twice, a size that does not
    follow from dtype and shape, a header above 100 MB or beyond the file's end, and for anything that is not the format.
    """
    with open_regular(path) as file:
        return _header(path, file)


def read_safetensors(path: AnyPath, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors ``names`` (all when None) and the metadata of a safetensors file; strict as `read_header`.

    Every tensor owns its memory: the file is read, never mapped, so what is resident is what was asked for.
    """
    with open_regular(path) as file:
        entries, metadata = _header(path, file)
        wanted = list(entries) if names is None else list(dict.fromkeys(names))
        if missing := [name for name in wanted if name not in entries]:
            raise InputError(f"{show(path)} has no tensor {missing[0]!r}; the nearest there: {nearest(missing[0], entries)}")
        tensors = {name: _read_tensor(path, file, name, entries[name]) for name in wanted}
    return tensors, metadata


def map_safetensors(path: AnyPath) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: what is not looked at takes no memory, and writing to one changes no file."""
    entries, _ = read_header(path)
    whole = torch.from_numpy(np.memmap(os.fsdecode(path), np.uint8, "c"))
    return {name: whole[e.offset : e.offset + e.nbytes].view(e.dtype).reshape(e.shape) for name, e in entries.items()}


def open_regular(path: AnyPath) -> BinaryIO:
    """Open a file for reading; `InputError` if it is missing, unreadable, a folder or a device (which could hang)."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{show(path)} is a folder; a file is needed")
        if not stat.S_ISREG(mode):
            raise InputError(f"{show(path)} is not a regular file")
        return open(path, "rb")
    except FileNotFoundError as err:
        raise InputError(f"{show(path)} does not exist") from err
    except (OSError, ValueError) as err:
        raise InputError(f"cannot read {show(path)}: {getattr(err, 'strerror', None) or err}") from err


def _header(path: AnyPath, file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    def refuse(what: str) -> InputError:
        return InputError(f"{show(path)} is not a sound safetensors file: {what}")

    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise refuse(f"it has {size} bytes, and the length of its header alone takes 8")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER:
        raise refuse(f"its header claims {length} bytes; at most {MAX_HEADER} are allowed")
    if length > size - 8:
        raise refuse(f"its header claims {length} bytes, the file has {size - 8} after the length")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise refuse("its header does not start with '{'")
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise refuse("its header is nested too deep") from None
    except ValueError as err:  # JSON and Unicode errors are ValueErrors
        raise refuse(f"its header is no valid JSON ({err})") from err
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("its '__metadata__' is not a table of texts")
    start, total = 8 + length, size - 8 - length
    entries = {name: _entry(refuse, name, value, start) for name, value in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            what = "overlaps the one before it" if entry.offset < end else f"leaves a hole of {entry.offset - end} bytes before it"
            raise refuse(f"tensor {name!r} {what}")
        end += entry.nbytes
    if end != start + total:
        raise refuse(f"its tensors take {end - start} bytes, {total} are there: cut off, or something is appended")
    return entries, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is given twice")
    for name in table:
        name.encode()  # a lone surrogate is no name
    return table


def _entry(refuse: Any, name: str, value: Any, start: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"tensor {name!r} has dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", span)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise refuse(f"tensor {name!r} has a {what} that is not a list of sizes")
    if len(span) != 2:
        raise refuse(f"tensor {name!r} has {len(span)} data_offsets, not 2")
    # The product of the sizes that are not 0 bounds the strides torch will compute.
    if len(shape) > 64 or math.prod(n or 1 for n in shape) >= 2**60:
        raise refuse(f"tensor {name!r} has an impossible shape of {len(shape)} sizes")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if span[1] - span[0] != needed:
        raise refuse(
            f"tensor {name!r} of shape {shape} and dtype {dtype} takes {needed} bytes, its offsets span {span[1] - span[0]}"
        )
    return Entry(DTYPES[dtype], tuple(shape), start + span[0], needed)


def _read_tensor(path: AnyPath, file: BinaryIO, name: str, entry: Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if not entry.nbytes:
        return tensor
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    file.seek(entry.offset)
    try:
        if file.readinto(view) != entry.nbytes:  # type: ignore[attr-defined]
            raise InputError(f"{show(path)} ends inside tensor {name!r}; it was cut off while being read")
    except OSError as err:
        raise InputError(f"cannot read tensor {name!r} of {show(path)}: {err.strerror}") from err
    return tensor
