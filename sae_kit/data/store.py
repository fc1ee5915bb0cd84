"""`ActivationsStore`: the activation stream in one object.

    documents -> token rows -> forwards, stopped at the deepest site -> filters -> mixing buffer -> batches
                                  or: activations on disk -> batches

Each link can be used alone; the store builds the chain, runs it ahead of the trainer if asked, and stops and
resumes it as a whole.
"""

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_kit.data.batch import State, TokenRows
from sae_kit.data.buffer import BATCHES, BufferConfig
from sae_kit.data.cache import Cache, CacheReader
from sae_kit.data.capture import Reader, device_of, max_context, vocabulary_size
from sae_kit.data.contexts import WholeContexts
from sae_kit.data.filters import PositionSlice, RowFilter
from sae_kit.data.given import GivenRows
from sae_kit.data.harvest import MEDIAN, Harvest
from sae_kit.data.mixing import Mixing
from sae_kit.data.models import ModelConfig, load_model, model_facts
from sae_kit.data.prefetch import Prefetch
from sae_kit.data.sites import Spelling, resolve
from sae_kit.data.tokens import DataConfig, TokenStream, excluded_ids
from sae_kit.errors import ConfigError

log = logging.getLogger(__name__)

TOKENS_PER_FORWARD = 16_384  # stopped at the deepest site, so no logits take memory
LONGEST_ROW = 1_024  # unless asked for
AHEAD = 2


class ActivationsStore(Iterator[dict[str, Tensor]]):
    """Batches of mixed activations: site -> [batch_tokens, width].

    With `train_tokens` exactly `train_tokens // batch_tokens` batches are given, and no more is harvested than they
    need. A batch is the caller's own memory.
    """

    def __init__(
        self,
        mixed: Mixing | CacheReader | WholeContexts,
        *,
        prefetch: int = 0,
        device: torch.device | None = None,
        sample: int | None = None,
    ) -> None:
        """Batches of `mixed`, up to `prefetch` of them made ahead; `device` is where they are made.

        `peek` shows at most `sample` activations.
        """
        self.mixed, self._sample = mixed, sample
        self._batches = Prefetch(mixed, prefetch, device)
        # A thread that nobody asks for batches would keep the buffer, and crash the interpreter's end amid a forward.
        weakref.finalize(self, self._batches.stop)

    @classmethod
    def from_model(
        cls,
        model: nn.Module | Reader,
        tokens: TokenRows,
        sites: Iterable[Spelling],
        *,
        batch_tokens: int,
        train_tokens: int | None = None,
        buffer: BufferConfig | None = None,
        rows_per_forward: int | None = None,
        excluded: Sequence[int] = (),
        seq_slice: PositionSlice | None = None,
        seed: int = 0,
        facts: Mapping[str, Any] | None = None,
    ) -> "ActivationsStore":
        """Find the sites and check the sizes; nothing is read before the first batch, `fill` or `peek`.

        `facts` say which model this is, as JSON values.

        Raises:
            HookNotFoundError: a site that is not in the model.
            ConfigError: rows longer than the model can read, or sizes that do not fit each other.
        """
        cfg = buffer or BufferConfig()
        source = harvest(
            model,
            tokens,
            sites,
            rows_per_forward=rows_per_forward,
            excluded=excluded,
            seq_slice=seq_slice,
            norm_filter=cfg.norm_filter,
            facts=facts,
        )
        device = device_of(source.reader.model)
        mixing = Mixing(source, cfg, batch_tokens=batch_tokens, train_tokens=train_tokens, seed=seed, device=device)
        ahead = cfg.prefetch if cfg.prefetch != "auto" else AHEAD if device.type == "cuda" else 0
        return cls(mixing, prefetch=ahead, device=device)

    @classmethod
    def from_config(
        cls,
        model: ModelConfig | nn.Module | Reader,
        data: DataConfig,
        buffer: BufferConfig | None = None,
        *,
        sites: Iterable[Spelling],
        train_tokens: int | None,
        batch_tokens: int,
        seed: int = 0,
        tokenizer: Any = None,
        documents: Any = None,
        facts: Mapping[str, Any] | None = None,
    ) -> "ActivationsStore":
        """Load what is given as config and connect it; a model object needs its `tokenizer`.

        `documents`, an iterable of strings or a dataset, takes the place of `data.sources`.
        """
        sites = tuple(sites)
        if isinstance(model, ModelConfig):
            module, own = load_model(model, sites)
            facts, tokenizer = facts or model_facts(module, model), tokenizer or own
            model = model.reader(module)
        return cls.from_model(
            model,
            token_stream(model, data, sites=sites, tokenizer=tokenizer, documents=documents, seed=seed),
            sites,
            batch_tokens=batch_tokens,
            train_tokens=train_tokens,
            buffer=buffer,
            rows_per_forward=data.rows_per_forward,
            excluded=excluded_ids(data.exclude, tokenizer),
            seq_slice=data.seq_slice,
            seed=seed,
            facts=facts,
        )

    @classmethod
    def from_cache(
        cls,
        cache: Cache | Path | str,
        buffer: BufferConfig | None = None,
        *,
        sites: Iterable[str] | None = None,
        batch_tokens: int,
        train_tokens: int | None = None,
        epochs: int | None = None,
        order: Literal["global", "blocks"] = "global",
        seed: int = 0,
        expected: Mapping[str, Any] | None = None,
    ) -> "ActivationsStore":
        """Batches of activations on disk; `expected` is the provenance of the activations that are wanted.

        Raises:
            FileNotFoundError, DataError, CorruptFileError, ConfigError, HookNotFoundError: see `CacheReader`.
        """
        cfg = buffer or BufferConfig()
        reader = CacheReader(
            cache,
            batch_tokens=batch_tokens,
            sites=None if sites is None else tuple(sites),
            order=order,
            seed=seed,
            epochs=epochs,
            tokens=train_tokens,
            dtype=None if cfg.dtype == "auto" else getattr(torch, cfg.dtype),
            expected=expected,
            drop_last=cfg.drop_last and order == "global",  # else the buffer gathers what is left
        )
        ahead = 0 if cfg.prefetch == "auto" else cfg.prefetch
        if order == "global":  # mixed already
            return cls(reader, prefetch=ahead, sample=BATCHES * batch_tokens if cfg.tokens == "auto" else cfg.tokens)
        return cls(Mixing(reader, cfg, batch_tokens=batch_tokens, train_tokens=train_tokens, seed=seed), prefetch=ahead)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Tensor | Mapping[str, Tensor]],
        buffer: BufferConfig | None = None,
        *,
        site: str = "rows",
        batch_tokens: int,
        train_tokens: int | None = None,
        seed: int = 0,
    ) -> "ActivationsStore":
        """Batches of rows that were made elsewhere: tensors [rows, width], of `site`, or mappings from site to them.

        They are mixed as activations are; filters other than that for values that are not finite are not applied.
        """
        cfg = buffer or BufferConfig()
        mixing = Mixing(GivenRows(rows, site), cfg, batch_tokens=batch_tokens, train_tokens=train_tokens, seed=seed)
        return cls(mixing, prefetch=0 if cfg.prefetch == "auto" else cfg.prefetch)

    def __next__(self) -> dict[str, Float[Tensor, "batch _"]]:
        return next(self._batches)

    def fill(self) -> None:
        """Fill the buffer, if there is one, before the first batch.

        Raises:
            DataError: text that does not give one batch.
        """
        if isinstance(self.mixed, Mixing):
            with self._batches.between_batches():
                self.mixed.fill()

    def peek(self, number: int) -> dict[str, Float[Tensor, "rows _"]]:
        """The first `number` activations, or as many as the buffer holds (or would hold); nothing is removed.

        They hold until the first batch; after it there is no peeking (RuntimeError).
        """
        with self._batches.between_batches():
            if self._batches.ready:
                raise RuntimeError("peek shows the first rows: call it before the first batch is taken")
            return self.mixed.peek(number if self._sample is None else min(number, self._sample))

    def pause(self) -> None:
        """Make no batches ahead until the next one is asked for.

        Call it before anything else runs the model: a forward made ahead would pass through its hooks and edits.
        """
        self._batches.pause()

    @property
    def ahead(self) -> int:
        """Batches that are made ahead, at most."""
        return self._batches.ahead

    @property
    def counters(self) -> Mapping[str, int | float]:
        """As of the last batch: ids fed to the model, activations and documents left out by reason, clumping."""
        return self._batches.counters

    @property
    def lm_seconds(self) -> float | None:
        """How long forwards of the language model took so far, wherever they ran; None where there is none."""
        return getattr(getattr(self.mixed, "source", None), "lm_seconds", None)

    @property
    def provenance(self) -> dict[str, Any]:
        """Which activations these are, as JSON values: model, sites, text, packing, filters."""
        return dict(self.mixed.provenance)

    @property
    def medians(self) -> dict[str, float]:
        """Site -> the median norm that its rows were compared with; none without a norm filter."""
        reader = self.mixed.source if isinstance(self.mixed, Mixing) else self.mixed
        counters = reader.cache.counters if isinstance(reader, CacheReader) else self.counters
        return {name.removeprefix(MEDIAN): float(n) for name, n in counters.items() if name.startswith(MEDIAN)}

    def state_dict(self) -> State:
        """Where the stream stands, just after the last batch; holds until the next one is asked for.

        JSON values and tensors. The tensors are the stream's own memory: write or copy them at once.
        """
        return self._batches.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go on after the batch at which `state` was taken, bit for bit, without reading what came before.

        Raises:
            ConfigError, DataError: the state belongs to other settings or other data.
        """
        self._batches.load_state_dict(state)

    def close(self) -> None:
        """Give back threads, files and the buffer's memory; the store is then at its end."""
        self._batches.close()


HELD = ("buffer", "pending", "pending_contexts")


def without_rows(state: State) -> tuple[State, State | None]:
    """The state of a store in two parts: where it stands, which is small, and the rows that it holds.

    A stream that mixes nothing holds none but batches made ahead, which are small, too.
    """
    mixed, ready = dict(state["source"]), state["ready"]
    if "numbers" not in mixed:
        return state, None
    rows = {name: mixed.pop(name) for name in HELD}
    entered = 0 if rows["buffer"] is None else int(rows["buffer"]["count"])
    entered += sum(len(next(iter(item["batch"].values()))) for item in ready)
    waiting = len(rows["pending_contexts"]) if rows["pending"] else 0
    place = {"source": mixed, "counters": state["counters"], "held": {"entered": entered, "waiting": waiting}}
    return place, {**rows, "ready": ready}


def with_rows(place: State, rows: State | None) -> State:
    """The two parts together again; without the rows the stream goes on with those that come next, and says so."""
    if "held" not in place:
        return place
    source, held = place["source"], place["held"]
    if rows is not None:
        source = source | {name: rows[name] for name in HELD}
        return {"source": source, "counters": place["counters"], "ready": rows["ready"]}
    if lost := sum(held.values()):
        log.warning(
            "%d activations that were read and not yet trained on were not saved; others take their place, so this is "
            "not bit for bit the run that was interrupted",
            lost,
        )
    contexts, entered, dropped = source["numbers"]
    anew = {"buffer": None, "pending": {}, "pending_contexts": torch.empty(0, dtype=torch.int32)}
    anew |= {"numbers": [contexts, entered - held["entered"], dropped], "ended": False}
    return {"source": source | anew, "counters": place["counters"], "ready": []}


def harvest(
    model: nn.Module | Reader,
    tokens: TokenRows,
    sites: Iterable[Spelling],
    *,
    rows_per_forward: int | None = None,
    excluded: Sequence[int] = (),
    seq_slice: PositionSlice | None = None,
    norm_filter: float | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Harvest:
    """The activations of `sites` in the order of `tokens`.

    Raises:
        HookNotFoundError: a site that is not in the model. ConfigError: rows longer than the model can read.
    """
    reader = model if isinstance(model, Reader) else Reader(model)
    bound = [resolve(reader.model, site) for site in sites]
    limit = max_context(reader.model)
    if limit is not None and tokens.context_size > limit:
        raise ConfigError(
            f"data.context_size: expected at most {limit}, the model's maximum, found {tokens.context_size}"
        )
    names = [site.spelling for site in bound]
    filters = RowFilter(names, excluded=excluded, seq_slice=seq_slice, norm_filter=norm_filter)
    rows = rows_per_forward or max(1, TOKENS_PER_FORWARD // tokens.context_size)
    return Harvest(reader, tokens, bound, rows_per_forward=rows, filters=filters, facts=facts)


def token_stream(
    model: nn.Module | Reader,
    data: DataConfig,
    *,
    sites: Iterable[Spelling] = (),
    tokenizer: Any = None,
    documents: Any = None,
    seed: int = 0,
) -> TokenStream:
    """Token rows for `model`; `sites` are looked for first, because opening the text may take longer."""
    if tokenizer is None:
        raise ConfigError("expected the tokenizer of the model that was given, found None")
    model = model.model if isinstance(model, Reader) else model
    for site in sites:
        resolve(model, site)
    return TokenStream.from_config(
        data,
        tokenizer,
        context_size=default_context(model),
        documents=documents,
        seed=seed,
        vocabulary=vocabulary_size(model),
    )


def default_context(model: nn.Module) -> int:
    """Ids per row where the config names none: the model's maximum, at most 1,024."""
    return min(LONGEST_ROW, max_context(model) or LONGEST_ROW)
