"""Calibration and evaluation data as re-iterable batches, from Python objects or from files; it knows no model."""

from __future__ import annotations

import io
import itertools
import lzma
import math
import os
import re
import tokenize
import tomllib
import warnings
import zipfile
import zlib
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, Literal, TypeAlias

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import InputError
from .files import AnyPath, open_regular, show, size_text

Tokenizer: TypeAlias = Callable[[str], Sequence[int]]

#: Names under which the labels of a batch, or of a file, are looked for.
TARGETS = ("y", "labels", "label", "target", "targets")

#: A compressed file may declare this much (bytes) whatever its size; above it, at most `RATIO` times its size.
SMALL, RATIO = 64 * 2**20, 100

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
#: The only decoders that are ever asked; others (EPS, say) start programs.
_DECODERS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
_PIXELS = 2**26


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one call, ``module(*args, **named)``, and the labels of its examples where known."""

    args: tuple[Tensor, ...] = ()
    named: Mapping[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None

    def __len__(self) -> int:
        """Number of examples: the size of the first axis of the first input."""
        first = next(iter((*self.args, *self.named.values())))
        return first.shape[0] if first.ndim else 1

    def take(self, index: Tensor) -> Batch:
        """Some of the examples; an input without a batch axis stays whole."""
        n = len(self)

        def cut(x: Tensor) -> Tensor:
            return x[index] if x.ndim and x.shape[0] == n else x

        target = None if self.target is None else cut(self.target)
        return Batch(tuple(map(cut, self.args)), {name: cut(x) for name, x in self.named.items()}, target)


@dataclass(frozen=True, eq=False)
class Data:
    """Batches that can be gone through again and again; each is made when its turn comes and checked for NaN.

    ``classes`` are the names of the labels where the files give them; ``preprocess`` is what was applied; ``notes`` are for
    the user. ``len`` is the number of batches, or a `TypeError` where the source does not know it.
    """

    source: Callable[[], Iterable[Batch]]
    count: int | None
    classes: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("the number of batches is known only after going through them")
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for number, batch in enumerate(self.source()):
            _check(batch, number)
            empty = False
            yield batch
        if empty:
            raise InputError("the data holds no batches; give at least one")


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is done to raw inputs before the model sees them; stored with the quantized model so that it is never guessed.

    Numbers of every floating or byte input become ``dtype``, times ``scale``, minus ``mean``, over ``std``. Images first become
    ``channels`` planes, are scaled to ``size``, cut to the middle ``crop``, both (height, width) in pixels, and, unless
    ``scale`` is given, divided by 255. ``mean`` and ``std``, in units of what that leaves, have one number or one per channel,
    channels lying where ``layout`` says. ``shape`` reshapes each example at last ((-1,) flattens). Token ids, which are wider
    integers, are only cut: documents to ``max_tokens``, text into pieces of ``max_tokens`` (256 if not given) or, with
    ``lines``, into lines of ``words`` = (least, most) words that do not start with ``skip``.

    >>> Preprocess(scale=1 / 16, mean=0.5, std=0.25).apply(torch.tensor([[8.0, 16.0]]))
    tensor([[0., 2.]])
    """

    scale: float | None = None
    mean: float | tuple[float, ...] = ()
    std: Annotated[float, msgspec.Meta(gt=0)] | tuple[Annotated[float, msgspec.Meta(gt=0)], ...] = ()
    channels: Literal[1, 3] = 3
    size: tuple[Annotated[int, msgspec.Meta(ge=1, le=16384)], Annotated[int, msgspec.Meta(ge=1, le=16384)]] | None = None
    crop: tuple[Annotated[int, msgspec.Meta(ge=1)], Annotated[int, msgspec.Meta(ge=1)]] | None = None
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    shape: tuple[int, ...] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    lines: bool = False
    words: tuple[int, int] | None = None
    skip: str = ""

    def apply(self, x: Tensor) -> Tensor:
        """One input of a batch, first axis = examples. Wider integers (token ids) are cut to ``max_tokens`` only."""
        if not (x.is_floating_point() or x.dtype == torch.uint8):
            return x[:, : self.max_tokens] if self.max_tokens and x.ndim > 1 else x
        out = x.to(getattr(torch, self.dtype))
        if self.scale is not None:
            out = out * self.scale
        if self.mean:
            out = out - self._per_channel(self.mean, "mean", out)
        if self.std:
            out = out / self._per_channel(self.std, "std", out)
        if self.shape is not None:
            try:
                out = out.reshape(out.shape[0], *self.shape)
            except RuntimeError as err:
                raise InputError(f"preprocess: shape {list(self.shape)} does not fit an example of {list(x.shape[1:])}") from err
        return out

    def image(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Images (N, H, W, channels) of bytes -> one input in ``layout``; 0..255 becomes 0..1 unless ``scale`` is given."""
        x = torch.from_numpy(pixels).to(getattr(torch, self.dtype))
        if self.scale is None:
            x = x / 255
        return self.apply(x.permute(0, 3, 1, 2).contiguous() if self.layout == "NCHW" else x)

    def _per_channel(self, numbers: float | tuple[float, ...], what: str, x: Tensor) -> Tensor:
        values = torch.tensor(numbers, dtype=x.dtype)
        if values.numel() == 1:
            return values
        axis = 1 if self.layout == "NCHW" else x.ndim - 1
        if x.ndim < 2 or x.shape[axis] != len(values):
            raise InputError(f"preprocess: {len(values)} numbers in {what}, but axis {axis} of the input {list(x.shape)} differs")
        return values.reshape([-1 if i == axis else 1 for i in range(x.ndim)])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON content; fields at their defaults are left out."""
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], where: str = "preprocess") -> Preprocess:
        """The reverse of `to_dict`; raises `InputError` naming the field that is wrong."""
        try:
            return msgspec.convert(dict(plain), cls)
        except msgspec.ValidationError as err:
            raise InputError(f"{where}: {err}; the fields are {', '.join(cls.__struct_fields__)}") from err


def read_preprocess(path: AnyPath) -> Preprocess:
    """A `Preprocess` from a TOML or JSON file."""
    with open_regular(path) as file:
        text = file.read()
    try:
        plain = msgspec.json.decode(text) if text.lstrip()[:1] == b"{" else tomllib.loads(text.decode())
    except (msgspec.DecodeError, ValueError, RecursionError) as err:  # TOML and Unicode errors are ValueErrors
        raise InputError(f"{show(path)} is neither TOML nor JSON: {err}") from err
    if not isinstance(plain, dict):
        raise InputError(f"{show(path)} is no table of preprocessing fields")
    return Preprocess.from_dict(plain, show(path))


# -- from Python objects ----------------------------------------------------------------------------------------------


def batches(data: Any, batch_size: int = 64, preprocess: Preprocess | None = None) -> Data:
    """Batches from what a Python user has at hand.

    * one tensor or array (N, ...): cut along its first axis; so are a dict of them, and ``(inputs, target)`` with an integer
      target of N labels;
    * a list, a DataLoader or anything else that can be iterated: each item is one batch, and nothing is copied up front. An
      item is a tensor (one argument), a dict (named arguments), a tuple or list of tensors (several arguments), or
      ``(inputs, target)``: a pair whose second is an integer tensor with one axis as long as the inputs' first, or whose
      first is itself a dict or tuple. In a dict, "y", "labels", "label", "target" or "targets" is the target.
    * a one-shot iterator is read once into memory, and a note says so.

    Arrays of float64, NumPy's default, become float32. Raises `InputError` for no data at all, an item that is none of
    these, and, while iterating, for NaN or +inf in an input (with the batch's number).
    """
    if isinstance(data, Data):
        if data.preprocess is None or preprocess in (None, data.preprocess):
            return data if data.preprocess is not None else _mapped(data, preprocess)
        raise InputError("this data is preprocessed already, and otherwise; give the preprocessing to load_data alone")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    if isinstance(data, str | bytes | os.PathLike):
        raise InputError(f"the data is a path, {show(data)}; read it first with roundel.load_data(path)")
    if isinstance(data, Batch):
        return _mapped(Data(lambda: (data,), 1), preprocess)
    if isinstance(data, Tensor | np.ndarray | Mapping | UserDict) or (isinstance(data, tuple) and _is_labelled(data)):
        return _mapped(_cut(_batch(data), batch_size), preprocess)
    if not isinstance(data, Iterable):
        raise InputError(f"data of type {type(data).__name__} is no tensor, array, dict or iterable of batches")
    notes: tuple[str, ...] = ()
    if isinstance(data, Iterator):
        data = list(data)
        notes = (f"the data was a one-shot iterator; its {len(data)} batches were read into memory",)
    count = len(data) if hasattr(data, "__len__") else None
    if count == 0:
        raise InputError("the data holds no batches; give at least one")
    return _mapped(Data(lambda: map(_batch, data), count, notes=notes), preprocess)


def _mapped(data: Data, preprocess: Preprocess | None) -> Data:
    if preprocess is None:
        return data

    def apply(batch: Batch) -> Batch:
        named = {name: preprocess.apply(x) for name, x in batch.named.items()}
        return Batch(tuple(map(preprocess.apply, batch.args)), named, batch.target)

    return Data(lambda: map(apply, data.source()), data.count, data.classes, preprocess, data.notes)


def _cut(whole: Batch, batch_size: int) -> Data:
    """One batch that is the whole data set -> batches of ``batch_size`` views."""
    parts = [*whole.args, *whole.named.values(), *([] if whole.target is None else [whole.target])]
    sizes = {part.shape[0] if part.ndim else 0 for part in parts}
    if len(sizes) != 1:
        raise InputError(f"the inputs and labels hold different numbers of examples: {sorted(sizes)}")
    (total,) = sizes
    if not total:
        raise InputError("the data holds no examples; give at least one")

    def source() -> Iterator[Batch]:
        for i in range(0, total, batch_size):
            at = slice(i, i + batch_size)
            named = {name: x[at] for name, x in whole.named.items()}
            yield Batch(tuple(x[at] for x in whole.args), named, None if whole.target is None else whole.target[at])

    return Data(source, math.ceil(total / batch_size))


def _batch(item: Any) -> Batch:
    """One item of a user's iterable; the rule is in `batches`."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping | UserDict):
        named = dict(item)
        found = next((name for name in TARGETS if name in named), None)
        target = None if found is None else _target(named.pop(found))
        if not named:
            raise InputError(f"a batch holds labels ({found!r}) but no input")
        return Batch((), {str(name): _tensor(x) for name, x in named.items()}, target)
    if isinstance(item, tuple | list):
        if _is_labelled(item):
            inputs = _batch(item[0])
            return Batch(inputs.args, inputs.named, _target(item[1]))
        if not item:
            raise InputError("a batch is an empty tuple; give its tensors")
        return Batch(tuple(map(_tensor, item)))
    return Batch((_tensor(item),))


def _is_labelled(item: Sequence[Any]) -> bool:
    """Whether a pair is ``(inputs, target)``."""
    if len(item) != 2 or not isinstance(item[1], Tensor | np.ndarray):
        return False
    inputs, target = item
    if isinstance(inputs, tuple | list | Mapping | UserDict):
        return True
    whole = not torch.is_floating_point(target) if isinstance(target, Tensor) else target.dtype.kind in "iu"
    return bool(
        isinstance(inputs, Tensor | np.ndarray) and whole and target.ndim == 1 and inputs.ndim and len(target) == len(inputs)
    )


def _tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray):
        raise InputError(
            f"a batch holds {type(x).__name__}; batches are tensors, arrays, dicts, tuples of them or (inputs, target)"
        )
    if x.dtype.kind not in "biuf":
        raise InputError(f"a batch holds an array of {x.dtype}; numbers are needed")
    native = x.astype(np.float32 if x.dtype == np.float64 else x.dtype.newbyteorder("="), copy=not x.flags.writeable)
    return torch.from_numpy(np.ascontiguousarray(native))


def _target(x: Any) -> Tensor:
    target = _tensor(x)
    return target if target.is_floating_point() else target.long()


def _check(batch: Batch, number: int) -> None:
    """A NaN or +inf in any input is refused with its place (-inf is left alone: attention masks hold it)."""
    for name, x in (*enumerate(batch.args), *batch.named.items()):
        if not x.is_floating_point() or not x.numel():
            continue
        bad = x.isnan() | x.isposinf()
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            what = "NaN" if x[first].isnan() else "inf"
            raise InputError(
                f"batch {number} of the data: input {name!r} holds {int(bad.sum())} NaN or inf, the first ({what}) at {first}"
            )


def check_labels(target: Tensor, classes: int, number: int = 0) -> None:
    """Raise `InputError` unless every label of batch ``number`` is one of ``0 .. classes - 1``."""
    if target.is_floating_point():
        raise InputError(f"batch {number} of the data: labels are {target.dtype}; class numbers are needed")
    if target.numel() and not (int(target.min()) >= 0 and int(target.max()) < classes):
        bad = int(target.min()) if int(target.min()) < 0 else int(target.max())
        raise InputError(f"batch {number} of the data: label {bad} is outside the model's {classes} classes (0 .. {classes - 1})")


# -- from files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Examples:
    """What a file reader hands over: how to make a batch of any examples, in any choice and order."""

    make: Callable[[Sequence[int]], Batch]
    count: int
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    lengths: tuple[int, ...] | None = None  # of token documents: only neighbours of one length share a batch
    notes: tuple[str, ...] = ()


def load_data(
    path: AnyPath,
    *,
    preprocess: Preprocess | None = None,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 64,
    key: str | None = None,
    part: str | None = None,
    limit: int | None = None,
) -> Data:
    """Read a data file or folder as batches; nothing in it is ever run or unpacked to disk.

    * ``.npz``: "x" is the input and "y" (or "labels", ...) the labels; without "x" every array is an input of its name.
    * ``.npy``: floats are inputs (N, ...); integers are token ids, (N, length) or one stream cut into pieces.
    * ``.json``: token ids as a list of lists, or a table of such lists from which ``key`` chooses.
    * ``.txt``, ``.txt.xz``: text for ``tokenizer`` (see `Preprocess` for how it is cut).
    * a folder or ``.zip`` of images: the class is the name of the folder an image lies in, numbered in sorted order.

    Token documents of different lengths are never padded: only neighbours of one length share a batch.

    ``part`` narrows the examples: "0::10" (a Python slice), "5/class" (the first 5 of each class), "class=3", each with "!"
    in front for the others, several joined by commas and all counted on the whole file. ``limit`` keeps the first so many.
    Key and part may end the path: ``ids.json#calib[:80]``, ``mfcc.npz[!0::10]``. Raises `InputError` for an empty choice,
    unreadable or hostile content, and labels that do not fit.

    >>> np.savez("digits.npz", x=np.zeros((3, 1, 8, 8), np.float32), y=[4, 0, 9])
    >>> for batch in load_data("digits.npz", batch_size=2):
    ...     print(batch.args[0].shape, batch.target)
    torch.Size([2, 1, 8, 8]) tensor([4, 0])
    torch.Size([1, 1, 8, 8]) tensor([9])
    """
    where, inner_key, inner_part = _split(path)
    key, parts = key or inner_key, [text for text in (inner_part, part) if text]
    steps = preprocess or Preprocess()
    suffix = Path(where).suffix.lower()
    if key is not None and suffix != ".json":
        raise InputError(f"{show(where)}: a key ({key!r}) chooses from a .json file only")
    if os.path.isdir(where):
        found = _images(where, steps)
    elif suffix == ".json":
        found = _ids_json(where, key, steps)
    elif suffix == ".npz":
        found = _npz(where, steps)
    elif suffix == ".npy":
        found = _npy(where, steps)
    elif suffix == ".txt" or where.lower().endswith(".txt.xz"):
        found = _text(where, tokenizer, steps)
    elif suffix == ".zip":
        found = _images(where, steps)
    else:
        open_regular(where).close()
        raise InputError(
            f"{show(where)}: data is .npz, .npy, .json (token ids), .txt or .txt.xz, or a folder or .zip of images by class"
        )
    chosen = np.arange(found.count)
    for text in parts:
        chosen = chosen[np.isin(chosen, _chosen(text, found))]
    chosen = chosen[:limit]
    if not len(chosen):
        narrowed = f" of its {found.count} examples after the choice {', '.join(map(repr, parts)) or limit}" if found.count else ""
        raise InputError(f"{show(where)} holds no data{narrowed}; at least one example is needed")
    groups = _groups(chosen.tolist(), found.lengths, batch_size)
    return Data(lambda: map(found.make, groups), len(groups), found.classes, steps, found.notes)


def _split(path: AnyPath) -> tuple[str, str | None, str | None]:
    """``file#key[part]`` -> its pieces; a file that really has such a name is taken as it is."""
    text = os.fsdecode(path)
    if os.path.lexists(text):
        return text, None, None
    match = re.fullmatch(r"(.+?)(?:#([^#\[\]]+))?(?:\[([^\[\]]*)\])?", text, re.DOTALL)
    return (match[1], match[2], match[3]) if match else (text, None, None)


def _chosen(text: str, found: _Examples) -> NDArray[np.int64]:
    """The examples that a ``part`` names."""
    keep = np.ones(found.count, bool)
    for item in text.split(","):
        body = item.strip().removeprefix("!")
        here = np.zeros(found.count, bool)
        if match := re.fullmatch(r"(-?\d+)?:(-?\d+)?(?::(-?[1-9]\d*))?", body):
            here[slice(*(None if n is None else int(n) for n in match.groups()))] = True
        elif match := re.fullmatch(r"(\d+)/class|class=(\d+)", body):
            if found.labels is None:
                raise InputError(f"part {item!r}: the data has no labels to choose by")
            if match[1]:
                for label in np.unique(found.labels):
                    here[np.flatnonzero(found.labels == label)[: int(match[1])]] = True
            else:
                here = found.labels == int(match[2])
        else:
            raise InputError(f"part {item!r} is not understood; examples: '0::10', '!0::10', ':80', '5/class', '!class=0'")
        keep &= here != item.strip().startswith("!")
    return np.flatnonzero(keep)


def _groups(chosen: list[int], lengths: tuple[int, ...] | None, batch_size: int) -> list[list[int]]:
    runs = [chosen] if lengths is None else [list(run) for _, run in itertools.groupby(chosen, lambda i: lengths[i])]
    return [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]


# arrays


def _npz(path: str, steps: Preprocess) -> _Examples:
    with open_regular(path) as file:
        with _archive(path, file) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
            wanted = {name: members[name] for name in ("x", *TARGETS) if name in members} if "x" in members else members
            arrays = {name: _member_array(path, archive, member) for name, member in wanted.items()}
        left = sorted(members.keys() - arrays.keys() | {name for name, array in arrays.items() if array is None})
    notes = (f"{show(path)}: not used: {', '.join(map(repr, left))}",) if left else ()
    numbers = {name: array for name, array in arrays.items() if array is not None}
    label = next((name for name in TARGETS if name in numbers), None)
    target = None if label is None else _labels(path, numbers.pop(label))
    if not numbers:
        raise InputError(f"{show(path)} holds no input; name it 'x' (labels 'y'), found: {sorted(members) or 'nothing'}")
    sizes = {name: array.shape[0] if array.ndim else 0 for name, array in numbers.items()}
    if target is not None:
        sizes[str(label)] = len(target)
    if len(set(sizes.values())) != 1:
        raise InputError(f"{show(path)}: arrays hold different numbers of examples: {sizes}")

    def make(at: Sequence[int]) -> Batch:
        inputs = {name: steps.apply(_numbers(array[list(at)])) for name, array in numbers.items()}
        y = None if target is None else torch.from_numpy(target[list(at)])
        return Batch((inputs["x"],), {}, y) if set(inputs) == {"x"} else Batch((), inputs, y)

    return _Examples(make, next(iter(sizes.values())), target, notes=notes)


def _npy(path: str, steps: Preprocess) -> _Examples:
    with open_regular(path) as file:
        array = _array(path, file, os.fstat(file.fileno()).st_size)
    if array is None or not array.ndim:
        raise InputError(f"{show(path)} holds no array of numbers")
    if array.dtype.kind == "f" or array.dtype == np.uint8:
        return _Examples(lambda at: Batch((steps.apply(_numbers(array[list(at)])),)), len(array))
    if array.ndim == 1:
        return _pieces(path, array.astype(np.int64), steps)
    if array.ndim != 2:
        raise InputError(f"{show(path)}: integers are token ids, of 1 or 2 axes; found {array.ndim}")
    return _documents(list(array.astype(np.int64)), steps)


def _numbers(array: NDArray[Any]) -> Tensor:
    """float16 and float64 become float32, integers but bytes int64; the result owns its memory."""
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array.astype(np.uint8 if array.dtype == np.uint8 else np.int64))


def _labels(path: str, array: NDArray[Any]) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InputError(f"{show(path)}: labels must be integers (N,); found {array.dtype} {list(array.shape)}")
    if len(array) and int(array.min()) < 0:
        raise InputError(f"{show(path)}: label {int(array.min())} at {int(array.argmin())} is negative")
    return array.astype(np.int64)


def _member_array(path: str, archive: zipfile.ZipFile, member: str) -> NDArray[Any] | None:
    try:
        with archive.open(member) as file:
            return _array(path, file, archive.getinfo(member).file_size, member)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as err:
        raise InputError(f"{show(path)}: its member {member!r} is damaged: {err}") from err


def _array(path: str, file: Any, size: int, member: str = "") -> NDArray[Any] | None:
    """An array in NumPy's format, or None for one that holds no numbers; never a pickle. ``size`` in bytes bounds it."""
    where = show(path) + (f", member {member!r}" if member else "")
    form = np.lib.format
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = form.read_magic(file)
            read = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}.get(version)
            if read is None:
                raise InputError(f"{where}: NumPy format version {version} is unknown")
            shape, fortran, dtype = read(file)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, EOFError, tokenize.TokenError) as err:
        raise InputError(f"{where} is no NumPy array: {str(err).splitlines()[0] if str(err) else type(err).__name__}") from err
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects (a pickle), which are never loaded; save plain numbers")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > size:
        raise InputError(f"{where}: shape {shape} of {dtype} takes {size_text(needed)}, the file holds {size_text(size)}")
    if dtype.kind not in "biuf":
        return None
    data = file.read(needed)
    if len(data) != needed:
        raise InputError(f"{where} ends early: {len(data)} of {needed} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), copy=False)


# tokens and text


def _ids_json(path: str, key: str | None, steps: Preprocess) -> _Examples:
    token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    with open_regular(path) as file:
        text = file.read()
    try:
        found = msgspec.json.decode(text, type=list[list[token]] | dict[str, list[list[token]]])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as err:
        raise InputError(f"{show(path)} holds no token ids (a list of lists of numbers, or a table of them): {err}") from err
    if isinstance(found, dict):
        if key is None and len(found) == 1:
            (key,) = found
        if key not in found:
            what = "which one is meant?" if key is None else f"it has no {key!r};"
            raise InputError(
                f"{show(path)} holds several lists, {what} write {show(path)[1:-1]}#KEY with one of {sorted(found)[:20]}"
            )
        found = found[key]
    elif key is not None:
        raise InputError(f"{show(path)} is one list; it has no key {key!r}")
    return _documents([np.array(ids, np.int64) for ids in found], steps)


def _documents(documents: list[NDArray[np.int64]], steps: Preprocess, notes: tuple[str, ...] = ()) -> _Examples:
    cut = [ids[: steps.max_tokens] for ids in documents]
    for number, ids in enumerate(cut):
        if not len(ids) or int(ids.min()) < 0:
            raise InputError(f"token document {number} is {'empty' if not len(ids) else 'holding negative ids'}")

    def make(at: Sequence[int]) -> Batch:
        return Batch((torch.from_numpy(np.stack([cut[i] for i in at])),))

    return _Examples(make, len(cut), lengths=tuple(map(len, cut)), notes=notes)


def _pieces(path: str, ids: NDArray[np.int64], steps: Preprocess) -> _Examples:
    """One long stream of ids -> pieces of equal length; the rest that fills no piece is left out and noted."""
    length = min(steps.max_tokens or 256, len(ids))
    rest = len(ids) % length if length else 0
    notes = (f"{show(path)}: the last {rest} tokens fill no piece of {length} and are left out",) if rest else ()
    return _documents([ids[i : i + length] for i in range(0, len(ids) - rest, length)] if length else [], steps, notes)


def _text(path: str, tokenizer: Tokenizer | None, steps: Preprocess) -> _Examples:
    if tokenizer is None:
        raise InputError(f"{show(path)} is text; a model without a tokenizer cannot read it: give token ids (.json, .npy) instead")
    with open_regular(path) as file:
        raw = _unxz(path, file) if path.lower().endswith(".xz") else file.read()
    try:
        text = raw.decode()
    except UnicodeDecodeError as err:
        raise InputError(f"{show(path)} is no UTF-8 text: byte {err.start} is {err.object[err.start]:#04x}") from err
    if not steps.lines:
        return _pieces(path, np.array(tokenizer(text), np.int64), steps)
    least, most = steps.words or (1, len(text))
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if least <= len(line.split()) <= most and not (steps.skip and line.startswith(steps.skip))]
    tokens: dict[int, NDArray[np.int64]] = {}

    def ids(i: int) -> NDArray[np.int64]:
        if i not in tokens:
            tokens[i] = np.array(tokenizer(kept[i])[: steps.max_tokens], np.int64)
        return tokens[i]

    return _Examples(
        lambda at: Batch((torch.from_numpy(np.stack([ids(i) for i in at])),)), len(kept), lengths=tuple(range(len(kept)))
    )


def _unxz(path: str, file: BinaryIO) -> bytes:
    limit = max(SMALL, RATIO * os.fstat(file.fileno()).st_size)
    unpack, out = lzma.LZMADecompressor(memlimit=2 * SMALL), io.BytesIO()
    try:
        while not unpack.eof:
            chunk = file.read(2**16) if unpack.needs_input else b""
            if unpack.needs_input and not chunk:
                raise InputError(f"{show(path)} ends early; it is cut off")
            out.write(unpack.decompress(chunk, 2**20))
            if out.tell() > limit:
                raise InputError(f"{show(path)} is refused: it unpacks to more than {size_text(limit)}")
    except lzma.LZMAError as err:
        raise InputError(f"{show(path)} is no sound .xz file: {err}") from err
    return out.getvalue()


# images


def _images(path: str, steps: Preprocess) -> _Examples:
    """A folder or zip of images; the class of ``train/cat/1.jpg`` is "cat"."""
    folder = os.path.isdir(path)
    names = _folder_names(path) if folder else _zip_names(path)
    images = sorted(name for name in names if PurePosixPath(name).suffix.lower() in _IMAGES)
    if not images:
        raise InputError(f"{show(path)} holds no images ({', '.join(sorted(_IMAGES))})")
    notes = (f"{show(path)}: {len(names) - len(images)} files that are no images are left out",) if len(names) > len(images) else ()
    parents = [PurePosixPath(name).parent.name for name in images]
    classes = tuple(sorted(set(parents)))
    labels = None if "" in classes else np.array([classes.index(parent) for parent in parents], np.int64)

    def make(at: Sequence[int]) -> Batch:
        if folder:
            pixels = [_pixels(path, images[i], _read(os.path.join(path, images[i])), steps) for i in at]
        else:
            with open_regular(path) as file, _archive(path, file) as archive:
                pixels = [_pixels(path, images[i], _member(path, archive, images[i]), steps) for i in at]
        odd = next((k for k, p in enumerate(pixels) if p.shape != pixels[0].shape), None)
        if odd is not None:
            a, b = list(pixels[0].shape[:2]), list(pixels[odd].shape[:2])
            raise InputError(
                f"{show(path)}: images differ in size ({a} and {b}, {images[at[odd]]!r}); give size in the preprocessing"
            )
        return Batch((steps.image(np.stack(pixels)),), {}, None if labels is None else torch.from_numpy(labels[list(at)]))

    return _Examples(make, len(images), labels, classes if labels is not None else (), notes=notes)


def _folder_names(path: str) -> list[str]:
    return [
        Path(root, name).relative_to(path).as_posix()
        for root, _, files in os.walk(path)
        for name in files
        if not name.startswith(".")
    ]


def _zip_names(path: str) -> list[str]:
    with open_regular(path) as file, _archive(path, file) as archive:
        names = [member.filename for member in archive.infolist() if not member.is_dir()]
    for name in names:
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name[:2]:
            raise InputError(f"{show(path)} is refused: its member {name!r} leads out of the archive")
    return names


def _archive(path: str, file: BinaryIO) -> zipfile.ZipFile:
    """An open zip file whose members declare a believable size."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as err:
        raise InputError(f"{show(path)} is no sound zip archive: {err}") from err
    size, declared = os.fstat(file.fileno()).st_size, sum(member.file_size for member in archive.infolist())
    if declared > max(SMALL, RATIO * size):
        archive.close()
        raise InputError(f"{show(path)} is refused: {size_text(size)} claim to unpack to {size_text(declared)}")
    return archive


def _member(path: str, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, KeyError) as err:
        raise InputError(f"{show(path)}: its member {name!r} is damaged: {err}") from err


def _read(path: str) -> bytes:
    with open_regular(path) as file:
        return file.read()


def _pixels(path: str, name: str, raw: bytes, steps: Preprocess) -> NDArray[np.uint8]:
    """(height, width, channels) bytes of one image, scaled and cut as ``steps`` says."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Any = Image.open(io.BytesIO(raw), formats=_DECODERS)
        if image.width * image.height > _PIXELS:
            raise InputError(
                f"{show(path)}: image {name!r} claims {image.width} x {image.height} pixels; at most {_PIXELS} are read"
            )
        image = image.convert("L" if steps.channels == 1 else "RGB")
        if steps.size is not None:
            image = image.resize((steps.size[1], steps.size[0]), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, MemoryError) as err:
        raise InputError(f"{show(path)}: {name!r} is no readable image: {err}") from err
    pixels = np.array(image, np.uint8).reshape(image.height, image.width, steps.channels)
    if steps.crop is None:
        return pixels
    top, left = (pixels.shape[0] - steps.crop[0]) // 2, (pixels.shape[1] - steps.crop[1]) // 2
    if min(top, left) < 0:
        raise InputError(
            f"preprocess: crop {list(steps.crop)} is larger than the image {name!r}, {list(pixels.shape[:2])}; give a larger size"
        )
    return pixels[top : top + steps.crop[0], left : left + steps.crop[1]]
