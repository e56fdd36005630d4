"""Batches from Python objects and from files: the documented rules, the real data's splits, and hostile files."""

import io
import json
import lzma
import os
import random
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from attacks import archives
from conftest import DATA, needs_data
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader, TensorDataset

from roundel.data import Batch, Data, Preprocess, batches, check_labels, load_data, read_preprocess
from roundel.errors import InputError

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10) % 3


def first(data: Data) -> Batch:
    return next(iter(data))


# -- Python objects -------------------------------------------------------------------------------------------------


@pytest.mark.proves("data.batches")
def test_one_tensor_or_array_is_cut():
    for whole in (X, X.numpy()):
        data = batches(whole, 4)
        assert [len(b) for b in data] == [4, 4, 2]
        assert len(data) == 3
        assert torch.equal(torch.cat([b.args[0] for b in data]), X)
        assert all(b.target is None and not b.named for b in data)


@pytest.mark.proves("data.batches")
@pytest.mark.parametrize("whole", [(X, Y), (X.numpy(), Y.numpy().astype(np.uint8))])
def test_inputs_and_target_are_cut_together(whole):
    data = batches(whole, 4)
    assert torch.equal(torch.cat([b.target for b in data]), Y)
    assert first(data).target.dtype == torch.int64
    assert len(first(data).args) == 1


def test_a_dict_of_arrays_is_cut():
    data = batches({"ids": X, "mask": X > 3, "labels": Y}, 6)
    assert [set(b.named) for b in data] == [{"ids", "mask"}] * 2
    assert torch.equal(torch.cat([b.target for b in data]), Y)
    with pytest.raises(InputError, match=r"different numbers of examples: \[5, 10\]"):
        batches({"a": X, "b": X[:5]})


@pytest.mark.proves("data.batches")
@pytest.mark.parametrize(
    ("item", "args", "named", "labelled"),
    [
        (X, 1, [], False),
        ((X,), 1, [], False),
        ((X, Y), 1, [], True),
        ([X, Y], 1, [], True),
        ((X, Y[:5]), 2, [], False),
        ((X, Y.float()), 2, [], False),
        ((X, X), 2, [], False),
        ((X, Y, Y), 3, [], False),
        (((X, X), Y), 2, [], True),
        (({"a": X}, Y.float()), 0, ["a"], True),
        ({"a": X, "b": X}, 0, ["a", "b"], False),
        ({"a": X, "y": Y}, 0, ["a"], True),
        ({"input_ids": X, "label": Y}, 0, ["input_ids"], True),
        (Batch((X,), {}, Y), 1, [], True),
    ],
)
def test_items_of_an_iterable(item, args, named, labelled):
    batch = first(batches([item]))
    assert len(batch.args) == args
    assert list(batch.named) == named
    assert (batch.target is not None) == labelled
    assert len(batch) == 10


def test_a_data_loader_is_gone_through_again_each_time():
    data = batches(DataLoader(TensorDataset(X, Y), batch_size=4))
    for _ in range(2):
        assert torch.equal(torch.cat([b.target for b in data]), Y)
    assert len(data) == 3


def test_lists_are_not_copied_and_batches_are_idempotent():
    items = [X, X]
    data = batches(items)
    assert first(data).args[0] is X
    assert batches(data) is data
    items.append(X)
    assert sum(1 for _ in data) == 3


def test_a_generator_is_read_once_and_said_so():
    data = batches(X for _ in range(3))
    assert [len(b) for b in data] == [len(b) for b in data] == [10] * 3
    assert "one-shot iterator; its 3 batches" in data.notes[0]


def test_an_unsized_iterable_has_no_length():
    class Stream:
        def __iter__(self):
            return iter([X, X])

    data = batches(Stream())
    assert sum(1 for _ in data) == sum(1 for _ in data) == 2
    with pytest.raises(TypeError):
        len(data)


@pytest.mark.proves("inputs.empty-calibration")
@pytest.mark.parametrize("empty", [[], X[:0], (X[:0], Y[:0]), {"a": X[:0]}, iter([])])
def test_no_data(empty):
    with pytest.raises(InputError, match=r"holds no (batches|examples); give at least one"):
        batches(empty)


def test_no_data_found_while_iterating():
    with pytest.raises(InputError, match="holds no batches"):
        list(batches(type("Empty", (), {"__iter__": lambda self: iter(())})()))


@pytest.mark.proves("inputs.nan-batch")
@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "inf")])
def test_nan_is_refused_with_its_place(value, what):
    bad = X.clone()
    bad[4, 1] = value
    with pytest.raises(InputError, match=rf"batch 1 of the data: input 0 holds 1 NaN or inf, the first \({what}\) at \(1, 1\)"):
        list(batches(bad, 3))
    with pytest.raises(InputError, match="batch 2 of the data: input 'mask'"):
        list(batches([{"mask": X}, {"mask": X}, {"mask": bad}]))


def test_minus_inf_of_a_mask_passes():
    assert len(list(batches([torch.tensor([[0.0, -torch.inf]])]))) == 1


@pytest.mark.parametrize("wrong", [3, "path.npz", ["text"], [[1, 2]], [()], [{"y": Y}], [np.array(["a"])]])
def test_what_is_no_data(wrong):
    with pytest.raises(InputError):
        list(batches(wrong))


def test_numpy_arrays():
    assert first(batches(np.zeros((2, 2)))).args[0].dtype == torch.float32
    assert first(batches(np.zeros((2, 2), np.float16))).args[0].dtype == torch.float16
    assert first(batches(np.zeros((2, 2), ">i4"))).args[0].dtype == torch.int32
    frozen = np.zeros((2, 2), np.float32)
    frozen.flags.writeable = False
    first(batches(frozen)).args[0].add_(1)
    assert frozen.sum() == 0


def test_labels_outside_the_classes():
    check_labels(Y, 3)
    for labels, text in (([0, 3], "label 3 is outside the model's 3 classes"), ([-1, 1], "label -1 is outside")):
        with pytest.raises(InputError, match=f"batch 7 of the data: {text}"):
            check_labels(torch.tensor(labels), 3, 7)
    with pytest.raises(InputError, match="class numbers are needed"):
        check_labels(torch.tensor([0.5]), 3)


# -- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.proves("data.preprocess")
def test_preprocess_by_hand():
    x = torch.tensor([[[[10.0]], [[20.0]]]])  # (1, 2, 1, 1)
    steps = Preprocess(scale=0.1, mean=(0.5, 1.0), std=(0.5, 2.0))
    assert steps.apply(x).flatten().tolist() == [1.0, 0.5]
    channels_last = Preprocess(scale=0.1, mean=(0.5, 1.0), std=(0.5, 2.0), layout="NHWC", shape=(-1,))
    assert channels_last.apply(x.permute(0, 2, 3, 1)).tolist() == [[1.0, 0.5]]
    assert Preprocess(mean=(1.0,)).apply(torch.tensor([[3]], dtype=torch.uint8)).tolist() == [[2.0]]
    assert Preprocess(mean=(1.0,), max_tokens=2).apply(torch.tensor([[3, 4, 5]])).tolist() == [[3, 4]]
    assert Preprocess().apply(torch.zeros(1, 1, dtype=torch.float16)).dtype == torch.float32


def test_preprocess_in_python_and_not_twice():
    steps = Preprocess(scale=2.0)
    data = batches(X, preprocess=steps)
    assert torch.equal(first(data).args[0], X * 2)
    assert data.preprocess == steps
    assert batches(data, preprocess=steps) is data
    with pytest.raises(InputError, match="preprocessed already"):
        batches(data, preprocess=Preprocess(scale=3.0))


@pytest.mark.proves("data.preprocess")
def test_preprocess_files(tmp_path):
    steps = Preprocess(mean=(0.1, 0.2, 0.3), size=(32, 24), layout="NHWC")
    assert Preprocess.from_dict(json.loads(json.dumps(steps.to_dict()))) == steps
    assert steps.to_dict() == {"mean": [0.1, 0.2, 0.3], "size": [32, 24], "layout": "NHWC"}
    (tmp_path / "p.toml").write_text('mean = [0.1, 0.2, 0.3]\nsize = [32, 24]\nlayout = "NHWC"\n')
    (tmp_path / "p.json").write_text(json.dumps(steps.to_dict()))
    assert read_preprocess(tmp_path / "p.toml") == read_preprocess(tmp_path / "p.json") == steps


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("men = 1", r"unknown field `men`.*the fields are scale, mean"),
        ("std = [0.0]", r"`\$\.std\[\.\.\.\]`|\$\.std"),
        ('layout = "CHW"', r"\$\.layout"),
        ("size = [0, 3]", r"\$\.size"),
        ("mean =", "neither TOML nor JSON"),
        ("[1]", "unknown field `1`"),
        ("{", "neither TOML nor JSON"),
    ],
)
def test_wrong_preprocess_files(tmp_path, text, says):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(InputError, match=says):
        read_preprocess(tmp_path / "p.toml")


def test_preprocess_that_does_not_fit():
    with pytest.raises(InputError, match=r"shape \[7\] does not fit an example of \[2\]"):
        Preprocess(shape=(7,)).apply(X)
    with pytest.raises(InputError, match=r"3 numbers in mean, but axis 1 of the input \[10, 2\] differs"):
        Preprocess(mean=(1.0, 2.0, 3.0)).apply(X)


# -- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("data.npz")
def test_npz(tmp_path):
    np.savez(
        tmp_path / "a.npz", x=X.numpy().astype(np.float16), y=Y.numpy().astype(np.uint8), name=np.array(["n"] * 10), other=X.numpy()
    )
    data = load_data(tmp_path / "a.npz", batch_size=4)
    assert [len(b) for b in data] == [4, 4, 2]
    assert first(data).args[0].dtype == torch.float32
    assert torch.equal(torch.cat([b.args[0] for b in data]), X)
    assert torch.equal(torch.cat([b.target for b in data]), Y)
    assert data.notes[0].endswith("not used: 'name', 'other'")
    assert data.preprocess == Preprocess()


@pytest.mark.proves("data.npz")
def test_npz_of_named_inputs(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", ids=Y.numpy(), mask=Y.numpy() > 0, labels=Y.numpy())
    batch = first(load_data(tmp_path / "a.npz"))
    assert set(batch.named) == {"ids", "mask"}
    assert batch.target is not None
    np.savez(tmp_path / "b.npz", y=Y.numpy())
    with pytest.raises(InputError, match="holds no input; name it 'x'"):
        load_data(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=X.numpy(), y=Y.numpy()[:3])
    with pytest.raises(InputError, match=r"different numbers of examples: {'x': 10, 'y': 3}"):
        load_data(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", x=X.numpy(), y=np.array([-1] * 10))
    with pytest.raises(InputError, match="label -1 at 0 is negative"):
        load_data(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("0::5", [0, 5]),
        ("!0::5", [1, 2, 3, 4, 6, 7, 8, 9]),
        (":3", [0, 1, 2]),
        ("-2:", [8, 9]),
        ("1/class", [0, 1, 2]),
        ("!1/class,!class=0", [4, 5, 7, 8]),
        ("class=1", [1, 4, 7]),
        ("2:8, !class=0", [2, 4, 5, 7]),
    ],
)
def test_parts(tmp_path, part, expected):
    np.savez(tmp_path / "a.npz", x=np.arange(10.0), y=Y.numpy())
    for data in (load_data(tmp_path / "a.npz", part=part), load_data(f"{tmp_path}/a.npz[{part}]")):
        assert first(data).args[0].tolist() == expected
    assert first(load_data(tmp_path / "a.npz", part=part, limit=2)).args[0].tolist() == expected[:2]


def test_a_name_with_brackets_is_a_name(tmp_path):
    np.savez(tmp_path / "a#b[0::2].npz", x=np.arange(10.0))
    assert len(first(load_data(tmp_path / "a#b[0::2].npz"))) == 10


@pytest.mark.parametrize(
    ("part", "says"),
    [("10:", "no data of its 10 examples after the choice '10:'"), ("x", "not understood"), ("::0", "not understood")],
)
def test_wrong_parts(tmp_path, part, says):
    np.savez(tmp_path / "a.npz", x=np.arange(10.0))
    with pytest.raises(InputError, match=says):
        load_data(tmp_path / "a.npz", part=part)
    with pytest.raises(InputError, match="no labels to choose by"):
        load_data(tmp_path / "a.npz", part="5/class")


def test_npy(tmp_path):
    np.save(tmp_path / "f.npy", np.asfortranarray(X.numpy()))
    assert torch.equal(first(load_data(tmp_path / "f.npy")).args[0], X)
    np.save(tmp_path / "i.npy", np.arange(12, dtype=np.uint16).reshape(3, 4))
    assert first(load_data(tmp_path / "i.npy")).args[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    np.save(tmp_path / "s.npy", np.arange(11))
    data = load_data(tmp_path / "s.npy", preprocess=Preprocess(max_tokens=4))
    assert first(data).args[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert "the last 3 tokens fill no piece of 4" in data.notes[0]


# -- tokens and text ------------------------------------------------------------------------------------------------


@pytest.mark.proves("data.ids")
def test_token_documents_are_never_padded(tmp_path):
    (tmp_path / "a.json").write_text("[[1,2,3],[4,5,6],[7],[8,9,10]]")
    assert [b.args[0].tolist() for b in load_data(tmp_path / "a.json")] == [[[1, 2, 3], [4, 5, 6]], [[7]], [[8, 9, 10]]]
    data = load_data(tmp_path / "a.json", preprocess=Preprocess(max_tokens=1), batch_size=3)
    assert [b.args[0].tolist() for b in data] == [[[1], [4], [7]], [[8]]]
    assert first(data).args[0].dtype == torch.int64


@pytest.mark.proves("data.ids")
def test_keys(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [[1]], "b": [[2]]}')
    assert first(load_data(f"{tmp_path}/a.json#b")).args[0].item() == 2
    assert first(load_data(tmp_path / "a.json", key="a")).args[0].item() == 1
    with pytest.raises(InputError, match=r"several lists, which one is meant\? write .*#KEY with one of \['a', 'b'\]"):
        load_data(tmp_path / "a.json")
    with pytest.raises(InputError, match="it has no 'c'"):
        load_data(tmp_path / "a.json", key="c")
    (tmp_path / "b.json").write_text('{"only": [[3]]}')
    assert first(load_data(tmp_path / "b.json")).args[0].item() == 3


@pytest.mark.parametrize("text", ["[[]]", "[]", "{}", '{"a": []}', "[[-1]]", "[[1.5]]", "[1]", "{", "[[2147483648]]", "\udcff"])
def test_wrong_ids(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError):
        load_data(tmp_path / "a.json")


@pytest.mark.proves("data.text")
def test_text(tmp_path):
    def letters(text: str) -> list[int]:
        return [ord(c) for c in text]

    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"abcdefghij"))
    data = load_data(tmp_path / "a.txt.xz", tokenizer=letters, preprocess=Preprocess(max_tokens=4))
    assert first(data).args[0].tolist() == [letters("abcd"), letters("efgh")]
    assert "the last 2 tokens" in data.notes[0]
    (tmp_path / "b.txt").write_text("= title =\n\none two\n a b c \nd e f\nlong long long long\n")
    lines = Preprocess(lines=True, words=(2, 3), skip="=", max_tokens=5)
    data = load_data(tmp_path / "b.txt", tokenizer=letters, preprocess=lines, part="1:")
    assert [b.args[0].tolist() for b in data] == [[letters("a b c")], [letters("d e f")]]
    with pytest.raises(InputError, match="without a tokenizer"):
        load_data(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="no UTF-8 text: byte 2 is 0xff"):
        load_data(tmp_path / "c.txt", tokenizer=letters)
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(InputError, match="holds no data"):
        load_data(tmp_path / "d.txt", tokenizer=letters)


def test_bad_xz(tmp_path):
    path = tmp_path / "a.txt.xz"
    sound = lzma.compress(b"hello" * 100)
    bomb = lzma.compress(b"\0" * (65 * 2**20), preset=0)
    for raw, says in (
        (sound[:-20], "ends early|no sound"),
        (b"x" * 50, "no sound"),
        (b"", "ends early"),
        (bomb, r"unpacks to more than 64\.0 MiB"),
    ):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=says):
            load_data(path, tokenizer=lambda text: [1])


# -- images ---------------------------------------------------------------------------------------------------------


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (4, 2)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


PICTURES = {"set/dog/1.png": picture((255, 0, 0)), "set/cat/1.png": picture((0, 255, 0)), "set/cat/2.PNG": picture((0, 0, 51))}


@pytest.mark.proves("data.images")
@pytest.mark.parametrize("packed", [False, True])
def test_images_by_class(tmp_path, packed):
    path = tmp_path / ("a.zip" if packed else "a")
    members = PICTURES | {"set/readme.md": b"hello"}
    if packed:
        path.write_bytes(archives.zip_of(members))
    else:
        for name, content in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    data = load_data(path)
    batch = first(data)
    assert data.classes == ("cat", "dog")
    assert batch.target.tolist() == [0, 0, 1]
    assert batch.args[0].shape == (3, 3, 2, 4)  # height 2, width 4
    assert batch.args[0][:, :, 0, 0].tolist() == [[0, 1, 0], [0, 0, torch.tensor(0.2).item()], [1, 0, 0]]
    assert "1 files that are no images" in data.notes[0]
    steps = Preprocess(scale=1.0, layout="NHWC", channels=1, size=(4, 4), crop=(2, 2))
    assert first(load_data(path, preprocess=steps, part="class=1")).args[0].tolist() == [[[[76.0]] * 2] * 2]
    steps = Preprocess(mean=(0.5, 0.0, 0.0), std=(0.25, 1.0, 1.0))
    assert first(load_data(path, preprocess=steps)).args[0][2, :, 0, 0].tolist() == [2.0, 0.0, 0.0]


def test_images_that_do_not_fit(tmp_path):
    (tmp_path / "a.zip").write_bytes(archives.zip_of({"a/1.png": picture((0, 0, 0)), "a/2.png": picture((0, 0, 0), (3, 3))}))
    with pytest.raises(InputError, match=r"differ in size \(\[2, 4\] and \[3, 3\], 'a/2.png'\); give size"):
        list(load_data(tmp_path / "a.zip"))
    with pytest.raises(InputError, match=r"crop \[9, 9\] is larger"):
        list(load_data(tmp_path / "a.zip", preprocess=Preprocess(crop=(9, 9))))
    (tmp_path / "b.zip").write_bytes(archives.zip_of({"a.txt": b""}))
    with pytest.raises(InputError, match="holds no images"):
        load_data(tmp_path / "b.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        load_data(tmp_path / "empty")
    (tmp_path / "c.zip").write_bytes(archives.zip_of({"1.png": picture((0, 0, 0))}))
    assert first(load_data(tmp_path / "c.zip")).target is None


# -- hostile and damaged files --------------------------------------------------------------------------------------


@pytest.mark.proves("inputs.data")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bomb.npz", r"2\.0 MiB claim to unpack to 2\.0 GiB"),
        ("bomb_images.zip", r"2\.0 MiB claim to unpack to 2\.0 GiB"),
        ("pickled.npz", "Python objects .a pickle., which are never loaded"),
        ("pickled.npy", "Python objects .a pickle., which are never loaded"),
        ("shape_2_40.npz", "takes 4.0 TiB"),
        ("shape_2_40.npy", "takes 4.0 TiB"),
        ("shape_wraps.npy", "TiB"),
        ("shape_negative.npy", r"shape \(-1, 4\)"),
        ("header_code.npy", "no NumPy array"),
        ("header_deep.npy", "no NumPy array"),
        ("traversal.zip", r"'\.\./\.\./cat/1\.png' leads out"),
        ("absolute.zip", "'/etc/cat/1.png' leads out"),
        ("pixels_2_32.zip", "no readable image: Image size .4294836225 pixels. exceeds limit"),
        ("pixels_81_million.zip", "claims 9000 x 9000 pixels; at most 67108864 are read"),
        ("postscript.zip", "no readable image"),
        ("no_zip.npz", "no sound zip"),
        ("empty.npz", "no sound zip"),
        ("deep.json", "no token ids"),
        ("huge_id.json", "no token ids"),
        ("text.json", "no token ids"),
    ],
)
def test_hostile_files(tmp_path, name, says):
    (tmp_path / name).write_bytes(archives.FILES[name]())
    start = time.perf_counter()
    with pytest.raises(InputError, match=says):
        list(load_data(tmp_path / name))
    assert time.perf_counter() - start < 0.5


@pytest.mark.proves("inputs.data")
def test_a_picture_never_starts_a_program(tmp_path, monkeypatch):
    """PostScript would be handed to Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    (tmp_path / "a.zip").write_bytes(archives.FILES["postscript.zip"]())
    with pytest.raises(InputError, match="no readable image: cannot identify"):
        list(load_data(tmp_path / "a.zip"))
    assert not started


def test_no_data_file(tmp_path):
    (tmp_path / "a.xyz").write_text("x")
    for path, says in (
        (tmp_path / "a.xyz", "data is .npz, .npy"),
        (tmp_path / "no.npz", "does not exist"),
        ("/dev/zero", "not a regular"),
    ):
        with pytest.raises(InputError, match=says):
            load_data(path)


@pytest.mark.proves("inputs.fuzz")
@pytest.mark.parametrize("kind", ["npz", "npy", "json", "zip", "txt.xz"])
def test_flipped_bytes(tmp_path, kind):
    """300 damaged files of each kind: read, or refused with our own error."""
    out = io.BytesIO()
    if kind == "npz":
        np.savez_compressed(out, x=X.numpy(), y=Y.numpy())
    elif kind == "npy":
        np.save(out, X.numpy())
    elif kind == "json":
        out.write(b'{"a": [[1, 2, 3], [4, 5]]}')
    elif kind == "zip":
        out.write(archives.zip_of(PICTURES, zipfile.ZIP_DEFLATED))
    else:
        out.write(lzma.compress(b"hello " * 50))
    sound, rng, refused = out.getvalue(), random.Random(1), 0
    path = tmp_path / f"a.{kind}"
    for _ in range(300):
        broken = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken[: rng.randrange(len(broken))] if rng.random() < 0.1 else broken)
        try:
            list(load_data(path, tokenizer=lambda text: list(text.encode())))
        except InputError:
            refused += 1
    assert refused > 30


@pytest.mark.proves("inputs.paths")
@pytest.mark.parametrize("name", [b"with space.npz", b"\xff\xfe.npz", b"n" * 251 + b".npz"])
def test_odd_names(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        np.savez(file, x=X.numpy())
    assert len(first(load_data(path, part="0::2"))) == 5
    assert len(first(load_data(os.fsdecode(path) + "[0::2]"))) == 5


def test_npy_versions(tmp_path):
    """Version 2 of the array format is read, an unknown one refused."""
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
    data = np.array([1, 2], "<f4").tobytes()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\2\0" + struct.pack("<I", len(text)) + text + data)
    assert first(load_data(tmp_path / "a.npy")).args[0].tolist() == [1, 2]
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY\7\0" + struct.pack("<I", len(text)) + text + data)
    with pytest.raises(InputError, match=r"NumPy format version \(7, 0\) is unknown"):
        load_data(tmp_path / "b.npy")


# -- the real data --------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.proves("data.npz", "data.images")
@pytest.mark.parametrize(
    ("path", "count", "shape"),
    [
        ("speech_commands_v2_test/shared_mfcc49x10_f16.npz[0::10]", 245, (49, 10)),
        ("speech_commands_v2_test/shared_mfcc49x10_f16.npz[!0::10]", 2200, (49, 10)),
        ("speech_commands_v2_test/shared_kwt98x40_f16.npz[5/class]", 60, (98, 40)),
        ("speech_commands_v2_test/shared_kwt98x40_f16.npz[!5/class,!class=0]", 275, (98, 40)),
        ("cifar10_jpg/calib_train_50perclass.zip", 500, (3, 32, 32)),
        ("cifar10_jpg/shared_test_300perclass.zip[::10]", 300, (3, 32, 32)),
    ],
)
def test_real_files(path, count, shape):
    data = load_data(DATA / path)
    assert sum(len(b) for b in data) == count
    assert {tuple(b.args[0].shape[1:]) for b in data} == {shape}
    assert all(b.args[0].dtype == torch.float32 and b.target is not None for b in data)


@needs_data
@pytest.mark.proves("data.ids")
@pytest.mark.parametrize(("choice", "count"), [("#calib[:80]", 80), ("#calib[80:]", 20), ("#eval", 87), ("#calib_chunks", 134)])
def test_real_ids(choice, count):
    data = load_data(str(DATA / "stories260K/ids.json") + choice)
    assert sum(len(b) for b in data) == count
    if choice == "#eval":
        assert sum(b.args[0].numel() - len(b) for b in data) == 36326


@needs_data
def test_a_real_image_equals_pillow():
    path = DATA / "cifar10_jpg/shared_test_300perclass.zip"
    with zipfile.ZipFile(path) as archive:
        pixels = np.array(Image.open(io.BytesIO(archive.read("cat/0007.jpg"))))
    data = load_data(path, part="class=3", limit=10)
    assert torch.equal(first(data).args[0][7], torch.from_numpy(pixels).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("text", ["mean = 0.5\nstd = 0.25", "mean = [0.5]\nstd = [0.25]", '{"mean": 0.5, "std": 0.25}'])
def test_one_number_needs_no_list(tmp_path, text):
    (tmp_path / "p.toml").write_text(text)
    steps = read_preprocess(tmp_path / "p.toml")
    assert torch.equal(steps.apply(X), (X - 0.5) / 0.25)
    assert Preprocess.from_dict(steps.to_dict()) == steps
    assert torch.equal(Preprocess(mean=0.5, std=0.25).apply(X), (X - 0.5) / 0.25)
    (tmp_path / "p.toml").write_text("std = 0")
    with pytest.raises(InputError, match="std"):
        read_preprocess(tmp_path / "p.toml")


def test_the_message_about_a_path_names_a_public_function():
    import roundel as rd

    with pytest.raises(InputError, match=r"roundel\.load_data\(path\)"):
        batches("cal.npz")
    assert rd.load_data is load_data
    assert rd.Preprocess is Preprocess
