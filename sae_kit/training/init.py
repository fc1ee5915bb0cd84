"""Where training starts from: biases and directions that fit a sample of the activations.

The sample is normalised first; then, in this order: b_dec, decoder directions, decoder norm, encoder, biases of the
latents. The formulas are pure functions of rows in training space; `initialize_from` writes them into an SAE block by
block, so they serve every geometry. Random numbers come from generators of their own, drawn per block of latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError, DataError, ShapeError
from sae_kit.geometry import SMALLEST_NORM
from sae_kit.ops import widen
from sae_kit.sae import SAE
from sae_kit.seeding import generator
from sae_kit.weights import LATENTS_PER_BLOCK

SAMPLE_ROWS, MEDIAN_ROWS, TRIAL_ROWS = 100_000, 32_768, 4_096
"""Rows of the sample that serve at most: for all, for the geometric median, for each norm that is tried."""
CHUNK_LATENTS, CHUNK_NUMBERS = 4_096, 2**26
USUAL_ACTIVE, LARGEST_RATE = 1e4, 0.1  # Anthropic, January 2025: firing rate 10⁴ / S
UNIT_INPUTS = 256  # as in OpenAI's code


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How an SAE starts from the first rows that it sees; the defaults leave it as it was built."""

    b_dec: Literal["zero", "mean", "geometric_median"] = "zero"
    """centre of what is to be reproduced"""
    decoder: Literal["random", "uniform", "active_subspace", "zero"] = "random"
    """random: as built; uniform: entries within ±1/sqrt(all widths written); active_subspace: where activations vary"""
    d_active_subspace: int | None = None
    """dimensions of the active subspace"""
    zero_later_layers: bool = False
    """cross-layer transcoder: decoders to later layers start at zero"""
    decoder_norm: Literal["grid"] | None = None
    """grid: the common norm of least error on the sample; None = the SAE's decoder_init_norm"""
    encoder: Literal["default", "transpose", "uniform", "calibrated"] = "default"
    """transpose: encoder_factor · W_decᵀ; uniform: within ±1/sqrt(d_sae); calibrated: W_decᵀ, unit in gives unit out"""
    encoder_factor: float = 1.0
    """encoder norm over decoder norm of a transposed encoder"""
    b_enc: Literal["zero", "mean_centred", "quantile"] = "zero"
    """mean_centred: mean pre-activation 0; quantile: every latent passes its threshold in the same share of rows"""
    firing_rate: float | None = None
    """that share; None = the smaller of 10,000 / d_sae and 0.1"""

    def __post_init__(self) -> None:
        subspace = self.decoder == "active_subspace"
        if subspace != (self.d_active_subspace is not None):
            raise ConfigError(
                "d_active_subspace and decoder='active_subspace' belong together, found "
                f"{self.d_active_subspace} and {self.decoder!r}"
            )
        if self.d_active_subspace is not None and self.d_active_subspace < 1:
            raise ConfigError(f"d_active_subspace must be at least 1, found {self.d_active_subspace}")
        if not self.encoder_factor > 0:
            raise ConfigError(f"encoder_factor must be positive, found {self.encoder_factor}")
        if self.encoder_factor != 1 and self.encoder != "transpose":
            raise ConfigError(f"encoder_factor is for encoder='transpose', found encoder={self.encoder!r}")
        if self.firing_rate is not None and self.b_enc != "quantile":
            raise ConfigError(f"firing_rate is for b_enc='quantile', found b_enc={self.b_enc!r}")
        if self.firing_rate is not None and not 0 < self.firing_rate < 1:
            raise ConfigError(f"firing_rate must lie between 0 and 1, found {self.firing_rate}")
        if self.decoder_norm == "grid" and (self.decoder == "zero" or self.encoder == "calibrated"):
            other = "decoder='zero'" if self.decoder == "zero" else "encoder='calibrated'"
            raise ConfigError(f"decoder_norm='grid' and {other} both say how long weights are: choose one")


# ---- pure functions on rows in training space ----------------------------------------------------------------------


def geometric_median(
    rows: Float[Tensor, "rows *sites width"], max_iterations: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, "*sites width"]:
    """The point with the least mean distance to the rows, each site by itself (Weiszfeld's algorithm, from the mean).

    It ends when a step is shorter than `tolerance` times the mean distance.
    """
    rows = widen(rows)
    median = rows.mean(dim=0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(rows - median, dim=-1)
        weight = 1 / distance.clamp(min=SMALLEST_NORM)
        moved = torch.einsum("n...,n...d->...d", weight, rows) / weight.sum(dim=0)[..., None]
        step = torch.linalg.vector_norm(moved - median, dim=-1)
        median = moved
        if (step < tolerance * distance.mean(dim=0)).all():
            break
    return median


def mean_levels(rows: Float[Tensor, "rows width"], W_enc: Float[Tensor, "width latents"]) -> Float[Tensor, " latents"]:
    """Mean of rows · W_enc."""
    return rows.mean(dim=0) @ W_enc


def quantile_levels(
    rows: Float[Tensor, "rows width"], W_enc: Float[Tensor, "width latents"], rate: float
) -> Float[Tensor, " latents"]:
    """What each latent of rows · W_enc exceeds in a share `rate` of the rows: in round(rate · rows), at least one."""
    above = min(max(round(rate * len(rows)), 1), len(rows) - 1)
    if above < 1:
        raise DataError(f"b_enc='quantile' needs a sample of at least 2 rows, found {len(rows)}")
    size = max(min(CHUNK_LATENTS, CHUNK_NUMBERS // len(rows)), 1)
    # Halfway between two order statistics, so that rounding cannot put either on the other side.
    parts = [(part.T @ rows.T).topk(above + 1, dim=1).values[:, -2:].mean(dim=1) for part in W_enc.split(size, dim=1)]
    return torch.cat(parts)


def active_subspace(rows: Float[Tensor, "rows width"], rank: int) -> Float[Tensor, "width rank"]:
    """The `rank` orthonormal directions in which the rows vary most (arXiv 2508.16929)."""
    if len(rows) <= rank:
        raise DataError(f"an active subspace of {rank} dimensions needs more rows than that, found {len(rows)}")
    mean = rows.mean(dim=0, dtype=torch.float64)
    width = rows.shape[1]
    covariance = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    for part in rows.split(8_192):
        centred = part.double() - mean
        covariance += centred.T @ centred
    return torch.linalg.eigh(covariance).eigenvectors[:, -rank:].flip(1).to(rows.dtype)


def grid_search(loss: Callable[[float], float]) -> float:
    """The norm of least loss: 50 points from 0.1 to 5, then 20 around the best of them (OpenMOSS)."""
    coarse = min(torch.linspace(0.1, 5, 50, dtype=torch.float64).tolist(), key=loss)
    return min((max(coarse - 0.09 + 0.01 * i, 0.01) for i in range(20)), key=loss)


# ---- into an SAE -----------------------------------------------------------------------------------------------------


def check_init(sae: SAE, cfg: InitConfig) -> None:
    """Refuse what has no meaning for this SAE.

    Raises:
        ConfigError: it says what, and why.
    """
    geometry, name = sae.geometry, f"a {sae.cfg.architecture} {sae.geometry.kind}"
    if "W_enc" not in sae._parameters and cfg.encoder != "default":
        raise ConfigError(
            f"init.encoder={cfg.encoder!r}: {name} has no encoder of its own, it is the transposed decoder"
        )
    if not any(bias in sae._parameters for bias in ("b_enc", "b_gate")) and cfg.b_enc != "zero":
        raise ConfigError(f"init.b_enc={cfg.b_enc!r}: {name} has no biases of latents; leave it out")
    if cfg.encoder in ("transpose", "calibrated") and not geometry.same_site:
        raise ConfigError(
            f"init.encoder={cfg.encoder!r}: {name} writes elsewhere than it reads, so its encoder is not the transpose "
            "of its decoder; choose 'default' or 'uniform'"
        )
    if cfg.decoder == "zero" and geometry.same_site:
        raise ConfigError(f"init.decoder='zero': the encoder of {name} would be its transpose, and zero as well")
    unit = sae.cfg.decoder_norm_constraint == "unit"
    if unit and (cfg.decoder_norm == "grid" or cfg.decoder == "zero"):
        setting = "decoder='zero'" if cfg.decoder == "zero" else "decoder_norm='grid'"
        raise ConfigError(
            f"init.{setting} has no meaning with decoder_norm_constraint='unit', which keeps every norm at 1"
        )
    if cfg.zero_later_layers and not geometry.cross_layer:
        raise ConfigError(f"init.zero_later_layers is for cross-layer transcoders, found {name}")
    if cfg.d_active_subspace is not None:
        widest = min(geometry.decoder(sae.W_dec, layer).shape[1] for layer in range(geometry.layers))
        if cfg.d_active_subspace > widest:
            raise ConfigError(
                f"init.d_active_subspace must be at most {widest}, the width that {name} writes, found "
                f"{cfg.d_active_subspace}"
            )


@torch.no_grad()
def estimate_statistics(sae: SAE, sample: Batch) -> None:
    """Set the statistics of the normalisation that are not known yet, from raw rows."""
    for norm, rows in ((sae.norm_in, sample.x), (sae.norm_target, sample.y)):
        if norm.needs_estimate:
            norm.estimate(rows)


@torch.no_grad()
def initialize_from(sae: SAE, sample: Batch, cfg: InitConfig, seed: int) -> None:
    """Give `sae` the start that `cfg` describes, in place, from raw rows [rows, *in_shape] and [rows, *out_shape].

    Statistics of the normalisation that are not known yet are estimated from the same rows.

    Raises:
        ConfigError: a setting without meaning for this SAE. ShapeError: rows of another shape. DataError: too few.
    """
    check_init(sae, cfg)
    estimate_statistics(sae, sample)
    x, y = _training_space(sae, sample, seed)
    sae.b_dec.copy_(_centre(y, cfg, seed))
    _draw_decoder(sae, y, cfg, seed)
    sae.restore_constraints()
    if cfg.encoder == "uniform":
        bound = 1 / math.sqrt(sae.d_sae)
        for layer in range(sae.geometry.layers):
            _uniform(sae.geometry.encoder(sae.W_enc, layer).T, bound, seed, f"encoder_{layer}")
    elif _is_tied(sae, cfg) and (cfg.encoder != "default" or cfg.decoder != "random"):
        _set_encoder(sae, [sae.geometry.decoder(sae.W_dec, 0).T], cfg.encoder_factor)
    if cfg.decoder_norm == "grid":
        _search_norm(sae, x, y, cfg)
    if cfg.encoder == "calibrated":
        _calibrate_encoder(sae, seed)
    _set_biases(sae, _levels(sae, x, cfg), cfg)


def _training_space(sae: SAE, sample: Batch, seed: int) -> tuple[Float[Tensor, "rows ..."], Float[Tensor, "rows ..."]]:
    """Some rows of the sample, normalised, in float32 or wider."""
    geometry = sae.geometry
    for what, rows, shape in (("rows", sample.x, geometry.in_shape), ("targets", sample.y, geometry.out_shape)):
        if rows.shape[1:] != shape or len(rows) != len(sample.x):
            raise ShapeError(f"expected {what} of shape [{len(sample.x)}, *{list(shape)}], found {list(rows.shape)}")
    if not len(sample.x):
        raise DataError("an SAE cannot start from an empty sample: expected rows of activations")
    dtype = torch.float64 if sae.dtype == torch.float64 else torch.float32
    x = sae.norm_in(_some(sample.x, SAMPLE_ROWS, seed).to(sae.device, dtype))
    if geometry.same_site and sample.y is sample.x:
        return x, x
    return x, sae.norm_target(_some(sample.y, SAMPLE_ROWS, seed).to(sae.device, dtype))


def _some(rows: Float[Tensor, "rows ..."], number: int, seed: int) -> Float[Tensor, "some ..."]:
    """At most `number` rows, drawn at random; of x and y the same."""
    if len(rows) <= number:
        return rows
    chosen = torch.randperm(len(rows), generator=generator(seed, "init", "rows"))[:number].sort().values
    return rows[chosen.to(rows.device)]


def _centre(y: Float[Tensor, "rows ..."], cfg: InitConfig, seed: int) -> Float[Tensor, "..."]:
    if cfg.b_dec == "geometric_median":
        return geometric_median(_some(y, MEDIAN_ROWS, seed))
    return y.mean(dim=0) if cfg.b_dec == "mean" else torch.zeros_like(y[0])


def _draw_decoder(sae: SAE, y: Float[Tensor, "rows ..."], cfg: InitConfig, seed: int) -> None:
    geometry = sae.geometry
    for layer in range(geometry.layers):
        decoder = geometry.decoder(sae.W_dec, layer)
        if cfg.decoder == "zero":
            decoder.zero_()
        elif cfg.decoder == "uniform":
            _uniform(decoder, 1 / math.sqrt(math.prod(geometry.out_shape)), seed, f"decoder_{layer}")
        elif cfg.d_active_subspace is not None:
            basis = active_subspace(geometry.written(y, layer), cfg.d_active_subspace)
            drawn = basis.new_empty(len(decoder), basis.shape[1])
            _uniform(drawn, 1.0, seed, f"subspace_{layer}")
            _turn(sae, decoder, drawn @ basis.T)
        if cfg.zero_later_layers:
            decoder[:, geometry.out_shape[-1] :] = 0.0


def _turn(sae: SAE, decoder: Float[Tensor, "latents width"], directions: Float[Tensor, "latents width"]) -> None:
    """Give decoder rows new directions at the norms that they have; one without direction stays as it is."""
    norms = sae.geometry.block_norms(directions)
    factor = sae.geometry.block_norms(decoder) / norms.clamp(min=SMALLEST_NORM)
    decoder.copy_(torch.where((norms > SMALLEST_NORM)[:, None], directions * factor[:, None], decoder))


def _uniform(rows: Float[Tensor, "latents width"], bound: float, seed: int, name: str) -> None:
    for block, part in enumerate(rows.split(LATENTS_PER_BLOCK)):
        drawn = torch.empty(part.shape, dtype=torch.float32)
        part.copy_(drawn.uniform_(-bound, bound, generator=generator(seed, "init", name, index=block)))


def _is_tied(sae: SAE, cfg: InitConfig) -> bool:
    """Whether the encoder follows the decoder."""
    return sae.geometry.same_site and cfg.encoder != "uniform" and "W_enc" in sae._parameters


def _set_encoder(sae: SAE, columns: list[Float[Tensor, "width latents"]], factor: float) -> None:
    for layer, block in enumerate(columns):
        sae.geometry.encoder(sae.W_enc, layer).copy_(widen(block) * factor)


def _search_norm(sae: SAE, x: Float[Tensor, "rows ..."], y: Float[Tensor, "rows ..."], cfg: InitConfig) -> None:
    """Bring all decoder rows, and the encoder with them, to the norm of least reconstruction error."""
    geometry = sae.geometry
    unit = [widen(geometry.decoder(sae.W_dec, layer)).clone() for layer in range(geometry.layers)]
    for block in unit:
        block /= geometry.block_norms(block).clamp(min=SMALLEST_NORM)[:, None]
    tied = _is_tied(sae, cfg)
    if tied:
        columns = [block.T for block in unit]
    elif "W_enc" in sae._parameters:
        columns = [widen(geometry.encoder(sae.W_enc, layer)) for layer in range(geometry.layers)]
        columns = [torch.nn.functional.normalize(block, dim=0) for block in columns]
    else:
        columns = []

    def set_norm(norm: float) -> None:
        for layer, block in enumerate(unit):
            geometry.decoder(sae.W_dec, layer).copy_(norm * block)
        _set_encoder(sae, columns, norm * cfg.encoder_factor)

    set_norm(1.0)
    levels = _levels(sae, x, cfg)  # of all rows, once: they are proportional to the norm
    x, y = (rows[:TRIAL_ROWS].to(sae.dtype) for rows in (x, y))

    def loss(norm: float) -> float:
        set_norm(norm)
        _set_biases(sae, None if levels is None else norm * levels, cfg)
        return _error(sae, x, y)

    set_norm(grid_search(loss))


def _error(sae: SAE, x: Float[Tensor, "rows ..."], y: Float[Tensor, "rows ..."]) -> float:
    """Σ_b ‖ŷ − y‖², in pieces of rows."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    size = max(CHUNK_NUMBERS // sae.geometry.n_latents, 1)
    for read, target in zip(x.split(size), y.split(size), strict=True):
        encoding = sae.encoding(read)
        extra = encoding.extra if encoding.extra is not None else sae.extra_output(read)
        y_hat = sae.reconstruct(encoding.codes)
        error = widen(y_hat if extra is None else y_hat + extra) - widen(target)
        total += error.square().sum(dtype=torch.float64)
    return float(total)


def _calibrate_encoder(sae: SAE, seed: int) -> None:
    """W_enc /= mean ‖ŷ − b_dec‖ over b_dec + unit vectors in random directions (OpenAI's sparse_autoencoder)."""
    inputs = torch.randn(UNIT_INPUTS, *sae.geometry.in_shape, generator=generator(seed, "init", "unit_inputs"))
    inputs /= torch.linalg.vector_norm(inputs.flatten(1), dim=1).reshape(-1, *[1] * (inputs.ndim - 1))
    codes = sae.encoding((inputs.to(sae.device) + widen(sae.b_dec)).to(sae.dtype)).codes
    response = torch.linalg.vector_norm((widen(sae.reconstruct(codes)) - widen(sae.b_dec)).flatten(1), dim=1).mean()
    if not response > 0:
        raise ConfigError(
            "init.encoder='calibrated': no latent fires on inputs of length 1, so there is nothing to calibrate by; "
            "lower the thresholds or choose 'transpose'"
        )
    sae.W_enc.div_(response)


def _levels(sae: SAE, x: Float[Tensor, "rows ..."], cfg: InitConfig) -> Float[Tensor, " latents"] | None:
    """What the biases have to make up for: mean or quantile of (x − a·b_dec) W_enc."""
    if cfg.b_enc == "zero":
        return None
    geometry = sae.geometry
    rate = cfg.firing_rate or min(USUAL_ACTIVE / sae.d_sae, LARGEST_RATE)
    if sae.cfg.apply_b_dec_to_input:
        x = x - sae.b_dec.to(x.dtype)
    parts: list[Tensor] = []
    for layer in range(geometry.layers):
        rows, W_enc = geometry.read(x, layer), geometry.encoder(sae.W_enc, layer).to(x.dtype)
        parts.append(mean_levels(rows, W_enc) if cfg.b_enc == "mean_centred" else quantile_levels(rows, W_enc, rate))
    return torch.cat(parts)


def _set_biases(sae: SAE, levels: Float[Tensor, " latents"] | None, cfg: InitConfig) -> None:
    sae.reset_latents(torch.arange(sae.geometry.n_latents, device=sae.device))
    if levels is not None:
        threshold = sae.gate_threshold() if cfg.b_enc == "quantile" else None
        sae.shift_preactivations(-levels if threshold is None else threshold - levels)


# ---- from the layer that a transcoder imitates ---------------------------------------------------------------------


@torch.no_grad()
def transcoder_from_mlp(sae: SAE, mlp: Callable[[Tensor], Tensor], sample: Batch) -> None:
    """Point each decoder row where `mlp` goes when its input moves along the encoder column, in place.

    Probe i is the mean input plus the unit direction of column i times the mean distance from the mean;
    d_i ∝ mlp(probe_i) − mean_j mlp(probe_j). `mlp` maps raw activations [probes, d_in] to [probes, d_out], in the dtype
    and on the device of the sample. Norms, encoder and b_dec stay as they are; `initialize_from` may follow.

    Raises:
        ConfigError: not a transcoder of one site. ShapeError: outputs or rows of another shape.
    """
    geometry = sae.geometry
    if geometry.kind not in ("transcoder", "skip_transcoder"):
        raise ConfigError(f"transcoder_from_mlp is for transcoders from one site to one other, found a {geometry.kind}")
    estimate_statistics(sae, sample)
    x, _ = _training_space(sae, sample, sae.seed)
    mean = x.mean(dim=0)
    radius = torch.linalg.vector_norm(x - mean, dim=1).mean()
    directions = torch.nn.functional.normalize(sae.W_enc.T.to(x.dtype), dim=1)
    probes = sae.norm_in.undo(mean + directions * radius)
    outputs = [mlp(part.to(sample.x.device, sample.x.dtype)) for part in probes.split(CHUNK_LATENTS)]
    for part, found in zip(probes.split(CHUNK_LATENTS), outputs, strict=True):
        if found.shape != (len(part), sae.d_out):
            raise ShapeError(f"expected the MLP to give [{len(part)}, {sae.d_out}], found {list(found.shape)}")
    y = sae.norm_target(torch.cat(outputs).to(sae.device, x.dtype))
    _turn(sae, sae.W_dec, y - y.mean(dim=0))
