"""Random integer graphs for tests: every operation with a C kernel, at ties, extreme zero points and shifts, and saturation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from roundel.errors import InputError
from roundel.formats.pack import pack
from roundel.graph import Graph, Node, Spec
from roundel.integer.check import accumulators, check_integer
from roundel.integer.fixed import exp_table, step_table
from roundel.integer.ops import INTEGER, extremes

Ints = NDArray[np.int64]
LOW, HIGH = -128, 127


@dataclass
class Drawing:
    """A graph in the making; every choice comes from ``rng``."""

    rng: np.random.Generator
    rounding: str
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Spec] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def zero(self, name: str | None = None) -> int:
        """A zero point that the type of ``name`` (default int8) has, extreme half of the time."""
        low, high = extremes(self.values[name].dtype if name else "int8")
        return int(self.pick(low, high, max(low, 0), int(self.rng.integers(low, high + 1))))

    def shape(self, name: str) -> list[int]:
        return [1 if n == "N" else int(n) for n in self.values[name].shape]

    def input(self, *sizes: int, dtype: str = "int8") -> str:
        name = f"x{len(self.inputs)}"
        low, high = extremes(dtype)
        zero = int(self.rng.integers(low, high + 1))
        self.inputs.append(name)
        self.values |= {name: Spec(("N", *sizes)), f"{name}.codes": Spec(("N", *sizes), dtype)}
        self.nodes.append(Node("quantize", (name,), (f"{name}.codes",), {"scale": 0.25, "zero": zero, "low": low, "high": high}))
        return f"{name}.codes"

    def constant(self, name: str, numbers: Any, dtype: str = "int32") -> str:
        codes = np.asarray(numbers, np.int64)
        low, high = extremes(dtype)
        self.values[name] = Spec(codes.shape, dtype)
        if high > 255:
            self.constants[name] = torch.from_numpy(codes.astype(np.int32))
        else:
            rows = torch.from_numpy(codes & (high - low)).reshape(codes.shape[0] if codes.ndim > 1 else 1, -1)
            self.constants[name] = pack(rows, (high - low).bit_length())
        return name

    def codes(self, *shape: int, dtype: str = "int8") -> Ints:
        low, high = extremes(dtype)
        low = max(low, -high) if dtype == "int8" else low
        draw = self.rng.integers(low, high + 1, shape)
        return np.where(self.rng.random(shape) < 0.2, self.rng.choice([low, high], shape), draw)

    def factor(self, reach: float, count: int | None = None) -> tuple[Any, Any]:
        """Multipliers and shifts that bring sums of up to ``reach`` to some dozens or hundreds, ties and limits among them."""
        size = count or 1
        multiplier = self.rng.choice([1 << 30, 3 << 29, (1 << 31) - 1, -(1 << 30)], size, p=[0.5, 0.2, 0.2, 0.1])
        multiplier = np.where(self.rng.random(size) < 0.5, self.rng.integers(1 << 30, 1 << 31, size), multiplier)
        shift = 7 - int(np.log2(max(reach, 1))) + self.rng.integers(-2, 4, size)
        shift = np.where(self.rng.random(size) < 0.05, -31, np.clip(shift, -31, 30))
        return (multiplier, shift) if count else (int(multiplier[0]), int(shift[0]))

    def out(self) -> dict[str, Any]:
        zero = self.zero()
        low, high = self.pick((LOW, HIGH), (LOW, HIGH), (max(LOW, zero - 40), min(HIGH, zero + 60)))
        return {"y_zero": zero, "low": low, "high": high, "rounding": self.rounding}

    def emit(self, op: str, inputs: list[str], dtype: str = "int8", **attrs: Any) -> str:
        """Add a node; its shape is what the definition makes of zeros. Shifts that the proof refuses are lowered."""
        name = f"v{len(self.nodes)}"
        for _ in range(80):
            node = Node(op, tuple(inputs), (name,), attrs)
            try:
                acc = accumulators(self, node)
                break
            except InputError:
                if isinstance(attrs.get("shift"), list):
                    attrs["shift"] = [*attrs["shift"][:-1], attrs["shift"][-1] - 1]
                elif "shift" in attrs:
                    attrs["shift"] -= 1
                else:
                    at = 4  # the shifts of a weighted operation
                    self.constants[inputs[at]] = torch.clamp(self.constants[inputs[at]] - 1, min=-31)
        else:
            raise AssertionError(f"no shift fits {op}")
        if acc is not None:
            node = Node(op, node.inputs, node.outputs, {**attrs, "acc": list(acc)})
        from roundel.integer.ops import numbers

        zeros = [
            numbers(self, i) if i in self.constants else np.full(self.shape(i), min(max(0, extremes(self.values[i].dtype)[0]), 0))
            for i in node.inputs
        ]
        made = INTEGER[op](*zeros, **{**node.attrs, **({"acc": [-(2**62), 2**62] * (len(acc) // 2)} if acc else {})})
        self.nodes.append(node)
        self.values[name] = Spec(("N", *made.shape[1:]), dtype)
        return name

    # -- operations ---------------------------------------------------------------------------------------------------

    def weighted(self, op: str, x: str, weight: Ints, dtype: str, **attrs: Any) -> str:
        at, outputs = f"w{len(self.nodes)}", len(weight)
        reach = np.abs(weight).reshape(outputs, -1).sum(1).max() * 128
        multiplier, shift = self.factor(reach, outputs)
        parts = [self.constant(f"{at}.weight", weight, dtype), self.constant(f"{at}.bias", self.rng.integers(-999, 999, outputs))]
        parts += [self.constant(f"{at}.multiplier", multiplier), self.constant(f"{at}.shift", shift)]
        return self.emit(op, [x, *parts], x_zero=self.zero(x), **attrs, **self.out())

    def conv(self, x: str) -> str:
        _, channels, *sizes = self.shape(x)
        kernel = [int(self.rng.integers(1, min(n, 4) + 1)) for n in sizes]
        dilation = [self.pick(1, 1, 2) if (k - 1) * 2 < n else 1 for k, n in zip(kernel, sizes)]
        stride = [self.pick(1, 1, 2, 3) for _ in sizes]
        padding = [self.pick(0, 1, (k - 1) * d, 2) for k, d in zip(kernel[::-1], dilation[::-1]) for _ in "ab"]
        groups = self.pick(1, 1, channels, *(g for g in (2, 3) if channels % g == 0))
        outputs = groups * self.pick(1, 2, 3)
        dtype = self.pick("int8", "int8", "int4", "int2", "int3")
        weight = self.codes(outputs, channels // groups, *kernel, dtype=dtype)
        return self.weighted("conv", x, weight, dtype, stride=stride, padding=padding, dilation=dilation, groups=groups)

    def linear(self, x: str) -> str:
        dtype = self.pick("int8", "int8", "int4", "int2", "int5")
        return self.weighted("linear", x, self.codes(int(self.rng.integers(1, 20)), self.shape(x)[-1], dtype=dtype), dtype)

    def pool(self, x: str) -> str:
        sizes = self.shape(x)[2:]
        kernel = [int(self.rng.integers(1, min(n, 4) + 1)) for n in sizes]
        stride = [self.pick(1, 2, k) for k in kernel]
        padding = [self.pick(0, k // 2) for k in kernel[::-1] for _ in "ab"]
        place = {"kernel": kernel, "stride": stride, "padding": padding}
        op = self.pick("avg_pool", "max_pool", "sum_pool")
        if op != "sum_pool":
            return self.emit(op, [x], low=LOW, high=HIGH, **place)
        multiplier, shift = self.factor(128 * np.prod(kernel))
        return self.emit(op, [x], x_zero=self.zero(x), multiplier=multiplier, shift=shift, **place, **self.out())

    def pair(self, x: str) -> str:
        shape = self.shape(x)
        op = self.pick("add", "sub", "mul")
        if self.pick(True, False):
            other = x
        else:
            kept = [1, *(n if self.pick(True, True, False) else 1 for n in shape[1:])]
            other = self.constant(f"k{len(self.nodes)}", self.codes(*kept), "int8")
        operands = [x, other] if op != "sub" or other in self.constants else [other, x]
        if op == "mul":
            multiplier, shift = self.factor(2**15)
            zeros = {"a_zero": self.zero(operands[0]), "b_zero": self.zero(operands[1])}
            return self.emit("mul", operands, multiplier=multiplier, shift=shift, **zeros, **self.out())
        multiplier = [abs(self.factor(1)[0]) for _ in range(3)]
        shift = [int(self.rng.integers(-6, 1)), int(self.rng.integers(-6, 1)), int(self.rng.integers(-21, -16))]
        return self.emit(
            op,
            operands,
            a_zero=self.zero(operands[0]),
            b_zero=self.zero(operands[1]),
            left=20,
            multiplier=multiplier,
            shift=shift,
            **self.out(),
        )

    def unary(self, x: str) -> str:
        op = self.pick("rescale", "table", "prelu", "softmax", "sum", "norm")
        rank, shape = len(self.shape(x)), self.shape(x)
        if op == "table":
            entries = self.constant(f"t{len(self.nodes)}", self.rng.integers(LOW, HIGH + 1, 256), "int8")
            return self.emit("table", [x, entries], first=extremes(self.values[x].dtype)[0])
        if op == "softmax":
            axis = int(self.rng.integers(1, rank))
            entries = self.constant(f"t{len(self.nodes)}", exp_table(self.pick(0.003, 0.1, 0.7, 20.0), 256))
            bits, zero = self.pick((8, -128), (7, 0), (8, -128))
            out = {"y_zero": zero, "low": LOW, "high": HIGH, "rounding": self.rounding}
            return self.emit("softmax", [x, entries], axis=self.pick(axis, axis - rank), bits=bits, **out)
        if op == "norm":
            n = shape[-1]
            parts = [self.constant(f"n{len(self.nodes)}.{p}", self.rng.integers(-999, 999, n)) for p in "wb"]
            multiplier, shift = self.factor(2**18)
            attrs = {"centred": self.pick(True, False), "eps": int(self.pick(0, 1, 77)), "bits": self.pick(8, 11)}
            return self.emit("norm", [x, *parts], x_zero=self.zero(x), multiplier=multiplier, shift=shift, **attrs, **self.out())
        if op == "prelu":
            channels = self.pick(1, shape[1])
            parts = [self.factor(256, channels) for _ in "pn"]
            made = [
                self.constant(f"p{len(self.nodes)}.{i}", np.minimum(np.stack(p), [2**31, 20][i])) for i, p in enumerate(zip(*parts))
            ]
            return self.emit("prelu", [x, *made], x_zero=self.zero(x), **self.out())
        if op == "sum":
            axes = sorted({int(self.rng.integers(1, rank)) for _ in range(2)})
            keepdim = len(axes) == rank - 1 or self.pick(True, False)
            multiplier, shift = self.factor(128 * np.prod([shape[a] for a in axes]))
            return self.emit(
                "sum", [x], axes=axes, keepdim=keepdim, x_zero=self.zero(x), multiplier=multiplier, shift=shift, **self.out()
            )
        multiplier, shift = self.factor(128)
        return self.emit("rescale", [x], x_zero=self.zero(x), multiplier=multiplier, shift=shift, **self.out())

    def transposed(self, x: str) -> str:
        _, channels, *sizes = self.shape(x)
        kernel = [int(self.rng.integers(2, 4)) for _ in sizes]
        groups = self.pick(1, channels)
        dtype = self.pick("int8", "int4")
        weight = self.codes(groups * self.pick(1, 2), channels // groups, *kernel, dtype=dtype)
        stride = [self.pick(1, 2, 3) for _ in sizes]
        place = {
            "stride": stride,
            "padding": [self.pick(0, k // 2) if n > 1 else 0 for k, n in zip(kernel, sizes)],
            "dilation": [self.pick(1, 2) for _ in sizes],
        }
        place["output_padding"] = [self.pick(0, s - 1) for s in stride]
        return self.weighted("conv_transpose", x, weight, dtype, groups=groups, **place)

    def resized(self, x: str) -> str:
        picks = []
        bits = self.pick(0, 7)
        for i, n in enumerate(self.shape(x)[-2:]):
            out = int(self.rng.integers(1, 9))
            table = np.stack([self.rng.integers(0, n, out), self.rng.integers(0, 1 << bits, out)], 1)
            picks.append(self.constant(f"r{len(self.nodes)}.{i}", table))
        multiplier, shift = self.factor(128 << 2 * bits)
        return self.emit("resize", [x, *picks], bits=bits, x_zero=self.zero(x), multiplier=multiplier, shift=shift, **self.out())

    def move(self, x: str) -> str:
        shape = self.shape(x)
        rank, dtype = len(shape), self.values[x].dtype
        op = self.pick("reshape", "transpose", "slice", "concat", "pad", "pad", "expand", "gather", "amax", "depth_to_space")
        axis = int(self.rng.integers(1, rank))
        if op == "expand":
            to = [-1, *(3 if n == 1 else -1 for n in shape[1:])]
            return self.emit("expand", [x], dtype, shape=to)
        if op == "gather":
            index = self.constant(f"i{len(self.nodes)}", self.rng.integers(0, shape[axis], 3))
            return self.emit("gather", [x, index], dtype, axis=axis)
        if op == "amax":
            return self.emit("amax", [x], dtype, axes=[axis], keepdim=True)
        if op == "depth_to_space":
            if rank != 4 or shape[1] % 4:
                return self.emit("reshape", [x], dtype, shape=[0, -1, shape[-1]])
            return self.emit("depth_to_space", [x], dtype, block=2)
        if op == "reshape":
            to = self.pick([0, -1, shape[-1]], [0, *shape[:0:-1]], [0, shape[1], -1], [0, -1, 1, shape[-1]])
            return self.emit("reshape", [x], dtype, shape=to)
        if op == "transpose":
            return self.emit("transpose", [x], dtype, perm=[0, *(1 + self.rng.permutation(rank - 1)).tolist()])
        if op == "slice":
            n = shape[axis]
            start = int(self.rng.integers(0, n))
            return self.emit(
                "slice", [x], dtype, axis=self.pick(axis, axis - rank), start=start, stop=self.pick(None, n), step=self.pick(1, 2)
            )
        if op == "concat":
            return self.emit("concat", [x, self.pick(x, *self.alike(x, axis))], dtype, axis=axis)
        padding = [int(self.rng.integers(-1, 3)) if n > 2 else int(self.rng.integers(0, 2)) for n in shape[:1:-1] for _ in "ab"]
        low, high = extremes(dtype)
        return self.emit("pad", [x], dtype, padding=padding, code=int(self.pick(low, high, low + 5)))

    def alike(self, x: str, axis: int) -> list[str]:
        """Values that differ from x along ``axis`` at most."""
        made = [node.name for node in self.nodes if self.values[node.name].dtype == self.values[x].dtype]
        shape = self.shape(x)
        return [
            o
            for o in made
            if len(self.shape(o)) == len(shape) and all(a == b for i, (a, b) in enumerate(zip(self.shape(o), shape)) if i != axis)
        ]

    def products(self, x: str) -> str:
        shape = self.shape(x)
        if self.pick(True, False):
            reach = 2**14 * shape[-1]
            multiplier, shift = self.factor(reach)
            zeros = {"a_zero": self.zero(x), "b_zero": self.zero(x)}
            return self.emit("matmul", [x, x], transpose_b=True, multiplier=multiplier, shift=shift, **zeros, **self.out())
        steps = self.constant(f"s{len(self.nodes)}", step_table())
        constants = [steps]
        if self.pick(True, False):
            keep = (self.rng.random((shape[-2], shape[-2])) < 0.7) | np.eye(shape[-2], dtype=bool)
            constants.append(self.constant(f"m{len(self.nodes)}", keep, "uint8"))
        unit = self.pick(1.0, 20.0, 3000.0)
        from roundel.integer.dialect import quantize_multiplier

        multiplier, shift = quantize_multiplier([unit, self.pick(1.0, 0.31) / 2**15])
        zeros = {f"{letter}_zero": self.zero(x) for letter in "qkv"}
        attrs = {"causal": self.pick(True, False), "reach": int(((1 << 21) - 2) / unit), "bits": 15}
        attrs |= {"multiplier": multiplier.tolist(), "shift": shift.tolist()}
        return self.emit("attention", [x, x, x, *constants], **attrs, **zeros, **self.out())

    def grow(self, x: str) -> str:
        """One more operation on x."""
        rank = len(self.shape(x))
        if np.prod(self.shape(x)) > 3000:
            return self.emit("slice", [x], self.values[x].dtype, axis=1, start=0, stop=1, step=1)
        kinds = [self.unary, self.move, self.pair, self.linear, *[self.products] * (rank > 2)]
        kinds += [self.conv, self.conv, self.pool, self.transposed] * (rank in (3, 4)) + [self.resized] * (rank == 4)
        return kinds[int(self.rng.integers(len(kinds)))](x)


def draw(seed: int, rounding: str) -> Graph:
    """A random integer graph of up to 8 operations, in part side by side, proven by `check_integer`."""
    made = Drawing(np.random.default_rng(seed), rounding)
    shape = made.pick((6, 7, 5), (3, 8, 8), (12, 9), (4, 11), (20,), (8, 5, 4), (4, 6, 3))
    values = [made.input(*shape, dtype=made.pick("int8", "int8", "uint8", "int4"))]
    for _ in range(int(made.rng.integers(2, 9))):
        values.append(made.grow(made.pick(values[-1], values[-1], values[int(made.rng.integers(len(values)))])))
    used = {i for node in made.nodes for i in node.inputs}
    ends = [v for v in values if v not in used] or values[-1:]
    if made.pick(True, False, False):
        ends.append(made.emit("argmax", [ends[0]], "int32", axis=-1, keepdim=False))
        ends = ends[1:]
    for v in ends:
        made.nodes.append(Node("dequantize", (v,), (f"{v}.real",), {"scale": 0.5, "zero": 0}))
        made.values[f"{v}.real"] = Spec(made.values[v].shape)
    graph = Graph(
        tuple(made.inputs), tuple(f"{v}.real" for v in ends), tuple(made.nodes), made.constants, made.values, opset="integer"
    )
    check_integer(graph)
    return graph
