"""The project's habits as tests: floors, docstrings and their examples, a light import, a clean tree; no behaviour."""

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import roundel

SRC = ROOT / "src" / "roundel"
MODULES = sorted(SRC.rglob("*.py"))

#: Room -> floor; an import never goes up, and two rooms of one floor never import each other. `roundel/__init__.py` is a table.
FLOORS = {
    "errors": 1,
    "executor": 2, "files": 2, "formats": 2, "stats": 2, "data": 2,
    "graph": 3, "plan": 3, "solvers": 3,
    "network": 4, "qmodel": 4,
    "calibrate": 5,
    "ranges": 5, "evaluate": 5, "integer": 5, "refine": 5, "fisher": 5, "gate": 5, "transforms": 5, "tune": 5,
    "quantize": 6, "qat": 6, "readers": 6, "report": 6, "inspect": 6, "sharing": 6, "exporters": 6, "runtimes": 6,
    "demo": 7, "verify": 7, "diagnose": 7, "cli": 7,
}  # fmt: skip

#: Needed by tests alone (oracles), or never wanted at all.
FORBIDDEN = {"torchvision", "torchaudio", "tensorflow", "gguf", "ml_dtypes", "kmeans1d", "psutil"}

DOCTEST = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, those inside functions and type-checking blocks too."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def room_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import from another room of the package."""
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "roundel" and parts[1] in FLOORS and parts[1] != room(path):  # others are names such as __version__
            yield line, parts[1]


@pytest.mark.proves("habits.floors")
@pytest.mark.parametrize("path", [p for p in MODULES if p != SRC / "__init__.py"], ids=module_name)
def test_imports_run_down_the_floors(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{path.name} stands on no floor: give its room one in FLOORS"
    for line, there in room_imports(path):
        assert FLOORS[there] <= FLOORS[here], f"{place(path, line)}: {here} ({FLOORS[here]}) imports {there} ({FLOORS[there]})"


@pytest.mark.proves("habits.floors")
def test_rooms_of_one_floor_import_in_one_direction() -> None:
    wants: dict[str, set[str]] = {}
    for path in MODULES[1:]:
        wants.setdefault(room(path), set()).update(there for _, there in room_imports(path))
    TopologicalSorter(wants).prepare()  # raises CycleError, which names the ring


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_are_declared(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [d for extra, wanted in extras.items() if extra != "dev" for d in wanted]
    names = {re.split(r"[\[<>=~ ]", d)[0] for d in [*project["dependencies"], *optional]}
    known = {"scikit-learn": "sklearn", "pillow": "PIL", "protobuf": "google"}
    modules = {known.get(name, name.replace("-", "_")) for name in names} | {"roundel"}
    for line, name in imports(path):
        top = name.split(".")[0]
        assert top not in FORBIDDEN, f"{place(path, line)} imports {top}"
        assert top in modules or top in sys.stdlib_module_names, f"{place(path, line)}: pyproject.toml does not name {top}"


@pytest.mark.proves("seam.torch-free")
def test_import_and_format_language_are_light() -> None:
    code = "import time; t = time.perf_counter(); import roundel; str(roundel.Format.parse('cb16/g32*int8'))\n"
    code += "import sys; print(time.perf_counter() - t, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    assert {torch for _, torch in runs} == {"False"}
    fastest = min(float(seconds) for seconds, _ in runs)  # the others shared the machine with something
    assert fastest < 0.3, f"import roundel and one Format.parse took {fastest:.2f} s"


@pytest.mark.proves("habits.all")
def test_all_is_complete() -> None:
    assert len(set(roundel.__all__)) == len(roundel.__all__)
    for name in roundel.__all__:
        assert getattr(roundel, name).__module__.startswith("roundel."), name
    assert set(dir(roundel)) >= set(roundel.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = roundel.no_such_name


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_all_is_importable(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name), f"{module.__name__}.__all__ names {name!r}, which it does not have"


@pytest.mark.proves("habits.all")
@pytest.mark.parametrize("name", roundel.__all__)
def test_public_name_has_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = getattr(roundel, name)
    if inspect.isclass(value) and issubclass(value, Exception):
        assert value.__doc__
        return
    tests = [t for t in doctest.DocTestFinder(recurse=True).find(value, name) if t.examples]
    assert tests, f"the docstring of roundel.{name} shows no example (a line with >>>)"
    runner = doctest.DocTestRunner(optionflags=DOCTEST, verbose=False)
    out: list[str] = []
    for test in tests:
        runner.run(test, out=out.append)
    assert not runner.failures, "".join(out)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_examples_of_internal_docstrings_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(module_name(path)), optionflags=DOCTEST).failed == 0


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public functions and classes, and methods of the package's public classes, that have no docstring and need one.

    A function that is one return statement speaks for itself, one that a decorator enters in a table is named by its operation, and
    `forward` is torch's.
    """
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and node.name in roundel.__all__ else []
        for part in (node, *members):
            if not isinstance(part, ast.FunctionDef | ast.ClassDef) or part.name.startswith("_") or ast.get_docstring(part):
                continue
            if isinstance(part, ast.FunctionDef) and part.decorator_list:
                continue
            if part.name != "forward" and not (len(part.body) == 1 and isinstance(part.body[0], ast.Return)):
                yield f"{part.name} (line {part.lineno})"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py" or p.name[0] != "_"], ids=module_name)
def test_public_things_have_docstrings(path: Path) -> None:
    assert not list(undocumented(ast.parse(path.read_text())))


def tracked() -> list[Path]:
    """Files that git has or would take."""
    names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in names.split(b"\0") if name and (path := ROOT / os.fsdecode(name)).is_file()]


def test_every_file_opens_with_its_purpose() -> None:
    bare = [str(p.relative_to(ROOT)) for p in tracked() if p.suffix == ".py" and not ast.get_docstring(ast.parse(p.read_text()))]
    assert not bare


@pytest.mark.proves("habits.clean")
def test_tree_is_clean() -> None:
    # The brackets keep this file from matching itself.
    path = re.compile(r"(^|[^A-Za-z.])/(w[o]rk|f[a]rm|t[m]p|r[o]ot|h[o]me)/")
    host = re.compile(r"p[y]pi\.org|python[h]osted|registry\.[n]pm|deb\.[d]ebian|extra-[i]ndex-url")
    for file in tracked():
        assert file.stat().st_size < 1_000_000, f"{file.relative_to(ROOT)} is over 1 MB"
        assert not file.is_symlink(), f"{file.relative_to(ROOT)} is a link"
        for number, line in enumerate(file.read_bytes().decode("utf-8", "replace").splitlines(), 1):
            hit = path.search(line) or host.search(line)
            assert not hit, f"{place(file, number)} holds {hit.group().strip()!r}: a path of one machine or a registry's host"


@pytest.mark.proves("habits.warnings")
def test_warnings_are_errors() -> None:
    import warnings

    with pytest.raises(UserWarning, match="told"):
        warnings.warn("told", stacklevel=1)


@pytest.mark.proves("api.errors")
def test_every_error_has_one_root() -> None:
    kinds = [v for v in vars(importlib.import_module("roundel.errors")).values() if inspect.isclass(v)]
    assert len(kinds) == 5
    assert all(issubclass(kind, roundel.RoundelError) for kind in kinds)
