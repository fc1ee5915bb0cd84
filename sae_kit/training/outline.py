"""What a run is going to do, counted before its first token: what it builds, holds and writes.

Every run makes its outline, and is refused, or warned of, what cannot go well.
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sae_kit.data.mixing import Mixing
from sae_kit.data.store import ActivationsStore
from sae_kit.devices import pick_device
from sae_kit.errors import ConfigError, DiskFullError
from sae_kit.sae import SAE
from sae_kit.training.checkpoint import OVERHEAD
from sae_kit.training.config import RunConfig
from sae_kit.training.inputs import Inputs, LiveInputs
from sae_kit.training.memory import Part, available, averages, lasting_parts, least_of_a_step, moments, size
from sae_kit.training.part import dead_after

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedSAE:
    """One SAE that is going to be trained."""

    name: str
    architecture: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    d_in: int
    latents: int
    parameters: int
    """numbers that are trained"""


@dataclass(frozen=True)
class Disk:
    """What a run writes, in bytes."""

    folder: Path
    """or the nearest above it that exists"""
    checkpoints: int
    """how many; more if they are due by the clock, too"""
    newest: int
    """bytes of one of the newest checkpoints"""
    least: int
    """bytes without which the run cannot be saved"""
    most: int
    """bytes of all that lies in the folder at a time"""
    free: int


@dataclass(frozen=True)
class Timing:
    """Seconds, from what a rehearsal measured; an estimate."""

    reading: float
    """running the model over its text, or reading a cache"""
    steps: float
    evaluating: float
    forwards: int | None
    """of the model, to train on; None from a cache"""
    overlap: bool
    """whether rows are read while steps are made"""

    @property
    def total(self) -> float:
        """All of it but start-up and saving."""
        training = max(self.reading, self.steps) if self.overlap else self.reading + self.steps
        return training + self.evaluating


@dataclass(frozen=True)
class Plan:
    """What a run is going to build, hold and write."""

    saes: tuple[PlannedSAE, ...]
    tokens: int
    steps: int
    buffer: int
    """tokens that are mixed; 0 = none are"""
    evaluations: int
    evaluated: int
    """held-out tokens of each"""
    lasting: tuple[Part, ...]
    """memory that is held all the time"""
    meanwhile: tuple[Part, ...]
    """memory that something holds while it runs: at least, and measured once it was rehearsed"""
    disk: Disk
    ahead: int
    """batches that are made ahead while steps are made"""
    notes: tuple[str, ...]
    """what is probably not meant"""
    timing: Timing | None = None

    def memory(self, device: torch.device) -> int:
        """Most bytes on a device at a time."""
        temporary = [part.bytes for part in self.meanwhile if part.device == device]
        return sum(part.bytes for part in self.lasting if part.device == device) + max(temporary, default=0)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Those that anything is on."""
        return tuple(dict.fromkeys(part.device for part in (*self.lasting, *self.meanwhile)))

    def __str__(self) -> str:
        number = sum(sae.parameters for sae in self.saes)
        where = ", ".join(f"{in_bytes(self.memory(device))} on {device}" for device in self.devices)
        several = f"{len(self.saes)} SAEs" if len(self.saes) > 1 else "1 SAE"
        return f"{several} of {number:,} parameters, {self.steps:,} steps; memory: about {where}"


def check_run(cfg: RunConfig) -> torch.device:
    """The device of a run's SAEs; ConfigError if there are none, or there is no such device."""
    if not cfg.saes:
        raise ConfigError("saes: there is no SAE to train; give at least one entry")
    return pick_device(cfg.train.device, "train.device")


# ---- counting --------------------------------------------------------------------------------------------------------


def announce(planned: Plan) -> None:
    """Log what is about to be done, and what may not go well."""
    log.info("%s", planned)
    for note in planned.notes:
        log.warning("%s", note)


def outline(
    cfg: RunConfig,
    folder: Path,
    saes: Mapping[str, SAE],
    inputs: Inputs,
    store: ActivationsStore,
    live: LiveInputs | None,
) -> Plan:
    """What the run of these objects is going to do; SAEs may be on the meta device.

    Raises:
        ConfigError: it does not fit on a device whatever else is there. DiskFullError: no room for one checkpoint.
    """
    batch = cfg.train.batch_tokens
    steps = cfg.train.tokens // batch
    device = pick_device(cfg.train.device, "train.device")
    lasting = lasting_parts(cfg, saes, inputs, store, None if live is None else live.model)
    held_out = None if live is None else live.held_out
    every = cfg.eval.interval(cfg.train.tokens)
    evaluated = set() if held_out is None or every is None else _crossings(every, steps, batch)
    evaluated |= {steps} if held_out is not None and cfg.eval.at_end else set()
    found = Plan(
        saes=tuple(_planned(cfg, name, sae) for name, sae in saes.items()),
        tokens=steps * batch,
        steps=steps,
        buffer=store.mixed.capacity if isinstance(store.mixed, Mixing) and store.mixed.cfg.mix == "stream" else 0,
        evaluations=len(evaluated),
        evaluated=0 if held_out is None else held_out.numel(),
        lasting=tuple(part for part in lasting if part.bytes),
        meanwhile=(Part("a step", device, least_of_a_step(cfg, saes, device)),),
        disk=_disk(cfg, folder, saes, sum(part.bytes for part in lasting if part.name == "buffer")),
        ahead=store.ahead,
        notes=(),
    )
    return dataclasses.replace(found, notes=(*_about_dead(cfg, saes), *_about_memory(found), *_about_disk(found.disk)))


def _planned(cfg: RunConfig, name: str, sae: SAE) -> PlannedSAE:
    reads, writes = cfg.saes[name].sites
    geometry, parameters = sae.geometry, sum(p.numel() for p in sae.parameters())
    return PlannedSAE(name, sae.cfg.architecture, reads, writes, geometry.in_shape[-1], geometry.n_latents, parameters)


def _crossings(every: int, steps: int, batch: int) -> set[int]:
    """Steps, from 1 on, that reach a multiple of `every` rows."""
    every = max(every, batch)  # each step reaches one of less
    return {-(-number * every // batch) for number in range(1, steps * batch // every + 1)}


def _disk(cfg: RunConfig, folder: Path, saes: Mapping[str, SAE], buffer: int) -> Disk:
    batch = cfg.train.batch_tokens
    steps = cfg.train.tokens // batch
    times = cfg.checkpoint.build(cfg.train.tokens, batch)
    candidates = {-(-point // batch) for point in times.points} | {steps}
    candidates |= set() if times.every is None else _crossings(times.every, steps, batch)
    number = sum(times.due((step - 1) * batch, step * batch) for step in candidates)
    for_use = sum(size((*sae.parameters(), *sae.buffers())) for sae in saes.values())
    state = sum(moments(cfg.optim_of(name), sae) + averages(cfg.optim_of(name), sae) for name, sae in saes.items())
    old = for_use + state + OVERHEAD
    newest = old + (buffer if cfg.checkpoint.buffer == "save" else 0)
    # While one is written those before it are still there; by the clock there may be any number of them.
    together = cfg.checkpoint.keep + 1 if times.minutes is not None else min(cfg.checkpoint.keep + 1, number)
    stay = len(times.milestones) + (cfg.checkpoint.best is not None)
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    least, most = (newest if number else 0) + for_use, together * newest + stay * old + for_use
    return Disk(there, number, newest, least, most, shutil.disk_usage(there).free)


# ---- what cannot go well ---------------------------------------------------------------------------------------------


def _about_dead(cfg: RunConfig, saes: Mapping[str, SAE]) -> Iterator[str]:
    never = [name for name, sae in saes.items() if dead_after(sae, cfg) >= cfg.train.tokens]
    if never:
        yield (
            f"dead_after_tokens of {', '.join(never)} is not below train.tokens = {cfg.train.tokens:,}: no latent will "
            "count as dead"
        )


def _about_memory(planned: Plan) -> Iterator[str]:
    for device in planned.devices:
        lasting = sum(part.bytes for part in planned.lasting if part.device == device)
        there, lacking = available(device), shortage(planned, device)
        hint = "a smaller buffer.tokens, buffer.dtype=bfloat16, or fewer or narrower SAEs would help"
        if there is not None and device.type == "cuda" and lasting > there[1]:
            raise ConfigError(
                f"this run holds {in_bytes(lasting)} on {device}, which has {in_bytes(there[1])}: {hint}; "
                "--dry-run shows what takes how much"
            )
        if there is not None and lacking > 0:
            yield (
                f"memory may not suffice on {device}: {in_bytes(there[0])} are free, and about "
                f"{in_bytes(there[0] + lacking)} are needed beside what is there; {hint}"
            )


def shortage(planned: Plan, device: torch.device) -> int:
    """Bytes that are needed beside what is held already, less those that are free."""
    there = available(device)
    held = sum(part.bytes for part in planned.lasting if part.device == device and part.is_there)
    return 0 if there is None else planned.memory(device) - held - there[0]


def _about_disk(disk: Disk) -> Iterator[str]:
    if disk.free < disk.least:
        what = "a checkpoint and the trained SAEs" if disk.checkpoints else "the trained SAEs"
        raise DiskFullError(what, disk.folder, needed=disk.least, free=disk.free)
    if disk.free < disk.most:
        yield (
            f"the disk may become full: up to {in_bytes(disk.most)} are written, and {in_bytes(disk.free)} are free; "
            "checkpoint.keep, milestones and buffer=drop make it less"
        )


def in_bytes(number: int | float) -> str:
    """`512 KiB`, `3.2 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1000 or unit == "GiB":
            break
        number = number / 1024
    return f"{number:.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:.1f} {unit}"
