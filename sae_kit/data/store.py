"""`ActivationsStore`: the activation stream in one object.

    documents -> token rows -> forwards, stopped at the deepest site -> filters -> mixing buffer -> batches
                                  or: activations on disk -> batches

Each link can be used alone; the store builds the chain, runs it ahead of the trainer if asked, and stops and
resumes it as a whole.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sae_kit.data.batch import State, TokenRows
from sae_kit.data.buffer import BufferConfig
from sae_kit.data.capture import device_of, max_context
from sae_kit.data.filters import PositionSlice, RowFilter
from sae_kit.data.harvest import Harvest
from sae_kit.data.mixing import Mixing
from sae_kit.data.models import ModelConfig, load_model
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
        model: nn.Module,
        tokens: TokenRows,
        sites: Sequence[Spelling],
        *,
        batch_tokens: int,
        train_tokens: int | None = None,
        buffer: BufferConfig | None = None,
        rows_per_forward: int | None = None,
        excluded: Sequence[int] = (),
        seq_slice: PositionSlice | None = None,
        seed: int = 0,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Find the sites and check the sizes; nothing is read before the first batch, `fill` or `peek`.

        `facts` say which model this is, as JSON values.

        Raises:
            HookNotFoundError: a site that is not in the model.
            ConfigError: rows longer than the model can read, or sizes that do not fit each other.
        """
        cfg = buffer or BufferConfig()
        self.harvest = harvest(
            model,
            tokens,
            sites,
            rows_per_forward=rows_per_forward,
            excluded=excluded,
            seq_slice=seq_slice,
            norm_filter=cfg.norm_filter,
            facts=facts,
        )
        self.tokens = tokens
        self.mixing = Mixing(self.harvest, cfg, batch_tokens=batch_tokens, train_tokens=train_tokens, seed=seed)
        device = device_of(model)
        ahead = cfg.prefetch if cfg.prefetch != "auto" else AHEAD if device.type == "cuda" else 0
        self._batches = Prefetch(self.mixing, ahead, device) if ahead else self.mixing

    @classmethod
    def from_config(
        cls,
        model: ModelConfig | nn.Module,
        data: DataConfig,
        buffer: BufferConfig | None = None,
        *,
        sites: Sequence[Spelling],
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
        if isinstance(model, ModelConfig):
            model, own = load_model(model)
            tokenizer = tokenizer or own
        return cls(
            model,
            token_stream(model, data, sites=sites, tokenizer=tokenizer, documents=documents, seed=seed),
            sites,
            batch_tokens=batch_tokens,
            train_tokens=train_tokens,
            buffer=buffer,
            rows_per_forward=data.rows_per_forward,
            excluded=excluded_ids(data.exclude, tokenizer),
            seq_slice=getattr(data, "seq_slice", None),
            seed=seed,
            facts=facts,
        )

    def __next__(self) -> dict[str, Float[Tensor, "batch _"]]:
        return next(self._batches)

    def fill(self) -> None:
        """Fill the buffer, before the first batch.

        Raises:
            DataError: text that does not give one batch.
        """
        self.mixing.fill()

    def peek(self, number: int) -> dict[str, Float[Tensor, "rows _"]]:
        """The first `number` activations, or as many as the buffer holds; nothing is removed.

        They are views that hold until the first batch; after it there is no peeking (RuntimeError).
        """
        return self.mixing.peek(number)

    @property
    def capacity(self) -> int:
        """Rows that the buffer holds."""
        return self.mixing.capacity

    @property
    def counters(self) -> Mapping[str, int | float]:
        """As of the last batch: ids fed to the model, activations and documents left out by reason, clumping."""
        return self._batches.counters

    @property
    def provenance(self) -> dict[str, Any]:
        """Which activations these are, as JSON values: model, sites, text, packing, filters."""
        return self.mixing.provenance

    @property
    def medians(self) -> dict[str, float]:
        """Site -> the median norm that the norm filter compares with."""
        return self.harvest.filters.medians

    @property
    def holdout(self) -> tuple[float, ...]:
        """Share of its documents that each source keeps for evaluation; none where rows came from elsewhere."""
        return getattr(self.tokens, "holdout", ())

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


def harvest(
    model: nn.Module,
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
    bound = [resolve(model, site) for site in sites]
    limit = max_context(model)
    if limit is not None and tokens.context_size > limit:
        raise ConfigError(
            f"data.context_size: expected at most {limit}, the model's maximum, found {tokens.context_size}"
        )
    names = [site.spelling for site in bound]
    filters = RowFilter(names, excluded=excluded, seq_slice=seq_slice, norm_filter=norm_filter)
    rows = rows_per_forward or max(1, TOKENS_PER_FORWARD // tokens.context_size)
    return Harvest(model, tokens, bound, rows_per_forward=rows, filters=filters, facts=facts)


def token_stream(
    model: nn.Module,
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
    for site in sites:
        resolve(model, site)
    return TokenStream.from_config(data, tokenizer, context_size=default_context(model), documents=documents, seed=seed)


def default_context(model: nn.Module) -> int:
    """Ids per row where the config names none: the model's maximum, at most 1,024."""
    return min(LONGEST_ROW, max_context(model) or LONGEST_ROW)
