"""The C export compiled by a C compiler of this machine and run here: every value of the network, code for code.

Not here: boards (`qemu`), what C is written (`exporters.c`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckError, InputError
from ..exporters.c.emit import Port, Source, emit
from ..exporters.c.memory import from_memory, to_memory
from ..graph import BATCH, Graph
from ..integer.dialect import Ints
from ..integer.ops import numbers
from ..qmodel import QModel

NAME = "host-c"

#: Seconds after which a compiler or a run is given up.
PATIENCE = 600

FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic")


def absent(name: str = NAME) -> str | None:
    """Why no C can be compiled here; None where it can."""
    return None if compiler() else "no C compiler: install gcc or clang, or name one in CC"


def compiler() -> str | None:
    """CC, or the first of gcc, clang and cc that is there."""
    return next((found for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and (found := shutil.which(name))), None)


def dialects(name: str = NAME) -> dict[str, str]:
    """None of its own: the C rounds as each node of the graph says."""
    return {}


def run(q: QModel | None, graph: Graph, codes: Mapping[str, Ints], folder: Path, name: str = NAME) -> dict[str, Ints]:
    """Export ``graph``, compile it in ``folder`` and run it on ``codes`` (graph input -> (N, ...)); every value's codes.

    Raises `InputError` without a compiler, `PlanError` for what has no C, `CheckError` where compiling or running fails.
    """
    cc = compiler()
    if cc is None:
        raise InputError(f"host-c cannot run: {absent()}")
    source = emit(graph)
    program = build([source], folder, [cc, *FLAGS])
    return values(source, graph, codes, execute([str(program), "0"], inputs_of(source, codes)))


def build(sources: Sequence[Source], folder: Path, command: Sequence[str]) -> Path:
    """One program in ``folder`` for several networks, chosen by number as its first argument: inputs come in on stdin, the codes of
    every call go out on stdout, example after example."""
    cases = []
    for i, source in enumerate(sources):
        upper = source.name.upper()
        (folder / f"{source.name}.h").write_text(source.header)
        (folder / f"{source.name}.c").write_text(source.code)
        reads = [
            f"            if (fread({upper}_INPUT{j}, 1, {port.nbytes}, stdin) != {port.nbytes}) {{ return 0; }}"
            for j, port in enumerate(source.inputs)
        ]
        cases += [f"        case {i}:", *reads, f"            {source.name}_run();", "            break;"]
    includes = [f'#include "{source.name}.h"' for source in sources]
    runner = _RUNNER.replace("@includes@", "\n".join(includes)).replace("@cases@", "\n".join(cases))
    (folder / "runner.c").write_text(runner)
    program = folder / "runner"
    defines = [f"-D{source.name.upper()}_WATCH=watch" for source in sources]
    files = [f"{source.name}.c" for source in sources]
    compile_([*command, *defines, "runner.c", *files, "-o", program.name], folder)
    return program


def compile_(command: Sequence[str], folder: Path) -> str:
    """Run a compiler in ``folder``; `CheckError` with what it says where it fails."""
    try:
        done = subprocess.run(list(command), cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as err:
        raise CheckError(f"{command[0]} was given up after {PATIENCE} s") from err
    if done.returncode:
        raise CheckError(f"{command[0]} failed on the exported C:\n{(done.stderr or done.stdout)[:2000]}")
    return done.stderr


def execute(command: Sequence[str], stdin: bytes) -> bytes:
    """What a program writes; `CheckError` where it fails."""
    try:
        done = subprocess.run(list(command), input=stdin, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as err:
        raise CheckError(f"the exported C was given up after {PATIENCE} s: give fewer examples") from err
    if done.returncode:
        said = done.stderr.decode(errors="replace")[:2000]
        raise CheckError(f"the exported C ended with status {done.returncode}:\n{said}")
    return done.stdout


_RUNNER = """\
/* Runs the network whose number is the first word, example after example, and writes what every call makes. */
@includes@
#include <stdio.h>
#include <stdlib.h>

void watch(int call, const void *codes, uint32_t bytes);
void watch(int call, const void *codes, uint32_t bytes)
{
    (void)call;
    fwrite(codes, 1, bytes, stdout);
}

int main(int count, char **words)
{
    const int chosen = count > 1 ? atoi(words[1]) : 0;
    for (;;) {
        switch (chosen) {
@cases@
        default:
            return 2;
        }
    }
}
"""


# -- codes as bytes ---------------------------------------------------------------------------------------------------


def inputs_of(source: Source, codes: Mapping[str, Ints]) -> bytes:
    """All examples as the runner reads them: for each, its inputs one after the other, as they lie in memory."""
    parts = []
    for port in source.inputs:
        if port.name not in codes:
            raise InputError(
                f"the network reads {port.name!r}, and no codes are given for it; given: {', '.join(codes) or 'nothing'}"
            )
        parts.append(to_memory(port, np.asarray(codes[port.name])))
    if len({len(part) for part in parts}) > 1:
        raise InputError(f"the inputs have different numbers of examples: {[len(part) for part in parts]}")
    return np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in parts], 1).tobytes()


def values(source: Source, graph: Graph, codes: Mapping[str, Ints], raw: bytes) -> dict[str, Ints]:
    """What the runner wrote, by value; those that only rename axes are read from the memory that they share."""
    count = len(next(iter(codes.values())))
    size = sum(port.nbytes for port in source.watched)
    if len(raw) != count * size:
        raise CheckError(f"the exported C wrote {len(raw)} bytes for {count} examples of {size}")
    table = np.frombuffer(raw, np.uint8).reshape(count, size)
    memory: dict[str, NDArray[np.uint8]] = {}
    for port, value in zip(source.inputs, source.layout.inputs.values()):
        memory[source.layout.places[value].root] = to_memory(port, np.asarray(codes[port.name])).view(np.uint8)
    start = 0
    for port in source.watched:
        memory[port.name] = table[:, start : start + port.nbytes]
        start += port.nbytes
    ctypes = {port.name: port.ctype for port in source.watched} | {
        source.layout.inputs[port.name]: port.ctype for port in source.inputs
    }
    out = {}
    for name, place in source.layout.places.items():
        if place.root in graph.constants and name not in graph.constants:  # a constant under another name
            found = numbers(graph, place.root).reshape(place.sizes)
            shape = graph.values[name].shape
            out[name] = np.repeat(found, count, shape.index(BATCH)) if BATCH in shape else found
        if name in graph.values and name not in graph.constants and place.root in memory:
            port = Port(name, place, ctypes[place.root], 0, 1.0, 0)
            out[name] = from_memory(port, memory[place.root], graph.values[name].shape)
    return out
