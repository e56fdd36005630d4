"""Function-preserving outliers in real models, and what the transforms bring back of W8A8; prints Markdown and judges nothing.

python scripts/outliers.py cnn --model DS-CNN      ReLU pairs rescaled per channel, log-uniform in 1e-2..1e2
python scripts/outliers.py lm                      gains of norms up to 100 times larger, the weights that read them smaller
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click
import torch
from measure import CASES, _draw, _network
from torch import nn

import roundel as rd
from roundel.data import Batch
from roundel.graph import Graph, GraphModule
from roundel.transforms import absorb, equalize, rotate, smooth
from roundel.transforms.channels import find_channels
from roundel.transforms.networks import channels_of, rescaled, tensors_of


def cnn_outliers(graph: Graph, seed: int = 0, streams: bool = False) -> Graph:
    """Every channel that one layer alone makes (with ``streams``, every channel) times its own factor, log-uniform in 1e-2..1e2."""
    channels = find_channels(graph)
    factor = 10 ** (4 * torch.rand(channels.count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2)
    return rescaled(graph, channels, torch.where(channels.single() | streams, factor, 1.0))[0]


def lm_outliers(module: nn.Module, data: Sequence[Batch], seed: int = 0) -> nn.Module:
    """A copy in which one in twenty gains of norms is larger by a factor from 10 to 100 (log-uniform), the weights that read it
    smaller."""
    channels, _ = channels_of(module, data)
    tensors, draw = tensors_of(module), torch.Generator().manual_seed(seed)
    norms = torch.zeros(channels.count, dtype=torch.bool)
    for place in channels.made:
        norms[place.index] |= tensors[place.name].ndim == 1 and f"{place.layer}.input" not in {r.site for r in channels.readers}
    norms &= channels.single()
    factor = 10 ** -(1 + torch.rand(channels.count, generator=draw, dtype=torch.float64))
    picked = norms & (torch.rand(channels.count, generator=draw) < 0.05)
    new, far = rescaled(module, channels, torch.where(picked, factor, 1.0), data)
    assert far < 1e-4
    return new


def _kl(
    model: Any, real: nn.Module, score: Sequence[Batch], data: Sequence[Batch], weights: str, activations: str, ranges: str
) -> str:
    module = GraphModule(model).eval() if isinstance(model, Graph) else model
    q = rd.quantize(module, weights, activations, data=data, ranges=ranges)
    cost = rd.evaluate(q, against=real, data=score, latency=False, layers=False)
    return f"{cost.kl if cost.kl is not None else math.nan:.5f} ({cost.flips:.2%})"


def _table(nets: dict[str, Any], ways: Sequence[tuple[str, str, str]], real: nn.Module, score: Any, data: Any) -> None:
    click.echo("| KL (flips) | " + " | ".join(" ".join(way) for way in ways) + " |\n" + "|---" * (1 + len(ways)) + "|")
    for name, net in nets.items():
        click.echo(f"| {name} | " + " | ".join(_kl(net, real, score, data, *way) for way in ways) + " |")


@click.group(help=__doc__)
def cli() -> None:
    torch.set_num_threads(1)


@cli.command()
@click.option("--model", type=click.Choice(["ResNet-20", "DS-CNN"]), default="DS-CNN", show_default=True)
@click.option("--every", default=1, show_default=True, help="Score on every n-th example.")
@click.option("--seed", default=0, show_default=True)
def cnn(model: str, every: int, seed: int) -> None:
    """Equalization after outliers in a CNN, W8A8 static on every edge."""
    case = CASES[model]
    pool = case.calibrate()
    network = _network(case.model(), case, pool[0])
    assert isinstance(network, GraphModule)
    graph, data = network.graph, _draw(pool, 1)
    score = [batch.take(torch.arange(0, len(batch), every)) for batch in case.score()]
    bad = cnn_outliers(graph, seed)
    nets = {
        "untouched": graph,
        "outliers": bad,
        "untouched, equalized": equalize(graph)[0],
        "outliers, equalized": equalize(bad)[0],
    }
    nets["outliers, equalized, absorbed"] = absorb(nets["outliers, equalized"], data)[0]
    ways = [(weights, "int8", ranges) for weights in ("int8", "int8/tensor") for ranges in ("minmax", "mse")]
    _table(nets, ways, network, score, data)


@cli.command()
@click.option("--documents", default=20, show_default=True, help="As many calibrate as score.")
@click.option("--seed", default=0, show_default=True)
def lm(documents: int, seed: int) -> None:
    """Smoothing, rotation and per-token activations after outliers in stories260K."""
    case = CASES["stories260K"]
    model, data, score = case.model(), list(case.calibrate())[:documents], list(case.score())[:documents]
    bad = lm_outliers(model, data, seed)
    nets = {"untouched": model, "outliers": bad}
    for activations in ("int8", "int8/token:dynamic"):
        nets[f"outliers, smoothed for {activations}"] = smooth(bad, data, "int8", activations)[0]
    nets["outliers, rotated"] = rotate(bad, data)[0]
    nets["outliers, rotated, smoothed"] = smooth(nets["outliers, rotated"], data, "int8", "int8")[0]
    ways = [("int8", "int8", "minmax"), ("int8", "int8", "mse"), ("int8", "int8/token:dynamic", "mse")]
    _table(nets, ways, model, score, data)


if __name__ == "__main__":
    cli()
