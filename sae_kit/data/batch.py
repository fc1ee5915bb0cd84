"""What the links of the activation stream hand to one another, and what each of them can do.

    token rows --TokenBatch--> harvest --Harvested--> mixing --{site: rows}--> trainer --Batch--> SAE

A link is an iterator that can be stopped and started again: `state_dict()` is where it stands, as JSON values and
tensors, just after the last item that it handed out; a link built in the same way that gets it by
`load_state_dict()` goes on from there, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

State = dict[str, Any]
"""JSON values and tensors. The tensors may be the link's own memory: save or copy them before its next item."""


@dataclass(frozen=True)
class Batch:
    """Rows to train on: `x` [batch, *in_shape] is read, `y` [batch, *out_shape] is to be reproduced.

    For an SAE both are the same tensor.
    """

    x: Float[Tensor, "batch ..."]
    y: Float[Tensor, "batch ..."]

    @cached_property
    def moments(self) -> tuple[Float[Tensor, "sites width"], Float[Tensor, " sites"]]:
        """ȳ and Σ‖y − ȳ‖² at each site, in float64: found once for all SAEs that are trained on these rows."""
        wide = self.y.detach().double().reshape(len(self.y), -1, self.y.shape[-1])
        mean = wide.mean(dim=0)
        return mean, (wide - mean).square().sum(dim=(0, 2))


@dataclass(frozen=True)
class TokenBatch:
    """Rows of ids for one forward of the language model."""

    ids: Int[Tensor, "rows context"]
    lengths: Int[Tensor, " rows"] | None = None
    """ids of each row before its padding; None = every row is full. Padding is known from here, never from the ids"""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Harvested:
    """What one forward gave, in the order of the text."""

    rows: Mapping[str, Float[Tensor, "kept _"]]
    """site -> the activations that passed the filters; row i of every site is the same token"""
    tokens: TokenBatch
    kept: Int[Tensor, " kept"]
    """where each row stands in `tokens.ids.flatten()`, ascending; on the CPU"""


@runtime_checkable
class Resumable(Protocol):
    """A link of the stream."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...

    def close(self) -> None:
        """Give back threads, files and memory; may be called any number of times."""
        ...


@runtime_checkable
class TokenRows(Resumable, Protocol):
    """Where token rows come from."""

    context_size: int

    def take(self, number: int) -> TokenBatch:
        """The next `number` rows; fewer at the end, and then none."""
        ...

    @property
    def passes(self) -> int:
        """Whole passes over the text; a stream that ends has no more than it was asked for."""
        ...

    @property
    def counters(self) -> Mapping[str, int]:
        """Documents and ids that were left out, by reason."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Everything that says which rows these are, as JSON values: tokenizer, sources, packing, held-out share."""
        ...
