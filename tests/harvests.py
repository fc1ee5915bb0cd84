"""A harvest without a model: rows, ids and gaps drawn from seeded generators, forward by forward."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sae_kit.data.batch import Harvested, State, TokenBatch
from sae_kit.seeding import generator

SPECIAL = 300
"""an id that bfloat16 rounds to that of its neighbours"""


class RandomHarvest(Iterator[Harvested]):
    """Forwards of 4 contexts of `context` ids; positions with the id `SPECIAL` are left out.

    Column 0 of the site "a" is the number of the row, over all that were given.
    """

    def __init__(
        self,
        *,
        widths: Mapping[str, int] | None = None,
        forwards: int = 100,
        context: int = 8,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        padded: bool = False,
        pause: float = 0.0,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.widths = dict(widths or {"a": 6, "b": 4})
        self.forwards, self.context, self.seed, self.dtype, self.padded = forwards, context, seed, dtype, padded
        self.pause, self.facts, self.loads = pause, dict(facts or {}), 0
        self.at = self.rows = 0
        self.norms = torch.zeros(3)

    def __next__(self) -> Harvested:
        if self.at == self.forwards:
            raise StopIteration
        time.sleep(self.pause)
        draws = generator(self.seed, "harvest", index=self.at)
        ids = torch.randint(SPECIAL - 3, SPECIAL + 4, (4, self.context), generator=draws)
        lengths = torch.randint(1, self.context + 1, (4,), generator=draws) if self.padded else None
        there = torch.ones_like(ids) if lengths is None else torch.arange(self.context) < lengths[:, None]
        kept = (there.bool() & (ids != SPECIAL)).flatten().nonzero().squeeze(1)
        rows = {site: torch.randn(len(kept), width, generator=draws) for site, width in self.widths.items()}
        if "a" in rows:
            rows["a"][:, 0] = torch.arange(self.rows, self.rows + len(kept))
        self.at, self.rows = self.at + 1, self.rows + len(kept)
        self.norms += torch.tensor([1.0, len(kept), ids.sum()])
        return Harvested({site: r.to(self.dtype) for site, r in rows.items()}, TokenBatch(ids, lengths), kept)

    @property
    def counters(self) -> dict[str, int | float]:
        return {"lm_tokens": self.at * 4 * self.context, "dropped_special": self.at * 4 * self.context - self.rows}

    @property
    def provenance(self) -> dict[str, Any]:
        return {"model": {"name": "random", "seed": self.seed, **self.facts}, "sites": list(self.widths)}

    def state_dict(self) -> State:
        return {"numbers": [self.at, self.rows], "filters": {"norms": self.norms}}

    def load_state_dict(self, state: State) -> None:
        self.loads += 1
        self.at, self.rows = state["numbers"]
        self.norms = state["filters"]["norms"].clone()

    def close(self) -> None:
        pass


def all_rows(harvest: RandomHarvest) -> dict[str, torch.Tensor]:
    """Everything that a harvest gives."""
    forwards = list(harvest)
    return {site: torch.cat([forward.rows[site] for forward in forwards]) for site in harvest.widths}
