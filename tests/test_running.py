"""Running ranges: against a naive loop, sample by sample against batches, saved and loaded, and what they cost and win."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import roundel as rd
from roundel.formats.codec import Stored
from roundel.graph import Graph
from roundel.integer import check_integer
from roundel.integer.running import BOUND, DOWN, UP, Exponents, Site, observed
from roundel.network.layer import Activation
from roundel.network.running import FAR, Running, State, Tracker, advance, ends, extremes, reset, trackers
from roundel.network.sites import find_sites
from roundel.plan import Plan, Rule
from roundel.qmodel import fake
from roundel.runtimes import hostc, qemu

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))

GRIDS = ["int8", "int8s", "int4", "uint8~uint8", "int16", "fp8", "int3"]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


class Residual(nn.Module):
    """A sum of two paths, a product of two activations and a mean: every kind of reader."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.one(x))
        b = a + self.two(a)
        c = b @ a.transpose(1, 2)
        return self.head(c.mean(2)).softmax(1)


def stream(shape: tuple[int, ...] = (3, 8, 8), n: int = 60, gain: float = 3.0, at: int = 20) -> torch.Tensor:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))
    x[at:] *= gain
    return x


@cache
def kept(activations: str, kind: Callable[[], nn.Module], shape: tuple[int, ...]) -> rd.QModel:
    torch.manual_seed(3)
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(4))
    return rd.quantize(kind(), "int8", activations, data=[x])


def made(
    activations: str = "int8:running", kind: Callable[[], nn.Module] = network, shape: tuple[int, ...] = (3, 8, 8)
) -> rd.QModel:
    """A network quantized once for all tests, as its file has it."""
    q = kept(activations, kind, shape)
    reset(q.module)
    return q


# -- one site ---------------------------------------------------------------------------------------------------------


def site(format: str = "int8", low: float = -1.0, high: float = 3.0, **options: float) -> Running:
    fmt = rd.Format.parse(format, "activation")
    params = fmt.store(fmt.from_range(torch.full((1, 1), low), torch.full((1, 1), high)))
    return Running(Activation(fmt, "running", params, dataclasses.replace(Tracker(low, high), **options)))


def naive(part: Running, samples: np.ndarray) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The definition in the docstring of the module, one number after the other: (range, what coded) of each sample."""
    t = part.tracker
    assert t is not None
    low, high, met, coded = t.low, t.high, [], []
    for sample in samples:
        met.append((low, high))
        smallest, largest = 0.0, 0.0
        for x in sample.flat:
            smallest, largest = (x if x < smallest else smallest), (x if x > largest else largest)
        width = high - low
        fills, inside = (largest - smallest) * t.room >= width, low <= smallest and largest <= high
        coded.append((low, high) if fills and inside else (smallest, largest))
        if not fills or smallest < low:
            low += np.clip(smallest - low, -t.rate * width, t.rate * width)
        if not fills or largest > high:
            high += np.clip(largest - high, -t.rate * width, t.rate * width)
    return [*met, (low, high)], coded


@pytest.mark.proves("adaptive.running")
@pytest.mark.parametrize("gain", [1.0, 0.2, 4.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1.5])
def test_tracker_is_the_naive_loop(gain: float, offset: float) -> None:
    part = site()
    x = torch.randn(90, 20, generator=torch.Generator().manual_seed(1)).double() * 0.8 + 0.8
    x[30:] = x[30:] * gain + offset
    met, coded = naive(part, x.numpy())
    got = []
    part.trace = []
    for row, (low, high) in zip(x, coded, strict=True):
        got.append(part.follow(row[None]))
        params = part.format.store(part.format.from_range(torch.full((1, 1), low), torch.full((1, 1), high)))
        assert torch.equal(got[-1], Activation(part.format, "static", params).quantize(row[None]))
    assert np.allclose([*part.trace, tuple(part.range.tolist())], met, rtol=1e-12, atol=1e-12)
    beyond = sum(int(((row < low - (high - low) / 512) | (row > high + (high - low) / 512)).sum())
                 for row, (low, high) in zip(x, met, strict=False))  # fmt: skip
    assert part.counts.tolist()[0] == 90
    assert part.counts.tolist()[2:] == [sum(a != b for a, b in zip(met, coded, strict=False)), 90 * 20, beyond]
    part.reset()
    assert torch.equal(part.follow(x), torch.cat(got))


def test_advance_by_hand() -> None:
    """A quarter of the width a sample, half of it to be filled."""
    t, both, at = Tracker(-1.0, 3.0, rate=0.25, room=2.0), (True, True), State(-1.0, 3.0, 2, 5)
    assert advance(t, both, at, -0.9, 1.2) == ((-1.0, 3.0), State(-1.0, 3.0, 0, 5))  # suits
    assert advance(t, both, at, 0.0, 0.0) == ((-1.0, 3.0), State(-1.0, 3.0, 0, 5))  # nothing but 0 is on every grid
    assert advance(t, both, at, -0.5, 3.5) == ((-0.5, 3.5), State(-1.0, 3.5, 3, 6))  # beyond above: the other end stays
    assert advance(t, both, at, -9.0, 1.0) == ((-9.0, 1.0), State(-2.0, 3.0, 3, 6))  # no further than a step
    assert advance(t, both, at, 0.5, 1.0) == ((0.0, 1.0), State(0.0, 2.0, 3, 6))  # small: both draw near, and 0 is held
    assert advance(t, (False, True), State(0.0, 4.0), -5.0, 3.0) == ((0.0, 4.0), State(0.0, 4.0))  # a ReLU has nothing below
    assert advance(t, both, at, 0.0, 4 / FAR / 2) == ((-1.0, 3.0), State(-1.0, 3.0, 0, 5))  # too small to count
    assert advance(t, both, at, 0.0, 1e30)[0] == (0.0, 4 * FAR)  # too large
    assert at == State(-1.0, 3.0, 2, 5)


@pytest.mark.proves("adaptive.bound")
@pytest.mark.parametrize("room", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_number_is_off_by_more_than_room_times_what_its_own_sample_asks(bits: int, room: float) -> None:
    """Whatever the stream does, from its first sample on: half a step of the sample's own grid, times the room."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(400, 50, generator=g) * torch.randn(400, 1, generator=g).mul(2).exp() + torch.randn(400, 1, generator=g)
    part = site(f"int{bits}", room=room)
    low, high = extremes(x).clamp(max=0)[:, :1], extremes(x).clamp(min=0)[:, 1:]
    step = (high - low) / (2**bits - 1)
    assert bool(((part.follow(x) - x).abs() <= step * (room / 2 + 0.5) * 1.001).all())  # a zero point rounds too: half a step more
    assert 0 < part.counts[2] <= 400


def test_one_outlier_moves_a_range_by_one_step_only() -> None:
    part, g = site(), torch.Generator().manual_seed(1)
    for i in range(60):
        sample = torch.randn(1, 400, generator=g) * 0.8 + 0.8
        part.follow(sample if i != 40 else sample * 1e6)
        if i == 39:
            before, beyond = part.range.clone(), int(part.counts[4])
        if i == 40:
            width = float(before[1] - before[0])
            assert (part.range - before).abs().tolist() == pytest.approx([width / 16] * 2)
            assert part.counts[4] >= beyond + 390
    assert part.told() is None


def test_range_comes_back_after_a_burst() -> None:
    part, g = site(), torch.Generator().manual_seed(1)
    for i in range(300):
        part.follow((torch.randn(1, 400, generator=g) * 0.8 + 0.8) * (20 if 100 <= i < 150 else 1))
        if i == 149:
            assert part.range[1] > 30
            assert "its range moved in 150 samples from -1 to 3 to" in str(part.told())
        if i == 250:  # a hundred samples later
            assert part.range[1] < 4
    assert part.told() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_odd_numbers_leave_a_range_that_codes(value: float) -> None:
    part = site()
    for _ in range(50):
        part.follow(torch.full((2, 7), value))
    low, high = part.range.tolist()
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low < high
    part.follow(torch.zeros(0, 7))
    assert part.counts[0] == 100
    assert part.quantize(torch.zeros(3, 7)).abs().max() == 0


def test_extremes_are_those_of_each_sample() -> None:
    x = torch.randn(64, 3, 40, 40)
    assert extremes(x).tolist() == [[float(row.min()), float(row.max())] for row in x]


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("adaptive.running")
@pytest.mark.parametrize("grid", GRIDS)
def test_batch_is_its_samples_and_twin_is_equal(grid: str) -> None:
    """Whatever the grid: batches of 60, of 7 and of 1 give the same bits and leave the same state; so does the twin."""
    q, x = made(f"{grid}:running"), stream()
    assert trackers(q.module).keys() == q.activations.keys()
    with torch.no_grad():
        out = q.module(x)
        state = {name: t.clone() for name, t in q.module.state_dict().items()}
        assert any(part.counts[2] for part in trackers(q.module).values())
        for size in (7, 1):
            reset(q.module)
            assert torch.equal(torch.cat([q.module(part) for part in x.split(size)]), out)
            assert all(torch.equal(t, state[name]) for name, t in q.module.state_dict().items())
        twin = fake(q)
        assert torch.equal(twin(x), out)
    twin(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for name, p in twin.named_parameters() if name.startswith("weights"))


def test_all_kinds_of_readers_agree_sample_by_sample() -> None:
    q = made(kind=Residual, shape=(4, 10))
    x = stream((4, 10))
    left = {note.subject: note.text for note in q.notes if "its range stays" in note.text}
    assert list(left) == ["softmax"] or all("fixes" in text for text in left.values())
    with torch.no_grad():
        out = q.module(x)
        reset(q.module)
        assert torch.equal(torch.cat([q.module(row[None]) for row in x]), out)


def away(q: rd.QModel, net: nn.Module, x: torch.Tensor) -> float:
    """How far the outputs are from the float ones."""
    reset(q.module)
    with torch.no_grad():
        return float((q.module(x) - net(x)).square().mean().sqrt())


def own(q: rd.QModel) -> rd.QModel:
    """The same sites with every sample coded by its own ends: dynamic."""
    found = {name: dataclasses.replace(a, tracker=dataclasses.replace(a.tracker, room=1.0)) for name, a in q.activations.items()}
    return dataclasses.replace(q, activations=found)


@pytest.mark.proves("adaptive.running")
@pytest.mark.parametrize("gain", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_it_is_as_near_to_float_as_dynamic_and_without_drift_as_static(gain: float, offset: float) -> None:
    """From the first sample that drifts, and while no more than half of the samples beyond the input are coded anew."""
    net, x = network(), stream(gain=gain, n=300, at=0) + offset
    q, s = made(), made("int8")
    ours, theirs = away(q, net, x), away(own(q), net, x)
    assert ours < 1.3 * theirs
    assert ours < away(s, net, x) * (1.05 if gain == 1 and not offset else 0.5)
    reset(q.module)
    q.module(x)
    again = {name: int(part.counts[2]) for name, part in trackers(q.module).items()}
    assert again.pop("input") == 300
    assert sum(again.values()) < 150 * len(again)


def test_an_input_is_coded_by_each_samples_own_ends() -> None:
    x = stream((6,), n=40)
    q = rd.quantize(nn.Linear(6, 3), plan=Plan((Rule("*", "int8"), Rule("*.input", activation="int8:running"))), data=[x])
    d = rd.quantize(nn.Linear(6, 3), "int8", "int8/token:dynamic", data=[x])
    assert {a.tracker.room for a in q.activations.values() if a.tracker} == {1.0}
    (site,) = trackers(q.module).values()
    assert torch.equal(site.follow(x), next(iter(d.activations.values())).quantize(x))


def test_it_starts_where_calibration_brings_it() -> None:
    """On calibration's own samples the range stays about where it is, however wide the static one."""
    x = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    x[7] *= 30
    q = rd.quantize(network(), "int8", "int8:running", data=[x], ranges="minmax")
    q.module(x)
    for part in trackers(q.module).values():
        low, high = ends(part.base)
        assert part.start[1] - part.start[0] < (high - low) / 3
        assert part.told() is None


@pytest.mark.proves("adaptive.saved")
def test_saved_and_loaded(tmp_path) -> None:
    q, x = made(), stream()
    q.module(x)  # the file holds the start, whatever has passed
    q.save(tmp_path / "a")
    back = rd.load(tmp_path / "a")
    assert back.format_version == 2
    assert {name: a.tracker for name, a in back.activations.items()} == {name: a.tracker for name, a in q.activations.items()}
    back.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    reset(q.module)
    assert torch.equal(back.module(x), q.module(x))
    assert back.nbytes == q.nbytes
    assert {row.when for row in rd.inspect(back).sites} == {"running"}


@pytest.mark.proves("adaptive.saved")
@pytest.mark.parametrize("odd", ['"room":0.5', '"room":null', '"rate":2.0', '"high":-9.0'])
def test_a_file_whose_tracker_is_impossible_is_refused(odd: str, tmp_path: Path) -> None:
    made().save(tmp_path / "a")
    name = odd.split(":")[0]
    data = (tmp_path / "a").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    key = next(key for key in header["__metadata__"] if "tracker" in header["__metadata__"][key])
    header["__metadata__"][key] = re.sub(rf"{name}:[-0-9.e]+", odd, header["__metadata__"][key])
    text = json.dumps(header).encode()
    (tmp_path / "b").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(rd.InputError):
        rd.load(tmp_path / "b")


def test_quantizing_twice_gives_the_same_bytes(tmp_path) -> None:
    for name in "ab":
        kept.__wrapped__("int8:running", network, (3, 8, 8)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_state_can_be_kept_and_put_back() -> None:
    q, x = made(), stream()
    q.module(x[:30])
    held = {name: t.clone() for name, t in q.module.state_dict().items()}
    out = q.module(x[30:])
    other = made().module
    other.load_state_dict(held)
    assert torch.equal(other(x[30:]), out)


@pytest.mark.proves("adaptive.evaluate")
def test_evaluate_starts_afresh_tells_and_leaves_no_trace() -> None:
    net = network()
    q, x = made(), stream()
    q.module(x[:30])
    before = {name: t.clone() for name, t in q.module.state_dict().items()}
    told = [rd.evaluate(q, against=net, data=[x], latency=latency, metric="cosine") for latency in (False, True)]
    assert all(torch.equal(t, before[name]) for name, t in q.module.state_dict().items())
    moved = [[note for note in one.notes if "its range moved" in note] for one in told]
    assert moved[0] == moved[1]
    assert moved[0][0].split(":")[0] in q.activations
    assert told[0].kl == told[1].kl
    reset(q.module)
    q.module(x)
    assert {note.split(": its")[0] for note in moved[0]} == {n for n, part in trackers(q.module).items() if part.told()}


def test_a_plan_may_run_some_sites_only() -> None:
    plan = Plan((Rule("*", "int8", "int8"), Rule("input", activation="int8:running")))
    x = torch.randn(32, 3, 8, 8)
    q = rd.quantize(network(), plan=plan, data=[x])
    assert {name: a.when for name, a in q.activations.items() if a.when != "static"} == {"input": "running"}
    assert q.activations["input"].tracker is not None


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.two(x) * 3], 1).sigmoid()


@pytest.mark.proves("adaptive.left-static")
def test_what_cannot_run_stays_static_and_says_so() -> None:
    x = torch.randn(32, 4)
    q = rd.quantize(Joined(), "int8", "int8:running", data=[x])
    static = {name for name, a in q.activations.items() if a.when == "static"}
    told = {note.subject: note for note in q.notes if "its range stays" in note.text}
    assert static == told.keys()
    assert len(static) >= 2
    assert any("several values share" in n.text and n.fallback for n in told.values())
    assert any("fixes its range" in n.text and not n.fallback for n in told.values())
    with pytest.raises(rd.CheckError, match="several values share"):
        rd.quantize(Joined(), "int8", "int8:running", data=[x], strict=True)


def test_constant_numbers_stay_static() -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(4, 4)), "int8", "int8:running", data=[torch.ones(16, 4)])
    assert q.activations["input"].when == "static"
    assert any("do not vary" in n.text for n in q.notes)
    q = rd.quantize(nn.Sequential(nn.Linear(4, 4)), "int8", "int8:running", data=[torch.zeros(16, 4)])
    assert q.activations["input"].when == "static"
    assert any("nothing but 0" in n.text for n in q.notes)


def test_refusals() -> None:
    x = torch.randn(32, 3, 8, 8)
    with pytest.raises(rd.PlanError, match="no range that could run"):
        rd.quantize(network(), "int8", "fp16:running", data=[x])
    with pytest.raises(rd.PlanError, match="takes no ':running'"):
        rd.quantize(network(), "int8:running", data=[x])


def test_ends_are_those_of_the_grid() -> None:
    fmt = rd.Format.parse("int8", "activation")
    params = fmt.store(fmt.from_range(torch.full((1, 1), -1.0), torch.full((1, 1), 1.55)))
    assert ends(Activation(fmt, "static", params)) == pytest.approx((-1.0, 1.55), abs=0.01)


# -- in integers ------------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Every operation that takes a shift: convolutions, depthwise and plain, sums, a product, means, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.up, self.head = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.one(x))
        b = torch.relu(self.deep(a))
        c = nn.functional.max_pool2d(a - self.point(b) * b + b, 2)
        return self.head(nn.functional.avg_pool2d(self.up(c), 2).mean((2, 3)))


@cache
def shifted(weights: str) -> rd.QModel:
    torch.manual_seed(3)
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return rd.quantize(Shifted(), weights, "int8:running", data=[x])


def lowered(dialect: str = "R2", weights: str = "int8") -> tuple[rd.QModel, Graph]:
    return shifted(weights), rd.lower(shifted(weights), dialect)


def simulated(graph: Graph, x: torch.Tensor, state: Exponents | None = None) -> dict[str, np.ndarray]:
    seen: dict[str, np.ndarray] = {}
    rd.simulate(graph, x, watch=seen.__setitem__, state=state)
    return seen


@pytest.mark.proves("adaptive.integer")
def test_exponent_by_hand() -> None:
    """Three full samples: one up. Twelve quiet ones: one down. Never past the bound; what lies between starts the count anew."""
    tracks = [0, -128, 127, 1, 47]
    full, quiet, some = np.array([127, -128, 5]), np.array([47, -47, 5]), np.array([48, 127, 0])
    site = Site()
    for codes in [full] * 2 + [some] + [full] * 2:
        site = observed(site, tracks, codes)
    assert site == Site(0, 0, 2, 0)
    assert observed(site, tracks, full) == Site(0, 1, 0, 0)
    for used in (-BOUND, 0, BOUND):
        assert observed(Site(used, used, UP - 1), tracks, full).next == min(used + 1, BOUND)
        assert observed(Site(used, used, 0, DOWN - 1), tracks, quiet).next == max(used - 1, -BOUND)
    assert observed(Site(0, 0, 2, 5), tracks, some) == Site()
    assert observed(Site(0, 0, 2, 5), tracks, np.zeros(0, np.int64)) == Site(0, 0, 2, 5)


@pytest.mark.proves("adaptive.integer")
@pytest.mark.parametrize("exponents", [0, 1, -2, BOUND, "mixed"])
def test_exponents_are_scales_times_powers_of_two(exponents: int | str) -> None:
    """The codes of a network whose stored scales were multiplied, lowered anew, but for what a bias loses in coarser units."""
    q, graph = lowered()
    rng = np.random.default_rng(0)
    order = list(dict.fromkeys(site for site in find_sites(q.structure).root.values() if q.activations[site].when == "running"))
    ks = [int(rng.integers(-2, 3)) if exponents == "mixed" else int(exponents) for _ in order]
    scaled = {}
    for site, a in q.activations.items():
        k = ks[order.index(site)] if site in order else 0
        params = Stored(a.params.scale * 2.0**k, a.params.offset, a.params.table)
        scaled[site] = Activation(a.format, "static", params)
    again = rd.lower(dataclasses.replace(q, activations=scaled))
    x = torch.randn(1, 3, 8, 8) * (2.0 ** ks[0])
    want, got = simulated(again, x), simulated(graph, x, Exponents([Site(k, k) for k in ks]))
    for name in want.keys() & {node.name for node in graph if node.op != "dequantize"}:
        assert np.abs(want[name] - got[name]).max() <= 4
        assert np.abs(want[name] - got[name]).mean() < 0.4
    for node in graph:
        if node.op == "dequantize":
            step = q.activations[order[node.attrs["runs"][0]]].params.scale.item() * 2.0 ** ks[node.attrs["runs"][0]]
            assert np.abs(want[node.name] - got[node.name]).max() <= 4.01 * step


@pytest.mark.proves("adaptive.integer")
def test_state_goes_from_call_to_call() -> None:
    _, graph = lowered()
    check_integer(graph)
    x = stream(gain=6.0)
    states = [Exponents.of(graph) for _ in range(3)]
    whole = rd.simulate(graph, x, state=states[0])
    assert np.array_equal(np.concatenate([rd.simulate(graph, part, state=states[1]) for part in x.split(7)]), whole)
    assert np.array_equal(rd.simulate(graph, x[:50], fast=False, state=states[2]), whole[:50])
    assert states[0] == states[1]
    assert any(site.used for site in states[0].sites)
    assert np.array_equal(rd.simulate(graph, x), whole)
    assert rd.simulate(graph, x[:0]).shape == (0, 5)


@pytest.mark.parametrize("gain", [0.15, 6.0])
def test_integers_follow_a_gain(gain: float) -> None:
    """After a hundred samples, nearer to float than static integers by far, and without drift no further."""
    torch.manual_seed(3)
    net = network()
    q, s = made(), made("int8")
    graph, still = rd.lower(q), rd.lower(s)
    x = stream(gain=gain, at=0, n=200)
    with torch.no_grad():
        real = net(x).numpy()[100:]
    errors = [np.sqrt(np.square(rd.simulate(g, x)[100:] - real).mean()) for g in (graph, still)]
    assert errors[0] < errors[1] * (0.5 if gain > 1 else 1.02)


@needs_cc
@pytest.mark.proves("adaptive.integer-c")
@pytest.mark.parametrize(
    ("dialect", "weights"), [("R1", "int8"), ("R2", "int8"), ("R2a", "int4"), ("R3", "cb16/tensor"), ("R2", "int2")]
)
def test_c_is_the_simulation_over_a_stream(dialect: str, weights: str, tmp_path: Path) -> None:
    _, graph = lowered(dialect, weights=weights)
    x = torch.cat([stream(gain=6.0, at=5, n=30), stream(n=30, gain=0.05, at=0)])
    state = Exponents.of(graph)
    want = simulated(graph, x, state)
    assert {site.used for site in state.sites} != {0}
    got = hostc.run(None, graph, {graph.inputs[0]: want[f"{graph.inputs[0]}.codes"]}, tmp_path)
    assert all(np.array_equal(got[node.name], want[node.name]) for node in graph if node.op != "dequantize")


@pytest.mark.skipif(qemu.absent("qemu-cortex-m4") is not None, reason=str(qemu.absent("qemu-cortex-m4")))
@pytest.mark.proves("adaptive.integer-c")
def test_a_board_is_the_simulation_over_a_stream(tmp_path: Path) -> None:
    _, graph = lowered()
    want = simulated(graph, stream(gain=6.0, at=10, n=40))
    got = qemu.run(None, graph, {graph.inputs[0]: want[f"{graph.inputs[0]}.codes"]}, tmp_path, "qemu-cortex-m4")
    assert all(np.array_equal(got[node.name], want[node.name]) for node in graph if node.op != "dequantize")


@needs_cc
def test_export_and_verify(tmp_path: Path) -> None:
    q, _ = lowered()
    rd.export(q, tmp_path / "firmware", "cortex-m4")
    text = (tmp_path / "firmware" / "firmware.h").read_text()
    assert "FIRMWARE_INPUT0_EXPONENT (firmware_exponent(" in text
    assert "void firmware_reset(void);" in text
    found = rd.verify(q, against=["host-c"], data=[stream(gain=6.0, at=10, n=60)])["host-c"]
    assert (found.differing, found.why) == (0, None)
    assert found.total > 0
    for target in ("model.tflite", "model.onnx"):
        with pytest.raises(rd.PlanError, match="ranges that run"):
            rd.export(q, tmp_path / target)


@pytest.mark.proves("adaptive.integer")
@pytest.mark.parametrize("k", [-BOUND, BOUND])
def test_no_sum_leaves_its_proof_at_any_exponent(k: int) -> None:
    q, graph = lowered()
    state = Exponents([Site(k if i % 2 else -k, k if i % 2 else -k) for i in range(len(q.activations))])
    rd.simulate(graph, torch.randn(8, 3, 8, 8) * 1e3, state=state)  # `within` raises


class Odd(nn.Module):
    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.one, self.after, self.two = nn.Conv2d(3, 4, 1), after, nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.after(self.one(x)))


@pytest.mark.proves("adaptive.integer-refused")
@pytest.mark.parametrize(
    ("after", "says"), [(nn.ReLU6(), "relu6 ends at one code"), (nn.GELU(), "takes no shift"), (nn.Softmax(1), "takes no shift")]
)
def test_what_takes_no_shift_is_refused_by_name(after: nn.Module, says: str) -> None:
    x = torch.randn(32, 3, 4, 4)
    model = Odd(after)
    with pytest.raises(rd.PlanError, match=f"(?s)cannot be lowered.*(one|after).*{says}.*static format"):
        rd.lower(rd.quantize(model, "int8", "int8:running", data=[x]))
    plan = Plan((Rule("*", "int8", "int8"), Rule("x", activation="int8:running")))
    rd.lower(rd.quantize(model, plan=plan, data=[x]))


def test_sums_of_64_bits_are_refused() -> None:
    x = torch.randn(32, 3, 8, 8)
    with pytest.raises(rd.PlanError, match="64 bits"):
        rd.lower(rd.quantize(network(), "int8", "int16:running", data=[x]))
