"""Guided Hessians against naive loops and exact expectations; end-to-end tuning on networks small enough to run here."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.fisher import hessians
from roundel.graph import GraphModule
from roundel.tune.endtoend import Teaching, tune_model


class Net(nn.Module):
    """Images (N, 2, 6, 6) -> (N, 4): a convolution of two groups and a linear layer, both with ReLU after them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.mid, self.head = nn.Linear(36, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.head(F.relu(self.mid(x.flatten(1))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def graph(model: nn.Module, x: Tensor) -> GraphModule:
    return GraphModule(rd.fuse(rd.capture(model, (x,)))).eval()


@pytest.mark.proves("stats.guided")
def test_the_mean_over_draws_is_the_exact_fisher() -> None:
    """For the head, s_i has a closed form: the mean over outputs j of p_j (1 - p_j), whatever label is drawn."""
    model, x = net(), torch.randn(5, 2, 6, 6)
    with torch.no_grad():
        inside = F.relu(model.mid(F.relu(model.conv(x)).flatten(1)))
        p = model.head(inside).softmax(1).double()
    s = (p * (1 - p)).mean(1)
    wanted = inside.double().T @ (s[:, None] * inside.double())
    many = [Batch((x.repeat(40, 1, 1, 1),))]
    got = sum(hessians(model, many, {"head.weight"}, guided=True, seed=i)["head.weight"] for i in range(10))[0] / (400 * 1e6)
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.02 * float(wanted.diagonal().mean()))


@pytest.mark.proves("stats.guided")
def test_every_layer_against_one_example_at_a_time() -> None:
    """The gradient at each output place by autograd through a network that is written out; the labels are those that were drawn."""
    model, x = net(), torch.randn(6, 2, 6, 6)
    found = hessians(model, [Batch((x,))], guided=True, seed=3)
    with torch.no_grad():
        labels = torch.multinomial(model(x).softmax(-1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    wanted = {name: torch.zeros_like(h) for name, h in found.items()}
    for one, label in zip(x, labels, strict=True):
        a = model.conv(one[None])
        b = model.mid(F.relu(a).flatten(1))
        c = model.head(F.relu(b))
        da, db, dc = torch.autograd.grad(1e3 * F.cross_entropy(c, label[None]), (a, b, c))
        for name, inside, slope in (("mid", F.relu(a).flatten(1), db), ("head", F.relu(b), dc)):
            row = inside.detach().double()
            wanted[f"{name}.weight"][0] += slope.double().square().mean() * row.T @ row
        padded = F.pad(one, (1, 1, 1, 1)).double()
        for group in range(2):
            for i in range(3):
                for j in range(3):
                    patch = padded[group, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(1, -1)
                    weight = da[0, 2 * group : 2 * group + 2, i, j].double().square().mean()
                    wanted["conv.weight"][group] += weight * patch.T @ patch
    for name, h in found.items():
        torch.testing.assert_close(h, wanted[name], rtol=1e-4, atol=1e-4 * float(wanted[name].abs().amax()))


@pytest.mark.proves("stats.guided")
@pytest.mark.parametrize("guided", [False, True])
def test_a_graph_and_its_modules_give_the_same(guided: bool) -> None:
    """Activation functions that the graph fused into its layers come after the outputs whose gradients count."""
    model, x = net(), torch.randn(6, 2, 6, 6)
    real = graph(model, x)
    assert any(node.attrs.get("act") for node in real.structure.nodes)
    ours, theirs = (hessians(m, [Batch((x,))], guided=guided) for m in (real, model))
    assert ours.keys() == theirs.keys()
    for name, h in ours.items():
        torch.testing.assert_close(h, theirs[name], rtol=1e-4, atol=1e-4 * float(h.abs().amax()))


@pytest.mark.proves("stats.guided", "stats.threads")
def test_threads_seeds_and_what_is_left_behind() -> None:
    model, x = net(), torch.randn(40, 2, 6, 6)
    before = copy.deepcopy(model.state_dict())
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(hessians(model, [Batch((x,))], guided=True))
    torch.set_num_threads(1)
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)
    other = hessians(model, [Batch((x,))], guided=True, seed=1)
    assert not torch.equal(other["head.weight"], found[0]["head.weight"])
    assert list(hessians(model, [Batch((x,))], {"mid.weight"})) == ["mid.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(rd.InputError, match="guided Hessians need gradients"):
        hessians(model, [Batch((x,))], guided=True)


# -- end to end --------------------------------------------------------------------------------------------------------


def batches(count: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [Batch((torch.randn(32, 2, 6, 6, generator=generator),)) for _ in range(count)]


@pytest.mark.proves("tune.endtoend")
@pytest.mark.parametrize("as_graph", [False, True])
@pytest.mark.parametrize("text", ["int2", "cb2@tensor/channel*int8"])
def test_the_whole_network_comes_nearer_and_keeps_its_bytes(text: str, as_graph: bool) -> None:
    model = net()
    with torch.no_grad():
        model.head.weight.mul_(8)
    real = graph(model, batches(1, 0)[0].args[0]) if as_graph else model
    q = rd.quantize(real, text)
    how = Teaching(steps=60, rates={"weights": 2e-2, "scales": 1e-2, "tables": 1e-2, "rest": 1e-2})
    new = tune_model(q, real, batches(6, 1), batches(3, 2), how)
    assert "end-to-end tuning of 60 steps kept" in new.notes[-1].text
    assert new.nbytes == q.nbytes
    assert {name: t.format for name, t in new.tensors.items()} == {name: t.format for name, t in q.tensors.items()}
    score = [b.args[0] for b in batches(3, 3)]
    before, after = (rd.evaluate(m, against=model, data=score, latency=False, layers=False).kl for m in (q, new))
    assert after < 0.6 * before  # type: ignore[operator]
    again = tune_model(q, real, batches(6, 1), batches(3, 2), how)
    assert all(torch.equal(again.tensors[name].codes, t.codes) for name, t in new.tensors.items())
    assert all(torch.equal(again.rest[name], t) for name, t in new.rest.items())


@pytest.mark.proves("tune.endtoend")
def test_what_does_not_help_is_not_kept() -> None:
    model = net()
    q = rd.quantize(model, "int8")
    new = tune_model(q, model, batches(2, 1), batches(2, 2), Teaching(steps=5, rates={"rest": 10.0}))
    assert "end-to-end tuning of 5 steps not kept" in new.notes[-1].text
    assert new.tensors is q.tensors


@pytest.mark.proves("tune.endtoend")
def test_a_time_budget_becomes_steps_that_are_told() -> None:
    model = net()
    new = tune_model(rd.quantize(model, "int2"), model, batches(2, 1), batches(2, 2), Teaching(seconds=0.3))
    steps = int(new.notes[-1].text.split("tuning of ")[1].split()[0])
    assert steps >= 3


@pytest.mark.proves("tune.endtoend")
def test_what_training_refuses() -> None:
    with pytest.raises(rd.PlanError, match="steps= or seconds="):
        Teaching()
    with pytest.raises(rd.PlanError, match="steps= or seconds="):
        Teaching(steps=1, seconds=1)
    with pytest.raises(rd.PlanError, match="there is no kind of parameter 'momentum'"):
        Teaching(steps=1, rates={"momentum": 1})
    model = net()
    with pytest.raises(rd.InputError, match="learns from some batches and is judged on others"):
        tune_model(rd.quantize(model, "int2"), model, batches(1, 0), [], Teaching(steps=1))
    with pytest.raises(rd.InputError, match="nothing trains"):
        tune_model(rd.quantize(model, "int2"), model, batches(1, 0), batches(1, 1), Teaching(steps=1, rates={}))
