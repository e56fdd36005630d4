"""The command line `roundel`: parses, calls the Python API of the same names, prints; it decides nothing itself.

Exit status: 0 fine, 1 a check missed, 2 usage or bad input (one sentence on stderr), 130 and 143 when interrupted.
torch is loaded by the commands that need it, so help and `roundel formats` answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import click

from .. import __version__
from ..errors import CheckError, RoundelError
from ..report.text import inert
from . import device, diagnose, formats, measure, models, train
from .formats import CATALOGUE


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="roundel %(version)s")
def cli() -> None:
    """Make a trained model small, and prove that it still works."""


for _room in (formats, models, train, measure, diagnose, device):
    for _command in _room.COMMANDS:
        cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with the status the file's docstring lists."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        cli.main(list(sys.argv[1:] if args is None else args) or ["--help"], prog_name="roundel", standalone_mode=False)
        sys.stdout.flush()
    except CheckError as err:
        _exit(1, str(err))
    except click.ClickException as err:
        hint = f" (see {err.ctx.command_path} --help)" if isinstance(err, click.UsageError) and err.ctx else ""
        _exit(2, err.format_message().rstrip(".") + hint)
    except (RoundelError, MemoryError) as err:
        _exit(2, str(err) or "there is not enough memory for this model")
    except (KeyboardInterrupt, click.Abort):
        _exit(130, "interrupted")
    except BrokenPipeError:
        # The reader of a pipe has gone, as `head` does; keep the interpreter from flushing into it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as err:
        place = f"{err.filename}: " if err.filename else ""
        _exit(2, f"{place}{err.strerror or err}")


def _terminated(*_: object) -> None:
    click.echo("roundel: terminated", err=True)
    sys.exit(143)


def _exit(status: int, sentence: str) -> None:
    click.echo(f"roundel: {inert(' '.join(sentence.split()))}", err=True)
    sys.exit(status)


__all__ = ["CATALOGUE", "cli", "main"]
