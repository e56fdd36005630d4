"""Exported .tflite files of other formats than int8: fewer bits, tables, 16-bit activations; and what no TFLite computes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export_tflite import (
    any_weights,
    assert_tflm_equal,
    at_doors,
    captured,
    case,
    child,
    differing,
    further,
    image,
    in_this_process,
    quantized,
    simulated,
)  # fmt: skip
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.errors import CheckError, PlanError
from roundel.exporters.tflite import Written, write
from roundel.graph import Graph, GraphModule, Node
from roundel.integer import in_dialect
from roundel.integer.check import accumulators
from roundel.integer.dialect import quantize_multiplier
from roundel.qmodel import QModel
from roundel.readers._tflite_file import read_file
from roundel.runtimes import litert, tflm

__all__ = ["in_this_process"]  # the fixture is for every test here too


# -- weights of fewer bits, negative scales -----------------------------------------------------------------------------


@pytest.mark.proves("export.tflite.int4")
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        *((name, "int4") for name in ("conv", "conv-1d", "conv-depthwise", "linear", "mlp")),
        *((name, "int4/tensor") for name in ("conv-depthwise", "mlp")),
        ("conv-depthwise", "int2"),
        ("mlp", "int6"),
    ],
)
def test_narrow_weights(name: str, weights: str, tmp_path: Path) -> None:
    """4 bits stay packed, two codes in a byte, and scales of either sign compute; other widths are widened. All of it is told."""
    q, graph, inputs = case(name, weights)
    assert weights != "int4" or all((tensor.params.scale < 0).any() for tensor in q.tensors.values())
    written = write(q, graph, tmp_path / "w.tflite")
    kinds = {name: "INT4" if weights.startswith("int4") else "INT8" for name in q.tensors}
    if (name, weights) == ("mlp", "int4/tensor"):
        kinds["0.weight"] = "INT8"  # its one scale is negative
    assert weight_types(q, written) == kinds
    told = {note.subject for note in written.notes}
    assert told == {n for n, tensor in q.tensors.items() if kinds[n] == "INT8" or (tensor.params.scale < 0).any()}
    widened = write(q, graph, tmp_path / "w.tflite", widen=True)
    assert weight_types(q, widened) == dict.fromkeys(q.tensors, "INT8")
    assert {note.subject for note in widened.notes} == set(q.tensors)
    assert min(scale for tensor in read_file(widened.path).tensors for scale in tensor.scale) > 0
    x = [4 * x for x in inputs]
    if weights == "int4" and "l" in name[:2]:
        with pytest.raises(CheckError, match="TFLite Micro refuses"):
            assert_tflm_equal(q, graph, tmp_path, *x)
    else:
        assert_tflm_equal(q, graph, tmp_path, *x)
    reference = in_dialect(graph, litert.dialects("litert-ref"))
    want = simulated(reference, *x)
    assert differing(litert.run(q, graph, at_doors(graph, want), tmp_path, "litert-ref"), want) == {}


def weight_types(q: QModel, written: Written) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in read_file(written.path).tensors if tensor.name in q.tensors}


@pytest.mark.proves("export.tflite.codebook")
@pytest.mark.parametrize("weights", ["fp4/channel", "ternary", "log4"])
def test_tables_of_whole_levels_are_written_out(weights: str, tmp_path: Path) -> None:
    q, graph, (x,) = case("conv", weights)
    assert len(graph.nodes[1].inputs) == 6  # a table
    written = write(q, graph, tmp_path / "w.tflite")
    assert [(note.subject, note.text) for note in written.notes] == [
        ("weight", f"its uint{q.tensors['weight'].format.bits} indices are written out as int8")
    ]
    assert_tflm_equal(q, graph, tmp_path, 4 * x)


def test_finer_tables_are_refused(tmp_path: Path) -> None:
    q, graph, _ = case("conv", "nf4/channel")
    with pytest.raises(PlanError, match=r"conv \(conv\): its weights are a table of levels finer than int8"):
        write(q, graph, tmp_path / "w.tflite")


# -- 16-bit activations -------------------------------------------------------------------------------------------------


def sixteen(module: nn.Module, *inputs: Tensor, weights: str | None = "int8") -> tuple[QModel, Graph]:
    """The model in symmetric int16, which is what TFLite's kernels take."""
    torch.set_num_threads(1)
    q = rd.quantize(module.eval(), weights, "int16s", data=[Batch(inputs, {}, None)], ranges="minmax")
    return q, rd.lower(q, "R1")


@pytest.mark.proves("export.tflite.int16x8")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_int16_activations(weights: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 9, 9)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(200, 5))
    q, graph = sixteen(module, x, weights=weights)
    want = assert_tflm_equal(q, graph, tmp_path, 4 * x)
    assert want["4"].min() == -(2**15) or want["2"].min() == -(2**15)  # the type's own end, where no format of them reaches
    file = read_file(tmp_path / "model.tflite")
    assert {t.type for t in file.tensors if t.name.endswith(".bias")} == {"INT64"}
    assert {t.type for t in file.tensors if t.name.endswith(".weight")} == {"INT8"}  # no kernel takes int4 here
    for kernels in litert.KERNELS:
        got = litert.run(q, graph, at_doors(graph, want), tmp_path, kernels)
        assert set(differing(got, want)) <= {"4"}  # its linear layers keep 31 bits of the multiplier and round once
        assert np.abs(got["4"] - want["4"]).max() <= 1


#: Cases that TFLite Micro computes in int16 too.
IN_SIXTEEN = [
    "conv-grouped", "transposed-cut", "matmul", "mul", "sum", "relu6", "max-pool", "slice", "concat", "pad-other", "nearest",
]  # fmt: skip


@pytest.mark.proves("export.tflite.int16x8")
@pytest.mark.parametrize("name", IN_SIXTEEN)
def test_int16_operation_equals_tflite_micro(name: str, tmp_path: Path) -> None:
    real, inputs = captured()[name]
    q, graph = sixteen(GraphModule(real), *inputs, weights="int8" if any_weights(real) else None)
    assert_tflm_equal(q, graph, tmp_path, *map(further, inputs))


@pytest.mark.parametrize("op", ["add", "sub"])
def test_int16_sums_of_two_gain_as_many_bits_as_tflites(op: str, tmp_path: Path) -> None:
    """15 before they meet; a graph whose operands gain 14, as those with zero points must, is refused."""
    torch.manual_seed(0)
    inputs = 3 * torch.randn(64, 12), torch.randn(64, 12) + 1
    q, graph = sixteen(GraphModule(captured()[op][0]), *inputs, weights=None)
    one, two, door = graph.nodes[:2], graph.nodes[2], graph.nodes[3]
    a, b, y = (float(n.attrs["scale"]) for n in (*one, door))
    for left in (14, 15):
        factors = quantize_multiplier([a / (2 * max(a, b)), b / (2 * max(a, b)), 2 * max(a, b) / (2.0**left * y)])
        attrs = {**two.attrs, "left": left, "multiplier": factors[0].tolist(), "shift": factors[1].tolist()}
        made = Node(two.op, two.inputs, two.outputs, attrs)
        made = Node(two.op, two.inputs, two.outputs, {**attrs, "acc": list(accumulators(graph, made) or ())})
        changed = replace(graph, nodes=(*one, made, door))
        if left == 15:
            assert_tflm_equal(q, changed, tmp_path, *(4 * x for x in inputs))
        else:
            with pytest.raises(PlanError, match="its operands gain 14 bits before they meet; TFLite's int16 gain 15"):
                write(q, changed, tmp_path / "m.tflite")


def test_what_tflite_computes_otherwise_in_int16_is_refused(tmp_path: Path) -> None:
    q, graph = sixteen(nn.Sigmoid(), torch.randn(64, 12), weights=None)
    with pytest.raises(PlanError, match=r"sigmoid \(table\): TFLite's functions of int16 have tables of their own"):
        write(q, graph, tmp_path / "m.tflite")


@child
def test_tflite_micro_dying_is_an_error_like_any(tmp_path: Path) -> None:
    """Its softmax ends the process where a sum of 3,000 terms overflows; this one goes on."""
    torch.manual_seed(0)
    q, graph = quantized(nn.Softmax(-1), x := torch.randn(4, 3000), weights=None)
    with pytest.raises(CheckError, match="TFLite Micro ended by signal 6 while it ran the exported file"):
        tflm.run(q, graph, at_doors(graph, simulated(graph, 4 * x)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.tflite"]


@pytest.mark.parametrize("name", ["amax", "gather"])
@child
def test_what_tflite_micro_lacks_is_an_error_with_its_words(name: str, tmp_path: Path) -> None:
    real, (x,) = captured()[name]
    q, graph = sixteen(GraphModule(real), x, weights="int8" if any_weights(real) else None)
    with pytest.raises(CheckError, match=r"TFLite Micro refuses the exported file: .*(REDUCE_MAX|GATHER)"):
        tflm.run(q, graph, at_doors(graph, simulated(graph, x)), tmp_path)


#: name -> (module, inputs, why not).
REFUSED: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...], str]]] = {
    "bilinear": lambda: (
        nn.UpsamplingBilinear2d(scale_factor=2), (image(),), r"\(resize\): TFLite's RESIZE_BILINEAR rounds in its operand's units",
    ),
    "groups": lambda: (nn.ConvTranspose2d(6, 6, 3, groups=2), (image(),), "TFLite's transposed convolution has no groups"),
    "norm": lambda: (nn.LayerNorm(12), (torch.randn(64, 12),), r"\(norm\): TFLite has no norm of these codes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_tflite_computes_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs, why = REFUSED[name]()
    q, graph = quantized(module.eval(), *inputs, weights="int8/tensor" if name == "groups" else None)
    with pytest.raises(PlanError, match=why):
        write(q, graph, tmp_path / "m.tflite")


def test_int8_sums_past_int32_are_refused(tmp_path: Path) -> None:
    """The graph adds them in int64, TFLite would not."""
    linear = nn.Linear(8, 2)
    with torch.no_grad():
        linear.weight *= 1e-6
        linear.bias.fill_(1e5)
    q, graph = quantized(linear, torch.randn(32, 8))
    assert graph.nodes[1].attrs["wide"]
    with pytest.raises(PlanError, match="its sums leave int32, in which TFLite adds products of int8"):
        write(q, graph, tmp_path / "m.tflite")
