"""onnxruntime on the processor: runs the ONNX export of a model and gives back every value that it holds as codes.

Its rescales are R4: float32 products, ties to even. It forms some factors and sums in another order of float32 operations, by which
a code in a million differs: docs/onnx.md counts them. Other execution providers are not here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..exporters.onnx import Written, infer, write
from ..graph import Graph
from ..integer.dialect import Ints
from ..qmodel import QModel

NAME = "onnxruntime"

#: Runtime name -> how the model is written for it.
FORMS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"style": "qoperator"},
    "onnxruntime-qdq": {"style": "qdq"},
    "onnxruntime-u8s8": {"style": "qoperator", "signed": False},
}


def absent(name: str = NAME) -> str | None:
    """Why it cannot run here; None where it can."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed: pip install -e '.[onnx]' in Roundel's folder"
    return None


def dialects(name: str = NAME) -> str:
    """Its rounding, as `roundel.integer.in_dialect` takes it."""
    _form(name)
    return "R4"


def run(q: QModel, graph: Graph, codes: Mapping[str, Ints], folder: Path, name: str = NAME) -> dict[str, Ints]:
    """Value -> its codes (N, ...) in PyTorch's layout, for every value of the integer graph that the file holds as codes.

    ``codes`` are those of the inputs. The model is written into ``folder`` first.
    """
    written = write(q, graph, Path(folder) / f"{name}.onnx", **_form(name))
    return {name: np.asarray(given, np.int64) for name, given in codes.items()} | execute(written, codes)


def execute(written: Written, given: Mapping[str, Ints], *, apart: bool = False) -> dict[str, Ints]:
    """Codes of every value of a written model that are made from the ``given`` ones, codes of some values (its inputs, say).

    Whoever reads a given value gets the given codes. With ``apart`` all are given, and those are left out of the answer that no
    operation makes: what then differs from what was given differs by one operation alone.
    """
    import onnx

    path = written.files[-1]
    model = onnx.load(str(path), load_external_data=False)
    types = {value.name: value.type for value in (*model.graph.value_info, *model.graph.input)}
    kinds = {name: kind.tensor_type.elem_type for name, kind in types.items()}
    feeds: dict[str, NDArray[Any]] = {}
    for name, codes in given.items():
        source = written.codes.get(name) or written.names.get(name)
        if source is None:
            raise InputError(f"{name!r} is no value of the ONNX model {path.name}")
        array = np.asarray(codes) + written.shifts.get(name, 0)
        feeds[f"{source}/given"] = array.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[source]))
        model.graph.input.append(onnx.helper.make_value_info(f"{source}/given", types[source]))
    made: dict[str, Any] = {}
    for node in model.graph.node:
        made |= dict.fromkeys(node.output, node)
        node.input[:] = [f"{name}/given" if f"{name}/given" in feeds else name for name in node.input]
    wanted = {name: code for name, code in written.codes.items() if code in made and not _door(made[code], model)}
    if not apart:
        wanted = {name: code for name, code in wanted.items() if name not in given}
    _restrict(model, list(dict.fromkeys(wanted.values())), kinds)
    inner = path.with_name(f"{path.stem[:100]}.codes.onnx")
    inner.write_bytes(model.SerializeToString())
    needed = {value.name for value in model.graph.input}
    results = infer(inner, {name: codes for name, codes in feeds.items() if name in needed})
    answers = dict(zip((value.name for value in model.graph.output), results, strict=True))
    return {name: answers[code].astype(np.int64) - written.shifts[name] for name, code in wanted.items()}


def _door(node: Any, model: Any) -> bool:
    """Whether a node quantizes an input of the model, clipped or not."""
    doors = {value.name for value in model.graph.input}
    doors |= {clip.output[0] for clip in model.graph.node if clip.op_type == "Clip" and clip.input[0] in doors}
    return node.op_type == "QuantizeLinear" and node.input[0] in doors


def _restrict(model: Any, outputs: list[str], kinds: Mapping[str, int]) -> None:
    """Make ``outputs`` the outputs of an ONNX model, in place, and drop what they do not need."""
    from onnx import helper

    live, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if live.intersection(node.output):
            kept.append(node)
            live.update(node.input)
    inputs = [value for value in model.graph.input if value.name in live]
    for field, items in (("node", kept[::-1]), ("input", inputs), ("output", [])):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(items)
    model.graph.output.extend(helper.make_tensor_value_info(name, kinds[name], None) for name in outputs)


def _form(name: str) -> dict[str, Any]:
    if name not in FORMS:
        raise InputError(f"there is no runtime {name!r} here; there are {', '.join(FORMS)}")
    return FORMS[name]
