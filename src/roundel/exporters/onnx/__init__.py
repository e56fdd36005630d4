"""The ONNX exporter: a quantized graph with QuantizeLinear and DequantizeLinear, or with QLinear operators; checked.

`network` decides what stands for what, `operators` and `qlinear` write the operations, `weights` the packed tensors, `model` the
file. Codebooks and activations whose parameters vary by token are not here: ONNX has no form of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import CheckError, InputError, PlanError
from ...files import AnyPath
from ...graph import Graph
from ...integer.ops import numbers
from ...qmodel import Note, QModel
from .network import Network
from .qlinear import REDUCED
from .weights import by_output

Style = Literal["qdq", "qoperator"]

#: Blocked DequantizeLinear, int4 and int16 came with 21; onnxruntime 1.20 and later run it.
OPSETS = range(21, 26)


@dataclass(frozen=True)
class Written:
    """What `write` made: ``files`` (the model last), ``notes``, and for values of the real graph: ``names`` in the file as real
    numbers, ``codes``, their names as codes, and ``shifts``, file code - own code (128 or -128 where the sign changed, else 0)."""

    files: tuple[Path, ...]
    notes: tuple[Note, ...]
    names: Mapping[str, str]
    codes: Mapping[str, str]
    shifts: Mapping[str, int]


def write(
    q: QModel,
    graph: Graph | None,
    path: AnyPath,
    *,
    style: Style = "qdq",
    signed: bool = True,
    opset: int = 21,
    external: bool | None = None,
    float_for_unsupported: bool = False,
) -> Written:
    """Write ``q`` as an ONNX model, checked, re-read and, where onnxruntime is installed, run before the file appears.

    ``graph`` is the integer graph of ``q``, if there is one: its weights and biases must then be those written. ``style`` is
    ``"qdq"`` (float operators between QuantizeLinear and DequantizeLinear) or ``"qoperator"`` (QLinearConv and onnxruntime's own
    QLinear operators, float ones where there are none). ``signed`` activations are int8; unsigned ones (uint8, codes moved by 128)
    need weights of 7 bits, because x86 without VNNI saturates sums of two full products. Tensors lie in ``path``.HASH.data when
    ``external``, None meaning above 1 GiB. Weights that ONNX lacks are refused, or written dequantized with
    ``float_for_unsupported``, and noted.

    Raises `PlanError` with every node that ONNX cannot express, `CheckError` where the file made fails a check; it leaves no file
    then, and an old one as it was.
    """
    if importlib.util.find_spec("onnx") is None:
        raise InputError("writing ONNX needs the package onnx: pip install -e '.[onnx]' in Roundel's folder")
    if style not in ("qdq", "qoperator"):
        raise PlanError(f"there is no ONNX style {style!r}; there are qdq and qoperator")
    if opset not in OPSETS:
        raise PlanError(f"opset {opset} cannot be written; there are {OPSETS.start} to {OPSETS.stop - 1}")
    if not signed:
        _refuse_wide(q)
    made = Network.of(q, opset, style, signed, float_for_unsupported)
    if graph is not None:
        _compare(made, graph)
    files = made.model.save(path, external, _metadata(), partial(_run, made))
    if style == "qdq" and signed and made.codes:
        made.note("onnxruntime", "off ARM it needs the session entry session.qdqisint8allowed=1: see docs/onnx.md")
    renamed = [Note(was, f"named {now!r} in the file") for now, was in made.model.renamed.items() if was in made.names]
    notes = (*made.notes, *renamed)
    reals = {name: real for name, real in made.reals.items() if name in made.graph.values}
    codes = {name: code for name, code in made.codes.items() if name in made.graph.values}
    return Written(tuple(files), notes, reals, codes, {name: made.sites[name].shift for name in codes})


def _metadata() -> dict[str, str]:
    from ... import __version__

    return {"roundel.version": __version__}


def _refuse_wide(q: QModel) -> None:
    """uint8 activations need weights within 7 bits."""
    wide = []
    for name, tensor in q.tensors.items():
        codes = tensor.unpack() if tensor.format.bits <= 8 else torch.zeros(1)
        if codes.numel() and max(-int(codes.min()), int(codes.max())) > REDUCED:
            wide.append(f"{name} ({tensor.format})")
    if wide and any(a.when == "static" for a in q.activations.values()):
        raise PlanError(
            f"unsigned activations need weights of at most {REDUCED}, since x86 without VNNI saturates sums of two full products: "
            f"quantize with weights='int7', or export with signed=True. Beyond that are {len(wide)}:\n  " + ", ".join(wide)
        )


def _compare(made: Network, graph: Graph) -> None:
    """`CheckError` where a weight or bias in the file is not the one of the integer graph."""
    layers = {node.name: node for node in made.graph}
    for node in graph:
        if node.op not in ("conv", "linear") or len(node.inputs) < 3:
            continue
        source = layers.get(node.name)
        if source is None or source.inputs[1] not in made.q.tensors or not by_output(made.q.tensors[source.inputs[1]]):
            continue
        found = made.bias(source) if len(source.inputs) > 2 and source.inputs[2] else None
        if found is not None and not np.array_equal(found[0], numbers(graph, node.inputs[2])):
            raise CheckError(f"the bias of {node.name!r} is not that of the integer graph; was it lowered from this model?")
        kept = made.q.tensors[source.inputs[1]].unpack().numpy()
        if not np.array_equal(numbers(graph, node.inputs[1]).reshape(kept.shape), kept):
            raise CheckError(f"the weight of {node.name!r} is not that of the integer graph; was it lowered from this model?")


# -- running what was written -----------------------------------------------------------------------------------------


def _run(made: Network, path: Path) -> None:
    """`CheckError` unless onnxruntime, where it is installed, takes the file and answers a sample in the right shape."""
    if importlib.util.find_spec("onnxruntime") is None:
        made.note(path.name, "not run: onnxruntime is not installed here")
        return
    samples = [_sample(kind, shape) for _, kind, shape in made.model.inputs]
    try:
        answers = infer(path, {name: x for (name, _, _), x in zip(made.model.inputs, samples, strict=True)})
    except CheckError as err:
        raise CheckError(f"{err}; the file was removed") from err
    for i, ((name, _, shape), answer) in enumerate(zip(made.model.outputs, answers, strict=True)):
        sizes = [answer.shape[i] if isinstance(n, str) else n for i, n in enumerate(shape or answer.shape)]
        if list(answer.shape) != sizes:
            raise CheckError(f"onnxruntime gives output {name!r} the shape {list(answer.shape)}, not {shape}; the file was removed")
        if answer.dtype.kind == "f" and not np.isfinite(answer).all() and _finite(made, samples, i):
            raise CheckError(f"onnxruntime gives output {name!r} numbers that are not finite; the file was removed")


def _finite(made: Network, samples: list[NDArray[Any]], i: int) -> bool:
    """Whether output ``i`` of the quantized module itself is finite on a sample."""
    with torch.no_grad():
        out = made.q.module(*map(torch.from_numpy, samples))
    return bool((out[i] if isinstance(out, tuple) else out).isfinite().all())


#: Session entries under which onnxruntime computes what the file says. By default, off ARM, it turns int8 activations between
#: QuantizeLinear and DequantizeLinear into uint8 or floats, and rounds the float inputs of packed matrices to 8 bits.
ENTRIES = {"session.qdqisint8allowed": "1", "session.qdq_matmulnbits_accuracy_level": "1"}


def infer(path: Path, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Outputs of an ONNX file by onnxruntime, on one thread of the processor, under `ENTRIES`; `CheckError` where it refuses."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in ENTRIES.items():
        settings.add_session_config_entry(name, value)
    try:
        made = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        return list(made.run(None, dict(feeds)))
    except _refusals() as err:
        raise CheckError(f"onnxruntime does not run the ONNX model: {err}") from err


def _refusals() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a model that it does not take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return tuple(getattr(state, name) for name in names)


def _sample(kind: str, shape: tuple[int | str, ...]) -> NDArray[Any]:
    """Two examples: normal numbers, zeros where integers are asked for, True for truth values (a mask that hides nothing)."""
    from onnx import TensorProto, helper

    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    sizes = [2 if isinstance(n, str) else n for n in shape]
    if dtype.kind == "f":
        return np.random.default_rng(0).standard_normal(sizes).astype(dtype)
    return np.full(sizes, dtype.kind == "b", dtype)
