"""The repeated blocks of an ordinary network, one call after another in the order of its own forward; where weights come from, who
solves them and where values are kept between calls is not decided here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import InputError
from .sweep import MATRIX, columns, second_moment
from .walk import Leaf, leaf

#: Positions (tokens, pixels) that go through a block at a time: the fixed unit of work, so that bytes depend on no memory limit.
UNIT = 2048


class _Stop(BaseException):
    """Leaves a forward pass as soon as what was wanted of it is known; no `except Exception` of a model holds it up."""


class Entangled(InputError):
    """A block needs more of the blocks before it than the output of the last one."""


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the blocks: the members of the outermost module lists that hold weighted layers; [""] (the root) without any.

    >>> layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])
    >>> find_blocks(nn.ModuleDict({"h": layers, "head": nn.Linear(2, 2)}))
    ['h.0', 'h.1']
    """
    found: list[str] = []
    lists: list[str] = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        inside = [f"{name}.{key}" for key, child in part.named_children() if leaf("", child) is None and _weighted(child)]
        if inside:
            lists.append(name)
            found += inside
    return found or [""]


def _weighted(module: nn.Module) -> bool:
    return any("weight" in part._parameters and leaf("", part) is not None for part in module.modules())


def units(batches: Iterable[Batch]) -> list[Batch]:
    """The examples of ``batches`` in portions of about `UNIT` positions, in order."""
    out = []
    for batch in batches:
        size = max(1, UNIT // max(1, positions(batch) // max(1, len(batch))))
        out += [batch.take(part) for part in torch.arange(len(batch)).split(size)]
    return out


def positions(batch: Batch) -> int:
    """How many tokens, or numbers of an image, the first input of a batch has."""
    return next(iter([*batch.args, *batch.named.values()])).numel()


# -- values between blocks --------------------------------------------------------------------------------------------


def flatten(value: Any, into: list[Tensor]) -> Any:
    """The structure of what a block returned, JSON-ready, its tensors appended to ``into``; `InputError` for other objects."""
    if isinstance(value, Tensor):
        into.append(value)
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple | list):
        return [type(value) is list, *(flatten(part, into) for part in value)]
    if value is None or isinstance(value, bool | int | float | str):
        return {"is": value}
    raise InputError(f"a block returns a {type(value).__name__}, which cannot be kept on disk; quantize the model in memory")


def unflatten(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """Inverse of `flatten`."""
    if isinstance(structure, list):
        parts = [unflatten(part, tensors) for part in structure[1:]]
        return parts if structure[0] else tuple(parts)
    return structure["is"] if "is" in structure else next(tensors)


def poison(structure: Any) -> Iterator[Tensor]:
    """NaNs of the right shapes, which take no memory: what stands for a value that nothing should read any more."""
    if isinstance(structure, list):
        for part in structure[1:]:
            yield from poison(part)
    elif "shape" in structure:
        dtype = getattr(torch, structure["dtype"])
        yield torch.full((), torch.nan if dtype.is_floating_point else 0, dtype=dtype).expand(structure["shape"])


class Shelf(Protocol):
    """Where the outputs of block calls lie until the next block has read them."""

    def put(self, at: int, unit: int, value: Any) -> None:
        """Keep what call ``at`` returned for a unit."""

    def get(self, at: int, unit: int) -> Any:
        """It again; what was dropped comes back as NaN."""

    def drop(self, at: int) -> None:
        """Nothing but its shape will be wanted of call ``at``."""


@dataclass(eq=False)
class MemoryShelf:
    """A `Shelf` in memory; with ``keep`` nothing is dropped."""

    keep: bool = False
    held: dict[tuple[int, int], tuple[Any, list[Tensor]]] = field(default_factory=dict)

    def put(self, at: int, unit: int, value: Any) -> None:
        tensors: list[Tensor] = []
        self.held[at, unit] = flatten(value, tensors), tensors

    def get(self, at: int, unit: int) -> Any:
        structure, tensors = self.held[at, unit]
        return unflatten(structure, iter(tensors or poison(structure)))

    def drop(self, at: int) -> None:
        for key, (structure, _) in self.held.items():
            if key[0] == at and not self.keep:
                self.held[key] = structure, []


# -- the walk ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Call:
    """A block about to be called by the network's own forward."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False)
class Walk:
    """A network whose calls of blocks are numbered in the order in which its forward makes them.

    A forward pass up to call ``at`` computes no block: the calls before it give back what the shelf has of them. So each block
    gets exactly the arguments that the model passes to it, of whatever kind, and a walk can start at any call whose
    predecessor's outputs lie on the shelf. ``history`` names the block of each call that was made.
    """

    module: nn.Module
    blocks: Sequence[str]
    units: Sequence[Batch]
    shelf: Shelf
    history: list[str] = field(default_factory=list)

    def enter(self, at: int, unit: int) -> Call | None:
        """Call number ``at`` of a unit, before it is made; None where the forward ends earlier."""
        calls = 0
        found: Call | None = None

        def stand_in(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls, found
                if calls == at:
                    found = Call(name, args, kwargs)
                    raise _Stop
                calls += 1
                return self.shelf.get(calls - 1, unit)

            return forward

        parts = {name: self.module.get_submodule(name) for name in self.blocks}
        for name, part in parts.items():
            part.forward = stand_in(name)
        try:
            self._run(unit)
        finally:
            for part in parts.values():
                del part.forward
        if found is None:
            return None
        if at < len(self.history) and self.history[at] != found.block:
            raise Entangled(f"different examples run different blocks: {self.history[at]!r} and {found.block!r} as number {at}")
        if at == len(self.history):
            self.history.append(found.block)
        check_call(found, at)
        return found

    def finish(self, unit: int) -> None:
        """The forward of a unit past its last call, all calls given back; a `_Stop` ends it early."""
        if self.enter(len(self.history), unit) is not None:
            raise Entangled("different examples run different numbers of blocks")

    def _run(self, unit: int) -> None:
        batch = self.units[unit]
        with suppress(_Stop):
            self.module(*batch.args, **batch.named)


def check_call(call: Call, at: int) -> None:
    """`Entangled` where NaN has come into the inputs of a block."""
    tensors = [x for x in [*call.args, *call.kwargs.values()] if isinstance(x, Tensor) and x.is_floating_point()]
    if any(bool(x.isnan().any()) for x in tensors):
        raise Entangled(
            f"the inputs of {call.block} (block call {at + 1}) are not finite: the model passes on more than a block's output to "
            "the next, or its numbers overflow on this data"
        )


@contextmanager
def listening(module: nn.Module, watch: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Show the input of each layer that ``watch`` names to its function, each time before the layer runs."""

    def hook(fn: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda _, args, named: fn(args[0] if args else next(iter(named.values())))

    hooks = [module.get_submodule(name).register_forward_pre_hook(hook(fn), with_kwargs=True) for name, fn in watch.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def compute(module: nn.Module, call: Call, watch: Mapping[str, Callable[[Tensor], None]] | None = None) -> Any:
    """Make a call; a function of ``watch`` may end it, and it then gives None."""
    with listening(module, watch or {}), suppress(_Stop):
        return module.get_submodule(call.block)(*call.args, **call.kwargs)
    return None


# -- what is solved together ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Layers of a block that are solved before what comes after them runs; ``shared`` maps a layer to the one just before it that
    takes the same tensor, and ``once`` says that each runs once per example."""

    layers: tuple[str, ...]
    shared: Mapping[str, str]
    once: bool


def find_groups(walk: Walk, at: int, found: Mapping[str, Leaf]) -> list[Group]:
    """The groups of block call ``at`` in the order of execution, such as q, k and v | o | gate and up | down.

    One group are layers that take the same tensor, and layers of one name in the members of a list (the experts of a mixture).
    ``found`` are the layers of the block; those that no unit reaches are in no group.
    """
    kinds = {name: _kind(walk.module, name) for name, one in found.items() if one.op in MATRIX}
    merged: list[set[str]] = []
    shared: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for unit in range(len(walk.units)):
        call = walk.enter(at, unit)
        if call is None:
            continue
        calls: list[tuple[str, Tensor]] = []
        compute(walk.module, call, {name: partial(_take, calls, name) for name in kinds})
        fresh = {name for name, _ in calls} - counts.keys()
        counts += Counter({name: n for name, n in Counter(name for name, _ in calls).items() if name in fresh})
        for _, run in groupby(calls, key=lambda one: id(one[1])):
            names = [name for name, _ in run]
            same = {kinds[name] for name in names}
            home = next((kept for kept in merged if kept & same), None)
            if home is None:
                merged.append(home := set())
            home |= same
            shared |= {name: names[0] for name in names[1:] if name != names[0] and {name, names[0]} <= fresh}
        if set(kinds.values()) <= set().union(*merged):
            break
    groups = []
    for home in merged:
        names = [name for name, kind in kinds.items() if kind in home]
        groups.append(Group(tuple(names), {n: s for n, s in shared.items() if n in names}, all(counts[n] == 1 for n in names)))
    return groups


def _take(calls: list[tuple[str, Tensor]], name: str, x: Tensor) -> None:
    calls.append((name, x))


def _kind(module: nn.Module, name: str) -> str:
    """The name with a star for each place in a list: what the members of a list have in common."""
    parts = name.split(".")
    starred = [
        "*" if i and isinstance(module.get_submodule(".".join(parts[:i])), nn.ModuleList) else part for i, part in enumerate(parts)
    ]
    return ".".join(starred)


def moments(walk: Walk, at: int, found: Mapping[str, Leaf], group: Group, limit: float = math.inf) -> Iterator[dict[str, Tensor]]:
    """Second moments of the inputs of a group's layers, by layer, at most ``limit`` bytes at a time where one alone takes no
    more; a layer that nothing reaches has none."""
    owners = [name for name in group.layers if name not in group.shared]
    while owners:
        part, held = [owners.pop(0)], 0.0
        held = moment_bytes(found[part[0]])
        while owners and (held := held + moment_bytes(found[owners[0]])) <= limit:
            part.append(owners.pop(0))
        sums: dict[str, Tensor] = {}
        for unit in range(len(walk.units)):
            call = walk.enter(at, unit)
            if call is not None:
                left = set(group.layers) if group.once else None
                last: dict[str, Tensor] = {}
                compute(
                    walk.module, call, {name: partial(_gather, found, group, sums, part, left, last, name) for name in group.layers}
                )
        of = {name: group.shared.get(name, name) for name in group.layers}
        got = {name: sums[owner] for name, owner in of.items() if owner in sums and owner in part}
        sums.clear()
        yield got


def _gather(found: Mapping[str, Leaf], group: Group, sums: dict[str, Tensor], part: Container[str], left: set[str] | None,
            last: dict[str, Tensor], name: str, x: Tensor) -> None:  # fmt: skip
    last[name] = x
    owner = group.shared.get(name)
    if owner is not None and last.get(owner) is not x:
        raise Entangled(f"{name} shares its input with {owner} on some examples and not on others")
    if name in part:
        one = found[name]
        moment = second_moment(columns(one.op, one.attrs, x.detach(), one.weight.shape))
        sums[name] = sums[name].add_(moment) if name in sums else moment
        del moment  # a frame that a `_Stop` passes through outlives it
    if left is not None:
        left.discard(name)
        if not left:
            raise _Stop


def moment_bytes(one: Leaf) -> int:
    """Bytes of the second moment of a layer's inputs in float64."""
    shape = one.weight.shape
    cols = math.prod(shape[1:])
    return 8 * cols * cols * int(one.attrs.get("groups", 1))


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a weighted leaf another weight, in the shape that `Leaf` shows and the type that it has."""
    part = module.get_submodule(name)
    one = leaf(name, part)
    old = part._parameters["weight"]
    assert one is not None
    assert old is not None
    turned = one.weight.stride() != old.stride() or one.weight.shape != old.shape
    value = value.to(old.dtype)
    part._parameters["weight"] = nn.Parameter(value.t().contiguous() if turned else value, requires_grad=False)


def within(name: str, block: str) -> bool:
    """Whether a layer, or a tensor, belongs to a block; everything belongs to the root."""
    return not block or name == block or name.startswith(f"{block}.")


# -- the sweep --------------------------------------------------------------------------------------------------------


#: {layer: second moment of its inputs} -> {layer: its new weight}, the layers that were solved.
SolveLayers = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def sweep_blocks(walk: Walk, found: Mapping[str, Leaf], solve: SolveLayers, last: SolveLayers, *, solved: Iterable[str] = (),
                 enter: Callable[[int, str], None] = lambda at, block: None,
                 leave: Callable[[int, str], None] = lambda at, block: None,
                 limit: float = math.inf) -> None:  # fmt: skip
    """Solve the layers of every block in the order of execution, each on the inputs that the solved layers before it leave.

    ``found`` are the layers, by name, as the network had them at first. It starts at the first call that is not in the walk's
    history; blocks in ``solved`` are computed and not solved. ``enter`` and ``leave`` are told of each call before its block
    is touched and after its outputs are on the shelf. Layers outside the blocks are solved by ``last``. ``limit`` bounds the bytes
    of second moments in memory at a time and changes no result. Raises `Entangled` for networks that are no chain of blocks.
    """
    done = set(solved)
    for at in count(len(walk.history)):
        if all(walk.enter(at, unit) is None for unit in range(len(walk.units))):
            break
        block = walk.history[at]
        enter(at, block)
        if block not in done:
            inside = {name: one for name, one in found.items() if within(name, block)}
            for group in find_groups(walk, at, inside):
                new: dict[str, Tensor] = {}
                for part in moments(walk, at, inside, group, limit):
                    new |= solve(part)
                    part.clear()  # or they would stay while those of the next group are gathered
                for name in list(new):
                    put(walk.module, name, new.pop(name))
            done.add(block)
        for unit in range(len(walk.units)):
            if (call := walk.enter(at, unit)) is not None:
                walk.shelf.put(at, unit, compute(walk.module, call))
        leave(at, block)
        if at and _list(walk.history[at - 1]) == _list(block):  # what another list begins with may be wanted to the end
            walk.shelf.drop(at - 1)
    outside = {name: one for name, one in found.items() if one.op in MATRIX and not any(within(name, b) for b in walk.blocks)}
    if outside:
        last(_tail(walk, outside))


def _list(block: str) -> str:
    return block.rpartition(".")[0]


def _tail(walk: Walk, found: Mapping[str, Leaf]) -> dict[str, Tensor]:
    """Second moments of the inputs of layers that are in no block."""
    sums: dict[str, Tensor] = {}
    group = Group(tuple(found), {}, False)
    once = Counter[str]()
    for unit in range(len(walk.units)):
        left = set(once) if once and set(once.values()) == {1} else None
        calls: list[str] = []

        def see(name: str, x: Tensor, left: set[str] | None = left, calls: list[str] = calls) -> None:
            calls.append(name)
            _gather(found, group, sums, found, left, {}, name, x)

        with listening(walk.module, {name: partial(see, name) for name in found}):
            walk.finish(unit)
        once = once or Counter(calls)
    return sums
