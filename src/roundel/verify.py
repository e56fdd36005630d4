"""`verify`: a quantized model run by other programs, every code that they show compared with the simulation of their rounding."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import Batch, batches
from .errors import CheckError, InputError, PlanError, RoundelError
from .evaluate.scores import METRICS, Metric, Scores
from .graph import BATCH, Graph
from .graph.module import bind_inputs
from .integer import in_dialect, lower, simulate
from .integer.dialect import Ints
from .integer.ops import INTEGER
from .integer.running import Exponents
from .integer.simulate import as_array
from .qmodel import QModel
from .runtimes import runtime

#: What is counted where it is not codes, by how a runtime's name begins.
_COUNTED = {"vela": "operators are not on the NPU", "board": "calls differ by their checksums"}

#: Examples that a board which QEMU plays gets where no limit is given.
BOARD = 5


@dataclass(frozen=True)
class Verification:
    """What one runtime made of the model.

    * ``differing`` of ``total``: codes of all values that the runtime shows and that differ from the simulation, over ``examples``
      inputs; for an NPU's compiler, operators that it does not place there of all.
    * ``first_op``: the first value in running order with a differing code, ``histogram``: its differences, code by code,
      {runtime - simulation: how many}; ``values``: name -> how many differ, for those where any does.
    * ``metric``: the task metric (``metric_name``) of the runtime's own outputs, ``metric_simulated`` that of the simulation.
    * ``why``: why there is no result: it is ``absent`` here, or refuses the model. ``notes``: the rest.
    """

    runtime: str
    differing: int = 0
    total: int = 0
    first_op: str | None = None
    histogram: Mapping[int, int] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)
    examples: int = 0
    metric: float | None = None
    metric_simulated: float | None = None
    metric_name: str = ""
    why: str | None = None
    absent: bool = False
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether it ran, showed something, and nothing differed."""
        return self.why is None and self.differing == 0 and self.total > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, keys equal to the attributes."""
        return asdict(self) | {"histogram": {str(off): n for off, n in self.histogram.items()}, "exact": self.exact}

    def __str__(self) -> str:
        if self.why is not None:
            return f"{self.runtime}: no result: {self.why}"
        what = next((text for kind, text in _COUNTED.items() if self.runtime.startswith(kind)), "elements differ")
        said = f"{self.runtime}: {self.differing:,} of {self.total:,} {what}"
        if self.examples:
            said += f" over {self.examples:,} inputs"
        if self.first_op is not None:
            offs = ", ".join(f"{off:+d}: {n:,}" for off, n in sorted(self.histogram.items()))
            said += f"; the first in {self.first_op!r}" + (f", off by {offs}" if offs else "")
        if self.metric is not None:
            said += f"; {self.metric_name} {self.metric:.4g} (simulated {self.metric_simulated:.4g})"
        return said


def verify(
    q: QModel, against: Sequence[str], data: Any, *, metric: str | Metric | None = None, limit: int | None = None
) -> dict[str, Verification]:
    """Run ``q`` on ``data`` in every runtime named ``against``, and compare code by code.

    Names are those of `roundel.runtimes.RUNTIMES`. Each runtime is compared with the simulation of its own rounding, so a
    difference is a difference in arithmetic. A runtime that is absent, or cannot take the model, has its reason in ``.why``.
    ``limit`` is how many examples are used; boards that QEMU plays get 5 where it is None. ``metric`` as in `evaluate`.

    Raises `PlanError` for a name that there is not and for a model that cannot be lowered, `InputError` for data that is empty or
    does not fit.

    >>> from roundel import quantize
    >>> x = torch.randn(64, 16)
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(16, 4)), "int8", "int8", data=[x])
    >>> found = verify(q, ["host-c"], [x])["host-c"]
    >>> found.exact, found.differing, found.total, found.examples  # doctest: +SKIP
    (True, 0, 1280, 64)
    """
    if not isinstance(q, QModel):
        raise PlanError(f"what is verified is a quantized model (roundel.quantize, roundel.load); got {type(q).__name__}")
    if not isinstance(against, Iterable):
        raise PlanError(f"against= names runtimes, such as ['host-c']; got {type(against).__name__}")
    if limit is not None and not isinstance(limit, int):
        raise InputError(f"limit is a whole number of examples; got {limit!r}")
    names = [against] if isinstance(against, str) else list(against)
    if not names:
        raise PlanError("there is nothing to compare with: name one runtime or more, such as host-c")
    modules = {name: runtime(name) for name in names}
    if isinstance(metric, str) and metric not in METRICS:
        raise PlanError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}, or pass fn(outputs, target)")
    items = _examples(data, limit)
    if isinstance(q.structure, Graph):  # what is not, `lower` refuses in words of its own
        for batch in items:
            bind_inputs(q.structure, batch.args, dict(batch.named))
    if isinstance(q.structure, Graph) and items[0].target is not None:  # a label that does not fit is told before any work
        _check_labels(q, items, metric)
    graphs = {dialect: lower(q, dialect) for dialect in dict.fromkeys(dialect for _, dialect in modules.values())}
    return {name: _one(q, graphs[dialect], module, name, items, metric, limit) for name, (module, dialect) in modules.items()}


def _one(q: QModel, graph: Graph, module: Any, name: str, items: list[Batch], metric: str | Metric | None,
         limit: int | None) -> Verification:  # fmt: skip
    if (why := module.absent(name)) is not None:
        return Verification(name, why=why, absent=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if hasattr(module, "place"):
                return _placed(module.place(q, graph, Path(scratch), name), name)
            used = _limited(items, BOARD) if limit is None and name.startswith("qemu-") else items
            expected, inputs = _simulated(in_dialect(graph, module.dialects(name)), used)
            got = module.run(q, graph, inputs, Path(scratch), name)
            _check_shapes(expected, got)
        except RoundelError as err:
            return Verification(name, why=str(err))
    return _compared(graph, name, expected, got, used, metric)


def _placed(placement: Any, name: str) -> Verification:
    notes = tuple(f"{op} that makes {result!r} is not on the NPU: {why}" for op, result, why in placement.off)
    first = placement.off[0][1] if placement.off else None
    return Verification(name, len(placement.off), placement.total, first, notes=notes)


def _examples(data: Any, limit: int | None) -> list[Batch]:
    """The first ``limit`` examples of a user's data; batches after those are not made."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is how many examples are used, 1 or more; got {limit}")
    items = _limited(filter(len, batches(data)), limit)
    if not items:
        raise InputError("there is nothing to verify with: the data holds no examples")
    return items


def _limited(items: Iterable[Batch], limit: int | None) -> list[Batch]:
    out: list[Batch] = []
    left = limit
    for batch in items:
        out.append(batch if left is None or len(batch) <= left else batch.take(torch.arange(left)))
        if left is not None and (left := left - len(batch)) <= 0:
            break
    return out


def _simulated(graph: Graph, items: list[Batch]) -> tuple[dict[str, Ints], dict[str, Ints]]:
    """(codes of every value, codes of the inputs) over all examples."""
    seen: dict[str, list[Any]] = {}
    state = Exponents.of(graph)
    for batch in items:
        bound = bind_inputs(graph, batch.args, dict(batch.named))
        simulate(graph, watch=lambda name, codes: seen.setdefault(name, []).append(codes), state=state, **bound)  # type: ignore[arg-type]
    found = {name: _joined(parts, graph.values[name].shape) for name, parts in seen.items()}
    running = {node.inputs[0]: found[node.name] for node in graph if node.op == "quantize" and "runs" in node.attrs}
    return found, _at_the_doors(graph, items) | running


def _at_the_doors(graph: Graph, items: list[Batch]) -> dict[str, Ints]:
    """Codes of the inputs over all examples; token ids are their own codes."""
    bound = [bind_inputs(graph, batch.args, dict(batch.named)) for batch in items]
    doors = {node.inputs[0]: node for node in graph if node.op == "quantize"}
    out = {}
    for name in graph.inputs:
        parts = [as_array(inputs[name]) for inputs in bound]
        if name in doors:
            door = {key: doors[name].attrs[key] for key in ("scale", "zero", "low", "high")}
            parts = [INTEGER["quantize"](part, **door) for part in parts]
        out[name] = np.concatenate(parts).astype(np.int64)
    return out


def _joined(parts: list[Ints], shape: tuple[int | str, ...]) -> Ints:
    """The codes of all batches; a value that has no batch axis is the same in each."""
    return np.concatenate(parts, shape.index(BATCH)) if BATCH in shape else parts[0]


def _check_labels(q: QModel, items: list[Batch], metric: str | Metric | None) -> None:
    """`InputError` or `PlanError` where the metric cannot be taken of these labels."""
    first = items[0]
    with torch.no_grad():
        out = q.module(*first.args, **first.named)
    Scores.like(first, out, metric).take(0, first, out, out)


def _check_shapes(expected: Mapping[str, Ints], got: Mapping[str, Ints]) -> None:
    for name in got.keys() & expected.keys():
        if got[name].shape != expected[name].shape:
            raise CheckError(f"it gives {name!r} the shape {list(got[name].shape)}; {list(expected[name].shape)} is right")


def _compared(graph: Graph, name: str, expected: Mapping[str, Ints], got: Mapping[str, Ints], items: list[Batch],
              metric: str | Metric | None) -> Verification:  # fmt: skip
    differing, total, values, first, histogram = 0, 0, {}, None, {}
    hidden = []
    for node in graph:
        if node.op in ("quantize", "dequantize"):
            continue
        if node.name not in got:
            hidden.append(node.name)
            continue
        off = got[node.name].astype(np.int64) - expected[node.name]
        wrong = int(np.count_nonzero(off))
        total, differing = total + off.size, differing + wrong
        if wrong:
            values[node.name] = wrong
            if first is None:
                first = node.name
                histogram = {int(k): int(n) for k, n in sorted(Counter(off[off != 0].tolist()).items())}
    sources = {node.name: node.inputs[0] for node in graph if node.op == "dequantize"}
    outputs = {sources.get(out, out) for out in graph.outputs}
    notes = [f"{len(hidden)} values inside are not shown by the runtime"] if set(hidden) - outputs else []
    notes += [f"the output {name!r} is not shown by the runtime: it was not compared" for name in hidden if name in outputs]
    figures = _metric(graph, expected, got, items, metric) if graph.outputs[0] in sources else {}
    return Verification(name, differing, total, first, histogram, values, sum(map(len, items)), notes=tuple(notes), **figures)


def _metric(graph: Graph, expected: Mapping[str, Ints], got: Mapping[str, Ints], items: list[Batch],
            metric: str | Metric | None) -> dict[str, Any]:  # fmt: skip
    """The task metric of the first output: the simulation's and the runtime's."""
    door = next(node for node in graph if node.name == graph.outputs[0])
    name = door.inputs[0]
    if name not in got:
        return {}
    pair = [torch.from_numpy((codes[name] - door.attrs["zero"]).astype(np.float32) * np.float32(door.attrs["scale"]))
            for codes in (expected, got)]  # fmt: skip
    scores, start = None, 0
    for number, batch in enumerate(items):
        real, now = (part[start : start + len(batch)] for part in pair)
        start += len(batch)
        scores = scores or Scores.like(batch, real, metric)
        scores.take(number, batch, real, now)
    if scores is None:
        return {}
    found = scores.figures(0)
    return {"metric": found["metric"], "metric_simulated": found["metric_float"], "metric_name": found["metric_name"]}


# -- a real board -----------------------------------------------------------------------------------------------------


def vectors(q: QModel, data: Any, limit: int = 2) -> dict[str, Ints]:
    """Codes of the first ``limit`` examples of ``data`` at the model's inputs: golden vectors, as `export` and `verify_log` take
    them. Raises as `verify` does."""
    return _at_the_doors(lower(q, "R2"), _examples(data, limit))


_LINE = re.compile(r"\w+ call (\d+) crc ([0-9A-Fa-f]{8})\b")


def verify_log(q: QModel, log: str, *, vectors: Mapping[str, Ints] | None = None) -> Verification:
    """Judge the ``log`` of a board that ran the exported self-test: one checksum for each call, against the simulation's.

    ``vectors`` are those given to `export`, if any were (`roundel.verify.vectors` makes them of data). Other lines of the log are
    passed over; where a board printed several runs, the last counts. What is counted are calls. Raises `CheckError` where the log
    holds no checksums or not one for each call.

    >>> from roundel import quantize
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(16, 4)), "int8", "int8", data=[torch.randn(64, 16)])
    >>> verify_log(q, "nothing to see")
    Traceback (most recent call last):
    roundel.errors.CheckError: the log holds 0 checksums, the model has 1 calls: was it cut, or is it another model's?
    """
    from .exporters.c.emit import emit
    from .exporters.c.project import checksums, examples

    graph = lower(q, "R2")
    source = emit(graph)
    wanted = checksums(graph, source, vectors if vectors is not None else examples(graph))
    found = {int(number): int(crc, 16) for number, crc in _LINE.findall(log)}
    if sorted(found) != list(range(len(wanted))):
        raise CheckError(
            f"the log holds {len(found)} checksums, the model has {len(wanted)} calls: was it cut, or is it another model's?"
        )
    # A copy of a value into another order is a call of its own, and goes by the value's name.
    names = [port.name if port.name in graph.values else port.name.partition(", axes ")[0] for port in source.watched]
    wrong = [name for i, (name, crc) in enumerate(zip(names, wanted)) if found[i] != crc]
    notes = ("every call differs: is it another model's log, or was export given golden vectors that are missing here?",)
    told = notes if len(wrong) == len(wanted) else ()
    return Verification("board-log", len(wrong), len(wanted), wrong[0] if wrong else None, values=dict(Counter(wrong)), notes=told)
