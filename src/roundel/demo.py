"""The demo: trains a small residual CNN on scikit-learn's digits and quantizes it in three modes; it downloads nothing.

Three disjoint sets: training, calibration (ranges), scoring (read once per row of the table). One intra-op thread and fixed
seeds, so a run repeats itself exactly on one build of torch; only the latencies differ.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import one_thread
from .evaluate import Evaluation, evaluate
from .files import atomic_write, write_safetensors
from .graph import GraphModule
from .network import capture, fuse
from .qmodel import QModel
from .quantize import quantize
from .report import Report, Row, float_row, layers, row, write_report

__all__ = ["Digits", "DigitsNet", "Outcome", "demo", "digits", "train"]

#: How many digits train and how many of the rest calibrate; the others score.
TRAIN, CALIBRATE = 1000, 100

#: (mode, activation format, weight formats), 8 to 2 bits, uniform and not.
RECIPES: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
    (
        "weight-only",
        None,
        ("int8", "int4", "int4/g32", "nf4/g32", "log4", "cb16/channel", "cb8/channel", "int3", "ternary", "int2"),
    ),
    ("dynamic", "int8:dynamic", ("int8", "int4/g32", "cb16/channel", "int3", "int2")),
    ("static", "int8", ("int8", "int4/g32", "cb16/channel", "int3", "int2")),
)


class DigitsNet(nn.Module):
    """conv-bn-relu three times around one residual add, then a mean over places and a linear layer: 28,842 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, 8, 8) grey levels in 0..1 -> (N, 10) logits."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.max_pool2d(x, 2)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.linear(x.mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """The three disjoint sets; images (N, 1, 8, 8) float32 in 0..1, labels (N,) int64."""

    train: tuple[Tensor, Tensor]
    calibrate: tuple[Tensor, Tensor]
    score: tuple[Tensor, Tensor]


def digits(seed: int = 0) -> Digits:
    """scikit-learn's 1,797 handwritten digits, shuffled by ``seed`` and split."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = [(images[i], labels[i]) for i in order.split([TRAIN, CALIBRATE, len(labels) - TRAIN - CALIBRATE])]
    return Digits(*parts)


def train(
    data: tuple[Tensor, Tensor], *, epochs: int = 24, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> DigitsNet:
    """A trained `DigitsNet` in eval mode; ``progress(done, epochs)`` after each epoch. Images are shifted by up to a pixel."""
    images, labels = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
        steps = epochs * (len(labels) // 50)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        padded = F.pad(images, (1, 1, 1, 1))
        for epoch in range(epochs):
            for picks in torch.randperm(len(labels)).split(50):
                down, right = torch.randint(3, (2,)).tolist()
                loss = F.cross_entropy(model(padded[picks, :, down : down + 8, right : right + 8]), labels[picks])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if progress:
                progress(epoch + 1, epochs)
    return model.eval()


@dataclass(frozen=True)
class Outcome:
    """What the demo made: the measured rows, float first, the recipe it keeps as best, and the files it wrote."""

    rows: tuple[Row, ...]
    best: Row
    seconds: float
    report: Path
    artifact: Path
    state: Path
    calibration: Path
    scoring: Path


def demo(folder: str | os.PathLike[str], *, seed: int = 0, progress: Callable[[str, int, int], None] | None = None) -> Outcome:
    """Train, quantize in every recipe, measure, and write the report, the best artifact and what the next command needs.

    The best is the smallest whose share of changed predictions is at most 1 %, else the one with the lowest KL divergence.
    ``progress(stage, done, total)`` is called as work goes on.
    """
    started, folder = time.monotonic(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda stage, done, total: None)
    with one_thread():
        data = digits(seed)
        model = train(data.train, seed=seed, progress=lambda done, total: tell("training", done, total))
        # Captured once for all recipes; quantize and evaluate would do it again each time.
        network = GraphModule(fuse(capture(model, data.calibrate[0]))).eval()
        results: list[_Result] = []
        total = sum(len(weights) for _, _, weights in RECIPES)
        for mode, activations, formats in RECIPES:
            for weights in formats:
                tell("quantizing", len(results), total)
                results.append(_measure(network, data, mode, activations, weights, seed))
        tell("quantizing", total, total)
        times = _latencies([model, *(result.q.module for result in results)], data.score[0][:1])
    nbytes = sum(t.nbytes for t in model.state_dict().values())
    reference = replace(float_row(results[0].measured), nbytes=nbytes, latency=times[0])
    results = [replace(result, row=replace(result.row, latency=median)) for result, median in zip(results, times[1:], strict=True)]
    rows = tuple(result.row for result in results)
    best = min(results, key=lambda r: (r.row.nbytes,) if _faithful(r.row) else (float("inf"), r.row.kl))
    found = len(data.score[1])
    page = Report(
        title="Handwritten digits: what each format costs",
        summary=f"A residual CNN of {sum(p.numel() for p in model.parameters()):,} parameters, trained on {TRAIN:,} digits, "
        f"its ranges calibrated on {CALIBRATE} others, measured on the remaining {found}. Latency: one intra-op thread.",
        rows=(reference, *rows),
        layers=layers(best.q, best.measured),
        layers_of=f"{best.row.name}, {best.row.series}",
        notes=tuple((note.subject, note.text) for note in best.q.notes),
        provenance=best.q.provenance,
        metric_name="top1",
    )
    write_report(folder / "report.html", page)
    best.q.save(folder / "digits-small.safetensors")
    write_safetensors(folder / "digits-float.safetensors", dict(model.state_dict()), {})
    for name, (images, labels) in (("calibrate", data.calibrate), ("score", data.score)):
        buffer = io.BytesIO()
        np.savez(buffer, x=images.numpy(), y=labels.numpy())
        atomic_write(folder / f"digits-{name}.npz", [buffer.getvalue()])
    files = (folder / name for name in (
        "report.html", "digits-small.safetensors", "digits-float.safetensors", "digits-calibrate.npz", "digits-score.npz"
    ))  # fmt: skip
    return Outcome((reference, *rows), best.row, time.monotonic() - started, *files)


@dataclass(frozen=True)
class _Result:
    row: Row
    q: QModel
    measured: Evaluation


def _measure(model: nn.Module, data: Digits, mode: str, activations: str | None, weights: str, seed: int) -> _Result:
    q = quantize(model, weights, activations, data=[data.calibrate], seed=seed)
    measured = evaluate(q, against=model, data=[data.score], metric="top1", latency=False)
    return _Result(row(weights, measured, series=mode, bits=q.bits), q, measured)


def _latencies(models: Sequence[nn.Module], sample: Tensor, rounds: int = 40) -> list[float]:
    """Median seconds per forward of each model, all of them in turn in every round, so that a busy moment disturbs all alike."""
    spent: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for turn in range(rounds + 3):
            for model, times in zip(models, spent, strict=True):
                started = time.perf_counter()
                model(sample)
                if turn >= 3:
                    times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in spent]


def _faithful(measured: Row) -> bool:
    return measured.flips is not None and measured.flips <= 0.01


def activations_of(mode: str) -> str | None:
    """The activation format that a row's mode stands for."""
    return next(activations for name, activations, _ in RECIPES if name == mode)
