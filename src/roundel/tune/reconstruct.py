"""`reconstruct`: a quantized graph brought nearer to its float network, window by window, without labels; it judges no whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Progress, one_thread
from ..data import Batch
from ..errors import InputError
from ..formats.qtensor import QTensor
from ..gate import LEAST, split
from ..graph import BATCH, Graph, GraphModule
from ..network.layer import WEIGHTED, PackedWeight, Site
from ..network.run import QGraphModule
from ..network.sites import find_sites
from ..qmodel import Constants, Note, QModel
from .tunable import Learn, TunableActivation, TunableWeight
from .tuner import Told, Tuning, mean_distance, pace, tune
from .windows import Kind, Values, Window, advance, entries, joined, needed, windows

#: Steps of each window where neither ``steps`` nor ``seconds`` is given.
STEPS = 100

#: One example in so many judges a window, and is not learned from.
EVERY = 5


@dataclass(frozen=True, eq=False)
class Done:
    """A window that is finished: ``number`` of ``count`` from 1 on, its last value's ``name``, the loss on held-out examples
    ``before`` and ``after``, the ``steps`` done, and ``model``, the whole network with the windows finished so far. Saved, it is
    where `reconstruct` goes on with ``first=number``."""

    number: int
    count: int
    name: str
    before: float
    after: float
    steps: int
    model: QModel

    @property
    def kept(self) -> bool:
        return self.after < self.before


def reconstruct(
    q: QModel,
    real: GraphModule,
    batches: Sequence[Batch],
    window: Kind = "block",
    how: Tuning | None = None,
    *,
    steps: int | Sequence[int] | None = None,
    seconds: float | None = None,
    first: int = 0,
    finished: Callable[[Done], None] | None = None,
    progress: Progress | None = None,
) -> QModel:
    """``q`` trained on ``batches``, no labels needed, so that each of its `windows` gives what it gives in ``real``, the float
    network that ``q`` was made of, on the inputs that the tuned windows before it leave. ``how`` says what is trained and how.

    One example in `EVERY` is held out: a window's training stays only where its loss there falls, and a note says by how much.
    Each window trains for ``steps``, a number or one per window, or as long as an equal share of the ``seconds`` that are left; the
    pace is measured as it begins, so ``seconds`` is kept to within a few steps unless the machine slows down, and the provenance
    then holds the ``steps`` that make the same bytes again. ``finished`` is called after each window; with ``first`` the windows
    before it are taken as they are in ``q``. ``progress`` is told steps done and in all.

    Memory is that of the values at one border of both networks, over all examples, and of one step.

    Raises `InputError` for a model that is no graph, a ``real`` of other nodes, and fewer than 8 * `EVERY` examples.

    >>> from roundel import capture, fuse, quantize
    >>> net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 8)
    >>> real = GraphModule(fuse(capture(net, (x,))))
    >>> better = reconstruct(quantize(real, "int3", "int8", data=[x]), real, [Batch((x,))], steps=30)
    >>> better.provenance["reconstruction"]["steps"]
    [30]
    """
    how = how or Tuning()
    graph = _same_graph(q, real)
    parts = windows(graph, window)
    plan = _planned(steps, seconds, len(parts), first)
    state = _State(q)
    shapes = [graph.values[name].shape for name in graph.inputs if name in graph.values]
    learn, held = split(batches, EVERY, whole=any(BATCH not in shape[:1] for shape in shapes[:1]))
    if sum(map(len, held)) < LEAST:
        raise InputError(f"{sum(map(len, batches))} examples are too few to learn from and judge by: give at least {LEAST * EVERY}")
    end = None if seconds is None else time.monotonic() + seconds
    count: list[int] = []
    told: list[Note] = []
    keep = needed(parts, graph.outputs)
    with one_thread():
        wanted = {"learn": entries(graph, learn), "held": entries(graph, held)}
        got = dict(wanted)
        for number, part in enumerate(parts):
            outputs = set(part.graph.outputs)
            truth = GraphModule(part.graph).eval()
            wanted = {key: advance(truth, values, keep[number] | outputs) for key, values in wanted.items()}
            if number >= first:
                share = None if end is None else (end - time.monotonic()) / (len(parts) - number)
                one = replace(how, seed=how.seed * 10_007 + number)
                goals = {key: [_only(env, outputs) for env in values] for key, values in wanted.items()}
                inputs = {key: [_only(env, set(part.graph.inputs)) for env in values] for key, values in got.items()}
                tell = _teller(progress, number - first, len(parts) - first)
                before, after, done = state.improve(part, inputs, goals, one, plan[number], share, tell)
                count.append(done)
                told.append(_note(part, before, after, done, how))
                if finished:
                    so_far = state.model(q, told, _record(window, how, count, first))
                    finished(Done(number + 1, len(parts), part.name, before, after, done, so_far))
            state.settled |= part.graph.constants.keys() | set(state.sites(part).values())
            now = state.packed(part)
            got = {key: advance(now, values, keep[number]) for key, values in got.items()}
            wanted = {key: [_only(env, keep[number]) for env in values] for key, values in wanted.items()}
    return state.model(q, told, _record(window, how, count, first))


class _State:
    """What is stored of each tensor, site and constant so far, and who may still train it: the first window that has it."""

    def __init__(self, q: QModel) -> None:
        assert isinstance(q.structure, Graph)
        self.tensors, self.activations, self.rest = dict(q.tensors), dict(q.activations), dict(q.rest)
        self.root, self.settled = find_sites(q.structure).root, set[str]()

    def model(self, q: QModel, notes: Sequence[Note], record: dict[str, Any]) -> QModel:
        assert isinstance(q.structure, Graph)
        tensors, activations, rest = dict(self.tensors), dict(self.activations), dict(self.rest)
        structure = replace(q.structure, constants=Constants({**tensors, **rest}))
        return replace(q, structure=structure, tensors=tensors, activations=activations, rest=rest, notes=(*q.notes, *notes),
                       provenance={**q.provenance, "reconstruction": record}, path=None)  # fmt: skip

    def sites(self, part: Window) -> dict[str, str]:
        """Site of the window's own graph, or input of one of its layers -> its name in the whole network."""
        found = {here: self.root[here] for here in set(find_sites(part.graph).root.values())}
        found |= {f"{node.name}.input": f"{node.name}.input" for node in part.graph.nodes}
        return {here: there for here, there in sorted(found.items()) if there in self.activations}

    def packed(self, part: Window) -> QGraphModule:
        """The window as it is stored."""
        return self._module(
            part, {name: self.activations[there] for name, there in self.sites(part).items()}, self.rest, PackedWeight
        )

    def improve(self, part: Window, inputs: Mapping[str, Sequence[Values]], goals: Mapping[str, Sequence[Values]], how: Tuning,
                steps: int | None, share: float | None, told: Told | None) -> tuple[float, float, int]:  # fmt: skip
        """(held-out loss before, after, steps); what does not lower it is not kept."""
        packed = self.packed(part)
        before = mean_distance(how.loss, packed, inputs["held"], goals["held"])
        unit = mean_distance(how.loss, packed, inputs["learn"], goals["learn"])
        module, kinds = self._trainee(part, how)
        values, aims = joined(part.graph, inputs["learn"]), joined(part.graph, goals["learn"])
        if share is not None:
            steps = max(0, int(share * 0.95 / pace(module, values, aims, how)))
        pulled = [w for w in module.packed().values() if isinstance(w, TunableWeight) and w.rounding == "sigmoid"]
        size = sum(w.v.numel() for w in pulled if w.v is not None)

        def pull(beta: float) -> Tensor:
            return torch.stack([w.regulariser(beta) for w in pulled]).sum() / size

        def held() -> float:
            return mean_distance(how.loss, module, inputs["held"], goals["held"])

        steps = steps or 0
        if unit > 0 and steps:
            tune(module, values, aims, kinds, how, steps, unit, held, pull if pulled else None, told)
        old = dict(self.tensors), dict(self.activations), dict(self.rest)
        self._take(part, module)
        after = mean_distance(how.loss, self.packed(part), inputs["held"], goals["held"])
        if not after < before:
            self.tensors, self.activations, self.rest = old
        return before, after, steps

    def _trainee(self, part: Window, how: Tuning) -> tuple[QGraphModule, dict[str, list[nn.Parameter]]]:
        """The window over trainable parts, and its parameters by kind, each once."""

        def weight(name: str, tensor: QTensor) -> Any:
            if name in self.settled:
                return PackedWeight(tensor)
            return TunableWeight(tensor, part.graph.constants[name], how.rounding, "scales" in how.rates, "tables" in how.rates)

        names = self.sites(part)
        sites: dict[str, TunableActivation] = {}
        for here, there in names.items():
            learn: Learn = "step" if there not in self.settled and "activations" in how.rates else "none"
            entering = here in part.graph.inputs
            sites.setdefault(there, TunableActivation(self.activations[there], learn, 0.0 if entering else how.drop,
                                                      settled=not here.endswith(".input")))  # fmt: skip
        rest = {name: self.rest[name].clone() for name in part.graph.constants if name in self.rest}
        module = self._module(part, {here: sites[there] for here, there in names.items()}, rest, PackedWeight)
        for name, tensor in self.tensors.items():
            if name in part.graph.constants:
                module.put(name, weight(name, tensor))
        kinds: dict[str, list[nn.Parameter]] = {}
        for one in module.packed().values():
            for kind, found in one.kinds().items() if isinstance(one, TunableWeight) else ():
                kinds.setdefault(kind, []).extend(found)
        kinds["activations"] = [p for site in sites.values() for found in site.kinds().values() for p in found]
        heavy = {node.inputs[1] for node in part.graph.nodes if node.op in WEIGHTED}
        kinds["rest"] = []
        for name, param in _floats(module):
            mine = name in part.trained and name not in self.settled and name not in heavy and param.is_floating_point()
            param.requires_grad_(mine and "rest" in how.rates)
            kinds["rest"] += [param] if param.requires_grad else []
        return module, kinds

    def _take(self, part: Window, module: QGraphModule) -> None:
        """Store what a trained window holds."""
        for name, one in module.packed().items():
            if isinstance(one, TunableWeight):
                self.tensors[name] = one.hard()
        for here, there in self.sites(part).items():
            site = module.activations[here]
            if isinstance(site, TunableActivation) and there not in self.settled:
                self.activations[there] = site.hard()
        for name, param in _floats(module):
            if param.requires_grad:
                self.rest[name] = param.detach().clone()

    def _module(self, part: Window, sites: Mapping[str, Site], rest: Mapping[str, Tensor], weight: Any) -> QGraphModule:
        here = part.graph.constants
        return QGraphModule(part.graph, {name: self.tensors[name] for name in here if name in self.tensors}, sites,
                            {name: rest[name] for name in here if name in rest}, weight).eval()  # fmt: skip


def _floats(module: QGraphModule) -> Iterator[tuple[str, nn.Parameter]]:
    """The constants that are not packed, by name."""
    return ((name.replace("\x1f", "."), param) for name, param in module.rest.items())


def _only(env: Values, names: set[str]) -> Values:
    return {name: value for name, value in env.items() if name in names}


def _same_graph(q: QModel, real: GraphModule) -> Graph:
    """The float graph, constants as they are now."""
    if not isinstance(q.structure, Graph):
        raise InputError("only a quantized graph can be reconstructed; this model's layers were quantized in place, without one")
    if q.structure.nodes != real.structure.nodes:
        raise InputError("the float network is not the one that was quantized: its graph has other nodes; fuse it as quantize does")
    return real.graph


def _planned(steps: int | Sequence[int] | None, seconds: float | None, count: int, first: int) -> list[int | None]:
    """Steps of each window by its number; None where the clock decides."""
    if steps is not None and seconds is not None:
        raise InputError("give steps or seconds, not both: seconds are turned into steps by the pace of this machine")
    if not 0 <= first <= count:
        raise InputError(f"first={first}: there are {count} windows")
    if seconds is not None:
        if not seconds > 0:
            raise InputError(f"seconds={seconds}: a time above 0 is needed")
        return [None] * count
    if steps is None or isinstance(steps, int):
        return [STEPS if steps is None else steps] * count
    if len(steps) != count - first:
        raise InputError(f"there are {count - first} windows to tune, and {len(steps)} numbers of steps")
    return [*[0] * first, *steps]


def _teller(progress: Progress | None, number: int, count: int) -> Told | None:
    """Steps of one window as thousandths of all windows."""
    if progress is None:
        return None
    return lambda done, steps: progress("reconstruct", number * 1000 + done * 1000 // steps, count * 1000)


def _note(part: Window, before: float, after: float, steps: int, how: Tuning) -> Note:
    kept = "kept" if after < before else "not kept"
    return Note(part.name, f"reconstruction {kept}: {how.loss} {before:.3g} to {after:.3g} on held-out examples, {steps} steps")


def _record(window: Kind, how: Tuning, steps: Sequence[int], first: int) -> dict[str, Any]:
    """What makes the same bytes again."""
    return {"window": window, "first": first, "steps": list(steps), **asdict(how), "rates": dict(how.rates)}
