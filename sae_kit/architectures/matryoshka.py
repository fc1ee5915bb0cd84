"""Matryoshka BatchTopK: nested dictionaries, whose first latents have to do without the others (2503.17547)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.architectures._selection import BatchSelectionConfig, BatchSelectionSAE
from sae_kit.errors import ConfigError
from sae_kit.ops import SparseCodes
from sae_kit.registry import register
from sae_kit.sae import AuxiliaryTask, Encoding, squared_error
from sae_kit.sae_config import training_only
from sae_kit.seeding import generator

SHARES = (1, 3, 7, 15, 32)
"""Default prefixes, in 32nds of d_sae."""


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKSAEConfig(BatchSelectionConfig):
    """General concepts in the first latents, details in the later ones: every prefix reconstructs by itself."""

    matryoshka_widths: tuple[int, ...] | None = training_only(None)
    """lengths of the prefixes; d_sae is added if it is missing; None = (1, 3, 7, 15, 32) / 32 of d_sae"""
    matryoshka_weights: tuple[float, ...] | None = training_only(None)
    """weights of their errors, scaled to a sum of 1; None = equal"""
    matryoshka_random_prefixes: int | None = training_only(None)
    """draw so many lengths anew for each step, d_sae among them, instead of fixed ones"""
    use_matryoshka_aux_loss: bool = training_only(False)
    """AuxK of each level: its dead latents explain what its prefix misses"""

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.matryoshka_widths
        if widths is not None:
            rising = all(a < b for a, b in pairwise((0, *widths)))
            if not widths or not rising or widths[-1] > self.d_sae:
                raise ConfigError(
                    f"matryoshka_widths must be positive, rising and at most d_sae = {self.d_sae}, found {widths}"
                )
        number = self.matryoshka_random_prefixes
        if number is not None:
            if widths is not None or self.matryoshka_weights is not None or self.use_matryoshka_aux_loss:
                raise ConfigError(
                    "matryoshka_random_prefixes draws its own widths, with equal weights and without levels for AuxK: "
                    "leave matryoshka_widths, matryoshka_weights and use_matryoshka_aux_loss out"
                )
            if not 1 <= number <= self.d_sae:
                raise ConfigError(f"matryoshka_random_prefixes must lie between 1 and {self.d_sae}, found {number}")
        weights = self.matryoshka_weights
        if weights is not None and (len(weights) != len(self.widths) or min(weights) < 0 or sum(weights) <= 0):
            raise ConfigError(
                f"matryoshka_weights needs a weight of at least 0 for each of the widths {self.widths}, found {weights}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Lengths of the fixed prefixes, the last of them d_sae."""
        if self.matryoshka_widths is None:
            return tuple(sorted({max(self.d_sae * share // SHARES[-1], 1) for share in SHARES}))
        given = self.matryoshka_widths
        return given if given[-1] == self.d_sae else (*given, self.d_sae)

    @property
    def weights(self) -> tuple[float, ...]:
        """α of the fixed prefixes, of sum 1."""
        given = self.matryoshka_weights or (1.0,) * len(self.widths)
        return tuple(weight / sum(given) for weight in given)


@register("matryoshka_batchtopk", MatryoshkaBatchTopKSAEConfig)
class MatryoshkaBatchTopKSAE(BatchSelectionSAE):
    """One selection over all latents; L_rec = Σ_g α_g E‖ŷ_g − y‖² with ŷ_g from the first w_g of them, Σ α = 1.

    The weights sum to 1, so the balance with AuxK does not depend on the number of levels.
    """

    cfg: MatryoshkaBatchTopKSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    geometries = BatchSelectionSAE.geometries - {"clt"}

    def reconstruction_loss(
        self, encoding: Encoding, y: Float[Tensor, "rows ..."], y_hat: Float[Tensor, "rows ..."]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        if self.cfg.matryoshka_random_prefixes is not None:
            widths = self._random_widths(self.cfg.matryoshka_random_prefixes)
            weights = (1 / len(widths),) * len(widths)
        else:
            widths, weights = self.cfg.widths, self.cfg.weights
        errors = [squared_error(prefix, y) for prefix in self.prefixes(encoding, widths)]
        total = torch.stack([weight * error for weight, error in zip(weights, errors, strict=True)]).sum()
        parts = {"mse_loss": errors[-1]}  # the last prefix is the whole
        if self.cfg.matryoshka_random_prefixes is None:
            parts |= {f"inner_mse_loss_{width}": error for width, error in zip(widths[:-1], errors, strict=False)}
        return total, parts

    def prefixes(self, encoding: Encoding, widths: tuple[int, ...]) -> tuple[Float[Tensor, "rows ..."], ...]:
        """ŷ_g of rising widths, the last of them d_sae: each adds what its own latents write to the one before."""
        assert isinstance(encoding.codes, SparseCodes)
        parts = self.geometry.decode(encoding.codes.at_levels(widths), self.W_dec)
        prefixes = parts.unflatten(0, (-1, len(widths))).cumsum(dim=1) + self.b_dec
        if encoding.extra is not None:
            prefixes = prefixes + encoding.extra[:, None]
        return prefixes.unbind(1)

    def auxiliary_tasks(
        self, encoding: Encoding, y: Float[Tensor, "rows ..."], y_hat: Float[Tensor, "rows ..."], dead: Tensor
    ) -> Iterator[AuxiliaryTask]:
        if not self.cfg.use_matryoshka_aux_loss:
            yield from super().auxiliary_tasks(encoding, y, y_hat, dead)
            return
        with torch.no_grad():
            prefixes = self.prefixes(encoding, self.cfg.widths)
        for (first, last), weight, prefix in zip(
            pairwise((0, *self.cfg.widths)), self.cfg.weights, prefixes, strict=True
        ):
            own = dead[(dead >= first) & (dead < last)]
            if len(own):
                yield AuxiliaryTask(weight, 0, own, (y - prefix).detach().flatten(1))

    def _random_widths(self, number: int) -> tuple[int, ...]:
        """d_sae and number − 1 shorter lengths l with P(l) ∝ √l − √(l − 1), other ones in every step."""
        if number == 1:
            return (self.d_sae,)
        # From the tokens seen, not from a running generator: a resumed run draws the same lengths.
        draw = generator(self.seed, "prefixes", index=int(self.tokens_seen))
        roots = torch.arange(self.d_sae, dtype=torch.float64).sqrt()
        lengths = torch.multinomial(roots.diff(), number - 1, generator=draw) + 1
        return (*sorted(lengths.tolist()), self.d_sae)
