"""Read a Roundel artifact with numpy and json alone, as docs/file-format.md describes it: weights only, no network, no checks."""

import json
import re
import sys
from pathlib import Path

import numpy as np

FLOATS = {"fp8": (4, 3), "fp8_e5m2": (5, 2), "fp6": (2, 3), "fp6_e3m2": (3, 2), "fp4": (2, 1)}  # exponent and mantissa bits
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FIXED = {"nf4": NF4, "iq4nl": [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
         "ternary": [-1, 0, 1], "binary": [-1, 1], "e8m0": 2.0 ** np.arange(-127, 128)}  # fmt: skip


def levels(grid):
    """The level of every code of a fixed table; its length tells the bits of a code."""
    if grid in FIXED:
        return np.array(FIXED[grid], np.float32)
    if grid in FLOATS:
        e, m = FLOATS[grid]
        code = np.arange(2 ** (1 + e + m))
        field, low = code >> m & (2**e - 1), code % 2**m / 2**m
        size = np.where(field, (1 + low) * 2.0 ** (field - 2.0 ** (e - 1) + 1), low * 2.0 ** (2 - 2 ** (e - 1)))
        return (size * np.where(code >> (e + m), -1, 1)).astype(np.float32)
    kind, bits, base = re.fullmatch(r"(log|apot)(\d+)(?::([\d.]+))?", grid).groups()
    n = int(bits) - 1
    size = {0.0} | {float(base or 2) ** -i for i in range(2**n - 1)}
    if kind == "apot":  # sums of one power of two from each of n // 2 interleaved rows, and of one single power where n is odd
        t, odd, size = n // 2, n % 2, {0.0}
        rows = [[0.0, *(2.0 ** -(t * i + j + 1 + odd * (i == 2)) for i in range(3))] for j in range(t)]
        for row in rows + [[0.0, 2.0 ** -(2 * t + 1)]] * odd:
            size = {s + p for s in size for p in row}
        size = {s / max(size) for s in size}
    return np.array(sorted({s * v for v in size for s in (-1, 1)}), np.float32)


def decode(read, name, text, rows, cols):
    """The (rows, cols) float32 matrix stored as ``name``.codes, .scale, .offset and .table in the format ``text``."""
    grid, _, share, _, rest = re.fullmatch(r"([\w.:]+)(@\w+)?/?(\w*)(\*(.*))?", text).groups()
    scale, sign, offset = re.fullmatch(r"([^~-]*)([~-]?)(.*)", rest or "one").groups()
    number, step = re.fullmatch(r"u?int(\d+)|cb(\d+).*|log(\d+):fit.*", grid), int(re.search(r"^cb\d+x(\d+)|$", grid)[1] or 1)
    if grid in ("fp16", "bf16", "fp32"):
        raw = read(name + ".codes").view("<u4" if grid == "fp32" else "<u2")
        return raw.view("<f2").astype(np.float32) if grid == "fp16" else (raw.astype("<u4") << (16 * (grid == "bf16"))).view("<f4")
    if number:
        bits = int(number[1] or number[3] or (int(number[2]) - 1).bit_length())
    else:
        table = levels(grid)
        bits = (len(table) - 1).bit_length()
    stream = np.unpackbits(read(name + ".codes"), axis=1, bitorder="little")[:, : -(-cols // step) * bits]
    codes = stream.reshape(rows, -(-cols // step), bits) @ (1 << np.arange(bits))
    if number and number[1]:
        value = (codes - (2**bits * (codes >> (bits - 1)) if grid[0] == "i" else 0)).astype(np.float32)
    elif number:
        table = read(name + ".table").astype(np.float32)
        table = table.reshape(len(table), -1, step)
        which = np.arange(rows) if len(table) > 1 else np.zeros(rows, int)
        value = table[which[:, None], codes].reshape(rows, -1)[:, :cols]
    else:
        value = table[codes]
    down, across = {"channel": (1, cols), "token": (1, cols), "tensor": (rows, cols), "": (rows, cols)}.get(share) or (
        (1, int(share[1:])) if share[0] == "g" else map(int, share[1:].split("x"))
    )

    def spread(part, text):
        blocks = decode(read, name + part, text, -(-rows // down), -(-cols // across))
        return blocks.repeat(down, 0)[:rows].repeat(across, 1)[:, :cols]

    shift = spread(".offset", offset) if sign else np.float32(0)
    value = (value - shift if sign == "~" else value) * (spread(".scale", scale) if scale != "one" else np.float32(1))
    return value - shift if sign == "-" else value


def read_artifact(path):
    """(the document under the metadata key "roundel", name -> array): quantized tensors as float32, the others as they are."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    document = json.loads(header.pop("__metadata__")["roundel"])
    types = {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }

    def read(name):
        entry = header.pop(name)
        raw = np.frombuffer(data[start:], np.uint8)[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":  # numpy has no bfloat16: the upper half of a float32
            return (raw.view("<u2").astype("<u4") << 16).view("<f4").reshape(entry["shape"])
        return raw.view(types[entry["dtype"]]).reshape(entry["shape"])

    out = {}
    for name, entry in document["tensors"].items():
        shape, axis = entry["shape"], entry["axis"]
        front = [shape[axis], *shape[:axis], *shape[axis + 1 :]] if len(shape) > 1 else [1, *shape]
        matrix = decode(read, name, entry["format"], front[0], int(np.prod(front[1:])))
        out[name] = np.moveaxis(matrix.reshape(front), 0, axis) if len(shape) > 1 else matrix.reshape(shape)
    return document, out | {name: read(name) for name in list(header)}


if __name__ == "__main__":
    _, tensors = read_artifact(sys.argv[1])
    for name, value in sorted(tensors.items()):
        print(name, value.dtype, list(value.shape))
