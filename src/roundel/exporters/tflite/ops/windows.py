"""Operations over windows: the operand N, H, W, C with its padding, the result from it, and pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ....errors import PlanError
from ....graph import Node
from ..layout import channels_last, moved, plain
from ..translation import Pad, Translation, act


@dataclass(frozen=True)
class Places:
    """An operand of a convolution or pool, N, H, W, C, TFLite's padding of it (0 SAME, 1 VALID), and the steps of its windows."""

    tensor: int
    padding: int
    stride: Sequence[int] = (1, 1)


def places(t: Translation, node: Node, reach: Sequence[int], stride: Sequence[int], code: int | None = None,
            pad: bool = True) -> Places:  # fmt: skip
    """The operand of ``node`` for windows of ``reach``: padded by an operator of its own where neither SAME nor VALID says it."""
    name = node.inputs[0]
    order = channels_last(t.rank(name))
    x, shape = t.value(name, order), moved(t.shape(name), order)
    flat = node.attrs.get("padding", [0, 0] * (len(shape) - 2))
    pads: list[Pad] = list(zip(flat[::2], flat[1::2]))[::-1]
    if len(shape) == 3:
        shape, pads = (shape[0], 1, *shape[1:]), [(0, 0), *pads]
        x = t.reshape(x, t.like(name, f"{node.name}.rows", plain(3), shape))
    if any(map(any, pads)) and pads == [same_padding(n, k, s) for n, k, s in zip(shape[1:3], reach, stride)]:
        return Places(x, 0, stride)
    if any(map(any, pads)) and not pad:
        raise PlanError(f"its padding {flat} is left out of the mean and is not TFLite's SAME")
    x = t.padded(name, x, [(0, 0), *pads, (0, 0)], f"{node.name}.padded", code)
    sizes = t.draft.tensors[x].shape[1:3]  # a window as large as its axis has no next one, and NPUs want small steps
    return Places(x, 1, [1 if n == k else s for n, k, s in zip(sizes, reach, stride)])


def same_padding(size: int, reach: int, stride: int) -> Pad:
    """TFLite's SAME padding of one axis."""
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def place(t: Translation, node: Node, step: Callable[[int], int]) -> None:
    """Write ``node``'s value, N, H, W, C; one of three axes loses its height of 1 again."""
    rank = t.rank(node.name)
    order = channels_last(rank)
    made = t.result(node, order)
    if rank == 4:
        step(made)
        return
    shape = moved(t.shape(node.name), order)
    t.reshape(step(t.like(node.name, f"{node.name}.rows", plain(3), (shape[0], 1, *shape[1:]))), made)


def pool(t: Translation, node: Node) -> None:
    """MAX_POOL_2D or AVERAGE_POOL_2D."""
    line = t.rank(node.name) == 3
    kernel, stride = ([1] * line + list(node.attrs[key]) for key in ("kernel", "stride"))
    mean = node.op == "avg_pool"
    x = places(t, node, kernel, stride, code=t.units(node.name).range[0], pad=not mean)
    kind = "AVERAGE_POOL_2D" if mean else "MAX_POOL_2D"
    fused = act(t, node)
    place(t, node, lambda made: t.draft.step(
        kind, 2, [x.tensor], made, "Pool2DOptions", padding=x.padding, strideH=x.stride[0], strideW=x.stride[1],
        filterHeight=kernel[0], filterWidth=kernel[1], fusedActivationFunction=fused))  # fmt: skip
