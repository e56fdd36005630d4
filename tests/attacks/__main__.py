"""Write every hostile file of this package into a folder."""

import sys
from pathlib import Path

from attacks import archives, pickles, safetensors

if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, content in safetensors.FILES.items():
        (out / f"{name}.safetensors").write_bytes(content)
    for name, content in pickles.files(out / "CANARY").items():
        (out / f"{name}.pt").write_bytes(content)
    for name, content in archives.FILES.items():
        (out / name).write_bytes(content())
    print("\n".join(sorted(path.name for path in out.iterdir())))
