"""Running ranges in C: the state of their sites, kernels that look at codes, and those that put exponents into biases and shifts.

All exponents hold for a whole run, so everything is settled before its first kernel, and the kernels know nothing of it. Not here:
what an exponent means and when it moves (`integer.running`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import PlanError
from ...graph import Graph, Node
from ...integer.ops import numbers
from ...integer.running import BOUND, DOWN, UP, count
from .calls import Kernel, Making, Ram
from .layout import Step

#: The state, and what reads it.
SITES = """\
/* Running ranges: codes of a site stand for 2^used times what they do at first. next is for the next run; up and down count the
 * runs in a row that ask for it. */
struct site {{
    int8_t used, next, up, down;
}};

static struct site sites[{count}];

static inline int32_t used_at(int32_t site)
{{
    return site < 0 ? 0 : sites[site].used;
}}

static inline int32_t bounded(int32_t shift)
{{
    return shift < -31 ? -31 : shift;
}}"""

#: The first statement of a run.
BEGIN = """\
for (int32_t i = 0; i < {count}; i++) {{
    sites[i].used = sites[i].next;
}}"""


def running(made: Making, step: Step, k: Kernel) -> Kernel:
    """``k`` with what its step's exponents ask for: kernels before the run, and one that looks at the result."""
    node = step.node
    if node is None or "runs" not in node.attrs:
        return k
    if k.more:
        raise PlanError("its range runs, and it takes several kernels; give its site a static format by a rule of the plan")
    *ins, y = node.attrs["runs"]
    if max(*ins, y) >= 0:
        k = _settled(made, node, k, ins, y)
    return replace(k, more=(observing(made, node, step.output),)) if "tracker" in node.attrs else k


def observing(made: Making, node: Node, value: str) -> Kernel:
    """The kernel that looks at the codes of ``value``, which ``node`` makes."""
    keys = ("zero", "low", "high", "limit", "quiet")
    fields = {"count": made.place(value).count, **dict(zip(keys, node.attrs["tracker"])), "site": node.attrs["runs"][-1]}
    fields |= {"bound": BOUND, "most_up": UP, "most_down": DOWN}
    return Kernel("observe", {"Y": made.kind(value)}, (value,), fields)


def doors(made: Making) -> list[Kernel]:
    """Those that look at the network's inputs."""
    return [observing(made, node, node.name) for node in made.graph if node.op == "quantize" and "tracker" in node.attrs]


def _settled(made: Making, node: Node, k: Kernel, ins: Sequence[int], y: int) -> Kernel:
    """``k`` over numbers in RAM, and the kernel that fills them before each run."""
    sites = {"x": ins[0], "z": ins[1] if len(ins) > 1 else -1, "y": y}
    if node.op in ("add", "sub"):
        before = Kernel("settle_pair", {}, (), {"shift": k.fields["shift"], "now": "@.shift", **sites})
        return replace(k, live=True, before=(before,))
    if not isinstance(k.fields.get("product", k.fields).get("bias"), np.ndarray):
        before = Kernel("settle_one", {}, (), {"shift": k.fields["shift"], "now": "&@.shift", **sites})
        return replace(k, live=True, before=(before,))
    members: dict[str, Any] = k.fields.get("product", k.fields)
    bias = numbers(made.graph, node.inputs[2]).astype(np.int32)
    fields = {"bias": bias, "zeros": (bias - members["bias"]).astype(np.int32), "shift": members["shift"]}
    fields |= {"bias_now": "@_bias", "shift_now": "@_shift", "outputs": len(bias), "x": ins[0], "y": y}
    here = {**members, "bias": Ram("int32_t", len(bias)), "shift": Ram("int8_t", len(bias))}
    own = {**k.fields, "product": here} if "product" in k.fields else here
    return replace(k, fields=own, before=(Kernel("settle", {}, (), fields),))


def functions(name: str, graph: Graph) -> list[str]:
    """Pieces of the .c that the header's functions are."""
    n = count(graph)
    return [
        f"int {name}_exponent(int site, int next)\n{{\n    return next ? sites[site].next : sites[site].used;\n}}",
        f"void {name}_reset(void)\n{{\n    const struct site start = {{0, 0, 0, 0}};\n"
        f"    for (int32_t i = 0; i < {n}; i++) {{\n        sites[i] = start;\n    }}\n}}",
    ]


def header(name: str, graph: Graph, ports: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of the header: exponents of the inputs and outputs (``ports``: INPUT and OUTPUT -> values), and the way back."""
    read = {node.inputs[0]: node.attrs["runs"][0] for node in graph if node.op == "dequantize" and "runs" in node.attrs}
    made = {node.inputs[0]: node.attrs["runs"][0] for node in graph if node.op == "quantize" and "runs" in node.attrs}
    lines = [
        "/* Ranges run: codes of what follows stand for 2^EXPONENT * scale * (code - zero); of an input, those of the next run. */"
    ]
    for word, values in ports.items():
        for i, value in enumerate(values):
            site = (made if word == "INPUT" else read).get(value, -1)
            if site >= 0:
                lines.append(f"#define {name.upper()}_{word}{i}_EXPONENT ({name}_exponent({site}, {int(word == 'INPUT')}))")
    return [*lines, f"int {name}_exponent(int site, int next);", f"void {name}_reset(void); /* ranges as at the start */", ""]
