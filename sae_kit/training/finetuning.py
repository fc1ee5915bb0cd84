"""Training that begins from an SAE that exists."""

import dataclasses

import torch

from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.sae_config import SAEConfig

COUNTERS = ("tokens_since_fired", "firing_count", "tokens_seen")
"""What an SAE has seen is counted anew."""


def started_from(folder: str, asked: SAEConfig, completed: SAEConfig, *, seed: int) -> SAE:
    """An SAE with the weights, thresholds and statistics of the one in `folder`, to be trained as `asked`.

    What it computes is a matter of the file; of `asked` come the fields that shape training alone. `completed` has
    width and metadata of the run.

    Raises:
        ConfigError: `asked` sets a field that the file has another value of, or is of another architecture.
    """
    found = SAE.load_from_disk(folder)
    if found.cfg.architecture != asked.architecture:
        raise ConfigError(
            f"start: {folder} holds a {found.cfg.architecture} SAE, and sae.architecture is {asked.architecture}: "
            f"set it to {found.cfg.architecture}, or start from a checkpoint, which holds an SAE as it was trained"
        )
    own = {field.name for field in dataclasses.fields(asked) if field.metadata.get("training_only")} | {"metadata"}
    lasting = [field for field in dataclasses.fields(asked) if field.name not in own]
    differing = [
        f"sae.{field.name} is {getattr(asked, field.name)!r}, there it is {getattr(found.cfg, field.name)!r}"
        for field in lasting
        if getattr(asked, field.name) not in (field.default, getattr(found.cfg, field.name))
    ]
    if found.cfg.geometry() != completed.geometry():
        differing.append(f"the run gives {completed.geometry()}, there it is {found.cfg.geometry()}")
    if differing:
        raise ConfigError(f"start: {folder} holds another SAE: {'; '.join(differing)}")
    changes = {name: getattr(asked, name) for name in own - {"metadata"}}
    sae = dataclasses.replace(found.cfg, **changes, metadata=completed.metadata).build(seed=seed)
    with torch.no_grad():
        tensors = dict(found.named_parameters()) | dict(found.named_buffers())
        for name, tensor in (*sae.named_parameters(), *sae.named_buffers()):
            if name not in COUNTERS and name in tensors:
                tensor.copy_(tensors[name])
    return sae
