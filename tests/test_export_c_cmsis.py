"""Calls into CMSIS-NN: a stand-in of naive loops everywhere, the real one where ROUNDEL_CMSIS_NN names its folder."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cmsis_nn import differing, flags, library
from conftest import DATA
from integer_graphs import Drawing, draw
from real_models import ds_cnn, resnet20_q
from test_export_c import STRICT, compare, feed

from roundel import CheckError, lower
from roundel.exporters.c.emit import either, emit
from roundel.exporters.c.project import simulated, write
from roundel.graph import Graph, Node, Spec
from roundel.runtimes import hostc, qemu

STAND_IN = Path(__file__).parent / "cmsis_nn"
SINGLE = {"R1": [], "R2": ["-DCMSIS_NN_USE_SINGLE_ROUNDING"]}
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))


def drawn(rounding: str) -> tuple[Graph, dict[str, str]]:
    """Weighted layers side by side; by name, part of the reason for which CMSIS-NN does not take one, or nothing."""
    made = Drawing(np.random.default_rng(11), rounding)
    factor = made.factor

    def bounded(reach: float, count: int | None = None) -> tuple[Any, Any]:
        multiplier, shift = factor(reach, count)
        return multiplier, np.maximum(shift, -30)  # -31 is refused

    setattr(made, "factor", bounded)  # noqa: B010
    x, flat, signed = made.input(8, 9, 7), made.input(3, 20), made.input(5, 1, 12)
    ends: dict[str, str] = {}
    place = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1]}
    for stride, padding, dilation in (
        ([1, 1], [1, 1, 1, 1], [1, 1]),
        ([2, 1], [0, 1, 1, 0], [1, 1]),
        ([1, 2], [2, 2, 0, 0], [2, 2]),
    ):
        way = {"stride": stride, "padding": padding, "dilation": dilation}
        ends[made.weighted("conv", x, made.codes(6, 8, 3, 2), "int8", groups=1, **way)] = ""
        ends[made.weighted("conv", x, made.codes(6, 4, 2, 3), "int8", groups=2, **way)] = ""
        ends[made.weighted("conv", x, made.codes(8, 1, 3, 3), "int8", groups=8, **way)] = "reads past" if stride == [1, 2] else ""
        ends[made.weighted("conv", x, made.codes(16, 1, 2, 3), "int8", groups=8, **way)] = ""
    ends[made.weighted("conv", x, made.codes(5, 8, 1, 1), "int8", groups=1, **place | {"padding": [0] * 4})] = ""
    ends[made.weighted("conv", x, made.codes(5, 8, 1, 1), "int8", groups=1, **place | {"padding": [0] * 4, "stride": [2, 2]})] = ""
    row = place | {"padding": [0, 3, 0, 0]}
    ends[made.weighted("conv", signed, made.codes(4, 5, 1, 4), "int8", groups=1, **row)] = "differs by more than one place"
    ends[made.weighted("conv", signed, made.codes(4, 5, 1, 4), "int8", groups=1, **row | {"padding": [1, 2, 0, 0]})] = ""
    ends[made.weighted("linear", flat, made.codes(7, 20), "int8")] = ""
    ends[made.weighted("linear", flat, made.codes(7, 20) // 32, "int4")] = "packed"
    for v in ends:
        made.nodes.append(Node("dequantize", (v,), (f"{v}.real",), {"scale": 0.5, "zero": 0}))
        made.values[f"{v}.real"] = Spec(made.values[v].shape)
    outputs = tuple(f"{v}.real" for v in ends)
    return Graph(tuple(made.inputs), outputs, tuple(made.nodes), made.constants, made.values, opset="integer"), ends


@needs_cc
@pytest.mark.proves("c.cmsis-nn")
@pytest.mark.parametrize("rounding", SINGLE)
def test_calls_get_the_right_arguments(rounding: str, tmp_path: Path) -> None:
    """Drawn layers and random graphs through naive loops of CMSIS-NN's signatures: every value equals `simulate`."""
    graphs = [drawn(rounding)[0], *(draw(seed, rounding) for seed in range(3000, 3012))]
    sources = [emit(graph, f"g{i}") for i, graph in enumerate(graphs)]
    assert sum(len(source.cmsis.sent) for source in sources if source.cmsis) > 16
    command = ["gcc", *STRICT, *SANITIZE, "-DROUNDEL_CMSIS_NN", *SINGLE[rounding], "-isystem", str(STAND_IN)]
    (tmp_path / "nn.c").write_text((STAND_IN / "arm_nnfunctions.c").read_text())
    hostc.compile_(["gcc", "-std=c99", *SANITIZE, *SINGLE[rounding], "-isystem", str(STAND_IN), "-c", "nn.c"], tmp_path)
    program = hostc.build(sources, tmp_path, [*command, "nn.o"])
    for i, (graph, source) in enumerate(zip(graphs, sources)):
        codes = feed(graph)
        raw = hostc.execute([str(program), str(i)], hostc.inputs_of(source, codes))
        compare(graph, hostc.values(source, graph, codes, raw), simulated(graph, codes))


@pytest.mark.proves("c.cmsis-nn")
@pytest.mark.parametrize("rounding", [*SINGLE, "R3"])
def test_what_stays_says_why(rounding: str) -> None:
    graph, ends = drawn(rounding)
    made = emit(graph).cmsis
    if rounding == "R3":
        assert made is None
        assert "CMSIS" not in emit(graph).code + emit(graph).header
        return
    assert made is not None
    assert made.rounding == rounding
    for name, why in ends.items():
        assert (name in made.sent) == (not why), name
        assert why in made.kept.get(name, "")
    kept = emit(lower(ds_cnn("cb16/channel")[0])).cmsis if DATA.is_dir() else None
    assert kept is None  # indices into a table all


@needs_cc
@pytest.mark.proves("c.cmsis-nn")
def test_other_roundings_never_pass(tmp_path: Path) -> None:
    """A build whose flags differ does not compile; a library that was compiled otherwise stops the first run."""
    graph = drawn("R2")[0]
    source, codes = emit(graph), feed(graph)
    hidden = ["gcc", "-std=c99", "-DROUNDEL_CMSIS_NN", "-isystem", str(STAND_IN)]
    with pytest.raises(CheckError, match="compile it and CMSIS-NN with -DCMSIS_NN_USE_SINGLE_ROUNDING"):
        hostc.build([source], tmp_path, [*hidden, str(STAND_IN / "arm_nnfunctions.c")])
    hostc.compile_(["gcc", "-c", "-isystem", str(STAND_IN), str(STAND_IN / "arm_nnfunctions.c"), "-o", "nn.o"], tmp_path)
    program = hostc.build([source], tmp_path, [*hidden, *SINGLE["R2"], "nn.o"])
    with pytest.raises(CheckError, match="ended with status"):
        hostc.execute([str(program), "0"], hostc.inputs_of(source, codes))


@needs_cc
@pytest.mark.proves("c.cmsis-nn")
def test_one_folder_serves_both(tmp_path: Path) -> None:
    """Without the macro nothing of it is compiled; with it in some files alone, nothing links."""
    written = write(None, drawn("R1")[0], tmp_path / "fw")
    note = next(note.text for note in written.notes if note.subject == "cmsis-nn")
    assert "15 of 18 weighted layers" in note
    assert "without CMSIS_NN_USE_SINGLE_ROUNDING" in note
    assert "reads past" in note
    command = ["gcc", "-std=c99", "-isystem", str(STAND_IN), "-c"]
    hostc.compile_([*command, "-DROUNDEL_CMSIS_NN", "fw.c"], written.folder)
    hostc.compile_([*command, "-DFW_WATCH=fw_watch", "main.c"], written.folder)
    with pytest.raises(CheckError, match="fw_run"):
        hostc.compile_(["gcc", "fw.o", "main.o", str(STAND_IN / "arm_nnfunctions.c"), "-isystem", str(STAND_IN)], written.folder)


def test_two_texts_as_one() -> None:
    assert either(["a"], ["a"]) == ["a"]
    assert either(["a", "b"], ["c"]) == ["#if defined(ROUNDEL_CMSIS_NN)", "a", "b", "#else", "c", "#endif"]


if (SOURCE := os.environ.get("ROUNDEL_CMSIS_NN")) is not None:  # the user's own; CI has none

    @pytest.mark.proves("c.cmsis-nn")
    @pytest.mark.parametrize("rounding", SINGLE)
    @pytest.mark.parametrize("name", ["qemu-cortex-m3", "qemu-cortex-m4", "qemu-cortex-m55"])
    def test_the_real_one_on_boards(name: str, rounding: str, tmp_path: Path) -> None:
        """Drawn layers, random graphs, DS-CNN and ResNet-20: 0 codes differ."""
        graphs: list[Any] = [drawn(rounding)[0], *(draw(seed, rounding) for seed in range(3100, 3124))]
        graphs += [lower(ds_cnn()[0], rounding), lower(resnet20_q()[0], rounding)]
        built = library(Path(str(SOURCE)).resolve(), rounding, name, tmp_path)
        options = ("-O2", "-DROUNDEL_CMSIS_NN", *flags(Path(str(SOURCE)).resolve(), rounding, tmp_path))
        for i, graph in enumerate(graphs):
            source, codes = emit(graph), feed(graph, 1)
            if source.cmsis is None or (i > 24 and name == "qemu-cortex-m3"):
                continue
            elf = qemu.link([source], tmp_path, name, options, libraries=["-Wl,--gc-sections", built])
            wrong, total = differing(graph, source, codes, elf, name)
            print(f"{name}, {rounding}: {len(source.cmsis.sent)} calls, {wrong} of {total:,} codes differ")
            assert not wrong
