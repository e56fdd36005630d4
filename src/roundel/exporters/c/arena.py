"""Offsets of every buffer in one static arena, from lifetimes alone: a pure function of buffers, steps and which may share.

A result that may be written over an operand which nothing reads again starts at the same offset. The bound is the largest sum of
bytes that live at once when every such result is; scratch counts in the arena and not in the bound. Not here: which kernels
may write in place, and what scratch they need (`steps`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

#: Offsets are multiples of it, in bytes, so that words can be read at once.
ALIGN = 4


@dataclass(frozen=True)
class Call:
    """One step: buffers it reads, the one it makes, the operand that this may be written over, and scratch in bytes.

    ``shared`` is the scratch where it is written over ``over``, ``apart`` where it is not.
    """

    reads: tuple[str, ...]
    makes: str
    over: str | None = None
    shared: int = 0
    apart: int = 0


@dataclass(frozen=True)
class Arena:
    """``offsets`` and ``scratch`` (one for each call) in bytes; ``inplace`` are the calls that write over an operand."""

    nbytes: int
    bound: int
    offsets: dict[str, int]
    scratch: tuple[int, ...]
    inplace: frozenset[int]


@dataclass(frozen=True)
class _Block:
    """Buffers at one offset: the bytes it takes at each moment."""

    names: tuple[str, ...]
    taken: Mapping[int, int]


def plan(sizes: Mapping[str, int], calls: Sequence[Call], inputs: Sequence[str], outputs: Sequence[str]) -> Arena:
    """Place buffers of ``sizes`` bytes; ``inputs`` live from the start, ``outputs`` to the end.

    Results are written over operands only where that makes the arena smaller, since some kernels then copy rows aside.
    """
    live = lifetimes(sizes, calls, inputs, outputs)
    legal = frozenset(i for i, call in enumerate(calls) if call.over is not None and live[call.over][1] == i)
    bound = max((sum(taken.values()) for taken in _moments(sizes, live, calls, legal)), default=0)
    best = _pack(sizes, live, calls, legal)
    costs = {i: calls[i].shared - calls[i].apart for i in sorted(legal) if calls[i].shared > calls[i].apart}
    for i in sorted(costs, key=lambda i: -costs[i]):
        other = _pack(sizes, live, calls, best.inplace - {i})
        best = other if other.nbytes <= best.nbytes else best
    return replace(best, bound=bound)


def lifetimes(
    sizes: Mapping[str, int], calls: Sequence[Call], inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """First and last call during which each buffer holds something."""
    first = dict.fromkeys(inputs, 0)
    last = dict(first)
    for i, call in enumerate(calls):
        first.setdefault(call.makes, i)
        for name in (*call.reads, call.makes):
            if name in sizes:
                last[name] = i
    return {name: (first[name], len(calls) if name in outputs else last[name]) for name in first}


def _moments(
    sizes: Mapping[str, int], live: Mapping[str, tuple[int, int]], calls: Sequence[Call], inplace: frozenset[int]
) -> list[dict[str, int]]:
    """For every call, the bytes of what lives; an operand that is written over counts with its result, as the larger of both."""
    moments = []
    for i, call in enumerate(calls):
        now = {name: sizes[name] for name, (start, end) in live.items() if start <= i <= end}
        if i in inplace and call.over is not None:
            now[call.makes] = max(now[call.makes], now.pop(call.over))
        moments.append(now)
    return moments


def _pack(sizes: Mapping[str, int], live: Mapping[str, tuple[int, int]], calls: Sequence[Call], inplace: frozenset[int]) -> Arena:
    """First fit over several orders; the smallest."""
    chain = {name: name for name in live}  # buffer -> the first of those at its offset
    for i, call in enumerate(calls):
        if i in inplace and call.over is not None:
            chain[call.makes] = chain[call.over]
    blocks: dict[str, dict[int, int]] = {head: {} for head in chain.values()}
    for name, (start, end) in live.items():
        taken = blocks[chain[name]]
        for moment in range(start, end + 1):
            taken[moment] = max(taken.get(moment, 0), sizes[name])
    for i, call in enumerate(calls):
        if scratch := call.shared if i in inplace else call.apart:
            blocks[f"scratch {i}"] = {i: scratch}
    orders = [
        sorted(blocks, key=lambda b: (-max(blocks[b].values(), default=0), -len(blocks[b]))),
        sorted(blocks, key=lambda b: -max(blocks[b].values(), default=0) * len(blocks[b])),
        sorted(blocks, key=lambda b: (-len(blocks[b]), -max(blocks[b].values(), default=0))),
        sorted(blocks, key=lambda b: min(blocks[b], default=0)),
    ]
    at, nbytes = min((_first_fit(blocks, order) for order in orders), key=lambda found: found[1])
    return Arena(
        nbytes,
        0,
        {name: at[head] for name, head in chain.items()},
        tuple(at.get(f"scratch {i}", 0) for i in range(len(calls))),
        inplace,
    )


def _first_fit(blocks: Mapping[str, Mapping[int, int]], order: Sequence[str]) -> tuple[dict[str, int], int]:
    """Each block at the lowest offset where at no moment it meets one already placed."""
    at: dict[str, int] = {}
    nbytes = 0
    for name in order:
        taken = blocks[name]
        ends = {at[o] + b for o in at for m, b in blocks[o].items() if m in taken}
        for start in sorted({0, *(-(-end // ALIGN) * ALIGN for end in ends)}):
            if not any(at[o] < start + b and start < at[o] + blocks[o][m] for o in at for m, b in taken.items() if m in blocks[o]):
                break
        at[name] = start
        nbytes = max(nbytes, start + max(taken.values(), default=0))
    return at, nbytes
