"""The C exporter on boards that QEMU plays: random graphs and DS-CNN code for code, what does not fit, instruction counts."""

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needs_data
from integer_graphs import Drawing, draw
from real_models import ds_cnn, kwt1, resnet20_q
from test_export_c import compare, feed

from roundel import InputError, lower, simulate
from roundel.exporters.c.emit import emit
from roundel.exporters.c.project import simulated
from roundel.graph import Graph, Node, Spec
from roundel.integer.dialect import INTEGER
from roundel.runtimes import hostc, qemu

#: The boards of the ordinary run; the others are in the soak (`make verify-boards`).
NEAR = ("qemu-cortex-m4", "qemu-cortex-m55")
BOARDS = [name if name in NEAR else pytest.param(name, marks=pytest.mark.soak) for name in qemu.BOARDS]
SYSTEM = [board for name, board in zip(qemu.BOARDS, BOARDS) if qemu.BOARDS[name].machine]


def playable(name: str) -> None:
    if (why := qemu.absent(name)) is not None:
        pytest.skip(why)


@pytest.mark.proves("c.boards.random")
@pytest.mark.parametrize("name", SYSTEM)
def test_random_graphs_on_boards(name: str, tmp_path: Path) -> None:
    """One program runs them all: 4 on the smallest board and in the ordinary run, 12 elsewhere."""
    playable(name)
    count = 4 if name in ("qemu-cortex-m0", *NEAR) else 12
    graphs = [draw(seed, INTEGER[seed % 4]) for seed in range(2000, 2000 + count)]
    sources = [emit(graph, f"g{i}") for i, graph in enumerate(graphs)]
    elf = qemu.link(sources, tmp_path, name)
    codes = [feed(graph, 2) for graph in graphs]
    raw, _ = qemu.play(elf, b"".join(qemu.counted(s, hostc.inputs_of(s, c)) for s, c in zip(sources, codes)), name)
    total = 0
    for graph, source, given in zip(graphs, sources, codes):
        size = 2 * sum(port.nbytes for port in source.watched)
        total += compare(graph, hostc.values(source, graph, given, raw[:size]), simulated(graph, given))
        raw = raw[size:]
    assert not raw
    assert total > 1000


@pytest.mark.soak
@pytest.mark.proves("c.boards.random")
def test_random_graphs_on_aarch64(tmp_path: Path) -> None:
    """Which runs them as programs of Linux, one each."""
    playable(name := "qemu-aarch64")
    total = 0
    for seed in range(2000, 2012):
        graph = draw(seed, INTEGER[seed % 4])
        (folder := tmp_path / str(seed)).mkdir()
        total += compare(graph, qemu.run(None, graph, codes := feed(graph, 2), folder, name), simulated(graph, codes))
    assert total > 10_000


@pytest.mark.proves("c.boards.random")
@pytest.mark.parametrize("name", [*NEAR, pytest.param("qemu-cortex-m33", marks=pytest.mark.soak)])
def test_tails_of_vectors(name: str, tmp_path: Path) -> None:
    """int8 by int8 in depths and numbers of outputs that fill vectors and tiles, and that do not; in two roundings."""
    playable(name)
    for rounding in ("R2", "R1"):
        made = Drawing(np.random.default_rng(7), rounding)
        x, image = made.input(3, 70), made.input(19, 6, 5)
        ends = []
        for depth, outputs in ((1, 1), (15, 4), (16, 5), (17, 8), (31, 3), (64, 6), (70, 9)):
            part = made.emit("slice", [x], axis=-1, start=0, stop=depth, step=1)
            ends.append(made.weighted("linear", part, made.codes(outputs, depth), "int8"))
        place = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1]}
        for weight, groups in ((made.codes(19, 1, 3, 3), 19), (made.codes(6, 19, 2, 2), 1)):
            ends.append(made.weighted("conv", image, weight, "int8", groups=groups, **place))
        for v in ends:
            made.nodes.append(Node("dequantize", (v,), (f"{v}.real",), {"scale": 0.5, "zero": 0}))
            made.values[f"{v}.real"] = Spec(made.values[v].shape)
        outputs = tuple(f"{v}.real" for v in ends)
        graph = Graph(tuple(made.inputs), outputs, tuple(made.nodes), made.constants, made.values, opset="integer")
        folder = tmp_path / rounding
        folder.mkdir()
        codes = feed(graph, 2)
        compare(graph, qemu.run(None, graph, codes, folder, name), simulated(graph, codes))


@needs_data
@pytest.mark.proves("c.boards.ds-cnn")
@pytest.mark.parametrize("name", BOARDS)
def test_ds_cnn_on_boards(name: str, tmp_path: Path) -> None:
    """Five clips, every value."""
    playable(name)
    q, x = ds_cnn()
    graph = lower(q)
    want: dict[str, Any] = {}
    simulate(graph, x[:5], watch=want.__setitem__)
    got = qemu.run(q, graph, {"input_1": want["input_1.codes"]}, tmp_path, name)
    assert compare(graph, got, want) > 300_000


#: Larger networks, and the boards whose memories do not hold them.
LARGE = {"ResNet-20": (resnet20_q, {"qemu-cortex-m0"}), "KWT-1": (kwt1, {"qemu-cortex-m0", "qemu-cortex-m55"})}


@needs_data
@pytest.mark.soak
@pytest.mark.proves("c.boards.large")
@pytest.mark.parametrize("name", qemu.BOARDS)
@pytest.mark.parametrize("network", LARGE)
def test_larger_networks_on_boards(network: str, name: str, tmp_path: Path) -> None:
    """Five inputs, every value; or what the board lacks, before anything runs."""
    playable(name)
    make, small = LARGE[network]
    q, x = make()
    graph = lower(q)
    want: dict[str, Any] = {}
    simulate(graph, x[:5], watch=want.__setitem__)
    codes = {graph.inputs[0]: want[f"{graph.inputs[0]}.codes"]}
    if name in small:
        with pytest.raises(InputError, match=rf"does not fit {name}: \w+ needs [\d,]+ bytes, has [\d,]+") as err:
            qemu.run(q, graph, codes, tmp_path, name)
        print(err.value)
        return
    total = compare(graph, qemu.run(q, graph, codes, tmp_path, name), want)
    print(f"{network} on {name}: 0 of {total:,} codes differ")
    assert total > 1_500_000


@needs_data
@pytest.mark.proves("c.fit")
def test_what_does_not_fit_is_refused_before_it_runs(tmp_path: Path) -> None:
    playable("qemu-cortex-m0")
    q, x = resnet20_q()
    graph = lower(q)
    codes = {graph.inputs[0]: np.zeros((1, *x.shape[1:]), np.int64)}
    with pytest.raises(
        InputError, match=r"does not fit qemu-cortex-m0: flash needs [\d,]+ bytes, has 262,144; ram needs [\d,]+ bytes, has 16,384"
    ):
        qemu.run(q, graph, codes, tmp_path, "qemu-cortex-m0")
    assert not (tmp_path / "out").exists()


def test_an_unknown_board() -> None:
    with pytest.raises(InputError, match=r"there is no board 'qemu-z80'; there are qemu-cortex-m0"):
        qemu.absent("qemu-z80")


#: Instructions of DS-CNN's calls on a Cortex-M4, gcc 12 -O2; 2 % more is a regression to explain.
COUNTS = {"conv_0": 764_131, "conv_1": 513_703, "conv_2": 854_412, "avg_pool_9": 64_915, "linear_11": 2_706, "softmax_12": 540}


@needs_data
@pytest.mark.proves("c.instructions")
def test_instructions_on_m4(tmp_path: Path) -> None:
    """Pointwise convolutions at most 1.7 instructions per multiplication; no call more than 2 % above the count on record."""
    playable("qemu-cortex-m4")
    q, _ = ds_cnn()
    graph = lower(q)
    source = emit(graph)
    (counts,) = qemu.count(source, hostc.inputs_of(source, feed(graph, 1)), tmp_path)
    found = dict(zip((step.output for step in source.layout.steps), counts))
    print(", ".join(f"{name} {n:,}" for name, n in found.items()), f"in all {sum(counts):,}")
    assert found["conv_2"] <= 1.7 * 125 * 64 * 64
    for name, most in COUNTS.items():
        assert found[name] <= 1.02 * most, name


@needs_data
@pytest.mark.proves("c.instructions")
def test_helium_on_m55(tmp_path: Path) -> None:
    """Instructions per product with Helium's vectors, beside the same source without them: a third in pointwise convolutions."""
    playable("qemu-cortex-m55")
    source = emit(graph := lower(ds_cnn()[0]))
    sent, per = hostc.inputs_of(source, feed(graph, 1)), {}
    for word, options in (("Helium", ()), ("without", ("-U__ARM_FEATURE_MVE",))):
        (tmp_path / word).mkdir()
        (counts,) = qemu.count(source, sent, tmp_path / word, "qemu-cortex-m55", ("-O2", *options))
        found = dict(zip((step.output for step in source.layout.steps), counts))
        products = {"conv_0": 125 * 64 * 40, "conv_1": 125 * 64 * 9, "conv_2": 125 * 64 * 64, "linear_11": 64 * 12}
        per[word] = {name: found[name] / n for name, n in products.items()}
        print(word, ", ".join(f"{name} {n:.2f}" for name, n in per[word].items()), f"per product, in all {sum(counts):,}")
    one, other = per["Helium"], per["without"]
    assert one["conv_2"] <= 0.66
    assert one["conv_1"] <= 3.6
    assert one["conv_2"] <= other["conv_2"] / 2.5
    assert one["conv_1"] <= other["conv_1"] / 2
    assert one["linear_11"] <= other["linear_11"] / 3


@needs_data
@pytest.mark.proves("c.weights")
@pytest.mark.parametrize(
    "formats", [("cb16/channel",), pytest.param(("int8", "int4", "int2", "cb16/tensor", "cb16/channel"), marks=pytest.mark.soak)]
)
def test_narrow_weights_on_m4(formats: tuple[str, ...], tmp_path: Path) -> None:
    """DS-CNN in other weight formats: every value equal, and a pointwise convolution's instructions beside int8's."""
    playable("qemu-cortex-m4")
    found: dict[str, int] = {}
    for form in formats:
        q, _ = ds_cnn(form)
        graph = lower(q)
        want = simulated(graph, codes := {"input_1": feed(graph, 2)["input_1"]})
        folder = tmp_path / form.replace("/", " ")
        folder.mkdir()
        compare(graph, qemu.run(q, graph, codes, folder), want)
        source = emit(graph)
        counts = qemu.count(source, hostc.inputs_of(source, codes), folder)[0]
        tool = ["arm-none-eabi-size", "model.o"]
        size = subprocess.run(tool, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
        flash, arena = int(size[6]) + int(size[7]), source.arena.nbytes
        print(f"{form}: {flash:,} bytes of flash, arena {arena:,}, conv_2 {counts[2]:,} of {sum(counts):,}")
        found[form] = counts[2]
        if form.startswith("cb16"):
            assert arena <= 1.05 * source.arena.bound
            assert counts[2] <= 1.4 * COUNTS["conv_2"]
    assert found.get("int4", 0) <= 1.15 * COUNTS["conv_2"]
    assert found.get("int8", 0) <= 1.02 * COUNTS["conv_2"]


@needs_data
@pytest.mark.proves("c.freestanding")
def test_the_elf_holds_no_float_and_no_library(tmp_path: Path) -> None:
    """Compiled for a core with a float unit: no instruction of it, no float helper, nothing of a C library."""
    playable("qemu-cortex-m4")
    q, _ = ds_cnn()
    source = emit(lower(q), "kws")
    hard = ("-O2", "-mfloat-abi=softfp", "-mfpu=fpv4-sp-d16")
    elf = qemu.link([source], tmp_path, "qemu-cortex-m4", hard)
    listing = subprocess.run(
        ["arm-none-eabi-objdump", "-d", "kws.o"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"\tv(add|mul|sub|div|cvt|mla|fma|cmp)", listing)
    symbols = subprocess.run(["arm-none-eabi-nm", elf.name], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert not [n for n in names if re.match(r"__aeabi_[fd]|__.*(sf|df)\d$|malloc|printf|exit|_sbrk", n)]
    undefined = subprocess.run(["arm-none-eabi-nm", "-u", "kws.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert set(undefined.split()) - {"U"} <= {"memcpy", "memset", "watch", "__aeabi_llsl", "__aeabi_lasr", "__aeabi_ldivmod"}
