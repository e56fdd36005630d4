"""Executors: the same results in the same order wherever the work runs, also when a worker dies."""

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import roundel
from roundel import InputError
from roundel.executor import Here, Ray

sys.path.insert(0, str(ROOT / "scripts"))
from random_llama import random_llama


def test_here_is_lazy_and_in_order() -> None:
    seen: list[int] = []

    def double(x: int) -> int:
        seen.append(x)
        return 2 * x

    results = Here().map(double, iter([3, 1, 2]))
    assert next(results) == 6
    assert seen == [3]
    assert list(results) == [2, 4]


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"\[ray\]"):
        Ray(2)


def _dies_once(item: tuple[str, int]) -> int:
    folder, value = item
    mark = Path(folder) / str(value)
    if value == 1 and not mark.exists():
        mark.touch()
        os._exit(1)
    return value * value


@pytest.mark.soak
@pytest.mark.proves("executor.ray")
@pytest.mark.filterwarnings("ignore")
def test_two_ray_workers_write_the_same_bytes(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test
    ids = torch.randint(0, 64, (6, 16))
    random_llama(tmp_path / "model", {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 64,
                                      "num_attention_heads": 4, "num_key_value_heads": 2})  # fmt: skip
    executor = Ray(2)
    try:
        assert list(executor.map(_dies_once, [(str(tmp_path), i) for i in range(4)])) == [0, 1, 4, 9]
        sums = set()
        for name, where in (("here", Here()), ("ray", executor)):
            out = tmp_path / name
            roundel.quantize(tmp_path / "model", "int4/g32", data=[ids], solver="gptq", output=out, executor=where)
            sums.add(hashlib.sha256(out.read_bytes()).hexdigest())
        assert len(sums) == 1
    finally:
        ray.shutdown()
