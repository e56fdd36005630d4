"""`quantize`: a float network, a plan and some data become a `QModel`; every decision is in the plan or in the notes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import __version__
from .calibrate import Progress, calibrate, evaluating, list_of_batches, one_thread, run
from .data import Batch, Data, Preprocess, batches
from .errors import CheckError, FormatError, InputError, PlanError
from .evaluate import near_chance, predictions
from .formats.format import MODEL, Format, with_real
from .formats.grid import Levels, Uniform
from .formats.qtensor import QTensor, to_matrix
from .gate import LEAST, judge, losses, split
from .graph import BATCH, Graph, GraphModule, Node
from .network.capture import capture
from .network.fuse import fuse
from .network.huggingface import hf_config
from .network.layer import WEIGHTED, Activation
from .network.sites import find_sites, find_slots, find_weights
from .network.walk import Leaf, leaf_slots, leaves, member, state
from .plan import FLOAT, Choice, Plan, Slot
from .qmodel import HF, Constants, External, Note, QModel, share
from .ranges import known_ranges, static_activation
from .refine import Solve, hessians, refine
from .solvers import NEED_HESSIAN, SOLVERS, rtn
from .stats import Stats

#: What ``effort`` does after rounding to nearest: the weights' solver, or none.
EFFORTS: dict[str, str | None] = {"fast": None, "default": "gptq"}

#: Examples that a step learns from, and as many that judge it, at most: all their values at one node are in memory together.
EXAMPLES = 256

#: A number is an outlier when it is this many times the usual (median) magnitude of its tensor.
OUTLIER = 1e4


@dataclass(frozen=True, eq=False)
class _Target:
    """One weight to quantize: its values and the axis of its outputs."""

    name: str
    weight: Tensor
    axis: int


def quantize(
    model: nn.Module,
    weights: str | None = "int8",
    activations: str | None = None,
    *,
    data: Any = None,
    effort: str = "fast",
    solver: str | None = None,
    ranges: str = "mse",
    exclude: Iterable[str] = (),
    plan: Plan | None = None,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
) -> QModel:
    """Quantize ``model`` after training.

    ``weights`` is a format text. ``activations`` is None (computed in float), a format text (static: ranges from ``data``), or one
    with ``:dynamic`` (ranges at run time, of the inputs of weighted layers) such as ``int8:dynamic`` and ``int8/token:dynamic``.
    ``effort`` is fast (round to nearest, seconds) or default (GPTQ, minutes); both then correct the biases of a graph. Such a step
    is kept only if it brings the model nearer to the float one on every fourth example of ``data``, which it did not learn from;
    the notes say what was measured. ``solver``, rtn or gptq, names the weights' solver outright. ``ranges`` is minmax, average,
    percentile[:P], mse or kl. ``exclude`` names layers to leave float, as shell wildcards; ``plan`` gives rules per layer in place
    of both formats. ``seed`` is recorded; nothing here is drawn at random yet.
    Labels in ``data`` are used to check that the float model works at all.

    With ``strict`` anything that is left float unasked, or done in another way, is a `CheckError`. Raises `PlanError` for a plan
    that does not fit the model, `InputError` for bad data or weights, `FormatError` for numbers that a format cannot hold.

    >>> import torch
    >>> q = quantize(torch.nn.Sequential(torch.nn.Linear(64, 10)), weights="int4/g32", data=[torch.randn(8, 64)])
    >>> q.tensors["0.weight"].bits, q.module(torch.randn(2, 64)).shape
    (4.5, torch.Size([2, 10]))
    """
    _refuse(model, solver, effort, data is not None)
    plan = _rules(weights, activations, exclude, plan)
    items = None if data is None else list_of_batches(batches(data, preprocess=preprocess))
    notes: list[Note] = []
    with one_thread(), torch.no_grad(), evaluating(model):
        _check_numbers(model)
        network = _network(model, items, notes)
        table = network.resolve(plan)
        if not network.targets and any(rule.weight not in (None, FLOAT) for rule in plan.rules):
            raise PlanError("the model has no layer to quantize: no linear, convolution or embedding layer with real weights")
        if any(c and c.when == "static" for name, c in table.items() if name in network.sites) and items is None:
            raise PlanError("static activations need calibration data (data=, --data); or use ':dynamic' ranges, or weights alone")
        _check_weights(network, table, notes)
        if items is not None:
            _check_float(network.module, items)
        if hf_config(model) is not None and any(c and c.when == "static" for n, c in table.items() if n in network.sites):
            notes.append(
                Note(
                    "model", "only the inputs of its weighted layers are quantized, what lies between them is float", fallback=True
                )
            )
        chosen = _activations(network, table, items or [], ranges, progress, notes)
        tensors = _weights(network, table, progress, notes)
    provenance = {
        "roundel": __version__,
        "torch": str(torch.__version__),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "effort": effort,
        "solver": solver or "rtn",
        "ranges": ranges,
        "seed": seed,
        "calibration_batches": len(items) if items is not None else 0,
    }
    applied = preprocess or (data.preprocess if isinstance(data, Data) else None)
    if applied is not None and applied != Preprocess():
        provenance["preprocess"] = applied.to_dict()
    q = network.finish(tensors, chosen, plan, provenance, ())
    with one_thread(), evaluating(model):
        if items is not None and tensors:
            q = _refined(network, q, items, solver, effort, progress, notes)
    undone = [n for n in notes if n.fallback]
    if strict and undone:
        raise CheckError("strict: " + "; ".join(f"{n.subject}: {n.text}" for n in undone[:5])
                         + (f"; and {len(undone) - 5} more" if len(undone) > 5 else ""))  # fmt: skip
    return replace(q, notes=q.notes + tuple(notes))


# -- the two kinds of network: a graph, or modules ---------------------------------------------------------------------


class _GraphNetwork:
    """A fused graph: every edge is a site."""

    def __init__(self, graph: Graph, notes: list[Note]) -> None:
        self.graph = graph
        self.module: nn.Module = GraphModule(graph).eval()
        self.groups = find_sites(graph)
        self.found = find_weights(graph)
        self.targets = [
            _Target(name, graph.constants[name], 1 if node.op == "conv_transpose" and node.attrs.get("groups", 1) == 1 else 0)
            for name, node in self.found.items()
        ]
        self.tied = {f"{node.name}.weight": node for node in graph.nodes if _reads_anothers(node, self.found)}
        self.sites: set[str] = set()
        # batches must keep their size where the first input has no axis for them, or a fixed one
        first = graph.values.get(next(iter(graph.inputs), ""))
        self.whole = first is not None and BATCH not in first.shape[:1]
        _left(notes, [node.inputs[1] for node in graph.nodes if node.op in WEIGHTED and node.inputs[1] in graph.constants
                      and node.inputs[1] not in self.found])  # fmt: skip

    def resolve(self, plan: Plan) -> dict[str, Choice | None]:
        """Static rules decide sites, dynamic ones the inputs of weighted layers; a plan may hold both."""
        static, dynamic = find_slots(self.graph, True), find_slots(self.graph, False)
        aliases = [Slot(name, node.name, "weight") for name, node in self.tied.items()]
        both = {slot.name: slot for slot in [*static, *dynamic, *aliases]}
        table = plan.resolve(both.values())
        _check_ties(table, {name: node.inputs[1] for name, node in self.tied.items()})
        weights = {slot.name for slot in static if slot.kind == "weight"}
        whole = {slot.name for slot in static} - weights
        kept: dict[str, Choice | None] = {name: table[name] for name in weights}
        for name in whole:
            kept[name] = c if (c := table[name]) is None or c.when == "static" else None
        for slot in dynamic:
            if slot.kind == "activation" and (c := table[slot.name]) is not None and c.when == "dynamic":
                kept[slot.name] = c
        self.sites = whole | {slot.name for slot in dynamic if slot.kind == "activation"}
        return kept

    def stats(self, items: list[Batch], only: set[str], progress: Progress | None) -> dict[str, Stats]:
        return calibrate(self.module, items, only=only, progress=progress)

    def known(self) -> dict[str, tuple[float, float]]:
        return known_ranges(self.graph, self.groups)

    def refined(self, q: QModel, items: list[Batch], solve: Callable[..., QTensor] | None, bias: bool,
                progress: Progress | None) -> QModel:  # fmt: skip
        """Layer by layer, on the inputs that the quantized layers before leave."""
        assert isinstance(self.module, GraphModule)
        return refine(q, self.module, items, solve and _solving(self, q, solve, progress), bias)

    def finish(self, tensors: dict[str, QTensor], chosen: dict[str, Activation], plan: Plan, provenance: dict[str, Any],
               notes: tuple[Note, ...]) -> QModel:  # fmt: skip
        rest = {name: t.detach().clone() for name, t in self.graph.constants.items() if name not in tensors}
        structure = replace(self.graph, constants=Constants({**tensors, **rest}))
        said = tuple(Note("model", text) for text in self.graph.notes)
        return QModel(structure, tensors, chosen, plan, rest, provenance, said + notes)


class _ModuleNetwork:
    """An ordinary network whose weighted leaf modules are replaced; the sites are their inputs."""

    def __init__(self, module: nn.Module, notes: list[Note]) -> None:
        self.module = module
        self.found: dict[str, Leaf] = leaves(module)
        self.tied = _ties(module)
        named = {member(name, "weight"): one for name, one in self.found.items()}
        self.targets = [_Target(name, one.weight, one.axis) for name, one in named.items() if name not in self.tied]
        self.sites = {member(name, "input") for name in self.found}
        self.whole = False
        _left(notes, [name for name, p in module.named_parameters() if p.ndim >= 2 and name not in named])

    def resolve(self, plan: Plan) -> dict[str, Choice | None]:
        table = plan.resolve(leaf_slots(self.found))
        _check_ties(table, self.tied)
        return {name: c for name, c in table.items() if name not in self.tied}

    def stats(self, items: list[Batch], only: set[str], progress: Progress | None) -> dict[str, Stats]:
        return calibrate(self.module, items, only=only, progress=progress)

    def known(self) -> dict[str, tuple[float, float]]:
        return {}

    def refined(self, q: QModel, items: list[Batch], solve: Callable[..., QTensor] | None, bias: bool,
                progress: Progress | None) -> QModel:  # fmt: skip
        """Every layer on the inputs that the float network gives it: one pass, all Hessians in memory."""
        if solve is None:
            return q
        new, solving = dict(q.tensors), _solving(self, q, solve, progress)
        for name, hessian in hessians(self.module, self.found, items, set(new)).items():
            new[name] = solving(name, hessian)
        return replace(q, tensors=new)

    def finish(self, tensors: dict[str, QTensor], chosen: dict[str, Activation], plan: Plan, provenance: dict[str, Any],
               notes: tuple[Note, ...]) -> QModel:  # fmt: skip
        gone = set(tensors) | {alias for alias, first in self.tied.items() if first in tensors}
        rest = {name: t.clone() for name, t in state(self.module).items() if name not in gone and name not in self.tied}
        config = hf_config(self.module)
        kind = type(self.module)
        structure = HF(config) if config is not None else External(f"{kind.__module__}:{kind.__qualname__}")
        return QModel(
            structure,
            tensors,
            chosen,
            plan,
            rest,
            provenance,
            notes,
            self.tied,
            template=None if config is not None else share(self.module),
        )


def _solving(network: _GraphNetwork | _ModuleNetwork, q: QModel, solve: Callable[..., QTensor], progress: Progress | None) -> Solve:
    """``solve`` by the name of a weight, in the format that the weight has."""
    targets = {target.name: target for target in network.targets}
    done: list[str] = []

    def one(name: str, hessian: Tensor) -> QTensor:
        target, fmt = targets[name], q.tensors[name].format
        if progress:
            done.append(name)
            progress("solve", len(done), len(q.tensors))
        return solve(target.weight, fmt, hessian, axis=target.axis)

    return one


def _network(model: nn.Module, items: list[Batch] | None, notes: list[Note]) -> _GraphNetwork | _ModuleNetwork:
    """A graph where the model is one or can be captured; transformers models and what cannot be captured go the module path."""
    if isinstance(model, GraphModule):
        return _GraphNetwork(fuse(model.graph), notes)
    if hf_config(model) is not None:
        return _ModuleNetwork(model, notes)
    if items is None:
        notes.append(
            Note(
                "model",
                "without data to trace it with, the file holds no structure: give data (data=, --data), or load(path, into=module)",
            )
        )
        return _ModuleNetwork(model, notes)
    example = items[0].named or items[0].args
    if len({tuple((name, x.shape[1:]) for name, x in _inputs(batch)) for batch in items}) > 1:
        text = "its batches differ in more than the batch size, which one graph cannot follow; its layers are quantized in place"
        notes.append(Note("model", f"{text}, each layer's input only", fallback=True))
        return _ModuleNetwork(model, notes)
    try:
        return _GraphNetwork(fuse(capture(model, example)), notes)
    except InputError as err:
        run(model, items[0])  # where it cannot run on the data at all, that is the answer
        notes.append(
            Note(
                "model",
                f"it cannot be captured as a graph ({err}); its layers are quantized in place, each layer's input only, "
                "and the file needs load(path, into=module)",
                fallback=True,
            )
        )
        return _ModuleNetwork(model, notes)


def _inputs(batch: Batch) -> list[tuple[str, Tensor]]:
    return [*((str(i), x) for i, x in enumerate(batch.args)), *sorted(batch.named.items())]


def _ties(module: nn.Module) -> dict[str, str]:
    """Name -> the earlier name of the same tensor, over the whole state."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.numel() and not tensor.is_meta:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key in first:
                ties[name] = first[key]
            first.setdefault(key, name)
    return ties


def _reads_anothers(node: Node, found: Mapping[str, Node]) -> bool:
    """Whether a layer computes with the weight of another, as a tied head does; a layer that runs again only has a number."""
    if node.op not in WEIGHTED or found.get(node.inputs[1], node) is node:
        return False
    return not re.fullmatch(re.escape(node.inputs[1].removesuffix(".weight")) + r"(_\d+)?", node.name)


def _check_ties(table: Mapping[str, Choice | None], tied: Mapping[str, str]) -> None:
    for alias, first in tied.items():
        if alias in table and first in table and table[alias] != table[first]:
            raise PlanError(f"{alias} and {first} are one tied tensor, but the plan treats them differently: name both or neither")


def _left(notes: list[Note], names: list[str]) -> None:
    """List the weights that nothing here can quantize."""
    if names:
        what = "parameters are in no layer that Roundel quantizes and stay as they are"
        notes.append(Note("model", f"{len(names)} {what}: {_some(names)}", fallback=True))


# -- checks before any work -------------------------------------------------------------------------------------------


def _refuse(model: object, solver: str | None, effort: str, data: bool) -> None:
    if isinstance(model, QModel):
        raise PlanError("this model is quantized already; start from the float model")
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"a model is a torch.nn.Module, got {type(model).__name__}; roundel.read(path) makes one from a file or folder"
        )
    if solver is not None and solver not in SOLVERS:
        raise PlanError(f"there is no solver {solver!r}; there are {', '.join(SOLVERS)}")
    if effort not in EFFORTS:
        raise PlanError(f"there is no effort {effort!r}; there are {', '.join(EFFORTS)}")
    if solver in NEED_HESSIAN and not data:
        raise PlanError(f"the solver {solver} learns from the inputs of each layer: pass data=")
    for name, child in model.named_modules():
        where = type(child).__module__
        if (
            "quantized" in where
            or where.startswith(("bitsandbytes", "torchao", "auto_gptq", "gptqmodel"))
            or where.startswith("roundel.network")
        ):
            raise PlanError(
                f"{name or 'the model'} is a {type(child).__name__}: it is quantized already; start from the float model"
            )


def _check_numbers(model: nn.Module) -> None:
    """Every number is there and finite, those that stay float included; -inf in a buffer or constant is a mask."""
    graph = model.graph.constants if isinstance(model, GraphModule) else {}
    parameters = {} if graph else dict(model.named_parameters())
    tensors = parameters | (dict(graph) if graph else dict(model.named_buffers()))
    if lazy := [name for name, t in tensors.items() if is_lazy(t)]:
        raise InputError(f"{_some(lazy)} have no shape yet (lazy modules): run the model once on a batch before quantizing it")
    if missing := [name for name, t in tensors.items() if t.is_meta]:
        raise InputError(f"{len(missing)} tensors have no numbers (meta device): {_some(missing)}; load the weights first")
    for name, t in tensors.items():
        if t.is_floating_point() or t.is_complex():
            _check_finite(name, t.detach(), mask=name not in parameters)


def _check_finite(name: str, w: Tensor, mask: bool = False) -> None:
    w = w if w.is_complex() else w.float()
    bad = ~torch.isfinite(w)
    if mask and not w.is_complex():
        bad &= w != -torch.inf
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise InputError(f"{name}: {int(bad.sum())} of {w.numel()} numbers are not finite (in float32), the first at {first}; "
                         "repair the model")  # fmt: skip


def _rules(weights: str | None, activations: str | None, exclude: Iterable[str], plan: Plan | None) -> Plan:
    """The plan that the arguments ask for; ``exclude`` comes after the rules of a given plan."""
    for name, text in (("weights", weights), ("activations", activations)):
        if text is not None and not isinstance(text, str):
            raise PlanError(f"{name} is a format text such as 'int4/g32', or None; got {type(text).__name__}")
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
    if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise PlanError(f"exclude holds names of layers, as shell wildcards; got {odd[0]!r}")
    if plan is None:
        return Plan.of(weights, activations, patterns)
    if not isinstance(plan, Plan):
        raise PlanError(f"plan is a Plan, got {type(plan).__name__}; Plan.read(path) makes one of a TOML or JSON file")
    if activations is not None or weights not in ("int8", FLOAT, None):
        raise PlanError(
            "the plan says how weights and activations are treated; leave weights= and activations= away, or add a rule"
        )
    return Plan((*plan.rules, *Plan.of(None, None, patterns).rules[1:]))


def _check_weights(network: _GraphNetwork | _ModuleNetwork, table: Mapping[str, Choice | None], notes: list[Note]) -> None:
    """Numbers that are not finite, formats that cannot apply, groups that do not divide: all before the work starts."""
    short: dict[int, list[str]] = {}
    for target in network.targets:
        w = target.weight
        _check_finite(target.name, w)
        choice = table.get(target.name)
        if choice is None:
            continue
        if choice.format.table == MODEL:
            raise PlanError(
                f"{target.name}: a table shared by the model ({choice.format}) is not built yet; use @tensor or @channel"
            )
        cols = to_matrix(w, target.axis).shape[1]
        group = choice.format.share.cols
        if group and cols % group:
            short.setdefault(group, []).append(target.name)
    for group, names in short.items():
        notes.append(
            Note(
                "groups",
                f"groups of {group} do not divide the rows of {_some(names)}: the last group of each row is short",
            )
        )


def _check_float(module: nn.Module, items: list[Batch]) -> None:
    """Where there are labels, the float model must know more than chance, or its inputs are not what it was trained on."""
    right = total = classes = 0
    for batch in items:
        if batch.target is None or batch.target.ndim != 1 or batch.target.is_floating_point():
            return
        scores = predictions(run(module, batch))
        if scores.ndim != 2 or scores.shape[0] != batch.target.shape[0]:
            return
        classes = scores.shape[1]
        right += int((scores.argmax(1) == batch.target).sum())
        total += batch.target.shape[0]
    if total and near_chance(right / total, classes, total):
        raise InputError(f"the float model itself gets {right} of {total} right ({classes} classes), which is chance: "
                         "check the preprocessing (mean, std, scale, channel order) and the labels before quantizing")  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# -- activations ------------------------------------------------------------------------------------------------------


def _activations(
    network: _GraphNetwork | _ModuleNetwork,
    table: Mapping[str, Choice | None],
    items: list[Batch],
    ranges: str,
    progress: Progress | None,
    notes: list[Note],
) -> dict[str, Activation]:
    wanted = {name: c for name, c in table.items() if name in network.sites and c is not None}
    static = {name for name, c in wanted.items() if c.when == "static"}
    stats = network.stats(items, static, progress) if static else {}
    fixed = network.known()
    chosen: dict[str, Activation] = {}
    for name, choice in wanted.items():
        if choice.when == "dynamic":
            chosen[name] = Activation(choice.format, "dynamic")
        elif name in stats:
            chosen[name] = static_activation(name, choice.format, stats[name], ranges, fixed.get(name))
        else:
            notes.append(Note(name, "no value passed here during calibration; it stays float", fallback=True))
    return chosen


# -- weights ----------------------------------------------------------------------------------------------------------


def _weights(
    network: _GraphNetwork | _ModuleNetwork, table: Mapping[str, Choice | None], progress: Progress | None, notes: list[Note]
) -> dict[str, QTensor]:
    """Every weight rounded to nearest."""
    tensors: dict[str, QTensor] = {}
    for i, target in enumerate(network.targets):
        choice = table.get(target.name)
        if choice is not None and target.weight.numel() == 0:
            notes.append(Note(target.name, f"it is empty, shape {list(target.weight.shape)}; it stays as it is"))
        elif choice is not None:
            tensors[target.name] = _rounded(target, choice.format, notes)
            _tell_outlier(target, tensors[target.name], notes)
        if progress:
            progress("quantize", i + 1, len(network.targets))
    return tensors


def _rounded(target: _Target, fmt: Format, notes: list[Note]) -> QTensor:
    """One weight rounded; scales are kept as fp32, with a note, where fp16 cannot hold them or would lose the tensor's own grid."""
    wide = with_real(fmt, "fp32")
    if wide != fmt and isinstance(fmt.grid, Uniform | Levels) and _on_grid(target, wide):
        kept = rtn(target.weight, wide, axis=target.axis)
        if torch.equal(kept.dequantize(), target.weight.float()):
            narrow = rtn(target.weight, fmt, axis=target.axis)
            if torch.equal(narrow.dequantize(), target.weight.float()):
                return narrow
            notes.append(
                Note(
                    target.name,
                    f"its numbers already lie on the grid of {wide}: the scale is kept as fp32, so that they come back exactly",
                )
            )
            return kept
    try:
        return rtn(target.weight, fmt, axis=target.axis)
    except FormatError as err:
        if wide == fmt:
            raise FormatError(f"{target.name}, shape {list(target.weight.shape)}: {err}") from err
        notes.append(Note(target.name, f"{err}; done, as {wide}", fallback=True))
        return rtn(target.weight, wide, axis=target.axis)


def _tell_outlier(target: _Target, q: QTensor, notes: list[Note]) -> None:
    """One huge number costs those that share its scale their codes; say where it is and how many."""
    w = to_matrix(target.weight, target.axis).float()
    size = w.abs().flatten()
    usual = size[:: max(1, size.numel() >> 12)]
    usual = usual[usual > 0]
    if not usual.numel() or float(size.max()) <= OUTLIER * float(usual.median()):
        return
    row, col = divmod(int(size.argmax()), w.shape[1])
    high, wide = q.format.share.block(q.matrix)
    rows, cols = (slice(i // n * n, i // n * n + n) for i, n in ((row, high), (col, wide)))
    real, kept = w[rows, cols], to_matrix(q.dequantize(), q.axis)[rows, cols]
    lost = int(((real - kept).abs() >= real.abs()).logical_and(real != 0).sum())
    if lost:
        where = tuple(int(i) for i in torch.unravel_index(target.weight.abs().argmax(), target.weight.shape))
        said = f"an outlier of {float(w[row, col]):.3g} at {where} costs {lost} of the {real.numel()} numbers that share its scale"
        notes.append(Note(target.name, f"{said} their codes; repair it, exclude the layer or take smaller groups"))


def _on_grid(target: _Target, fmt: Format) -> bool:
    """Whether a few rows of a tensor come back exactly, so that trying the whole is worth it."""
    rows = to_matrix(target.weight, target.axis)[:4].float()
    try:
        return torch.equal(rtn(rows, fmt).dequantize(), rows)
    except FormatError:
        return False


# -- steps, each judged -----------------------------------------------------------------------------------------------


def _refined(network: _GraphNetwork | _ModuleNetwork, q: QModel, items: list[Batch], solver: str | None, effort: str,
             progress: Progress | None, notes: list[Note]) -> QModel:  # fmt: skip
    """``q`` after the steps that ``effort`` names, those that were measured to help; a solver that was named is not judged."""
    learn, held = (_limited(part, network.whole) for part in split(items, whole=network.whole))
    judges = sum(map(len, held))
    if solver in NEED_HESSIAN:
        rounded, q = q, network.refined(q, learn if judges else items, SOLVERS[solver], False, progress)
        if left := [name for name, tensor in q.tensors.items() if tensor is rounded.tensors[name]]:
            why = "it solves convolutions and linear layers that the data reaches"
            notes.append(Note("model", f"{len(left)} weights are rounded to nearest, not by {solver}: {_some(left)}; {why}"))
    ladder: list[tuple[str, Callable[..., QTensor] | None, bool]]
    ladder = [(name.upper(), SOLVERS[name], False) for name in [EFFORTS[effort]] if name and solver is None]
    if isinstance(network, _GraphNetwork):
        ladder.append(("bias correction", None, True))
    if judges < LEAST:
        if ladder:
            told = f"{sum(map(len, items))} examples are too few to judge by ({4 * LEAST} would do)"
            notes.append(Note("model", f"{' and '.join(name for name, *_ in ladder)} not tried: {told}"))
        return q
    try:
        loss = losses(network.module, q.module, held)
    except InputError as err:
        notes.append(Note("model", f"{' and '.join(name for name, *_ in ladder)} not tried: there is nothing to judge by, {err}"))
        return q
    for name, solve, bias in ladder:
        new = network.refined(q, learn, solve, bias, progress)
        try:
            new_loss = losses(network.module, new.module, held)
        except InputError as err:
            notes.append(Note("model", f"{name} not kept: {err}"))
            continue
        verdict = judge(loss, new_loss)
        notes.append(Note("model", f"{name} {'kept' if verdict.kept else 'not kept'}: {verdict}"))
        if verdict.kept:
            q, loss = new, new_loss
            if solve is not None:
                q = replace(q, provenance={**q.provenance, "solver": name.lower()})
    return q


def _limited(batches: list[Batch], whole: bool) -> list[Batch]:
    """The first `EXAMPLES` examples, or the batches that hold them."""
    out, left = [], EXAMPLES
    for batch in batches:
        if left > 0:
            out.append(batch if whole or len(batch) <= left else batch.take(torch.arange(left)))
            left -= len(batch)
    return out
