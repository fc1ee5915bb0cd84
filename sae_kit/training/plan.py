"""What a run is going to do and how long it takes, without a trace of it: `sae-kit train --dry-run`.

The objects of the run are built and counted (`outline.py`). Then a few forwards, steps and evaluations are rehearsed in
memory, to measure what no one can count.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from sae_kit.data.harvest import Harvest
from sae_kit.devices import kernels
from sae_kit.errors import ConfigError
from sae_kit.evals.runner import TOKENS_WITH_LOGITS
from sae_kit.training.building import build_saes, completed_configs
from sae_kit.training.callbacks import Callback
from sae_kit.training.config import RunConfig
from sae_kit.training.evaluating import check_awaited
from sae_kit.training.folder import check_free, run_folder
from sae_kit.training.inputs import Inputs, LiveInputs, open_inputs
from sae_kit.training.memory import Part, available, peak_of
from sae_kit.training.outline import Plan, Timing, check_run, in_bytes, outline, shortage
from sae_kit.training.resume import checkpoint_to_resume, only_begun
from sae_kit.training.trainer import SAETrainer

ENOUGH_SECONDS = 3.0
"""a measurement ends after so long, or after three times"""
SHOWN = 30
"""SAEs that a table has room for"""


def plan(
    cfg: RunConfig,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    documents: Iterable[Any] | None = None,
    override: bool = False,
) -> Plan:
    """What `run` with the same arguments is going to do; nothing is written.

    Where all of it fits into memory it is rehearsed: times and temporary memory are then measured.

    Raises:
        What `run` raises before its first token. ConfigError: texts that can be read only once.
    """
    if isinstance(documents, Iterator):
        raise ConfigError("a dry run reads some of the texts, and an iterator gives them only once: pass a list")
    device = check_run(cfg)
    folder = run_folder(cfg)
    found = checkpoint_to_resume(cfg, folder, override=override)
    check_free(folder, resuming=found is not None or only_begun(cfg, folder))
    inputs, live = open_inputs(cfg, model, tokenizer, documents)
    completed = completed_configs(cfg, inputs)
    with torch.device("meta"):
        saes = {name: config.build() for name, config in completed.items()}
    check_awaited(cfg, is_evaluated=live is not None and live.hold_out())
    store = inputs.open()
    planned = outline(cfg, folder, saes, inputs, store, live)
    store.close()
    if found is not None:
        note = f"goes on from {found.path}, with {found.tokens:,} tokens behind it; what is shown is of the whole run"
        planned = dataclasses.replace(planned, notes=(*planned.notes, note))
    if any(shortage(planned, on) > 0 for on in planned.devices):
        return planned
    try:
        with kernels(tf32=cfg.train.tf32, deterministic=cfg.deterministic):
            meanwhile, timing = _Rehearsal(cfg, inputs, live, documents, device).of(planned)
    except torch.OutOfMemoryError as error:
        note = f"memory does not suffice: a rehearsal ended with {str(error).split('. ')[0]!r}"
        return dataclasses.replace(planned, notes=(*planned.notes, note))
    return dataclasses.replace(planned, meanwhile=meanwhile, timing=timing)


class _OneStep(Callback):
    """Ends a run after its first step."""

    essential = True

    def on_step_end(self, trainer: SAETrainer) -> None:
        trainer.callbacks.stop("rehearsed")


class _Rehearsal:
    """A few forwards, steps and evaluations of a run, in memory."""

    def __init__(
        self,
        cfg: RunConfig,
        inputs: Inputs,
        live: LiveInputs | None,
        documents: Iterable[Any] | None,
        device: torch.device,
    ) -> None:
        self._cfg, self._live, self._device, self._model_device = cfg, live, device, inputs.device
        # Without the buffer: to fill it takes as long as many steps.
        buffer = cfg.buffer if cfg.end_to_end else dataclasses.replace(cfg.buffer, mix="none", prefetch=0)
        small = dataclasses.replace(cfg, buffer=buffer)
        model, tokenizer = (None, None) if live is None else (live.model, live.tokenizer)
        self._stream = open_inputs(small, model, tokenizer, documents)[0].open()
        self._batch = next(self._stream)
        saes = build_saes(cfg, inputs)
        loss = None if live is None else live.loss(saes, self._stream)
        self._trainer = SAETrainer(small, saes, [self._batch], callbacks=[_OneStep()], loss=loss)
        self._trainer.fit()  # statistics, and what is allocated once

    def of(self, planned: Plan) -> tuple[tuple[Part, ...], Timing]:
        """Temporary memory and times of what is planned."""
        step = self._seconds(self._step, self._device)
        gradients = sum(part.bytes for part in planned.lasting if part.name == "gradients")
        meanwhile = [Part("a step", self._device, max(self._step_bytes() - gradients, 0))]
        harvest = None if self._live is None or self._cfg.cache.read or self._cfg.end_to_end else self._live.harvest()
        rows: list[int] = []
        read, read_bytes = self._measured(lambda: self._read(harvest, rows), self._model_device)
        if harvest is not None:
            meanwhile.append(Part("a forward", self._model_device, read_bytes))
            harvest.close()
        evaluation = 0.0
        if planned.evaluations:
            evaluation, evaluation_bytes = self._evaluation(planned.evaluated)
            meanwhile.append(Part("an evaluation", self._model_device, evaluation_bytes))
        self._stream.close()
        return tuple(meanwhile), Timing(
            reading=planned.tokens * read,
            steps=planned.steps * step,
            evaluating=planned.evaluations * evaluation,
            forwards=None if harvest is None else math.ceil(planned.tokens * len(rows) / sum(rows)),
            overlap=planned.ahead > 0,
        )

    def _measured(self, work: Callable[[], int], device: torch.device) -> tuple[float, int]:
        """Seconds for one of what `work` returns the number of, and the memory that it takes meanwhile."""
        return self._seconds(work, device), peak_of(work, device)

    def _seconds(self, work: Callable[[], int], device: torch.device) -> float:
        taken: list[tuple[float, int]] = []
        while len(taken) < 3 and sum(seconds for seconds, _ in taken) < ENOUGH_SECONDS:
            start = time.perf_counter()
            number = work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append((time.perf_counter() - start, number))
        taken = taken[1:] or taken  # the first time warms up
        return sum(seconds for seconds, _ in taken) / max(sum(n for _, n in taken), 1)

    def _step(self) -> int:
        self._trainer.step(self._batch)
        return 1

    def _step_bytes(self) -> int:
        """Of as many of the largest of the SAEs as make their steps side by side."""
        number, self._trainer.at_a_time = self._trainer.at_a_time, 1
        most = peak_of(self._step, self._device)
        self._trainer.at_a_time = number
        return number * most

    def _read(self, harvest: Harvest | None, rows: list[int]) -> int:
        if harvest is None:
            return self._cfg.train.batch_tokens if next(self._stream, None) is not None else 0
        found = next(harvest, None)
        rows.append(0 if found is None else len(found.kept))
        return rows[-1]

    def _evaluation(self, tokens: int) -> tuple[float, int]:
        """Of all held-out tokens, some of which are spliced, from as many as fit into one forward."""
        live, cfg = self._live, self._cfg.eval
        assert live is not None
        assert live.held_out is not None
        context = live.held_out.shape[1]
        number = cfg.rows_per_forward or self._cfg.data.rows_per_forward or max(TOKENS_WITH_LOGITS // context, 1)
        number = min(number, len(live.held_out))

        def work(metrics: Collection[str]) -> int:
            saes = {name: part.for_use().to_inference() for name, part in self._trainer.in_training.items()}
            live.evaluate(saes, {}, rows=slice(number), metrics=metrics)
            return number * context

        whole, most = self._measured(lambda: work(cfg.metrics), self._model_device)
        if "fidelity" not in cfg.metrics or tokens <= cfg.fidelity_tokens:
            return tokens * whole, most
        plain = self._seconds(lambda: work([name for name in cfg.metrics if name != "fidelity"]), self._model_device)
        return cfg.fidelity_tokens * whole + (tokens - cfg.fidelity_tokens) * plain, most


# ---- showing ---------------------------------------------------------------------------------------------------------


def show(found: Plan, console: Any = None) -> None:
    """Print a plan to a console of rich; None = the terminal."""
    from rich.console import Console

    console = console or Console()
    console.print(_table_of_saes(found))
    console.print(_table_of_memory(found))
    for name, text in _facts(found).items():
        console.print(f"{name:<12} {text}", highlight=False, markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _table_of_saes(found: Plan) -> Any:
    from rich.table import Table
    from rich.text import Text

    transcoders = any(sae.writes != sae.reads for sae in found.saes)
    table = Table("SAE", "architecture")
    for name in ("reads", "writes") if transcoders else ("reads",):
        table.add_column(name, overflow="fold")
    for name in ("d_in", "latents", "parameters"):
        table.add_column(name, justify="right")
    for sae in found.saes[:SHOWN]:
        sites = (sae.reads, sae.writes) if transcoders else (sae.reads,)
        texts = (sae.name, sae.architecture, *(", ".join(each) for each in sites))
        table.add_row(*map(Text, texts), f"{sae.d_in:,}", f"{sae.latents:,}", f"{sae.parameters:,}")
    if len(found.saes) > SHOWN:
        table.add_row(f"... and {len(found.saes) - SHOWN} more")
    return table


def _table_of_memory(found: Plan) -> Any:
    from rich.table import Table

    table = Table("memory", "on")
    table.add_column("bytes", justify="right")
    for part in found.lasting:
        table.add_row(part.name, str(part.device), in_bytes(part.bytes))
    for part in found.meanwhile:
        less = "" if found.timing else "at least "
        table.add_row(f"during {part.name}", str(part.device), f"{less}{in_bytes(part.bytes)}")
    for device in found.devices:
        there = available(device)
        free = "" if there is None else f", {in_bytes(there[0])} of {in_bytes(there[1])} free"
        table.add_section()
        table.add_row("most at a time", f"{device}{free}", in_bytes(found.memory(device)))
    return table


def _facts(found: Plan) -> dict[str, str]:
    buffer = f", mixed among {found.buffer:,} ({found.buffer * found.steps / found.tokens:.0f} batches)"
    disk, timing = found.disk, found.timing
    forwards = f", {timing.forwards:,} forwards of the model" if timing is not None and timing.forwards else ""
    facts = {
        "tokens": f"{found.tokens:,} in {found.steps:,} steps{buffer if found.buffer else ''}{forwards}",
        "evaluations": f"{found.evaluations} of {found.evaluated:,} held-out tokens" if found.evaluations else "none",
        "checkpoints": f"{disk.checkpoints} of {in_bytes(disk.newest)}; at most {in_bytes(disk.most)} on the disk, "
        f"{in_bytes(disk.free)} free",
        "time": "not estimated: it does not fit into memory",
    }
    if timing is not None:
        parts = {"model" if timing.forwards else "reading": timing.reading, "SAEs": timing.steps}
        parts |= {"evaluations": timing.evaluating} if found.evaluations else {}
        listed = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items())
        together = " at the same time" if timing.overlap else ""
        facts["time"] = (
            f"about {_duration(timing.total)} ({listed}{together}), estimated from a few steps; saving left out"
        )
    return facts


def _duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `1:02:03`."""
    return f"{seconds:.2g} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
