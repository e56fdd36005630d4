"""Quantization-aware training measured: ResNet-20 on its 500 calibration images, and digits from scratch; it prints Markdown and
judges nothing. Each row is a process of its own, one thread, so that its seconds (user CPU) and peak memory are its own.

    python scripts/qat.py resnet20                 distilled from the float model, without labels
    python scripts/qat.py resnet20 --labels 1      the labels' cross-entropy beside it, and the float model by the same recipe
    python scripts/qat.py digits                   scikit-learn's 8x8 digits from scratch, five seeds

KL divergence is of the float model as it came || trained, in nats; flips are images whose first class changes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import click
import torch
import torch.nn.functional as F
from measure import CASES, _batched
from torch import Tensor, nn

import roundel as rd
from roundel.graph import GraphModule
from roundel.qat import prepare
from roundel.tune import convert, kinds

#: Name -> formats of weights and activations.
ROWS = {
    "float": (None, None),
    "W4A4": ("int4", "int4"),
    "W3A3": ("int3", "int3"),
    "W2A4": ("int2", "int4"),
    "ternary, A8": ("ternary", "int8"),
    "16 clusters, A8": ("cb16/channel", "int8"),
}

#: Learning rate by kind; that of weights counts in units of a tensor's root mean square.
RATES = {"weights": 3e-3, "scales": 1e-3, "tables": 1e-3, "rest": 1e-3}


def _groups(module: nn.Module) -> list[dict[str, object]]:
    """Parameter groups of an optimizer."""
    if isinstance(module, GraphModule):
        found = {"weights": [p for p in module.parameters() if p.ndim > 1], "rest": [p for p in module.parameters() if p.ndim == 1]}
    else:
        found = kinds(module)
    out: list[dict[str, object]] = []
    for kind, rate in RATES.items():
        for p in found.get(kind, []):
            size = float(p.detach().square().mean().sqrt()) if kind == "weights" else 1.0
            out.append({"params": [p], "lr": rate * size})
    return out


def _shaken(x: Tensor, draw: torch.Generator) -> Tensor:
    """Mirrored or not, and moved by up to 4 pixels, each image by itself."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5, x.flip(3), x)
    wide, out = F.pad(x, (4, 4, 4, 4)), []
    for image, (dy, dx) in zip(wide, torch.randint(9, (len(x), 2), generator=draw).tolist(), strict=True):
        out.append(image[:, dy : dy + 32, dx : dx + 32])
    return torch.stack(out)


def _train(
    module: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, steps: int, labels: float, seed: int, batch: int = 64
) -> None:
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(_groups(module))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randperm(len(x), generator=draw)[:batch]
        seen = _shaken(x[chosen], draw)
        with torch.no_grad():
            wanted = teacher(seen).softmax(-1)
        answer = module(seen)
        loss = F.kl_div(answer.log_softmax(-1), wanted, reduction="batchmean")
        if labels:
            loss = loss + labels * F.cross_entropy(answer, y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _scores(module: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """Over the scoring images: KL(float || module), flips and top-1, the last two in per cent."""
    kl = flips = right = total = 0.0
    with torch.no_grad():
        for batch in CASES["ResNet-20"].score():
            assert batch.target is not None
            wanted, got = teacher(*batch.args), module(*batch.args)
            kl += float(F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"))
            flips += int((got.argmax(1) != wanted.argmax(1)).sum())
            right += int((got.argmax(1) == batch.target).sum())
            total += len(batch.target)
    return {"kl": kl / total, "flips": 100 * flips / total, "top1": 100 * right / total}


def _cpu() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def _resnet20_row(row: str, steps: int, labels: float, seed: int) -> dict[str, object]:
    case = CASES["ResNet-20"]
    (batch,) = _batched(case.calibrate(), 500)
    assert batch.target is not None
    net = case.model()
    teacher = GraphModule(rd.fuse(rd.capture(net, batch.take(torch.arange(2)).args))).eval()
    weights, activations = ROWS[row]
    start = _cpu()
    if weights is None:
        student: nn.Module = GraphModule(teacher.graph).train()
        for p in student.parameters():
            p.data = p.data.clone()
        before, made = student, _cpu() - start
    else:
        student = prepare(teacher, weights, activations, data=_batched(case.calibrate(), 100))
        before, made = convert(student).module, _cpu() - start
    first = _scores(before.eval(), teacher)
    start = _cpu()
    _train(student.train(), teacher, batch.args[0], batch.target, steps, labels, seed)
    spent = _cpu() - start
    after = student.eval() if weights is None else convert(student).module
    if weights is not None:  # the artifact is the module that was trained
        assert torch.equal(after(batch.args[0][:8]), student.eval()(batch.args[0][:8]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"row": row, "before": first, "after": _scores(after, teacher), "ptq": made, "qat": spent, "peak": peak}


def _child(*args: object) -> dict[str, object]:
    command = [sys.executable, __file__, "child", *map(str, args)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@click.group()
def main() -> None:
    """Quantization-aware training, measured."""
    torch.set_num_threads(1)


@main.command(hidden=True)
@click.argument("row")
@click.argument("steps", type=int)
@click.argument("labels", type=float)
@click.argument("seed", type=int)
def child(row: str, steps: int, labels: float, seed: int) -> None:
    print(json.dumps(_resnet20_row(row, steps, labels, seed)))


@main.command()
@click.option("--row", "rows", multiple=True, type=click.Choice(list(ROWS)), help="Only these rows.")
@click.option("--steps", default=200, show_default=True, help="Steps of 64 images.")
@click.option("--labels", default=0.0, show_default=True, help="Weight of the labels' cross-entropy beside the divergence.")
@click.option("--seed", default=0, show_default=True)
def resnet20(rows: tuple[str, ...], steps: int, labels: float, seed: int) -> None:
    """ResNet-20 on 500 images, every edge quantized; scored on 3,000 others."""
    print(f"`python scripts/qat.py {' '.join(sys.argv[1:])}`\n")
    print("| | KLD before | flips before | top-1 before | KLD | flips | top-1 | rounding to nearest, s | training, s | peak MB |")
    print("| --- " * 10 + "|")
    for row in rows or [row for row in ROWS if row != "float" or labels]:
        found = _child(row, steps, labels, seed)
        cells = [f"{s['kl']:.4f} | {s['flips']:.1f} % | {s['top1']:.1f}" for s in (found["before"], found["after"])]  # type: ignore[index]
        print(f"| {row} | {' | '.join(cells)} | {found['ptq']:.0f} | {found['qat']:.0f} | {found['peak']:.0f} |", flush=True)


# -- digits -----------------------------------------------------------------------------------------------------------


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    learn, score = order[:1200], order[1200:]
    return images[learn], labels[learn], images[score], labels[score]


def _fit(module: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    found = kinds(module) if hasattr(module, "prepared") else {"weights": list(module.parameters()), "scales": []}
    ranges = found["scales"]  # from scratch they have far to go
    optimizer = torch.optim.Adam([{"params": [p for kind, group in found.items() if kind != "scales" for p in group]}], lr=3e-3)
    if ranges:
        optimizer.add_param_group({"params": ranges, "lr": 3e-2})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // 60))
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=draw).split(60):
            loss = F.cross_entropy(module(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@main.command()
@click.option("--epochs", default=12, show_default=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--learn", default="step", show_default=True, help="What moves at activations: step, clip, ema.")
def digits(epochs: int, seeds: int, learn: str) -> None:
    """A small CNN on 8x8 digits, quantized before it knows anything and trained from there; 597 digits score."""
    x, y, x_score, y_score = _digits()
    print(f"`python scripts/qat.py {' '.join(sys.argv[1:])}`\n")
    print("| weights and activations | error, % (mean ± deviation over seeds) | user CPU s |\n| --- | --- | --- |")
    for bits in (None, 8, 4, 3, 2):
        wrong, start = [], _cpu()
        for seed in range(seeds):
            torch.manual_seed(seed)
            net: nn.Module = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(),
                                           nn.Flatten(), nn.Linear(256, 10))  # fmt: skip
            if bits is not None:
                net = prepare(net, f"int{bits}", f"int{bits}", data=[x[:300]], learn=learn, momentum=0.1)  # type: ignore[arg-type]
            _fit(net, x, y, epochs, seed)
            final = net.eval() if bits is None else convert(net).module
            with torch.no_grad():
                wrong.append(100 * float((final(x_score).argmax(1) != y_score).float().mean()))
        errors, row = torch.tensor(wrong), "float" if bits is None else f"int{bits}"
        deviation = float(errors.std()) if seeds > 1 else 0.0
        print(f"| {row} | {errors.mean():.2f} ± {deviation:.2f} | {_cpu() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
