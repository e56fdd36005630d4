"""The steps of the ladder, each a function from one rung to the next; their order and which of them stay is not decided here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..calibrate import Progress
from ..data import Batch
from ..errors import InputError
from ..graph import GraphModule
from ..plan import FLOAT, Plan, Rule, size_of
from ..qmodel import Note, QModel
from ..solvers import SOLVERS
from ..transforms import equalize, smooth, widen
from ..tune.endtoend import Teaching, tune_model
from ..tune.reconstruct import reconstruct
from ..tune.text import enough_text
from ..tune.tuner import Tuning
from .mixed import counted, mixed
from .networks import GraphNetwork, ModuleNetwork, Network, guided_moments, literally, solved_guided, with_tensors
from .sizes import overdrawn
from .weights import round_weight


@dataclass(frozen=True, eq=False)
class Rung:
    """A float network, perhaps transformed, its quantized form, what the transforms told, and its guided Hessians once a step had
    use for them."""

    network: Network
    q: QModel
    told: tuple[Note, ...] = ()
    moments: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Means:
    """What steps work with: ``near`` gives the ladder's foot for any network (ranges from the data, weights rounded to nearest) by
    ``plan``, which has a format for each size of the plan that was ``asked``; ``learn`` the examples they may learn from, ``end``
    the clock's time at which they are to end."""

    near: Callable[[Network], QModel]
    plan: Plan
    asked: Plan
    learn: Sequence[Batch]
    end: float | None = None
    seed: int = 0
    progress: Progress | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """``make`` gives the next rung, or None where there is nothing to do; ``graph``: it needs to know how values flow; ``parts``:
    its layers can stay one by one; ``anew``: it quantizes another network, so what was done to codes before is lost; ``codes``: it
    chooses codes, which a solver that was named does outright."""

    make: Callable[[Rung, Means], Rung | None]
    graph: bool = False
    parts: bool = False
    anew: bool = False
    codes: bool = False


def equalization(rung: Rung, means: Means) -> Rung | None:
    return _transformed(rung, means, *equalize(rung.network.module))


def widening(rung: Rung, means: Means) -> Rung | None:
    """16 bits where a concatenation joins parts of very different size; a rule for its site has the last word."""
    if not isinstance(rung.network.module, GraphModule):
        return None
    module, told = widen(rung.network.module, means.learn)
    if module is not rung.network.module and GraphNetwork(module.graph, []).widened(means.plan, []) == means.plan:
        return None  # the plan's ranges are float, dynamic, running or wide enough
    return _transformed(rung, means, module, told)


def smoothing(rung: Rung, means: Means) -> Rung | None:
    """`smooth` by the formats that the plan has for everything; nothing to do where it leaves weights or activations float."""
    every = [rule for rule in reversed(means.plan.rules) if rule.pattern == "*"]
    weights, activations = (next(filter(None, given), None) for given in ((r.weight for r in every), (r.activation for r in every)))
    if weights in (None, FLOAT) or activations in (None, FLOAT):
        return None  # where activations are float nothing is gained by moving their scale into weights
    return _transformed(rung, means, *smooth(rung.network.module, means.learn, weights, activations))


def _transformed(rung: Rung, means: Means, module: nn.Module, told: Sequence[Note]) -> Rung | None:
    """The transformed network quantized anew, by the same plan; None where it came back as it was."""
    if module is rung.network.module:
        return None
    network: Network = GraphNetwork(module.graph, []) if isinstance(module, GraphModule) else ModuleNetwork(module, [])
    return Rung(network, means.near(network), (*rung.told, *told))


def mixing(rung: Rung, means: Means) -> Rung | None:
    """Within a size that was asked for, formats that differ from weight to weight, each rounded to nearest."""
    if not any(size_of(rule.weight) for rule in means.asked.rules):
        return None
    try:
        moments = guided_moments(rung.network, rung.q, list(means.learn), means.seed, _until(means))
    except InputError as err:
        return replace(rung, q=with_tensors(rung.q, rung.q.tensors, (Note("model", f"no mix of formats was tried: {err}"),)))
    rung = replace(rung, moments=moments if isinstance(rung.network, ModuleNetwork) else None)  # a graph's steps sweep
    with torch.no_grad():
        formats = mixed(means.asked, means.plan, rung.q.tensors, rung.network, moments)
        changed = {name: fmt for name, fmt in formats.items() if fmt != rung.q.tensors[name].format}
        targets, notes = {target.name: target for target in rung.network.targets}, list[Note]()
        tensors = dict(rung.q.tensors)
        for name, fmt in changed.items():
            tensors |= round_weight(targets[name], fmt, notes)
    if not changed:
        return rung
    if overdrawn(means.asked, means.plan, rung.network, tensors):
        wide = Note("model", "no mix of formats was kept: scales had to be stored wider than the size allows")
        return replace(rung, q=with_tensors(rung.q, rung.q.tensors, (wide,)))
    mix = Note("model", f"formats by what each weight counts for the end loss: {counted(formats.values())}")
    rules = [Rule(literally(name), weight=str(formats[first])) for name, first in rung.network.names(changed)]
    q = with_tensors(rung.q, tensors, (*(note for note in notes if note not in rung.q.notes), mix))
    return replace(rung, q=replace(q, plan=Plan((*q.plan.rules, *rules))))


def solving(name: str) -> Callable[[Rung, Means], Rung | None]:
    """Every weight by a solver on the inputs that a sweep finds; not where guided Hessians are there, which the next step takes."""

    def make(rung: Rung, means: Means) -> Rung | None:
        if rung.moments is not None and isinstance(rung.network, ModuleNetwork):
            return None
        q = rung.network.refined(rung.q, list(means.learn), SOLVERS[name], False, means.progress, _until(means))
        return replace(rung, q=replace(q, provenance={**q.provenance, "solver": name}))

    return make


def guided_descent(rung: Rung, means: Means) -> Rung | None:
    """Every weight by descent on guided Hessians; a graph has the sweep, and training after it."""
    if isinstance(rung.network, GraphNetwork):
        return None
    q = solved_guided(rung.network, rung.q, list(means.learn), SOLVERS["descent"], means.seed, False, means.progress,
                      rung.moments, _until(means))  # fmt: skip
    return replace(rung, q=replace(q, provenance={**q.provenance, "solver": "descent"}))


def bias_correction(rung: Rung, means: Means) -> Rung:
    return replace(rung, q=rung.network.refined(rung.q, list(means.learn), None, True, means.progress))


def reconstruction(rung: Rung, means: Means) -> Rung:
    """Each block trained towards the float one's outputs, without QDrop: its steps are few."""
    assert isinstance(rung.network.module, GraphModule)
    left = _left(means)
    q = reconstruct(rung.q, rung.network.module, means.learn, how=Tuning(drop=0.0, seed=means.seed),
                    seconds=None if left is None else BLOCKS * left, progress=means.progress)  # fmt: skip
    return replace(rung, q=q)


#: The share of the time left that Hessians take, or the solving of weights; training takes most.
SOLVING = 0.25

#: The share of the time left that blocks take; the whole takes the rest.
BLOCKS = 0.25


#: The share of the time left that a language model writes text for.
WRITING = 0.15

#: Steps of end-to-end tuning where no budget says how long.
TEACHING_STEPS = 300

#: The most that an example that teaches has of another one: without it few examples are learned by heart.
MIX = 0.5


def teaching(rung: Rung, means: Means) -> Rung:
    """The whole network trained towards the float one's answers; a language model learns from text that it wrote itself as well."""
    module, wrote, learn = rung.network.module, 0, list(means.learn)
    left = _left(means)
    writing = None if left is None else WRITING * left
    if isinstance(rung.network, ModuleNetwork) and (text := enough_text(module, learn, means.seed, writing)):
        learn, wrote = text
    left = _left(means)
    how = Teaching(TEACHING_STEPS if left is None else None, left, seed=means.seed, start="codes", mix=MIX)
    q = tune_model(rung.q, module, learn, None, how, means.progress)
    if wrote:
        told = f"end-to-end tuning learned from {wrote} examples that the model wrote itself as well"
        q = replace(q, notes=(*q.notes, Note("model", told)))
    return replace(rung, q=q)


def _until(means: Means) -> float | None:
    """When a step that measures or solves is to end."""
    left = _left(means)
    return None if left is None else time.monotonic() + SOLVING * left


def _left(means: Means) -> float | None:
    """Seconds until the end, at least one."""
    return None if means.end is None else max(1.0, means.end - time.monotonic())


#: Name, as notes call it -> step, in the order in which they are of use to each other.
STEPS: dict[str, Step] = {
    "equalization": Step(equalization, graph=True, anew=True),
    "widening": Step(widening, graph=True, anew=True),
    "smoothing": Step(smoothing, anew=True),
    "mixed formats": Step(mixing, codes=True),
    "GPTQ": Step(solving("gptq"), parts=True, codes=True),
    "guided descent": Step(guided_descent, parts=True, codes=True),
    "bias correction": Step(bias_correction, graph=True, parts=True),
    "reconstruction": Step(reconstruction, graph=True, codes=True),
    "end-to-end tuning": Step(teaching, codes=True),
}

#: What ``effort`` does after rounding to nearest.
EFFORTS: dict[str, tuple[str, ...]] = {
    "fast": ("bias correction",),
    "default": ("equalization", "widening", "GPTQ", "bias correction"),
    "best": tuple(STEPS),
}
