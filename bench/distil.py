"""The one loop in which every toolkit's trainable model learns from the float one; torch only, for it runs with them.

Mirrored and shifted images, KL(float || student), Adam with a cosine, no labels: the recipe of scripts/qat.py, for a CPU time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Learning rates: of a weight tensor in units of its root mean square, and of all else.
WEIGHTS, REST = 3e-3, 1e-3


def groups(named: Iterable[tuple[Tensor, float | None]]) -> list[dict[str, Any]]:
    """Parameter groups: each parameter with its rate, or None for that of weights.

    >>> groups([(torch.full((2, 2), 2.0, requires_grad=True), None)])[0]["lr"]
    0.006
    """
    out = []
    for p, rate in named:
        out.append({"params": [p], "lr": WEIGHTS * float(p.detach().square().mean().sqrt()) if rate is None else rate})
    return out


def plain_groups(student: nn.Module) -> list[dict[str, Any]]:
    """Parameters of two axes and more are weights."""
    return groups((p, None if p.ndim > 1 else REST) for p in student.parameters() if p.requires_grad)


def shaken(x: Tensor, draw: torch.Generator, shift: int = 4) -> Tensor:
    """Images (n, c, h, w), each mirrored or not and moved by up to ``shift`` pixels."""
    height, width = x.shape[2:]
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5, x.flip(3), x)
    wide = F.pad(x, (shift, shift, shift, shift))
    places = torch.randint(2 * shift + 1, (len(x), 2), generator=draw).tolist()
    return torch.stack([image[:, dy : dy + height, dx : dx + width] for image, (dy, dx) in zip(wide, places, strict=True)])


def distil(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    parameters: list[dict[str, Any]],
    seconds: float,
    seed: int,
    batch: int = 64,
) -> int:
    """Train ``student`` for ``seconds`` of CPU time and return the number of steps; the cosine is over time."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters)
    rates = [group["lr"] for group in parameters]
    start, steps = time.process_time(), 0
    while (share := (time.process_time() - start) / seconds) < 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))
        seen = shaken(images[torch.randperm(len(images), generator=draw)[:batch]], draw)
        with torch.no_grad():
            wanted = teacher(seen).softmax(-1)
        answer = student(seen)
        loss = F.kl_div(getattr(answer, "value", answer).log_softmax(-1), wanted, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return steps
