"""LiteRT (TensorFlow Lite) on this machine's processor, by each of its three sets of kernels: reference, ruy's and XNNPACK's."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckError, InputError, PlanError
from ..exporters.tflite import write
from ..graph import Graph
from ..integer.dialect import Ints
from ..integer.ops import INTEGER
from ..qmodel import QModel
from ..readers._tflite_file import read_file
from ._tflite import from_file, inputs_of, to_file

NAME = "litert"

_SUMS = ("conv", "conv_transpose", "linear", "sum", "sum_pool")

#: Name -> (the resolver that has these kernels, whether values inside can be seen, roundings other than R1). XNNPACK computes whole
#: stretches of a graph out of sight. What the roundings do not tell: ruy's depthwise kernels take channels by eights and leave the
#: rest, and grouped convolutions, to R1; XNNPACK adds with 20-bit factors, rescales (QUANTIZE, RELU) with 8-bit ones and has a
#: softmax of its own; linear layers of int16 keep 31 bits of the multiplier in all three. Each is a unit off at most.
KERNELS: dict[str, tuple[str, bool, dict[str, str]]] = {
    "litert": ("BUILTIN", False, {**dict.fromkeys(_SUMS, "R4"), "mul": "R4", "add": "R2", "sub": "R2"}),
    "litert-builtin": ("BUILTIN_WITHOUT_DEFAULT_DELEGATES", True, {**dict.fromkeys(_SUMS, "R3"), "conv_transpose": "R1"}),
    "litert-ref": ("BUILTIN_REF", True, {"linear": "R2a"}),
}


def absent(name: str = NAME) -> str | None:
    """Why this runtime cannot run here, or None."""
    return None if find_spec("ai_edge_litert") else "LiteRT needs the extra `edge`: pip install -e '.[edge]' in Roundel's folder"


def dialects(name: str = NAME) -> Mapping[str, str]:
    """The rounding of a set of kernels on x86, per integer operation."""
    return {**dict.fromkeys(INTEGER, "R1"), **_kernels(name)[2]}


def run(q: QModel, graph: Graph, codes: Mapping[str, Ints], folder: Path, name: str = NAME) -> dict[str, Ints]:
    """Export ``graph`` into ``folder`` and run it: value name -> codes (N, ...) in PyTorch's layout. The whole batch goes at once,
    but where an operator holds the size of its result.

    Raises `PlanError` for what cannot be exported or a set of kernels that is not, `CheckError` where LiteRT refuses the file.
    """
    if why := absent():
        raise InputError(why)
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver, visible, _ = _kernels(name)
    written = write(q, graph, folder / "model.tflite")
    given = inputs_of(graph, codes)
    ready = {port: to_file(batch, written.inputs[port], dtype) for port, (batch, dtype) in given.items()}
    count = len(next(iter(ready.values())))
    batched = all(op.op != "TRANSPOSE_CONV" for op in read_file(written.path).operators)
    shown = written.places if visible else written.outputs
    seen: dict[str, list[Ints]] = {value: [] for value in shown}
    try:
        interpreter: Any = Interpreter(
            str(written.path),
            experimental_op_resolver_type=OpResolverType[resolver],
            experimental_preserve_all_tensors=visible,
            num_threads=1,
        )
        size = count if batched else min(count, 1)
        for port, batch in ready.items():
            interpreter.resize_tensor_input(written.inputs[port].tensor, [size, *batch.shape[1:]])
        interpreter.allocate_tensors()
        for first in range(0, count, max(size, 1)):
            for port, batch in ready.items():
                interpreter.set_tensor(written.inputs[port].tensor, batch[first : first + size])
            interpreter.invoke()
            for value, place in shown.items():
                seen[value].append(from_file(np.asarray(interpreter.get_tensor(place.tensor)), place))
    except (RuntimeError, ValueError) as err:
        raise CheckError(f"LiteRT refuses the exported file: {err}") from err
    return {value: np.concatenate(parts) for value, parts in seen.items()}


def _kernels(name: str) -> tuple[str, bool, dict[str, str]]:
    if name not in KERNELS:
        raise PlanError(f"LiteRT has no kernels {name!r} here; there are {', '.join(KERNELS)}")
    return KERNELS[name]
