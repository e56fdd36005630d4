"""The two kinds of network that can be quantized, behind the same methods: a graph, or ordinary modules."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Progress, calibrate, run
from ..data import Batch
from ..errors import InputError, PlanError
from ..files import size_text
from ..fisher import backward_bytes, hessians
from ..formats.format import MODEL
from ..formats.grid import Uniform
from ..formats.qtensor import QTensor
from ..graph import BATCH, Graph, GraphModule, Node
from ..network.blocks import Entangled, MemoryShelf, Walk, find_blocks, sweep_blocks, units, within
from ..network.capture import capture
from ..network.fuse import fuse
from ..network.huggingface import hf_config
from ..network.layer import WEIGHTED, Activation
from ..network.sites import find_sites, find_slots, find_weights, fine_sites
from ..network.walk import Leaf, install, leaf_slots, leaves, member, state
from ..plan import FLOAT, Choice, Plan, Rule, Slot
from ..qmodel import HF, Constants, External, Note, QModel, share
from ..ranges import known_ranges
from ..refine import Solve, refine
from ..solvers import solved
from ..stats import Stats
from .memory import available

#: The format of sites that are marked fine, where a plan says nothing but fewer bits for everything: TFLite's int16, symmetric.
FINE, FINE_BITS = "int16s", 16


@dataclass(frozen=True, eq=False)
class Target:
    """One weight to quantize: its values and the axis of its outputs."""

    name: str
    weight: Tensor
    axis: int


class GraphNetwork:
    """A fused graph: every edge is a site. ``captured`` is the graph before it was fused, where that is known."""

    def __init__(self, graph: Graph, notes: list[Note], captured: Graph | None = None) -> None:
        self.graph, self.captured = graph, captured or graph
        self.module: nn.Module = GraphModule(graph).eval()
        self.groups = find_sites(graph)
        self.found = find_weights(graph)
        self.targets = [
            Target(name, graph.constants[name], 1 if node.op == "conv_transpose" and node.attrs.get("groups", 1) == 1 else 0)
            for name, node in self.found.items()
        ]
        self.tied = {f"{node.name}.weight": node for node in graph.nodes if _reads_anothers(node, self.found)}
        self.ops = {name: node.op for name, node in self.found.items()}
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
            kept[name] = c if (c := table[name]) is None or c.when != "dynamic" else None
        for slot in dynamic:
            if slot.kind == "activation" and (c := table[slot.name]) is not None and c.when == "dynamic":
                kept[slot.name] = c
        self.sites = whole | {slot.name for slot in dynamic if slot.kind == "activation"}
        return kept

    def widened(self, plan: Plan, notes: list[Note]) -> Plan:
        """``plan`` with rules for what is marked ``fine``, where its rule for everything asks for fewer bits: what recurrent cells
        add to, since an error there comes back at every step, and parts of very different size. They come right after that rule,
        so any other of the plan has the last word."""
        general = [i for i, rule in enumerate(plan.rules) if rule.pattern == "*" and rule.activation not in (None, FLOAT)]
        sites = fine_sites(self.graph)
        if not general or not sites:
            return plan
        at = general[-1]
        choice = Choice.parse(str(plan.rules[at].activation), "activation")
        if choice.when != "static" or choice.format.bits >= FINE_BITS or not isinstance(choice.format.grid, Uniform):
            return plan
        joined = {self.groups.root[node.name] for node in self.graph.nodes if node.op == "concat" and node.attrs.get("fine")}
        cells, joins = [site for site in sites if site not in joined], [site for site in sites if site in joined]
        for what, which, but in (("what recurrent cells add to from step to step", cells, ""),
                                 ("what joins parts of unlike size", joins, ", which no .tflite file can hold")):  # fmt: skip
            if which:
                told = f"{what} is {FINE}, not {plan.rules[at].activation}: {some(which)}{but}"
                notes.append(Note("model", f"{told}; a rule of a plan for these sites has the last word"))
        fine = tuple(Rule(literally(site), activation=FINE) for site in sites)
        return Plan((*plan.rules[: at + 1], *fine, *plan.rules[at + 1 :]))

    def names(self, weights: Collection[str]) -> list[tuple[str, str]]:
        """(a name that a plan knows, the weight it stands for): its own, and those of nodes that share it."""
        return [
            (alias, name) for name in weights for alias in (name, *(a for a, node in self.tied.items() if node.inputs[1] == name))
        ]

    def stats(self, items: list[Batch], only: set[str], progress: Progress | None) -> dict[str, Stats]:
        return calibrate(self.module, items, only=only, progress=progress)

    def known(self) -> dict[str, tuple[float, float]]:
        return known_ranges(self.graph, self.groups)

    def refined(self, q: QModel, items: list[Batch], solve: Callable[..., QTensor] | None, bias: bool,
                progress: Progress | None, end: float | None = None) -> QModel:  # fmt: skip
        """Layer by layer, on the inputs that the quantized layers before leave."""
        assert isinstance(self.module, GraphModule)
        told: dict[str, str] = {}
        new = refine(q, self.module, items, solve and solving(self, q, solve, told, progress, end), bias)
        return told_of(new, told, solve)

    def finish(self, tensors: dict[str, QTensor], chosen: dict[str, Activation], plan: Plan, provenance: dict[str, Any],
               notes: tuple[Note, ...]) -> QModel:  # fmt: skip
        rest = {name: t.detach().clone() for name, t in self.graph.constants.items() if name not in tensors}
        structure = replace(self.graph, constants=Constants({**tensors, **rest}))
        said = tuple(Note("model", text) for text in self.graph.notes)
        return QModel(structure, tensors, chosen, plan, rest, provenance, said + notes)


class ModuleNetwork:
    """An ordinary network whose weighted leaf modules are replaced; the sites are their inputs."""

    def __init__(self, module: nn.Module, notes: list[Note]) -> None:
        self.module = module
        self.found: dict[str, Leaf] = leaves(module)
        self.tied = _ties(module)
        named = {member(name, "weight"): one for name, one in self.found.items()}
        self.targets = [Target(name, one.weight, one.axis) for name, one in named.items() if name not in self.tied]
        self.ops = {member(name, "weight"): one.op for name, one in self.found.items()}
        self.sites = {member(name, "input") for name in self.found}
        self.whole = False
        _left(notes, [name for name, p in module.named_parameters() if p.ndim >= 2 and name not in named])

    def widened(self, plan: Plan, notes: list[Note]) -> Plan:
        """As it is: what lies inside of a module is float here."""
        return plan

    def resolve(self, plan: Plan) -> dict[str, Choice | None]:
        table = plan.resolve(leaf_slots(self.found))
        _check_ties(table, self.tied)
        return {name: c for name, c in table.items() if name not in self.tied}

    def names(self, weights: Collection[str]) -> list[tuple[str, str]]:
        """(a name that a plan knows, the weight it stands for): its own, and those of modules that share it."""
        return [(name, name) for name in weights] + [(alias, name) for alias, name in self.tied.items() if name in weights]

    def stats(self, items: list[Batch], only: set[str], progress: Progress | None) -> dict[str, Stats]:
        return calibrate(self.module, items, only=only, progress=progress)

    def known(self) -> dict[str, tuple[float, float]]:
        return {}

    def refined(self, q: QModel, items: list[Batch], solve: Callable[..., QTensor] | None, bias: bool,
                progress: Progress | None, end: float | None = None) -> QModel:  # fmt: skip
        """Block by block, on the inputs that the quantized layers before leave; all values between blocks in memory."""
        if solve is None:
            return q
        blocks = find_blocks(self.module)
        found = {name: one for name, one in self.found.items() if member(name, "weight") in q.tensors}
        last: Entangled | None = None
        for names, keep in ((blocks, False), (blocks, True), ([""], True)):  # a chain, blocks that see each other, or anything
            new, told = dict(q.tensors), dict[str, str]()
            solve_one = solving(self, q, solve, told, progress, end)
            module = install(share(self.module), outside(new, names), self.tied, {})
            try:
                with torch.no_grad():
                    walk = Walk(module, names, units(items), MemoryShelf(keep))
                    sweep_blocks(walk, found, *2 * [partial(solve_layers, new, solve_one)])
                return told_of(replace(q, tensors=new), told, solve)
            except Entangled as err:
                last = err
        raise last or AssertionError

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


Network = GraphNetwork | ModuleNetwork


def guided_moments(network: Network, q: QModel, items: list[Batch], seed: int, end: float | None = None) -> dict[str, Tensor]:
    """Guided Hessians of the weights of ``q`` by name, of as many batches as there is time for; `InputError` where a backward pass
    does not fit in memory, or the network gives no gradients, or some that are not finite."""
    learn, wanted = units(items), set(q.tensors)
    if (need := backward_bytes(network.module, learn, wanted)) > available():
        raise InputError(f"a backward pass takes {size_text(need)} of memory, which is more than is free")
    moments = hessians(network.module, learn, wanted, guided=True, seed=seed, end=end)
    if odd := [name for name, moment in moments.items() if not moment.isfinite().all()]:
        raise InputError(f"gradients at {some(odd)} are not finite numbers; a float32 model has a wider range")
    return moments


def solved_guided(network: Network, q: QModel, items: list[Batch], solve: Callable[..., QTensor], seed: int,
                  asked: bool, progress: Progress | None, moments: Mapping[str, Tensor] | None = None,
                  end: float | None = None) -> QModel:  # fmt: skip
    """``q`` with every weight solved on guided Hessians of the float network, ``moments`` where they are there already. Where a
    backward pass, or all Hessians at a time, do not fit in memory, or the network gives no gradients, the Hessians are those that
    the sweep finds, and a note says so: a fall-back where guided ones were ``asked`` for. Hessians take at most half of the time
    until ``end``."""
    half = None if end is None else (time.monotonic() + end) / 2
    try:
        moments = guided_moments(network, q, items, seed, half) if moments is None else moments
    except InputError as err:
        new = network.refined(q, items, solve, False, progress, end)
        return replace(new, notes=(*new.notes, Note("model", f"swept Hessians in place of guided ones: {err}", fallback=asked)))
    told: dict[str, str] = {}
    solve_one, tensors = solving(network, q, solve, told, progress, end), dict(q.tensors)
    for name, moment in moments.items():
        tensors[name] = solve_one(name, moment)
    return told_of(with_tensors(q, tensors), told, solve, GUIDED)


def with_tensors(q: QModel, tensors: Mapping[str, QTensor], notes: tuple[Note, ...] = ()) -> QModel:
    """``q`` with other codes for its weights."""
    structure = q.structure
    if isinstance(structure, Graph):
        structure = replace(structure, constants=Constants({**tensors, **q.rest}))
    return replace(q, structure=structure, tensors=dict(tensors), notes=(*q.notes, *notes))


#: What a solver's Hessians were, as notes say it.
SWEPT = "on Hessians of the inputs that the quantized layers before leave, all places alike"
GUIDED = "on guided Hessians, each layer on the float network's inputs"


def told_of(q: QModel, told: Mapping[str, str], solve: Callable[..., QTensor] | None, how: str = SWEPT) -> QModel:
    """``q`` with a note for each tensor that a solver tells of."""
    return replace(q, notes=(*q.notes, *accounts(q.tensors, told, getattr(solve, "__name__", ""), how)))


def accounts(names: Iterable[str], told: Mapping[str, str], solver: str, how: str = SWEPT) -> list[Note]:
    """What a solver did to each tensor, in the order of ``names``, and on which Hessians."""
    each = [Note(name, f"{solver}: {told[name]}") for name in names if name in told]
    return [*each, Note("model", f"solved {how}")] if each else []


def solving(network: Network, q: QModel, solve: Callable[..., QTensor], told: dict[str, str], progress: Progress | None,
            end: float | None = None) -> Solve:  # fmt: skip
    """``solve`` by the name of a weight, in the format that the weight has; ``told`` takes its account. After ``end`` on the
    monotonic clock a weight keeps its codes."""
    targets = {target.name: target for target in network.targets}

    def one(name: str, hessian: Tensor) -> QTensor:
        target, old = targets[name], q.tensors[name]
        if end is not None and time.monotonic() > end:
            told[name] = "not solved, the budget's share for it was over"
            return old
        if progress:
            progress("solve", len(told) + 1, len(q.tensors))
        table = old.params.table if old.format.table == MODEL else None  # a table of the model stays what all have
        done = solved(solve, target.weight, old.format, hessian, axis=target.axis, table=table, near=old)
        told[name] = str(done)
        return done.tensor

    return one


def solve_layers(tensors: dict[str, QTensor], solve: Solve, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers of ``moments`` solved into ``tensors``, and their new values."""
    for name, moment in moments.items():
        weight = member(name, "weight")
        tensors[weight] = solve(weight, moment)
    return {name: tensors[member(name, "weight")].dequantize() for name in moments}


def outside(tensors: Mapping[str, QTensor], blocks: Sequence[str]) -> dict[str, QTensor]:
    """The tensors that are in none of the blocks."""
    return {name: tensor for name, tensor in tensors.items() if not any(within(name, block) for block in blocks)}


def find_network(model: nn.Module, items: list[Batch] | None, notes: list[Note]) -> Network:
    """A graph where the model is one or can be captured; transformers models and what cannot be captured go the module path."""
    if isinstance(model, GraphModule):
        return GraphNetwork(fuse(graph := model.graph), notes, graph)
    if hf_config(model) is not None:
        return ModuleNetwork(model, notes)
    if items is None:
        notes.append(
            Note(
                "model",
                "without data to trace it with, the file holds no structure: give data (data=, --data), or load(path, into=module)",
            )
        )
        return ModuleNetwork(model, notes)
    example = items[0].named or items[0].args
    if len({tuple((name, x.shape[1:]) for name, x in _inputs(batch)) for batch in items}) > 1:
        text = "its batches differ in more than the batch size, which one graph cannot follow; its layers are quantized in place"
        notes.append(Note("model", f"{text}, each layer's input only", fallback=True))
        return ModuleNetwork(model, notes)
    try:
        return GraphNetwork(fuse(graph := capture(model, example)), notes, graph)
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
        return ModuleNetwork(model, notes)


def _inputs(batch: Batch) -> list[tuple[str, Tensor]]:
    return [*((str(i), x) for i, x in enumerate(batch.args)), *sorted(batch.named.items())]


def _ties(module: nn.Module) -> dict[str, str]:
    """Name -> the earlier name of the same tensor, over the whole state."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.numel():
            key = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key in first:
                ties[name] = first[key]
            first.setdefault(key, name)
    return ties


def _reads_anothers(node: Node, found: Mapping[str, Node]) -> bool:
    """Whether a layer computes with the weight of another, as a tied head does; a layer that runs again only has a number."""
    if node.op not in WEIGHTED or (first := found.get(node.inputs[1], node)) is node:
        return False
    if node.attrs.get("site", "") == first.attrs.get("site"):  # another step of one recurrent layer
        return False
    return not re.fullmatch(re.escape(node.inputs[1].removesuffix(".weight")) + r"(_\d+)?", node.name)


def _check_ties(table: Mapping[str, Choice | None], tied: Mapping[str, str]) -> None:
    for alias, first in tied.items():
        if alias in table and first in table and table[alias] != table[first]:
            raise PlanError(f"{alias} and {first} are one tied tensor, but the plan treats them differently: name both or neither")


def literally(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _left(notes: list[Note], names: list[str]) -> None:
    """List the weights that nothing here can quantize."""
    if names:
        what = "parameters are in no layer that Roundel quantizes and stay as they are"
        notes.append(Note("model", f"{len(names)} {what}: {some(names)}", fallback=True))


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
