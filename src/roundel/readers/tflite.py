"""`read_tflite`: a float .tflite file as a `Graph` in PyTorch's layout; quantized compute, control flow and state are refused."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..graph import Graph, GraphModule
from ..graph.batch import batched
from ..graph.build import Builder
from ..graph.rewrite import simplify
from ._tflite_file import File, Operator, guarded, read_file
from ._tflite_ops import TRANSLATE
from ._tflite_reader import Reader

#: The batch is tried out at read time unless one example costs more than this: multiply-adds, elements of all values.
_TRIAL_WORK, _TRIAL_SIZE = 1_000_000_000, 2**24


def read_tflite(path: str | Path, inputs: Sequence[int | str] | None = None) -> Graph:
    """Read a float .tflite file.

    The graph's inputs and outputs keep the file's shapes (images are N, H, W, C there); inside, convolutions and pools run
    on N, C, H, W with weights (out, in/groups, kh, kw), and as few transposes as possible lie between. The batch becomes
    symbolic: it takes the place of a leading 1 or, where the file has dropped it, is put in front. Layers are named
    ``{operation}_{operator index}``, their constants ``conv_0.weight``, ``conv_0.bias``.

    ``inputs`` starts in the middle, at these tensors (indices or names): only operators after them are kept. Constants that
    are stored as integers or float16 for a float computation become float32, exactly, and are listed in ``Graph.notes``.

    Raises `InputError`: a damaged file, a model that is already quantized, or operators that are not supported, all of
    which are named at once. Specification: TensorFlow Lite's schema, version 3.
    """
    file = read_file(Path(path))
    return guarded(file.path, lambda: _graph(file, inputs))


def _graph(file: File, inputs: Sequence[int | str] | None) -> Graph:
    starts = file.inputs if inputs is None else tuple(_find(file, given) for given in inputs)
    operators = _between(file, starts)
    _refuse_quantized(file, starts, operators)
    _refuse_unknown(file, operators)
    reader = Reader(file)
    names = [reader.input(index) for index in starts]
    for operator in operators:
        reader.translate(operator, TRANSLATE[operator.op])
    single = reader.builder.graph(names, [reader.value(index) for index in file.outputs], reader.notes())
    return _over_batches(single, file)


def _find(file: File, given: int | str) -> int:
    """A tensor's index by index or name."""
    by_name = {tensor.name: index for index, tensor in enumerate(file.tensors)}
    if isinstance(given, str) and given in by_name:
        return by_name[given]
    if str(given).isdecimal() and int(given) < len(file.tensors):
        return int(given)
    near = difflib.get_close_matches(str(given), list(by_name)[:10_000], 3)
    raise InputError(
        f"{file.path}: there is no tensor {given!r} to start at; there are indices 0 to {len(file.tensors) - 1} and names"
        + (f" such as {', '.join(map(repr, near))}" if near else "")
    )


def _between(file: File, starts: Sequence[int]) -> list[Operator]:
    """The operators that lead from the starting tensors to the file's outputs, in the file's order."""
    makers: dict[int, Operator] = {}
    for operator in file.operators:
        for index in operator.outputs:
            if makers.setdefault(index, operator) is not operator:
                raise InputError(f"{file.path}: tensor {index} is made by operators {makers[index].index} and {operator.index}")
    kept: dict[int, Operator] = {}
    seen, todo = set(starts), [index for index in file.outputs if index not in starts]
    while todo:
        index = todo.pop()
        if index < 0 or index in seen:
            continue
        seen.add(index)
        if index in makers:
            kept[makers[index].index] = makers[index]
            todo.extend(makers[index].inputs)
        elif file.data(file.tensors[index]) is None:
            raise InputError(
                f"{file.path}: the outputs also need tensor {index} ({file.tensors[index].name!r}), which does not follow from "
                f"the inputs {list(starts)}: name it among `inputs` too"
            )
    return [kept[index] for index in sorted(kept)]


def _refuse_quantized(file: File, starts: Sequence[int], operators: Sequence[Operator]) -> None:
    made = {*starts, *(index for operator in operators for index in operator.outputs)} - {-1}
    codes = [i for i in sorted(made) if file.tensors[i].type in ("INT8", "UINT8", "INT16", "INT4") and len(file.tensors[i].scale)]
    if codes:
        first = file.tensors[codes[0]]
        whole = len(codes) == len(made) and {file.tensors[i].type for i in codes} == {"INT8"}
        instead = ", or take its integers as they are: roundel.read_integer(path)" if whole else ""
        raise InputError(
            f"{file.path}: already quantized: {len(codes)} of {len(made)} activations are {first.type.lower()} "
            f"(the first is {first.name!r}); start from the float model it was made of{instead}"
        )


def _refuse_unknown(file: File, operators: Sequence[Operator]) -> None:
    unknown = Counter(operator.op for operator in operators if operator.op not in TRANSLATE)
    if unknown:
        listed = ", ".join(f"{op} ({count})" for op, count in sorted(unknown.items()))
        raise InputError(
            f"{file.path}: operators that are not supported: {listed}. `inputs` can start after them, at a tensor's index or name"
        )


# -- the batch --------------------------------------------------------------------------------------------------------


def _over_batches(single: Graph, file: File) -> Graph:
    """The graph over a symbolic batch, tried out against the single examples; with its fixed batch where that cannot be."""
    try:
        many = simplify(batched(single))
        trial = _trial(single, many)
    except InputError as err:
        trial = str(err)
        many = single
    if trial:
        return _noted(simplify(single), f"the batch stays at the file's own size: {trial}")
    notes = []
    for name in many.inputs:
        have, want = single.values[name].shape, many.values[name].shape
        if len(have) != len(want):
            notes.append(f"input {name!r} has no batch in the file ({list(have)}): it takes {list(want)} here")
    if _too_large(single):
        notes.append("the model is large: batches were not compared with single examples while reading")
    if file.subgraphs > 1:
        notes.append(f"only the main one of {file.subgraphs} subgraphs is read")
    return _noted(many, *notes)


def _noted(graph: Graph, *notes: str) -> Graph:
    return Graph(graph.inputs, graph.outputs, graph.nodes, graph.constants, graph.values, (*graph.notes, *notes))


def _too_large(graph: Graph) -> bool:
    """True where trying it out would take long or much memory."""
    probe, work, size = Builder(graph), 0, 0
    for node in graph:
        probe.emit(node.op, node.inputs, node.outputs, node.attrs)
        made = sum(prod(probe.shape(out)) for out in node.outputs)
        size += made
        if node.op in ("conv", "linear"):
            made *= prod(probe.shape(node.inputs[1])[1:])
        elif node.op == "conv_transpose":  # each input element meets each weight of its channel
            made = prod(probe.shape(node.inputs[0])) * prod(probe.shape(node.inputs[1])[1:])
        elif node.op == "matmul":
            made *= probe.shape(node.inputs[0])[-1]
        elif node.op in ("max_pool", "avg_pool"):
            made *= prod(node.attrs["kernel"])
        elif node.op in ("mean", "sum", "amax", "argmax"):
            made = prod(probe.shape(node.inputs[0]))
        work += made
    size += sum(prod(probe.shape(name)) for name in graph.inputs)
    return work > _TRIAL_WORK or size > _TRIAL_SIZE


def _trial(single: Graph, many: Graph) -> str:
    """Why a batch of two seeded random examples differs from the two alone; empty where it does not (to 1e-4)."""
    if _too_large(single):
        return ""
    generator = torch.Generator().manual_seed(0)
    examples = [_example(many, generator) for _ in range(2)]
    shapes = [[size for size in single.values[name].shape if isinstance(size, int)] for name in single.inputs]
    one, two = GraphModule(single).eval(), GraphModule(many).eval()
    with torch.no_grad():
        alone = [_outputs(one(*[x.reshape(shape) for x, shape in zip(example, shapes)])) for example in examples]
        together = _outputs(two(*[torch.stack(pair) for pair in zip(*examples)]))
    for i, name in enumerate(many.outputs):
        for j in range(2):
            want, got = alone[j][i].to(torch.float64).reshape(-1), together[i][j].to(torch.float64).reshape(-1)
            near = 1e-4 * max(1.0, float(want.nan_to_num(0.0, 0.0, 0.0).abs().max()))
            if not torch.allclose(want, got, rtol=1e-4, atol=near, equal_nan=True):
                return f"output {name!r} of a batch differs from that of single examples"
    return ""


def _example(graph: Graph, generator: torch.Generator) -> list[Tensor]:
    made = []
    for name in graph.inputs:
        spec = graph.values[name]
        shape = [size for size in spec.shape[1:] if isinstance(size, int)]
        dtype = getattr(torch, spec.dtype)
        floating = dtype.is_floating_point
        made.append(
            torch.randn(shape, generator=generator) if floating else torch.randint(0, 2, shape, generator=generator).to(dtype)
        )
    return made


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
