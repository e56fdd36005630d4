"""One quantized layer: weights that give their levels, activations that give their codes, and the one arithmetic that joins them.

    acc = op(code_x - zero_x, level_w)          exact: integers in float32 below 2^24, else float64
    y   = acc * (scale_x * scale_w) + bias      one named order, float32 unless acc is float64

Straight-through gradients make the same code the fake-quantized twin. What is float here: everything a plan leaves float. Under
autocast the codes stay exact, and what is float follows autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..formats.codec import Params, Stored, block_ranges
from ..formats.format import Format
from ..formats.grid import Uniform
from ..formats.qtensor import QTensor, from_matrix, to_matrix
from ..graph.ops import ACTS, OPS
from ..plan import When

if TYPE_CHECKING:
    from .running import Tracker

#: In the place of a bias: what makes a layer's outputs of its sums over all of a batch, a norm under training.
Shift = Callable[[Tensor], Tensor]

#: Operations with a weight as their second operand that can compute on codes.
WEIGHTED = ("conv", "conv_transpose", "linear", "embedding")


class _Straight(torch.autograd.Function):
    """Forward the quantized value, backward as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(real.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight(real: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` with the gradient of ``real``."""
    return _Straight.apply(real, quantized) if real.requires_grad else quantized.to(real.dtype)


class Weight(Protocol):
    """What `weighted` asks of a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        """Whether sums over its levels must not depend on the order of adding; what is being trained takes float32 for speed."""

    def values(self) -> Tensor:
        """Dequantized, in the weight's shape."""

    def rows(self, index: Tensor) -> Tensor:
        """Values of some rows."""

    def levels(self) -> tuple[Tensor, Tensor | None]:
        """(levels in the weight's shape, scale per output); the scale is None where an output has no single factor."""


class Site(Protocol):
    """What `weighted` and a graph ask of a quantized site: `Activation`, or what is trained in its place."""

    @property
    def format(self) -> Format: ...

    @property
    def when(self) -> When: ...

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(code - zero, scale); without a single factor, (value, None)."""

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its own units."""


# -- activations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Activation:
    """How one site is quantized; ``params`` are stored when ``when`` is static, computed from each input when dynamic, and where a
    running one starts, whose ``tracker`` says how it goes on (`running`)."""

    format: Format
    when: When = "static"
    params: Stored | None = None
    tracker: Tracker | None = None

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(code - zero as real numbers, scale that broadcasts to ``x``); without a single factor, (the value itself, None)."""
        matrix, back = _as_matrix(x, self.format.share.word)
        params = self.params or self.measure(matrix)
        codes = self.format.encode(matrix.detach(), params)
        one_factor = params.scale is not None and params.scale.shape[1] == 1 and self.format.min is None
        if not one_factor or (params.scale.shape[0] > 1 and self.format.share.word == "channel"):  # type: ignore[union-attr]
            value = self.format.decode(codes, params)[:, : matrix.shape[1]]
            return straight(x, back(value)), None
        plain = Stored(torch.ones(1, 1), params.offset, params.table, params.parts)
        level = back(self.format.decode(codes, plain)[:, : matrix.shape[1]])
        scale = params.scale
        assert scale is not None
        scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(_token_shape(x))
        return straight(x / divisor(scale), level), scale

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its own units."""
        code, scale = self.codes(x)
        return (code if scale is None else code * scale).to(x.dtype)

    def measure(self, matrix: Tensor) -> Stored:
        """Parameters that just cover the numbers of each block of ``matrix``."""
        return self.format.store(self.format.from_range(*block_ranges(self.format, matrix.detach().float())))


def _token_shape(x: Tensor) -> tuple[int, ...]:
    """One scale per token of (..., features), per sample of an image."""
    return (x.shape[0],) + (1,) * (x.ndim - 1) if x.ndim >= 4 else (*x.shape[:-1], 1)


def _as_matrix(x: Tensor, share: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The matrix a format sees of an activation, and the way back: one row per tensor, per channel (axis 1), or per token."""
    if share == "tensor":
        return x.reshape(1, -1), lambda m: m.reshape(x.shape)
    if share == "channel":
        return to_matrix(x, 1), lambda m: from_matrix(m, tuple(x.shape), 1)
    width = x[0].numel() if x.ndim >= 4 else x.shape[-1]
    return x.reshape(-1, width), lambda m: m.reshape(x.shape)


# -- weights ----------------------------------------------------------------------------------------------------------


class PackedWeight(nn.Module):
    """A weight that stays packed; levels and values are made when they are needed and not kept."""

    #: What rows are handed out in: the type the network computes in.
    dtype = torch.float32
    exact = True

    def __init__(self, tensor: QTensor) -> None:
        super().__init__()
        self.tensor, self.shape = tensor, tensor.shape

    def extra_repr(self) -> str:
        return f"{list(self.tensor.shape)}, {self.tensor.format}"

    def values(self) -> Tensor:
        return self.tensor.dequantize()

    def rows(self, index: Tensor) -> Tensor:
        """Values of some rows, without touching the others."""
        flat, where = index.reshape(-1).unique(return_inverse=True)
        return self.tensor.matrix_values(flat)[where].reshape(*index.shape, -1)

    def levels(self) -> tuple[Tensor, Tensor | None]:
        """(levels in the weight's shape, scale per output); the scale is None where an output has no single factor."""
        return _levels(self.tensor, None)


class FakeWeight(nn.Module):
    """The trainable twin of `PackedWeight`: a real weight, encoded anew at each use with the same parameters."""

    dtype = torch.float32
    exact = True

    def __init__(self, tensor: QTensor) -> None:
        super().__init__()
        self.tensor, self.shape = tensor, tensor.shape
        self.weight = nn.Parameter(tensor.dequantize())

    def values(self) -> Tensor:
        q = self.tensor
        matrix = to_matrix(self.weight.detach(), q.axis)
        value = q.format.decode(q.format.encode(matrix, q.params), q.params)[:, : matrix.shape[1]]
        return straight(self.weight, from_matrix(value, q.shape, q.axis))

    def rows(self, index: Tensor) -> Tensor:
        return self.values()[index]

    def levels(self) -> tuple[Tensor, Tensor | None]:
        return _levels(self.tensor, self.weight)


class FloatWeight(nn.Module):
    """A weight left float, under an input that is quantized all the same."""

    exact = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.shape, self.dtype = tuple(weight.shape), weight.dtype

    def values(self) -> Tensor:
        return self.weight

    def rows(self, index: Tensor) -> Tensor:
        return self.weight[index]

    def levels(self) -> tuple[Tensor, None]:
        return self.weight, None


def _levels(q: QTensor, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Levels of the packed codes, or of ``live`` encoded now."""
    fmt, params = q.format, q.params
    codes = q.unpack() if live is None else fmt.encode(to_matrix(live.detach(), q.axis), params)
    scale = output_scale(fmt, params, q.matrix[0])
    if scale is None:
        value = from_matrix(fmt.decode(codes, params)[:, : q.matrix[1]], q.shape, q.axis)
        return (value if live is None else straight(live, value)), None
    plain = Stored(torch.ones(1, 1), params.offset, params.table, params.parts)
    level = from_matrix(fmt.decode(codes, plain)[:, : q.matrix[1]], q.shape, q.axis)
    if live is not None:
        level = straight(live / divisor(from_matrix(scale.expand(q.matrix), q.shape, q.axis)), level)
    return level, scale.reshape(-1)


def output_scale(fmt: Format, params: Params, rows: int) -> Tensor | None:
    """The scale (rows or 1, 1) that is one factor of each output of a weight, or None where there is no such factor."""
    scale = params.scale
    if scale is None or scale.shape[1] != 1 or fmt.min is not None:
        return None
    return scale.repeat_interleave(fmt.share.rows, 0)[:rows] if 1 < scale.shape[0] < rows else scale


def divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0 (a pruned row), so that no gradient becomes NaN."""
    return torch.where(scale == 0, torch.ones((), dtype=scale.dtype), scale)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def span(fmt: Format) -> float:
    """Largest |code - zero| of an integer grid; infinite on others, whose levels are no whole numbers."""
    low, high = fmt.extremes
    if not isinstance(fmt.grid, Uniform):
        return float("inf")
    return high - low if fmt.zero is not None else max(abs(low), abs(high))


def exact_dtype(reach: float) -> torch.dtype:
    """float32 where every partial sum is a whole number below 2^24, so that no order of adding can change it; else float64."""
    return torch.float32 if reach < 2**24 else torch.float64


def reach(level: Tensor, axis: int) -> float:
    """Largest sum of |level| over the inputs of one output; infinite where levels are not whole numbers."""
    if not level.numel():
        return 0.0
    level = to_matrix(level.detach(), axis)
    return float(level.abs().sum(1, dtype=torch.float64).amax()) if bool((level == level.round()).all()) else float("inf")


def weighted(
    op: str, attrs: Mapping[str, Any], x: Tensor, weight: Weight, bias: Tensor | Shift | None, site: Site | None
) -> Tensor:
    """One weighted operation, on codes where its input is quantized, on dequantized weights where it is not."""
    plain = bias if isinstance(bias, Tensor) else None
    if op == "embedding":
        return weight.rows(x).to(weight.dtype)
    if op != "linear" and x.ndim < len(weight.shape):  # one example without a batch axis
        return weighted(op, attrs, x[None], weight, bias, site)[0]
    act = attrs.get("act")
    attrs = {k: v for k, v in attrs.items() if k != "act"}
    if site is None:
        out = OPS[op](x, weight.values().to(x.dtype), plain, **attrs)
    else:
        code, x_scale = site.codes(x) if op == "linear" else _codes_by_sample(site, x)
        axis = 1 if op == "conv_transpose" else 0
        level, w_scale = weight.levels()
        if op == "conv_transpose" and attrs.get("groups", 1) != 1 and w_scale is not None:
            level, w_scale = weight.values(), None  # rows are inputs there: no factor per output
        whole = weight.exact and x_scale is not None
        dtype = exact_dtype(span(site.format) * reach(level, axis) if whole else float("inf" if weight.exact else 0))
        with exactly(x):
            out = OPS[op](code.to(dtype), level.to(dtype), None, **attrs)
        channels = out.ndim - 1 if op == "linear" else 1
        spread = [1] * out.ndim
        if w_scale is not None:
            spread[channels] = -1
        factor = torch.ones((), dtype=dtype) if w_scale is None else w_scale.to(dtype).reshape(spread)
        if x_scale is not None:
            factor = factor * x_scale.to(dtype)
        out = out * factor
        if plain is not None:
            spread[channels] = -1
            out = out + plain.to(dtype).reshape(spread)
        out = out.to(x.dtype)
    if bias is not None and not isinstance(bias, Tensor):
        out = bias(out)
    return ACTS[act](out) if act else out


def exactly(x: Tensor) -> torch.autocast:
    """No autocast inside: bfloat16 holds no sum of codes."""
    return torch.autocast(x.device.type, enabled=False)


def _codes_by_sample(site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes of a convolution's input: its tokens are samples, also where they are (channels, length)."""
    if x.ndim != 3:
        return site.codes(x)
    code, scale = site.codes(x[:, :, None])
    return code.squeeze(2), scale.squeeze(2) if scale is not None and scale.ndim else scale


class QLayer(nn.Module):
    """A weighted leaf module of an ordinary network, quantized: the module path's counterpart of a graph node."""

    def __init__(self, op: str, attrs: Mapping[str, Any], weight: Weight, bias: Tensor | None, input: Site | None) -> None:
        super().__init__()
        self.op, self.attrs, self.input = op, dict(attrs), input
        self.packed = weight
        self.bias = nn.Parameter(bias.detach()) if bias is not None else None
        # torch's fused encoder layer reads its layers' weights without calling them, unless one of them has a hook
        self.register_forward_pre_hook(_called)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew, for networks that look at it."""
        return self.packed.values()

    def extra_repr(self) -> str:
        return self.op + (f", input {self.input.format}:{self.input.when}" if self.input else "")

    def forward(self, x: Tensor) -> Tensor:
        return weighted(self.op, self.attrs, x, self.packed, self.bias, self.input)


def _called(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing."""
