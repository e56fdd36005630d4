"""Signal and noise at the sites that two networks share; it holds one batch of values at a time."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..calibrate import run
from ..data import Batch
from ..errors import InputError, PlanError
from ..graph import Graph, GraphModule
from ..network.capture import capture
from ..network.fuse import fuse
from ..network.watch import watching
from ..qmodel import QModel
from .scores import decibel


def live(model: QModel | nn.Module) -> nn.Module:
    """The network that runs; `PlanError` for anything else."""
    if not isinstance(model, QModel | nn.Module):
        raise PlanError(f"a model is a QModel or a torch.nn.Module, got {type(model).__name__}; load or read it first")
    return model.module if isinstance(model, QModel) else model


class Sites:
    """Signal and noise at the sites of two networks, of one batch at a time.

    A quantized graph is fused, and a fused layer keeps its name while its value has become another. So its float counterpart is
    fused likewise, and only values that equal nodes make are compared.
    """

    def __init__(self, reference: nn.Module | None, same: set[str] | None, note: str = "") -> None:
        self.reference, self.same, self.note = reference, same, note
        self.held: dict[str, deque[Tensor]] = defaultdict(deque)
        self.sums: dict[str, list[float]] = {}
        self.seen: tuple[set[str], set[str]] = (set(), set())
        self.first = True

    @classmethod
    def between(cls, q: QModel | nn.Module, against: QModel | nn.Module, batch: Batch) -> Sites:
        """The float counterpart of ``q`` and the sites to be compared."""
        wanted, given, module = _graph(q), _graph(against), live(against)
        if wanted is None:
            return cls(None, None)
        if given is None or not _equal(wanted, given) >= {name for node in wanted for name in node.outputs}:
            if isinstance(against, QModel):
                return cls(None, set(), "the two models are different graphs: no layers were compared")
            try:
                graph = fuse(module.graph if isinstance(module, GraphModule) else capture(module, batch.named or batch.args))
            except InputError as err:
                return cls(None, set(), f"the float model cannot be captured as a graph ({err}): no layers were compared")
            return cls(GraphModule(graph).eval(), _equal(wanted, graph))
        return cls(None, _equal(wanted, given))

    def run(self, real: nn.Module, quantized: nn.Module, batch: Batch) -> tuple[Any, Any]:
        """Both outputs; on the way, what the float sites give waits for the quantized ones."""
        self.held.clear()
        with watching(self.reference or real, self._keep):
            out = run(self.reference or real, batch)
        if self.reference is not None:
            out = run(real, batch)
        with watching(quantized, self._compare):
            result = run(quantized, batch)
        self.held.clear()
        self.first = False
        return out, result

    def _keep(self, site: str, value: Tensor) -> None:
        name = _layer(site, value)
        if name is not None and (self.first or name in self.sums):
            self.seen[0].add(name)
            if self.same is None or name in self.same:
                self.held[name].append(value.detach().clone())  # in-place layers write over it

    def _compare(self, site: str, value: Tensor) -> None:
        name = _layer(site, value)
        if name is None:
            return
        self.seen[1].add(name)
        kept = self.held.get(name)
        if not kept or kept[0].shape != value.shape:
            return
        real = kept.popleft()
        sums = self.sums.setdefault(name, [0.0, 0.0])
        for i, part in enumerate((real, real - value.detach())):
            sums[i] += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2

    def sqnr(self) -> dict[str, float]:
        return {name: decibel(*sums) for name, sums in self.sums.items()}

    def skipped(self) -> int:
        return len((self.seen[0] | self.seen[1]) - self.sums.keys())

    def notes(self) -> Iterator[str]:
        """Why nothing was compared, if so."""
        if self.note:
            yield self.note


def _layer(site: str, value: Tensor) -> str | None:
    """The name under which a site's value is compared: a layer's output has the layer's; its input is another's output."""
    if site == "input" or site.endswith(".input") or not value.is_floating_point():
        return None
    return site.removesuffix(".output")


def _graph(model: QModel | nn.Module) -> Graph | None:
    found = getattr(model, "structure", None)
    return found if isinstance(found, Graph) else None


def _equal(one: Graph, other: Graph) -> set[str]:
    """Values that equal nodes of both make from equally named values; the attributes may have been through JSON."""
    plain = [{node.name: msgspec.json.encode(node, order="sorted") for node in graph} for graph in (one, other)]
    return {out for node in one if plain[0][node.name] == plain[1].get(node.name) for out in node.outputs} | set(one.inputs)
