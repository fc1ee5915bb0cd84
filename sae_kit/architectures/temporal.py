"""Temporal: attention over earlier tokens predicts a token, sparse latents say what is new in it (arXiv 2511.01836).

Loaded and used, never trained here. Activations are sequences; λ₀ = 1 / (4 d_in). From r = x − a·b_dec, each layer
subtracts what it predicts, by as much as the prediction D explains of r:

    e = relu(λ₀ r W_enc)      p = relu(attention(e from earlier tokens, e))      D = p W_dec
    s = ⟨D, r⟩ / (‖D‖ + 1e-6)²      z ← z + s·p      r ← r − s·D

The code is then c = f(λ₀ r W_enc), and the output (c + z) W_dec + b_dec. Codes are the new part alone; the predicted
part z W_dec goes to the output beside them (`RowContext.extra`), so that a spliced SAE includes it.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sae_kit.errors import ConfigError
from sae_kit.normalization import ESTIMATED, Normalization
from sae_kit.ops import Codes, SparseCodes, widen
from sae_kit.registry import register
from sae_kit.sae import SAE, Encoding
from sae_kit.sae_config import SAEConfig
from sae_kit.seeding import generator

SMALLEST_PREDICTION = 1e-6


@dataclass(frozen=True, kw_only=True)
class TemporalSAEConfig(SAEConfig):
    """A sparse code for what attention over the tokens before does not predict."""

    # Statistics that training estimates have no one to estimate them.
    normalizations = (SAEConfig.normalizations | {"constant_scalar_rescale"}) - ESTIMATED

    n_heads: int = 8
    """heads of each attention layer"""
    n_attn_layers: int = 1
    """attention layers, each of which predicts what those before it left"""
    bottleneck_factor: int = 64
    """queries and keys have d_sae / bottleneck_factor features"""
    sae_diff_type: Literal["relu", "topk"] = "topk"
    """how the latents of the new part switch on"""
    kval_topk: int | None = None
    """topk: latents per token; None = all that are positive"""
    tied_weights: bool = True
    """the encoder is the transposed decoder"""
    activation_normalization_factor: float = 1.0
    """factor of constant_scalar_rescale, which is the normalisation if the factor is not 1 and none is named"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_heads", "n_attn_layers", "bottleneck_factor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.d_sae % (self.n_heads * self.bottleneck_factor):
            raise ConfigError(
                f"d_sae must be a multiple of n_heads · bottleneck_factor = {self.n_heads * self.bottleneck_factor}, "
                f"found {self.d_sae}"
            )
        if self.kval_topk is not None and not 1 <= self.kval_topk <= self.d_sae:
            raise ConfigError(f"kval_topk must lie between 1 and d_sae = {self.d_sae}, found {self.kval_topk}")
        if not self.activation_normalization_factor > 0:
            raise ConfigError(
                f"activation_normalization_factor must be positive, found {self.activation_normalization_factor}"
            )


@register("temporal", TemporalSAEConfig)
class TemporalSAE(SAE):
    """Codes of sequences [..., tokens, d_in]; [d_in] alone is a sequence of one token, [tokens, d_in] is one sequence.

    Decoding needs the sequence as well, for the predicted part: `decode(acts, context=sae.row_context(u))`.
    """

    cfg: TemporalSAEConfig
    trainable = False
    norm_fold_is_exact = False
    geometries = frozenset({"sae"})
    reads_sequences = True

    def __init__(self, cfg: TemporalSAEConfig, *, seed: int = 0) -> None:
        if isinstance(cfg, TemporalSAEConfig) and cfg.normalize_activations is None:
            scaled = cfg.activation_normalization_factor != 1
            cfg = dataclasses.replace(cfg, normalize_activations="constant_scalar_rescale" if scaled else "none")
        super().__init__(cfg, seed=seed)
        self.attn_layers = nn.ModuleList(
            _Attention(cfg.d_sae, cfg.n_heads, cfg.bottleneck_factor, self.dtype, self.device)
            for _ in range(cfg.n_attn_layers)
        )
        if not self.b_dec.is_meta:
            for layer, attention in enumerate(self.attn_layers):
                _initialize(cast("_Attention", attention), seed, f"init_attention_{layer}")

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes()
        # W_enc goes first: once there is a W_dec the name is taken, by the view of it.
        names = ("W_dec", "b_dec") if self.cfg.tied_weights else ("W_enc", "W_dec", "b_dec")
        return {name: shapes[name] for name in names}

    def make_normalization(self, shape: tuple[int, ...]) -> Normalization:
        made = super().make_normalization(shape)
        made.factor = self.cfg.activation_normalization_factor
        return made

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoder; a view of the decoder where they are tied."""
        own = self._parameters.get("W_enc")
        return self.W_dec.T if own is None else own

    @property
    def adds_b_dec(self) -> bool:
        return bool(self.cfg.apply_b_dec_to_input) or not self.cfg.tied_weights

    @property
    def needs_context(self) -> bool:
        return True

    def encoding(self, x: Float[Tensor, "..."], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        _, prediction, left = self._predict(x)
        pre = self._project(left)
        pre = on_pre(pre) if on_pre else pre
        return Encoding(self._new(pre), pre, prediction)

    def extra_output(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """z W_dec, the predicted part of x."""
        return self._predict(x)[1]

    def predicted_codes(self, u: Float[Tensor, "..."]) -> Float[Tensor, "... d_sae"]:
        """z of raw sequences: what attention over earlier tokens says of each, in the latents' terms."""
        return self._predict(self.norm_in(self._prepare(u)[0]))[0]

    def _predict(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_in"], Float[Tensor, "... d_in"]]:
        """Predicted codes z, the predicted part z W_dec, and what is left, (x − a·b_dec) − z W_dec."""
        sequences = x.reshape(-1, x.shape[-1])[None] if x.ndim < 3 else x.flatten(0, -3)
        left = sequences - self.b_dec if self.cfg.apply_b_dec_to_input else sequences
        codes, prediction = left.new_zeros(*left.shape[:-1], self.d_sae), torch.zeros_like(left)
        for attention in self.attn_layers:
            own = torch.relu(self._project(left))
            # A token sees those before it, and the first one zeros.
            earlier = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
            predicted = torch.relu(attention(earlier, own))
            direction = predicted @ self.W_dec
            wide = widen(direction)
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + SMALLEST_PREDICTION
            scale = ((wide * left).sum(dim=-1, keepdim=True) / length.square()).to(x.dtype)
            codes, prediction = codes + scale * predicted, prediction + scale * direction
            left = left - scale * direction
        return codes.reshape(*x.shape[:-1], self.d_sae), prediction.reshape(x.shape), left.reshape(x.shape)

    def _project(self, rows: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        return (rows / (4 * self.d_in)) @ self.W_enc

    def _new(self, pre: Float[Tensor, "... d_sae"]) -> Codes:
        acts, k = torch.relu(pre), self.cfg.kval_topk
        if self.cfg.sae_diff_type == "relu" or k is None:
            return acts
        values, indices = acts.reshape(-1, self.d_sae).topk(k, dim=1, sorted=False)
        return SparseCodes(values, indices, self.d_sae, tuple(pre.shape[:-1]))

    # ---- folds: weights are compared with each other in many places, so scales stay where they are -------------------

    def fold_normalization(self) -> "TemporalSAE":
        """Nothing is moved: a temporal SAE keeps its normalisation."""
        return self

    def decoder_norm_folds(self) -> bool:
        return False


class _Attention(nn.Module):
    """Causal attention of codes; queries and keys are narrow, values and output are as wide as the codes."""

    def __init__(self, width: int, n_heads: int, bottleneck: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.n_heads = n_heads

        def linear(features: int) -> nn.Linear:  # without the weights that torch would draw from its own generator
            return cast("nn.Linear", nn.utils.skip_init(nn.Linear, width, features, dtype=dtype, device=device))

        self.k_ctx, self.q_target = linear(width // bottleneck), linear(width // bottleneck)
        self.v_ctx, self.c_proj = linear(width), linear(width)

    def forward(
        self, context: Float[Tensor, "n tokens d_sae"], target: Float[Tensor, "n tokens d_sae"]
    ) -> Float[Tensor, "n tokens d_sae"]:
        parts = (self.q_target(target), self.k_ctx(context), self.v_ctx(context))
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def _initialize(attention: _Attention, seed: int, purpose: str) -> None:
    """Rows of norm 1 / √(features of one head, or of all for the output), biases zero."""
    for name, linear in attention.named_children():
        assert isinstance(linear, nn.Linear)
        drawn = torch.randn(linear.weight.shape, generator=generator(seed, f"{purpose}_{name}"))
        heads = 1 if name == "c_proj" else attention.n_heads
        linear.weight.copy_(F.normalize(drawn, dim=1) / math.sqrt(linear.out_features / heads))
        linear.bias.zero_()
