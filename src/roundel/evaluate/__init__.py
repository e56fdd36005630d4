"""`evaluate`: what a quantized model costs against the float one, and `diff`; it judges no figure and draws nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibrate import run
from ..data import Batch, batches
from ..errors import InputError, PlanError
from ..network.running import Course, reset, trackers
from ..network.walk import state
from ..qmodel import QModel
from .artifacts import Difference, diff
from .inputs import Inputs
from .scores import METRICS, Metric, Scores, near_chance, plain, predictions
from .sites import Sites, live

__all__ = ["Difference", "Evaluation", "Latency", "check_metric", "diff", "evaluate", "near_chance", "predictions"]


@dataclass(frozen=True)
class Latency:
    """Seconds per forward of one sample, over ``pairs`` runs in turn with the other model, after warming up."""

    median: float
    p99: float
    pairs: int


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. A figure that has no meaning for the model or could not be measured is None.

    * ``kl``, ``kl_p99``: mean and 99th percentile of KL(float || quantized) in nats, per sample for class outputs (N, C), per
      token for (N, T, V); ``kl_interval``: 95 % bootstrap interval of the mean, over documents (rows) for tokens.
    * ``flips``: share of those samples or tokens whose most likely class changed.
    * ``metric``, ``metric_float``: the task metric ``metric_name`` of either model. top1: share right. perplexity: exp of the
      mean next-token loss. cosine: between the two models' outputs, mean-pooled over tokens, so 1.0 for the float model. mse:
      against a real-valued target where there is one, else against the float outputs.
    * ``difference``: metric - metric_float, for perplexity the relative one, metric / metric_float - 1; ``interval``: its
      paired 95 % interval (normal approximation over samples, over documents for perplexity).
    * ``sqnr``: 10 log10(signal / noise energy) of the outputs in dB, inf when equal; ``layers``: the same at every site that
      both models have, a layer under its own name, in running order; ``sites_skipped``: how many only one of them has.
    * ``nbytes``, ``nbytes_float``: bytes of all parameters and buffers; ``disk``: bytes of the file it was loaded from.
    * ``latency``, ``latency_float``: `Latency`.
    * ``peak_memory``: highest resident set of this process, the float model's part included, during a quantized forward of the
      first batch, in bytes (Linux only).
    * ``ranges``: what the running ranges did, site by site.
    * ``samples``: rows scored; ``notes``: what a reader of the figures should know.

    >>> measured = Evaluation(kl=0.002, sqnr=float("inf"), layers={"fc": 31.5}, samples=100)
    >>> measured.kl, measured.to_dict()["layers"], measured.to_dict()["sqnr"]
    (0.002, {'fc': 31.5}, None)
    """

    kl: float | None = None
    kl_p99: float | None = None
    kl_interval: tuple[float, float] | None = None
    flips: float | None = None
    metric: float | None = None
    metric_float: float | None = None
    metric_name: str = ""
    difference: float | None = None
    interval: tuple[float, float] | None = None
    sqnr: float | None = None
    layers: Mapping[str, float] = field(default_factory=dict)
    sites_skipped: int = 0
    nbytes: int = 0
    nbytes_float: int = 0
    disk: int | None = None
    latency: Latency | None = None
    latency_float: Latency | None = None
    peak_memory: int | None = None
    ranges: Mapping[str, Course] = field(default_factory=dict)
    samples: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, keys equal to the attributes; a number that is not finite, which JSON cannot say, is None."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def evaluate(
    q: QModel | nn.Module,
    *,
    against: QModel | nn.Module,
    data: Any,
    metric: str | Metric | None = None,
    latency: bool = True,
    layers: bool = True,
    seed: int = 0,
) -> Evaluation:
    """Run ``q`` and ``against`` on the same ``data``, whatever `roundel.data.batches` takes, and compare them.

    ``metric`` is top1, perplexity, cosine, mse or ``fn(outputs, target)`` -> one score per sample. Without one: top1 where there
    is a label per sample; perplexity where ids go in and logits (N, T, V) come out, the targets being the ids shifted, or a
    target (N, T) shifted with -100 left out; mse where targets are real numbers; else cosine. Outputs are a tensor, or the
    ``logits``, ``last_hidden_state`` or first tensor of what the model returns; tokens that ``attention_mask`` hides do not
    count. Running ranges start as in the file, and notes say how they moved. Outputs that are probabilities are used as such.
    ``layers`` and ``latency`` switch the slow parts off; ``seed`` is the bootstrap's. Both models run in evaluation mode and are
    left as they were.

    Raises `InputError` for data that is empty or does not fit the models, and for outputs that are not finite (with the batch);
    `PlanError` for a metric that does not exist or does not apply.

    >>> import torch
    >>> net, x = torch.nn.Sequential(torch.nn.Linear(8, 3)), torch.randn(16, 8)
    >>> measured = evaluate(net, against=net, data=[(x, net(x).argmax(1))], latency=False)
    >>> measured.kl, measured.flips, measured.metric_name, measured.metric, measured.interval
    (0.0, 0.0, 'top1', 1.0, (0.0, 0.0))
    """
    _known(metric)
    now, before = live(q), live(against)
    scores: Scores | None = None
    inputs = Inputs(q)
    sites, peak, sample = None, None, None
    with _resting(now, before):
        for number, batch in enumerate(batches(data)):
            if scores is None:
                reset(now, before)  # each begins as its file has it
                sample = _first(batch)
                sites = Sites.between(q, against, batch) if layers else None
                peak = _peak_memory(lambda batch=batch: run(now, batch))  # type: ignore[misc]
                reset(now)
                for part in trackers(now).values():
                    part.trace = []
            real, quantized = sites.run(before, now, batch) if sites else (run(before, batch), run(now, batch))
            if scores is None:
                scores = Scores.like(batch, real, metric)
            scores.take(number, batch, real, quantized)
            inputs.take(batch)
        if scores is None or sample is None:
            raise InputError("the data holds no batches; give at least one")
        moved = tuple(f"{name}: {told}" for name, part in trackers(now).items() if (told := part.told()) is not None)
        ranges = {name: part.course() for name, part in trackers(now).items()}
        times = _latency(before, now, sample) if latency else (None, None)
    noted = (*inputs.notes(), *scores.notes(), *(sites.notes() if sites else ()), *moved)
    path = getattr(q, "path", None)
    return Evaluation(
        **scores.figures(seed),
        layers=sites.sqnr() if sites else {},
        sites_skipped=sites.skipped() if sites else 0,
        nbytes=_nbytes(q),
        nbytes_float=_nbytes(against),
        disk=Path(path).stat().st_size if path is not None and Path(path).is_file() else None,
        latency_float=times[0],
        latency=times[1],
        peak_memory=peak,
        ranges=ranges,
        notes=noted,
    )


def check_metric(metric: str | Metric | None, model: nn.Module, data: Any) -> str | Metric:
    """The metric that `evaluate` would take, from one forward of ``model`` on the first batch: so that a long run does not end in
    an error. Raises `PlanError` for one that does not exist or does not apply."""
    _known(metric)
    batch = next(iter(batches(data)))
    with _resting(model):
        return Scores.like(batch, run(model, batch), metric).metric


def _known(metric: str | Metric | None) -> None:
    if isinstance(metric, str) and metric not in METRICS:
        raise PlanError(
            f"there is no metric {metric!r}; there are {', '.join(METRICS)}, or pass fn(outputs, target) -> per-sample scores"
        )


# -- running ----------------------------------------------------------------------------------------------------------


@contextmanager
def _resting(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own mode back."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    ranges = [(part, {name: t.clone() for name, t in part.state_dict().items()}) for m in modules for part in trackers(m).values()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training
        for tracker, held in ranges:
            tracker.load_state_dict(held)
            tracker.trace = None


def _first(batch: Batch) -> Batch:
    """The first sample of a batch, as a batch of one."""
    n = len(batch)
    cut = {name: x[:1] if x.ndim and x.shape[0] == n else x for name, x in batch.named.items()}
    return Batch(tuple(x[:1] if x.ndim and x.shape[0] == n else x for x in batch.args), cut)


def _latency(real: nn.Module, quantized: nn.Module, sample: Batch) -> tuple[Latency, Latency]:
    """In turn, so that what disturbs the machine disturbs both: 20 pairs and 2 s at least, 10 s at most from 3 pairs on."""
    cuda = any(x.is_cuda for x in (*sample.args, *sample.named.values()))

    def once(module: nn.Module) -> float:
        start = time.perf_counter()
        run(module, sample)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        once(real), once(quantized)
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(pairs) < 3 or ((spent := time.perf_counter() - start) < 10 and (len(pairs) < 20 or spent < 2)):
        pairs.append((once(real), once(quantized)))
    median, p99 = np.percentile(np.array(pairs), [50, 99], axis=0)
    return Latency(float(median[0]), float(p99[0]), len(pairs)), Latency(float(median[1]), float(p99[1]), len(pairs))


def _peak_memory(work: Callable[[], object]) -> int | None:
    """High-water mark of the resident set while ``work`` runs, in bytes; None where the kernel does not tell (proc(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    except OSError:
        return None
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _nbytes(model: QModel | nn.Module) -> int:
    if isinstance(model, QModel):
        return model.nbytes
    return sum(t.nbytes for t in state(model).values())
