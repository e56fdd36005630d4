"""A plain training loop and the images it sees, for the tests of trainable modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def images(n: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(module: nn.Module, x: Tensor, y: Tensor, steps: int = 3, rate: float = 1e-2) -> list[float]:
    """A plain loop."""
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate)
    lost = []
    for _ in range(steps):
        loss = (module(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lost.append(loss.item())
    return lost
