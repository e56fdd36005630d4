"""End to end: a quantized network trained as a whole towards the float one's answers: roundings, scales, tables and norms together;
kept only where answers held out come nearer. Where codes start from, and which formats, is not decided here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate import Progress, evaluating, one_thread
from ..data import Batch
from ..errors import InputError, PlanError
from ..evaluate.scores import Scores
from ..formats.qtensor import QTensor, packed, to_matrix
from ..gate import judge, losses
from ..network.watch import first_tensor
from ..qmodel import Note, QModel
from .prepare import convert, float_weights, kinds, prepare
from .tunable import TunableWeight

Start = Literal["float", "codes"]

#: Learning rate by kind of parameter, and by where training starts: weights in units of a tensor's root mean square, which from
#: codes on halves with each bit beyond 4, as the way to the next level does; the others as they are.
RATES: Mapping[Start, Mapping[str, float]] = {
    "float": {"weights": 1e-2, "scales": 1e-3, "tables": 1e-3, "rest": 1e-3},
    "codes": {"weights": 3e-3, "scales": 1e-3, "tables": 1e-3, "rest": 1e-3},
}

#: Steps in which the rates rise, and after which a time is turned into steps.
WARM = 10


@dataclass(frozen=True)
class Teaching:
    """How `tune_model` trains: ``steps`` of one batch each, or ``seconds`` on this machine, turned into steps by the pace of
    the first ones; ``rates`` by kind in place of `RATES`, a kind that is left out stays as it is; ``seed`` shuffles the batches.
    ``start`` is float, the float weights, or codes: where a solver chose against the nearest level, weights start there.
    ``mix``: each real example has up to this share of another of its batch blended in (mixup without labels, Zhang et al. 2018),
    so that few examples are not learned by heart; ids and whole numbers stay as they are.

    >>> Teaching(seconds=60).steps is None
    True
    """

    steps: int | None = None
    seconds: float | None = None
    rates: Mapping[str, float] | None = None
    seed: int = 0
    start: Start = "float"
    mix: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise PlanError("training takes steps= or seconds=, one of them")
        if self.start not in ("float", "codes"):
            raise PlanError(f"training starts at float or codes, got {self.start!r}")
        if not 0 <= self.mix <= 0.5:
            raise PlanError(f"mix={self.mix!r}: the share of another example is from 0 to 0.5")
        known = RATES[self.start]
        if odd := sorted((self.rates or {}).keys() - known.keys()):
            raise PlanError(f"there is no kind of parameter {odd[0]!r} to give a rate; there are {', '.join(known)}")

    def rate(self, kind: str) -> float:
        """The learning rate of a kind; 0 leaves it as it is."""
        return (RATES[self.start] if self.rates is None else self.rates).get(kind, 0.0)


def tune_model(q: QModel, teacher: nn.Module, batches: Sequence[Batch], held: Sequence[Batch] | None, how: Teaching,
               progress: Progress | None = None) -> QModel:  # fmt: skip
    """``q`` trained so that its answers on ``batches`` come near those of ``teacher``, the float network it was made of.

    The loss is KL(teacher || q) per token or example where answers are logits, else the squared error over the variance of the
    teacher's. Weights train straight-through; formats and bytes stay. The result is ``q`` itself, with a note, where `gate.judge`
    on ``held`` does not find it nearer; with None the caller judges. The same steps give the same bytes; a time budget is said in
    steps by the note. Raises `InputError` where there is nothing to learn from.

    >>> from roundel import quantize
    >>> net, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), [Batch((torch.randn(32, 8),)) for _ in range(4)]
    >>> q = tune_model(quantize(net, "int2", data=data), net, data[:3], data[3:], Teaching(steps=2))
    >>> "end-to-end tuning" in q.notes[-1].text
    True
    """
    if not batches or (held is not None and not held):
        raise InputError("end-to-end tuning learns from some batches and is judged on others; give both")
    with one_thread(), evaluating(teacher):
        module = prepare(_at_the_float_weights(q, teacher) if how.start == "float" else q, teacher)
        done = _train(module, teacher, batches, how, progress)
        new = convert(module)
        new = replace(new, notes=q.notes, provenance={**new.provenance, "tuned": {"steps": done, "seed": how.seed}})
        told = f"end-to-end tuning of {done} steps"
        if held is not None:
            verdict = judge(losses(teacher, q.module, held), losses(teacher, new.module, held))
            told, new = f"{told} {'kept' if verdict.kept else 'not kept'}: {verdict}", new if verdict.kept else q
    return replace(new, notes=(*q.notes, Note("model", told)))


def _at_the_float_weights(q: QModel, teacher: nn.Module) -> QModel:
    """``q`` with the codes nearest to the float weights under its own parameters: training that starts there ends better than one
    that starts from a solver's codes, whose values lie in the middle of their cells."""
    real = float_weights(teacher)

    def nearest(name: str, tensor: QTensor) -> QTensor:
        w = to_matrix(real[name].detach().float(), tensor.axis)
        return packed(tensor.format, tensor.format.encode(w, tensor.params), tensor.params, tensor.shape, tensor.axis)

    return replace(q, tensors={name: nearest(name, tensor) for name, tensor in q.tensors.items()})


@torch.enable_grad()
def _train(module: nn.Module, teacher: nn.Module, batches: Sequence[Batch], how: Teaching, progress: Progress | None) -> int:
    """Adam under a cosine after a short warm-up; the number of steps done."""
    groups = []
    found = [part for part in module.modules() if isinstance(part, TunableWeight)] if how.start == "codes" else []
    way = {id(part.weight): 2.0 ** (4 - part.tensor.format.bits / part.tensor.format.step) for part in found}
    for kind, params in kinds(module).items():
        params = [p for p in params if kind != "rest" or p.ndim < 2]  # biases and norms; embeddings and other matrices stay
        for p in params:
            unit = float(p.detach().square().mean().sqrt()) * way.get(id(p), 1.0) if kind == "weights" else 1.0
            groups.append({"params": [p], "lr": 0.0, "base": how.rate(kind) * unit})
    groups = [group for group in groups if group["base"]]
    if not groups:
        raise InputError("nothing trains: the model has no parameter of the kinds that have a rate")
    trained = {id(p) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    for p in module.parameters():
        p.requires_grad_(id(p) in trained)
    module.eval()  # no dropout; what trains is the same in both modes
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    start = half = time.monotonic()
    total, loss_of = how.steps, _Loss()
    for step, batch in enumerate(_blended(_shuffled(batches, how.seed), how)):
        now = time.monotonic()
        if step == WARM // 2:  # the first steps build caches, those after them tell the pace
            half = now
        if total is None and how.seconds is not None and (step == WARM or (step and now - start > how.seconds / 2)):
            pace = (now - half) / (step - WARM // 2) if step > WARM // 2 else (now - start) / step
            total = step + int(max(0.0, how.seconds - (now - start)) / pace)
        if total is not None and step >= total:
            return step
        loss = loss_of(batch, teacher, module)
        optimizer.zero_grad()
        loss.backward()
        share = max(0, step - WARM) / max(1, total - WARM) if total else 0.0
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1.0, (step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.step()
        if progress:
            progress("tune", step + 1, total or 0)
    return 0


def _shuffled(batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    """The batches again and again, each round in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def _blended(batches: Iterator[Batch], how: Teaching) -> Iterator[Batch]:
    """Each example with a share of another, drawn evenly up to ``how.mix``; all real inputs of an example in the same way."""
    generator = torch.Generator().manual_seed(how.seed)
    for batch in batches:
        given = [*batch.args, *batch.named.values()]
        if not how.mix or len(batch) < 2 or not all(x.is_floating_point() for x in given):
            yield batch
            continue
        other = torch.randperm(len(batch), generator=generator)
        share = how.mix * torch.rand(len(batch), generator=generator)

        def blend(x: Tensor, other: Tensor = other, share: Tensor = share) -> Tensor:
            if x.ndim == 0 or len(x) != len(other):
                return x  # one for all examples
            return x.lerp(x[other], share.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)))

        yield Batch(tuple(map(blend, batch.args)), {name: blend(x) for name, x in batch.named.items()})


class _Loss:
    """The distance of two networks' answers to one batch; what kind of answers they are, the first batch tells."""

    kind = ""

    def __call__(self, batch: Batch, teacher: nn.Module, module: nn.Module) -> Tensor:
        with torch.no_grad():
            wanted = teacher(*batch.args, **batch.named)
        got = module(*batch.args, **batch.named)
        self.kind = self.kind or Scores.like(Batch(batch.args, batch.named), wanted, None).kind
        a, b = _answer(wanted), _answer(got)
        mask = batch.named.get("attention_mask")
        if mask is not None and a.ndim == 3 and mask.shape == a.shape[:2]:
            a, b = a[mask.bool()], b[mask.bool()]
        if self.kind == "values":
            return (b - a).square().mean() / a.var().clamp(min=torch.finfo(torch.float32).tiny)
        pair = F.log_softmax(b.flatten(0, -2), -1), F.log_softmax(a.flatten(0, -2), -1)
        return F.kl_div(*pair, log_target=True, reduction="batchmean")


def _answer(output: Any) -> Tensor:
    """The tensor that `evaluate.predictions` would take, with its gradient."""
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if (found := first_tensor(output)) is None:
        raise InputError(f"the model returned a {type(output).__name__} without a tensor in it")
    return found
