"""A bank of planted faults over six small networks, and healthy models beside them; what they prove is in test_diagnose.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import roundel as rd
from roundel.calibrate import list_of_batches
from roundel.data import Batch
from roundel.diagnose.edits import with_tensors
from roundel.graph import Graph, GraphModule
from roundel.network.sites import find_sites
from roundel.plan import Plan, Rule
from roundel.qmodel import Note, QModel
from roundel.quantize import _activations
from roundel.quantize.networks import GraphNetwork
from roundel.quantize.weights import round_weights
from roundel.solvers import rtn
from roundel.transforms.channels import find_channels, scaled_graph

#: Examples that train, that a diagnosis sees, and that measure its promise.
TRAIN, SEEN, FRESH = slice(0, 600), slice(600, 1200), slice(1200, 1797)

# -- data -------------------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Real handwritten digits, shuffled: images (1797, 1, 8, 8) from 0 to 1, labels."""
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(5))
    return torch.tensor(raw.images, dtype=torch.float32)[order][:, None] / 16, torch.tensor(raw.target)[order]


def images(part: slice, size: int = 64, labels: bool = False, change: Callable[[Tensor], Tensor] = lambda x: x) -> list[Batch]:
    x, y = digits()
    x = change(x[part])
    return [Batch((a,), target=b if labels else None) for a, b in zip(x.split(size), y[part].split(size), strict=True)]


def ids(part: slice, size: int = 64, **_: Any) -> list[Batch]:
    """Every image as a sentence of 32 words, its levels in pairs of rows."""
    x = (digits()[0][part, 0, ::2] * 16).long().flatten(1)
    return [Batch(named={"input_ids": a}) for a in x.split(size)]


# -- the networks -----------------------------------------------------------------------------------------------------


class Cnn(nn.Module):
    """A residual block between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv4, self.bn4 = nn.Conv2d(12, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        return self.fc(F.relu(self.bn4(self.conv4(x))).flatten(1))


class Separable(nn.Module):
    """Depthwise and pointwise layers in turn, with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.dw1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.pw1, self.bn2 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.dw2, self.bn3 = nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.pw2, self.bn4 = nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu6(self.bn2(self.pw1(F.relu6(self.bn1(self.dw1(x))))))
        x = F.relu(self.bn4(self.pw2(F.relu6(self.bn3(self.dw2(x))))))
        return self.fc(F.avg_pool2d(x, 2).flatten(1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 48), nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class Transformer(nn.Module):
    """One layer over words; its head is the table of its words. The attention is gated, so that its softmax stays a value."""

    def __init__(self, words: int = 17, length: int = 32, width: int = 24) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.head.weight = self.embed.weight
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, length))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.register_buffer("mask", torch.full((length, length), -30.0).triu(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.place
        h = self.norm1(x)
        scores = self.q(h) @ self.k(h).transpose(1, 2) / 4.9 + self.mask
        x = x + self.o((torch.softmax(scores, -1) * self.gate) @ self.v(h))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))


class Detector(nn.Module):
    """Boxes in pixels and scores below one, in one tensor or apart."""

    def __init__(self, pixels: float, together: bool = True) -> None:
        super().__init__()
        self.pixels, self.together = pixels, together
        self.trunk1, self.trunk2 = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 16, 3, 2, 1)
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 6, 1)
        for layer, gain in ((self.trunk1, 2.0), (self.trunk2, 2.0), (self.boxes, 1.5), (self.scores, 8.0)):
            layer.weight.data *= gain

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.trunk2(F.relu(self.trunk1(x))))
        boxes, scores = torch.sigmoid(self.boxes(x)) * self.pixels, torch.sigmoid(self.scores(x))
        return torch.cat([boxes, scores], 1) if self.together else (boxes, scores)


class Unet(nn.Module):
    """Two levels and a lateral layer on the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.low = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)
        self.lateral, self.up = nn.Conv2d(12, 8, 1), nn.ConvTranspose2d(16, 8, 2, 2)
        self.dec, self.out = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enc(x))
        below = F.relu(self.up(F.relu(self.low(F.max_pool2d(x, 2)))))
        return self.out(F.relu(self.dec(torch.cat([F.relu(self.lateral(x)), below], 1))))


def _train(model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor, epochs: int,
           lr: float = 4e-3) -> nn.Module:  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    best = torch.optim.Adam(model.parameters(), lr)
    model.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for index in torch.randperm(len(inputs), generator=draw).split(64):
                best.zero_grad()
                loss(model, inputs[index], targets[index]).backward()
                best.step()
    return model.eval()


def _classes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@cache
def _trained(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x, y = (part[TRAIN] for part in digits())
        if name in ("cnn", "dw", "mlp"):
            model, epochs = {"cnn": (Cnn, 5), "dw": (Separable, 10), "mlp": (Mlp, 12)}[name]
            return _train(model(), _classes, x, y, epochs)
        if name == "normed":
            return _train(Separable(), _classes, (x - x.mean()) / x.std() + 3, y, 10)
        if name == "unet":
            noisy = x + 0.3 * torch.randn(x.shape)
            return _train(Unet(), lambda m, a, b: F.mse_loss(m(a), b), noisy, (x > 0.4).float(), 6)
        if name == "lm":
            words = torch.cat([batch.named["input_ids"] for batch in ids(TRAIN)])
            step = lambda m, a, b: F.cross_entropy(m(a)[:, :-1].flatten(0, 1), b[:, 1:].flatten())  # noqa: E731
            return _train(Transformer(), step, words, words, 5)
        return Detector(*{"boxes100": (100.0,), "boxes640": (640.0,), "apart": (100.0, False)}[name]).eval()


def net(name: str, seed: int = 0) -> Any:
    """A fresh copy of a trained network."""
    return copy.deepcopy(_trained(name, seed))


# -- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A quantized model with something wrong: where and what, what a diagnosis sees, and how fresh data are made."""

    q: QModel
    model: nn.Module
    layers: tuple[str, ...]
    cause: str
    data: list[Batch]
    fresh: list[Batch]
    vnni: bool = True


def _fault(q: QModel, model: nn.Module, layer: str | tuple[str, ...], cause: str, make: Callable[..., list[Batch]] = images,
           data: list[Batch] | None = None, vnni: bool = True, **how: Any) -> Fault:  # fmt: skip
    layers = (layer,) if isinstance(layer, str) else layer
    return Fault(q, model, layers, cause, data or make(SEEN, **how), make(FRESH, **how), vnni)


def _site(q: QModel, value: str) -> str:
    assert isinstance(q.structure, Graph)
    return find_sites(q.structure).root[value]


def _node(q: QModel, op: str, number: int = 0) -> str:
    assert isinstance(q.structure, Graph)
    return [node.name for node in q.structure.nodes if node.op == op][number]


def concat_detector(seed: int, name: str) -> Fault:
    model = net(name, seed)
    q = rd.quantize(model, "int8", "int8", data=images(SEEN))
    return _fault(q, model, _node(q, "concat"), "one scale over concatenated parts")


def concat_skip(seed: int) -> Fault:
    """The skip is 60 times as large as what it meets; the next layer undoes that."""
    model = net("unet", seed)
    model.lateral.weight.data *= 60
    model.lateral.bias.data *= 60
    model.dec.weight.data[:, :8] /= 60
    q = rd.quantize(model, "int8", "int8", data=images(SEEN))
    return _fault(q, model, _node(q, "concat"), "one scale over concatenated parts")


def _stretch(first: Any, second: Any, channel: int, factor: float) -> None:
    """One channel between two layers, larger by a factor; what the two compute is the same."""
    first.weight.data[channel] *= factor
    if first.bias is not None:
        first.bias.data[channel] *= factor
    second.weight.data[:, channel] /= factor


def outlier_mlp(seed: int, weights: str, activations: str | None, factor: float) -> Fault:
    model = net("mlp", seed)
    _stretch(model.fc1, model.fc2, 7, factor)
    q = rd.quantize(model, weights, activations, data=images(SEEN))
    return _fault(q, model, "fc1", "outlier channel")


def outlier_cnn(seed: int) -> Fault:
    """A batch norm that makes one channel of the block large, undone by the next layer; one scale for each weight."""
    model = net("cnn", seed)
    model.bn2.weight.data[3] *= 80
    model.bn2.bias.data[3] *= 80
    model.conv3.weight.data[:, 3] /= 80
    q = rd.quantize(model, "int8/tensor", "int8", data=images(SEEN))
    return _fault(q, model, "conv2", "outlier channel")


def outlier_dw(seed: int) -> Fault:
    """A stem channel that is large before its depthwise filter makes it small."""
    model = net("dw", seed)
    model.bn0.weight.data[5] *= 80
    model.bn0.bias.data[5] *= 80
    model.dw1.weight.data[5] /= 80
    q = rd.quantize(model, "int8", "int8", data=images(SEEN))
    return _fault(q, model, "stem", "outlier channel")


def dead_channel(seed: int, name: str) -> Fault:
    """A channel that its bias keeps at zero, with weights that decide the scale of all."""
    model = net(name, seed)
    layer, norm = {"mlp": ("fc1", None), "cnn": ("conv2", "bn2"), "dw": ("pw1", "bn2")}[name]
    if norm is None:
        model.fc1.weight.data[5] *= 60
        model.fc1.bias.data[5] = -1e3
    else:
        getattr(model, norm).weight.data[5] *= 200
        getattr(model, norm).bias.data[5] = -1e4
    q = rd.quantize(model, "int6/tensor" if name != "cnn" else "int8/tensor", "int8", data=images(SEEN))
    return _fault(q, model, layer, "dead channel")


def calibrated_raw(seed: int, name: str) -> Fault:
    """Calibrated on numbers up to 16 or 255, run on numbers up to 1."""
    model = net(name, seed)
    factor = 16.0 if name == "cnn" else 255.0
    q = rd.quantize(model, "int8", "int8", data=images(SEEN, change=lambda x: x * factor))
    return _fault(q, model, _node_input(q), "wrong preprocessing")


def _node_input(q: QModel) -> str:
    assert isinstance(q.structure, Graph)
    return q.structure.inputs[0]


def labelled_wrong(
    seed: int, name: str, change: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor] = lambda x: x
) -> Fault:
    """The model was quantized well; the data are prepared otherwise."""
    model = net(name, seed)
    q = rd.quantize(model, "int8", "int8", data=images(TRAIN, change=right))
    return _fault(q, model, _node_input(q), "wrong preprocessing", labels=True, change=change)


def unfolded(seed: int, name: str, norm: str) -> Fault:
    """Quantized as captured, batch norms and all, after training left channels of very different size before one of them."""
    model = net(name, seed)
    conv = getattr(model, norm.replace("bn", "conv") if name == "cnn" else {"bn0": "stem", "bn2": "pw1"}[norm])
    bn = getattr(model, norm)
    factor = (
        10 ** torch.linspace(-1.5, 1.5, len(bn.weight))[torch.randperm(len(bn.weight), generator=torch.Generator().manual_seed(1))]
    )
    conv.weight.data *= factor[:, None, None, None]
    bn.running_mean *= factor
    bn.running_var *= factor.square()
    bn.eps = 1e-12
    network = GraphNetwork(rd.capture(model, images(SEEN)[0].args), [])
    plan, items = Plan.of("int8", "int8"), list_of_batches(images(SEEN))
    table = network.resolve(plan)
    with torch.no_grad():
        chosen = _activations(network, table, items, "mse", None, [])
        q = network.finish(round_weights(network, table, None, []), chosen, plan, {"ranges": "mse"}, ())
    return _fault(q, model, norm, "batch norm not folded")


def clipped(seed: int, name: str, op: str, cause: str, share: float, number: int = 0) -> Fault:
    """A site whose range was cut to a share of what it holds."""
    make = ids if name == "lm" else images
    model = net(name, seed)
    q = rd.quantize(model, "int8", "int8", data=make(SEEN))
    site = _site(q, _node(q, op, number))
    old = q.activations[site]
    low, high = old.quantize(torch.tensor([-1e9, 1e9])).tolist()
    params = old.format.store(old.format.from_range(torch.full((1, 1), low), torch.full((1, 1), high * share)))
    q = replace(q, activations={**q.activations, site: replace(old, params=params)})
    return _fault(q, model, site, cause, make)


def overflow(seed: int, name: str) -> Fault:
    """A channel that is its bias alone: its weights, and so the scale of its sums, are next to nothing."""
    model = net(name, seed)
    if name == "mlp":
        model.fc1.weight.data[4], model.fc1.bias.data[4] = 1e-10 * torch.randn(64), 2.0
    else:
        model.bn2.weight.data[4], model.bn2.bias.data[4] = 1e-10, 2.0
    q = rd.quantize(model, "int8/channel*fp32", "int8", data=images(SEEN))
    return _fault(q, model, "fc1" if name == "mlp" else "conv2", "bias overflow")


def saturating(seed: int, name: str) -> Fault:
    """Weights of 7 bits, as a target without VNNI wants them, but for one layer."""
    model, layer = net(name, seed), {"mlp": "fc1", "cnn": "conv1"}[name]
    q = rd.quantize(model, plan=Plan((Rule("*", "int7", "int8"), Rule(layer, "int8"))), data=images(SEEN))
    return _fault(q, model, layer, "saturation without VNNI", vnni=False)


def untied(seed: int, how: str) -> Fault:
    """The float model has one table; it was quantized after the two came apart."""
    model = net("lm", seed)
    other = copy.deepcopy(model)
    other.head.weight = nn.Parameter(other.embed.weight.detach().clone())
    plan = Plan((Rule("*", "int8", "int8"), *([Rule("head", "int3/tensor")] if how == "apart" else [])))
    if how == "changed":
        draw = torch.Generator().manual_seed(0)
        other.head.weight.data += 0.4 * other.head.weight.std() * torch.randn(other.head.weight.shape, generator=draw)
    return _fault(rd.quantize(other, plan=plan, data=ids(SEEN)), model, "head", "broken tie", ids)


def bad_batch(seed: int, name: str) -> Fault:
    """One batch of the calibration data is forty times too large, and ranges are the extremes."""
    data = images(SEEN)
    data[3] = Batch((data[3].args[0] * 40,))
    model = net(name, seed)
    q = rd.quantize(model, "int8", "int8", data=data, ranges="minmax")
    return _fault(q, model, _node_input(q), "bad calibration batch", data=data)


def misled_solver(seed: int) -> Fault:
    """A rounding that was learned on something else: in one layer many weights are a code off the nearest."""
    model = net("mlp", seed)
    q = rd.quantize(model, "int4", "int8", data=images(SEEN))
    old = q.tensors["fc2.weight"]
    scale = old.params.scale
    assert scale is not None
    off = torch.randint(-1, 2, old.shape, generator=torch.Generator().manual_seed(seed)) * scale.abs()
    wrong = rtn(old.dequantize() + off, old.format)
    notes = (*q.notes, Note("model", "reconstruction kept: squared error 0.3 to 0.2 ± 0.01 on 64 held-out examples"))
    return _fault(with_tensors(replace(q, notes=notes), {"fc2.weight": wrong}), model, "fc2", "harmful solver")


def wild_transform(seed: int) -> Fault:
    """Channels scaled by factors a thousand apart, which leaves the float model as it is; one scale for each weight."""
    model = net("dw", seed)
    graph = rd.fuse(rd.capture(model, images(SEEN)[0].args))
    channels = find_channels(graph, False)
    draw = torch.Generator().manual_seed(2)
    factor = torch.where(channels.single(), 10 ** (3 * torch.rand(channels.count, generator=draw) - 1.5), 1.0)
    scaled = GraphModule(scaled_graph(graph, channels, factor)).eval()
    q = rd.quantize(scaled, "int8/tensor", "int8", data=images(SEEN))
    return _fault(q, model, ("stem", "pw2"), "harmful transform")


def few_bits(seed: int) -> Fault:
    model = net("cnn", seed)
    q = rd.quantize(model, plan=Plan((Rule("*", "int8", "int8"), Rule("conv3", "int2"))), data=images(SEEN))
    return _fault(q, model, "conv3", "too few bits")


#: Name -> how to plant it; `FAST` are those that the normal run tries.
FAULTS: dict[str, Callable[[int], Fault]] = {
    "detector, boxes to 100": lambda seed: concat_detector(seed, "boxes100"),
    "detector, boxes to 640": lambda seed: concat_detector(seed, "boxes640"),
    "U-Net, skip 60 times larger": concat_skip,
    "MLP, outlier row, weights alone": lambda seed: outlier_mlp(seed, "int6/tensor", None, 100.0),
    "MLP, outlier channel": lambda seed: outlier_mlp(seed, "int8", "int8", 200.0),
    "CNN, outlier channel, one scale": outlier_cnn,
    "depthwise, outlier channel": outlier_dw,
    "MLP, dead channel": lambda seed: dead_channel(seed, "mlp"),
    "CNN, dead channel": lambda seed: dead_channel(seed, "cnn"),
    "depthwise, dead channel": lambda seed: dead_channel(seed, "dw"),
    "CNN, calibrated on 0..16": lambda seed: calibrated_raw(seed, "cnn"),
    "U-Net, calibrated on 0..255": lambda seed: calibrated_raw(seed, "unet"),
    "MLP, data 0..255": lambda seed: labelled_wrong(seed, "mlp", lambda x: x * 255),
    "CNN, rows for columns": lambda seed: labelled_wrong(seed, "cnn", lambda x: x.transpose(2, 3)),
    "depthwise, no mean and std": lambda seed: labelled_wrong(seed, "normed", lambda x: x, lambda x: (x - x.mean()) / x.std() + 3),
    "CNN, batch norm unfolded": lambda seed: unfolded(seed, "cnn", "bn2"),
    "depthwise, batch norm unfolded": lambda seed: unfolded(seed, "dw", "bn2"),
    "transformer, softmax clipped": lambda seed: clipped(seed, "lm", "softmax", "clipped softmax", 0.15),
    "transformer, GELU clipped": lambda seed: clipped(seed, "lm", "gelu", "clipped GELU", 0.15),
    "CNN, block clipped": lambda seed: clipped(seed, "cnn", "conv", "clipped values", 0.2, 1),
    "MLP, bias overflow": lambda seed: overflow(seed, "mlp"),
    "CNN, bias overflow": lambda seed: overflow(seed, "cnn"),
    "MLP, pairs saturate": lambda seed: saturating(seed, "mlp"),
    "CNN, pairs saturate": lambda seed: saturating(seed, "cnn"),
    "transformer, head quantized apart": lambda seed: untied(seed, "apart"),
    "transformer, head changed": lambda seed: untied(seed, "changed"),
    "CNN, bad batch": lambda seed: bad_batch(seed, "cnn"),
    "U-Net, bad batch": lambda seed: bad_batch(seed, "unet"),
    "MLP, misled solver": misled_solver,
    "depthwise, wild transform": wild_transform,
}

#: A thirty-first, for the last resort.
LAST = {"CNN, one layer at 2 bits": few_bits}


# -- healthy models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Healthy:
    name: str
    seed: int
    how: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} {self.seed} " + " ".join(map(str, self.how.values()))

    def make(self) -> tuple[QModel, nn.Module, list[Batch]]:
        data = ids(SEEN) if self.name == "lm" else images(SEEN, labels=self.name in ("cnn", "dw", "mlp"))
        model = net(self.name, self.seed)
        return rd.quantize(model, data=data, **self.how), model, data


STATIC = {"weights": "int8", "activations": "int8"}
HEALTHY = [
    *(Healthy(name, seed, STATIC) for name in ("cnn", "dw", "mlp", "lm", "unet", "apart") for seed in (0, 1)),
    Healthy("cnn", 0, {"weights": "int4", "activations": "int8", "effort": "default"}),
    Healthy("mlp", 1, {"weights": "int4", "activations": "int8"}),
    Healthy("dw", 0, {"weights": "int8", "activations": "int8", "effort": "default"}),
    Healthy("lm", 0, {"weights": "int4/g32"}),
    Healthy("mlp", 0, {"weights": "nf4/g32"}),
    Healthy("cnn", 1, {"weights": "int8", "activations": "int8:dynamic"}),
    Healthy("unet", 0, {"weights": "int8", "activations": "int8", "ranges": "percentile"}),
    Healthy("mlp", 2, {"weights": "int8/tensor", "activations": "int8", "ranges": "minmax"}),
]
