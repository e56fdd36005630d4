"""The folder that a firmware project takes: the network in C, a self-test with golden vectors, and build fragments.

The self-test prints one checksum (CRC-32) for each call, over all vectors, and PASS or FAIL. Where a compiler is at hand it has
passed before any file is left; files take their places together. Not here: the C of the network (`emit`), boards (`runtimes.qemu`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckError, InputError
from ...files import show
from ...graph import Graph
from ...integer import simulate
from ...integer.dialect import Ints
from ...qmodel import Note, QModel
from .cmsis import BUILDS, Calls
from .emit import Source, array, emit, printable
from .memory import to_memory

#: Examples in the self-test where none are given.
EXAMPLES = 2


@dataclass(frozen=True)
class Written:
    """What was written: ``arena`` and its lower ``bound``, and constants, in bytes; ``checked`` says that the self-test ran."""

    folder: Path
    files: tuple[str, ...]
    arena: int
    bound: int
    const_bytes: int
    checked: bool
    notes: tuple[Note, ...]


def write(
    q: QModel | None,
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    vectors: Mapping[str, Ints] | None = None,
    name: str | None = None,
) -> Written:
    """Write the integer ``graph`` as C99 into the folder ``path``, which is made; files there of the same names are replaced.

    ``vectors`` are codes (N, ...) for each graph input, for the self-test; by default two random examples. ``name`` (default: the
    folder's) prefixes all C names. Raises `PlanError` for what has no C, `InputError` where the folder cannot be written,
    `CheckError` where the self-test fails here; nothing is left then.
    """
    folder = Path(os.fsdecode(path))
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"cannot write firmware into {show(path)}: it is not a folder")
    source = emit(graph, name or folder.name)
    texts = _texts(graph, source, vectors if vectors is not None else examples(graph))
    checked = self_test(texts)
    _put(folder, texts)
    arena = source.arena
    ratio = arena.nbytes / max(arena.bound, 1)
    told = [Note("arena", f"{arena.nbytes:,} bytes, {ratio:.3f} of the lower bound {arena.bound:,}")]
    if source.cmsis and source.cmsis_arena:
        told.append(Note("cmsis-nn", _offered(source.cmsis, source.cmsis_arena.nbytes)))
    if not checked:
        told.append(Note("self-test", "no C compiler here: the C was written and not run"))
    return Written(folder, tuple(texts), arena.nbytes, arena.bound, source.const_bytes, checked, tuple(told))


def _offered(cmsis: Calls, arena: int) -> str:
    """Which calls go to CMSIS-NN where the user asks for it, and why others do not."""
    build = "with" if BUILDS[cmsis.rounding][0] else "without"
    text = f"with -DROUNDEL_CMSIS_NN {len(cmsis.sent)} of {len(cmsis.sent) + len(cmsis.kept)} weighted layers call a CMSIS-NN "
    text += f"compiled {build} CMSIS_NN_USE_SINGLE_ROUNDING, in an arena of {arena:,} bytes"
    return text + "".join(f"; {name} does not: {why}" for name, why in cmsis.kept.items())


def _put(folder: Path, texts: Mapping[str, str]) -> None:
    """All files or none: a full disk fails beside them, before the first takes its place."""
    made: list[Path] = []
    try:
        for part in (*reversed(folder.parents), folder):
            if not part.exists():
                part.mkdir(exist_ok=True)
                made.insert(0, part)
        if blocked := [file for file in texts if (folder / file).is_dir()]:
            raise InputError(f"cannot write firmware into {show(folder)}: {blocked[0]} is a folder there")
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as beside:
            for file, text in texts.items():
                with open(Path(beside) / file, "wb") as stream:
                    stream.write(text.encode())
                    stream.flush()
                    os.fsync(stream.fileno())
            for file in texts:
                os.replace(Path(beside) / file, folder / file)
    except (OSError, ValueError, InputError) as err:
        for part in made:
            with suppress(OSError):  # it holds something by now
                part.rmdir()
        if isinstance(err, InputError):
            raise
        why = err.strerror if isinstance(err, OSError) else err
        raise InputError(f"cannot write firmware into {show(folder)}: {why}") from err


def examples(graph: Graph) -> dict[str, Ints]:
    """Codes for the self-test: uniform over what each input can hold, of a fixed seed; ids over the smallest vocabulary."""
    rng = np.random.default_rng(0)
    doors = {node.inputs[0]: (node.attrs["low"], node.attrs["high"]) for node in graph if node.op == "quantize"}
    rows = [graph.values[node.inputs[1]].shape[0] for node in graph if node.op == "embedding"]
    ids = (0, min((size for size in rows if isinstance(size, int)), default=1) - 1)
    shapes = {name: [size for size in graph.values[name].shape[1:] if isinstance(size, int)] for name in graph.inputs}
    return {name: rng.integers(*doors.get(name, ids), (EXAMPLES, *shapes[name]), endpoint=True) for name in graph.inputs}


def simulated(graph: Graph, codes: Mapping[str, Ints]) -> dict[str, Ints]:
    """Every value's codes, from codes at the inputs."""
    real = {name: codes[name] for name in graph.inputs}
    for node in graph:
        if node.op == "quantize":
            name, a = node.inputs[0], node.attrs
            real[name] = ((codes[name] - a["zero"]) * np.float32(a["scale"])).astype(np.float32)
    seen: dict[str, Any] = {}
    simulate(graph, *real.values(), watch=seen.__setitem__)
    return seen


def checksums(graph: Graph, source: Source, codes: Mapping[str, Ints]) -> list[int]:
    """CRC-32 of what each call makes, over all examples, as `simulate` has it."""
    seen = simulated(graph, codes)
    sums = []
    for port in source.watched:
        name = port.name if port.name in seen else port.name.partition(", axes ")[0]
        sums.append(zlib.crc32(to_memory(port, seen[name]).tobytes()))
    return sums


def self_test(texts: Mapping[str, str]) -> bool:
    """Build the self-test and run it; False where no compiler is at hand, `CheckError` where it does not pass."""
    cc = next((found for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and (found := shutil.which(name))), None)
    if cc is None:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        for file, text in texts.items():
            (Path(scratch) / file).write_text(text)
        sources = [file for file in texts if file.endswith(".c")]
        define = next(line.split()[-1] for line in texts["Makefile"].splitlines() if line.startswith("WATCH ="))
        built = subprocess.run([cc, "-std=c99", "-O1", define, *sources, "-o", "test"], cwd=scratch, capture_output=True, text=True)
        if built.returncode:
            raise CheckError(f"the exported C does not compile, which is a mistake in Roundel:\n{built.stderr[:2000]}")
        ran = subprocess.run([str(Path(scratch) / "test")], cwd=scratch, capture_output=True, text=True, timeout=600)
    if ran.returncode or "PASS" not in ran.stdout:
        raise CheckError(
            f"the exported C does not compute what simulate computes, which is a mistake in Roundel:\n{ran.stdout[-2000:]}"
        )
    return True


def _texts(graph: Graph, source: Source, vectors: Mapping[str, Ints]) -> dict[str, str]:
    fields = {
        "name": source.name,
        "upper": source.name.upper(),
        "arena": f"{source.arena.nbytes:,}",
        "constants": f"{source.const_bytes:,}",
        "calls": str(len(source.watched)),
    }
    return {
        f"{source.name}.c": source.code,
        f"{source.name}.h": source.header,
        "golden.h": _golden(graph, source, vectors),
        **{file: _fill(text, fields) for file, text in _FILES.items()},
    }


def _golden(graph: Graph, source: Source, vectors: Mapping[str, Ints]) -> str:
    """Inputs as they lie in memory and the checksum of every call."""
    upper, count = source.name.upper(), len(next(iter(vectors.values())))
    lines = ["/* Inputs for the self-test and the checksum (CRC-32) of what each call makes of them. */", "#include <stdint.h>", ""]
    lines += [f"#define EXAMPLES {count}", f"#define CALLS {len(source.watched)}", ""]
    feeds = []
    for i, port in enumerate(source.inputs):
        if port.name not in vectors:
            raise InputError(f"no golden vectors for the input {port.name!r}")
        memory = to_memory(port, np.asarray(vectors[port.name]))
        lines += [array(f"golden{i}", memory.astype(np.int64), port.ctype), ""]
        feeds.append(
            f"    for (i = 0; i < {port.place.count}; i++) {{ {upper}_INPUT{i}[i] = golden{i}[example * {port.place.count} + i]; }}"
        )
    sums = checksums(graph, source, vectors)
    names = [f"    0x{crc:08X}u, /* {i} {printable(port.name)} */" for i, (crc, port) in enumerate(zip(sums, source.watched))]
    lines += [f"static const uint32_t golden_crc[{max(len(sums), 1)}] = {{", *(names or ["    0"]), "};", ""]
    lines += ["static void feed(int example)", "{", "    int i;", *feeds, "}", ""]
    return "\n".join(lines)


def _fill(text: str, fields: Mapping[str, str]) -> str:
    for key, value in fields.items():
        text = text.replace(f"@{key}@", value)
    return text


_MAIN = """\
/* Self-test: runs the golden vectors, prints a checksum for each call, then PASS or FAIL.
 * On a board, compile with -DPUT=your_function, which takes one character. */
#include "@name@.h"
#include "golden.h"

#ifdef PUT
int PUT(int character);
#else
#include <stdio.h>
#define PUT putchar
#endif

static uint32_t crc[CALLS + 1];

void @name@_watch(int call, const void *codes, uint32_t bytes)
{
    const unsigned char *byte = codes;
    uint32_t sum = ~crc[call];
    while (bytes--) {
        int bit;
        sum ^= *byte++;
        for (bit = 0; bit < 8; bit++) {
            sum = (sum >> 1) ^ (0xEDB88320u & (0u - (sum & 1u)));
        }
    }
    crc[call] = ~sum;
}

static void put(const char *text)
{
    while (*text) {
        PUT(*text++);
    }
}

int main(void)
{
    int call, example, wrong = 0;
    for (example = 0; example < EXAMPLES; example++) {
        feed(example);
        @name@_run();
    }
    for (call = 0; call < CALLS; call++) {
        int digit;
        put("@name@ call ");
        PUT('0' + call / 100 % 10);
        PUT('0' + call / 10 % 10);
        PUT('0' + call % 10);
        put(" crc ");
        for (digit = 28; digit >= 0; digit -= 4) {
            PUT("0123456789ABCDEF"[(crc[call] >> digit) & 15u]);
        }
        put(crc[call] == golden_crc[call] ? " ok\\n" : " WRONG\\n");
        wrong += crc[call] != golden_crc[call];
    }
    put(wrong ? "FAIL\\n" : "PASS\\n");
    return wrong != 0;
}
"""

_MAKEFILE = """\
# make test builds and runs the self-test here; for a board give CC, CFLAGS and what starts it.
CC ?= cc
CFLAGS ?= -O2
WATCH = -D@upper@_WATCH=@name@_watch

test: self_test
	./self_test

self_test: main.c @name@.c @name@.h golden.h
	$(CC) -std=c99 -Wall -Wextra $(CFLAGS) $(WATCH) main.c @name@.c -o $@

.PHONY: test
"""

_CMAKE = """\
# add_subdirectory() this folder and link against @name@; the self-test is a target of its own.
cmake_minimum_required(VERSION 3.13)
project(@name@ C)

add_library(@name@ STATIC @name@.c)
target_include_directories(@name@ PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})
set_target_properties(@name@ PROPERTIES C_STANDARD 99)

option(@upper@_CMSIS_NN "Call CMSIS-NN, the target cmsis-nn, where it computes the same codes" OFF)
if(@upper@_CMSIS_NN)
  target_compile_definitions(@name@ PUBLIC ROUNDEL_CMSIS_NN)
  target_link_libraries(@name@ PUBLIC cmsis-nn)
endif()

add_executable(@name@_self_test EXCLUDE_FROM_ALL main.c @name@.c)
target_compile_definitions(@name@_self_test PRIVATE @upper@_WATCH=@name@_watch)
"""

_README = """\
`@name@.c` and `@name@.h` are the network: integer arithmetic in C99, no allocation, no library.
It needs @arena@ bytes of RAM for its arena and about @constants@ bytes of flash for constants.
Fill `@upper@_INPUT0`, call `@name@_run()`, read `@upper@_OUTPUT0`; the header says what a code stands for.
`make test` runs the self-test: @calls@ checksums, then PASS. On a board, compile `main.c` with `-DPUT=` your output function.
The output of a board's self-test can be judged elsewhere: keep its log.
"""

_FILES = {"main.c": _MAIN, "Makefile": _MAKEFILE, "CMakeLists.txt": _CMAKE, "README.md": _README}
