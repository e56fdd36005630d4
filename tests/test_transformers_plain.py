"""Transformers in plain PyTorch, whole in integers and C: encoders with and without masks, a causal decoder; not real ones."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roundel as rd
from roundel.graph import GraphModule
from roundel.network.capture import capture
from roundel.network.fuse import fuse
from roundel.runtimes import hostc

STEPS, WIDTH, HEADS = 6, 16, 2
SEEN = torch.ones(STEPS, STEPS).tril().bool()
MASKS = {"no mask": None, "added": torch.zeros(STEPS, STEPS).masked_fill(~SEEN, float("-inf")), "booleans": ~SEEN}


class Encoder(nn.Module):
    """(N, steps, width) -> (N, 4)."""

    def __init__(self, mask: Tensor | None, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **{"batch_first": True, **options})
        self.layers, self.head, self.mask = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(WIDTH, 4), mask
        self.first = options.get("batch_first", True)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        x = self.layers(x, mask=self.mask)
        return self.head(x.mean(1 if self.first else 0))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021)."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


class Decoder(nn.Module):
    """Ids (N, steps) -> scores (N, steps, 20): RMS norm, rotary positions, attention written in one of four ways, a gated MLP."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, size = way, WIDTH // HEADS
        self.emb, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(32, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32, bias=False)
        angles = torch.outer(torch.arange(STEPS).float(), 100.0 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.way == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        if self.way == "filled":
            scores = scores.masked_fill(~SEEN, float("-inf"))
        elif self.way == "chosen":
            scores = torch.where(SEEN, scores, -1e9)
        else:
            scores = scores + torch.full((STEPS, STEPS), float("-inf")).triu(1)
        return scores.softmax(-1) @ v

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.qkv)
        made = self.attend(turned(q, self.cos, self.sin), turned(k, self.cos, self.sin), v)
        x = x + self.out(made.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norms[2](x))


def whole(module: nn.Module, x: Tensor, attentions: int) -> None:
    """Captured and fused it is the same function; in integers it is the float side within three steps of 255; in C the integers."""
    module.eval()
    real = fuse(capture(module, x))
    with torch.no_grad():
        want = module(x[:5])
        torch.testing.assert_close(GraphModule(real)(x[:5]), want, rtol=0, atol=2e-6)
    q = rd.quantize(module, "int8", "int8", data=[x])
    graph = rd.lower(q)
    assert [node.op for node in graph].count("attention") == attentions
    with torch.no_grad():
        there = q.module(x[:16]).numpy()
    here = rd.simulate(graph, x[:16])
    assert np.abs(here - there).max() <= 3 * (there.max() - there.min()) / 255 + 0.03 * np.abs(there).max()
    assert np.array_equal(rd.simulate(graph, x[:1], codes=True), rd.simulate(graph, x[:1], codes=True, fast=False))
    if hostc.absent() is None:
        seen = rd.verify(q, against=["host-c"], data=[x[:4]])["host-c"]
        assert seen.differing == 0 < seen.total


@pytest.mark.proves("integer.transformers")
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        pytest.param("no mask", {}, marks=pytest.mark.soak),
        ("added", {"norm_first": True, "activation": "gelu"}),
        ("booleans", {"batch_first": False}),
    ],
)  # fmt: skip
def test_encoder_layers(mask: str, options: dict[str, Any]) -> None:
    """Steps first inside, as torch has it, or outside too: in the graph the batch is first everywhere."""
    torch.manual_seed(0)
    whole(Encoder(MASKS[mask], **options), torch.randn(64, STEPS, WIDTH), 1)


@pytest.mark.proves("integer.transformers")
@pytest.mark.parametrize("way", ["sdpa", "filled", *(pytest.param(way, marks=pytest.mark.soak) for way in ("chosen", "added"))])
def test_causal_decoder(way: str) -> None:
    torch.manual_seed(0)
    whole(Decoder(way), torch.randint(0, 20, (64, STEPS)), 1)


class Joined(nn.Module):
    """The batch joined with steps, before and behind it; a slice and a softmax beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, width = x.shape
        y = torch.relu(self.one(x.reshape(n * steps, width)))
        y = self.two(y).reshape(n, steps, 3).permute(1, 2, 0)
        y = torch.cat([y[1:], y.softmax(1)[:1]], 0)
        return y.reshape(steps * 3, n).t().reshape(n, steps, 3) * 2.0


def test_a_batch_that_is_joined_with_other_axes() -> None:
    torch.manual_seed(0)
    module, x = Joined().eval(), torch.randn(9, 4, 6)
    graph = fuse(capture(module, x))
    assert all(graph.values[out].shape[0] == "N" for node in graph for out in node.outputs)
    with torch.no_grad():
        for n in (1, 5):
            torch.testing.assert_close(GraphModule(graph)(x[:n]), module(x[:n]), rtol=0, atol=1e-6)


def test_what_cannot_be_turned_stays_as_it_is() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1)[:4].sum() + x  # reads across the batch

    graph = capture(Mixed(), torch.randn(3, 5))
    assert torch.equal(GraphModule(fuse(graph))(torch.ones(2, 5)), torch.full((2, 5), 5.0))
