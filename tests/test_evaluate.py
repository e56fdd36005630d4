"""`evaluate`, `diff` and `watching` against scipy, naive loops and hand-worked numbers; real models are scored elsewhere."""

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

import roundel as rd
from roundel.errors import InputError, PlanError
from roundel.evaluate import Evaluation, Latency, check_metric, diff, evaluate, near_chance, predictions
from roundel.evaluate.scores import FLOOR, _bootstrap, _paired, _ratio
from roundel.graph import Graph, GraphModule, Node
from roundel.network.watch import watching
from roundel.plan import Plan, Rule


class Fixed(nn.Module):
    """Row i of the input is an index; the output is that row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x[:, 0].long()]


def rows(n: int) -> Tensor:
    return torch.arange(n).float()[:, None]


def compare(a: Tensor, b: Tensor, target: Tensor | None = None, size: int = 64, **options: object) -> Evaluation:
    """Evaluate two tables of outputs, float then quantized, in batches of ``size``."""
    x = rows(len(a))
    data = [(x[i : i + size], target[i : i + size]) if target is not None else x[i : i + size] for i in range(0, len(a), size)]
    return evaluate(Fixed(b), against=Fixed(a), data=data, **{"latency": False, "layers": False, **options})  # type: ignore[arg-type]


def softmax(x: Tensor) -> np.ndarray:
    return scipy.special.softmax(x.double().numpy(), axis=-1)


@pytest.fixture
def tables() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200, 7, generator=g) * 3
    return a, a + torch.randn(200, 7, generator=g) * 0.3


# -- divergence, flips, SQNR ------------------------------------------------------------------------------------------


@pytest.mark.proves("evaluate.kl")
@pytest.mark.proves("evaluate.flips")
@pytest.mark.parametrize("size", [200, 64, 1])
def test_classes_against_scipy(tables: tuple[Tensor, Tensor], size: int) -> None:
    a, b = tables
    got = compare(a, b, size=size)
    kl = scipy.special.rel_entr(softmax(a), softmax(b)).sum(1)
    assert got.kl == pytest.approx(kl.mean(), rel=1e-9)
    assert got.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-9)
    assert got.flips == (a.argmax(1) != b.argmax(1)).double().mean().item() > 0
    low, high = got.kl_interval  # type: ignore[misc]
    error = kl.std(ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((kl.mean() - 1.96 * error, kl.mean() + 1.96 * error), rel=0.1)
    signal, noise = a.double().square().sum(), (a.double() - b.double()).square().sum()
    assert got.sqnr == pytest.approx(10 * math.log10(signal / noise))
    assert got.samples == 200
    assert "no labels" in got.notes[0]


def test_hand_worked_divergence() -> None:
    a = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]])) + 4  # logits have a free offset
    b = torch.log(torch.tensor([[0.25, 0.75], [0.25, 0.75]]))
    got = compare(a, b, torch.tensor([0, 1]))
    assert got.kl == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)), abs=1e-7)
    assert (got.flips, got.metric, got.metric_float, got.difference) == (0.5, 0.5, 1.0, -0.5)


def test_probabilities_are_used_as_such(tables: tuple[Tensor, Tensor]) -> None:
    a, b = (torch.tensor(softmax(x)).float() for x in tables)
    got = compare(a, b)
    assert got.kl == pytest.approx(scipy.special.rel_entr(a.double().numpy(), b.double().numpy()).sum(1).mean(), rel=1e-4)
    assert got.kl == pytest.approx(compare(*tables).kl, rel=1e-4)


def test_a_zero_probability_is_floored_and_said() -> None:
    a = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0]])
    b = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    got = compare(a, b, torch.tensor([0, 0]))
    p, q = np.array([0.9, 0.1, FLOOR]), np.array([1.0, FLOOR, FLOOR])
    assert got.kl == pytest.approx(scipy.special.rel_entr(p / p.sum(), q / q.sum()).sum() / 2, rel=1e-6)
    assert "1 of 2 quantized outputs" in got.notes[0]


class Tokens(nn.Module):
    """Logits (N, T, V) by looking ids up, as a language model without context would."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        logits = self.table(input_ids)
        if attention_mask is not None:  # what a hidden position holds must not matter
            logits = torch.where(attention_mask[..., None].bool(), logits, math.nan)
        return SimpleNamespace(loss=None, logits=logits)


@pytest.fixture
def language() -> tuple[Tokens, Tokens, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    a = torch.randn(11, 11, generator=g) * 2
    b = a + torch.randn(11, 11, generator=g) * 0.2
    ids = torch.randint(11, (24, 9), generator=g)
    lengths = torch.randint(2, 10, (24,), generator=g)
    return Tokens(a), Tokens(b), ids, (torch.arange(9) < lengths[:, None]).long()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [24, 5])
def test_language_against_a_naive_loop(language: tuple[Tokens, Tokens, Tensor, Tensor], masked: bool, size: int) -> None:
    a, b, ids, mask = language
    if not masked:
        mask = torch.ones_like(mask)
    named = {"input_ids": ids} | ({"attention_mask": mask} if masked else {})
    data = [{k: v[i : i + size] for k, v in named.items()} for i in range(0, 24, size)]
    got = evaluate(b, against=a, data=data, latency=False)
    kl, flips, loss = [], [], []
    for line, keep in zip(ids, mask, strict=True):
        line = line[keep.bool()]
        p, q = softmax(a.table.weight[line]), softmax(b.table.weight[line])
        kl += scipy.special.rel_entr(p, q).sum(1).tolist()
        flips += (p.argmax(1) != q.argmax(1)).tolist()
        loss.append([(-math.log(p[t, line[t + 1]]), -math.log(q[t, line[t + 1]])) for t in range(len(line) - 1)])
    flat = np.array([pair for row in loss for pair in row])
    assert got.kl == pytest.approx(np.mean(kl), rel=1e-6)
    assert got.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-6)
    assert got.flips == pytest.approx(np.mean(flips))
    assert (got.metric_float, got.metric) == pytest.approx(tuple(np.exp(flat.mean(0))), rel=1e-6)
    assert got.metric_name == "perplexity"
    assert got.difference == pytest.approx(got.metric / got.metric_float - 1)  # type: ignore[operator]
    # The jackknife over documents is an independent way to the same error.
    totals = np.array([[sum(x[1] - x[0] for x in row), len(row)] for row in loss])
    left = [(totals[:, 0].sum() - t) / (totals[:, 1].sum() - n) for t, n in totals]
    error = math.sqrt(23 / 24 * sum((x - np.mean(left)) ** 2 for x in left))
    low, high = got.interval  # type: ignore[misc]
    assert (math.log1p(high) - math.log1p(low)) / 2 / 1.96 == pytest.approx(error, rel=0.1)


def test_labels_of_their_own_and_ignored_ones(language: tuple[Tokens, Tokens, Tensor, Tensor]) -> None:
    a, b, ids, _ = language
    plain = evaluate(b, against=a, data=[{"input_ids": ids}], latency=False)
    same = evaluate(b, against=a, data=[{"input_ids": ids, "labels": ids}], latency=False)
    assert same.metric == plain.metric
    labels = ids.clone()
    labels[:, :4] = -100
    cut = evaluate(b, against=a, data=[{"input_ids": ids, "labels": labels}], latency=False)
    p = softmax(b.table.weight[ids[:, 3:-1]])
    assert cut.metric == pytest.approx(np.exp(-np.log(np.take_along_axis(p, ids[:, 4:, None].numpy(), 2)).mean()), rel=1e-6)


def test_large_outputs_in_pieces(tables: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(*tables)
    monkeypatch.setattr(sys.modules["roundel.evaluate.scores"], "CHUNK", 20)
    pieces = compare(*tables)
    assert (pieces.kl, pieces.kl_p99, pieces.flips, pieces.metric) == (whole.kl, whole.kl_p99, whole.flips, whole.metric)
    assert pieces.sqnr == pytest.approx(whole.sqnr)


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("evaluate.metric")
def test_top1_is_a_paired_difference_by_hand() -> None:
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    a = torch.tensor([right, right, right, wrong])
    b = torch.tensor([right, right, wrong, right])
    got = compare(a, b, torch.zeros(4, dtype=torch.long), metric="top1")
    assert (got.metric, got.metric_float, got.difference) == (0.75, 0.75, 0.0)
    half = 1.96 * math.sqrt(2 / 3) / 2  # differences 0 0 -1 1: variance 2/3 of 4
    assert got.interval == pytest.approx((-half, half))
    assert compare(a[:1], b[:1], torch.tensor([0])).interval is None


def test_the_paired_interval_covers_95_percent() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        change = rng.choice([-1.0, 0.0, 1.0], size=300, p=[0.06, 0.9, 0.04])
        _, (low, high) = _paired(change)  # type: ignore[misc]
        inside += low <= -0.02 <= high
    assert 0.93 < inside / 2000 < 0.97


def test_the_perplexity_interval_covers_95_percent() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        tokens = rng.integers(5, 60, 80).astype(float)
        change = tokens * (0.05 + 0.1 * rng.standard_normal(80)) + rng.standard_normal(80)  # documents differ
        low, high = _ratio(tokens * 2, tokens * 2 + change, tokens)[3]  # type: ignore[misc]
        inside += low <= math.expm1(0.05) <= high
    assert 0.92 < inside / 1000 < 0.97


def test_hand_worked_perplexity_ratio() -> None:
    before, now, tokens = np.array([2.0, 4.0]), np.array([2.5, 5.5]), np.array([1.0, 3.0])
    metric, metric_float, difference, interval = _ratio(before, now, tokens)
    assert (metric, metric_float) == pytest.approx((math.exp(2), math.exp(1.5)))
    assert difference == pytest.approx(math.exp(0.5) - 1)  # (0.5 + 1.5) / 4 per token
    assert interval == pytest.approx((difference, difference))  # both documents lose 0.5 per token
    interval = _ratio(before, now + np.array([0.1, -0.1]), tokens)[3]
    half = 1.96 * math.sqrt((0.1**2 + 0.1**2) * 2 / 1) / 4
    assert interval == pytest.approx((math.expm1(0.5 - half), math.expm1(0.5 + half)))


def test_the_bootstrap_is_seeded_and_by_rows() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 50, 100).astype(float)
    sums = sizes * rng.random(100)
    low, high = _bootstrap(sums, sizes, 0)  # type: ignore[misc]
    assert (low, high) == _bootstrap(sums, sizes, 0) != _bootstrap(sums, sizes, 1)
    ratio = sums.sum() / sizes.sum()
    error = math.sqrt(((sums - ratio * sizes) ** 2).sum() * 100 / 99) / sizes.sum()
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), rel=0.05)
    assert _bootstrap(sums[:1], sizes[:1], 0) is None


def test_cosine_mse_and_functions(tables: tuple[Tensor, Tensor]) -> None:
    a, b = tables
    got = compare(a, b, metric="cosine")
    alike = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    assert (got.metric, got.metric_float, got.kl, got.flips) == (pytest.approx(np.mean(alike)), 1.0, None, None)
    assert compare(a, a, metric="cosine").interval == (0.0, 0.0)
    got = compare(a, b, metric="mse")
    assert (got.metric, got.metric_float) == (pytest.approx((a - b).double().square().mean().item()), 0.0)

    def margin(outputs: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return outputs[torch.arange(len(y)), y]

    y = torch.randint(7, (200,))
    got = compare(a, b, y, metric=margin)
    want = (b - a).double()[torch.arange(200), y].numpy()
    assert (got.difference, got.metric_name) == (pytest.approx(want.mean(), abs=1e-6), "margin")
    assert got.interval == pytest.approx(scipy.stats.norm.interval(0.95, want.mean(), scipy.stats.sem(want)), rel=1e-3)


def test_regression_with_real_targets() -> None:
    net, worse = nn.Linear(3, 2), nn.Linear(3, 2)
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    got = evaluate(worse, against=net, data=[({"input": x, "y": y})], latency=False)
    with torch.no_grad():
        assert got.metric_float == pytest.approx((net(x) - y).square().mean().item())
        assert (got.metric, got.metric_name, got.kl) == (pytest.approx((worse(x) - y).square().mean().item()), "mse", None)


class Encoder(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.embed(input_ids), "pooler_output": torch.zeros(len(input_ids), 2)}


def test_embeddings_are_pooled_over_what_the_mask_leaves() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = Encoder(torch.randn(50, 6, generator=g)), Encoder(torch.randn(50, 6, generator=g))
    ids, mask = torch.randint(50, (4, 5), generator=g), torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    got = evaluate(b, against=a, data=[{"input_ids": ids, "attention_mask": mask}], latency=False)
    want = []
    for line, keep in zip(ids, mask.bool(), strict=True):
        u, v = (m.embed.weight[line[keep]].mean(0).double().numpy() for m in (a, b))
        want.append(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    assert (got.metric_name, got.metric, got.kl) == ("cosine", pytest.approx(np.mean(want), rel=1e-5), None)


def test_predictions_finds_the_tensor() -> None:
    x = torch.ones(2, 3)
    hidden = SimpleNamespace(last_hidden_state=x, logits=None)
    for output in (x, (x, 3), [None, (x,)], {"logits": x, "loss": torch.zeros(1)}, hidden, {"a": 1, "b": x}):
        assert predictions(output) is not None
        assert predictions(output).shape == (2, 3)
    with pytest.raises(InputError, match="returned a str without a tensor"):
        predictions("no")


@pytest.mark.parametrize(("score", "classes", "n", "chance"), [
    (0.10, 10, 100, True), (0.16, 10, 100, True), (0.25, 10, 100, False), (0.0, 10, 100, True), (1.0, 3, 2, False),
    (0.0, 3, 2, False), (0.5, 2, 1000, True), (0.55, 2, 1000, False), (0.9, 1, 50, False), (0.5, 10, 0, False),
])  # fmt: skip
def test_near_chance(score: float, classes: int, n: int, chance: bool) -> None:
    assert near_chance(score, classes, n) is chance
    if classes > 1 and n >= 100:
        assert chance == (scipy.stats.binomtest(round(score * n), n, 1 / classes, alternative="greater").pvalue > 0.01)


# -- sites ------------------------------------------------------------------------------------------------------------


def test_watching_modules_reports_inputs_and_outputs_and_leaves_nothing() -> None:
    inner = nn.Linear(3, 3)
    net = nn.Sequential(inner, nn.ReLU(inplace=True), inner)
    seen: list[tuple[str, tuple[int, ...]]] = []
    with watching(net, lambda site, value: seen.append((site, tuple(value.shape)))):
        net(torch.zeros(2, 3))
    assert [site for site, _ in seen] == ["0.input", "0.output", "1.input", "1.output", "0.input", "0.output"]
    with watching(nn.ReLU(), lambda *_: None), pytest.raises(ZeroDivisionError), watching(net, lambda *_: 1 / 0):
        net(torch.zeros(2, 3))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


class Odd(nn.Module):
    def forward(self, *, pair: tuple[str, Tensor]) -> dict[str, object]:
        return {"why": "text", "value": (None, pair[1] + 1)}


class Holder(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def test_watching_finds_the_first_tensor_of_anything() -> None:
    odd, seen = Odd(), {}
    with watching(odd, lambda site, value: seen.update({site: value.item()})):
        odd(pair=("a", torch.tensor(1.0)))
    assert seen == {"input": 1.0, "output": 2.0}


def relu_graph() -> GraphModule:
    return GraphModule(Graph(("x",), ("y",), (Node("relu", ("x",), ("y",)),)))


def test_watching_graphs_by_their_own_names() -> None:
    graph, x = relu_graph(), torch.zeros(1)
    for net, names in (
        (graph, ["x", "y"]),
        (Holder(body=graph), ["x", "y"]),
        (Holder(a=relu_graph(), b=relu_graph()), ["a.x", "a.y", "b.x", "b.y"]),
    ):
        outer: list[str] = []
        inner: list[str] = []
        with watching(net, lambda site, _, outer=outer: outer.append(site)):
            with watching(net, lambda site, _, inner=inner: inner.append(site)):
                net(x)
            net(x)
        net(x)
        assert (inner, outer) == (names, names * 2)
    assert graph.watch is None


class OwnWatch(nn.Module):
    def watch(self) -> str:
        return "mine"

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_method_named_watch_is_left_alone() -> None:
    net, seen = OwnWatch(), []
    with watching(net, lambda site, _: seen.append(site)):
        net(torch.zeros(1))
    assert (seen, net.watch()) == (["input", "output"], "mine")


@pytest.mark.proves("evaluate.sqnr")
def test_layer_sqnr_by_hand() -> None:
    shared = nn.Linear(4, 4, bias=False)
    a = nn.Sequential(shared, nn.ReLU(inplace=True), shared, nn.Identity())
    b = copy.deepcopy(a)
    b[0].weight.data *= 1.01
    b[3] = nn.Sequential(nn.Identity())  # other names: 3 in one, 3.0 in the other
    x = torch.randn(30, 4)
    got = evaluate(b, against=a, data=[x[:20], x[20:]], latency=False, metric="mse")
    with torch.no_grad():
        signal = noise = 0.0
        first = [x, x]
        for _ in range(2):
            first = [m[0](v) for m, v in zip((a, b), first, strict=True)]
            signal += first[0].double().square().sum().item()
            noise += (first[0] - first[1]).double().square().sum().item()
            first = [v.relu() for v in first]
    assert list(got.layers) == ["0", "1"]
    assert got.layers["0"] == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
    assert got.layers["1"] == pytest.approx(10 * math.log10(1 / 0.01**2), abs=0.01)  # ReLU keeps the factor of 1.01
    assert got.sites_skipped == 2
    assert evaluate(a, against=a, data=[x], latency=False).sqnr == math.inf


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Linear(8, 4)
        self.bn.running_mean += torch.randn(8)  # type: ignore[operator]
        self.bn.running_var *= 3  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))


@pytest.fixture
def small() -> Small:
    return Small().train()


def test_a_fused_layer_is_compared_with_its_fused_self(small: Small) -> None:
    x = torch.randn(40, 3, 8, 8)
    q = rd.quantize(small, "int8", "int8", data=[x])
    got = evaluate(q, against=small, data=[x], latency=False)
    assert {"conv", "fc"} <= set(got.layers)
    assert min(got.layers.values()) > 20, got.layers
    again = evaluate(
        q.module, against=GraphModule(rd.fuse(rd.capture(copy.deepcopy(small).eval(), (x[:2],)))), data=[x], latency=False
    )
    assert again.layers == pytest.approx(got.layers, abs=0.1)
    other = evaluate(q, against=rd.quantize(small, "int4", data=[x]), data=[x], latency=False)
    assert other.layers["fc"] < got.layers["fc"]


def test_layers_of_a_network_that_stays_modules() -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    q = rd.quantize(net, "int4/g32")  # without data there is no graph
    got = evaluate(q, against=net, data=[torch.randn(20, 64)], latency=False)
    assert list(got.layers) == ["0", "1", "2"]
    assert got.sites_skipped == 0
    assert 10 < got.layers["0"] < 40


# -- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("evaluate.bytes")
@pytest.mark.proves("evaluate.latency")
@pytest.mark.proves("evaluate.peak-memory")
def test_bytes_latency_and_memory(small: Small, tmp_path: Path) -> None:
    x = torch.randn(40, 3, 8, 8)
    path = tmp_path / "m.safetensors"
    rd.quantize(small, "int8", data=[x]).save(path)
    small.bn.eval()
    before = [part.training for part in small.modules()]
    got = evaluate(rd.load(path), against=small, data=[x])
    assert [part.training for part in small.modules()] == before == [True, True, False, True, True]
    assert got.disk == path.stat().st_size
    assert got.nbytes == rd.load(path).nbytes < got.nbytes_float
    assert got.nbytes_float == sum(t.nbytes for t in [*small.parameters(), *small.buffers()])
    for took in (got.latency, got.latency_float):
        assert isinstance(took, Latency)
        assert 0 < took.median <= took.p99 < 5
        assert took.pairs >= 20
    assert got.peak_memory is None or got.peak_memory > 50 * 2**20


class Hungry(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(60_000_000).sum()


def test_peak_memory_sees_what_a_forward_needs() -> None:
    lean, hungry = (evaluate(m, against=m, data=[torch.ones(2, 3)], latency=False).peak_memory for m in (nn.Identity(), Hungry()))
    if lean is None or hungry is None:
        pytest.skip("the kernel does not let a process reset its high-water mark")
    assert hungry - lean > 150 * 2**20
    assert evaluate(nn.Identity(), against=nn.Identity(), data=[torch.ones(2, 3)], latency=False).peak_memory < hungry  # type: ignore[operator]


class Alternating(nn.Module):
    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(f"{self.name}{len(x)}")
        return x


def test_latency_is_taken_in_turn_on_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) / 10)
    evaluate(Alternating("q", log), against=Alternating("f", log), data=[torch.ones(4, 2)], layers=False)
    timed = [entry for entry in log if entry.endswith("1")]
    assert timed == ["f1", "q1"] * (len(timed) // 2)
    assert 3 + 20 <= len(timed) // 2 <= 3 + 25


@pytest.mark.proves("evaluate.json")
def test_to_dict_is_json_under_the_attributes_names(tables: tuple[Tensor, Tensor]) -> None:
    got = compare(*tables)
    plain = got.to_dict()
    assert plain.keys() == vars(got).keys()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["kl_interval"] == list(got.kl_interval)  # type: ignore[arg-type]
    assert compare(tables[0], tables[0]).to_dict()["sqnr"] is None


def test_bad_input_is_named(tables: tuple[Tensor, Tensor]) -> None:
    a, b = tables
    y = torch.zeros(200, dtype=torch.long)
    for data in ([], iter(())):
        with pytest.raises(InputError, match="no batches"):
            evaluate(Fixed(b), against=Fixed(a), data=data)
    broken = b.clone()
    broken[150, 2] = math.nan
    with pytest.raises(InputError, match=r"batch 2: 1 of 448 outputs of the quantized model are not finite"):
        compare(a, broken, y)
    with pytest.raises(InputError, match=r"batch 2: 1 of 448 outputs of the float model"):
        compare(broken, b, y)
    with pytest.raises(InputError, match=r"batch 1: 2 labels lie outside 0..6, the first is 9"):
        compare(a, b, torch.cat([y[:100], torch.tensor([9, -1]), y[102:]]))
    with pytest.raises(InputError, match=r"batch 0: the float model gives shape \[64, 7\], the quantized one \[64, 6\]"):
        compare(a, b[:, :6], y)
    with pytest.raises(InputError, match="one score per sample, 64; got shape"):
        compare(a, b, y, metric=lambda out, _: out)
    with pytest.raises(InputError, match="scores that are not finite"):
        compare(a, b, y, metric=lambda out, _: out[:, 0] * math.inf)
    with pytest.raises(InputError, match="top1 needs one whole-number label per sample, 64; got none"):
        compare(a, b, metric="top1")
    with pytest.raises(PlanError, match="no metric 'accuracy'; there are top1, perplexity, cosine, mse"):
        compare(a, b, y, metric="accuracy")
    with pytest.raises(PlanError, match="'perplexity' needs outputs"):
        compare(a, b, y, metric="perplexity")
    with pytest.raises(PlanError, match="got str"):
        evaluate("m.safetensors", against=Fixed(a), data=[rows(3)])  # type: ignore[arg-type]


def test_labels_of_another_length(tables: tuple[Tensor, Tensor]) -> None:
    batch = {"x": rows(8), "y": torch.zeros(5, dtype=torch.long)}
    with pytest.raises(InputError, match=r"one whole-number label per sample, 8; got torch.int64 of shape \[5\]"):
        evaluate(Fixed(tables[1]), against=Fixed(tables[0]), data=[batch], metric="top1", latency=False)


def test_ids_out_of_range(language: tuple[Tokens, Tokens, Tensor, Tensor]) -> None:
    a, b, ids, _ = language
    labels = ids.clone()
    labels[3, 4] = 11
    with pytest.raises(InputError, match=r"batch 0: 1 ids lie outside 0..10, the first is 11"):
        evaluate(b, against=a, data=[{"input_ids": ids, "labels": labels}], latency=False)
    with pytest.raises(InputError, match="at least two tokens"):
        evaluate(b, against=a, data=[{"input_ids": ids[:, :1]}], latency=False)


# -- diff -------------------------------------------------------------------------------------------------------------


def test_diff_of_equal_models_is_empty(small: Small, tmp_path: Path) -> None:
    q = rd.quantize(small, "int8", "int8", data=[torch.randn(8, 3, 8, 8)])
    q.save(tmp_path / "m.safetensors")
    assert diff(q, q) == diff(q, rd.load(tmp_path / "m.safetensors")) == []


@pytest.mark.proves("evaluate.diff", "api.diff")
def test_diff_names_every_change(small: Small) -> None:
    x = torch.randn(8, 3, 8, 8)
    a = rd.quantize(small, "int8", "int8", data=[x])
    b = rd.quantize(small, "int4", "int8", data=[2 * x], exclude=["fc"])
    found = {(d.kind, d.name): d for d in diff(a, b)}
    conv = found["tensor", "conv.weight"]
    assert (conv.a, conv.b) == (str(a.tensors["conv.weight"].format), str(b.tensors["conv.weight"].format))
    assert (conv.bytes_a, conv.bytes_b) == (a.tensors["conv.weight"].nbytes, b.tensors["conv.weight"].nbytes)
    u, v = (m.tensors["conv.weight"].dequantize() for m in (a, b))
    assert conv.max_abs == pytest.approx((u - v).abs().max().item())
    assert conv.relative == pytest.approx(((u - v).norm() / u.norm()).item())
    assert found["tensor", "fc.weight"].b == "float32"
    assert found["tensor", "fc.weight"].max_abs == pytest.approx(
        (a.tensors["fc.weight"].dequantize() - small.fc.weight).abs().max().item()
    )
    site = next(d for d in found.values() if d.kind == "site" and d.a and d.b)
    assert site.relative == pytest.approx(1.0, abs=0.05) or site.a == site.b
    assert any(d.kind == "rule" for d in found.values())
    json.dumps([d.to_dict() for d in found.values()], allow_nan=False)
    backwards = {(d.kind, d.name): d for d in diff(b, a)}
    assert backwards.keys() == found.keys()
    assert (backwards["tensor", "conv.weight"].a, backwards["tensor", "conv.weight"].b) == (conv.b, conv.a)


def test_diff_of_plans_shows_what_was_put_in(small: Small) -> None:
    x = torch.randn(8, 3, 8, 8)
    rules = Rule("*", weight="int8"), Rule("fc", weight="float"), Rule("conv", weight="int8")
    a, b = (rd.quantize(small, data=[x], plan=Plan(chosen)) for chosen in ((rules[0], rules[2]), rules))
    assert [(d.name, d.a, d.b) for d in diff(a, b) if d.kind == "rule"] == [("fc", None, "weight=float")]


# -- what looks wrong before any quantization -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x, None),
        (lambda x: x * 0.9, None),
        (lambda x: x * 96 + 77, "outside the calibrated range"),
        (lambda x: x / 255, "% of the calibrated range"),
    ],
)
@pytest.mark.parametrize("weights", ["int8", "int2"])
def test_inputs_unlike_the_calibration_data(change: Callable[[Tensor], Tensor], said: str | None, weights: str) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.Linear(8, 4))
    q = rd.quantize(net, "int8", weights, data=[x])
    notes = [note for note in evaluate(q, against=net, data=[change(x)], latency=False).notes if "calibrated" in note]
    assert len(notes) == (said is not None)
    assert all(note.startswith("input 'input' goes from ") and str(said) in note for note in notes)
    weight_only = rd.quantize(net, "int8", data=[x])
    assert not any("calibrated" in note for note in evaluate(weight_only, against=net, data=[change(x)], latency=False).notes)


@pytest.mark.parametrize(("right", "said"), [(0.1, True), (0.2, True), (0.5, False), (1.0, False)])
def test_a_float_model_that_knows_little_is_noted(right: float, said: bool) -> None:
    target = torch.arange(200) % 10
    shown = torch.where(torch.arange(200) < 200 * right, target, (target + 1) % 10)
    got = compare(torch.eye(10)[shown], torch.eye(10)[shown], target, metric="top1")
    assert any(f"only {right:.2%} right (10 classes)" in note for note in got.notes) == said


def test_what_fits_a_language_model_is_named() -> None:
    table = torch.randn(3, 5, 7)
    ids = torch.randint(7, (3, 5))

    class Tokens(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return table[: len(ids)]

    with pytest.raises(PlanError, match="use perplexity, cosine or mse"):
        check_metric("top1", Tokens(), [ids])
    assert check_metric(None, Tokens(), [ids]) == "perplexity"
    with pytest.raises(PlanError, match="there is no metric 'acc'"):
        check_metric("acc", Tokens(), [ids])


def test_a_model_that_cannot_take_the_data_says_so() -> None:
    net = nn.Linear(8, 4)
    with pytest.raises(InputError, match=r"cannot run on a batch of float32 \[2, 3\]"):
        evaluate(net, against=net, data=[torch.zeros(2, 3)], latency=False)
