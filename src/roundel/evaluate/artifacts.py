"""`diff`: what two quantized models hold that differs; it runs neither."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from typing import Any, Literal

import torch
from torch import Tensor

from ..formats.qtensor import QTensor
from ..network.layer import Activation
from ..plan import Rule
from ..qmodel import QModel
from .scores import plain


@dataclass(frozen=True)
class Difference:
    """One thing in which two models differ: a tensor, a site (a quantized activation) or a rule of the plan.

    ``a`` and ``b`` say what either holds (a format, a rule), None where it lacks it; ``bytes_a`` and ``bytes_b`` what that takes.
    ``max_abs`` is the largest difference of the dequantized values (a site's: of its scale and zero point), ``relative`` the
    norm of the differences over the norm of a's values.
    """

    kind: Literal["tensor", "site", "rule"]
    name: str
    a: str | None
    b: str | None
    bytes_a: int = 0
    bytes_b: int = 0
    max_abs: float | None = None
    relative: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def diff(a: QModel, b: QModel) -> list[Difference]:
    """What differs between two models: tensors (packed or left float), then sites, then rules; empty when nothing does.

    >>> import roundel as rd
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    >>> found = diff(rd.quantize(net, "int8"), rd.quantize(net, "int4"))
    >>> [(d.name, d.a, d.b) for d in found if d.kind == "tensor"]
    [('0.weight', 'int8/channel*fp16', 'int4/channel*fp16')]
    """
    found = []
    for name in dict.fromkeys([*a.tensors, *a.rest, *b.tensors, *b.rest]):
        found.append(_compare("tensor", name, *(_held(model.tensors.get(name, model.rest.get(name))) for model in (a, b))))
    for site in dict.fromkeys([*a.activations, *b.activations]):
        found.append(_compare("site", site, *(_held(model.activations.get(site)) for model in (a, b))))
    rules = [[(rule.pattern, _said(rule)) for rule in model.plan.rules] for model in (a, b)]
    for what, i, j, k, m in SequenceMatcher(None, rules[0], rules[1], autojunk=False).get_opcodes():
        for n in range(max(j - i, m - k)) if what != "equal" else ():
            old = rules[0][i + n] if n < j - i else None
            new = rules[1][k + n] if n < m - k else None
            found.append(Difference("rule", (old or new or ("",))[0], old[1] if old else None, new[1] if new else None))
    return [one for one in found if one is not None]


@dataclass(frozen=True)
class _Held:
    """One side of a `Difference`: what it is, how large, and its numbers when asked."""

    text: str
    shape: tuple[int, ...]
    nbytes: int
    values: Callable[[], Tensor]


def _held(found: QTensor | Tensor | Activation | None) -> _Held | None:
    if isinstance(found, QTensor):
        return _Held(str(found.format), tuple(found.shape), found.nbytes, found.dequantize)
    if isinstance(found, Tensor):
        return _Held(str(found.dtype).removeprefix("torch."), tuple(found.shape), found.nbytes, lambda: found)
    if found is None:
        return None
    parts = [part for part in (found.params.parts[:2] if found.params else ()) if part is not None]
    numbers = [part.dequantize().reshape(-1) for part in parts]
    joined = torch.cat(numbers) if numbers else torch.zeros(0)
    return _Held(f"{found.format}:{found.when}", tuple(joined.shape), sum(part.nbytes for part in parts), lambda: joined)


def _compare(kind: Literal["tensor", "site"], name: str, a: _Held | None, b: _Held | None) -> Difference | None:
    if a is None or b is None:
        there = Difference(kind, name, a.text if a else None, b.text if b else None)
        return replace(there, bytes_a=a.nbytes if a else 0, bytes_b=b.nbytes if b else 0)
    if a.shape != b.shape:
        return Difference(kind, name, f"{a.text} {list(a.shape)}", f"{b.text} {list(b.shape)}", a.nbytes, b.nbytes)
    x, y = a.values().double(), b.values().double()
    if a.text == b.text and torch.equal(x, y):
        return None
    apart = (x - y).abs()
    largest = float(apart.max()) if apart.numel() else 0.0
    size, norm = float(x.norm()), float(apart.norm())
    return Difference(kind, name, a.text, b.text, a.nbytes, b.nbytes, largest, norm / size if size else math.inf if norm else 0.0)


def _said(rule: Rule) -> str:
    return " ".join(f"{key}={value}" for key, value in (("weight", rule.weight), ("activation", rule.activation)) if value)
