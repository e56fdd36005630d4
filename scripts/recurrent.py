"""Trains a small GRU and LSTM on spoken words in seconds and prints what int16 states are worth; no figure of the README.

Usage: python scripts/recurrent.py DATA [clips for the boards], DATA being the folder of speech_commands_v2_test.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roundel as rd
from roundel.network.capture import capture
from roundel.network.fuse import fuse
from roundel.network.sites import fine_sites
from roundel.plan import Rule


class Words(nn.Module):
    """MFCCs (N, 49, 10) to scores of 12 words, by one recurrent layer."""

    def __init__(self, kind: str, size: int = 32) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(10, size, batch_first=True)
        self.head = nn.Linear(size, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def clips(folder: Path) -> tuple[Tensor, Tensor]:
    """Every clip normalised over the first 1,600, and its label, in a fixed random order."""
    held = np.load(folder / "shared_mfcc49x10_f16.npz")
    order = torch.randperm(len(held["y"]), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(held["x"].astype(np.float32))[order], torch.from_numpy(held["y"].astype(np.int64))[order]
    return (x - x[:1600].mean((0, 1))) / x[:1600].std((0, 1)), y


def trained(kind: str, x: Tensor, y: Tensor, epochs: int = 12) -> nn.Module:
    """Adam, batches of 64; the first step of a one-cycle schedule is small."""
    torch.manual_seed(0)
    model = Words(kind)
    made = torch.optim.Adam(model.parameters(), 0.01)
    rounds = torch.optim.lr_scheduler.OneCycleLR(made, 0.01, epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            made.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            made.step()
            rounds.step()
    return model.eval()


def main(folder: Path, boards: int) -> None:
    """One line for each network and plan."""
    x, y = clips(folder)
    learn, score = x[:1600], x[1600:]
    for kind in ("GRU", "LSTM"):
        start = time.process_time()
        model = trained(kind, learn, y[:1600])
        with torch.no_grad():
            real = model(score)
        right = (real.argmax(1) == y[1600:]).float().mean()
        print(f"{kind}: float {right:.4f} of {len(score)} clips right, trained in {time.process_time() - start:.0f} s")
        sites = fine_sites(fuse(capture(model, learn[:2])))
        coarse = rd.Plan((Rule("*", "int8", "int8"), *(Rule(site, activation="int8") for site in sites)))
        for name, plan, activations in (("int16 states", None, "int8"), ("int8 all", coarse, None), ("int16 all", None, "int16s")):
            q = rd.quantize(model, "int8", activations, data=[learn[:256]], plan=plan)
            graph = rd.lower(q)
            with torch.no_grad():
                sides = q.module(score), torch.from_numpy(rd.simulate(graph, score))
            told = []
            for got in sides:
                kl = F.kl_div(got.log_softmax(1), real.log_softmax(1), reduction="batchmean", log_target=True)
                flips = int((got.argmax(1) != real.argmax(1)).sum())
                told.append(f"KLD {kl:.3e}, {flips} flips, {(got.argmax(1) == y[1600:]).float().mean():.4f} right")
            print(f"  {name}: float side {told[0]}; integers {told[1]}; {len(graph.nodes)} nodes")
            if boards and name == "int16 states":
                for runtime, seen in rd.verify(q, against=["host-c", "qemu-cortex-m4"], data=[score[:boards]]).items():
                    print(f"    {runtime}: {seen.differing} of {seen.total:,} codes differ{', ' + seen.why if seen.why else ''}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
