"""Train the demo's language model on the source of the Python standard library, and write it as the package ships it.

    python scripts/train_demo_model.py --work runs/demo-model --out sae_kit/demo/model

A four-layer Llama (d_model 128, byte-level BPE of 2,048 tokens, 1.1M parameters) learns from the training
side of `sae_kit.demo.corpus()`. Everything is seeded: one interpreter, one torch build and one number of threads give
one model. `--work` holds the newest checkpoint; the same command continues from it, and one with other arguments or
other text is refused. Losses are printed for training rows and for held-out modules, the latter in bits per byte, so
that they compare across tokenizers.

Matrices are trained by Muon, which reaches the same loss as Adam in about half the tokens at this size; embeddings and
gains by AdamW. Matrix products run in bfloat16 (processors with AMX gain a factor of ten), weights stay float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_kit.demo.corpus import corpus

log = logging.getLogger("train_demo_model")

BOS = "<|endoftext|>"
VOCABULARY, CONTEXT = 2_048, 256
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    initializer_range=0.02,
    architectures=["LlamaForCausalLM"],
)
EVALUATE_EVERY, SAVE_EVERY = 1_000, 250  # steps

MODEL_CARD = """\
# The demo language model of sae_kit

A small Llama that writes Python, so that everything in sae_kit can be tried on a real model with no network and no GPU.

| | |
|---|---|
| architecture | Llama: 4 layers, d_model 128, 4 heads, MLP 384, context 256, tied embeddings |
| parameters | {parameters:,} in float16 |
| tokenizer | byte-level BPE, 2,048 tokens, trained on the training modules; `<|endoftext|>` is BOS and EOS |
| data | standard library of Python {python}, tests included: {train_modules:,} modules, {train_megabytes:.1f} MB |
| split | near-copies left out; by content hash, 5%: {held_out_modules} modules held out (`sae_kit.demo.corpus()`) |
| training | {tokens_seen:,} tokens, Muon and AdamW, seed {seed}, torch {torch} |
| loss, training modules | {train_loss:.3f} nats per token, {train_bits_per_byte:.3f} bits per byte |
| loss, held-out modules | {held_out_loss:.3f} nats per token, {held_out_bits_per_byte:.3f} bits per byte |

Every row begins with BOS, also in the middle of a module. With another version of Python the held-out modules are not
quite the same ones, so some of their text may have been trained on.

`scripts/train_demo_model.py` makes it again. The text is the Python Software Foundation's, under the PSF licence; the
weights come under the licence of sae_kit.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/demo-model"), help="checkpoint and log")
    parser.add_argument("--out", type=Path, default=Path("sae_kit/demo/model"), help="where the model is written")
    parser.add_argument("--tokens", type=int, default=49_152_000, help="training tokens, all epochs")
    parser.add_argument("--rows", type=int, default=32, help=f"rows of {CONTEXT} tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.work.mkdir(parents=True, exist_ok=True)

    text = corpus()
    tokenizer = train_tokenizer(text.train, args.work / "tokenizer.json")
    train_ids, held_out_ids = encode(tokenizer, text.train), encode(tokenizer, text.held_out)
    train_bytes, held_out_bytes = count_bytes(text.train), count_bytes(text.held_out)
    log.info("train: %d modules, %.1f MB, %.2fM tokens (%.2f bytes a token); held out: %d modules, %.2f MB",
             len(text.train), train_bytes / 1e6, len(train_ids) / 1e6, train_bytes / len(train_ids),
             len(text.held_out), held_out_bytes / 1e6)  # fmt: skip

    torch.manual_seed(args.seed)
    # Plain attention: inductor fuses it, and it beats the flash kernel's backward at this width on a CPU.
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager")
    forward = torch.compile(model)
    log.info("%.2fM parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    optimizers = make_optimizers(model)
    steps = args.tokens // (args.rows * CONTEXT)
    run = {
        "tokens": args.tokens,
        "rows": args.rows,
        "seed": args.seed,
        "text": hashlib.sha256(train_ids.tobytes()).hexdigest()[:16],
    }
    start = load_checkpoint(args.work / "checkpoint.pt", run, model, optimizers)

    running, since = 0.0, time.perf_counter()
    rows = batches(train_ids, args.rows, seed=args.seed)
    for step, batch in enumerate(rows):
        if step >= steps:
            break
        if step < start:
            continue
        factor = learning_rate_factor(step, steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        done = step + 1
        if done % SAVE_EVERY == 0:
            save_checkpoint(args.work / "checkpoint.pt", run, model, optimizers, done)
        if done % 50 == 0:
            rate = 50 * args.rows * CONTEXT / (time.perf_counter() - since)
            log.info(
                "step %d/%d  train %.4f nats a token  lr x%.2f  %.0f tokens/s", done, steps, running / 50, factor, rate
            )
            running, since = 0.0, time.perf_counter()
        if done % EVALUATE_EVERY == 0 or done == steps:
            log.info("step %d  held out: %.4f bits per byte", done, bits_per_byte(model, held_out_ids, held_out_bytes))
            since = time.perf_counter()

    model.half().float()  # what is measured is what is shipped
    sample = text.train[:: len(text.train) // len(text.held_out)]
    sample_ids = encode(tokenizer, sample)
    train_nats = mean_nats(model, sample_ids)
    held_out_nats = mean_nats(model, held_out_ids)
    facts = {
        "train_loss": train_nats,
        "train_bits_per_byte": train_nats / math.log(2) * len(sample_ids) / count_bytes(sample),
        "held_out_loss": held_out_nats,
        "held_out_bits_per_byte": held_out_nats / math.log(2) * len(held_out_ids) / held_out_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_modules": len(text.train),
        "held_out_modules": len(text.held_out),
        "train_megabytes": train_bytes / 1e6,
        "tokens_seen": steps * args.rows * CONTEXT,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": args.seed,
    }
    write(model, tokenizer, facts, args.out)
    log.info("%s", json.dumps(facts, indent=2))


def train_tokenizer(documents: Sequence[str], path: Path) -> Tokenizer:
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """All documents in one line of ids, each begun by BOS."""
    encoded = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    return np.concatenate([np.array([0, *e.ids], dtype=np.int64) for e in encoded])


def count_bytes(documents: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in documents)


def batches(ids: np.ndarray, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [rows, CONTEXT] batches: every row is BOS and the next 255 ids; each epoch starts at another offset."""
    width = CONTEXT - 1
    epoch = 0
    while True:
        rng = np.random.default_rng((seed, epoch))
        offset = int(rng.integers(width))
        starts = rng.permutation(np.arange(offset, len(ids) - width, width))
        for first in range(0, len(starts) - rows + 1, rows):
            batch = np.zeros((rows, CONTEXT), dtype=np.int64)
            for row, start in enumerate(starts[first : first + rows]):
                batch[row, 1:] = ids[start : start + width]
            yield torch.from_numpy(batch)
        epoch += 1


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(step: int, steps: int, warm_up: int = 100, decay: float = 0.5) -> float:
    """Linear warm-up, constant, then linear to zero over the last half."""
    return min(1.0, (step + 1) / warm_up, (steps - step) / (decay * steps))


def mean_nats(model: LlamaForCausalLM, ids: np.ndarray, rows: int = 32) -> float:
    """Mean cross-entropy in nats over every id, each predicted inside its row of BOS and 255 ids."""
    width = CONTEXT - 1
    padded = np.concatenate([ids, np.full(-len(ids) % width, -1)]).reshape(-1, width)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for first in range(0, len(padded), rows):
            target = torch.from_numpy(padded[first : first + rows])
            inputs = torch.cat([torch.zeros(len(target), 1, dtype=torch.int64), target[:, :-1].clamp(min=0)], dim=1)
            logits = model(input_ids=inputs, use_cache=False).logits
            total += torch.nn.functional.cross_entropy(
                logits.reshape(-1, VOCABULARY), target.reshape(-1), ignore_index=-1, reduction="sum"
            ).item()
    model.train()
    return total / len(ids)


def bits_per_byte(model: LlamaForCausalLM, ids: np.ndarray, n_bytes: int) -> float:
    return mean_nats(model, ids) * len(ids) / math.log(2) / n_bytes


Run = dict[str, int | str]
"""What has to be the same for a checkpoint to be continued: the arguments, and a hash of the training ids."""


def save_checkpoint(
    path: Path, run: Run, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int
) -> None:
    temporary = path.with_suffix(".tmp")
    state = {"run": run, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, run: Run, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """The step at which to continue: 0 if there is no checkpoint. One of another run ends the program."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    saved_run = state.get("run", {})
    wrong = [
        f"{key} {saved_run.get(key, 'unknown')}, now {value}"
        for key, value in run.items()
        if saved_run.get(key) != value
    ]
    if wrong:
        raise SystemExit(
            f"{path} is the checkpoint of another run ({'; '.join(wrong)}). Repeat its arguments, choose another "
            "--work, or remove it to start anew"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    log.info("continuing at step %d", state["step"])
    return int(state["step"])


def write(model: LlamaForCausalLM, tokenizer: Tokenizer, facts: dict[str, object], out: Path) -> None:
    model.half().save_pretrained(out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (out / "README.md").write_text(MODEL_CARD.format(**facts))
    for path in out.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
