"""Clues: what can be seen in a quantized model and its values without trying anything, each with the cure that it suggests.

The order of `CLUES` is that of how much a clue explains: where two cures are worth the same, the earlier is told first. None is
believed before its cure was measured, so a clue may be wrong; it must not be blind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import PlanError
from ..formats.qtensor import from_matrix, to_matrix
from ..graph import GraphModule, Node
from ..network.layer import WEIGHTED, Activation
from ..network.sites import edges, find_sites
from ..network.walk import leaves
from ..qmodel import QModel
from ..quantize.networks import GraphNetwork
from ..ranges import static_activation
from ..solvers import rtn
from ..stats import Stats
from ..transforms.equalize import equalize
from .edits import remade, with_format, with_ranges, with_tensors, with_weight
from .evidence import Evidence, Seen
from .loss import bare
from .machine import lost_in_pairs, meetings, overflowing, pairing

#: Parts of a concatenation are unlike, and channels stand out, from this ratio of magnitudes on.
UNLIKE = 8.0

#: A range is wrong where another of the same format has so many times less squared error.
WRONG = 4.0

#: Errors below this share of a value's own energy are no clue.
SMALL = 1e-4

#: Squared error of a weight or value as a share of its energy, from which its bits may be too few.
COARSE = 0.02

#: 16 bits, as the integer form of a network takes them; 8 for weights.
FINE, BYTE = "int16s", "int8"


@dataclass(frozen=True, eq=False)
class Suspect:
    """A layer, what may be wrong with it, what would help, and the model that this makes."""

    layer: str
    cause: str
    cure: str
    make: Callable[[], QModel]
    #: What the cure is measured against, if not ``q`` as it is.
    rival: Callable[[], QModel] | None = None


Clue = Callable[[Evidence], Iterator[Suspect]]


# -- the data ---------------------------------------------------------------------------------------------------------


def bad_batch(e: Evidence) -> Iterator[Suspect]:
    """Batches were left out: ranges without them."""
    if e.bad and e.inputs:
        which = ", ".join(map(str, e.bad))
        told = f"calibrate without batch {which}, whose largest input is far above the others'"
        yield Suspect(e.inputs[0], "bad calibration batch", told, partial(with_ranges, e.q, _statistics(e), e.method, e.fixed))


def other_inputs(e: Evidence) -> Iterator[Suspect]:
    """The range of an input does not fit the data."""
    for name in [] if e.bad else e.inputs:
        now, best = _errors(e, name)
        if now > WRONG * best:
            low, high = _ends(e.static[name])
            seen = e.stats[name]
            said = f"its range is {low:.3g} to {high:.3g}, the data's {seen.min:.3g} to {seen.max:.3g}"
            told = f"prepare both alike and calibrate again: {said}"
            yield Suspect(name, "wrong preprocessing", told, partial(with_ranges, e.q, _statistics(e), e.method, e.fixed))


# -- the structure ----------------------------------------------------------------------------------------------------


def unfolded(e: Evidence) -> Iterator[Suspect]:
    """A batch norm that stands behind a layer which could take it up."""
    if e.graph is not None:
        makers = e.graph.producers()
        found = [node for node in e.graph.nodes if node.op == "batch_norm"
                 and (maker := makers.get(node.inputs[0])) is not None and maker.op in WEIGHTED]  # fmt: skip
    else:
        found = []
    if found:
        worst = max(found, key=lambda node: _unevenness(e, node))
        told = f"fold it into {worst.inputs[0]}" + (f", and {len(found) - 1} others" if found[1:] else "")
        yield Suspect(worst.name, "batch norm not folded", told, partial(_plain, e))


def broken_ties(e: Evidence) -> Iterator[Suspect]:
    """Two names of one float tensor that are two tensors here."""
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, weight in _named_weights(e):
        first = seen.setdefault((weight.data_ptr(), weight.shape), name)
        if first == name or first not in e.q.tensors or name not in e.q.tensors:
            continue
        a, b = e.q.tensors[first], e.q.tensors[name]
        if a.shape != b.shape or a is b or torch.equal(a.dequantize(), b.dequantize()):
            continue
        apart = [_loss_of(q.dequantize(), weight.detach()) for q in (a, b)]
        wrong, right = (name, first) if apart[1] >= apart[0] else (first, name)
        yield Suspect(_layer(wrong), "broken tie", f"give it the tensor of {right} again: in the float model the two are one",
                      partial(with_tensors, e.q, {wrong: replace(e.q.tensors[right], axis=e.q.tensors[wrong].axis)}))  # fmt: skip


def transformed(e: Evidence) -> Iterator[Suspect]:
    """Rows of weights that are multiples of the float model's, by factors that differ."""
    factors = {}
    for name, weight in e.floats.items():
        real, stored = (to_matrix(w, e.q.tensors[name].axis).double() for w in (weight, e.q.tensors[name].dequantize()))
        dot, own, other = (real * stored).sum(1), real.square().sum(1), stored.square().sum(1)
        alike = (dot > 0.9 * (own * other).sqrt()) & (own > 0) & (other > 0)
        if int(alike.sum()) >= 2 and 2 * int(alike.sum()) >= len(alike):
            logs = (dot[alike] / own[alike]).log2()
            factors[name] = float(logs.max() - logs.min())
    worst = max(factors.values(), default=0.0)
    if worst > 1.0:
        name = next(name for name, spread in factors.items() if spread >= 0.8 * worst)
        told = f"leave its channels as they were: they are scaled by factors {2**worst:.3g} apart"
        yield Suspect(_layer(name), "harmful transform", told, partial(_plain, e), rival=partial(_again, e))


# -- the target -------------------------------------------------------------------------------------------------------


def overflow(e: Evidence) -> Iterator[Suspect]:
    """Biases beyond 32 bits at the scale of their sums: a wider step for those weights, which are tiny."""
    for one in meetings(e.q):
        over = overflowing(e.q, one)
        if over is not None and bool(over.any()):
            channels = over.nonzero().flatten().tolist()
            told = f"a larger step for output {_some(channels)}: at the scale of its weights the bias has more than 32 bits"
            yield Suspect(one.node.name, "bias overflow", told, partial(_coarser, e, one.node, over))


def pairs(e: Evidence) -> Iterator[Suspect]:
    """Sums of two products that leave 16 bits on the data, where the target has no VNNI."""
    if e.vnni:
        return
    lost: dict[str, float] = {}
    found = {one.node.name: one for one in meetings(e.q) if pairing(one)}
    module = e.q.module
    for node, env in module.steps(*bare(e.learn[0]).args, **bare(e.learn[0]).named):  # type: ignore[operator]
        if node.name in found:
            with torch.no_grad():
                lost[node.name] = float((lost_in_pairs(found[node.name], env[node.inputs[0]]) != 0).double().mean())
    for name, share in lost.items():
        weight = found[name].node.inputs[1]
        if share > 0 and weight in e.floats:
            text = str(e.q.tensors[weight].format).replace("int8", "int7", 1)
            told = f"weights of 7 bits: {share:.2%} of its sums saturate in 16 bits on the way"
            yield Suspect(name, "saturation without VNNI", told, partial(with_weight, e.q, weight, e.floats[weight], text))


# -- sites ------------------------------------------------------------------------------------------------------------


def concatenated(e: Evidence) -> Iterator[Suspect]:
    """Parts of very different size on one scale of few bits."""
    if e.graph is None:
        return
    root = find_sites(e.graph).root
    for node in e.graph.nodes:
        site = root.get(node.name, "")
        if node.op != "concat" or site not in e.static or e.static[site].format.bits > 8:
            continue
        reach = {name: _usual(e.own[name]) for name in edges(node) if name in e.own}
        if len(reach) > 1 and max(reach.values()) > UNLIKE * max(min(reach.values()), 1e-30):
            most, least = max(reach, key=lambda n: reach[n]), min(reach, key=lambda n: reach[n])
            said = f"{most} reaches {reach[most]:.3g}, {least} {reach[least]:.3g}"
            cause = "one scale over concatenated parts"
            yield Suspect(node.name, cause, f"equalize the channels, so that the parts are alike ({said})", partial(_equalized, e))
            yield Suspect(node.name, cause, f"give each part back by itself, or take 16 bits here ({said}; rule {site} = {FINE})",
                          partial(with_format, e.q, site, e.stats[site], FINE))  # fmt: skip


def wrong_range(e: Evidence) -> Iterator[Suspect]:
    """A site whose stored range costs far more than another of the same format would."""
    makers = e.graph.producers() if e.graph else {}
    for site, activation in e.static.items():
        now, best = _errors(e, site)
        if now <= WRONG * best or now <= SMALL * _energy(e, site):
            continue
        low, high = _ends(activation)
        seen = e.stats[site]
        step = (high - low) / 2**activation.format.bits
        clipped = seen.max > high + step or seen.min < low - step
        maker = makers.get(site)
        what = {"softmax": "softmax", "gelu": "GELU"}.get(maker.op if maker else "", "values")
        cause = f"clipped {what}" if clipped else "range too wide"
        said = f"{low:.3g} to {high:.3g}, where values reach from {seen.min:.3g} to {seen.max:.3g}"
        yield Suspect(site, cause, f"find its range anew, which is {said}", partial(_best_range, e, site))


def outlier_site(e: Evidence) -> Iterator[Suspect]:
    """One channel of a value that is far larger than the others: equalized, or 16 bits."""
    if e.graph is None:
        return
    root = find_sites(e.graph).root
    told: set[str] = set()
    for name, seen in e.own.items():
        site = root.get(name, "")
        if site not in e.static or site in told or e.static[site].format.bits > 8 or len(seen.low) < 4 or site in e.graph.constants:
            continue
        reach = seen.reach
        middle = float(reach.median())
        if middle > 0 and float(reach.max()) > UNLIKE * middle:
            told.add(site)
            said = f"channel {int(reach.argmax())} reaches {float(reach.max()):.3g}, others {middle:.3g}"
            yield Suspect(site, "outlier channel", f"equalize the channels ({said})", partial(_equalized, e))
            yield Suspect(site, "outlier channel", f"take 16 bits here ({said}; rule {site} = {FINE})",
                          partial(with_format, e.q, site, e.stats[site], FINE))  # fmt: skip


# -- weights ----------------------------------------------------------------------------------------------------------


def dead(e: Evidence) -> Iterator[Suspect]:
    """Outputs that never change, over weights that are larger than all others and so decide a scale that others share."""
    if e.graph is None:
        return
    for node in e.graph.nodes:
        weight = e.floats.get(node.inputs[1]) if node.op in ("conv", "linear") else None
        seen = e.real.get(node.name)
        if weight is None or seen is None or len(seen.low) != len(weight) or node.attrs.get("act") not in (None, "relu", "relu6"):
            continue
        still = (seen.high - seen.low) <= 1e-6 * (1 + seen.reach)
        size = to_matrix(weight, 0).abs().amax(1)
        hogging = still & (size > UNLIKE / 2 * size[~still].max()) if bool((~still).any()) and bool(still.any()) else torch.zeros(0)
        if bool(hogging.any()):
            which = _some(hogging.nonzero().flatten().tolist())
            told = f"output {which} never changes: set its weights to zero and its bias to what it gives"
            yield Suspect(node.name, "dead channel", told, partial(_without, e, node, hogging, seen.high))


def outlier_weight(e: Evidence) -> Iterator[Suspect]:
    """A row of a weight far larger than the others that share its scale."""
    for name, weight in e.floats.items():
        q = e.q.tensors[name]
        rows = q.format.share.block(q.matrix)[0]
        size = to_matrix(weight, q.axis).abs().amax(1)
        if rows < 2 or len(size) < 2 or float(size.max()) <= UNLIKE * max(float(size.median()), 1e-30):
            continue
        row = int(size.argmax())
        said = f"output {row} has weights up to {float(size.max()):.3g}, others {float(size.median()):.3g}"
        text = str(q.format).replace("/tensor*", "/channel*", 1)
        if text != str(q.format):
            yield Suspect(_layer(name), "outlier channel", f"a scale for each output, {text} ({said})",
                          partial(with_weight, e.q, name, weight, text))  # fmt: skip
        yield Suspect(_layer(name), "outlier channel", f"equalize the channels ({said})", partial(_equalized, e))


def solved_badly(e: Evidence) -> Iterator[Suspect]:
    """A weight that lies much further from the float one than rounding to nearest would leave it."""
    words = " ".join([str(e.q.provenance.get("solver", "rtn")), *(n.text for n in e.q.notes if " kept" in n.text)])
    solver = any(word in words for word in ("gptq", "GPTQ", "descent", "alternate", "reconstruction"))
    for name, weight in e.floats.items():
        q = e.q.tensors[name]
        text = str(q.format)
        near = rtn(weight, q.format, axis=q.axis).dequantize() if q.format.table is None else None
        if near is None:
            continue
        now, best = _loss_of(q.dequantize(), weight), _loss_of(near, weight)
        if now > 2 * best and now > SMALL:
            told = f"its squared error is {now / max(best, 1e-30):.3g} times that of rounding to nearest: round it so"
            yield Suspect(
                _layer(name), "harmful solver" if solver else "changed weight", told, partial(with_weight, e.q, name, weight, text)
            )


def moved_bias(e: Evidence) -> Iterator[Suspect]:
    """A bias moved by more than a tenth of what its layer's outputs span."""
    if e.graph is None or not isinstance(e.network, GraphNetwork):
        return
    for node in e.graph.nodes:
        name = (*node.inputs, "", "")[2]
        if node.op not in WEIGHTED or name not in e.q.rest or name not in e.network.graph.constants:
            continue
        real, now, seen = e.network.graph.constants[name], e.q.rest[name], e.own.get(node.name)
        if real.shape == now.shape and seen is not None and float((now - real).abs().max()) > 0.1 * float(seen.sample.std()):
            yield Suspect(
                node.name, "harmful bias correction", "take the float model's bias", partial(with_tensors, e.q, None, {name: real})
            )


def too_few_bits(e: Evidence) -> Iterator[Suspect]:
    """The last resort: what is coarse, in 8 bits."""
    for name, weight in e.floats.items():
        q = e.q.tensors[name]
        share = _loss_of(q.dequantize(), weight)
        if q.format.bits < 8 and share > COARSE:
            told = f"8 bits: at {q.format} its weights lose {share:.1%} of their energy (rule {name} = {BYTE})"
            yield Suspect(_layer(name), "too few bits", told, partial(with_weight, e.q, name, weight, "int8/channel*fp16"))
    for site, activation in e.static.items():
        if activation.format.bits < 8 and _errors(e, site)[0] > COARSE * _energy(e, site):
            yield Suspect(
                site, "too few bits", f"8 bits here (rule {site} = {BYTE})", partial(with_format, e.q, site, e.stats[site], BYTE)
            )


#: In the order in which they are told.
CLUES: Sequence[Clue] = (
    bad_batch, unfolded, broken_ties, transformed, overflow, pairs, concatenated, dead, wrong_range, other_inputs, outlier_weight,
    outlier_site, solved_badly, moved_bias, too_few_bits,
)  # fmt: skip


# -- measures ---------------------------------------------------------------------------------------------------------


def _statistics(e: Evidence) -> dict[str, Stats]:
    return {site: e.stats[site] for site in e.static}


def _errors(e: Evidence, site: str) -> tuple[float, float]:
    """Mean squared error at a site of its stored range, and of the best range for its format."""
    sample = _sample(e, site)
    activation = e.static[site]
    ranges = [static_activation(site, activation.format, e.stats[site], how, e.fixed.get(site)) for how in ("mse", "minmax")]
    now, *others = (float((one.quantize(sample) - sample).square().mean()) for one in (activation, *ranges))
    return now, min(others)


def _sample(e: Evidence, site: str) -> Tensor:
    """Numbers of a site, with its extremes."""
    names = [site] if e.graph is None else find_sites(e.graph).origin.get(site, [site])
    parts = [e.own[name].sample for name in names if name in e.own]
    return torch.cat([*parts, torch.tensor([e.stats[site].min, e.stats[site].max])])


def _energy(e: Evidence, site: str) -> float:
    return float(_sample(e, site).var())


def _ends(activation: Activation) -> tuple[float, float]:
    """Lowest and highest number of a site's grid."""
    huge = torch.tensor([-1e30, 1e30])
    low, high = activation.quantize(huge).tolist()
    return low, high


def _usual(seen: Seen) -> float:
    """The magnitude below which nearly all of a value lies."""
    return float(seen.sample.abs().quantile(0.99))


def _loss_of(stored: Tensor, real: Tensor) -> float:
    """Squared error as a share of the energy."""
    return float((stored - real).double().square().sum() / real.double().square().sum().clamp(min=1e-30))


def _unevenness(e: Evidence, node: Node) -> float:
    seen = e.own.get(node.inputs[0])
    return float((seen.reach.max() / seen.reach.median().clamp(min=1e-30)).log2()) if seen is not None else 0.0


def _named_weights(e: Evidence) -> Iterator[tuple[str, Tensor]]:
    """Weights of the float model under every name that they have."""
    if isinstance(e.model, GraphModule):
        yield from e.model.graph.constants.items()
    else:
        yield from ((f"{name}.weight", one.weight) for name, one in leaves(e.model).items())


def _layer(weight: str) -> str:
    return weight.rpartition(".")[0] or weight


def _some(channels: Sequence[int]) -> str:
    return ", ".join(map(str, channels[:4])) + (f" and {len(channels) - 4} more" if len(channels) > 4 else "")


# -- cures ------------------------------------------------------------------------------------------------------------


def _plain(e: Evidence) -> QModel:
    """The float model quantized anew, as it is."""
    return e.once("plain", lambda: remade(e.q, e.model, e.learn))


def _again(e: Evidence) -> QModel:
    """What ``q`` holds, its weights as they are stored, quantized anew by the same plan."""
    graph = e.graph
    if graph is None:
        raise PlanError("only a graph can be made again from what is stored")
    stored = replace(graph, constants={**e.q.rest, **{name: q.dequantize() for name, q in e.q.tensors.items()}})
    return e.once("again", lambda: remade(e.q, GraphModule(stored).eval(), e.learn))


def _equalized(e: Evidence) -> QModel:
    """The float network equalized, then quantized anew."""

    def make() -> QModel:
        network = e.network
        if not isinstance(network, GraphNetwork):
            raise PlanError("channels of a network that is no graph are not equalized here")
        graph, _ = equalize(network.graph)
        return remade(e.q, GraphModule(graph).eval(), e.learn)

    return e.once("equalized", make)


def _best_range(e: Evidence, site: str) -> QModel:
    """The better of two ranges at one site, on the sample."""
    sample = _sample(e, site)
    made = [with_ranges(e.q, {site: e.stats[site]}, how, e.fixed) for how in ("mse", "minmax")]
    return min(made, key=lambda q: float((q.activations[site].quantize(sample) - sample).square().mean()))


def _without(e: Evidence, node: Node, which: Tensor, value: Tensor) -> QModel:
    """Some outputs of a layer without weights: their value is their bias."""
    name, bias = node.inputs[1], (*node.inputs, "", "")[2]
    weight = e.floats[name].clone()
    weight[which] = 0
    if bias not in e.q.rest and bool(value[which].any()):
        raise PlanError(f"{node.name} has no bias to take up what its dead outputs give")
    new = with_weight(e.q, name, weight, str(e.q.tensors[name].format))
    return with_tensors(new, None, {bias: torch.where(which, value, e.q.rest[bias])} if bias in e.q.rest else None)


def _coarser(e: Evidence, node: Node, over: Tensor) -> QModel:
    """The weights of some outputs at a step that lets their bias fit: they become the multiples of it that are nearest, mostly
    zero, and an output without weights has the scale of its result."""
    name = node.inputs[1]
    old = e.q.tensors[name]
    matrix = to_matrix(e.floats.get(name, old.dequantize()), old.axis).clone()
    matrix[over] = 0
    return with_weight(e.q, name, from_matrix(matrix, old.shape, old.axis), str(old.format))
