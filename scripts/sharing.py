"""Measure non-uniform formats, shared tables, entropy coding and rate-aware rounding on real models; it judges nothing.

python scripts/sharing.py formats    ResNet-20 weight-only at 4, 3 and 2 bits: KL, bytes, entropy-coded bytes beside zstd -19
python scripts/sharing.py tables     one table over the model against one per layer, at equal bytes
python scripts/sharing.py clusters   16 clusters per layer, and k from a size
python scripts/sharing.py rate       rate-aware rounding: size against KL
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import zstandard
from measure import CASES, _draw, _network
from torch import nn

import roundel as rd
from roundel.data import Batch
from roundel.formats.entropy import compress
from roundel.formats.qtensor import QTensor
from roundel.solvers.rate import rate

FORMATS = {
    4: ("int4", "log4", "log4:fit", "apot4", "nf4", "cb16@tensor/channel", "cb16:int7@tensor/channel", "cb16:int7/g32*int8",
        "cb16/channel", "cb256x2@tensor/channel"),
    3: ("int3", "log3", "log3:fit", "apot3", "cb8@tensor/channel", "cb8:int6@tensor/channel", "cb8/channel",
        "cb64x2@tensor/channel"),
    2: ("int2", "log2", "ternary", "cb4@tensor/channel", "cb4:int5@tensor/channel", "cb4/channel", "cb16x2@tensor/channel"),
}  # fmt: skip

#: Scoring batches that are used: 1,024 images, or as many stories.
BATCHES = 16


def coded(tensors: Sequence[QTensor]) -> tuple[int, int, int]:
    """Bytes of the codes: packed, as ANS streams, and by zstd -19 (the better of packed and one byte a code, tensor by tensor)."""
    packer, sums = zstandard.ZstdCompressor(level=19), [0, 0, 0]
    for q in tensors:
        raw, stream = q.codes.numpy().tobytes(), compress(q)
        loose = (q.unpack() & ((1 << q.format.bits) - 1)).to(torch.uint8 if q.format.bits <= 8 else torch.int16).numpy().tobytes()
        sizes = (
            len(raw),
            len(raw) if stream is None else stream.nbytes,
            min(len(raw), *(len(packer.compress(b)) for b in (raw, loose))),
        )
        sums = [total + size for total, size in zip(sums, sizes, strict=True)]
    return sums[0], sums[1], sums[2]


class Bench:
    """A model with its calibration draw and scoring batches; `row` prints one measured line."""

    def __init__(self, name: str, learn: bool = False) -> None:
        self.case = CASES[name]
        self.model, self.score = self.case.model(), list(self.case.score())[:BATCHES]
        self.learn = _draw(self.case.calibrate(), 1) if learn else None
        self.network: nn.Module = _network(self.model, self.case, self.score[0])

    def row(self, text: str, q: rd.QModel) -> None:
        cost = rd.evaluate(q, against=self.model, data=self.score, metric=self.case.metric, latency=False, layers=False)
        raw, ans, zstd = coded(list(q.tensors.values()))
        flips = "" if cost.flips is None else f"{cost.flips:.2%}"
        sizes = f"{q.nbytes:,} | {q.nbytes - raw + ans:,} | {1 - ans / raw:.1%} | {ans / zstd - 1:+.1%}"
        print(f"| {text} | {cost.kl:.3e} | {flips} | {sizes} |",
              flush=True)  # fmt: skip


HEAD = ("", "KL", "flips", "bytes", "bytes, entropy-coded", "codes shrink by", "against zstd -19")


def formats(args: Sequence[str]) -> None:
    bench = Bench("ResNet-20")
    for bits in map(int, args or map(str, FORMATS)):
        for text in FORMATS[bits]:
            bench.row(f"`{text}`", rd.quantize(bench.network, text))


def tables(args: Sequence[str]) -> None:
    for name in args or ("ResNet-20", "stories260K"):
        bench = Bench(name)
        for each in ("cb16@{}/channel", "cb16@{}/g32*int8", "cb8@{}/channel"):
            for where in ("model", "tensor"):
                text = each.format(where)
                bench.row(f"{name} `{text}`", rd.quantize(bench.network, text))


def clusters(args: Sequence[str]) -> None:
    bench = Bench("ResNet-20", learn=True)
    learn: list[Batch] | None = bench.learn
    for text in ("cb16/tensor", "cb16@tensor/channel", "cb16/channel"):
        for effort in ("fast", "default"):
            bench.row(f"`{text}`, effort {effort}", rd.quantize(bench.network, text, data=learn, effort=effort))
    for told in args or ("4.2", "5.0"):
        plan = rd.share_plan(bench.network, bits=float(told), data=learn)
        bench.row(f"k from a size of {told} bits", rd.quantize(bench.network, plan=plan, data=learn))


def rates(args: Sequence[str]) -> None:
    bench = Bench("ResNet-20")
    weights: Any = getattr(bench.network, "graph").constants  # noqa: B009
    for text in args or ("int4", "int5", "cb16@tensor/channel"):
        q = rd.quantize(bench.network, text)
        for weigh in (0.0, 2.0, 4.0, 8.0, 12.0):
            new = {name: rate(weights[name], t.format, axis=t.axis, bits_weigh=weigh) for name, t in q.tensors.items()}
            bench.row(f"`{text}`, a bit weighs {weigh:g}", replace(q, tensors=new))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"formats": formats, "tables": tables, "clusters": clusters, "rate": rates}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(__doc__)
    print("`python scripts/sharing.py " + " ".join(sys.argv[1:]) + "`\n\n| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    COMMANDS[sys.argv[1]](sys.argv[2:])
