"""The C exporter on this machine: random graphs against `simulate`, roundings, arena, layout, names, the folder."""

import errno
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integer_graphs import draw
from torch import Tensor, nn

import roundel as rd
from roundel import CheckError, InputError, PlanError
from roundel.exporters.c.arena import Call, plan
from roundel.exporters.c.calls import Kernel, planes
from roundel.exporters.c.emit import _Texts, emit, filled, identifier, printable
from roundel.exporters.c.layout import Place, lay, regrouped
from roundel.exporters.c.memory import from_memory, to_memory
from roundel.exporters.c.project import examples, simulated, write
from roundel.graph import Graph, Node, Spec
from roundel.integer.dialect import INTEGER, RULES
from roundel.runtimes import hostc

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")


def feed(graph: Graph, count: int = 4, seed: int = 1) -> dict[str, Any]:
    """Random codes for the inputs of a graph."""
    rng = np.random.default_rng(seed)
    doors = [node for node in graph if node.op == "quantize"]
    return {d.inputs[0]: rng.integers(d.attrs["low"], d.attrs["high"] + 1, (count, *graph.values[d.name].shape[1:])) for d in doors}


def compare(graph: Graph, got: dict[str, Any], want: dict[str, Any]) -> int:
    """How many codes were compared; every value must equal."""
    total = 0
    for node in graph:
        if node.op != "dequantize":
            assert got[node.name].shape == want[node.name].shape, (node.op, node.name)
            wrong = np.count_nonzero(got[node.name] != want[node.name])
            assert not wrong, f"{wrong} of {want[node.name].size} codes of {node.name} ({node.op}) differ: {node.attrs}"
            total += want[node.name].size
    return total


VARIANTS = {
    "gcc -O0": ["gcc", "-O0"],
    "gcc -O2": ["gcc", "-O2"],
    "gcc -O3": ["gcc", "-O3"],
    "clang -O2": ["clang", "-O2"],
    "sanitizers": ["gcc", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


@pytest.mark.proves("c.random")
@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.soak)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_graphs_equal_simulate(variant: str, count: int, tmp_path: Path) -> None:
    """Graphs in one program: every operation at ties, extreme zero points, shift limits, saturation, all four roundings."""
    command = VARIANTS[variant]
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    first = 1000 + count * list(VARIANTS).index(variant)
    graphs = [draw(seed, INTEGER[seed % 4]) for seed in range(first, first + count)]
    sources = [emit(graph, f"g{i}") for i, graph in enumerate(graphs)]
    program = hostc.build(sources, tmp_path, [*command, *STRICT])
    total = 0
    for i, (graph, source) in enumerate(zip(graphs, sources)):
        codes = feed(graph)
        raw = hostc.execute([str(program), str(i)], hostc.inputs_of(source, codes))
        total += compare(graph, hostc.values(source, graph, codes, raw), simulated(graph, codes))
    assert total > 400 * count


def test_random_graphs_hold_every_kernel() -> None:
    """What the drawing covers, so that the tests above mean something."""
    from roundel.exporters.c.calls import KERNELS

    seen = {node.op for seed in range(1000, 1120) for node in draw(seed, "R2")}
    assert seen >= {*KERNELS, "reshape", "transpose"} - {"embedding"}  # that is in test_export_c_wide.py


# -- roundings --------------------------------------------------------------------------------------------------------


@needs_cc
@pytest.mark.proves("c.rounding")
@pytest.mark.parametrize("rule", INTEGER)
def test_rounding_in_c(rule: str, tmp_path: Path) -> None:
    """The C of each rule against its definition: every shift, ends, ties, random numbers."""
    rng = np.random.default_rng(0)
    n = 40_000
    shift = rng.integers(-31, 31, n)
    reach = (2**31 - 1) >> np.maximum(shift, 0)
    sums = (rng.integers(-(2**31), 2**31, n) * rng.choice([1.0, 1e-3, 1e-6], n)).astype(np.int64)
    sums = np.clip(np.where(rng.random(n) < 0.2, rng.choice([-(2**31), 2**31 - 1, 0, 1, -1], n), sums), -reach, reach)
    multiplier = np.where(
        rng.random(n) < 0.5, rng.choice([1 << 30, 3 << 29, 2**31 - 1, 0, -(1 << 30)], n), rng.integers(1 << 30, 2**31, n)
    )
    texts = _Texts()
    texts.include(f"round_{rule}", {"R": rule})
    program = (
        "#include <stdint.h>\n#include <stdio.h>\n"
        + "\n".join(texts.parts)
        + f"""
int main(void)
{{
    int32_t a[3];
    while (fread(a, 4, 3, stdin) == 3) {{
        const int32_t y = rescale_{rule}(a[0], a[1], a[2]);
        fwrite(&y, 4, 1, stdout);
    }}
    return 0;
}}
"""
    )
    (tmp_path / "r.c").write_text(program)
    hostc.compile_([str(hostc.compiler()), "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "r.c", "-o", "r"], tmp_path)
    out = hostc.execute([str(tmp_path / "r")], np.stack([sums, multiplier, shift], 1).astype(np.int32).tobytes())
    assert np.array_equal(np.frombuffer(out, np.int32), RULES[rule](sums, multiplier, shift))


# -- constants and names ----------------------------------------------------------------------------------------------


def test_planar_weights() -> None:
    """Weight i of int4 lies in byte i % 4 of its word, in the lower half for the first four; of int2, two bits for each four."""
    rows = np.arange(-8, 8).reshape(1, 16)
    letters, packed = planes(rows, "int4")
    assert letters == "s4"
    word = packed.view(np.uint8).reshape(2, 4)
    low, high = word & 15, word >> 4
    codes = np.concatenate([low, high], 1).reshape(-1).astype(int)
    assert np.array_equal(np.where(codes > 7, codes - 16, codes), rows[0])
    letters, packed = planes(np.array([[-2, -1, 0, 1] * 4]), "int2")
    assert (letters, packed.view(np.uint8).tolist()) == ("s2", [[0b10101010, 0b11111111, 0, 0b01010101]])
    assert planes(np.ones((2, 5), int), "int8")[1].shape == (2, 8)
    assert planes(np.ones((1, 3), int), "int3")[0] == "s4"


HOSTILE = [
    "*/ int main;",
    'a"b\\',
    "new\nline",
    "??/",
    "//",
    "",
    "ünïcode \u202e",
    "x" * 10_000,
    "int",
    "#include <evil>",
    "%s%n",
    "$(rm)",
]


def renamed(graph: Graph, names: list[str]) -> Graph:
    """The same graph under other value names."""
    made = [node.name for node in graph if node.op not in ("quantize", "dequantize")]
    new = {old: f"{names[i % len(names)]}" + (f" {i}" if i >= len(names) or not names[i] else "") for i, old in enumerate(made)}
    nodes = tuple(
        Node(n.op, tuple(new.get(i, i) for i in n.inputs), tuple(new.get(o, o) for o in n.outputs), n.attrs) for n in graph
    )
    return replace(graph, nodes=nodes, values={new.get(k, k): v for k, v in graph.values.items()})


@needs_cc
@pytest.mark.proves("c.names")
def test_hostile_names_make_no_hostile_c(tmp_path: Path) -> None:
    graph = renamed(draw(1012, "R2"), HOSTILE)
    source = emit(graph, '"; system("')
    code = source.code + source.header
    assert code.isascii()
    assert "evil" not in re.sub(r"/\*.*?\*/", "", code, flags=re.S)
    assert "??" not in code
    assert "\\\n" not in re.sub(r"^#define.*", "", code)
    codes = feed(graph)
    program = hostc.build([source], tmp_path, ["gcc", "-O1", *STRICT])
    raw = hostc.execute([str(program), "0"], hostc.inputs_of(source, codes))
    compare(graph, hostc.values(source, graph, codes, raw), simulated(graph, codes))
    assert len(max(code.splitlines(), key=len)) < 200


@pytest.mark.parametrize("text", [*HOSTILE, "main", "golden", "9lives", "a-b c"])
def test_identifiers(text: str) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]{0,40}", identifier(text))
    assert identifier(text) not in ("main", "golden", "stdint")
    assert "*/" not in printable(text)


def test_letters() -> None:
    assert filled("static void f_X_Y_R(const X *x, Y *y) { dot_X_W(x); XY; }", {"X": "s8", "Y": "u8", "R": "R2", "W": "s4"}) == (
        "static void f_s8_u8_R2(const int8_t *x, uint8_t *y) { dot_s8_s4(x); XY; }"
    )


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_name_every_node() -> None:
    graph = draw(1013, "R2")
    nodes = list(graph.nodes)
    bad = [Node("embedding", ("x0.codes", "i", "i", "i", "i"), (name,), {}) for name in ("first", "second")]
    values = {**graph.values, **dict.fromkeys(("first", "second"), graph.values["x0.codes"]), "i": Spec((2, 17), "int32")}
    constants = {**graph.constants, "i": torch.ones(2, 17, dtype=torch.int32)}
    broken = Graph(graph.inputs, graph.outputs, (nodes[0], *bad, *nodes[1:]), constants, values, opset="integer")
    with pytest.raises(PlanError, match=r"2 nodes.*\n.*first \(embedding\): its weights are indices into 17.*\n.*second"):
        emit(broken)
    with pytest.raises(PlanError, match=r"roundel\.lower"):
        emit(Graph(("x",), ("y",), (Node("relu", ("x",), ("y",)),)))


def test_wrong_codes_are_refused() -> None:
    graph = draw(1012, "R2")
    source = emit(graph)
    with pytest.raises(InputError, match="no codes are given"):
        hostc.inputs_of(source, {})
    codes = feed(graph)
    with pytest.raises(InputError, match="the network takes"):
        hostc.inputs_of(source, {"x0": codes["x0"][:, :1]})
    with pytest.raises(InputError, match="does not hold"):
        hostc.inputs_of(source, {"x0": codes["x0"] + 9999})


# -- arena ------------------------------------------------------------------------------------------------------------


def random_calls(rng: np.random.Generator) -> tuple[dict[str, int], list[Call], list[str], list[str]]:
    sizes = {"in": int(rng.integers(1, 500))}
    calls, made = [], ["in"]
    for i in range(int(rng.integers(1, 14))):
        reads = tuple({made[-1 - int(rng.integers(min(len(made), 3)))] for _ in range(int(rng.integers(1, 3)))})
        name = f"v{i}"
        sizes[name] = int(rng.choice([sizes[reads[0]], rng.integers(1, 1000)]))
        over = reads[0] if rng.random() < 0.6 else None
        calls.append(Call(reads, name, over, int(rng.integers(0, 99)), int(rng.integers(0, 50))))
        made.append(name)
    return sizes, calls, ["in"], [made[-1], *([made[1]] if rng.random() < 0.3 else [])]


@pytest.mark.proves("c.arena")
def test_arena_never_overlaps_what_lives() -> None:
    """120 random programs, run over real bytes: what each call reads is still what was written."""
    for seed in range(120):
        rng = np.random.default_rng(seed)
        sizes, calls, inputs, outputs = random_calls(rng)
        arena = plan(sizes, calls, inputs, outputs)
        memory = np.zeros(arena.nbytes, np.int64)
        tags = {name: i + 1 for i, name in enumerate(sizes)}

        def at(name: str, arena: Any = arena, sizes: Any = sizes) -> slice:
            return slice(arena.offsets[name], arena.offsets[name] + sizes[name])

        memory[at("in")] = tags["in"]
        for i, call in enumerate(calls):
            scratch = call.shared if i in arena.inplace else call.apart
            memory[arena.scratch[i] : arena.scratch[i] + scratch] = -1
            for name in call.reads:
                assert (memory[at(name)] == tags[name]).all(), (seed, i)
            keep = [name for name in call.reads if i not in arena.inplace or name != call.over]
            memory[at(call.makes)] = tags[call.makes]
            for name in keep:
                assert (memory[at(name)] == tags[name]).all(), (seed, i)
            assert all(memory[arena.scratch[i] : arena.scratch[i] + scratch] == -1), (seed, i)
        for name in outputs:
            assert (memory[at(name)] == tags[name]).all()
        assert arena.nbytes >= arena.bound
        assert all(offset % 4 == 0 for offset in arena.offsets.values())
        assert plan(sizes, calls, inputs, outputs) == arena


def test_arena_by_hand() -> None:
    """100 -> 60 over it -> 80 apart: the bound is 60 + 80, and 100 fits into that."""
    calls = [Call(("a",), "b", "a"), Call(("b",), "c")]
    arena = plan({"a": 100, "b": 60, "c": 80}, calls, ["a"], ["c"])
    assert (arena.bound, arena.nbytes, arena.inplace) == (140, 140, {0})
    assert arena.offsets["a"] == arena.offsets["b"]
    kept = plan({"a": 100, "b": 60, "c": 80}, [Call(("a",), "b", "a"), Call(("b", "a"), "c")], ["a"], ["c"])
    assert kept.inplace == frozenset()
    assert kept.bound == 240


# -- layout -----------------------------------------------------------------------------------------------------------


def test_reshapes_that_move_nothing() -> None:
    """Wherever `regrouped` gives an order, memory read in it is what NumPy's reshape gives."""
    found = 0
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        sizes = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 6], int(rng.integers(1, 5))))
        order = tuple(rng.permutation(len(sizes)).tolist())
        flat = int(np.prod(sizes))
        divisors = [d for d in range(1, flat + 1) if flat % d == 0]
        one = int(rng.choice(divisors))
        two = int(rng.choice([d for d in divisors if (flat // one) % d == 0]))
        target = tuple(rng.permutation([one, two, flat // one // two, 1]).tolist())
        memory = np.arange(flat)
        logical = memory.reshape([sizes[a] for a in order]).transpose([order.index(a) for a in range(len(sizes))])
        new = regrouped(Place("x", sizes, order, "int8"), target)
        if new is None:
            continue
        found += 1
        seen = memory.reshape([target[a] for a in new]).transpose([new.index(a) for a in range(len(target))])
        assert np.array_equal(seen, logical.reshape(target)), (sizes, order, target)
    assert found > 500


def test_memory_and_back() -> None:
    graph = draw(1024, "R2")
    source = emit(graph)
    codes = simulated(graph, feed(graph))
    for port in source.watched:
        if port.name in codes:
            raw = to_memory(port, codes[port.name]).view(np.uint8).reshape(4, -1)
            assert np.array_equal(from_memory(port, raw, graph.values[port.name].shape), codes[port.name])


def test_an_unknown_size_is_refused() -> None:
    door = Node("quantize", ("x",), ("x.codes",), {"scale": 1.0, "zero": 0, "low": -128, "high": 127})
    values = {"x": Spec(("N", "T", 4)), "x.codes": Spec(("N", "T", 4), "int8")}
    with pytest.raises(PlanError, match="'T', which firmware must know"):
        lay(Graph(("x",), ("x.codes",), (door,), {}, values, opset="integer"))


# -- the folder -------------------------------------------------------------------------------------------------------


@needs_cc
@pytest.mark.proves("c.project")
def test_the_folder_builds_and_passes(tmp_path: Path) -> None:
    graph = draw(1034, "R1")
    written = write(None, graph, tmp_path / "fire ware")
    assert written.checked
    assert set(written.files) == {"fire_ware.c", "fire_ware.h", "golden.h", "main.c", "Makefile", "CMakeLists.txt", "README.md"}
    assert written.arena >= written.bound
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # those of a make around the tests
    done = subprocess.run(["make", "test"], cwd=written.folder, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.rstrip().endswith("PASS")
    assert done.stdout.count(" ok\n") == len(emit(graph).watched)
    if shutil.which("cmake"):
        steps = [["-S", ".", "-B", "build"], ["--build", "build", "--target", "fire_ware_self_test"]]
        for step in steps:
            subprocess.run(["cmake", *step], cwd=written.folder, capture_output=True, check=True)
        assert subprocess.run(["build/fire_ware_self_test"], cwd=written.folder, capture_output=True).returncode == 0


@needs_cc
def test_a_wrong_constant_fails_the_self_test(tmp_path: Path) -> None:
    graph = draw(1034, "R1")
    written = write(None, graph, tmp_path / "fw")
    code = (written.folder / "fw.c").read_text()
    (written.folder / "fw.c").write_text(re.sub(r"(_bias\[\d+\] = \{\n\s*)(-?\d+)", lambda m: m[1] + str(int(m[2]) + 70_000), code))
    done = subprocess.run(["make", "test"], cwd=written.folder, capture_output=True, text=True)
    assert done.returncode
    assert "WRONG" in done.stdout
    assert "FAIL" in done.stdout


@needs_cc
def test_nothing_is_left_when_the_self_test_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from roundel.exporters.c import project

    monkeypatch.setattr(project, "checksums", lambda graph, source, codes: [0] * len(source.watched))
    with pytest.raises(CheckError, match="a mistake in Roundel"):
        write(None, draw(1034, "R1"), tmp_path / "fw")
    assert not (tmp_path / "fw").exists()


def test_the_same_bytes_again(tmp_path: Path) -> None:
    one, two = emit(draw(1018, "R3"), "net"), emit(draw(1018, "R3"), "net")
    assert (one.code, one.header) == (two.code, two.header)


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        write(None, draw(1018, "R3"), tmp_path / "taken")


@needs_cc
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth file does not fit: no new file is there, old ones are as they were, and a folder that was made is gone."""
    old = write(None, draw(1018, "R3"), tmp_path / "fw")
    before = {file: (old.folder / file).read_bytes() for file in old.files}
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) % 4 == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for folder in (tmp_path / "fw", tmp_path / "new" / "deep"):
        with pytest.raises(InputError, match=r"cannot write firmware into .*No space left"):
            write(None, draw(1034, "R1"), folder)
    assert {file.name: file.read_bytes() for file in old.folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


@needs_cc
@pytest.mark.parametrize("name", ["deep/er", "new\nline", "x" * 200, "ünï code", "*"])
def test_odd_folders_are_fine(name: str, tmp_path: Path) -> None:
    assert write(None, draw(1018, "R3"), tmp_path / name, name="a/b").checked
    assert {file.name for file in (tmp_path / name).iterdir()} >= {"a_b.c", "a_b.h"}


@needs_cc
@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "file/below"])
def test_folders_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write firmware into"):
        write(None, draw(1018, "R3"), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@needs_cc
def test_a_folder_in_a_files_place(tmp_path: Path) -> None:
    (tmp_path / "fw" / "main.c").mkdir(parents=True)
    with pytest.raises(InputError, match=r"main\.c is a folder there"):
        write(None, draw(1018, "R3"), tmp_path / "fw")
    assert [file.name for file in (tmp_path / "fw").iterdir()] == ["main.c"]


@needs_cc
def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write into one, so the refusal is played."""
    from roundel.exporters.c import project

    (tmp_path / "fw").mkdir(mode=0o500)
    open_ = project.tempfile.TemporaryDirectory

    def beside(*args: Any, dir: Any = None, **named: Any) -> Any:
        if dir is not None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_(*args, **named)

    monkeypatch.setattr(project.tempfile, "TemporaryDirectory", beside)
    with pytest.raises(InputError, match="Permission denied"):
        write(None, draw(1018, "R3"), tmp_path / "fw")


def test_examples_are_drawn_within_the_doors() -> None:
    graph = draw(1018, "R3")
    door = graph.nodes[0]
    codes = examples(graph)["x0"]
    assert codes.min() >= door.attrs["low"]
    assert codes.max() <= door.attrs["high"]


def test_kernel_of_scalars() -> None:
    assert Kernel("fill", {"X": "s8"}, ("y",), {}).scalars is None


@needs_cc
@pytest.mark.proves("c.freestanding")
def test_no_library_and_no_float(tmp_path: Path) -> None:
    """On x86-64: no symbol from outside but what compilers call unasked, no float type or literal in the text."""
    for seed in range(1000, 1004):
        source = emit(draw(seed, INTEGER[seed % 4]), "net")
        code = re.sub(r"/\*.*?\*/", "", source.code, flags=re.S)
        assert not re.search(r"\b(float|double|malloc|calloc|free|printf|long)\b|\d\.\d", code)
        assert set(re.findall(r"#include .*", code)) == {'#include "net.h"'}
        (tmp_path / "net.c").write_text(source.code)
        (tmp_path / "net.h").write_text(source.header)
        hostc.compile_([str(hostc.compiler()), "-std=c99", "-O2", "-mno-sse", "-ffreestanding", "-c", "net.c"], tmp_path)
        listed = subprocess.run(["nm", "-u", "net.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
        assert set(listed) - {"U"} <= {"memcpy", "memset"}


class Positions(nn.Module):
    """Adds a table of fewer axes than the values."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.table(torch.arange(6)))


def test_a_constant_of_fewer_axes(tmp_path: Path) -> None:
    x = torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(0))
    found = rd.verify(rd.quantize(Positions().eval(), "int8", "int8", data=[x]), ["host-c"], [x[:8]])["host-c"]
    if found.absent:
        pytest.skip(found.why or "")
    assert found.exact, str(found)
