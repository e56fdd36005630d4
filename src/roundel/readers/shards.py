"""A Hugging Face folder read a part at a time: the network on the meta device, and its weights where they lie; `.bin` files, which
cannot be read in parts, are refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import AnyPath, Slice, show, slices
from ..network.huggingface import first_line, huggingface_skeleton, misfit, quiet, resolve
from .huggingface import folder_json, weight_files


@dataclass(frozen=True, eq=False)
class Folder:
    """``module`` has its parameters on the meta device; ``places`` says for each stored tensor which tensor of the module it is, or
    is a part of; ``needed`` are the module's tensors that come from files; ``alike`` are the names of one tied tensor, by each."""

    path: Path
    module: Any
    stored: Mapping[str, Slice]
    places: Mapping[str, str]
    needed: frozenset[str]
    alike: Mapping[str, tuple[str, ...]]
    mapping: list[Any]
    notes: tuple[str, ...]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors of the module from their files, converted as transformers does; a tied one by any of its names."""
        asked = {name: self.alike.get(name, (name,)) for name in names}
        wanted = {alias for names in asked.values() for alias in names}
        keys = [key for key, place in self.places.items() if place in wanted]
        from transformers import core_model_loading, modeling_utils

        dtype = self.module.dtype
        plan = self.module._get_dtype_plan(dtype)
        config = modeling_utils.LoadStateDictConfig(dtype=dtype, dtype_plan=plan, weight_mapping=self.mapping)
        with quiet():
            try:
                core_model_loading.convert_and_load_state_dict_in_model(
                    self.module, {key: self.stored[key].read() for key in keys}, config
                )
            except misfit() as err:
                raise InputError(f"{show(self.path)}: transformers cannot load {keys[0]!r}: {first_line(err)}") from err
        found = {}
        for name, aliases in asked.items():
            values = [t for alias in aliases if (t := owner(self.module, alias)[alias.rpartition(".")[2]]) is not None]
            found[name] = next(t for t in values if not t.is_meta).detach()
        for name in wanted & self.needed:
            table, last = owner(self.module, name), name.rpartition(".")[2]
            old = table[last]
            assert old is not None
            empty = torch.empty_like(old, device="meta")
            table[last] = nn.Parameter(empty, requires_grad=False) if isinstance(old, nn.Parameter) else empty
        return found

    def put(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Give these tensors to a copy of the module, tied ones under all their names."""
        for name, value in values.items():
            for alias in self.alike.get(name, (name,)):
                table, last = owner(module, alias), alias.rpartition(".")[2]
                if last in table:
                    is_parameter = isinstance(table[last], nn.Parameter)
                    table[last] = nn.Parameter(value, requires_grad=False) if is_parameter else value


def owner(module: nn.Module, name: str) -> dict[str, Tensor | None]:
    """The table of parameters or buffers that a tensor's name stands in; an empty one where there is none."""
    part = module.get_submodule(name.rpartition(".")[0])
    tables: tuple[Any, ...] = (part._parameters, part._buffers)
    return next((table for table in tables if name.rpartition(".")[2] in table), {})


def open_folder(path: AnyPath) -> Folder:
    """The folder, nothing of its weights read. Raises `InputError` as `read_folder` does."""
    folder = Path(os.fsdecode(path))
    raw = folder_json(folder)
    files = weight_files(folder)
    if odd := [file for file in files if file.suffix != ".safetensors"]:
        raise InputError(f"{show(odd[0])} cannot be read in parts: save the model as safetensors, or quantize it in memory")
    stored: dict[str, Slice] = {}
    for file in files:
        found = slices(file)
        if twice := stored.keys() & found.keys():
            raise InputError(f"{show(path)}: two shards hold the tensor {min(twice)!r}")
        stored |= found
    if not stored:
        raise InputError(f"{show(path)} holds no weights: its files are empty")
    dtypes = {one.dtype for one in stored.values() if one.dtype.is_floating_point}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    notes = ["config.json brings code of its own (auto_map); it is ignored, transformers' built-in class is used"]
    notes = notes if "auto_map" in raw else []
    if len(dtypes) > 1:
        notes.append(f"weights are stored in {', '.join(sorted(map(str, dtypes)))}; all are read as float32")
    _, cls = resolve(raw, show(path))
    module: Any = huggingface_skeleton({**raw, "architectures": [cls.__name__], "dtype": str(dtype).removeprefix("torch.")})
    return _placed(folder, module, stored, tuple(notes))


def _placed(folder: Path, module: Any, stored: dict[str, Slice], notes: tuple[str, ...]) -> Folder:
    """Which stored tensor goes where, by transformers' own renamings; what is missing, has another shape or is left over."""
    from transformers import conversion_mapping, core_model_loading

    mapping = conversion_mapping.get_model_conversion_mapping(module)
    renamings = [one for one in mapping if isinstance(one, core_model_loading.WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, core_model_loading.WeightConverter)]
    targets = {pattern: one.target_patterns for one in converters for pattern in one.source_patterns}
    state = module.state_dict(keep_vars=True)
    places: dict[str, str] = {}
    covered: set[str] = set()
    extra = []
    for key, one in stored.items():
        name, source = core_model_loading.rename_source_key(key, renamings, converters, module.base_model_prefix, state)
        if name not in state and key in state:
            name, source = core_model_loading.rename_source_key(key, [], [], module.base_model_prefix, state)
        if name not in state:
            extra.append(key)
            continue
        places[key] = name
        covered |= {name} if source is None else {name.replace(targets[source][0], t) for t in targets[source]}
        if source is None and tuple(state[name].shape) != one.shape:
            raise InputError(
                f"{show(folder)}: weight {key!r} has shape {list(one.shape)}, config.json asks for {list(state[name].shape)}"
            )
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(tensor), name) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    tied = {same[name] for name in covered if name in same}
    missing = sorted(name for name, tensor in state.items() if tensor.is_meta and name not in covered and same[name] not in tied)
    if missing:
        shown = ", ".join(map(repr, missing[:4])) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        kind = type(module).__name__
        raise InputError(
            f"{show(folder)}: weights of {kind} are missing: {shown}; name the class they were saved from in config.json"
        )
    for key, name in places.items():
        others = [k for k, n in places.items() if n != name and same.get(n) == same.get(name)] if same.get(name) != name else []
        if others and digest(stored[key]) != digest(stored[others[0]]):
            raise InputError(f"{show(folder)}: config.json ties {name!r} to {same[name]!r}, but their numbers differ; set "
                             "tie_word_embeddings to false")  # fmt: skip
    if extra:
        shown = ", ".join(map(repr, sorted(extra)[:4])) + (" ..." if len(extra) > 4 else "")
        notes = (*notes, f"{len(extra)} stored tensors are not part of {type(module).__name__} and left out: {shown}")
    alike: dict[str, tuple[str, ...]] = {}
    for name, leader in same.items():
        alike[leader] = (*alike.get(leader, ()), name)
    alike = {name: names for names in alike.values() if len(names) > 1 for name in names}
    return Folder(folder, module, stored, places, frozenset(covered), alike, mapping, notes)


def digest(stored: Slice) -> bytes:
    """A hash of a tensor's bytes."""
    whole = hashlib.blake2b(digest_size=20)
    for piece in stored.pieces():
        whole.update(piece)
    return whole.digest()
