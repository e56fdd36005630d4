"""Where running ranges start: the ends of the calibration examples at each site, and how far they wander there; not how they go on
(`network.running`)."""

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
        tracker = started(torch.cat(recorder.recorded), recorder.start)
        if tracker is None:
            notes.append(Note(name, "its range stays: its numbers do not vary", fallback=True))
            continue
        made[name] = replace(q.activations[name], when="running", tracker=tracker)
    return replace(q, activations={**q.activations, **made}, notes=(*q.notes, *notes))


#: How much further than calibration itself a range must be off before it moves.
BEYOND = 1.25


def started(found: Tensor, start: tuple[float, float]) -> Tracker | None:
    """The tracker of a site whose samples have the ends ``found`` (N, 2), under the range ``start``; None where nothing varies.

    Its margin is wide enough that the same samples, shuffled, do not move the range.
    """
    low, high = found.mean(0).tolist()
    if not high > low:
        return None
    tracker = Tracker(low, high)
    at, off = State(low, high, *start), 0.0
    still = replace(tracker, margin=0.0, patience=1)
    for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist():
        at = advance(still, start, at, *found[i].tolist())
        off = max(off, abs(at.low - start[0]), abs(at.high - start[1]))
    return replace(tracker, margin=max(tracker.margin, BEYOND * off / (start[1] - start[0])))
