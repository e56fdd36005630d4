"""`widen`: marks concatenations of parts of very different size, which one scale of 8 bits cannot serve; it changes no number."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from msgspec.structs import replace
from torch import Tensor

from ..calibrate import list_of_batches, run
from ..data import Batch
from ..graph import GraphModule
from ..network.sites import edges
from ..network.watch import watching
from ..qmodel import Note

#: Parts are unlike from this ratio of their reaches on: of 256 steps the smaller has 32 left.
UNLIKE = 8.0


def widen(network: GraphModule, data: Iterable[object]) -> tuple[GraphModule, tuple[Note, ...]]:
    """The same graph with ``fine`` on every concatenation whose parts' reaches, on ``data``, are 8 times apart or more: `quantize`
    gives their site 16 bits. A reach is the mean over examples of the largest magnitude.

    >>> from roundel import capture, fuse
    >>> class Head(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.cat([x * 100.0, torch.sigmoid(x)], 1)
    >>> graph, notes = widen(GraphModule(fuse(capture(Head(), torch.ones(2, 3)))), [torch.randn(8, 3)])
    >>> [node.op for node in graph.graph.nodes if node.attrs.get("fine")]
    ['concat']
    """
    joins = [node for node in network.graph.nodes if node.op == "concat" and not node.attrs.get("fine")]
    reaches: dict[str, list[Tensor]] = {name: [] for node in joins for name in edges(node)}

    def seen(name: str, value: Tensor) -> None:
        if name in reaches and value.is_floating_point() and value.numel():
            reaches[name].append(value.detach().abs().reshape(len(value), -1).amax(1))

    with torch.no_grad(), watching(network, seen):
        for batch in list_of_batches(data):
            run(network, Batch(batch.args, batch.named))
    told: dict[str, Note] = {}
    for node in joins:
        means = {name: float(torch.cat(reaches[name]).mean()) for name in edges(node) if reaches[name]}
        parts = {name: mean for name, mean in means.items() if mean > 0}
        most, least = max(parts, key=parts.__getitem__, default=""), min(parts, key=parts.__getitem__, default="")
        if parts and parts[most] >= UNLIKE * parts[least]:
            said = f"{most} reaches {parts[most]:.3g}, {least} {parts[least]:.3g}: one scale over both hides the smaller"
            told[node.name] = Note(node.name, said)
    if not told:
        return network, ()
    marked = (replace(node, attrs={**node.attrs, "fine": True}) if node.name in told else node for node in network.graph.nodes)
    return GraphModule(network.graph.with_nodes(marked)).eval(), tuple(told.values())
