"""The closed list of operations a `Graph` may hold, each with its definition in torch; nothing else runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: name -> function of the operands and the node's attributes. Layout is PyTorch's: (N, C, H, W), weights (out, in/groups, kh, kw).
OPS: dict[str, Callable[..., Any]] = {}

#: Activations that `fuse` may fold into the operation before them (attribute ``act`` of conv, linear, add, ...).
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
}


#: Attributes of any operation that change no number. Results of one ``site`` share their parameters; those that are ``fine``
#: take 16 bits where a plan says 8 of everything.
MARKS = frozenset(["site", "fine"])

_COMPARE = {"eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge}

#: What an operation raises for operands or attributes that it cannot take.
MISFIT = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)


def misfit(name: str, attrs: Mapping[str, Any]) -> str:
    """Why these attributes are none of the operation ``name``; empty where they are."""
    known, needed = _attributes(name)
    if odd := sorted(attrs.keys() - known - MARKS):
        return f"has no attribute {odd[0]!r}"
    if missing := sorted(needed - attrs.keys()):
        return f"lacks the attribute {missing[0]!r}"
    if (act := attrs.get("act")) is not None and not (isinstance(act, str) and act in ACTS):
        return f"has an unknown activation {act!r}"
    return ""


@cache
def _attributes(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """All attributes of an operation, and those it cannot do without."""
    found = [p for p in signature(OPS[name]).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    return frozenset(p.name for p in found), frozenset(p.name for p in found if p.default is Parameter.empty)


def op(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a definition in the list under its own name, less a trailing underscore; it computes without `MARKS`."""

    @wraps(fn)
    def unmarked(*operands: Any, site: str = "", fine: bool = False, **attrs: Any) -> Any:
        return fn(*operands, **attrs)

    OPS[fn.__name__.rstrip("_")] = unmarked
    return fn


def _act(x: Tensor, act: str | None) -> Tensor:
    return ACTS[act](x) if act else x


# -- weighted ---------------------------------------------------------------------------------------------------------


@op
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    act: str | None = None,
) -> Tensor:
    """1-D or 2-D convolution; ``padding`` is (left, right[, top, bottom]) as in `pad`, so uneven padding needs no extra node."""
    if any(padding):
        x = F.pad(x, list(padding))
    fn = F.conv1d if w.ndim == 3 else F.conv2d
    return _act(fn(x, w, b, tuple(stride), 0, tuple(dilation), groups), act)


@op
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    act: str | None = None,
) -> Tensor:
    """Transposed convolution, ``w`` is (in, out/groups, kh, kw); ``padding`` is torch's, one number per axis."""
    fn = F.conv_transpose1d if w.ndim == 3 else F.conv_transpose2d
    out = fn(x, w, b, tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    return _act(out, act)


@op
def linear(x: Tensor, w: Tensor, b: Tensor | None = None, *, act: str | None = None) -> Tensor:
    """x (..., in) @ w (out, in)^T + b."""
    return _act(F.linear(x, w, b), act)


@op
def embedding(ids: Tensor, w: Tensor) -> Tensor:
    """Rows of ``w`` (vocabulary, dim) by integer ``ids``."""
    return F.embedding(ids, w)


# -- two activations --------------------------------------------------------------------------------------------------


@op
def matmul(a: Tensor, b: Tensor, *, transpose_b: bool = False) -> Tensor:
    """Batched matrix product of two computed operands."""
    return torch.matmul(a, b.transpose(-1, -2) if transpose_b else b)


@op
def add(a: Tensor, b: Tensor, *, act: str | None = None) -> Tensor:
    return _act(a + b, act)


@op
def sub(a: Tensor, b: Tensor, *, act: str | None = None) -> Tensor:
    return _act(a - b, act)


@op
def mul(a: Tensor, b: Tensor, *, act: str | None = None) -> Tensor:
    return _act(a * b, act)


@op
def div(a: Tensor, b: Tensor, *, act: str | None = None) -> Tensor:
    return _act(a / b, act)


@op
def maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b)


@op
def minimum(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b)


@op
def squared_difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square()


@op
def pow_(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b)


@op
def where(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(c.bool(), a, b)


@op
def compare(a: Tensor, b: Tensor, *, how: str) -> Tensor:
    """Elementwise; ``how`` is eq, ne, lt, le, gt or ge."""
    return _COMPARE[how](a, b)


@op
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, causal: bool = False) -> Tensor:
    """softmax(q k^T * scale + mask) v over the last two axes."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)


# -- elementwise ------------------------------------------------------------------------------------------------------


@op
def identity(x: Tensor) -> Tensor:
    return x


@op
def relu(x: Tensor) -> Tensor:
    return F.relu(x)


@op
def relu6(x: Tensor) -> Tensor:
    return F.relu6(x)


@op
def leaky_relu(x: Tensor, *, slope: float) -> Tensor:
    return F.leaky_relu(x, slope)


@op
def prelu(x: Tensor, w: Tensor) -> Tensor:
    return F.prelu(x, w)


@op
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@op
def hardswish(x: Tensor) -> Tensor:
    return F.hardswish(x)


@op
def hardsigmoid(x: Tensor) -> Tensor:
    return F.hardsigmoid(x)


@op
def hardtanh(x: Tensor, *, lo: float, hi: float) -> Tensor:
    """Clamp to [lo, hi]; an open end is +-inf, written as a missing bound by the JSON (null)."""
    return torch.clamp(x, lo, hi)


@op
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@op
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@op
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@op
def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@op
def exp(x: Tensor) -> Tensor:
    return torch.exp(x)


@op
def log(x: Tensor) -> Tensor:
    return torch.log(x)


@op
def erf(x: Tensor) -> Tensor:
    return torch.erf(x)


@op
def sqrt(x: Tensor) -> Tensor:
    return torch.sqrt(x)


@op
def rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x)


@op
def abs_(x: Tensor) -> Tensor:
    return torch.abs(x)


@op
def neg(x: Tensor) -> Tensor:
    return -x


@op
def sin(x: Tensor) -> Tensor:
    return torch.sin(x)


@op
def cos(x: Tensor) -> Tensor:
    return torch.cos(x)


@op
def cast(x: Tensor, *, dtype: str) -> Tensor:
    return x.to(getattr(torch, dtype))


# -- normalisation and softmax ----------------------------------------------------------------------------------------


@op
def batch_norm(x: Tensor, mean: Tensor, var: Tensor, w: Tensor | None = None, b: Tensor | None = None, *, eps: float) -> Tensor:
    """Inference-time batch norm over axis 1; the statistics do not train."""
    return F.batch_norm(x, mean.detach(), var.detach(), w, b, eps=eps)


@op
def layer_norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None, *, eps: float) -> Tensor:
    """Over the last axis."""
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


@op
def rms_norm(x: Tensor, w: Tensor | None = None, *, eps: float) -> Tensor:
    """Over the last axis."""
    return F.rms_norm(x, x.shape[-1:], w, eps)


@op
def group_norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None, *, groups: int, eps: float) -> Tensor:
    return F.group_norm(x, groups, w, b, eps)


@op
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return F.softmax(x, dim=axis)


@op
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return F.log_softmax(x, dim=axis)


# -- pooling and reduction --------------------------------------------------------------------------------------------


@op
def max_pool(x: Tensor, *, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], act: str | None = None) -> Tensor:
    """``padding`` as in `conv`; padded places never win."""
    if any(padding):
        x = F.pad(x, list(padding), value=float("-inf"))
    fn = F.max_pool1d if x.ndim == 3 else F.max_pool2d
    return _act(fn(x, tuple(kernel), tuple(stride)), act)


@op
def avg_pool(
    x: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_pad: bool = False,
    act: str | None = None,
) -> Tensor:
    """``padding`` as in `conv`; padded places are left out of the mean unless ``count_pad``."""
    fn = F.avg_pool1d if x.ndim == 3 else F.avg_pool2d
    kernel, stride = tuple(kernel), tuple(stride)
    if not any(padding):
        return _act(fn(x, kernel, stride), act)
    total = fn(F.pad(x, list(padding)), kernel, stride)
    if not count_pad:
        total = total / fn(F.pad(torch.ones_like(x[:1, :1]), list(padding)), kernel, stride)
    return _act(total, act)


@op
def mean(x: Tensor, *, axes: Sequence[int], keepdim: bool = False) -> Tensor:
    return x.mean(tuple(axes), keepdim)


@op
def sum_(x: Tensor, *, axes: Sequence[int], keepdim: bool = False) -> Tensor:
    return x.sum(tuple(axes), keepdim)


@op
def amax(x: Tensor, *, axes: Sequence[int], keepdim: bool = False) -> Tensor:
    return x.amax(tuple(axes), keepdim)


@op
def argmax(x: Tensor, *, axis: int, keepdim: bool = False) -> Tensor:
    return x.argmax(axis, keepdim)


# -- moving values ----------------------------------------------------------------------------------------------------


@op
def reshape(x: Tensor, *, shape: Sequence[int]) -> Tensor:
    """At most one -1; 0 keeps the input's size at that place (ONNX), so a batch stays symbolic."""
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


@op
def transpose(x: Tensor, *, perm: Sequence[int]) -> Tensor:
    return x.permute(tuple(perm))


@op
def slice_(x: Tensor, *, axis: int, start: int = 0, stop: int | None = None, step: int = 1) -> Tensor:
    """As in Python, negative steps included."""
    picks = range(*slice(start, stop, step).indices(x.shape[axis]))
    if step > 0:
        return x[(slice(None),) * (axis % x.ndim) + (slice(picks.start, picks.stop, step),)]
    return x.index_select(axis, torch.tensor(list(picks), dtype=torch.long, device=x.device))


@op
def concat(*xs: Tensor, axis: int) -> Tensor:
    return torch.cat(xs, axis)


@op
def split(x: Tensor, *, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes), axis)


@op
def pad(x: Tensor, *, padding: Sequence[int], value: float = 0.0, mode: str = "constant") -> Tensor:
    """``padding`` runs from the last axis backwards, (before, after) each, as torch has it."""
    return F.pad(x, list(padding), mode, value if mode == "constant" else None)


@op
def expand(x: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Broadcast to ``shape``; -1 keeps a size."""
    return x.expand(tuple(shape))


@op
def expand_batch(x: Tensor, like: Tensor) -> Tensor:
    """Repeat a batch-1 value along axis 0 to the batch of ``like`` (a class token under a symbolic batch)."""
    return x.expand(like.shape[0], *x.shape[1:])


@op
def gather(x: Tensor, index: Tensor, *, axis: int) -> Tensor:
    """Whole slices of ``x`` along ``axis`` by ``index`` of any rank (ONNX Gather, TFLite GATHER)."""
    out = x.index_select(axis, index.reshape(-1).long())
    at = axis % x.ndim
    return out.reshape(x.shape[:at] + index.shape + x.shape[at + 1 :])


@op
def resize(x: Tensor, *, size: Sequence[int], mode: str, align_corners: bool = False) -> Tensor:
    """nearest or bilinear over the last two axes."""
    return F.interpolate(x, tuple(size), mode=mode, align_corners=align_corners if mode == "bilinear" else None)


@op
def depth_to_space(x: Tensor, *, block: int) -> Tensor:
    """(N, C b b, H, W) -> (N, C, H b, W b), channel-major as `torch.nn.PixelShuffle`."""
    return F.pixel_shuffle(x, block)
