"""Which device a run uses."""

from __future__ import annotations

import torch

from sae_kit.errors import ConfigError


def pick_device(name: str, field: str) -> torch.device:
    """The device called `name`; auto is cuda where there is one, else cpu. `field` names it in errors.

    Not mps by itself: it lacks float64, in which statistics are kept.

    Raises:
        ConfigError: there is no such device here; the message lists those that there are.
    """
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.empty(0, device=wanted)
        return torch.device(wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a build without CUDA
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        there = ["cpu"] if kind is None else ["cpu", *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
        raise ConfigError(f"{field}: expected auto or one of {', '.join(there)}, found {name!r}") from error
