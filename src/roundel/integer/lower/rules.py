"""What each operation of the real graph becomes, one function each; those with stored weights are in `weights`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import PlanError
from ...graph import Node, Spec
from ...graph.ops import OPS
from .. import ops
from ..check import INT32, norm_reach, size
from ..dialect import quantize_multiplier, quantize_wide
from ..fixed import STEP_BITS, UNIT_BITS, exp_table, step_table
from .making import STILL, Lowering
from .weights import lower_embedding, lower_matmul, lower_weighted


def _input(made: Lowering, node: Node) -> None:
    spec = made.source.values.get(node.name)
    if spec is not None and spec.shape and isinstance(spec.shape[0], int):
        told = "write the network without the batch size, for a device runs one example"
        raise PlanError(f"its batch is fixed at {spec.shape[0]}: {told}")
    if spec is not None and "float" not in spec.dtype:  # whole numbers, such as ids, come as they are
        made.values[node.name] = Spec(spec.shape, "int32")
        return
    at = made.affine(node.name)
    made.values[node.name] = Spec(made.shape(node.name))
    made.emit("quantize", [node.name], f"{node.name}.codes", at.dtype, like=node.name, **at.door)
    made.renamed[node.name] = f"{node.name}.codes"


# pointwise


def _add(made: Lowering, node: Node) -> None:
    """Sums and differences. Both operands gain 20 bits before they meet, as in TFLite, or what int32 has left."""
    (a, b), y = map(made.affine, node.inputs), made.affine(node.name)
    wide = max(a.bits, b.bits) > 8
    left = 20 if not wide else 15 if a.bits == b.bits and not (a.zero or b.zero) else 14
    unit = 2 * max(a.scale, b.scale)
    multiplier, shift = quantize_multiplier([a.scale / unit, b.scale / unit, unit / (2.0**left * y.scale)])
    made.emit(node.op, list(node.inputs), node.name, y.dtype, a_zero=a.zero, b_zero=b.zero, left=left,
              multiplier=multiplier.tolist(), shift=shift.tolist(), **made.rescaled(y, node.attrs.get("act")))  # fmt: skip


def _mul(made: Lowering, node: Node) -> None:
    (a, b), y = map(made.affine, node.inputs), made.affine(node.name)
    multiplier, shift = (int(part) for part in quantize_multiplier(a.scale * b.scale / y.scale))
    made.emit("mul", list(node.inputs), node.name, y.dtype, a_zero=a.zero, b_zero=b.zero, multiplier=multiplier, shift=shift,
              **made.rescaled(y, node.attrs.get("act")))  # fmt: skip


def _rescaled(made: Lowering, node: Node, op: str, factor: float, act: str | None = None, constants: Sequence[str] = (),
              **attrs: Any) -> None:  # fmt: skip
    """``op`` sums its one operand; the result is that sum times ``factor``."""
    x, y = made.affine(node.inputs[0]), made.affine(node.name)
    multiplier, shift = (int(part) for part in quantize_multiplier(x.scale * factor / y.scale))
    made.emit(op, [node.inputs[0]], node.name, y.dtype, constants, **attrs, x_zero=x.zero, multiplier=multiplier, shift=shift,
              **made.rescaled(y, act))  # fmt: skip


def _cast(made: Lowering, node: Node) -> None:
    if "float" not in node.attrs["dtype"]:
        raise PlanError(f"its results are {node.attrs['dtype']}; a cast between real numbers changes units, others are not lowered")
    _rescaled(made, node, "rescale", 1.0)


def _relu(made: Lowering, node: Node) -> None:
    _rescaled(made, node, "rescale", 1.0, act=node.op)


#: log2 of the distance between the entries of a table for more than 8 bits, as in TFLite.
LINE = 7


def _table(made: Lowering, node: Node) -> None:
    """Any function of one value: its result for every code (every 128th of 16 bits), worked out in double, the nearest code.

    The value is the one operand that the network computes; others, such as an exponent, are single numbers.
    """
    site = next(name for name in node.inputs if name not in made.source.constants)
    others = [name for name in node.inputs if name != site]
    if odd := [name for name in others if name not in made.source.constants or made.number(name).size != 1]:
        raise PlanError(f"it depends on {odd[0]!r} too: a table is a function of one value")
    x, y = made.affine(site), made.affine(node.name)
    (low, high), bits = ops.extremes(x.dtype), LINE if x.bits > 8 else 0
    numbers = torch.from_numpy(x.scale * (np.arange(low, high + 1 + bool(bits), 1 << bits) - x.zero))
    operands = [numbers if name == site else torch.from_numpy(made.number(name)).reshape(()) for name in node.inputs]
    if node.op == "prelu":
        operands[1] = operands[1].reshape(1)
    real = OPS[node.op](*operands, **node.attrs).double().numpy()
    if np.isnan(real).any():
        raise PlanError(f"it is no number at {int(np.isnan(real).sum())} of the {len(real)} codes of {site!r}")
    codes = np.clip(np.rint(np.clip(real / y.scale, -(2.0**40), 2.0**40)) + y.zero, y.low, y.high)
    table, line = made.constant(f"{node.name}.table", codes, y.dtype), dict[str, Any](bits=bits) if bits else dict[str, Any]()
    made.emit("table", [site], node.name, y.dtype, (table,), first=low, **line)


def _prelu(made: Lowering, node: Node) -> None:
    x, y = made.affine(node.inputs[0]), made.affine(node.name)
    slope = np.array([node.attrs["slope"]]) if node.op == "leaky_relu" else made.number(node.inputs[1]).reshape(-1)
    if slope.size == 1 and x.bits <= 8:
        return _table(made, node)
    multiplier, shift = quantize_multiplier(np.stack([np.ones_like(slope), slope]) * x.scale / y.scale)
    parts = [made.constant(f"{node.name}.multiplier", multiplier), made.constant(f"{node.name}.shift", shift)]
    made.emit("prelu", [node.inputs[0]], node.name, y.dtype, parts, x_zero=x.zero, **made.rescaled(y))


# reductions


def _sum(made: Lowering, node: Node) -> None:
    axes = list(node.attrs["axes"])
    count = size(made.source, node.inputs[0], axes) if node.op == "mean" else 1
    _rescaled(made, node, "sum", _share(count), axes=axes, keepdim=node.attrs.get("keepdim", False))


def _share(count: int) -> float:
    """1 / count as a float32, which is how runtimes that compute a mean as a weighted sum hold it."""
    return float(np.float32(1 / count))


def _avg_pool(made: Lowering, node: Node) -> None:
    x, y, a = made.affine(node.inputs[0]), made.affine(node.name), node.attrs
    place: dict[str, Any] = {key: list(a[key]) for key in ("kernel", "stride", "padding")}
    ragged = any(a["padding"]) and not a.get("count_pad")
    if x == y and (ragged or not any(a["padding"])):
        low, high = y.clamp(a.get("act"))
        return made.emit("avg_pool", [node.inputs[0]], node.name, y.dtype, **place, low=low, high=high)
    if ragged:
        raise PlanError("its padding is left out of the mean while its parameters change, so its factor would vary by place")
    _rescaled(made, node, "sum_pool", _share(math.prod(a["kernel"])), act=a.get("act"), **place)


def _max_pool(made: Lowering, node: Node) -> None:
    y = made.affine(node.name)
    low, high = y.clamp(node.attrs.get("act"))
    place: dict[str, Any] = {key: list(node.attrs[key]) for key in ("kernel", "stride", "padding")}
    made.emit("max_pool", [node.inputs[0]], node.name, y.dtype, **place, low=low, high=high)


def _amax(made: Lowering, node: Node) -> None:
    made.emit("amax", list(node.inputs), node.name, made.affine(node.name).dtype, axes=list(node.attrs["axes"]),
              keepdim=node.attrs.get("keepdim", False))  # fmt: skip


def _argmax(made: Lowering, node: Node) -> None:
    made.emit("argmax", list(node.inputs), node.name, "int32", axis=node.attrs["axis"], keepdim=node.attrs.get("keepdim", False))


# exponentials and norms


def _softmax(made: Lowering, node: Node) -> None:
    x, y = made.affine(node.inputs[0]), made.affine(node.name)
    mantissa, exponent = math.frexp(y.scale)
    if mantissa != 0.5 or not 0 < 1 - exponent <= 16:
        raise PlanError(f"its result is in units of {y.scale:.6g}; an integer softmax gives a power of two such as 1/256")
    if x.bits <= 8:
        table, steps = made.constant(f"{node.name}.table", exp_table(x.scale, x.high - x.low + 1)), dict[str, Any]()
    else:
        units = x.scale * 2**UNIT_BITS
        multiplier, shift = (int(part) for part in quantize_multiplier(units))
        table, steps = _steps(made, node), {"reach": _reach(units), "multiplier": multiplier, "shift": shift}
    made.emit("softmax", [node.inputs[0]], node.name, y.dtype, (table,), axis=node.attrs.get("axis", -1), bits=1 - exponent,
              **steps, **made.rescaled(y))  # fmt: skip


def _steps(made: Lowering, node: Node) -> str:
    """The table of exp by steps, which all that need it share."""
    made.steps = made.steps or made.constant(f"{node.name}.steps", step_table())
    return made.steps


def _reach(units: float) -> int:
    """The largest difference, of which one is ``units`` steps of 2^-16, that `exp_steps` takes."""
    return min(math.floor(((1 << 3 * STEP_BITS) - (1 << 8)) / units), INT32[1])  # a 15-bit multiplier may round up by 2^-14


#: Bits of an attention's probabilities, which then fit int16.
PROBABILITY = 15


def _attention(made: Lowering, node: Node) -> None:
    (q, k, v), y, scale = map(made.affine, node.inputs[:3]), made.affine(node.name), node.attrs["scale"]
    if scale <= 0:
        raise PlanError(f"its scores are scaled by {scale:g}")
    constants = [_steps(made, node)]
    if len(node.inputs) > 3 and node.inputs[3]:
        constants.append(made.constant(f"{node.name}.keep", _kept(made, node.inputs[3]), "uint8"))
    units = q.scale * k.scale * scale * 2**UNIT_BITS
    wide = max(q.bits, k.bits, v.bits) > 8
    multiplier, shift = (quantize_wide if wide else quantize_multiplier)([units, v.scale / 2**PROBABILITY / y.scale])
    made.emit("attention", list(node.inputs[:3]), node.name, y.dtype, constants, causal=node.attrs.get("causal", False),
              q_zero=q.zero, k_zero=k.zero, v_zero=v.zero, reach=_reach(units), bits=PROBABILITY,
              multiplier=multiplier.tolist(), shift=shift.tolist(), **made.rescaled(y, wide=wide))  # fmt: skip


def _kept(made: Lowering, name: str) -> NDArray[np.int64]:
    """A constant mask as ones and zeros: booleans, or 0 where a key is seen and -10,000 or less where it is not."""
    if name not in made.source.constants:
        raise PlanError(f"its mask {name!r} is computed; masks are constants yet")
    mask = made.source.constants[name] if name not in made.q.rest else made.q.rest[name].detach()
    keep = mask if mask.dtype == torch.bool else mask == 0
    if mask.is_floating_point() and bool((~keep & (mask > -1e4)).any()):
        raise PlanError(f"its mask {name!r} adds numbers to scores; masks hide a key or do not")
    if not keep.any(-1).all():
        raise PlanError(f"its mask {name!r} hides every key of a query")
    return keep.numpy().astype(np.int64)


def _norm(made: Lowering, node: Node) -> None:
    """Numbers over their deviation and weights share the bits of int32, so that both cost the result as little; results of more
    than 8 bits are summed in int64."""
    x, y = made.affine(node.inputs[0]), made.affine(node.name)
    n = size(made.source, node.inputs[0], [-1])
    weight, bias = (made.number(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] else np.full(n, 2.0 - i) for i in (1, 2))
    peak, wide = float(np.abs(weight).max()) or y.scale, y.bits > 8
    spare = 30 - math.ceil(math.log2(n) / 2)
    half = (y.high - y.low) / 2 * y.scale / peak or 1.0  # the largest normalised number that a result holds
    bits = min(spare - 1, 20) if wide else min(max(round((spare - math.log2(half)) / 2), 8), spare - 8)
    for w_bits in range(15 if wide else min(15, spare - bits), 6, -1):
        unit = peak / ((1 << w_bits) - 1)
        w, b = np.rint(weight / unit), np.rint(np.clip(bias / unit * 2.0**bits, -(2.0**46), 2.0**46))
        if wide or (norm_reach(n, bits) * np.abs(w) + np.abs(b)).max() <= INT32[1]:
            break
    multiplier, shift = (int(part) for part in (quantize_wide if wide else quantize_multiplier)(unit / 2.0**bits / y.scale))
    parts = [made.constant(f"{node.name}.weight", w, "int16"), made.constant(f"{node.name}.bias", b, "int64" if wide else "int32")]
    made.emit("norm", [node.inputs[0]], node.name, y.dtype, parts, centred=node.op == "layer_norm",
              eps=round(node.attrs["eps"] * (n / x.scale) ** 2), bits=bits, x_zero=x.zero, multiplier=multiplier, shift=shift,
              **made.rescaled(y, wide=wide))  # fmt: skip


# moves


def _move(made: Lowering, node: Node) -> None:
    made.emit(node.op, list(node.inputs), node.name, made.affine(node.name).dtype, **node.attrs)


def _pad(made: Lowering, node: Node) -> None:
    at, value = made.affine(node.name), node.attrs.get("value", 0.0)
    if at.site >= 0 and value:
        raise PlanError(f"it pads with {value:g}, and its range runs; {STILL}")
    if node.attrs.get("mode", "constant") != "constant":
        raise PlanError(f"padding by {node.attrs['mode']} has no integer definition yet")
    made.emit("pad", list(node.inputs), node.name, at.dtype, padding=list(node.attrs["padding"]),
              code=at.code(value))  # fmt: skip


def _split(made: Lowering, node: Node) -> None:
    ends = np.cumsum(node.attrs["sizes"]).tolist()
    for name, start, stop in zip(node.outputs, [0, *ends], ends):
        place = {"axis": node.attrs["axis"], "start": start, "stop": stop, "step": 1}
        made.emit("slice", list(node.inputs), name, made.affine(name).dtype, **place)


def _expand_batch(made: Lowering, node: Node) -> None:
    made.emit("expand_batch", list(node.inputs), node.name, made.affine(node.name).dtype)


def _gather(made: Lowering, node: Node) -> None:
    index = node.inputs[1]
    if index in made.source.constants:
        made.constant(index, made.source.constants[index].numpy())
    made.emit("gather", list(node.inputs), node.name, made.affine(node.name).dtype, axis=node.attrs["axis"])


#: Bits of the weights of neighbours when an image is resized, as in TFLite.
NEIGHBOUR = 10


def _resize(made: Lowering, node: Node) -> None:
    a, bits = node.attrs, 0 if node.attrs["mode"] == "nearest" else NEIGHBOUR
    if a["mode"] not in ("nearest", "bilinear"):
        raise PlanError(f"resizing by {a['mode']} has no integer definition yet")
    old = [size(made.source, node.inputs[0], [axis]) for axis in (-2, -1)]
    picks = [_neighbours(m, n, bits, a.get("align_corners", False)) for m, n in zip(old, a["size"], strict=True)]
    parts = [made.constant(f"{node.name}.{key}", pick) for key, pick in zip(("rows", "columns"), picks)]
    _rescaled(made, node, "resize", 4.0**-bits, constants=parts, bits=bits)


def _neighbours(old: int, new: int, bits: int, corners: bool) -> NDArray[np.int64]:
    """For each of ``new`` places the index of one of ``old`` and the weight of its next neighbour in units of 2^-bits (new, 2)."""
    at = np.arange(new)
    if not bits:
        near = OPS["resize"](torch.arange(float(old)).reshape(1, 1, 1, -1), size=[1, new], mode="nearest").long().numpy()
        return np.stack([near.reshape(-1), 0 * at], 1)
    place = at * (old - 1) / max(new - 1, 1) if corners else np.maximum((at + 0.5) * old / new - 0.5, 0)
    units = np.rint(np.minimum(place, old - 1) * 2**bits).astype(np.int64)
    return np.stack([units >> bits, units & ((1 << bits) - 1)], 1)


def _identity(made: Lowering, node: Node) -> None:
    made.renamed[node.name] = made.operand(node.inputs[0])


#: Operation of the real graph -> how it is lowered. `input` stands for the graph's own.
RULES: Mapping[str, Callable[[Lowering, Node], None]] = {
    "input": _input, "identity": _identity,
    "conv": lower_weighted, "conv_transpose": lower_weighted, "linear": lower_weighted, "embedding": lower_embedding,
    "matmul": lower_matmul,
    "add": _add, "sub": _add, "mul": _mul, "relu": _relu, "relu6": _relu, "cast": _cast,
    "prelu": _prelu, "leaky_relu": _prelu,
    "mean": _sum, "sum": _sum, "avg_pool": _avg_pool, "max_pool": _max_pool, "amax": _amax, "argmax": _argmax,
    "softmax": _softmax, "attention": _attention, "layer_norm": _norm, "rms_norm": _norm,
    "reshape": _move, "transpose": _move, "slice": _move, "concat": _move, "depth_to_space": _move, "expand": _move,
    "pad": _pad, "split": _split, "expand_batch": _expand_batch, "gather": _gather, "resize": _resize,
} | dict.fromkeys([
    "gelu", "silu", "sigmoid", "tanh", "exp", "log", "erf", "sqrt", "rsqrt", "abs", "neg", "sin", "cos", "elu", "hardswish",
    "hardsigmoid", "hardtanh", "div", "pow", "maximum", "minimum",
], _table)  # fmt: skip
