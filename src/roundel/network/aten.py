"""The table from aten operations to the graph's own: one function each, arguments in the schema's order; no tracing, no naming."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .emitter import Const, Emitter, Unsupported, is_symbolic

#: aten operation, or operation and overload -> function of the emitter and the arguments; returns what `Emitter.emit` gave.
ATEN: dict[str, Callable[..., Any]] = {}

#: Operations that give their operand back, in eval mode at least.
PASSING = ("detach", "clone", "contiguous", "alias", "lift_fresh_copy", "dropout", "feature_dropout", "alpha_dropout")


def op_name(target: Any) -> str:
    """``conv2d`` for ``aten.conv2d.default``; for what is no operation of torch, its own name."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return getattr(target, "__name__", str(target))


def translator(target: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """The table's entry for this overload, else for the operation."""
    name = op_name(target)
    return ATEN.get(f"{name}.{target._overloadname}") or ATEN.get(name)


def _aten(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(fn: Callable[..., Any]) -> Callable[..., Any]:
        ATEN.update(dict.fromkeys(names, fn))
        return fn

    return enter


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise Unsupported(what)


# what needs no thought: the operation under its own name or a neighbour's

_UNARY = "relu relu6 sigmoid tanh exp log erf sqrt rsqrt abs neg sin cos silu hardswish hardsigmoid"
for _name in _UNARY.split():
    ATEN[_name] = lambda e, x, *_, op=_name: e.emit(op, x)
for _name in ("mul", "maximum", "minimum"):
    ATEN[_name] = lambda e, x, y, op=_name: e.emit(op, x, y)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    ATEN[_name] = lambda e, x, y, how=_name: e.emit("compare", x, y, how=how)
for _name in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"):
    ATEN[_name] = lambda e, x, *_: e.reshape(x, e.shape(x), e.out.shape)
for _name in PASSING:
    ATEN[_name] = lambda e, x, *_: x
ATEN |= {
    "linear": lambda e, x, w, bias: e.emit("linear", x, w, bias),
    "embedding": lambda e, w, ids, *_: e.emit("embedding", ids, w),
    "square": lambda e, x: e.emit("mul", x, x),
    "reciprocal": lambda e, x: e.emit("div", 1.0, x),
    "log1p": lambda e, x: e.emit("log", e.emit("add", x, 1.0)),
    "expm1": lambda e, x: e.emit("sub", e.emit("exp", x), 1.0),
    "rsub": lambda e, x, y, alpha: e.emit("sub", y, _times(e, x, alpha)),
    "where": lambda e, c, x, y: e.emit("where", c, x, y),
    "masked_fill": lambda e, x, mask, value: e.emit("where", mask, value, x),
    "leaky_relu": lambda e, x, slope: e.emit("leaky_relu", x, slope=float(slope)),
    "prelu": lambda e, x, w: e.emit("prelu", x, w),
    "celu": lambda e, x, alpha: _elu(e, x, alpha, 1.0, 1.0 / alpha),
    "gelu": lambda e, x, approximate: e.emit("gelu", x, approximate=approximate),
    "softmax": lambda e, x, axis, *_: e.emit("softmax", x, axis=axis),
    "log_softmax": lambda e, x, axis, *_: e.emit("log_softmax", x, axis=axis),
    "group_norm": lambda e, x, groups, w, bias, eps, _: e.emit("group_norm", x, w, bias, groups=groups, eps=eps),
    "max": lambda e, x: e.emit("amax", x, axes=_axes(e, x, None), keepdim=False),
    "max.other": lambda e, x, y: e.emit("maximum", x, y),
    "min.other": lambda e, x, y: e.emit("minimum", x, y),
    "amin": lambda e, x, axes, keepdim: e.emit("neg", e.emit("amax", e.emit("neg", x), axes=_axes(e, x, axes), keepdim=keepdim)),
    "std.correction": lambda e, x, *how: e.emit("sqrt", _var(e, x, *how)),
    "permute": lambda e, x, perm: _perm(e, x, perm),
    "t": lambda e, x: _perm(e, x, list(range(len(e.shape(x))))[::-1]),
    "expand": lambda e, x, *_: _to_shape(e, x, e.shape(x), e.out.shape),
    "index_select": lambda e, x, axis, index: e.emit("gather", x, index, axis=axis),
    "pixel_shuffle": lambda e, x, block: e.emit("depth_to_space", x, block=block),
    "upsample_nearest1d": lambda e, x, _size, *how: _resize(e, x, how, "nearest", False),
    "upsample_nearest2d": lambda e, x, _size, *how: _resize(e, x, how, "nearest", False),
    "upsample_bilinear2d": lambda e, x, _size, align, *how: _resize(e, x, how, "bilinear", align),
    "adaptive_avg_pool1d": lambda e, x, size: _adaptive(e, x, size, "avg_pool", "mean", count_pad=False),
    "adaptive_avg_pool2d": lambda e, x, size: _adaptive(e, x, size, "avg_pool", "mean", count_pad=False),
    "adaptive_max_pool2d": lambda e, x, size: (_adaptive(e, x, size, "max_pool", "amax"), None),
}


# weighted


def _padding(pairs: Sequence[Sequence[int]]) -> list[int]:
    """(before, after) per axis, first axis first -> torch's flat order, last axis first."""
    return [int(n) for pair in reversed(pairs) for n in pair]


def _each(value: Any, axes: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in (values * axes if len(values) == 1 else values)]


@_aten("conv1d", "conv2d")
def _conv(e: Emitter, x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    axes = len(e.shape(w)) - 2
    _need(len(e.shape(x)) == axes + 2, "an input without a batch axis")
    stride, dilation = _each(stride, axes), _each(dilation, axes)
    if isinstance(padding, str):
        spare = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, e.shape(w)[2:], strict=True)]
        pairs = [(n // 2, n - n // 2) for n in spare]
    else:
        pairs = [(p, p) for p in _each(padding, axes)]
    return e.emit("conv", x, w, bias, stride=stride, padding=_padding(pairs), dilation=dilation, groups=groups)


@_aten("conv_transpose1d", "conv_transpose2d")
def _conv_transpose(
    e: Emitter, x: Any, w: Any, bias: Any, stride: Any, padding: Any, extra: Any, groups: int, dilation: Any
) -> Any:
    axes = len(e.shape(w)) - 2
    stride, padding, extra, dilation = (_each(v, axes) for v in (stride, padding, extra, dilation))
    return e.emit(
        "conv_transpose", x, w, bias, stride=stride, padding=padding, output_padding=extra, dilation=dilation, groups=groups
    )


@_aten("convolution")
def _convolution(
    e: Emitter, x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, flip: bool, extra: Any, groups: int
) -> Any:
    _need(len(e.shape(w)) <= 4, "three-dimensional")
    if flip:
        return _conv_transpose(e, x, w, bias, stride, padding, extra, groups, dilation)
    return _conv(e, x, w, bias, stride, padding, dilation, groups)


@_aten("matmul", "bmm", "mm")
def _matmul(e: Emitter, x: Any, y: Any) -> Any:
    w = e.env[y]
    if isinstance(w, Const) and w.tensor.ndim == 2:  # stored (in, out); a linear layer holds (out, in)
        return e.emit("linear", x, e.form(y, "t", torch.t))
    _need(min(len(e.shape(x)), len(e.shape(y))) >= 2, "a vector operand")
    return e.emit("matmul", x, y)


@_aten("addmm")
def _addmm(e: Emitter, c: Any, x: Any, y: Any, beta: float, alpha: float) -> Any:
    known = isinstance(e.env[y], Const) and isinstance(e.env[c], Const)
    if known and len(e.shape(c)) == 1 and beta == alpha == 1:
        return e.emit("linear", x, e.form(y, "t", torch.t), c)
    return _baddbmm(e, c, x, y, beta, alpha)


@_aten("baddbmm")
def _baddbmm(e: Emitter, c: Any, x: Any, y: Any, beta: float, alpha: float) -> Any:
    product = _times(e, _matmul(e, x, y), alpha)
    return product if beta == 0 else e.emit("add", _times(e, c, beta), product)


@_aten("scaled_dot_product_attention")
def _attention(e: Emitter, q: Any, k: Any, v: Any, mask: Any, drop: float, causal: bool, scale: float | None, gqa: bool) -> Any:
    _need(drop == 0, "dropout at inference")
    _need(not gqa, "enable_gqa; repeat the key and value heads instead")
    scale = 1 / math.sqrt(e.sizes(q, -1)[0]) if scale is None else float(scale)
    return e.emit("attention", q, k, v, mask, scale=scale, causal=causal)


# arithmetic


def _times(e: Emitter, x: Any, factor: float) -> Any:
    return x if factor == 1 else e.emit("mul", x, factor)


@_aten("add")
def _add(e: Emitter, x: Any, y: Any, alpha: float = 1) -> Any:
    return e.emit("add", x, y * alpha if isinstance(y, (int, float)) else _times(e, y, alpha))


@_aten("sub")
def _sub(e: Emitter, x: Any, y: Any, alpha: float = 1) -> Any:
    return e.emit("sub", x, y * alpha if isinstance(y, (int, float)) else _times(e, y, alpha))


@_aten("div")
def _div(e: Emitter, x: Any, y: Any, mode: str | None = None) -> Any:
    _need(mode is None, f"rounding_mode={mode!r}")
    return e.emit("div", x, y)


@_aten("pow")
def _pow(e: Emitter, x: Any, y: Any) -> Any:
    match y:
        case 2:
            return e.emit("mul", x, x)
        case 0.5:
            return e.emit("sqrt", x)
        case -0.5:
            return e.emit("rsqrt", x)
        case -1:
            return e.emit("div", 1.0, x)
    return e.emit("pow", x, y)


@_aten("logical_not", "bitwise_not")
def _not(e: Emitter, x: Any) -> Any:
    _need(x.meta["val"].dtype == torch.bool, "on numbers")
    return e.emit("compare", x, False, how="eq")


@_aten("logical_and", "bitwise_and.Tensor")
def _and(e: Emitter, x: Any, y: Any) -> Any:
    _need(e.out.dtype == torch.bool, "on numbers")
    return e.emit("minimum", x, y)


@_aten("logical_or", "bitwise_or.Tensor")
def _or(e: Emitter, x: Any, y: Any) -> Any:
    _need(e.out.dtype == torch.bool, "on numbers")
    return e.emit("maximum", x, y)


# activations and normalisation


def _bounds(e: Emitter, x: Any, lo: Any = None, hi: Any = None) -> Any:
    if isinstance(lo, fx.Node) or isinstance(hi, fx.Node):
        x = x if lo is None else e.emit("maximum", x, lo)
        return x if hi is None else e.emit("minimum", x, hi)
    lo, hi = (None if v is None or math.isinf(v) else float(v) for v in (lo, hi))
    if lo == 0 and hi in (None, 6.0):
        return e.emit("relu6" if hi else "relu", x)
    return x if lo is hi is None else e.emit("hardtanh", x, lo=lo, hi=hi)


ATEN.update(
    hardtanh=_bounds,
    clamp=_bounds,
    clamp_min=lambda e, x, lo: _bounds(e, x, lo),
    clamp_max=lambda e, x, hi: _bounds(e, x, None, hi),
)


@_aten("elu")
def _elu(e: Emitter, x: Any, alpha: float, scale: float, input_scale: float) -> Any:
    # elu(x) = scale * (x if x > 0 else alpha * (exp(input_scale * x) - 1))
    if input_scale == 1:
        return _times(e, e.emit("elu", x, alpha=float(alpha)), scale)
    rest = _times(e, e.emit("elu", e.emit("hardtanh", _times(e, x, input_scale), lo=None, hi=0.0), alpha=1.0), alpha * scale)
    return e.emit("add", _times(e, e.emit("relu", x), scale), rest)


@_aten("_native_batch_norm_legit_no_training")
def _batch_norm(e: Emitter, x: Any, w: Any, bias: Any, mean: Any, var: Any, _momentum: float, eps: float) -> Any:
    return e.emit("batch_norm", x, mean, var, w, bias, eps=eps), None, None


@_aten("batch_norm")
def _batch_norm_eval(
    e: Emitter, x: Any, w: Any, bias: Any, mean: Any, var: Any, training: bool, _momentum: float, eps: float, _cudnn: bool
) -> Any:
    _need(not training, "statistics of the batch itself at inference")
    return e.emit("batch_norm", x, mean, var, w, bias, eps=eps)


def _over_last(e: Emitter, x: Any, shape: Sequence[int], params: Sequence[Any], emit: Callable[..., Any]) -> Any:
    """A norm over the last axes: those axes become one, are normalised, and come back."""
    if len(shape) == 1:
        return emit(x, *params)
    flat = [*e.shape(x)[: -len(shape)], math.prod(shape)]
    consts = [p and e.form(p, "flat", torch.flatten, e.env[p].name) for p in params]
    return e.reshape(emit(e.reshape(x, e.shape(x), flat), *consts), flat, e.out.shape)


@_aten("layer_norm")
def _layer_norm(e: Emitter, x: Any, shape: Sequence[int], w: Any, bias: Any, eps: float, _cudnn: bool) -> Any:
    return _over_last(e, x, shape, [w, bias], lambda x, *p: e.emit("layer_norm", x, *p, eps=eps))


@_aten("rms_norm")
def _rms_norm(e: Emitter, x: Any, shape: Sequence[int], w: Any, eps: float | None) -> Any:
    eps = torch.finfo(e.out.dtype).eps if eps is None else eps
    return _over_last(e, x, shape, [w], lambda x, *p: e.emit("rms_norm", x, *p, eps=eps))


@_aten("instance_norm")
def _instance_norm(
    e: Emitter, x: Any, w: Any, bias: Any, mean: Any, var: Any, own: bool, _momentum: float, eps: float, _cudnn: bool
) -> Any:
    if own:
        return e.emit("group_norm", x, w, bias, groups=e.sizes(x, 1)[0], eps=eps)
    return e.emit("batch_norm", x, mean, var, w, bias, eps=eps)


# pooling and reduction


def _pool_padding(
    e: Emitter, x: Any, kernel: list[int], stride: list[int], padding: list[int], ceil: bool
) -> list[tuple[int, int]]:
    """(before, after) per axis; ``ceil_mode`` is room for one more window after, which must start inside the input."""
    if not ceil:
        return [(p, p) for p in padding]
    pairs = []
    for size, k, s, p in zip(e.sizes(x, *range(2 - len(e.shape(x)), 0)), kernel, stride, padding, strict=True):
        windows = -(-(size + 2 * p - k) // s) + 1
        windows -= (windows - 1) * s >= size + p
        pairs.append((p, max(p, (windows - 1) * s + k - size - p)))
    return pairs


@_aten("max_pool1d", "max_pool2d", "max_pool2d_with_indices")
def _max_pool(e: Emitter, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Any:
    axes = len(e.shape(x)) - 2
    _need(set(_each(dilation, axes)) == {1}, "dilation")
    kernel, padding = _each(kernel, axes), _each(padding, axes)
    stride = _each(stride, axes) if stride else kernel
    pads = _pool_padding(e, x, kernel, stride, padding, ceil)
    out = e.emit("max_pool", x, kernel=kernel, stride=stride, padding=_padding(pads))
    return out if isinstance(e.out, Tensor) else (out, None)


@_aten("avg_pool1d", "avg_pool2d")
def _avg_pool(
    e: Emitter, x: Any, kernel: Any, stride: Any, padding: Any, ceil: bool, count_pad: bool, divisor: int | None = None
) -> Any:
    axes = len(e.shape(x)) - 2
    _need(divisor is None, "divisor_override")
    kernel, padding = _each(kernel, axes), _each(padding, axes)
    stride = _each(stride, axes) if stride else kernel
    pads = _pool_padding(e, x, kernel, stride, padding, ceil)
    uneven = any(before != after for before, after in pads)
    _need(not (uneven and count_pad and any(padding)), "ceil_mode with counted padding")
    counted = count_pad and any(padding)  # torch never counts the room that ceil_mode adds
    return e.emit("avg_pool", x, kernel=kernel, stride=stride, padding=_padding(pads), count_pad=counted)


def _adaptive(e: Emitter, x: Any, size: Any, pool: str, reduce: str, **attrs: Any) -> Any:
    axes = len(e.shape(x)) - 2
    spatial, size = list(range(2, axes + 2)), _each(size, axes)
    if set(size) == {1}:
        return e.emit(reduce, x, axes=spatial, keepdim=True)
    have = e.sizes(x, *spatial)
    if have == size:
        return x
    _need(all(h % n == 0 for h, n in zip(have, size, strict=True)), f"from {have} to {size}, which does not divide")
    kernel = [h // n for h, n in zip(have, size, strict=True)]
    return e.emit(pool, x, kernel=kernel, stride=kernel, padding=[0] * 2 * axes, **attrs)


def _axes(e: Emitter, x: Any, axes: Any) -> list[int]:
    if axes is None or axes == []:
        return list(range(len(e.shape(x))))
    return [int(a) for a in (axes if isinstance(axes, list) else [axes])]


def _reduction(op: str) -> Callable[..., Any]:
    def translate(e: Emitter, x: Any, axes: Any = None, keepdim: bool = False, *_: Any) -> Any:
        overall = not isinstance(axes, (int, list))  # the overload without axes has a dtype here
        return e.emit(op, x, axes=_axes(e, x, None if overall else axes), keepdim=keepdim is True)

    return translate


ATEN.update(mean=_reduction("mean"), sum=_reduction("sum"), amax=_reduction("amax"))


@_aten("max.dim")
def _max_dim(e: Emitter, x: Any, axis: int, keepdim: bool) -> Any:
    return e.emit("amax", x, axes=[axis], keepdim=keepdim), e.emit("argmax", x, axis=axis, keepdim=keepdim)


@_aten("argmax")
def _argmax(e: Emitter, x: Any, axis: int | None, keepdim: bool) -> Any:
    _need(axis is not None, "over all axes")
    return e.emit("argmax", x, axis=axis, keepdim=keepdim)


@_aten("var.correction")
def _var(e: Emitter, x: Any, axes: Any, correction: float | None, keepdim: bool) -> Any:
    axes = _axes(e, x, axes)
    count, spare = math.prod(e.sizes(x, *axes)), 1 if correction is None else correction
    square = e.emit("squared_difference", x, e.emit("mean", x, axes=axes, keepdim=True))
    return _times(e, e.emit("mean", square, axes=axes, keepdim=keepdim), 1.0 if spare == 0 else count / (count - spare))


@_aten("var_mean.correction")
def _var_mean(e: Emitter, x: Any, axes: Any, correction: float | None, keepdim: bool) -> Any:
    return _var(e, x, axes, correction, keepdim), e.emit("mean", x, axes=_axes(e, x, axes), keepdim=keepdim)


@_aten("linalg_vector_norm")
def _vector_norm(e: Emitter, x: Any, order: float, axes: Any, keepdim: bool, *_: Any) -> Any:
    _need(order == 2, f"of order {order}")
    return e.emit("sqrt", e.emit("sum", e.emit("mul", x, x), axes=_axes(e, x, axes), keepdim=keepdim))


# moving values


def _perm(e: Emitter, x: Any, perm: list[int]) -> Any:
    rank = len(perm)
    perm = [p % rank for p in perm]
    return x if perm == list(range(rank)) else e.emit("transpose", x, perm=perm)


@_aten("transpose")
def _transpose(e: Emitter, x: Any, i: int, j: int) -> Any:
    perm = list(range(len(e.shape(x))))
    perm[i], perm[j] = perm[j], perm[i]
    return _perm(e, x, perm)


@_aten("slice")
def _slice(e: Emitter, x: Any, axis: int, start: Any, stop: Any, step: int) -> Any:
    size = e.shape(x)[axis]
    stop = None if stop is None or str(stop) == str(size) or (not is_symbolic(stop) and stop >= 2**31) else stop
    start = 0 if start is None else start
    _need(not is_symbolic(start) and not is_symbolic(stop), "bounds that depend on the batch")
    if stop is not None and not is_symbolic(size) and stop >= size:
        stop = None
    if (start, stop, step) == (0, None, 1):
        return x
    return e.emit("slice", x, axis=axis, start=int(start), stop=stop, step=step)


def _pick(e: Emitter, x: Any, axis: int, index: int, after: Sequence[Any]) -> Any:
    one = e.emit("slice", x, axis=axis, start=index, stop=index + 1 or None, step=1)
    shape = e.shape(x)
    shape[axis] = 1
    return e.reshape(one, shape, after)


@_aten("select")
def _select(e: Emitter, x: Any, axis: int, index: Any) -> Any:
    _need(isinstance(index, int), "an index that depends on the batch")
    return _pick(e, x, axis, index, e.out.shape)


@_aten("unbind")
def _unbind(e: Emitter, x: Any, axis: int) -> Any:
    return tuple(_pick(e, x, axis, i, one.shape) for i, one in enumerate(e.out))


@_aten("split", "split_with_sizes", "chunk")
def _split(e: Emitter, x: Any, _sizes: Any, axis: int) -> Any:
    parts = [p.shape[axis] for p in e.out]
    _need(not any(is_symbolic(n) for n in parts), "along the batch")
    if len(parts) == 1:
        return (e.env[x],)
    return e.emit("split", x, sizes=[int(n) for n in parts], axis=axis, outputs=len(parts))


@_aten("cat", "concat", "concatenate")
def _cat(e: Emitter, xs: list[Any], axis: int) -> Any:
    xs = [x for x in xs if e.shape(x) != [0]]  # torch ignores such empties
    return e.emit("concat", *xs, axis=axis)


@_aten("stack")
def _stack(e: Emitter, xs: list[Any], axis: int) -> Any:
    shape = list(e.out.shape)
    shape[axis] = 1
    return e.emit("concat", *[e.reshape(x, e.shape(x), shape) for x in xs], axis=axis)


@_aten("pad", "constant_pad_nd")
def _pad(e: Emitter, x: Any, padding: list[int], mode: Any = "constant", value: Any = None) -> Any:
    mode, value = (mode, value) if isinstance(mode, str) else ("constant", mode)  # constant_pad_nd has its value there
    _need(not any(is_symbolic(p) for p in padding), "by a size that depends on the batch")
    padding = [int(p) for p in padding]
    return e.emit("pad", x, padding=padding, value=float(value or 0), mode=mode) if any(padding) else x


def _to_shape(e: Emitter, x: Any, before: Sequence[Any], after: Sequence[Any]) -> Any:
    """Broadcast; a symbolic size can only be met along axis 0, by the batch of an input."""
    lead = [1] * (len(after) - len(before)) + list(before)
    x = e.reshape(x, before, lead)
    changed = [i for i, (m, n) in enumerate(zip(lead, after, strict=True)) if str(m) != str(n)]
    grows = [i for i in changed if is_symbolic(after[i])]
    _need(grows in ([], [0]) and (not grows or str(after[0].node.expr).isidentifier()), "a broadcast to the batch size off axis 0")
    if grows:
        x = e.emit("expand_batch", x, e.batch_like)
    if changed == grows:
        return x
    return e.emit("expand", x, shape=[int(n) if i in changed and i not in grows else -1 for i, n in enumerate(after)])


@_aten("repeat")
def _repeat(e: Emitter, x: Any, repeats: list[Any]) -> Any:
    before = [1] * (len(repeats) - len(e.shape(x))) + e.shape(x)
    out = e.reshape(x, e.shape(x), before)
    for axis, times in enumerate(repeats):
        if not is_symbolic(times) and times != 1 and before[axis] != 1:
            out = e.emit("concat", *[out] * times, axis=axis)
            before[axis] = e.out.shape[axis]
    return _to_shape(e, out, before, e.out.shape)


def _filled(value: Callable[..., Any]) -> Callable[..., Any]:
    """Constructors whose shape holds the batch: one row, repeated."""

    def translate(e: Emitter, *args: Any) -> Any:
        shape = [1 if is_symbolic(n) else int(n) for n in e.out.shape]
        row = Const(torch.full(shape, value(*args), dtype=e.out.dtype))
        if any(is_symbolic(n) for n in e.out.shape[1:]) and not is_symbolic(e.out.shape[0]):
            return Const(row.tensor, single=True)  # the state of a recurrent layer begins so
        return _to_shape(e, e.emit("identity", row), shape, e.out.shape) if shape != list(e.out.shape) else row

    return translate


ATEN.update(dict.fromkeys(["zeros", "zeros_like", "new_zeros"], _filled(lambda *_: 0)))
ATEN.update(dict.fromkeys(["ones", "ones_like", "new_ones"], _filled(lambda *_: 1)))
ATEN.update(full=_filled(lambda _, v, *r: v), full_like=_filled(lambda _, v, *r: v), new_full=_filled(lambda _, __, v, *r: v))


@_aten("index")
def _index(e: Emitter, x: Any, indices: list[Any]) -> Any:
    used = [i for i, ix in enumerate(indices) if ix is not None]
    _need(len(used) == 1 and indices[used[0]].meta["val"].dtype != torch.bool, "by several tensors or by a mask")
    return e.emit("gather", x, indices[used[0]], axis=used[0])


@_aten("flip")
def _flip(e: Emitter, x: Any, axes: list[int]) -> Any:
    for axis in axes:
        x = e.emit("slice", x, axis=axis, start=-1, stop=None, step=-1)
    return x


@_aten("_to_copy", "to", "convert_element_type")
def _cast(e: Emitter, x: Any, *_: Any) -> Any:
    same = x.meta["val"].dtype == e.out.dtype
    return x if same else e.emit("cast", x, dtype=str(e.out.dtype).removeprefix("torch."))


def _resize(e: Emitter, x: Any, how: Sequence[Any], mode: str, align: bool) -> Any:
    """``how`` ends in the scale factors, as one list (the overload ``vec``) or as numbers; none of them sets the size itself."""
    scales = how[0] if how and isinstance(how[0], list) else [s for s in how if s is not None]
    have, size = e.sizes(x, *range(2, len(e.shape(x)))), [int(n) for n in e.out.shape[2:]]
    whole = all(abs(h * s - n) < 1e-6 for h, s, n in zip(have, scales or [], size))
    _need(whole, "a scale factor that does not give whole sizes; pass size= instead")
    return e.emit("resize", x, size=size, mode=mode, align_corners=align)
