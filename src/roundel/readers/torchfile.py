"""Weights from PyTorch checkpoints and safetensors files; it runs nothing that a file contains and builds no module."""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import InputError
from ..files import AnyPath, open_regular, read_safetensors, show, size_text

#: Keys under which training scripts keep the state dict inside a larger checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model")

#: What the pickle of a state dict may name. torch's own weights-only list is wider and stays the second lock.
_ALLOWED = re.compile(
    r"collections OrderedDict|_codecs encode|torch (\w+Storage|Size|device)|torch\.storage (Untyped|Typed)Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
)

#: What a damaged pickle makes the unpicklers raise; a program error of ours is none of these by itself.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


def read_state(path: AnyPath) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in a ``.pt``/``.pth``/``.th``/``.bin`` (zip or legacy) or ``.safetensors`` file, and notes for the user.

    The file may hold the state dict itself or a checkpoint with it under "state_dict", "model_state_dict" or "model"; the
    prefix ``module.`` of data-parallel training is removed when every key has it. Raises `InputError` for a damaged file, a
    pickle that names anything but tensors (the name is given; there is no unsafe way round), and sizes the file cannot hold.
    """
    with open_regular(path) as file:
        magic = file.read(9)
    if magic[8:] == b"{":
        return dict(read_safetensors(path)[0]), ()
    return _state(path, _load(path, magic))


def _load(path: AnyPath, magic: bytes) -> Any:
    """The checked content of a checkpoint: `torch.load` in weights-only mode behind our own reading of sizes and names."""
    with open_regular(path) as file, _damage_named(path):
        size = file.seek(0, 2)
        file.seek(0)
        named = _zip_globals(path, file, size) if magic[:4] == b"PK\x03\x04" else _pickle_globals(file, pickles=5)
        if refused := sorted(set(named)):
            names = ", ".join(repr(name.replace(" ", ".")) for name in refused[:5])
            raise InputError(
                f"{show(path)} is refused: its pickle asks for {names}, which is no part of a state dict and could run code; "
                "ask its author for the bare state dict or a safetensors file"
            )
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    _check_sizes(path, content, size)
    return content


@contextmanager
def _damage_named(path: AnyPath) -> Iterator[None]:
    """Whatever the unpicklers raise inside becomes one `InputError`; their warnings (odd protocols, escapes) add nothing to it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except _DAMAGE as err:
        raise InputError(f"{show(path)} is damaged or no PyTorch checkpoint: {_first_line(err)}") from err


def _zip_globals(path: AnyPath, file: BinaryIO, size: int) -> Iterator[str]:
    """Check the archive member by member (declared sizes first, then every CRC), then scan its pickle."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        declared = sum(member.file_size for member in members)
        if declared > size:
            raise InputError(
                f"{show(path)} is refused: it declares {size_text(declared)} in a file of {size_text(size)}; "
                "PyTorch never compresses a checkpoint"
            )
        if len({member.filename for member in members}) != len(members):
            raise InputError(f"{show(path)} is refused: two members of the archive share one name")
        if bad := archive.testzip():
            raise InputError(f"{show(path)} is damaged: the checksum of its member {bad!r} is wrong")
        if any(member.filename.endswith("constants.pkl") for member in members):
            raise InputError(f"{show(path)} is a TorchScript program, not weights; save model.state_dict() instead")
        pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise InputError(
                f"{show(path)} is a zip file, but no PyTorch checkpoint: it has {len(pickles)} members 'data.pkl', not 1"
            )
        with archive.open(pickles[0]) as stream:
            yield from _pickle_globals(stream, pickles=1)


def _pickle_globals(stream: Any, pickles: int) -> Iterator[str]:
    """The "module name" pairs, not allowed in a state dict, that the first pickles of a stream would import; runs nothing.

    A legacy checkpoint is five pickles (magic, version, system, content, storage keys) and then raw numbers.
    """
    for _ in range(pickles):
        texts: list[str] = []
        for op, value, _at in pickletools.genops(stream):
            if isinstance(value, str):
                texts.append(value)
            if op.name in ("GLOBAL", "INST"):
                name = str(value)
            elif op.name == "STACK_GLOBAL":  # its operands are the last two texts, as every pickler writes them
                name = " ".join(texts[-2:])
            else:
                continue
            if not _ALLOWED.fullmatch(name) and not _is_dtype(name):
                yield name
        if not stream.peek(1):
            return


def _is_dtype(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def _check_sizes(path: AnyPath, content: Any, size: int) -> None:
    """A tensor that claims more numbers than the file has bytes for (a stretched or over-long view) is refused."""
    storages: dict[int, int] = {}
    for name, tensor in _tensors(content):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if max(sum(storages.values()), tensor.numel() * tensor.element_size()) > size:
            raise InputError(f"{show(path)} is refused: tensor {name!r} claims more numbers than the file holds")


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of the places that `_state` looks at: two levels of dicts."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict) and name.count("/") < 2:
        for key, value in content.items():
            yield from _tensors(value, f"{name}/{key}" if name else str(key))


def _state(path: AnyPath, content: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    if isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        for key in _NESTED:
            if isinstance(content.get(key), dict):
                notes.append(f"the state dict lies under {key!r}; the checkpoint's other entries are left out")
                content = content[key]
                break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        what = (
            f"keys {', '.join(repr(str(k))[:40] for k in list(content)[:8])}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise InputError(
            f"{show(path)} holds no state dict (found: {what}); expected tensors by name, bare or under one of {_NESTED}"
        )
    state = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    if others := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        notes.append(f"entries that are no tensors are left out: {', '.join(map(repr, others[:8]))}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
        notes.append("the prefix 'module.' (data-parallel training) is removed from every key")
    return state, tuple(notes)


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]
