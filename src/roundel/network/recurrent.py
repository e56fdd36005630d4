"""Recurrent layers and cells of torch as operations of the graph, one step after the other; no operation of their own, no loop.

Every weight is one constant that all steps read. The values of a cell that mean the same (all its gates, all its states) carry
one ``site``, so that they share parameters over the steps, and a state that comes in has those of the state that goes out. What
the next step adds to is marked ``fine``: an error there comes back at every step, so it has 16 bits unless a plan says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .aten import ATEN
from .emitter import Const, Emitter, Unsupported, is_symbolic

#: State of a cell: its values, the output first; None stands for zeros.
State = tuple[Any, ...] | None


# -- keeping them whole -----------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("roundel", "DEF")
_WHOLE: dict[Any, Any] = {}


def _keep(target: torch._ops.OpOverload, cell: bool) -> None:
    """Enter an operation of ours with the schema of ``target``; torch takes its own apart, and then nobody knows it."""
    name, _, rest = str(target._schema).removeprefix("aten::").partition("(")
    name = name.replace(".", "_")
    _LIBRARY.define(f"{name}({rest}")

    def shapes(x: Tensor, hx: Any, *rest: Any) -> Any:
        states = [s.new_empty(s.shape) for s in (hx if isinstance(hx, (list, tuple)) else [hx])]
        if cell:
            return tuple(states) if len(states) > 1 else states[0]
        directions = 1 + rest[5]
        return (x.new_empty((*x.shape[:-1], states[0].shape[-1] * directions)), *states)

    torch.library.register_fake(f"roundel::{name}", shapes, lib=_LIBRARY)
    _WHOLE[target] = getattr(torch.ops.roundel, name).default


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _keep(getattr(torch.ops.aten, _name).input, False)
    _keep(getattr(torch.ops.aten, f"{_name}_cell").default, True)


def kept_whole(graph: fx.Graph) -> None:
    """Rename the recurrent operations of an exported program, in place, so that its decomposition leaves them whole."""
    for node in graph.nodes:
        node.target = _WHOLE.get(node.target, node.target)


# -- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Operations of one layer and direction under the name ``at``; ``size`` numbers of state."""

    e: Emitter
    at: str
    size: int

    def __call__(self, group: str, op: str, *operands: Any, fine: bool = True, **attrs: Any) -> Any:
        """One operation, its result in ``group``."""
        name = f"{self.at}.{group}" if self.at else group
        marks: dict[str, Any] = {"site": name} | ({"fine": True} if fine else {})
        return self.e.emit(op, *operands, named=name, **marks, **attrs)

    def parts(self, x: Any, *counts: int) -> tuple[Any, ...]:
        """Runs of ``counts`` states along the last axis."""
        return self.e.emit("split", x, sizes=[n * self.size for n in counts], axis=-1, outputs=len(counts))


#: (cell, gates that the input gives, weight and bias of the state, state) -> the output, then the whole state.
Step = Callable[[Cell, Any, "Weights", State], tuple[Any, State]]


@dataclass(frozen=True)
class Weights:
    """Of the input and of the state; ``bias`` is added to the former's product, ``later`` to the latter's. ``out`` projects."""

    input: Const
    state: Const
    bias: Const | None
    later: Const | None
    out: Const | None


def _lstm(cell: Cell, gates: Any, w: Weights, state: State) -> tuple[Any, State]:
    """i, f, g, o; c' = f c + i g; h = o tanh(c'). Hochreiter and Schmidhuber 1997, gates in torch's order."""
    if state is not None:
        gates = cell("gates", "add", gates, cell("gates", "linear", state[0], w.state))
    i, f, g, o = cell.parts(gates, 1, 1, 1, 1)
    i, o = cell("sigmoid", "sigmoid", i), cell("sigmoid", "sigmoid", o)
    new = cell("cell", "mul", i, cell("tanh", "tanh", g))
    if state is not None:
        new = cell("cell", "add", cell("cell", "mul", cell("sigmoid", "sigmoid", f), state[1]), new)
    out = cell("product" if w.out else "hidden", "mul", o, cell("tanh", "tanh", new), fine=False)
    out = cell("hidden", "linear", out, w.out, fine=False) if w.out else out
    return out, (out, new)


def _gru(cell: Cell, gates: Any, w: Weights, state: State) -> tuple[Any, State]:
    """r, z; n = tanh(n_x + r n_h); h' = n + z (h - n). Cho et al. 2014, as torch has it. Its output is the state in coarser units,
    which the next step multiplies too."""
    both, new = cell.parts(gates, 2, 1)
    later: Any = w.later
    if state is not None:
        other, later = cell.parts(cell("gates", "linear", _coarse(cell, w, *state), w.state, w.later), 2, 1)
        both = cell("gates", "add", both, other)
    elif w.later is not None:
        new_bias = Const(w.later.tensor[2 * cell.size :].clone(), None, w.later.sources)
        later = cell("gates", "identity", cell.e.forms.setdefault((w.later, "new"), new_bias))
    r, z = cell.parts(cell("sigmoid", "sigmoid", both), 1, 1)
    new = new if later is None else cell("gates", "add", new, cell("gates", "mul", r, later))
    new = cell("tanh", "tanh", new)
    if state is None:
        out = cell("state", "sub", new, cell("change", "mul", z, new))
    else:
        out = cell("state", "add", new, cell("change", "mul", z, cell("change", "sub", state[0], new)))
    coarse = _coarse(cell, w, out)
    return coarse, (out, coarse)


def _coarse(cell: Cell, w: Weights, state: Any, known: Any = None) -> Any:
    """The state at a site of its own, for products: a cast to the type it has."""
    dtype = str(w.state.tensor.dtype).removeprefix("torch.")
    return known or cell("hidden", "cast", state, dtype=dtype, fine=False)


def _rnn(act: str) -> Step:
    """h' = act(x + h)."""

    def step(cell: Cell, gates: Any, w: Weights, state: State) -> tuple[Any, State]:
        group = "hidden" if act == "relu" else "gates"  # fusion makes a ReLU part of the sum
        if state is not None:
            gates = cell(group, "add", gates, cell("gates", "linear", state[0], w.state), fine=group == "gates")
        out = cell("hidden", act, gates, fine=False)
        return out, (out,)

    return step


@dataclass(frozen=True)
class Kind:
    """How many gates, the groups of its state, whether part of the bias is added to the state's product alone."""

    step: Step
    gates: int
    groups: tuple[str, ...]
    later: bool = False


KINDS = {
    "lstm": Kind(_lstm, 4, ("hidden", "cell")),
    "gru": Kind(_gru, 3, ("state",), later=True),
    "rnn_tanh": Kind(_rnn("tanh"), 1, ("hidden",)),
    "rnn_relu": Kind(_rnn("relu"), 1, ("hidden",)),
}


# -- layers -----------------------------------------------------------------------------------------------------------


def _weights(e: Emitter, kind: Kind, nodes: Sequence[fx.Node | None]) -> Weights:
    """Of one layer and direction: two weights, two biases or none, a projection or none. Both biases become one where they can."""
    given: list[Any] = [None if node is None else e.env[node] for node in nodes]
    if odd := [c for c in given if c is not None and not isinstance(c, Const)]:
        raise Unsupported(f"weights that are computed, {odd[0]}")
    biases = [c for c in given[2:] if c is not None and c.tensor.ndim == 1]
    out = next((c for c in given[2:] if c is not None and c.tensor.ndim == 2), None)
    if not biases:
        return Weights(given[0], given[1], None, None, out)
    one, two = biases
    now, later = two.tensor.clone(), torch.zeros_like(two.tensor)
    if kind.later:
        start = len(now) // kind.gates * (kind.gates - 1)
        later[start:], now[start:] = now[start:], 0.0
    sources = tuple(dict.fromkeys(one.sources + two.sources))
    bias = e.forms.setdefault((one, "both biases"), Const((one.tensor + now).detach(), None, sources))
    late = e.forms.setdefault((two, "later bias"), Const(later.detach(), None, two.sources)) if kind.later else None
    return Weights(given[0], given[1], bias, late, out)


def _is_zero(e: Emitter, node: fx.Node) -> bool:
    """Whether a state is zeros known at capture, of one example or repeated over the batch."""
    value = e.env[node]
    while isinstance(value, str) and value.startswith("%") and value not in e.constants:
        made = e.drafts[int(value[1:].split(".")[0])].node
        if made.op not in ("identity", "expand_batch"):
            return False
        value = made.inputs[0]
    tensor = value.tensor if isinstance(value, Const) else e.constants.get(value)
    return tensor is not None and not tensor.any()


def _initial(e: Emitter, kind: Kind, hx: Any) -> list[fx.Node] | None:
    """The values of the first state; None for zeros."""
    nodes = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    return None if all(_is_zero(e, node) for node in nodes) else nodes


def _scope(e: Emitter, tail: str) -> str:
    return ".".join(part for part in (e.call.path, tail) if part)


def _layers(kind: Kind) -> Callable[..., Any]:
    """Layers and directions over a sequence (N, T, in), or (T, N, in) where not ``first``: outputs, then the last states."""

    def translate(e: Emitter, x: Any, hx: Any, params: Any, biases: bool, layers: int, drop: float, train: bool, both: bool,
                  first: bool) -> Any:  # fmt: skip
        shape = e.shape(x)
        if len(shape) != 3:
            raise Unsupported("an input without a batch axis")
        if train and drop:
            raise Unsupported("dropout at inference")
        time, batch = (1, 0) if first else (0, 1)
        if is_symbolic(shape[time]):
            raise Unsupported("a number of steps that is not fixed; the first axis of an input is its batch: use batch_first=True")
        steps, count, start = int(shape[time]), shape[batch], _initial(e, kind, hx)
        each, ends = len(params) // (layers * (1 + both)), [[] for _ in kind.groups]  # type: ignore[var-annotated]

        def spread(value: Any, width: int, axis: int) -> Any:
            """(N, width) with an axis of size 1."""
            return e.reshape(value, [count, width], [1, count, width] if axis == 0 else [count, 1, width])

        def joined(values: Sequence[Any], axis: int) -> Any:
            return e.emit("concat", *values, axis=axis) if len(values) > 1 else values[0]

        for i in range(layers):
            sides = []
            for back in range(1 + both):
                k = i * (1 + both) + back
                w = _weights(e, kind, params[k * each : (k + 1) * each])
                cell = Cell(e, _scope(e, f"l{i}" + "_reverse" * back), w.state.tensor.shape[0] // kind.gates)
                total = kind.gates * cell.size
                gates = cell("gates", "linear", x, w.input, w.bias)
                state: State = None
                if start is not None:
                    state = tuple(_enter(cell, group, node, k) for group, node in zip(kind.groups, start, strict=True))
                outs: list[Any] = [None] * steps
                for t in reversed(range(steps)) if back else range(steps):
                    now = gates if steps == 1 else e.emit("slice", gates, axis=time, start=t, stop=t + 1, step=1)
                    now = e.reshape(now, [count, 1, total] if first else [1, count, total], [count, total])
                    outs[t], state = kind.step(cell, now, w, state)
                width = (w.out.tensor if w.out else w.state.tensor).shape[0 if w.out else 1]
                sides.append(joined([spread(out, width, time) for out in outs], time))
                assert state is not None
                for values, value, source in zip(ends, state, (w.out or w.state, w.state)):
                    values.append(spread(value, source.tensor.shape[0] if source is w.out else cell.size, 0))
            x = joined(sides, -1)
        return x, *(joined(values, 0) for values in ends)

    return translate


def _enter(cell: Cell, group: str, node: fx.Node, k: int) -> Any:
    """State ``k`` of (layers, N, size) as (N, size), in the group of those that the steps make."""
    e, shape = cell.e, cell.e.shape(node)
    value: Any = node if shape[0] == 1 else e.emit("slice", node, axis=0, start=k, stop=k + 1, step=1)
    value = e.reshape(value, [1, *shape[1:]], shape[1:])
    return cell(group, "identity", value, fine=group != "hidden")


def _one_step(kind: Kind) -> Callable[..., Any]:
    """A cell: the state after one step."""

    def translate(e: Emitter, x: Any, hx: Any, *params: Any) -> Any:
        if len(e.shape(x)) != 2:
            raise Unsupported("an input without a batch axis")
        w, start = _weights(e, kind, params), _initial(e, kind, hx)
        cell = Cell(e, e.call.path, w.state.tensor.shape[0] // kind.gates)
        state: State = None
        if start is not None:
            state = tuple(cell(g, "identity", node, fine=g != "hidden") for g, node in zip(kind.groups, start, strict=True))
        _, state = kind.step(cell, cell("gates", "linear", x, w.input, w.bias), w, state)
        assert state is not None
        return state[: len(kind.groups)] if len(kind.groups) > 1 else state[0]

    return translate


for _name, _kind in KINDS.items():
    ATEN[f"{_name}_input"], ATEN[f"{_name}_cell"] = _layers(_kind), _one_step(_kind)
