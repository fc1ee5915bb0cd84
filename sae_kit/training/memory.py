"""What a run holds in memory, from the objects that it is made of; what there is; what a piece of work takes meanwhile.

What lasts is counted: weights, gradients, moments, the buffer. What comes and goes depends on architecture and batch in
ways that only the code itself knows, so it is measured where something runs, and otherwise bounded from below.
"""

import contextlib
import heapq
import itertools
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sae_kit.data.harvest import Harvest
from sae_kit.data.mixing import Mixing, buffer_device
from sae_kit.data.store import ActivationsStore
from sae_kit.devices import pick_device
from sae_kit.ops import widen
from sae_kit.sae import SAE
from sae_kit.training.config import RunConfig
from sae_kit.training.inputs import Inputs
from sae_kit.training.optim import OptimConfig
from sae_kit.training.workers import at_a_time
from sae_kit.weights import slice_bytes


@dataclass(frozen=True)
class Part:
    """Something that a run holds all the time, or again and again."""

    name: str
    device: torch.device
    bytes: int
    is_there: bool = False
    """whether it is allocated already"""


def lasting_parts(
    cfg: RunConfig, saes: Mapping[str, SAE], inputs: Inputs, store: ActivationsStore, model: nn.Module | None
) -> list[Part]:
    """All that the run of these objects holds from its first step to its last; SAEs may be on the meta device."""
    device = pick_device(cfg.train.device, "train.device")
    tensors = [tensor for sae in saes.values() for tensor in (*sae.parameters(), *sae.buffers())]
    is_there = all(tensor.device == device for tensor in tensors)
    gradients = [size(sae.parameters()) for sae in saes.values()]
    parts = [] if model is None else [Part("model", *held, is_there=True) for held in _by_device(model)]
    return [
        *parts,
        Part("SAEs", device, size(tensors), is_there=is_there),
        Part("gradients", device, sum(heapq.nlargest(steps_at_a_time(cfg, saes, device), gradients))),
        Part("moments of the optimizer", device, sum(moments(cfg.optim_of(name), saes[name]) for name in saes)),
        Part("averages of the weights", device, sum(averages(cfg.optim_of(name), saes[name]) for name in saes)),
        *_of_stream(cfg, inputs, store, device),
    ]


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def moments(cfg: OptimConfig, sae: SAE) -> int:
    """Bytes that the optimizer keeps between two steps."""
    adam = cfg.name in ("adam", "adamw")
    return (2 + cfg.amsgrad if adam else bool(cfg.momentum)) * size(sae.parameters())


def averages(cfg: OptimConfig, sae: SAE) -> int:
    """Bytes of averaged weights, if there are such."""
    return 0 if cfg.ema is None else sum(p.numel() * widen(p[:0]).itemsize for p in sae.parameters())


def steps_at_a_time(cfg: RunConfig, saes: Mapping[str, SAE], device: torch.device) -> int:
    """How many of the SAEs have gradients at the same time."""
    return at_a_time(len(saes), device) if cfg.train.compile is None else 1


def least_of_a_step(cfg: RunConfig, saes: Mapping[str, SAE], device: torch.device) -> int:
    """Bytes of pre-activations that the largest of the SAEs hold at a time while their codes are sparse."""
    limit = cfg.train.max_pre_bytes or slice_bytes(device) // cfg.train.accumulate
    rows = -(-cfg.train.batch_tokens // cfg.train.accumulate)
    least = [min(limit, rows * sae.d_sae * sae.dtype.itemsize) for sae in saes.values()]
    return sum(heapq.nlargest(steps_at_a_time(cfg, saes, device), least))


def _by_device(model: nn.Module) -> list[tuple[torch.device, int]]:
    """Bytes of a model's memory on each of its devices; what several tensors share counts once."""
    stored: dict[tuple[torch.device, int], int] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        memory = tensor.untyped_storage()
        stored[tensor.device, memory.data_ptr()] = memory.nbytes()
    devices = dict.fromkeys(device for device, _ in stored)
    return [(device, sum(n for (on, _), n in stored.items() if on == device)) for device in devices]


def _of_stream(cfg: RunConfig, inputs: Inputs, store: ActivationsStore, device: torch.device) -> list[Part]:
    """The mixing buffer, the batches made ahead, and the one that is trained on."""
    batch = cfg.train.batch_tokens * inputs.row_bytes
    parts = [Part("batches", device, (store.ahead + 1) * batch)]
    if isinstance(store.mixed, Mixing):
        rows = store.mixed.capacity * inputs.row_bytes
        if isinstance(store.mixed.source, Harvest):  # what was made and does not fit into the buffer yet
            waiting = store.mixed.source.tokens_per_forward * inputs.row_bytes
            parts.append(Part("rows of a forward", inputs.device, waiting))
        parts.append(Part("buffer", buffer_device(cfg.buffer.device, inputs.device, rows), rows))
    return parts


# ---- what there is ---------------------------------------------------------------------------------------------------


def available(device: torch.device) -> tuple[int, int] | None:
    """Bytes that are free, and all that there are, on a device; None where nobody says."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused, total
    if device.type != "cpu" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table = Path("/proc/meminfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return (free[0] if free else total), total


# ---- what is needed meanwhile ----------------------------------------------------------------------------------------


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `work` holds on a device at a time, beyond those that were held before; 0 where nobody counts.

    On a CPU those of this thread.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    if device.type != "cpu" or recorded.profiler is None or recorded.profiler.kineto_results is None:
        return 0
    events = recorded.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]  # pyright: ignore
    return max(itertools.accumulate(changes, initial=0))


@contextlib.contextmanager
def _silent() -> Generator[None, None, None]:
    """Without what libraries write to the terminal by themselves: the profiler speaks to its developers."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
