"""What a peer is given and what it gives back; imported in the peer's own environment, so numpy and the standard library only.

A peer is one file of `peers/` with a function ``quantize(task) -> Quantized``. It scores nothing: it answers with outputs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Ids = NDArray[np.int64]


class Refused(Exception):
    """The toolkit has no such thing; the text says what is missing, and becomes the row's reason."""


@dataclass(frozen=True)
class Task:
    """One run: ``suite`` holds the model and its data, ``setting`` is one of the peer's, ``weights`` and ``activations`` are
    bits, ``seed`` names the calibration draw and seeds what is drawn at random; files may be written to ``scratch`` only.
    ``minutes`` is how long a setting that trains may do so, in CPU time. A suite of texts gives ``size`` in place of both widths:
    bits per number of the linear layers, every byte of them counted."""

    suite: Path
    setting: str
    weights: int
    activations: int
    seed: int
    scratch: Path
    minutes: float = 5.0
    size: float = 0.0

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

    @property
    def folder(self) -> Path:
        """The float language model, as transformers loads it; embeddings and head are to stay float."""
        return self.suite / "model"

    def documents(self) -> list[Ids]:
        """The calibration documents of this draw, token ids (tokens,) each, in its order."""
        return read_documents(self.suite / f"calibrate-{self.seed}.npz")

    def chunks(self, length: int) -> Ids:
        """The calibration documents joined and cut, (n, length); what is left over at the end is dropped."""
        ids = np.concatenate(self.documents())
        return ids[: len(ids) // length * length].reshape(-1, length)

    def questions(self) -> Sequence[Array | Ids]:
        """What is to be answered, one call of ``Quantized.run`` each: images a hundred at a time, or one document."""
        if (self.suite / "score.npz").exists():
            return read_documents(self.suite / "score.npz")
        x = self.score()
        return [x[i : i + 100] for i in range(0, len(x), 100)]


@dataclass(frozen=True)
class Quantized:
    """``run`` maps a batch of images to outputs (n, classes), or the ids of a document (tokens,) to logits (tokens, vocabulary);
    ``weights`` and ``activations`` count what was quantized, by bits; ``note`` says what the counts do not. Of a language model
    ``size`` is the true bits per number of its linear layers, and ``backprop`` whether gradients went through the whole of it."""

    run: Callable[[Any], Array]
    weights: Mapping[int, int] = field(default_factory=dict)
    activations: Mapping[int, int] = field(default_factory=dict)
    note: str = ""
    size: float | None = None
    backprop: bool = False


def write_documents(path: Path, documents: Sequence[Ids]) -> None:
    """Token ids of unequal lengths, in one file."""
    np.savez(path, ids=np.concatenate(documents), sizes=[len(d) for d in documents])


def read_documents(path: Path) -> list[Ids]:
    with np.load(path) as held:
        return np.split(held["ids"], np.cumsum(held["sizes"])[:-1])


#: A size is met by what is this little above it: a zero point more per row should not cost a toolkit its place.
SLACK = 0.02

Shape = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """Codes of ``bits``, groups of about ``group`` columns (0: the whole row) with a scale and a zero point of so many bits.

    Groups are whole, of the divisor of the row that is nearest to ``group``; or rows are ``padded`` to groups of just that.

    >>> Grid(4, 32).size([(64, 64)]), round(Grid(4, 0, zero=4).size([(64, 64), (64, 172)]), 4)
    (4.5, 4.1695)
    """

    bits: int
    group: int
    scale: int = 16
    zero: int = 0
    padded: bool = False

    def columns(self, columns: int) -> int:
        """Columns of a group in a row of ``columns``.

        >>> Grid(4, 32).columns(172), Grid(4, 32).columns(64), Grid(4, 0).columns(172)
        (43, 32, 172)
        """
        wanted = self.group or columns
        if self.padded:
            return wanted
        return min((n for n in range(1, columns + 1) if columns % n == 0), key=lambda n: max(n / wanted, wanted / n))

    def size(self, shapes: Iterable[Shape]) -> float:
        """Bits per number over weights of these shapes (outputs, inputs)."""
        whole = total = 0
        for rows, columns in shapes:
            whole += rows * columns
            group = self.columns(columns)
            total += rows * -(-columns // group) * (group * self.bits + self.scale + self.zero)
        return total / whole


def fitting(shapes: Sequence[Shape], size: float, groups: Iterable[int] = (16, 32, 43, 64, 86, 128, 256, 0), scale: int = 16,
            zero: int = 0, padded: bool = False) -> Grid:  # fmt: skip
    """The grid within ``size`` bits whose groups are smallest; zero points have as many bits as codes where ``zero`` is -1.

    Raises `Refused` where none fits.

    >>> fitting([(64, 64)], 4.5), fitting([(64, 64)], 4.4).group, fitting([(64, 64)], 3.5, zero=-1).group
    (Grid(bits=4, group=32, scale=16, zero=0, padded=False), 64, 64)
    """
    bits = int(size)
    for group in groups:
        grid = Grid(bits, group, scale, bits if zero == -1 else zero, padded)
        if grid.size(shapes) <= size + SLACK:
            return grid
    raise Refused(f"no groups of {bits} bits fit within {size:g} bits")


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
