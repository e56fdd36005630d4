"""`inspect`: what is in a model or a quantized model, tensor by tensor; it reads and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .graph import Graph, GraphModule
from .qmodel import QModel

__all__ = ["Inspection", "SiteRow", "TensorRow", "inspect"]


@dataclass(frozen=True)
class TensorRow:
    """One stored tensor: ``op`` is what reads it, ``format`` a dtype or a canonical format, ``low``/``high`` its finite range."""

    name: str
    op: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SiteRow:
    """One quantized activation: its format and when its range is found ("static", "dynamic", "running")."""

    name: str
    format: str
    when: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. ``notes`` are (subject, sentence) pairs; ``nbytes`` counts every tensor, tied ones once."""

    kind: str
    tensors: tuple[TensorRow, ...]
    sites: tuple[SiteRow, ...]
    notes: tuple[tuple[str, str], ...]
    parameters: int
    nbytes: int
    ops: Mapping[str, int] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Stored bits per parameter."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; keys equal the attributes."""
        return asdict(self) | {"bits": self.bits}


def inspect(model: nn.Module | QModel) -> Inspection:
    """List every tensor of ``model`` with its size and range, its quantized activations, and what is odd about it.

    Raises `InputError` for anything that is neither a module nor a `QModel`.

    >>> found = inspect(nn.Sequential(nn.Linear(4, 2)))
    >>> [(row.name, row.op, row.shape, row.nbytes) for row in found.tensors], found.parameters
    ([('0.weight', 'Linear', (2, 4), 32), ('0.bias', 'Linear', (2,), 8)], 10)
    """
    if isinstance(model, QModel):
        return _quantized(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"inspect takes an nn.Module or a QModel; got {type(model).__name__}")
    if isinstance(model, GraphModule):
        graph = model.graph
        return _survey("graph", graph.constants, _readers(graph), _ops(graph), [("graph", text) for text in graph.notes])
    owners = dict(model.named_modules())

    def owner(name: str) -> str:
        return type(owners[name.rpartition(".")[0]]).__name__

    leaves = Counter(type(m).__name__ for m in owners.values() if not any(m.children()))
    return _survey("module", dict(_tensors(model)), owner, dict(leaves), [])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _readers(graph: Graph) -> Callable[[str], str]:
    uses = graph.consumers()
    return lambda name: uses[name][0].op if name in uses else ""


def _ops(graph: Graph) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes))


def _survey(
    kind: str, tensors: Mapping[str, Tensor], op: Callable[[str], str], ops: Mapping[str, int], notes: list[tuple[str, str]]
) -> Inspection:
    rows: list[TensorRow] = []
    first: dict[tuple[Any, ...], str] = {}
    parameters = nbytes = 0
    for name, tensor in tensors.items():
        low, high, odd = _range(tensor)
        rows.append(TensorRow(name, op(name), tuple(tensor.shape), _dtype(tensor), tensor.nbytes, low, high))
        notes += [(name, text) for text in odd]
        place = _place(tensor)
        if place is not None and place in first:
            notes.append((name, f"is tied to {first[place]}: counted once"))
            continue
        if place is not None:
            first[place] = name
        parameters, nbytes = parameters + tensor.numel(), nbytes + tensor.nbytes
    return Inspection(kind, tuple(rows), (), tuple(notes), parameters, nbytes, ops)


def _quantized(q: QModel) -> Inspection:
    graph = q.structure if isinstance(q.structure, Graph) else None
    op = _readers(graph) if graph else lambda name: ""
    rows, notes = [], [(note.subject, note.text) for note in q.notes]
    for name, tensor in q.tensors.items():
        low, high, odd = _range(tensor.dequantize())
        rows.append(TensorRow(name, op(name), tuple(tensor.shape), str(tensor.format), tensor.nbytes, low, high))
        notes += [(name, text) for text in odd]
    for name, plain in q.rest.items():
        low, high, odd = _range(plain)
        rows.append(TensorRow(name, op(name), tuple(plain.shape), _dtype(plain), plain.nbytes, low, high))
        notes += [(name, text) for text in odd]
    notes += [(name, f"is tied to {first}: counted once") for name, first in q.tied.items()]
    sites = tuple(SiteRow(name, str(site.format), site.when) for name, site in q.activations.items())
    parameters = sum(_numel(row.shape) for row in rows)
    return Inspection("quantized", tuple(rows), sites, tuple(notes), parameters, q.nbytes, _ops(graph) if graph else {})


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """What makes two names one tensor: the same memory, looked at in the same way."""
    if tensor.is_meta or tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _range(tensor: Tensor) -> tuple[float | None, float | None, list[str]]:
    """Smallest and largest finite element, and what is odd: no numbers, none at all, or some that are not finite."""
    if tensor.is_meta:
        return None, None, ["is a meta tensor: it has a shape and no numbers"]
    if tensor.numel() == 0:
        return None, None, ["is empty"]
    if tensor.is_complex():
        return None, None, ["is complex: its range is not shown"]
    values = tensor.detach().reshape(-1)
    if tensor.is_floating_point():
        finite = torch.isfinite(values if values.element_size() > 1 else values.float())
        if not bool(finite.all()):
            bad = (~finite).nonzero().reshape(-1)
            where = torch.unravel_index(bad[0], tensor.shape)
            index = ", ".join(str(int(i)) for i in where)
            odd = [f"holds {len(bad)} values that are not finite, the first at ({index})"]
            values = values[finite]
            return (*_extremes(values), odd)
    return (*_extremes(values), [])


def _extremes(values: Tensor) -> tuple[float | None, float | None]:
    if not len(values):
        return None, None
    if not values.is_floating_point():
        values = values.long()
    elif values.element_size() < 4:
        values = values.float()  # 8-bit floats have no reductions of their own
    low, high = torch.aminmax(values)
    return float(low), float(high)
