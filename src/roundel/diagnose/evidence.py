"""What is known before any cure is tried: what passes through the float and the quantized network, and by how much they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import run
from ..data import Batch
from ..errors import InputError
from ..graph import Graph, GraphModule, Node
from ..network.layer import WEIGHTED
from ..network.sites import find_sites
from ..network.watch import watching
from ..qmodel import Note, QModel
from ..quantize.networks import GraphNetwork, Network, find_network
from ..ranges import known_ranges
from ..refine import refine
from ..stats import Stats
from ..transforms.equalize import equalize
from .edits import with_tensors
from .loss import apart, bare, kind_of, outputs
from .machine import as_computed

#: Numbers of one value that are kept, at most.
SAMPLE = 1 << 14


@dataclass(eq=False)
class Seen:
    """What one value held over all batches: numbers of it, its ends per channel, and the largest magnitude of each batch."""

    axis: int
    parts: list[Tensor] = field(default_factory=list)
    low: Tensor = field(default_factory=lambda: torch.zeros(0))
    high: Tensor = field(default_factory=lambda: torch.zeros(0))
    largest: list[float] = field(default_factory=list)

    @property
    def sample(self) -> Tensor:
        """Some of its numbers, spread evenly."""
        return torch.cat(self.parts)

    @property
    def reach(self) -> Tensor:
        """(channels,): the largest magnitude of each."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def take(self, value: Tensor, share: int) -> None:
        """One batch more."""
        value = value.detach().float()
        flat = value.reshape(-1)
        self.parts.append(flat[:: max(1, len(flat) // share)].clone())
        matrix = value.movedim(self.axis, 0).flatten(1) if value.ndim > 1 else value.reshape(1, -1)
        low, high = matrix.amin(1), matrix.amax(1)
        known = len(self.low) == len(low)
        self.low, self.high = (torch.minimum(self.low, low), torch.maximum(self.high, high)) if known else (low, high)
        self.largest.append(float(flat.abs().max()))


@dataclass(frozen=True, eq=False)
class Evidence:
    """The quantized model ``q``, the float one, and what data says of both.

    ``network`` is the float network in the form that ``q`` was made from, ``real`` what passes through it, by value. ``own`` and
    ``stats`` are what passes through ``q`` with its weights as they are stored and nothing else quantized, by value and by site.
    ``learn`` is what cures are made from, ``held`` what they are judged on; ``wanted`` are the float outputs on it, ``before`` the
    losses of ``q``. ``bad`` are batches by number that are left out of both.
    """

    q: QModel
    model: nn.Module
    network: Network
    real: Mapping[str, Seen]
    own: Mapping[str, Seen]
    stats: Mapping[str, Stats]
    fixed: Mapping[str, tuple[float, float]]
    learn: Sequence[Batch]
    held: Sequence[Batch]
    wanted: Sequence[Any]
    before: Tensor
    unit: str
    vnni: bool
    bad: tuple[int, ...] = ()
    made: dict[str, QModel] = field(default_factory=dict)

    @cached_property
    def rival(self) -> Tensor:
        """(examples,): the losses of ``q`` with the biases that suit it best: what any cure has to beat."""
        new = self.settled(self.q)
        return self.before if new is self.q else self.loss(new)

    @property
    def graph(self) -> Graph | None:
        """The graph of ``q``, if it is one."""
        return self.q.structure if isinstance(self.q.structure, Graph) else None

    @property
    def method(self) -> str:
        """How ranges were found."""
        return str(self.q.provenance.get("ranges", "mse"))

    @property
    def inputs(self) -> list[str]:
        """Static sites that are inputs of the network."""
        return [name for name in self.graph.inputs if name in self.static] if self.graph else []

    @property
    def static(self) -> dict[str, Any]:
        """Static sites that some value passed, with their activations."""
        return {site: a for site, a in self.q.activations.items() if a.when == "static" and a.params and site in self.stats}

    @property
    def floats(self) -> dict[str, Tensor]:
        """Float weights by name, where the float network has one of that name and shape."""
        return {t.name: t.weight.detach() for t in self.network.targets
                if t.name in self.q.tensors and tuple(t.weight.shape) == self.q.tensors[t.name].shape}  # fmt: skip

    def once(self, name: str, make: Callable[[], QModel]) -> QModel:
        """What several suspects need is made once."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def loss(self, q: QModel) -> Tensor:
        """(examples,): the losses of a model on what is held out."""
        return apart(self.held, self.wanted, outputs(as_computed(q, self.vnni), self.held))

    def settled(self, q: QModel) -> QModel:
        """``q``, which is this one with something changed, with biases that suit it.

        Biases that were corrected were so for errors that are no longer there. So the float ones, and those corrected anew, are
        tried too; the examples that cures are made from decide.
        """
        moved = self._moved(q)
        if not moved:
            return q
        assert isinstance(self.network.module, GraphModule)
        plain = with_tensors(q, rest=moved)
        tries = [q, plain, refine(plain, self.network.module, self.learn, None, True)]
        goal = outputs(self.model, self.learn)
        return min(tries, key=lambda one: float(apart(self.learn, goal, outputs(as_computed(one, self.vnni), self.learn)).mean()))

    def _moved(self, q: QModel) -> dict[str, Tensor]:
        """Float biases, by name, if those of this model are others and ``q`` has them as they are here."""
        if not (self.graph and isinstance(q.structure, Graph) and isinstance(self.network, GraphNetwork)):
            return {}
        names = [[node.name for node in graph.nodes] for graph in (self.graph, q.structure, self.network.graph)]
        if not names[0] == names[1] == names[2]:
            return {}
        real, moved = self.network.graph.constants, {}
        for node in self.graph.nodes:
            name = (*node.inputs, "", "")[2]
            if node.op not in WEIGHTED or name not in real or q.rest.get(name) is not self.q.rest.get(name, ""):
                continue
            if real[name].shape == q.rest[name].shape and not torch.equal(real[name], q.rest[name]):
                moved[name] = real[name].detach().clone()
        return moved


def gather(q: QModel, model: nn.Module, items: Sequence[Batch], vnni: bool) -> Evidence:
    """Run both networks over the data. Raises `InputError` where they cannot run or be compared."""
    own, _ = watched(replace(q, activations={}).module, q.rest, items)
    bad = bad_batches(q, own, len(items))
    good = [item for i, item in enumerate(items) if i not in bad]
    network = source(q, model, good)
    learn, held = parts(good, getattr(network, "whole", False))
    if not learn or not held:
        raise InputError(
            f"{sum(map(len, good))} examples are too few to diagnose with: every third makes the cures, the others judge them"
        )
    own, stats = watched(replace(q, activations={}).module, q.rest, learn)
    real, _ = watched(network.module, {}, learn)
    wanted = outputs(model, held)
    before = apart(held, wanted, outputs(as_computed(q, vnni), held))
    fixed = known_ranges(q.structure, find_sites(q.structure)) if isinstance(q.structure, Graph) else {}
    return Evidence(q, model, network, real, own, stats, fixed, learn, held, wanted, before, kind_of(held, wanted), vnni, bad)


def parts(items: Sequence[Batch], whole: bool) -> tuple[list[Batch], list[Batch]]:
    """(what cures are made from, what judges them): every third example and the others; batches where these must stay whole."""
    if whole:
        return list(items[::3]), [item for i, item in enumerate(items) if i % 3]
    learn: list[Batch] = []
    held: list[Batch] = []
    start = 0
    for batch in items:
        making = torch.arange(start, start + len(batch)) % 3 == 0
        start += len(batch)
        for chosen, into in ((making, learn), (~making, held)):
            if bool(chosen.any()):
                into.append(batch.take(chosen.nonzero()[:, 0]))
    return learn, held


def source(q: QModel, model: nn.Module, items: Sequence[Batch]) -> Network:
    """The float network as `quantize` would take it, equalized where ``q`` was."""
    notes: list[Note] = []
    network = find_network(model, [bare(item) for item in items], notes)
    if isinstance(network, GraphNetwork) and any(n.text.startswith("equalization kept") for n in q.notes):
        network = GraphNetwork(equalize(network.graph)[0], notes)
    return network


def watched(module: nn.Module, rest: Mapping[str, Tensor], items: Sequence[Batch]) -> tuple[dict[str, Seen], dict[str, Stats]]:
    """What passes through a network: by value, and by site as calibration counts it, the constants of ``rest`` included."""
    structure = getattr(module, "structure", None)
    graph = structure if isinstance(structure, Graph) else None
    nodes = {node.name: node for node in graph.nodes} if graph else {}
    sites = {name: site for site, names in find_sites(graph).origin.items() for name in names} if graph else {}
    own: dict[str, Seen] = {}
    stats: dict[str, Stats] = {}
    share = max(16, SAMPLE // max(1, len(items)))

    def note(name: str, value: Tensor) -> None:
        if not value.is_floating_point() or not value.numel():
            return
        own.setdefault(name, Seen(channel_axis(nodes.get(name), value))).take(value, share)
        site = sites.get(name) if graph else name
        if site is not None:
            stats.setdefault(site, Stats()).update(value)

    for name in graph.constants if graph else ():
        if name in sites and name in rest:
            note(name, rest[name])
    with torch.no_grad(), watching(module, note):
        for item in items:
            run(module, bare(item))
    return own, stats


def channel_axis(node: Node | None, value: Tensor) -> int:
    """The axis along which the channels of a value lie, as far as its rank and its maker tell."""
    if value.ndim == 4 or (node is not None and node.op in ("conv", "conv_transpose", "batch_norm") and value.ndim == 3):
        return 1
    return value.ndim - 1


#: A batch is bad if its largest input is so many times what the largest of others usually is, and sites beyond the first follow.
BAD = 4.0


def bad_batches(q: QModel, own: Mapping[str, Seen], count: int) -> tuple[int, ...]:
    """Batches whose extremes lie far off the others', at an input of the network; at most a quarter of them."""
    if count < 4:
        return ()
    names = list(q.structure.inputs) if isinstance(q.structure, Graph) else list(own)[:1]
    found: set[int] = set()
    for name in names:
        seen = own.get(name)
        if seen is None or len(seen.largest) != count:
            continue
        largest = torch.tensor(seen.largest, dtype=torch.float64)
        found |= set((largest > BAD * largest.median()).nonzero().flatten().tolist())
    return tuple(sorted(found)) if 4 * len(found) <= count else ()
