"""Folders quantized block by block: the same bytes as in memory, whatever stops the work, under a memory cap that is kept."""

import errno
import gc
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT
from torch import nn

import roundel
from roundel import CheckError, InputError, PlanError
from roundel.cli import main
from roundel.formats.format import Format
from roundel.network.blocks import find_blocks
from roundel.quantize import folder as folder_module
from roundel.quantize import memory as memory_module
from roundel.quantize import pieces
from roundel.quantize.memory import settled, trim
from roundel.quantize.networks import SWEPT
from roundel.quantize.pieces import by_rows, rows_alone
from roundel.solvers import gptq, rtn

sys.path.insert(0, str(ROOT / "scripts"))
from random_llama import SIZES, random_llama

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 64,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
#: Its scales are not searched, which makes a run short.
FORMAT = "int8/g32"
IDS = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(5))


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model"
    random_llama(path, SMALL)
    return path


@pytest.fixture(scope="module")
def wanted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file that quantizing in memory writes."""
    path = tmp_path_factory.mktemp("wanted") / "out"
    roundel.quantize(roundel.read(llama), FORMAT, data=[IDS], solver="gptq").save(path)
    return sha(path)


def stream(model: Path, out: Path, **named: Any) -> roundel.QModel:
    return roundel.quantize(model, FORMAT, **{"data": [IDS], "solver": "gptq", "output": out, **named})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL | {"num_hidden_layers": 2}, num_local_experts=4)),
    "albert": lambda: transformers.AlbertModel(
        transformers.AlbertConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64, vocab_size=64, num_attention_heads=4,
                                  embedding_size=16)),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64, vocab_size=64, num_attention_heads=4)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, ffn_dim=64, vocab_size=64, num_attention_heads=4,
                               word_embed_proj_dim=16, max_position_embeddings=32)),
}  # fmt: skip


#: The others take a minute together: `make soak`.
QUICK = {("gpt2", "gptq"), ("mixtral", "gptq"), ("albert", "rtn")}


@pytest.mark.proves("folder.same-bytes")
@pytest.mark.parametrize(
    ("name", "solver"),
    [pytest.param(name, solver, marks=[] if (name, solver) in QUICK else [pytest.mark.soak])
     for name in MODELS for solver in ("gptq", "rtn")],
)  # fmt: skip
def test_same_bytes_as_in_memory(name: str, solver: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    MODELS[name]().eval().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    q = roundel.quantize(roundel.read(tmp_path / "model"), FORMAT, data=[IDS], solver=solver)
    q.save(tmp_path / "wanted")
    got = stream(tmp_path / "model", tmp_path / "out", solver=solver)
    assert sha(tmp_path / "out") == sha(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["model", "out", "wanted"]
    assert (got.nbytes, got.notes) == (q.nbytes, q.notes)
    assert [n.text for n in got.notes if "Hessians" in n.text] == [f"solved {SWEPT}"] * (solver == "gptq")
    for a, b in zip(_outputs(got), _outputs(q), strict=True):
        assert torch.equal(a, b)


def _outputs(q: roundel.QModel) -> list[torch.Tensor]:
    with torch.no_grad():
        return [x for x in q.module(IDS).values() if isinstance(x, torch.Tensor)]


@pytest.mark.proves("folder.prefix")
def test_each_layer_learns_from_the_quantized_ones_before_it() -> None:
    """Against a loop written out for a chain of two-layer blocks."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3)]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x if x.sum() > -1e9 else -x  # no graph can follow this

    x = torch.randn(6, 16)
    q = roundel.quantize(Chain(), "int4", data=[x], solver="gptq")
    fmt = Format.parse("int4")
    with torch.no_grad():
        for i, block in enumerate(blocks):
            layer = x
            for j in (0, 2):
                linear = block[j]
                assert isinstance(linear, nn.Linear)
                done = gptq(linear.weight, fmt, (layer.double().T @ layer.double())[None])
                assert torch.equal(q.tensors[f"blocks.{i}.{j}.weight"].codes, done.codes)
                layer = torch.nn.functional.linear(layer, done.dequantize(), linear.bias).relu()
            assert isinstance(linear, nn.Linear)
            inner = nn.functional.linear(x, q.tensors[f"blocks.{i}.0.weight"].dequantize(), block[0].bias).relu()
            x = x + nn.functional.linear(inner, done.dequantize(), linear.bias)


class _Skips(nn.Module):
    """The last block wants what the first one said: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        out = self.blocks[2](self.blocks[1](first) + first)
        return out if out.sum() > -1e9 else -out


def test_blocks_that_see_each_other_are_kept_in_memory() -> None:
    torch.manual_seed(0)
    model, x = _Skips(), torch.randn(6, 8)
    q = roundel.quantize(model, "int4", data=[x], solver="gptq")
    with torch.no_grad():
        first, second = (nn.functional.linear(x, q.tensors["blocks.0.0.weight"].dequantize(), model.blocks[0][0].bias).relu(), None)
        second = nn.functional.linear(first, q.tensors["blocks.1.0.weight"].dequantize(), model.blocks[1][0].bias).relu()
        seen = (first + second).double()
    done = gptq(model.blocks[2][0].weight, Format.parse("int4"), (seen.T @ seen)[None])
    assert torch.equal(q.tensors["blocks.2.0.weight"].codes, done.codes)


@pytest.mark.proves("folder.experts")
def test_experts_that_saw_no_token_are_listed(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.experts[int(i)](part) for i, part in enumerate(x.split(len(x) // 2))])

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x if x.sum() > -1e9 else -x

    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(6, 8)
    q = roundel.quantize(model, "int4", data=[x], solver="gptq")
    unseen = [f"blocks.{i}.experts.{e}.weight" for i in range(2) for e in (2, 3)]
    assert [n.subject for n in q.notes if "no example reached it" in n.text] == unseen
    for name in unseen:
        assert torch.equal(q.tensors[name].codes, rtn(model.get_parameter(name), Format.parse("int4")).codes)
    with pytest.raises(CheckError, match="no example reached it"):
        roundel.quantize(model, "int4", data=[x], solver="gptq", strict=True)


def test_blocks_are_the_outermost_lists() -> None:
    torch.manual_seed(0)
    assert find_blocks(nn.Sequential(nn.Linear(2, 2))) == [""]
    assert find_blocks(_Skips()) == ["blocks.0", "blocks.1", "blocks.2"]
    assert find_blocks(MODELS["mixtral"]()) == ["model.layers.0", "model.layers.1"]


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["int4/g32", "int8/channel", "uint4/g8~uint4", "uint4/g32*uint6/g8*fp16-uint6/g8*fp16", "fp4/g16*e8m0"]
)
def test_rows_in_pieces_are_the_rows_of_the_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, w = Format.parse(text), torch.randn(40, 64)
    assert rows_alone(fmt)
    whole = rtn(w, fmt)
    monkeypatch.setattr(pieces, "PIECE", 64 * 7)
    parts = by_rows(rtn, w, fmt)
    assert (parts.shape, parts.nbytes) == (whole.shape, whole.nbytes)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.dequantize(), whole.dequantize())


@pytest.mark.parametrize("text", ["int4/tensor", "nvfp4", "cb16", "cb16/g32*int8", "int4/b4x4"])
def test_formats_whose_rows_share_something_are_solved_whole(text: str) -> None:
    assert not rows_alone(Format.parse(text))


class _Ring:
    """Holds itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.self = self


@pytest.mark.proves("folder.memory")
def test_what_was_there_before_is_set_aside_and_rings_are_freed() -> None:
    old, before = weakref.ref(_Ring()), gc.get_freeze_count()
    with settled():
        assert old() is None  # garbage from before is not kept for as long
        assert gc.get_freeze_count() > before == 0
        new = weakref.ref(_Ring())
        trim()
        assert new() is None
        with settled():  # one inside changes nothing
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


# -- stopped and taken up ---------------------------------------------------------------------------------------------


def started(work: Callable[[], Any]) -> int:
    """Run ``work`` in a child process, whose number this is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads
        child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def forked(work: Callable[[], Any]) -> int:
    """How ``work`` ended in a child process: 0, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(started(work), 0)[1])


#: Writes, fsyncs and renames.
KINDS = ("write", "fsync", "replace")


def counting(stop: int | None, act: Callable[[], None], kinds: Sequence[str] = KINDS) -> Callable[[], int]:
    """From now on count calls of ``kinds`` by this process, and ``act`` at number ``stop``, before it is done."""
    seen = [0]

    def counted(real: Callable[..., Any], *args: Any, **named: Any) -> Any:
        seen[0] += 1
        if seen[0] == stop:
            act()
        return real(*args, **named)

    for name in kinds:
        setattr(os, name, partial(counted, getattr(os, name)))
    return lambda: seen[0]


def killed_at(model: Path, out: Path, stop: int, kinds: Sequence[str] = KINDS) -> int:
    def work() -> None:
        counting(stop, lambda: os.kill(os.getpid(), signal.SIGKILL), kinds)
        stream(model, out)

    return forked(work)


def steps(model: Path, out: Path) -> int:
    """How many writes, fsyncs and renames a whole run takes."""
    read, write = os.pipe()

    def work() -> None:
        count = counting(None, lambda: None)
        stream(model, out)
        total = count()
        os.write(write, str(total).encode())

    assert forked(work) == 0
    total = int(os.read(read, 64))
    os.close(read)
    os.close(write)
    return total


@pytest.mark.proves("resume.kill", "inputs.resume")
def test_killed_and_run_again_it_ends_in_the_same_bytes(llama: Path, wanted: str, tmp_path: Path) -> None:
    total = steps(llama, tmp_path / "whole")
    assert sha(tmp_path / "whole") == wanted
    out = tmp_path / "out"
    out.write_bytes(b"the file before")
    for at in (1, total // 4, total // 4, total // 8, total // 8):
        assert killed_at(llama, out, at) == -signal.SIGKILL
        assert out.read_bytes() == b"the file before"
    stream(llama, out)
    assert sha(out) == wanted
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


@pytest.mark.proves("resume.one-block")
def test_no_block_is_solved_twice(llama: Path, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, solved = tmp_path / "out", []
    real = folder_module._solve

    def counted(work: Any) -> Any:
        solved.append(work[1].name)
        if len(solved) == 11:  # in the second block
            raise KeyboardInterrupt
        return real(work)

    monkeypatch.setattr(folder_module, "_solve", counted)
    with pytest.raises(KeyboardInterrupt):
        stream(llama, out)
    stream(llama, out)
    assert sha(out) == wanted
    twice = {name for name in solved if solved.count(name) > 1}
    assert twice
    assert all(name.startswith("model.layers.1.") for name in twice)


@pytest.mark.proves("resume.disk-full")
def test_a_full_disk_loses_nothing(llama: Path, wanted: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"the file before")

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for at in (2, 60, 100):

        def work(at: int = at) -> None:
            counting(at, full)
            with pytest.raises(InputError, match="No space left"):
                stream(llama, out)

        assert forked(work) == 0
        assert out.read_bytes() == b"the file before"
        assert not list(tmp_path.rglob(".roundel-*"))
    stream(llama, out)
    assert sha(out) == wanted


@pytest.mark.proves("resume.refused")
def test_another_run_is_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert killed_at(llama, out, 150) == -signal.SIGKILL
    other = tmp_path / "other"
    random_llama(other, SMALL, seed=1)
    for field, again in {
        "plan.rules": lambda: roundel.quantize(llama, "int5/g32", data=[IDS], solver="gptq", output=out),
        "data": lambda: stream(llama, out, data=[IDS.flip(0)]),
        "model.weights": lambda: stream(other, out),
        "run.seed": lambda: stream(llama, out, seed=3),
        "run.solver": lambda: stream(llama, out, solver="descent"),
    }.items():
        with pytest.raises(InputError, match=f"differs in {field}"):
            again()


@pytest.mark.proves("resume.signals")
def test_signals_stop_the_command_and_the_same_command_goes_on(llama: Path, wanted: str, tmp_path: Path) -> None:
    data, out = tmp_path / "ids.json", tmp_path / "out"
    data.write_text(json.dumps(IDS.tolist()))
    command = [sys.executable, "-m", "roundel.cli", "quantize", str(llama), "--weights", FORMAT, "--data", str(data),
               "--solver", "gptq", "--memory", "4GB", "-o", str(out)]  # fmt: skip
    restored = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell may start what runs behind it with Ctrl-C ignored
    for call, sent, status in (0, signal.SIGTERM, 143), (1, signal.SIGINT, 130):
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=restored)
        while child.poll() is None and not (tmp_path / "out.journal" / f"call-{call:05}.entry").exists():
            time.sleep(0.01)
        child.send_signal(sent)
        _, said = child.communicate()
        assert child.returncode == status, said
        assert not out.exists()
        assert (tmp_path / "out.journal").is_dir()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 4GB allowed" in done.stderr
    assert sha(out) == wanted
    assert sorted(os.listdir(tmp_path)) == ["ids.json", "out"]


# -- refused, before any work -----------------------------------------------------------------------------------------


@pytest.mark.proves("folder.memory")
@pytest.mark.parametrize("memory", [None, "tight"])
def test_no_hessian_outlives_its_layers(memory: str | None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When layers come to be solved, there are their Hessians and no others; between blocks there is none."""
    limits = {"tight": 0.0, None: math.inf}
    sweep = folder_module.sweep_blocks
    monkeypatch.setattr(folder_module, "sweep_blocks", lambda *a, **named: sweep(*a, **named | {"limit": limits[memory]}))
    solved, seen = folder_module._Run.solved, []

    def alive() -> list[torch.Tensor]:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of torch's old names warn when they are looked at
            tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        return [t for t in tensors if t.dtype == torch.float64 and t.ndim == 3 and t.shape[1] == t.shape[2] > 1]

    def watched(run: Any, moments: dict[str, torch.Tensor], *rest: Any) -> Any:
        seen.append((len({t.data_ptr() for t in alive()}), len({t.data_ptr() for t in moments.values()})))
        return solved(run, moments, *rest)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "solve":
            assert not alive()

    monkeypatch.setattr(folder_module._Run, "solved", watched)
    stream(llama, tmp_path / "out", progress=progress)
    assert len(seen) == 3 * 4 + 1  # q, k and v | o | gate and up | down, and the head
    assert all(there == own for there, own in seen)


@pytest.mark.proves("folder.memory")
def test_a_command_that_took_more_than_its_cap_says_so(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_module, "peak", lambda: 3 * 10**9)
    for cap, warns in ("4GB", False), ("2GB", True):
        command = ["quantize", str(llama), "--weights", FORMAT, "--memory", cap, "-o", str(tmp_path / "out")]
        main(command)
        assert ("warning: that is 1.00 GB more than --memory allows" in capsys.readouterr().err) == warns


@pytest.mark.soak
@pytest.mark.proves("result.llama-1b")
def test_a_billion_weights_under_two_gigabytes(tmp_path: Path) -> None:
    """Fifty minutes of one core: GPTQ on a folder in the shape of TinyLlama."""
    assert random_llama(tmp_path / "model", SIZES["1.1b"]) > 1e9
    data = tmp_path / "ids.json"
    data.write_text(json.dumps(torch.randint(0, 32000, (8, 512), generator=torch.Generator().manual_seed(0)).tolist()))
    command = [sys.executable, "-m", "roundel.cli", "quantize", str(tmp_path / "model"), "--weights", "int4/g32",
               "--data", str(data), "--solver", "gptq", "--memory", "2GB", "-o", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 2GB allowed" in done.stderr
    assert "more than --memory allows" not in done.stderr


@pytest.mark.proves("folder.memory")
def test_a_cap_that_cannot_be_kept_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"100\.0 MiB of memory cannot be kept: it takes about .* for Python"):
        stream(llama, tmp_path / "out", memory="100MiB")
    with pytest.raises(PlanError, match="a size of memory"):
        stream(llama, tmp_path / "out", memory="much")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("named", "said"),
    [
     ({"effort": "default", "solver": None}, "effort='default' compares models.*name a solver"),
     ({"effort": "best"}, "effort='best' compares models"), ({"loss": 0.1}, "loss= compares models"),
     ({"effort": "best", "budget": "5min"}, "budget= and effort='best' compares models.*or leave output= away"),
     ({"budget": "5min"}, "budget= compares models"), ({"guided": True}, "a backward pass of the whole model: leave output="),
     ({"activations": "int8"}, "static activations need the whole model"),
     ({"data": None}, "pass data="), ({"solver": "magic"}, "no solver")],
)  # fmt: skip
def test_what_needs_the_whole_model_is_refused(named: dict[str, Any], said: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=said):
        stream(llama, tmp_path / "out", **named)
    assert not list(tmp_path.iterdir())


def test_nan_in_a_shard_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["bert"]()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"encoder.layer.1.output.dense.weight: 1 of"):
        stream(tmp_path / "model", tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


# -- many kills -------------------------------------------------------------------------------------------------------


def entries(out: Path) -> dict[str, str]:
    """What a journal holds, by name, without what a killed process was writing."""
    return {path.name: sha(path) for path in out.with_name(f"{out.name}.journal").glob("*.entry")}


def written(model: Path, out: Path) -> set[tuple[str, str]]:
    """(name, digest) of every entry that an undisturbed run writes, those included that it removes again."""
    said = out.with_name("said")

    def work() -> None:
        real = os.replace

        def seen(source: Any, target: Any, **named: Any) -> None:
            with said.open("a") as file:
                file.write(f"{Path(target).name} {sha(source) if Path(source).is_file() else ''}\n")
            real(source, target, **named)

        os.replace = seen
        stream(model, out)

    assert forked(work) == 0
    return {(name, digest) for name, digest in (line.split(" ") for line in said.read_text().splitlines())}


def spent() -> float:
    """CPU seconds of all children that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def killed_after(model: Path, out: Path, seconds: float) -> int:
    """Run it in a child that is killed, wherever it is, when it has had so many CPU seconds."""
    child = started(lambda: stream(model, out))
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        ticks = sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]))
        if ticks / os.sysconf("SC_CLK_TCK") >= seconds:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def survive(model: Path, out: Path, kills: int, calls: int, stride: int = 1) -> float:
    """Kill the work ``kills`` times, each time going on from what the last kill left, and start anew where it comes to its end.

    Until the first of ``calls`` blocks is done it is killed at its first write, fsync or rename, then at the one ``stride`` later,
    until something new is in the journal, and again; from the last but one on likewise, at fsyncs and renames; between them at any
    instant, by CPU time. What is in the journal after a kill must be what an undisturbed run writes, and so must every result.
    Returns the CPU seconds of a whole run.
    """
    good, old = written(model, out), b"the file before"
    wanted, start = sha(out), spent()
    assert killed_after(model, out, math.inf) == 0
    whole, since = spent() - start, spent()
    print(f"\na whole run: {whole:.1f} s of CPU time, {len(good)} entries")
    random, places, ends, stop = torch.Generator().manual_seed(0), Counter[str](), 0, 1
    out.write_bytes(old)
    last = entries(out)
    while places.total() < kills or last:
        if places.total() >= kills:
            where, ended = "", killed_after(model, out, math.inf)
        elif "call-00000.entry" not in last:
            where, ended = "at a write, fsync or rename", killed_at(model, out, stop)
        elif f"call-{calls - 3:05}.entry" in last:
            where, ended = "at a late fsync or rename", killed_at(model, out, stop, ("fsync", "replace"))
        else:
            where, ended = "at any instant", killed_after(model, out, 3 * whole / calls * float(torch.rand((), generator=random)))
        assert ended in (0, -signal.SIGKILL)
        places[where] += ended != 0
        now = entries(out)
        assert set(now.items()) <= good
        assert sha(out) == wanted or (ended and out.read_bytes() == old)
        stop = stop + stride if now.keys() == last.keys() else 1
        if sha(out) == wanted and not now:  # the end, or killed right after it
            ends, stop = ends + 1, 1
            out.write_bytes(old)
        last = now
    redone = (spent() - since - ends * whole) / kills
    told = f"{places.total()} kills {dict(places)}, {ends} results, all the same bytes"
    print(f"{told}; {redone:.2f} s redone per kill, a block takes {whole / calls:.2f} s")
    return whole


@pytest.mark.soak
@pytest.mark.proves("resume.kill")
def test_two_hundred_kills(tmp_path: Path) -> None:
    """Of runs that take more than a minute each."""
    random_llama(tmp_path / "model", {"hidden_size": 256, "num_hidden_layers": 60, "intermediate_size": 704, "vocab_size": 512,
                                      "num_attention_heads": 4, "num_key_value_heads": 2})  # fmt: skip
    assert survive(tmp_path / "model", tmp_path / "out", 200, 60) >= 60
