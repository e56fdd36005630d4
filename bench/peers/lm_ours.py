"""Roundel's rows of language models: the efforts of `quantize` at a size."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from hf import answered
from task import Quantized, Task

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import lm  # noqa: E402 - scripts/ is no package

import roundel as rd  # noqa: E402
from roundel.data import Batch  # noqa: E402

#: Setting -> (effort, budget).
EFFORTS = {"fast": ("fast", None), "default": ("default", None), "best": ("best", "52s"), "long": ("best", "3min")}
HEAD = ("*embed_tokens*", "lm_head")


def quantize(task: Task) -> Quantized:
    data = [Batch((torch.from_numpy(d)[None],)) for d in task.documents()]
    effort, budget = EFFORTS[task.setting]
    q = rd.quantize(task.folder, f"{task.size:g} bits", data=data, exclude=HEAD, effort=effort, seed=task.seed, budget=budget)
    formats = Counter(str(t.format) for t in q.tensors.values())
    told = ", ".join(f"{n} x {fmt}" for fmt, n in sorted(formats.items())) if len(formats) > 1 else next(iter(formats))
    return answered(q.module, lm.bits(q.tensors), told, backprop=effort == "best")
