"""What the TopK family shares: latents are compared with each other instead of being penalised.

z = h·n, n the norm of the decoder row (or z = h without rescaling) decides who is kept. The kept value is relu(h)·n and
the decoder divides by n again, so n decides only the ranking and its gradient is zero. The codes here carry relu(h);
`encode` multiplies by n.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit import config as trees
from sae_kit.annealing import KAnnealing
from sae_kit.config import Tokens
from sae_kit.conversions import to_jumprelu, to_topk
from sae_kit.errors import ConfigError
from sae_kit.ops import Largest, SparseCodes, largest_of_rows
from sae_kit.sae import SAE, Encoding
from sae_kit.sae_config import SAEConfig, training_only
from sae_kit.weights import Slice

LONGEST_WINDOW = 1_000_000  # tokens over which a threshold is averaged, unless asked for


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(SAEConfig):
    """Fields of every architecture that keeps a number of latents."""

    rescale_acts_by_decoder_norm: bool = True
    """rank and report latents as h·n, n the norm of their decoder row"""
    aux_coefficient: float = training_only(1 / 32)
    """weight of AuxK, the loss in which dead latents explain what the living ones miss; 0 = off"""
    k_annealing: KAnnealing | None = training_only(None)
    """begin with a larger k; None = the same k throughout"""

    k: int | float = 32
    """latents selected in each row"""

    def values(self, tokens: int, total: int) -> dict[str, float]:
        annealed = {} if self.k_annealing is None else {"k": self.k_annealing.k(float(self.k), tokens, total)}
        return super().values(tokens, total) | annealed

    def check_k(self, k: int | float) -> None:
        """Refuse numbers of latents that cannot be selected."""
        if not 0 < k <= self.d_sae:
            raise ConfigError(f"k must lie between 1 and d_sae = {self.d_sae}, found {k}")
        if self.k_annealing is not None and not k <= self.k_annealing.k_start(float(k)) <= self.d_sae:
            raise ConfigError(
                f"k_annealing.start must lie between k = {k} and d_sae = {self.d_sae}, found {self.k_annealing.start}"
            )


class SelectionSAE(SAE):
    """Latents are ranked; whoever is selected passes through `activation`."""

    norm_fold_is_exact = False

    def ranked(self, pre: Float[Tensor, "rows n_latents"]) -> Float[Tensor, "rows n_latents"]:
        """z, without gradient."""
        factor = self.rank_factor()
        return pre.detach() if factor is None else pre.detach() * factor

    def parts(
        self, x: Float[Tensor, "rows ..."], pre: Float[Tensor, "rows n_latents"] | None, multiple: int = 1
    ) -> Iterator[Slice]:
        """Slices of z: of the pre-activations given, or else as they are computed."""
        if pre is None:
            yield from self.slices(x, self.b_enc, self.rank_factor(), multiple)
            return
        z = self.ranked(pre)
        for layer in range(self.geometry.layers):
            yield Slice(self.geometry.latents(z, layer), 0, layer * self.d_sae, layer)

    def codes(
        self,
        x: Float[Tensor, "rows ..."],
        pre: Float[Tensor, "rows n_latents"] | None,
        picked: SparseCodes,
    ) -> SparseCodes:
        """Codes of those that were picked by their z, in the graph of `pre` if that was given."""
        if pre is not None:
            found = picked.taken_from(pre)
        else:
            factor = self.rank_factor()
            found = self.with_gradient(x, self.b_enc, picked if factor is None else picked.scale(1 / factor))
        return found.with_values(self.activation(found.values))


# ---- k of each row -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RowSelectionConfig(SelectionConfig):
    """k latents of each row."""

    k: int = 32
    """latents selected in each row; of a cross-layer transcoder, in each layer"""
    selection: Literal["topk", "groupmax"] = "topk"
    """groupmax: the largest of each of k groups of neighbours, which needs no sorting"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_k(self.k)
        if self.k != int(self.k):
            raise ConfigError(f"k must be a whole number of latents for each row, found {self.k}")
        if self.selection == "groupmax" and self.d_sae % self.k:
            raise ConfigError(f"groupmax needs d_sae to be a multiple of k, found {self.d_sae} and {self.k}")
        if self.selection == "groupmax" and self.k_annealing is not None:
            raise ConfigError("groupmax has as many groups as latents are on: k_annealing does not fit it")


class RowSelectionSAE(SelectionSAE):
    """The k of largest `strength` in each row, each block of a cross-layer transcoder by itself."""

    cfg: RowSelectionConfig

    @abstractmethod
    def strength(self, z: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """What latents are compared by."""

    def encoding(self, x: Float[Tensor, "..."], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        rows, pre = x.reshape(-1, *self.geometry.in_shape), None
        if on_pre or torch.is_grad_enabled():  # whatever someone may want to differentiate, once, twice or forwards
            pre = self.preactivations(x)
            pre = (on_pre(pre) if on_pre else pre).reshape(-1, self.geometry.n_latents)
        codes = self.codes(rows, pre, self._picked(rows, pre, self.cfg.k))
        return Encoding(dataclasses.replace(codes, leading=self._leading(x)))

    def training_encoding(self, x: Float[Tensor, "rows ..."], values: Mapping[str, float]) -> Encoding:
        pre = self.preactivations(x) if self.shows_all_pre else None
        k = math.ceil(values.get("k", self.cfg.k))
        return Encoding(self.codes(x, pre, self._picked(x, pre, k)), pre)

    @torch.no_grad()
    def _picked(
        self, rows: Float[Tensor, "rows ..."], pre: Float[Tensor, "rows n_latents"] | None, k: int
    ) -> SparseCodes:
        """z and indices of those who are kept: the best of each slice compete with each other."""
        size = self.d_sae // k if self.cfg.selection == "groupmax" else 1
        best: list[dict[int, list[tuple[Tensor, Tensor]]]] = [{} for _ in range(self.geometry.layers)]
        for part in self.parts(rows, pre, size):
            strength = self.strength(part.values)
            if size > 1:
                columns = largest_of_groups(strength, size)
            else:
                columns = largest_of_rows(strength, min(k, strength.shape[1]))
            found = part.values.gather(1, columns), columns + part.latent
            best[part.layer].setdefault(part.row, []).append(found)
        blocks = [[self._best(found, k) for found in block.values()] for block in best]
        z, latents = (
            torch.cat([torch.cat([found[which] for found in block]) for block in blocks], dim=1) for which in (0, 1)
        )
        return SparseCodes(z, latents, self.geometry.n_latents, (len(rows),))

    def _best(self, found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
        """z and indices of the k best of what was found of some rows."""
        z, latents = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
        if z.shape[1] == k:
            return z, latents
        columns = largest_of_rows(self.strength(z), k)
        return z.gather(1, columns), latents.gather(1, columns)


def largest_of_groups(numbers: Float[Tensor, "rows width"], size: int) -> Int[Tensor, "rows groups"]:
    """The column of the largest of each group of `size` neighbours (Eleuther's sparsify)."""
    best = numbers.unflatten(1, (-1, size)).argmax(dim=2)
    return best + torch.arange(best.shape[1], device=best.device) * size


# ---- k·B of a batch of B rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BatchSelectionConfig(SelectionConfig):
    """k latents of each row on average: the k·B largest of a batch of B rows."""

    k: int | float = 32
    """mean number of latents in each row; of a cross-layer transcoder, in each layer"""
    k_scope: Literal["layer", "batch"] = "layer"
    """cross-layer transcoder: k·B in each layer, or layers·k·B over all of them"""
    threshold_window_tokens: Tokens | None = training_only(None)
    """tokens over which the threshold for use is averaged; None = the smaller of 1M and a tenth of the run"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_k(self.k)
        window = self.threshold_window_tokens
        if window is not None and trees.resolve_tokens(window, 100, "threshold_window_tokens") == 0:
            raise ConfigError("threshold_window_tokens must be positive, found 0")
        if self.k_scope != "layer" and not self.cross_layer:
            raise ConfigError("k_scope is for cross-layer transcoders: leave it out or set cross_layer")

    def values(self, tokens: int, total: int) -> dict[str, float]:
        wanted = self.threshold_window_tokens
        own = min(LONGEST_WINDOW, total // 10) if wanted is None else wanted
        window = max(trees.resolve_tokens(own, total, "threshold_window_tokens"), 1)
        return super().values(tokens, total) | {"threshold_window_tokens": float(window)}


class BatchSelectionSAE(SelectionSAE):
    """Training keeps the k·B largest of relu(z) over the batch; use keeps relu(z) above the mean threshold of training.

    Which rule runs is decided by the method called, never by `module.training`. θ̄ is an average of τ, the smallest kept
    value of a batch: m ← βm + (1 − β)τ, w ← βw + (1 − β), θ̄ = m/w, β = exp(−B / window); the division makes it right
    from the first step on. Before it, `encode` keeps the ceil(k) largest of each row.
    """

    cfg: BatchSelectionConfig
    selects_over_batch = True
    exact_dtype_tensors = SAE.exact_dtype_tensors | {"threshold_average", "threshold_weight"}
    threshold_average: Tensor
    threshold_weight: Tensor

    def __init__(self, cfg: BatchSelectionConfig, *, seed: int = 0) -> None:
        super().__init__(cfg, seed=seed)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        for name in ("threshold_average", "threshold_weight"):
            zeros = torch.zeros(self._scopes, dtype=wide, device=self.tokens_seen.device)
            self.register_buffer(name, zeros if self._scopes > 1 else zeros.squeeze(0))

    @property
    def _scopes(self) -> int:
        """Sets of latents that compete with each other."""
        return self.geometry.layers if self.cfg.k_scope == "layer" else 1

    @property
    def inference_threshold(self) -> Float[Tensor, " n_latents"] | None:
        """θ̄ of every latent, in units of z; None before the first estimate."""
        if not (self.threshold_weight > 0).all():
            return None
        threshold = (self.threshold_average / self.threshold_weight).reshape(-1)
        return threshold.repeat_interleave(self.geometry.n_latents // self._scopes)

    def set_threshold(self, threshold: Float[Tensor, "..."] | float) -> None:
        """Use this θ̄, in units of z, from now on; training goes on averaging from it."""
        self.threshold_average.copy_(torch.as_tensor(threshold))
        self.threshold_weight.fill_(1.0)

    def encoding(self, x: Float[Tensor, "..."], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        pre = self.preactivations(x)
        pre = on_pre(pre) if on_pre else pre
        rows = pre.reshape(-1, self.geometry.n_latents)
        z, threshold = self.ranked(rows), self.inference_threshold
        if threshold is not None:
            on = z > threshold.clamp(min=0)
        else:
            blocks = z.reshape(-1, self.d_sae)
            best = blocks.topk(math.ceil(self.cfg.k), sorted=False).indices
            on = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, best, True).reshape(z.shape)
        return Encoding((torch.relu(rows) * on).reshape(pre.shape), pre)

    def training_encoding(self, x: Float[Tensor, "rows ..."], values: Mapping[str, float]) -> Encoding:
        pre = self.preactivations(x) if self.shows_all_pre else None
        number = max(1, round(values.get("k", self.cfg.k) * len(x) * self.geometry.layers / self._scopes))
        return Encoding(self.codes(x, pre, self._picked(x, pre, number)), pre)

    @torch.no_grad()
    def _picked(
        self, x: Float[Tensor, "rows ..."], pre: Float[Tensor, "rows n_latents"] | None, number: int
    ) -> SparseCodes:
        """z of the `number` largest of each scope, in the order of rows and latents.

        Slice after slice goes into the largest so far, the least of which is a bound for the next.
        """
        n_latents = self.geometry.n_latents
        per_scope = n_latents // self._scopes
        kept = [Largest(number) for _ in range(self._scopes)]
        for part in self.parts(x, pre):
            kept[part.latent // per_scope].add(part.values, part.row * n_latents + part.latent, n_latents)
        z, keys = (torch.cat(each) for each in zip(*(best.result() for best in kept), strict=True))
        keys, order = keys.sort()
        return SparseCodes.from_keys(keys, z[order], len(x), n_latents)

    @torch.no_grad()
    def observe(self, encoding: Encoding, values: Mapping[str, float]) -> None:
        """Take the smallest kept value of this batch into the threshold's average."""
        codes = encoding.codes
        assert isinstance(codes, SparseCodes)
        z = codes.scale(self.decoder_norms()).values if self.rescales else codes.values
        scope = codes.indices // (self.geometry.n_latents // self._scopes)
        smallest = torch.full((self._scopes,), torch.inf, dtype=self.threshold_average.dtype, device=z.device)
        kept = torch.where(z > 0, z, torch.inf).to(smallest.dtype)
        smallest.scatter_reduce_(0, scope, kept, "amin")
        smallest = smallest.reshape(self.threshold_average.shape)
        beta = math.exp(-codes.n_rows / values["threshold_window_tokens"])
        any_kept = smallest.isfinite()
        averaged = beta * self.threshold_average + (1 - beta) * torch.where(any_kept, smallest, 0.0)
        self.threshold_average.copy_(torch.where(any_kept, averaged, self.threshold_average))
        self.threshold_weight.copy_(
            torch.where(any_kept, beta * self.threshold_weight + (1 - beta), self.threshold_weight)
        )

    def schedule_settled(self) -> None:
        """k has come to its end: thresholds of larger k count no more."""
        self.threshold_average.zero_()
        self.threshold_weight.zero_()

    def scale_biases(self, factor: Float[Tensor, "..."]) -> None:
        super().scale_biases(factor)
        if not self.rescales:  # θ̄ is compared with h, and the norms that are folded are equal
            self.threshold_average.mul_(factor.reshape(self._scopes, -1)[:, 0].view_as(self.threshold_average))

    def training_state(self) -> dict[str, Float[Tensor, ""]]:
        threshold = self.threshold_average / self.threshold_weight.clamp(min=1e-30)
        return {"metrics/topk_threshold": threshold.mean()}

    def for_use(self) -> SAE:
        """A JumpReLU SAE with this threshold; before the first estimate, a TopK SAE."""
        threshold = self.inference_threshold
        if threshold is None:
            return to_topk(self, math.ceil(self.cfg.k))
        return to_jumprelu(self, threshold.clamp(min=0) / self.decoder_norms() if self.rescales else threshold)
