"""`smooth`: the scale of activations moved into weights, SmoothQuant's and AWQ's way, where a layer's own error falls by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..calibrate import evaluating, list_of_batches, one_thread, run
from ..data import Batch
from ..graph.ops import OPS
from ..network.layer import Activation
from ..network.watch import watching
from ..plan import Choice
from ..qmodel import Note
from ..solvers import rtn
from .channels import Channels, Reader
from .networks import Network, channels_of, module_of, proven, rescaled, tensors_of

#: Exponents tried for each group of layers that read the same channels.
GRID = tuple(i / 10 for i in range(11))

#: A scale is taken where it lowers the layers' error to less than this share.
WORTH = 0.95

#: What a layer is judged on: this many of its inputs' rows, or examples of images.
ROWS, IMAGES = 512, 8


@dataclass(eq=False)
class _Seen:
    """What passed at the input of one reader: extremes and mean magnitude of each class, and some of the values themselves."""

    low: Tensor
    high: Tensor
    total: Tensor
    count: Tensor
    sample: list[Tensor] = field(default_factory=list)
    kept: int = 0


def smooth(
    network: Network,
    data: Iterable[object],
    weights: str = "int8",
    activations: str | None = "int8",
    *,
    by: Literal["max", "mean"] = "max",
    grid: Sequence[float] = GRID,
) -> tuple[Network, tuple[Note, ...]]:
    """An equal network whose weighted layers lose less to these formats.

    Channel j of a layer's input is divided by s_j where it is made (the gain of a norm, the rows of the layer before) and its
    column of the weights multiplied. With ``by="max"`` s_j = max|X_j|^a / max|W_j|^(1-a) (SmoothQuant, Xiao et al. 2023, arXiv
    2211.10438, eq. 4); with ``"mean"`` s_j = mean|X_j|^a (AWQ, Lin et al. 2024, arXiv 2306.00978, eq. 5). The exponent a is
    searched in ``grid`` for the layers that share an input, by the squared error of their outputs with both sides rounded to
    nearest, on a sample of ``data``; where none lowers it by 5 %, the scale stays. ``weights`` and ``activations`` are format
    texts as `quantize` takes them; activations None computes in float.

    >>> from roundel.graph import GraphModule
    >>> net = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    >>> net[0].weight.data[3] = 100.0
    >>> net[1].weight.data[:, 3] /= 100
    >>> x = torch.randn(64, 8)
    >>> even, notes = smooth(net, [x])
    >>> bool(even[0].weight.max() < 20), torch.allclose(net(x), even(x), atol=1e-4)
    (True, True)
    """
    items = list_of_batches(data)
    channels, said = channels_of(network, items)
    notes = list(said)
    if channels.count == 1:
        return network, (*notes, Note("model", "smoothing found no channel to scale"))
    w_format = Choice.parse(weights, "weight").format
    choice = None if activations is None else Choice.parse(activations, "activation")
    with one_thread(), torch.no_grad():
        seen = _watch(network, channels, items)
        factor = torch.ones(channels.count, dtype=torch.float64)
        tensors, group = tensors_of(network), channels.groups()
        for number in range(1, int(group.max()) + 1):
            classes = group == number
            readers = [r for r in channels.readers if bool(classes[r.classes].any()) and r.layer in seen]
            if not readers:
                continue
            judge = _Judge(channels, readers, seen, tensors, lambda w, axis: rtn(w, w_format, axis=axis).dequantize(), choice)
            plain = judge.error(torch.ones(channels.count, dtype=torch.float64))
            tries = [(plain, 0.0, torch.ones_like(factor))]
            tries += [(judge.error(s), a, s) for a in grid if (s := judge.scale(classes, a, by)) is not None]
            best, exponent, scale = min(tries, key=lambda one: one[0])
            names = ", ".join(r.layer for r in readers[:4])
            if best < WORTH * plain:
                factor = torch.where(classes, scale, factor)
                notes.append(Note(names, f"smoothed with exponent {exponent:g}: its error falls {plain:.2g} to {best:.2g}"))
    if bool((factor == 1).all()):
        return network, (*notes, Note("model", "smoothing would lower no layer's error"))
    new, _ = rescaled(network, channels, factor)
    return proven(network, new, items, notes, "smoothing")


def _watch(network: Network, channels: Channels, items: Sequence[Batch]) -> dict[str, _Seen]:
    """What reaches each reader, over all batches; samples are taken at equal distances."""
    sites: dict[str, list[Reader]] = {}
    for reader in channels.readers:
        sites.setdefault(reader.site, []).append(reader)
    zero, inf = torch.zeros(channels.count, dtype=torch.float64), float("inf")
    seen: dict[str, _Seen] = {}

    def note(site: str, value: Tensor) -> None:
        for reader in sites.get(site, ()):
            one = seen.setdefault(reader.layer, _Seen(zero + inf, zero - inf, zero.clone(), zero.clone()))
            flat, wide = value.detach().double().reshape(-1), reader.classes.expand(value.shape).reshape(-1)
            one.low = one.low.scatter_reduce(0, wide, flat, "amin")
            one.high = one.high.scatter_reduce(0, wide, flat, "amax")
            one.total = one.total.scatter_add(0, wide, flat.abs())
            one.count = one.count.scatter_add(0, wide, torch.ones_like(flat))
            rows = value.detach().reshape(-1, value.shape[-1]) if reader.op == "linear" else value.detach()
            limit = max(1, -(-(ROWS if reader.op == "linear" else IMAGES) // len(items)))
            one.sample.append(rows[:: max(1, len(rows) // limit)][:limit].clone())

    module = module_of(network)
    with evaluating(module), watching(module, note):
        for batch in items:
            run(module, batch)
    return seen


class _Judge:
    """The layers that read one group of channels, and what scaling these costs or gains them."""

    def __init__(self, channels: Channels, readers: Sequence[Reader], seen: Mapping[str, _Seen], tensors: Mapping[str, Tensor],
                 rounded: Callable[[Tensor, int], Tensor], choice: Choice | None) -> None:  # fmt: skip
        self.channels, self.readers, self.choice, self.rounded = channels, readers, choice, rounded
        self.seen = [seen[r.layer] for r in readers]
        self.weights = [tensors[r.weight.name].detach() for r in readers]
        self.inputs = [torch.cat(one.sample) for one in self.seen]
        self.attrs = [{key: value for key, value in r.attrs.items() if key != "act"} for r in readers]
        self.wanted = [OPS[r.op](x, w, **attrs) for r, x, w, attrs in zip(readers, self.inputs, self.weights, self.attrs)]
        self.most = torch.stack([torch.maximum(-one.low, one.high).clamp(min=0) for one in self.seen]).amax(0)
        self.mean = torch.stack([one.total / one.count.clamp(min=1) for one in self.seen]).amax(0)
        self.reach = torch.stack([channels.largest(w, r.weight.index) for w, r in zip(self.weights, readers)]).amax(0)

    def scale(self, classes: Tensor, exponent: float, by: str) -> Tensor | None:
        """(count,): the formula, with a geometric mean of 1 over the group; 1 where a side has no number."""
        top = self.most if by == "max" else self.mean
        ok = classes & (top > 0) & (self.reach > 0) & top.isfinite()
        if not bool(ok.any()):
            return None
        log = exponent * top.clamp(min=1e-30).log()
        if by == "max":
            log = log - (1 - exponent) * self.reach.clamp(min=1e-30).log()
        return torch.where(ok, (log - log[ok].mean()).exp(), 1.0)

    def error(self, factor: Tensor) -> float:
        """Squared error of the outputs, both sides rounded, over the sum of their squares, summed over the layers."""
        total = 0.0
        for r, one, x, w, attrs, wanted in zip(self.readers, self.seen, self.inputs, self.weights, self.attrs, self.wanted):
            axis = 1 if r.op == "conv_transpose" and attrs.get("groups", 1) == 1 else 0
            scaled = (x.double() / factor[r.classes]).float()
            if self.choice is not None:
                scaled = _site(self.choice, one, factor).quantize(scaled)
            got = OPS[r.op](scaled, self.rounded((w.double() * factor[r.weight.index]).float(), axis), **attrs)
            total += float((got - wanted).double().square().sum() / wanted.double().square().sum().clamp(min=1e-30))
        return total


def _site(choice: Choice, one: _Seen, factor: Tensor) -> Activation:
    """How an input is rounded: in the range of all that was seen where it is static."""
    fmt = choice.format
    if choice.when != "static":
        return Activation(fmt, "dynamic")
    ok = one.count > 0
    lo, hi = min(float((one.low / factor)[ok].min()), 0.0), max(float((one.high / factor)[ok].max()), 0.0)
    return Activation(fmt, "static", fmt.store(fmt.from_range(torch.full((1, 1), lo), torch.full((1, 1), hi))))
