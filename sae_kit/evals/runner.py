"""The pass: every family of metrics of every SAE, from one run of the model over held-out rows.

A batch without fidelity costs one forward, stopped at the deepest site. With it, it costs one clean forward, which
also gives the activations, one ablated forward per site and one spliced forward per SAE.
"""

import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_kit.data.batch import TokenBatch
from sae_kit.data.capture import Reader, device_of, max_context
from sae_kit.data.filters import PositionSlice, RowFilter
from sae_kit.data.sites import BoundSite
from sae_kit.errors import ConfigError, DataError, SiteDidNotFireError
from sae_kit.evals.family import FAMILIES, EvalStep, Family, Metrics, check_families
from sae_kit.evals.fidelity import FidelityStep, Positions
from sae_kit.evals.moments import Moments
from sae_kit.evals.reconstruction import Reconstruction
from sae_kit.ops import SparseCodes
from sae_kit.sae import SAE
from sae_kit.splicing import observed, replaced, require_sae, sites_of, spliced_sites

TOKENS_WITH_LOGITS = 4_096  # a quarter of the store's: these forwards end in logits, [tokens, vocabulary]
TOKENS_PER_STEP = 4_096  # encoded at once: what an encoder makes on the way is [tokens, d_sae]


@dataclass(frozen=True)
class EvalReport:
    """What `evaluate` found."""

    metrics: dict[str, Metrics]
    """SAE -> group -> key -> value; None where it is undefined"""
    features: dict[str, dict[str, Tensor]]
    """SAE -> key -> a value per latent, [d_sae]"""
    tokens: dict[str, int]
    """rows, tokens, eligible, excluded, and ce_positions: those of the fidelity rows that have a next id"""


@dataclass(frozen=True, eq=False)
class _Subject:
    """One SAE under evaluation."""

    sae: SAE
    reads: list[BoundSite]
    writes: list[BoundSite]
    families: dict[str, Family[Any]]
    sites: list[Reconstruction]
    """of an SAE that writes several sites, each by itself"""

    @property
    def site(self) -> BoundSite:
        """Where it is spliced in."""
        return self.writes[0]

    @property
    def is_spliced(self) -> bool:
        """Whether one forward can run through it: an SAE of several sites reads later ones to write earlier ones."""
        return len(self.sae.geometry.out_shape) == 1

    @property
    def place(self) -> str:
        return self.site.names[0]

    def update(self, reads: str, step: EvalStep | FidelityStep) -> None:
        for family in self.families.values():
            if family.reads == reads:
                family.update(step)

    def measure(self, values: Mapping[str, Float[Tensor, "tokens _"]]) -> None:
        x, y = (self._rows(values, sites) for sites in (self.reads, self.writes))
        for rows, target in zip(x.split(TOKENS_PER_STEP), y.split(TOKENS_PER_STEP), strict=True) if len(x) else ():
            codes = self.sae.encode_sparse(rows)
            y_hat = self.sae.decode(codes)
            self.update("activations", EvalStep(target.flatten(1), y_hat.flatten(1), codes))
            for site, family in enumerate(self.sites):
                family.update(EvalStep(target[:, site], y_hat[:, site], codes))

    def measure_sequences(self, values: Mapping[str, Float[Tensor, "rows context _"]], positions: Positions) -> None:
        """The same of an SAE that needs the tokens before each: encoded in whole, measured where eligible."""
        codes = self.sae.encode_sparse(self._rows(values, self.reads))
        target, y_hat = positions.select(self._rows(values, self.writes)), positions.select(self.sae.decode(codes))
        eligible = SparseCodes.from_dense(positions.select(codes.to_dense()))
        self.update("activations", EvalStep(target, y_hat, eligible))

    def _rows(self, values: Mapping[str, Tensor], sites: list[BoundSite]) -> Float[Tensor, "..."]:
        rows = [values[site.spelling].to(self.sae.device) for site in sites]
        return rows[0] if len(self.sae.geometry.in_shape) == 1 else torch.stack(rows, dim=1)

    @contextmanager
    def spliced(self, model: nn.Module, where: Bool[Tensor, "rows context"]) -> Generator[None]:
        """The SAE at its site, positions that are False left alone."""
        if self.sae.geometry.same_site:
            with replaced(model, self.site, lambda value: self._output(value), where):
                yield
            return
        seen: dict[str, Tensor] = {}
        reading = self.reads[0].on_read(lambda value: seen.update(x=value))
        try:
            with replaced(model, self.site, lambda _: self._written(seen), where):
                yield
        finally:
            reading.remove()

    def _written(self, seen: dict[str, Tensor]) -> Tensor:
        if "x" not in seen:
            raise SiteDidNotFireError(
                f"{self.reads[0].spelling!r}, which this transcoder reads, did not come before {self.site.spelling!r}, "
                "which it writes"
            )
        return self._output(seen.pop("x"))

    def _output(self, value: Tensor) -> Tensor:
        return self.sae(value.to(self.sae.device), use_error_term=False)

    def compute(self) -> Metrics:
        metrics = _merged(family.compute() for family in self.families.values())
        for site, family in enumerate(self.sites):
            metrics |= {f"{group}_site_{site}": values for group, values in family.compute().items()}
        return metrics


@torch.no_grad()
def evaluate(
    saes: SAE | Mapping[str, SAE],
    model: nn.Module | Reader,
    rows: Int[Tensor, "rows context"],
    *,
    excluded_ids: Collection[int] = (),
    metrics: Collection[str] = ("reconstruction", "sparsity", "fidelity"),
    fidelity_tokens: int = 200_000,
    ablation: str = "zero",
    rows_per_forward: int | None = None,
    seq_slice: PositionSlice | None = None,
    max_norms: Mapping[str, float] | None = None,
) -> EvalReport:
    """Evaluate SAEs, each at the site that its metadata names and as `to_inference()`, on rows of token ids.

    Positions whose id is in `excluded_ids`, that are outside `seq_slice`, or whose norm is above that of `max_norms` (0
    is no limit) at some site that is read or written, count in no sum and keep the model's own activation in every
    forward. Of a transcoder everything refers to the site that it writes. An SAE of several sites has its
    reconstruction for all of them together and, in groups of their own, for each; it cannot be spliced in, so it has no
    fidelity. Fidelity is measured on the first `fidelity_tokens` of the rows, against an `ablation` that writes "zero"
    or the "mean" activation. One SAE is called "sae" in the report. The model, the SAEs and the random generators are
    left as they were.

    Raises:
        ConfigError: an unknown metric or ablation, an SAE without a site or something that is no SAE, rows longer than
            the model can read, or a model with SAEs attached.
        HookNotFoundError: a site is not in the model.
        DataError: no position is eligible.
    """
    check_families(metrics)
    if ablation not in ("zero", "mean"):
        raise ConfigError(f"ablation: expected 'zero' or 'mean', found {ablation!r}")
    if fidelity_tokens < 1 or (rows_per_forward is not None and rows_per_forward < 1):
        raise ConfigError("fidelity_tokens and rows_per_forward must be at least 1")
    reader = model if isinstance(model, Reader) else Reader(model)
    model = reader.model
    limit = max_context(model)
    if limit is not None and rows.shape[1] > limit:
        raise ConfigError(f"rows: expected at most {limit} ids, the model's maximum, found {rows.shape[1]}")
    if attached := spliced_sites(model):
        raise ConfigError(f"SAEs are attached to the model at {', '.join(attached)}; detach them before evaluating")
    named = saes if isinstance(saes, Mapping) else {"sae": saes}
    subjects = {name: _subject(require_sae(sae), model, metrics) for name, sae in named.items()}
    filters = RowFilter([], excluded=tuple(excluded_ids), seq_slice=seq_slice)
    run = _Pass(reader, list(subjects.values()), filters, max_norms or {}, ablation, rows_per_forward)
    with _evaluating(model):
        tokens = run.over(rows, fidelity_tokens if "fidelity" in metrics else 0)
    return EvalReport(
        metrics={name: subject.compute() for name, subject in subjects.items()},
        features={name: _merged(family.features() for family in s.families.values()) for name, s in subjects.items()},
        tokens=tokens,
    )


class _Pass:
    """One run over the rows; fidelity with mean ablation needs a second look at its rows, after the mean is known."""

    def __init__(
        self,
        reader: Reader,
        subjects: list[_Subject],
        filters: RowFilter,
        max_norms: Mapping[str, float],
        ablation: str,
        rows_per_forward: int | None,
    ) -> None:
        self._reader, self._subjects, self._filters = reader, subjects, filters
        self._model = reader.model
        self._sites = {site.spelling: site for s in subjects for site in (*s.reads, *s.writes)}
        # A limit of zero is that of a median of zero, which training takes for none.
        self._max_norms = {site: norm for site, norm in max_norms.items() if norm > 0 and site in self._sites}
        self._spliced = [s for s in subjects if s.is_spliced]
        self._needs_sequences = any(s.sae.reads_sequences for s in subjects)
        means = {s.place: Moments(s.sae.d_out, s.sae.device) for s in self._spliced}
        self._means = means if ablation == "mean" else {}
        self._rows_per_forward = rows_per_forward
        self._device = device_of(reader.model)

    def over(self, rows: Int[Tensor, "rows context"], fidelity_tokens: int) -> dict[str, int]:
        """Feed every family; `fidelity_tokens=0` leaves out what needs logits."""
        eligible = ce_positions = 0
        looked_at = -(-fidelity_tokens // max(rows.shape[1], 1))
        again: list[tuple[Tensor, Positions]] = []
        for batch, with_logits in self._batches(rows, looked_at):
            positions = Positions(batch, self._filters.positions(TokenBatch(batch.cpu())), self._device)
            ids = batch.to(self._device)
            clean: Tensor | None = None
            if with_logits and not self._means:
                view = Tensor.clone if self._needs_sequences else positions.select
                with observed(self._model, self._sites.values(), view) as values:
                    clean = self._logits(ids)
            else:
                values = self._reader.capture(self._sites.values(), ids)
            values, positions = self._within_norms(values, positions)
            eligible += positions.number
            ce_positions += positions.n_targets if with_logits else 0
            self._measure(values, positions)
            if clean is not None:
                self._compare(ids, positions, clean)
            elif with_logits:
                again.append((batch, positions))
        for batch, positions in again:
            ids = batch.to(self._device)
            self._compare(ids, positions, self._logits(ids))
        if not eligible:
            raise DataError(f"expected some token that is not excluded, found none among {rows.numel()}")
        return {
            "rows": len(rows),
            "tokens": rows.numel(),
            "eligible": eligible,
            "excluded": rows.numel() - eligible,
            "ce_positions": ce_positions,
        }

    def _batches(self, rows: Int[Tensor, "rows context"], looked_at: int) -> Iterator[tuple[Tensor, bool]]:
        """Rows of one forward, and whether fidelity is measured on them: its rows do not depend on the batch size."""
        size = self._rows_per_forward or max(1, TOKENS_WITH_LOGITS // max(rows.shape[1], 1))
        for part, with_logits in ((rows[:looked_at], True), (rows[looked_at:], False)):
            if len(part):
                yield from ((batch, with_logits) for batch in part.split(size))

    def _within_norms(
        self, values: Mapping[str, Float[Tensor, "..."]], positions: Positions
    ) -> tuple[Mapping[str, Float[Tensor, "..."]], Positions]:
        """Without the positions whose norm is above that of rows trained on."""
        if not self._max_norms:
            return values, positions
        rows = {site: values[site] for site in self._max_norms}
        rows = {site: value if value.ndim == 2 else positions.select(value) for site, value in rows.items()}
        short = [
            torch.linalg.vector_norm(value.float(), dim=1) <= self._max_norms[site] for site, value in rows.items()
        ]
        kept = torch.stack([found.to(self._device) for found in short]).all(0).nonzero().squeeze(1)
        if len(kept) == positions.number:
            return values, positions
        fewer = {
            site: value.index_select(0, kept.to(value.device)) if value.ndim == 2 else value
            for site, value in values.items()
        }
        return fewer, positions.only(kept)

    def _measure(self, values: Mapping[str, Float[Tensor, "..."]], positions: Positions) -> None:
        """Values are whole, [rows, context, width], or of eligible positions already, [eligible, width]."""
        eligible = {site: value if value.ndim == 2 else positions.select(value) for site, value in values.items()}
        for subject in self._subjects:
            if subject.sae.reads_sequences:
                subject.measure_sequences(values, positions)
            else:
                subject.measure(eligible)
        for place, moments in self._means.items():
            at_place = next(s for s in self._spliced if s.place == place)
            moments.update(eligible[at_place.site.spelling].to(moments.mean.device))

    def _compare(self, ids: Int[Tensor, "rows context"], positions: Positions, clean: Tensor) -> None:
        ce_clean, _ = positions.losses(clean, None)
        ablated: dict[str, tuple[Tensor, Tensor]] = {}
        for subject in self._spliced:
            if subject.place not in ablated:
                with replaced(self._model, subject.site, self._ablation(subject), positions.mask):
                    patched = self._logits(ids)
                ablated[subject.place] = positions.losses(patched, clean)
                del patched
            with subject.spliced(self._model, positions.mask):
                patched = self._logits(ids)
            spliced = positions.losses(patched, clean)
            del patched
            ce, kl = zip(ablated[subject.place], spliced, strict=True)
            subject.update("logits", FidelityStep(positions.n_targets, positions.number, ce_clean, *ce, *kl))

    def _ablation(self, subject: _Subject) -> Callable[[Tensor], Tensor]:
        if not self._means:
            return torch.zeros_like
        mean = self._means[subject.place].mean
        return lambda value: mean.to(value).expand_as(value)

    def _logits(self, ids: Int[Tensor, "rows context"]) -> Float[Tensor, "rows context vocabulary"]:
        out = self._reader(ids)
        return out if isinstance(out, Tensor) else out.logits


def _subject(sae: SAE, model: nn.Module, metrics: Collection[str]) -> _Subject:
    used = sae.to_inference().eval()
    reads, writes = sites_of(model, sae)
    shape, several = used.geometry.out_shape, len(used.geometry.out_shape) > 1
    width = math.prod(shape)
    families = {
        name: FAMILIES[name](width, used.geometry.n_latents, used.device)
        for name in metrics
        if not (several and FAMILIES[name].reads == "logits")
    }
    sites = (
        [Reconstruction(shape[-1], used.geometry.n_latents, used.device) for _ in range(shape[0])] if several else []
    )
    return _Subject(used, reads, writes, families, sites if "reconstruction" in metrics else [])


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Eval mode; every module gets back the mode that it had, which need not have been the same for all."""
    inner = getattr(model, "original_model", model)
    modes = [(module, module.training) for module in (*model.modules(), *inner.modules())]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _merged(parts: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}
