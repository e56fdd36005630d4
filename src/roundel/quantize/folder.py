"""`quantize_folder`: a folder's language model quantized block by block from its shards into one file, under a memory cap, and
taken up again where it was stopped. What needs the whole model at once (static activations, the gate, shared tables) is refused."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor, nn

from ..calibrate import Progress, evaluating, one_thread
from ..data import Batch
from ..errors import InputError, PlanError
from ..executor import Executor, Here
from ..files import AnyPath, Slice, show, size_text
from ..formats.format import MODEL, Format
from ..formats.qtensor import QTensor
from ..network.blocks import (
    UNIT,
    Walk,
    find_blocks,
    flatten,
    moment_bytes,
    poison,
    positions,
    put,
    sweep_blocks,
    unflatten,
    units,
    within,
)
from ..network.huggingface import hf_config
from ..network.layer import Activation
from ..network.sweep import MATRIX
from ..network.walk import install, member, state
from ..plan import Plan
from ..qmodel import HF, Note, QModel, load, share
from ..qmodel import _flat as flat_tensors
from ..qmodel import _lift as lift_tensor
from ..readers.shards import Folder, open_folder
from ..solvers import NEED_HESSIAN, SOLVERS, solved
from .checks import check_finite, check_weights
from .journal import Journal, journal
from .ladder import learning, unsolved
from .memory import ROUNDING, SLACK, SOLVING, Need, bytes_of, held, settled, trim
from .networks import ModuleNetwork, Target, accounts
from .pieces import by_rows, rows_at_once
from .sizes import fitted, overdrawn
from .weights import round_weight

#: The entries of the journal for what is outside the blocks: rounded, and later solved.
OUTSIDE, TAIL = "outside", "tail"

#: Told of the notes so far, it may refuse them.
Strict: TypeAlias = Callable[[Sequence[Note]], None]


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
    strict: Strict | None = None,
    progress: Progress | None = None,
) -> QModel:
    """Quantize the model of a Hugging Face folder into the file ``output``; the result's numbers stay in that file.

    Weights are read a block at a time. With a ``solver`` that learns from data, each block's layers are solved on the inputs that
    the quantized blocks before it leave, and what passes between blocks lies on disk. ``memory`` in bytes, or as in "2GB", bounds
    the resident memory of this process; what cannot be kept under it is refused before any work. The same run, stopped in whatever
    way, goes on where it was and ends in the same bytes: those that quantizing the model in memory gives.
    """
    cap = math.inf if memory is None else bytes_of(memory)
    folder = open_folder(path)
    with one_thread(), torch.no_grad(), settled(), evaluating(folder.module):
        run = _Run(folder, plan, items or [], solver, executor or Here(), progress)
        run.refuse(items is not None)
        need = run.need()
        need.check(cap, run.instead())
        with journal(output) as log:
            log.bind({
                "model": {"config": _digest(msgspec.json.encode(run.config, order="sorted")), "weights": run.read_through(log)},
                "plan": msgspec.json.decode(run.plan.to_json()),
                "data": _digest(*(_batch_bytes(batch) for batch in run.learn)),
                "run": dict(provenance),
            }, output)  # fmt: skip
            run.check_disk(output)
            strict = strict or _anything
            strict(run.notes)
            run.quantize(log, cap - need.total, strict)
            q = run.result(log, provenance)
            strict(q.notes)
            q.save(output, numbers=run.numbers(log))
    return load(output, mapped=True)


@dataclass(eq=False)
class _Run:
    """One model on its way; names of tensors are those of the module's state."""

    folder: Folder
    plan: Plan
    items: list[Batch]
    named: str | None
    executor: Executor
    progress: Progress | None
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.solver = self.named if self.named in NEED_HESSIAN else None
        self.config = hf_config(self.folder.module)
        self.network = ModuleNetwork(self.folder.module, self.notes)
        self.state = {name: t for name, t in state(self.folder.module).items() if name not in self.network.tied}
        self.asked, self.plan = self.plan, fitted(self.plan, self.network, self.notes, read=self._read_target)
        self.table = self.network.resolve(self.plan)
        self.blocks = find_blocks(self.folder.module)
        self.targets = {t.name: t for t in self.network.targets if self.table.get(t.name) is not None and t.weight.numel()}
        self.learn = learning(self.items, False) if self.solver else []

    def refuse(self, data: bool) -> None:
        """What cannot be done a block at a time."""
        if not self.network.targets:
            raise PlanError("the model has no layer to quantize: no linear, convolution or embedding layer with real weights")
        choices = {name: choice for name, choice in self.table.items() if choice is not None}
        if shared := [name for name in self.targets if choices[name].format.table == MODEL]:
            raise PlanError(f"{shared[0]}: a table shared by the model needs all weights at once; quantize it in memory")
        if any(choice.when == "static" for name, choice in choices.items() if name in self.network.sites):
            raise PlanError("static activations need the whole model at once: quantize it in memory, or use ':dynamic' ranges")
        if self.solver and not data:
            raise PlanError(f"the solver {self.solver} learns from the inputs of each layer: pass data=")
        check_weights(self.network, self.table, self.notes)

    # -- memory and disk --

    def need(self) -> Need:
        """The most that this process will hold."""
        outer = self.inside(None)
        packed = sum(self._packed(name) for name in outer)
        always: list[tuple[str, float]] = [
            ("Python, torch, the data and the skeleton", held()),
            ("what the allocator keeps", SLACK),
        ]
        if self.solver:
            always.append(("what is outside the blocks", packed + sum(self._bytes(n) for n in outer if n not in self.targets)))
        stages = [
            (f"rounding {name}", self._rounding(name) + (packed if self._block(name) is None else 0)) for name in self.targets
        ]
        if self.solver:
            for block in self.blocks:
                inside = self.inside(block)
                here = sum(self._bytes(name) + self._packed(name) for name in inside)
                tops = [self._solving(name) for name in inside if name in self.targets]
                stages.append((f"solving {block or 'the model, which has no list of blocks'}", here + max(tops, default=0.0)))
                stages.append((f"running {block or 'the model'}", here + self._running(inside)))
            tops = [self._solving(name) + self._bytes(name) for name in outer if name in self.targets and self._matrix(name)]
            stages.append(("solving what is outside the blocks", max(tops, default=0.0)))
        return Need(always, stages)

    def instead(self) -> str:
        more = "; give more, or take solver='rtn'" if self.solver else "; give more"
        return more + ("; the model has no list of repeated blocks to go through" if self.blocks == [""] else "")

    def check_disk(self, output: AnyPath) -> None:
        """The space for the journal and the file, stated up front."""
        packed = sum(self._packed(name) if name in self.targets else self._bytes(name) for name in self.state)
        free = shutil.disk_usage(os.path.dirname(os.path.realpath(os.fsdecode(output)))).free
        if free < 2 * packed:
            raise InputError(
                f"cannot write {show(output)}: {size_text(2 * packed)} needed for the file and its journal, {size_text(free)} free"
            )

    def _bytes(self, name: str) -> float:
        return self.state[name].numel() * self.state[name].element_size()

    def _packed(self, name: str) -> float:
        """About what a weight takes when it is packed."""
        if name not in self.targets:
            return 0.0
        fmt = self._format(name)
        return self.state[name].numel() * (fmt.bits + 32 / max(1, fmt.share.cols or 64)) / 8

    def _piece(self, name: str) -> float:
        """Bytes in float32 of what is solved at a time."""
        target = self.targets[name]
        rows = min(rows_at_once(target.weight.shape, self._format(name), target.axis), target.weight.shape[0])
        return 4.0 * rows * target.weight.numel() / max(1, target.weight.shape[0])

    def _rounding(self, name: str) -> float:
        return self._bytes(name) + self._packed(name) + ROUNDING * self._piece(name)

    def _solving(self, name: str) -> float:
        if not self._matrix(name):
            return self._rounding(name)
        one = self.network.found[_layer(name)]
        stages = [hessians * moment_bytes(one) + copies * self._piece(name) for hessians, copies in SOLVING]
        return max(self._rounding(name), *stages)

    def _running(self, inside: list[str]) -> float:
        """The values inside a block for one unit of work, and the second moment of one input of it."""
        widest = max((max(self.state[n].shape) for n in inside if self.state[n].ndim > 1), default=0)
        places = max(map(positions, units(self.learn)), default=UNIT)
        tops = [moment_bytes(self.network.found[_layer(n)]) for n in inside if n in self.targets and self._matrix(n)]
        largest = max((self.state[n].numel() for n in inside if n in self.targets), default=0)
        return 2 * max(tops, default=0) + 8.0 * largest + 4.0 * places * (6 * widest) + 8.0 * min(places, 4096) * widest

    def _format(self, name: str) -> Format:
        choice = self.table[name]
        assert choice is not None
        return choice.format

    def _matrix(self, name: str) -> bool:
        return self.network.ops[name] in MATRIX

    def _block(self, name: str) -> str | None:
        return next((block for block in self.blocks if within(name, block)), None)

    def inside(self, block: str | None) -> list[str]:
        """The tensors of a block; of None those that are in no block."""
        return [name for name in self.state if self._block(name) == block]

    # -- the work --

    def read_through(self, log: Journal) -> str:
        """A digest of every stored number, each of which is finite; files that are as the journal saw them are not read again."""
        files = sorted({one.path for one in self.folder.stored.values()})
        now = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        if log.has("_weights") and (before := log.facts("_weights"))["files"] == now:
            return str(before["digest"])
        whole = hashlib.blake2b(digest_size=20)
        for i, (key, one) in enumerate(sorted(self.folder.stored.items())):
            whole.update(msgspec.json.encode([key, str(one.dtype), one.shape]))
            for piece in one.pieces():
                whole.update(piece)
                if one.dtype.is_floating_point:
                    check_finite(key, torch.frombuffer(bytearray(piece), dtype=one.dtype))
            self.tell("read", i + 1, len(self.folder.stored))
        if not log.has("_weights"):
            log.write("_weights", {}, {"files": now, "digest": whole.hexdigest()})
        return whole.hexdigest()

    def quantize(self, log: Journal, spare: float, strict: Strict) -> None:
        """Every entry of the journal that is not there yet."""
        if not log.has(OUTSIDE):
            names = self.inside(None)
            rounded, notes = self.rounded(names, self.read)
            self.write(log, OUTSIDE, rounded, self.folder.read(name for name in names if name not in rounded), notes, {})
        strict(self.told(log))
        if self.solver is None:
            for i, block in enumerate(self.blocks):
                if not log.has(self.entry(block)):
                    self._round_block(log, block)
                self.tell("quantize", i + 1, len(self.blocks))
            return
        self._sweep(log, spare, strict)
        for block in self.blocks:  # such as the vision blocks of a model that was shown text
            if not log.has(self.entry(block)):
                self._round_block(log, block)

    def _round_block(self, log: Journal, block: str) -> None:
        names = self.inside(block)
        rounded, notes = self.rounded(names, self.read)
        rest = self.folder.read(name for name in names if name not in rounded)
        self.write(log, self.entry(block), rounded, rest, notes, {})

    def rounded(self, names: Sequence[str], read: Callable[[str], Tensor]) -> tuple[dict[str, QTensor], list[Note]]:
        """The weights among ``names`` rounded to nearest."""
        chosen = [name for name in names if name in self.targets]
        work = ((self.named, self._shown(self.targets[name], read(name)), self._format(name)) for name in chosen)
        rounded: dict[str, QTensor] = {}
        notes: list[Note] = []
        for tensors, said in self.executor.map(_round, work):
            rounded |= tensors
            notes += said
            trim()
        return rounded, notes

    def read(self, name: str) -> Tensor:
        return self.folder.read([name])[name]

    def _read_target(self, target: Target) -> Target:
        return self._shown(target, self.read(target.name))

    def _shown(self, target: Target, value: Tensor) -> Target:
        """A weight as its layer shows it: transformers' Conv1D stores the transpose."""
        turned = self.network.found[_layer(target.name)].weight.stride() != self.state[target.name].stride()
        return replace(target, weight=value.t() if turned else value)

    def _sweep(self, log: Journal, spare: float, strict: Strict) -> None:
        """Solve block after block, going on at the first call that is not in the journal."""
        outside = {name: lift(log, OUTSIDE, name) for name in self.inside(None) if name in self.targets}
        module = share(self.folder.module)
        self.folder.put(module, {n: one.read() for n, one in log.tensors(OUTSIDE).items() if n in self.state})
        module = install(module, outside, self.network.tied, {})
        shelf = _Shelf(log)
        walk = Walk(module, self.blocks, units(self.learn), shelf, shelf.resume())
        sweep = _Sweep(self, log, module, shelf, outside, strict)
        found = {name: one for name, one in self.network.found.items() if member(name, "weight") in self.targets}
        done = [block for block in self.blocks if log.has(self.entry(block))]
        sweep_blocks(walk, found, sweep.solve, sweep.solve_outside, solved=done, enter=sweep.enter, leave=sweep.leave, limit=spare)

    def solved(self, moments: Mapping[str, Tensor], near: Mapping[str, QTensor],
               read: Callable[[str], Tensor]) -> Iterator[tuple[str, QTensor, str]]:  # fmt: skip
        """(name, tensor, account) of each layer of ``moments``, rounded to ``near`` before; ``read`` gives its numbers."""
        assert self.solver is not None
        solve, names = SOLVERS[self.solver], [member(layer, "weight") for layer in moments]
        work = ((solve, self._shown(self.targets[name], read(name)), near[name], moments[_layer(name)]) for name in names)
        trim()  # before the largest moment there is, of what gathering left
        for name, (tensor, account) in zip(names, self.executor.map(_solve, work), strict=True):
            trim()
            yield name, tensor, account

    # -- the journal --

    def entry(self, block: str) -> str:
        return f"block-{self.blocks.index(block):05}"

    def _entries(self, log: Journal) -> list[str]:
        return [entry for entry in [OUTSIDE, *map(self.entry, self.blocks), TAIL] if log.has(entry)]

    def write(self, log: Journal, entry: str, tensors: Mapping[str, QTensor], rest: Mapping[str, Tensor], notes: list[Note],
               told: Mapping[str, str]) -> None:  # fmt: skip
        flat = {key: t for name, tensor in tensors.items() for key, t in flat_tensors(name, tensor).items()}
        trim()
        described = {name: [str(t.format), t.shape, t.axis] for name, t in tensors.items()}
        log.write(entry, {**flat, **rest}, {"tensors": described, "notes": notes, "solved": dict(told)})

    def told(self, log: Journal) -> list[Note]:
        """All notes so far, in the order of the tensors."""
        facts = [log.facts(entry) for entry in self._entries(log)]
        said = [msgspec.convert(note, Note) for one in facts for note in one["notes"]]
        order = {target.name: i for i, target in enumerate(self.network.targets)}
        empty: list[Note] = []
        for target in self.network.targets:
            if target.weight.numel() == 0 and (choice := self.table.get(target.name)) is not None:
                round_weight(target, choice.format, empty)
        told = {name: text for one in facts for name, text in one["solved"].items()}
        done_by = accounts([target.name for target in self.network.targets], told, self.solver or "")
        notes = [*sorted([*said, *empty], key=lambda note: order[note.subject]), *done_by, *self.notes]
        if self.solver is None:
            return notes
        made = {name for one in facts for name in one["tensors"]}
        done = TAIL in self._entries(log) or not any(self._matrix(n) and self._block(n) is None for n in self.targets)
        left = [name for name in self.targets if name in made - told.keys() and (done or self._block(name) is not None)]
        return notes + unsolved(left, self.network.ops, self.solver)

    def result(self, log: Journal, provenance: Mapping[str, Any]) -> QModel:
        """The model, its numbers on the meta device."""
        facts = {name: one for entry in self._entries(log) for name, one in log.facts(entry)["tensors"].items()}
        shapes = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in self.numbers(log).items()}
        tensors = {name: lift_tensor(name, fmt, tuple(shape), axis, shapes) for name, (fmt, shape, axis) in facts.items()}
        sites = {n: c for n, c in self.table.items() if n in self.network.sites and c is not None}
        dynamic = {name: Activation(choice.format, "dynamic") for name, choice in sites.items()}
        notes = (*self.told(log), *overdrawn(self.asked, self.plan, self.network, tensors))
        return QModel(HF(self.config or {}), tensors, dynamic, self.plan, shapes, dict(provenance), notes, self.network.tied)

    def numbers(self, log: Journal) -> dict[str, Slice]:
        """Where the numbers of the result lie, by the names of the file; what was solved last stands for what was rounded."""
        return {name: one for entry in self._entries(log) for name, one in log.tensors(entry).items()}

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(stage, done, total)


@dataclass(eq=False)
class _Sweep:
    """What `sweep_blocks` is told to do at each block. Of the block at hand ``values`` are what is float in memory, ``packed`` its
    weights, rounded and then solved, ``notes`` and ``told`` what there is to say of them."""

    run: _Run
    log: Journal
    module: nn.Module
    shelf: _Shelf
    outside: Mapping[str, QTensor]
    strict: Strict
    values: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, QTensor] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)

    def enter(self, at: int, block: str) -> None:
        """Bring a block into memory: as it was solved, or float and rounded to nearest."""
        names = self.run.inside(block)
        self.values.clear()  # before others come
        self.values, self.told = self.run.folder.read(names), {}
        self.run.folder.put(self.module, self.values)
        if self.log.has(entry := self.run.entry(block)):
            for name in names:
                if name in self.run.targets:
                    put(self.module, _layer(name), lift(self.log, entry, name).dequantize())
        else:
            self.packed, self.notes = self.run.rounded(names, self.values.__getitem__)

    def solve(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layers of the block at hand; their packed form is all that stays of them."""
        new = {}
        for name, tensor, account in self.run.solved(moments, self.packed, self.values.__getitem__):
            self.packed[name], self.told[name] = tensor, account
            del self.values[name]
            new[_layer(name)] = tensor
        return {layer: tensor.dequantize() for layer, tensor in new.items()}

    def leave(self, at: int, block: str) -> None:
        """Write a block, and leave it out of memory."""
        if not self.log.has(entry := self.run.entry(block)):
            rest = {name: value for name, value in self.values.items() if name not in self.packed}
            self.run.write(self.log, entry, self.packed, rest, self.notes, self.told)
            self.strict(self.run.told(self.log))
        self.shelf.close(at, block)
        self.run.folder.put(self.module, {name: self.run.state[name] for name in self.run.inside(block)})
        self.run.tell("solve", at + 1, max(at + 1, len(self.run.blocks)))

    def solve_outside(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layers outside of all blocks, one at a time; nothing runs after them."""
        if not self.log.has(TAIL):
            done = [one for layer in moments for one in self.run.solved({layer: moments[layer]}, self.outside, self.run.read)]
            packed, told = {name: tensor for name, tensor, _ in done}, {name: account for name, _, account in done}
            self.run.write(self.log, TAIL, packed, {}, [], told)
        return {}


def _anything(notes: Sequence[Note]) -> None:
    """Not strict."""


def lift(log: Journal, entry: str, name: str) -> QTensor:
    """A packed tensor of an entry."""
    fmt, shape, axis = log.facts(entry)["tensors"][name]
    flat = {key: one.read() for key, one in log.tensors(entry).items() if key.startswith(f"{name}.")}
    return lift_tensor(name, fmt, tuple(shape), axis, flat)


def _layer(name: str) -> str:
    return name.removesuffix("weight").removesuffix(".")


def _round(work: tuple[str | None, Target, Format]) -> tuple[dict[str, QTensor], list[Note]]:
    notes: list[Note] = []
    solver, target, fmt = work
    return round_weight(target, fmt, notes, solver=solver), notes


def _solve(work: tuple[Callable[..., QTensor], Target, QTensor, Tensor]) -> tuple[QTensor, str]:
    solve, target, near, moment = work
    done = solved(partial(by_rows, solve), target.weight, near.format, moment, axis=target.axis, near=near)
    return done.tensor, str(done)


def _digest(*parts: bytes) -> str:
    whole = hashlib.blake2b(digest_size=20)
    for part in parts:
        whole.update(hashlib.blake2b(part, digest_size=20).digest())
    return whole.hexdigest()


def _batch_bytes(batch: Batch) -> bytes:
    """What tells a batch from another."""
    out = b""
    for name, x in [*((str(i), x) for i, x in enumerate(batch.args)), *sorted(batch.named.items())]:
        out += msgspec.json.encode([name, str(x.dtype), list(x.shape)])
        out += x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return out


@dataclass(eq=False)
class _Shelf:
    """A shelf in the journal: an entry for the output of each call and unit, and one per call that is complete."""

    log: Journal
    structures: dict[int, dict[int, Any]] = field(default_factory=dict)

    def put(self, at: int, unit: int, value: Any) -> None:
        """See `Shelf`."""
        tensors: list[Tensor] = []
        structure = flatten(value, tensors)
        self.log.write(self._name(at, unit), {str(i): t for i, t in enumerate(tensors)})
        self.structures.setdefault(at, {})[unit] = structure

    def get(self, at: int, unit: int) -> Any:
        """See `Shelf`."""
        structure = self.structures[at][unit]
        if not self.log.has(self._name(at, unit)):
            return unflatten(structure, poison(structure))
        found = self.log.tensors(self._name(at, unit))
        return unflatten(structure, (found[str(i)].read() for i in range(len(found))))

    def drop(self, at: int) -> None:
        """See `Shelf`."""
        for unit in self.structures.get(at, ()):
            self.log.remove(self._name(at, unit))

    def close(self, at: int, block: str) -> None:
        """Call ``at`` is complete, for every unit that makes it."""
        units = self.structures.get(at, {})
        self.log.write(f"call-{at:05}", {}, {"block": block, "outputs": [[unit, units[unit]] for unit in units]})

    def resume(self) -> list[str]:
        """The blocks of the calls that are complete."""
        history: list[str] = []
        while self.log.has(f"call-{len(history):05}"):
            facts = self.log.facts(f"call-{len(history):05}")
            self.structures[len(history)] = dict(facts["outputs"])
            history.append(facts["block"])
        return history

    def _name(self, at: int, unit: int) -> str:
        return f"out-{at:05}-{unit:05}"
