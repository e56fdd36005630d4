"""Running ranges: against a naive loop, sample by sample against batches, saved and loaded, and what they cost and win."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import roundel as rd
from roundel.network.layer import Activation
from roundel.network.running import SETTLED, Running, State, Tracker, advance, ends, extremes, reset, trackers
from roundel.plan import Plan, Rule
from roundel.qmodel import fake

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


def stream(shape: tuple[int, ...] = (3, 8, 8), n: int = 120, gain: float = 3.0, at: int = 40) -> torch.Tensor:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))
    x[at:] *= gain
    return x


def made(activations: str = "int8:running", model: nn.Module | None = None, shape: tuple[int, ...] = (3, 8, 8)) -> rd.QModel:
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(4))
    return rd.quantize(model or network(), "int8", activations, data=[x])


# -- one site ---------------------------------------------------------------------------------------------------------


def site(format: str = "int8", low: float = -1.0, high: float = 3.0, **options: float) -> Running:
    fmt = rd.Format.parse(format, "activation")
    params = fmt.store(fmt.from_range(torch.full((1, 1), low), torch.full((1, 1), high)))
    return Running(Activation(fmt, "running", params, dataclasses.replace(Tracker(-1.4, 3.0), **options)))


def naive(part: Running, samples: np.ndarray) -> list[tuple[float, float]]:
    """The definition in the docstring of the module, one number after the other."""
    t, (low0, high0) = part.tracker, part.start
    assert t is not None
    a, b, low, high, drift = t.low, t.high, low0, high0, 0
    met = []
    for sample in samples:
        met.append((low, high))
        smallest, largest = sample.flat[0], sample.flat[0]
        for x in sample.flat:
            smallest, largest = (x if x < smallest else smallest), (x if x > largest else largest)
        far = t.bound * (b - a)
        a, b = a + t.rate * float(np.clip(smallest - a, -far, far)), b + t.rate * float(np.clip(largest - b, -far, far))
        stretch = (b - a) / (t.high - t.low)
        new = min(a + (low0 - t.low) * stretch, 0), max(a + (high0 - t.low) * stretch, 0)
        off = max(abs(new[0] - low), abs(new[1] - high)) / (high - low)
        if off <= t.margin * (SETTLED if drift >= t.patience else 1):
            drift = 0
        else:
            drift = min(drift + 1, t.patience)
            if drift == t.patience:
                low, high = new
    return [*met, (low, high)]


@pytest.mark.proves("adaptive.running")
@pytest.mark.parametrize("gain", [1.0, 0.2, 4.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1.5])
def test_tracker_is_the_naive_loop(gain: float, offset: float) -> None:
    part = site()
    x = torch.randn(90, 20, generator=torch.Generator().manual_seed(1)).double() * 0.8 + 0.8
    x[30:] = x[30:] * gain + offset
    met = naive(part, x.numpy())
    got = []
    for row in x:
        got.append(tuple(part.range.tolist()))
        part.follow(row[None])
    got.append(tuple(part.range.tolist()))
    assert np.allclose(got, met, rtol=1e-12, atol=1e-12)
    assert part.counts[2] > 0 or (gain == 1 and offset == 0)


def test_gain_and_offset_carry_the_range_with_them() -> None:
    """An affine change of the numbers is the same change of the range, whatever share of them it cut off."""
    part = site(patience=1, margin=0.0)
    for _ in range(300):
        part.follow(torch.tensor([[-1.4, 3.0]]) * 0.5 - 0.4)
    low, high = part.start
    assert part.range.tolist() == pytest.approx([low * 0.5 - 0.4, high * 0.5 - 0.4], abs=1e-4)


def test_nothing_moves_within_the_margin_and_one_outlier_is_bounded() -> None:
    part, g = site(), torch.Generator().manual_seed(1)
    for i in range(200):
        sample = torch.randn(1, 400, generator=g) * 0.8 + 0.8
        part.follow(sample if i != 100 else sample * 1e6)
    assert part.counts.tolist()[1:3] == [0, 0] and part.range.tolist() == list(part.start)
    assert part.counts[4] > 300  # numbers beyond the range: those of the outlier, and few others
    assert part.told() is None


def test_range_comes_back_after_a_burst() -> None:
    part, g = site(), torch.Generator().manual_seed(1)
    for i in range(400):
        part.follow((torch.randn(1, 400, generator=g) * 0.8 + 0.8) * (20 if 100 <= i < 150 else 1))
        if i == 149:
            assert part.range[1] > 8
        if i == 250:  # a hundred samples later
            assert part.range[1] < 3 * 1.15
    assert part.told() is not None and "its range moved" in part.told()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_odd_numbers_leave_a_range_that_codes(value: float) -> None:
    part = site()
    for _ in range(50):
        part.follow(torch.full((2, 7), value))
    low, high = part.range.tolist()
    assert math.isfinite(low) and math.isfinite(high) and low < high
    part.follow(torch.zeros(0, 7))
    assert part.counts[0] == 100
    assert part.quantize(torch.zeros(3, 7)).abs().max() == 0


def test_extremes_are_those_of_each_sample() -> None:
    x = torch.randn(64, 3, 40, 40)
    assert extremes(x).tolist() == [[float(row.min()), float(row.max())] for row in x]


def test_a_range_that_has_not_moved_is_the_stored_one() -> None:
    part, x = site(margin=9.0), torch.randn(5, 30)
    assert torch.equal(part.follow(x), part.base.quantize(x)) and part.live.params is part.base.params


def test_advance_leaves_its_state_alone() -> None:
    at = State(-0.4, 0.4, -0.5, 0.5)
    advance(Tracker(-0.4, 0.4), (-0.5, 0.5), at, -1.0, 1.0)
    assert at == State(-0.4, 0.4, -0.5, 0.5)


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("adaptive.running")
@pytest.mark.parametrize("grid", GRIDS)
def test_batch_is_its_samples_and_twin_is_equal(grid: str) -> None:
    """Whatever the grid: batches of 120, of 7 and of 1 give the same bits and leave the same state; so does the twin."""
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
    q = made(model=Residual(), shape=(4, 10))
    x = stream((4, 10))
    left = {note.subject: note.text for note in q.notes if "its range stays" in note.text}
    assert list(left) == ["softmax"] or all("fixes" in text for text in left.values())
    with torch.no_grad():
        out = q.module(x)
        reset(q.module)
        assert torch.equal(torch.cat([q.module(row[None]) for row in x]), out)


@pytest.mark.proves("adaptive.running")
def test_without_drift_it_is_the_static_model() -> None:
    q, s = made(), made("int8")
    x = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    assert torch.equal(q.module(x), s.module(x))
    assert {a.when for a in q.activations.values()} == {"running"}
    assert {n.text for n in q.notes} == {n.text for n in s.notes}


@pytest.mark.proves("adaptive.running")
@pytest.mark.parametrize("gain", [3.0, 10.0])
def test_after_a_gain_it_is_nearer_to_float_than_static(gain: float) -> None:
    net, x = network(), stream(gain=gain, n=300, at=0)
    q, s = made(model=net), made("int8", model=net)
    with torch.no_grad():
        q.module(x[:100])  # a hundred samples to find the range
        real = net(x[100:])
        errors = [(model.module(x[100:]) - real).square().mean().sqrt() for model in (q, s)]
    assert errors[0] < errors[1] / 3


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
    assert back.nbytes == q.nbytes and {row.when for row in rd.inspect(back).sites} == {"running"}


def test_quantizing_twice_gives_the_same_bytes(tmp_path) -> None:
    for name in "ab":
        made().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_state_can_be_kept_and_put_back() -> None:
    q, x = made(), stream()
    q.module(x[:60])
    held = {name: t.clone() for name, t in q.module.state_dict().items()}
    out = q.module(x[60:])
    other = made().module
    other.load_state_dict(held)
    assert torch.equal(other(x[60:]), out)


@pytest.mark.proves("adaptive.evaluate")
def test_evaluate_starts_afresh_tells_and_leaves_no_trace() -> None:
    net = network()
    q, x = made(model=net), stream()
    q.module(x[:60])
    before = {name: t.clone() for name, t in q.module.state_dict().items()}
    told = [rd.evaluate(q, against=net, data=[x], latency=latency, metric="cosine") for latency in (False, True)]
    assert all(torch.equal(t, before[name]) for name, t in q.module.state_dict().items())
    moved = [[note for note in one.notes if "its range moved" in note] for one in told]
    assert moved[0] == moved[1] and moved[0][0].split(":")[0] in q.activations
    assert told[0].kl == told[1].kl
    reset(q.module)
    q.module(x)
    assert {note.split(": its")[0] for note in moved[0]} == {n for n, part in trackers(q.module).items() if part.counts[2]}


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
    assert static == told.keys() and len(static) >= 2
    assert any("several values share" in n.text and n.fallback for n in told.values())
    assert any("fixes its range" in n.text and not n.fallback for n in told.values())
    with pytest.raises(rd.CheckError, match="several values share"):
        rd.quantize(Joined(), "int8", "int8:running", data=[x], strict=True)


def test_constant_numbers_stay_static() -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(4, 4)), "int8", "int8:running", data=[torch.ones(16, 4)])
    assert q.activations["input"].when == "static" and any("do not vary" in n.text for n in q.notes)
    q = rd.quantize(nn.Sequential(nn.Linear(4, 4)), "int8", "int8:running", data=[torch.zeros(16, 4)])
    assert q.activations["input"].when == "static" and any("nothing but 0" in n.text for n in q.notes)


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
