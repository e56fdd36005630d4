"""`Plan`: its text, its resolution to a complete table, and the errors that name what is near; no networks but one."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import roundel as rd
from roundel.plan import Choice, Plan, Rule, Slot, describe

TOML = """
# everything in int8, the head in float, one tensor by its full name
[[rules]]
pattern = "*"
weight = "int8"
activation = "int8"

[[rules]]
pattern = "head"
weight = "float"

[[rules]]
pattern = "stage1.*.weight"
weight = "int4/g32"

[[rules]]
pattern = "head.input"
activation = "int8:token"
"""

PLAN = Plan((Rule("*", "int8", "int8"), Rule("head", "float"), Rule("stage1.*.weight", "int4/g32"),
             Rule("head.input", activation="int8:token")))  # fmt: skip

SLOTS = [
    Slot("stage1.0.conv.weight", "stage1.0.conv", "weight"),
    Slot("stage2.0.conv.weight", "stage2.0.conv", "weight"),
    Slot("head.weight", "head", "weight"),
    Slot("stage2.0.conv", "stage2.0.conv", "activation", ("head.input",)),
    Slot("head", "head", "activation"),
]


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.proves("plan.text")
def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    """By the standard library's own parsers: what a person writes is what the plan holds."""
    assert Plan.read(write(tmp_path, "plan.toml", TOML)) == PLAN
    document = {"rules": tomllib.loads(TOML)["rules"]}
    assert Plan.read(write(tmp_path, "plan.json", json.dumps(document))) == PLAN
    assert json.loads(PLAN.to_json()) == document  # what is not said is not written
    assert Plan.read(write(tmp_path, "again.json", PLAN.to_json().decode())) == PLAN


texts = st.none() | st.text(max_size=8)


@pytest.mark.proves("plan.text")
@given(rules=st.lists(st.builds(Rule, st.text(max_size=8), texts, texts), max_size=4))
def test_json_round_trip(rules: list[Rule], tmp_path_factory: pytest.TempPathFactory) -> None:
    plan = Plan(tuple(rules))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_bytes(plan.to_json())
    assert Plan.read(path) == plan


@pytest.mark.proves("plan.text")
@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.toml", '[[rules]]\npattern = "*"\nweigths = "int8"', "unknown field `weigths`"),
        ("p.toml", 'rule = []\nrules = []', "unknown field `rule`"),
        ("p.toml", "rules = [", "p.toml"),
        ("p.toml", '[[rules]]\nweight = "int8"', "missing required field `pattern`"),
        ("p.toml", '[[rules]]\npattern = "*"\nweight = 8', "Expected `str | null`, got `int`"),
        ("p.json", "{}", "missing required field `rules`"),
        ("p.json", "[" * 100_000, "p.json"),
        ("p.json", '{"rules": {}}', "Expected `array`, got `object`"),
        ("missing.toml", None, "No such file"),
    ],
)  # fmt: skip
def test_damaged_plans_say_where(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        write(tmp_path, name, text)
    with pytest.raises(rd.PlanError) as caught:
        Plan.read(tmp_path / name)
    assert says in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("rules", [("*",), (Rule("*", 8),), (Rule(None),), ({"pattern": "*"},)])  # type: ignore[arg-type]
def test_plans_made_of_other_things(rules: tuple[Rule, ...]) -> None:
    with pytest.raises(rd.PlanError, match=r"a plan is a tuple of Rule\(pattern, weight, activation\), all of them texts"):
        Plan(rules)


@pytest.mark.proves("plan.complete", "mode.rules")
def test_every_slot_is_decided_and_the_last_match_wins() -> None:
    assert describe(PLAN.resolve(SLOTS)) == {
        "stage1.0.conv.weight": "int4/g32*fp16",
        "stage2.0.conv.weight": "int8/channel*fp16",
        "head.weight": "float",
        "stage2.0.conv": "int8/token*fp32~int8:dynamic",  # the input of head, by its alias
        "head": "int8/tensor*fp32~int8",
    }


@pytest.mark.proves("plan.complete")
def test_every_weight_must_be_named_and_an_unnamed_site_is_float() -> None:
    with pytest.raises(rd.PlanError, match=r"no rule of the plan names the weight 'stage1\.0\.conv\.weight'; begin with Rule"):
        Plan((Rule("head", "int4"),)).resolve(SLOTS)
    table = Plan((Rule("*.weight", "int4"),)).resolve(SLOTS)
    assert table.keys() == {slot.name for slot in SLOTS}
    assert [name for name, choice in table.items() if choice is None] == ["stage2.0.conv", "head"]


@pytest.mark.proves("plan.complete")
def test_a_mistake_in_the_last_rule_costs_no_work() -> None:
    """Nothing is calibrated or solved before the whole table stands."""
    net, steps = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), []
    for rule, error in ((Rule("1", "int99"), rd.FormatError), (Rule("2", "int8"), rd.PlanError)):
        with pytest.raises(error):
            rd.quantize(net, plan=Plan((Rule("*", "int8", "int8"), rule)), data=[torch.randn(2, 8)],
                        progress=lambda *step: steps.append(step))  # fmt: skip
    assert steps == []


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("*", 5), ("head", 2), ("head.*", 1), ("stage?", 3), ("stage[12].0", 3), ("stage1", 1), ("*.weight", 3),
        ("stage2.0.conv", 2), ("head.input", 1), ("*.input", 1), ("*conv", 3),
    ],
)  # fmt: skip
def test_patterns_match_names_and_dotted_prefixes(pattern: str, hits: int) -> None:
    table = Plan((Rule("*", "float"), Rule(pattern, "int4", "int4"))).resolve(SLOTS)
    assert sum(choice is not None for choice in table.values()) == hits


@pytest.mark.proves("plan.unmatched")
@pytest.mark.parametrize(
    ("pattern", "near"),
    [("haed", "head"), ("stage1.0.conv1", "stage1.0.conv"), ("HEAD", "stage1"), ("", "head"), ("head ", "head")],
)
def test_a_pattern_that_matches_nothing_names_its_neighbours(pattern: str, near: str) -> None:
    with pytest.raises(rd.PlanError) as caught:
        Plan((Rule("*", "int8"), Rule(pattern, "int4"))).resolve(SLOTS)
    assert f"no layer matches the pattern {pattern!r}; the nearest names are " in str(caught.value)
    assert near in str(caught.value)


@pytest.mark.proves("plan.unmatched")
def test_a_model_without_layers() -> None:
    with pytest.raises(rd.PlanError, match="the model has no layer to quantize"):
        Plan((Rule("*", "int8"),)).resolve([])


@pytest.mark.proves("api.activations")
@pytest.mark.parametrize(
    ("text", "format", "when"),
    [
        ("int8", "int8/tensor*fp32~int8", "static"),
        ("int8:static", "int8/tensor*fp32~int8", "static"),
        ("int8:dynamic", "int8/tensor*fp32~int8", "dynamic"),
        ("int8/token:dynamic", "int8/token*fp32~int8", "dynamic"),
        ("int8:token", "int8/token*fp32~int8", "dynamic"),
        ("int8s", "int8s", "static"),
        ("log4:2", "log4:2", "static"),
        ("log4:2:dynamic", "log4:2", "dynamic"),
    ],
)
def test_when_a_range_is_found(text: str, format: str, when: str) -> None:
    choice = Choice.parse(text, "activation")
    assert (choice.format, choice.when) == (rd.Format.parse(format, "activation"), when)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("int8:dynamic", "weight", "takes no ':dynamic'"),
        ("int8:token", "weight", "takes no ':token'"),
        ("int8:running", "weight", "takes no ':running'"),
        ("cb16", "activation", "learns its table"),
        ("log4:fit", "activation", "learns its table"),
        (":dynamic", "activation", "':dynamic'"),
        ("int8:Dynamic", "activation", "':?int8:Dynamic'|':Dynamic'"),
    ],
)
def test_choices_that_cannot_be(text: str, kind: str, says: str) -> None:
    with pytest.raises(rd.RoundelError, match=says):
        Choice.parse(text, kind)  # type: ignore[arg-type]
