"""The drift bench: ResNet-20 and DS-CNN in int8 on streams whose inputs drift, judged against the float model on the same stream.

    python scripts/drift.py --model ResNet-20 --samples 300
    python scripts/drift.py --model DS-CNN --drift gain --plot drift.svg

A stream is `--samples` scored examples in a fixed random order, one after the other; what drifts does so from `--onset` on.
Columns: static ranges; static ones with each example's mean and deviation put back to calibration's; static ones calibrated on data
that drift likewise; running ranges; dynamic ones at the same sites, each sample by its own ends; dynamic ranges of the inputs of
weighted layers, where all else is float.

Figures over what comes after the onset: KL(float || quantized) in nats, flips, top-1. For running ranges also the mean difference
of KL to dynamic ones at the same sites with its standard error, sample by sample; the share of all numbers that were coded anew,
where dynamic ranges measure every number before they code it; and how many examples pass until the mean KL of 25 stays within 1.5
times what the same examples cost once the ranges have settled (in a second pass), but for chance: two standard errors. Last, CPU
time per sample, given one by one.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import click
import torch
from markupsafe import Markup
from torch import Tensor, nn

import roundel as rd
from roundel.network.running import Tracker, reset, trackers
from roundel.plan import Rule
from roundel.report.svg import WIDTH, Axis, axis, tick_label

#: Examples that a recovery is averaged over, and how far above the final level counts as recovered.
WINDOW, BACK = 25, 1.5

#: Drifts that change no example for good: calibrating on them would be no help.
SAME = ("none", "slow", "burst", "class-skewed")

Drift = Callable[[Tensor, int], Tensor]

#: What running sites have counted, by name.
Counts = dict[str, Tensor]


def _measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", Path(__file__).with_name("measure.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module
    spec.loader.exec_module(module)
    return module


# -- what drifts ------------------------------------------------------------------------------------------------------


def drifts(onset: int, scale: float) -> dict[str, Drift]:
    """Name -> what becomes of stream (N, ...) from sample ``onset`` on; ``scale`` is the deviation of the inputs."""
    noise = torch.Generator().manual_seed(1)

    def after(change: Callable[[Tensor], Tensor]) -> Drift:
        return lambda x, _: torch.cat([x[:onset], change(x[onset:])])

    def slow(x: Tensor, _: int) -> Tensor:
        gain = torch.linspace(1, 3, len(x) - onset).reshape(-1, *[1] * (x.ndim - 1))
        return torch.cat([x[:onset], x[onset:] * gain])

    def burst(x: Tensor, _: int) -> Tensor:
        out = x.clone()
        out[onset : onset + 50] *= 8
        return out

    def sensor(x: Tensor) -> Tensor:
        """Another gain and offset for each channel, or for each coefficient where there is one channel."""
        axis = 1 if x.shape[1] > 1 else 2
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        steps = torch.linspace(-1, 1, x.shape[axis]).reshape(shape)
        return x * (1.5 + 0.5 * steps) + 0.3 * scale * steps

    return {
        "none": lambda x, _: x,
        "gain x3": after(lambda x: x * 3),
        "gain x0.3": after(lambda x: x * 0.3),
        "offset": after(lambda x: x + 1.5 * scale),
        "noise": after(lambda x: x + scale * torch.randn(x.shape, generator=noise)),
        "brightness": after(lambda x: x * 1.5 + 0.5 * scale),
        "contrast": after(lambda x: x.mean([*range(1, x.ndim)], keepdim=True) * 0.7 + x * 0.3),
        "sensor": after(sensor),
        "slow": slow,
        "burst": burst,
        "class-skewed": lambda x, _: x,  # the stream itself is sorted (below)
    }


# -- one stream -------------------------------------------------------------------------------------------------------


def outputs(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Class probabilities of a stream, by batches: a batch is its samples one after the other for all that runs here."""
    with torch.no_grad():
        out = torch.cat([module(part) for part in x.split(50)])
    return out if bool((out >= 0).all() and (out.sum(1) - 1).abs().max() < 0.05) else out.softmax(1)


def seconds(module: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Median of the CPU time per sample, one after the other."""
    found = []
    for sample in x.split(1):
        begun = time.process_time()
        outputs(module, sample)
        found.append(time.process_time() - begun)
    return float(torch.tensor(found).median())


def divergence(real: Tensor, quantized: Tensor) -> Tensor:
    """KL in nats of each sample, floored at 1/512 as `roundel.evaluate` does for probabilities."""
    p, q = (part.double().clamp(min=1 / 512) for part in (real, quantized))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return (p * (p / q).log()).sum(1)


def recovered(kl: Tensor, settled: Tensor) -> int | None:
    """Examples until the mean of the next `WINDOW` no more exceeds `BACK` times what it is when the ranges have settled, by more
    than twice the standard error of the difference."""
    first, second, paired = (part.unfold(0, WINDOW, 1) for part in (kl, settled, kl - settled))
    late = (first.mean(1) > BACK * second.mean(1)) & (paired.mean(1) > 2 * paired.std(1) / WINDOW**0.5)
    after = int(late.nonzero()[-1]) + 1 if late.any() else 0
    return after if after < len(first) else None


def renormalised(module: nn.Module, mean: float, deviation: float) -> Callable[[Tensor], Tensor]:
    """A network whose inputs are first given the mean and deviation of calibration, example by example."""

    def run(x: Tensor) -> Tensor:
        axes = list(range(1, x.ndim))
        own = x.std(axes, keepdim=True).clamp(min=1e-6)
        return module((x - x.mean(axes, keepdim=True)) / own * deviation + mean)

    return run


def ordered(x: Tensor, labels: Tensor, samples: int, skewed: bool) -> tuple[Tensor, Tensor]:
    """``samples`` of the scored examples in a fixed random order, or class by class."""
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:samples]
    pick = pick[labels[pick].argsort(stable=True)] if skewed else pick
    return x[pick], labels[pick]


def with_room(q: rd.QModel, room: float) -> rd.QModel:
    """Running sites with another room, but for inputs, which have none; 1 is dynamic, at the same sites."""
    moving = {name: a.tracker for name, a in q.activations.items() if a.tracker is not None and a.tracker.room > 1}
    changed = {name: replace(q.activations[name], tracker=replace(t, room=room)) for name, t in moving.items()}
    return replace(q, activations={**q.activations, **changed})


def anew(before: Counts, after: Counts) -> float:
    """The share of the numbers of running sites that were coded anew between two readings of their counts."""
    moved = [(after[name] - counts)[[0, 2, 3]].tolist() for name, counts in before.items()]
    return sum(again / samples * numbers for samples, again, numbers in moved) / sum(numbers for *_, numbers in moved)


# -- the plot ---------------------------------------------------------------------------------------------------------


def plot(curves: dict[str, Tensor], title: str) -> str:
    """Running means of KL over the stream, one line per method, on a log axis."""
    means = {name: kl.unfold(0, WINDOW, 1).mean(1).clamp(min=1e-5) for name, kl in curves.items()}
    top, bottom, left, right = 30.0, 300.0, 64.0, WIDTH - 120.0
    y = axis([float(v) for part in means.values() for v in (part.min(), part.max())], bottom, top, log=True)
    x = Axis(0, max(map(len, means.values())), left, right)
    form = '<text x="{:.0f}" y="{:.0f}" font-size="11" text-anchor="{}">{}</text>'
    colours = ["#888", "#c60", "#a3c", "#181", "#27a", "#7bd"]
    parts = [Markup(form).format(left - 6, y(t) + 4, "end", tick_label(t)) for t in y.ticks()]
    for (name, kl), colour in zip(means.items(), colours, strict=False):
        path = "M" + "L".join(f"{x(i):.1f} {y(float(v)):.1f}" for i, v in enumerate(kl))
        parts.append(Markup('<path d="{}" fill="none" stroke="{}"/>').format(path, colour))
        parts.append(Markup(form).format(right + 6, y(float(kl[-1])) + 4, "start", name))
    parts.append(Markup(form).format(left, 16, "start", title))
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} 330">').format(WIDTH)
    return head + Markup("\n").join(parts) + Markup("</svg>\n")


# -- command ----------------------------------------------------------------------------------------------------------


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--model", type=click.Choice(["ResNet-20", "DS-CNN"]), default="ResNet-20", show_default=True)
@click.option("--samples", default=300, show_default=True, help="Examples in a stream.")
@click.option("--onset", default=100, show_default=True, help="The first example that drifts.")
@click.option("--calibrate", "count", default=500, show_default=True, help="Examples to calibrate on.")
@click.option("--drift", "wanted", multiple=True, help="Only these drifts.")
@click.option("--room", default=Tracker.room, show_default=True, help="How much wider a range may be than its sample asks.")
@click.option("--site", "sites", multiple=True, help="Only these run; the others are static.")
@click.option("--plot", "picture", type=click.Path(), help="Write the KL of the last drift as SVG.")
def main(
    model: str, samples: int, onset: int, count: int, wanted: Sequence[str], room: float, sites: Sequence[str], picture: str | None
) -> None:
    torch.set_num_threads(1)
    case = _measure().CASES[model]
    net, calibration, score = case.model().eval(), case.calibrate(), case.score()
    data = [batch.args[0] for batch in calibration][:: max(1, len(calibration) // count)]
    x, labels = torch.cat([b.args[0] for b in score]), torch.cat([b.target for b in score])
    mean, deviation = float(torch.cat(data).mean()), float(torch.cat(data).std())
    static, inputs = (rd.quantize(net, "int8", text, data=data) for text in ("int8", "int8/token:dynamic"))
    runs = [Rule(name, activation="int8:running") for name in sites or ["*"]]
    running = with_room(rd.quantize(net, plan=rd.Plan((Rule("*", "int8", "int8"), *runs)), data=data), room)
    whole, same_sites = torch.cat(data), with_room(running, 1.0)
    click.echo(f"`python scripts/drift.py {' '.join(sys.argv[1:])}`\n")
    names = ("static", "re-normalised", "recalibrated", "running", "dynamic", "dynamic inputs")
    click.echo("| drift | float top-1 | " + " | ".join(names) + " | running - dynamic | coded anew | recovery |")
    click.echo("| --- " * (len(names) + 5) + "|")
    for drift, change in ((name, change) for name, change in drifts(onset, deviation).items() if not wanted or name in wanted):
        stream, truth = ordered(x, labels, samples, drift == "class-skewed")
        stream = change(stream, onset)
        real = outputs(net, stream)
        again = static if drift in SAME else rd.quantize(net, "int8", "int8", data=[drifts(0, deviation)[drift](whole, 0)])
        modules = (static.module, renormalised(static.module, mean, deviation), again.module, running.module, same_sites.module,
                   inputs.module)  # fmt: skip
        cells, curves = [f"{(real.argmax(1) == truth)[onset:].double().mean():.1%}"], {}
        reset(running.module)
        for name, module in zip(names, modules, strict=True):
            got = outputs(module, stream[:onset])
            counts = {site: part.counts.clone() for site, part in trackers(running.module).items()}
            got = torch.cat([got, outputs(module, stream[onset:])])
            if name == "running":
                share = anew(counts, {site: part.counts for site, part in trackers(running.module).items()})
            kl = curves[name] = divergence(real, got)
            flips = (got.argmax(1) != real.argmax(1))[onset:].double().mean()
            right = (got.argmax(1) == truth)[onset:].double().mean()
            cells.append(f"{kl[onset:].mean():.4f}, {flips:.1%}, {right:.1%}")
        paired = (curves["running"] - curves["dynamic"])[onset:]
        start = onset + 50 if drift == "burst" else onset
        back = recovered(curves["running"][start:], divergence(real[start:], outputs(running.module, stream[start:])))
        cells += [f"{paired.mean():+.4f} ± {paired.std() / len(paired) ** 0.5:.4f}", f"{share:.0%}"]
        click.echo("| " + " | ".join([drift, *cells, "never" if back is None else str(back)]) + " |")
        if picture:
            Path(picture).write_text(plot(curves, f"{model}, {drift}: KL, mean of {WINDOW} examples"))
        spent = {name: 1e3 * seconds(module, stream[-60:]) for name, module in zip(names, modules, strict=True)}
    click.echo(f"\nms per sample of {drift}: " + ", ".join(f"{name} {median:.2f}" for name, median in spent.items()))


if __name__ == "__main__":
    main()
