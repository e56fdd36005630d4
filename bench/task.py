"""What a peer is given and what it gives back; imported in the peer's own environment, so numpy and the standard library only.

A peer is one file of `peers/` with a function ``quantize(task) -> Quantized``. It scores nothing: it answers with outputs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Refused(Exception):
    """The toolkit has no such thing; the text says what is missing, and becomes the row's reason."""


@dataclass(frozen=True)
class Task:
    """One run: ``suite`` holds the model and the images, ``setting`` is one of the peer's, ``weights`` and ``activations`` are
    bits, ``seed`` names the calibration draw and seeds what is drawn at random; files may be written to ``scratch`` only.
    ``minutes`` is how long a setting that trains may do so, in CPU time."""

    suite: Path
    setting: str
    weights: int
    activations: int
    seed: int
    scratch: Path
    minutes: float = 5.0

    @property
    def onnx(self) -> Path:
        """The float model with a free batch size; its input is ``x``, its output ``y``."""
        return self.suite / "model.onnx"

    def model(self) -> Any:
        """The float model as a torch.fx.GraphModule of plain torch modules, in evaluation mode."""
        import torch

        return torch.load(self.suite / "model.pt", weights_only=False).eval()

    def calibrate(self) -> Array:
        """The calibration images of this draw, (n, ...), in its order."""
        found: Array = np.load(self.suite / f"calibrate-{self.seed}.npy")
        return found

    def batches(self, size: int) -> Iterator[Array]:
        """The calibration images in batches of ``size``; a short last one too."""
        x = self.calibrate()
        return (x[i : i + size] for i in range(0, len(x), size))

    def even(self, most: int) -> int:
        """The largest batch size up to ``most`` that leaves no short last batch, which some toolkits cannot take."""
        count = len(self.calibrate())
        return next(size for size in range(most, 0, -1) if count % size == 0)

    def score(self) -> Array:
        """The images to answer, (n, ...)."""
        found: Array = np.load(self.suite / "score.npy")
        return found


@dataclass(frozen=True)
class Quantized:
    """``run`` maps a batch of images to outputs (n, classes); ``weights`` and ``activations`` count what was quantized, by bits;
    ``note`` says what the counts do not."""

    run: Callable[[Array], Array]
    weights: Mapping[int, int] = field(default_factory=dict)
    activations: Mapping[int, int] = field(default_factory=dict)
    note: str = ""


def torch_runner(module: Any) -> Callable[[Array], Array]:
    """``module`` as a function of arrays."""
    import torch

    def run(x: Array) -> Array:
        with torch.no_grad():
            y = module(torch.from_numpy(x))
        return np.asarray(getattr(y, "value", y))

    return run


def onnx_runner(path: Path | bytes) -> Callable[[Array], Array]:
    """An ONNX model under onnxruntime on one thread, node by node: fused integer kernels saturate on CPUs without VNNI."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = path if isinstance(path, bytes) else str(path)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


def onnx_sites(model: Any) -> tuple[Counter[int], Counter[int]]:
    """Weights and activations with a QuantizeLinear or DequantizeLinear in an ONNX model, by the bits of their codes.

    A weight may be stored as codes or as numbers that are quantized on the way; a bias (1-D, 32 bits) is not counted.
    """
    import onnx

    bits = {"INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16, "INT2": 2, "UINT2": 2}
    stored = {t.name: t for t in model.graph.initializer}
    weights, activations = Counter[int](), Counter[int]()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        source, zero = node.input[0], node.input[2] if len(node.input) > 2 else ""
        if source in stored:
            kind = stored[source if node.op_type == "DequantizeLinear" else zero].data_type
            if len(stored[source].dims) > 1:
                weights[bits[onnx.TensorProto.DataType.Name(kind)]] += 1
        elif node.op_type == "QuantizeLinear":
            activations[bits[onnx.TensorProto.DataType.Name(stored[zero].data_type)]] += 1
    return weights, activations


def bits_of(text: str) -> tuple[int, int]:
    """Bits of weights and activations.

    >>> bits_of("W4A8")
    (4, 8)
    """
    found = re.fullmatch(r"W(\d+)A(\d+)", text)
    if found is None:
        raise ValueError(f"{text!r}: bits are written as in W4A8")
    return int(found[1]), int(found[2])
