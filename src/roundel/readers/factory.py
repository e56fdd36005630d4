"""Modules built by the user's own function ``package.module:factory``, with their weights; it guesses no architecture."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..files import AnyPath, nearest, show
from .torchfile import read_state


def read_factory(spec: str, state: AnyPath | None = None) -> nn.Module:
    """Import ``package.module``, call ``factory()``, load the weights file ``state`` strictly; evaluation mode.

    The current folder is searched first, as ``python -m`` does. The import is the user's explicit wish: a name inside a
    model file never comes here. Without ``state`` a note says whose weights they are. Raises `InputError` naming every missing,
    unexpected or misshapen weight.
    """
    where, _, name = spec.partition(":")
    module = _call(spec, _find(where, name))
    if state is not None:
        tensors, notes = read_state(state)
        load_state(module, tensors, show(state))
    else:
        notes = (f"no state (--state) was given: the weights are whatever {spec} makes",) if module.state_dict() else ()
    module.roundel_notes = notes  # type: ignore[assignment]
    return module.eval()


def load_state(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict of which every name and shape must fit; ``where`` names its source in errors."""
    own = module.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"missing: {_some(missing)}")
    if extra := [name for name in state if name not in own]:
        problems.append(f"not in the module: {_some(extra)}; the nearest there: {nearest(extra[0], own)}")
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            problems.append(f"{name!r} is {list(state[name].shape)}, the module has {list(own[name].shape)}")
    if problems:
        raise InputError(f"the weights of {where} do not fit {type(module).__name__}: {'; '.join(sorted(problems))}")
    module.load_state_dict(state)


def _find(where: str, name: str) -> Any:
    sys.path.insert(0, "")
    try:
        found: Any = import_module(where)
    except ImportError as err:
        raise InputError(f"cannot import {where!r}: {err}; is it installed, or in the folder you are in?") from err
    except (ValueError, SyntaxError) as err:
        raise InputError(f"cannot import {where!r}: {err}") from err
    finally:
        sys.path.remove("")
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{where!r} has no {part!r}; the nearest there: {nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def _call(spec: str, factory: Any) -> nn.Module:
    module = factory if isinstance(factory, nn.Module) else None
    if module is None:
        if not callable(factory):
            raise InputError(f"{spec!r} is no function or class, but {type(factory).__name__}")
        module = factory()
    if not isinstance(module, nn.Module):
        raise InputError(f"{spec!r} returned {type(module).__name__}; it must return a torch.nn.Module")
    return module


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
