"""The three threads from end to end on real models: read, quantized, saved, and run by a new process that has no float model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, needs_data
from models import resnet20
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch, Preprocess, load_data
from roundel.graph import GraphModule
from roundel.network import watching
from roundel.network.sites import find_sites

ROOT = Path(__file__).resolve().parent.parent
DS_CNN, KWT = DATA / "mlperf_kws" / "kws_ref_model_float32.tflite", DATA / "kwt1" / "kwt1.tflite"
STORIES = DATA / "stories260K"
SPEECH = DATA / "speech_commands_v2_test"

#: Runs each saved model on the inputs; the data folder is not named, and nothing that reads or makes float models is imported.
RUN = """
import sys, torch
import roundel as rd
folder = sys.argv[1]
x, *want = torch.load(folder + "/x.pt")
for threads in (1, 2):
    torch.set_num_threads(threads)
    with torch.no_grad():
        for i, y in enumerate(want):
            out = rd.load(f"{folder}/{i}.safetensors").module(x)
            assert torch.equal(out if isinstance(out, torch.Tensor) else out.logits, y), (threads, i)
assert not {name for name in sys.modules if name.startswith(("roundel.readers", "models"))}
print("equal")
"""


def runs_alone(folder: Path, models: list[rd.QModel], x: Tensor) -> None:
    """Save, note the outputs, and let a new process find the same bits, under one thread and under two."""
    want = []
    for i, q in enumerate(models):
        q.save(folder / f"{i}.safetensors")
        with torch.no_grad():
            out = q.module(x)
            twin = rd.fake(q)(x)
        want.append(out if isinstance(out, Tensor) else out.logits)
        assert torch.equal(want[-1], twin if isinstance(twin, Tensor) else twin.logits)
    torch.save([x, *want], folder / "x.pt")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "ROUNDEL_DATA": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)], capture_output=True, text=True, env=env, cwd=folder, check=False
    )
    assert done.stdout == "equal\n", done.stderr


def sites_by_kind(q: rd.QModel, x: Tensor) -> tuple[Counter[str], Counter[str]]:
    """(quantized, left float): every real number on every edge of a run must lie on its site's grid, or it counts as float."""
    assert isinstance(q.structure, rd.Graph)
    root, made = find_sites(q.structure).root, q.structure.producers()
    done, left = Counter[str](), Counter[str]()

    def look(name: str, value: Tensor) -> None:
        if not value.is_floating_point():
            return
        kind = made[name].op if name in made else "input"
        site = q.activations.get(root.get(name, ""))
        if site is None or site.params is None:
            left[kind] += 1
            return
        scale, zero, _ = site.params.parts
        step, low = scale.codes.numpy().view(np.float32).item(), -128 - zero.codes.numpy().view(np.int8).item()
        codes = np.rint(value.numpy() / np.float32(step))
        on_grid = np.array_equal(codes.astype(np.float32) * np.float32(step), value.numpy())
        (done if on_grid and low <= codes.min() and codes.max() <= low + 255 else left)[kind] += 1

    with torch.no_grad(), watching(q.module, look):
        q.module(x)
    return done, left


def nearly(q: rd.QModel, model: nn.Module, x: Tensor, flips: float) -> None:
    with torch.no_grad():
        got, want = (torch.as_tensor(m(x)).argmax(1) for m in (q.module, model))
    assert (got != want).float().mean() <= flips


@needs_data
@pytest.mark.proves("thread.ds-cnn", "mode.static", "file.roundtrip")
def test_ds_cnn(tmp_path: Path) -> None:
    steps = Preprocess.from_dict({"shape": [49, 10, 1]})
    data = list(load_data(f"{SPEECH / 'shared_mfcc49x10_f16.npz'}[0::10]", preprocess=steps, batch_size=64))[:2]
    model, x = rd.read(DS_CNN), data[0].args[0]
    static = rd.quantize(model, "int8", "int8", data=data)
    assert static.notes == () or not any(note.fallback for note in static.notes)
    done, left = sites_by_kind(static, x)
    assert not left
    assert done["input"] == 1
    assert done["conv"] == 9  # one plain, four depthwise, four pointwise
    assert done.total() == len(static.structure.nodes) + 1  # type: ignore[union-attr]
    nearly(static, model, x, 0.05)
    packed = rd.quantize(model, "int4", "int8:dynamic", data=data[:1])
    runs_alone(tmp_path, [static, packed], x)


@needs_data
@pytest.mark.proves("mode.weight-only")
def test_weights_stored_as_integers_come_back_exactly() -> None:
    """Five convolutions of the file hold int8 codes: weight-only int8 gives the very same values."""
    model = rd.read(DS_CNN)
    assert isinstance(model, GraphModule)
    q = rd.quantize(model, "int8")
    stored = [name for name, node in ((n.inputs[1], n) for n in model.graph.nodes if n.op in ("conv", "linear"))
              if model.graph.constants[name].unique().numel() <= 255 and node.attrs.get("groups", 1) == 1]  # fmt: skip
    same = [name for name in q.tensors if torch.equal(q.tensors[name].dequantize(), rd.fuse(model.graph).constants[name])]
    assert len(stored) == 5
    assert set(stored) <= set(same)


@needs_data
@pytest.mark.proves("thread.kwt1", "mode.static")
def test_kwt1(tmp_path: Path) -> None:
    clips = np.load(SPEECH / "shared_kwt98x40_f16.npz")
    x = torch.from_numpy(clips["x"][1::30].astype(np.float32))  # one clip of each class
    model = rd.read(KWT, inputs=[214])
    q = rd.quantize(model, "int8", "int8", data=[x])
    done, left = sites_by_kind(q, x[:4])
    assert not left
    ops = Counter(node.op for node in q.structure.nodes)  # type: ignore[union-attr]
    assert {"linear", "layer_norm", "gelu"} <= done.keys()
    assert ops["matmul"] == done["matmul"] == 24 or ops["attention"] == done["attention"] == 12  # both operands computed
    assert done.total() == sum(len(node.outputs) for node in q.structure.nodes) + 1  # type: ignore[union-attr]
    nearly(q, model, x, 0.1)
    runs_alone(tmp_path, [q], x[:3])


@needs_data
@pytest.mark.proves("thread.resnet20", "mode.static", "mode.shared-params")
def test_resnet20(tmp_path: Path) -> None:
    steps = Preprocess.from_dict({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]})
    zipped = DATA / "cifar10_jpg" / "calib_train_50perclass.zip"
    data: list[Batch] = []
    for batch in load_data(zipped, preprocess=steps, batch_size=10):
        data.append(batch)
        if len(data) == 4:
            break
    model = resnet20()
    images = [batch.args[0] for batch in data]
    q = rd.quantize(model, "int8", "int8", data=images)
    done, left = sites_by_kind(q, images[0])
    assert not left
    assert done["conv"] == 19
    assert done["add"] == 9
    assert done["pad"] == 2
    assert done["mean"] + done["avg_pool"] == 1
    assert done["input"] == done["linear"] == 1
    root = find_sites(q.structure).root  # type: ignore[arg-type]
    for node in q.structure.nodes:  # type: ignore[union-attr]
        if node.op in ("pad", "slice", "reshape"):
            assert root[node.name] == root[node.inputs[0]]  # a shortcut keeps the numbers of the block before it
    nearly(q, model, torch.cat(images), 0.1)
    with torch.no_grad():  # a batch of any size, and none of it depends on its neighbours
        together = q.module(torch.cat(images))
        assert torch.equal(together, torch.cat([q.module(x) for x in images]))
        assert torch.equal(together[:1], q.module(images[0][:1]))
    runs_alone(tmp_path, [q], images[1])


@needs_data
@pytest.mark.proves("thread.stories260k", "mode.weight-only", "file.roundtrip")
def test_stories260k(tmp_path: Path) -> None:
    model = rd.read(STORIES)
    q = rd.quantize(model, "int4/g32")
    ids = next(iter(load_data(f"{STORIES / 'ids.json'}#eval", batch_size=1))).args[0][:, :64]
    assert {str(t.format) for t in q.tensors.values()} == {"int4/g32*fp16"}
    assert q.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert q.nbytes < 0.17 * sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        a, b = model(ids).logits.log_softmax(-1), q.module(ids).logits.log_softmax(-1)
    assert 0 < (a.exp() * (a - b)).sum(-1).mean() < 0.2
    runs_alone(tmp_path, [q, rd.quantize(model, "int4/g32", "int8:token")], ids)
