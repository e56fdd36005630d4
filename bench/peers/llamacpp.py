"""llama.cpp: the folder written as GGUF, an importance matrix of the calibration documents, `llama_model_quantize`, its own run."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lib
import numpy as np
import torch
from hf import linears, load
from task import Array, Ids, Quantized, Refused, Task
from torch import Tensor

TYPES = {"q4_k_m": "Q4_K_M", "q3_k_m": "Q3_K_M", "iq4_xs": "IQ4_XS"}

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def renamed(name: str) -> str:
    """The name that GGUF has for a layer of a Llama."""
    if name in WHOLE:
        return WHOLE[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{NAMES[rest]}"


def rotated(x: Array, heads: int) -> Array:
    """Rows of a query or key projection in the order of ggml's rotary embedding."""
    return x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)


def write(model: Any, path: Path) -> None:
    c = model.config
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_vocab_size(c.vocab_size)
    out.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    out.add_rope_freq_base(float(c.rope_parameters["rope_theta"]))
    out.add_file_type(0)
    out.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        x = tensor.float().numpy()
        if layer.endswith(("q_proj", "k_proj")):
            x = rotated(x, c.num_attention_heads if layer.endswith("q_proj") else c.num_key_value_heads)
        if not (layer == "lm_head" and c.tie_word_embeddings):
            out.add_tensor(renamed(layer) + ".weight", np.ascontiguousarray(x))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def importance(model: Any, documents: list[Ids]) -> dict[str, Array]:
    """Mean square of each layer's inputs over the calibration tokens: what llama.cpp's imatrix holds."""
    sums: dict[str, Tensor] = {}
    tokens = sum(map(len, documents))

    def hook(name: str) -> Any:
        def seen(_: Any, given: tuple[Tensor, ...]) -> None:
            squares = given[0].flatten(0, -2).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return seen

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in linears(model).items()]
    with torch.no_grad():
        for ids in documents:
            model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    for one in hooks:
        one.remove()
    return {renamed(name) + ".weight": (x / tokens).float().numpy() for name, x in sums.items()}


def quantize(task: Task) -> Quantized:
    model = load(task)
    real, made = task.scratch / "real.gguf", task.scratch / "made.gguf"
    if any(layer.in_features % 256 for layer in linears(model).values()):
        raise Refused("K-quants want rows of whole blocks of 256")
    write(model, real)
    matrix = importance(model, task.documents())
    lib.llama_backend_init()
    how = lib.llama_model_quantize_default_params()
    how.nthread, how.output_tensor_type, how.token_embedding_type = 1, 0, 0  # head and embedding stay float
    how.ftype = getattr(lib, "LLAMA_FTYPE_MOSTLY_" + TYPES[task.setting])
    kept = imatrix(how, matrix)
    if code := lib.llama_model_quantize(str(real).encode(), str(made).encode(), ctypes.byref(how)):
        raise RuntimeError(f"llama_model_quantize gives {code}")
    del kept
    names = {renamed(name) + ".weight" for name in linears(model)}
    parts = [part for part in gguf.GGUFReader(str(made)).tensors if part.name in names]
    kinds = Counter(part.tensor_type.name for part in parts)
    size = 8 * sum(int(part.n_bytes) for part in parts) / sum(int(part.n_elements) for part in parts)
    note = ", ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items()))
    return Quantized(Runner(made, model.config.vocab_size).run, note=note, size=size)


def imatrix(how: Any, matrix: Mapping[str, Array]) -> object:
    """Hand ``matrix`` over; what is returned has to live until the call is made."""
    kind = lib.llama_cpp.llama_model_imatrix_data
    real = ctypes.POINTER(ctypes.c_float)
    rows = [kind(name.encode(), x.ctypes.data_as(real), x.size) for name, x in matrix.items()]
    held = (kind * (len(rows) + 1))(*rows)  # an empty one ends it
    how.imatrix = ctypes.cast(held, ctypes.POINTER(kind))
    return matrix, held


class Runner:
    """A GGUF file under llama.cpp on one thread."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(str(path).encode(), params)
        context = lib.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = 1
        self.context, self.vocabulary = lib.llama_init_from_model(self.model, context), vocabulary

    def run(self, ids: Ids) -> Array:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        if code := lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gives {code}")
        found = np.ctypeslib.as_array(lib.llama_get_logits(self.context), (len(ids), self.vocabulary)).copy()
        lib.llama_batch_free(batch)
        return found
