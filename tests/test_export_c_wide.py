"""The C of wide sums (int64), of 16-bit codes and of embeddings, against `simulate`: on this machine and on boards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from integer_graphs import Drawing
from test_export_c import STRICT, compare, feed
from test_export_c_boards import playable
from torch import nn

import roundel as rd
from roundel import PlanError
from roundel.exporters.c.calls import KERNELS
from roundel.exporters.c.emit import emit, live
from roundel.exporters.c.layout import RENAMING
from roundel.exporters.c.project import simulated, write
from roundel.graph import Graph, Node, Spec
from roundel.integer.check import check_integer
from roundel.integer.dialect import INTEGER, quantize_wide
from roundel.integer.fixed import step_table
from roundel.integer.ops import INTEGER as OPS
from roundel.runtimes import hostc, qemu

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))

OUT = {"low": -(2**15), "high": 2**15 - 1, "rounding": "R2", "wide": True}


def long(made: Drawing, name: str, numbers: Any) -> str:
    """A constant of 64 bits."""
    made.constants[name] = torch.from_numpy(np.asarray(numbers, np.int64))
    made.values[name] = Spec(np.shape(numbers), "int64")
    return name


def weighted(made: Drawing, op: str, x: str, shape: tuple[int, ...], dtype: str, **attrs: Any) -> str:
    """A weighted operation whose biases leave int32; for ``dtype`` table, weights are indices into 16 levels for each row."""
    at, n, rng = f"w{len(made.nodes)}", shape[0], made.rng
    weight = made.codes(*shape, dtype="uint4" if dtype == "table" else dtype)
    table = rng.integers(-4095, 4096, (n, 16))
    entries = table[np.arange(n).reshape(-1, *[1] * (len(shape) - 1)), weight] if dtype == "table" else weight
    reach = np.abs(entries).reshape(n, -1).sum(1) * 2**15 + 2**33
    multiplier = np.where(rng.random(n) < 0.5, rng.integers(2**14, 2**15, n), rng.choice([2**14, 2**15 - 1, -(2**14), 0], n))
    shift = np.clip(31 - np.log2(reach).astype(int) + rng.integers(-3, 3, n), -15, 30)
    parts = [made.constant(f"{at}.weight", weight, "uint4" if dtype == "table" else dtype)]
    parts += [long(made, f"{at}.bias", rng.integers(-(2**33), 2**33, n)), made.constant(f"{at}.multiplier", multiplier)]
    parts += [made.constant(f"{at}.shift", shift)]
    parts += [made.constant(f"{at}.table", table)] if dtype == "table" else []
    return made.emit(op, [x, *parts], "int16", x_zero=made.zero(x), y_zero=int(rng.integers(-99, 99)), **attrs, **OUT)


def wide(seed: int) -> Graph:
    """Every operation with wide sums or 16-bit tables, from one input of 16 bits and one of ids."""
    made = Drawing(np.random.default_rng(seed), INTEGER[seed % 4])
    x = made.input(4, 5, 6, dtype="int16")
    made.inputs.append("ids")
    made.values["ids"] = Spec(("N", 3), "int32")
    place = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1]}
    point = place | {"padding": [0, 0, 0, 0]}
    small = made.emit("rescale", [x], x_zero=0, multiplier=1 << 30, shift=-6, y_zero=3, low=-128, high=127, rounding="R1")
    ends = [
        weighted(made, "conv", x, (3, 4, 3, 3), "int8", groups=1, **place),
        weighted(made, "conv", x, (6, 2, 3, 2), "int4", groups=2, **place),
        weighted(made, "conv", x, (4, 1, 3, 3), "int8", groups=4, **place),
        weighted(made, "conv", x, (4, 1, 3, 3), "table", groups=4, **place),
        weighted(made, "conv", x, (5, 4, 1, 1), "int2", groups=1, **point),
        weighted(made, "conv_transpose", x, (3, 4, 3, 1), "int8", groups=1, output_padding=[0, 0], **place | {"padding": [0, 0]}),
        weighted(made, "linear", x, (7, 6), "table"),
        weighted(made, "linear", small, (5, 6), "int8"),
    ]
    m, s = quantize_wide(made.rng.choice([1e-5, 1e-6]))
    zeros = {"a_zero": made.zero(x), "b_zero": made.zero(x), "y_zero": -7}
    ends.append(made.emit("matmul", [x, x], "int16", transpose_b=True, multiplier=int(m), shift=int(s), **zeros, **OUT))
    steps, unit = made.constant("steps", step_table()), float(made.rng.choice([1e-3, 1e-5]))
    multiplier, shift = (part.tolist() for part in quantize_wide([unit, 2.0**-15]))
    attrs = {"causal": bool(seed % 2), "reach": int((2**21 - 2**8) / unit), "bits": 15, "multiplier": multiplier, "shift": shift}
    zero = {"q_zero": -(2**15), "k_zero": -(2**15), "v_zero": made.zero(x)}
    ends.append(made.emit("attention", [x, x, x, steps], "int16", y_zero=0, **attrs, **zero, **OUT))
    parts = [made.constant("n.w", made.rng.integers(-(2**15), 2**15, 6)), long(made, "n.b", made.rng.integers(-(2**33), 2**33, 6))]
    m, s = quantize_wide(2.0**-17)
    scale = {"multiplier": int(m), "shift": int(s), "x_zero": 11, "y_zero": 0}
    ends.append(made.emit("norm", [x, *parts], "int16", centred=bool(seed % 3), eps=int(made.rng.choice([0, 9, 10**9])), bits=15,
                          **scale, **OUT))  # fmt: skip
    out = {"y_zero": -(2**15), "low": -(2**15), "high": 2**15 - 1, "rounding": made.rounding}
    for axis in (1, -1):
        reach = {"reach": int(made.rng.choice([40_000, 900])), "multiplier": 3 << 29, "shift": 5}
        ends.append(made.emit("softmax", [x, steps], "int16", axis=axis, bits=16, **reach, **out))
    lines = made.constant("lines", made.rng.choice([-(2**15), 2**15 - 1, 0, 77], 513))
    ends.append(made.emit("table", [x, lines], "int16", first=-(2**15), bits=7))
    for dtype in ("int8", "int4", "int2", "uint4"):
        rows, each = made.codes(9, 7, dtype=dtype), dtype != "int8"
        m, s = made.factor(2**7, 9 if each else 1)
        names = [made.constant(f"e.{dtype}", rows, dtype), made.constant(f"e.{dtype}.m", m), made.constant(f"e.{dtype}.s", s)]
        if dtype == "uint4":
            names.append(made.constant("e.table", made.rng.integers(-99, 99, (9, 16))))
        ends.append(made.emit("embedding", ["ids", *names], **made.out()))
    for v in ends:
        made.nodes.append(Node("dequantize", (v,), (f"{v}.real",), {"scale": 0.5, "zero": 0}))
        made.values[f"{v}.real"] = Spec(made.values[v].shape)
    outputs = tuple(f"{v}.real" for v in ends)
    graph = Graph(tuple(made.inputs), outputs, tuple(made.nodes), made.constants, made.values, opset="integer")
    check_integer(graph)
    return graph


def codes_of(graph: Graph, count: int) -> dict[str, Any]:
    """Ends and random codes, and ids."""
    codes = feed(graph, count)
    codes["x0"] = np.where(np.random.default_rng(3).random(codes["x0"].shape) < 0.2, [[[[-(2**15)]]]], codes["x0"])
    return codes | {"ids": np.random.default_rng(2).integers(0, 9, (count, 3))}


@needs_cc
@pytest.mark.proves("c.random")
@pytest.mark.parametrize("options", ["-O2", "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"])
def test_wide_sums_equal_simulate(options: str, tmp_path: Path) -> None:
    """Every operation with 64-bit sums, all weights, extreme zero points, biases past int32."""
    graphs = [wide(seed) for seed in range(3)]
    sources = [emit(graph, f"g{i}") for i, graph in enumerate(graphs)]
    program = hostc.build(sources, tmp_path, [str(hostc.compiler()), *options.split(), *STRICT])
    varied = 0
    for i, (graph, source) in enumerate(zip(graphs, sources)):
        codes = codes_of(graph, 3)
        want = simulated(graph, codes)
        raw = hostc.execute([str(program), str(i)], hostc.inputs_of(source, codes))
        compare(graph, hostc.values(source, graph, codes, raw), want)
        varied += sum(len(np.unique(want[node.name])) > 20 for node in graph if node.op not in ("quantize", "dequantize"))
    assert varied > 30


@pytest.mark.proves("c.random")
@pytest.mark.parametrize(
    "name", ["qemu-cortex-m4", *(pytest.param(n, marks=pytest.mark.soak) for n in qemu.BOARDS if "m4" not in n)]
)
def test_wide_sums_on_boards(name: str, tmp_path: Path) -> None:
    playable(name)
    graph = wide(5)
    codes = codes_of(graph, 1)
    if name == "qemu-cortex-m0":
        assert emit(graph).arena.nbytes < 16_000
    compare(graph, qemu.run(None, graph, codes, tmp_path, name), simulated(graph, codes))


class Every(nn.Module):
    """What the compatibility table found wrong once, side by side."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tables = (F.hardswish, torch.sigmoid, torch.tanh, F.gelu, F.silu, torch.exp)
        return (*(fn(x) for fn in tables), x.softmax(-1))


@pytest.mark.proves("c.random")
def test_codes_of_16_bits_are_exact_here_and_on_a_board() -> None:
    """Tables with lines and softmax of 16 bits: exact in both, never one thing here and another there."""
    torch.manual_seed(0)
    x = torch.randn(64, 4, 8)
    q = rd.quantize(Every().eval(), "float", "int16", data=[x])
    found = rd.verify(q, ("host-c", "qemu-cortex-m4"), [x[:5]])
    ran = [v for v in found.values() if not v.absent]
    assert ran
    assert all(v.exact and v.total == 5 * 7 * 32 for v in ran), list(map(str, found.values()))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(50, 16), nn.Embedding(6, 16), nn.Linear(16, 8)
        self.register_buffer("at", torch.arange(6)[None])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(ids) + self.places(self.at))


@needs_cc
@pytest.mark.proves("c.random")
@pytest.mark.parametrize(("weights", "activations"), [("int8", "int16"), ("int4", "int8"), ("cb16/channel", "int8")])
def test_embeddings(weights: str, activations: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (64, 6))
    q = rd.quantize(Words().eval(), weights, activations, data=[ids])
    found = rd.verify(q, ["host-c"], [ids[:8]])["host-c"]
    assert found.exact, str(found)
    assert found.total == 8 * 6 * (16 + 16 + 8)


@needs_cc
def test_an_id_that_is_none_reads_row_0(tmp_path: Path) -> None:
    """The C stays in its table; `simulate` refuses such ids."""
    graph = wide(1)
    codes = codes_of(graph, 2)
    bad = {**codes, "ids": np.where(np.arange(6).reshape(2, 3) % 2, 2**31 - 1, -1)}
    source = emit(graph)
    command = [str(hostc.compiler()), "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *STRICT]
    program = hostc.build([source], tmp_path, command)
    got = hostc.values(source, graph, bad, hostc.execute([str(program), "0"], hostc.inputs_of(source, bad)))
    compare(graph, got, simulated(graph, {**codes, "ids": np.zeros((2, 3), np.int64)}))


@needs_cc
def test_a_folder_with_ids(tmp_path: Path) -> None:
    assert write(None, wide(2), tmp_path / "words").checked


def test_every_integer_operation_has_a_kernel() -> None:
    assert {*OPS} - {"quantize", "dequantize", *RENAMING} == {*KERNELS}


def test_tables_that_c_does_not_take_are_refused() -> None:
    graph = wide(0)
    nodes = [Node(n.op, n.inputs, n.outputs, {**n.attrs, "bits": 15}) if n.op == "table" else n for n in graph]
    with pytest.raises(PlanError, match=r"C kernels draw lines over up to 2\^14"):
        emit(Graph(graph.inputs, graph.outputs, tuple(nodes), graph.constants, graph.values, opset="integer"))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("#if DSP_s64\nx\n#endif\ny", "y"),
        ("#if DSP_s32\nx\n#elif HELIUM_u8_s8_s32\ny\n#else\nz\n#endif", "#if DSP_s32\nx\n#else\nz\n#endif"),
        ("#if !DSP_s64 && !HELIUM_s8_s8_s32\nx\n#endif", "#if !HELIUM_s8_s8_s32\nx\n#endif"),
        ("#if !DSP_s64\nx\n#endif", "x"),
        ("#if HELIUM_R1_s8\n#if A\nx\n#endif\n#endif", ""),
    ],
)
def test_branches_that_no_compiler_takes(text: str, left: str) -> None:
    assert live(text) == left


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1), (1, 1)])
def test_transposed_kernels_of_one_row_in_simulate(kernel: tuple[int, int]) -> None:
    """A flipped axis of size 1 keeps its negative stride; the fast sums equal the definition."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 5, 5)
    graph = rd.lower(rd.quantize(nn.ConvTranspose2d(3, 2, kernel), "int8", "int8", data=[x]))
    fast, slow = (rd.simulate(graph, x, codes=True, fast=fast) for fast in (True, False))
    assert np.array_equal(fast, slow)
