"""The SAEs of a run: from its config and what it reads, from one that exists, or from a checkpoint."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_kit.errors import ConfigError, ShapeError
from sae_kit.metadata import split_head
from sae_kit.sae import SAE
from sae_kit.sae_config import SAEConfig
from sae_kit.seeding import derive_seed
from sae_kit.training.checkpoint import Checkpoint
from sae_kit.training.config import RunConfig, SAEEntry
from sae_kit.training.finetuning import started_from
from sae_kit.training.inputs import Inputs


def restored_saes(cfg: RunConfig, found: Checkpoint) -> dict[str, SAE]:
    """The SAEs of a checkpoint, with the seeds that they had."""
    if list(found.saes) != list(cfg.saes):
        raise ConfigError(f"{found.path} holds the SAEs {', '.join(found.saes)}, the run has {', '.join(cfg.saes)}")
    for name, sae in found.saes.items():
        sae.seed = _seed(cfg, name)
        for tensor in (*sae.parameters(), *sae.buffers()):
            tensor.data = tensor.data.clone()  # where in memory a tensor begins can change the last bits of sums
    return found.saes


def _seed(cfg: RunConfig, name: str) -> int:
    seed = cfg.saes[name].seed
    return derive_seed(cfg.seed, "init", name) if seed is None else seed


def build_saes(cfg: RunConfig, inputs: Inputs) -> dict[str, SAE]:
    """The SAEs of a run: width and metadata from what it reads, normalisation on unless it was chosen.

    Raises:
        HookNotFoundError, ShapeError: a site that is not there, or whose width is not the config's `d_in`.
    """
    completed = completed_configs(cfg, inputs)
    return {name: _new_sae(entry, completed[name], _seed(cfg, name)) for name, entry in cfg.saes.items()}


def completed_configs(cfg: RunConfig, inputs: Inputs) -> dict[str, SAEConfig]:
    """What the SAEs of a run are made of: their configs with all that follows from what they read."""
    metadata = inputs.metadata
    return {name: _complete(entry, inputs, metadata) for name, entry in cfg.saes.items()}


def _new_sae(entry: SAEEntry, completed: SAEConfig, seed: int) -> SAE:
    if entry.start is None:
        return completed.build(seed=seed)
    return started_from(entry.start, entry.sae, completed, seed=seed)


def _complete(entry: SAEEntry, inputs: Inputs, known: Mapping[str, Any]) -> SAEConfig:
    reads, writes = entry.sites
    read, written = (inputs.widths(sites) for sites in (reads, writes))
    for sites in (read, written):
        if len(set(sites.values())) > 1:
            found = ", ".join(f"{site!r} {width}" for site, width in sites.items())
            raise ShapeError(f"the sites of one SAE have to be of one width, found {found}")
    width = read[reads[0]]
    if entry.sae.d_in not in (None, width):
        raise ShapeError(
            f"sae.d_in is {entry.sae.d_in}, but {reads[0]!r} is {width} wide: leave d_in out or set it to {width}"
        )
    several = not isinstance(entry.hook, str)
    shapes: dict[str, Any] = {"d_in": width, "in_shape": (len(reads), width) if several else None}
    if entry.hook_out is not None or entry.sae.cross_layer:
        d_out = written[writes[0]]
        shapes["out_shape"] = (d_out,) if isinstance(entry.hook_out, str) else (len(writes), d_out)
    for name, shape in shapes.items():
        if name != "d_in" and getattr(entry.sae, name) not in (None, shape):
            raise ShapeError(f"sae.{name} is {getattr(entry.sae, name)}, the sites give {shape}: leave it out")
    facts: dict[str, Any] = {key: value for key, value in known.items() if value is not None}
    for site, out in ((entry.hook, ""), (entry.hook_out, "_out")):
        name, head = split_head(site) if isinstance(site, str) else (None, None)
        path = None if name is None else inputs.module_path(name)
        facts |= {f"hook_name{out}": name, f"hook_head_index{out}": head, f"hf_hook_name{out}": path}
    metadata = dataclasses.replace(entry.sae.metadata, **facts)
    metadata.extra = copy.deepcopy(metadata.extra)
    if several:
        ours = metadata.extra.setdefault("sae_kit", {})
        ours |= {"hook_names": list(reads)} | ({"hook_names_out": list(writes)} if writes != reads else {})
    return dataclasses.replace(
        entry.sae,
        **shapes,
        normalize_activations=entry.sae.normalize_activations or "expected_average_only_in",
        metadata=metadata,
    )
