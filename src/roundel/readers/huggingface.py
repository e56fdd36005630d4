"""Hugging Face folders -> ordinary transformers models, from local files only; no code of a folder is ever run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import AnyPath, open_regular, read_header, read_safetensors, show
from ..network.huggingface import first_line, misfit, quiet, resolve
from .torchfile import read_state

#: What does not fit is reported to us, who refuse it by name, instead of raised or passed over.
_REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}

#: Weight files in the order of preference; the second of each pair indexes several shards.
_WEIGHTS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


def read_folder(path: AnyPath) -> nn.Module:
    """The model of a Hugging Face folder, in evaluation mode and in its stored dtype, with `roundel_notes` for the user.

    The class is the one that ``architectures`` names among transformers' own. Weights come from safetensors, or from
    ``.bin`` through the weights-only reader. Raises `InputError` before any weight is read for a missing shard, an index that
    lists an unknown file or leads out of the folder, a model that is quantized already, or an architecture that needs code
    from the folder; and afterwards for weights that are missing or have the wrong shape.
    """
    folder = Path(os.fsdecode(path))
    raw = folder_json(folder)
    notes = []
    if "auto_map" in raw:
        notes.append("config.json brings code of its own (auto_map); it is ignored, transformers' built-in class is used")
    shards = weight_files(folder)
    config, cls = resolve(raw, show(path))
    state: dict[str, Tensor] = {}
    for shard in shards:
        if shard.suffix == ".safetensors":
            tensors = read_safetensors(shard)[0]
        else:
            tensors, said = read_state(shard)
            notes += said
        if twice := state.keys() & tensors.keys():
            raise InputError(f"{show(path)}: two shards hold the tensor {min(twice)!r}")
        state |= tensors
    if not state:
        raise InputError(f"{show(path)} holds no weights: its files are empty")
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    if len(dtypes) > 1:
        notes.append(f"weights are stored in {', '.join(sorted(map(str, dtypes)))}; all are read as float32")
    with quiet():
        try:
            module, info = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **_REPORT)
        except misfit() as err:
            raise InputError(f"{show(path)}: transformers cannot load it as {cls.__name__}: {first_line(err)}") from err
    if wrong := sorted(info["mismatched_keys"]):
        name, found, wanted = wrong[0]
        raise InputError(f"{show(path)}: weight {name!r} has shape {list(found)}, config.json asks for {list(wanted)}")
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(map(repr, missing[:4])) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise InputError(
            f"{show(path)}: weights of {cls.__name__} are missing: {shown}; name the class they were saved from in config.json"
        )
    if extra := sorted(info["unexpected_keys"]):
        shown = ", ".join(map(repr, extra[:4])) + (" ..." if len(extra) > 4 else "")
        notes.append(f"{len(extra)} stored tensors are not part of {cls.__name__} and left out: {shown}")
    module.roundel_notes = tuple(notes)
    return module.eval()


def read_tokenizer(path: AnyPath) -> Callable[[str], list[int]]:
    """The function text -> token ids of a folder's ``tokenizer.json``, special tokens included, nothing cut or padded."""
    file = Path(os.fsdecode(path))
    file = file / "tokenizer.json" if file.is_dir() else file
    if not os.path.lexists(file):
        raise InputError(f"{show(file.parent)} has no {file.name}, so text cannot be read: give token ids (.json, .npy) instead")
    with open_regular(file) as handle:
        text = handle.read()
    try:
        import tokenizers
    except ImportError as err:
        raise InputError("reading text needs the package tokenizers: pip install -e '.[hf]' in Roundel's folder") from err
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text.decode())
    except Exception as err:  # the library raises the bare class
        raise InputError(f"{show(file)} is no tokenizer: {first_line(err)}") from err
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    return encode


# -- the folder -------------------------------------------------------------------------------------------------------


def _json(folder: Path, name: str) -> dict[str, Any]:
    with open_regular(_inside(folder, name)) as file:
        text = file.read()
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as err:
        raise InputError(f"{show(folder / name)} is no JSON table: {first_line(err)}") from err
    return value


def folder_json(folder: Path) -> dict[str, Any]:
    """The config of a folder whose weights are float."""
    raw = _json(folder, "config.json")
    if "quantization_config" in raw:
        method = _text(raw["quantization_config"], "quant_method")
        raise InputError(f"{show(folder)} is quantized already (quantization_config: {method!r}); start from the float model")
    return raw


def _inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a folder; refused when it is, or links to, something outside.

    A link may lead from ``snapshots/<revision>`` to the ``blobs`` beside, as Hugging Face's own cache is built.
    """
    root = Path(os.path.realpath(folder))
    homes = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    if "\0" in name or not any(Path(os.path.realpath(root / name)).is_relative_to(home) for home in homes):
        raise InputError(f"{show(folder)}: the file {name!r} lies outside the folder; it is refused")
    return folder / name


def weight_files(folder: Path) -> list[Path]:
    """The weight files to read, every one checked to be there and inside the folder."""
    for single, index in _WEIGHTS:
        if os.path.lexists(folder / single):
            return [_there(folder, single)]
        if not os.path.lexists(folder / index):
            continue
        weight_map = _json(folder, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise InputError(f"{show(folder / index)} has no 'weight_map' from tensor names to files")
        names = sorted(set(weight_map.values()))
        for name in names:
            _inside(folder, name)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise InputError(
                f"{show(folder)}: {index} lists {missing[0]!r}, which is not there"
                f" ({len(missing)} of {len(names)} files missing); download the model again"
            )
        if unfit := [name for name in names if Path(name).suffix != Path(single).suffix]:
            raise InputError(f"{show(folder)}: {index} lists {unfit[0]!r}, which is no {Path(single).suffix} file")
        return [_there(folder, name, [k for k, v in weight_map.items() if v == name]) for name in names]
    raise InputError(f"{show(folder)} has no weights; expected one of: {', '.join(name for pair in _WEIGHTS for name in pair)}")


def _there(folder: Path, name: str, promised: Sequence[str] = ()) -> Path:
    """The shard, its header sound and with every tensor that the index promises in it."""
    path = _inside(folder, name)
    if path.suffix == ".safetensors":
        entries = read_header(path)[0]
        if lost := [key for key in promised if key not in entries]:
            raise InputError(f"{show(path)} lacks the tensor {lost[0]!r} that the index promises; download the model again")
    return path


def _text(value: Any, key: str) -> str:
    return str(value.get(key)) if isinstance(value, dict) else str(value)
