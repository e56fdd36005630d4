"""The artifact as docs/file-format.md describes it: a numpy-only reader against `rd.load`, bytes by hand, versions refused."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from read_artifact import read_artifact

import roundel as rd
from roundel.cli import CATALOGUE

TEXTS = dict.fromkeys(text for _, texts in CATALOGUE for text in texts)
MORE = [
    *(f"int{bits}" for bits in range(1, 17)), *(f"uint{bits}/g32" for bits in range(1, 17)),
    "apot2", "apot3", "apot5", "apot8", "log2", "log8:1.1", "cb3x3@tensor/channel", "cb16@tensor/channel", "cb16:fp32/channel",
    "cb16:bf16/g32*int8", "int4/b2x16", "int8/tensor", "int4/g32*fp16-fp16", "int4/g32*bf16", "int4/channel*one",
]  # fmt: skip


class Net(torch.nn.Module):
    """One of each: a convolution, a depthwise and a transposed one (its rows are axis 1), a linear layer, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, groups=8)
        self.up = torch.nn.ConvTranspose2d(8, 4, 2)
        self.linear = torch.nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.up(self.depthwise(self.conv(x))).flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A static artifact with its graph."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    rd.quantize(Net().eval(), "int8", "int8", data=[torch.randn(4, 3, 8, 8)]).save(path)
    return path.read_bytes()


@pytest.mark.proves("file.format")
@pytest.mark.parametrize("text", [*TEXTS, *(text for text in MORE if text not in TEXTS)])
def test_numpy_reader_equals_load(text: str, net: Net, tmp_path: Path) -> None:
    if text.endswith("*one"):  # integers without a scale hold integers
        for parameter in net.parameters():
            parameter.data.mul_(20)
    rd.quantize(net, text).save(tmp_path / "net.safetensors")
    document, arrays = read_artifact(tmp_path / "net.safetensors")
    loaded = rd.load(tmp_path / "net.safetensors")
    assert len(loaded.tensors) == 4
    for name, tensor in loaded.tensors.items():
        assert document["tensors"][name]["format"] == str(tensor.format) == str(rd.Format.parse(text))
        assert arrays[name].dtype == np.float32
        assert np.array_equal(arrays[name], tensor.dequantize().numpy())  # equal values, not close ones
    for name, rest in loaded.rest.items():
        assert np.array_equal(arrays[name], rest.numpy())


@pytest.mark.proves("file.format")
def test_static_activation_parameters_are_in_the_file(saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(saved)
    document, arrays = read_artifact(tmp_path / "net.safetensors")
    loaded = rd.load(tmp_path / "net.safetensors")
    assert loaded.activations
    for site, activation in loaded.activations.items():
        assert document["activations"][site] == {"format": str(activation.format), "when": "static"}
        assert activation.params is not None
        assert activation.params.scale is not None
        scale = arrays[f"activation:{site}.scale.codes"].view("<f4")
        assert scale == activation.params.scale.numpy()
        zero = arrays[f"activation:{site}.offset.codes"].view("i1")
        assert zero == activation.params.offset.numpy()


@pytest.mark.proves("file.format")
def test_bytes_by_hand(tmp_path: Path) -> None:
    """-7 .. 7 in int4 with the largest weight 7: scale 1, codes two's complement, the first in the low half of its byte."""
    layer = torch.nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0, 7.0]])
    rd.quantize(torch.nn.Sequential(layer), "int4").save(tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert list(header["__metadata__"]) == ["roundel"]
    (name,) = json.loads(header["__metadata__"]["roundel"])["tensors"]
    assert header[f"{name}.codes"]["shape"] == [1, 2]
    at = [8 + length + header[f"{name}.{part}"]["data_offsets"][0] for part in ("codes", "scale.codes")]
    assert data[at[0] : at[0] + 2] == bytes([0xE1, 0x73])
    assert data[at[1] : at[1] + 2] == struct.pack("<e", 1.0)


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """The same file with other entries in its document."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"]["roundel"]) | change
    header["__metadata__"]["roundel"] = json.dumps({key: value for key, value in document.items() if value is not None})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.proves("file.version")
def test_newer_version_is_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(saved)
    rewrite(path, {})
    rd.load(path)  # rewriting alone does no harm
    rewrite(path, {"format_version": 3, "structure": {"kind": "of a later day"}})
    with pytest.raises(rd.InputError, match=r"format version 3; this Roundel reads up to 2"):
        rd.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": None}, {"format_version": "1"}, {"tensors": {"conv.weight": {"format": "int9000", "shape": [1]}}},
        {"tensors": {"conv.weight": {"format": "int8/channel*fp16", "shape": [2**40, 2**40]}}},
        {"tensors": {"nowhere": {"format": "int8/channel*fp16", "shape": [2, 2]}}}, {"structure": {"kind": "other"}},
        {"structure": {"kind": "graph", "graph": {"nodes": []}}}, {"activations": {"x": {"format": "int8", "when": "never"}}},
    ],
)  # fmt: skip
def test_damaged_documents_are_refused(change: dict[str, Any], saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(saved)
    rewrite(path, change)
    with pytest.raises(rd.RoundelError):
        rd.load(path)


def test_reader_needs_numpy_alone() -> None:
    source = (ROOT / "scripts" / "read_artifact.py").read_text()
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE)) == {"json", "re", "sys", "pathlib", "numpy"}
