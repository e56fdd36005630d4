"""Weights and activations that train: the faces of `network.layer` over parameters, and the gradients of their papers.

    value = decode(codes, stored parameters) + inside * scale * (u - stop(u)),    u = the number in units of the grid

The second term is 0 and carries the straight-through gradient: 1 to a number inside the grid's range and 0 outside, level - u to
a scale inside and level outside (LSQ, Esser et al. 2020), 0 to a zero point inside and -scale outside (LSQ+, Bhalgat et al.
2020), and to a learned table the sum over each of its clusters. What is not here: losses, loops, and which layer learns what.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..formats.codec import Params, Stored, neighbours, spread
from ..formats.format import Format
from ..formats.grid import Codebook, Levels, Uniform
from ..formats.qtensor import QTensor, from_matrix, packed, to_matrix
from ..network.layer import Activation, divisor, output_scale, straight
from ..plan import When

Rounding = Literal["straight", "sigmoid", "sign"]
Learn = Literal["step", "clip", "ema", "none"]

#: kind -> the parameters of that kind.
Kinds = dict[str, list[nn.Parameter]]


class _Damped(torch.autograd.Function):
    """The same value with a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.gain, None


class _Rounded(torch.autograd.Function):
    """``code - zero`` of numbers on one grid of integers: `Format.encode`, `Format.decode` and the gradient of `passing` in four
    passes over memory, on which training of small networks spends half its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, low: float, high: float) -> Tensor:
        u = x / divisor(scale)
        ends = torch.tensor([low, high]) - (0 if offset is None else offset.reshape(()))
        code = u.clamp(*(ends * (scale.reshape(()) != 0)))
        ctx.save_for_backward(x, code == u, scale)
        return code.round_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inside, scale = ctx.saved_tensors
        to_x, to_scale, to_offset = torch.where(inside, grad, 0.0), None, None
        if ctx.needs_input_grad[2]:
            to_offset = (to_x - grad).sum().reshape(scale.shape)
        to_x /= divisor(scale)
        if ctx.needs_input_grad[1]:
            to_scale = -((to_x * x).sum() / divisor(scale)).reshape(scale.shape)
        return to_x, to_scale, to_offset, None, None


class Steps(nn.Module):
    """Scale, offset and table of one tensor as parameters that start at 0, each relative to what was stored.

    scale = start * exp(log_scale), which keeps its sign; offset = start + offset * (levels of the grid, in its own units); table =
    start + table * largest entry, sorted; under ``logN:fit`` the law stays and only its top and base move. So one rate suits all
    of them, and weight decay leads back to the start.
    """

    def __init__(self, fmt: Format, start: Stored, scales: bool = True, tables: bool = True) -> None:
        super().__init__()
        self.format, self.start = fmt, start
        self.log_scale = nn.Parameter(torch.zeros_like(start.scale)) if scales and start.scale is not None else None
        self.offset = nn.Parameter(torch.zeros_like(start.offset)) if scales and start.offset is not None else None
        law = isinstance(fmt.grid, Codebook) and fmt.grid.law == "log"
        self.law = nn.Parameter(torch.zeros(len(start.table), 2, 1)) if tables and law and start.table is not None else None
        self.table = nn.Parameter(torch.zeros_like(start.table)) if tables and not law and start.table is not None else None
        #: LSQ damps the gradient of a step by 1 / sqrt(numbers that share it * largest level).
        self.top = max(abs(x) for x in fmt.extremes)

    def kinds(self) -> Kinds:
        scales, tables = [self.log_scale, self.offset], [self.table, self.law]
        return {"scales": [p for p in scales if p is not None], "tables": [p for p in tables if p is not None]}

    def real(self, count: float, growth: Tensor | None = None) -> Params:
        """The parameters before they are stored; ``count`` numbers share one step. ``growth`` (outputs, 1) multiplies what belongs
        to one output, so that its codes stay when a factor of all its numbers moves."""
        start, gain = self.start, 1 / math.sqrt(max(1.0, count * self.top))
        scale, offset, table = start.scale, start.offset, start.table
        if self.log_scale is not None and scale is not None:
            scale = scale * _Damped.apply(self.log_scale, gain).exp()
        if self.offset is not None and offset is not None:
            low, high = self.format.extremes
            unit = high - low if self.format.zero is not None or start.scale is None else (high - low) * start.scale.abs()
            offset = offset + unit * _Damped.apply(self.offset, gain)
        if self.table is not None and table is not None:
            table = table + self.table * table.abs().amax(1, keepdim=True)
            table = table.sort(1).values if self.format.step == 1 else table
        if self.law is not None and table is not None:
            half = (table.shape[1] - 1) // 2
            power = half - (torch.arange(table.shape[1]) - half).abs()
            table = table * (self.law[:, :1] - power[None, :, None] * self.law[:, 1:]).exp()
        if growth is not None:
            if scale is not None and len(scale) == len(growth):
                scale = scale * growth
                offset = offset * growth if offset is not None and self.format.min is not None else offset
            elif scale is None and table is not None and len(table) == len(growth):
                table = table * growth[:, :, None]
        return Params(scale, offset, table)

    def stored(self, count: float = 1, growth: Tensor | None = None) -> Stored:
        """The parameters as they will be stored, rounded straight-through."""
        if not any(self.kinds().values()) and growth is None:
            return self.start
        real, start = self.real(count, growth), self.start

        def moved(new: Tensor | None, old: Tensor | None) -> Tensor | None:
            if new is None or old is None or torch.equal(new, old):
                return None  # it keeps the bytes that it has
            if not torch.isfinite(new).all():
                raise InputError(f"{self.format}: a learned parameter is no longer finite; train with a lower rate")
            return new

        with torch.no_grad():
            new = self.format.store(Params(moved(real.scale, start.scale), moved(real.offset, start.offset),
                                           moved(real.table, start.table)))  # fmt: skip
        parts = tuple(old if now is None else now for now, old in zip(new.parts, start.parts, strict=True))
        return Stored(_live(real.scale, new.scale, start.scale), _live(real.offset, new.offset, start.offset),
                      _live(real.table, new.table, start.table), parts)  # fmt: skip


def _live(real: Tensor | None, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The stored number with the gradient of the real one."""
    stored = old if new is None else new
    return None if real is None or stored is None else straight(real, stored)


def grid_units(fmt: Format, w: Tensor, params: Params) -> Tensor:
    """``w`` (rows, columns) in units of the grid, unrounded and differentiable; in its own where the scale is 0."""
    u = w + spread(fmt, params.offset, w) if fmt.min is not None else w
    if params.scale is not None:
        u = u / divisor(spread(fmt, params.scale, w))
    return u + spread(fmt, params.offset, w) if fmt.zero is not None else u


def _covered(fmt: Format, params: Stored) -> Tensor:
    """Lowest and highest number that the parameters of one tensor reach, (1, 2)."""
    ends = torch.tensor([fmt.extremes])
    ends = ends - params.offset if fmt.zero is not None and params.offset is not None else ends
    ends = ends if params.scale is None else ends * params.scale
    return ends - params.offset if fmt.min is not None and params.offset is not None else ends


def unscaled(params: Stored) -> Stored:
    """The same parameters with a scale of one: decoding gives levels, zero point taken out."""
    return Stored(torch.ones(1, 1), params.offset, params.table, params.parts)


def still(params: Stored) -> Stored:
    """The same parameters with an offset that gets no gradient through them: `passing` gives it, number by number, because two
    sums that ought to cancel leave a residue, which Adam would take for a direction."""
    offset = None if params.offset is None else params.offset.detach()
    return Stored(params.scale, offset, params.table, params.parts)


def passing(fmt: Format, w: Tensor, params: Stored, rounded: Tensor | None = None) -> Tensor:
    """A matrix of zeros with the gradients that decoding `still` parameters lacks: inside the range the straight-through one of
    ``w`` in units of the grid, beyond fixed levels the offset's. ``rounded``, the value that ``w`` rounds to, takes its place
    inside: then no error of rounding moves the scale."""
    fixed = still(params)
    u = grid_units(fmt, w if rounded is None else w + (rounded - w).detach(), fixed)
    pull = u - u.detach()
    if not isinstance(fmt.grid, Uniform | Levels):  # a learned table follows its numbers: nothing is beyond it
        return pull
    low, high = fmt.extremes
    with torch.no_grad():
        at = u if rounded is None else grid_units(fmt, w, fixed)
        inside = (at >= low) & (at <= high)
    if params.offset is None:
        return torch.where(inside, pull, torch.zeros(()))
    offset = spread(fmt, params.offset, w)
    beyond = offset.detach() - offset
    if fmt.min is not None and params.scale is not None:
        beyond = beyond / divisor(spread(fmt, params.scale, w)).detach()
    return torch.where(inside, pull, beyond)


class TunableWeight(nn.Module):
    """A weight under training, with the face of `network.layer.PackedWeight`.

    ``tensor`` is what it starts from, ``real`` the float weight of its shape (without it, the dequantized one). ``rounding``:

    * ``straight``: the real weight trains through its rounding, and starts where its codes are those of ``tensor``.
    * ``sigmoid``: AdaRound (Nagel et al. 2020), h = clip(1.2 sigmoid(v) - 0.1, 0, 1) between the two nearest levels of any grid
      of single numbers. In training mode its value is between levels, at first the real weight; add `regulariser` to the loss.
    * ``sign``: AutoRound (Cheng et al. 2023), the codes of weight + v * step with v in [-0.5, 0.5], for sign-SGD.

    ``scales`` and ``tables``: whether those train. The forward pass uses them as they will be stored. ``factor`` gives, in float64,
    what multiplies each output of ``real``, and may train elsewhere (`norms.LiveNorm`): the product is what is quantized, and a
    scale or table of one output alone goes with it. Raises `FormatError` where a format's levels have no neighbours to choose
    between.

    >>> from roundel.solvers import rtn
    >>> w = TunableWeight(rtn(torch.tensor([[1.0, 0.5, -2.0]]), Format.parse("int3")), torch.tensor([[1.0, 0.6, -2.0]]))
    >>> w.values().detach(), {kind: len(found) for kind, found in w.kinds().items()}
    (tensor([[ 1.0000,  0.5000, -2.0000]]), {'weights': 1, 'rounding': 0, 'scales': 1, 'tables': 0})
    """

    dtype = torch.float32
    begin: Tensor

    def __init__(self, tensor: QTensor, real: Tensor | None = None, rounding: Rounding = "straight",
                 scales: bool = True, tables: bool = True, factor: Callable[[], Tensor] | None = None) -> None:  # fmt: skip
        super().__init__()
        if real is not None and tuple(real.shape) != tensor.shape:
            raise InputError(f"the float weight has shape {list(real.shape)}, the quantized one {list(tensor.shape)}")
        self.tensor, self.shape, self.rounding = tensor, tensor.shape, rounding
        fmt, params = tensor.format, tensor.params
        w = to_matrix(tensor.dequantize() if real is None else real.detach().float(), tensor.axis).clone()
        self.factor, bare = factor, w
        if factor is not None:
            begin = factor().detach()[:, None]
            self.register_buffer("begin", begin, persistent=False)
            w = (w.double() * begin).float()
        if rounding != "sigmoid" and real is not None:  # codes that a solver chose against the nearest level stay
            other = (fmt.encode(w, params) != tensor.unpack()).repeat_interleave(fmt.step, 1)[:, : w.shape[1]]
            w = torch.where(other, tensor.matrix_values(), w)
            bare = w if factor is None else torch.where(other, (w / divisor(begin)).float(), bare)
        self.weight = nn.Parameter(from_matrix(bare, tensor.shape, tensor.axis).contiguous(), requires_grad=rounding == "straight")
        self.steps = Steps(fmt, params, scales, tables)
        blocks = math.prod(fmt.share.grid(tensor.matrix))
        self.count = math.prod(tensor.shape) / max(1, blocks)
        self.v: nn.Parameter | None = None
        if rounding != "straight":
            low, high = neighbours(fmt, w, params)
            self.register_buffer("low", low, persistent=False)
            self.register_buffer("high", high, persistent=False)
            start = torch.zeros_like(w)
            if rounding == "sigmoid":
                below, above = (fmt.decode(codes, params) for codes in (low, high))
                gap = above - below
                share = torch.where(gap == 0, torch.zeros(()), (w - below) / torch.where(gap == 0, torch.ones(()), gap))
                start = torch.logit((share.clamp(0, 1) + 0.1) / 1.2)
            self.v = nn.Parameter(start)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.tensor.format}, {self.rounding}"

    @property
    def exact(self) -> bool:
        return not self.training

    def kinds(self) -> Kinds:
        """Parameters by kind: weights, rounding, scales (zero points and minima too), tables."""
        own = {"weights": [self.weight] if self.rounding == "straight" else [], "rounding": [] if self.v is None else [self.v]}
        return own | self.steps.kinds()

    def h(self) -> Tensor:
        """AdaRound's share of the upper level, (rows, columns) in [0, 1]."""
        if self.v is None:
            raise InputError(f"h belongs to sigmoid rounding; this weight has {self.rounding}")
        return (1.2 * self.v.sigmoid() - 0.1).clamp(0, 1)

    def regulariser(self, beta: float) -> Tensor:
        """Sum of 1 - |2h - 1|^beta: 0 where every choice is made (AdaRound, equation 24); 0 for the other roundings."""
        if self.rounding != "sigmoid":
            return torch.zeros(())
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

    def _params(self, count: float) -> Stored:
        if self.factor is None:
            return self.steps.stored(count)
        growth = self.factor()[:, None] / divisor(self.begin)
        return self.steps.stored(count, torch.where(self.begin == 0, 1.0, growth.abs()).float())

    def values(self) -> Tensor:
        params = self._params(self.count)
        return from_matrix(self._decoded(params, params), self.shape, self.tensor.axis)

    def rows(self, index: Tensor) -> Tensor:
        return self.values()[index]

    def levels(self) -> tuple[Tensor, Tensor | None]:
        params, q = self._params(self.count), self.tensor
        scale = output_scale(q.format, params, q.matrix[0])
        value = self._decoded(params, params if scale is None else unscaled(params))
        return from_matrix(value, q.shape, q.axis), None if scale is None else scale.reshape(-1)

    def hard(self) -> QTensor:
        """What would be stored now; in evaluation mode the module computes with exactly this."""
        with torch.no_grad():
            if not torch.isfinite(self._bare()).all() or (self.v is not None and not torch.isfinite(self.v).all()):
                raise InputError(f"shape {list(self.shape)}: its numbers are no longer finite; train with a lower rate")
            params = self._params(1)
            return packed(self.tensor.format, self._codes(params), params, self.shape, self.tensor.axis)

    def _bare(self) -> Tensor:
        """The real weight, folded, (rows, columns)."""
        w = to_matrix(self.weight, self.tensor.axis)
        return w if self.factor is None else (w.double() * self.factor()[:, None]).float()

    def _real(self, params: Stored) -> Tensor:
        """The number that is rounded, (rows, columns)."""
        w = self._bare()
        if self.rounding != "sign" or self.v is None:
            return w
        fmt = self.tensor.format
        v = straight(self.v, self.v.detach().clamp(-0.5, 0.5))
        fixed = still(params)
        return w + v * (fmt.decode(self.high, fixed) - fmt.decode(self.low, fixed))  # type: ignore[arg-type]

    def _codes(self, params: Stored) -> Tensor:
        if self.rounding == "sigmoid":
            return torch.where(self.h() >= 0.5, self.high, self.low)  # type: ignore[arg-type]
        return self.tensor.format.encode(self._real(params), params)

    def _decoded(self, params: Stored, to: Stored) -> Tensor:
        """Values (rows, columns) under ``to``, the parameters or `unscaled` ones, with the gradients of training."""
        fmt, cols = self.tensor.format, self.tensor.matrix[1]
        if self.rounding == "sigmoid" and self.training:
            low, high = (fmt.decode(codes, to) for codes in (self.low, self.high))  # type: ignore[arg-type]
            return low + self.h() * (high - low)
        with torch.no_grad():
            codes = self._codes(params)
        value = fmt.decode(codes, to if self.rounding == "sigmoid" else still(to))[:, :cols]
        if self.rounding == "sigmoid" or not torch.is_grad_enabled():
            return value
        pull = passing(fmt, self._real(params), params)
        if to is params and params.scale is not None:
            pull = pull * spread(fmt, params.scale, pull).detach()
        return value + pull


class TunableActivation(nn.Module):
    """A site under training, with the face of `Activation`. What trains, by ``learn``:

    * ``step``: scale and zero point (LSQ, LSQ+); * ``clip``: the same, but only what is beyond the range moves them (PACT, Choi et
      al. 2018); * ``ema``: nothing; in training mode the range follows the extremes of each batch, a share ``momentum`` at a time,
      until `freeze`; * ``none``: nothing.

    ``settled`` says that `quantize` puts every value on the grid before `codes` reads it, as a graph does; else `codes` is the only
    call. ``drop`` is the share of numbers that pass unquantized in training mode (QDrop, Wei et al. 2022). Dynamic sites have no
    parameters; `drop` works on them too.
    """

    low: Tensor
    high: Tensor
    frozen: Tensor

    def __init__(
        self, base: Activation, learn: Learn = "step", drop: float = 0.0, settled: bool = False, momentum: float = 0.01
    ) -> None:
        super().__init__()
        self.base, self.drop, self.settled, self.momentum = base, drop, settled, momentum
        self.learn: Learn = learn if base.params is not None and base.params.scale is not None else "none"
        self.steps = Steps(base.format, base.params, scales=self.learn in ("step", "clip"), tables=False) if base.params else None
        if self.learn == "ema" and base.params is not None:
            reach = _covered(base.format, base.params)
            self.register_buffer("low", reach.amin().reshape(1, 1))
            self.register_buffer("high", reach.amax().reshape(1, 1))
            self.register_buffer("frozen", torch.tensor(False))
            self.register_buffer("seen", torch.tensor(False))

    def extra_repr(self) -> str:
        return f"{self.format}:{self.when}, {self.learn}"

    @property
    def format(self) -> Format:
        return self.base.format

    @property
    def when(self) -> When:
        return self.base.when

    @property
    def params(self) -> Stored | None:
        return self._stored(1)

    def kinds(self) -> Kinds:
        return {"weights": [], "rounding": []} | (self.steps.kinds() if self.steps else {"scales": [], "tables": []})

    def freeze(self, on: bool = True) -> None:
        """Keep the range as it is from here on (``ema``)."""
        if self.learn == "ema":
            self.frozen.fill_(on)

    def hard(self) -> Activation:
        """What would be stored now."""
        with torch.no_grad():
            params = self._stored(1)
            return self.base if params is None else replace(self.base, params=params)

    def quantize(self, x: Tensor) -> Tensor:
        if self.steps is None:
            return self._dropped(x, self.base.quantize(x))
        code, scale = self._fresh(x)
        value = (code if scale is None else code * scale).to(x.dtype)
        if scale is not None and not torch.compiler.is_compiling():
            value.made_of = code, scale  # type: ignore[attr-defined]  # for `codes`, as long as the tensor lives
        return value

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.steps is None:
            code, scale = self.base.codes(x)
            return self._dropped(x if scale is None else x / divisor(scale), code), scale
        if not self.settled:
            return self._fresh(x)
        if (found := getattr(x, "made_of", None)) is not None:
            return found
        params = self._stored(x.numel() / max(1, len(x) if x.ndim else 1))
        assert params is not None
        if params.scale is None or self.format.min is not None:
            return x, None
        scale = params.scale.reshape(())
        real = x / divisor(scale)
        if self.training and self.drop:
            return real, scale
        with torch.no_grad():
            level = self.format.decode(self.format.encode(x.reshape(1, -1), params), unscaled(params)).reshape(x.shape)
        return straight(real, level), scale

    def _fresh(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(code - zero, scale) or (value, None) of numbers that no one has quantized yet."""
        fmt = self.format
        if self.learn == "ema" and self.training and not bool(self.frozen):
            self._observe(x.detach())
        params = self._stored(x.numel() / max(1, len(x) if x.ndim else 1))
        assert params is not None
        factor = params.scale is not None and fmt.min is None
        row = x.reshape(1, -1)
        if factor and self.learn != "clip" and isinstance(fmt.grid, Uniform):
            value = _Rounded.apply(row.float(), params.scale, params.offset, *fmt.extremes)
        else:
            with torch.no_grad():
                codes = fmt.encode(row, params)
            value = fmt.decode(codes, still(unscaled(params) if factor else params))
            if torch.is_grad_enabled():
                pull = passing(fmt, row.float(), params, fmt.decode(codes, params) if self.learn == "clip" else None)
                value = value + (pull if factor or params.scale is None else pull * params.scale.detach())
        value = value.reshape(x.shape)
        if not factor:
            return self._dropped(x, value), None
        assert params.scale is not None
        scale = params.scale.reshape(())
        return self._dropped(x / divisor(scale), value) if self.training and self.drop else value, scale

    def _dropped(self, real: Tensor, value: Tensor) -> Tensor:
        """A random share of the numbers as they were."""
        if not (self.training and self.drop):
            return value
        return torch.where(torch.rand(real.shape) < self.drop, real, value.to(real.dtype))

    def _observe(self, x: Tensor) -> None:
        low, high = x.float().amin().reshape(1, 1), x.float().amax().reshape(1, 1)
        self.low.lerp_(low, self.momentum)
        self.high.lerp_(high, self.momentum)
        self.seen.fill_(True)  # type: ignore[operator]

    def _stored(self, count: float) -> Stored | None:
        if self.steps is None:
            return None
        if self.learn == "ema" and bool(self.seen):
            with torch.no_grad():
                return self.format.store(self.format.from_range(self.low, self.high))
        return self.steps.stored(count)
