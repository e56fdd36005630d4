"""Text for end-to-end tuning of language models: what there is, cut to one length, and more that the model itself writes; whether a
model is tuned, and how, is not decided here."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibrate import evaluating
from ..data import Batch
from ..network.huggingface import hf_config

#: Tokens of an example, and examples of a batch: short ones, since attention takes half the time of a step on small models.
LENGTH, BATCH = 128, 8

#: Examples that the model writes, at most, and as many for each that it was given; how many it writes at a time.
WRITTEN, TIMES, AT_ONCE = 800, 4, 200


def tokens(batch: Batch) -> list[Tensor] | None:
    """The token ids of each example, those that its attention mask hides left out; None where the batch is no such thing."""
    values = dict(batch.named)
    mask = values.pop("attention_mask", None)
    if values.keys() - {"input_ids"} or len(batch.args) + len(values) != 1:
        return None
    ids = next(iter([*batch.args, *values.values()]))
    if ids.ndim != 2 or ids.is_floating_point():
        return None
    return [row if mask is None else row[mask[i].bool()] for i, row in enumerate(ids)]


@torch.no_grad()
def writes(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether a model writes text: it is a transformers one, takes nothing but token ids, and what it answers at a place are scores
    of all tokens that no later token changes.

    >>> writes(nn.Linear(2, 2), [Batch((torch.randn(1, 2),))])
    False
    """
    if hf_config(model) is None or not batches or any(tokens(batch) is None for batch in batches):
        return False
    ids = max((row for row in tokens(batches[0]) or []), key=len)[None, :32]
    if ids.shape[1] < 2:
        return False
    other = ids.clone()
    other[0, -1] = ids[0, -1] - 1 if ids[0, -1] > 0 else 1
    with evaluating(model):
        a, b = (getattr(model(x), "logits", None) for x in (ids, other))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape[:2] != ids.shape or int(ids.max()) >= a.shape[-1]:
        return False
    moved = (a - b).float().abs().amax((0, 2))
    return bool(moved[:-1].max() < 1e-4 * moved[-1])


def cut(documents: Sequence[Tensor], seed: int = 0, length: int = LENGTH, size: int = BATCH) -> list[Batch]:
    """Token ids joined, cut to ``length`` and shuffled into batches of ``size``; a rest that is shorter is left away.

    >>> [batch.args[0].shape for batch in cut([torch.arange(9), torch.arange(9)], length=4, size=3)]
    [torch.Size([3, 4]), torch.Size([1, 4])]
    """
    ids = torch.cat([d.flatten() for d in documents])
    length = min(length, len(ids))
    rows = ids[: len(ids) // length * length].view(-1, length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return [Batch((part,)) for part in rows.split(size)]


@torch.no_grad()
def written(model: nn.Module, starts: Tensor, length: int = LENGTH, seed: int = 0, seconds: float | None = None) -> Tensor:
    """(examples, length) token ids drawn from the model itself, one example from each first token of ``starts`` (Liu et al. 2023,
    "LLM-QAT"); as many lots of `AT_ONCE` as ``seconds`` allow, the first at least begun. The same seed draws the same."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    begun = time.monotonic()
    with evaluating(model):
        for first in starts.split(AT_ONCE):
            if parts and seconds is not None and (time.monotonic() - begun) * (len(parts) + 1) / len(parts) > seconds:
                break
            ids = now = first[:, None].long()
            past = None
            for at in range(length - 1):
                if not parts and at and seconds is not None and time.monotonic() - begun > seconds:
                    return ids
                out = model(now, past_key_values=past, use_cache=True) if past is not None else model(ids, use_cache=True)
                past = getattr(out, "past_key_values", None)
                now = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
                ids = torch.cat([ids, now], 1)
            parts.append(ids)
    return torch.cat(parts)


def enough_text(model: nn.Module, batches: Sequence[Batch], seed: int = 0, seconds: float | None = None
                ) -> tuple[list[Batch], int] | None:  # fmt: skip
    """(batches of what there is and what the model wrote, how many examples it wrote within about ``seconds``); None for a model
    that `writes` nothing."""
    if not writes(model, batches):
        return None
    documents = [row for batch in batches for row in tokens(batch) or []]
    length = min(LENGTH, max(map(len, documents)))
    count = min(WRITTEN, TIMES * max(1, sum(map(len, documents)) // length))
    starts = torch.stack([documents[i % len(documents)][0] for i in range(count)])
    more = written(model, starts, length, seed, seconds)
    return cut([*documents, more], seed, length), len(more)
