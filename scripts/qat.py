"""Quantization-aware training measured: ResNet-20 on its 500 calibration images, and digits from scratch; it prints Markdown and
judges nothing. Each row is a process of its own, one thread, so that its seconds (user CPU) and peak memory are its own.

    python scripts/qat.py resnet20                 distilled from the float model, without labels
    python scripts/qat.py resnet20 --labels 1      the labels' cross-entropy beside it
    python scripts/qat.py digits                   scikit-learn's 8x8 digits from scratch, five seeds

KL divergence is of the float model as it came || trained, in nats; flips are images whose first class changes. The float model is
trained by the identical recipe too, and top-1 is told against both.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from measure import CASES, MB, _batched, _peak, _resident_set
from torch import Tensor, nn

import roundel as rd
from roundel.graph import GraphModule
from roundel.qat import prepare
from roundel.tune import convert, freeze, kinds

#: Name -> formats of weights and activations.
ROWS = {
    "float": (None, None),
    "W4A4": ("int4", "int4"),
    "W3A3": ("int3", "int3"),
    "W2A4": ("int2", "int4"),
    "ternary, A8": ("ternary", "int8"),
    "16 clusters, A8": ("cb16/channel", "int8"),
}

#: Steps of 64 images: each row stays below 4 minutes of a core.
STEPS = 200

#: Learning rate by kind; that of weights counts in units of a tensor's root mean square, at 4 bits and in float: each bit less
#: doubles the way to the next level, and the rate.
RATES = {"weights": 3e-3, "scales": 3e-3, "tables": 1e-3, "rest": 1e-3}

#: The share of the steps after which norms and ranges that follow the batches are kept.
FREEZE = 0.7


def _optimizer(module: nn.Module, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    """Adam with a rate for each kind of parameter, of a float network too."""
    if hasattr(module, "prepared"):
        found = dict(kinds(module))
    else:
        parameters = [p for p in module.parameters() if p.requires_grad]
        found = {"weights": [p for p in parameters if p.ndim > 1], "rest": [p for p in parameters if p.ndim < 2]}
    groups = []
    for kind, rate in rates.items():
        for p in found.get(kind, []):
            size = float(p.detach().square().mean().sqrt()) if kind == "weights" else 1.0
            groups.append({"params": [p], "lr": rate * size})
    return torch.optim.Adam(groups)


def _shaken(x: Tensor, draw: torch.Generator) -> Tensor:
    """Mirrored or not, and moved by up to 4 pixels, each image by itself."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5, x.flip(3), x)
    wide, out = F.pad(x, (4, 4, 4, 4)), []
    for image, (dy, dx) in zip(wide, torch.randint(9, (len(x), 2), generator=draw).tolist(), strict=True):
        out.append(image[:, dy : dy + 32, dx : dx + 32])
    return torch.stack(out)


def _train(module: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, steps: int, labels: float, seed: int, bits: float) -> None:
    """Steps of 64 images, every image once before any comes again, under a cosine after ten steps of warming up."""
    draw, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    optimizer = _optimizer(module, {**RATES, "weights": RATES["weights"] * 2 ** (4 - bits)})
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        if step == round(FREEZE * steps) and hasattr(module, "prepared"):
            freeze(module)
        if len(order) < 64:
            order = torch.cat([order, torch.randperm(len(x), generator=draw)])
        chosen, order = order[:64], order[64:]
        seen = _shaken(x[chosen], draw)
        with torch.no_grad():
            wanted = teacher(seen).log_softmax(-1)
        answer = module(seen)
        loss = F.kl_div(answer.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        if labels:
            loss = loss + labels * F.cross_entropy(answer, y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _answers(module: nn.Module) -> Tensor:
    """To the scoring images."""
    with torch.no_grad():
        return torch.cat([module(*batch.args) for batch in CASES["ResNet-20"].score()])


def _scores(got: Tensor, answers: Tensor) -> dict[str, float]:
    """KL(float || module), flips and top-1, the last two in per cent."""
    batches = CASES["ResNet-20"].score()
    right = got.argmax(1) == torch.cat([batch.target for batch in batches if batch.target is not None])
    kl = F.kl_div(got.log_softmax(-1), answers.log_softmax(-1), log_target=True, reduction="batchmean")
    flips = got.argmax(1) != answers.argmax(1)
    return {"kl": float(kl), "flips": 100 * float(flips.float().mean()), "top1": 100 * float(right.float().mean())}


def _cpu() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def _resnet20_row(row: str, steps: int, labels: float, seed: int, norms: Any) -> dict[str, Any]:
    case = CASES["ResNet-20"]
    (batch,) = _batched(case.calibrate(), 500)
    labelled = batch.target
    assert labelled is not None
    captured = GraphModule(rd.capture(case.model(), batch.take(torch.arange(2)).args)).eval()
    teacher = GraphModule(rd.fuse(captured.graph)).eval()
    answers = _answers(teacher)
    weights, activations = ROWS[row]
    start, rest = _cpu(), _resident_set()
    if weights is None:
        student: nn.Module = GraphModule(teacher.graph)
        for p in student.parameters():
            p.data = p.data.clone()
    else:
        student = prepare(captured, weights, activations, data=_batched(case.calibrate(), 100), norms=norms)
    made = _cpu() - start
    before = _scores(answers if weights is None else _answers(student.eval()), answers)
    start = _cpu()
    bits = 4 if weights is None else rd.Format.parse(weights).bits
    peak = _peak(lambda: _train(student.train(), teacher, batch.args[0], labelled, steps, labels, seed, bits))
    spent = _cpu() - start
    after = student.eval() if weights is None else convert(student).module
    if weights is not None:  # the artifact is the module that was trained
        assert torch.equal(after(batch.args[0][:8]), student.eval()(batch.args[0][:8]))
    found = {"before": before, "after": _scores(_answers(after), answers), "ptq": made, "qat": spent, "mb": (peak - rest) / MB}
    return found | {"top1": _scores(answers, answers)["top1"]}


def _child(*args: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "child", *map(str, args)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


@click.group()
def main() -> None:
    """Quantization-aware training, measured."""
    torch.set_num_threads(1)


@main.command(hidden=True)
@click.argument("row")
@click.argument("steps", type=int)
@click.argument("labels", type=float)
@click.argument("seed", type=int)
@click.argument("norms")
def child(row: str, steps: int, labels: float, seed: int, norms: str) -> None:
    print(json.dumps(_resnet20_row(row, steps, labels, seed, norms)))


@main.command()
@click.option("--row", "rows", multiple=True, type=click.Choice(list(ROWS)), help="Only these rows, beside float.")
@click.option("--steps", default=STEPS, show_default=True, help="Steps of 64 images.")
@click.option("--labels", default=0.0, show_default=True, help="Weight of the labels' cross-entropy beside the divergence.")
@click.option("--seed", default=0, show_default=True)
@click.option("--norms", default="folded", show_default=True, type=click.Choice(["folded", "live"]))
@click.option("--record", type=Path, help="A JSON file that keeps the rows; those in it are not measured again.")
def resnet20(rows: tuple[str, ...], steps: int, labels: float, seed: int, norms: str, record: Path | None) -> None:
    """ResNet-20 on 500 images, every edge quantized; scored on 3,000 others."""
    kept: dict[str, Any] = json.loads(record.read_text()) if record and record.exists() else {}
    print(f"`python scripts/qat.py {' '.join(sys.argv[1:])}`\n")
    print("| | to nearest: KLD | flips, % | top-1 | trained: KLD | flips, % | top-1 | − float | − float, trained too | "
          "nearest, s | training, s | training, MB | s per point | MB per point |")  # fmt: skip
    print("| --- " * 14 + "|")
    for row in ["float", *(row for row in rows or ROWS if row != "float")]:  # the others are told against it
        key = f"{row} {steps} {labels} {seed} {norms}"
        found = kept[key] = kept.get(key) or _child(row, steps, labels, seed, norms)
        if record:
            record.write_text(json.dumps(kept, indent=1))
        trained_float = kept[f"float {steps} {labels} {seed} {norms}"]["after"]["top1"]
        cells = [f"{s['kl']:.4f} | {s['flips']:.1f} | {s['top1']:.2f}" for s in (found["before"], found["after"])]
        top1, gain = found["after"]["top1"], found["after"]["top1"] - found["before"]["top1"]
        costs = [f"{found[cost] / gain:.1f}" if row != "float" and gain > 0 else "" for cost in ("qat", "mb")]
        against = f"{top1 - found['top1']:+.2f} | {top1 - trained_float:+.2f}"
        print(f"| {row} | {' | '.join(cells)} | {against} | {found['ptq']:.0f} | {found['qat']:.0f} | {found['mb']:.0f} | "
              f"{' | '.join(costs)} |", flush=True)  # fmt: skip


# -- digits -----------------------------------------------------------------------------------------------------------


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    learn, score = order[:1200], order[1200:]
    return images[learn], labels[learn], images[score], labels[score]


def _cnn() -> nn.Sequential:
    """Two convolutions with norms, and a linear layer."""
    layers = [nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    layers += [nn.Conv2d(12, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def _fit(module: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    draw, steps = torch.Generator().manual_seed(seed), epochs * (len(x) // 60)
    live = hasattr(module, "prepared")
    found = dict(kinds(module)) if live else {"weights": [p for p in module.parameters() if p.requires_grad]}
    rates = {"weights": 3e-3, "tables": 3e-3, "rest": 3e-3, "scales": 3e-2}  # from scratch, ranges have far to go
    optimizer = torch.optim.Adam([{"params": found[kind], "lr": rates[kind]} for kind in found if found[kind]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done = 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=draw).split(60):
            if live and done == round(FREEZE * steps):
                freeze(module)
            loss = F.cross_entropy(module(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1


@main.command()
@click.option("--epochs", default=12, show_default=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--bits", multiple=True, type=int, default=(8, 4, 3, 2), show_default=True)
@click.option("--learn", default="step", show_default=True, help="What moves at activations: step, clip, ema.")
@click.option("--norms", default="live", show_default=True, type=click.Choice(["folded", "live"]))
def digits(epochs: int, seeds: int, bits: tuple[int, ...], learn: Any, norms: Any) -> None:
    """A small CNN on 8x8 digits, quantized before it knows anything and trained from there; 597 digits score."""
    x, y, x_score, y_score = _digits()
    print(f"`python scripts/qat.py {' '.join(sys.argv[1:])}`\n")
    print("| weights and activations | error, % (mean ± deviation over seeds) | user CPU s |\n| --- | --- | --- |")
    for row in (None, *bits):
        wrong, start = [], _cpu()
        for seed in range(seeds):
            torch.manual_seed(seed)
            net = _cnn()
            norms_of = [norm for norm in net if isinstance(norm, nn.BatchNorm2d)]
            for norm in norms_of:  # ranges are measured on what norms make of data: let them have seen some
                norm.momentum = 1.0
            with torch.no_grad():
                net.train()(x[:300])
            for norm in norms_of:
                norm.momentum = 0.1
            module: nn.Module = net
            if row is not None:
                bits_of = f"int{row}"
                module = prepare(net, bits_of, bits_of, data=[x[:300]], learn=learn, norms=norms, momentum=0.1)
            _fit(module.train(), x, y, epochs, seed)
            final = module.eval() if row is None else convert(module).module
            with torch.no_grad():
                wrong.append(100 * float((final(x_score).argmax(1) != y_score).float().mean()))
        errors, name = torch.tensor(wrong), "float" if row is None else f"int{row}"
        deviation = float(errors.std()) if seeds > 1 else 0.0
        print(f"| {name} | {errors.mean():.2f} ± {deviation:.2f} | {_cpu() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
