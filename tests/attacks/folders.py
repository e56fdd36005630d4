"""Hostile and broken Hugging Face folders, written below a given path."""

import json
import shutil
from pathlib import Path


def sharded(folder: Path, shards: dict[str, str], config: dict | None = None) -> Path:
    """A folder whose index sends each tensor name to a file name; no shard is written."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def auto_map(folder: Path, source: Path, canary: Path, model_type: str | None = None) -> Path:
    """A copy of a real folder with code of its own, which would make ``canary``, and perhaps another model type."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}
    if model_type:
        config["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    return folder
