"""A keyword transformer, KWT-1, whole in integers: softmax, GELU and layer norm too; its divergence against the float side's."""

from collections import Counter
from functools import partial

import pytest
import torch
from conftest import DATA, needs_data
from test_integer_lower import Network, apart, divergence, outputs

import roundel as rd
from roundel.data import batches, load_data


@pytest.fixture(scope="module")
def kwt() -> Network:
    """The 275 scoring clips, those that neither calibrate nor are silence."""
    clips = f"{DATA / 'speech_commands_v2_test' / 'shared_kwt98x40_f16.npz'}"
    calibrate, score = ([b.args[0] for b in batches(load_data(f"{clips}{part}"))] for part in ("[5/class]", "[!5/class,!class=0]"))
    return Network.of(rd.read(DATA / "kwt1" / "kwt1.tflite", inputs=[214]), calibrate, torch.cat(score))


@needs_data
@pytest.mark.proves("integer.kwt1")
def test_kwt1_in_integers(kwt: Network) -> None:
    """A transformer whole, all 275 scoring clips: softmax, GELU and layer norm are integers too."""
    graph = rd.lower(kwt.q)
    assert Counter(node.op for node in graph) == {
        "linear": 74, "add": 25, "norm": 24, "attention": 12, "table": 12, "quantize": 1, "expand_batch": 1, "concat": 1,
        "slice": 1, "reshape": 1, "dequantize": 1}  # fmt: skip
    integer = outputs(partial(rd.simulate, graph), kwt.inputs)
    one, two = (divergence(kwt.real.softmax(1), t.softmax(1)) for t in (kwt.static, integer))
    print(f"KWT-1: KLD {two:.5f}, float side {one:.5f}, ratio {two / one:.3f}")
    assert len(kwt.inputs) == 275
    assert 0.0005 < two <= 1.1 * one


@needs_data
@pytest.mark.proves("integer.one-unit")
def test_each_operation_is_one_unit_from_the_float_side(kwt: Network) -> None:
    """12 layers of norms pass differences on, so a chain of them drifts further than a chain of convolutions."""
    alone, chained = apart(kwt.q, kwt.inputs[:10])
    print(f"KWT-1: off by, each operation alone {alone}; in a chain {sorted(chained.items())}")
    assert set(alone) <= {-1, 0, 1}
    assert sum(n for off, n in chained.items() if abs(off) > 5) <= 0.02 * chained.total()
