"""The documents tell the truth: the README's code runs, generated pages are current, links lead somewhere, options have help."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pages
import pytest
import status
import torch
from conftest import ROOT

from roundel.cli import cli

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.\w+)\b")


def make_llama(folder: Path) -> None:
    """The folder and the token ids that the README's second Python block takes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder / "llama")
    (folder / "ids.json").write_text(json.dumps(torch.randint(3, 64, (8, 16)).tolist()))


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block that names a language."""
    return BLOCK.findall((ROOT / page).read_text())


@pytest.mark.proves("habits.docs")
def test_the_code_of_the_readme_runs(tmp_path: Path) -> None:
    """In order, in one empty folder; a block that opens with a comment naming a file becomes that file."""
    make_llama(tmp_path)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = {"python": 0, "sh": 0}
    for number, (language, code) in enumerate(blocks("README.md")):
        if named := NAMED.match(code):
            (tmp_path / named[1]).write_text(code)
            continue
        script = tmp_path / f"block{number}"
        script.write_text(code)
        command = [sys.executable, script.name] if language == "python" else ["sh", "-e", script.name]
        run = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": tools}, capture_output=True, text=True)
        assert run.returncode == 0, f"{code}\n{run.stdout}\n{run.stderr}"
        assert run.stdout or code.startswith("python "), code
        ran[language] += 1
    assert ran == {"python": 5, "sh": 3}


def test_the_readme_keeps_its_word_about_length() -> None:
    ten = next(code for language, code in blocks("README.md") if language == "python" and not NAMED.match(code))
    five = [code for language, code in blocks("README.md") if language == "sh"][1]
    assert len([line for line in ten.splitlines() if line.strip()]) <= 10
    assert len(five.splitlines()) <= 5
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60


@pytest.mark.proves("habits.status")
def test_status_is_current_and_nothing_is_silently_absent() -> None:
    promised, proven = status.promises(), status.proofs()
    assert not set(proven) - promised.ids, "markers that name no row of docs/promises.toml"
    assert not promised.ids - set(proven) - set(promised.missing), "promised, proven by no test, and [missing] does not say why"
    assert status.PAGE.read_text() == status.page(promised, proven), "docs/status.md is stale: run `make docs`"


@pytest.mark.proves("habits.docs")
@pytest.mark.parametrize("name", ["cli.md", "formats.md"])
def test_generated_pages_are_current(name: str) -> None:
    path = ROOT / "docs" / name
    assert path.read_text() == pages.pages()[path], f"docs/{name} is stale: run `make docs`"


def commands() -> Iterator[tuple[str, click.Command]]:
    yield "roundel", cli
    yield from cli.commands.items()


@pytest.mark.proves("habits.help")
@pytest.mark.parametrize(("name", "command"), [pytest.param(*pair, id=pair[0]) for pair in commands()])
def test_every_command_and_option_has_help(name: str, command: click.Command) -> None:
    assert command.help, name
    bare = [option.opts for option in command.params if isinstance(option, click.Option) and not option.help]
    assert not bare, f"{name}: options without help"


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_number_of_the_readme_has_a_command() -> None:
    """The table of results names the command that makes it."""
    results = re.search(r"<!-- results -->\n(.*?)<!-- /results -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert results
    assert "scripts/measure.py" in results[1]
