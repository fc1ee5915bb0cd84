"""What a run reads: a model and its text, or activations on disk."""

import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sae_kit.data.cache import Cache, open_cache
from sae_kit.data.capture import device_of, site_width
from sae_kit.data.contexts import WholeContexts, split_contexts
from sae_kit.data.harvest import Harvest
from sae_kit.data.models import Compatibility, load_model, model_facts
from sae_kit.data.sites import resolve
from sae_kit.data.store import ActivationsStore, default_context, harvest, token_stream
from sae_kit.data.tokens import excluded_ids, held_out_rows, special_id
from sae_kit.errors import ConfigError, HookNotFoundError, did_you_mean
from sae_kit.evals import EvalReport, evaluate
from sae_kit.sae import SAE
from sae_kit.training.config import RunConfig
from sae_kit.training.end_to_end import EndToEnd

log = logging.getLogger(__name__)

ALL = slice(None)


class LiveInputs:
    """A model and its text; objects that are passed take the place of what `cfg` names."""

    def __init__(
        self,
        cfg: RunConfig,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        documents: Iterable[Any] | None = None,
        sites: tuple[str, ...] | None = None,
    ) -> None:
        """`sites` are read instead of those of the SAEs."""
        self._cfg, self._documents = cfg, documents
        self._sites = cfg.sites if sites is None else sites
        if model is None:
            model, own = load_model(cfg.model, self._sites)
            tokenizer = tokenizer or own
        self.model, self.tokenizer = model, tokenizer
        self.reader = cfg.model.reader(model)
        self._held_out: Int[Tensor, "rows context"] | None = None

    def widths(self, sites: Iterable[str]) -> dict[str, int]:
        """Site -> width of its activations; HookNotFoundError if it is not there."""
        return {site: site_width(self.reader, site) for site in sites}

    @property
    def device(self) -> torch.device:
        """Where activations are made."""
        return device_of(self.model)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's activations at all sites, in the precision in which they are kept."""
        dtype = next(self.model.parameters()).dtype
        return sum(self.widths(self._sites).values()) * _kept_as(self._cfg, dtype).itemsize

    def module_path(self, site: str) -> str | None:
        """Where a site is in the plain Hugging Face model, if that is known."""
        return resolve(self.model, site).hf_name

    @property
    def metadata(self) -> dict[str, Any]:
        """Fields of `SAEMetadata` that say what an SAE is trained on; None where that is not known."""
        data = self._cfg.data
        has_bos = data.row_start == "bos" and special_id("bos", self.tokenizer, "row_start") is not None
        return {
            "model_name": self._cfg.model.name,
            "model_class_name": type(self.model).__name__,
            "prepend_bos": has_bos,
            "model_from_pretrained_kwargs": dataclasses.asdict(self._cfg.model.compat or Compatibility()),
            "exclude_special_tokens": list(excluded_ids(data.exclude, self.tokenizer)),
            "seqpos_slice": data.seq_slice,
            "context_size": self._context,
            "dataset_path": ", ".join(source.path for source in data.sources) or None,
        }

    def open(self) -> ActivationsStore:
        """The stream of mixed batches; of whole contexts, if an SAE of the run is trained end to end."""
        cfg = self._cfg
        if cfg.end_to_end:
            return ActivationsStore(self._whole_contexts())
        return ActivationsStore.from_config(
            self.reader,
            cfg.data,
            cfg.buffer,
            sites=self._sites,
            train_tokens=cfg.train.tokens,
            batch_tokens=cfg.train.batch_tokens,
            seed=cfg.seed,
            tokenizer=self.tokenizer,
            documents=self._documents,
            facts=model_facts(self.model, cfg.model),
        )

    def loss(self, saes: Mapping[str, SAE], store: ActivationsStore) -> EndToEnd | None:
        """What SAEs are trained on beside their own losses, over the stream `store`."""
        if not isinstance(store.mixed, WholeContexts):
            return None
        return EndToEnd(self.reader, store.mixed, [(saes[name], cfg) for name, cfg in self._cfg.end_to_end.items()])

    def _whole_contexts(self) -> WholeContexts:
        train, rows_per_forward = self._cfg.train, self._cfg.data.rows_per_forward
        forwards, rows = split_contexts(train.batch_tokens, self._context, rows_per_forward)
        wanted = train.tokens // train.batch_tokens * train.batch_tokens
        return WholeContexts(self.harvest(rows_per_forward=rows), forwards=forwards, train_tokens=wanted)

    def harvest(self, *, rows_per_forward: int | None = None) -> Harvest:
        """The same activations in the order of the text; `rows_per_forward` takes the place of the config's."""
        cfg = self._cfg
        tokens = token_stream(
            self.model, cfg.data, sites=self._sites, tokenizer=self.tokenizer, documents=self._documents, seed=cfg.seed
        )
        return harvest(
            self.reader,
            tokens,
            self._sites,
            rows_per_forward=rows_per_forward or cfg.data.rows_per_forward,
            excluded=excluded_ids(cfg.data.exclude, self.tokenizer),
            seq_slice=cfg.data.seq_slice,
            norm_filter=cfg.buffer.norm_filter,
            facts=model_facts(self.model, cfg.model),
        )

    def hold_out(self) -> bool:
        """Read the rows of text that training never sees, so that too little text is found before it begins.

        False if there are none, or none are wanted.
        """
        cfg = self._cfg
        if not cfg.eval.at_end and cfg.eval.every_tokens is None:
            return False
        if isinstance(self._documents, Iterator):
            log.warning(
                "no held-out evaluation: an iterator of texts can be read only once; pass a list or another iterable"
            )
            return False
        wanted = cfg.eval.tokens or min(200_000, max(16_384, cfg.train.tokens // 200))
        self._held_out = held_out_rows(
            cfg.data,
            self.tokenizer,
            max(wanted // self._context, 1),
            context_size=self._context,
            documents=self._documents,
            seed=cfg.seed,
        )
        return True

    def evaluate(
        self,
        saes: Mapping[str, SAE],
        medians: Mapping[str, float],
        *,
        rows: slice = ALL,
        metrics: Collection[str] | None = None,
    ) -> EvalReport:
        """Metrics on the rows that are held out, at the positions that training would have seen of them.

        `rows` are some of them, and `metrics` other families than the config names.
        """
        assert self._held_out is not None, "hold_out comes first"
        cfg = self._cfg
        multiple = cfg.buffer.norm_filter
        return evaluate(
            saes,
            self.reader,
            self._held_out[rows],
            excluded_ids=excluded_ids(cfg.data.exclude, self.tokenizer),
            seq_slice=cfg.data.seq_slice,
            max_norms=None if multiple is None else {site: multiple * median for site, median in medians.items()},
            metrics=cfg.eval.metrics if metrics is None else metrics,
            fidelity_tokens=cfg.eval.fidelity_tokens,
            ablation=cfg.eval.ablation,
            rows_per_forward=cfg.eval.rows_per_forward or cfg.data.rows_per_forward,
        )

    @property
    def held_out(self) -> Int[Tensor, "rows context"] | None:
        """Rows of token ids that training never sees, once `hold_out` has read them."""
        return self._held_out

    @property
    def _context(self) -> int:
        return self._cfg.data.context_size or default_context(self.model)


class CachedInputs:
    """Activations on disk; `live`, if the run names them, are the model and the text that they have to be from."""

    def __init__(self, cfg: RunConfig, live: LiveInputs | None = None) -> None:
        assert cfg.cache.read is not None
        self._cfg, self._live = cfg, live
        self._cache: Cache = open_cache(cfg.cache.read)

    def widths(self, sites: Iterable[str]) -> dict[str, int]:
        there = self._cache.widths
        for site in sites:
            if site not in there:
                raise HookNotFoundError(
                    f"{site!r} is not in {self._cache.place}.{did_you_mean(site, there)} It holds {', '.join(there)}"
                )
        return {site: there[site] for site in sites}

    @property
    def device(self) -> torch.device:
        """Where activations are read to."""
        return torch.device("cpu")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's activations at all sites, in the precision in which they are read."""
        widths, dtypes = self.widths(self._cfg.sites), self._cache.dtypes
        return sum(width * _kept_as(self._cfg, dtypes[site]).itemsize for site, width in widths.items())

    def module_path(self, site: str) -> str | None:
        """As of the model that the run names, if it names one."""
        return None if self._live is None else self._live.module_path(site)

    @property
    def metadata(self) -> dict[str, Any]:
        found = self._cache.provenance
        tokens = found.get("tokens", {})
        sources = [source["path"] for source in tokens.get("sources", ())]
        model, filters = found.get("model", {}), found.get("filters", {})
        known = {
            "model_name": model.get("name"),
            "model_from_pretrained_kwargs": model.get("compat"),
            "exclude_special_tokens": filters.get("excluded_ids"),
            "seqpos_slice": None if filters.get("seq_slice") is None else tuple(filters["seq_slice"]),
            "context_size": self._cache.context_size,
            "dataset_path": ", ".join(sources) or None,
        }
        return known if self._live is None else {**known, **self._live.metadata}

    def open(self) -> ActivationsStore:
        cfg = self._cfg
        return ActivationsStore.from_cache(
            self._cache,
            cfg.buffer,
            sites=cfg.sites,
            batch_tokens=cfg.train.batch_tokens,
            train_tokens=cfg.train.tokens,
            epochs=cfg.cache.epochs,
            order=cfg.cache.order,
            seed=cfg.seed,
            expected=None if self._live is None else self._expected(self._live),
        )

    def _expected(self, live: LiveInputs) -> dict[str, Any]:
        source = live.harvest()
        source.close()
        expected = source.provenance
        if "order" in self._cache.provenance.get("tokens", {}):  # in what order the text was read does not matter here
            expected["tokens"]["order"] = self._cache.provenance["tokens"]["order"]
        return expected


def _kept_as(cfg: RunConfig, made: torch.dtype) -> torch.dtype:
    """The precision of activations that are made in another one."""
    return made if cfg.buffer.dtype == "auto" else getattr(torch, cfg.buffer.dtype)


Inputs = LiveInputs | CachedInputs
"""Where the activations of a run come from: widths of sites, what goes into the metadata of SAEs, and the stream."""


def open_inputs(
    cfg: RunConfig, model: nn.Module | None, tokenizer: Any, documents: Iterable[Any] | None
) -> tuple[Inputs, LiveInputs | None]:
    """What the run trains on, and the model and text that it can be evaluated on, if it names any.

    Raises:
        ConfigError: there is neither a model with text nor a cache.
    """
    named = model is not None or cfg.model.name is not None
    text = documents is not None or bool(cfg.data.sources)
    if cfg.cache.read is None:
        live = LiveInputs(cfg, model, tokenizer, documents)
        return live, live
    if named != text:
        raise ConfigError(
            "cache.read takes the place of model and text: name both, to compare the cache with them and to evaluate, "
            "or neither"
        )
    live = LiveInputs(cfg, model, tokenizer, documents) if named else None
    if live is None and (cfg.eval.at_end or cfg.eval.every_tokens is not None):
        log.info("no evaluation: the run names no model and no text beside its cache")
    return CachedInputs(cfg, live), live
