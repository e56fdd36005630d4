"""`quantize_folder`: a folder's language model quantized block by block from its shards into one file, under a memory cap, and
taken up again where it was stopped. What needs the whole model at once (static activations, the gate, shared tables) is refused."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..calibrate import Progress, evaluating, one_thread
from ..data import Batch
from ..errors import InputError, PlanError
from ..executor import Executor, Here
from ..files import DTYPES, AnyPath, Slice, show, size_text
from ..formats.format import MODEL, Format
from ..formats.qtensor import QTensor
from ..gate import LEAST
from ..network.blocks import UNIT, Walk, find_blocks, flatten, moment_bytes, poison, put, sweep_blocks, unflatten, units, within
from ..network.huggingface import hf_config
from ..network.layer import Activation
from ..network.sweep import MATRIX
from ..network.walk import Leaf, install, leaf, member, state
from ..plan import Choice, Plan
from ..qmodel import HF, Note, QModel, load
from ..qmodel import _flat as flat_tensors
from ..qmodel import _lift as lift_tensor
from ..readers.shards import Folder, open_folder
from ..solvers import NEED_HESSIAN, SOLVERS
from .checks import check_finite, check_weights
from .journal import Journal, journal
from .ladder import learning, unsolved
from .memory import Need, bytes_of, needed, resident
from .networks import ModuleNetwork, Target
from .pieces import by_rows
from .weights import round_weight

#: The entries of the journal that hold what is outside the blocks, rounded and then solved.
OUTSIDE, TAIL = "outside", "tail"


def quantize_folder(
    path: AnyPath,
    plan: Plan,
    items: list[Batch] | None,
    provenance: Mapping[str, Any],
    *,
    output: AnyPath,
    memory: str | int | None = None,
    solver: str | None = None,
    executor: Executor | None = None,
    strict: Callable[[Sequence[Note]], None] = lambda notes: None,
    progress: Progress | None = None,
) -> QModel:
    """Quantize the model of a Hugging Face folder into the file ``output``; the result's numbers stay in that file.

    Weights are read a block at a time. With a ``solver`` that learns from data, each block's layers are solved on the inputs that
    the quantized blocks before it leave, and what passes between blocks lies on disk. ``memory`` in bytes, or as in "2GB", bounds
    the resident memory of this process; what cannot be kept under it is refused before any work. The same run, stopped in whatever
    way, goes on where it was and ends in the same bytes: those that quantizing the model in memory gives.
    """
    cap = math.inf if memory is None else bytes_of(memory)
    run = _Run(open_folder(path), plan, items, solver, executor or Here(), progress)
    with one_thread(), torch.no_grad(), evaluating(run.folder.module):
        run.refuse()
        need = run.needs()
        need.check(cap)
        config = {
            "model": {"config": _digest(msgspec.json.encode(run.config, order="sorted"))},
            "plan": msgspec.json.decode(plan.to_json()),
            "data": _data_digest(run.learn),
            "made by": dict(provenance),
        }
        with journal(output, progress=None) as log:
            config["model"]["weights"] = run.read_through(log)
            log.bind(config, output)
            _check_disk(output, run, log)
            strict(run.notes)
            run.quantize(log, cap - need.total)
            q = run.result(log, provenance)
            strict(q.notes)
            q.save(output, numbers=run.numbers(log))
    return load(output, mapped=True)
