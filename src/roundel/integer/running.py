"""Running ranges in integers: codes of a site stand for 2^exponent times what they did, and that follows peaks and saturation.

A node that reads or makes such codes has the attribute ``runs``: the site of each operand and of the result, -1 for a static one.
The node that makes a site has ``tracker`` too. Nothing here is float and zero points stay, so the next exponent is a few compares:

    saturated > limit   for `UP` samples in a row: one up          (codes at an end of the range that is no fused activation's)
    peak <= quiet       for `DOWN` samples in a row: one down      (largest |code - zero|; at 3/8, the next peak is at 3/4)

A site's exponent holds for a whole sample; the next one is found as soon as its codes are there. Exponents stay within +-`BOUND`,
and every sum is proven for all of them. Not here: what `runs` does in C (`exporters.c`), which sites can run (`lower.making`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..graph import Graph, Node
from .dialect import LEAST, Ints

#: Largest exponent, up and down: a factor of 8.
BOUND = 3

#: Samples in a row that ask for more, or for less, before the exponent moves.
UP, DOWN = 3, 12

#: Operations that take exponents: their rescale takes a shift. Those that only move codes need none.
TAKEN = ("quantize", "conv", "conv_transpose", "linear", "add", "sub", "mul", "sum", "sum_pool", "rescale", "dequantize")


@dataclass(frozen=True)
class Site:
    """The state of one site: the exponent of the sample at hand and of the next, and samples in a row that ask up and down."""

    used: int = 0
    next: int = 0
    up: int = 0
    down: int = 0


@dataclass
class Exponents:
    """The state of a graph's running sites, which `simulate` carries from sample to sample; changed in place."""

    sites: list[Site] = field(default_factory=list)

    @classmethod
    def of(cls, graph: Graph) -> Exponents:
        """As the device starts."""
        return cls([Site()] * count(graph))

    def begin(self) -> None:
        """The next sample."""
        self.sites = [replace(site, used=site.next) for site in self.sites]

    def used(self, site: int) -> int:
        return self.sites[site].used if site >= 0 else 0


def count(graph: Graph) -> int:
    """How many sites of an integer graph run."""
    return 1 + max((site for node in graph for site in node.attrs.get("runs", ())), default=-1)


def tracker(zero: int, low: int, high: int, numbers: int) -> list[int]:
    """Of a site with that many numbers a sample: zero, the codes at and beyond which a number is saturated, limit, quiet."""
    reach = max(high - zero, zero - low)
    return [zero, low if low < zero else low - 1, high if high > zero else high + 1, max(1, numbers >> 6), 3 * reach >> 3]


def observed(site: Site, tracker: Sequence[int], codes: Ints) -> Site:
    """The state after one sample's ``codes``.

    >>> site = Site()
    >>> for _ in range(3):
    ...     site = observed(site, [0, -128, 127, 1, 47], np.array([127, 127, 3]))
    >>> site
    Site(used=0, next=1, up=0, down=0)
    """
    zero, low, high, limit, quiet = tracker
    if not codes.size:
        return site
    saturated, peak = int((codes <= low).sum() + (codes >= high).sum()), int(np.abs(codes - zero).max())
    up = site.up + 1 if saturated > limit else 0
    down = site.down + 1 if saturated <= limit and peak <= quiet else 0
    if up == UP:
        return replace(site, next=min(site.used + 1, BOUND), up=0, down=0)
    if down == DOWN:
        return replace(site, next=max(site.used - 1, -BOUND), up=0, down=0)
    return replace(site, up=up, down=down)


def run(fn: Any, node: Node, operands: list[Any], state: Exponents) -> Any:
    """One node under the exponents of ``state``, which sees what it makes."""
    attrs = {key: value for key, value in node.attrs.items() if key not in ("runs", "tracker")}
    *ins, out = map(state.used, node.attrs["runs"])
    if node.op in ("quantize", "dequantize"):
        attrs["scale"] = attrs["scale"] * 2.0 ** (sum(ins) + out)  # one of them is -1, which is 0 here
    elif node.op in ("add", "sub"):
        attrs["shift"] = shifts(attrs["shift"], ins, out)
    elif "shift" in attrs:
        attrs["shift"] = bounded(attrs["shift"] + sum(ins) - out)
    else:  # x, w, bias, multiplier, shift
        operands = [*operands[:2], moved(operands[2], ins[0]), operands[3], bounded(operands[4] + ins[0] - out), *operands[5:]]
    made = fn(*operands, **attrs)
    if "tracker" in node.attrs:
        at = node.attrs["runs"][-1]
        state.sites[at] = observed(state.sites[at], node.attrs["tracker"], made)
    return made


def moved(bias: Ints, exponent: int) -> Ints:
    """A bias in units of 2^exponent, ties up."""
    return bias << -exponent if exponent <= 0 else (bias + (1 << (exponent - 1))) >> exponent


def bounded(shift: ArrayLike) -> Any:
    """Shifts that a rescale takes."""
    return np.maximum(shift, LEAST)


def shifts(shift: Sequence[int], ins: Sequence[int], out: int) -> list[int]:
    """Those of a sum of two: the operand with the larger exponent keeps its own, so no term grows."""
    top = max(ins)
    return [int(bounded(s)) for s in (shift[0] + ins[0] - top, shift[1] + ins[1] - top, shift[2] + top - out)]


def widest(node: Node) -> tuple[int, int]:
    """How many bits all exponents together may add to a node's shift, and that of its first operand to its bias."""
    *ins, out = (BOUND if site >= 0 else 0 for site in node.attrs.get("runs", (-1,)))
    return (max(ins, default=0) if node.op in ("add", "sub") else sum(ins)) + out, ins[0] if ins else 0
