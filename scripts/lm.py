"""Weight-only tables at equal bytes, as Markdown: stories260K by KLD, MiniLM by 1 - cosine, ResNet-20 by KL; it judges no figure.

    python scripts/lm.py stories            sizes in bits, by effort
    python scripts/lm.py solvers            what each solver alone makes of a format, plain and guided Hessians
    python scripts/lm.py sizes              what is measured to choose a format within a size, beside the KLD that it stands for
    python scripts/lm.py minilm             all linear layers of all-MiniLM-L6-v2
    python scripts/lm.py resnet             ResNet-20 at 4, 3 and 2 bits: uniform, log, codebook, vector

Bits are all bytes of the linear weights (codes, scales, tables, padding) times 8 over their number; embeddings and
heads stay float. Splits are those of docs/data.md: 80 stories to learn from, 20 to judge by, 87 to score. Seconds are of
one thread's CPU time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import click
import torch
from measure import CASES, _cosine, _embed, _neighbours
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.fisher import hessians
from roundel.formats import QTensor
from roundel.quantize.networks import find_network
from roundel.quantize.sizes import best, mean_squares
from roundel.solvers import NEED_HESSIAN, SOLVERS, solved

#: Sizes that the field compares at, in bits.
SIZES = (4.5, 4.25, 3.5, 3.25, 2.5, 2.25)


@click.group(help=__doc__, context_settings={"max_content_width": 120})
def cli() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def row(*cells: object) -> None:
    click.echo("| " + " | ".join(map(str, cells)) + " |")


def head(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


def bits(tensors: Mapping[str, QTensor]) -> float:
    """Bits per number of the packed tensors, every byte counted."""
    return 8 * sum(q.nbytes for q in tensors.values()) / sum(torch.Size(q.shape).numel() for q in tensors.values())


def solve(q: rd.QModel, real: nn.Module, solver: str, moments: Mapping[str, Tensor]) -> tuple[rd.QModel, float, float]:
    """(``q`` solved anew, mean relative error before and after), each layer on the inputs of the float network."""
    if solver not in NEED_HESSIAN:
        free = {name: SOLVERS[solver](real.get_parameter(name), t.format) for name, t in q.tensors.items()}
        return replace(q, tensors=free), float("nan"), float("nan")
    done = {name: solved(SOLVERS[solver], real.get_parameter(name), t.format, moments[name]) for name, t in q.tensors.items()}
    before, after = (sum(getattr(one, what) for one in done.values()) / len(done) for what in ("before", "after"))
    return replace(q, tensors={name: one.tensor for name, one in done.items()}), before, after


# -- stories260K ------------------------------------------------------------------------------------------------------


def stories() -> tuple[nn.Module, list[Batch], list[Batch], list[Batch]]:
    """The model, what it learns from, what judges, what scores."""
    case = CASES["stories260K"]
    documents = list(case.calibrate())
    return case.model().eval(), documents[:80], documents[80:], list(case.score())


def story_row(what: str, q: rd.QModel, real: nn.Module, score: Sequence[Batch], seconds: float, more: str = "") -> None:
    cost = rd.evaluate(q, against=real, data=score, metric="perplexity", latency=False, layers=False)
    assert cost.kl_interval is not None
    low, high = cost.kl_interval
    row(what, f"{bits(q.tensors):.3f}", f"{cost.kl:.4f} [{low:.4f}, {high:.4f}]", f"{cost.kl_p99:.3f}", f"{cost.flips:.2%}",
        f"{1 + (cost.difference or 0):.4f}", f"{seconds:.0f}", more)  # fmt: skip


STORY = ("what", "bits", "KLD mean [95 %]", "p99", "flips", "perplexity ratio", "seconds", "")


HEAD = ("model.embed_tokens", "lm_head")


def rounded(real: nn.Module, text: str) -> rd.QModel:
    """Rounded to nearest, embedding and head float."""
    return rd.quantize(real, text, exclude=HEAD)


@cli.command("stories")
@click.option("--bits", "sizes", multiple=True, type=float, default=SIZES, help="Only these.")
@click.option("--effort", default="best", show_default=True)
@click.option("--budget", default="52s", show_default=True, help="Of effort best.")
def stories_(sizes: Sequence[float], effort: str, budget: str) -> None:
    """Sizes on stories260K, by effort."""
    real, learn, held, score = stories()
    head(*STORY)
    for size in sizes:
        start = time.process_time()
        q = rd.quantize(real, f"{size:g} bits", data=[*learn, *held], exclude=HEAD, effort=effort,
                        budget=budget if effort == "best" else None)  # fmt: skip
        seconds = time.process_time() - start
        formats = Counter(str(t.format) for t in q.tensors.values())
        steps = next((note.text for note in q.notes if note.text.startswith("end-to-end tuning of")), "")
        told = ", ".join(f"{count} x `{text}`" for text, count in sorted(formats.items()))
        story_row(f"{size:g} bits", q, real, score, seconds, f"{told}; {steps}")


@cli.command("sizes")
@click.option("--bits", "sizes", multiple=True, type=float, default=(4.25, 3.25), help="Only these.")
def sizes_(sizes: Sequence[float]) -> None:
    """Every format that is tried within a size on stories260K, rounded to nearest: is the least error the least KLD?"""
    real, learn, _, score = stories()
    network = find_network(real, None, [])
    targets = [target for target in network.targets if not target.name.startswith(("model.embed_tokens", "lm_head"))]
    with torch.no_grad():
        weigh = mean_squares(network, learn)
    head("size", "format", "bits", "error", "KLD")
    for size in sizes:
        for offer in best(targets, size, [], weigh):
            q = rounded(real, str(offer.format))
            cost = rd.evaluate(q, against=real, data=score, metric="perplexity", latency=False, layers=False)
            row(size, f"`{offer.format}`", f"{offer.bits:.3f}", f"{offer.error:.4f}", f"{cost.kl:.4f}")


@cli.command()
@click.option("--weights", "formats", multiple=True, default=("uint4/g32*fp16~uint4", "cb16@tensor/channel*int8",
              "cb8@tensor/channel*int8", "cb4@tensor/channel*int8"))  # fmt: skip
def solvers(formats: Sequence[str]) -> None:
    """Each solver alone on stories260K, layers on the inputs of the float network."""
    real, learn, _, score = stories()
    names = set(rounded(real, "int8").tensors)
    moments = {kind: hessians(real, learn, names, guided=kind == "guided") for kind in ("plain", "guided")}
    head(*STORY)
    for text in formats:
        for solver in SOLVERS:
            for kind in ("plain", "guided") if solver in NEED_HESSIAN else ("",):
                start = time.process_time()
                q, before, after = solve(rounded(real, text), real, solver, moments.get(kind, {}))
                seconds = time.process_time() - start
                story_row(
                    f"`{text}` {solver} {kind}", q, real, score, seconds, f"error {before:.4f} to {after:.4f}" if kind else ""
                )


# -- MiniLM -----------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--weights", "formats", multiple=True, default=("uint4/g32*fp16~uint4", "cb16@tensor/g64*int8", "cb8@tensor/g32*int8",
              "cb4@tensor/g32*int8"))  # fmt: skip
@click.option("--solver", "names", multiple=True, default=("rtn", "gptq", "alternate"))
def minilm(formats: Sequence[str], names: Sequence[str]) -> None:
    """All linear layers of all-MiniLM-L6-v2; calibrated on the validation text, scored on the test text."""
    case = CASES["all-MiniLM-L6-v2"]
    real, score = case.model().eval(), list(case.score())
    learn = validation(64)
    wanted = _embed(real, score)
    layers = {f"{name}.weight" for name, part in real.named_modules() if isinstance(part, nn.Linear)}
    moments = hessians(real, learn, layers)
    head("weights", "solver", "bits", "1 - cosine", "Spearman", "same nearest neighbour", "seconds")
    for text in formats:
        for name in names:
            start = time.process_time()
            q = rd.quantize(real, text, exclude=("*embeddings*",))
            q, *_ = solve(q, real, name, moments)
            seconds = time.process_time() - start
            got = _embed(q.module, score)
            row(f"`{text}`", name, f"{bits(q.tensors):.3f}", f"{1 - _cosine(wanted, got):.4f}", f"{spearman(wanted, got):.3f}",
                f"{_neighbours(wanted, got):.3f}", f"{seconds:.0f}")  # fmt: skip


def validation(count: int) -> list[Batch]:
    """The first lines of the WikiText-2 validation file, one sentence a batch."""
    from measure import DATA
    from measure import minilm as folder

    from roundel.data import Preprocess, load_data
    from roundel.readers.huggingface import read_tokenizer

    steps, text = Preprocess(lines=True, words=(8, 64), skip="="), str(DATA / "text" / "wikitext2_valid.txt.xz")
    return list(load_data(text, preprocess=steps, tokenizer=read_tokenizer(folder()), limit=count, batch_size=1))


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of all pairwise cosines."""
    above = torch.ones(len(a), len(a)).triu(1).bool()
    ranks = torch.stack([(x @ x.T)[above].argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# -- ResNet-20 --------------------------------------------------------------------------------------------------------


RESNET = (
    *("int4", "log4:fit", "cb16/tensor", "cb256x2@tensor/channel*fp16"),
    *("int3", "log3:fit", "cb8/tensor", "cb64x2@tensor/channel*fp16"),
    *("int2", "ternary", "cb4/tensor", "cb16x2@tensor/channel*fp16"),
)


@cli.command()
@click.option("--weights", "formats", multiple=True, default=RESNET)
@click.option("--solver", "names", multiple=True, default=("rtn", "alternate"))
@click.option("--effort", "efforts", multiple=True, help="Also by the ladder: default or best.")
@click.option("--budget", default="3min", show_default=True, help="Of effort best.")
def resnet(formats: Sequence[str], names: Sequence[str], efforts: Sequence[str], budget: str) -> None:
    """ResNet-20, every weight: uniform, log, one table per layer, vectors."""
    from measure import _draw, _network

    case = CASES["ResNet-20"]
    model, pool, score = case.model(), case.calibrate(), list(case.score())
    network, learn = _network(model, case, pool[0]), _draw(pool, 1)
    head("weights", "solver or effort", "bits", "KL", "flips", "seconds")
    for text in formats:
        for name in (*names, *efforts):
            start = time.process_time()
            how = {"effort": name, "budget": budget if name == "best" else None} if name in efforts else {"solver": name}
            q = rd.quantize(network, text, data=learn, **how)
            seconds = time.process_time() - start
            cost = rd.evaluate(q, against=model, data=score, metric="top1", latency=False, layers=False)
            row(f"`{text}`", name, f"{bits(q.tensors):.3f}", f"{cost.kl:.4f}", f"{cost.flips:.2%}", f"{seconds:.0f}")


if __name__ == "__main__":
    cli()
