"""`capture`: a live `nn.Module` becomes a `Graph` through torch.export; it fuses nothing and never leaves the module changed."""

from __future__ import annotations

import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from ..errors import InputError
from ..graph import BATCH, Graph, GraphModule, Spec
from .aten import PASSING, op_name, translator
from .emitter import Call, Const, Emitter, Unsupported, finish, is_symbolic, some
from .recurrent import kept_whole


def capture(module: nn.Module, example: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Graph:
    """The graph of ``module`` in eval mode, traced on ``example`` (positional tensors, or named ones as a mapping).

    Axis 0 of every input that shares the first input's size there is the symbolic batch; a model that fixes its batch is
    captured for the example's size alone, with a note. A value is named by the module that makes it (``layer1.0.conv1``),
    a functional operation by its module and itself (``layer1.0.add``). Constants keep their `state_dict` names and share
    memory with the module, tied ones are one constant, a parametrized weight is computed once, with a note.
    The module comes back as it was, training mode included, also after a failure.

    Raises `InputError`: meta tensors, a forward that branches on the data, operations outside the list (all of them at once).

    >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> [(node.name, node.op) for node in capture(net, torch.randn(3, 4))]
    [('0', 'linear'), ('1', 'relu')]
    """
    if isinstance(module, GraphModule):
        return module.graph
    meta = [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if meta:
        raise InputError(f"{len(meta)} tensors have no numbers (meta device): {some(meta)}; load the weights before quantizing")
    args, named = _as_arguments(example)
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), _quiet(), _masks_unread():
            program, notes = _export(module, args, named)
            return _translate(module, _simplify(program), notes)
    finally:
        for m, mode in modes:
            m.training = mode


def _as_arguments(example: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    args = (example,) if isinstance(example, Tensor) else () if isinstance(example, Mapping) else tuple(example)
    named = dict(example) if isinstance(example, Mapping) else {}
    for where, x in [*enumerate(args), *named.items()]:
        if not isinstance(x, Tensor):
            raise InputError(f"input {where!r} of the example must be a tensor; got {type(x).__name__}")
    if not args and not named:
        raise InputError("the example holds no tensor; give one batch of inputs as the model takes them")
    seen: set[int] = set()

    def apart(x: Tensor) -> Tensor:
        """torch.export takes one tensor that is given twice for one input, and the other is never read."""
        again = id(x) in seen
        seen.add(id(x))
        return x.clone() if again else x

    return tuple(map(apart, args)), {name: apart(x) for name, x in named.items()}


# -- tracing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own deprecation warnings and the graph that it prints on a failed trace off the user's screen."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    dump = logging.getLogger("torch._export.non_strict_utils")
    failed = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled, dump.disabled, failed.disabled
    log.disabled = dump.disabled = failed.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled, dump.disabled, failed.disabled = before


@contextmanager
def _masks_unread() -> Iterator[None]:
    """`nn.TransformerEncoder` compares its mask with a causal one, only to be faster; no trace can follow numbers."""
    torch_s = torch.nn.modules.transformer
    before = torch_s._detect_is_causal_mask
    torch_s._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        torch_s._detect_is_causal_mask = before


def _export(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[Any, list[str]]:
    """The exported program with a symbolic batch where the model allows one, and what the user should know about it."""
    tensors = [*args, *named.values()]
    size = tensors[0].shape[0] if tensors[0].ndim else 0
    batched = [t.ndim > 0 and t.shape[0] == size and size > 0 for t in tensors]
    # A batch of one is where broadcasting hides the batch from torch.export; trace on two. It fails on some strided examples.
    grown = [torch.cat([t, t]) if yes and size == 1 else t.contiguous() for t, yes in zip(tensors, batched, strict=True)]
    shapes = torch.export.ShapesCollection()
    for t, yes in zip(grown, batched, strict=True):
        if yes:
            shapes[t] = {0: torch.export.Dim.AUTO}
    try:
        program = _trace(module, tuple(grown[: len(args)]), dict(zip(named, grown[len(args) :], strict=True)), shapes)
        user = [n.meta["val"] for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
        if any(batched) and sum(v.ndim > 0 and is_symbolic(v.shape[0]) for v in user) == sum(batched):
            return program, _batch_limits(program)
        why = "its forward works with one batch size only"
    except InputError as err:
        why = str(err)
    program = _trace(module, args, named, None)
    return program, [f"captured for the example's batch of {size} only ({why})"]


def _trace(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], shapes: Any) -> Any:
    try:
        with redirect_stderr(io.StringIO()):  # torch prints the half-made graph there when a trace fails
            return torch.export.export(module, args, named or None, dynamic_shapes=shapes)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError) as err:
        raise InputError(_why_not(err)) from err


def _why_not(err: BaseException) -> str:
    text = str(err)
    first = next((line for line in text.splitlines() if line.strip()), type(err).__name__).strip()
    if "data-dependent" not in text:
        return f"the model cannot be traced on the example: {first}; check the example"
    frames = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.+)', text)
    where = f' at {frames[-1][0]}:{frames[-1][1]} ("{frames[-1][2].strip()}")' if frames else ""
    return f"forward branches on the numbers it computes{where}, so no one graph describes it; torch.where could be captured"


def _batch_limits(program: Any) -> list[str]:
    """A note for each bound on the batch that the trace took for granted, such as an ``if x.shape[0] > 4``."""
    notes = []
    for symbol, bound in program.range_constraints.items():
        low, high = bound.lower, bound.upper
        if low > 2 or (getattr(high, "is_finite", False) and high < 2**31):
            notes.append(f"captured for batch sizes {low} to {high} ({symbol}): forward chooses its way by the batch size")
    return notes


def _simplify(program: Any) -> Any:
    """Functional form (no in-place writes), with only those operations taken apart that `ATEN` does not know."""
    kept_whole(program.graph)
    program = program.run_decompositions({})
    catalogue = torch.export.default_decompositions()
    tried: set[Any] = set()
    while True:  # each round may uncover operations that come apart further
        made = [n for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload) and _is_tensors(n)]
        table = {n.target: catalogue[n.target] for n in made if translator(n.target) is None and n.target in catalogue}
        if not table.keys() - tried:
            break
        tried |= table.keys()
        program = program.run_decompositions(table)
    return program


# -- from aten to the graph's operations ------------------------------------------------------------------------------


def _translate(module: nn.Module, program: Any, notes: list[str]) -> Graph:
    """Walk the program's live nodes once; raises one `InputError` with everything that has no counterpart."""
    calls = {n: _call_of(module, n) for n in program.graph.nodes}
    e = Emitter({c.path for c in calls.values()})
    inputs = _placeholders(module, program, e)
    problems: dict[str, list[str]] = {}
    live = _live(program.graph)
    for n in program.graph.nodes:
        if n.op != "call_function" or n not in live or not _is_tensors(n):
            continue
        e.node, e.call = n, calls[n]
        try:
            e.env[n] = _one(e, n)
        except Unsupported as err:
            what = f"{op_name(n.target)} ({err})" if str(err) else op_name(n.target)
            problems.setdefault(what, []).append(e.call.path or "the model itself")
            e.env[n] = "?" if isinstance(n.meta["val"], Tensor) else ("?",) * len(n.meta["val"])  # go on, to find the others
    outputs, more = _outputs(program, e, problems)
    if problems:
        listed = "; ".join(f"{op} in {some(list(dict.fromkeys(where)))}" for op, where in problems.items())
        raise InputError(f"these operations have no counterpart in a graph: {listed}")
    return finish(e, inputs, outputs, [*notes, *more])


def _is_tensors(n: Any) -> bool:
    """Makes a tensor or several; the others work out sizes, or assert."""
    return isinstance(n.meta.get("val"), (Tensor, tuple, list))


def _live(graph: fx.Graph) -> set[fx.Node]:
    todo, live = [n for n in graph.nodes if n.op == "output"], set()
    while todo:
        n = todo.pop()
        if n not in live:
            live.add(n)
            todo.extend(n.all_input_nodes)
    return live


def _call_of(module: nn.Module, n: Any) -> Call:
    stack = n.meta.get("nn_module_stack") or {}
    key, (path, _) = next(reversed(stack.items())) if stack else ("", ("", None))
    try:
        inner = module.get_submodule(path)
    except AttributeError:  # a path that torch made up
        return Call("", key, False)
    return Call(path, key, path != "" and all(name == "parametrizations" for name, _ in inner.named_children()))


def _placeholders(module: nn.Module, program: Any, e: Emitter) -> dict[str, Spec]:
    """Fill the environment with the program's parameters, buffers and inputs; returns the inputs."""
    state = {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    first: dict[int, str] = {}  # tied parameters: a tensor keeps the first of its names
    for name, t in state.items():
        first.setdefault(id(t), name)
    shared: dict[str, Const] = {}
    inputs: dict[str, Spec] = {}
    kinds = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    for n in program.graph.nodes:
        if n.op != "placeholder":
            continue
        spec = kinds[n.name]
        if spec.kind == InputKind.USER_INPUT:
            val = n.meta["val"]
            shape = tuple(BATCH if is_symbolic(size) else int(size) for size in val.shape)
            inputs[n.name], e.env[n] = Spec(shape, str(val.dtype).removeprefix("torch.")), n.name
            if shape[:1] == (BATCH,):
                e.batch_like = e.batch_like or n.name
        else:
            name = first[id(state[spec.target])] if spec.target in state else spec.target
            stored = program.state_dict if spec.target in program.state_dict else program.constants
            sources = (name,) if spec.kind == InputKind.PARAMETER else ()
            e.env[n] = shared.setdefault(name, Const(stored[spec.target], name, sources))
    return inputs


def _outputs(program: Any, e: Emitter, problems: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    outputs, notes = [], []
    nodes = {n.name: n for n in program.graph.nodes}
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            notes.append(f"the model overwrites its input {spec.target}; the graph leaves it alone")
        elif spec.kind != OutputKind.USER_OUTPUT:
            problems.setdefault("a write into a buffer", []).append(str(spec.target))
        elif (n := nodes.get(getattr(spec.arg, "name", None))) is None:
            notes.append(f"the model also returns the constant {getattr(spec.arg, 'value', None)!r}; the graph does not")
        elif n in e.env:
            e.call = Call("", "", False)
            value = e.env[n]
            outputs.append(e.emit("identity", value) if isinstance(value, Const) else value)
    structure = program.call_spec.out_spec
    if structure is not None and structure.type is not None and structure.type not in (tuple, list) and len(outputs) > 1:
        notes.append(f"the model returns a {structure.type.__name__}; the graph returns its {len(outputs)} tensors as a tuple")
    return outputs, notes


def _one(e: Emitter, n: Any) -> Any:
    if n.target is operator.getitem:
        picked = e.env[n.args[0]][n.args[1]]
        if picked is None:
            raise Unsupported(f"result {n.args[1]} of {op_name(n.args[0].target)}")
        return picked
    if not isinstance(n.target, torch._ops.OpOverload):
        raise Unsupported("not an aten operation")
    if all(isinstance(e.env.get(a), Const) for a in n.all_input_nodes) and torch.Tag.nondeterministic_seeded not in n.target.tags:
        return e.env[n.args[0]] if op_name(n.target) in PASSING else _fold(e, n)
    translate = translator(n.target)
    if translate is None:
        raise Unsupported
    result = translate(e, *_bound(e, n))
    if isinstance(result, tuple):
        return tuple(e.env.get(r, r) for r in result)
    return e.env.get(result, result)


def _fold(e: Emitter, n: Any) -> Any:
    """An operation on constants alone happens now; what it gives is one constant."""
    operands = [e.env[a] for a in n.all_input_nodes]
    values = {a: c.tensor for a, c in zip(n.all_input_nodes, operands, strict=True)}
    result = n.target(*fx.map_arg(n.args, values.__getitem__), **fx.map_arg(n.kwargs, values.__getitem__))
    sources, single = tuple(dict.fromkeys(s for c in operands for s in c.sources)), any(c.single for c in operands)
    head, mark, tail = e.call.path.partition(".parametrizations.")
    name = f"{head}.{tail.split('.')[0]}" if mark else None
    if isinstance(result, Tensor):
        return next((c for c in operands if c.tensor is result), Const(result.detach(), name, sources, single))
    return tuple(Const(r.detach(), None, sources, single) for r in result)


def _bound(e: Emitter, n: Any) -> list[Any]:
    """The arguments in the schema's order, defaults filled in, sizes as numbers, tensors as fx nodes."""

    def plain(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return [plain(x) for x in a]
        val = a.meta.get("val") if isinstance(a, fx.Node) else None
        return val if isinstance(val, (torch.SymInt, int, float)) else a

    args, kwargs = list(n.args), dict(n.kwargs)
    out = []
    for i, arg in enumerate(n.target._schema.arguments):
        out.append(plain(args[i] if i < len(args) else kwargs.get(arg.name, arg.default_value)))
    return out
