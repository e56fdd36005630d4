"""`read`: any supported file or folder -> an ordinary `nn.Module`; `read_integer`: an integer .tflite -> an integer graph.

Each kind of file has a module of its own here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from torch import nn

from ..errors import InputError
from ..files import AnyPath, open_regular, read_header, show
from ..graph import Graph

__all__ = ["read", "read_integer", "reader_notes"]

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def read(path: AnyPath, *, inputs: Sequence[int | str] | None = None, state: AnyPath | None = None) -> nn.Module:
    """Read a float model.

    ``path`` is a ``.tflite`` file, a Hugging Face folder (with ``config.json``), or ``package.module:factory``: a function or
    class of yours that returns the module, whose weights come from the checkpoint ``state``. ``inputs`` starts a ``.tflite``
    at these tensors (index or name) instead of its own inputs. The module is in evaluation mode; what the reader wants the
    user to know is in `reader_notes`. Raises `InputError` that says what was found and what to do; nothing that a model file
    contains is ever run.

    >>> type(read("torch.nn:Identity")).__name__
    'Identity'
    """
    text = os.fsdecode(path)
    if not os.path.lexists(text) and _FACTORY.fullmatch(text):
        _only(inputs is None, "inputs= starts a .tflite at other tensors; a factory's module has none")
        from .factory import read_factory

        return read_factory(text, state)
    _only(not _is_module(text), f"{show(path)} is a module; name the function in it that builds the network, {text}:factory")
    _only(state is None, f"state= belongs to a factory (package.module:factory); {show(path)} brings its own weights")
    if os.path.isdir(text):
        _only(inputs is None, f"inputs= starts a .tflite at other tensors; {show(path)} is a folder")
        if not os.path.lexists(os.path.join(text, "config.json")):
            raise InputError(f"{show(path)} is a folder without config.json; a Hugging Face folder has one")
        from .huggingface import read_folder

        return read_folder(path)
    kind = _kind(path)
    if kind == "tflite":
        from ..graph import GraphModule
        from .tflite import read_tflite

        return GraphModule(read_tflite(text, inputs=inputs)).eval()
    raise InputError(f"{show(path)} {_INSTEAD[kind]}")


def read_integer(path: AnyPath) -> Graph:
    """Read a .tflite file whose activations are int8 as the graph of integers that TFLite Micro computes, code for code.

    Inputs and outputs are real numbers in the file's own shapes, (N, ...) where it has a leading 1; between the doors values are in
    PyTorch's layout and named ``{operation}_{operator index}``, and every rescale rounds by R1. `roundel.simulate` runs the graph,
    with ``codes=True`` in the runtime's own numbers. There is no float model in it to calibrate or to quantize again.

    Raises `InputError` for a damaged file, one that is not int8 throughout, and operators that are not supported, all named.
    Specification: TensorFlow Lite's schema, version 3, and its 8-bit quantization specification.

    >>> import torch
    >>> from roundel import export, quantize, simulate
    >>> x = torch.randn(64, 16)
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU()), "int8", "int8", data=[x])
    >>> _ = export(q, "model.tflite", target="tflite")
    >>> graph = read_integer("model.tflite")
    >>> [node.op for node in graph], simulate(graph, x).shape
    (['quantize', 'linear', 'dequantize'], (64, 4))
    """
    from ._tflite_integer import read_integer as read_file

    return read_file(os.fsdecode(path))


def reader_notes(module: nn.Module) -> tuple[str, ...]:
    """The sentences that the reader of this module left for the user: what was expanded, dropped or ignored."""
    graph = getattr(module, "structure", None)
    return tuple(getattr(module, "roundel_notes", ())) + tuple(getattr(graph, "notes", ()))


#: What to say of files that are recognised but are not a float model by themselves.
_INSTEAD = {
    "roundel": "is a quantized Roundel model; open it with roundel.load(path)",
    "weights": "holds weights without their network: name the function that builds it, package.module:factory, and give the "
    "file as state (on the command line: --state)",
    "onnx": "is an ONNX model, which cannot be read yet; give the PyTorch module as package.module:factory, or a .tflite",
    "gguf": "is a GGUF file, which cannot be read yet; give the Hugging Face folder it was made from",
    "": "is no model file that Roundel knows; it reads .tflite, Hugging Face folders and package.module:factory with state",
}


def _kind(path: AnyPath) -> str:
    """What a file is, by its first bytes; by its suffix only for ONNX, which has none of its own."""
    with open_regular(path) as file:
        head = file.read(16)
    if head[4:8] == b"TFL3":
        return "tflite"
    if head[8:9] == b"{":
        return "roundel" if "roundel" in read_header(path)[1] else "weights"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "weights"
    if head[:4] == b"GGUF":
        return "gguf"
    suffix = os.path.splitext(os.fsdecode(path))[1].lower()
    if suffix == ".onnx":
        return "onnx"
    if suffix == ".tflite":
        return "tflite"  # its own reader says best what is wrong with it
    return ""


def _is_module(text: str) -> bool:
    """Whether ``package.module`` is what Python would import, and no file; nothing is imported to see that."""
    if os.path.lexists(text) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", text):
        return False
    stems = [os.path.join(home, *text.split(".")) for home in ("", *sys.path)]
    return any(os.path.isfile(stem + end) for stem in stems for end in (".py", os.sep + "__init__.py"))


def _only(fits: bool, otherwise: str) -> None:
    if not fits:
        raise InputError(otherwise)
