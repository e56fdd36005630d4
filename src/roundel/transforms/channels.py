"""`Channels`: which channels of a network may be scaled without changing what it computes, and the scaling; by how much is not
decided here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..graph import BATCH, OPS, Graph, Node
from ..graph.ops import MISFIT
from ..network.layer import WEIGHTED

#: The class of what must keep its scale.
FIXED = torch.zeros((), dtype=torch.long)


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor and the class of each of its entries: ``index`` broadcasts to the tensor's shape. ``layer`` is whose it is."""

    name: str
    index: Tensor
    layer: str = ""


@dataclass(frozen=True, eq=False)
class Reader:
    """A weighted layer that multiplies a scaled value by its weight.

    ``site`` is the value's name as `watching` tells it, ``classes`` broadcasts to the value, ``weight.index`` to the weight.
    """

    layer: str
    op: str
    attrs: Mapping[str, Any]
    weight: Place
    site: str
    classes: Tensor


@dataclass(frozen=True, eq=False)
class Channels:
    """Classes 0 to ``count`` - 1 of channels that can only be scaled together; class 0 is never scaled.

    For any positive factor per class, dividing the ``made`` tensors (outputs of layers: rows of weights, biases, gains of norms)
    and
    multiplying the weights of the ``readers`` leaves the network's function as it is. Between them lie operations with f(x / s) =
    f(x) / s. ``clips`` are ReLU6 nodes between, whose bound has to move along.
    """

    count: int
    made: tuple[Place, ...]
    readers: tuple[Reader, ...]
    clips: tuple[Place, ...] = ()

    def scaled(self, tensors: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
        """The tensors that change, for ``factor`` (count,): what is made is divided by it, what reads is multiplied."""
        factor = factor.double().clone()
        factor[0] = 1.0
        out: dict[str, Tensor] = {}
        for place in {place.name: place for place in self.made}.values():
            out[place.name] = tensors[place.name].detach().double() / factor[place.index]
        for place in {reader.weight.name: reader.weight for reader in self.readers}.values():
            tensor = out.get(place.name, tensors[place.name].detach().double())
            out[place.name] = tensor * factor[place.index]
        return {name: tensor.to(tensors[name].dtype) for name, tensor in out.items()}

    def largest(self, tensor: Tensor, index: Tensor) -> Tensor:
        """(count,): the largest magnitude in ``tensor`` of each class of ``index``, which broadcasts to it; 0 where there is
        none."""
        wide = index.expand(tensor.shape).reshape(-1)
        found = torch.zeros(self.count, dtype=torch.float64)
        return found.scatter_reduce(0, wide, tensor.detach().double().abs().reshape(-1), "amax")

    def single(self) -> Tensor:
        """(count,): whether one layer alone makes a class."""
        makers = torch.zeros(self.count, dtype=torch.long)
        for layer in {place.layer for place in self.made}:
            makers[torch.cat([place.index.reshape(-1) for place in self.made if place.layer == layer]).unique()] += 1
        return (makers == 1) & (torch.arange(self.count) > 0)

    def groups(self) -> Tensor:
        """(count,): the group of each class; classes of one group meet in a layer's input or in one tensor that is divided."""
        links = [p.index for p in self.made] + [r.classes for r in self.readers]
        rows = [torch.stack([ids[0].expand(len(ids)), ids]) for link in links if len(ids := link[link > 0].reshape(-1))]
        return _components(self.count, torch.cat(rows, 1) if rows else torch.zeros(2, 0, dtype=torch.long))


def _components(count: int, pairs: Tensor) -> Tensor:
    """Labels of the components of a graph over ``count`` points with edges ``pairs`` (2, n); that of point 0 is 0."""
    edges = coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0].numpy(), pairs[1].numpy())), shape=(count, count))
    labels = torch.from_numpy(connected_components(edges, directed=False)[1].astype(np.int64))
    first = labels[0].clone()
    return torch.where(labels == first, 0, torch.where(labels < first, labels + 1, labels))


# -- finding them in a graph ------------------------------------------------------------------------------------------


def find_channels(graph: Graph, clips: bool = True) -> Channels:
    """The channels of a graph.

    ``clips=False`` fixes channels that a ReLU6 could cut; one that provably never does, by the bounds of its inputs, is a ReLU
    here.

    >>> import torch
    >>> from roundel import capture, fuse
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    >>> found = find_channels(fuse(capture(net, torch.zeros(1, 3, 6, 6))))
    >>> found.count, [place.name for place in found.made], [reader.weight.name for reader in found.readers]
    (9, ['0.weight', '0.bias'], ['2.weight'])
    """
    return _Walk(graph, clips).run()


class _Walk:
    """The ids of every value as it is made, each broadcasting to the value with a batch of 1, and which ids must be one class."""

    def __init__(self, graph: Graph, clips: bool) -> None:
        self.graph = graph
        self.count = 1
        self.ids: dict[str, Tensor] = dict.fromkeys(graph.inputs, FIXED)
        self.pairs: list[Tensor] = []
        self.made: list[Place] = []
        self.readers: list[Reader] = []
        self.clips: list[Place] = []
        self.moving = clips
        self.free = frozenset[str]() if clips else _unclipped(graph)
        self.frozen: set[str] = set()  # constants that some operation needs as they are
        self.touched: set[str] = set()

    # ids

    def fresh(self, *shape: int) -> Tensor:
        size = int(np.prod(shape))
        self.count += size
        return torch.arange(self.count - size, self.count).reshape(shape)

    def same(self, a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(a, b)
        self.pairs.append(torch.stack([a.reshape(-1), b.reshape(-1)]))

    def fix(self, *names: str) -> None:
        for name in names:
            if name:
                self.same(self.of(name), FIXED)

    def of(self, name: str) -> Tensor:
        """The ids of a value; a constant in an activation's place is scaled with what it meets, entry by entry."""
        self.touched.add(name)
        if name not in self.ids:
            tensor = self.graph.constants[name]
            self.ids[name] = self.fresh(*tensor.shape) if tensor.is_floating_point() else FIXED
            if tensor.is_floating_point():
                self.made.append(Place(name, self.ids[name], name))
        return self.ids[name]

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name in self.graph.constants:
            return tuple(self.graph.constants[name].shape)
        spec = self.graph.values.get(name)
        return None if spec is None else tuple(1 if size == BATCH else int(size) for size in spec.shape)

    def constant(self, name: str) -> Tensor | None:
        found = self.graph.constants.get(name)
        return found if found is not None and found.is_floating_point() else None

    # the walk

    def run(self) -> Channels:
        for node in self.graph.nodes:
            self.touched.clear()
            out = _RULES.get(node.op, _fixed)(self, node)
            self.frozen |= {name for name in node.inputs if name in self.graph.constants} - self.touched
            if node.attrs.get("act") == "relu6" or node.op == "relu6":
                self.clip(node, out)
            self.ids.update(zip(node.outputs, out if isinstance(out, tuple) else (out,), strict=True))
        self.fix(*self.graph.outputs)
        self.shared()
        label = _components(self.count, torch.cat(self.pairs, 1) if self.pairs else torch.zeros(2, 0, dtype=torch.long))
        made = torch.zeros(self.count, dtype=torch.bool)
        read = made.clone()
        for place in self.made:
            made[label[place.index]] = True
        for reader in self.readers:
            read[label[reader.weight.index]] = True
        useful = made & read
        useful[0] = False
        final = torch.where(useful, useful.cumsum(0), 0)[label]
        places = [Place(place.name, final[place.index], place.layer) for place in self.made]
        readers = [replace(r, weight=Place(r.weight.name, final[r.weight.index]), classes=final[r.classes]) for r in self.readers]
        clips = [Place(place.name, final[place.index]) for place in self.clips]
        return Channels(
            1 + int(useful.sum()),
            tuple(place for place in places if place.index.any()),
            tuple(reader for reader in readers if reader.weight.index.any()),
            tuple(place for place in clips if place.index.any()),
        )

    def clip(self, node: Node, out: Any) -> None:
        if self.moving or node.name in self.free:
            self.clips.append(Place(node.name, out))
        else:
            self.same(out, FIXED)

    def shared(self) -> None:
        """A tensor used twice is scaled once: alike in all its uses, or not at all where the uses differ."""
        for name in {place.name for place in self.made} | {reader.weight.name for reader in self.readers}:
            rows = [place.index for place in self.made if place.name == name]
            reads = [reader.weight.index for reader in self.readers if reader.weight.name == name]
            shapes = [len({index.shape for index in uses}) for uses in (rows, reads)]
            alike = len({len(rows), len(reads)} - {0}) == 1 and max(shapes) == 1 and name not in self.frozen
            for uses in (rows, reads):
                for index in uses:
                    self.same(index, uses[0] if alike else FIXED)

    def read(self, node: Node, index: Tensor, x: Tensor) -> None:
        self.touched.add(node.inputs[1])
        self.readers.append(Reader(node.name, node.op, node.attrs, Place(node.inputs[1], index), node.inputs[0], x))

    def write(self, node: Node, name: str, index: Tensor) -> None:
        self.touched.add(name)
        self.made.append(Place(name, index, node.name))


def _fixed(walk: _Walk, node: Node) -> Any:
    """What is not known to scale."""
    walk.fix(*(name for name in node.inputs if name not in walk.graph.constants))
    walk.frozen.update(name for name in node.inputs if name in walk.graph.constants)
    return FIXED if len(node.outputs) == 1 else (FIXED,) * len(node.outputs)


def _same(walk: _Walk, node: Node) -> Tensor:
    return walk.of(node.inputs[0])


def _along(ids: Tensor, axes: Iterable[int]) -> bool:
    """Whether ids do not change along ``axes``."""
    return not ids.ndim or all(ids.shape[axis] == 1 for axis in axes)


def _window(walk: _Walk, node: Node) -> Any:
    """Pooling and resizing over the axes behind the channels."""
    ids = walk.of(node.inputs[0])
    return ids if _along(ids, range(2, ids.ndim)) else _fixed(walk, node)


def _reduce(walk: _Walk, node: Node) -> Any:
    ids, axes = walk.of(node.inputs[0]), node.attrs["axes"]
    if not ids.ndim or not _along(ids, axes):
        return _fixed(walk, node)
    return ids if node.attrs.get("keepdim") else ids.sum(tuple(axes))  # of one each


def _aligned(ids: Tensor, rank: int) -> Tensor:
    return ids.reshape((1,) * (rank - ids.ndim) + ids.shape) if ids.ndim else ids


def _sum(walk: _Walk, node: Node) -> Any:
    """add, sub, maximum, minimum, where: all operands on one scale."""
    operands = node.inputs[1:] if node.op == "where" else node.inputs
    found = [walk.of(name) for name in operands]
    if any(ids is FIXED for ids in found):
        return _fixed(walk, node)
    for ids in found[1:]:
        walk.same(*(_aligned(one, max(one.ndim for one in found)) for one in (found[0], ids)))
    return torch.broadcast_tensors(*found)[0]


def _product(walk: _Walk, node: Node) -> Any:
    """The first operand that can be scaled carries the scale, the other keeps its own."""
    a, b = node.inputs
    if node.op == "mul" and (a in walk.graph.constants or walk.of(a) is FIXED):
        a, b = b, a
    if a in walk.graph.constants:
        return _fixed(walk, node)
    if b in walk.graph.constants:
        walk.frozen.add(b)
    else:
        walk.fix(b)
    ids, shape = walk.of(a), walk.shape(node.name)
    return FIXED if shape is None else _aligned(ids, len(shape))


def _move(walk: _Walk, node: Node) -> Any:
    """The ids move as the numbers do."""
    operands = node.inputs if node.op == "concat" else node.inputs[:1]
    found, shapes = [walk.of(name) for name in operands], [walk.shape(name) for name in operands]
    if all(ids is FIXED for ids in found) or None in shapes:
        return _fixed(walk, node)
    wide = [ids.expand(shape) for ids, shape in zip(found, shapes, strict=True) if shape is not None]
    rest = [walk.graph.constants.get(name) for name in node.inputs[len(operands) :]]
    try:
        moved = OPS[node.op](*wide, *rest, **node.attrs)
    except MISFIT:
        return _fixed(walk, node)
    parts = [_small(part) for part in (moved if isinstance(moved, tuple) else (moved,))]
    if any(part.ndim and part.shape[0] != 1 for part in parts):  # no longer alike for all examples
        return _fixed(walk, node)
    return tuple(parts) if isinstance(moved, tuple) else parts[0]


def _small(ids: Tensor) -> Tensor:
    """The axes along which nothing changes, cut to one."""
    for axis in range(ids.ndim):
        first = ids.narrow(axis, 0, 1)
        if ids.shape[axis] > 1 and bool((ids == first).all()):
            ids = first
    return ids


def _pad(walk: _Walk, node: Node) -> Any:
    """Zeros have any scale; where a border repeats numbers, only axes along which ids do not change may have one."""
    ids, padding = walk.of(node.inputs[0]), list(node.attrs["padding"])
    zero = node.attrs.get("mode", "constant") == "constant" and not node.attrs.get("value", 0.0)
    shape = walk.shape(node.inputs[0])
    if not ids.ndim or shape is None:
        return _fixed(walk, node)
    for i in range(0, len(padding), 2):
        axis = ids.ndim - 1 - i // 2
        if ids.shape[axis] == 1 and (shape[axis] > 1 or zero):
            padding[i : i + 2] = [0, 0]
    if not zero and (any(padding) or node.attrs.get("mode", "constant") == "constant"):
        return _fixed(walk, node)
    wide = F.pad(ids, padding, value=-1)
    hole = wide < 0
    wide[hole] = walk.fresh(int(hole.sum()))
    return wide


def _batch(walk: _Walk, node: Node) -> Tensor:
    return walk.of(node.inputs[0])


def _weighted(walk: _Walk, node: Node) -> Any:
    """Reads its input's scale and makes a new one, where weight and bias are stored."""
    x, w, b = (*node.inputs, "")[:3]
    ids, weight = walk.of(x), walk.constant(w)
    if weight is None or (b and walk.constant(b) is None):
        return _fixed(walk, node)
    shape = walk.shape(x)
    if ids.ndim and shape is not None:
        channels = len(shape) - 1 if node.op == "linear" else len(shape) - weight.ndim + 1
        if not _along(ids, [axis for axis in range(ids.ndim) if axis != channels]):
            walk.fix(x)
        vector = ids.expand(shape)[tuple(slice(None) if axis == channels else 0 for axis in range(ids.ndim))]
        walk.read(node, _columns(node, weight, vector), ids)
    elif ids.ndim:
        walk.fix(x)
    out = weight.shape[0] if node.op != "conv_transpose" else weight.shape[1] * node.attrs.get("groups", 1)
    made = walk.fresh(out)
    walk.write(node, w, _rows(node, weight, made))
    if b:
        walk.write(node, b, made)
    rank = len(walk.shape(node.name) or ())
    if not rank:
        walk.same(made, FIXED)
        return FIXED
    return made.reshape([-1 if axis == (rank - 1 if node.op == "linear" else 1) else 1 for axis in range(rank)])


def _columns(node: Node, weight: Tensor, ids: Tensor) -> Tensor:
    """The ids of a weight's inputs, in its own axes."""
    if node.op == "linear":
        return ids[None]
    ones, groups = [1] * (weight.ndim - 2), node.attrs.get("groups", 1)
    if node.op == "conv_transpose":
        return ids.reshape(-1, 1, *ones)
    return ids.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0).reshape(*weight.shape[:2], *ones)


def _rows(node: Node, weight: Tensor, ids: Tensor) -> Tensor:
    """The ids of a weight's outputs, in its own axes."""
    ones, groups = [1] * (weight.ndim - 2), node.attrs.get("groups", 1)
    if node.op != "conv_transpose":
        return ids.reshape(-1, 1, *ones)
    return ids.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0).reshape(*weight.shape[:2], *ones)


def _embedding(walk: _Walk, node: Node) -> Any:
    weight, rank = walk.constant(node.inputs[1]), len(walk.shape(node.name) or ())
    if weight is None or not rank:
        return _fixed(walk, node)
    made = walk.fresh(weight.shape[1])
    walk.write(node, node.inputs[1], made[None])
    return _aligned(made, rank)


def _norm(walk: _Walk, node: Node) -> Any:
    """A norm undoes its input's scale as a whole but not per channel; its stored gain and shift make a new one."""
    gain, shift = (*node.inputs[3 if node.op == "batch_norm" else 1 :], "", "")[:2]
    walk.fix(node.inputs[0])
    rank = len(walk.shape(node.name) or ())
    if not rank or walk.constant(gain) is None or (shift and walk.constant(shift) is None):
        return FIXED
    made = walk.fresh(walk.graph.constants[gain].numel())
    for name in filter(None, (gain, shift)):
        walk.write(node, name, made)
    axis = 1 if node.op in ("batch_norm", "group_norm") else rank - 1
    return made.reshape([-1 if i == axis else 1 for i in range(rank)])


def _matmul(walk: _Walk, node: Node) -> Any:
    """Columns of the second operand pass; what is summed over must have one scale."""
    a, b = node.inputs
    ids = walk.of(b)
    if node.attrs.get("transpose_b") or ids.ndim < 2 or ids.shape[-2] != 1 or walk.constant(b) is not None:
        return _fixed(walk, node)
    walk.fix(a)
    return _aligned(ids, len(walk.shape(node.name) or ()) or ids.ndim)


def _attention(walk: _Walk, node: Node) -> Any:
    q, k, v, *mask = node.inputs
    walk.fix(q, k, *mask)
    ids = walk.of(v)
    if not ids.ndim or ids.shape[-2] != 1:
        walk.fix(v)
        return FIXED
    return ids


_Rule = Callable[[_Walk, Node], Any]
_RULES: dict[str, _Rule] = {
    op: rule
    for rule, ops in (
        (_same, "identity relu relu6 leaky_relu prelu neg abs"),
        (_window, "max_pool avg_pool resize"),
        (_reduce, "mean sum amax"),
        (_sum, "add sub maximum minimum where"),
        (_product, "mul div"),
        (_move, "reshape transpose slice split concat expand gather depth_to_space"),
        (_pad, "pad"),
        (_batch, "expand_batch"),
        (_weighted, " ".join(op for op in WEIGHTED if op != "embedding")),
        (_embedding, "embedding"),
        (_norm, "layer_norm rms_norm batch_norm group_norm"),
        (_matmul, "matmul"),
        (_attention, "attention"),
    )
    for op in ops.split()
}


# -- ReLU6 ------------------------------------------------------------------------------------------------------------


def _unclipped(graph: Graph) -> frozenset[str]:
    """ReLU6 nodes whose inputs provably stay below 6: bounds that hold for every input of the network."""
    bounds: dict[str, tuple[float, float]] = {}
    found = set()
    inf = float("inf")
    for node in graph.nodes:
        x = bounds.get(node.inputs[0], (-inf, inf)) if node.inputs else (-inf, inf)
        if node.op in ("conv", "linear") and node.inputs[1] in graph.constants and x[1] - x[0] < inf:
            weight = graph.constants[node.inputs[1]].double().flatten(1)
            low, high = min(x[0], 0.0), max(x[1], 0.0)  # padding is zero
            bias = graph.constants.get((*node.inputs, "")[2], torch.zeros(()))
            up = weight.clamp(min=0).sum(1) * high + weight.clamp(max=0).sum(1) * low + bias.double()
            down = weight.clamp(min=0).sum(1) * low + weight.clamp(max=0).sum(1) * high + bias.double()
            out = (float(down.min()), float(up.max()))
        elif node.op in ("sigmoid", "softmax", "tanh"):
            out = (-1.0 if node.op == "tanh" else 0.0, 1.0)
        elif node.op in ("relu", "relu6", "max_pool", "avg_pool", "mean", "reshape", "transpose", "slice", "identity"):
            out = x
        else:
            out = (-inf, inf)
        act = node.op if node.op in ("relu", "relu6") else node.attrs.get("act")
        if act == "relu6" and out[1] <= 6:
            found.add(node.name)
        if act:
            out = (max(out[0], 0.0), min(max(out[1], 0.0), 6.0 if act == "relu6" else inf))
        bounds[node.name] = out
    return frozenset(found)


def scaled_graph(graph: Graph, channels: Channels, factor: Tensor) -> Graph:
    """``graph`` with its channels divided by ``factor`` (count,) where they are made and multiplied where they are read.

    A ReLU6 on a scaled channel becomes a ReLU and a ``minimum`` with 6 / factor, one bound per channel.
    """
    constants = dict(channels.scaled(graph.constants, factor))
    factor = factor.double().clone()
    factor[0] = 1.0
    bounds = {place.name: place.index for place in channels.clips if bool((factor[place.index] != 1).any())}
    free_ones = _unclipped(graph) if bounds else frozenset[str]()
    renamed: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        node = msgspec.structs.replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if node.name not in bounds:
            nodes.append(node)
            continue
        free = {*graph.constants, *graph.inputs, *(out for n in graph.nodes for out in n.outputs)}
        bound, clipped = (_free(f"{node.name}.{what}", free) for what in ("bound", "clipped"))
        bare = {**node.attrs, "act": "relu"} if "act" in node.attrs else node.attrs
        nodes += [Node("relu" if node.op == "relu6" else node.op, node.inputs, node.outputs, bare)]
        if node.name in free_ones:  # no number reaches the bound, so there is none to move
            continue
        nodes += [Node("minimum", (node.name, bound), (clipped,), {})]
        constants[bound] = (6 / factor[bounds[node.name]]).float()
        renamed[node.name] = clipped
    values = {**graph.values, **{new: graph.values[old] for old, new in renamed.items() if old in graph.values}}
    outputs = tuple(renamed.get(name, name) for name in graph.outputs)
    return replace(graph, nodes=tuple(nodes), constants={**graph.constants, **constants}, outputs=outputs, values=values)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def members(channels: Channels, classes: Tensor) -> tuple[Sequence[Place], Sequence[Reader]]:
    """What makes and what reads any of ``classes`` (a mask over them)."""
    made = [place for place in channels.made if bool(classes[place.index].any())]
    return made, [reader for reader in channels.readers if bool(classes[reader.classes].any())]
