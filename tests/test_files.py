"""Files written whole or not at all, and safetensors against the safetensors library in both directions."""

import errno
import itertools
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors
import torch
from attacks import safetensors as attack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from roundel import files
from roundel.errors import InputError
from roundel.files import DTYPES, atomic_write, check_writable, read_header, read_safetensors, write_safetensors


def caught(function: Callable, *args: object, **named: object) -> InputError | None:
    try:
        function(*args, **named)
    except InputError as err:
        return err
    return None


# -- writing --------------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_writes_what_it_is_given(tmp_path):
    atomic_write(tmp_path / "a", [b"one", bytearray(b"two"), memoryview(b""), memoryview(b"three")], size=11)
    assert (tmp_path / "a").read_bytes() == b"onetwothree"
    atomic_write(tmp_path / "a", [])
    assert (tmp_path / "a").read_bytes() == b""
    assert not leftovers(tmp_path)


def test_new_file_follows_the_umask_and_links_are_followed(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", [b"x"])
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "a")
    atomic_write(tmp_path / "link", [b"y"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"y"


@pytest.mark.proves("inputs.disk-full")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_every_failing_system_call_leaves_the_old_file(tmp_path, monkeypatch, code, call):
    """Fail the n-th call of each kind until none fails any more."""
    target, real = tmp_path / "model", getattr(os, call)

    def fails_at(n: int) -> InputError | None:
        calls = itertools.count(1)

        def failing(*args, **kwargs):
            if next(calls) == n:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        target.write_bytes(b"old")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            return caught(atomic_write, target, [b"new"] * 5, size=15)

    for n in itertools.count(1):
        error = fails_at(n)
        assert not leftovers(tmp_path)
        if error is None:
            break
        assert os.strerror(code) in str(error)
        # Only the folder's own sync comes after the new name is in place; the new file is whole then.
        late = "is written whole" in str(error)
        assert target.read_bytes() == (b"new" * 5 if late else b"old")
        assert late or "15 bytes needed" in str(error)
    assert n > {"open": 2, "write": 5, "fsync": 2, "replace": 1}[call]


def test_a_partial_write_goes_on(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    atomic_write(tmp_path / "a", [b"0123456789"])
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_the_kernel_refusing_bytes_leaves_the_old_file(tmp_path):
    """A real failing write, by the file size limit of a process."""
    target = tmp_path / "a"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match="File too large after 1000 bytes"):
            atomic_write(target, [b"x" * 600] * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old"
    assert not leftovers(tmp_path)


@pytest.mark.proves("inputs.disk-full")
def test_space_is_checked_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("U", (), {"free": 2**20})())
    with pytest.raises(InputError, match=r"3\.0 MiB needed, 1\.0 MiB free"):
        atomic_write(tmp_path / "a", iter(lambda: pytest.fail("asked for a chunk"), None), size=3 * 2**20)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, InputError("bad"), ValueError("bug")])
def test_an_error_while_making_the_bytes_leaves_the_old_file(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")

    def chunks():
        yield b"new"
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        atomic_write(tmp_path / "a", chunks())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert not leftovers(tmp_path)


@pytest.mark.proves("inputs.kill")
def test_killed_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    code = (
        "import os, signal, sys; from roundel.files import atomic_write\n"
        "def chunks():\n    yield b'new'\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(sys.argv[1], chunks())"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False).returncode == -9
    assert (tmp_path / "a").read_bytes() == b"old"


def test_check_writable(tmp_path):
    check_writable(tmp_path / "new")
    (tmp_path / "old").write_bytes(b"old")
    check_writable(tmp_path / "old")
    assert sorted(os.listdir(tmp_path)) == ["old"]
    with pytest.raises(InputError, match="is a folder; name a file"):
        check_writable(tmp_path)
    with pytest.raises(InputError, match=r"the folder '.*missing' does not exist; make it first"):
        check_writable(tmp_path / "missing" / "a")
    with pytest.raises(InputError, match="not a regular file"):
        check_writable("/dev/null")
    with pytest.raises(InputError, match="too long"):
        check_writable(tmp_path / ("n" * 256))
    with pytest.raises(InputError):
        check_writable(tmp_path / "old" / "a")


@pytest.mark.proves("inputs.read-only")
def test_read_only_folder(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o555)
    root = os.geteuid() == 0
    for folder in [*tmp_path.parents, tmp_path][:3] if root else []:
        folder.chmod(0o755)
    if root:
        tmp_path.chmod(0o755)
        os.seteuid(65534)
    try:
        if root and not os.access(tmp_path, os.X_OK, effective_ids=True):
            pytest.skip("the temporary folder is closed to other users")
        for write in (check_writable, lambda path: atomic_write(path, [b"x"])):
            with pytest.raises(InputError, match="Permission denied"):
                write(tmp_path / "shut" / "a")
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.proves("inputs.paths")
@pytest.mark.parametrize("name", [b"with space", b"n" * 255, b"\xff\xfe latin", "čeština.safetensors".encode(), b"\x1b[31mred"])
def test_odd_names(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    write_safetensors(path, {"w": torch.arange(3)}, {"a": "b"})
    tensors, metadata = read_safetensors(os.fsdecode(path))
    assert tensors["w"].tolist() == [0, 1, 2]
    assert metadata == {"a": "b"}
    with pytest.raises(InputError) as err:
        read_safetensors(path, ["x"])
    str(err.value).encode()  # printable anywhere
    assert "\x1b" not in str(err.value)


# -- safetensors ----------------------------------------------------------------------------------------------------


def some(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype (bits of a bool are 0 and 1)."""
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(
        0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return bits.view(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


EVERY = {
    f"{name}.{i}": some(dtype, shape, i) for name, dtype in DTYPES.items() for i, shape in enumerate([(3, 5), (), (0, 4), (7,)])
}


@pytest.mark.proves("file.format")
def test_the_library_reads_what_we_write(tmp_path):
    write_safetensors(tmp_path / "a", EVERY, {"b": "2", "a": "1 \u00e9 \x1b"})
    theirs = load_file(tmp_path / "a")
    assert theirs.keys() == EVERY.keys()
    assert all(same(theirs[name], EVERY[name]) for name in EVERY)
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"b": "2", "a": "1 \u00e9 \x1b"}


@pytest.mark.proves("file.format")
def test_we_read_what_the_library_writes(tmp_path):
    save_file(EVERY, tmp_path / "a", {"k": "v"})
    ours, metadata = read_safetensors(tmp_path / "a")
    assert ours.keys() == EVERY.keys()
    assert all(same(ours[name], EVERY[name]) for name in EVERY)
    assert metadata == {"k": "v"}


def test_all_dtypes_of_the_library_are_known():
    from safetensors.torch import _TYPES

    assert _TYPES == DTYPES


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda s: s != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.text(st.characters(codec="utf-8")), max_size=4),
)
def test_round_trip(tmp_path, tensors, metadata):
    made = {name: some(DTYPES[dtype], tuple(shape), i) for i, (name, (dtype, shape)) in enumerate(tensors.items())}
    write_safetensors(tmp_path / "a", made, metadata)
    ours, texts = read_safetensors(tmp_path / "a")
    assert ours.keys() == made.keys()
    assert all(same(ours[name], made[name]) for name in made)
    assert texts == metadata
    theirs = load_file(tmp_path / "a")
    assert all(same(theirs[name], made[name]) for name in made)


def test_bytes_by_hand(tmp_path):
    write_safetensors(tmp_path / "a", {"b": torch.tensor([1], dtype=torch.int8), "a": torch.tensor(2.0)}, {"k": "v"})
    header = b'{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
    header += b'"b":{"dtype":"I8","shape":[1],"data_offsets":[4,5]}}'
    header += b" " * (-len(header) % 8)
    assert (tmp_path / "a").read_bytes() == len(header).to_bytes(8, "little") + header + b"\0\0\0\x40" + b"\1"


@pytest.mark.proves("file.sha256")
def test_equal_inputs_equal_bytes(tmp_path):
    tensors, metadata = dict(EVERY), {str(i): str(i) for i in range(20)}
    write_safetensors(tmp_path / "a", tensors, metadata)
    for seed in range(5):
        order, texts = list(tensors), list(metadata)
        random.Random(seed).shuffle(order)
        random.Random(seed).shuffle(texts)
        write_safetensors(tmp_path / "b", {n: tensors[n] for n in order}, {n: metadata[n] for n in texts})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_equal_their_contiguous_copies(tmp_path):
    x = torch.arange(24.0).reshape(4, 6)
    z = torch.arange(4.0) + 1j
    views = {"t": x.t(), "e": x[:1].expand(3, 6), "s": x[::2, 1::2], "c": z.conj(), "n": z.conj().imag}
    views["p"] = torch.nn.Parameter(x)
    write_safetensors(tmp_path / "a", views)
    write_safetensors(tmp_path / "b", {k: v.detach().clone().contiguous().resolve_conj().resolve_neg() for k, v in views.items()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(read_safetensors(tmp_path / "a")[0]["c"], z.conj())


def test_alignment(tmp_path):
    write_safetensors(tmp_path / "a", EVERY)
    for entry in read_header(tmp_path / "a")[0].values():
        assert entry.offset % entry.dtype.itemsize == 0


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.empty(2, device="meta"), "'w' has no numbers"),
        (torch.eye(2).to_sparse(), "make it dense"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128; a safetensors file holds"),
    ],
)
def test_what_cannot_be_stored(tmp_path, tensor, text):
    with pytest.raises(InputError, match=text):
        write_safetensors(tmp_path / "a", {"w": tensor})
    assert os.listdir(tmp_path) == []


def test_only_the_wanted_tensors_are_read(tmp_path):
    write_safetensors(tmp_path / "a", {"layer.weight": torch.ones(2), "layer.bias": torch.zeros(2)})
    assert set(read_safetensors(tmp_path / "a", ["layer.bias"])[0]) == {"layer.bias"}
    assert read_safetensors(tmp_path / "a", [])[0] == {}
    with pytest.raises(InputError, match=r"has no tensor 'layer.weigth'; the nearest there: 'layer.weight'"):
        read_safetensors(tmp_path / "a", ["layer.weigth"])


def test_tensors_own_their_memory(tmp_path):
    write_safetensors(tmp_path / "a", {"w": torch.ones(1000)})
    tensors, _ = read_safetensors(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")  # a mapped tensor would die with the file
    tensors["w"].add_(1)
    assert tensors["w"].sum() == 2000
    assert tensors["w"].untyped_storage().nbytes() == 4000


@pytest.mark.proves("inputs.stream")
def test_writing_makes_no_second_copy(tmp_path):
    """Memory that the process ever held, above the model itself, stays far below the model's 64 MiB."""
    code = (
        "import sys, torch, resource; from roundel.files import write_safetensors\n"
        "w = {f'{i:02}': torch.ones(2**20) for i in range(16)}\n"
        "write_safetensors(sys.argv[1], {'0': torch.ones(1)})\n"
        "a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_safetensors(sys.argv[1], w)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 6 * 1024  # KiB


@pytest.mark.proves("inputs.safetensors-header")
@pytest.mark.parametrize("name", attack.FILES)
def test_hostile_files_are_refused_at_once(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(attack.FILES[name])
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"is not a sound safetensors file: \w"):
        read_safetensors(path)
    assert time.perf_counter() - start < 0.05


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("overlap", "tensor 'b' overlaps the one before it"),
        ("hole", "tensor 'b' leaves a hole of 4 bytes before it"),
        ("tail", "its tensors take 8 bytes, 9 are there: cut off, or something is appended"),
        ("header_2_63", "its header claims 9223372036854775808 bytes; at most 100000000 are allowed"),
        ("wrong_size", r"of shape \[3\] and dtype F32 takes 12 bytes, its offsets span 8"),
    ],
)
def test_the_reason_is_named(tmp_path, name, says):
    (tmp_path / "a").write_bytes(attack.FILES[name])
    with pytest.raises(InputError, match=says):
        read_header(tmp_path / "a")


def test_header_limit_is_exact(tmp_path):
    """A sparse file whose header has the largest allowed length passes the length check and fails in the JSON."""
    for length, text in ((files.MAX_HEADER, "does not start"), (files.MAX_HEADER + 1, "at most 100000000 are allowed")):
        with open(tmp_path / "a", "wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(length + 8)
        with pytest.raises(InputError, match=text):
            read_safetensors(tmp_path / "a")


def test_missing_folder_device(tmp_path):
    for path, text in ((tmp_path / "x", "does not exist"), (tmp_path, "is a folder"), ("/dev/zero", "not a regular file")):
        with pytest.raises(InputError, match=text):
            read_safetensors(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        read_safetensors(tmp_path / "pipe")
    with pytest.raises(InputError, match="null"):
        read_safetensors("a\0b")


@pytest.mark.proves("inputs.fuzz")
def test_flipped_bytes(tmp_path):
    """Whatever we accept, the library accepts and reads as the same numbers; nothing but InputError leaves."""
    rng = random.Random(0)
    write_safetensors(tmp_path / "a", {"w": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int8)}, {"k": "v"})
    sound = (tmp_path / "a").read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")
    accepted = 0
    for n in range(300):
        broken = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(end if n % 4 else len(sound))] = rng.choice([rng.randrange(256), *b'"{}[]:,0129eE-. '])
        (tmp_path / "b").write_bytes(broken)
        with suppress(InputError):
            tensors, metadata = read_safetensors(tmp_path / "b")
            accepted += 1
            theirs = load_file(tmp_path / "b")
            assert theirs.keys() == tensors.keys()
            assert all(same(theirs[k], tensors[k]) for k in theirs)
            with safetensors.safe_open(tmp_path / "b", "pt") as file:
                assert (file.metadata() or {}) == metadata
    assert 0 < accepted < 300
