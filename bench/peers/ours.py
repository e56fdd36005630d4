"""Roundel as a row: the efforts of `quantize`, and `prepare` for training; the harness's own interpreter runs it."""

from __future__ import annotations

import re
from collections import Counter

import torch
import torch.export._trace  # what quantize and prepare import when they are called: imports are not in a toolkit's seconds
from distil import REST, distil, groups
from task import Quantized, Task, torch_runner

import roundel as rd
from roundel.tune import kinds

BUDGET = "5min"


def quantize(task: Task) -> Quantized:
    data = [torch.from_numpy(x) for x in task.batches(64)]
    formats = f"int{task.weights}", f"int{task.activations}"
    if task.setting == "qat":
        student = rd.prepare(task.model(), *formats, data=data)
        rated = groups((p, None if kind == "weights" else REST) for kind, part in kinds(student).items() for p in part)
        steps = distil(student.train(), task.model(), torch.cat(data), rated, 60 * task.minutes, task.seed)
        return described(rd.convert(student), f"{steps} steps in {task.minutes:g} min")
    q = rd.quantize(task.model(), *formats, data=data, effort=task.setting, seed=task.seed,
                    budget=BUDGET if task.setting == "best" else None)  # fmt: skip
    return described(q)


def described(q: rd.QModel, note: str = "") -> Quantized:
    """A model and its counts."""
    weights = Counter(_bits(str(t.format)) for t in q.tensors.values())
    activations = Counter(_bits(str(a.format)) for a in q.activations.values())
    return Quantized(torch_runner(q.module), weights, activations, note)


def _bits(text: str) -> int:
    found = re.match(r"int(\d+)", text)
    if found is None:
        raise ValueError(f"{text}: not one of the formats that were asked for")
    return int(found[1])
