"""`equalize`: cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721, 4.1), on weights alone; it judges nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..calibrate import list_of_batches
from ..qmodel import Note
from .channels import Channels
from .networks import Network, channels_of, proven, rescaled, tensors_of

#: Sweeps at most; a chain of two layers is done after the first.
SWEEPS = 100


def equalize(
    network: Network, data: Iterable[object] | None = None, *, clips: bool = False, streams: bool = False
) -> tuple[Network, tuple[Note, ...]]:
    """An equal graph in which every channel has the same largest magnitude where it is made as where it is read.

    A graph's channels are read off it; an ordinary module's are found and proven on ``data``, `InputError` without. ``clips``: the
    bound of a ReLU6 moves along with its channels (then one number per channel, in a node of its own); else channels that
    it could cut stay as they are. ``streams``: channels that several layers write, such as a sum's, are scaled too.

    >>> import torch
    >>> from roundel import capture, fuse
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 2, bias=False))
    >>> net[0].weight.data = torch.tensor([[1.0, 0.0], [100.0, 0.0]])
    >>> net[2].weight.data = torch.tensor([[1.0, 0.01], [0.0, 0.0]])
    >>> equal, notes = equalize(fuse(capture(net, torch.ones(1, 2))))
    >>> equal.constants["0.weight"].tolist(), equal.constants["2.weight"].tolist()
    ([[1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]])
    >>> notes[0].text
    '1 channels equalized by factors from 100 to 100'
    """
    items = [] if data is None else list_of_batches(data)
    channels, notes = channels_of(network, items, clips)
    wanted = torch.arange(channels.count) > 0 if streams else channels.single()
    factor = balance(channels, tensors_of(network), wanted)
    moved = factor != 1
    if not bool(moved.any()):
        return network, (*notes, Note("model", "equalization found no channel to scale"))
    low, high = float(factor[moved].min()), float(factor[moved].max())
    told = Note("model", f"{int(moved.sum())} channels equalized by factors from {low:.3g} to {high:.3g}")
    new, _ = rescaled(network, channels, factor)
    return proven(network, new, items, (*notes, told), "equalization")


def balance(channels: Channels, tensors: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """(count,): the factors, 1 where not ``wanted``, for which each class is as large in the weights that make it as in those
    that read it.

    Several such weights count by the mean of their logarithms. Gains of norms and biases are no weights here. A class without a
    number on one side keeps its scale.
    """
    weights = {reader.weight.name for reader in channels.readers} | {p.name for p in channels.made if tensors[p.name].ndim >= 2}
    made = [(p.name, p.index) for p in {p.name: p for p in channels.made}.values() if p.name in weights]
    read = [(p.name, p.index) for p in {r.weight.name: r.weight for r in channels.readers}.values()]
    total = torch.ones(channels.count, dtype=torch.float64)
    now = {name: tensors[name].detach().double().abs() for name in weights}
    for _ in range(SWEEPS):
        sides = [_level(channels, now, places) for places in (made, read)]
        step = ((sides[0] - sides[1]) / 2).exp()
        step = torch.where(step.isfinite(), step, 1.0)
        step = torch.where(wanted, step, 1.0)
        for name, index in made:
            now[name] = now[name] / step[index]
        for name, index in read:
            now[name] = now[name] * step[index]
        total *= step
        if bool(((step - 1).abs() < 1e-4).all()):
            break
    return total


def _level(channels: Channels, tensors: Mapping[str, Tensor], places: list[tuple[str, Tensor]]) -> Tensor:
    """(count,): mean over the tensors of the logarithm of each class's largest magnitude; NaN where all is zero."""
    total, seen = torch.zeros(2, channels.count, dtype=torch.float64)
    for name, index in places:
        found = channels.largest(tensors[name], index)
        total += torch.where(found > 0, found, 1.0).log()
        seen += found > 0
    return total / seen
