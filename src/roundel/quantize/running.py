"""Where running ranges start: where the calibration examples themselves bring them; not how they go on (`network.running`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..calibrate import evaluating, one_thread, run
from ..data import Batch
from ..errors import PlanError
from ..graph import BATCH, Graph
from ..network.layer import Activation, PackedWeight
from ..network.running import Running, State, Tracker, advance, ends
from ..network.sites import find_sites
from ..plan import Choice
from ..qmodel import Note, QModel, fake


def unfit(graph: Graph, fixed: Collection[str], activations: Mapping[str, Activation]) -> dict[str, str]:
    """Site -> why its range does not follow what passes; ``fixed`` are those whose ranges hold whatever the data."""
    sites, found = find_sites(graph), {}
    for site in activations:
        values = [name for name, root in sites.root.items() if root == site]
        shapes = [graph.values[name].shape for name in values if name in graph.values and name not in graph.constants]
        low, high = ends(activations[site])
        if site in fixed:
            found[site] = "its operation fixes its range"
        elif len(sites.origin.get(site, ())) != 1 or any(name in graph.constants for name in values):
            found[site] = "several values share its range"
        elif len(shapes) < len(values) or any(shape[:1] != (BATCH,) for shape in shapes):
            found[site] = "its first axis is not the batch"
        elif not high > low:
            found[site] = "nothing but 0 passed in calibration"
    return found


def followed(q: QModel, wanted: Mapping[str, Choice | None], fixed: Collection[str], items: list[Batch]) -> QModel:
    """``q`` with the sites that ``wanted`` runs made running; they start from its static parameters. Those that cannot are static,
    with a note. Raises `PlanError` for formats without a scale, and for a network that is no graph."""
    wanted = {name: choice for name, choice in wanted.items() if choice and choice.when == "running" and name in q.activations}
    names = list(wanted)
    if not names:
        return q
    if not isinstance(q.structure, Graph):
        raise PlanError("running ranges are for networks that can be captured as a graph; use ':dynamic' here")
    if odd := [name for name in names if q.activations[name].format.scale is None]:
        raise PlanError(f"site {odd[0]!r}: {q.activations[odd[0]].format} has no range that could run; leave ':running' away")
    left = unfit(q.structure, fixed, {name: q.activations[name] for name in names})
    notes = [Note(name, f"its range stays: {why}", fallback=name not in fixed) for name, why in left.items()]
    names = [name for name in names if name not in left]
    recorders = {name: Running(replace(q.activations[name], when="running")) for name in names}
    with one_thread(), torch.no_grad():
        module = fake(q, PackedWeight, {**q.activations, **recorders})
        with evaluating(module):
            for item in items:
                run(module, item)
    made: dict[str, Activation] = {}
    for name, recorder in recorders.items():
        room = 1.0 if name in q.structure.inputs else Tracker.room
        tracker = started(torch.cat(recorder.recorded), recorder.sides, recorder.start, room)
        if tracker is None:
            notes.append(Note(name, "its range stays: its numbers do not vary", fallback=True))
            continue
        made[name] = replace(q.activations[name], when="running", tracker=tracker)
    return replace(q, activations={**q.activations, **made}, notes=(*q.notes, *notes))


#: Samples of calibration, drawn with repetition, that a range settles on.
DRAWN = 512


def started(found: Tensor, sides: tuple[bool, bool], start: tuple[float, float], room: float) -> Tracker | None:
    """The tracker of a site whose calibration samples have the ends ``found`` (N, 2), from where these, in random order, bring the
    static range ``start``; None where nothing varies."""
    low, high = found.mean(0).tolist()
    if not high > low:
        return None
    tracker, at = Tracker(*start, room=room), State(*start)
    for i in torch.randint(len(found), (DRAWN,), generator=torch.Generator().manual_seed(0)).tolist():
        _, at = advance(tracker, sides, at, *found[i].tolist())
    return Tracker(at.low, at.high, room=room)
