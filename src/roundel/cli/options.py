"""Options that several commands share, and the way from their texts to what the Python API takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from .text import notes

if TYPE_CHECKING:
    from torch import nn

    from ..data import Data, Preprocess
    from ..qmodel import QModel

#: What `roundel.evaluate` knows by name, written again because it lives with torch.
METRICS = ("top1", "perplexity", "cosine", "mse")

model = click.argument("model", metavar="MODEL")
state = click.option("--state", metavar="WEIGHTS", help="Weights for MODEL = package.module:factory, or for a bare checkpoint.")
inputs = click.option("--inputs", metavar="T", multiple=True, help="Start at this tensor (index or name); may be repeated.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
preprocess = click.option("--preprocess", metavar="P.toml", help="How raw data becomes the model's input; stored in the artifact.")
metric = click.option(
    "--metric", metavar="M", type=click.Choice(METRICS), help="top1, perplexity, cosine or mse; without it what suits the data."
)


def data(required: bool) -> Callable[..., Any]:
    """The option --data."""
    text = "Data: .npz (x and y, or named inputs), token ids (.json, .npy), text, a zip or folder of images by class."
    return click.option("--data", metavar="FILE", required=required, help=text)


def check_output(path: str) -> None:
    """Fail before any work when ``path`` cannot be written."""
    from ..files import check_writable

    check_writable(path)


def check_format(text: str | None, kind: Literal["weight", "activation"]) -> None:
    """Refuse a bad format text before the model is read."""
    from ..plan import FLOAT, Choice

    if text is not None and text != FLOAT:
        Choice.parse(text, kind)


def is_artifact(path: str) -> bool:
    """Whether a safetensors file says in its header that it is one of ours."""
    if not Path(path).is_file():
        return False
    from ..files import open_regular, read_header

    with open_regular(path) as file:
        looks = file.read(9)[8:] == b"{"
    return looks and "roundel" in read_header(path)[1]


def read_model(model: str, state: str | None, inputs: Sequence[str]) -> nn.Module:
    """MODEL as a network; inputs that are numbers are indices."""
    from ..readers import read

    return read(model, inputs=[int(t) if t.lstrip("-").isdigit() else t for t in inputs] or None, state=state)


def read_notes(model: str, module: nn.Module) -> list[tuple[str, str]]:
    """What the reader of MODEL wants the user to know; of a graph, `quantize` keeps that in its own notes."""
    return [(model, sentence) for sentence in getattr(module, "roundel_notes", ())]


def given(option: str) -> bool:
    """Whether the user named an option, or it has its default."""
    return click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE


def scoring_of(metric: str | None, module: nn.Module, data: Data | None) -> Any:
    """What to score both models on the calibration data by, found before the work: the metric asked for, or top1 where there are
    labels for it."""
    if data is None or (metric is None and next(iter(data)).target is None):
        return None
    from ..evaluate import check_metric

    return check_metric(metric, module, data)


def load_artifact(path: str, into: Callable[[], nn.Module] | None = None) -> QModel:
    """A saved model; ``into`` builds the network where the file says that only its own code can."""
    from ..qmodel import External, load

    q = load(path)
    return load(path, into=into()) if into is not None and isinstance(q.structure, External) else q


def read_data(path: str, preprocess: Preprocess | None, model: str) -> Data:
    """The data of a command line; text is cut into the tokens of the model's own folder."""
    from ..data import load_data

    tokenizer = None
    if Path(model).is_dir() and path.endswith((".txt", ".txt.xz")):
        from ..readers.huggingface import read_tokenizer

        tokenizer = read_tokenizer(model)
    data = load_data(path, preprocess=preprocess, tokenizer=tokenizer)
    notes([(path, sentence) for sentence in data.notes])
    return data


def steps_of(path: str | None) -> Preprocess | None:
    """The steps of a --preprocess file, if one was named."""
    from ..data import read_preprocess

    return read_preprocess(path) if path is not None else None
