"""Checkpoints that try to run code or to claim more than they hold, as bytes; the code would only make a canary file."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

#: The numbers that open PyTorch's legacy checkpoint format: magic and protocol version.
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)


class Call:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: object, *args: object) -> None:
        self.pair = (function, args)

    def __reduce__(self) -> tuple:
        return self.pair


def in_zip(pickled: bytes, **members: bytes) -> bytes:
    """A zip checkpoint around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, content in members.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)
    return out.getvalue()


def in_legacy(pickled: bytes, keys: tuple[str, ...] = (), tail: bytes = b"") -> bytes:
    return LEGACY + pickled + pickle.dumps(list(keys), 2) + tail


def getattr_chain(command: str) -> bytes:
    """getattr(getattr(builtins.__import__('os'), ...)): no dangerous global but getattr itself."""
    text = command.encode()
    return (
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00system\x86R"
        + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."
    )  # fmt: skip


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], legacy: bool = False) -> bytes:
    """{"w": one float tensor} over a storage '0' that is said to hold ``numel``."""

    import torch

    class Storage:
        pass

    class Rebuild:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, size, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            if not isinstance(value, Storage):
                return None
            return ("storage", torch.FloatStorage, "0", "cpu", numel, *([None] if legacy else []))

    out = io.BytesIO()
    Pickler(out, 2).dump({"w": Rebuild()})
    return out.getvalue()


def files(canary: Path) -> dict[str, bytes]:
    """name -> file; each but the last few would make ``canary`` under an unsafe loader."""
    command = f"touch '{canary}'"
    system = Call(os.system, command)
    protocol2, protocol4 = pickle.dumps({"w": system}, 2), pickle.dumps({"w": system}, 4)
    return {
        "os_system_zip": in_zip(protocol2),
        "os_system_zip_protocol4": in_zip(protocol4),
        "os_system_legacy": in_legacy(protocol2),
        "os_system_legacy_first": protocol2 + LEGACY,
        "os_system_bare_pickle": protocol2,
        "os_system_bare_pickle4": protocol4,
        "os_system_protocol0": pickle.dumps({"w": system}, 0),
        "os_system_legacy_keys": LEGACY + pickle.dumps({}, 2) + protocol2,
        "eval_zip": in_zip(pickle.dumps({"w": Call(eval, f"__import__('os').system({command!r})")}, 2)),
        "getattr_chain_zip": in_zip(getattr_chain(command)),
        "getattr_chain_legacy": in_legacy(getattr_chain(command)),
        "whole_object_zip": in_zip(pickle.dumps({"w": Path("x")}, 2)),
    }


def stretched() -> bytes:
    """A view of 2^40 numbers on a storage of one."""
    return in_zip(tensor(1, (2**40,), (0,)), data__0=struct.pack("<f", 1.0))


def over_long() -> bytes:
    """A contiguous tensor of 2^28 numbers (1 GiB) on a storage of one: `set_` would grow the storage."""
    return in_zip(tensor(1, (2**28,), (1,)), data__0=struct.pack("<f", 1.0))


def legacy_storage(numel: int) -> bytes:
    """A legacy file of a few hundred bytes whose storage is said to hold ``numel`` numbers."""
    return in_legacy(tensor(numel, (numel,), (1,), legacy=True), ("0",), struct.pack("<q", numel))
