"""Formats that differ from weight to weight within one size: bytes go where they save most of the loss. What each number counts is
given; which codes a format gets, and whether the mix stays, is decided elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import FormatError
from ..formats.format import Format
from ..formats.grid import Codebook, Uniform
from ..formats.qtensor import QTensor, to_matrix
from ..plan import Plan, size_of
from ..solvers import rtn
from .networks import Network, Target
from .sizes import FAMILIES, decided, integer, matrix, sampled_rows

#: Bits of the formats that are tried, from the whole bits of the size.
REACH = (-1, 0, 1, 2)

#: What is tried beside the format that all weights have: one scale a row, of tables where nothing forbids them.
ROWS = ("cb{k}@tensor/channel*int8",)
ROWS_WHOLE = ("int{b}/channel", "cb{k}/tensor")

#: Squared error of the best levels for normal numbers at 1 to 5 bits, free and evenly spaced (Max 1960, "Quantizing for minimum
#: distortion"); each bit beyond is a quarter of it. How a weight's error falls with the bits is told by these, so one is measured.
FREE = (0.3634, 0.1175, 0.03454, 0.009497, 0.002499)
EVEN = (0.3634, 0.1188, 0.03744, 0.01154, 0.00349)


@dataclass(frozen=True)
class Option:
    """A format for one weight: its bytes, and the loss that it is expected to cost."""

    format: Format
    nbytes: int
    loss: float


def mixed(
    asked: Plan, plan: Plan, tensors: Mapping[str, QTensor], network: Network, moments: Mapping[str, Tensor]
) -> dict[str, Format]:
    """Name of a weight -> its format, for the sizes of the plan that was ``asked``; ``plan`` has one format for each of them.

    ``moments`` (groups, columns, columns) are Hessians of the end loss: rounding that is blind to them costs sum_ij h_jj d_ij^2
    (Dong et al. 2019, "HAWQ", with the diagonal in place of the top eigenvalue). A weight keeps its format, and is not named, where
    it has none, or scales wider than the plan's, or no other format holds it.
    """
    formats: dict[str, Format] = {}
    for i, rule in enumerate(asked.rules):
        bits = size_of(rule.weight)
        if bits is None:
            continue
        targets, whole = decided(asked, i, network)
        targets = [target for target in targets if target.name in tensors]
        have = Format.parse(str(plan.rules[i].weight))
        families = _families(have, int(bits), whole)
        free = {
            target.name: options
            for target in targets
            if target.name in moments and tensors[target.name].format == have
            if (options := _options(target, families, moments[target.name], len(targets)))
        }
        room = bits / 8 * sum(target.weight.numel() for target in targets)
        room -= sum(tensors[target.name].nbytes for target in targets if target.name not in free)
        if chosen := allocate(list(free.values()), room):
            formats |= dict(zip(free, chosen, strict=True))
    return formats


def _families(have: Format, bits: int, whole: bool) -> list[dict[int, Format]]:
    """The family of the format that there is, and those of one scale a row: for each some bits fewer and more, by bits."""
    every = [text.replace("{share}", share) for text, shares, _ in FAMILIES for share in shares]
    texts = [text for text in every if have in _family(text, range(1, 17)).values()]
    found = [_family(text, [bits + more for more in REACH]) for text in dict.fromkeys([*texts, *(ROWS_WHOLE if whole else ROWS)])]
    return [{b: fmt for b, fmt in family.items() if not whole or integer(fmt)} for family in found]


def _family(text: str, bits: Iterable[int]) -> dict[int, Format]:
    found = {}
    for b in bits:
        try:
            found[b] = Format.parse(text.format(b=b, k=2**b))
        except FormatError:  # there is no int0, no fp5
            continue
    return found


def _options(target: Target, families: Sequence[Mapping[int, Format]], moment: Tensor, count: int) -> list[Option]:
    """The loss of each format: of one of a family as measured on some rows, of its others by the law where there is one; nothing
    where no loss depends on the weight, and without what cannot hold the rows."""
    w = to_matrix(target.weight.detach(), target.axis)
    rows = sampled_rows(w, count)
    h = moment.diagonal(dim1=1, dim2=2).repeat_interleave(len(w) // len(moment), 0)[rows]
    if not h.any():
        return []

    def measured(fmt: Format) -> float | None:
        try:
            d = rtn(w[rows], fmt, (h / h.mean()).float()).matrix_values() - w[rows].float()
        except FormatError:
            return None
        return float((h * d.double().square()).sum()) * len(w) / len(rows)

    losses: dict[Format, float | None] = {}
    for family in filter(None, families):
        middle = sorted(family)[(len(family) - 1) // 2]
        if not isinstance(family[middle].grid, Codebook | Uniform):  # a float's range takes bits of its own: no law for it
            losses |= {fmt: measured(fmt) for fmt in family.values()}
        elif (base := measured(family[middle])) is not None:
            losses |= {fmt: base * _law(fmt, bits) / _law(fmt, middle) for bits, fmt in family.items()}
    return [Option(fmt, fmt.nbytes(matrix(target)), loss) for fmt, loss in losses.items() if loss is not None]


def _law(fmt: Format, bits: int) -> float:
    """The share of the squares of normal numbers that so many bits lose."""
    law = FREE if isinstance(fmt.grid, Codebook) else EVEN
    return law[min(bits, len(law)) - 1] * 4.0 ** -max(0, bits - len(law))


def allocate(weights: Sequence[Sequence[Option]], room: float) -> list[Format]:
    """One format for each weight, of at most ``room`` bytes together, so that the sum of the losses is small: from the smallest on,
    the next step on the lower convex hull that saves most per byte (Shoham and Gersho 1988); nothing where even the smallest are
    too large.

    >>> a, b = Format.parse("int2"), Format.parse("int4")
    >>> some = [Option(a, 10, 9.0), Option(b, 20, 1.0)], [Option(a, 10, 4.0), Option(b, 20, 1.0)]
    >>> [str(fmt) for fmt in allocate(some, 35)]
    ['int4/channel*fp16', 'int2/channel*fp16']
    """
    hulls = [_hull(options) for options in weights]
    if not all(hulls):
        return []
    at, used = [0] * len(hulls), sum(hull[0].nbytes for hull in hulls)
    if used > room:
        return []
    steps = [(_saved(hull[i], hull[i + 1]), i, n) for n, hull in enumerate(hulls) for i in range(len(hull) - 1)]
    for _, i, n in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        more = hulls[n][i + 1].nbytes - hulls[n][i].nbytes
        if at[n] == i and used + more <= room:
            at[n], used = i + 1, used + more
    return [hull[i].format for hull, i in zip(hulls, at, strict=True)]


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bytes, by rising bytes and falling loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda one: (one.nbytes, one.loss, str(one.format))):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _saved(hull[-2], hull[-1]) <= _saved(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _saved(a: Option, b: Option) -> float:
    """Loss per byte more."""
    return (a.loss - b.loss) / (b.nbytes - a.nbytes)


def counted(formats: Iterable[Format]) -> str:
    """2 x int4/channel*fp16 and 1 x int8/channel*fp16"""
    return " and ".join(f"{count} x {fmt}" for fmt, count in sorted(Counter(map(str, formats)).items()))
