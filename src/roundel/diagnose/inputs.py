"""Whether the inputs are what the float model was trained on, found by trying other preparations against the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import InputError
from ..evaluate import predictions
from ..graph import Graph
from ..qmodel import QModel
from .edits import with_ranges
from .evidence import parts, watched
from .loss import labelled, outputs, to_labels

Change = Callable[[Tensor], Tensor]

#: By so much of all examples, and so many standard errors, another preparation must get more right.
MORE, ERRORS = 0.1, 4.0


@dataclass(frozen=True, eq=False)
class Wrong:
    """A better preparation of the first input, and the losses of the quantized model against the labels without and with it."""

    layer: str
    cure: str
    mend: Callable[[Batch], Batch]
    model: QModel
    before: Tensor
    after: Tensor


def wrong_inputs(q: QModel, model: nn.Module, items: Sequence[Batch]) -> Wrong | None:
    """The preparation with which the float model gets by far more labels right than as the data is; None without labels."""
    if any(batch.target is None for batch in items) or not (items[0].args or items[0].named):
        return None
    first = items[0].args[0] if items[0].args else next(iter(items[0].named.values()))
    if not first.is_floating_point():
        return None
    learn, held = parts(items, False)
    if not learn or not held:
        return None
    now = _right(model, learn)
    tries = [
        (right, told, change)
        for told, change in preparations(learn)
        if (right := _right(model, [_changed(b, change) for b in learn])) is not None
    ]
    if not tries:
        return None
    best, told, change = max(tries, key=lambda one: float(one[0].mean()))
    if now is not None:
        gain = best - now
        if not float(gain.mean()) > max(MORE, ERRORS * float(gain.std()) / math.sqrt(len(gain))):
            return None
    elif float(best.mean()) < 0.5:
        return None

    def mend(batch: Batch) -> Batch:
        return _changed(batch, change)

    mended = [mend(batch) for batch in held]
    models = [q]
    _, stats = watched(replace(q, activations={}).module, q.rest, [mend(batch) for batch in learn])
    static = {
        site: s for site, s in stats.items() if (a := q.activations.get(site)) is not None and a.when == "static" and a.params
    }
    if static:
        models.append(with_ranges(q, static, str(q.provenance.get("ranges", "mse")), {}))
    losses = [against_labels(one, mended) for one in models]
    i = min(range(len(models)), key=lambda k: float(losses[k].mean()))
    layer = q.structure.inputs[0] if isinstance(q.structure, Graph) else "input"
    cure = told + (", and calibrate again" if i else "")
    return Wrong(layer, cure, mend, models[i], against_labels(q, held), losses[i])


def against_labels(q: QModel, items: Sequence[Batch]) -> Tensor:
    """(examples,): cross entropy of ``q`` against the labels, nats; where it cannot run on such data, that of a guess."""
    try:
        return to_labels(items, outputs(q.module, items))
    except InputError:
        classes = 1 + max(int(batch.target.max()) for batch in items if batch.target is not None)
        return torch.full((sum(map(len, items)),), math.log(classes), dtype=torch.float64)


def preparations(items: Sequence[Batch]) -> Iterator[tuple[str, Change]]:
    """What may have been forgotten or done twice, in words and as a function of the first input."""
    x = torch.cat([_first(batch) for batch in items])
    top = float(x.abs().max())
    for number in (255.0, 16.0, 127.5):
        yield (f"divide by {number:g}", partial(torch.mul, other=1 / number)) if top > 1.5 else (
            f"multiply by {number:g}", partial(torch.mul, other=number))  # fmt: skip
    yield "divide by 127.5 and take 1 away", lambda x: x / 127.5 - 1
    yield "take 1 away from twice its numbers", lambda x: 2 * x - 1
    yield "add 1 and halve", lambda x: (x + 1) / 2
    axes = [i for i in range(x.ndim) if i != 1] if x.ndim > 2 else list(range(x.ndim))
    mean, std = x.mean(axes, keepdim=True), x.std(axes, keepdim=True).clamp(min=1e-6)
    yield "take away the mean and divide by the standard deviation, per channel", lambda x: (x - mean) / std
    whole, spread = x.mean(), x.std().clamp(min=1e-6)
    yield "take away the mean and divide by the standard deviation", lambda x: (x - whole) / spread
    yield "turn light and dark round", lambda x: float(x.max()) + float(x.min()) - x
    if x.ndim == 4:
        yield "exchange rows and columns", lambda x: x.transpose(2, 3)
        yield "move the channels' axis from last to second", lambda x: x.permute(0, 3, 1, 2)
        yield "move the channels' axis from second to last", lambda x: x.permute(0, 2, 3, 1)
        if x.shape[1] == 3:
            yield "reverse the channels", lambda x: x.flip(1)


def _first(batch: Batch) -> Tensor:
    return batch.args[0] if batch.args else next(iter(batch.named.values()))


def _changed(batch: Batch, change: Change) -> Batch:
    if batch.args:
        return replace(batch, args=(change(batch.args[0]).contiguous(), *batch.args[1:]))
    name = next(iter(batch.named))
    return replace(batch, named={**batch.named, name: change(batch.named[name]).contiguous()})


def _right(model: nn.Module, items: Sequence[Batch]) -> Tensor | None:
    """(examples,): 1 where the float model is right; None where it cannot run or gives no class scores."""
    try:
        got = outputs(model, items)
    except InputError:
        return None
    if not labelled(items, got):
        return None
    return torch.cat(
        [predictions(out).argmax(1).eq(b.target).double() for out, b in zip(got, items, strict=True) if b.target is not None]
    )
