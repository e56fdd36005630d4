"""A quantized model made trainable, and a trained one quantized: `prepare`, `convert` and what a training loop asks of the module
between them; no loops, no losses, no decisions about formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, InputError, PlanError
from ..formats.qtensor import QTensor
from ..graph import Graph, GraphModule
from ..network.run import QGraphModule
from ..network.sites import find_sites
from ..network.walk import leaves, member
from ..qmodel import Constants, Note, QModel, fake
from ..ranges import known_ranges
from .tunable import Kinds, Learn, Rounding, TunableActivation, TunableWeight

#: Operands that hold a layer's parameters; other constants of a graph are numbers of its code and do not train.
_TRAINED = {"conv": (1, 2), "conv_transpose": (1, 2), "linear": (1, 2), "embedding": (1,), "batch_norm": (3, 4),
            "layer_norm": (1, 2), "rms_norm": (1,), "group_norm": (1, 2), "prelu": (1,)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `convert` needs to know of a prepared module: where it came from, and what trains by the names of the `QModel`."""

    source: QModel
    weights: dict[str, TunableWeight]
    sites: dict[str, TunableActivation]
    choices: dict[str, Any]


def prepare(
    q: QModel,
    real: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    learn: Learn = "step",
    rounding: Rounding = "straight",
    scales: bool = True,
    tables: bool = True,
    drop: float = 0.0,
    momentum: float = 0.01,
) -> nn.Module:
    """``q`` as an ordinary `nn.Module` in training mode that computes as ``q.module`` does and trains in any PyTorch loop.

    ``real`` gives the float weights: the float network (for a graph its `GraphModule`) or weights by name; without it they start
    from their rounded values. ``learn`` is what trains at static sites: step (LSQ, LSQ+), clip (PACT), ema (ranges that follow the
    data until `freeze`), none. Sites whose range an operation fixes (softmax, sigmoid, tanh) keep it. ``rounding``, ``scales`` and
    ``tables`` are those of `TunableWeight`, ``drop`` is QDrop's share. Biases and norms train as they are. Batch norms are folded
    already where ``q`` holds a graph; elsewhere they are modules and train until `freeze`.

    Raises `InputError` where ``real`` has no weight of a name and shape that ``q`` has.

    >>> from roundel import quantize
    >>> net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8)
    >>> q = quantize(net, "int4", "int8", data=[x])
    >>> module = prepare(q, {"0.weight": net[0].weight})
    >>> torch.equal(module(x), q.module(x)), {kind: len(found) for kind, found in kinds(module).items()}
    (True, {'weights': 1, 'rounding': 0, 'scales': 5, 'tables': 0, 'rest': 1})
    """
    if moving := [site for site, one in q.activations.items() if one.when == "running"]:
        raise PlanError(f"{moving[0]!r} follows its input at run time, which training does not see: train with static ranges")
    names = {id(tensor): name for name, tensor in q.tensors.items()}
    floats = None if real is None else float_weights(real)
    graph = isinstance(q.structure, Graph)
    fixed = known_ranges(q.structure, find_sites(q.structure)) if isinstance(q.structure, Graph) else {}
    weights: dict[str, TunableWeight] = {}

    def weight(tensor: QTensor) -> TunableWeight:
        name = names[id(tensor)]
        if floats is not None and name not in floats:
            raise InputError(
                f"the float network has no weight {name!r}; is it the one that was quantized (a graph, where q is one)?"
            )
        try:
            weights[name] = TunableWeight(tensor, None if floats is None else floats[name], rounding, scales, tables)
        except (InputError, FormatError) as err:
            raise type(err)(f"{name}: {err}") from err
        return weights[name]

    sites = {
        name: TunableActivation(
            site, "none" if name in fixed else learn, drop, settled=graph and site.when == "static", momentum=momentum
        )
        for name, site in q.activations.items()
    }
    module = fake(q, weight, sites)
    if isinstance(module, QGraphModule):
        layers = {node.inputs[i] for node in module.structure.nodes for i in _TRAINED.get(node.op, ()) if i < len(node.inputs)}
        for name, value in module.floats().items():
            value.requires_grad_(value.is_floating_point() and name in layers)
    choices = {"learn": learn, "rounding": rounding, "scales": scales, "tables": tables}
    module.prepared = Prepared(q, weights, sites, choices)  # type: ignore[assignment]
    return module.train()


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
