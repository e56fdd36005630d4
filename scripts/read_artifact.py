"""Read a Roundel artifact with numpy and json alone, as docs/file-format.md describes it: numbers only, no network, no checks."""

import json
import re
import sys
from pathlib import Path

import numpy as np

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FIXED = {"nf4": NF4, "iq4nl": [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
         "ternary": [-1, 0, 1], "binary": [-1, 1], "e8m0": 2.0 ** np.arange(-127, 128)}  # fmt: skip
FLOATS = {"fp8": (4, 3), "fp8_e5m2": (5, 2), "fp6": (2, 3), "fp6_e3m2": (3, 2), "fp4": (2, 1)}  # exponent and mantissa bits
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
         "U32": "<u4", "BOOL": "?"}  # fmt: skip


def levels(grid):
    """The level of every code of a grid that is not learned."""
    if grid in FIXED:
        return FIXED[grid]
    if grid in FLOATS:  # bit patterns: sign, exponent, mantissa, subnormals where the exponent is 0
        e, m = FLOATS[grid]
        code = np.arange(2 ** (1 + e + m))
        power, part = code >> m & (2**e - 1), code % 2**m / 2**m
        size = np.where(power, (1 + part) * 2.0 ** (power - 2.0 ** (e - 1) + 1), part * 2.0 ** (2 - 2 ** (e - 1)))
        return size * np.where(code >> (e + m), -1, 1)
    kind, bits, base = re.fullmatch(r"(u?int|log|apot)(\d+)(?::([\d.]+))?", grid).groups()
    n = int(bits) - 1
    if kind == "uint":
        return np.arange(2 << n)
    if kind == "int":
        return (np.arange(2 << n) ^ 1 << n) - (1 << n)  # two's complement
    sizes = {0.0, *(float(base or 2) ** -i for i in range(2**n - 1))}
    if kind == "apot":
        t, odd, sizes = n // 2, n % 2, {0.0}
        lists = [[0.0, *(2.0 ** -(t * i + j + 1 + odd * (i == 2)) for i in range(3))] for j in range(t)]
        for terms in lists + [[0.0, 2.0 ** -(2 * t + 1)]] * odd:
            sizes = {s + term for s in sizes for term in terms}
        sizes = {s / max(sizes) for s in sizes}
    return sorted({s * sign for s in sizes for sign in (-1, 1)})


def ans(words, rows, cols, k, flip):
    """The codes (rows, cols) below k of an ANS stream; see "Codes as an ANS stream"."""
    distance, words, state = int(words[0]), [int(word) for word in words[2:]], 0
    while state < 2**32 and words:
        state = state << 32 | words.pop()
    codes, contexts = np.zeros((rows, cols), np.int64), min(k, 16)
    counts, overall, context = np.zeros((contexts, k), np.int64), np.zeros(k, np.int64), np.zeros(rows, np.int64)
    for column in range(cols):
        if distance and column:
            left = codes[:, column - 1]
            context = (left + (codes[:, column - distance] if column >= distance else left) + 1) // 2 * contexts // k
        for c in np.unique(context):
            prior = 2 * overall + 1
            weight = counts[c] * prior.sum() + 8 * prior
            share = 1 + weight * (2**24 - k) // weight.sum()
            share[weight.argmax()] += 2**24 - share.sum()
            start = np.cumsum(share) - share
            for row in np.flatnonzero(context == c):
                low = state & 2**24 - 1
                code = codes[row, column] = np.searchsorted(start, low, "right") - 1
                state = (state >> 24) * int(share[code]) + low - int(start[code])
                if state < 2**32 and words:
                    state = state << 32 | words.pop()
            counts[c] += np.bincount(codes[context == c, column], minlength=k)
            counts[c] >>= counts[c].sum() > 2**14
        overall += np.bincount(codes[:, column], minlength=k)
        while overall.sum() > 2**14:
            overall >>= 1
    return codes ^ flip


def decode(read, name, text, rows, cols):
    """The (rows, cols) float32 matrix stored as ``name``.codes, .scale, .offset and .table in the format ``text``."""
    if text in ("fp16", "bf16", "fp32"):
        raw = read(name + ".codes")
        return (raw.view("<u2").astype("<u4") << 16).view("<f4") if text == "bf16" else raw.view(TYPES["F" + text[2:]]).astype("f4")
    grid, learned, share, scale, sign, offset = re.fullmatch(r"([\w.:]+)(@\w+)?(?:/(\w+)\*([^~-]+)([~-]?)(.*))?", text).groups()
    step = int((re.match(r"cb\d+x(\d+)", grid) or [0, 1])[1])
    home = f"model:{text}" if learned == "@model" else name
    table = np.asarray(read(home + ".table") if learned else [levels(grid)], np.float32)
    table = table.reshape(len(table), -1, step)
    bits, width = max(1, table.shape[1] - 1).bit_length(), -(-cols // step)
    if (words := read(name + ".codes.ans", None)) is not None:
        codes = ans(words, rows, width, 1 << bits, 1 << bits - 1 if re.match(r"int\d", grid) else 0)
    else:
        stream = np.unpackbits(read(name + ".codes"), axis=1, bitorder="little")[:, : width * bits]
        codes = stream.reshape(rows, width, bits) @ (1 << np.arange(bits))
    which = np.arange(rows)[:, None] if len(table) > 1 else 0
    value = table[which, codes].reshape(rows, -1)[:, :cols]
    block = re.fullmatch(r"b(\d+)x(\d+)|g(\d+)|(.*)", share or "tensor")
    down = int(block[1] or (rows if block[4] == "tensor" else 1))
    across = int(block[2] or block[3] or cols)

    def spread(part, text):
        blocks = decode(read, name + part, text, -(-rows // down), -(-cols // across))
        return blocks.repeat(down, 0)[:rows].repeat(across, 1)[:, :cols]

    shift = spread(".offset", offset) if sign else 0
    value = value - shift if sign == "~" else value
    value = value if scale in (None, "one") else value * spread(".scale", scale)
    return value - shift if sign == "-" else value


def read_artifact(path):
    """(the document under the metadata key "roundel", name -> array): quantized tensors as float32, the others as they are."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    document = json.loads(header.pop("__metadata__")["roundel"])

    def read(name, *missing):
        if missing and name not in header:
            return missing[0]
        entry = header[name]
        done.add(name)
        raw = np.frombuffer(data[start:], np.uint8)[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":  # numpy has no bfloat16: the upper half of a float32
            return (raw.view("<u2").astype("<u4") << 16).view("<f4").reshape(entry["shape"])
        return raw.view(TYPES[entry["dtype"]]).reshape(entry["shape"])

    arrays, done = {}, set()
    for name, entry in document["tensors"].items():
        shape, axis = entry["shape"], entry["axis"]
        front = [shape[axis], *shape[:axis], *shape[axis + 1 :]] if len(shape) > 1 else [1, *shape]
        matrix = decode(read, name, entry["format"], front[0], int(np.prod(front[1:])))
        arrays[name] = np.moveaxis(matrix.reshape(front), 0, axis) if len(shape) > 1 else matrix.reshape(shape)
    return document, arrays | {name: read(name) for name in list(header.keys() - done)}


if __name__ == "__main__":
    for name, value in sorted(read_artifact(sys.argv[1])[1].items()):
        print(name, value.dtype, list(value.shape))
