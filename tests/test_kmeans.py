"""Learned tables against the `kmeans1d` package and brute force; no formats."""

import time
from itertools import combinations

import kmeans1d
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.formats import kmeans as module
from roundel.formats.kmeans import kmeans, kmeans_vectors


def error(values: torch.Tensor, weights: torch.Tensor | None, table: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of each row, float64."""
    near = (values.double()[:, :, None] - table.double()[:, None, :]).square().amin(2)
    return (near if weights is None else near * weights.double()).sum(1)


def brute(values: list[float], weights: list[float], k: int) -> float:
    """Least error over all ways to cut the sorted points into k runs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    x, w = [values[i] for i in order], [weights[i] for i in order]
    best = float("inf")
    for cuts in combinations(range(1, len(x)), min(k, len(x)) - 1):
        total = 0.0
        for a, b in zip((0, *cuts), (*cuts, len(x))):
            mass = sum(w[a:b])
            mean = sum(p * q for p, q in zip(x[a:b], w[a:b])) / mass if mass else 0.0
            total += sum(q * (p - mean) ** 2 for p, q in zip(x[a:b], w[a:b]))
        best = min(best, total)
    return best


@pytest.mark.proves("formats.codebook")
@given(
    points=st.lists(st.tuples(st.integers(-20, 20), st.sampled_from([0.0, 0.25, 1.0, 3.0, 100.0])), min_size=1, max_size=9),
    k=st.integers(1, 6),
    scale=st.sampled_from([1.0, 0.37, 1e-20, 1e20]),
)
@settings(deadline=None, max_examples=300)
def test_no_cut_of_few_points_is_better(points: list[tuple[int, float]], k: int, scale: float) -> None:
    values, weights = torch.tensor([[p * scale for p, _ in points]]), torch.tensor([[w for _, w in points]])
    table = kmeans(values, weights, k)
    mass = weights if weights.sum() else torch.ones_like(weights)
    best = brute(values[0].tolist(), mass[0].tolist(), k)
    assert table.shape == (1, k)
    assert torch.equal(table, table.sort(1).values)
    # float32 centroids: each is off by at most half an ulp of its size
    rounding = float((mass.double() * (values.double() * 2**-22) ** 2).sum())
    assert float(error(values, mass, table)) <= best * (1 + 1e-6) + rounding


@pytest.mark.proves("formats.codebook")
@pytest.mark.parametrize("n", [17, 100, 1000])
@pytest.mark.parametrize("k", [2, 3, 8, 16])
def test_equals_kmeans1d(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n * k)
    x = torch.randn(12, n, generator=generator) ** 3
    x[3] = x[3].round(decimals=1)
    x[4] += 1000
    w = torch.randint(1, 40, (12, n), generator=generator).float()
    for weights in (None, w):
        table = kmeans(x, weights, k)
        theirs = torch.tensor([_oracle(row, None if weights is None else weights[i], k) for i, row in enumerate(x)])
        torch.testing.assert_close(error(x, weights, table), error(x, weights, theirs), rtol=1e-6, atol=1e-9)
        for i in range(12):  # alone as in company
            assert torch.equal(kmeans(x[i : i + 1], None if weights is None else weights[i : i + 1], k), table[i : i + 1])


def _oracle(row: torch.Tensor, weights: torch.Tensor | None, k: int) -> list[float]:
    """kmeans1d, which has no weights (so points are repeated), padded where the row has fewer distinct values."""
    points = row if weights is None else row.repeat_interleave(weights.long())
    found = kmeans1d.cluster(points.tolist(), min(k, len(row.unique()))).centroids
    return found + found[-1:] * (k - len(found))


def test_exact_at_the_largest_size() -> None:
    x = torch.randn(1, module.EXACT, generator=torch.Generator().manual_seed(1))
    theirs = torch.tensor([kmeans1d.cluster(x[0].tolist(), 16).centroids])
    torch.testing.assert_close(error(x, None, kmeans(x, None, 16)), error(x, None, theirs), rtol=1e-7, atol=0)


@pytest.mark.parametrize("k", [4, 16, 256])
def test_above_the_largest_size_it_is_close_and_a_fixed_point(k: int) -> None:
    x = torch.randn(1, 60_000, generator=torch.Generator().manual_seed(2))
    table = kmeans(x, None, k)
    best = torch.tensor([kmeans1d.cluster(x[0].tolist(), k).centroids])
    assert error_large(x, table) <= error_large(x, best) * 1.0005
    codes = torch.bucketize(x[0].double(), (table[0, 1:] + table[0, :-1]).double() / 2)
    mean = torch.zeros(k, dtype=torch.float64).index_add_(0, codes, x[0].double()) / codes.bincount(minlength=k)
    torch.testing.assert_close(table[0].double(), mean, rtol=1e-3, atol=1e-4)


def error_large(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    codes = torch.bucketize(x[0], (table[0, 1:] + table[0, :-1]) / 2)
    return (x[0].double() - table[0].double()[codes]).square().sum()


def test_many_points_of_few_values_stay_exact() -> None:
    levels = torch.tensor([-3.0, -1.1, 0.0, 0.7, 1e-3, 12.0])
    x = levels[torch.randint(0, 6, (2, 100_000), generator=torch.Generator().manual_seed(3))]
    assert torch.equal(kmeans(x, torch.rand(2, 100_000), 6), levels.sort().values.expand(2, 6))
    half = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(4)).mul(100).round().div(100)
    theirs = kmeans1d.cluster(half[0].tolist(), 8).centroids
    torch.testing.assert_close(kmeans(half, None, 8), torch.tensor([theirs]), rtol=1e-6, atol=1e-7)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8), st.integers(8, 10))
@settings(deadline=None)
def test_few_distinct_values_return_exactly(values: list[float], k: int) -> None:
    expected = sorted(set(values))
    table = kmeans(torch.tensor([values * 3]), None, k)[0].tolist()
    assert table == expected + expected[-1:] * (k - len(expected))


def test_rows_of_different_counts_solve_together() -> None:
    x = torch.tensor([[1.0, 1, 1, 1, 1], [1, 2, 3, 4, 5], [5, 5, 0, 0, 1], [0, 10, 11, 20, 21]])
    assert kmeans(x, None, 3).tolist() == [[1, 1, 1], [1, 2.5, 4.5], [0, 1, 5], [0, 10.5, 20.5]]


def test_weights_pull_and_zero_weights_count_for_nothing() -> None:
    x = torch.tensor([[0.0, 1.0, 10.0, 14.0, 1000.0]])
    assert kmeans(x, torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]), 2).tolist() == [[0.75, 12.0]]
    assert torch.equal(kmeans(x, torch.zeros(1, 5), 2), kmeans(x, None, 2))


@pytest.mark.parametrize("outlier", [1e30, -1e30])
def test_an_outlier_does_not_spoil_the_rest(outlier: float) -> None:
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(5))
    rest = kmeans(x, None, 7)
    x[0, 10] = outlier
    assert float(x[0, 10]) in kmeans(x, None, 8)[0].tolist()
    without = torch.cat([x[:, :10], x[:, 11:]], 1)
    table = kmeans(x, None, 8)[0]
    inner = table[table.abs() < 1e29]
    assert float(error(without, None, inner[None])) <= 1.01 * float(error(without, None, rest)) + 1e-3
    assert torch.isfinite(table).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad: float) -> None:
    good = torch.ones(2, 3)
    with pytest.raises(ValueError, match="finite"):
        kmeans(torch.tensor([[1.0, bad]]), None, 2)
    with pytest.raises(ValueError, match="finite"):
        kmeans(good, torch.full((2, 3), bad), 2)
    with pytest.raises(ValueError, match="not negative"):
        kmeans(good, -good, 2)
    with pytest.raises(ValueError, match="n >= 1"):
        kmeans(torch.ones(2, 0), None, 2)


def test_speed() -> None:
    """Many small rows and one large one; about 2.5 s and 0.3 s on one core, with room here for a busy one."""
    generator = torch.Generator().manual_seed(6)
    for shape, seconds in (((500, 384), 4.0), ((1, 600_000), 2.0)):
        x = torch.randn(shape, generator=generator)
        start = time.perf_counter()
        kmeans(x, None, 16)
        assert time.perf_counter() - start < seconds


# -- vectors ------------------------------------------------------------------------------------------------------------


def vector_error(points: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> float:
    return float((weights * (points[:, None] - table[None]).square().sum(2).amin(1)).sum())


@pytest.mark.proves("formats.vector")
def test_separate_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(7)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10], [5, 40]])
    points = (centres[:, None] + 0.1 * torch.randn(5, 50, 2, generator=generator)).reshape(-1, 2)
    table = kmeans_vectors(points, None, 5)
    assert torch.cdist(centres, table).amin(1).max() < 0.1
    assert torch.equal(table, kmeans_vectors(points, None, 5))  # deterministic
    assert not torch.equal(kmeans_vectors(points, None, 9, seed=0), kmeans_vectors(points, None, 9, seed=1))


def test_few_distinct_points_return_exactly() -> None:
    levels = torch.tensor([[0.1, -2.0], [3.3, 1.0], [3.3, 1.5]])
    table = kmeans_vectors(levels[torch.arange(60) % 3], None, 5)
    assert table.tolist() == levels.tolist() + levels[-1:].tolist() * 2


def test_better_than_the_product_of_scalar_tables() -> None:
    """16 free points of the plane beat the 4 x 4 grid of the two optimal scalar tables."""
    points = torch.randn(4000, 2, generator=torch.Generator().manual_seed(8))
    x, y = (kmeans(points[:, i][None], None, 4)[0] for i in (0, 1))
    ones = torch.ones(len(points))
    assert vector_error(points, ones, kmeans_vectors(points, None, 16)) < vector_error(points, ones, torch.cartesian_prod(x, y))


def test_one_dimension_comes_near_the_optimum() -> None:
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(9))
    best = float(error(x.T, None, kmeans(x.T, None, 8)))
    assert float(error(x.T, None, kmeans_vectors(x, None, 8, iters=100).T)) < 1.1 * best


def test_weights_per_point_and_per_coordinate() -> None:
    points = torch.tensor([[0.0, 0], [1, 1], [10, 10], [12, 12]])
    weights = torch.tensor([3.0, 1, 1, 1])
    table = kmeans_vectors(points, weights, 2).sort(0).values
    torch.testing.assert_close(table, torch.tensor([[0.25, 0.25], [11, 11]]))
    assert torch.equal(kmeans_vectors(points, weights[:, None].expand(4, 2), 2).sort(0).values, table)
    uneven = torch.tensor([[3.0, 1], [1, 1], [1, 1], [1, 0]])
    torch.testing.assert_close(kmeans_vectors(points, uneven, 2).sort(0).values, torch.tensor([[0.25, 0.5], [11, 10]]))


def test_no_entry_is_wasted() -> None:
    """Heavy duplicates tempt k-means++ to repeat itself; every entry still serves some point."""
    points = torch.cat([torch.zeros(500, 2), torch.randn(40, 2, generator=torch.Generator().manual_seed(10))])
    table = kmeans_vectors(points, None, 16)
    assert len(torch.cdist(points, table).argmin(1).unique()) == 16


def test_entries_that_fall_empty_restart_where_the_error_is_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the worst start, every entry in one place but one, each cluster is still found."""
    monkeypatch.setattr(module, "_plus_plus", lambda x, w, k, generator: torch.full((k, len(x)), 50.0, dtype=x.dtype))
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    points = (centres[:, None] + 0.1 * torch.randn(4, 50, 2, generator=torch.Generator().manual_seed(12))).reshape(-1, 2)
    assert torch.cdist(centres, kmeans_vectors(points, None, 12, iters=2)).amin(1).max() < 1


def test_outlier_vectors_stay_finite() -> None:
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(11))
    points[3] = 1e30
    table = kmeans_vectors(points, None, 8)
    assert torch.isfinite(table).all()
    assert (table == points[3]).any()
