"""Train the bench model: a Llama of about 5 M parameters on the text of the data folder; a Hugging Face folder, cached by seed.

    python scripts/train_bench_lm.py OUT [--seed 0] [--steps 600]

Hidden size 256 and inner size 768, so that formats with blocks of 256 apply. Byte-level BPE of 1,024 tokens, context 256. The same
seed and steps give the same folder; one that is there already is left as it is. It measures nothing but its own held-out loss.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import time
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ROUNDEL_DATA", ROOT.parent / "shared" / "data"))
CONTEXT, BATCH, RATE, WARM = 256, 16, 2e-3, 50


def text() -> tuple[str, str]:
    """(what is trained on, the last twentieth of each source, which is not)."""
    train, held = [], []
    for name in ("tinystories", "wikitext2_valid", "wikitext2_test"):
        whole = lzma.decompress((DATA / "text" / f"{name}.txt.xz").read_bytes()).decode()
        cut = len(whole) * 19 // 20
        train.append(whole[:cut])
        held.append(whole[cut:])
    return "\n".join(train), "\n".join(held)


def tokenizer_of(train: str, vocabulary: int = 1024) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [train], trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def model_of(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", default=600, show_default=True)
def main(out: Path, seed: int, steps: int) -> None:
    """Train the bench model into the folder OUT."""
    made_by = {"seed": seed, "steps": steps}
    record = out / "training.json"
    if record.exists() and {key: json.loads(record.read_text()).get(key) for key in made_by} == made_by:
        return click.echo(f"{out} is there")
    torch.manual_seed(seed)
    train, held = text()
    tokenizer = tokenizer_of(train)
    ids, unseen = (torch.tensor(tokenizer.encode(part).ids) for part in (train, held))
    model = model_of(tokenizer.get_vocab_size())
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=RATE, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    start = time.perf_counter()
    for step in range(steps):
        begin = torch.randint(len(ids) - CONTEXT - 1, (BATCH,))
        loss = loss_of(model, torch.stack([ids[i : i + CONTEXT + 1] for i in begin]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            click.echo(f"step {step} of {steps}, loss {float(loss.detach()):.3f}, {time.perf_counter() - start:.0f} s")
    model.eval()
    with torch.no_grad():
        rows = unseen[: len(unseen) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        final = sum(float(loss_of(model, part)) * len(part) for part in rows.split(16)) / len(rows)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}) + "\n"
    )
    # last, so that a folder without it is not finished
    record.write_text(
        json.dumps({**made_by, "held_out_loss": round(final, 4), "parameters": model.num_parameters(), "tokens": len(ids)}) + "\n"
    )
    seconds = time.perf_counter() - start
    click.echo(f"{out}: {model.num_parameters():,} parameters, held-out loss {final:.3f} nats per token, {seconds:.0f} s")
    return None


if __name__ == "__main__":
    main()
