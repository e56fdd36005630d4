"""What each integer operation becomes in C: a kernel, the numbers of its struct, which operand it may write over, its scratch.

One function per operation; an operation without one is refused by name. Not here: offsets (`arena`), C text (`emit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import PlanError
from ...graph import Graph, Node
from ...integer.dialect import Ints
from ...integer.ops import extremes, levels, numbers
from ...integer.running import widest
from .layout import Layout, Place, Step

#: Axes that the loops of a kernel over any order run over.
LOOPS = 4

INT32 = 2**31 - 1

#: Taps that the depthwise kernel has pointers for.
TAPS = 49


@dataclass(frozen=True)
class Kernel:
    """One call of ``file``'s function on ``operands`` (values, the result last), under the types that ``kinds`` gives its letters.

    ``fields`` are the members of its struct: numbers, lists, arrays (constants of their own) or more fields; a kernel with
    ``scalars`` takes them in place of a struct. ``over`` is the operand that the result may be written over, ``shared`` and
    ``apart`` the scratch in bytes where it is and is not. ``skip`` are codes left out at the start of each operand, ``more`` calls
    that follow, ``before`` those that come before anything else in a run; a ``live`` struct is in RAM.
    """

    file: str
    kinds: dict[str, str]
    operands: tuple[str, ...]
    fields: dict[str, Any]
    over: str | None = None
    shared: int = 0
    apart: int = 0
    skip: tuple[int, ...] = ()
    more: tuple[Kernel, ...] = ()
    scalars: tuple[int, ...] | None = None
    before: tuple[Kernel, ...] = ()
    live: bool = False


@dataclass(frozen=True)
class Ram:
    """In place of constants of that many numbers: as many that are written before each run."""

    ctype: str
    count: int


@dataclass(frozen=True)
class Making:
    """What the functions below look things up in."""

    graph: Graph
    layout: Layout

    def place(self, name: str) -> Place:
        return self.layout.places[name]

    def kind(self, name: str) -> str:
        """The letters of a value's C type."""
        low, high = extremes(self.place(name).dtype)
        if self.place(name).dtype == "int32" or name in self.graph.inputs:  # token ids are int32 here
            return "s32"
        if low < -(2**15) or high >= 2**15 or (high >= 256 and low == 0):
            raise PlanError(f"{name!r} is {self.place(name).dtype}; C kernels take codes of up to 16 signed or 8 unsigned bits")
        return "s16" if high > 255 else "s8" if low < 0 else "u8"

    def dtype(self, name: str) -> np.dtype[Any]:
        """NumPy's type for the codes of a value."""
        return np.dtype({"s8": np.int8, "u8": np.uint8, "s16": np.int16, "s32": np.int32}[self.kind(name)])

    def width(self, name: str) -> int:
        """Bytes of one code."""
        return self.dtype(name).itemsize


def kernel(made: Making, step: Step) -> Kernel:
    """The call for ``step``; `PlanError` for an operation that has none."""
    if step.node is None:
        return copy(made, step.inputs[0], step.output, made.place(step.inputs[0]).order)
    if step.node.op not in KERNELS:
        raise PlanError("there is no C kernel for it yet")
    return KERNELS[step.node.op](made, step.node, step)


def rule(node: Node) -> str:
    """The letters of a node's rounding; wide sums are int64 and have one of their own."""
    return "wide" if node.attrs.get("wide") else str(node.attrs["rounding"])


def sums(node: Node) -> type[np.signedinteger[Any]]:
    """The type of a node's sums, and of its bias."""
    return np.int64 if node.attrs.get("wide") else np.int32


# -- weighted ---------------------------------------------------------------------------------------------------------


def product(made: Making, node: Node, weight: Ints) -> tuple[str, dict[str, Any]]:
    """Letters of the weights (rows, n), and the members they give; the zero point of x moves into the bias."""
    table = levels_of(made, node.inputs[5:])
    bias, multiplier, shift = (numbers(made.graph, name) for name in node.inputs[2:5])
    if table is None:
        letters, packed = planes(weight, made.graph.values[node.inputs[1]].dtype)
        extra: dict[str, Any] = {}
    else:
        letters, packed, extra = "c4", nibbles(weight), tables(table)
        weight = levels(weight, table)
    real, bias = bias, bias - node.attrs["x_zero"] * weight.sum(1)
    low, high = extremes(made.place(node.inputs[0]).dtype)
    scaled = max(-low, high) * np.abs(weight).sum(1) * {"s4": 16, "s2": 64}.get(letters, 1)
    scaled += np.abs(real) << widest(node)[1] if "runs" in node.attrs else 0
    if not node.attrs.get("wide") and max(np.abs(bias).max(initial=0), (np.abs(bias) + scaled).max(initial=0)) > INT32:
        raise PlanError("its sums, with the zero point of its input in the bias, could leave int32; split the layer")
    return letters, {
        "weight": packed,
        "bias": bias.astype(sums(node)),
        "multiplier": multiplier.astype(np.int32),
        "shift": shift.astype(np.int8),
        **extra,
        "stride": packed.shape[1],
        "depth": weight.shape[1],
        "span": span(weight.shape[1]),
        "columns": 2 if table is None or node.attrs.get("wide") else 4,
        "to": to(node),
    }


def levels_of(made: Making, names: Sequence[str]) -> Ints | None:
    """The levels that weights are indices into, (1 or rows, up to 16), of the constant named last; None where there is none."""
    if not names:
        return None
    table = numbers(made.graph, names[-1])
    if table.shape[1] > 16:
        raise PlanError(f"its weights are indices into {table.shape[1]} levels; C kernels take up to 16")
    return np.pad(table, [(0, 0), (0, 16 - table.shape[1])])


def nibbles(rows: Ints) -> Ints:
    """Indices (rows, n) two in a byte, as `dot_c4` reads them: of 4, the first and third, then the second and fourth."""
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[1] % 4)]).reshape(len(rows), -1, 4)
    return (rows[..., :2] | rows[..., 2:] << 4).reshape(len(rows), -1).astype(np.uint8).view(np.int8)


def tables(table: Ints) -> dict[str, Any]:
    """Members for levels (1 or rows, 16)."""
    return {"levels": table.astype(np.int16), "level_step": 16 if len(table) > 1 else 0}


def planes(rows: Ints, dtype: str) -> tuple[str, Ints]:
    """Weights (rows, n) as bytes: int8 as they are; 4 bytes hold 8 of up to 4 bits or 16 of up to 2, plane by plane.

    >>> planes(np.array([[1, 2, 3, 4, 5, 6, 7, -8]]), "int4")[1].tolist()
    [[81, 98, 115, -124]]
    """
    low, high = extremes(dtype)
    bits = next(b for b in (2, 4, 8) if (high - low).bit_length() <= b)
    per = 8 // bits
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[1] % (4 * per))]).reshape(len(rows), -1, per, 4)
    packed = ((rows & (2**bits - 1)) << (np.arange(per) * bits)[:, None]).sum(2).reshape(len(rows), -1)
    return f"s{bits}", packed.astype(np.uint8).view(np.int8)


def to(node: Node) -> dict[str, int]:
    """Where results go: the code of 0, and the bounds as seen from it."""
    zero = int(node.attrs["y_zero"])
    return {"zero": zero, "floor": node.attrs["low"] - zero, "ceiling": node.attrs["high"] - zero}


def span(depth: int) -> int:
    """Codes from one column in the scratch to the next: as many as the weights of any width take in steps of 4 bytes."""
    return -(-depth // 16) * 16


def beside(members: dict[str, Any]) -> int:
    """Bytes of scratch for the columns of a product, of 16 bits as the DSP kernels want them."""
    return 2 * int(members["columns"] * members["span"])


def linear(made: Making, node: Node, step: Step) -> Kernel:
    """Every row of x by the weights."""
    weight = numbers(made.graph, node.inputs[1])
    rows = made.place(step.inputs[0]).count // weight.shape[1]
    return rowwise(made, node, step, weight, rows)


def rowwise(made: Making, node: Node, step: Step, weight: Ints, rows: int) -> Kernel:
    """Rows of codes by weights (outputs, depth): linear layers, and convolutions of one tap."""
    letters, members = product(made, node, weight)
    (x,), y = step.inputs, step.output
    outputs, depth = weight.shape
    fits = made.kind(x) == made.kind(y) and outputs <= depth
    fields = {"product": members, "rows": rows, "outputs": outputs}
    kinds = {"X": made.kind(x), "Y": made.kind(y), "R": rule(node), "W": letters}
    scratch = beside(members)
    return Kernel("linear", kinds, (x, y), fields, x if fits else None, scratch, scratch)


def conv(made: Making, node: Node, step: Step) -> Kernel:
    """A convolution: of one tap, of channels that stand alone, or any other."""
    a, weight = node.attrs, numbers(made.graph, node.inputs[1])
    (x,), y = step.inputs, step.output
    view = window(made, x, y, a, weight.shape[2:])
    weight = weight if weight.ndim == 4 else weight[..., None]  # one axis of places: rows of one place each
    outputs, channels, *_ = weight.shape
    kinds = {"X": made.kind(x), "Y": made.kind(y), "R": rule(node)}
    over = x if view["kept"] else None
    ring = ring_bytes(made, view, x)
    pointwise = weight.shape[2:] == (1, 1) and view["stride_h"] == view["stride_w"] == 1
    if pointwise and a["groups"] == 1 and not any(a["padding"]):
        return rowwise(made, node, step, weight[:, :, 0, 0], view["height"] * view["width"])
    if channels == 1 and a["groups"] == view["channels"] == outputs > 1 and math.prod(weight.shape[2:]) <= TAPS:
        _, members = product(made, node, weight.reshape(outputs, -1))
        members = {key: members[key] for key in ("bias", "multiplier", "shift")}
        taps = stood_for(made, node).reshape(outputs, -1).T
        wide = np.abs(taps).max(initial=0) > 127  # levels of a table; smaller weights take a byte each here
        members["weight"] = taps.astype(np.int16 if wide else np.int8)
        zeros = np.full(view["channels"], a["x_zero"], made.dtype(x))
        kinds |= {"V": "s16" if wide else "s8"}
        return Kernel("depthwise", kinds, (x, y), {**members, "window": view, "zeros": zeros, "to": to(node)}, over, ring)
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, -1)
    letters, members = product(made, node, rows)
    before = beside(members)
    fields = {
        "product": members,
        "window": view,
        "groups": a["groups"],
        "outputs": outputs,
        "zeros": np.full(view["channels"] // a["groups"], a["x_zero"], made.dtype(x)),
        "before": before,
    }
    return Kernel("conv", kinds | {"W": letters}, (x, y), fields, over, shared=before + ring, apart=before)


def embedding(made: Making, node: Node, step: Step) -> Kernel:
    """Rows of weights by ids, unpacked as they are read."""
    (ids,), y = step.inputs, step.output
    weight, multiplier, shift = (numbers(made.graph, name) for name in node.inputs[1:4])
    table = levels_of(made, node.inputs[4:])
    if table is None:
        letters, packed = planes(weight, made.graph.values[node.inputs[1]].dtype)
        extra: dict[str, Any] = {}
    else:
        letters, packed, extra = "c4", nibbles(weight), tables(table)
    fields = {"weight": packed, "multiplier": multiplier.reshape(-1).astype(np.int32), "shift": shift.reshape(-1).astype(np.int8)}
    fields |= {"count": made.place(ids).count, "vocabulary": len(weight), "depth": weight.shape[1], "stride": packed.shape[1]}
    kinds = {"X": made.kind(ids), "Y": made.kind(y), "R": rule(node), "W": letters}
    return Kernel("embedding", kinds, (ids, y), fields | extra | {"each": int(multiplier.size > 1), "to": to(node)})


def conv_transpose(made: Making, node: Node, step: Step) -> Kernel:
    """A transposed convolution, as the codes that reach each place."""
    a, weight = node.attrs, numbers(made.graph, node.inputs[1])
    (x,), y = step.inputs, step.output
    kernel, flat = list(weight.shape[2:]), weight.ndim == 3
    weight = weight if weight.ndim == 4 else weight[..., None]
    outputs = len(weight)
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, -1)
    letters, members = product(made, node, rows)
    _, channels, *sizes = made.place(x).sizes
    _, _, *out = made.place(y).sizes
    fields: dict[str, Any] = {"product": members}
    fields["zeros"] = np.full(channels // a["groups"], a["x_zero"], made.dtype(x))
    pairs = {"": sizes, "out_": out, "kernel_": kernel, "stride_": a["stride"], "dilation_": a["dilation"], "pad_": a["padding"]}
    for name, both in pairs.items():
        one, two = (*both, 0 if name == "pad_" else 1) if flat else both
        ends = {"pad_": ("top", "left"), "": ("height", "width"), "out_": ("out_height", "out_width")}
        first, second = ends.get(name, (f"{name}h", f"{name}w"))
        fields |= {first: one, second: two}
    fields |= {"channels": channels, "groups": a["groups"], "outputs": outputs}
    kinds = {"X": made.kind(x), "Y": made.kind(y), "R": rule(node), "W": letters}
    scratch = beside(members)
    return Kernel("conv_transpose", kinds, (x, y), fields, None, scratch, scratch)


def stood_for(made: Making, node: Node) -> Ints:
    """The weights of a node as numbers, whether they are stored so or as indices."""
    return levels(numbers(made.graph, node.inputs[1]), levels_of(made, node.inputs[5:]))


# -- windows ----------------------------------------------------------------------------------------------------------


def window(made: Making, x: str, y: str, a: dict[str, Any], kernel: Sequence[int]) -> dict[str, int]:
    """The members of ``struct window``; ``kept`` rows make writing over x legal, 0 where it is not.

    Row r of the result covers at most the bytes of the input rows before (r + 1) * stride, so keeping those that are still read,
    from r * stride - top on, is enough.
    """
    kernel, stride, dilation = list(kernel), list(a["stride"]), list(a.get("dilation", [1] * len(kernel)))
    pads = a["padding"]
    _, channels, *sizes = made.place(x).sizes
    _, outputs, *out = made.place(y).sizes
    left, top = (0, pads[0]) if len(sizes) == 1 else (pads[0], pads[2])
    if len(sizes) == 1:
        sizes, out, kernel, stride, dilation = [*sizes, 1], [*out, 1], [*kernel, 1], [*stride, 1], [*dilation, 1]
    legal = made.kind(x) == made.kind(y) and out[1] * outputs <= stride[0] * sizes[1] * channels
    names = ("kernel", "stride", "dilation")
    pairs = {f"{n}_{d}": v for n, both in zip(names, (kernel, stride, dilation)) for d, v in zip("hw", both)}
    return {
        "height": sizes[0], "width": sizes[1], "channels": channels, "out_height": out[0], "out_width": out[1], **pairs,
        "top": top, "left": left, "kept": max(top, 0) + stride[0] if legal else 0,
    }  # fmt: skip


def ring_bytes(made: Making, view: dict[str, int], x: str) -> int:
    """Bytes of the rows that are kept while x is written over."""
    return view["kept"] * view["width"] * view["channels"] * made.width(x)


def pool(made: Making, node: Node, step: Step) -> Kernel:
    """Pools of all three kinds."""
    a, (x,), y = node.attrs, step.inputs, step.output
    view = window(made, x, y, a, a["kernel"])
    kinds = {"X": made.kind(x), "Y": made.kind(y)}
    fields: dict[str, Any] = {"window": view}
    if node.op == "sum_pool":
        kinds["R"] = rule(node)
        fields |= {"x_zero": a["x_zero"], "multiplier": a["multiplier"], "shift": a["shift"], "to": to(node)}
    else:
        fields |= {"low": a["low"], "high": a["high"]}
    return Kernel(node.op, kinds, (x, y), fields, x if view["kept"] else None, ring_bytes(made, view, x))


# -- over any order ---------------------------------------------------------------------------------------------------


def loops(sizes: Sequence[int], *steps: Sequence[int], most: int = LOOPS) -> list[list[int]]:
    """Nested loops over ``sizes`` (slowest first) that walk several operands at once, joined where one loop does for two.

    >>> loops([2, 3, 4], [12, 4, 1], [0, 4, 1])
    [[1, 1, 2, 12], [0, 0, 12, 1], [0, 0, 0, 1]]
    """
    rows: list[list[int]] = []
    for n, *at in zip(sizes, *steps):
        if n == 1:
            continue
        if rows and all(outer == n * inner for outer, inner in zip(rows[-1][1:], at)):
            rows[-1] = [rows[-1][0] * n, *at]
        else:
            rows.append([n, *at])
    if len(rows) > most:
        raise PlanError(f"it runs over {len(rows)} axes that do not join; C kernels have {most} loops")
    rows = [[1] + [0] * len(steps)] * (most - len(rows)) + rows
    return [list(column) for column in zip(*rows)]


def seen_from(made: Making, name: str, like: Place) -> list[int]:
    """Steps of an operand along the axes of a result that it is broadcast to."""
    place = made.place(name)
    missing = len(like.sizes) - len(place.sizes)
    return [0] * missing + [step if size > 1 else 0 for step, size in zip(place.steps, place.sizes)]


def same(made: Making, name: str, y: str) -> bool:
    """Whether code i of an operand is of the place of code i of the result, and of one type."""
    x, out = made.place(name), made.place(y)
    flows = x.root not in made.graph.constants
    return flows and x.sizes == out.sizes and x.lies(out.order) and made.kind(name) == made.kind(y)


def pairwise(made: Making, node: Node, step: Step) -> Kernel:
    """Operations on two operands that broadcast."""
    a, y = node.attrs, step.output
    out = made.place(y)
    one, two = ([seen_from(made, name, out)[axis] for axis in out.order] for name in step.inputs)
    n, a_step, b_step = loops([out.sizes[axis] for axis in out.order], one, two)
    kinds = {letter: made.kind(name) for letter, name in zip("XZY", (*step.inputs, y))} | {"R": rule(node)}
    fields = {"n": n, "a_step": a_step, "b_step": b_step, "to": to(node)}
    fields |= {key: a[key] for key in ("a_zero", "b_zero", "left", "multiplier", "shift") if key in a}
    roots = [made.place(name).root for name in step.inputs]
    over = [x for x in step.inputs if same(made, x, y) and (roots[0] != roots[1] or all(same(made, o, y) for o in step.inputs))]
    return Kernel(node.op, kinds, (*step.inputs, y), fields, over[0] if over else None)


def rescale(made: Making, node: Node, step: Step) -> Kernel:
    """Other units."""
    (x,), y = step.inputs, step.output
    fields = {"count": made.place(y).count, **{k: node.attrs[k] for k in ("x_zero", "multiplier", "shift")}, "to": to(node)}
    kinds = {"X": made.kind(x), "Y": made.kind(y), "R": rule(node)}
    return Kernel("rescale", kinds, (x, y), fields, x if same(made, x, y) else None)


def sum_(made: Making, node: Node, step: Step) -> Kernel:
    """Sums over axes, in any order of memory."""
    (x,), y, a = step.inputs, step.output, node.attrs
    place = made.place(x)
    gone = [axis % len(place.sizes) for axis in a["axes"]]
    kept = [axis for axis in place.order if axis not in gone]
    n, steps = loops([place.sizes[axis] for axis in kept], [place.steps[axis] for axis in kept])
    over, strides = loops(*([part[axis] for axis in place.order if axis in gone] for part in (place.sizes, place.steps)))
    fields = {"n": n, "step": steps, "over": over, "stride": strides, "to": to(node)}
    fields |= {key: a[key] for key in ("x_zero", "multiplier", "shift")}
    return Kernel("sum", {"X": made.kind(x), "Y": made.kind(y), "R": rule(node)}, (x, y), fields)


def amax(made: Making, node: Node, step: Step) -> Kernel:
    """Largest codes over axes, in any order of memory."""
    (x,), y = step.inputs, step.output
    place = made.place(x)
    gone = [axis % len(place.sizes) for axis in node.attrs["axes"]]
    kept = [axis for axis in place.order if axis not in gone]
    n, steps = loops([place.sizes[axis] for axis in kept], [place.steps[axis] for axis in kept])
    over, strides = loops(*([part[axis] for axis in place.order if axis in gone] for part in (place.sizes, place.steps)))
    return Kernel("amax", {"X": made.kind(x)}, (x, y), {"n": n, "step": steps, "over": over, "stride": strides})


def along(place: Place, axis: int) -> dict[str, int]:
    """How codes along one axis lie: count of them step apart, in outer blocks."""
    count, step = place.sizes[axis], place.steps[axis] if place.sizes[axis] > 1 else 1
    return {"outer": place.count // (count * step), "count": count, "step": step}


def argmax(made: Making, node: Node, step: Step) -> Kernel:
    """The place of the largest code along an axis."""
    (x,), y = step.inputs, step.output
    place = made.place(x)
    fields = along(place, node.attrs["axis"] % len(place.sizes))
    return Kernel("argmax", {"X": made.kind(x), "Y": made.kind(y)}, (x, y), fields)


def gather(made: Making, node: Node, step: Step) -> Kernel:
    """Slices by a constant index."""
    x, y = step.inputs[0], step.output
    place = made.place(x)
    if node.inputs[1] not in made.graph.constants:
        raise PlanError("its index is computed; C kernels take constants")
    index = numbers(made.graph, node.inputs[1])
    axis = node.attrs["axis"] % len(place.sizes)
    if index.ndim != 1 or node.inputs[0] in made.graph.constants:
        raise PlanError(f"its index has {index.ndim} axes; C kernels take one, into a value")
    fields = along(place, axis)
    fields["inner"] = fields.pop("step")
    index = np.where(index < 0, index + place.sizes[axis], index)
    return Kernel("gather", {"X": made.kind(x)}, (x, y), {"index": index.astype(np.int32), **fields, "picked": len(index)})


def resize(made: Making, node: Node, step: Step) -> Kernel:
    """Resizing by tables of rows and columns."""
    (x,), y, a = step.inputs, step.output, node.attrs
    rows, columns = (numbers(made.graph, name).astype(np.int32) for name in node.inputs[1:3])
    _, channels, height, width = made.place(x).sizes
    fields = {"rows": rows, "columns": columns, "height": height, "width": width, "channels": channels}
    fields |= {"out_height": len(rows), "out_width": len(columns), "to": to(node)}
    fields |= {key: a[key] for key in ("bits", "x_zero", "multiplier", "shift")}
    return Kernel("resize", {"X": made.kind(x), "Y": made.kind(y), "R": rule(node)}, (x, y), fields)


def softmax(made: Making, node: Node, step: Step) -> Kernel:
    """Softmax along an axis, wherever it lies."""
    (x,), y, a = step.inputs, step.output, node.attrs
    place = made.place(x)
    axis = a["axis"] % len(place.sizes)
    table = numbers(made.graph, node.inputs[1]).astype(np.int32)
    fields = {"table": table, **along(place, axis), "bits": a["bits"], "to": to(node)}
    steps = {key: a[key] for key in ("multiplier", "shift") if "reach" in a}
    steps |= {"reach": reach(a["reach"], a["multiplier"], a["shift"])} if steps else {}
    kinds = {"X": made.kind(x), "Y": made.kind(y), "R": rule(node)}
    return Kernel("softmax_steps" if steps else "softmax", kinds, (x, y), fields | steps, x if same(made, x, y) else None)


def table(made: Making, node: Node, step: Step) -> Kernel:
    """A look-up of every code, or of 16 bits lines between entries."""
    (x,), y, bits = step.inputs, step.output, node.attrs.get("bits", 0)
    if bits > 14:
        raise PlanError(f"its table has an entry for every 2^{bits} codes; C kernels draw lines over up to 2^14")
    entries = numbers(made.graph, node.inputs[1]).astype(made.dtype(y))
    kinds = {"X": made.kind(x), "Y": made.kind(y)}
    fields = {"table": entries, "count": made.place(y).count, "first": node.attrs["first"]}
    if bits:
        return Kernel("table_lines", kinds, (x, y), fields | {"bits": bits}, x if same(made, x, y) else None)
    return Kernel("table", kinds, (x, y), fields, x if same(made, x, y) else None)


def prelu(made: Making, node: Node, step: Step) -> Kernel:
    """Factors by channel and sign."""
    (x,), y, a = step.inputs, step.output, node.attrs
    place = made.place(x)
    multiplier, shift = (numbers(made.graph, name) for name in node.inputs[1:3])
    count, inner = multiplier.shape[1], place.steps[1] if multiplier.shape[1] > 1 else place.count
    fields = {"multiplier": multiplier.astype(np.int32), "shift": shift.astype(np.int8), "outer": place.count // (count * inner)}
    fields |= {"count": count, "step": inner, "x_zero": a["x_zero"], "to": to(node)}
    kinds = {"X": made.kind(x), "Y": made.kind(y), "R": rule(node)}
    return Kernel("prelu", kinds, (x, y), fields, x if same(made, x, y) else None)


def norm(made: Making, node: Node, step: Step) -> Kernel:
    """Layer norm and RMS norm of rows."""
    (x,), y, a = step.inputs, step.output, node.attrs
    weight, bias = (numbers(made.graph, name).reshape(-1) for name in node.inputs[1:3])
    count = made.place(x).sizes[-1]
    fields = {"weight": weight.astype(np.int32), "bias": bias.astype(sums(node)), "eps": a["eps"]}
    fields |= {"rows": made.place(x).count // count, "count": count}
    fields |= {key: int(a[key]) for key in ("centred", "bits", "x_zero", "multiplier", "shift")} | {"to": to(node)}
    kinds = {"X": made.kind(x), "Y": made.kind(y), "R": rule(node)}
    return Kernel("norm", kinds, (x, y), fields, x if same(made, x, y) else None)


# -- products of activations ------------------------------------------------------------------------------------------


def heads(made: Making, *names: str) -> tuple[list[list[int]], list[dict[str, int]]]:
    """Joined loops over the leading axes (sizes, then a step for each value), and each value's steps by row and column."""
    steps = [list(made.place(name).steps) for name in names]
    rank = len(made.place(names[-1]).sizes) - 2
    like = made.place(names[-1])
    lead = []
    for name in names:
        place = made.place(name)
        own = [step if size > 1 else 0 for step, size in zip(place.steps, place.sizes)][:-2]
        lead.append([0] * (rank - len(own)) + own)
    return loops(like.sizes[:-2], *lead, most=2), [{"row": s[-2], "column": s[-1]} for s in steps]


def matmul(made: Making, node: Node, step: Step) -> Kernel:
    """Products of two values, leading axes broadcast."""
    a, (one, two), y = node.attrs, step.inputs, step.output
    (n, *lead), steps = heads(made, one, two, y)
    if a["transpose_b"]:
        steps[1] = {"row": steps[1]["column"], "column": steps[1]["row"]}
    *_, rows, depth = made.place(one).sizes
    fields: dict[str, Any] = {"n": n, "rows": rows, "depth": depth, "columns": made.place(y).sizes[-1], "to": to(node)}
    for letter, head, step_ in zip("aby", lead, steps):
        fields |= {f"{letter}_head": head, f"{letter}_row": step_["row"], f"{letter}_column": step_["column"]}
    fields |= {key: a[key] for key in ("a_zero", "b_zero", "multiplier", "shift")}
    kinds = {letter: made.kind(name) for letter, name in zip("XZY", (one, two, y))} | {"R": rule(node)}
    return Kernel("matmul", kinds, (one, two, y), fields)


def reach(most: int, multiplier: int, shift: int) -> int:
    """Differences up to ``most``, but none that would lie past the tables of exp, which end at 2^21 units: C has no bounds."""
    return min(most, ((2**21 - 1) << (31 - shift)) // multiplier) if multiplier > 0 else most


def attention(made: Making, node: Node, step: Step) -> Kernel:
    """Attention with its softmax, one query at a time."""
    a, (q, k, v), y = node.attrs, step.inputs, step.output
    (n, *lead), steps = heads(made, q, k, v, y)
    *_, queries, depth = made.place(q).sizes
    keys = made.place(k).sizes[-2]
    fields: dict[str, Any] = {"table": numbers(made.graph, node.inputs[3]).astype(np.int32)}
    if len(node.inputs) > 4:
        keep = numbers(made.graph, node.inputs[4])
        if any(size != 1 for size in keep.shape[:-2]):
            raise PlanError("its mask differs from head to head or example to example; C kernels take one for all")
        fields["keep"] = np.ascontiguousarray(np.broadcast_to(keep.reshape(keep.shape[-2:]), (queries, keys))).astype(np.int8)
    fields |= {"n": n, "queries": queries, "keys": keys, "depth": depth, "outputs": made.place(v).sizes[-1], "to": to(node)}
    for letter, head, step_ in zip("qkvy", lead, steps):
        fields |= {f"{letter}_head": head, f"{letter}_row": step_["row"], f"{letter}_column": step_["column"]}
    fields |= {key: a[key] for key in ("q_zero", "k_zero", "v_zero", "multiplier", "shift", "bits")}
    fields["reach"] = reach(a["reach"], a["multiplier"][0], a["shift"][0])
    fields |= {"causal": int(a["causal"])}
    kinds = {letter: made.kind(name) for letter, name in zip("XZVY", (q, k, v, y))} | {"R": rule(node)}
    others = {made.place(name).root for name in (k, v)}
    over = q if same(made, q, y) and made.place(q).root not in others else None
    scratch = sums(node)().itemsize * keys
    return Kernel("attention", kinds, (q, k, v, y), fields, over, scratch, scratch)


# -- moving codes -----------------------------------------------------------------------------------------------------


def copy(
    made: Making,
    x: str,
    y: str,
    axes: Sequence[int],
    region: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]] | None = None,
) -> Kernel:
    """Codes of x to their places in y, over ``axes`` from the slowest; ``region``: sizes, starts and steps in x, starts in y."""
    one, two = made.place(x), made.place(y)
    rank = len(one.sizes)
    sizes, start, step, at = region or (one.sizes, [0] * rank, [1] * rank, [0] * rank)
    from_ = [one.steps[axis] * step[axis] for axis in axes]
    n, source, target = loops([sizes[axis] for axis in axes], from_, [two.steps[axis] for axis in axes], most=5)
    skip = (sum(s * b for s, b in zip(one.steps, start)), sum(s * b for s, b in zip(two.steps, at)))
    return Kernel("move", {"X": made.kind(x)}, (x, y), {"n": n, "from": source, "to": target}, skip=skip)


def slice_(made: Making, node: Node, step: Step) -> Kernel:
    """A slice, as a copy."""
    (x,), y, a = step.inputs, step.output, node.attrs
    place, out = made.place(x), made.place(y)
    axis = a["axis"] % len(place.sizes)
    picked = range(place.sizes[axis])[slice(a.get("start", 0), a.get("stop"), a.get("step", 1))]
    rank = range(len(place.sizes))
    starts = [picked.start if i == axis else 0 for i in rank]
    steps = [picked.step if i == axis else 1 for i in rank]
    return copy(made, x, y, out.order, (out.sizes, starts, steps, [0] * len(rank)))


def concat(made: Making, node: Node, step: Step) -> Kernel:
    """Operands side by side, a copy for each."""
    y, out = step.output, made.place(step.output)
    rank = len(out.sizes)
    axis, at = node.attrs["axis"] % rank, 0
    parts: list[Kernel] = []
    for x in step.inputs:
        sizes = made.place(x).sizes
        parts.append(copy(made, x, y, out.order, (sizes, [0] * rank, [1] * rank, [at if i == axis else 0 for i in range(rank)])))
        at += sizes[axis]
    return several(parts)


def several(parts: Sequence[Kernel]) -> Kernel:
    """Calls one after the other, as one step."""
    return replace(parts[0], more=tuple(parts[1:]))


def expand(made: Making, node: Node, step: Step) -> Kernel:
    """Copies along axes of size 1."""
    (x,), y = step.inputs, step.output
    out = made.place(y)
    steps = seen_from(made, x, out)
    n, source, target = loops(*([part[axis] for axis in out.order] for part in (out.sizes, steps, out.steps)), most=5)
    return Kernel("move", {"X": made.kind(x)}, (x, y), {"n": n, "from": source, "to": target}, skip=(0, 0))


def depth_to_space(made: Making, node: Node, step: Step) -> Kernel:
    """Channels to places, as a copy over five axes."""
    (x,), y, b = step.inputs, step.output, node.attrs["block"]
    (_, c, h, w), (_, deep, down, right) = made.place(x).sizes, made.place(x).steps
    _, channel, row, place = made.place(y).steps
    loops_ = [(h, down, row * b), (b, deep * b, row), (w, right, place * b), (b, deep, place), (c // b**2, deep * b**2, channel)]
    n, source, target = loops(*(list(part) for part in zip(*loops_)), most=5)
    return Kernel("move", {"X": made.kind(x)}, (x, y), {"n": n, "from": source, "to": target}, skip=(0, 0))


def pad(made: Making, node: Node, step: Step) -> Kernel:
    """A filled result, and a copy into it."""
    (x,), y = step.inputs, step.output
    place, out = made.place(x), made.place(y)
    rank, pads = len(out.sizes), node.attrs["padding"]
    before = [0] * (rank - len(pads) // 2) + list(pads[::2])[::-1]
    start, at = [max(0, -b) for b in before], [max(0, b) for b in before]
    sizes = [min(n - s, m - t) for n, s, m, t in zip(place.sizes, start, out.sizes, at)]
    fill = Kernel("fill", {"X": made.kind(y)}, (y,), {}, scalars=(out.count, node.attrs["code"]), skip=(0,))
    return several([fill, copy(made, x, y, out.order, (sizes, start, [1] * rank, at))])


KERNELS: dict[str, Callable[[Making, Node, Step], Kernel]] = {
    "conv": conv, "linear": linear, "embedding": embedding, "add": pairwise, "sub": pairwise, "mul": pairwise, "sum": sum_,
    "sum_pool": pool,
    "avg_pool": pool, "max_pool": pool, "rescale": rescale, "table": table, "prelu": prelu, "softmax": softmax, "norm": norm,
    "matmul": matmul, "attention": attention, "conv_transpose": conv_transpose, "amax": amax, "argmax": argmax,
    "gather": gather, "resize": resize, "expand": expand, "depth_to_space": depth_to_space, "slice": slice_, "concat": concat,
    "pad": pad,
}  # fmt: skip
