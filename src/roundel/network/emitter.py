"""`Emitter`: collects a graph under provisional names while a traced program is walked, and names it at the end; knows no aten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Node, Spec
from ..graph.build import with_values


class Unsupported(Exception):
    """Why one aten operation has no counterpart in the graph; collected, so that all of them are told at once."""


@dataclass(frozen=True, eq=False)
class Const:
    """A tensor known at capture: a parameter by its name, or something computed from ``sources`` alone.

    One that is ``single`` stands for as many examples as there are, on an axis where no operation repeats it: it can be looked at,
    and be no operand.
    """

    tensor: Tensor
    name: str | None = None
    sources: tuple[str, ...] = ()
    single: bool = False


@dataclass(frozen=True)
class Call:
    """The module call that an operation belongs to; ``key`` tells repeated calls of one module apart."""

    path: str
    key: str
    leaf: bool


@dataclass(frozen=True)
class Draft:
    """A node under provisional names (``%7``), and the module call it belongs to."""

    node: Node
    call: Call
    stem: str = ""


#: What the operands of an operation are called when they are constants without a name of their own.
_ROLES = {
    **dict.fromkeys(["conv", "conv_transpose", "linear", "layer_norm", "group_norm"], ("input", "weight", "bias")),
    **dict.fromkeys(["embedding", "rms_norm", "prelu"], ("input", "weight")),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
}
_WEIGHTED = {"conv", "conv_transpose", "linear", "embedding"}


@dataclass
class Emitter:
    """Collects drafts while the exported program is walked; names are given at the end, when all of them are known."""

    called: set[str]
    batch_like: str = ""
    drafts: list[Draft] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refs: dict[Const, str] = field(default_factory=dict)
    forms: dict[tuple[Const, str], Const] = field(default_factory=dict)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    node: fx.Node = None  # type: ignore[assignment]
    call: Call = field(default_factory=lambda: Call("", "", False))

    def emit(self, op: str, *operands: Any, outputs: int = 1, named: str = "", **attrs: Any) -> Any:
        """Add one node; operands are fx nodes, value names, tensors' `Const`, numbers or None. Returns its value name(s), which
        become ``named`` and a number."""
        at = f"%{len(self.drafts)}"
        roles = _ROLES.get(op, ())
        names = [self._ref(x, at, roles[i] if i < len(roles) else "value") for i, x in enumerate(operands)]
        while names and not names[-1]:
            names.pop()
        outs = tuple(f"{at}.{i}" for i in range(outputs)) if outputs > 1 else (at,)
        self.drafts.append(Draft(Node(op, tuple(names), outs, attrs), self.call, named or self._stem(op, names)))
        return outs if outputs > 1 else at

    def _ref(self, x: Any, at: str, role: str) -> str:
        x = self.env[x] if isinstance(x, fx.Node) else x
        if x is None or isinstance(x, str):
            return x or ""
        if isinstance(x, (bool, int, float)):
            floats = isinstance(self.out, Tensor) and self.out.is_floating_point()
            x = Const(torch.tensor(float(x) if floats else x))
        if not isinstance(x, Const):
            raise Unsupported(f"an operand that is {type(x).__name__}")
        if x.single:
            raise Unsupported("a broadcast to the batch size off axis 0")
        if x not in self.refs:
            ref = x.name or f"{at}/{role}"
            while ref in self.constants:
                ref += "+"
            self.refs[x], self.constants[ref] = ref, x.tensor.detach().contiguous()
            if x.sources and x.sources != (x.name,):
                self.folded[ref] = x.sources
        return self.refs[x]

    def form(self, x: Any, how: str, change: Callable[[Tensor], Tensor], name: str | None = None) -> Const:
        """Another form of a constant; asked for twice, it is one constant still."""
        c = self.env[x]
        return self.forms.setdefault((c, how), Const(change(c.tensor), name, c.sources))

    def _stem(self, op: str, names: list[str]) -> str:
        """The layer a functional call stands for by its weight (``attn.out_proj.weight``), unless that layer is called itself."""
        weight = names[1] if op in _WEIGHTED and not names[1].startswith("%") else ""
        stem = weight.removesuffix("weight").rstrip("._")
        inside = stem.startswith(f"{self.call.path}." if self.call.path else "")
        return stem if stem != weight and stem and inside and stem not in self.called else ""

    def shape(self, x: Any) -> list[Any]:
        return list(x.meta["val"].shape)

    def sizes(self, x: Any, *axes: int) -> list[int]:
        """Static sizes of the given axes."""
        shape = self.shape(x)
        if any(is_symbolic(shape[a]) for a in axes):
            raise Unsupported("a size that depends on the batch")
        return [int(shape[a]) for a in axes]

    @property
    def out(self) -> Tensor:
        return self.node.meta["val"]

    def reshape(self, x: Any, before: Sequence[Any], after: Sequence[Any]) -> Any:
        """``x`` of shape ``before`` in shape ``after``: 0 where a symbolic size stays in place, -1 where one moves."""
        if [str(n) for n in before] == [str(n) for n in after]:
            return x
        shape = []
        for i, n in enumerate(after):
            stays = i < len(before) and str(before[i]) == str(n)
            shape.append((0 if stays else -1) if is_symbolic(n) else int(n))
        if shape.count(-1) > 1:
            raise Unsupported("a reshape that moves two symbolic sizes")
        return self.emit("reshape", x, shape=shape)


def is_symbolic(n: Any) -> bool:
    return isinstance(n, torch.SymInt) and not n.node.expr.is_number


def some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def finish(e: Emitter, inputs: dict[str, Spec], outputs: list[str], notes: list[str]) -> Graph:
    """Give every value its final name: the leaf module's for what leaves it, ``module.op`` for the rest."""
    taken = set(inputs)
    final: dict[str, str] = {name: name for name in inputs}
    final[""] = ""

    def claim(ref: str, wish: str) -> None:
        name, i = wish, 0
        while name in taken:
            i += 1
            name = f"{wish}_{i}"
        taken.add(name)
        final[ref] = name

    for ref in e.constants:
        if not ref.startswith("%"):
            claim(ref, ref.rstrip("+"))
    last = {d.call.key: i for i, d in enumerate(e.drafts) if d.call.leaf}
    for i, d in enumerate(e.drafts):
        scope = f"{d.call.path}." if d.call.path else ""
        wish = d.call.path if last.get(d.call.key) == i else d.stem or scope + d.node.op
        for out in d.node.outputs:
            claim(out, wish)
    for ref in e.constants:
        if ref.startswith("%"):
            at, _, role = ref.rstrip("+").partition("/")
            claim(ref, f"{final.get(at) or final[f'{at}.0']}.{role}")
    for ref, sources in e.folded.items():
        notes.append(f"{final[ref]} is computed from {some(sources)} once and stored as one constant")
    rename = final.__getitem__
    nodes = [Node(n.op, tuple(map(rename, n.inputs)), tuple(map(rename, n.outputs)), n.attrs) for n in (d.node for d in e.drafts)]
    graph = Graph(
        tuple(inputs),
        tuple(map(rename, outputs)),
        tuple(nodes),
        {final[ref]: tensor for ref, tensor in e.constants.items()},
        inputs,
        tuple(notes),
    )
    return with_values(graph.with_nodes(graph.nodes))
