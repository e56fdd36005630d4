"""Static activation ranges: from what calibration saw, or from what an operation can give at all."""

from __future__ import annotations

import torch

from .errors import FormatError, PlanError
from .formats.format import Format
from .formats.grid import Real, Uniform
from .graph import Graph
from .network.layer import Activation
from .network.sites import Sites
from .stats import Stats, find_range


def known_ranges(graph: Graph, sites: Sites) -> dict[str, tuple[float, float]]:
    """Sites whose numbers lie in a fixed range whatever the data: softmax and sigmoid in [0, 1), tanh in [-1, 1), as TFLite fixes
    them (int8 then steps by 1/256 and 1/128, symmetric int16 by 2^-15)."""
    producers = graph.producers()
    found = {}
    for site, origin in sites.origin.items():
        ops = {producers[name].op for name in origin if name in producers}
        if len(ops) == 1 and all(name in producers for name in origin):
            if ops <= {"softmax", "sigmoid"}:
                found[site] = (0.0, 1.0)
            elif ops == {"tanh"}:
                found[site] = (-1.0, 1.0)
    return found


def static_activation(name: str, fmt: Format, seen: Stats, method: str, fixed: tuple[float, float] | None = None) -> Activation:
    """The stored parameters of one site. Raises `PlanError` for a format that is not per tensor, `FormatError` for a range that the
    format cannot hold."""
    if fmt.share.word != "tensor":
        raise PlanError(f"site {name!r}: static activations share one scale per tensor, got {fmt}; "
                        "use /tensor, or ':dynamic' for tokens and groups")  # fmt: skip
    if isinstance(fmt.grid, Real):
        nothing = torch.zeros(1, 1)
        return Activation(fmt, "static", fmt.store(fmt.from_range(nothing, nothing)))
    symmetric = fmt.zero is None and fmt.min is None and fmt.bits == 16
    if fixed is not None and isinstance(fmt.grid, Uniform) and symmetric:
        lo, hi = 2.0**-15 - fixed[1], fixed[1] - 2.0**-15
    elif fixed is not None and isinstance(fmt.grid, Uniform) and fmt.zero is not None and fmt.bits in (8, 16):
        lo, hi = fixed[0], fixed[1] - (fixed[1] - fixed[0]) * 2.0**-fmt.bits
    else:
        # A grid that is no run of integers is searched as the symmetric integers of as many bits.
        low, high = fmt.extremes if isinstance(fmt.grid, Uniform) else (-(2 ** (fmt.bits - 1) - 1), 2 ** (fmt.bits - 1) - 1)
        lo, hi = find_range(seen, method, int(low), int(high))
    try:
        return Activation(fmt, "static", fmt.store(fmt.from_range(torch.full((1, 1), lo), torch.full((1, 1), hi))))
    except FormatError as err:
        raise FormatError(f"site {name!r}, range {lo:.3g} to {hi:.3g}: {err}") from err
