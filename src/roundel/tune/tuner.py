"""The one loop that trains a quantized window towards the float one; where windows come from and what is kept is not here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PlanError
from ..evaluate.scores import FLOOR
from ..graph.module import Interpreter
from .windows import Values, results

Rounding = Literal["straight", "sigmoid", "sign"]
Loss = Literal["mse", "kl"]

#: What is trained under each rounding, and its learning rate: see `Tuning.rates`.
RATES: dict[str, dict[str, float]] = {
    "sigmoid": {"rounding": 1e-2, "activations": 1e-2, "rest": 1e-2},
    "sign": {"rounding": 5e-3, "scales": 2e-3, "tables": 2e-3, "activations": 1e-2, "rest": 1e-2},
    "straight": {"weights": 1e-2, "scales": 2e-3, "tables": 2e-3, "activations": 1e-2, "rest": 1e-2},
}

#: Kinds whose rate is in units of the root mean square of each tensor; the others are relative or bounded by themselves.
SIZED = ("weights", "rest")

#: How often a run is judged on the way.
CHECKS = 8


@dataclass(frozen=True)
class Tuning:
    """The choices of one run of `tune`.

    * ``rounding``: how codes are searched. sigmoid: each weight goes up or down, by a soft step that hardens (AdaRound, Nagel et
      al. 2020, arXiv 2004.10568). sign: the same by sign-SGD on an offset of half a step at most (AutoRound, Cheng et al. 2023,
      arXiv 2309.05516). straight: the real weight is trained through its rounding (LSQ, Esser et al. 2020, arXiv 1902.08153).
    * ``loss``: mse, the squared error of a window's outputs in units of what it was before; kl, the divergence of the network's
      answers from the float network's.
    * ``rates``: kind of parameter -> learning rate; a kind that is not named is left as it is. Kinds: rounding, weights, scales,
      tables, activations (their scales and zero points), rest (biases and norms). Weights and rest move in units of their own
      root mean square, scales and tables relative to what they were.
    * ``drop``: the share of activations that pass unquantized while training (QDrop, Wei et al. 2022, arXiv 2203.05740).
    * ``batch`` examples a step; ``pull``: how hard the sigmoid is pulled to 0 or 1, in units of the loss at the start.

    >>> Tuning(rounding="sign").rates["scales"]
    0.002
    """

    rounding: Rounding = "straight"
    loss: Loss = "mse"
    rates: Mapping[str, float] = field(default_factory=dict)
    drop: float = 0.5
    batch: int = 32
    pull: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for word, kinds, got in (("rounding", Rounding, self.rounding), ("loss", Loss, self.loss)):
            if got not in get_args(kinds):
                raise PlanError(f"{word}={got!r}: there are {', '.join(get_args(kinds))}")
        known = {kind for rates in RATES.values() for kind in rates}
        if odd := sorted(self.rates.keys() - known):
            raise PlanError(f"there is no kind of parameter {odd[0]!r} to give a rate; there are {', '.join(sorted(known))}")
        if not 0 <= self.drop < 1:
            raise PlanError(f"drop={self.drop}: the share of activations that pass unquantized is at least 0 and below 1")
        if self.batch < 1:
            raise PlanError(f"batch={self.batch}: a step needs an example")
        if not self.rates:
            object.__setattr__(self, "rates", RATES[self.rounding])


#: Called after each step as ``told(steps done, steps in all)``.
Told = Callable[[int, int], None]


def distance(loss: Loss, got: Values, wanted: Values) -> Tensor:
    """How far a window's outputs are from those wanted, a mean over all examples; of the first output alone where it is kl.

    >>> distance("mse", {"y": torch.tensor([[1.0, 3.0]])}, {"y": torch.tensor([[1.0, 1.0]])}).item()
    2.0
    """
    if loss == "mse":
        return torch.stack([(got[name] - wanted[name]).square().mean() for name in wanted]).sum()
    name = next(iter(wanted))
    return F.kl_div(_log_shares(got[name], wanted[name]), _log_shares(wanted[name], wanted[name]), log_target=True,
                    reduction="none").sum(-1).mean()  # fmt: skip


def _log_shares(answer: Tensor, real: Tensor) -> Tensor:
    """Log-probabilities of logits; of probabilities, which ``real`` shows, with the floor that `evaluate` gives them."""
    if bool((real >= 0).all()) and bool(((real.sum(-1) - 1).abs() < 1e-3).all()):
        shares = answer.clamp(min=0) + FLOOR
        return (shares / shares.sum(-1, keepdim=True)).log()
    return F.log_softmax(answer, -1)


def mean_distance(loss: Loss, module: Interpreter, values: Sequence[Values], wanted: Sequence[Values]) -> float:
    """`distance` over entries of uneven sizes, each example counted alike."""
    total = count = 0.0
    with torch.no_grad():
        for env, goal in zip(values, wanted, strict=True):
            n = len(next(iter(goal.values())))
            total += n * float(distance(loss, results(module, env), goal))
            count += n
    return total / max(1.0, count)


@torch.enable_grad()
def tune(module: Interpreter, values: Sequence[Values], wanted: Sequence[Values], kinds: Mapping[str, Sequence[nn.Parameter]],
         how: Tuning, steps: int, unit: float, judge: Callable[[], float] | None = None,
         pull: Callable[[float], Tensor] | None = None, told: Told | None = None) -> None:  # fmt: skip
    """Train ``module`` in place for ``steps`` steps so that its outputs on ``values`` come near ``wanted``.

    ``values`` and ``wanted`` are entries of one batch each; where there is one entry alone, each step draws its examples from it.
    ``kinds`` are the trainable parameters by kind. ``unit`` is the loss that counts as 1. ``judge`` is asked `CHECKS` times on the
    way, in evaluation mode, for the loss on examples held out, and the least leaves its parameters behind. ``pull(beta)`` is the
    mean distance of soft roundings from 0 and 1. The same arguments give the same bytes on one thread; the global generator is
    left as it was.
    """
    groups = []
    for kind, params in kinds.items():
        for param in params if how.rates.get(kind) else ():
            size = float(param.detach().square().mean().sqrt()) if kind in SIZED else 1.0
            groups.append({"params": [param], "base": how.rates[kind] * (size or 1.0), "kind": kind})
    if not groups or steps < 1:
        return
    trained = [param for group in groups for param in group["params"]]  # type: ignore[attr-defined]
    checks = {math.ceil(steps * (i + 1) / CHECKS) for i in range(CHECKS)} if judge else set()
    best, least = [param.detach().clone() for param in trained], math.inf
    optimizer = torch.optim.Adam(groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        module.train()
        for step in range(steps):
            env, goal = _draw(values, wanted, how.batch)
            done = step / steps
            loss = distance(how.loss, results(module, env), goal) / unit
            if pull is not None and done >= 0.2:
                loss = loss + how.pull * pull(2 + 9 * (1 + math.cos(math.pi * (done - 0.2) / 0.8)))
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * _warmth(group["kind"], how.rounding, done)
                if how.rounding == "sign" and group["kind"] == "rounding":
                    _sign_step(group)
            optimizer.step()
            if judge and step + 1 in checks:
                module.eval()
                if (now := judge()) < least:
                    best, least = [param.detach().clone() for param in trained], now
                module.train()
            if told:
                told(step + 1, steps)
        module.eval()
    if judge:
        with torch.no_grad():
            for param, kept in zip(trained, best, strict=True):
                param.copy_(kept)


def _warmth(kind: str, rounding: Rounding, done: float) -> float:
    """The share of its rate that a kind is trained with: a soft rounding until it has hardened, AutoRound's falling on a line, all
    others on a cosine."""
    if kind == "rounding":
        return 1.0 if rounding == "sigmoid" else 1 - done
    return 0.5 * (1 + math.cos(math.pi * done))


def _sign_step(group: dict[str, Any]) -> None:
    """Sign-SGD in place of the optimizer's step."""
    with torch.no_grad():
        for param in group["params"]:
            if param.grad is not None:
                param.sub_(group["lr"] * param.grad.sign()).clamp_(-0.5, 0.5)
                param.grad = None


def _draw(values: Sequence[Values], wanted: Sequence[Values], batch: int) -> tuple[Values, Values]:
    """Some examples of the one entry, or one of the entries, by the global generator."""
    if len(values) > 1:
        chosen = int(torch.randint(len(values), ()))
        return values[chosen], wanted[chosen]
    count = len(next(iter(wanted[0].values())))
    index = torch.randint(count, (min(batch, count),))
    return _take(values[0], index, count), _take(wanted[0], index, count)


def _take(env: Values, index: Tensor, count: int) -> Values:
    return {name: value[index] if value.ndim and len(value) == count else value for name, value in env.items()}


@torch.enable_grad()
def pace(module: Interpreter, values: Sequence[Values], wanted: Sequence[Values], how: Tuning) -> float:
    """Seconds that one step takes now: the second of two passes there and back, which change nothing."""
    took = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        module.train()
        for _ in range(2):
            start = time.monotonic()
            env, goal = _draw(values, wanted, how.batch)
            distance(how.loss, results(module, env), goal).backward()
            took = time.monotonic() - start
        module.eval()
    module.zero_grad(set_to_none=True)
    return took
