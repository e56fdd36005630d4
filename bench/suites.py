"""Suites: a model and its data as files that every peer's environment can read, and the truth that only the harness reads.

`SUITES` are networks of images and sounds, `TEXTS` language models and documents; nothing is quantized here.
"""

from __future__ import annotations

import json
import lzma
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from measure import CASES, DATA, _draw  # noqa: E402 - scripts/ and tests/ are no packages
from models import Shortcut  # noqa: E402
from task import Ids, write_documents  # noqa: E402

import roundel as rd  # noqa: E402
from roundel.data import Batch  # noqa: E402
from roundel.graph import Graph  # noqa: E402
from roundel.network.sites import find_sites  # noqa: E402

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Suite:
    """``model`` is made of plain torch modules, ``calibrate`` gives single examples, ``score`` batches with labels."""

    model: Callable[[], nn.Module]
    calibrate: Callable[[], Sequence[Batch]]
    score: Callable[[], Sequence[Batch]]


class _Shortcut(nn.Module):
    """`models.Shortcut` without indexing, which not every toolkit's tensors can do: a max over one pixel leaves out the others."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pool, self.pad = nn.MaxPool2d(1, 2), pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, self.pad, self.pad))


class _Block(nn.Module):
    """A block of tests/models.py with every activation a module of its own, which is how toolkits find them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)
        self.shortcut = _Shortcut(block.shortcut.extra // 2) if isinstance(block.shortcut, Shortcut) else nn.Identity()
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.body(x) + self.shortcut(x))
        return out


def _resnet20() -> nn.Module:
    net: Any = CASES["ResNet-20"].model()
    blocks = [_Block(block) for layer in (net.layer1, net.layer2, net.layer3) for block in layer]
    return nn.Sequential(net.conv1, net.bn1, nn.ReLU(), *blocks, nn.AvgPool2d(8), nn.Flatten(), net.linear).eval()


def _ds_cnn() -> nn.Module:
    """The .tflite file's chain as plain modules, up to the logits; images are (n, 1, 49, 10)."""
    graph = CASES["DS-CNN"].model().graph
    if not isinstance(graph, Graph):
        raise TypeError(f"DS-CNN is read as a Graph, not as {type(graph).__name__}")
    layers: list[nn.Module] = []
    for node in graph.nodes:
        if node.op == "conv":
            weight, bias = (graph.constants[name] for name in node.inputs[1:])
            left, right, top, bottom = node.attrs["padding"]
            even = top == bottom and left == right
            if not even:
                layers.append(nn.ZeroPad2d((left, right, top, bottom)))
            groups = node.attrs["groups"]
            conv = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), tuple(node.attrs["stride"]),
                             (top, left) if even else 0, groups=groups)  # fmt: skip
            layers += [_filled(conv, weight, bias), nn.ReLU()]
        elif node.op == "avg_pool":
            layers += [nn.AvgPool2d(tuple(node.attrs["kernel"])), nn.Flatten()]
        elif node.op == "linear":
            weight, bias = (graph.constants[name] for name in node.inputs[1:])
            layers.append(_filled(nn.Linear(weight.shape[1], weight.shape[0]), weight, bias))
    return nn.Sequential(*layers).eval()


def _filled(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
    return layer


def _first_channel(batches: Callable[[], Sequence[Batch]]) -> Callable[[], Sequence[Batch]]:
    return lambda: [Batch((b.args[0].permute(0, 3, 1, 2).contiguous(),), {}, b.target) for b in batches()]


_RESNET, _DSCNN = CASES["ResNet-20"], CASES["DS-CNN"]
SUITES = {
    "resnet20": Suite(_resnet20, _RESNET.calibrate, _RESNET.score),
    "dscnn": Suite(_ds_cnn, _first_channel(_DSCNN.calibrate), _first_channel(_DSCNN.score)),
}


def make(suite: Suite, folder: Path, seeds: Sequence[int] = SEEDS) -> None:
    """Write ``suite`` into ``folder``: for peers ``model.pt`` (a `torch.fx.GraphModule`), ``model.onnx``, ``calibrate-SEED.npy``
    and ``score.npy``; for the harness ``truth.npz`` and ``suite.json``, which comes last: the folder is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    model, pool, score = suite.model(), suite.calibrate(), suite.score()
    traced = fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        node.type = None  # an annotation that is a text cannot be pickled
    traced.recompile()
    torch.save(traced, folder / "model.pt")
    x, y = torch.cat([b.args[0] for b in score]), torch.cat([b.target for b in score if b.target is not None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no package beyond torch calls itself old
        torch.onnx.export(model, (x[:2],), str(folder / "model.onnx"), dynamo=False, input_names=["x"], output_names=["y"],
                          dynamic_axes={"x": {0: "n"}, "y": {0: "n"}}, opset_version=17)  # fmt: skip
    for seed in seeds:
        np.save(folder / f"calibrate-{seed}.npy", torch.cat([b.args[0] for b in _draw(pool, seed, 1)]).numpy())
    np.save(folder / "score.npy", x.numpy())
    with torch.no_grad():
        real = torch.cat([model(part) for part in x.split(100)])
    np.savez(folder / "truth.npz", labels=y.numpy(), outputs=real.numpy())
    graph = rd.fuse(rd.capture(model, (x[:2],)))
    weighted = [node for node in graph.nodes if node.op in ("conv", "linear")]
    shape = {"weights": len(weighted), "sites": len(find_sites(graph).origin), "calibrate": len(pool), "score": len(x)}
    (folder / "suite.json").write_text(json.dumps(shape | {"top1": float((real.argmax(1) == y).float().mean())}, indent=1))


# -- language models --------------------------------------------------------------------------------------------------

#: Tokens of a document of the bench model, and how many documents calibrate and score.
LENGTH, LEARN, SCORE = 256, 100, 60
BENCH_MODEL = Path.home() / ".cache" / "roundel" / "bench-lm-0"  # scripts/train_bench_lm.py


@dataclass(frozen=True)
class Texts:
    """``folder`` is what transformers loads; the documents are token ids (tokens,), those to score unseen by any toolkit."""

    folder: Path
    calibrate: Sequence[Ids]
    score: Sequence[Ids]


def _stories() -> Texts:
    ids = json.loads((DATA / "stories260K" / "ids.json").read_text())
    return Texts(DATA / "stories260K", *([np.asarray(d, np.int64) for d in ids[name]] for name in ("calib", "eval")))


def folder_texts(folder: Path) -> Texts:
    """Any folder, on the texts of the data folder: documents of `LENGTH` tokens at equal distances, calibration from the first 19
    twentieths of each source, which is what the bench model learned from, scoring from the last."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = min(LENGTH, getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", LENGTH))
    learn: list[Ids] = []
    score: list[Ids] = []
    for name in ("tinystories", "wikitext2_valid", "wikitext2_test"):
        whole = lzma.decompress((DATA / "text" / f"{name}.txt.xz").read_bytes()).decode()
        cut = len(whole) * 19 // 20
        for text, into in ((whole[:cut], learn), (whole[cut:], score)):
            starts = np.linspace(0, len(text) - 16 * length, LEARN, dtype=int)  # 16 letters a token are enough
            found = (np.asarray(tokenizer(text[at : at + 16 * length])["input_ids"][:length], np.int64) for at in starts)
            into += [ids for ids in found if len(ids) == length]
    even = [[part[i] for i in np.linspace(0, len(part) - 1, n, dtype=int)] for part, n in ((learn, LEARN), (score, SCORE))]
    return Texts(folder, *even)


TEXTS: dict[str, Callable[[], Texts]] = {"stories260K": _stories, "benchlm": lambda: folder_texts(BENCH_MODEL)}


def write_texts(given: Callable[[], Texts], folder: Path, seeds: Sequence[int] = SEEDS) -> None:
    """Write a suite of texts: for peers ``model/`` (float32), ``calibrate-SEED.npz`` (all documents, in an order of the draw's own)
    and ``score.npz``; for the harness ``truth.npz`` and ``suite.json``, which comes last."""
    from transformers import AutoModelForCausalLM

    texts = given()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(texts.folder, dtype=torch.float32).eval()
    model.save_pretrained(folder / "model")
    for file in texts.folder.glob("*token*"):
        shutil.copyfile(file, folder / "model" / file.name)
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(texts.calibrate))
        write_documents(folder / f"calibrate-{seed}.npz", [texts.calibrate[i] for i in order])
    write_documents(folder / "score.npz", texts.score)
    ids = [torch.from_numpy(d) for d in texts.score]
    with torch.no_grad():
        real = [model(input_ids=d[None], use_cache=False).logits[0] for d in ids]
    np.savez(folder / "truth.npz", outputs=torch.cat(real), ids=np.concatenate(texts.score), sizes=[len(d) for d in texts.score])
    losses = torch.cat([F.cross_entropy(y[:-1], d[1:], reduction="none") for y, d in zip(real, ids, strict=True)])
    layers = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    shape = {"parameters": sum(p.numel() for p in model.parameters()), "numbers": sum(w.numel() for w in layers),
             "weights": len(layers), "calibrate": len(texts.calibrate), "score": len(ids), "tokens": sum(map(len, ids)),
             "loss": float(losses.double().mean())}  # fmt: skip
    (folder / "suite.json").write_text(json.dumps(shape, indent=1))
