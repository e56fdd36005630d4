"""A small detector and a U-Net on composed scenes: made, trained, quantized and scored; it prints Markdown and judges nothing.

    python scripts/scenes.py train                  both networks, minutes each, once for each seed
    python scripts/scenes.py measure detector       mAP@.5 of float, min-max and ours at int8 and W4A8
    python scripts/scenes.py measure unet           mIoU of the same
    python scripts/scenes.py verify                 both lowered whole, code by code against C, TFLite and onnxruntime
    python scripts/scenes.py diagnose               what roundel.diagnose says of the detector

A scene is 128x128 RGB: a CIFAR-10 image as ground, one to four of scikit-learn's digits on it, each with a colour, size and place
of its own. Boxes, classes and masks are known by construction. Scenes that train, calibrate, gate and score share neither digits
nor grounds. What the detector finds is decoded and thinned out here, outside of the network.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from measure import DATA
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import roundel as rd
from roundel.data import load_data
from roundel.qmodel import QModel

SIDE, CLASSES = 128, 10

#: Name -> (digits, grounds) that no other part sees, of 1,797 shuffled and 3,500.
PARTS = {
    "train": (slice(0, 1000), slice(0, 2000)),
    "calibrate": (slice(1000, 1180), slice(2000, 2300)),
    "gate": (slice(1180, 1240), slice(2300, 2400)),
    "score": (slice(1240, 1797), slice(2400, 3500)),
}


# -- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scene:
    """``image`` (3, 128, 128) uint8, ``boxes`` (objects, 4) as x1, y1, x2, y2 in pixels, ``classes`` (objects,), and ``mask``
    (128, 128) uint8: 0 is ground, 1 + class an object."""

    image: Tensor
    boxes: Tensor
    classes: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Pool:
    """What scenes are made of: ``digits`` (n, 8, 8) from 0 to 1, their ``labels``, ``grounds`` (m, 3, 32, 32) from 0 to 1."""

    digits: Tensor
    labels: Tensor
    grounds: Tensor


@cache
def sources() -> Pool:
    """All digits and grounds, shuffled in the same way whatever the seed."""
    raw = load_digits()
    grounds = torch.cat([batch.args[0] for name in ("calib_train_50perclass", "shared_test_300perclass")
                         for batch in load_data(str(DATA / "cifar10_jpg" / f"{name}.zip"))])  # fmt: skip
    order, places = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (len(raw.target), len(grounds)))
    return Pool(torch.tensor(raw.images, dtype=torch.float32)[order] / 16, torch.tensor(raw.target)[order], grounds[places])


def pool(part: str) -> Pool:
    """The digits and grounds of one part."""
    digits, grounds = PARTS[part]
    return Pool(sources().digits[digits], sources().labels[digits], sources().grounds[grounds])


def compose(source: Pool, draw: np.random.Generator) -> Scene:
    """One scene. A digit is pasted only where its box meets no other; after 20 places that do, it is left away."""
    ground = source.grounds[int(draw.integers(len(source.grounds)))]
    image = F.interpolate(ground[None], (SIDE, SIDE), mode="bilinear")[0]
    mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    boxes: list[list[int]] = []
    classes: list[int] = []
    for _ in range(int(draw.integers(1, 5))):
        chosen = int(draw.integers(len(source.digits)))
        side = math.exp(draw.uniform(math.log(20), math.log(56)))
        height, width = (round(side * draw.uniform(0.85, 1.15)) for _ in range(2))
        ink = F.interpolate(source.digits[chosen][None, None], (height, width), mode="bicubic")[0, 0].clamp(0, 1)
        solid = ink > 0.4
        rows, columns = solid.any(1).nonzero()[:, 0], solid.any(0).nonzero()[:, 0]
        for _ in range(20):
            y, x = (int(draw.integers(SIDE - size + 1)) for size in (height, width))
            box = [x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1]
            if not any(meet(box, other) for other in boxes):
                break
        else:
            continue
        patch = image[:, y : y + height, x : x + width]
        light = float(patch.mean()) < 0.5
        colour = torch.from_numpy(draw.uniform(0.6, 1.0, 3) if light else draw.uniform(0.0, 0.4, 3)).float()[:, None, None]
        image[:, y : y + height, x : x + width] = patch + ink * (colour - patch)
        mask[y : y + height, x : x + width][solid] = 1 + int(source.labels[chosen])
        boxes.append(box)
        classes.append(int(source.labels[chosen]))
    return Scene((image * 255).round().to(torch.uint8), torch.tensor(boxes).float(), torch.tensor(classes), mask)


def meet(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def scenes(part: str, count: int, seed: int = 0) -> list[Scene]:
    """``count`` scenes of one part. Of those that calibrate every fourth is made of what is kept for the gate: it is the one that
    `roundel.quantize` holds out to judge its steps by."""
    draw = np.random.default_rng([seed, list(PARTS).index(part)])
    pools = [pool(part)] * 3 + [pool("gate" if part == "calibrate" else part)]
    return [compose(pools[i % 4], draw) for i in range(count)]


def images(found: Sequence[Scene], size: int = 32) -> list[Tensor]:
    """What networks take: batches (n, 3, 128, 128) from 0 to 1."""
    return [torch.stack([s.image for s in found[i : i + size]]).float() / 255 for i in range(0, len(found), size)]


# -- networks ---------------------------------------------------------------------------------------------------------


def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class Body(nn.Module):
    """Features at strides 2, 4, 8 and 16, of 1, 2, 3 and 4 times ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.at2, self.at4 = block(3, width, 2), nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))
        self.at8 = nn.Sequential(block(2 * width, 3 * width, 2), block(3 * width, 3 * width))
        self.at16 = nn.Sequential(block(3 * width, 4 * width, 2), block(4 * width, 4 * width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c2 = self.at2(x)
        c4 = self.at4(c2)
        c8 = self.at8(c4)
        return c2, c4, c8, self.at16(c8)


class Detector(nn.Module):
    """One answer for each cell of two levels, 8 and 16 pixels wide: (n, 4 + classes, cells).

    The first four rows are the distances from a cell's centre to the left, top, right and bottom of an object, in pixels, the
    others the score of each class, from 0 to 1: one tensor, as detectors are deployed, or two where they are not ``together``.
    """

    strides = (8, 16)

    def __init__(self, width: int = 16, neck: int = 32, together: bool = True) -> None:
        super().__init__()
        self.together, self.body = together, Body(width)
        self.lateral8, self.lateral16 = nn.Conv2d(3 * width, neck, 1), nn.Conv2d(4 * width, neck, 1)
        self.tower8, self.tower16 = (nn.Sequential(block(neck, neck), block(neck, neck)) for _ in range(2))
        self.boxes8, self.boxes16 = (nn.Conv2d(neck, 4, 3, padding=1) for _ in range(2))
        self.scores8, self.scores16 = (nn.Conv2d(neck, CLASSES, 3, padding=1) for _ in range(2))
        for scores in (self.scores8, self.scores16):
            assert scores.bias is not None
            nn.init.constant_(scores.bias, -4.0)  # hardly any cell holds an object

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        _, _, c8, c16 = self.body(x)
        p16 = self.lateral16(c16)
        p8 = self.lateral8(c8) + F.interpolate(p16, scale_factor=2.0, mode="nearest")
        p8, p16 = self.tower8(p8), self.tower16(p16)
        boxes = torch.cat([(self.boxes8(p8) * 8.0).flatten(2), (self.boxes16(p16) * 16.0).flatten(2)], 2)
        scores = torch.cat([torch.sigmoid(self.scores8(p8)).flatten(2), torch.sigmoid(self.scores16(p16)).flatten(2)], 2)
        return torch.cat([boxes, scores], 1) if self.together else (boxes, scores)


class UNet(nn.Module):
    """A class for each pixel: logits (n, 1 + classes, 128, 128), worked out at half that size."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w, self.body = width, Body(width)
        self.up3, self.join3 = nn.ConvTranspose2d(4 * w, 3 * w, 2, 2), block(6 * w, 3 * w)
        self.up2, self.join2 = nn.ConvTranspose2d(3 * w, 2 * w, 2, 2), block(4 * w, 2 * w)
        self.up1, self.join1 = nn.ConvTranspose2d(2 * w, w, 2, 2), block(2 * w, w)
        self.logits = nn.Conv2d(w, 1 + CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        c2, c4, c8, c16 = self.body(x)
        x = self.join3(torch.cat([c8, self.up3(c16)], 1))
        x = self.join2(torch.cat([c4, self.up2(x)], 1))
        x = self.join1(torch.cat([c2, self.up1(x)], 1))
        return F.interpolate(self.logits(x), scale_factor=2.0, mode="bilinear")


# -- training ---------------------------------------------------------------------------------------------------------


def centres() -> tuple[Tensor, Tensor]:
    """Of every cell of the detector: its centre (cells, 2) as x, y in pixels, and its stride (cells,)."""
    places, strides = [], []
    for stride in Detector.strides:
        at = (torch.arange(SIDE // stride) + 0.5) * stride
        y, x = torch.meshgrid(at, at, indexing="ij")
        places.append(torch.stack([x.flatten(), y.flatten()], 1))
        strides.append(torch.full((x.numel(),), float(stride)))
    return torch.cat(places), torch.cat(strides)


def wanted_of(scene: Scene) -> Tensor:
    """(5, cells): what a detector should say of a scene, distances in pixels and the class, -1 where there is none.

    Objects up to 28 pixels belong to the finer level; an object is told by the cells whose centres are nearest to its own, within
    three quarters of a stride.
    """
    places, strides = centres()
    out = torch.full((5, len(places)), -1.0)
    for box, number in zip(scene.boxes, scene.classes, strict=True):
        stride = Detector.strides[int((box[2:] - box[:2]).max() > 28)]
        off = (places - (box[:2] + box[2:]) / 2).abs().amax(1)
        cells = (off <= 0.75 * stride) & (strides == stride)
        out[:4, cells] = torch.cat([places[cells] - box[:2], box[2:] - places[cells]], 1).T
        out[4, cells] = float(number)
    return out


def detection_loss(out: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss of the scores, absolute error of the distances in strides, over the cells that tell of objects."""
    strides, held = centres()[1], wanted[:, 4] >= 0
    truth = F.one_hot(wanted[:, 4].clamp(min=0).long(), CLASSES).transpose(1, 2) * held[:, None]
    scores = out[:, 4:].clamp(1e-6, 1 - 1e-6)
    hard = torch.where(truth > 0, 1 - scores, scores).square()
    classes = hard * F.binary_cross_entropy(scores, truth.to(scores), reduction="none")
    apart = ((out[:, :4] - wanted[:, :4]).abs() / strides).mean(1)
    return (classes.sum() + (apart * held).sum()) / held.sum()


def mask_of(scene: Scene) -> Tensor:
    """(128, 128): what a U-Net should say of a scene."""
    return scene.mask


def mask_loss(out: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy, with a pixel of ground counted for a tenth: there are ten times as many."""
    weight = torch.ones(1 + CLASSES)
    weight[0] = 0.1
    return F.cross_entropy(out, wanted.long(), weight)


@dataclass(frozen=True)
class Task:
    """A network, its loss, what a scene wants of it, for how many epochs of how many scenes it trains, how many at a time, and the
    task whose trained body it begins with."""

    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    wanted: Callable[[Scene], Tensor]
    epochs: int
    batch: int
    scenes: int = 3000
    start: str = ""


TASKS = {
    "detector": Task(Detector, detection_loss, wanted_of, 10, 32),
    "unet": Task(UNet, mask_loss, mask_of, 4, 8, 1200, start="detector"),
}


def train(task: Task, found: Sequence[Scene], seed: int, epochs: int, body: nn.Module | None = None) -> nn.Module:
    """The network after ``epochs`` over the scenes: AdamW on one cycle of the learning rate, nothing drawn but by ``seed``."""
    torch.manual_seed(seed)
    net, batch = task.network().train(), task.batch
    if body is not None:
        net.body.load_state_dict(body.state_dict())  # type: ignore[union-attr]
    x, y = torch.stack([s.image for s in found]), torch.stack([task.wanted(s) for s in found])
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.15)
    for epoch in range(epochs):
        lost = 0.0
        for chosen in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            loss = task.loss(net(x[chosen].float() / 255), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            lost += loss.item()
        click.echo(f"epoch {epoch + 1} of {epochs}: loss {lost * epochs / steps:.3f}, {_cpu():.0f} s of CPU", err=True)
    return net.eval()


def kept(name: str, seed: int, cache: Path) -> Path:
    """Where a trained network lies: the name changes with all code that decides its weights."""
    task = TASKS[name]
    parts: tuple[Any, ...] = (sources, compose, scenes, block, Body, task.network, task.loss, centres, task.wanted, train)
    recipe = "".join(map(inspect.getsource, parts)) + repr((PARTS, task.epochs, task.batch, task.scenes))
    recipe += kept(task.start, seed, cache).name if task.start else ""
    return cache / f"{name}-{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"


def trained(name: str, seed: int, cache: Path) -> nn.Module:
    """The network of a task, from ``cache`` if it was trained there by the same code."""
    task, path = TASKS[name], kept(name, seed, cache)
    if not path.exists():
        body = trained(task.start, seed, cache).body if task.start else None
        start = _cpu()
        net = train(task, scenes("train", task.scenes, seed), seed, task.epochs, body=body)  # type: ignore[arg-type]
        click.echo(f"{name}, seed {seed}: {_cpu() - start:.0f} s of CPU with its scenes, into {path}", err=True)
        cache.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), path)
    net = task.network()
    net.load_state_dict(load_file(path))
    return net.eval()


def _cpu() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


# -- scores -----------------------------------------------------------------------------------------------------------


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """(n, m): intersection over union of boxes (n, 4) and (m, 4)."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    sizes = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return inside / (sizes[0][:, None] + sizes[1][None] - inside).clamp(min=1e-9)


def decoded(out: Tensor, least: float = 0.05, most: int = 100, apart: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes, classes, scores), best first, from what a detector says of one scene (4 + classes, cells): answers above ``least``,
    thinned out class by class where boxes overlap by more than ``apart``."""
    places = centres()[0].T
    distances, scores = out[:4], out[4:]
    classes, cells = (scores > least).nonzero(as_tuple=True)
    values = scores[classes, cells]
    order = values.argsort(descending=True, stable=True)[: 4 * most]
    classes, cells, values = classes[order], cells[order], values[order]
    boxes = torch.cat([places - distances[:2], places + distances[2:]])[:, cells].T
    rival = (overlap(boxes, boxes) > apart) & (classes[:, None] == classes[None])
    kept: list[int] = []
    for i in range(len(values)):
        if not bool(rival[i, kept].any()) and len(kept) < most:
            kept.append(i)
    return boxes[kept], classes[kept], values[kept]


@dataclass(frozen=True, eq=False)
class Hits:
    """What a detector found in one scene: class, score and whether it is right, for each answer; ``truth`` (classes,) counts the
    objects that are there."""

    classes: Tensor
    scores: Tensor
    right: Tensor
    truth: Tensor


def matched(found: tuple[Tensor, Tensor, Tensor], scene: Scene, least: float = 0.5) -> Hits:
    """Answers, best first, each take the object of their class that they overlap most, if it is free and they do by ``least``."""
    boxes, classes, scores = found
    shared = overlap(boxes, scene.boxes) * (classes[:, None] == scene.classes[None])
    right, taken = torch.zeros(len(boxes), dtype=torch.bool), torch.zeros(len(scene.boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        best = int(shared[i].argmax())
        if shared[i, best] >= least and not taken[best]:
            right[i] = taken[best] = True
    return Hits(classes, scores, right, torch.bincount(scene.classes, minlength=CLASSES))


def average_precision(scores: Tensor, right: Tensor, truth: int) -> float:
    """COCO's: the mean, over recall of 0, 0.01 to 1, of the best precision at that recall or a higher one."""
    order = scores.argsort(descending=True, stable=True)
    hits = right[order].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    at = torch.searchsorted(hits / truth, torch.arange(101).double() / 100 - 1e-9)
    return float(torch.cat([best, torch.zeros(1)])[at].mean())


def mean_ap(found: Sequence[Hits]) -> float:
    """mAP in per cent over the classes of which there is an object."""
    classes, scores, right = (torch.cat([getattr(h, name) for h in found]) for name in ("classes", "scores", "right"))
    truth = torch.stack([h.truth for h in found]).sum(0)
    each = [average_precision(scores[classes == c], right[classes == c], int(n)) for c, n in enumerate(truth) if n]
    return 100 * sum(each) / len(each)


def confusion(out: Tensor, scene: Scene) -> Tensor:
    """(classes, classes): pixels of each true class, in rows, that were given each class, in columns."""
    pairs = scene.mask.long() * len(out) + out.argmax(0)
    return torch.bincount(pairs.flatten(), minlength=len(out) ** 2).reshape(len(out), len(out))


def mean_iou(found: Sequence[Tensor]) -> float:
    """mIoU in per cent over the classes that are there, ground included, from `confusion` of each scene."""
    table = torch.stack(list(found)).sum(0).double()
    hit, either = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    there = table.sum(1) > 0
    return 100 * float((hit[there] / either[there]).mean())


def difference(score: Callable[[Sequence], float], a: Sequence, b: Sequence, draws: int = 200) -> tuple[float, float, float]:
    """score(a) - score(b) of the same scenes, with its paired 95 % interval by bootstrap over scenes."""
    draw = np.random.default_rng(0)
    many = []
    for _ in range(draws):
        chosen = draw.integers(len(a), size=len(a))
        many.append(score([a[i] for i in chosen]) - score([b[i] for i in chosen]))
    low, high = np.percentile(many, [2.5, 97.5])
    return score(a) - score(b), float(low), float(high)


SCORES: dict[str, tuple[str, Callable[[Sequence], float], Callable[[Tensor, Scene], object]]] = {
    "detector": ("mAP@.5", mean_ap, lambda out, scene: matched(decoded(out), scene)),
    "unet": ("mIoU", mean_iou, confusion),
}


def answers(module: nn.Module, found: Sequence[Scene]) -> Tensor:
    """Outputs for all scenes; those of a detector whose parts are apart are joined here."""
    with torch.no_grad():
        outs = [module(x) for x in images(found)]
    return torch.cat([torch.cat(out, 1) if isinstance(out, tuple) else out for out in outs])


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """How `roundel.quantize` is called, every edge in int8; ``apart``: of a detector that gives boxes and scores as two tensors."""

    weights: str
    effort: str
    ranges: str = "mse"
    apart: bool = False


ROWS = {
    "min-max, W8A8": Row("int8", "fast", "minmax"),
    "min-max, W8A8, two tensors": Row("int8", "fast", "minmax", apart=True),
    "ours, W8A8": Row("int8", "default"),
    "ours, W8A8, two tensors": Row("int8", "default", apart=True),
    "min-max, W4A8": Row("int4", "fast", "minmax"),
    "ours, W4A8": Row("int4", "default"),
    "ours, best, W4A8": Row("int4", "best"),
}


def rows_of(name: str) -> list[str]:
    return [text for text, row in ROWS.items() if name == "detector" or not row.apart]


def quantized(net: nn.Module, row: Row, calibration: Sequence[Scene], budget: str) -> QModel:
    if row.apart:
        net = copy.deepcopy(net)
        net.together = False  # type: ignore[assignment]
    return rd.quantize(net, row.weights, "int8", data=images(calibration), effort=row.effort, ranges=row.ranges,
                       budget=budget if row.effort == "best" else None)  # fmt: skip


_cache = click.option("--cache", type=click.Path(path_type=Path), default=Path.home() / ".cache" / "roundel" / "scenes",
                      help="Where trained networks are kept.")  # fmt: skip
_seed = click.option("--seed", default=0, show_default=True, help="Of scenes and training.")
_calibrate = click.option("--calibrate", default=256, show_default=True, help="Scenes that calibrate; every fourth is the gate's.")


@click.group(help=__doc__, context_settings={"max_content_width": 120})
def main() -> None:
    torch.set_num_threads(1)


@main.command("train")
@click.argument("names", nargs=-1, type=click.Choice(list(TASKS)))
@_seed
@_cache
def train_command(names: tuple[str, ...], seed: int, cache: Path) -> None:
    """Train what the cache does not hold yet."""
    for name in names or TASKS:
        trained(name, seed, cache)


@main.command()
@click.argument("name", type=click.Choice(list(TASKS)))
@click.option("--row", "rows", multiple=True, type=click.Choice(list(ROWS)), help="Only these rows.")
@click.option("--scenes", "count", default=500, show_default=True, help="Scenes that score.")
@click.option("--budget", default="3min", show_default=True, help="Of effort best.")
@click.option("--notes", is_flag=True, help="Also what quantize noted.")
@_calibrate
@_seed
@_cache
def measure(name: str, rows: tuple[str, ...], count: int, budget: str, notes: bool, calibrate: int, seed: int, cache: Path) -> None:
    """Score float and quantized networks on the same scenes."""
    net, calibration, score = trained(name, seed, cache), scenes("calibrate", calibrate, seed), scenes("score", count, seed)
    title, figure, judge = SCORES[name]
    real = answers(net, score)
    base = [judge(out, scene) for out, scene in zip(real, score, strict=True)]
    click.echo(f"`python scripts/scenes.py {' '.join(sys.argv[1:])}`\n")
    click.echo(f"| {name} | {title} | less float, 95 % interval | bytes | user CPU s |\n| --- | --- | --- | --- | --- |")
    click.echo(f"| float | {figure(base):.2f} | | {sum(t.nbytes for t in net.parameters()):,} | |")
    for text in rows or rows_of(name):
        start = _cpu()
        q = quantized(net, ROWS[text], calibration, budget)
        spent = _cpu() - start
        mine = [judge(out, scene) for out, scene in zip(answers(q.module, score), score, strict=True)]
        off, low, high = difference(figure, mine, base)
        click.echo(f"| {text} | {figure(mine):.2f} | {off:+.2f} [{low:+.2f}, {high:+.2f}] | {q.nbytes:,} | {spent:.0f} |")
        for note in q.notes if notes else ():
            click.echo(f"    {note.subject}: {note.text}", err=True)


@main.command("verify")
@click.argument("names", nargs=-1, type=click.Choice(list(TASKS)))
@click.option("--row", "rows", multiple=True, type=click.Choice(list(ROWS)), help="Only these rows.")
@click.option("--scenes", "count", default=20, show_default=True, help="Scored scenes that are run.")
@click.option("--against", multiple=True, default=["host-c", "onnxruntime", "tflm"], show_default=True)
@_calibrate
@_seed
@_cache
def verify_command(names: tuple[str, ...], rows: tuple[str, ...], count: int, against: tuple[str, ...], calibrate: int, seed: int,
                   cache: Path) -> None:  # fmt: skip
    """Lower whole, simulate, and compare every code with other programs; the score is that of the integers."""
    click.echo(f"`python scripts/scenes.py {' '.join(sys.argv[1:])}`\n")
    for name in names or TASKS:
        net, calibration, score = trained(name, seed, cache), scenes("calibrate", calibrate, seed), scenes("score", count, seed)
        title, figure, judge = SCORES[name]
        for text in rows or [row for row in rows_of(name) if ROWS[row].effort == "default"]:
            q = quantized(net, ROWS[text], calibration, "")
            graph = rd.lower(q)
            outs = answers(Simulated(graph), score), answers(q.module, score)
            said = ", ".join(f"{figure([judge(*pair) for pair in zip(out, score, strict=True)]):.2f}" for out in outs)
            click.echo(f"{name}, {text}: {len(graph.nodes)} operations, {title} of integers and of the quantized module {said}")
            for found in rd.verify(q, against, images(score), limit=count).values():
                click.echo(f"  {found}")


@main.command("diagnose")
@click.option("--scenes", "count", default=500, show_default=True, help="Scenes that score.")
@_calibrate
@_seed
@_cache
def diagnose_command(count: int, calibrate: int, seed: int, cache: Path) -> None:
    """What is wrong with the detector that min-max makes, and its score with the first finding's cure."""
    click.echo(f"`python scripts/scenes.py {' '.join(sys.argv[1:])}`\n")
    net, calibration, score = trained("detector", seed, cache), scenes("calibrate", calibrate, seed), scenes("score", count, seed)
    title, figure, judge = SCORES["detector"]

    def scored(module: nn.Module) -> str:
        return f"{title} {figure([judge(*pair) for pair in zip(answers(module, score), score, strict=True)]):.2f}"

    q = quantized(net, ROWS["min-max, W8A8"], calibration, "")
    click.echo(f"float {scored(net)}, min-max W8A8 {scored(q.module)}")
    for number, found in enumerate(rd.diagnose(q, net, images(calibration))):
        click.echo(f"{found}" + ("" if number else f": {scored(found.model.module)}"))


class Simulated(nn.Module):
    """An integer graph as a module."""

    def __init__(self, graph: rd.Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = rd.simulate(self.graph, x)
        return tuple(map(torch.from_numpy, out)) if isinstance(out, tuple) else torch.from_numpy(out)


if __name__ == "__main__":
    main()
