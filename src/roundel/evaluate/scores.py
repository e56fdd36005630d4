"""Outputs of two models compared batch by batch: divergence, flips, task metrics and their intervals; it runs no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from ..data import Batch
from ..errors import InputError, PlanError
from ..network.watch import first_tensor

Array = NDArray[np.float64]
#: ``fn(outputs, target)`` -> one score per sample; ``outputs`` is what the model returned, ``target`` is None without labels.
Metric = Callable[[Any, Tensor | None], Any]
METRICS = ("top1", "perplexity", "cosine", "mse")

#: Numbers compared at a time in float64.
CHUNK = 1 << 22

#: An int8 softmax cannot say less than 1/256; half of that is what its zero stands for, on both sides of a divergence.
FLOOR = 1 / 512


def predictions(output: Any) -> Tensor:
    """The tensor that a model's output is about: itself, ``logits``, ``last_hidden_state``, or the first tensor in it."""
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found.detach()
    if (found := first_tensor(output)) is None:
        raise InputError(f"the model returned a {type(output).__name__} without a tensor in it")
    return found.detach()


def near_chance(score: float, classes: int, n: int) -> bool:
    """Whether a share ``score`` right of ``n`` is what guessing among ``classes`` would give (one-sided exact test at 1 %).

    False where ``n`` is too small for even a perfect score to tell.
    """
    if classes < 2 or n < 1:
        return False
    tail = special.bdtrc([round(score * n) - 1, n - 1], n, 1 / classes)  # P(at least so many right), P(all right)
    return bool(tail[0] > 0.01 >= tail[1])


def _poor(score: float, classes: int, n: int) -> bool:
    """Whether a share right is so little above guessing (Cohen's kappa below 0.15) that a trained model is hardly behind it."""
    return classes > 1 and n >= 20 and (score - 1 / classes) / (1 - 1 / classes) < 0.15


class Scores:
    """Output against output, batch by batch: what is kept is a few numbers per row and one per token."""

    def __init__(self, kind: Literal["classes", "tokens", "values"], probabilities: bool, metric: str | Metric) -> None:
        self.kind, self.probabilities, self.metric = kind, probabilities, metric
        self.signal = self.noise = 0.0
        self.positions = self.flipped = self.floored = self.rows = self.classes = 0
        self.kl: list[Tensor] = []  # per position
        self.kl_rows: list[Tensor] = []  # per row: sum over its positions
        self.sizes: list[Tensor] = []  # per row: positions
        self.metrics: list[Tensor] = []  # per row: float score, quantized score, weight

    @classmethod
    def like(cls, batch: Batch, output: Any, metric: str | Metric | None) -> Scores:
        """Decides from the first batch what the outputs are and which metric applies."""
        out, ids, target = predictions(output), _ids(batch), batch.target
        logits = isinstance(getattr(output, "logits", None), Tensor)
        pooled = not logits and isinstance(getattr(output, "last_hidden_state", None), Tensor)
        kind: Literal["classes", "tokens", "values"] = "values"
        if metric not in ("cosine", "mse") and not pooled and not _real_target(out, target) and out.is_floating_point():
            if out.ndim == 2 and out.shape[1] > 1:
                kind = "classes"
            elif out.ndim == 3 and (logits or (ids is not None and ids.shape == out.shape[:2] and int(ids.max()) < out.shape[2])):
                kind = "tokens"
        if metric is None:
            labelled = kind == "classes" and target is not None and target.ndim == 1 and not target.is_floating_point()
            metric = "top1" if labelled else "perplexity" if kind == "tokens" and ids is not None else "cosine"
            metric = "mse" if _real_target(out, target) else metric
        wants = {"top1": "classes", "perplexity": "tokens"}.get(metric if isinstance(metric, str) else "", kind)
        if kind != wants:
            what = "(N, classes)" if wants == "classes" else "(N, T, vocabulary) from ids"
            fits = {"classes": "top1, ", "tokens": "perplexity, "}.get(kind, "")
            raise PlanError(f"metric {metric!r} needs outputs {what}; the model gives {list(out.shape)}: use {fits}cosine or mse")
        probable = kind != "values" and bool((out >= 0).all()) and bool(((out.double().sum(-1) - 1).abs() < 1e-3).all())
        return cls(kind, probable, metric)

    def take(self, number: int, batch: Batch, real: Any, quantized: Any) -> None:
        """One batch; raises `InputError` where it and the two outputs do not fit each other."""
        a, b = predictions(real).cpu(), predictions(quantized).cpu()
        if a.shape != b.shape or not a.ndim:
            raise InputError(f"batch {number}: the float model gives shape {list(a.shape)}, the quantized one {list(b.shape)}")
        mask = _mask(batch, a)
        if mask is not None or self.kind == "tokens":
            counted = mask if mask is not None else torch.ones(a.shape[:2], dtype=torch.bool)
            x, y, rows = a[counted], b[counted], counted.nonzero()[:, 0]
        else:
            x, y, rows = a.reshape(len(a), -1), b.reshape(len(b), -1), torch.arange(len(a))
        for name, part in (("float", x), ("quantized", y)):
            if part.is_floating_point() and (bad := int((~part.isfinite()).sum())):
                raise InputError(f"batch {number}: {bad} of {part.numel()} outputs of the {name} model are not finite")
        pieces = list(zip(x.split(_rows(x)), y.split(_rows(x)), strict=True))
        for i, j in pieces:
            self.signal += float(i.double().square().sum())
            self.noise += float((i.double() - j.double()).square().sum())
        self.rows += len(a)
        self.classes = a.shape[-1] if self.kind == "classes" else 0
        if self.kind != "values":
            kl = torch.cat([self._divergence(i, j) for i, j in pieces])
            self.kl.append(kl)
            self.kl_rows.append(torch.zeros(len(a), dtype=torch.float64).index_add_(0, rows, kl))
            self.sizes.append(torch.bincount(rows, minlength=len(a)))
            self.flipped += int((x.argmax(-1) != y.argmax(-1)).sum())
            self.positions += len(x)
        self.metrics.append(self._metric(number, batch, real, quantized, a, b, mask))

    def _divergence(self, a: Tensor, b: Tensor) -> Tensor:
        """KL(a || b) of each row of (rows, classes), nats, float64."""
        a, b = a.double(), b.double()
        if not self.probabilities:
            p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
            return (p.exp() * (p - q)).sum(-1).clamp(min=0)
        p, q = a / a.sum(-1, keepdim=True), b.clamp(min=0)
        lost = ((q == 0) & (p > 1e-9)).any(-1, keepdim=True)
        floor = lost.double() * min(FLOOR, 0.5 / a.shape[-1]) + 1e-300
        self.floored += int(lost.sum())
        p, q = torch.maximum(p, floor), torch.maximum(q, floor)
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        return (p * (p / q).log()).sum(-1).clamp(min=0)

    def _metric(self, number: int, batch: Batch, real: Any, quantized: Any, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, 3): float score, quantized score, weight."""
        n, target = len(a), batch.target.cpu() if batch.target is not None else None
        weight = torch.ones(n, dtype=torch.float64)
        if callable(self.metric):
            pair = [_per_sample(number, self.metric(out, batch.target), n) for out in (real, quantized)]
        elif self.metric == "top1":
            pair = list(_right(number, target, a, b))
        elif self.metric == "perplexity":
            pair, weight = _losses(number, batch, target, a, b, mask, self.probabilities)
        elif self.metric == "cosine":
            u, v = (_pooled(x, mask) for x in (a, b))
            alike = F.cosine_similarity(u, v, dim=1)
            pair = [torch.ones_like(alike), torch.where((u == v).all(1), 1.0, alike)]
        else:
            goal = target if _real_target(a, target) and target is not None else a
            pair = [(x.double() - goal.double()).square().reshape(n, -1).mean(1) for x in (a, b)]
        return torch.stack([*pair, weight], 1)

    def figures(self, seed: int) -> dict[str, Any]:
        """The fields of `Evaluation` that come from outputs."""
        before, now, weight = torch.cat(self.metrics).numpy().T
        if self.metric == "perplexity":
            metric, metric_float, difference, interval = _ratio(before, now, weight)
        else:
            metric, metric_float = float(now.mean()), float(before.mean())
            difference, interval = _paired(now - before)
        figures = {
            "metric": metric,
            "metric_float": metric_float,
            "metric_name": self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric"),
            "difference": difference,
            "interval": interval,
            "sqnr": decibel(self.signal, self.noise),
            "samples": self.rows,
        }
        if self.positions:
            kl, sums, sizes = (torch.cat(part).double().numpy() for part in (self.kl, self.kl_rows, self.sizes))
            figures |= {
                "kl": float(kl.mean()),
                "kl_p99": float(np.percentile(kl, 99)),
                "kl_interval": _bootstrap(sums, sizes, seed),
            }
            figures["flips"] = self.flipped / self.positions
        return figures

    def notes(self) -> Iterator[str]:
        """What the figures rest on, where it is not plain."""
        if self.kind == "classes" and self.metric == "cosine":
            yield "no labels: KL and flips take the outputs (N, C) for class scores; for embeddings ask for metric='cosine'"
        right = float(torch.cat(self.metrics)[:, 0].mean())
        if self.metric == "top1" and _poor(right, self.classes, self.rows):
            yield (f"the float model itself gets only {right:.2%} right ({self.classes} classes): check the preprocessing "
                   "(scale, mean, std, channel order), the labels and the weights")  # fmt: skip
        if self.floored:
            yield (f"{self.floored} of {self.positions} quantized outputs have a probability of zero where the float one has not: "
                   f"both were raised to at least {FLOOR:.4f} (half of 1/256) before KL")  # fmt: skip


def _rows(x: Tensor) -> int:
    return max(1, CHUNK * len(x) // max(1, x.numel()))


def _ids(batch: Batch) -> Tensor | None:
    """The token ids (N, T) of a batch: ``input_ids``, or the first integer matrix that is no mask."""
    named = {name: x for name, x in batch.named.items() if "mask" not in name and "type" not in name and "position" not in name}
    inputs = [*([named["input_ids"]] if "input_ids" in named else []), *batch.args, *named.values()]
    return next((x for x in inputs if x.ndim == 2 and x.dtype in (torch.int64, torch.int32)), None)


def _mask(batch: Batch, out: Tensor) -> Tensor | None:
    mask = batch.named.get("attention_mask")
    return mask.bool().cpu() if mask is not None and out.ndim == 3 and mask.shape == out.shape[:2] else None


def _real_target(out: Tensor, target: Tensor | None) -> bool:
    return target is not None and target.is_floating_point() and target.shape == out.shape


def _pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """One vector per row: the mean over what the mask leaves of (N, T, D), anything else flattened."""
    if x.ndim != 3:
        return x.double().reshape(len(x), -1)
    keep = (mask if mask is not None else torch.ones(x.shape[:2], dtype=torch.bool))[..., None]
    return torch.where(keep, x.double(), 0.0).sum(1) / keep.sum(1).clamp(min=1)


def _per_sample(number: int, scores: Any, n: int) -> Tensor:
    found = torch.as_tensor(scores).detach().cpu().double()
    if tuple(found.shape) != (n,):
        raise InputError(f"batch {number}: the metric must give one score per sample, {n}; got shape {list(found.shape)}")
    if not bool(found.isfinite().all()):
        raise InputError(f"batch {number}: the metric gave scores that are not finite")
    return found


def _right(number: int, target: Tensor | None, a: Tensor, b: Tensor) -> Iterator[Tensor]:
    if target is None or target.is_floating_point() or target.shape != a.shape[:1]:
        got = "none" if target is None else f"{target.dtype} of shape {list(target.shape)}"
        raise InputError(f"batch {number}: top1 needs one whole-number label per sample, {len(a)}; got {got}")
    _in_range(number, "labels", target, a.shape[1])
    return ((x.argmax(1) == target).double() for x in (a, b))


def _in_range(number: int, what: str, found: Tensor, classes: int) -> None:
    outside = found[(found < 0) | (found >= classes)]
    if len(outside):
        raise InputError(f"batch {number}: {len(outside)} {what} lie outside 0..{classes - 1}, the first is {int(outside[0])}")


def _losses(number: int, batch: Batch, target: Tensor | None, a: Tensor, b: Tensor, mask: Tensor | None,
            probabilities: bool) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Per row: next-token losses of both models summed, and how many tokens they are of."""
    ids = target if target is not None and target.ndim == 2 else _ids(batch)
    if ids is None or ids.shape != a.shape[:2]:
        raise InputError(
            f"batch {number}: perplexity needs token ids of shape {list(a.shape[:2])} among the inputs or as the target"
        )
    ids = ids.cpu().long()[:, 1:]
    counted = ids != -100
    if mask is not None:
        counted &= mask[:, 1:] & mask[:, :-1]
    _in_range(number, "ids", ids[counted], a.shape[2])
    sums = []
    for x in (a, b):
        rows = []
        for scores, wanted, keep in zip(x, ids, counted, strict=True):
            kept = scores[:-1][keep].double()
            logs = kept.clamp(min=1e-12).log() if probabilities else F.log_softmax(kept, -1)
            rows.append(-logs.gather(1, wanted[keep, None]).sum())
        sums.append(torch.stack(rows))
    return sums, counted.sum(1).double()


# -- statistics -------------------------------------------------------------------------------------------------------


def decibel(signal: float, noise: float) -> float:
    """Signal over noise energy in dB; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _paired(difference: Array) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % normal interval; no interval from one sample."""
    mean = float(difference.mean())
    if len(difference) < 2:
        return mean, None
    half = 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return mean, (mean - half, mean + half)


def _ratio(before: Array, now: Array, tokens: Array) -> tuple[float, float, float, tuple[float, float] | None]:
    """Perplexities, their ratio - 1, and its 95 % interval by the ratio estimator's error over documents (Cochran 1977, 6.4)."""
    total, n = tokens.sum(), int((tokens > 0).sum())
    if total == 0:
        raise InputError("perplexity needs documents of at least two tokens that are not masked")
    log = float((now - before).sum() / total)
    interval = None
    if n > 1:
        half = 1.96 * math.sqrt(float(((now - before - log * tokens) ** 2).sum()) * n / (n - 1)) / total
        interval = (math.expm1(log - half), math.expm1(log + half))
    return math.exp(now.sum() / total), math.exp(before.sum() / total), math.expm1(log), interval


def _bootstrap(sums: Array, sizes: Array, seed: int) -> tuple[float, float] | None:
    """95 % percentile interval of sum(sums) / sum(sizes) over 1,000 resamples of the rows."""
    rows = np.flatnonzero(sizes)
    if len(rows) < 2:
        return None
    rng = np.random.default_rng(seed)
    picks = (rng.choice(rows, len(rows)) for _ in range(1000))
    low, high = np.percentile([sums[pick].sum() / sizes[pick].sum() for pick in picks], [2.5, 97.5])
    return float(low), float(high)


def plain(value: Any) -> Any:
    """JSON-ready: tuples become lists, a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
