"""Bad and odd models through `quantize`, `save` and `load`: one clear sentence or a listed exception, nothing half done."""

import copy
import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import roundel as rd
from roundel import cli

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(7))

#: With data a network is captured as a graph; without, its modules are quantized in place.
both_paths = pytest.mark.parametrize("data", [None, [X]], ids=["modules", "graph"])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def said(q: rd.QModel, subject: str) -> list[str]:
    return [note.text for note in q.notes if note.subject == subject]


def again(q: rd.QModel, path: Path, build: Callable[[], nn.Module]) -> rd.QModel:
    """Saved and loaded."""
    q.save(path)
    return rd.load(path, into=None if isinstance(q.structure, rd.Graph) else build())


def unchanged(module: nn.Module) -> Callable[[], None]:
    """A check that the module is later as it is now: its layers, modes, hooks, names and numbers."""

    def look() -> tuple[list[object], dict[str, Tensor]]:
        parts = [(name, type(part), part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
                 for name, part in module.named_modules()]  # fmt: skip
        kept = [(name, p.requires_grad, p.data_ptr()) for name, p in module.named_parameters()]
        return [*parts, *kept], {name: value.clone() for name, value in module.state_dict().items()}

    before, numbers = look()

    def check() -> None:
        now, values = look()
        assert now == before
        assert values.keys() == numbers.keys()
        assert all(torch.equal(values[name], numbers[name]) or values[name].isnan().any() for name in values)

    return check


# -- weights ----------------------------------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "at", "size"), [("2.weight", (1, 4), 18), ("2.bias", (2,), 3), ("0.weight", (5, 7), 48)])
@pytest.mark.proves("inputs.nan-weight", "inputs.inf-weight")
def test_one_number_that_is_not_finite(data: list[Tensor] | None, value: float, name: str, at: tuple[int, ...], size: int) -> None:
    model = net()
    model.get_parameter(name).data[at] = value
    check, words = unchanged(model), f"{name}: 1 of {size} numbers are not finite (in float32), the first at {at};"
    with pytest.raises(rd.InputError, match=re.escape(words)):
        rd.quantize(model, "int4", data=data)
    check()


@both_paths
def test_bad_numbers_are_counted_even_where_they_stay_float(data: list[Tensor] | None) -> None:
    model = net()
    model[2].weight.data[0, 3:] = torch.tensor([np.nan, np.inf, 1.0])
    with pytest.raises(rd.InputError, match=r"2\.weight: 2 of 18 numbers are not finite \(in float32\), the first at \(0, 3\)"):
        rd.quantize(model, "int4", data=data, exclude=["2"])
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2)).eval()
    model[1].running_var[1] = np.inf
    with pytest.raises(rd.InputError, match=r"1.running_var: 1 of 2 numbers are not finite"):
        rd.quantize(model, "int4", data=None if data is None else [X[:, None]])


@pytest.mark.proves("inputs.dtypes")
def test_a_double_beyond_float32_is_refused_by_name() -> None:
    model = net().double()
    model[0].weight.data[1, 2] = 1e200
    with pytest.raises(rd.InputError, match=r"0.weight: 1 of 48 numbers are not finite \(in float32\), the first at \(1, 2\)"):
        rd.quantize(model, "int4")


def test_minus_infinity_in_a_mask_passes(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)
            self.register_buffer("mask", torch.tensor([0.0, -np.inf, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) + self.mask).softmax(1)

    for data in (None, [X]):
        q = again(rd.quantize(Masked(), "int8", data=data), tmp_path / "m.safetensors", Masked)
        y = q.module(X)
        assert torch.equal(y[:, 1], torch.zeros(6))
        assert y.isfinite().all()


@pytest.mark.parametrize("data", [None, [torch.ones(2, 64)]], ids=["modules", "graph"])
@pytest.mark.parametrize("text", ["int8", "int4/g32", "uint4/g32~uint4", "nf4/g32", "log4", "cb16/g32*int8", "mxfp4"])
@pytest.mark.proves("inputs.outlier")
def test_a_huge_outlier_is_named_with_the_codes_it_costs(data: list[Tensor] | None, text: str) -> None:
    model = nn.Sequential(nn.Linear(64, 4))
    model[0].weight.data[2, 37] = -1e30
    q = rd.quantize(model, text, data=data)
    values = q.tensors["0.weight"].dequantize()
    group = 32 if "g32" in text or text == "mxfp4" else 64
    assert values.isfinite().all()
    assert q.module(torch.randn(2, 64)).isfinite().all()
    assert float(values[2, 37]) == pytest.approx(-1e30, rel=0.5)
    if text != "cb16/g32*int8":  # whose table and outer scale the whole tensor shares
        assert (values[[0, 1, 3]] - model[0].weight[[0, 1, 3]]).abs().max() < 0.1
    assert any(f"outlier of -1e+30 at (2, 37) costs {group - 1} of the {group} numbers" in note for note in said(q, "0.weight"))


@pytest.mark.parametrize("text", ["int8", "int4/g32", "int2", "cb16/channel", "ternary"])
def test_ordinary_weights_have_no_outlier(text: str) -> None:
    q = rd.quantize(nn.Sequential(nn.Linear(64, 64)), text, data=[torch.randn(2, 64)])
    assert [note.text for note in q.notes] == ["bias correction not tried: 2 examples are too few to judge by (32 would do)"]


@pytest.mark.parametrize("text", ["int8", "int4/g4", "uint4~uint4", "nf4", "fp4", "cb16/channel", "int2", "binary", "mxfp4"])
@pytest.mark.proves("inputs.constant-channel")
def test_a_constant_channel_comes_back_within_one_step(text: str) -> None:
    model = nn.Sequential(nn.Linear(8, 5))
    for row, value in enumerate((0.37, -0.37, 0.0, 3e-3)):
        model[0].weight.data[row] = value
    q = rd.quantize(model, text).tensors["0.weight"]
    step = torch.zeros(()) if q.scale is None else q.scale.dequantize().abs().amax(1, keepdim=True)
    error = (q.dequantize() - model[0].weight)[:4].abs()
    assert (error <= step.expand(5, 1)[:4] + 1e-3 * model[0].weight[:4].abs()).all()


class Scalars(nn.Module):
    """A weight of 1x1, one of 1, and one of no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.tensor(2.5)), nn.Parameter(torch.tensor([0.5]))
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain + self.shift


@pytest.mark.parametrize("activations", [None, "int8", "int8:dynamic"])
@pytest.mark.parametrize("text", ["int8", "int4/g32", "cb16/channel", "mxfp4"])
@pytest.mark.proves("inputs.scalar")
def test_weights_of_one_number(text: str, activations: str | None, tmp_path: Path) -> None:
    x = X[:, :1]
    for data in ([x], None):
        if data is None and activations == "int8":
            continue
        model = Scalars()
        q = rd.quantize(model, text, activations, data=data)
        assert list(q.tensors) == ["linear.weight"]
        if data is None:  # in a graph they go into the layer before
            assert (q.rest["gain"].item(), q.rest["shift"].item()) == (2.5, 0.5)
        step = 0.3 if text == "mxfp4" else 0.03
        torch.testing.assert_close(q.module(x), model(x), rtol=step, atol=step)
        assert torch.equal(again(q, tmp_path / "s.safetensors", Scalars).module(x), q.module(x))


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it cannot fill them
            self.full, self.none, self.zero = nn.Linear(4, 3), nn.Linear(4, 0), nn.Linear(0, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.full(x), self.none(x)], 1) + self.zero(x[:, :0])


@pytest.mark.parametrize(("data", "activations"), [(None, None), ([X[:, :4]], None), ([X[:, :4]], "int8"), (None, "int8:dynamic")])
@pytest.mark.proves("inputs.empty-tensor")
def test_empty_tensors_pass_and_are_listed(data: list[Tensor] | None, activations: str | None, tmp_path: Path) -> None:
    x, model = X[:, :4], Empty()
    q = rd.quantize(model, "int8", activations, data=data)
    assert list(q.tensors) == ["full.weight"]
    assert said(q, "none.weight") == ["it is empty, shape [0, 4]; it stays as it is"]
    assert said(q, "zero.weight") == ["it is empty, shape [3, 0]; it stays as it is"]
    torch.testing.assert_close(q.module(x), model(x), rtol=0, atol=0.1)
    assert torch.equal(again(q, tmp_path / "e.safetensors", Empty).module(x), q.module(x))


@both_paths
@pytest.mark.proves("inputs.short-group")
def test_short_groups_are_listed_once_with_their_number(data: list[Tensor] | None) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 40), nn.Linear(40, 3))
    q = rd.quantize(model, "int4/g32", data=data)
    assert said(q, "groups") == ["groups of 32 do not divide the rows of 0.weight, 2.weight: the last group of each row is short"]
    shapes = {name: tuple(t.scale.shape) for name, t in q.tensors.items() if t.scale is not None}
    assert shapes == {"0.weight": (64, 1), "1.weight": (40, 2), "2.weight": (3, 2)}
    assert q.tensors["2.weight"].nbytes == 3 * (20 + 2 * 2)


@pytest.mark.parametrize(("text", "words"), [("int4/g0", "a group of 1 or more, such as g32 or g128"),
                                             ("int4/g-8", "expected tensor, channel, token, gN or bMxN")])  # fmt: skip
@pytest.mark.proves("inputs.group-zero")
def test_groups_of_nothing_name_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(rd.FormatError, match=words):
        rd.quantize(net(), text)


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[], iter(()), [X[:0]], [(X[:0], torch.zeros(0, dtype=torch.long))], X[:0]])
@pytest.mark.proves("inputs.empty-calibration")
def test_an_empty_calibration_set_is_told_before_the_weights_are_looked_at(data: object) -> None:
    model = net()
    model[0].weight.data.fill_(np.nan)
    with pytest.raises(rd.InputError, match=r"at least one|empty"):
        rd.quantize(model, "int8", "int8", data=data)


class Logarithm(nn.Module):
    """Not a number where its input is negative; with ``branch`` it cannot be captured."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 2)
        self.branch = branch
        self.first.weight.data.abs_()
        self.first.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.branch and bool(y.sum() > 1e9):
            y = -y
        return self.second(y.log())


@pytest.mark.proves("inputs.nan-batch")
def test_nan_in_a_batch_is_told_with_its_number() -> None:
    bad = X.clone()
    bad[3, 1] = np.nan
    with pytest.raises(rd.InputError, match=r"batch 2 of the data: .* 1 NaN.* at \(3, 1\)"):
        rd.quantize(net(), "int8", "int8", data=[X, X, bad, X])


@pytest.mark.parametrize(("branch", "site"), [(False, "log"), (True, "second.input")])
@pytest.mark.proves("inputs.nan-batch")
def test_nan_that_the_network_makes_is_told_with_batch_and_site(branch: bool, site: str) -> None:
    model = Logarithm(branch)
    check = unchanged(model)
    with pytest.raises(rd.InputError, match=rf"calibration batch 1, site '{site}': 24 of 24 values are not finite"):
        rd.quantize(model, "int8", "int8", data=[X.abs(), -X.abs(), X.abs()])
    check()


def test_strided_and_repeated_data_are_data() -> None:
    model = net()
    for x in (torch.randn(6, 16)[:, 4:12], X[:1].expand(6, 8)):
        strided, plain = (rd.quantize(model, "int8", "int8", data=[batch]) for batch in (x, x.contiguous()))
        assert torch.equal(strided.module(x), plain.module(x.contiguous()))


# -- modules ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


IDS = torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize("data", [None, [IDS]], ids=["modules", "graph"])
@pytest.mark.proves("inputs.tied")
def test_tied_weights(data: list[Tensor] | None, tmp_path: Path) -> None:
    """Stored once; a plan that treats one of them alone is an error that names both."""
    for exclude in (["head"], ["embedding"], ["head.weight"]):
        with pytest.raises(rd.PlanError, match=r"head.weight and embedding.weight are one tied tensor"):
            rd.quantize(Tied(), "int4", data=data, exclude=exclude)
    model = Tied()
    q = rd.quantize(model, "int4", data=data)
    assert list(q.tensors) == ["embedding.weight"]
    assert q.nbytes == 10 * (4 + 2)
    kept = rd.quantize(model, "int4", data=data, exclude=["head", "embedding"])
    assert kept.nbytes == 10 * 8 * 4
    torch.testing.assert_close(kept.module(IDS), model(IDS))
    for one in (q, kept):
        loaded = again(one, tmp_path / "t.safetensors", Tied)
        assert torch.equal(loaded.module(IDS), one.module(IDS))
        assert loaded.nbytes == one.nbytes


def test_a_layer_that_runs_twice_is_not_tied_to_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.layer(x).relu()))

    for data in (None, [X]):
        assert list(rd.quantize(Twice(), "int4", data=data, exclude=["layer"]).tensors) == ["last.weight"]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # a branch on data
            x = -x
        return self.linear(x)


@pytest.mark.parametrize("activations", [None, "int8", "int8:dynamic"])
@pytest.mark.proves("inputs.data-dependent-if")
def test_a_branch_on_data_is_named_and_the_layers_quantized_in_place(activations: str | None, tmp_path: Path) -> None:
    model = Branches()
    q = rd.quantize(model, "int8", activations, data=[X])
    (note,) = said(q, "model")
    assert re.search(r'branches on .*test_inputs\.py:\d+ \("if x\.sum\(\) > 0:', note)
    for x in (X, -X):
        torch.testing.assert_close(q.module(x), model(x), rtol=0, atol=0.5)
    assert torch.equal(again(q, tmp_path / "b.safetensors", Branches).module(X), q.module(X))
    with pytest.raises(rd.CheckError, match=r"strict: model: .*test_inputs\.py"):
        rd.quantize(model, "int8", activations, data=[X], strict=True)


class Unsupported(nn.Module):
    """What a graph has no operation for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x).sum() * x


WRAPS = {"weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm,
         "older weight_norm": weight_norm, "older spectral_norm": spectral_norm}  # fmt: skip


def wrapped(name: str) -> nn.Sequential:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own word on the older forms
        model = nn.Sequential(WRAPS[name](nn.Linear(8, 6)), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    model[1].eval()  # a mode of its own
    return model


@both_paths
@pytest.mark.parametrize("name", list(WRAPS))
@pytest.mark.proves("inputs.parametrization")
def test_a_weight_that_is_computed(data: list[Tensor] | None, name: str, tmp_path: Path) -> None:
    """Folded into one constant where there is a graph, else left as it is and listed; the user's module stays as it was."""
    model = wrapped(name)
    check = unchanged(model)
    q = rd.quantize(model, "int8", data=data)
    check()
    text = " ".join(said(q, "model"))
    if data is None:
        assert list(q.tensors) == ["2.weight"]
        assert re.search(r"stay as they are: 0\.(parametrizations\.weight\.original|weight_(g|orig))", text)
    else:
        assert list(q.tensors) == ["0.weight", "2.weight"]
        assert "0.weight is computed from" in text
    y = model.eval()(X)
    torch.testing.assert_close(q.module(X), y, rtol=0, atol=0.02 * float(y.detach().abs().max()))
    state = copy.deepcopy(model.state_dict())

    def rebuilt() -> nn.Module:
        fresh = wrapped(name).eval()
        fresh.load_state_dict(state)
        return fresh

    assert torch.equal(again(q, tmp_path / "p.safetensors", rebuilt).module(X), q.module(X))


@both_paths
@pytest.mark.parametrize("name", list(WRAPS))
@pytest.mark.proves("inputs.parametrization")
def test_a_module_is_restored_after_a_failure(data: list[Tensor] | None, name: str) -> None:
    model = wrapped(name)
    model[2].weight.data[0, 0] = np.nan
    check = unchanged(model)
    with pytest.raises(rd.InputError, match=r"2\.weight: 1 of 18"):
        rd.quantize(model, "int4", data=data)
    check()
    model = nn.Sequential(wrapped(name), Unsupported()).train()
    check = unchanged(model)
    with pytest.raises(rd.CheckError, match="strict"):
        rd.quantize(model, "int4", data=data, strict=True)
    check()


BASE = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
LAYOUTS = {
    "transposed": lambda: BASE[:8, :6].t(),
    "expanded": lambda: BASE[:1, :8].expand(6, 8),
    "strided": lambda: BASE[:12:2, ::2],
    "a view inside": lambda: BASE[3:9, 2:10],
}


@both_paths
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.proves("inputs.strided")
def test_the_layout_of_a_weight_does_not_show(layout: str, data: list[Tensor] | None, tmp_path: Path) -> None:
    files = []
    for weight in (LAYOUTS[layout](), LAYOUTS[layout]().contiguous()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6))
        model[0].weight = nn.Parameter(weight)
        rd.quantize(model, "int4/g3", data=data).save(tmp_path / "m.safetensors")
        files.append((tmp_path / "m.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.proves("inputs.strided")
def test_channels_last_does_not_show(tmp_path: Path) -> None:
    files = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 5, 3)).to(memory_format=layout)
        rd.quantize(model, "int4/g4").save(tmp_path / "m.safetensors")
        files.append((tmp_path / "m.safetensors").read_bytes())
    assert files[0] == files[1]


class Extra(nn.Module):
    """A linear layer beside a parameter of some other type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.extra = nn.Parameter(torch.tensor([[0, 1, 0], [1, 1, 0]]).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.extra.sum().real.to(x.dtype)


@both_paths
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.int8, torch.bool, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.proves("inputs.dtypes")
def test_parameters_of_other_types_are_left_alone_and_listed(data: list[Tensor] | None, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Extra(dtype)
    q = rd.quantize(model, "int8", data=data)
    assert list(q.tensors) == ["linear.weight"]
    assert any("extra" in text for text in said(q, "model"))
    if data is None:
        assert q.rest["extra"].dtype == dtype
        assert torch.equal(q.rest["extra"], model.extra)
    torch.testing.assert_close(q.module(X), model(X), rtol=0, atol=0.05)
    assert torch.equal(again(q, tmp_path / "x.safetensors", lambda: Extra(dtype)).module(X), q.module(X))


def test_a_type_that_a_file_cannot_hold_is_named(tmp_path: Path) -> None:
    q = rd.quantize(Extra(torch.complex128), "int8")
    with pytest.raises(rd.InputError, match=r"tensor 'extra' is torch.complex128; a safetensors file holds torch.bool"):
        q.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.proves("inputs.dtypes")
def test_networks_of_other_real_types_keep_theirs(data: list[Tensor] | None, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = net().to(dtype), X.to(dtype)
    q = rd.quantize(model, "int8", data=None if data is None else [x])
    y = q.module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, model(x), rtol=0, atol=0.05)
    assert torch.equal(again(q, tmp_path / "x.safetensors", lambda: net().to(dtype)).module(x), y)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.real, self.phase = nn.Linear(8, 4), nn.Linear(4, 2, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.phase(self.real(x).to(torch.complex64)).real


@both_paths
@pytest.mark.proves("inputs.dtypes")
def test_complex_layers_never_lose_their_imaginary_part(data: list[Tensor] | None) -> None:
    model = Complex()
    q = rd.quantize(model, "int8", data=data)
    assert list(q.tensors) == ["real.weight"]
    assert any("phase.weight" in text for text in said(q, "model"))
    torch.testing.assert_close(q.module(X), model(X), rtol=0, atol=0.05)
    with pytest.raises(rd.PlanError, match="no layer to quantize"):
        rd.quantize(nn.Sequential(nn.Linear(8, 2, dtype=torch.complex64)), "int8", data=None if data is None else [X.cfloat()])


@both_paths
@pytest.mark.proves("inputs.meta")
def test_meta_tensors_are_named(data: list[Tensor] | None) -> None:
    model = net()
    model[2] = nn.Linear(6, 3, device="meta")
    with pytest.raises(rd.InputError, match=r"2 tensors have no numbers \(meta device\): 2\.weight, 2\.bias"):
        rd.quantize(model, "int4", data=data)


@both_paths
@pytest.mark.proves("inputs.no-match", "plan.unmatched")
def test_a_pattern_that_matches_nothing_names_the_nearest(data: list[Tensor] | None) -> None:
    model = nn.Sequential()
    for name in ("encoder", "lm_head"):
        model.add_module(name, nn.Linear(8, 8))
    with pytest.raises(rd.PlanError, match=r"no layer matches the pattern 'lm_hed'; the nearest names are lm_head"):
        rd.quantize(model, "int4", data=data, exclude=["encoder", "lm_hed"])
    with pytest.raises(rd.PlanError, match="no layer to quantize"):
        rd.quantize(nn.Sequential(nn.ReLU()), "int4", data=data)


@both_paths
@pytest.mark.proves("inputs.already-quantized")
def test_a_quantized_model_is_refused_by_name(data: list[Tensor] | None) -> None:
    q = rd.quantize(net(), "int4", data=data)
    with pytest.raises(rd.PlanError, match="quantized already"):
        rd.quantize(q, "int4", data=data)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchs = torch.ao.quantization.quantize_dynamic(net())
    for model, words in ((q.module, "QLayer|QGraphModule"), (rd.fake(q), "QLayer|QGraphModule"), (torchs, "0 is a Linear")):
        with pytest.raises(rd.PlanError, match=rf"({words}).*quantized already"):
            rd.quantize(model, "int4", data=data)


@both_paths
@pytest.mark.proves("inputs.already-quantized")
def test_numbers_that_were_integers_come_back_exactly(data: list[Tensor] | None) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    codes = torch.randint(-127, 128, (6, 8))
    model[0].weight.data = codes * torch.rand(6, 1)
    assert torch.equal(rd.quantize(model, "int8", data=data).tensors["0.weight"].dequantize(), model[0].weight)


# -- the command line and the disk --------------------------------------------------------------------------------------


HOSTILE = "</script><img onerror=alert(1)>\x1b]0;owned\x07\x1b[31m"

NETS = f"""
    import torch
    from torch import nn

    class Hostile(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.register_module({HOSTILE!r}, nn.Linear(8, 3))

        def forward(self, x):
            return next(self.children())(x)

    def plain():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    def endless():
        import importlib
        room = importlib.import_module("roundel.quantize.weights")
        solve = room.rtn

        def again(*args, **named):
            print("solving", flush=True)
            while True:
                solve(*args, **named)

        room.rtn = again
        return plain()
"""


@pytest.fixture
def roundel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., object]]:
    """Runs the command line inside a folder that has ``odd_nets.py`` and ``x.npz``; gives (status, stdout, stderr)."""
    (tmp_path / "odd_nets.py").write_text(textwrap.dedent(NETS))
    np.savez(tmp_path / "x.npz", x=X.numpy())
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*args: object) -> tuple[int, str, str]:
        status = 0
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capfd.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)
    sys.modules.pop("odd_nets", None)


@pytest.mark.proves("inputs.no-match", "cli.exit")
def test_the_command_line_exits_2_where_nothing_matches(roundel: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, err = roundel("quantize", "odd_nets:plain", "--exclude", "lm_head", "-o", "o.safetensors")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"roundel: no layer matches the pattern 'lm_head'; the nearest names are [^\n]+\n", err)
    status, out, err = roundel("quantize", "odd_nets:plain", "--weights", "int4/g0", "-o", "o.safetensors")
    assert (status, out) == (2, "")
    assert "such as g32" in err
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.proves("inputs.already-quantized")
def test_the_command_line_refuses_an_artifact(roundel: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert roundel("quantize", "odd_nets:plain", "-o", "o.safetensors")[0] == 0
    status, out, err = roundel("quantize", "o.safetensors", "-o", "p.safetensors")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"roundel: [^\n]*o\.safetensors[^\n]*quantized[^\n]*\n", err)
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.proves("inputs.names")
def test_hostile_layer_names_are_inert_from_end_to_end(roundel: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """In notes, tables, JSON and the page; and the file brings the layer back under its own name."""
    data = ("--data", "x.npz")
    runs = [
        roundel("quantize", "odd_nets:Hostile", "--weights", "int4/g3", "--activations", "int8", *data, "-o", "a.safetensors"),
        roundel("quantize", "odd_nets:Hostile", "--weights", "int8", *data, "-o", "b.safetensors"),
        roundel("inspect", "a.safetensors"),
        roundel("diff", "a.safetensors", "b.safetensors"),
        roundel("evaluate", "a.safetensors", "--against", "odd_nets:Hostile", *data, "--report", "r.html"),
        roundel("evaluate", "a.safetensors", "--against", "odd_nets:Hostile", *data, "--json"),
    ]
    for status, out, err in runs:
        assert status == 0, err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out + err)
    assert "onerror" in runs[0][2]
    page = (tmp_path / "r.html").read_text()
    assert "onerror" in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert f"{HOSTILE}.weight" in rd.load(tmp_path / "a.safetensors").tensors


@pytest.mark.parametrize("call", ["replace", "fsync", "write"])
@pytest.mark.proves("inputs.disk-full")
def test_a_full_disk_leaves_the_old_artifact(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    old = rd.quantize(net(), "int8", data=[X])
    old.save(path)

    def full(*args: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(rd.InputError, match=r"cannot write .*m\.safetensors.*No space left.* needed; the file there before"):
            rd.quantize(net(), "int2", data=[X]).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert torch.equal(rd.load(path).module(X), old.module(X))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.proves("inputs.signals")
def test_a_signal_in_the_middle_of_a_layer(sent: signal.Signals, status: int, tmp_path: Path) -> None:
    (tmp_path / "odd_nets.py").write_text(textwrap.dedent(NETS))
    (tmp_path / "o.safetensors").write_bytes(b"old")
    command = [sys.executable, "-m", "roundel.cli", "quantize", "odd_nets:endless", "--weights", "int4", "-o", "o.safetensors"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test runner in the background ignores it
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "solving\n"
        child.send_signal(sent)
        out, err = child.communicate(timeout=20)
    assert (child.returncode, out) == (status, "")
    assert re.fullmatch(r"(note: .*\n)?\n?roundel: (interrupted|terminated)\n", err)
    assert (tmp_path / "o.safetensors").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["o.safetensors", "odd_nets.py"]


@pytest.mark.parametrize("name", [b"caf\xe9 \xff.safetensors", b"with a  blank\n.safetensors", b"n" * 255, "ü€.st".encode()])
@pytest.mark.proves("inputs.paths")
def test_odd_paths_save_load_and_measure(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    q = rd.quantize(net(), "int4", data=[X])
    q.save(path)
    loaded = rd.load(os.fsencode(path))
    assert torch.equal(loaded.module(X), q.module(X))
    assert rd.evaluate(rd.load(path), against=q, data=[X], latency=False).disk == path.stat().st_size


def test_notes_say_what_a_file_needs_to_be_loaded() -> None:
    (without,) = said(rd.quantize(net(), "int8"), "model")
    assert "data=, --data" in without
    assert "load(path, into=module)" in without
    with pytest.raises(rd.PlanError, match=r"data=, --data"):
        rd.quantize(net(), "int8", "int8")


def test_text_without_a_tokenizer_says_what_to_give_instead(tmp_path: Path) -> None:
    from roundel.readers.huggingface import read_tokenizer

    with pytest.raises(rd.InputError, match=r"has no tokenizer\.json.*token ids"):
        read_tokenizer(tmp_path)


class Experts(nn.Module):
    """Each example goes to the expert that the sign of its first number names; a graph cannot follow that."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0).long() == i
            if chosen.any():
                out[chosen] = expert(x[chosen])
        return out


@pytest.mark.proves("inputs.moe")
def test_an_expert_without_tokens_is_quantized_by_its_weights_and_listed() -> None:
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(64, 8) @ (torch.eye(8) + torch.ones(8, 8))  # what GPTQ is for: inputs that go together
    x[:, 0] = x[:, 0].abs()  # expert 0 sees nothing
    q = rd.quantize(model, "int4", "int8", data=[x], solver="gptq")
    assert str(q.tensors["experts.0.weight"].format) == str(q.tensors["experts.1.weight"].format)
    near = rd.quantize(model, "int4").tensors
    assert torch.equal(q.tensors["experts.0.weight"].codes, near["experts.0.weight"].codes)
    assert not torch.equal(q.tensors["experts.1.weight"].codes, near["experts.1.weight"].codes)
    listed = {note.subject: note.text for note in q.notes if note.fallback}
    assert "no example reached it" in listed["experts.0.weight"]
    assert "stays float" in listed["experts.0.input"]
    with pytest.raises(rd.CheckError, match=r"experts\.0"):
        rd.quantize(model, "int4", data=[x], solver="gptq", strict=True)
