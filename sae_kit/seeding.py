"""One seed, many independent generators.

Each consumer of randomness owns a generator whose seed is a hash of the run's seed and of what it is for.
So adding an SAE to a run changes neither the order of the data nor the initial weights of the others, and the
global generators are never read or written.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, name: str = "", index: int = 0) -> int:
    """First 8 bytes of SHA-256 of `"{seed}/{purpose}/{name}/{index}"`, as a non-negative 63-bit integer."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(
    seed: int, purpose: str, name: str = "", index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator of its own for one purpose ("init", "buffer", "shards", "eval", ...)."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, name, index))
