"""Integer .tflite files read into integer graphs: Google's own against TFLite Micro, our exports against themselves, damage."""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, needs_data
from numpy.typing import NDArray
from test_export_tflite import CASES, case
from tflite_micro.python.tflite_micro import runtime

import roundel as rd
from roundel.errors import InputError
from roundel.exporters.tflite import Written, write
from roundel.exporters.tflite.draft import Draft
from roundel.graph import Graph
from roundel.integer.ops import quantize
from roundel.readers import read_integer

KWS = DATA / "mlperf_kws" / "kws_ref_model.tflite"
CLIPS = DATA / "speech_commands_v2_test" / "shared_mfcc49x10_f16.npz"

Ints = NDArray[np.int64]


def tflite_micro(path: Path, codes: Ints) -> Ints:
    interpreter = runtime.Interpreter.from_file(str(path), arena_size=1 << 20)
    rows = []
    for row in codes.astype(np.int8):
        interpreter.set_input(row[None], 0)
        interpreter.invoke()
        rows.append(interpreter.get_output(0).astype(np.int64))
    return np.concatenate(rows)


@needs_data
@pytest.mark.proves("read.tflite.integer")
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_googles_ds_cnn_equals_tflite_micro(step: int) -> None:
    """On every 8th clip, or on all."""
    graph, clips = rd.read_integer(KWS), np.load(CLIPS)
    x = clips["x"][::step].astype(np.float32)[..., None]
    ours = np.concatenate([rd.simulate(graph, part, codes=True) for part in np.split(x, range(64, len(x), 64))])
    theirs = tflite_micro(KWS, quantize(x, **graph.nodes[0].attrs))
    assert ours.shape == theirs.shape == (len(range(0, 2445, step)), 12)
    assert np.count_nonzero(ours != theirs) == 0
    assert 0.9 < (ours.argmax(1) == clips["y"][::step]).mean() < 0.95
    assert all(node.attrs.get("rounding", "R1") == "R1" for node in graph)


# -- our own files ------------------------------------------------------------------------------------------------------


def exported(name: str, path: Path, weights: str = "int8") -> tuple[Graph, Written, tuple[torch.Tensor, ...]]:
    q, graph, inputs = case(name, weights)
    return graph, write(q, graph, path), tuple(4 * x for x in inputs)


#: Exported files whose tables are not read back.
UNREAD = {
    **dict.fromkeys(["sigmoid", "gate"], "LOGISTIC"), "tanh": "TANH",
    **dict.fromkeys(["gelu", "hardswish", "prelu", "prelu-2d", "leaky"], "CAST"),
    **dict.fromkeys(["embedding", "token-net", "gather", "gather-channels"], "GATHER"),
    **dict.fromkeys([f"transposed{kind}" for kind in ("", "-same", "-cut", "-odd", "-dilated", "-1d")], "TRANSPOSE_CONV"),
    **dict.fromkeys(["nearest", "nearest-odd"], "RESIZE_NEAREST_NEIGHBOR"),
    **dict.fromkeys(["shuffle", "shuffle-one"], "DEPTH_TO_SPACE"),
    **dict.fromkeys(["matmul", "matmul-turned", "scores"], "BATCH_MATMUL"),
    **dict.fromkeys(["argmax", "argmax-keep"], "ARG_MAX"), **dict.fromkeys(["amax", "amax-channels"], "REDUCE_MAX"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_operators_without_a_row_are_named(name: str, tmp_path: Path) -> None:
    _, written, _ = exported(name, tmp_path / "m.tflite")
    with pytest.raises(InputError, match=rf"operators that have no integer definition here: .*{UNREAD[name]} \(1\)"):
        read_integer(written.path)


@pytest.mark.proves("read.tflite.integer")
@pytest.mark.parametrize("name", [name for name in CASES if name not in UNREAD])
def test_an_exported_file_reads_back_to_the_same_codes(name: str, tmp_path: Path) -> None:
    graph, written, inputs = exported(name, tmp_path / "m.tflite", "int4" if "depthwise" in name else "int8")
    again = read_integer(written.path)
    given = [x.permute(place.order) for x, place in zip(inputs, written.inputs.values(), strict=True)]
    (place,) = written.outputs.values()
    assert np.array_equal(rd.simulate(again, *given, codes=True), rd.simulate(graph, *inputs, codes=True).transpose(place.order))


# -- what is refused ----------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("mlperf_kws/kws_ref_model_float32.tflite", "activations are int8 with one scale here"),
        ("kwt1/kwt1.tflite", "operators that have no integer definition here: "),
        ("kwt1/no such file", "cannot be read"),
        ("README.md", "not a .tflite file"),
    ],
)
def test_other_files_are_refused(path: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        read_integer(DATA / path)


@needs_data
def test_read_of_an_integer_file_tells_where_its_integers_are() -> None:
    with pytest.raises(InputError, match=r"already quantized: .*, or take its integers as they are: roundel.read_integer\(path\)$"):
        rd.read(KWS)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    _, written, _ = exported("linear", tmp_path / "m.tflite")
    whole = written.path.read_bytes()
    scale = np.float32(case("linear")[0].activations["input"].params.scale.item()).tobytes()
    assert whole.count(scale) == 1
    for bad in (np.nan, np.inf, 0, -1):
        written.path.write_bytes(whole.replace(scale, np.float32(bad).tobytes()))
        with pytest.raises(InputError, match="which is no int8 quantization"):
            read_integer(written.path)


def test_one_constant_read_by_many_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """A file of one megabyte whose hundred layers share their weights would be a hundred megabytes."""
    draft = Draft()
    at = {"scale": (0.5,), "zero": 0}
    values = [draft.tensor(f"x{i}", "INT8", (1, 1000), **at) for i in range(101)]
    weight = draft.constant("w", "INT8", np.ones((1000, 1000), np.int64), scale=(0.5,))
    for x, y in pairwise(values):
        draft.step("FULLY_CONNECTED", 4, [x, weight], y, "FullyConnectedOptions", fusedActivationFunction=0, keepNumDims=False)
    (tmp_path / "m.tflite").write_bytes(draft.file(values[:1], values[-1:], ""))
    with pytest.raises(InputError, match=r"operator 9 .* would take far more memory than the file has bytes"):
        read_integer(tmp_path / "m.tflite")


@pytest.mark.proves("inputs.fuzz")
def test_300_damaged_files_give_one_error_in_time(tmp_path: Path) -> None:
    """Flipped bytes, sizes overwritten by extremes, cut ends: nothing but `InputError` leaves, none takes two seconds."""
    draw = np.random.default_rng(12)
    whole = [exported(name, tmp_path / "m.tflite")[1].path.read_bytes() for name in ("residual", "mlp", "global-pool", "concat")]
    extremes = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**16, 4]
    refused = longest = 0
    for turn in range(300):
        content = bytearray(whole[turn % len(whole)])
        if turn % 10 == 0:
            del content[int(draw.integers(8, len(content))) :]
        for _ in range(int(draw.integers(1, 6))):
            at = int(draw.integers(8, len(content) - 3)) if len(content) > 12 else 8
            if draw.random() < 0.5:
                content[at : at + 1] = bytes([int(draw.integers(256))])
            else:
                content[at // 4 * 4 : at // 4 * 4 + 4] = int(draw.choice(extremes)).to_bytes(4, "little")
        (tmp_path / "bad.tflite").write_bytes(content)
        start = time.perf_counter()
        try:
            read_integer(tmp_path / "bad.tflite")
        except InputError as err:
            longest, refused = max(longest, len(str(err))), refused + 1
        assert time.perf_counter() - start < 2
    assert longest < 2000
    assert refused > 150  # most damage is noticed; the rest hit a weight or a name
