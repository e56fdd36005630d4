"""Real networks in C on this machine: DS-CNN on all clips, ResNet-20, KWT-1; their arenas."""

from pathlib import Path
from typing import Any

import pytest
from conftest import needs_data
from real_models import ds_cnn, kwt1, resnet20_q
from test_export_c import compare

import roundel as rd
from roundel.exporters.c.emit import emit
from roundel.runtimes import hostc, qemu

pytestmark = [needs_data, pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))]


def check(q: rd.QModel, x: Any, folder: Path, dialect: str = "R2", runtime: Any = hostc, name: str = hostc.NAME) -> int:
    """Codes compared, of which none differs."""
    graph = rd.lower(q, dialect)
    want: dict[str, Any] = {}
    rd.simulate(graph, x, watch=want.__setitem__)
    got = runtime.run(q, graph, {graph.inputs[0]: want[f"{graph.inputs[0]}.codes"]}, folder, name)
    return compare(graph, got, want)


@pytest.mark.proves("c.ds-cnn")
@pytest.mark.parametrize("count", [110, pytest.param(2200, marks=pytest.mark.soak)])
def test_ds_cnn_on_clips(count: int, tmp_path: Path) -> None:
    """All clips in the soak."""
    q, x = ds_cnn()
    assert len(x) == 2200
    total = sum(check(q, part, tmp_path) for part in x[:: 2200 // count].split(550))
    print(f"DS-CNN: 0 of {total:,} codes differ")
    assert total > 70_000 * count


@pytest.mark.proves("c.ds-cnn")
@pytest.mark.parametrize("dialect", ["R1", "R2a", "R3"])
def test_ds_cnn_in_every_dialect(dialect: str, tmp_path: Path) -> None:
    q, x = ds_cnn()
    assert check(q, x[:10], tmp_path, dialect) > 600_000


@pytest.mark.proves("c.resnet20")
@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.soak)])
def test_resnet20_on_images(count: int, tmp_path: Path) -> None:
    q, x = resnet20_q()
    assert len(x) == 100
    assert check(q, x[:count], tmp_path) > 300_000 * count


@pytest.mark.proves("c.kwt1")
@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_kwt1_on_clips(count: int, tmp_path: Path) -> None:
    """One clip on a Cortex-M4 too, in the soak."""
    q, x = kwt1()
    assert len(x) == 20
    assert check(q, x[:count], tmp_path) > 1_000_000 * count
    if count > 1 and qemu.absent() is None:
        assert check(q, x[:1], tmp_path, runtime=qemu, name=qemu.NAME) > 1_000_000


@pytest.mark.proves("c.arena.ds-cnn")
def test_arena_of_ds_cnn() -> None:
    """At most 1.05 of the bound, and 0.45 of the 24,272 bytes that TFLite Micro takes."""
    arena = emit(rd.lower(ds_cnn()[0])).arena
    print(f"DS-CNN: arena {arena.nbytes:,} bytes, bound {arena.bound:,}, ratio {arena.nbytes / arena.bound:.3f}")
    assert arena.nbytes <= 1.05 * arena.bound
    assert arena.nbytes <= 0.45 * 24_272


@pytest.mark.proves("c.arena.ds-cnn")
def test_arenas_of_the_others() -> None:
    for q in (resnet20_q()[0], kwt1()[0]):
        arena = emit(rd.lower(q)).arena
        assert arena.nbytes <= 1.05 * arena.bound
