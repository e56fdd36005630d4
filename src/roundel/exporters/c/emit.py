"""C99 text of an integer graph: one file of constants, kernels and calls, one header; nothing is allocated and nothing is float.

The kernels come from `kernels/`, each once for the types, weights and rounding that a network needs: X, Z, V and Y stand for types
of codes, S for that of sums, R for a rounding, W for weights. Not here: folders, self-tests and builds (`project`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.resources import files
from textwrap import indent
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import PlanError, RoundelError
from ...graph import Graph
from ...integer.ops import numbers
from .arena import Arena, Call, plan
from .calls import Kernel, Making, Ram, kernel
from .cmsis import BUILDS, Calls, choose
from .layout import Layout, Place, lay
from .running import BEGIN, SITES, count, doors, functions, running
from .running import header as running_header

#: Letters of a type -> the type.
TYPES = {"s8": "int8_t", "u8": "uint8_t", "s16": "int16_t", "s32": "int32_t", "s64": "int64_t"}

#: Bytes of one code by C type.
WIDTHS = {"int8_t": 1, "uint8_t": 1, "int16_t": 2, "int32_t": 4}


#: Conditions that never hold: DSP kernels sum in 32 bits, depthwise ones int8 by int8; Helium kernels take int8 (`dsp.c`).
DEAD = re.compile(r"DSP_(?!(s32|s8_s8_s32)\b)\w+|HELIUM_(?!(s8|s8_s8_s32|R2_s8)\b)\w+")

#: Names of files that are already there.
TAKEN = {"main", "golden", "stdint", "stdio", "stdlib", "stddef", "runner", "board", "semihosting"}


@dataclass(frozen=True)
class Port:
    """An input or output of the network as C sees it: ``offset`` in the arena in bytes, ``scale`` and ``zero`` of its codes."""

    name: str
    place: Place
    ctype: str
    offset: int
    scale: float
    zero: int

    @property
    def nbytes(self) -> int:
        return self.place.count * WIDTHS[self.ctype]


@dataclass(frozen=True)
class Source:
    """The text of a network in C. ``watched`` are the values that calls make, in order, as the watching function numbers them.

    ``cmsis`` says which calls are CMSIS-NN's where the text is compiled with -DROUNDEL_CMSIS_NN, None where none can be;
    ``cmsis_arena`` is the arena then. All else is of the text compiled without.
    """

    name: str
    code: str
    header: str
    arena: Arena
    layout: Layout
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    watched: tuple[Port, ...]
    const_bytes: int
    cmsis: Calls | None
    cmsis_arena: Arena | None


def emit(graph: Graph, name: str = "model") -> Source:
    """An integer ``graph`` as C99 under the identifier ``name``. Raises `PlanError` with every node that has no C, and why."""
    if graph.opset != "integer":
        raise PlanError("this graph holds real operations; roundel.lower makes an integer graph of a quantized model")
    name = identifier(name)
    layout = lay(graph)
    made = Making(graph, layout)
    kernels = _kernels(made)
    own = _Version.of(name, made, kernels)
    code, header, found, other = own.code, own.header, choose(made, layout.steps, kernels), None
    if found.sent:
        other = _Version.of(name, made, found.kernels, found)
        code, header = either(other.code, own.code), either(other.header, own.header)
    return Source(
        name,
        "\n\n".join(code) + "\n",
        "\n".join(header) + "\n",
        own.ports.arena,
        layout,
        own.ports.inputs,
        own.ports.outputs,
        tuple(own.ports.port(step.output) for step in layout.steps),
        own.const_bytes,
        found if found.sent else None,
        other.ports.arena if other else None,
    )


@dataclass(frozen=True)
class _Version:
    """The pieces of a text for one choice of kernels: of the .c, and the lines of the .h."""

    code: list[str]
    header: list[str]
    ports: _Ports
    const_bytes: int

    @classmethod
    def of(cls, name: str, made: Making, kernels: Sequence[Kernel], cmsis: Calls | None = None) -> _Version:
        graph, layout = made.graph, made.layout
        arena = _plan(made, kernels)
        ports = _Ports(graph, made, arena)
        structs: list[str] = []
        texts, calls, const_bytes = _Texts(), [], 0
        known: dict[tuple[str, bytes], str] = {}
        roots = dict.fromkeys(layout.places[operand].root for k in kernels for part in (k, *k.more) for operand in part.operands)
        consts = {root: f"{name}_constant{i}" for i, root in enumerate(roots) if root in graph.constants}
        if cmsis:
            texts.include("cmsis_probe", {"R": cmsis.rounding})
            calls.append(f"cmsis_probe({BUILDS[cmsis.rounding][1]});")
        for root, symbol in consts.items():
            codes = numbers(graph, root).astype(made.dtype(root))
            structs.append(array(symbol, codes))
            const_bytes += codes.nbytes
        early: list[str] = []
        if sites := count(graph):
            texts.parts[SITES.format(count=sites)] = None
            early.append(BEGIN.format(count=sites))
        for i, part in enumerate(doors(made)):
            text, size = struct(f"in{i}", part, known, inplace=False)
            structs += text
            const_bytes += size
            early.append(_call(f"in{i}", part, texts.function(part), ports, consts, arena, 0))
        for i, (step, first) in enumerate(zip(layout.steps, kernels)):
            place = layout.places[step.output]
            op = step.node.op if step.node else "copy"
            calls.append(f"/* {i} {printable(step.output)}: {op}, {shown(place)} */")
            for j, part in enumerate((first, *first.more)):
                symbol = f"s{i}" + (f"_{j}" if j else "")
                text, size = struct(symbol, part, known, inplace=i in arena.inplace)
                structs += text
                const_bytes += size
                calls.append(_call(symbol, part, texts.function(part), ports, consts, arena, i))
            for part in first.before:
                text, size = struct(f"s{i}_before", part, known, inplace=False, of=f"s{i}")
                structs += text
                const_bytes += size
                early.append(_call(f"s{i}_before", part, texts.function(part), ports, consts, arena, i))
            out = ports.port(step.output)
            calls.append(f"WATCH({i}, arena.bytes + {out.offset}, {out.nbytes});")
        code = _code(name, texts, structs, early + calls, arena)
        header = _header(name, ports.inputs, ports.outputs, arena, cmsis is not None)
        if sites:
            code += functions(name, graph)
            values = {"INPUT": [port.name for port in ports.inputs], "OUTPUT": [port.name for port in ports.outputs]}
            header[-1:-1] = running_header(name, graph, values)
        return cls(code, header, ports, const_bytes)


def either(cmsis: Sequence[str], own: Sequence[str]) -> list[str]:
    """Pieces of two texts as those of one, which is the first where ROUNDEL_CMSIS_NN is defined and the second elsewhere.

    >>> either(["a", "b", "d"], ["a", "c", "d", "e"])
    ['a', '#if defined(ROUNDEL_CMSIS_NN)', 'b', '#else', 'c', '#endif', 'd', '#if !defined(ROUNDEL_CMSIS_NN)', 'e', '#endif']
    """
    pieces: list[str] = []
    for kind, i, j, m, n in SequenceMatcher(None, cmsis, own, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces += cmsis[i:j]
            continue
        pieces.append(f"#if {'' if i < j else '!'}defined(ROUNDEL_CMSIS_NN)")
        pieces += [*cmsis[i:j], *(["#else"] if i < j and m < n else []), *own[m:n], "#endif"]
    return pieces


def _kernels(made: Making) -> list[Kernel]:
    """The kernel of every step; all that have none are refused at once."""
    found, refused = [], []
    for step in made.layout.steps:
        try:
            found.append(running(made, step, kernel(made, step)))
        except RoundelError as err:
            refused.append(f"{step.output} ({step.node.op if step.node else 'copy'}): {err}")
    if refused:
        raise PlanError(f"{len(refused)} nodes of this network have no C:\n  " + "\n  ".join(refused))
    return found


def _plan(made: Making, kernels: Sequence[Kernel]) -> Arena:
    places = made.layout.places
    root = {name: place.root for name, place in places.items()}
    sizes = {
        name: place.count * made.width(name)
        for name, place in places.items()
        if place.root == name and name not in made.graph.constants
    }
    calls = []
    for step, k in zip(made.layout.steps, kernels):
        over = root[k.over] if k.over is not None else None
        calls.append(Call(tuple(root[x] for x in step.inputs), step.output, over, k.shared, k.apart))
    outputs = [root[name] for name in made.layout.outputs.values()]
    return plan(sizes, calls, list(made.layout.inputs.values()), outputs)


class _Ports:
    """Where values lie in the arena, and the doors."""

    def __init__(self, graph: Graph, made: Making, arena: Arena) -> None:
        self.made, self.arena = made, arena
        doors = {node.name: node.attrs for node in graph if node.op in ("quantize", "dequantize")}
        self.inputs = tuple(self.port(v, name, doors.get(v)) for name, v in made.layout.inputs.items())
        self.outputs = tuple(self.port(v, v, doors[real]) for real, v in made.layout.outputs.items())

    def port(self, value: str, name: str | None = None, door: Mapping[str, Any] | None = None) -> Port:
        place, door = self.made.place(value), door or {"scale": 1.0, "zero": 0}
        ctype = TYPES[self.made.kind(value)]
        return Port(name or value, place, ctype, self.arena.offsets.get(place.root, 0), door["scale"], door["zero"])


# -- kernels ----------------------------------------------------------------------------------------------------------


class _Texts:
    """Kernel texts in the order in which they are needed, each once."""

    def __init__(self) -> None:
        self.parts: dict[str, None] = {}

    def function(self, k: Kernel) -> str:
        """The name of a kernel's function, its text and what it includes entered."""
        self.include(k.file, k.kinds)
        name = re.search(rf"static void ({k.file}(?:_[XZVYRW])*)\(", _text(k.file))
        assert name is not None, k.file
        return filled(name[1] + "(", k.kinds)[:-1]

    def include(self, file: str, kinds: Mapping[str, str]) -> None:
        text = live(filled(_text(file), kinds))
        for block in blocks(text):
            if match := re.fullmatch(r'#include "(\w+)\.c"', block):
                self.include(match[1], kinds)
            elif not re.fullmatch(r"#if .*\n#endif", block):  # what is left around an include
                self.parts.setdefault(block)


def _text(file: str) -> str:
    return (files(__package__) / "kernels" / f"{file}.c").read_text()


def blocks(text: str) -> Iterator[str]:
    """A kernel file in pieces: includes, structs, functions, each with the comment above it."""
    piece: list[str] = []
    for line in text.splitlines():
        if line.startswith("#include") or not line.strip():
            if piece and _whole(piece):
                yield "\n".join(piece)
                piece = []
            if line.startswith("#include"):
                yield line
                continue
            if not piece or not line:
                piece += [line] if piece else []
                continue
        piece.append(line)
    if piece:
        yield "\n".join(piece)


def _whole(piece: Sequence[str]) -> bool:
    opened = sum(line.startswith("#if") for line in piece) - sum(line.startswith("#endif") for line in piece)
    return not opened and (piece[-1] in ("}", "};", "#endif") or piece[-1].endswith(("*/", ";")))


def live(text: str) -> str:
    """A kernel without the branches that no compiler takes: vectors by types that they are not for.

    >>> live("#if DSP_s64\\nx\\n#elif A\\ny\\n#else\\nz\\n#endif")
    '#if A\\ny\\n#else\\nz\\n#endif'
    """
    lines: list[str] = []
    frames: list[tuple[bool, bool]] = []  # of each #if: whether one of its conditions stands, whether what follows does
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "#if":
            frames.append((False, True))
        opened, around = bool(frames) and frames[-1][0], all(kept for _, kept in frames[:-1])
        if word in ("#if", "#elif"):
            terms = [term for term in rest.split(" && ") if not (term[0] == "!" and DEAD.fullmatch(term[1:]))]
            never = any(map(DEAD.fullmatch, terms))
            if terms and not never:
                lines += [f"{'#elif' if opened else '#if'} {' && '.join(terms)}"] * around
                opened = True
            frames[-1] = (opened, not never)
        elif word == "#else":
            frames[-1] = (opened, True)
            lines += [line] * (opened and around)
        elif word == "#endif":
            frames.pop()
            lines += [line] * (opened and around)
        elif all(kept for _, kept in frames):
            lines.append(line)
    return "\n".join(lines)


def filled(text: str, kinds: Mapping[str, str]) -> str:
    """Letters in names (``dot_X_W``) become letters of types; alone (``const X *x``) they become types."""
    kinds = {"S": "s64" if kinds.get("R") == "wide" else "s32", **kinds}
    text = re.sub(r"_([XZVYRWS])(?=[_(\W])", lambda m: "_" + kinds.get(m[1], m[1]), text + " ")[:-1]
    return re.sub(r"\b([XZVYS])\b", lambda m: TYPES[kinds[m[1]]] if m[1] in kinds else m[1], text)


# -- constants --------------------------------------------------------------------------------------------------------


def array(name: str, numbers: NDArray[Any], ctype: str | None = None, aligned: bool = False) -> str:
    """A constant array of the C type that its dtype names, or of ``ctype``; ``aligned`` to words."""
    lines, line = [], ""
    for n in numbers.reshape(-1).tolist():
        word = "(-2147483647 - 1)," if n == -(2**31) else f"{n},"
        if len(line) + len(word) > 124:
            lines.append(line)
            line = ""
        line += word
    ctype = ctype or f"{numbers.dtype}_t"
    word = "WORD_ALIGNED " if aligned else ""
    return (
        f"static const {word}{ctype} {name}[{max(numbers.size, 1)}] = {{\n"
        + indent("\n".join([*lines, line or "0"]), "    ")
        + "\n};"
    )


def struct(name: str, k: Kernel, known: dict[tuple[str, bytes], str], inplace: bool, of: str = "") -> tuple[list[str], int]:
    """Texts of the arrays that a kernel's struct points to and of the struct; their bytes, the struct as on a 32-bit machine.

    An array equal to one in ``known``, (type, numbers) -> name, is that one; new ones are entered.
    An @ in a member stands for the struct ``of``.
    """
    if k.scalars is not None:
        return [], 0
    arrays: list[str] = []
    size = 0

    def value(key: str, item: Any) -> str:
        nonlocal size
        if isinstance(item, dict):
            return "{" + ", ".join(f".{key} = {value(key, part)}" for key, part in item.items()) + "}"
        if isinstance(item, np.ndarray):
            size += 4
            content = (str(item.dtype), item.tobytes())
            if content not in known:
                known[content] = f"{name}_{key}"
                arrays.append(array(f"{name}_{key}", item, aligned=key == "weight"))
                size += item.nbytes
            return known[content]
        if isinstance(item, Ram):
            size += 4
            arrays.append(f"static {item.ctype} {name}_{key}[{item.count}];")
            return f"{name}_{key}"
        if isinstance(item, str):
            size += 4
            return item.replace("@", of)
        if isinstance(item, list):
            size += 4 * len(item)
            return "{" + ", ".join(map(str, item)) + "}"
        size += 4
        number = item if key != "kept" or inplace else 0
        return str(number) if abs(number) < 2**31 else f"INT64_C({number})"

    named = re.search(rf"static void {k.file}\w*\(const struct (\w+) \*", _text(k.file))
    assert named is not None, k.file
    text = f"static {'' if k.live else 'const '}struct {named[1]} {name} = {value('', k.fields)};"
    return [*arrays, "\n".join(_wrap(text))], size


def _wrap(text: str) -> Iterator[str]:
    """Lines of at most 120 characters, broken after commas."""
    line = ""
    for word in text.split(" "):
        if len(line) + 1 + len(word) > 120:
            yield line
            line = "   "
        line = f"{line} {word}" if line else word
    yield line


# -- text -------------------------------------------------------------------------------------------------------------


def identifier(text: str) -> str:
    """A C identifier of up to 31 characters like ``text``."""
    name = re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9]", "_", text[:31])).strip("_").lower()
    return name if name and not name[0].isdigit() and name not in TAKEN else f"model_{name}".rstrip("_")


def printable(name: str) -> str:
    """A name for a comment: nothing in it can end the comment, continue the line or hide."""
    short = name if len(name) <= 60 else name[:57] + "..."
    return re.sub(r"[^A-Za-z0-9_.,:\- ]", "_", short)


def shown(place: Place) -> str:
    """``25 x 5 x 64 (axes 2 3 1)``: sizes as they lie, and the axes they are."""
    axes = [axis for axis in place.order if place.sizes[axis] > 1] or [len(place.sizes) - 1]
    return " x ".join(str(place.sizes[axis]) for axis in axes if place.sizes) + f" (axes {' '.join(map(str, axes))})"


def _call(symbol: str, k: Kernel, function: str, ports: _Ports, consts: Mapping[str, str], arena: Arena, i: int) -> str:
    """The statement that calls a kernel."""
    args = list(map(str, k.scalars)) if k.scalars is not None else [f"&{symbol}"]
    at = []
    for j, operand in enumerate(k.operands):
        port = ports.port(operand)
        skip = k.skip[j] if k.skip else 0
        if port.place.root in consts:
            at.append(consts[port.place.root] + (f" + {skip}" if skip else ""))
            continue
        const = "const " if j < len(k.operands) - 1 else ""
        at.append(f"({const}{port.ctype} *)(void *)(arena.bytes + {port.offset + skip * WIDTHS[port.ctype]})")
    args = at + args if k.scalars is not None else args + at
    if k.shared or k.apart or k.file in SCRATCHED:
        args.append(f"arena.bytes + {arena.scratch[i]}")
    return f"{function}({', '.join(args)});"


#: Kernels that take scratch even where they need none.
SCRATCHED = ("linear", "conv", "depthwise", "sum_pool", "avg_pool", "max_pool")


def _code(name: str, texts: _Texts, structs: Sequence[str], calls: Sequence[str], arena: Arena) -> list[str]:
    watch = f"{name.upper()}_WATCH"
    return [
        f"/* Integer-only network in C99, written by Roundel. Arena {arena.nbytes} bytes, lower bound {arena.bound}.\n"
        " * Needs two's complement and an arithmetic right shift of negative numbers, as every compiler in use has. */",
        f'#include "{name}.h"',
        f"#ifdef {watch}\n#define WATCH(call, codes, bytes) {watch}(call, codes, bytes)\n"
        "#else\n#define WATCH(call, codes, bytes) ((void)0)\n#endif",
        f"static union {{\n    int64_t align;\n    unsigned char bytes[{max(arena.nbytes, 1)}];\n}} arena;",
        "#if defined(__GNUC__)\n#define WORD_ALIGNED __attribute__((aligned(4)))\n#else\n#define WORD_ALIGNED\n#endif",
        *texts.parts,
        *structs,
        f"void *{name}_arena(void)\n{{\n    return arena.bytes;\n}}",
        f"void {name}_run(void)\n{{\n" + indent("\n".join(calls), "    ") + "\n}",
    ]


def _header(name: str, inputs: Sequence[Port], outputs: Sequence[Port], arena: Arena, cmsis: bool) -> list[str]:
    guard = f"{name.upper()}_H"
    lines = [
        f"#ifndef {guard}",
        f"#define {guard}",
        "",
        "#include <stdint.h>",
        "",
        "/* Fill the inputs, run, read the outputs: codes, each standing for scale * (code - zero). Running uses up the inputs.\n"
        f" * Everything lies in one static arena of {arena.nbytes} bytes; nothing is allocated. Not reentrant. */",
        f"#define {name.upper()}_ARENA_BYTES {arena.nbytes}",
        *([f"#define {name}_run {name}_run_cmsis_nn /* so that no file is compiled without */"] if cmsis else []),
        "",
    ]
    for word, ports in (("INPUT", inputs), ("OUTPUT", outputs)):
        for i, port in enumerate(ports):
            symbol = f"{name.upper()}_{word}{i}"
            lines += [
                f"/* {printable(port.name)}: {shown(port.place)}, scale {port.scale!r} */",
                f"#define {symbol}_COUNT {port.place.count}",
            ]
            lines += [f"#define {symbol}_ZERO ({port.zero})"]
            mantissa, exponent = np.frexp(port.scale)
            if mantissa == 0.5:
                lines += [f"#define {symbol}_SCALE_EXPONENT ({int(exponent) - 1}) /* the scale is 2 to this power */"]
            const = "" if word == "INPUT" else "const "
            lines += [f"#define {symbol} (({const}{port.ctype} *)(void *)((unsigned char *){name}_arena() + {port.offset}))", ""]
    lines += [
        f"void *{name}_arena(void);",
        f"void {name}_run(void);",
        "",
        "/* Where this is defined as the name of a function, it is called with the codes of every value as they are made. */",
        f"#ifdef {name.upper()}_WATCH",
        f"void {name.upper()}_WATCH(int call, const void *codes, uint32_t bytes);",
        "#endif",
        "",
        f"#endif /* {guard} */",
    ]
    return lines
