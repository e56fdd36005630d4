"""Which calls a CMSIS-NN that the user supplies can take without changing a code, and why the others stay.

CMSIS-NN rounds in one way per build: in two steps, which is R1, or with CMSIS_NN_USE_SINGLE_ROUNDING once, which is R2. It has no
part in an export: the C compiled with -DROUNDEL_CMSIS_NN calls it. Not here: the C of the calls (`kernels/cmsis*.c`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import PlanError
from ...integer.ops import extremes, numbers
from .calls import INT32, Kernel, Making, rule, window
from .layout import Step

#: Roundings that a build of CMSIS-NN can have -> whether CMSIS_NN_USE_SINGLE_ROUNDING is defined, and what -2 / 4 becomes.
BUILDS = {"R1": (False, -1), "R2": (True, 0)}

#: Channels that its Helium kernel for depthwise convolutions works on at once (arm_nnsupportfunctions.h).
BLOCK = 124


@dataclass(frozen=True)
class Calls:
    """``kernels`` by step; those of ``sent`` are CMSIS-NN's; ``kept`` names the weighted layers that are not, and why."""

    rounding: str
    kernels: tuple[Kernel, ...]
    sent: tuple[str, ...]
    kept: dict[str, str]


def choose(made: Making, steps: Sequence[Step], own: Sequence[Kernel]) -> Calls:
    """The calls of one build of CMSIS-NN: of the rounding in which more multiplications of the network could go there."""
    work = {
        s.output: made.place(s.output).count * numbers(made.graph, s.node.inputs[1])[0].size
        for s in steps
        if s.node is not None and weighted(s)
    }
    return max((_calls(made, steps, own, r) for r in BUILDS), key=lambda found: sum(work[name] for name in found.sent))


def weighted(step: Step) -> bool:
    """Whether a step is one of those that CMSIS-NN could take."""
    return step.node is not None and step.node.op in ("conv", "linear")


def _calls(made: Making, steps: Sequence[Step], own: Sequence[Kernel], rounding: str) -> Calls:
    kernels, sent, kept = list(own), [], {}
    for i, step in enumerate(steps):
        if not weighted(step):
            continue
        try:
            kernels[i] = kernel(made, step, rounding)
            sent.append(step.output)
        except PlanError as err:
            kept[step.output] = str(err)
    return Calls(rounding, tuple(kernels), tuple(sent), kept)


def kernel(made: Making, step: Step, rounding: str) -> Kernel:
    """The call that computes a weighted ``step`` in a build of that ``rounding``; `PlanError` with the reason why there is none."""
    node, (x,), y = step.node, step.inputs, step.output
    assert node is not None
    if "runs" in node.attrs:
        raise PlanError("its range runs")
    for name in (x, y):
        if made.kind(name) != "s8":
            raise PlanError("it reads or makes codes that are no int8")
    if len(node.inputs) > 5:
        raise PlanError("its weights are indices into a table")
    if rule(node) != rounding:
        raise PlanError("its sums have 64 bits" if rule(node) == "wide" else f"it rounds as {rule(node)}")
    low, high = extremes(made.graph.values[node.inputs[1]].dtype)
    if max(-low, high) < 2**6:
        raise PlanError("its weights lie packed, in an order of our own")
    weight, bias, multiplier, shift = (numbers(made.graph, name) for name in node.inputs[1:5])
    down, up = extremes(made.place(x).dtype)
    zero = node.attrs["x_zero"]
    reach = np.abs(bias) + max(zero - down, up - zero) * np.abs(weight).reshape(len(weight), -1).sum(1)
    if shift.min() < -30 or (reach * 2.0 ** np.maximum(shift + 1, 0) > INT32).any():
        raise PlanError("a factor is so large or small that CMSIS-NN's shifts would leave 32 bits")
    if node.op == "linear":
        outputs, depth = weight.shape
        return _kernel(node.attrs, "cmsis_conv", rounding, (x, y), weight, (bias, multiplier, shift), {
            "height": 1, "width": made.place(x).count // depth, "channels": depth, "out_height": 1,
            "out_width": made.place(x).count // depth, "outputs": outputs, "kernel_h": 1, "kernel_w": 1, "depth": depth,
            "stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1, "top": 0, "left": 0,
        })  # fmt: skip
    view = window(made, x, y, node.attrs, weight.shape[2:])
    view.pop("kept")
    weight = weight if weight.ndim == 4 else weight[..., None]
    outputs, depth, *_ = weight.shape
    alone = depth == 1 and node.attrs["groups"] > 1
    sizes = view | {"outputs": outputs, "depth": depth}
    if min(view["top"], view["left"]) < 0:
        raise PlanError("its padding is negative")
    after = (
        (view["out_width"] - 1) * view["stride_w"] - view["left"] + (view["kernel_w"] - 1) * view["dilation_w"] + 1 - view["width"]
    )
    if alone and after > 1 and (view["kernel_h"], view["kernel_w"]) == (3, 3):
        raise PlanError("CMSIS-NN's depthwise kernel of 3x3 reads past rows that end two places early")
    if view["height"] == view["kernel_h"] == 1 and view["kernel_w"] > 1 and after not in (view["left"], view["left"] + 1):
        raise PlanError("CMSIS-NN refuses rows whose padding differs by more than one place")
    order = (2, 3, 0, 1) if alone else (0, 2, 3, 1)
    name = "cmsis_depthwise" if alone else "cmsis_conv"
    return _kernel(node.attrs, name, rounding, (x, y), weight.transpose(order), (bias, multiplier, shift), sizes)


def _kernel(
    attrs: dict[str, int], name: str, rounding: str, operands: tuple[str, str], weight: np.ndarray, each: tuple[np.ndarray, ...],
    sizes: dict[str, int],
) -> Kernel:  # fmt: skip
    arrays = {key: n.reshape(-1).astype(np.int32) for key, n in zip(("bias", "multiplier", "shift"), each)}
    places = {"x_zero": attrs["x_zero"], "y_zero": attrs["y_zero"], "low": attrs["low"], "high": attrs["high"]}
    bytes_ = room(sizes, name == "cmsis_depthwise")
    fields = {"weight": np.ascontiguousarray(weight).astype(np.int8), **arrays, **sizes, **places, "room": bytes_}
    return Kernel(name, {"R": rounding}, operands, fields, None, bytes_, bytes_)


def room(view: dict[str, int], alone: bool) -> int:
    """Bytes of scratch that suffice for a call on every core, as ``arm_*_get_buffer_size`` has it; the C asks that too."""
    taps = view["kernel_h"] * view["kernel_w"]
    if alone:
        return max(2 * view["channels"] * taps, 4 * BLOCK * taps)
    depth = taps * view["channels"]
    if taps == 1 and not (view["top"] or view["left"]):
        return 4 * depth
    right = math.ceil(
        (view["left"] + 1 + view["stride_w"] - 1) / view["stride_w"]
    )  # places of the result that see past a row's end
    row = depth + max(view["left"], right) * view["channels"] if view["height"] == view["kernel_h"] == 1 else 0
    return max(4 * -(-depth // 16) * 16, row)
