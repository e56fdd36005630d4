"""`watching`: see every value that a network makes while it runs, whatever kind of network it is; it changes no value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layer import QLayer

Watch = Callable[[str, Tensor], None]


@contextmanager
def watching(module: nn.Module, fn: Watch) -> Iterator[None]:
    """Call ``fn(site, value)`` for the values that ``module`` makes inside the ``with`` block.

    A graph, the module itself or one inside it, reports its inputs and every result under its own names (graphs beside each
    other: behind the name of the module that each is). In any other network each leaf module reports ``name.input`` before it
    runs and ``name.output`` after, the first tensor where it takes or gives several; a module that runs twice reports twice.
    Nothing stays behind, whatever happens inside. Values are the network's own: copy what is to be kept.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with watching(net, lambda site, value: print(site, list(value.shape))):
    ...     _ = net(torch.zeros(1, 2))
    0.input [1, 2]
    0.output [1, 3]
    1.input [1, 3]
    1.output [1, 3]
    """
    graphs = {name: part for name, part in module.named_modules() if _is_graph(part)}
    undo: list[Callable[[], None]] = []
    try:
        for name, part in graphs.items():
            undo.append(_attach(part, fn if len(graphs) == 1 else _behind(f"{name}.", fn)))
        for name, part in module.named_modules() if not graphs else ():
            if _is_leaf(part):
                undo += [handle.remove for handle in _hooks(part, f"{name}." if name else "", fn)]
        yield
    finally:
        for step in undo:
            step()


def _is_graph(module: nn.Module) -> bool:
    """Whether it offers the attribute ``watch``; a module's own method of that name is another matter."""
    return "watch" in vars(module) or getattr(type(module), "watch", "") is None


def _is_leaf(module: nn.Module) -> bool:
    """What a user calls a layer: no modules inside but its own weight's."""
    return isinstance(module, QLayer) or all(name == "parametrizations" for name, _ in module.named_children())


def _attach(graph: Any, fn: Watch) -> Callable[[], None]:
    before: Watch | None = graph.watch

    def both(site: str, value: Tensor) -> None:
        if before is not None:
            before(site, value)
        fn(site, value)

    graph.watch = both
    return lambda: setattr(graph, "watch", before)


def _behind(prefix: str, fn: Watch) -> Watch:
    return lambda site, value: fn(prefix + site, value)


def _hooks(module: nn.Module, prefix: str, fn: Watch) -> tuple[Any, Any]:
    def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if (value := first_tensor((args, named))) is not None:
            fn(f"{prefix}input", value)

    def after(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if (value := first_tensor(result)) is not None:
            fn(f"{prefix}output", value)

    return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)


def first_tensor(value: object) -> Tensor | None:
    """The first tensor in what a module takes or gives: a tensor, or one inside tuples, lists, dicts and model outputs."""
    if isinstance(value, Tensor):
        return value
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for part in inside if (found := first_tensor(part)) is not None), None)
