"""Print the table of the fault bank (tests/faults.py): what was planted, and what `roundel.diagnose` told, promised and kept.

python scripts/faults.py             the 30 faults, the 20 healthy models
python scripts/faults.py --seed 1    the same faults in networks trained from another seed
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch

import roundel as rd
from roundel.diagnose import promise

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


@click.command()
@click.option("--seed", type=int, default=0, show_default=True, help="What the networks were trained from.")
@click.option("--only", default="", help="Faults whose name holds this text.")
def main(seed: int, only: str) -> None:
    """Print one row for each planted fault and each healthy model, and the counts."""
    import faults

    torch.set_num_threads(1)
    first = near = near_share = alarms = count = 0
    print("| fault | told first | loss before, after | gain promised | gain kept | ratio | ratio of shares |")
    print("|---|---|---|---|---|---|---|")
    for name, plant in faults.FAULTS.items():
        if only not in name:
            continue
        fault, count = plant(seed), count + 1
        found = rd.diagnose(fault.q, fault.model, fault.data, vnni=fault.vnni)
        if not found:
            print(f"| {name} | nothing | | | | | |", flush=True)
            continue
        told = found[0]
        right = told.layer in fault.layers and told.cause == fault.cause
        before, after = promise(told, fault.q, fault.model, fault.fresh, vnni=fault.vnni)
        ratio, share = (before - after) / told.gain, (1 - after / before) / (told.gain / told.before)
        first, near, near_share = first + right, near + (abs(ratio - 1) <= 0.2), near_share + (abs(share - 1) <= 0.2)
        print(f"| {name} | {'' if right else 'WRONG: '}{told.layer}: {told.cause} | {told.before:.3g}, {told.after:.2g} "
              f"| {told.gain:.3g} | {before - after:.3g} | {ratio:.2f} | {share:.2f} |", flush=True)  # fmt: skip
    for one in faults.HEALTHY if not only else []:
        q, model, data = one.make()
        if found := rd.diagnose(q, model, data):
            alarms += 1
            print(f"alarm on {one}: {found[0]}")
    healthy = 0 if only else len(faults.HEALTHY)
    print(f"\nSeed {seed}: right layer and cause first in {first} of {count}; gain within 20 % of the promised in {near},")
    print(f"as a share of the loss in {near_share}; alarms on {healthy} healthy models: {alarms}")


if __name__ == "__main__":
    main()
