"""`make bench-cnn`, `make bench-lm`: other toolkits and Roundel on the same models and data; each run alone, all scored in one way.

    python bench/harness.py install          a virtual environment per peer, outside the repository
    python bench/harness.py run              what is not on record yet; --again repeats
    python bench/harness.py table            results/NAME.json -> results/NAME.md

Each takes --lm for language models; without it, image networks. A peer's run is a process of its own environment that gets a model
and images or documents and answers with outputs (`child.py`, `task.py`). Whatever a peer does, fail, hang or print rubbish, is a
row that says so. What is particular to language models is in `tokens.py`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import tokens
import torch
from task import bits_of

from roundel.data import Batch
from roundel.errors import InputError
from roundel.evaluate.scores import Scores

HERE = Path(__file__).resolve().parent
CACHE = Path.home() / ".cache" / "roundel" / "bench"
RESULTS = HERE / "results"
OURS = "ours"
T = TypeVar("T")
LIMIT = 1200.0  # seconds that a run may take, images to score included

#: One thread, whichever library a toolkit computes with, and no look at the network.
LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "TBB")
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in LIBRARIES} | {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
    "PYTHONHASHSEED": "0",
}


# -- peers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """``bits`` are the widths to run it at on images, ``sizes`` in bits per number on texts; ``kind`` is ptq or qat; ``limit`` in
    seconds; ``minutes`` of training, CPU time; ``drawn``: whether anything depends on the seed, so that more than one is worth it.
    """

    words: str
    bits: tuple[str, ...] = ()
    kind: str = "ptq"
    suites: tuple[str, ...] = ("resnet20", "dscnn", "stories260K", "benchlm")
    limit: float = LIMIT
    minutes: float = 5.0
    sizes: tuple[str, ...] = ()
    drawn: bool = True


@dataclass(frozen=True)
class Peer:
    """``file`` in peers/, ``package`` whose version is reported, ``requires`` for pip, ``python`` of its environment; ``tokens`` is
    the file for language models where that is another one."""

    file: Path
    title: str
    package: str
    requires: tuple[str, ...]
    settings: Mapping[str, Setting]
    python: Path
    tokens: Path | None = None


def peers(table: Path = HERE / "peers.toml", cache: Path = CACHE) -> dict[str, Peer]:
    """The peers of a table; ours runs in the environment of this process."""
    out = {}
    for name, entry in tomllib.loads(table.read_text()).items():
        if not isinstance(entry, dict):
            continue
        settings = {key: _setting(given) for key, given in entry["settings"].items()}
        python = Path(sys.executable) if name == OURS else cache / name / "bin" / "python"
        file, texts = (table.parent / "peers" / str(entry.get(kind, entry["file"])) for kind in ("file", "tokens"))
        out[name] = Peer(file, entry["title"], entry["package"], tuple(entry["requires"]), settings, python, texts)
    return out


def _setting(given: Mapping[str, Any]) -> Setting:
    listed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return Setting(**listed)


def install(name: str, peer: Peer, first: str) -> None:
    """Make the peer's environment: ``first`` (torch, of which another package might pull the CUDA build) before all else.
    One that holds these very packages is left as it is."""
    folder = peer.python.parent.parent
    mark, wanted = folder / "installed.json", json.dumps([first, *peer.requires])
    if mark.exists() and mark.read_text() == wanted:
        return
    if not peer.python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(peer.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, first, "numpy"], check=True)
    if peer.requires:  # the first again, or the resolver may take another
        subprocess.run([*pip, first, *peer.requires], check=True)
    mark.write_text(wanted)


# -- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One run. ``status`` is ok, or missing, failed, rubbish, too long or refused, and then ``reason`` says why.

    ``seconds`` of CPU and ``wall`` from float model to quantized one, imports and scoring left out; ``peak`` resident bytes until
    then; ``kl`` of float || quantized in nats with its 95 % interval; ``flips`` and ``top1`` are shares. Of a language model:
    ``size`` in bits per number of the linear layers, ``ratio`` of perplexities, ``documents`` with each one's sum of KLD,
    ``backprop``: whether gradients went through the whole model, ``drawn``: whether the seed matters.
    """

    suite: str
    peer: str
    setting: str
    bits: str
    seed: int
    kind: str = "ptq"
    version: str = ""
    status: str = "ok"
    reason: str = ""
    kl: float | None = None
    interval: tuple[float, float] | None = None
    flips: float | None = None
    top1: float | None = None
    seconds: float | None = None
    wall: float | None = None
    peak: int | None = None
    weights: Mapping[str, int] = field(default_factory=dict)
    activations: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    size: float | None = None
    ratio: float | None = None
    documents: tuple[float, ...] = ()
    backprop: bool = False
    drawn: bool = True

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.suite, self.peer, self.setting, self.bits, self.seed


def run(row: Row, peer: Peer, suite: Path, minutes: float | None = None) -> Row:
    """``row`` with what came of it; never raises for what a peer does. ``minutes`` stands in for the setting's own."""
    setting = peer.settings[row.setting]
    row = replace(row, kind=setting.kind, drawn=setting.drawn)
    if not peer.python.exists():
        return replace(row, status="missing", reason=f"not installed: python bench/harness.py install --peer {row.peer}")
    text = (suite / "score.npz").exists()
    weights, activations = (0, 0) if text else bits_of(row.bits)
    with tempfile.TemporaryDirectory(prefix="roundel-bench-") as name:
        out = Path(name)
        task = {"suite": str(suite), "setting": row.setting, "weights": weights, "activations": activations, "seed": row.seed,
                "scratch": name, "minutes": setting.minutes if minutes is None else minutes,
                "size": float(row.bits) if text else 0.0}  # fmt: skip
        file = peer.tokens if text and peer.tokens else peer.file
        command = [str(peer.python), str(HERE / "child.py"), str(file), json.dumps(task), name]
        row = replace(row, version=_version(peer))
        code, log = _child(command, out, setting.limit)
        if code is None:
            return replace(row, status="too long", reason=f"over {setting.limit:.0f} s")
        if code != 0:
            return replace(row, status="failed", reason=_reason(code, log))
        return _read(row, out, suite)


def _child(command: Sequence[str], out: Path, limit: float) -> tuple[int | None, str]:
    """Exit status (None: it ran past ``limit``) and what was printed; its whole process group ends with it."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with (out / "log").open("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=out, env=keep | ONE_THREAD, start_new_session=True
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        log.seek(0)
        return code, log.read()


def _reason(code: int, log: str) -> str:
    """The last error that a failed run printed, or else its last line; progress bars are often shut after the traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [f"exit status {code}, nothing printed"])[-1][:300]


def _version(peer: Peer) -> str:
    """The version of the peer's package, asked of its own environment."""
    asked = f"import importlib.metadata as m; print(m.version({peer.package!r}))"
    done = subprocess.run([str(peer.python), "-c", asked], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "?"


#: What files that hold no answer raise.
RUBBISH = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError, MemoryError, zipfile.BadZipFile)


def _read(row: Row, out: Path, suite: Path) -> Row:
    """What a run left in ``out``, scored; anything that is no answer is rubbish."""
    try:
        told = json.loads((out / "told.json").read_text())
        if "refused" in told:
            return replace(row, status="refused", reason=str(told["refused"])[:300])
        figures: dict[str, Any] = {key: float(told[key]) for key in ("seconds", "wall")}
        figures |= {"peak": int(told["peak"]), "note": str(told["note"])}
        figures |= {key: {str(int(b)): int(n) for b, n in told[key].items()} for key in ("weights", "activations")}
        figures |= {"size": None if told["size"] is None else float(told["size"]), "backprop": bool(told["backprop"])}
        answer = np.load(out / "answer.npy", allow_pickle=False)
        if not isinstance(answer, np.ndarray):
            raise ValueError("answer.npy is an archive")
        if not all(math.isfinite(figures[key]) and figures[key] >= 0 for key in ("seconds", "wall")):
            raise ValueError("seconds are no time")
    except RUBBISH as error:
        return replace(row, status="rubbish", reason=f"no answer to read: {type(error).__name__}: {error}"[:300])
    judge = tokens.score if (suite / "score.npz").exists() else score
    try:
        return replace(row, **judge(answer, suite), **figures)
    except InputError as error:
        return replace(row, status="rubbish", reason=str(error)[:300])


def score(answer: np.ndarray, suite: Path) -> dict[str, Any]:
    """KL, its interval, flips and top-1 of outputs (n, classes); raises `InputError` where they are no such thing."""
    with np.load(suite / "truth.npz") as truth:
        real, labels = torch.from_numpy(truth["outputs"]), torch.from_numpy(truth["labels"])
    if answer.shape != tuple(real.shape) or answer.dtype != np.float32:
        raise InputError(f"outputs of shape {list(answer.shape)} and type {answer.dtype}; asked for {list(real.shape)}, float32")
    batch = Batch((), {}, labels)
    scores = Scores.like(batch, real, "top1")
    scores.take(0, batch, real, torch.from_numpy(answer))
    found = scores.figures(seed=0)
    return {"kl": found["kl"], "interval": found["kl_interval"], "flips": found["flips"], "top1": found["metric"]}


# -- the record -------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of a frozen file; none where there is no file."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["runs"]
    listed: list[dict[str, Any]] = [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    return [Row(**row) for row in listed]


def write(path: Path, rows: Iterable[Row], about: Mapping[str, Any]) -> None:
    """Freeze ``rows`` in a stable order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "runs": [_told(row) for row in sorted(rows, key=lambda r: r.key)]}, indent=1) + "\n"
    text = re.sub(r"\[\s+([^][{}]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)  # a list of numbers on one line
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


def _told(row: Row) -> dict[str, Any]:
    """A row without what only the other kind of suite has."""
    images = row.bits.startswith("W")
    left = ("size", "ratio", "documents", "backprop", "drawn") if images else ("top1", "weights", "activations")
    return {key: value for key, value in asdict(row).items() if key not in left}


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The runs of one setting at one width, all seeds: means over those that came through."""

    first: Row
    seeds: int
    kl: float | None
    flips: float | None
    top1: float | None
    seconds: float | None
    peak: float | None
    low: float | None
    high: float | None
    size: float | None = None
    ratio: float | None = None
    documents: tuple[float, ...] = ()

    @property
    def drawn(self) -> bool:
        return self.first.drawn

    @property
    def name(self) -> str:
        return f"{self.first.peer} {self.first.setting}"


def lines(rows: Iterable[Row]) -> list[Line]:
    """One line per suite, kind, width, peer and setting, in the order of the peers' file where it has them."""
    known = {(name, key): i for i, (name, key) in enumerate((n, k) for n, p in peers().items() for k in p.settings)}

    def order(row: Row) -> tuple[Any, ...]:
        at = known.get((row.peer, row.setting), len(known))
        return row.suite, row.kind, *(-b for b in _widths(row.bits)), at, row.peer, row.setting

    return [_line(list(group)) for _, group in groupby(sorted(rows, key=lambda r: (*order(r), r.seed)), key=order)]


def _widths(bits: str) -> tuple[float, ...]:
    """What rows are ordered by: W4A8, or a size such as 4.25."""
    return (float(bits),) if bits.replace(".", "", 1).isdigit() else bits_of(bits)


def _line(runs: list[Row]) -> Line:
    good = [row for row in runs if row.status == "ok"]

    def mean(name: str) -> float | None:
        found = [value for row in good if (value := getattr(row, name)) is not None]
        return math.fsum(found) / len(found) if found else None

    ends = [row.interval for row in good if row.interval]
    low, high = (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else (None, None)
    first = next(iter(good), runs[0])
    documents = tuple(map(float, np.mean([row.documents for row in good], 0))) if first.documents else ()
    return Line(first, len(good), mean("kl"), mean("flips"), mean("top1"), mean("seconds"), mean("peak"), low, high,
                mean("size"), mean("ratio"), documents)  # fmt: skip


def beaten(found: Sequence[Line]) -> Iterator[tuple[Line, list[Line]]]:
    """For each line of ours, the peers' lines that are at once better in KLD and faster."""
    for mine in found:
        if mine.first.peer != OURS or mine.kl is None or mine.seconds is None:
            continue
        better = [
            line
            for line in found
            if line.first.peer != OURS
            and line.kl is not None
            and line.seconds is not None
            and line.kl < mine.kl
            and line.seconds < mine.seconds
        ]
        yield mine, better


def sentence(found: Sequence[Line], bits: str) -> str:
    """Whether any peer is at once better in KLD and faster, at one width, for each of our settings."""
    claims = list(beaten(found))
    if not claims or not any(line.first.peer != OURS and line.kl is not None for line in found):
        return f"{bits}: nothing to compare."
    losses = [
        f"{them.name} ({_kl(them)}) over {mine.name} ({_kl(mine)}{', intervals overlap' if _overlap(them, mine) else ''})"
        for mine, better in claims
        for them in better
    ]
    names = ", ".join(mine.first.setting for mine, _ in claims)
    told = "; ".join(losses)
    verdict = "true" if not losses else f"**false**: {told}"
    return f"{bits}: of what was run, no peer is at once better in KLD and faster than any of ours ({names}): {verdict}."


def _overlap(one: Line, other: Line) -> bool:
    """Whether the 95 % intervals of two KLDs meet: then chance may have decided which is lower."""
    return None not in (one.high, other.low) and float(one.high or 0) >= float(other.low or 0)


def _kl(line: Line) -> str:
    return f"{line.kl:.4f} in {line.seconds:.1f} s"


def page(record: Path) -> str:
    """The Markdown of a frozen file; figures come from nowhere else."""
    about = json.loads(record.read_text())
    rows = read(record)
    out = [f"# {about['title']}", "", about["command"], "", f"Last run {about['date']}: {about['machine']}.", ""]
    head = "| toolkit | setting | seeds | KLD [95 %] | flips | top-1 | CPU s | peak MB | weights | edges | |"
    for (suite, kind), group in groupby(lines(rows), key=lambda line: (line.first.suite, line.first.kind)):
        shape = about["suites"][suite]
        text = "tokens" in shape
        out += [f"## {suite}{', trained (QAT)' if kind == 'qat' else ''}", ""]
        out += [tokens.about(shape) if text else
                f"{shape['weights']} weights, {shape['sites']} edges; {shape['calibrate']} examples calibrate, "
                f"{shape['score']} others score; float top-1 {100 * shape['top1']:.2f} %.", ""]  # fmt: skip
        everything = list(group)
        for bits, part in groupby(everything, key=lambda line: line.first.bits):
            found = list(part)
            out += [f"### {bits}{' bits' if text else ''}", "", tokens.HEAD if text else head, "| --- " * 11 + "|"]
            out += [_cells(line, shape) for line in found]
            out += ["", tokens.sentence(everything, bits, OURS) if text else sentence(found, bits)]
            if left := _not_run(found, suite, kind, bits):
                out += ["", f"Not run: {', '.join(left)}."]
            out += [""]
    return "\n".join(out).rstrip() + "\n"


def _not_run(found: Sequence[Line], suite: str, kind: str, bits: str) -> list[str]:
    """Settings of peers.toml that have no row."""
    there = {line.name for line in found}
    asked = [
        f"{name} {key}"
        for name, peer in peers().items()
        for key, setting in peer.settings.items()
        if suite in setting.suites and kind == setting.kind and bits in (*setting.bits, *setting.sizes)
    ]
    return [name for name in asked if name not in there]


def _cells(line: Line, shape: Mapping[str, int]) -> str:
    row = line.first
    head = f"| {row.peer} {row.version} | {row.setting} | "
    if line.kl is None:
        empty = f"– | 0 | {row.status} {'| ' * 6}" if "tokens" in shape else f"0 | {row.status} {'| ' * 7}"
        return head + empty + f"{_plain(row.reason)} |"
    if row.size is not None:
        return head + " | ".join([*tokens.cells(line), _plain(row.note)]) + " |"
    said = [_sites(row.weights, shape["weights"]), _sites(row.activations, shape["sites"])]
    peak = "–" if line.peak is None else f"{line.peak / 1e6:.0f}"
    figures = [f"{line.kl:.4f} [{line.low:.4f}, {line.high:.4f}]", f"{100 * (line.flips or 0):.2f} %",
               f"{100 * (line.top1 or 0):.2f} %", f"{line.seconds:.1f}", peak, *said, _plain(row.note)]  # fmt: skip
    return head + f"{line.seeds} | " + " | ".join(figures) + " |"


def _plain(text: str) -> str:
    """In one cell of a table."""
    return " ".join(text.replace("|", "/").split())


def _sites(counts: Mapping[str, int], whole: int) -> str:
    """Counts by bits, against how many there are; † where some stay float."""
    if not counts:
        return "not told"
    told = " + ".join(f"{n} x {bits}" for bits, n in sorted(counts.items(), key=lambda item: int(item[0])))
    return f"{told} of {whole}" + ("" if sum(counts.values()) >= whole else " †")


# -- commands ---------------------------------------------------------------------------------------------------------


@click.group(help=__doc__, context_settings={"max_content_width": 120})
def cli() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the clean-up: no peer outlives the harness


_cache = click.option(
    "--cache", type=click.Path(path_type=Path), default=CACHE, help="Environments and suites; by default ~/.cache/roundel/bench."
)
_peer = click.option("--peer", "names", multiple=True, help="Only these peers.")
_results = click.option(
    "--record", type=click.Path(path_type=Path), help="The frozen file; by default bench/results/cnn.json, or lm.json with --lm."
)
_lm = click.option("--lm", is_flag=True, help="Language models, not image networks.")


@cli.command("install")
@_cache
@_peer
@_lm
def install_(cache: Path, names: Sequence[str], lm: bool) -> None:
    """A virtual environment per peer; a peer that cannot be installed is said so and will be a row that is missing."""
    table = HERE / "peers.toml"
    first = f"torch=={tomllib.loads(table.read_text())['torch']}"
    for name, peer in _chosen(peers(table, cache), names):
        if name == OURS or not (names or any(setting.sizes if lm else setting.bits for setting in peer.settings.values())):
            continue
        try:
            install(name, peer, first)
        except subprocess.CalledProcessError as error:
            shutil.rmtree(peer.python.parent.parent, ignore_errors=True)
            click.echo(f"{name} is not installed: {error}", err=True)


@cli.command("run")
@_cache
@_peer
@_results
@click.option("--suite", "suite_names", multiple=True, help="Only these suites.")
@_lm
@click.option("--model", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="This folder of a language model, on the text of the data folder.")  # fmt: skip
@click.option("--setting", "settings", multiple=True, help="Only these settings.")
@click.option("--bits", "widths", multiple=True, help="Only these widths, such as W4A8, or sizes, such as 4.5.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only these calibration draws.  [default: 1, 2, 3]")
@click.option("--kind", type=click.Choice(["ptq", "qat"]), help="Only quantization after training, or only training.")
@click.option("--minutes", type=float, help="CPU time of settings that train, in place of what peers.toml says.")
@click.option("--again", is_flag=True, help="Also what is on record.")
def run_(cache: Path, names: Sequence[str], record: Path | None, lm: bool, model: Path | None, suite_names: Sequence[str],
         settings: Sequence[str], widths: Sequence[str], seeds: Sequence[int], kind: str | None, minutes: float | None,
         again: bool) -> None:  # fmt: skip
    """Run, score and freeze; each row is on record as soon as it is there."""
    from suites import SEEDS, SUITES, TEXTS, folder_texts, make, write_texts

    text = lm or model is not None
    record_given, record = record, record or RESULTS / ("lm.json" if text else "cnn.json")
    table: Mapping[str, Any] = TEXTS if text else SUITES
    if model is not None:  # what a caller brought is told apart by its bytes, and is not for the repository
        name = f"{model.name}-{_digest(model)}"
        table, record = {name: partial(folder_texts, model)}, (record_given or cache / f"{name}.json")
    who = _chosen(peers(cache=cache), names)
    for seed in seeds or SEEDS:
        for suite, given in _chosen(table, suite_names):
            folder = cache / "suites" / suite
            if not (folder / "suite.json").exists():
                (write_texts if text else make)(given, folder)
            for name, peer in who:
                for row in _asked(suite, name, peer, settings, widths, seed, kind, text):
                    if not again and row.key in {found.key for found in read(record)}:
                        continue
                    found = run(row, peer, folder, minutes=minutes)
                    others = [other for other in read(record) if other.key != found.key]  # as it is now: runs take minutes
                    write(record, [*others, found], _about(cache, {suite, *(other.suite for other in others)}, text))
                    record.with_suffix(".md").write_text(page(record))
                    click.echo(f"{suite} {name} {row.setting} {row.bits} seed {seed}: {found.status} {found.reason}"
                               + (f"KLD {found.kl:.4f}, {found.seconds:.1f} s CPU" if found.kl is not None else ""))  # fmt: skip


def _digest(folder: Path) -> str:
    """Eight letters that stand for the weights in a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:8]


def _asked(suite: str, name: str, peer: Peer, settings: Sequence[str], widths: Sequence[str], seed: int,
           kind: str | None, text: bool = False) -> Iterator[Row]:  # fmt: skip
    """The runs of a peer on a suite; a model that a caller brought is treated like the bench model."""
    for key, setting in peer.settings.items():
        named = suite if not text or suite in ("stories260K", "benchlm") else "benchlm"
        wanted = (not settings or key in settings) and named in setting.suites and kind in (None, setting.kind)
        for bits in (setting.sizes if text else setting.bits) if wanted and (setting.drawn or seed == 1) else ():
            if not widths or bits in widths:
                yield Row(suite, name, key, bits, seed)


def _about(cache: Path, suites: Collection[str], text: bool) -> dict[str, Any]:
    """What stands beside the runs."""
    from datetime import UTC, datetime

    found = {name: json.loads((cache / "suites" / name / "suite.json").read_text()) for name in sorted(suites)}
    return {
        "title": f"{'Language models' if text else 'Convolutional networks'}: Roundel and other toolkits",
        "command": f"`make bench-{'lm' if text else 'cnn'}` (written by bench/harness.py; what the columns mean: bench/README.md)",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"one thread of a CPU with {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"numpy {importlib.metadata.version('numpy')}",
        "suites": found,
    }


@cli.command("table")
@_results
@_lm
def table_(record: Path | None, lm: bool) -> None:
    """Write the Markdown beside the frozen file, and print its sentences."""
    record = record or RESULTS / ("lm.json" if lm else "cnn.json")
    text = page(record)
    record.with_suffix(".md").write_text(text)
    click.echo(text)


def _chosen(table: Mapping[str, T], names: Sequence[str]) -> list[tuple[str, T]]:
    if unknown := [name for name in names if name not in table]:
        raise click.ClickException(f"{', '.join(unknown)}: there is only {', '.join(table)}")
    return [(name, value) for name, value in table.items() if not names or name in names]


if __name__ == "__main__":
    cli()
