"""What is particular to language models: documents scored one by one, the columns and the sentence of a table; it runs none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from task import SLACK

from roundel.data import Batch
from roundel.errors import InputError
from roundel.evaluate.scores import Scores

if TYPE_CHECKING:
    from harness import Line

Sums = NDArray[np.float64]

#: At most so much of the best peer's KLD, and at most so much with 97.5 % confidence.
MARK, BOUND = 0.75, 0.85

#: Where ours was not run at a size, it is judged by the next that is no more than this many bits below.
NEAR = 0.5

#: What ours is to be faster than.
CLOCK = "autoround"

HEAD = "| toolkit | setting | bits | seeds | KLD [95 %] | flips | perplexity ratio | CPU s | peak MB | backprop | |"


def score(answer: NDArray[np.float32], suite: Path) -> dict[str, Any]:
    """Figures of logits (tokens of all documents, vocabulary), and each document's sum of KLD; raises `InputError` where they are
    no such thing."""
    with np.load(suite / "truth.npz") as truth:
        real, ids, sizes = torch.from_numpy(truth["outputs"]), torch.from_numpy(truth["ids"]), truth["sizes"].tolist()
    if answer.shape != tuple(real.shape) or answer.dtype != np.float32:
        raise InputError(f"logits of shape {list(answer.shape)} and type {answer.dtype}; asked for {list(real.shape)}, float32")
    scores = Scores("tokens", False, "perplexity")
    parts = zip(ids.split(sizes), real.split(sizes), torch.from_numpy(answer).split(sizes), strict=True)
    for number, (tokens, wanted, got) in enumerate(parts):
        scores.take(number, Batch((tokens[None],)), wanted[None], got[None])
    found = scores.figures(seed=0)
    sums = tuple(float(f"{value:.5g}") for value in torch.cat(scores.kl_rows).tolist())
    return {"kl": found["kl"], "interval": found["kl_interval"], "flips": found["flips"], "ratio": 1 + found["difference"],
            "documents": sums}  # fmt: skip


def ratio(ours: Sequence[float], theirs: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Ratio of two KLDs over the same documents, and the upper end of its 95 % interval when the documents are drawn anew.

    >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    (0.5, 0.5)
    """
    mine, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    picks = np.random.default_rng(0).integers(len(mine), size=(draws, len(mine)))
    drawn = mine[picks].sum(1) / np.maximum(other[picks].sum(1), 1e-300)
    return float(mine.sum() / other.sum()), float(np.percentile(drawn, 97.5))


def sentence(found: Sequence[Line], bits: str, mine: str) -> str:
    """Each setting of ours at a size against the best row of another toolkit at or under it, whichever size that row was run for.

    ``found`` are all lines of a suite; where ours has none at a size, its next within half a bit below counts. The sentence names
    the ratio of the KLDs, what the marks make of it, and the times.
    """
    limit = float(bits) + SLACK
    ours = [
        line
        for line in found
        if line.first.peer == mine and _fits(line, limit) and 0 <= float(bits) - float(line.first.bits) <= NEAR
    ]
    nearest = max((float(line.first.bits) for line in ours), default=0.0)
    ours = [line for line in ours if float(line.first.bits) == nearest]
    peers = [line for line in found if line.first.peer != mine and _fits(line, limit)]
    if not ours or not peers:
        return f"{bits} bits: nothing to compare."
    best = min(peers, key=lambda line: line.kl or 0.0)
    clock = [line for line in found if line.first.peer == CLOCK and float(line.first.bits) == nearest and line.seconds is not None]
    out = [f"{bits} bits: the best of the others at or under it is {best.name}, {best.kl:.4f} at {best.size:.2f} bits."]
    for line in ours:
        times, most = ratio(line.documents, best.documents)
        met = "met" if times <= MARK and most <= BOUND else "**missed**"
        told = f"Ours ({line.first.setting}, {line.size:.2f} bits): {times:.2f} of that, at most {most:.2f}"
        told += f" (marks {MARK} and {BOUND}: {met})"
        for other in sorted(clock, key=lambda one: one.seconds or 0.0)[:1]:
            less = (line.seconds or 0.0) < (other.seconds or 0.0)
            told += f", in {line.seconds:.0f} s where {other.name} took {other.seconds:.0f} s ({'less' if less else '**more**'})"
        out.append(told + ".")
    return " ".join(out)


def _fits(line: Line, limit: float) -> bool:
    return line.kl is not None and line.size is not None and line.size <= limit


def about(shape: Mapping[str, Any]) -> str:
    """What stands above a suite's tables."""
    return (f"{shape['parameters']:,} parameters, {shape['numbers']:,} of them in {shape['weights']} linear layers; "
            f"{shape['calibrate']} documents calibrate, {shape['score']} others of {shape['tokens']:,} tokens score; float "
            f"perplexity {math.exp(shape['loss']):.3f}. Embeddings and head stay float.")  # fmt: skip


def cells(line: Line) -> list[str]:
    """Everything but the names and the note of a row that was answered."""
    peak = "–" if line.peak is None else f"{line.peak / 1e6:.0f}"
    seeds = f"{line.seeds}" if line.drawn else "1 (no draw)"
    return [f"{line.size:.3f}", seeds, f"{line.kl:.4f} [{line.low:.4f}, {line.high:.4f}]", f"{100 * (line.flips or 0):.2f} %",
            f"{line.ratio:.4f}", f"{line.seconds:.1f}", peak, "yes" if line.first.backprop else "no"]  # fmt: skip
