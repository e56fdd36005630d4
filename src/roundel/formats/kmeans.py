"""Learned tables: exact weighted 1-D k-means for all rows at once, and Lloyd's k-means for vectors; knows no formats and no bits.

The scalar case is solved exactly by dynamic programming over sorted points, D[m][j] = min_i D[m-1][i] + cost(i, j), where the
best i grows with j and with m, so that a divide and conquer over j needs O(n log n) costs a layer (Wu 1991; Grønlund et al., "Fast
exact k-means, k-medians and Bregman divergence clustering in 1D", 2017). Cost is the weighted squared error in the cluster, from
prefix sums in float64: exact means up to their rounding, about 1e-15 of the row's own total squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: the most distinct points of a row that are solved exactly
EXACT = 1 << 14
#: candidate costs evaluated at once; bounds working memory near 200 MB
CHUNK = 1 << 21
#: distances of vectors evaluated at once: 2 MB, which stays in the cache
VECTOR_CHUNK = 1 << 18

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def kmeans(values: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """The k centroids of each row of values (rows, n), sorted ascending, float32 (rows, k).

    They minimise sum_i weights_i (values_i - nearest centroid)^2 over all choices of centroids while a row has at most 16,384
    distinct values. Above that the row is first reduced to 16,384 weighted means of neighbours and the result
    improved by Lloyd's iteration on all points until its error stops falling: not provably optimal then. A row with at most k
    distinct values returns exactly these, the last one repeated. Values and weights are finite, weights are not negative (None: all
    1; a row of zero weights counts as all 1); ValueError otherwise.
    """
    if values.dim() != 2 or values.shape[1] == 0 or k < 1:
        raise ValueError(f"k-means takes (rows, n >= 1) values and k >= 1, found {tuple(values.shape)} and k = {k}")
    points = _as_numpy(values)
    mass = np.ones_like(points) if weights is None else _as_numpy(weights)
    if mass.shape != points.shape or not np.isfinite(points).all() or not np.isfinite(mass).all() or (mass < 0).any():
        raise ValueError("k-means takes finite values, and finite weights of the same shape that are not negative")
    mass[mass.sum(1) == 0] = 1
    table = np.empty((len(points), k))
    step = max(1, 2 * CHUNK // (points.shape[1] * k))  # the program keeps k choices a point
    for start in range(0, len(points), step):
        table[start : start + step] = _chunk(points[start : start + step], mass[start : start + step], k)
    return torch.from_numpy(table).to(torch.float32).to(values.device)


def kmeans_whole(values: Tensor, weights: Tensor | None, k: int, most: int) -> Tensor:
    """The k distinct whole numbers of -most..most that serve each row of values (rows, n) best, sorted, float32 (rows, k).

    They minimise sum_i weights_i (values_i - nearest entry)^2 exactly, by dynamic programming over the entries: between two
    neighbours the cost does not depend on the others. Same demands on values and weights as `kmeans`.
    """
    if not 1 <= k <= 2 * most + 1:
        raise ValueError(f"there are {2 * most + 1} whole numbers from {-most} to {most}, not {k}")
    points, mass = _as_numpy(values), np.ones(tuple(values.shape)) if weights is None else _as_numpy(weights)
    if mass.shape != points.shape or not np.isfinite(points).all() or not np.isfinite(mass).all() or (mass < 0).any():
        raise ValueError("k-means takes finite values, and finite weights of the same shape that are not negative")
    level = np.arange(-most, most + 1, dtype=np.float64)
    table = np.stack([_whole(x, w if w.any() else np.ones_like(w), k, level) for x, w in zip(points, mass, strict=True)])
    return torch.from_numpy(table).to(torch.float32).to(values.device)


def _whole(value: Floats, mass: Floats, k: int, level: Floats) -> Floats:
    order = np.argsort(value, kind="stable")
    value, mass = value[order], mass[order]
    s0, s1, s2 = (np.concatenate([[0.0], np.cumsum(mass * value**power)]) for power in (0, 1, 2))
    at, middle = np.searchsorted(value, level), np.searchsorted(value, (level[:, None] + level) / 2)

    def cost(start: Ints, stop: Ints, to: Floats) -> Floats:
        """Of the points from start to stop under one entry."""
        out: Floats = s2[stop] - s2[start] - 2 * to * (s1[stop] - s1[start]) + to * to * (s0[stop] - s0[start])
        return out

    between = cost(at[:, None], middle, level[:, None]) + cost(middle, at[None, :], level[None, :])
    between[np.tril_indices(len(level))] = np.inf
    best, chosen = cost(np.zeros_like(at), at, level), []
    for _ in range(k - 1):
        total = best[:, None] + between
        chosen.append(total.argmin(0))
        best = total.min(0)
    entry = int((best + cost(at, np.full_like(at, len(value)), level)).argmin())
    entries = [entry, *(entry := int(choice[entry]) for choice in reversed(chosen))]
    return level[entries[::-1]]


def kmeans_vectors(points: Tensor, weights: Tensor | None, k: int, iters: int = 25, seed: int = 0) -> Tensor:
    """A codebook (k, d), float32, for points (n, d): k-means++ from `seed`, at most `iters` rounds of Lloyd; a local optimum.

    Minimises sum weights * (point - nearest entry)^2; weights is (n,) for a point or (n, d) for each coordinate. A cluster that
    falls empty restarts at the point that is worst off. At most k distinct points are returned exactly, the last one repeated.
    """
    if points.dim() != 2 or len(points) == 0 or k < 1:
        raise ValueError(f"k-means takes (n >= 1, d) points and k >= 1, found {tuple(points.shape)} and k = {k}")
    exact = torch.unique(points, dim=0)
    if len(exact) <= k:
        return torch.cat([exact, exact[-1:].expand(k - len(exact), -1)]).to(torch.float32)
    x = points.to(torch.float64).T.contiguous()
    centre = x.mean(1, keepdim=True)
    x = x - centre
    w = torch.ones_like(x) if weights is None else weights.to(x).reshape(len(points), -1).T.expand_as(x).contiguous()
    table = _plus_plus(x, w, k, torch.Generator().manual_seed(seed))
    last = float("inf")
    for _ in range(iters):
        code = _nearest(x, w, table)
        error = _error(x, w, table.T[:, code])
        total = float(error.sum())
        if total >= last:
            break
        last = total
        mass, first = (torch.zeros_like(table).index_add_(0, code, each.T) for each in (w, w * x))
        table = torch.where(mass > 0, first / mass, table)
        for empty in (torch.bincount(code, minlength=k) == 0).nonzero()[:, 0].tolist():
            table[empty] = x[:, error.argmax()]  # one at a time: else all of them restart in the same far place
            error = torch.minimum(error, _error(x, w, table[empty, :, None]))
    return (table + centre.T).to(torch.float32)


def _as_numpy(values: Tensor) -> Floats:
    return values.detach().to("cpu", torch.float64, copy=True).numpy()


@dataclass(frozen=True)
class _Rows:
    """Sorted distinct points (rows, n); prefix sums (rows, n + 1) of weight times (point - `centre`)^0, 1, 2; centre (rows, 1).

    A row of fewer points than n repeats its last one with weight 0. Sums are anchored at the row's middle, so that an outlier far
    out at either end costs no precision near the centre.
    """

    value: Floats
    centre: Floats
    count: Ints
    s0: Floats
    s1: Floats
    s2: Floats


def _rows(value: Floats, mass: Floats, count: Ints) -> _Rows:
    mid = (count - 1) // 2
    centre = np.take_along_axis(value, mid[:, None], 1)
    offset = value - centre
    sums = [_anchored(mass * power, mid) for power in (np.ones_like(offset), offset, offset * offset)]
    return _Rows(value, centre, count, *sums)


def _anchored(terms: Floats, mid: Ints) -> Floats:
    """Prefix sums P (rows, n + 1) with P[mid] = 0, added up outwards from there."""
    rows, n = terms.shape
    right = np.arange(n) >= mid[:, None]
    out = np.zeros((rows, n + 1))
    out[:, 1:] = np.cumsum(np.where(right, terms, 0), axis=1)
    out[:, :n] -= np.cumsum(np.where(right, 0, terms)[:, ::-1], axis=1)[:, ::-1]
    return out


def _merge(points: Floats, mass: Floats) -> tuple[Floats, Floats, Ints]:
    """Sort each row and merge equal values: values, weights (the last value repeated with weight 0), number of distinct values."""
    order = np.argsort(points, axis=1, kind="stable")
    points, mass = np.take_along_axis(points, order, 1), np.take_along_axis(mass, order, 1)
    fresh = np.ones(points.shape, dtype=bool)
    fresh[:, 1:] = points[:, 1:] != points[:, :-1]
    place: Ints = np.cumsum(fresh, axis=1) - 1
    count = place[:, -1] + 1
    value = np.repeat(points[:, -1:], int(count.max()), axis=1)
    np.put_along_axis(value, place, points, 1)
    row = np.arange(len(points))[:, None]
    weight = np.bincount((row * value.shape[1] + place).ravel(), mass.ravel(), value.size)
    return value, np.asarray(weight, dtype=np.float64).reshape(value.shape), count


def _chunk(points: Floats, mass: Floats, k: int) -> Floats:
    value, weight, count = _merge(points, mass)
    table = np.empty((len(points), k))
    small = count <= EXACT
    if small.any():
        n = count[small].max()
        table[small] = _solve(_rows(value[small, :n], weight[small, :n], count[small]), k)
    for row in np.flatnonzero(~small):
        n = count[row]
        full = _rows(value[row : row + 1, :n], weight[row : row + 1, :n], count[row : row + 1])
        table[row] = _lloyd(full, _solve(_reduce(full), k)[0])
    return table


def _reduce(full: _Rows) -> _Rows:
    """One row to at most EXACT weighted means of neighbours: half the bins follow the points, half the range, for the tails."""
    value = full.value[0]
    place = np.arange(len(value)) / len(value) + (value - value[0]) / (value[-1] - value[0])
    edges = np.unique(np.concatenate([np.searchsorted(place, np.arange(EXACT) * (2 / EXACT)), [len(value)]]))
    mass = np.diff(full.s0[0, edges])
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = full.centre[0] + np.diff(full.s1[0, edges]) / mass
    value = np.where(mass > 0, mean, value[edges[:-1]])
    order = np.argsort(value, kind="stable")  # rounding may swap neighbours
    return _rows(value[order][None], mass[order][None], np.array([len(order)]))


def _cost(rows: _Rows, row: Ints, start: Ints, stop: Ints) -> Floats:
    """Weighted squared error of the points start..stop-1 of a row as one cluster."""
    n = rows.s0.shape[1]
    a, b = row * n + start, row * n + stop
    mass = rows.s0.take(b) - rows.s0.take(a)
    first = rows.s1.take(b) - rows.s1.take(a)
    second = rows.s2.take(b) - rows.s2.take(a)
    return np.maximum(second - first * first / np.where(mass > 0, mass, np.inf), 0)


def _solve(rows: _Rows, k: int) -> Floats:
    """Optimal centroids (rows, k) of every row; rows with at most k points return their points."""
    n = rows.value.shape[1]
    table = rows.value[:, np.minimum(np.arange(k), n - 1)]  # right where count <= k: the last point repeats
    hard = np.flatnonzero(rows.count > k)
    if len(hard) == 0:
        return table
    rows = _Rows(rows.value[hard], rows.centre[hard], rows.count[hard], rows.s0[hard], rows.s1[hard], rows.s2[hard])
    many = len(hard)
    all_rows, everywhere = np.repeat(np.arange(many), n + 1), np.tile(np.arange(n + 1), many)
    best = _cost(rows, all_rows, np.zeros_like(everywhere), everywhere).reshape(many, n + 1)
    choice = np.zeros((k, many, n + 1), dtype=np.int64)  # choice[m, row, j]: where cluster m starts if it ends before j
    for layer in range(1, k):
        best, choice[layer] = _layer(rows, best, choice[layer - 1], layer)
    stop = np.full(many, n)
    for layer in range(k - 1, -1, -1):
        start = choice[layer, np.arange(many), stop]
        table[hard, layer] = _means(rows, np.arange(many), start, stop)
        stop = start
    return np.maximum.accumulate(table, axis=1)  # a mean may round past its neighbour by one ulp


def _means(rows: _Rows, row: Ints, start: Ints, stop: Ints) -> Floats:
    """Weighted mean of the points start..stop-1, inside their range; a cluster without weight is its first point."""
    mass = rows.s0[row, stop] - rows.s0[row, start]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = rows.centre[row, 0] + (rows.s1[row, stop] - rows.s1[row, start]) / mass
    last = rows.value.shape[1] - 1
    low, high = rows.value[row, np.minimum(start, last)], rows.value[row, np.clip(stop - 1, 0, last)]
    return np.where((mass > 0) & (stop > start), np.clip(mean, low, np.maximum(low, high)), low)


def _layer(rows: _Rows, before: Floats, floor: Ints, layer: int) -> tuple[Floats, Ints]:
    """One layer of the program for all rows: the best cost of layer + 1 clusters for every end, and where the last one starts.

    Ends are visited by levels of a binary subdivision; what the neighbours chose, and the layer before, bounds the search.
    """
    many, width = before.shape
    best, choice = before.copy(), np.empty((many, width), dtype=np.int64)
    best[:, : layer + 1], choice[:, : layer + 1] = 0, np.arange(layer + 1)  # no more points than clusters: no cost
    before = before - rows.s2  # the part of the cost that depends on the start alone
    step = 1 << width.bit_length()
    while step := step // 2:
        ends = np.arange(layer + step, width, 2 * step)
        low = np.maximum(choice[:, ends - step], floor[:, ends])
        high = np.repeat(ends[None, :] - 1, many, axis=0)
        known = ends + step < width
        high[:, known] = np.minimum(high[:, known], choice[:, ends[known] + step])
        row = np.repeat(np.arange(many), len(ends))
        end = np.tile(ends, many)
        start = _search(rows, before, row * width, row * width + end, low.ravel(), high.ravel())
        choice[row, end] = start
    row, end = np.repeat(np.arange(many), width - layer - 1), np.tile(np.arange(layer + 1, width), many)
    start = choice[row, end]
    best[row, end] = (before + rows.s2)[row, start] + _cost(rows, row, start, end)
    return best, choice


def _search(rows: _Rows, before: Floats, base: Ints, end: Ints, low: Ints, high: Ints) -> Ints:
    """For each end (flat index, its row begins at base): the first start in low..high of least cost."""
    s0, s1, flat = rows.s0.ravel(), rows.s1.ravel(), before.ravel()
    start = np.empty_like(end)
    count = high - low + 1
    total = np.cumsum(count)
    cut = 0
    while cut < len(end):  # ragged ranges, flattened a chunk at a time
        stop = max(cut + 1, int(np.searchsorted(total, (total[cut - 1] if cut else 0) + CHUNK, side="right")))
        size, begin, final = count[cut:stop], base[cut:stop] + low[cut:stop], end[cut:stop]
        first = np.cumsum(size) - size
        index = np.arange(int(size.sum())) + np.repeat(begin - first, size)
        mass = np.repeat(s0[final], size) - s0.take(index)
        value = np.repeat(s1[final], size) - s1.take(index)
        value *= value
        np.divide(value, mass, out=value, where=mass > 0)
        np.subtract(flat.take(index), value, out=value)
        hit = np.flatnonzero(value == np.repeat(np.minimum.reduceat(value, first), size))
        which = np.searchsorted(first, hit, side="right") - 1
        fresh = np.diff(which, prepend=-1) > 0
        start[cut:stop] = index[hit[fresh]] - base[cut:stop]
        cut = stop
    return start


def _lloyd(full: _Rows, table: Floats) -> Floats:
    """Lloyd's iteration for one row until its error stops falling; sorted points and prefix sums make a round O(k log n)."""
    value, row, last = full.value[0], np.zeros(len(table), dtype=np.int64), np.inf
    while True:
        edges = np.concatenate([[0], np.searchsorted(value, (table[1:] + table[:-1]) / 2), [len(value)]])
        error = float(_cost(full, row, edges[:-1], edges[1:]).sum())
        if not error < last:
            return table
        last = error
        mean = _means(full, row, edges[:-1], edges[1:])
        table = np.where(edges[1:] > edges[:-1], mean, table)


def _plus_plus(x: Tensor, w: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) on points x (d, n): each entry is drawn in proportion to the error left so far."""
    draws = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    table = torch.empty(k, len(x), dtype=x.dtype, device=x.device)
    chance = w.sum(0)
    error = torch.full_like(chance, torch.inf)
    for index, draw in enumerate(draws):
        total = chance.cumsum(0)
        pick = int(torch.searchsorted(total, draw * total[-1], right=True).clamp(max=x.shape[1] - 1))
        table[index] = x[:, pick]
        chance = error = torch.minimum(error, _error(x, w, table[index, :, None]))
    return table


def _nearest(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """The entry of least weighted squared error for every column of x (d, n), in chunks that fit the cache."""
    code = torch.empty(x.shape[1], dtype=torch.int64, device=x.device)
    plain = bool((w == w[:1]).all())  # one weight a point changes no choice
    step = max(1, VECTOR_CHUNK // len(table))
    for start in range(0, len(code), step):
        part = slice(start, start + step)
        if plain:
            code[part] = torch.addmm((table * table).sum(1), x[:, part].T, table.T, alpha=-2).argmin(1)
        else:
            code[part] = torch.addmm(w[:, part].T @ (table * table).T, (w * x)[:, part].T, table.T, alpha=-2).argmin(1)
    return code


def _error(x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
    """Weighted squared error (n,) of each column of x (d, n)."""
    return (w * (x - chosen) ** 2).sum(0)
