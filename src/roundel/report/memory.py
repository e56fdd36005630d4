"""Which bytes of its arena a network in C uses when, for the report's figure; the plan itself is made by the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RoundelError
from .svg import Block

if TYPE_CHECKING:
    from ..exporters.c.emit import Source
    from ..qmodel import QModel


@dataclass(frozen=True)
class Memory:
    """The arena of ``nbytes``, its lower ``bound`` and what lies in it over ``calls``; or ``why`` the model has no C.

    Scratch of the kernels is part of ``nbytes`` and none of the ``blocks``.
    """

    blocks: tuple[Block, ...] = ()
    calls: int = 0
    nbytes: int = 0
    bound: int = 0
    why: str = ""


def memory(q: QModel) -> Memory:
    """The arena of the C that ``roundel export`` would write, in its default rounding."""
    from ..exporters.c.emit import emit
    from ..integer import lower

    try:
        return of_source(emit(lower(q)))
    except RoundelError as err:
        return Memory(why=str(err).partition("\n")[0].rstrip(":"))


def of_source(source: Source) -> Memory:
    """The same for C that is already made. Where a call writes over an operand, that ends and the result begins in mid-call."""
    layout, calls = source.layout, len(source.layout.steps)
    ports = dict(zip(layout.inputs.values(), source.inputs)) | {port.name: port for port in source.watched}
    start: dict[str, float] = dict.fromkeys(layout.inputs.values(), 0.0)
    stop = dict.fromkeys(start, 1.0)
    for i, step in enumerate(layout.steps):
        made = ports[step.output]
        start[step.output], stop[step.output] = i, i + 1
        for name in {layout.places[operand].root for operand in step.inputs} & ports.keys():
            read = ports[name]
            stop[name] = i + 1
            if i in source.arena.inplace and read.offset < made.offset + made.nbytes and made.offset < read.offset + read.nbytes:
                stop[name] = start[step.output] = i + 0.5
    stop |= dict.fromkeys((layout.places[name].root for name in layout.outputs.values()), float(calls))
    blocks = tuple(Block(port.name, port.offset, port.nbytes, start[name], stop[name]) for name, port in ports.items())
    return Memory(blocks, calls, source.arena.nbytes, source.arena.bound)
