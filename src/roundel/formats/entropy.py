"""Packed codes as an ANS stream and back, exactly; a code of the saved file alone, which knows no scales, networks or files.

A matrix of codes is walked column by column. The model of a code is how often each code has come so far, in this tensor and, with
a ``distance`` d, in its context: the mean of the codes one column and d columns to the left. Both sides learn these counts as they
go, so no table is stored. All of it is integer arithmetic, so every machine forms the same models. The coder is the asymmetric
numeral system of Duda (2013) with a 64-bit state and 32-bit words, as the library constriction implements it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .grid import Uniform
from .pack import pack
from .qtensor import QTensor

#: Tensors of fewer rows stay as they are: a step codes one column.
LEAST_ROWS = 8
#: Bits of the codes that are coded at most; wider ones are stored floats.
MOST_BITS = 8
#: Codes that one stored byte may stand for, at most: a file cannot claim what no memory holds.
MOST_CODES = 256
#: Bits of a model's probabilities; contexts, at most; what the whole tensor's counts weigh in one; where counts are halved.
PRECISION, CONTEXTS, PRIOR, FULL = 24, 16, 8, 1 << 14

#: Words before the stream.
HEAD = 2

Ints = NDArray[np.int64]


def compress(q: QTensor) -> Tensor | None:
    """The codes of ``q`` as a uint32 vector, distance and CRC-32 of the packed codes first; None where packed codes take no
    more bytes.

    Raises `InputError` where the library constriction is not installed.

    >>> from roundel.solvers.rtn import rtn
    >>> from roundel.formats.format import Format
    >>> q = rtn(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), Format.parse("int4"))
    >>> words = compress(q)
    >>> words.nbytes < q.codes.numel(), torch.equal(restore(q, words), q.codes)
    (True, True)
    """
    rows, cols = q.codes.shape[0], -(-q.matrix[1] // q.format.step)
    if q.format.bits > MOST_BITS or rows < LEAST_ROWS or not cols:
        return None
    symbols = q.unpack().numpy().astype(np.int64) & ((1 << q.format.bits) - 1) ^ _flip(q)
    distances = {0, 1, q.shape[-1] if len(q.shape) > 2 else 1} if q.format.bits < MOST_BITS else {0}
    streams = {d: _encode(symbols, 1 << q.format.bits, d) for d in sorted(distances)}
    distance = min(streams, key=lambda d: len(streams[d]))
    head = np.array([distance, zlib.crc32(q.codes.contiguous().numpy().data)], np.uint32)
    best = np.concatenate([head, streams[distance]])
    if best.nbytes >= q.codes.numel() or symbols.size > MOST_CODES * best.nbytes:
        return None
    return torch.from_numpy(best)


def restore(q: QTensor, words: Tensor) -> Tensor:
    """The packed codes (rows, bytes) that `compress` was given; ``q`` is the tensor but for its codes.

    Raises ValueError for words that are no such stream, before any memory is taken that they do not pay for.
    """
    rows, cols = q.matrix[0], -(-q.matrix[1] // q.format.step)
    if words.dtype != torch.uint32 or words.ndim != 1 or len(words) < HEAD:
        raise ValueError(f"coded codes are a vector of {HEAD} or more uint32, found {words.dtype} of {tuple(words.shape)}")
    if q.format.bits > MOST_BITS or rows * cols > MOST_CODES * words.nbytes:
        raise ValueError(f"{words.nbytes} bytes cannot stand for {rows * cols} codes of {q.format.bits} bits")
    data = words.numpy()
    distance = int(data[0])
    if distance > cols:
        raise ValueError(f"a context {distance} columns to the left lies outside {cols} columns")
    coder = _library().stream.stack.AnsCoder(np.ascontiguousarray(data[HEAD:]))
    seen = np.zeros((rows, cols), dtype=np.uint8)
    for index, column, frequencies in _steps(seen, 1 << q.format.bits, distance):
        seen[index, column] = coder.decode(_model(frequencies), len(index))
    codes = pack(torch.from_numpy(seen).to(torch.int32) ^ _flip(q), q.format.bits)
    if not coder.is_empty() or zlib.crc32(codes.contiguous().numpy().data) != int(data[1]):
        raise ValueError("the coded codes are not those that were stored: their CRC-32 or their end is wrong")
    return codes


def _flip(q: QTensor) -> int:
    """What turns a bit pattern into its place in the order of levels: the sign bit of signed integers."""
    return 1 << (q.format.bits - 1) if isinstance(q.format.grid, Uniform) and q.format.grid.signed else 0


def _encode(symbols: Ints, k: int, distance: int) -> NDArray[np.uint32]:
    coder = _library().stream.stack.AnsCoder()
    for index, column, frequencies in reversed(list(_steps(symbols, k, distance))):  # a stack: the last one in comes out first
        coder.encode_reverse(symbols[index, column].astype(np.int32), _model(frequencies))
    words: NDArray[np.uint32] = coder.get_compressed()
    return words


def _steps(seen: Any, k: int, distance: int) -> Iterator[tuple[Ints, int, Ints]]:
    """(rows, column, frequencies of the k codes there) in the order of decoding; reads of ``seen`` only what was yielded."""
    rows, cols = seen.shape
    contexts = min(k, CONTEXTS)
    counts, overall = np.zeros((contexts, k), np.int64), np.zeros(k, np.int64)
    context = np.zeros(rows, np.int64)
    for column in range(cols):
        if distance and column:
            left = seen[:, column - 1].astype(np.int64)
            other = seen[:, column - distance] if column >= distance else left
            context = (left + other + 1) // 2 * contexts // k
        order, present = np.argsort(context, kind="stable"), np.bincount(context, minlength=contexts)
        start = 0
        for number in np.flatnonzero(present):
            index = order[start : start + present[number]]
            start += present[number]
            yield index, column, _frequencies(counts[number], overall)
            new = np.bincount(seen[index, column], minlength=k)
            counts[number] += new
            if counts[number].sum() > FULL:
                counts[number] >>= 1
        overall += np.bincount(seen[:, column], minlength=k)
        while overall.sum() > FULL:
            overall >>= 1


def _frequencies(counts: Ints, overall: Ints) -> Ints:
    """Frequencies of at least 1 that sum to 2^PRECISION, from a context's counts and, as its prior, those of the whole tensor."""
    prior = 2 * overall + 1
    weight = counts * prior.sum() + PRIOR * prior
    out = 1 + weight * ((1 << PRECISION) - len(weight)) // weight.sum()
    out[weight.argmax()] += (1 << PRECISION) - out.sum()
    return out


def _model(frequencies: Ints) -> Any:
    # The library gives every code 1 and shares out the rest in proportion: frequencies less 1 come back unrounded.
    return _library().stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


def _library() -> Any:
    try:
        import constriction
    except ImportError as err:
        raise InputError("entropy-coded files need the library constriction: pip install 'roundel[entropy]'") from err
    return constriction
