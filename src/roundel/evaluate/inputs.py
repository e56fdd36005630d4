"""Whether the numbers that go into a quantized graph are like those it was calibrated on; it looks at no output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..data import Batch
from ..formats.grid import Real
from ..graph import Graph
from ..network.sites import find_sites
from ..qmodel import QModel

#: A note is due where a larger share of an input lies outside the calibrated range, or it fills a smaller share of the range.
OUTSIDE = USED = 1 / 20


class Inputs:
    """The inputs of a graph whose ranges are static, against what evaluation gives them."""

    def __init__(self, q: QModel | nn.Module) -> None:
        self.names: tuple[str, ...] = ()
        self.ranges: dict[str, tuple[float, float]] = {}
        self.slack: dict[str, float] = {}
        self.seen: dict[str, list[float]] = {}  # lowest, highest, how many, how many of them outside
        if not (isinstance(q, QModel) and isinstance(q.structure, Graph)):
            return
        self.names, root = tuple(q.structure.inputs), find_sites(q.structure).root
        for name in self.names:
            site = q.activations.get(root.get(name, ""))
            if site is not None and site.when == "static" and not isinstance(site.format.grid, Real):
                low, high = site.quantize(torch.tensor([-1e30, 1e30])).tolist()  # numbers beyond a range become its ends
                self.ranges[name] = low, high
                # A range cuts off tails on purpose, and of few bits more than a tail: a step wide where steps are wide.
                self.slack[name] = (high - low) * max(1 / 10, 1 / (2**site.format.bits - 1))

    def take(self, batch: Batch) -> None:
        """One batch more."""
        given: dict[str, Tensor] = {**dict(zip(self.names, batch.args, strict=False)), **batch.named}
        for name, (low, high) in self.ranges.items():
            x = given.get(name)
            if x is None or not x.numel():
                continue
            slack = self.slack[name]
            outside = int(((x < low - slack) | (x > high + slack)).sum())
            a, b, count, out = self.seen.get(name, (torch.inf, -torch.inf, 0, 0))
            self.seen[name] = [min(a, float(x.min())), max(b, float(x.max())), count + x.numel(), out + outside]

    def notes(self) -> Iterator[str]:
        """What differs so much that the preprocessing must have."""
        for name, (a, b, count, out) in self.seen.items():
            low, high = self.ranges[name]
            if out > OUTSIDE * count:
                odd = f"{out / count:.0%} of its numbers lie outside the calibrated range"
            elif b - a < USED * (high - low):
                odd = f"its numbers fill {(b - a) / (high - low):.1%} of the calibrated range"
            else:
                continue
            yield (f"input {name!r} goes from {a:.3g} to {b:.3g}: {odd}, {low:.3g} to {high:.3g}; "
                   "check the preprocessing (scale, mean, std)")  # fmt: skip
