"""How well the stream mixes: a corpus of labelled tokens goes through all of it.

    python benchmarks/shuffle.py [--buffers 8192x1024 8192x256 131072x8192] [--json]

Documents of 20 to 900 tokens, rows of 128; the "model" gives the number of each token in the corpus, so every batch
says where its rows are from. *Window*: batch / (probability that two tokens of one row share a batch), in units of
2C − B, what a buffer of C rows and batches of B can reach at most. *Order*: mean correlation between place in a batch
and place in the corpus, in units of 1 / √(tokens), its spread for independent places. *Clumping*: what the stream
logs, beside what the probability says. *Once*: whether each token of a full row came exactly once.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from timing import parser
from torch import Tensor, nn

from sae_kit.data.buffer import BufferConfig
from sae_kit.data.store import ActivationsStore
from sae_kit.data.tokens import DataConfig
from sae_kit.demo import load_tokenizer

CONTEXT = 128
NO_MARKS: dict[str, Any] = {"row_start": None, "separator": None, "doc_start": None, "exclude": "none", "holdout": 0.0}


class Labels(nn.Module):
    """A model whose activations are the ids, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids[..., None].float())


def labelled(tokens: int) -> list[list[int]]:
    """Documents of 20 to 900 tokens whose ids are the numbers of the tokens in the corpus."""
    lengths = np.random.default_rng(0).integers(20, 900, tokens // 20)
    ends = np.cumsum(lengths)
    ends = ends[ends <= tokens]
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths.tolist(), strict=False)]


def measure(capacity: int, batch: int) -> dict[str, Any]:
    """One row of the table, from 10 buffers of tokens."""
    tokens = 10 * capacity
    store = ActivationsStore.from_config(
        Labels(),
        DataConfig(context_size=CONTEXT, **NO_MARKS),
        BufferConfig(tokens=capacity, norm_filter=None, drop_last=False),
        sites=["embed"],
        tokenizer=load_tokenizer(),
        documents=iter(labelled(tokens)),
        train_tokens=None,
        batch_tokens=batch,
    )
    batch_of = np.full(tokens, -1)
    correlations: list[float] = []
    clumping, given = 0.0, 0
    for number, found in enumerate(store):
        ids = found["embed"][:, 0].long().numpy()
        batch_of[ids], given = number, given + len(ids)
        if number * batch < 8 * capacity:  # before the buffer drains
            correlations.append(float(np.corrcoef(np.arange(batch), ids)[0, 1]))
            clumping = float(store.counters["clumping"])
    store.close()
    seen = int((batch_of >= 0).sum())
    steady = batch_of[capacity : 7 * capacity].reshape(-1, CONTEXT)
    p = _together(steady)
    return {
        "buffer x batch": f"{capacity}x{batch}",
        "window": batch / p / (2 * capacity - batch),
        "order": abs(float(np.mean(correlations))) * len(correlations) ** 0.5 * batch**0.5,
        "clumping": clumping,
        "of p": 1 + (CONTEXT - 1) * p,
        "once": seen == given and bool((batch_of[:given] >= 0).all()),
    }


def _together(batch_of: Int[np.ndarray, "rows context"]) -> float:
    """Share of the pairs of tokens of a row that are in one batch."""
    pairs = sum(
        int((counts * (counts - 1)).sum()) for counts in (np.unique(r, return_counts=True)[1] for r in batch_of)
    )
    return pairs / (len(batch_of) * CONTEXT * (CONTEXT - 1))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--buffers", nargs="+", default=["8192x1024", "8192x256", "131072x8192"])
    args = options.parse_args(arguments)
    for place, size in enumerate(args.buffers):
        found = measure(*map(int, size.split("x")))
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        if place == 0:
            print(f"| {' | '.join(found)} |\n|---|{'--:|' * (len(found) - 1)}")
        cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in found.values())
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
