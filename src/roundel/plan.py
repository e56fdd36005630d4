"""`Plan`: which tensor and which site gets which format, as rules a person can read, edit and diff; not how they were found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import msgspec

from .errors import PlanError
from .formats.format import Format
from .formats.grid import Codebook

When = Literal["static", "dynamic", "running"]

#: In a rule: leave it as it is.
FLOAT = "float"


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """For layers, tensors or sites that ``pattern`` matches: the weight's and the activation's format, each a text or ``"float"``.

    An activation text may end in ``:static`` (the default), ``:dynamic`` or ``:running``. None leaves what an earlier rule said.
    """

    pattern: str
    weight: str | None = None
    activation: str | None = None


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ordered rules; the last match wins. A pattern is a shell wildcard over names such as ``layer1.0.conv1``,
    ``layer1.0.conv1.weight`` or any dotted prefix of them.

    >>> plan = Plan((Rule("*", weight="int8"), Rule("head", weight="float")))
    >>> plan.resolve([Slot("conv.weight", "conv", "weight"), Slot("head.weight", "head", "weight")])["head.weight"] is None
    True
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, Rule) or not all(
                isinstance(v, str) for v in (rule.pattern, rule.weight or "", rule.activation or "")
            ):
                raise PlanError(f"a plan is a tuple of Rule(pattern, weight, activation), all of them texts; got {rule!r}")

    def resolve(self, slots: Iterable[Slot]) -> dict[str, Choice | None]:
        """Slot name -> its `Choice`, None for float. Raises `PlanError` for a rule that matches nothing, with the nearest names,
        and for a weight that no rule names; a site that no rule names is computed in float."""
        slots = list(slots)
        table: dict[str, Choice | None] = {}
        used = [False] * len(self.rules)
        for slot in slots:
            text, named = None, False
            for i, rule in enumerate(self.rules):
                if _matches(rule.pattern, slot):
                    used[i] = named = True
                    text = (rule.weight if slot.kind == "weight" else rule.activation) or text
            if slot.kind == "weight" and not named:
                raise PlanError(
                    f'no rule of the plan names the weight {slot.name!r}; begin with Rule("*", weight="float") or another format'
                )
            table[slot.name] = None if text in (None, FLOAT) else Choice.parse(text, slot.kind)
        for rule, hit in zip(self.rules, used, strict=True):
            if not hit:
                names = sorted({slot.layer for slot in slots} | {slot.name for slot in slots})
                near = difflib.get_close_matches(rule.pattern, names, 3, 0.3) or names[:3]
                told = f"the nearest names are {', '.join(near)}" if near else "the model has no layer to quantize"
                raise PlanError(f"no layer matches the pattern {rule.pattern!r}; {told}")
        return table

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """A plan from a TOML or JSON file; `PlanError` says where it is wrong."""
        path = Path(path)
        try:
            data = path.read_bytes()
            decode = msgspec.json.decode if path.suffix == ".json" else msgspec.toml.decode
            return decode(data, type=cls)
        except OSError as err:
            raise PlanError(f"plan {path}: {err.strerror}") from err
        except (msgspec.DecodeError, RecursionError) as err:
            raise PlanError(f"plan {path}: {err}") from err

    @classmethod
    def of(cls, weights: str | None, activations: str | None = None, exclude: Iterable[str] = ()) -> Plan:
        """One rule for everything, then one that leaves float whatever is excluded."""
        base = Rule("*", FLOAT if weights is None else weights, FLOAT if activations is None else activations)
        return cls((base, *(Rule(pattern, FLOAT, FLOAT) for pattern in exclude)))


@dataclass(frozen=True)
class Slot:
    """A thing that a plan decides: a weight tensor, or an activation at a site, of one layer. ``aliases`` are the ``layer.input``
    names of a site: patterns that end so find it, others do not."""

    name: str
    layer: str
    kind: Literal["weight", "activation"]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A format and when its parameters are computed."""

    format: Format
    when: When = "static"

    @classmethod
    def parse(cls, text: str, kind: Literal["weight", "activation"]) -> Choice:
        """Read ``FORMAT[:static|:dynamic|:running|:token]``; ``int8:token`` is short for ``int8/token:dynamic``."""
        when: When = "static"
        head, _, tail = text.rpartition(":")
        if tail == "token" and head:
            text, when = f"{head}/token", "dynamic"
        elif tail in ("static", "dynamic", "running") and head:
            text, when = head, tail  # type: ignore[assignment]
        if kind == "weight" and when != "static":
            raise PlanError(f"weights are stored, so their format {text!r} takes no ':{tail}'")
        if size_of(text) is not None:
            raise PlanError(f"{text!r} is a size, which `quantize` finds a format of weights for; here a format is needed")
        format = Format.parse(text, kind)
        if kind == "activation" and isinstance(format.grid, Codebook):
            raise PlanError(
                f"{text!r} learns its table from numbers that are stored; activations take intN, uintN, fpN, nf4 or logN"
            )
        return cls(format, when)


def size_of(text: str | None) -> float | None:
    """The number of bits per weight that a size such as "4.25 bits" asks for; None for a format, or ``"float"``.

    >>> size_of("4.25 bits"), size_of("3bit"), size_of("int4/g32")
    (4.25, 3.0, None)
    """
    if text is None or not re.search(r"bits?\s*$", text, re.IGNORECASE):
        return None
    found = re.fullmatch(r"\s*(\d{1,4}(?:\.\d{1,9})?)\s*bits?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None or not float(found[1]):
        raise PlanError(f"a size is a number of bits per weight, such as '4.25 bits'; got {text[:60]!r}")
    return float(found[1])


def _matches(pattern: str, slot: Slot) -> bool:
    parts = slot.name.split(".")
    names = {slot.name, slot.layer, *(".".join(parts[:i]) for i in range(1, len(parts)))}
    if pattern.endswith(".input"):
        names.update(slot.aliases)
    return any(fnmatchcase(name, pattern) for name in names)


def describe(table: Mapping[str, Choice | None]) -> dict[str, Any]:
    """The resolved table as JSON-ready text."""
    return {name: FLOAT if c is None else str(c.format) + ("" if c.when == "static" else f":{c.when}") for name, c in table.items()}
