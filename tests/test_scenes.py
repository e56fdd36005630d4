"""Composed scenes, their metrics by hand-worked cases, and the detector and U-Net of scripts/scenes.py down to C."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scenes as S
import torch
from click.testing import CliRunner
from conftest import needs_data
from sklearn.datasets import load_digits
from torch import Tensor, nn

import roundel as rd
from roundel.data import Batch
from roundel.gate import split
from roundel.graph import Graph, GraphModule
from roundel.network.sites import find_sites
from roundel.plan import Plan, Rule
from roundel.runtimes import hostc
from roundel.transforms import widen

needs_cc = pytest.mark.skipif(hostc.absent() is not None, reason=str(hostc.absent()))


digits = cache(load_digits)


def a_pool(only: int | None = None) -> S.Pool:
    """Real digits, of one class alone if asked, on grounds drawn at random: no data needed."""
    raw = digits()
    kept = torch.tensor(raw.target) == only if only is not None else torch.ones(len(raw.target), dtype=torch.bool)
    grounds = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return S.Pool(torch.tensor(raw.images, dtype=torch.float32)[kept] / 16, torch.tensor(raw.target)[kept], grounds)


@cache
def some(count: int, seed: int = 0) -> list[S.Scene]:
    draw = np.random.default_rng(seed)
    return [S.compose(a_pool(), draw) for _ in range(count)]


# -- scenes -----------------------------------------------------------------------------------------------------------


def test_boxes_and_classes_say_what_the_mask_holds() -> None:
    found = some(40)
    assert {len(scene.boxes) for scene in found} == {1, 2, 3, 4}
    for scene in found:
        assert scene.image.shape == (3, 128, 128)
        left = scene.mask.clone()
        for box, number in zip(scene.boxes.int().tolist(), scene.classes.tolist(), strict=True):
            part = left[box[1] : box[3], box[0] : box[2]]
            assert set(part.unique().tolist()) <= {0, 1 + number}  # nobody else's pixels
            for edge in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert bool(edge.any())  # the box is tight
            part.zero_()
        assert not bool(left.any())  # and there is nothing outside


def test_what_is_not_ink_is_the_ground() -> None:
    source = a_pool()
    source = replace(source, grounds=torch.full((1, 3, 32, 32), 0.25))
    for seed in range(5):
        scene = S.compose(source, np.random.default_rng(seed))
        grown = torch.nn.functional.max_pool2d(scene.mask[None, None].float(), 25, 1, 12)[0, 0]
        assert bool((scene.image[:, grown == 0] == 64).all())
        ink = scene.image[:, scene.mask > 0].float() / 255  # dark grounds have light digits
        assert float(ink.mean()) > 0.45


def test_scenes_come_from_their_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S, "pool", lambda part: a_pool())
    first, again, other = S.scenes("score", 3), S.scenes("score", 3), S.scenes("score", 3, seed=1)
    assert all(torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].image, other[0].image)
    assert not torch.equal(first[0].image, S.scenes("train", 1)[0].image)


def test_parts_share_nothing_and_every_fourth_scene_that_calibrates_is_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    for i, whole in enumerate((1797, 3500)):
        taken = [n for part in S.PARTS.values() for n in range(whole)[part[i]]]
        assert sorted(taken) == list(range(whole))
    monkeypatch.setattr(S, "pool", lambda part: a_pool({"calibrate": 3, "gate": 7}[part]))
    found = S.scenes("calibrate", 12)
    assert [set(scene.classes.tolist()) for scene in found] == [{3}, {3}, {3}, {7}] * 3
    _, held = split([Batch((x,)) for x in S.images(found, 5)])
    assert torch.equal(torch.cat([batch.args[0] for batch in held]), torch.cat(S.images(found[3::4])))


@needs_data
def test_parts_of_the_real_data_share_no_image() -> None:
    pools = [S.pool(part) for part in S.PARTS]
    for name in ("digits", "grounds"):
        parts = [{x.numpy().tobytes() for x in getattr(one, name)} for one in pools]
        assert len(set().union(*parts)) >= sum(map(len, parts)) - 2  # scikit-learn's set itself holds doubles


# -- what networks are told, and say ----------------------------------------------------------------------------------


def test_what_a_detector_is_told_decodes_to_the_objects() -> None:
    """Its targets, taken for its answer, give every box and class, and a perfect score."""
    found = some(30, 1)
    hits = []
    for scene in found:
        wanted = S.wanted_of(scene)
        out = torch.cat([wanted[:4], torch.nn.functional.one_hot(wanted[4].long() + 1, 11).T[1:].float()])
        boxes, classes, scores = S.decoded(out)
        assert sorted(map(tuple, boxes.tolist())) == sorted(map(tuple, scene.boxes.tolist()))
        assert sorted(classes.tolist()) == sorted(scene.classes.tolist())
        assert bool((scores == 1).all())
        hits.append(S.matched((boxes, classes, scores), scene))
    assert S.mean_ap(hits) == 100


def test_cells_lie_row_by_row_on_both_levels() -> None:
    places, strides = S.centres()
    assert places[[0, 1, 16, 255, 256, 257, 264]].tolist() == [[4, 4], [12, 4], [4, 12], [124, 124], [8, 8], [24, 8], [8, 24]]
    assert strides.tolist() == [8.0] * 256 + [16.0] * 64


def test_the_loss_of_detection_is_least_where_the_answer_is_right() -> None:
    wanted = torch.stack([S.wanted_of(scene) for scene in some(4, 2)])
    truth = torch.nn.functional.one_hot(wanted[:, 4].long() + 1, 11).transpose(1, 2)[:, 1:].float()
    right = torch.cat([wanted[:, :4], truth], 1)
    assert float(S.detection_loss(right, wanted)) < 1e-4
    held = wanted[:, 4] >= 0
    moved, unsure = right.clone(), right.clone()
    moved[:, 0][held] += 4.0  # half a stride of 8, a quarter of one of 16, in one of four distances
    unsure[:, 4:] = 0.5
    strides = S.centres()[1].expand_as(wanted[:, 4])[held]
    torch.testing.assert_close(S.detection_loss(moved, wanted), (1 / strides).mean(), rtol=1e-3, atol=1e-4)
    cells = 10 * held.numel() / int(held.sum())
    torch.testing.assert_close(
        S.detection_loss(unsure, wanted), torch.tensor(0.25 * np.log(2) * cells).float(), rtol=1e-4, atol=1e-4
    )
    elsewhere = right.clone()
    elsewhere[:, :4][(~held)[:, None].expand(-1, 4, -1)] = 99.0  # where there is no object, distances mean nothing
    assert torch.equal(S.detection_loss(elsewhere, wanted), S.detection_loss(right, wanted))


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    a = torch.tensor([[0.0, 0, 2, 2], [5, 5, 5, 9]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 1, 2]])
    torch.testing.assert_close(S.overlap(a, b), torch.tensor([[1 / 7, 1, 0, 0.5], [0, 0, 0, 0]]))


def an_answer(*cells: tuple[int, list[float], int, float]) -> Tensor:
    """(4 + classes, cells) that says nothing but (cell, distances, class, score)."""
    out = torch.zeros(14, 320)
    for cell, distances, number, score in cells:
        out[:4, cell] = torch.tensor(distances)
        out[4 + number, cell] = score
    return out


def test_answers_are_thinned_out_class_by_class() -> None:
    here = [4.0, 4, 12, 4]  # of cell 0: 0, 0, 16, 8; the same box from cell 1, 8 pixels to the right, is [12, 4, 4, 4]
    out = an_answer((0, here, 3, 0.6), (1, [12.0, 4, 4, 4], 3, 0.9), (17, [4.0, 4, 4, 4], 3, 0.5), (20, [4.0] * 4, 3, 0.04))
    boxes, classes, scores = S.decoded(out)
    assert boxes.tolist() == [[0, 0, 16, 8], [8, 8, 16, 16]]
    assert classes.tolist() == [3, 3]
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.5]))
    other = an_answer((0, here, 3, 0.6), (1, [12.0, 4, 4, 4], 4, 0.9))
    assert S.decoded(other)[1].tolist() == [4, 3]
    assert S.decoded(an_answer((0, here, 3, 0.9), (1, [4.0, 4, 4, 4], 3, 0.8)))[1].tolist() == [3, 3]  # half of it: not beyond
    assert len(S.decoded(an_answer())[0]) == 0
    assert len(S.decoded(an_answer(*((i, [1.0] * 4, 0, 0.5) for i in range(200))))[0]) == 100


def a_scene(*objects: tuple[list[float], int]) -> S.Scene:
    boxes, classes = torch.tensor([box for box, _ in objects]), torch.tensor([number for _, number in objects])
    return S.Scene(torch.zeros(3, 128, 128, dtype=torch.uint8), boxes, classes, torch.zeros(128, 128, dtype=torch.uint8))


def test_each_object_is_found_once_and_by_its_own_class() -> None:
    scene = a_scene(([0.0, 0, 10, 10], 1), ([20.0, 0, 30, 10], 2))
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 5], [20, 0, 30, 4.9], [60, 60, 70, 70]])
    found = S.matched((boxes, torch.tensor([1, 1, 1, 2, 2, 2]), torch.linspace(0.9, 0.4, 6)), scene)
    assert found.right.tolist() == [True, False, False, True, False, False]  # half shared is enough
    assert found.truth.tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_average_precision_by_hand() -> None:
    def ap(right: list[int], truth: int) -> float:
        return S.average_precision(torch.linspace(0.9, 0.1, len(right)), torch.tensor(right, dtype=torch.bool), truth)

    assert ap([1, 1], 2) == pytest.approx(1)
    assert ap([], 3) == 0
    assert ap([0, 0], 1) == 0
    assert ap([1], 2) == pytest.approx(51 / 101)  # recall 0 to 0.5
    assert ap([0, 1], 1) == pytest.approx(1 / 2)
    assert ap([1, 0, 1], 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert ap([1, 0, 0, 1, 1], 4) == pytest.approx((26 + 50 * 3 / 5) / 101)  # 2 of 4 at 1/2 is beaten by 3 of 5 at 3/4
    assert ap([1, 1, 0], 2) == pytest.approx(1)  # what is wrong after all are found costs nothing


def test_average_precision_equals_the_plain_loop() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        n = int(draw.integers(1, 30))
        right = draw.random(n) < 0.6
        truth = int(right.sum() + draw.integers(1, 4))
        scores = draw.permutation(n) / n
        ranked = right[np.argsort(-scores)]
        total = 0.0
        for percent in range(101):
            reached = [ranked[:k].sum() / k for k in range(1, n + 1) if 100 * ranked[:k].sum() >= percent * truth]
            total += max(reached, default=0.0)
        assert S.average_precision(torch.from_numpy(scores), torch.from_numpy(right), truth) == pytest.approx(total / 101)


def test_map_is_the_mean_over_classes_that_are_there() -> None:
    scene = a_scene(([0.0, 0, 10, 10], 1), ([20.0, 0, 30, 10], 2))
    found = S.matched((scene.boxes[:1], scene.classes[:1], torch.ones(1)), scene)
    assert S.mean_ap([found]) == pytest.approx(50)
    nobody = torch.tensor([[40.0, 40, 50, 50]])
    astray = S.matched((torch.cat([scene.boxes, nobody]), torch.tensor([1, 2, 5]), torch.tensor([0.8, 0.7, 0.9])), scene)
    assert S.mean_ap([astray]) == pytest.approx(100)  # a class of which there is nothing has no precision


def test_miou_by_hand() -> None:
    mask = torch.tensor([[0, 0], [1, 2]], dtype=torch.uint8)
    scene = replace(a_scene(([0.0] * 4, 0)), mask=mask)
    said = torch.tensor([[0, 1], [1, 1]])
    table = S.confusion(torch.nn.functional.one_hot(said, 4).permute(2, 0, 1).float(), scene)
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert S.mean_iou([table]) == pytest.approx(100 * (1 / 2 + 1 / 3 + 0) / 3)
    assert S.mean_iou([table, table]) == pytest.approx(S.mean_iou([table]))


def test_a_difference_is_paired() -> None:
    """Scenes that differ widely, and a loss that is the same in each: the interval knows it."""
    a = [float(n) for n in range(100)]
    off, low, high = S.difference(lambda part: sum(part) / len(part), [x - 1 for x in a], a)
    assert (off, low, high) == pytest.approx((-1, -1, -1))
    off, low, high = S.difference(lambda part: sum(part) / len(part), [x * (-1) ** i for i, x in enumerate(a)], a)
    assert low < off < high


# -- networks ---------------------------------------------------------------------------------------------------------

SMALL = {"detector": lambda: S.Detector(4, 8), "unet": lambda: S.UNet(4)}


def a_task(name: str) -> S.Task:
    return replace(S.TASKS[name], network=SMALL[name], epochs=1, batch=8, scenes=32)


@cache
def a_net(name: str) -> nn.Module:
    """Small, and trained for two steps."""
    net = S.train(a_task(name), some(16), 0, 1)
    if isinstance(net, S.Detector):  # boxes of some size, or nothing would be unlike
        for layer in (net.boxes8, net.boxes16):
            layer.bias.data += 2.0  # type: ignore[union-attr]
    return net


def test_training_repeats_bit_by_bit_and_lowers_the_loss() -> None:
    for name in SMALL:
        task = a_task(name)
        found = some(16)
        first, again = (S.train(task, found, 0, 1).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        x, y = torch.cat(S.images(found)), torch.stack([task.wanted(scene) for scene in found])
        long = S.train(task, found, 0, 12).train()  # its statistics have not settled after so few steps
        with torch.no_grad():
            assert float(task.loss(long(x), y)) < 0.8 * float(task.loss(task.network()(x), y))


@needs_cc
@pytest.mark.proves("result.detector", "result.unet")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("weights", "effort"), [("int8", "fast"), ("int4", "default")])
def test_both_networks_lower_whole_and_equal_c(name: str, weights: str, effort: str) -> None:
    net, (calibration, score) = a_net(name), ([x[:, :, ::2, ::2] for x in S.images(found, 40)] for found in (some(40), some(2, 9)))
    q = rd.quantize(net, weights, "int8", data=calibration, effort=effort, strict=True)
    assert {a.when for a in q.activations.values()} == {"static"}
    assert set(q.tensors) == {f"{key}.weight" for key, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    for dialect in ("R1", "R2"):
        assert rd.lower(q, dialect).opset == "integer"
    found = rd.verify(q, ["host-c"], score)["host-c"]
    assert found.why is None
    assert (found.differing, found.examples) == (0, 2)
    simulated = torch.from_numpy(rd.simulate(rd.lower(q), score[0]))
    with torch.no_grad():
        real, mine = net(score[0]), q.module(score[0])
    assert float((simulated - mine).square().mean()) < 0.1 * float((mine - real).square().mean()) + 1e-9


def test_a_detector_that_gives_two_tensors_is_the_same_network() -> None:
    net, x = a_net("detector"), S.images(some(3))[0]
    apart = S.Detector(4, 8, together=False)
    apart.load_state_dict(net.state_dict())
    scenes = some(3)
    assert torch.equal(S.answers(apart.eval(), scenes), S.answers(net, scenes))
    assert len(apart(x)) == 2


# -- widening ---------------------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """Two linear layers, the second smaller by a factor, joined."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.large, self.small, self.factor = nn.Linear(8, 4), nn.Linear(8, 4), factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.large(x) * self.factor, torch.sigmoid(self.small(x))], 1)[:, :, None]


def sixteen(q: rd.QModel) -> set[str]:
    return {name for name, a in q.activations.items() if a.format.bits == 16}


@pytest.mark.proves("transforms.widen")
def test_parts_of_unlike_size_are_marked_and_nothing_else_changes() -> None:
    x = torch.randn(64, 8)
    for factor, marked in ((1.0, []), (40.0, ["concat"])):
        graph = rd.fuse(rd.capture(Joined(factor).eval(), x))
        module, told = widen(GraphModule(graph), [x])
        assert [node.name for node in module.graph.nodes if node.attrs.get("fine")] == marked
        assert [note.subject for note in told] == marked
        assert torch.equal(module(x), GraphModule(graph)(x))
        assert widen(module, [x])[0] is module  # what is marked stays as it is
    assert "mul reaches" in told[0].text


@pytest.mark.proves("transforms.widen", "transforms.gated")
def test_default_gives_unlike_parts_16_bits_and_a_rule_has_the_last_word() -> None:
    torch.manual_seed(0)
    model, x, unseen = Joined(40.0).eval(), torch.randn(200, 8), torch.randn(100, 8)
    fast, default = (rd.quantize(model, "int8", "int8", data=[x], effort=effort) for effort in ("fast", "default"))
    assert isinstance(default.structure, Graph)
    site = find_sites(default.structure).root["concat"]
    assert sixteen(fast) == set()
    assert sixteen(default) == {site}
    assert [str(rule.activation) for rule in default.plan.rules] == ["int8", "int16s"]
    assert any(note.text.startswith("widening kept") for note in default.notes)
    with torch.no_grad():
        scores = [float((q.module(unseen) - model(unseen))[:, 4:].square().mean()) for q in (fast, default)]
    assert scores[1] < 0.01 * scores[0]
    pinned = rd.quantize(model, plan=Plan((Rule("*", "int8", "int8"), Rule(site, activation="int8"))), data=[x], effort="default")
    assert sixteen(pinned) == set()
    alike = rd.quantize(Joined(1.0).eval(), "int8", "int8", data=[x], effort="default")
    assert not any("widening" in note.text for note in alike.notes)


# -- the script -------------------------------------------------------------------------------------------------------


@needs_data
@needs_cc
def test_every_command_runs_on_a_tiny_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in S.TASKS:
        monkeypatch.setitem(S.TASKS, name, a_task(name))

    def ran(*args: object) -> str:
        done = CliRunner().invoke(S.main, [*map(str, args), "--cache", str(tmp_path)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    ran("train")
    files = sorted(tmp_path.iterdir())
    assert [path.name.split("-")[0] for path in files] == ["detector", "unet"]
    stamps = [path.stat().st_mtime_ns for path in files]
    told = ran("measure", "unet", "--scenes", 2, "--calibrate", 32, "--row", "min-max, W8A8", "--row", "min-max, W4A8")
    assert [line.split("|")[1].strip() for line in told.splitlines() if line.startswith("|")][2:] == [
        "float", "min-max, W8A8", "min-max, W4A8"
    ]  # fmt: skip
    told = ran("verify", "detector", "--scenes", 1, "--calibrate", 32, "--against", "host-c", "--row", "min-max, W8A8, two tensors")
    assert "host-c: 0 of " in told
    assert "min-max W8A8 mAP@.5" in ran("diagnose", "--scenes", 2, "--calibrate", 32)
    assert [path.stat().st_mtime_ns for path in files] == stamps  # trained once


@pytest.mark.soak
@needs_data
@needs_cc
@pytest.mark.proves("result.detector", "result.unet")
@pytest.mark.parametrize("name", S.TASKS)
def test_int8_is_within_a_point_of_float_and_equals_c_on_twenty_scenes(name: str, tmp_path: Path) -> None:
    """The whole: training in its minutes, the score of ours at int8 and at W4A8, and code by code against C."""
    start = S._cpu()
    net = S.trained(name, 0, tmp_path)
    assert S._cpu() - start < 15 * 60  # the U-Net's body is the detector's, so that this is both
    calibration, score = S.scenes("calibrate", 256), S.scenes("score", 300)
    _, figure, judge = S.SCORES[name]

    def scored(module: nn.Module) -> float:
        return figure([judge(out, scene) for out, scene in zip(S.answers(module, score), score, strict=True)])

    ours = S.quantized(net, S.ROWS["ours, W8A8"], calibration, "")
    four, plain = (S.quantized(net, S.ROWS[f"{who}, W4A8"], calibration, "") for who in ("ours", "min-max"))
    real = scored(net)
    assert real > {"detector": 80, "unet": 38}[name]
    assert scored(ours.module) > real - 1
    assert scored(four.module) > scored(plain.module)
    found = rd.verify(ours, ["host-c"], S.images(score[:20]))["host-c"]
    assert found.exact
    assert found.examples == 20
