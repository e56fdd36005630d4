"""A quantized model made trainable, and a trained one quantized: `prepare`, `convert` and what a training loop asks of the module
between them; no loops, no losses, no decisions about formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn

from ..errors import FormatError, InputError, PlanError
from ..formats.qtensor import QTensor
from ..graph import Graph, GraphModule
from ..network.fuse import batch_norms, fuse
from ..network.run import QGraphModule
from ..network.sites import find_sites
from ..network.walk import leaves, member
from ..qmodel import Constants, Note, QModel, fake
from ..ranges import known_ranges
from .norms import LiveNorm
from .tunable import Kinds, Learn, Rounding, TunableActivation, TunableWeight

#: Operands that hold a layer's parameters; other constants of a graph are numbers of its code and do not train.
_TRAINED = {"conv": (1, 2), "conv_transpose": (1, 2), "linear": (1, 2), "embedding": (1,), "batch_norm": (3, 4),
            "layer_norm": (1, 2), "rms_norm": (1,), "group_norm": (1, 2), "prelu": (1,)}  # fmt: skip


Norms = Literal["folded", "live"]


class Choices(TypedDict, total=False):
    """What may be chosen of a training; a choice that is not made is that of `DEFAULTS`.

    * ``learn``: what trains at static sites: step (LSQ, LSQ+), clip (PACT), ema (ranges that follow the data until `freeze`), none.
      Sites whose range an operation fixes (softmax, sigmoid, tanh) keep it.
    * ``rounding``, ``scales``, ``tables``: those of `TunableWeight`. * ``drop``: QDrop's share.
    * ``norms``: what becomes of batch norms that a captured graph folds into its layers: folded, or live until `freeze`, which
      trains straight through alone.
    * ``momentum``: the share of each batch in ranges of ``learn="ema"`` and in statistics of live norms.
    """

    learn: Learn
    rounding: Rounding
    scales: bool
    tables: bool
    drop: float
    norms: Norms
    momentum: float


DEFAULTS = Choices(learn="step", rounding="straight", scales=True, tables=True, drop=0.0, norms="folded", momentum=0.01)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `convert` needs to know of a prepared module: where it came from, and what trains by the names of the `QModel`."""

    source: QModel
    weights: dict[str, TunableWeight]
    sites: dict[str, TunableActivation]
    choices: dict[str, Any]


def prepare(q: QModel, real: nn.Module | Mapping[str, Tensor] | None = None, **choices: Unpack[Choices]) -> nn.Module:
    """``q`` as an ordinary `nn.Module` in training mode that computes as ``q.module`` does and trains in any PyTorch loop.

    ``real`` gives the float weights: the float network (for a graph its `GraphModule`) or weights by name; without it they start
    from their rounded values. ``choices`` are those of `Choices`. Biases and norms train as they are; batch norms of a network that
    is no graph are modules and live until `freeze`. ``norms="live"`` takes them from ``real``, which must be the `GraphModule` of
    the graph as it was captured, before `fuse`; evaluation mode and `convert` compute with them folded.

    Raises `InputError` where ``real`` has no weight of a name and shape that ``q`` has, `PlanError` for choices that do not go
    together.

    >>> from roundel import quantize
    >>> net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8)
    >>> q = quantize(net, "int4", "int8", data=[x])
    >>> module = prepare(q, {"0.weight": net[0].weight})
    >>> torch.equal(module(x), q.module(x)), {kind: len(found) for kind, found in kinds(module).items()}
    (True, {'weights': 1, 'rounding': 0, 'scales': 5, 'tables': 0, 'rest': 1})
    """
    if moving := [site for site, one in q.activations.items() if one.when == "running"]:
        raise PlanError(f"{moving[0]!r} follows its input at run time, which training does not see: train with static ranges")
    how = _checked(choices)
    names = {id(tensor): name for name, tensor in q.tensors.items()}
    graph = isinstance(q.structure, Graph)
    floats = None if real is None else float_weights(real)
    live: dict[str, tuple[str, LiveNorm]] = {}
    notes: list[Note] = []
    if isinstance(q.structure, Graph) and how["norms"] == "live":
        floats, live = _live_norms(q, q.structure, real, how["momentum"], notes)
        if not live:
            notes.append(
                Note("model", "norms='live' found no batch norm that is folded into a layer: nothing lives", fallback=True)
            )
    fixed = known_ranges(q.structure, find_sites(q.structure)) if isinstance(q.structure, Graph) else {}
    weights: dict[str, TunableWeight] = {}

    def weight(tensor: QTensor) -> TunableWeight:
        name = names[id(tensor)]
        if floats is not None and name not in floats:
            raise InputError(
                f"the float network has no weight {name!r}; is it the one that was quantized (a graph, where q is one)?"
            )
        try:
            w, factor = None if floats is None else floats[name], live[name][1].factor if name in live else None
            weights[name] = TunableWeight(tensor, w, how["rounding"], how["scales"], how["tables"], factor)
        except (InputError, FormatError) as err:
            raise type(err)(f"{name}: {err}") from err
        return weights[name]

    sites = {
        name: TunableActivation(
            site,
            "none" if name in fixed else how["learn"],
            how["drop"],
            settled=graph and site.when == "static",
            momentum=how["momentum"],
        )
        for name, site in q.activations.items()
    }
    module = fake(q, weight, sites)
    if isinstance(module, QGraphModule):
        layers = {node.inputs[i] for node in module.structure.nodes for i in _TRAINED.get(node.op, ()) if i < len(node.inputs)}
        for name, value in module.floats().items():
            value.requires_grad_(value.is_floating_point() and name in layers)
        for bias, norm in live.values():
            module.norm(bias, norm)
    told = {name: choice for name, choice in how.items() if name not in ("drop", "momentum")}
    if how["norms"] == "live":
        told["norms"] = f"{len(live)} live"
    module.prepared = Prepared(replace(q, notes=(*q.notes, *notes)), weights, sites, told)  # type: ignore[assignment]
    return module.train()


def _checked(choices: Choices) -> Choices:
    """All choices, `PlanError` for one that there is not."""
    if odd := sorted(choices.keys() - DEFAULTS.keys()):
        raise PlanError(f"there is no choice {odd[0]!r} of training; there are {', '.join(DEFAULTS)}")
    how: Choices = {**DEFAULTS, **choices}
    for word, kinds in (("learn", Learn), ("rounding", Rounding), ("norms", Norms)):
        if (got := how[word]) not in get_args(kinds):  # type: ignore[literal-required]
            raise PlanError(f"{word}={got!r}: there are {', '.join(get_args(kinds))}")
    if how["norms"] == "live" and how["rounding"] != "straight":
        told = f"rounding={how['rounding']!r} chooses between the neighbours of a weight that stays, and a live norm moves it"
        raise PlanError(f"{told}: train with rounding='straight', or with norms='folded'")
    return how


def _live_norms(q: QModel, graph: Graph, real: Any, momentum: float,
                notes: list[Note]) -> tuple[dict[str, Tensor], dict[str, tuple[str, LiveNorm]]]:  # fmt: skip
    """The float weights, and by a weight's name the norm that lives beside it, with the name of the bias whose place it takes."""
    if not isinstance(real, GraphModule):
        raise PlanError("norms='live' finds the norms in real=, the GraphModule of the graph as it was captured, before fuse()")
    found, floats, live = batch_norms(real.graph), dict(fuse(real.graph).constants), {}
    for node in graph.nodes:
        name = node.inputs[1] if len(node.inputs) > 1 else ""
        # rows of a grouped transposed convolution are its inputs, and a norm is one of outputs
        if name in found and name in q.tensors and not (node.op == "conv_transpose" and node.attrs["groups"] != 1):
            norm = found[name]
            bias = None if torch.equal(q.rest[norm.folded], floats[norm.folded]) else q.rest[norm.folded]
            live[name] = norm.folded, LiveNorm(norm, momentum, bias)
            floats[name] = norm.weight
    here, there = (sum(node.op == "batch_norm" for node in one.nodes) for one in (graph, real.graph))
    if still := there - here - len(live):
        notes.append(Note("model", f"{still} batch norms stay folded: more than the norm goes into their layers", fallback=True))
    return floats, live


def convert(module: nn.Module) -> QModel:
    """The `QModel` that a prepared module has become: what `quantize` gives, equal to the module in evaluation mode bit for bit.

    The module may go on training. Raises `PlanError` for a module that `prepare` did not make, `InputError` for numbers that are no
    longer finite and `FormatError` for scales that outgrew their stored type, with the layer's name.

    >>> from roundel import quantize
    >>> net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8)
    >>> module = prepare(quantize(net, "int4", data=[x]), net)
    >>> q = convert(module)
    >>> torch.equal(q.module(x), module.eval()(x))
    True
    """
    made = prepared(module)
    q = made.source
    tensors = {name: _hard(name, weight) for name, weight in made.weights.items()}
    activations = {name: _hard(name, site) for name, site in made.sites.items()}
    rest = {name: value.detach().clone() for name, value in _floats(module, q).items()}
    for name, value in rest.items():
        if value.is_floating_point() and not torch.equal(value, q.rest[name]) and not torch.isfinite(value).all():
            raise InputError(f"{name}: its numbers are no longer finite; train with a lower rate")
    structure = q.structure
    if isinstance(structure, Graph):
        structure = replace(structure, constants=Constants({**tensors, **rest}))
    note = Note("model", f"trained after quantization: {len(tensors)} weights, {len(activations)} sites, {made.choices}")
    provenance = {**q.provenance, "trained": made.choices}
    return replace(q, structure=structure, tensors=tensors, activations=activations, rest=rest, provenance=provenance,
                   notes=(*q.notes, note), path=None)  # fmt: skip


def _hard(name: str, part: TunableWeight | TunableActivation) -> Any:
    try:
        return part.hard()
    except (InputError, FormatError) as err:
        raise type(err)(f"{name}: {err}") from err


def prepared(module: nn.Module) -> Prepared:
    """What `prepare` left with the module, compiled or not; `PlanError` for any other."""
    found = getattr(module, "prepared", None)
    if not isinstance(found, Prepared):
        raise PlanError(f"this {type(module).__name__} was not made by prepare(): quantize the float model, prepare and train that")
    return found


def kinds(module: nn.Module) -> Kinds:
    """The parameters of a prepared module that train, by kind, so that an optimizer can give each its rate: weights, rounding,
    scales (zero points and minima too), tables, and rest (biases, norms, what stayed float)."""
    made = prepared(module)
    out: Kinds = {"weights": [], "rounding": [], "scales": [], "tables": []}
    parts: list[TunableWeight | TunableActivation] = [*made.weights.values(), *made.sites.values()]
    for part in parts:
        for kind, found in part.kinds().items():
            out[kind] += found
    taken = {id(p) for found in out.values() for p in found}
    return out | {"rest": [p for p in module.parameters() if p.requires_grad and id(p) not in taken]}


def freeze(module: nn.Module, *, ranges: bool = True, norms: bool = True, on: bool = True) -> None:
    """Keep the ranges of ``learn="ema"`` and the statistics of batch norms as they are, usually for the last part of a training.
    Call it after ``module.train()``, which sets batch norms going again. ``on=False`` lets them follow the data again."""
    if ranges:
        for site in prepared(module).sites.values():
            site.freeze(on)
    if norms:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.train(not on)
            elif isinstance(part, LiveNorm):
                part.freeze(on)


def float_weights(real: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Float weights by the names that a `QModel` gives them."""
    if isinstance(real, Mapping):
        return real
    if isinstance(real, GraphModule):
        return real.graph.constants
    return {member(name, "weight"): one.weight for name, one in leaves(real).items()}


def _floats(module: nn.Module, q: QModel) -> dict[str, Tensor]:
    """The tensors that stayed float, as they are now."""
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if isinstance(module, QGraphModule):
        return dict(module.floats())
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    out = {}
    for name, value in q.rest.items():
        layer, _, leaf = name.rpartition(".")
        inside = member(member(layer, "packed"), leaf)  # the float weight of a layer whose input alone is quantized
        if name not in found and inside not in found:
            raise InputError(f"the module no longer has {name!r}, shape {list(value.shape)}, which it had when it was prepared")
        out[name] = found[name] if name in found else found[inside]
    return out
