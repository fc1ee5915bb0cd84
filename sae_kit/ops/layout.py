"""Where the entries of sparse codes are: bag by bag, and the same entries latent by latent."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Groups(NamedTuple):
    """Entries sorted by something: group g has the entries order[offsets[g]] to order[offsets[g + 1] - 1]."""

    order: Int[Tensor, " entries"]
    offsets: Int[Tensor, " groups_plus_1"]


class Layout:
    """The latent of every entry [entries] and the bags that the entries lie in: bag b ends at offsets[b + 1].

    Everything else is found when it is first asked for and then kept: all codes that differ in their values alone share
    one layout, and its sorted order serves all their gradients. (Not by `cached_property`, whose lock torch.compile
    cannot follow.)
    """

    def __init__(self, indices: Int[Tensor, " entries"], offsets: Int[Tensor, " bags_plus_1"], n_latents: int) -> None:
        self.indices, self.offsets, self.n_latents = indices, offsets, n_latents
        self._bag: Int[Tensor, " entries"] | None = None
        self._by_latent: Groups | None = None

    @property
    def n_bags(self) -> int:
        return len(self.offsets) - 1

    @property
    def bag(self) -> Int[Tensor, " entries"]:
        """The bag of every entry."""
        if self._bag is None:
            bags = torch.arange(self.n_bags, device=self.indices.device)
            self._bag = bags.repeat_interleave(self.offsets.diff(), output_size=len(self.indices))
        return self._bag

    @property
    def by_latent(self) -> Groups:
        """The entries of every latent, in the order of their bags."""
        if self._by_latent is None:
            self._by_latent = grouped(self.indices, self.n_latents)
        return self._by_latent


def grouped(keys: Int[Tensor, " entries"], groups: int) -> Groups:
    """Entries sorted by keys from 0 to `groups` - 1; entries with the same key keep their order."""
    found, order = keys.sort(stable=True)
    return Groups(order, torch.searchsorted(found, torch.arange(groups + 1, device=keys.device)))
