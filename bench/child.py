"""One run of one peer, in the peer's own environment: `python child.py PEER.py TASK.json OUT`; it scores nothing.

OUT gets ``answer.npy`` (outputs for the images or documents to score) and ``told.json`` (seconds, memory, what was quantized).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
from task import Refused, Task


def cpu() -> float:
    """CPU seconds of this process, its threads and the children that ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def peak() -> int:
    """Highest resident bytes of this program; `getrusage` would begin at what its parent held."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main(peer: str, given: str, out: Path) -> None:
    spec = importlib.util.spec_from_file_location("peer", peer)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{peer} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(peer).parent))  # last: a peer's file may be named like the package it calls
    sys.modules["peer"] = module  # where dataclasses and pickles look for it
    spec.loader.exec_module(module)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
    entry = json.loads(given)
    task = Task(**(entry | {"suite": Path(entry["suite"]), "scratch": Path(entry["scratch"])}))
    start, wall = cpu(), time.perf_counter()
    try:
        made = module.quantize(task)
    except Refused as reason:
        (out / "told.json").write_text(json.dumps({"refused": str(reason)}))
        return
    told = {"seconds": cpu() - start, "wall": time.perf_counter() - wall}
    told["peak"] = peak()
    answer = np.concatenate([np.asarray(made.run(x), np.float32) for x in task.questions()])
    np.save(out / "answer.npy", answer)
    figures = {name: getattr(made, name) for name in ("weights", "activations", "note", "size", "backprop")}
    (out / "told.json").write_text(json.dumps(told | figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
