"""`QModel`: what it counts, and that what was saved runs the same in a process that never saw the float model; no formats."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SmallCNN, TransformerBlock, settle
from safetensors.torch import load_file
from torch import Tensor, nn

import roundel as rd
from roundel.data import Preprocess
from roundel.graph import GraphModule
from roundel.qmodel import HF, External

ROOT = Path(__file__).resolve().parent.parent
MODES = [None, "int8", "int8:dynamic", "int8:token"]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def fresh(code: str, *args: object, threads: int = 1) -> str:
    """Run ``code`` in a new process with the package alone on its path, and give its output."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    head = f"import sys, torch\nimport roundel as rd, roundel.graph\ntorch.set_num_threads({threads})\n"
    command = [sys.executable, "-W", "error", "-c", head + code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_tensors(path: Path, tensors: list[Tensor]) -> Path:
    torch.save(tensors, path)
    return path


RUN = """
x, want = (torch.load(path) for path in sys.argv[1:3])
with torch.no_grad():
    for path, y in zip(sys.argv[3:], want, strict=True):
        got = rd.load(path).module(*x)
        assert torch.equal(got, y), path
        assert torch.equal(rd.fake(rd.load(path))(*x), y), path
assert "models" not in sys.modules
print(len(want))
"""


@pytest.mark.proves("file.roundtrip", "api.load", "api.qmodel", "mode.fake-twin")
@pytest.mark.parametrize("net", [SmallCNN, TransformerBlock])
@pytest.mark.parametrize("threads", [1, 2])
def test_runs_the_same_in_a_new_process(net: Any, threads: int, tmp_path: Path) -> None:
    """Graph models, every mode by uniform and other formats; the process has no code of theirs. Its threads matter to none but
    the weight-only mode, whose float products are torch's."""
    x = rows(3, 3, 16, 16) if net is SmallCNN else rows(3, 7, 16)
    model = GraphModule(rd.capture(settle(net()), x))
    paths, want = [], []
    for i, activations in enumerate(MODES if threads == 1 else MODES[1:]):
        for j, weights in enumerate(("int4/g32", "nf4/g32", "cb16/channel", "uint4/g8~uint4")[: 4 if threads == 1 else 1]):
            q = rd.quantize(model, weights, activations, data=[x], ranges="minmax")
            paths.append(tmp_path / f"{i}{j}.safetensors")
            q.save(paths[-1])
            with torch.no_grad():
                want.append(q.module(x))
    inputs, outputs = save_tensors(tmp_path / "x.pt", [x]), save_tensors(tmp_path / "y.pt", want)
    assert fresh(RUN, inputs, outputs, *paths, threads=threads).strip() == str(len(paths))


SAVE = """
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 20)).eval()
x = torch.randn(64, 4, 8, 8)
net = rd.graph.GraphModule(rd.capture(net, x))
for activations in (None, "int8", "int8:token"):
    for path in sys.argv[1:]:
        rd.quantize(net, "cb16/g32*int8", activations, data=[x[:40], x[40:]]).save(path)
        print(activations, __import__("hashlib").sha256(open(path, "rb").read()).hexdigest())
"""


@pytest.mark.proves("file.sha256")
def test_one_sha256_twice_and_under_one_and_two_threads(tmp_path: Path) -> None:
    outs = [fresh(SAVE, tmp_path / "a", tmp_path / "b", threads=threads).split("\n")[:-1] for threads in (1, 2)]
    assert outs[0] == outs[1]
    assert len(outs[0]) == 6
    assert len(set(outs[0])) == 3  # saved twice in one process, too


EXTERNAL = """
q = rd.load(sys.argv[1])
assert type(q.structure).__name__ == "External", q.structure
try:
    q.module
except rd.InputError as err:
    print(err)
assert not {"strange", "strange.nets"} & set(sys.modules)
"""


def strange(folder: Path) -> type[nn.Module]:
    """A network of a package that marks every import of it."""
    package = folder / "strange"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path(__file__).with_name('imported').write_text('')\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)\n"
        "    def forward(self, x):\n"
        "        return self.second(self.first(x) if x.sum() > 0 else x)\n"
    )
    sys.path.insert(0, str(folder))
    try:
        from strange.nets import Net  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(folder))
        for name in ("strange", "strange.nets"):
            sys.modules.pop(name, None)
    (package / "imported").unlink()
    return Net  # type: ignore[no-any-return]


@pytest.mark.proves("file.external", "file.into", "api.load")
@pytest.mark.parametrize("activations", [None, "int8", "int8:dynamic"])
def test_external_code_is_never_imported_and_into_binds_it(activations: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    net, x = strange(tmp_path), rows(4, 8).abs()
    torch.manual_seed(1)
    model = net()
    q = rd.quantize(model, "int4", activations, data=[x])
    assert q.structure == External("strange.nets:Net")
    assert any("cannot be captured" in note.text and note.fallback for note in q.notes)
    path = tmp_path / "net.safetensors"
    q.save(path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "load(path, into=module)" in fresh(EXTERNAL.replace("import sys", f"sys.path.append({str(tmp_path)!r})"), path)
    assert not (tmp_path / "strange" / "imported").exists()

    other = net()
    before = {name: t.clone() for name, t in other.state_dict().items()}
    loaded = rd.load(path, into=other)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), q.module(x))
        assert torch.equal(rd.fake(loaded)(x), q.module(x))
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())  # what was lent is left as it was
    with pytest.raises(rd.InputError):
        rd.load(path, into=nn.Sequential(nn.Linear(8, 2))).module(x)


@pytest.mark.proves("file.into")
def test_a_graph_brings_its_own_structure(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(8, 2)), rows(2, 8)
    rd.quantize(net, data=[x]).save(tmp_path / "net")
    with pytest.raises(rd.InputError, match="brings its own structure"):
        rd.load(tmp_path / "net", into=net)


def tiny_llama() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2,
                                      tie_word_embeddings=True, max_position_embeddings=64)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


HF_RUN = """
x, *want = torch.load(sys.argv[1])
with torch.no_grad():
    for path, y in zip(sys.argv[2:], want, strict=True):
        assert torch.equal(rd.load(path).module(x).logits, y)
"""


@pytest.mark.proves("file.roundtrip", "mode.dynamic-token")
def test_transformers_models_come_back_through_their_config(tmp_path: Path) -> None:
    model, ids = tiny_llama(), torch.arange(12).reshape(2, 6)
    tensors, paths = [ids], []
    for activations in (None, "int8:token"):
        q = rd.quantize(model, "int4/g16", activations)
        assert isinstance(q.structure, HF)
        assert q.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        with torch.no_grad():
            tensors.append(q.module(ids).logits)
            assert torch.equal(rd.fake(q)(ids).logits, tensors[-1])
        paths.append(tmp_path / f"{activations is None}.safetensors")
        q.save(paths[-1])
    fresh(HF_RUN, save_tensors(tmp_path / "x.pt", tensors), *paths)


@pytest.mark.proves("file.provenance", "api.qmodel")
def test_provenance_and_everything_else_comes_back(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 2)), rows(4, 10)
    q = rd.quantize(net, "int4/g4", "int8", data=[x], exclude=["2"], seed=7, preprocess=Preprocess())
    assert q.provenance["torch"] == torch.__version__
    assert q.provenance["isa"] == torch.backends.cpu.get_cpu_capability()
    assert (q.provenance["roundel"], q.provenance["solver"], q.provenance["seed"]) == (rd.__version__, "rtn", 7)
    q.save(tmp_path / "net")
    loaded = rd.load(tmp_path / "net")
    assert loaded.provenance == json.loads(json.dumps(dict(q.provenance)))
    assert (loaded.plan, loaded.notes, loaded.tied, loaded.format_version) == (q.plan, q.notes, q.tied, q.format_version)
    assert loaded.notes
    assert (loaded.nbytes, loaded.bits) == (q.nbytes, q.bits)
    assert isinstance(q.structure, rd.Graph)
    assert isinstance(loaded.structure, rd.Graph)
    assert loaded.structure.to_json() == q.structure.to_json()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


@pytest.mark.proves("api.qmodel", "mode.weight-only")
def test_every_byte_is_counted(tmp_path: Path) -> None:
    """int4/g32 on (10, 70): rows of 35 bytes, three fp16 scales each; a bias; two sites of fp32 scale and int8 zero point."""
    q = rd.quantize(nn.Sequential(nn.Linear(70, 10)), "int4/g32", "int8", data=[rows(4, 70)])
    weight = q.tensors["0.weight"]
    assert weight.nbytes == 10 * 35 + 10 * 3 * 2
    assert weight.bits == 8 * weight.nbytes / 700
    assert str(weight.format) == "int4/g32*fp16"
    assert weight.dequantize().shape == weight.shape == (10, 70)
    assert q.nbytes == weight.nbytes + 10 * 4 + 2 * (4 + 1)
    assert q.bits == 8 * q.nbytes / 710
    q.save(tmp_path / "net")
    held = load_file(tmp_path / "net")
    assert sum(t.numel() * t.element_size() for t in held.values()) == q.nbytes
    assert math.isclose(rd.load(tmp_path / "net").bits, q.bits)


def test_the_packed_module_holds_no_float_weight() -> None:
    """The module of a packed model has the biases as parameters, and no tensor of a weight's size but its codes."""
    q = rd.quantize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), "int4/g32", data=[rows(4, 64)])
    assert sorted(p.numel() for p in q.module.parameters()) == [64, 64]
    assert q.module is q.module  # built once
    assert not q.module.training


def test_sha256_tells_what_differs(tmp_path: Path) -> None:
    net, x = settle(SmallCNN()), rows(2, 3, 16, 16)
    sums = set()
    for weights, seed in (("int8", 0), ("int8", 1), ("int7", 0)):
        rd.quantize(net, weights, data=[x], seed=seed).save(tmp_path / "net")
        sums.add(hashlib.sha256((tmp_path / "net").read_bytes()).hexdigest())
    assert len(sums) == 3
