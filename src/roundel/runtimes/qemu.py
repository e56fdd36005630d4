"""The C export on boards that QEMU plays: every value of the network, code for code, and the memory that it takes.

QEMU runs the instructions of a core, so it proves results and counts instructions; it knows nothing of cycles. AArch64 runs as a
Linux program. Not here: what C is written (`exporters.c`), compilers of this machine (`hostc`).
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..errors import CheckError, InputError
from ..exporters.c.emit import Source, emit
from ..graph import Graph
from ..qmodel import QModel
from .hostc import FLAGS, Ints, build, execute, inputs_of, values

NAME = "qemu-cortex-m4"

#: Seconds after which a run is given up.
PATIENCE = 300


@dataclass(frozen=True)
class Board:
    """A machine of QEMU: how to compile for it, where its memories start and how many bytes they have."""

    machine: str
    core: tuple[str, ...]
    flash: tuple[int, int] = (0, 4 << 20)
    ram: tuple[int, int] = (0x20000000, 4 << 20)
    compiler: str = "arm-none-eabi-gcc"
    emulator: str = "qemu-system-arm"
    start: str = "cortex_m.c"


BOARDS = {
    "qemu-cortex-m0": Board("microbit", ("-mthumb", "-mcpu=cortex-m0"), (0, 256 << 10), (0x20000000, 16 << 10)),
    "qemu-cortex-m3": Board("mps2-an385", ("-mthumb", "-mcpu=cortex-m3")),
    "qemu-cortex-m4": Board("mps2-an386", ("-mthumb", "-mcpu=cortex-m4")),
    "qemu-cortex-m7": Board("mps2-an500", ("-mthumb", "-mcpu=cortex-m7")),
    "qemu-cortex-m33": Board("mps2-an505", ("-mthumb", "-mcpu=cortex-m33"), (0x10000000, 4 << 20), (0x38000000, 4 << 20)),
    "qemu-cortex-m55": Board(
        "mps3-an547", ("-mthumb", "-mcpu=cortex-m55", "-mfloat-abi=hard"), (0, 512 << 10), (0x20000000, 512 << 10)
    ),
    "qemu-riscv32": Board(
        "virt",
        ("-march=rv32imac", "-mabi=ilp32", "-mcmodel=medany"),
        (0x80000000, 4 << 20),
        (0x80400000, 4 << 20),
        "riscv64-unknown-elf-gcc",
        "qemu-system-riscv32",
        "riscv.c",
    ),
    "qemu-aarch64": Board("", (), compiler="aarch64-linux-gnu-gcc", emulator="qemu-aarch64"),
}


def absent(name: str = NAME) -> str | None:
    """Why the board ``name`` cannot be played here; None where it can."""
    board = _board(name)
    missing = [tool for tool in (board.compiler, board.emulator) if not shutil.which(tool)]
    return f"{' and '.join(missing)} not found; install the packages of those names" if missing else None


def dialects(name: str = NAME) -> dict[str, str]:
    """None of its own: the C rounds as each node of the graph says."""
    return {}


def run(q: QModel | None, graph: Graph, codes: Mapping[str, Ints], folder: Path, name: str = NAME) -> dict[str, Ints]:
    """Export ``graph``, compile it for the board ``name`` in ``folder`` and run it on ``codes`` (graph input -> (N, ...)).

    Raises `InputError` where tools are missing or the network does not fit the board's memories, before anything runs;
    `PlanError` for what has no C; `CheckError` where compiling or running fails.
    """
    if (why := absent(name)) is not None:
        raise InputError(f"{name} cannot run: {why}")
    source, board = emit(graph), _board(name)
    sent = inputs_of(source, codes)
    if not board.machine:
        program = build([source], folder, [board.compiler, *FLAGS, "-static"])
        return values(source, graph, codes, execute([board.emulator, str(program), "0"], sent))
    elf = link([source], folder, name)
    return values(source, graph, codes, play(elf, counted(source, sent), name)[0])


def link(
    sources: Sequence[Source],
    folder: Path,
    name: str,
    options: Sequence[str] = ("-O2",),
    mode: str = "watch",
    libraries: Sequence[str | Path] = (),
) -> Path:
    """An ELF for the board that runs one network after the other on the file ``in`` and writes the file ``out``.

    Each network reads the number of its examples, four little-endian bytes, then them (`counted`). In mode "watch" the codes of
    every call are written; "run" writes the outputs alone; "mark" calls an empty function between calls.
    ``libraries`` are files to link with.
    """
    board = _board(name)
    for file in ("semihosting.h", "semihosting.c", "link.ld", board.start):
        (folder / file).write_text((files(__package__) / "boards" / file).read_text())
    for source in sources:
        (folder / f"{source.name}.h").write_text(source.header)
        (folder / f"{source.name}.c").write_text(source.code)
    (folder / "board.c").write_text(_main(sources, mode))
    plain = [board.compiler, *board.core, "-ffreestanding"]
    defined = [option for option in options if option.startswith("-DROUNDEL")]  # headers read it
    objects = []
    for file in ("semihosting.c", board.start, "board.c"):
        own = ["-std=gnu99", "-O1", "-fno-builtin", "-fno-tree-loop-distribute-patterns", *defined]
        _compile([*plain, *own, "-c", file], folder)
        objects.append(file.replace(".c", ".o"))
    for source in sources:
        define = [f"-D{source.name.upper()}_WATCH=watch"] if mode != "run" else []
        _compile([*plain, *FLAGS, *options, *define, "-c", f"{source.name}.c"], folder)
        objects.append(f"{source.name}.o")
    memory = [f"-Wl,--defsym={key}={value:#x}" for key, value in _memory(board).items()]
    _compile(
        [*plain, "-nostdlib", *memory, "-Wl,-T,link.ld", *objects, *map(str, libraries), "-lgcc", "-o", "board.elf"], folder, name
    )
    return folder / "board.elf"


def counted(source: Source, sent: bytes) -> bytes:
    """Examples of one network as the program of `link` reads them: their number, then they."""
    return (len(sent) // sum(port.nbytes for port in source.inputs)).to_bytes(4, "little") + sent


def play(elf: Path, sent: bytes, name: str, plugin: Sequence[str] = ()) -> tuple[bytes, str]:
    """Run an ELF of `link` on the bytes ``sent``: what it writes, and what QEMU says."""
    board, folder = _board(name), elf.parent
    (folder / "in").write_bytes(sent)
    (folder / "out").unlink(missing_ok=True)
    command = [board.emulator, "-M", board.machine, "-nographic", "-monitor", "none", "-serial", "none"]
    command += ["-semihosting-config", "enable=on,target=native", *plugin]
    command += ["-bios", "none"] if "riscv" in board.emulator else []
    try:
        done = subprocess.run(
            [*command, "-kernel", elf.name],
            cwd=folder,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as err:
        raise CheckError(f"{name} did not end within {PATIENCE} s") from err
    said = done.stderr[-2000:].decode(errors="replace")
    if done.returncode:
        raise CheckError(f"{name} ended with status {done.returncode}: {said}")
    return (folder / "out").read_bytes(), said


def _board(name: str) -> Board:
    if name not in BOARDS:
        raise InputError(f"there is no board {name!r}; there are {', '.join(BOARDS)}")
    return BOARDS[name]


def _memory(board: Board) -> dict[str, int]:
    return {"FLASH_ORG": board.flash[0], "FLASH_LEN": board.flash[1], "RAM_ORG": board.ram[0], "RAM_LEN": board.ram[1]}


def _compile(command: Sequence[str], folder: Path, name: str | None = None) -> None:
    try:
        done = subprocess.run(list(command), cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as err:
        raise CheckError(f"{command[0]} did not end within {PATIENCE} s") from err
    if not done.returncode:
        return
    if over := re.findall(r"region `(\w+)' overflowed by (\d+) bytes", done.stderr):
        memory = _memory(_board(name or NAME))
        told = [
            f"{region.lower()} needs {memory[region + '_LEN'] + int(by):,} bytes, has {memory[region + '_LEN']:,}"
            for region, by in over
        ]
        raise InputError(f"the network does not fit {name}: {'; '.join(dict.fromkeys(told))}")
    raise CheckError(f"{command[0]} failed on the exported C:\n{done.stderr[:2000]}")


def _main(sources: Sequence[Source], mode: str) -> str:
    lines = ['#include "semihosting.h"', *(f'#include "{source.name}.h"' for source in sources), "", "static int32_t out;", ""]
    body = "write_file(out, codes, bytes);" if mode == "watch" else '(void)codes, (void)bytes;\n    __asm__ volatile("");'
    lines += [
        "__attribute__((noinline)) void watch(int call, const void *codes, uint32_t bytes);",
        "void watch(int call, const void *codes, uint32_t bytes)",
    ]
    lines += ["{", "    (void)call;", f"    {body}", "}", "", "int main(void)", "{", "    uint32_t count;"]
    lines += ['    const int32_t in = open_file("in", 1);', '    out = open_file("out", 5);']
    for source in sources:
        upper = source.name.upper()
        lines += ["    if (read_file(in, &count, 4)) {", "        return 97;", "    }", "    while (count--) {"]
        lines += [f"        read_file(in, {upper}_INPUT{j}, {port.nbytes});" for j, port in enumerate(source.inputs)]
        lines += ["        watch(-1, 0, 0);"] if mode == "mark" else []
        lines += [f"        {source.name}_run();"]
        lines += [
            f"        write_file(out, {upper}_OUTPUT{j}, {port.nbytes});"
            for j, port in enumerate(source.outputs)
            if mode != "watch"
        ]
        lines += ["    }"]
    return "\n".join([*lines, "    return 0;", "}", ""])


# -- counting instructions --------------------------------------------------------------------------------------------


def count(
    source: Source,
    sent: bytes,
    folder: Path,
    name: str = NAME,
    options: Sequence[str] = ("-O2",),
    libraries: Sequence[str | Path] = (),
) -> list[list[int]]:
    """Instructions of every call of a network on the board ``name``, for each example in ``sent``: exact, and not cycles.

    Raises `InputError` where the tools are missing, gcc of this machine among them, or the network does not fit.
    """
    missing = absent(name) or (None if shutil.which("gcc") else "gcc not found, which compiles QEMU's plugin")
    if missing is not None:
        raise InputError(f"{name} cannot run: {missing}")
    elf = link([source], folder, name, options, "mark", libraries)
    (folder / "icount.c").write_text((files(__package__) / "boards" / "icount.c").read_text())
    _compile(["gcc", "-shared", "-fPIC", "-O2", "icount.c", "-o", "icount.so"], folder)
    symbols = subprocess.run(
        [_board(name).compiler.replace("gcc", "nm"), elf.name], cwd=folder, capture_output=True, text=True, check=True
    )
    mark = next(int(line.split()[0], 16) & ~1 for line in symbols.stdout.splitlines() if line.endswith(" watch"))
    play(elf, counted(source, sent), name, ["-plugin", f"file=./icount.so,out=counts,mark={mark:#x}"])
    totals = [int(line) for line in (folder / "counts").read_text().split()]
    marks = [totals[i : i + len(source.watched) + 1] for i in range(0, len(totals), len(source.watched) + 1)]
    return [[after - before for before, after in itertools.pairwise(row)] for row in marks]
