"""One SAE in training: a step of its optimizer, and all that the step keeps between batches.

Rates and coefficients from the tokens seen → losses → backward → decoder projection → clip → Adam → constraints →
metrics. It waits for the device only where AuxK renews its list of dead latents (and sorts it, if they belong to
several layers or levels), in architectures that choose in rounds or draw prefixes, in resampling, and where those with
thresholds count what passes (never with `sparse_below: 0`).
"""

import dataclasses
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from sae_kit.config import resolve_tokens
from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.training.config import RunConfig
from sae_kit.training.dead import DeadLatents
from sae_kit.training.init import InitConfig, check_init, estimate_statistics, initialize_from
from sae_kit.training.losses import training_losses, training_pass
from sae_kit.training.metrics import TrainingMetrics
from sae_kit.training.optim import (
    clip_gradients,
    clipped_parameters,
    project_decoder_gradient,
    set_learning_rate,
)
from sae_kit.training.resampling import Resampler
from sae_kit.training.schedules import StepValues

P = ParamSpec("P")
R = TypeVar("R")


class SAEInTraining:
    """One SAE with its optimizer, counters and metrics."""

    def __init__(self, cfg: RunConfig, name: str, sae: SAE) -> None:
        if not sae.trainable:
            raise ConfigError(
                f"SAE {name!r}: {sae.cfg.architecture} SAEs are loaded and used; there is no way to train one"
            )
        if sae.cfg.dtype == "float16":
            raise ConfigError(
                f"SAE {name!r}: float16 is for use, its range is too small for the optimizer; train in bfloat16 or "
                "float32"
            )
        total = cfg.train.tokens
        entry = cfg.saes.get(name)
        optim = cfg.optim if entry is None or entry.lr is None else dataclasses.replace(cfg.optim, lr=entry.lr)
        self.sae = sae
        if "W_enc" in sae._parameters:
            sae.W_enc.data = sae.geometry.latent_by_latent(sae.W_enc.data)
        for name_of in ("max_pre_bytes", "sparse_below"):
            if (setting := getattr(cfg.train, name_of)) is not None:
                setattr(sae, name_of, setting)
        self.optimizer = optim.build(sae)
        self.clip = optim.clip_grad_norm
        listed = sae.cfg.aux_coefficient > 0 or sae.cfg.pre_act_loss_coefficient is not None
        self.dead = DeadLatents(sae, dead_after(sae, cfg), listed=listed)
        self.metrics = TrainingMetrics(sae, self.dead, cfg.train.density_window_tokens)
        self.details: dict[str, float] = {}
        self._clipped = clipped_parameters(sae)
        self._pass = compiled(training_pass, cfg.train.compile)
        self._losses = compiled(training_losses, cfg.train.compile)
        self._schedule = StepValues(sae.cfg, total)
        self._init = None if entry is None else entry.init
        self.resampler: Resampler | None = None
        try:
            if self._init is not None:
                check_init(sae, self._init)
            if entry is not None and entry.resample is not None:
                self.resampler = Resampler(sae, entry.resample, total)
        except ConfigError as error:
            raise ConfigError(f"SAE {name!r}: {error}") from error

    @property
    def needs_sample(self) -> bool:
        """Whether rows are wanted before the first step: for the normalisation, or for the start of a fresh SAE."""
        sae = self.sae
        return sae.norm_in.needs_estimate or sae.norm_target.needs_estimate or self._start is not None

    def start_from(self, sample: Batch) -> None:
        """Take statistics, and the start of a fresh SAE, from raw rows."""
        estimate_statistics(self.sae, sample)
        if self._start is not None:
            initialize_from(self.sae, sample, self._start, self.sae.seed)

    @property
    def _start(self) -> InitConfig | None:
        """How the SAE starts, if it has not been trained yet."""
        return self._init if int(self.sae.tokens_seen) == 0 else None

    def step(self, batch: Batch, tokens: int, lr_factor: float) -> None:
        """One step on `batch`, after `tokens` rows; `lr_factor` scales the learning rates."""
        sae, rows = self.sae, len(batch.x)
        lr = set_learning_rate(self.optimizer, lr_factor)
        values = self._schedule.at(tokens)
        if self._schedule.k_settles(tokens, rows):
            sae.schedule_settled()
        run = self._pass(sae, batch, values)
        fired = self.dead.observe(run.encoding.codes.detach(), rows, tokens)
        if self.resampler is not None:
            self.resampler.observe(run, tokens)
        losses = self._losses(sae, run, values, self.dead)
        losses.total.backward()
        project_decoder_gradient(sae)
        grad_norm = clip_gradients(self._clipped, self.clip)
        sae.observe(run.encoding, values)
        self._schedule.observe(sae, run.encoding)
        self.optimizer.step()
        sae.restore_constraints()
        self.optimizer.zero_grad(set_to_none=True)
        self.metrics.update(run, losses, batch.y, fired, grad_norm, self.clip)
        self.details = {"details/current_learning_rate": lr}
        self.details |= {
            f"details/{name}": value for name, value in values.items() if name != "threshold_window_tokens"
        }
        if self.resampler is not None:
            latents = self.resampler.apply(self.optimizer, tokens, rows)
            if latents is not None:
                self.metrics.forget(latents)
            self.details["details/resampled"] = self.resampler.resampled

    def dead_fraction(self) -> float:
        """Share of latents that have been silent for `dead_after_tokens` of training."""
        return self.dead.mask().double().mean().item()


def compiled(function: Callable[P, R], backend: str | None) -> Callable[P, R]:
    """The function, through torch.compile if a backend is named.

    Raises:
        ConfigError: no backend of this name; the message lists those that there are.
    """
    if backend is None:
        return function
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"train.compile: expected one of {', '.join(known)}, found {backend!r}")
    return torch.compile(function, backend=backend)


def dead_after(sae: SAE, cfg: RunConfig) -> int:
    """Tokens of silence after which a latent counts as dead."""
    wanted = sae.cfg.dead_after_tokens if sae.cfg.dead_after_tokens is not None else cfg.train.dead_after_tokens
    if wanted is None:
        return max(min(10_000_000, cfg.train.tokens // 10), 1)
    return max(resolve_tokens(wanted, cfg.train.tokens, "dead_after_tokens"), 1)
