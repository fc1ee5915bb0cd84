"""End-to-end training (Braun et al. 2024): an SAE is judged by what the model does with its reconstruction.

The rows of a step are those of whole contexts. Their reconstruction is put back into the model where the rows were
read, and the predictions are compared with those of the untouched model, at the same positions:

    kl · E KL(p_clean ‖ p)  +  downstream · mean over later sites of E‖v − v̂‖² / E‖v − v̄‖²

Positions that the filters leave out keep their own activation and count in nothing, as in the evaluation. The model is
differentiated forward by forward, at once and with respect to the reconstruction alone; so the memory of a step is
that of one forward of `data.rows_per_forward` contexts, however many rows it has.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_kit.data.batch import Batch, Harvested
from sae_kit.data.capture import Reader
from sae_kit.data.contexts import WholeContexts
from sae_kit.data.sites import BoundSite, resolve
from sae_kit.errors import ConfigError, DataError, SiteDidNotFireError
from sae_kit.evals.fidelity import POSITIONS_PER_CHUNK, log_probabilities
from sae_kit.ops import widen
from sae_kit.sae import SAE
from sae_kit.splicing import replaced, site_of
from sae_kit.training.losses import Pass


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig:
    """An SAE that is judged by what the model does with its reconstruction."""

    kl: float = 1.0
    """coefficient of the KL divergence from the model's own predictions, in nats per token"""
    downstream: float = 0.0
    """coefficient of the error that the reconstruction causes at later sites, as a share of their variance"""
    sites: tuple[str, ...] = ()
    """these later sites, e.g. blocks.10.hook_resid_pre"""

    def __post_init__(self) -> None:
        if self.kl < 0 or self.downstream < 0 or not self.kl + self.downstream:
            raise ConfigError(
                f"end_to_end: kl and downstream must not be negative, nor both 0; found {self.kl} and {self.downstream}"
            )
        if bool(self.downstream) != bool(self.sites):
            raise ConfigError("end_to_end: downstream and sites belong together; give both, or neither")


@dataclass(frozen=True, eq=False)
class _Spliced:
    """One SAE with what is asked of it and its places in the model."""

    cfg: EndToEndConfig
    written: BoundSite
    later: Sequence[BoundSite]


class EndToEnd:
    """The loss of a trainer whose stream is `contexts`: terms of the SAEs in `asked`, none of others.

    Raises:
        ConfigError: an SAE of several sites, or one that does not say where it belongs.
        HookNotFoundError: a site that is not in the model.
    """

    def __init__(
        self, model: nn.Module | Reader, contexts: WholeContexts, asked: Iterable[tuple[SAE, EndToEndConfig]]
    ) -> None:
        self._reader = model if isinstance(model, Reader) else Reader(model)
        self._contexts = contexts
        inner = self._reader.model
        self._spliced = {
            sae: _Spliced(cfg, site_of(inner, sae), [resolve(inner, site) for site in cfg.sites]) for sae, cfg in asked
        }

    def __call__(self, sae: SAE, batch: Batch, run: Pass) -> Mapping[str, Float[Tensor, ""]]:
        """`kl_loss` and `downstream_loss`, of the reconstruction in `run`.

        Raises:
            DataError: the batch is not the one that the stream gave last.
        """
        spliced = self._spliced.get(sae)
        if spliced is None:
            return {}
        parts = self._contexts.current
        if len(batch.x) != sum(len(part.kept) for part in parts):
            raise DataError("end-to-end training needs whole batches of its stream, without accumulation")
        y_hat = sae.norm_target.undo(run.y_hat, run.scale, run.shift)
        sums: dict[str, Tensor] = {}
        gradients: list[Tensor] = []
        with _frozen(self._reader.model):
            for part, rows in zip(parts, y_hat.detach().split([len(part.kept) for part in parts]), strict=True):
                terms, gradient = self._forward(spliced, part, rows.requires_grad_(), len(y_hat))
                sums = {name: sums.get(name, 0) + term.to(y_hat.device) for name, term in terms.items()}
                gradients.append(gradient)
        values = _Differentiated.apply(y_hat, torch.cat(gradients), *sums.values())
        return dict(zip(sums, values, strict=True))

    def _forward(
        self, spliced: _Spliced, part: Harvested, rows: Float[Tensor, "rows width"], total: int
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "rows width"]]:
        """Terms of some of `total` rows, and the gradient of their sum with respect to these."""
        cfg, later = spliced.cfg, spliced.later
        with torch.no_grad(), _read(later, part.kept) as clean_values:
            clean = self._logits(part)
        with (
            torch.enable_grad(),
            _read(later, part.kept) as values,
            replaced(self._reader.model, spliced.written, _written(rows, part.kept)),
        ):
            logits = self._logits(part)
        terms: dict[str, Tensor] = {}
        outputs: list[tuple[Tensor, Tensor]] = []
        if cfg.kl:
            divergence, slope = kl_divergence(clean, logits, part.kept)
            terms["kl_loss"] = (cfg.kl / total * divergence).to(torch.promote_types(rows.dtype, torch.float32))
            outputs.append((logits, slope * (cfg.kl / total)))
        if later:
            with torch.enable_grad():
                errors = [_unexplained(clean_values[site], value, site) for site, value in values.items()]
                error = cfg.downstream * len(rows) / total * torch.stack(errors).mean()
            terms["downstream_loss"] = error.detach()
            outputs.append((error, torch.ones_like(error)))
        (gradient,) = torch.autograd.grad([each for each, _ in outputs], rows, [slope for _, slope in outputs])
        return terms, gradient

    def _logits(self, part: Harvested) -> Float[Tensor, "contexts positions vocabulary"]:
        out = self._reader(part.tokens.ids, part.tokens.lengths)
        return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def kl_divergence(
    clean: Float[Tensor, "contexts positions vocabulary"],
    logits: Float[Tensor, "contexts positions vocabulary"],
    index: Int[Tensor, " rows"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "contexts positions vocabulary"]]:
    """Σ KL(p_clean ‖ p) over the places `index` of the flat positions, and its gradient p − p_clean at the logits.

    By hand, because three tensors of the size of the logits would otherwise be kept for the way back.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    gradient = torch.zeros_like(logits)
    flat = gradient.view(-1, gradient.shape[-1])
    for places in index.to(logits.device).split(POSITIONS_PER_CHUNK):
        log_p, log_q = log_probabilities(clean, places), log_probabilities(logits, places)
        p = log_p.exp()
        total += torch.where(log_p.isinf(), 0, p * (log_p - log_q)).sum(dtype=torch.float64)
        flat[places] = (log_q.exp() - p).to(flat.dtype)
    return total, gradient


class _Differentiated(torch.autograd.Function):
    """Values whose sum has a known gradient with respect to `rows`; whoever uses them adds them up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gradient: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gradient.to(rows))
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return slopes[0].to(gradient) * gradient, None, *(None for _ in slopes)


def _written(rows: Float[Tensor, "rows width"], index: Int[Tensor, " rows"]) -> Callable[[Tensor], Tensor]:
    """What puts `rows` at these places of the flat positions."""

    def write(value: Tensor) -> Tensor:
        flat = value.reshape(-1, value.shape[-1])
        return flat.index_copy(0, index.to(flat.device), rows.to(flat)).reshape(value.shape)

    return write


@contextmanager
def _read(sites: Sequence[BoundSite], index: Int[Tensor, " rows"]) -> Generator[dict[str, Tensor]]:
    """The values at `sites`, [rows, width] at these places, with the gradient that they have."""
    values: dict[str, Tensor] = {}

    def reader(site: str) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            values[site] = value.reshape(-1, value.shape[-1]).index_select(0, index.to(value.device))

        return read

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.on_read(reader(site.spelling)).remove)
        yield values
    if missing := [site.spelling for site in sites if site.spelling not in values]:
        raise SiteDidNotFireError(f"the forward pass never reached {missing[0]!r}; choose another of end_to_end.sites")


def _unexplained(clean: Float[Tensor, "rows width"], value: Float[Tensor, "rows width"], site: str) -> Tensor:
    """The share of the variance of `clean` that is not in `value`; of a lone row, which has none, the error."""
    if not value.requires_grad:
        raise ConfigError(f"end_to_end.sites: {site!r} does not come after the site that the SAE writes")
    clean, value = widen(clean), widen(value)
    variance = (clean - clean.mean(0)).square().sum()
    return (value - clean).square().sum() / torch.where(variance > 0, variance, 1.0)


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """No gradients of parameters, so that nothing is kept of what comes before the site."""
    inner: nn.Module = getattr(model, "original_model", model)
    learning = [parameter for parameter in {*model.parameters(), *inner.parameters()} if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
