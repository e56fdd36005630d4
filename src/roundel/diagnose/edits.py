"""A quantized model with one thing changed: a site, a weight, a bias; each edit is in the new plan where a plan can say it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..data import Batch
from ..formats.format import Format
from ..formats.qtensor import QTensor
from ..graph import Graph
from ..network.layer import Activation
from ..plan import Plan, Rule
from ..qmodel import Constants, QModel
from ..quantize import quantize
from ..ranges import static_activation
from ..solvers import rtn
from ..stats import Stats
from .loss import bare


def with_tensors(q: QModel, tensors: Mapping[str, QTensor] | None = None, rest: Mapping[str, Tensor] | None = None) -> QModel:
    """``q`` with other weights, or other floats."""
    tensors, rest = {**q.tensors, **(tensors or {})}, {**q.rest, **(rest or {})}
    structure = q.structure
    if isinstance(structure, Graph):
        structure = replace(structure, constants=Constants({**tensors, **rest}))
    return replace(q, structure=structure, tensors=tensors, rest=rest)


def with_weight(q: QModel, name: str, weight: Tensor, text: str) -> QModel:
    """``q`` with one weight rounded to nearest in the format ``text``."""
    old = q.tensors[name]
    new = with_tensors(q, {name: rtn(weight, Format.parse(text), axis=old.axis)})
    return new if str(old.format) == text else _ruled(new, Rule(literally(name), weight=text))


def with_ranges(q: QModel, seen: Mapping[str, Stats], method: str, fixed: Mapping[str, tuple[float, float]]) -> QModel:
    """``q`` with the ranges of these sites found anew."""
    new = {site: static_activation(site, q.activations[site].format, stats, method, fixed.get(site))
           for site, stats in seen.items()}  # fmt: skip
    return replace(q, activations={**q.activations, **new})


def with_format(q: QModel, site: str, seen: Stats, text: str) -> QModel:
    """``q`` with one site in another static format."""
    new: Activation = static_activation(site, Format.parse(text, "activation"), seen, _method(q))
    return _ruled(replace(q, activations={**q.activations, site: new}), Rule(literally(site), activation=text))


def remade(q: QModel, model: nn.Module, learn: Sequence[Batch]) -> QModel:
    """``model`` quantized by the plan and the ranges of ``q``, rounded to nearest, biases corrected."""
    return quantize(model, plan=q.plan, data=[bare(batch) for batch in learn], ranges=_method(q))


def literally(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _method(q: QModel) -> str:
    return str(q.provenance.get("ranges", "mse"))


def _ruled(q: QModel, rule: Rule) -> QModel:
    return replace(q, plan=Plan((*q.plan.rules, rule)))
