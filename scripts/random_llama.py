"""Write a Llama-shaped folder of random bf16 weights, one shard per layer and one in memory at a time; it says nothing, and costs
what a real model of its size costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from roundel.files import write_safetensors

#: The shapes of TinyLlama (1.1 billion weights), and a small one (about 50 million).
SIZES = {
    "1.1b": {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "vocab_size": 32000,
             "num_attention_heads": 32, "num_key_value_heads": 4},
    "50m": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, "vocab_size": 32000,
            "num_attention_heads": 8, "num_key_value_heads": 2},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 160, "vocab_size": 256,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def tensors(shape: dict[str, int], layer: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a layer, or of what is outside of all."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    if layer is None:
        yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
        yield "lm_head.weight", (shape["vocab_size"], hidden)
        yield "model.norm.weight", (hidden,)
        return
    values = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {"q_proj": (hidden, hidden), "k_proj": (values, hidden), "v_proj": (values, hidden), "o_proj": (hidden, hidden)}
    for name, size in sizes.items():
        yield f"model.layers.{layer}.self_attn.{name}.weight", size
    for name, size in {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}.items():
        yield f"model.layers.{layer}.mlp.{name}.weight", size
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{layer}.{name}.weight", (hidden,)


def random_llama(folder: Path, shape: dict[str, int], seed: int = 0) -> int:
    """Write the folder and return the number of its weights; equal arguments give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    layers: list[int | None] = [None, *range(shape["num_hidden_layers"])]
    where, count = {}, 0
    for number, layer in enumerate(layers, 1):
        file = f"model-{number:05}-of-{len(layers):05}.safetensors"
        made = {}
        for name, size in tensors(shape, layer):
            values = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=random) * size[1] ** -0.5
            made[name] = values.bfloat16()
            where[name] = file
            count += values.numel()
        write_safetensors(folder / file, made, {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
    config |= shape
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 2 * count}, "weight_map": where}))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{random_llama(args.folder, SIZES[args.size], args.seed):,} weights in {args.folder}")


if __name__ == "__main__":
    main()
