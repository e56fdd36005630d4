"""Roundel's rows of language models: the efforts of `quantize` at a size, and the recipe of scripts/lm.py with its plan by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hf import answered, load
from task import Quantized, Task

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import lm  # noqa: E402 - scripts/ is no package

import roundel as rd  # noqa: E402
from roundel.data import Batch  # noqa: E402
from roundel.fisher import hessians  # noqa: E402
from roundel.tune.endtoend import RATES, Teaching, tune_model  # noqa: E402

BUDGET = {"best": "2min"}
HEAD = ("*embed_tokens*", "lm_head")
BATCH = 4
RECIPES = {"recipe": (250, 400), "short": (100, 100)}  # steps, and examples drawn from the model; the first as docs/solvers.md says
WEIGHTS = {2: 1e-2, 3: 5e-3, 4: 3e-3}


def quantize(task: Task) -> Quantized:
    data = [Batch((torch.from_numpy(d)[None],)) for d in task.documents()]
    if task.setting in RECIPES:
        q = recipe(task, data)
    else:
        q = rd.quantize(task.folder, f"{task.size:g} bits", data=data, exclude=HEAD, effort=task.setting, seed=task.seed,
                        budget=BUDGET.get(task.setting))  # fmt: skip
    formats = sorted({str(t.format) for t in q.tensors.values()})
    return answered(q.module, lm.bits(q.tensors), " and ".join(formats), backprop=task.setting in ("best", *RECIPES))


def recipe(task: Task, data: list[Batch]) -> rd.QModel:
    """Four fifths learn, with text drawn from the model itself, the others judge: guided Hessians, then taught end to end."""
    real, cut = load(task), len(data) * 4 // 5
    learn, held = data[:cut], data[cut:]
    q = lm.rounded(real, *lm.BUDGETS[task.size])
    q, *_ = lm.solve(q, real, "descent", hessians(real, learn, set(q.tensors), guided=True))
    steps, samples = RECIPES[task.setting]
    text = [*(lm.first(b) for b in learn), lm.sampled(real, samples, seed=task.seed)]
    how = Teaching(steps=steps, rates={**RATES, "weights": WEIGHTS[int(task.size)]}, start="codes", seed=task.seed)
    return tune_model(q, real, lm.chunks(text, seed=task.seed, size=BATCH), held, how)
