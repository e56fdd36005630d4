"""The two kinds of network that transforms take, behind the same functions: a graph (bare or in its module), or an ordinary
module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..calibrate import evaluating, one_thread, run
from ..data import Batch
from ..errors import InputError
from ..evaluate import predictions
from ..graph import Graph, GraphModule
from ..qmodel import Note
from .channels import Channels, find_channels, scaled_graph
from .probe import TOLERANCE, apart, probe_channels, stored

#: A `Graph`, a `GraphModule` or any other module; a transform gives back the kind it took.
Network = TypeVar("Network", bound=Graph | nn.Module)

#: Examples that a module is probed and proven with.
EXAMPLES = 4


def graph_of(network: Graph | nn.Module) -> Graph | None:
    return network.graph if isinstance(network, GraphModule) else network if isinstance(network, Graph) else None


def module_of(network: Graph | nn.Module) -> nn.Module:
    return GraphModule(network).eval() if isinstance(network, Graph) else network


def like(network: Network, graph: Graph) -> Network:
    """``graph`` as the kind of network that was given."""
    return GraphModule(graph).eval() if isinstance(network, GraphModule) else graph  # type: ignore[return-value]


def few(batches: Sequence[Batch], examples: int = EXAMPLES) -> Batch:
    """The first examples."""
    if not batches:
        raise InputError("a module's channels are found by running it: give at least one batch")
    first = batches[0]
    return first.take(torch.arange(examples)) if len(first) > examples else first


def channels_of(network: Graph | nn.Module, batches: Sequence[Batch], clips: bool = False) -> tuple[Channels, tuple[Note, ...]]:
    """The channels that can be scaled: read off a graph, found on a module by running it on ``batches``."""
    graph = graph_of(network)
    if graph is not None:
        return find_channels(graph, clips), ()
    assert isinstance(network, nn.Module)
    return probe_channels(network, few(batches))


def tensors_of(network: Graph | nn.Module) -> Mapping[str, Tensor]:
    """What a `Place` names."""
    graph = graph_of(network)
    if graph is not None:
        return graph.constants
    assert isinstance(network, nn.Module)
    return stored(network)


def rescaled(network: Network, channels: Channels, factor: Tensor, batches: Sequence[Batch] = ()) -> tuple[Network, float]:
    """A copy with its channels divided by ``factor`` (count,), and how far its outputs then lie from the old ones on the first
    examples of ``batches``, as a share of the largest; 0 without batches."""
    graph = graph_of(network)
    if graph is not None:
        new = like(network, scaled_graph(graph, channels, factor))
    else:
        new = copy.deepcopy(network)
        live = tensors_of(new)
        with torch.no_grad():
            for name, tensor in channels.scaled(live, factor).items():
                live[name].copy_(tensor)
    return new, distance(network, new, batches)


def distance(before: Graph | nn.Module, after: Graph | nn.Module, batches: Sequence[Batch]) -> float:
    """Largest difference of the first outputs on a few examples, as a share of the largest number; 0 without batches."""
    if not batches:
        return 0.0
    batch = few(batches)
    bare = replace(batch, target=None)
    outs = []
    for network in (before, after):
        module = module_of(network)
        with one_thread(), torch.no_grad(), evaluating(module):
            outs.append(predictions(run(module, bare)))
    return apart(*outs)


def proven(before: Network, after: Network, batches: Sequence[Batch], notes: Sequence[Note], what: str) -> tuple[Network, tuple[Note, ...]]:  # fmt: skip  # noqa: E501
    """``after`` if it computes what ``before`` does, with ``notes``; else ``before`` and a note that says so."""
    far = distance(before, after, batches)
    if far <= TOLERANCE:
        return after, tuple(notes)
    return before, (*notes, Note("model", f"{what} undone: the float outputs would differ by {far:.2g} of the largest"))
