"""Channels of ordinary modules, found by running them: a layer's outputs are scaled, and whoever reads the scaled numbers shows it;
no architecture is known here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibrate import evaluating, one_thread, run
from ..data import Batch
from ..evaluate import predictions
from ..network.walk import Leaf, leaves, member
from ..network.watch import watching
from ..qmodel import Note
from .channels import Channels, Place, Reader

#: Outputs of two equal networks may differ by this share of the largest; float32 leaves less than 1e-5.
TOLERANCE = 1e-4

#: A column is a scaled copy if what differs has less than this share of its energy.
COPY = 1e-8


@dataclass(frozen=True, eq=False)
class Maker:
    """A layer whose output channels are ``size`` numbers stored in ``tensors``, by name with their index of channels."""

    name: str
    size: int
    tensors: Mapping[str, Tensor]


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor that can be scaled: weights and biases of weighted leaf modules, weights as (out, in, ...), and vectors of the
    norms. Live, so that writing into one changes the module."""
    out: dict[str, Tensor] = {}
    for name, one in leaves(module).items():
        out[member(name, "weight")] = one.weight.detach()
        if one.bias is not None:
            out[member(name, "bias")] = one.bias.detach()
    for name, norm in _norms(module).items():
        out |= {member(name, key): p.detach() for key, p in norm.named_parameters(recurse=False)}
    return out


def _norms(module: nn.Module) -> dict[str, nn.Module]:
    """Leaf modules that hold a vector ``weight``, and at most a ``bias`` beside it."""
    found = {}
    for name, child in module.named_modules():
        own = dict(child.named_parameters(recurse=False))
        if next(child.children(), None) is not None or "weight" not in own or not own.keys() <= {"weight", "bias"}:
            continue
        vector = own["weight"].ndim == 1 and own["weight"].is_floating_point()
        if vector and len({p.shape for p in own.values()}) == 1:
            found[name] = child
    return found


def _makers(module: nn.Module, found: Mapping[str, Leaf]) -> Iterator[Maker]:
    for name, norm in _norms(module).items():
        own = dict(norm.named_parameters(recurse=False))
        size = own["weight"].numel()
        yield Maker(name, size, {member(name, key): torch.arange(size) for key in own})
    for name, one in found.items():
        if one.op not in ("linear", "conv"):
            continue
        size = one.weight.shape[0]
        tensors = {member(name, "weight"): torch.arange(size).reshape(-1, *[1] * (one.weight.ndim - 1))}
        yield Maker(name, size, tensors | ({} if one.bias is None else {member(name, "bias"): torch.arange(size)}))


def probe_channels(module: nn.Module, batch: Batch) -> tuple[Channels, tuple[Note, ...]]:
    """The channels of ``module``, each proven on ``batch``.

    The output channels of one norm, linear layer or convolution after another are divided by factors of their own. Where every
    channel of a weighted layer's input then is a former channel divided by one of the factors, that layer reads them. Its weight
    takes the factors up; if the network's outputs then are what they were, these are channels, else a note says that they are not.
    The module comes back as it was. Costs a forward pass per layer, and another for each that finds a reader.

    >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
    >>> found, _ = probe_channels(net, Batch((torch.randn(8, 4),)))
    >>> [place.name for place in found.made], [reader.layer for reader in found.readers]
    (['0.weight', '0.bias'], ['1'])
    """
    found = leaves(module)
    tensors = stored(module)
    made: list[Place] = []
    readers: list[Reader] = []
    notes: list[Note] = []
    count = 1
    with one_thread(), torch.no_grad(), evaluating(module):
        output, inputs = run_once(module, batch, found)
        unseen = [name for name, one in found.items() if one.op in ("linear", "conv") and member(name, "input") not in inputs]
        if unseen:  # they might read any channel
            told = f"no channel is scaled: the probe reached {len(unseen)} layers not, {', '.join(unseen[:3])}; give longer data"
            return Channels(1, (), ()), (Note("model", told),)
        for maker in _makers(module, found):
            factor = 1 + torch.arange(1, maker.size + 1, dtype=torch.float64) / maker.size
            places = [Place(name, index + 1, maker.name) for name, index in maker.tensors.items()]
            alone = Channels(1 + maker.size, tuple(places), ())
            both = torch.cat([torch.ones(1, dtype=torch.float64), factor])
            with _scaled(tensors, alone, both):
                _, seen = run_once(module, batch, found)
            reading = [r for name, one in found.items() if (r := _reader(name, one, inputs, seen, factor)) is not None]
            if not reading:
                continue
            whole = Channels(1 + maker.size, tuple(places), tuple(reading))
            with _scaled(tensors, whole, both):
                now, _ = run_once(module, batch, {})
            far = apart(output, now)
            names = ", ".join(reader.layer for reader in reading)
            if far > TOLERANCE:
                notes.append(Note(maker.name, f"not folded into {names}: the outputs would differ by {far:.2g} of the largest"))
                continue
            made += [Place(place.name, place.index + (count - 1), place.layer) for place in places]
            readers += [
                Reader(r.layer, r.op, r.attrs, Place(r.weight.name, r.weight.index + (count - 1)), r.site, r.classes + (count - 1))
                for r in reading
            ]
            count += maker.size
    return Channels(count, tuple(made), tuple(readers)), tuple(notes)


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference of two outputs as a share of the largest number; infinite where one is not finite."""
    far = float((a.double() - b.double()).abs().amax()) / max(float(a.double().abs().amax()), 1e-30) if a.numel() else 0.0
    return far if far == far else float("inf")


def run_once(module: nn.Module, batch: Batch, found: Mapping[str, Leaf]) -> tuple[Tensor, dict[str, Tensor]]:
    """(the output, the inputs of weighted layers, each as (rows, channels) of the layer's first run)."""
    sites = {member(name, "input"): one for name, one in found.items() if one.op in ("linear", "conv")}
    inputs: dict[str, Tensor] = {}

    def note(site: str, value: Tensor) -> None:
        if (one := sites.get(site)) is not None and site not in inputs and value.is_floating_point():
            inputs[site] = value.detach().movedim(_axis(one, value), -1).flatten(0, -2).double()

    with watching(module, note):
        output = predictions(run(module, Batch(batch.args, batch.named)))
    return output, inputs


def _axis(one: Leaf, value: Tensor) -> int:
    """The axis of a layer's input channels."""
    return value.ndim - (1 if one.op == "linear" else one.weight.ndim - 1)


@contextmanager
def _scaled(tensors: Mapping[str, Tensor], channels: Channels, factor: Tensor) -> Iterator[None]:
    """The tensors scaled inside the block, and as they were after it."""
    changed = channels.scaled(tensors, factor)
    before = {name: tensors[name].clone() for name in changed}
    try:
        for name, tensor in changed.items():
            tensors[name].copy_(tensor)
        yield
    finally:
        for name, tensor in before.items():
            tensors[name].copy_(tensor)


def _reader(name: str, one: Leaf, before: Mapping[str, Tensor], after: Mapping[str, Tensor], factor: Tensor) -> Reader | None:
    """The layer as a reader of the channels that ``factor`` (channels,) divided: every column of its input is a copy of one."""
    site = member(name, "input")
    x, y = before.get(site), after.get(site)
    if x is None or y is None or x.shape != y.shape or not x.numel():
        return None
    energy = x.square().sum(0)
    ratio = (x * y).sum(0) / energy
    if not bool(ratio.isfinite().all()) or bool(((y - ratio * x).square().sum(0) > COPY * energy).any()):
        return None
    which = ((1 / ratio)[:, None] - factor).abs().argmin(1)
    if bool(((1 / ratio - factor[which]).abs() > 0.1 / len(factor)).any()):
        return None
    classes = which + 1
    rank = one.weight.ndim
    if one.op == "linear":
        return Reader(name, one.op, one.attrs, Place(member(name, "weight"), classes[None]), site, classes)
    ones, groups = [1] * (rank - 2), one.attrs.get("groups", 1)
    columns = classes.reshape(groups, -1).repeat_interleave(one.weight.shape[0] // groups, 0).reshape(*one.weight.shape[:2], *ones)
    return Reader(name, one.op, one.attrs, Place(member(name, "weight"), columns), site, classes.reshape(-1, *ones))
