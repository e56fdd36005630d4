"""One run of TFLite Micro in a process of its own, which its kernels may end: python _tflm_child.py model arrays results.

``arrays`` (.npz) holds the inputs as "0", "1" ... (N, ...) in the file's layout and "tensors", the indices of those to look at;
``results`` gets each of them as its index, (N, ...). It knows nothing of graphs, and imports nothing of this package.
"""

from __future__ import annotations

import sys

import numpy as np

#: Bytes of the arena; only the host's memory bounds it here.
ARENA = 1 << 26


def main(model: str, arrays: str, results: str) -> None:
    """Run every example of ``arrays``."""
    from tflite_micro.python.tflite_micro import runtime

    keep = runtime.InterpreterConfig.kPreserveAllTensors
    interpreter = runtime.Interpreter.from_file(model, arena_size=ARENA, intrepreter_config=keep)
    with np.load(arrays) as given:
        tensors = given["tensors"].tolist()
        inputs = [given[str(port)] for port in range(len(given.files) - 1)]
    seen: dict[str, list[np.ndarray]] = {str(tensor): [] for tensor in tensors}
    for i in range(len(inputs[0])):
        for port, batch in enumerate(inputs):
            interpreter.set_input(batch[i : i + 1], port)
        interpreter.invoke()
        for tensor in tensors:
            seen[str(tensor)].append(interpreter.GetTensor(tensor, 0)["tensor_data"].copy())
    np.savez(results, **{name: np.concatenate(parts) for name, parts in seen.items() if parts})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
