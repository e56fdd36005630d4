"""The report page: what it says is what it was given, it loads nothing, and hostile names stay text."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_graphs import draw
from torch import nn

import roundel as rd
from roundel.exporters.c.emit import emit
from roundel.integer.dialect import INTEGER
from roundel.network.running import POINTS, Course
from roundel.report import Layer, Memory, Report, Row, memory, render, report, svg, text, write_report
from roundel.report.memory import of_source

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b]0;owned\x07\x1b[31m\u202e{{7*7}}\ud800\u2028"


class Page(HTMLParser):
    """Tags, attributes and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def example(**changes: object) -> Report:
    rows = (
        Row("float", 120_000, 32.0, 0.987, latency=1e-3, reference=True),
        Row("int8", 31_000, 8.2, 0.986, 2e-4, 0.001, 9e-4, -0.001, (-0.003, 0.001), "weight-only"),
        Row("int4", 16_000, 4.2, 0.950, 4e-2, 0.03, 9e-4, -0.037, (-0.05, -0.02), "weight-only"),
        Row("int4", 17_000, 4.4, 0.940, 6e-2, 0.04, 9e-4, -0.047, (-0.06, -0.03), "static"),
    )
    layers = (
        Layer("conv1", 31.5, "int4/channel*fp16", 300),
        Layer("conv2", 12.25, "int4/channel*fp16", 9000),
        Layer("add", math.inf),
    )
    base = {"layers": layers, "notes": (("bn", "left float: 64 numbers"),), "provenance": {"seed": 7, "torch": {"version": "2.13"}}}
    return Report(**({"title": "a title", "rows": rows, "metric_name": "top1"} | base | changes))  # type: ignore[arg-type]


def figures(page: str) -> list[ET.Element]:
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.S)]


@pytest.mark.proves("report.html")
def test_page_loads_nothing_and_runs_nothing() -> None:
    page = render(example())
    names = {tag for tag, _ in Page(page).tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|url\(|@import|src=|href=|javascript:", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_page_says_what_it_was_given() -> None:
    words = " ".join(Page(render(example())).words)
    sizes, changes, others = ("31.0 kB", "3.87×"), ("−0.10", "[−0.30, +0.10]", "0.10 %"), ("0.9870", "900 µs", "12.2", "2.13")
    for said in ("a title", *sizes, *changes, *others, "left float: 64 numbers"):
        assert said in words, said
    assert words.index("conv2", words.index("The worst")) < words.index("conv1", words.index("The worst"))
    assert "The worst 2 layers" in words  # a layer without error is not among them


@pytest.mark.proves("report.html", "inputs.names")
def test_hostile_names_are_inert() -> None:
    row = Row(HOSTILE, 1000, 4.0, 0.5, 0.1, 0.1, 1e-3, 0.0, (-0.1, 0.1), HOSTILE)
    page = example(
        title=HOSTILE, rows=(row, Row("f", 40, reference=True)), layers=(Layer(HOSTILE, 3.0, HOSTILE, 5),) * 60, layers_of=HOSTILE,
        notes=((HOSTILE, HOSTILE),), provenance={HOSTILE: HOSTILE}, metric_name=HOSTILE, summary=HOSTILE,
    )  # fmt: skip
    html = render(page)
    seen = Page(html)
    allowed = "html head meta title style body h1 h2 p b span code div dl dt dd figure figcaption svg g path rect text"
    assert {tag for tag, _ in seen.tags} <= set(f"{allowed} table caption thead tbody tr th td".split())
    assert not any(name.startswith("on") for _, attrs in seen.tags for name in attrs)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028\ud800]", html)
    assert "␛" in html
    assert "{{7*7}}" in " ".join(seen.words)
    html.encode()  # no lone surrogate is left
    ET.fromstring(html)  # every tag is closed where it should be: nothing broke out of its place
    assert len(figures(html)) == 3


@pytest.mark.proves("report.html")
def test_page_stays_under_100_kB() -> None:
    rows = tuple(Row(f"{'n' * 80}{i}", 1000 + i, 4.0, 0.5, 0.1 + i, 0.1, 1e-3, 0.0, (-0.1, 0.1), f"s{i % 4}") for i in range(500))
    layers = tuple(Layer(f"{'layer.' * 20}{i}", 20 + i % 7, "int4/g32*fp16", 5) for i in range(2000))
    page = render(example(rows=rows, layers=layers, notes=tuple(("s" * 100, "w" * 400) for _ in range(900))))
    assert len(page.encode()) < 100_000
    words = " ".join(Page(page).words)
    shown = int(re.search(r"The first (\d+) of 500 rows", words)[1])  # type: ignore[index]
    assert f"{900 - shown} more notes" in words
    assert page.count("<tr><td") == shown + 10 + shown  # rows, worst layers, notes


def test_a_page_of_ampersands_fits_too() -> None:
    """Escaping makes a page up to five times as long."""
    bad = "&" * 500
    rows = tuple(Row(bad, 1000 + i, 4.0, 0.5, 0.1 + i, series=bad) for i in range(100))
    page = example(
        title=bad,
        rows=rows,
        layers=(Layer(bad, 1.0, bad),) * 48,
        notes=((bad, bad),) * 100,
        provenance={f"{bad}{i}": bad for i in range(99)},
    )
    assert len(render(page).encode()) < 100_000


def test_numbers_that_are_not_finite_are_said_and_not_drawn() -> None:
    rows = (Row("a", 10, kl=math.nan), Row("b", 20, kl=math.inf), Row("c", 30, kl=0.0), Row("d", 40, kl=1e-3))
    page = render(example(rows=rows, layers=(Layer("x", math.nan), Layer("y", -3.0)), notes=()))
    assert not re.search(r"\b(nan|inf)\b", " ".join(re.findall(r'd="[^"]*"', page)))
    assert "2 rows without a finite value not drawn" in page
    assert "1 row of exactly zero at the lower edge" in page
    assert "every layer is as the plan asked" in page


def test_page_without_measurements_still_stands() -> None:
    page = render(Report("empty", (Row("only", 0),)))
    assert not figures(page)
    assert "only" in page


def points(kind: ET.Element) -> dict[str, tuple[float, float]]:
    """Tooltip -> where its mark starts."""
    found = {}
    for group in kind.iter("g"):
        start = re.match(r"M([\d.]+) ([\d.]+)", group.find("path").get("d"))  # type: ignore[union-attr, arg-type]
        found[group.find("title").text] = (float(start[1]), float(start[2]))  # type: ignore[union-attr, index]
    return found


@pytest.mark.proves("report.html")
def test_marks_lie_where_the_numbers_are() -> None:
    """Equal ratios of KL are equal distances on the log axis, and a smaller KL is lower on the page."""
    rows = tuple(Row(f"r{i}", 1000 + 100 * i, kl=10.0**-i) for i in range(4))
    marks = points(figures(render(example(rows=rows, layers=())))[0])
    y = [marks[f"r{i}: {text.size(1000 + 100 * i, '{:.4g}'.format)}, {text.number(10.0**-i)}"][1] for i in range(4)]
    steps = [b - a for a, b in pairwise(y)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert steps[0] > 0


def test_bars_are_as_long_as_their_numbers() -> None:
    bars = figures(render(example()))[-1]
    widths = {bar.find("title").text: float(bar.get("width")) for bar in bars.iter("rect")}  # type: ignore[union-attr, arg-type]
    assert widths["conv1: 31.5 dB"] / widths["conv2: 12.2 dB"] == pytest.approx(31.5 / 12.25, rel=1e-2)
    assert widths["add: exact"] > widths["conv1: 31.5 dB"]


# -- the arena --------------------------------------------------------------------------------------------------------


def disjoint(drawn: Memory) -> None:
    """At no moment do two blocks share a byte, and none leaves the arena."""
    for a in drawn.blocks:
        assert 0 <= a.offset <= a.offset + a.nbytes <= drawn.nbytes, a
        assert 0 <= a.start < a.stop <= drawn.calls, a
        for b in drawn.blocks:
            if a is not b and a.start < b.stop and b.start < a.stop:
                assert a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset, (a, b)


@pytest.mark.proves("report.arena")
def test_blocks_of_random_graphs_never_share_a_byte() -> None:
    """Every graph's blocks are apart, and where calls may write in place, some do."""
    inplace = 0
    for seed in range(40):
        source = emit(draw(seed, INTEGER[seed % 4]))
        drawn = of_source(source)
        disjoint(drawn)
        assert (drawn.nbytes, drawn.bound) == (source.arena.nbytes, source.arena.bound)
        assert {b.name for b in drawn.blocks} >= {port.name for port in source.watched}
        inplace += sum(b.start % 1 == 0.5 for b in drawn.blocks)
    assert inplace > 10


def static(**layers: nn.Module) -> rd.QModel:
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return rd.quantize(net.eval(), "int8", "int8", data=[torch.randn(8, 16)])


@pytest.mark.proves("report.arena")
def test_the_arena_by_hand() -> None:
    """16 codes in, 32 between, 4 out: 48 bytes live at once in the first call; in the second, one may be written over the other."""
    drawn = memory(static(a=nn.Linear(16, 32), b=nn.Linear(32, 4)))
    sizes = {b.name: (b.nbytes, math.floor(b.start), math.ceil(b.stop)) for b in drawn.blocks}
    assert sizes == {"input": (16, 0, 1), "a": (32, 0, 2), "b": (4, 1, 2)}
    disjoint(drawn)
    assert drawn.bound == 48
    assert not drawn.why


@pytest.mark.proves("report.arena")
def test_a_page_draws_the_arena_to_scale() -> None:
    q = static(a=nn.Linear(16, 32), b=nn.Linear(32, 4))
    x = torch.randn(8, 16)
    measured = rd.evaluate(q, against=q, data=[x], latency=False)
    html = render(report(q, measured, title="t", name="m"))
    figure = figures(html)[-1]
    rects = {rect.find("title").text: rect for rect in figure.iter("rect")}  # type: ignore[union-attr]
    assert len(rects) == 3
    a, b = (next(rect for name, rect in rects.items() if name and name.startswith(f"{which}:")) for which in "ab")
    assert float(a.get("height", 0)) / float(b.get("height", 1)) == pytest.approx(8, rel=0.02)
    spans = {block.name: block.stop - block.start for block in memory(q).blocks}
    assert float(a.get("width", 0)) / float(b.get("width", 1)) == pytest.approx(spans["a"] / spans["b"], rel=0.01)
    labels = [label.text for label in figure.iter("text")]
    assert "lower bound 48 B" in labels
    assert "a 32 B" in labels
    assert "over its 2 calls" in " ".join(Page(html).words)


@pytest.mark.proves("report.arena", "inputs.names")
def test_hostile_names_in_the_arena_are_inert() -> None:
    blocks = tuple(svg.Block(HOSTILE, 100 * i, 100, 0, 1) for i in range(4))
    html = render(example(memory=Memory(blocks, 1, 400, 400)))
    seen = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028\ud800]", html)
    ET.fromstring(html)
    refused = render(example(memory=Memory(why=HOSTILE)))
    assert "Not drawn, since this model has no C: </script>" in " ".join(Page(refused).words)
    ET.fromstring(refused)


@pytest.mark.proves("report.arena")
def test_a_model_without_c_says_why() -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(16, 4)), "int8", data=[torch.randn(4, 16)])
    found = memory(q)
    assert found.why
    assert not found.blocks
    page = render(example(memory=found))
    assert f"Not drawn, since this model has no C: {found.why[:60]}" in " ".join(Page(page).words)
    assert len(figures(page)) == len(figures(render(example())))


def test_a_page_of_many_blocks_fits_and_counts_what_it_leaves_out() -> None:
    blocks = tuple(svg.Block("&" * 400 + str(i), 8 * i, 8, i / 2, i / 2 + 40) for i in range(3000))
    page = render(example(memory=Memory(blocks, 1540, 24_000, 24_000)))
    assert len(page.encode()) < 100_000
    drawn = figures(page)[-1].findall("rect")
    assert f"{3000 - len(drawn):,} smaller values not drawn" in " ".join(Page(page).words)
    assert drawn


def course(wide: float, anew: float = 0.25) -> Course:
    """A range of [-1, 3] that grows to ``wide`` times that, evenly, over 240 samples."""
    steps = [1 + (wide - 1) * i / (POINTS - 1) for i in range(POINTS)]
    return Course(tuple(-s for s in steps), tuple(3 * s for s in steps), (-1.0, 3.0), 240, anew, 0.0125, 7)


@pytest.mark.proves("report.ranges")
def test_a_page_draws_ranges_to_scale_and_tells_their_counts() -> None:
    html = render(example(ranges={"input": course(4.0), "conv": course(0.25, 0.5), "still": course(1.0)}))
    seen = " ".join(Page(html).words)
    assert "The range of 3 sites over 240 samples" in seen
    for cell in ("-1.00 to 3.00", "-4.00 to 12.0", "-0.250 to 0.750", "50.0 %", "25.0 %", "1.25 %", "7"):
        assert cell.replace("-", "−") in [word.strip() for word in Page(html).words]
    (figure,) = [f for f in figures(html) if "line low" in ET.tostring(f, "unicode")]
    ends = {}
    for path in figure.iter("path"):
        if path.get("class", "").startswith("line"):
            points = [tuple(map(float, pair.split())) for pair in path.get("d", "")[1:].split("L")]
            ends[path.find("title").text] = points[-1][1] - points[0][1]  # type: ignore[union-attr]
            assert len(points) == POINTS
    assert ends["still"] == 0
    assert ends["input"] < 0  # up, on a page
    assert ends["conv"] == pytest.approx(-ends["input"], abs=0.2)  # as far down as four times is up
    assert "Ranges that followed" not in " ".join(Page(render(example())).words)


@pytest.mark.proves("report.ranges", "inputs.names")
def test_a_page_of_many_hostile_ranges_fits_and_is_inert() -> None:
    html = render(example(ranges={f"{HOSTILE}&{i}" * 20: course(1 + i / 10) for i in range(300)}))
    assert len(html.encode()) < 100_000
    assert not {"script", "img"} & {tag for tag, _ in Page(html).tags}
    ET.fromstring(html)
    words = " ".join(Page(html).words)
    assert "The 10 ranges that moved furthest." in words
    assert "of the 300 lines" in words


@pytest.mark.proves("report.ranges")
def test_a_page_of_a_model_that_runs_shows_where_its_ranges_went() -> None:
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    q = rd.quantize(net, "int8", "int8:running", data=[x])
    measured = rd.evaluate(q, against=net, data=[x[:32], x[32:] * 5], latency=False)
    assert measured.ranges.keys() == {name for name, a in q.activations.items() if a.when == "running"}
    for one in measured.ranges.values():
        assert (one.samples, one.low[0], one.high[0]) == (96, *one.start)
        assert max(one.high[:20]) < 2 * one.start[1]
        assert one.high[-1] > 2.5 * one.start[1]
    assert measured.ranges["input"].anew == 1.0
    words = " ".join(Page(render(report(q, measured, title="t", name="m"))).words)
    assert f"The range of {len(measured.ranges)} sites over 96 samples" in words
    assert sum("its range moved" in note for note in measured.notes) == len(measured.ranges)
    again = rd.evaluate(q, against=net, data=[x[:32], x[32:] * 5], latency=False)
    assert again.ranges == measured.ranges


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-5, 5)), min_size=1, max_size=12), st.booleans())
def test_front_is_the_pareto_front(values: list[tuple[int, int]], larger: bool) -> None:
    """Against the definition: a value pair is on the front when no other is at least as good in both and better in one."""
    sign = -1 if larger else 1
    wanted = {
        (x, y)
        for x, y in values
        if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in values)
    }  # fmt: skip
    found = svg.front([svg.Point(str(i), x, y) for i, (x, y) in enumerate(values)], larger_is_better=larger)
    assert {(p.x, p.y) for p in found} == wanted
    assert len(found) == len(wanted)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-9, 1e9), st.floats(1.0, 1e9), st.booleans())
def test_ticks_lie_on_the_axis(low: float, ratio: float, log: bool) -> None:
    axis = svg.axis([low, low * ratio], 0.0, 700.0, log=log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 20
    assert ticks == sorted(ticks)
    assert all(axis.lo * (1 - 1e-9) <= t <= axis.hi * (1 + 1e-9) for t in ticks)


def test_labels_do_not_touch() -> None:
    """A 6 x 6 swarm of marks: the boxes of the names that were placed are disjoint and none covers a mark."""
    marks = [svg.Point(f"name{i}{j}", 100 + 3 * i, 0.5 + 0.01 * j) for i, j in product(range(6), range(6))]
    figure = ET.fromstring(svg.tradeoff(marks, x_label="x", y_label="y", x_text=str))
    boxes = []
    for label in (t for t in figure.iter("text") if t.get("class", "").startswith("name")):
        x, width = float(label.get("x", 0)), svg._CHAR * len(label.text or "")
        start = x - {"start": 0, "middle": width / 2, "end": width}[label.get("text-anchor", "")]
        boxes.append((start, float(label.get("y", 0)) - 11, start + width, float(label.get("y", 0)) + 3))
    assert len(boxes) > 5
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] > b[2] - 0.2 or b[0] > a[2] - 0.2 or a[1] > b[3] - 0.2 or b[1] > a[3] - 0.2


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0.00"), (0.25, "0.250"), (3.14159, "3.14"), (1234.5, "1230"), (-0.5, "−0.500"), (2.5e-7, "2.50e−7"), (math.nan, "–"),
     (None, "–"), (math.inf, "∞"), (99.96, "100"), (0.0999, "0.0999")],
)  # fmt: skip
def test_numbers(value: float | None, said: str) -> None:
    assert text.number(value) == said


def test_sizes_and_times() -> None:
    assert [text.size(n) for n in (0, 999, 1000, 31_000, 2.5e9)] == ["0 B", "999 B", "1.00 kB", "31.0 kB", "2.50 GB"]
    assert [text.seconds(s) for s in (2.5, 0.0125, 9e-4, 1e-7)] == ["2.50 s", "12.5 ms", "900 µs", "0.100 µs"]
    assert text.short("a" * 30 + "the.end", 12) == "aaa…athe.end"


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, example())
    assert path.read_text(encoding="utf-8") == render(example())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
