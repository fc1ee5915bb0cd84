"""What a run costs beyond its two parts, which nothing can leave out: harvesting and the steps of the SAE.

    python benchmarks/overhead.py [--tokens 1024000] [--repeats 3] [--threads 1] [--json] [--profile]

*Run*: the demo's run as `sae-kit demo` makes it (text, tokenizer, filters, mixing, batches; a row of metrics to a file
and to the console every 50 steps), from the first row that is asked for to the last step. *Harvest*: the bare model on
as many ids, one hook, stopped there, nothing kept. *Steps*: a fresh SAE takes the same steps on batches that lie in
memory. The three take turns in one process; a ratio is that of a round, and the median of the rounds is printed.

Start-up, and the evaluation and saving at the end, are timed apart and shown beside. `--profile` prints where a run
spends its time instead. On a machine that others use, `--cpu --threads 1` counts seconds of the processor.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import json
import logging
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from timing import parser, start, synchronize
from torch import nn

from sae_kit import RunConfig, SAETrainer
from sae_kit.data.batch import Batch
from sae_kit.data.capture import capture
from sae_kit.data.models import load_model
from sae_kit.data.sites import resolve
from sae_kit.demo.run import CONFIG, HOOK
from sae_kit.seeding import generator
from sae_kit.training.callbacks import Callback
from sae_kit.training.inputs import open_inputs
from sae_kit.training.part import SAEInTraining
from sae_kit.training.run import run

ASKED = 1.12
CONTEXT, ROWS_PER_FORWARD = 256, 64
STEPS_PER_ROW, SAMPLE_ROWS = 50, 32_768


class Parts(Callback):
    """When a run came to its first row and to the end of its last step, and how many ids its model read."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.started = self.trained = 0.0
        self.lm_tokens = 0

    def on_start(self, trainer: SAETrainer) -> None:
        self.started = self._now()

    def on_step_end(self, trainer: SAETrainer) -> None:
        self.trained = self._now()

    def on_log(self, trainer: SAETrainer, metrics: Any) -> None:
        self.lm_tokens = int(metrics["data/lm_tokens"])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--tokens", type=int, default=1_024_000)
    options.add_argument("--eval-tokens", type=int, default=16_384)
    options.add_argument("--cpu", action="store_true", help="count seconds of the processor, not of the clock")
    options.add_argument("--profile", action="store_true", help="where a run spends its time")
    args = options.parse_args(arguments)
    device = start(args)
    now = time.process_time if args.cpu else time.perf_counter
    cfg = configured(args.tokens, args.eval_tokens)
    model, tokenizer = load_model(cfg.model, cfg.sites)
    model.to(device)
    if args.profile:
        profiler = cProfile.Profile()
        profiler.runcall(whole, cfg, model, tokenizer, now)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
        return
    batches = batches_of(cfg, model, tokenizer)
    rounds: list[dict[str, float]] = []
    for number in range(args.repeats + 1):  # the first round warms up
        found = whole(cfg, model, tokenizer, now)
        found["harvest"] = seconds_of(harvesting(model, round(found.pop("lm_tokens")), device), now, device)
        found["steps"] = seconds_of(stepping(cfg, batches), now, device)
        found["ratio"] = found["run"] / (found["harvest"] + found["steps"])
        if number:
            rounds.append(found)
    show(args, {name: statistics.median(found[name] for found in rounds) for name in rounds[0]})


def configured(tokens: int, eval_tokens: int) -> RunConfig:
    """The demo's run of so many tokens, evaluated on so many."""
    tree: dict[str, Any] = {**CONFIG, "tokens": tokens, "checkpoint": {"every_tokens": None, "every_minutes": None}}
    tree["eval"] = {"every_tokens": None, "tokens": eval_tokens, "fidelity_tokens": eval_tokens}
    cfg = RunConfig.from_dict(tree)
    log = dataclasses.replace(cfg.log, every_tokens=STEPS_PER_ROW * cfg.train.batch_tokens)
    return dataclasses.replace(cfg, log=log)


def whole(cfg: RunConfig, model: nn.Module, tokenizer: Any, now: Callable[[], float]) -> dict[str, float]:
    """Seconds of the parts of a run, and the ids that the model read for it."""
    with tempfile.TemporaryDirectory() as folder, console_to_nowhere():
        parts, began = Parts(now), now()
        run(dataclasses.replace(cfg, out=folder), model=model, tokenizer=tokenizer, callbacks=[parts])
        ending = now() - parts.trained
    startup, training = parts.started - began, parts.trained - parts.started
    return {"run": training, "startup": startup, "ending": ending, "lm_tokens": parts.lm_tokens}


@contextlib.contextmanager
def console_to_nowhere() -> Generator[None]:
    """What a run says is put together and written, as on a console, and nobody sees it."""
    log, handler = logging.getLogger("sae_kit"), logging.FileHandler(os.devnull)
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.setLevel(level)
        log.propagate = propagates


def harvesting(model: nn.Module, ids: int, device: torch.device) -> Callable[[], None]:
    """Forwards of the bare model on so many ids, stopped at the site, nothing kept."""
    bound = resolve(model, HOOK)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    drawn = torch.randint(3, vocabulary, (ROWS_PER_FORWARD, CONTEXT), generator=generator(0, "benchmark")).to(device)

    def harvest() -> None:
        for _ in range(round(ids / drawn.numel())):
            capture(model, [bound], drawn)

    return harvest


def batches_of(cfg: RunConfig, model: nn.Module, tokenizer: Any) -> list[torch.Tensor]:
    """The batches of the run."""
    inputs, _ = open_inputs(cfg, model, tokenizer, None)
    store = inputs.open()
    batches = [batch[HOOK].clone() for batch in store]
    store.close()
    return batches


def stepping(cfg: RunConfig, batches: list[torch.Tensor]) -> Callable[[], None]:
    """The steps of a fresh SAE on batches that are there, without a trainer."""
    entry = cfg.saes["sae"]
    sae = dataclasses.replace(
        entry.sae, d_in=batches[0].shape[1], normalize_activations="expected_average_only_in"
    ).build()
    part = SAEInTraining(cfg, "sae", sae.to(batches[0].device))
    sample = torch.cat(batches[: SAMPLE_ROWS // len(batches[0])])
    part.start_from(Batch(sample, sample))

    def step() -> None:
        tokens = 0
        for batch in batches:
            part.step(Batch(batch, batch), tokens)
            tokens += len(batch)

    return step


def seconds_of(work: Callable[[], None], now: Callable[[], float], device: torch.device) -> float:
    synchronize(device)
    started = now()
    work()
    synchronize(device)
    return now() - started


def show(args: argparse.Namespace, found: dict[str, float]) -> None:
    if args.json:
        print(json.dumps({"tokens": args.tokens, "asked": ASKED, **found}))
        return
    print("| tokens | run, s | harvest, s | steps, s | run / (harvest + steps) | asked | start-up, s | end, s |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    seconds = (f"{found[name]:.2f}" for name in ("run", "harvest", "steps"))
    beside = (f"{found[name]:.2f}" for name in ("startup", "ending"))
    print("|", " | ".join((f"{args.tokens:,}", *seconds, f"{found['ratio']:.3f}", str(ASKED), *beside)), "|")


if __name__ == "__main__":
    main()
