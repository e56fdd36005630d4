"""The commands about other programs: `roundel export` writes what they run, `roundel verify` asks whether they compute the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CheckError, InputError
from ..report.text import inert, size
from . import options
from .text import notes, pairs, print_json, table

if TYPE_CHECKING:
    from ..data import Data
    from ..exporters import Exported
    from ..qmodel import QModel
    from ..verify import Verification

#: What checks the files of each writer before they take their place.
CHECKED_BY = {"c": "host-c", "tflite": "litert", "onnx": "onnxruntime"}

#: Bytes of a board's log that are read at most; a self-test prints under 100 for each call.
LOG = 1 << 24

_artifact = click.argument("artifact", metavar="MODEL.safetensors", required=False)
_list = click.option("--list", "listing", is_flag=True, help="List what can be named, and why what is absent here is.")
_vectors = click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", default=2, show_default=True, help="How many examples the self-test gets."
)


@click.command("export")
@_artifact
@click.argument("out", metavar="OUT", required=False)
@click.option("--target", metavar="T", help="Where it will run, see --list; without it what the ending of OUT says.")
@options.data(required=False)
@options.preprocess
@_vectors
@options.as_json
@_list
def export_command(
    artifact: str | None, out: str | None, target: str | None, data: str | None, preprocess: str | None, limit: int,
    as_json: bool, listing: bool,
) -> None:  # fmt: skip
    """Write a quantized model for another program, into OUT: a folder of C99, a .tflite or an .onnx file.

    What is written is read again, checked and, where a compiler or runtime is at hand, run before it
    takes its place. With --data the first N examples are the golden vectors of the C self-test, in
    place of random ones. The keys of the JSON are the attributes of what roundel.export returns.
    """
    if listing:
        return _show(_targets(), ("target", "writes", "here"), as_json)
    artifact, out = _needed("MODEL.safetensors", artifact), _needed("OUT", out)
    from ..exporters import ENDINGS, TARGETS, export

    to = TARGETS.get(ENDINGS.get(Path(out).suffix.lower(), "") if target is None else target)
    if data is not None and to is not None and to.room != "c":
        raise InputError("--data gives the self-test of C its golden vectors; this target has none")
    if preprocess is not None and data is None:
        raise InputError("--preprocess says how --data becomes the model's input: give --data as well")
    if to is not None:
        _check_place(out, folder=to.room == "c")
    q = options.load_artifact(artifact)
    given = {"vectors": _golden(q, _data(q, artifact, data, preprocess), limit)} if data is not None else {}
    made = export(q, out, target, **given)
    if as_json:
        return print_json(_exported(made))
    pairs([(inert(file.name), size(file.stat().st_size)) for file in made.files])
    notes([(note.subject, note.text) for note in made.notes])
    click.echo(f"{inert(out)}: {size(made.nbytes)} in {len(made.files)} file{'s'[: len(made.files) > 1]} for {made.target}")
    return None


@click.command("verify")
@_artifact
@click.option("--against", metavar="R,R", multiple=True, help="Runtimes, see --list; separated by commas, or repeated.")
@options.data(required=False)
@options.preprocess
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use the first N examples; QEMU's boards get 5 without it.")
@options.metric
@click.option("--board-log", metavar="LOG", help="Judge what a board's self-test printed; - is stdin.")
@click.option("--strict", is_flag=True, help="A runtime that is absent here is an error.")
@options.as_json
@_list
def verify_command(
    artifact: str | None, against: tuple[str, ...], data: str | None, preprocess: str | None, limit: int | None,
    metric: str | None, board_log: str | None, strict: bool, as_json: bool, listing: bool,
) -> None:  # fmt: skip
    """Run a quantized model in other programs, and compare every code with the simulation.

    Exit status 0 when all that ran are exact and one at least did; 1 when a code differs, an operator
    is not on the NPU, or a runtime refuses the model. A runtime that is absent here is named, and
    fails only with --strict. A --board-log needs the --data and --limit that export was given, if
    any. The keys of the JSON are the attributes of roundel.verify's results.
    """
    if listing:
        return _show(_runtimes(), ("runtime", "rounding of its graph", "here"), as_json)
    artifact = _needed("MODEL.safetensors", artifact)
    if preprocess is not None and data is None:
        raise InputError("--preprocess says how --data becomes the model's input: give --data as well")
    names = [name.strip() for text in against for name in text.split(",") if name.strip()]
    found = _judged(artifact, names, data, preprocess, limit, metric, board_log)
    if as_json:
        print_json({name: one.to_dict() for name, one in found.items()})
    else:
        for one in found.values():
            click.echo(inert(" ".join(str(one).split())))
        notes([(name, sentence) for name, one in found.items() for sentence in one.notes])
    _conclude(found.values(), strict)
    return None


def _judged(artifact: str, names: Sequence[str], data: str | None, preprocess: str | None, limit: int | None, metric: str | None,
            board_log: str | None) -> Mapping[str, Verification]:  # fmt: skip
    """What each runtime, or the log of a board, shows."""
    from ..runtimes import runtime
    from ..verify import verify, verify_log

    if board_log is not None:
        if names or metric is not None:
            raise InputError("--board-log judges a log alone: leave --against and --metric away")
        log = _log(board_log)
        q = options.load_artifact(artifact)
        vectors = _golden(q, _data(q, artifact, data, preprocess), limit or 2) if data is not None else None
        return {"board-log": verify_log(q, log, vectors=vectors)}
    if not names:
        raise InputError("name what to compare with: --against host-c,tflm (roundel verify --list says what there is)")
    if data is None:
        raise InputError("--against runs the model on data: give --data as well")
    for name in names:
        runtime(name)
    q = options.load_artifact(artifact)
    return verify(q, names, _data(q, artifact, data, preprocess), metric=metric, limit=limit)


def _conclude(found: Any, strict: bool) -> None:
    """Status 1 where something is not as it should be; every name is in the sentence."""
    found = list(found)
    wrong = [one.runtime for one in found if not one.exact and (strict or not one.absent)]
    if wrong:
        raise CheckError(f"not exact: {', '.join(wrong)}")
    if not any(one.exact for one in found):
        raise CheckError(f"nothing ran: {', '.join(one.runtime for one in found)} absent here")


# -- between the commands and the API ---------------------------------------------------------------------------------


def _needed(name: str, value: str | None) -> str:
    if value is None:
        raise click.UsageError(f"Missing argument '{name}'.", click.get_current_context())
    return value


def _check_place(out: str, folder: bool) -> None:
    """Fail before any work when ``out``, a file or a ``folder`` that will be made, cannot be written."""
    place = Path(out)
    if folder:
        if place.exists() and not place.is_dir():
            raise InputError(f"cannot write firmware into {inert(out)}: it is not a folder")
        while not place.exists() and place != place.parent:
            place = place.parent
        options.check_output(os.path.join(place, "probe"))
    else:
        options.check_output(out)


def _data(q: QModel, artifact: str, path: str | None, preprocess: str | None) -> Data:
    """The data of a command line, by the preprocessing named or else the one that the artifact remembers."""
    from ..data import Preprocess

    stored = q.provenance.get("preprocess")
    steps = options.steps_of(preprocess) or (Preprocess.from_dict(stored, artifact) if stored else None)
    return options.read_data(str(path), steps, artifact)


def _golden(q: QModel, data: Data, limit: int) -> Mapping[str, Any]:
    from ..verify import vectors

    return vectors(q, data, limit)


def _log(path: str) -> str:
    """The text of a log, whatever bytes a serial line put into it."""
    from ..files import open_regular

    if path == "-":
        return sys.stdin.buffer.read(LOG).decode("utf-8", "replace")
    with open_regular(path) as file:
        return file.read(LOG).decode("utf-8", "replace")


def _exported(made: Exported) -> dict[str, Any]:
    details = {key: value for key, value in vars(made.details).items() if isinstance(value, bool | int | str)}
    return {
        "target": made.target,
        "files": [os.fspath(file) for file in made.files],
        "nbytes": made.nbytes,
        "notes": [{"subject": note.subject, "text": note.text} for note in made.notes],
        "details": details,
    }


# -- lists ------------------------------------------------------------------------------------------------------------


def _targets() -> list[tuple[str, str, str]]:
    from ..exporters import TARGETS

    return [(name, to.what, _here(CHECKED_BY[to.room])) for name, to in TARGETS.items()]


def _runtimes() -> list[tuple[str, str, str]]:
    from ..runtimes import RUNTIMES

    return [(name, dialect, _here(name)) for name, (_, dialect) in RUNTIMES.items()]


def _here(name: str) -> str:
    from ..runtimes import runtime

    why = runtime(name)[0].absent(name)
    return "ready" if why is None else f"absent: {why}"


def _show(rows: Sequence[tuple[str, ...]], head: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        return print_json([dict(zip((title.partition(" ")[0] for title in head), row, strict=True)) for row in rows])
    return table(head, rows, "l" * len(head))


COMMANDS = (export_command, verify_command)
