"""Operations on one place at a time: sums and products of two values, other units, softmax, and look-ups."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ....errors import PlanError
from ....graph import Node
from ....integer.dialect import Ints
from ....integer.fixed import exp_table
from ....integer.ops import INTEGER, numbers
from ....qmodel import Note
from ..layout import plain
from ..translation import Translation, act, factor
from ..units import Units, agree


def operands(t: Translation, node: Node) -> list[int]:
    """Both operands with their axes as the result has them; of fewer axes only where that order is plain, or of none."""
    own, rank = t.orders[node.name], t.rank(node.name)
    made = []
    for name in node.inputs:
        if t.rank(name) not in (0, rank) and own != plain(rank):
            raise PlanError(f"{name!r} has {t.rank(name)} axes and is spread over {rank} with channels last")
        made.append(t.value(name, own if t.rank(name) == rank else plain(t.rank(name))))
    return made


def add(t: Translation, node: Node) -> None:
    """ADD or SUB."""
    a, b, y = (t.units(name) for name in (*node.inputs, node.name))
    unit, left = 2 * max(a.scale, b.scale), node.attrs["left"]
    real = [a.scale / unit, b.scale / unit, unit / (2.0**left * y.scale)]
    if left != (steps := {"INT8": 20, "INT16": 15}[y.type]):
        raise PlanError(f"its operands gain {left} bits before they meet; TFLite's {y.type.lower()} gain {steps}")
    if not agree(node, factor(node), real):
        raise PlanError("no scales give its three multipliers")
    kind = "ADD" if node.op == "add" else "SUB"
    t.draft.step(kind, 2, operands(t, node), t.result(node), f"{kind.title()}Options", fusedActivationFunction=act(t, node),
                 potScaleInt16=False)  # fmt: skip


def mul(t: Translation, node: Node) -> None:
    """MUL."""
    a, b, y = (t.units(name) for name in (*node.inputs, node.name))
    if not agree(node, factor(node), np.float64(a.scale) * np.float64(b.scale) / np.float64(y.scale)):
        raise PlanError("no scales give its multiplier")
    t.draft.step("MUL", 2, operands(t, node), t.result(node), "MulOptions", fusedActivationFunction=act(t, node))


def rescale(t: Translation, node: Node) -> None:
    """QUANTIZE, or RELU where it clamps at zero; RELU6 of int8 changes no units, so one stands after a QUANTIZE."""
    source, y = t.units(node.inputs[0]), t.units(node.name)
    if not agree(node, factor(node), np.float64(source.scale) / np.float64(y.scale), tuple(node.attrs["acc"])):
        raise PlanError("no scales give its multiplier")
    fused = y.act(node)
    x, made = t.value(node.inputs[0], t.orders[node.name]), t.result(node)
    if fused == "RELU6" and source != y:
        x = t.draft.step("QUANTIZE", 2, [x], t.like(node.name, f"{node.name}.wide", t.orders[node.name]), "QuantizeOptions")
    elif fused == "RELU_N1_TO_1":
        raise PlanError(f"{fused} on its own is no operator of TFLite Micro")
    if fused == "NONE":
        t.draft.step("QUANTIZE", 2, [x], made, "QuantizeOptions")
    else:
        t.draft.step(fused, 2, [x], made)


def softmax(t: Translation, node: Node) -> None:
    """SOFTMAX, over the file's last axis."""
    source, y = t.units(node.inputs[0]), t.units(node.name)
    low, high = source.range
    table = numbers(t.graph, node.inputs[1])
    if (y.scale, y.zero) != (1 / 256, -128) or not np.array_equal(table, exp_table(source.scale, high - low + 1)):
        raise PlanError("TFLite's SOFTMAX gives int8 in units of 1/256 with zero point -128")
    if t.units(node.name).act(node) != "NONE":
        raise PlanError("SOFTMAX of TFLite has no clamp")
    rank = t.rank(node.name)
    axis = node.attrs["axis"] % rank
    order = t.orders[node.name]
    if order[-1] != axis:
        order = (*(i for i in range(rank) if i != axis), axis)
    t.draft.step("SOFTMAX", 2, [t.value(node.inputs[0], order)], t.result(node, order), "SoftmaxOptions", beta=1.0)


#: Operations that TFLite computes into one result scale and zero point, code for code the nearest.
_FUNCTIONS = {"sigmoid": ("LOGISTIC", Units(1 / 256, -128)), "tanh": ("TANH", Units(1 / 128, 0))}


def table(t: Translation, node: Node) -> None:
    """LOGISTIC or TANH; any other function of int8 looks itself up: CAST, ADD, GATHER."""
    order, name = t.orders[node.name], node.inputs[0]
    x, made, source = t.value(name, order), t.result(node), t.producers.get(node.name)
    kind, wanted = _FUNCTIONS.get(source.op if source else "", ("", None))
    if t.units(node.name) == wanted:
        t.draft.step(kind, 2, [x], made)
        return
    if t.units(name).type != "INT8":
        raise PlanError("TFLite's functions of int16 have tables of their own, and a look-up would have 65,536 entries")
    if node.attrs["first"] != -128:
        raise PlanError(f"its table starts at code {node.attrs['first']}, not at -128")
    _look_up(t, node, x, made, numbers(t.graph, node.inputs[1]), [128])


def prelu(t: Translation, node: Node) -> None:
    """A look-up in a table for each channel. TFLite's own PRELU has slopes of 8 bits and one multiplier for all of them."""
    order, name = t.orders[node.name], node.inputs[0]
    if t.units(name).type != "INT8":
        raise PlanError("TFLite Micro's PRELU takes int8, and a look-up would have 65,536 entries for each channel")
    slopes = [numbers(t.graph, constant) for constant in node.inputs[1:]]
    channels = max(t.shape(name)[1], 1)
    codes = np.broadcast_to(np.arange(-128, 128), (1, channels, 256))
    first = 128 + 256 * np.arange(channels).reshape([-1 if axis == 1 else 1 for axis in order])
    _look_up(t, node, t.value(name, order), t.result(node), INTEGER["prelu"](codes, *slopes, **node.attrs), first)


def _look_up(t: Translation, node: Node, x: int, made: int, table: Ints, first: ArrayLike) -> None:
    """Codes ``table[x + first]``: CAST, ADD, GATHER."""
    entry, at = t.draft.tensors[x], t.units(node.name)
    wide, index = (t.draft.tensor(f"{node.name}.{word}", "INT32", entry.shape, batched=entry.batched) for word in ("wide", "index"))
    t.draft.step("CAST", 1, [x], wide, "CastOptions", inDataType=9, outDataType=2)
    t.draft.step("ADD", 1, [wide, t.ints("first", first)], index, "AddOptions", fusedActivationFunction=0)
    name = node.inputs[1] if node.op == "table" else f"{node.name}.table"
    held = t.draft.constant(name, at.type, table.reshape(-1), scale=(at.scale,), zero=at.zero)
    t.draft.step("GATHER", 2, [held, index], made, "GatherOptions", axis=0)
    t.notes.append(Note(node.name, "a look-up by GATHER, which NPUs leave to the processor"))
