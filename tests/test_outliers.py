"""Real models with outliers that leave the float outputs alone: W8A8 collapses, and transforms bring it back."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_data
from measure import CASES, _draw, _network
from outliers import cnn_outliers, lm_outliers
from torch import nn

import roundel as rd
from roundel.data import Batch
from roundel.evaluate import predictions
from roundel.graph import GraphModule
from roundel.transforms import absorb, equalize, rotate, smooth
from roundel.transforms.channels import find_channels, scaled_graph

pytestmark = needs_data


def answers(module: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return predictions(module(*batch.args))


def close(real: nn.Module, other: nn.Module, batch: Batch, share: float = 1e-4) -> None:
    wanted, got = answers(real, batch), answers(other, batch)
    assert float((wanted - got).abs().max()) <= share * float(wanted.abs().max())


def kl(
    model: nn.Module, real: nn.Module, data: list[Batch], score: list[Batch], weights: str, activations: str, ranges: str
) -> float:
    q = rd.quantize(model, weights, activations, data=data, ranges=ranges)
    found = rd.evaluate(q, against=real, data=score, latency=False, layers=False).kl
    assert found is not None
    return found


@pytest.mark.proves("transforms.equal", "transforms.outliers")
@pytest.mark.parametrize("name", ["ResNet-20", "DS-CNN", "KWT-1"])
def test_real_graphs_compute_what_they_did(name: str) -> None:
    case = CASES[name]
    pool = case.calibrate()[:8]
    network = _network(case.model(), case, pool[0])
    assert isinstance(network, GraphModule)
    batch = _draw(pool, 1)[0]
    channels = find_channels(network.graph)
    assert channels.count - 1 == {"ResNet-20": 400, "DS-CNN": 576, "KWT-1": 768}[name]
    factor = 10 ** (4 * torch.rand(channels.count, generator=torch.Generator().manual_seed(0)) - 2)
    close(network, GraphModule(scaled_graph(network.graph, channels, factor)), batch)
    for made, notes in (equalize(network), equalize(network, streams=True), absorb(network, [batch]), rotate(network, [batch]),
                        smooth(network, [batch], grid=(0.5, 1.0))):  # fmt: skip
        assert isinstance(made, GraphModule)
        assert not any("undone" in note.text for note in notes)
        close(network, made, batch)


@pytest.mark.proves("transforms.outliers")
@pytest.mark.parametrize("weights", ["int8", "int8/tensor"])
def test_ds_cnn_comes_back_from_a_collapse(weights: str) -> None:
    case = CASES["DS-CNN"]
    pool = case.calibrate()
    network = _network(case.model(), case, pool[0])
    assert isinstance(network, GraphModule)
    data, score = _draw(pool, 1), [batch.take(torch.arange(0, len(batch), 2)) for batch in case.score()]
    bad = GraphModule(cnn_outliers(network.graph)).eval()
    close(network, bad, score[0])
    found = [kl(net, network, data, score, weights, "int8", "minmax") for net in (network, bad, equalize(bad)[0])]
    assert found[1] > 1.0
    assert found[2] < 1.2 * found[0]


@pytest.mark.proves("transforms.outliers", "transforms.modules")
def test_stories260k_comes_back_from_a_collapse() -> None:
    case = CASES["stories260K"]
    model, data, score = case.model(), list(case.calibrate())[:6], list(case.score())[:6]
    short = [Batch((batch.args[0][:, :96],)) for batch in data]
    bad = lm_outliers(model, short)
    close(model, bad, score[0])
    even, _ = smooth(bad, short, "int8", "int8/token:dynamic", grid=(0.5, 0.7, 1.0))
    close(model, even, score[0])
    turned, notes = rotate(bad, short)
    assert "a residual stream of 64 channels is rotated" in notes[0].text
    close(model, turned, score[0])
    ways = [(model, "int8", "minmax"), (bad, "int8", "minmax")]
    found = [kl(net, model, short, score, "int8", activations, ranges) for net, activations, ranges in ways]
    assert found[1] > 20 * found[0]
    tokens = [kl(net, model, short, score, "int8", "int8/token:dynamic", "mse") for net in (model, bad, even, turned)]
    assert tokens[1] > 5 * tokens[0]
    assert tokens[2] < 1.5 * tokens[0]
