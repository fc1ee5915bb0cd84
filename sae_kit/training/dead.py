"""Dead latents: who has been silent for how long, counted in tokens."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_kit.data.batch import State
from sae_kit.ops import Codes, firing_counts
from sae_kit.sae import SAE


class DeadLatents:
    """The counters of one SAE in training, and the list of latents that have been silent for `after` tokens.

    The list (`candidates`, kept only if `listed`) is what AuxK works on. It is read from the device every `after / 10`
    tokens, at most a million; in between, latents that fired again are masked there, and one that dies waits.
    """

    def __init__(self, sae: SAE, after: int, *, listed: bool = True) -> None:
        self.after = after
        self.listed = listed
        self.refresh_every = max(min(1_000_000, after // 10), 1)
        self._sae = sae
        self._next_refresh = 0
        self.candidates: Int[Tensor, " candidates"] = torch.empty(0, dtype=torch.int64, device=sae.device)

    def observe(self, codes: Codes, rows: int, tokens: int) -> Int[Tensor, " n_latents"]:
        """Count the firings of a batch of `rows`, `tokens` rows into the run: once per step, before `mask` is read.

        Returns in how many rows each latent fired.
        """
        sae = self._sae
        fired = firing_counts(codes)
        sae.firing_count += fired
        sae.tokens_seen += rows
        sae.tokens_since_fired += rows
        sae.tokens_since_fired.masked_fill_(fired > 0, 0)
        if self.listed and tokens >= self._next_refresh:
            self.candidates = self.mask().nonzero().squeeze(1)
            self._next_refresh = tokens + self.refresh_every
        return fired

    def mask(self) -> Bool[Tensor, " n_latents"]:
        """Which latents are dead now."""
        return self._sae.tokens_since_fired >= self.after

    def state_dict(self) -> State:
        """Where the list stands; the counters are the SAE's own."""
        return {"candidates": self.candidates, "next_refresh": self._next_refresh}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self.candidates = state["candidates"].to(self._sae.device, copy=True)
        self._next_refresh = int(state["next_refresh"])
