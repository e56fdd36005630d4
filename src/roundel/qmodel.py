"""`QModel`: a quantized model as a value, its one-file form on disk, and the modules that run it; not how it was made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from .errors import InputError
from .files import AnyPath, Slice, map_safetensors, read_header, read_safetensors, show, write_safetensors
from .formats.codec import DTYPES, Stored
from .formats.entropy import compress, restore
from .formats.format import CHANNEL, MODEL, Format
from .formats.grid import Codebook
from .formats.qtensor import QTensor
from .graph import Graph
from .network.huggingface import huggingface_skeleton
from .network.layer import Activation, FakeWeight, PackedWeight, Site, Weight
from .network.run import QGraphModule
from .network.running import Tracker
from .network.walk import install
from .plan import Plan, When

#: The newest version of the file format that is read; newer ones are refused.
FORMAT_VERSION = 2

#: The version of a file without what version 2 brought: codes as an ANS stream, tables of the model or of whole numbers, running
#: ranges.
PLAIN_VERSION = 1

#: The key of the safetensors metadata that holds everything but numbers.
KEY = "roundel"


class HF(msgspec.Struct, frozen=True):
    """A transformers architecture, described by its ``config`` alone."""

    config: dict[str, Any]


class External(msgspec.Struct, frozen=True):
    """A network that only its own code can build: ``package.module:factory``. Loading never imports it."""

    factory: str


Structure = Graph | HF | External


class Note(msgspec.Struct, frozen=True):
    """What was done to one tensor, site or layer beyond the plan's words, or what was left undone, and why.

    ``fallback`` marks what ``strict`` refuses: something left float unasked, or done in another way than asked.
    """

    subject: str
    text: str
    fallback: bool = False


@dataclass(frozen=True, eq=False)
class QModel:
    """A quantized model: packed ``tensors``, stored ``activations``, the float ``rest``, and the ``structure`` that runs them.

    ``tied`` maps a name to the earlier one whose tensor it shares. ``template`` is a live network that the module path puts packed
    layers into; it is not saved. ``format_version`` is that of the file it was loaded from. Every exporter reads only this value.

    >>> from roundel import quantize
    >>> q = quantize(nn.Sequential(nn.Linear(64, 10, bias=False)), "int4/g32")
    >>> q.nbytes, q.bits, q.module(torch.ones(1, 64)).shape
    (360, 4.5, torch.Size([1, 10]))
    """

    structure: Structure
    tensors: Mapping[str, QTensor]
    activations: Mapping[str, Activation]
    plan: Plan
    rest: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    format_version: int = PLAIN_VERSION
    template: nn.Module | None = None
    path: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model: packed weights with scales and tables, a table of the model once, activation parameters,
        everything left float."""
        parts = (part for a in self.activations.values() if a.params for part in a.params.parts[:2] if part is not None)
        packed = sum(q.nbytes for q in self.tensors.values()) + sum(part.nbytes for part in parts)
        again = sum(q.table.nbytes for q in self.tensors.values() if q.format.table == MODEL and q.table is not None)
        packed += sum(t.nbytes for t in _model_tables(self.tensors).values()) - again
        return packed + sum(t.nbytes for t in self.rest.values())

    @property
    def bits(self) -> float:
        """Bits per parameter, every byte of `nbytes` counted."""
        count = sum(math.prod(q.shape) for q in self.tensors.values()) + sum(t.numel() for t in self.rest.values())
        return 8 * self.nbytes / max(1, count)

    @cached_property
    def module(self) -> nn.Module:
        """The network, in evaluation mode, running from packed weights. Raises `InputError` for an External without its module."""
        return _build(self, PackedWeight).eval()

    def save(self, path: AnyPath, entropy: bool = False, numbers: Mapping[str, Slice] | None = None) -> None:
        """Write one safetensors file, atomically; equal models give equal bytes. See docs/file-format.md.

        With ``entropy`` the codes of every tensor that this makes smaller are stored as an ANS stream, which loading undoes
        exactly; that takes the library constriction, and `InputError` says so where it is not there. With ``numbers`` the
        tensors may be on the meta device, and each of the file is copied from where ``numbers`` says it lies.
        """
        tensors = dict(self.rest)
        for name, q in self.tensors.items():
            _add(tensors, _flat(name, q, entropy), path)
        for site, activation in self.activations.items():
            if activation.params is not None:
                for part, q in zip(("scale", "offset"), activation.params.parts, strict=False):
                    _add(tensors, _flat(f"activation:{site}.{part}", q) if q is not None else {}, path)
        _add(tensors, {_table_name(text): table for text, table in _model_tables(self.tensors).items()}, path)
        coded = any(name.endswith(STREAM) for name in tensors.keys() - self.rest.keys())
        coded |= any(a.when == "running" for a in self.activations.values())
        newer = coded or any(q.format.table == MODEL or getattr(q.format.grid, "whole", 0) for q in self.tensors.values())
        document = _Document.of(self, FORMAT_VERSION if newer else PLAIN_VERSION)
        found = {name: (numbers or {}).get(name, tensor) for name, tensor in tensors.items()}
        write_safetensors(path, found, {KEY: msgspec.json.encode(document, order="sorted").decode()})


def fake(q: QModel, weight: Callable[[QTensor], Weight] = FakeWeight, sites: Mapping[str, Site] | None = None) -> nn.Module:
    """The fake-quantized twin of ``q.module``: real weights, encoded at each use, trainable, and equal to it bit for bit.

    ``weight`` and ``sites`` put other weights and activations in place of the stored ones (`roundel.tune`).

    >>> from roundel import quantize
    >>> q, x = quantize(nn.Linear(8, 4), "int4", "int8:dynamic", data=[torch.randn(2, 8)]), torch.randn(2, 8)
    >>> torch.equal(fake(q)(x), q.module(x))
    True
    """
    own = {name: tensor.clone() for name, tensor in q.rest.items()}  # training it must not change q
    return _build(replace(q, rest=own), weight, sites).eval()


def load(path: AnyPath, into: nn.Module | None = None, *, mapped: bool = False) -> QModel:
    """Read a saved model. ``into`` is the network of an External structure; nothing that a file names is ever imported. ``mapped``
    leaves the numbers on disk until they are used.

    Raises `InputError` for a file that is damaged, not Roundel's, or of a newer format version.

    >>> from roundel import quantize
    >>> quantize(nn.Linear(8, 4), "int4", data=[torch.randn(2, 8)]).save("small.safetensors")
    >>> load("small.safetensors").module(torch.ones(1, 8)).shape
    torch.Size([1, 4])
    """
    _, metadata = read_header(path)
    if KEY not in metadata:
        raise InputError(f"{show(path)} is no Roundel model: its metadata has no {KEY!r}; quantize a float model first")
    document = _Document.read(metadata[KEY], path)
    flat = map_safetensors(path) if mapped else read_safetensors(path)[0]
    try:
        tensors = {name: _lift(name, e.format, tuple(e.shape), e.axis, flat) for name, e in document.tensors.items()}
        activations = {}
        for site, entry in document.activations.items():
            fmt = Format.parse(entry.format)
            if (entry.when == "running") != (entry.tracker is not None) or (entry.when == "dynamic" and not site.endswith("input")):
                raise ValueError(f"site {site!r} cannot be {entry.when}")
            params = _lift_params(f"activation:{site}", fmt, flat) if entry.when != "dynamic" else None
            activations[site] = Activation(fmt, entry.when, params, entry.tracker)
        for text in {str(q.format) for q in tensors.values() if q.format.table == MODEL}:
            del flat[_table_name(text)]
        if lost := [name for name in flat if name.startswith("activation:")]:
            raise ValueError(f"{lost[0]!r} belongs to no site")
    except (KeyError, ValueError, RuntimeError, IndexError) as err:
        raise InputError(f"{show(path)} is damaged: its tensors do not fit its description ({err})") from err
    structure = document.structure_over({**tensors, **flat})
    if into is not None and not isinstance(structure, External):
        raise InputError(f"{show(path)} brings its own structure; load it without into=")
    return QModel(structure, tensors, activations, document.plan, flat, document.provenance, document.notes,
                  document.tied, document.format_version, share(into) if into is not None else None, str(path))  # fmt: skip


# -- the file ---------------------------------------------------------------------------------------------------------


class _TensorEntry(msgspec.Struct, frozen=True):
    format: str
    shape: list[int]
    axis: int = 0


class _ActivationEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    format: str
    when: When
    tracker: Tracker | None = None


class _Version(msgspec.Struct, frozen=True):
    format_version: int


class _Document(msgspec.Struct, frozen=True):
    """What stands under `KEY`."""

    format_version: int
    structure: dict[str, Any]
    tensors: dict[str, _TensorEntry]
    activations: dict[str, _ActivationEntry]
    plan: Plan
    tied: dict[str, str]
    notes: tuple[Note, ...]
    provenance: dict[str, Any]

    @classmethod
    def of(cls, q: QModel, version: int) -> _Document:
        if isinstance(q.structure, Graph):
            structure: dict[str, Any] = {"kind": "graph", "graph": msgspec.json.decode(q.structure.to_json())}
        elif isinstance(q.structure, HF):
            structure = {"kind": "huggingface", "config": q.structure.config}
        else:
            structure = {"kind": "external", "factory": q.structure.factory}
        return cls(
            version,
            structure,
            {name: _TensorEntry(str(t.format), list(t.shape), t.axis) for name, t in q.tensors.items()},
            {site: _ActivationEntry(str(a.format), a.when, a.tracker) for site, a in q.activations.items()},
            q.plan,
            dict(q.tied),
            q.notes,
            dict(q.provenance),
        )

    @classmethod
    def read(cls, text: str, path: AnyPath) -> _Document:
        try:
            version = msgspec.json.decode(text, type=_Version).format_version
            if version > FORMAT_VERSION:
                raise InputError(f"{show(path)} has format version {version}; this Roundel reads up to {FORMAT_VERSION}: update it")
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, RecursionError) as err:
            raise InputError(f"{show(path)}: its description is not readable: {err}") from err

    def structure_over(self, constants: Mapping[str, Any]) -> Structure:
        kind = self.structure.get("kind")
        if kind == "graph":
            text = msgspec.json.encode(self.structure.get("graph"))
            return Graph.from_json(text, Constants(constants))
        if kind == "huggingface":
            return HF(dict(self.structure.get("config") or {}))
        if kind == "external":
            return External(str(self.structure.get("factory")))
        raise InputError(f"its structure is of unknown kind {kind!r}")


class Constants(Mapping[str, Any]):
    """Names of a loaded graph's constants; the numbers stay packed, so a value is a shape without memory."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._meta = {
            name: torch.empty(t.shape, device="meta") if isinstance(t, QTensor) else t
            for name, t in tensors.items()
            if isinstance(t, QTensor) or "activation:" not in name
        }

    def __getitem__(self, name: str) -> Any:
        return self._meta[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._meta)

    def __len__(self) -> int:
        return len(self._meta)


def _add(into: dict[str, Tensor], new: Mapping[str, Tensor], path: AnyPath) -> None:
    if twice := into.keys() & new.keys():
        raise InputError(f"cannot write {show(path)}: two tensors would be named {min(twice)!r}; rename the layer")
    into.update(new)


#: In place of ``.codes``: the codes as an ANS stream.
STREAM = ".codes.ans"


def _table_name(text: str) -> str:
    return f"model:{text}.table"


def _model_tables(tensors: Mapping[str, QTensor]) -> dict[str, Tensor]:
    """Format text -> the one table of all tensors in it, for formats whose table is the model's."""
    found: dict[str, Tensor] = {}
    for name, q in tensors.items():
        if q.format.table == MODEL and q.table is not None:
            first = found.setdefault(str(q.format), q.table)
            if first is not q.table and not torch.equal(first, q.table):
                raise InputError(f"{name} is in {q.format}, whose table all tensors share, but its table is another one")
    return found


def _flat(name: str, q: QTensor, entropy: bool = False) -> dict[str, Tensor]:
    """The stored tensors of a `QTensor`: ``name.codes``, ``name.scale.codes``, ``name.offset.codes``, ``name.table`` ..."""
    stream = compress(q) if entropy else None
    out = {f"{name}.codes": q.codes} if stream is None else {f"{name}{STREAM}": stream}
    if q.scale is not None:
        out |= _flat(f"{name}.scale", q.scale, entropy)
    if q.offset is not None:
        out |= _flat(f"{name}.offset", q.offset, entropy)
    if q.table is not None and q.format.table != MODEL:
        out[f"{name}.table"] = q.table
    return out


def _lift(name: str, fmt: Format | str, shape: tuple[int, ...], axis: int, flat: dict[str, Tensor]) -> QTensor:
    """The inverse of `_flat`; takes what it uses out of ``flat``, but for a table of the model."""
    fmt = Format.parse(fmt) if isinstance(fmt, str) else fmt
    stream = flat.pop(f"{name}{STREAM}", None)
    bare = QTensor(shape, fmt, torch.empty(0, dtype=torch.uint8), axis=axis)
    codes = flat.pop(f"{name}.codes") if stream is None else restore(bare, stream)
    rows, cols = bare.matrix
    width = -(-(-(-cols // fmt.step) * fmt.bits) // 8)
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (rows, width):
        raise ValueError(f"{name}.codes should be uint8 of {(rows, width)}, is {codes.dtype} of {tuple(codes.shape)}")
    blocks = fmt.share.grid(bare.matrix)
    scale = _lift(f"{name}.scale", fmt.scale, blocks, 0, flat) if fmt.scale is not None else None
    part = fmt.zero or fmt.min
    offset = _lift(f"{name}.offset", part, blocks, 0, flat) if part is not None else None
    table = None
    if isinstance(fmt.grid, Codebook):
        table = flat[_table_name(str(fmt))] if fmt.table == MODEL else flat.pop(f"{name}.table")
        wanted = (rows if fmt.table == CHANNEL else 1, fmt.grid.k * fmt.grid.dim)
        dtype = torch.int8 if fmt.grid.whole else DTYPES[fmt.grid.entry]
        if table.dtype != dtype or tuple(table.shape) != wanted:
            raise ValueError(f"the table of {name} should be {dtype} of {wanted}, is {table.dtype} of {tuple(table.shape)}")
    return QTensor(shape, fmt, codes, scale, offset, table, axis)


def _lift_params(name: str, fmt: Format, flat: dict[str, Tensor]) -> Stored:
    """Stored parameters of an activation; their shape is that of their codes, one code a parameter."""

    def one(part: Format | None, word: str) -> QTensor | None:
        if part is None:
            return None
        rows = flat[f"{name}.{word}.codes"].shape[0]
        return _lift(f"{name}.{word}", part, (rows, 1), 0, flat)

    scale, offset = one(fmt.scale, "scale"), one(fmt.zero or fmt.min, "offset")
    return Stored(
        scale.matrix_values() if scale is not None else None,
        offset.matrix_values() if offset is not None else None,
        None,
        (scale, offset, None),
    )


# -- the modules ------------------------------------------------------------------------------------------------------


def _build(q: QModel, weight: Callable[[QTensor], Weight], sites: Mapping[str, Site] | None = None) -> nn.Module:
    sites = q.activations if sites is None else sites
    if isinstance(q.structure, Graph):
        return QGraphModule(q.structure, q.tensors, sites, q.rest, weight)
    template = q.template
    if template is None:
        if isinstance(q.structure, External):
            raise InputError(f"this model's structure is {q.structure.factory}, which is never imported for you: "
                             f"build it and pass it as load(path, into=module)")  # fmt: skip
        template = huggingface_skeleton(q.structure.config)
    module = share(template)
    _assign(module, q.rest, q.tied)
    module = install(module, q.tensors, q.tied, sites, weight)
    if empty := [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]:
        raise InputError(f"{len(empty)} tensors of the network are missing from the file, the first is {empty[0]!r}")
    return module


def share(module: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors, so that layers can be replaced without touching the original."""
    computed = (t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor))  # by the older weight norm
    memo = {id(t): t for t in [*module.parameters(), *module.buffers(), *computed]}
    return copy.deepcopy(module, memo)


def _assign(module: nn.Module, rest: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Put float tensors into their places; tied names share one parameter."""
    made: dict[str, nn.Parameter] = {}
    for name in [*rest, *(alias for alias, first in tied.items() if first in rest)]:
        owner, _, leaf = name.rpartition(".")
        try:
            parent = module.get_submodule(owner)
        except AttributeError as err:
            raise InputError(f"the network has no {owner!r}, which the file's tensor {name!r} belongs to") from err
        first = tied.get(name, name)
        if leaf in parent._parameters:
            old = parent._parameters[leaf]
            if old is not None and old.shape != rest[first].shape:
                raise InputError(f"{name!r} has shape {list(old.shape)} in the network and {list(rest[first].shape)} in the file")
            made.setdefault(first, nn.Parameter(rest[first], requires_grad=rest[first].is_floating_point()))
            parent._parameters[leaf] = made[first]
        elif leaf in parent._buffers:
            parent._buffers[leaf] = rest[first]
        else:
            raise InputError(
                f"the network's {owner or 'root'} has no parameter or buffer {leaf!r}; is it the model that was quantized?"
            )
