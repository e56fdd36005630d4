"""The best format within a size: "4.25 bits" in a plan becomes the format that loses least of the weights it is for, measured on
them. One format for all layers that a rule decides; those that differ from layer to layer are in `mixed`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..data import Batch
from ..errors import FormatError, PlanError
from ..formats.format import Format
from ..formats.grid import Codebook, Uniform
from ..formats.qtensor import QTensor, to_matrix
from ..network.sweep import MATRIX, columns
from ..network.walk import member
from ..network.watch import watching
from ..plan import FLOAT, Choice, Plan, Rule, size_of
from ..qmodel import Note
from ..solvers import rtn
from .checks import check_finite
from .networks import GraphNetwork, Network, Target, some

#: Numbers that formats are tried on, of all weights and of one of few or of many: whole rows, evenly spaced.
SAMPLE, MOST, LEAST = 1 << 18, 1 << 14, 1 << 12

#: Families of formats: a text with {share}, and {b} bits or a table of {k}; who may share a scale, from all to few; the largest b.
FAMILIES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("int{b}/{share}", ("channel", "g128", "g64", "g32", "g16"), 16),
    ("int{b}/{share}*int8/g16*fp16", ("g64", "g32", "g16"), 8),
    ("uint{b}/{share}", ("channel", "g128", "g64", "g32", "g16"), 16),
    ("uint{b}/{share}*uint6/g8*fp16-uint6/g8*fp16", ("g64", "g32", "g16"), 8),
    ("cb{k}/{share}", ("tensor", "channel"), 8),
    ("cb{k}@tensor/{share}*int8", ("channel", "g128", "g64", "g32", "g16"), 8),
    ("fp{b}/{share}*e8m0", ("g32",), 8),
    ("fp{b}/{share}*fp8/tensor*fp32", ("g16",), 8),
    ("nf{b}/{share}", ("channel", "g128", "g64", "g32"), 4),
    ("fp16", ("",), 1),
    ("fp32", ("",), 1),
)


@dataclass(frozen=True)
class Offer:
    """A format, the bits per number that it takes for some weights, every byte counted, and the share of them that it loses: the
    mean over weights of sum h (w - q)^2 / sum h w^2, 0 being exact."""

    format: Format
    bits: float
    error: float = 0.0

    def __str__(self) -> str:
        return f"{self.format} {self.bits:.4g} bits {self.error:.3g}"


def fitted(plan: Plan, network: Network, notes: list[Note], items: Sequence[Batch] = (),
           read: Callable[[Target], Target] = lambda target: target) -> Plan:  # fmt: skip
    """``plan`` with a format in place of each size, such as "4.25 bits": of those that take no more for all weights that the rule
    decides, the one that loses least of them, which ``notes`` tell with what lost. ``read`` gives the numbers of a weight that has
    none here; inputs over ``items`` say what each number counts. Raises `PlanError` where no format is small enough, with the
    smallest."""
    weigh: dict[str, Tensor] | None = None
    for i, rule in enumerate(plan.rules):
        bits = size_of(rule.weight)
        if bits is None or not network.targets:
            continue
        targets, whole = decided(plan, i, network)
        weigh = mean_squares(network, items) if weigh is None and items else weigh
        offers = best(targets, bits, notes, weigh or {}, read, whole) if targets else []
        text = str(offers[0].format) if offers else FLOAT
        plan = Plan((*plan.rules[:i], _with(rule, text), *plan.rules[i + 1 :]))
        if offers:
            first, *others = offers
            how = "weighted by the inputs' mean squares" if weigh else "all numbers alike"
            beside = f"; beside it {', '.join(map(str, others))}" if others else "; nothing else fits"
            alone = ", of those that integers compute with" if whole else ""
            notes.append(Note("model", f"{rule.pattern} within {bits:g} bits: {first} of error, the least{alone} ({how}){beside}"))
    return plan


def overdrawn(plan: Plan, chosen: Plan, network: Network, tensors: Mapping[str, QTensor]) -> list[Note]:
    """What is said where ``tensors`` take more than a size of ``plan`` allows: where scales had to be stored wider than the format
    that was ``chosen`` says."""
    notes = []
    for i, rule in enumerate(plan.rules):
        bits = size_of(rule.weight)
        if bits is None or not network.targets:
            continue
        found = {t.name: tensors[t.name] for t in decided(plan, i, network)[0] if t.name in tensors}
        count = sum(torch.Size(q.shape).numel() for q in found.values())
        size = 8 * sum(q.nbytes for q in found.values())
        if size > bits * count:
            wide = [name for name, q in found.items() if str(q.format) != chosen.rules[i].weight]
            told = f"{rule.pattern} takes {size / count:.5g} bits, more than the {bits:g} asked for"
            notes.append(Note("model", f"{told}: scales are wider in {some(wide)}", fallback=True))
    return notes


def decided(plan: Plan, at: int, network: Network) -> tuple[list[Target], bool]:
    """The weights that rule ``at`` decides, and whether activations are codes whose parameters are known before they are."""

    def table(text: str) -> dict[str, Choice | None]:
        others = (rule if size_of(rule.weight) is None else _with(rule, FLOAT) for rule in plan.rules)
        return network.resolve(Plan(tuple(_with(rule, text) if i == at else rule for i, rule in enumerate(others))))

    without, within = table(FLOAT), table("int8")
    static = any(c is not None and c.when != "dynamic" for name, c in without.items() if name in network.sites)
    names = {name for name in within if within[name] != without[name]}
    return [target for target in network.targets if target.name in names and target.weight.numel()], static


def _with(rule: Rule, weight: str) -> Rule:
    return msgspec.structs.replace(rule, weight=weight)


def best(targets: Sequence[Target], bits: float, notes: list[Note], weigh: Mapping[str, Tensor],
         read: Callable[[Target], Target] = lambda target: target, whole: bool = False) -> list[Offer]:  # fmt: skip
    """The formats of at most ``bits`` for all of ``targets``, by rising error; see `fitted`."""
    offers = candidates(Counter(matrix(target) for target in targets), bits, whole)
    total = dict.fromkeys(offers, 0.0)
    for target in targets:
        weight = read(target).weight.detach()
        check_finite(target.name, weight)
        w = to_matrix(weight, target.axis)
        rows = sampled_rows(w, len(targets))
        h = weigh[target.name][rows] if target.name in weigh else None
        for offer in list(total):
            try:
                total[offer] += lost_share(w[rows].float(), rtn(w[rows], offer.format, h), h)
            except FormatError as err:
                del total[offer]
                if not total:
                    raise FormatError(f"{target.name}, shape {list(target.weight.shape)}: {err}") from err
                notes.append(Note(target.name, f"{offer.format} was not tried further: {err}"))
    made = [Offer(offer.format, offer.bits, error / len(targets)) for offer, error in total.items()]
    return sorted(made, key=lambda offer: (offer.error, offer.bits, str(offer.format)))


def candidates(shapes: Mapping[tuple[int, int], int], bits: float, whole: bool = False) -> list[Offer]:
    """Formats whose size for matrices of ``shapes``, each so many times, is at most ``bits`` per number: of every family the most
    bits for each way to share a scale, where two have the same bits the one whose scales fewer share, and none of two bits less
    than another. With ``whole`` those that `integer.lower` takes. Raises `PlanError`, with the smallest, where there is none.

    >>> [str(offer.format) for offer in candidates({(64, 64): 3}, 2.5)][:3]
    ['int2/g32*fp16', 'int1/g16*fp16', 'int2/g32*int8/g16*fp16']
    """
    count = sum(rows * cols * times for (rows, cols), times in shapes.items())
    chosen: list[Offer] = []
    least: Offer | None = None
    for text, shares, most in FAMILIES:
        kept: dict[int, Offer] = {}
        for share in shares:
            for b in range(most, 0, -1):
                try:
                    fmt = Format.parse(text.format(b=b, k=2**b, share=share))
                except FormatError:  # there is no fp5
                    continue
                if whole and not integer(fmt):
                    continue
                offer = Offer(fmt, 8 * sum(fmt.nbytes(shape) * times for shape, times in shapes.items()) / count)
                least = offer if least is None or offer.bits < least.bits else least
                if offer.bits <= bits:
                    kept[b] = offer
                    break
        chosen += kept.values()
    if not chosen:
        assert least is not None
        raise PlanError(f"{bits:g} bits are too few: the smallest format for these weights is {least.format}, which takes "
                        f"{least.bits:.5g} with its scales and tables")  # fmt: skip
    top = max(offer.format.bits for offer in chosen)
    return [offer for offer in chosen if offer.format.bits >= top - 1]  # two bits fewer lose 16 times as much


def integer(fmt: Format) -> bool:
    """Whether integer arithmetic computes with weights of this format (see `integer.lower`)."""
    alone = fmt.share.cols == 0 and fmt.share.rows <= 1 and fmt.zero is None and fmt.min is None
    return alone and (isinstance(fmt.grid, Codebook) or (isinstance(fmt.grid, Uniform) and 2 <= fmt.bits <= 8))


def sampled_rows(w: Tensor, count: int) -> Tensor:
    """Rows on which formats are tried for one of ``count`` weights."""
    numbers = min(MOST, max(LEAST, SAMPLE // count))
    return torch.arange(0, len(w), -(-len(w) // max(1, numbers // w.shape[1])))


def matrix(target: Target) -> tuple[int, int]:
    """Shape of a weight's (rows, columns) view."""
    shape = target.weight.shape
    rows = shape[target.axis] if len(shape) > 1 else 1
    return rows, shape.numel() // rows


def lost_share(w: Tensor, q: QTensor, h: Tensor | None) -> float:
    """sum h (w - q)^2 / sum h w^2 of a matrix ``w`` (rows, columns); ``h`` broadcasts, without it all numbers count alike."""
    h = torch.ones(()) if h is None else h.float()
    power = float((h * w.square()).double().sum())
    return float((h * (q.matrix_values() - w).square()).double().sum()) / power if power else 0.0


def mean_squares(network: Network, items: Iterable[Batch]) -> dict[str, Tensor]:
    """Name of a weight -> mean square over ``items`` of the input that each of its numbers is multiplied by, (rows, columns); those
    of convolutions and linear layers that inputs other than 0 reached."""
    readers = _readers(network)
    total: dict[str, Tensor] = {}
    seen: Counter[str] = Counter()
    rows: dict[str, int] = {}

    def note(site: str, value: Tensor) -> None:
        for name, op, attrs, shape in readers.get(site, ()):
            x = columns(op, attrs, value.detach(), shape).double()
            total[name] = total.get(name, 0.0) + x.square().sum(1)
            seen[name] += x.shape[1]
            rows[name] = shape[0]

    with watching(network.module, note):
        for batch in items:
            network.module(*batch.args, **batch.named)
    means = {name: (moment / seen[name]).float() for name, moment in total.items() if bool((moment > 0).any())}
    return {name: mean.repeat_interleave(rows[name] // len(mean), 0) for name, mean in means.items()}


def _readers(network: Network) -> dict[str, list[tuple[str, str, Mapping[str, Any], torch.Size]]]:
    """Site -> (weight, operation, its attributes, the weight's shape) of layers that take it and lay it out as a matrix."""
    every: list[tuple[str, str, str, Mapping[str, Any], torch.Size]]
    if isinstance(network, GraphNetwork):
        constants = network.graph.constants
        every = [(node.inputs[0], name, node.op, node.attrs, constants[name].shape) for name, node in network.found.items()]
    else:
        every = [
            (member(name, "input"), member(name, "weight"), one.op, one.attrs, one.weight.shape)
            for name, one in network.found.items()
        ]
    readers: dict[str, list[tuple[str, str, Mapping[str, Any], torch.Size]]] = {}
    for site, name, op, attrs, shape in every:
        if op in MATRIX:
            readers.setdefault(site, []).append((name, op, attrs, shape))
    return readers
