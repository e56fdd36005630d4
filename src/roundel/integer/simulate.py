"""`simulate`: runs an integer graph as the device will, code for code; what an operation computes is defined in `ops`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..graph import Graph
from ..graph.module import bind_inputs
from . import ops, running
from .dialect import Ints
from .running import Exponents

#: Called as ``watch(name, codes)`` on every value as it is made.
Watch = Callable[[str, Any], None]


def simulate(
    graph: Graph,
    *args: Any,
    codes: bool = False,
    fast: bool = True,
    watch: Watch | None = None,
    state: Exponents | None = None,
    **named: Any,
) -> Any:
    """Outputs of an integer ``graph`` for real inputs, arrays or tensors (N, ...), as NumPy arrays.

    They are dequantized, float32, or with ``codes`` the int64 codes themselves. One output comes back bare, several as a tuple.
    ``fast`` sums products by floating-point routines wherever every partial sum is a whole number that they
    hold, so the codes are the same. Running ranges go from sample to sample: ``state`` is where they begin and is left where they
    end; without it they begin as the device does. Raises `InputError` for inputs that do not fit, `CheckError` for sums that leave
    the range that the graph proves.

    >>> from roundel import lower, quantize
    >>> x = torch.randn(64, 16)
    >>> graph = lower(quantize(torch.nn.Sequential(torch.nn.Linear(16, 4)), "int8", "int8", data=[x]))
    >>> simulate(graph, x).shape, simulate(graph, x, codes=True).dtype
    ((64, 4), dtype('int64'))
    """
    if graph.opset != "integer":
        raise InputError("this graph holds real operations; roundel.lower makes an integer graph of a quantized model")
    tensors = bind_inputs(graph, tuple(map(torch.as_tensor, args)), {k: torch.as_tensor(v) for k, v in named.items()})
    env: dict[str, Any] = {name: as_array(tensor) for name, tensor in tensors.items()}
    if not running.count(graph):
        return _once(graph, env, codes, fast, watch, None)
    state, outs, seen = state or Exponents.of(graph), [], defaultdict[str, list[Any]](list)
    samples = max(map(len, env.values()))
    if not samples:
        return _once(graph, env, codes, fast, watch, state)
    for i in range(samples):
        state.begin()
        one = {name: value[i : i + 1] for name, value in env.items()}
        outs.append(_once(graph, one, codes, fast, lambda name, value: seen[name].append(value), state))
    for name, values in seen.items() if watch else ():
        watch(name, np.concatenate(values))  # type: ignore[misc]
    return tuple(map(np.concatenate, zip(*outs))) if isinstance(outs[0], tuple) else np.concatenate(outs)


def _once(graph: Graph, env: dict[str, Any], codes: bool, fast: bool, watch: Watch | None, state: Exponents | None) -> Any:
    """One batch, of one sample where ranges run."""
    table = ops.INTEGER | FAST if fast else ops.INTEGER
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    kept = {*graph.outputs, *(node.inputs[0] for node in graph if node.op == "dequantize")}
    for i, node in enumerate(graph.nodes):
        operands = [env[name] if name in env else ops.numbers(graph, name) for name in node.inputs]
        try:
            fn = table[node.op]
            running_node = state is not None and "runs" in node.attrs
            env[node.name] = running.run(fn, node, operands, state) if running_node else fn(*operands, **node.attrs)  # type: ignore[arg-type]
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as err:
            shapes = [operand.shape for operand in operands]
            raise InputError(f"{node.name!r} ({node.op}) cannot take operands of shapes {shapes}: {err}") from err
        if watch:
            watch(node.name, env[node.name])
        for name in node.inputs:
            if last_use[name] == i and name not in kept:
                env.pop(name, None)
    source = {node.name: node.inputs[0] for node in graph if codes and node.op == "dequantize"}
    outs = tuple(env[source.get(name, name)] for name in graph.outputs)
    return outs[0] if len(outs) == 1 else outs


def as_array(x: Tensor) -> Any:
    """An input as NumPy holds it; bfloat16, which NumPy lacks, as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


# -- the same sums, faster ----------------------------------------------------------------------------------------------


def _floating(x: Ints, rows: Ints) -> type[np.floating[Any]] | None:
    """A type that holds every partial sum of x by ``rows`` (n, terms) exactly, whatever the order; None if there is none."""
    reach = float(np.abs(x).max(initial=0)) * float(np.abs(rows).sum(1).max(initial=0))
    return np.float32 if reach < 2**24 else np.float64 if reach < 2**53 else None


def _linear_sums(x: Ints, w: Ints) -> Ints:
    dtype = _floating(x, w)
    if dtype is None:
        return ops.linear_sums(x, w)
    return _whole(F.linear(_tensor(x, dtype), _tensor(w, dtype)))


def _product_sums(a: Ints, b: Ints) -> Ints:
    dtype = _floating(a, b.swapaxes(-1, -2).reshape(-1, b.shape[-2]))
    if dtype is None:
        return ops.product_sums(a, b)
    return _whole(torch.matmul(_tensor(a, dtype), _tensor(b, dtype)))


def _conv_sums(x: Ints, w: Ints, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Ints:
    dtype = _floating(x, w.reshape(len(w), -1))
    if dtype is None:
        return ops.conv_sums(x, w, stride, padding, dilation, groups)
    conv = F.conv1d if w.ndim == 3 else F.conv2d
    return _whole(conv(F.pad(_tensor(x, dtype), list(padding)), _tensor(w, dtype), None, tuple(stride), 0, tuple(dilation), groups))


def _tensor(x: Ints, dtype: type[np.floating[Any]]) -> Tensor:
    """A copy: a flipped axis of size 1 keeps its negative stride, which torch has not, in what counts as contiguous."""
    return torch.from_numpy(x.astype(dtype, order="C"))


def _whole(sums: Tensor) -> Ints:
    return sums.to(torch.int64).numpy()


_FASTER = {"conv": _conv_sums, "conv_transpose": _conv_sums, "linear": _linear_sums, "matmul": _product_sums,
           "attention": _product_sums}  # fmt: skip

FAST: dict[str, Callable[..., Any]] = {name: partial(ops.INTEGER[name], sums=sums) for name, sums in _FASTER.items()}
