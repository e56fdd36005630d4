"""Print how many lines each room of the package has, and which files are long; no limit is enforced, and no code golf wanted."""

from collections import Counter
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src" / "roundel"
LONG = 600

lines = {path.relative_to(SRC): len(path.read_text().splitlines()) for path in sorted(SRC.rglob("*.py"))}
rooms: Counter[str] = Counter()
for path, count in lines.items():
    rooms[path.parts[0].removesuffix(".py")] += count
print(f"{rooms.total():,} lines:", ", ".join(f"{room} {count:,}" for room, count in rooms.most_common()))
for path, count in lines.items():
    if count > LONG:
        print(f"{path} has {count} lines: does it still have one job?")
