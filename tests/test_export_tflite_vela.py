"""Exported .tflite files through Vela: DS-CNN and ResNet-20 lie whole on an Ethos-U55; what does not is named with its reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import needs_data
from test_export_tflite import ds_cnn, quantized, renamed, resnet
from torch import Tensor, nn

import roundel as rd
from roundel.errors import PlanError
from roundel.graph import Graph
from roundel.qmodel import QModel
from roundel.runtimes import vela

needs_vela = pytest.mark.skipif(vela.absent() is not None, reason=f"{vela.absent()}")


@needs_vela
@needs_data
@pytest.mark.proves("export.vela")
@pytest.mark.parametrize("network", [ds_cnn, resnet])
def test_real_networks_lie_whole_on_the_npu(network: Callable[[], tuple[QModel, Graph, Tensor]], tmp_path: Path) -> None:
    q, graph, _ = network()
    placed = vela.place(q, graph, tmp_path)
    assert placed.total >= 12
    assert placed.off == ()


@needs_vela
@pytest.mark.proves("export.vela")
def test_an_operator_off_the_npu_is_named(tmp_path: Path) -> None:
    """A stride of 5; the names beside it are no obstacle."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=5, groups=8))
    q = renamed(
        quantized(module.eval(), torch.randn(8, 3, 20, 20), weights="int4")[0], {"0": "first' \nReason: none", "1": "wide'\n"}
    )
    placed = vela.place(q, rd.lower(q, "R1"), tmp_path)
    ((op, result, why),) = placed.off
    assert (op, result) == ("DEPTHWISE_CONV_2D", "wide'\n")
    assert "stride" in why
    assert placed.total == 2


@needs_vela
def test_an_accelerator_that_is_not(tmp_path: Path) -> None:
    q, graph = quantized(nn.ReLU(), torch.randn(4, 8), weights=None)
    with pytest.raises(PlanError, match="there is no accelerator 'u99' here; there are vela-ethos-u55,"):
        vela.place(q, graph, tmp_path, "u99")
