"""Which activations are trained on.

In this order, and a row counts for the first that applies: padding, excluded ids, positions outside a slice, values
that are not finite at some site, and norms far above the median at some site. The last are attention sinks, a few
tokens whose norm is 100 to 1,000 times that of all others in some models: one of them in a batch is all that its
gradient sees.

The first three are known from ids alone, on the CPU; the last two cost one pass over the rows, and one wait for
the device.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.data.batch import State, TokenBatch
from sae_kit.errors import ConfigError, NonFiniteError

log = logging.getLogger(__name__)

MEDIAN_ROWS = 65_536
"""Rows after which the median norm of a site stays as it is."""
TOO_MANY = 0.05
"""Share of rows dropped by norm that is worth a warning: sinks are a few in a thousand."""

PositionSlice = tuple[int | None, int | None, int | None]


class RowFilter:
    """Drops rows and counts them by reason.

    `norm_filter` is a multiple of the running median norm of each site: over the rows that passed so far, up to
    65,536 of them, and those of the forward in hand.
    """

    def __init__(
        self,
        sites: Sequence[str],
        *,
        excluded: Sequence[int] = (),
        seq_slice: PositionSlice | None = None,
        norm_filter: float | None = None,
    ) -> None:
        if norm_filter is not None and not norm_filter > 1:
            raise ConfigError(f"buffer.norm_filter: expected a multiple above 1, or null for none, found {norm_filter}")
        self.excluded = tuple(sorted(excluded))
        self.seq_slice, self.norm_filter = seq_slice, norm_filter
        self.dropped: dict[str, int] = dict.fromkeys(("pad", "special", "slice", "nonfinite", "norm"), 0)
        self._ids = torch.tensor(self.excluded, dtype=torch.int64)
        self._norms = {site: RunningMedian() for site in sites}
        self.medians: dict[str, float] = {}
        """site -> the median norm that the rows of the last forward were compared with"""
        self.max_ratios: dict[str, float] = {}
        """site -> the largest norm seen, dropped ones included, in units of the median"""
        self._passed = 0
        self._said = False

    @property
    def provenance(self) -> dict[str, Any]:
        """What the filters do, as JSON values."""
        return {
            "excluded_ids": list(self.excluded),
            "seq_slice": None if self.seq_slice is None else list(self.seq_slice),
            "norm_filter": self.norm_filter,
        }

    def positions(self, tokens: TokenBatch) -> Int[Tensor, " kept"]:
        """Places in `tokens.ids.flatten()` that are neither padding, nor excluded, nor outside the slice; ascending."""
        rows, context = tokens.ids.shape
        keep = torch.ones(rows, context, dtype=torch.bool)
        number = keep.numel()

        def drop(reason: str) -> None:
            nonlocal number
            left = int(keep.sum())
            self.dropped[reason] += number - left
            number = left

        if tokens.lengths is not None:
            keep &= torch.arange(context) < tokens.lengths[:, None]
            drop("pad")
        if self.excluded:
            keep &= torch.isin(tokens.ids, self._ids, invert=True)
            drop("special")
        if self.seq_slice is not None:
            inside = torch.zeros(context, dtype=torch.bool)
            inside[slice(*self.seq_slice)] = True
            keep &= inside
            drop("slice")
        return keep.flatten().nonzero().squeeze(1)

    def usable(self, rows: Mapping[str, Float[Tensor, "rows _"]]) -> Int[Tensor, " kept"] | None:
        """Which of these rows are finite and not too long at every site, ascending, on the CPU; None means all.

        Raises:
            NonFiniteError: not one row is finite.
        """
        # A norm is finite only if all values are: one pass tells both.
        norms = {
            site: torch.linalg.vector_norm(value, dim=-1, dtype=_at_least_float32(value.dtype))
            for site, value in rows.items()
        }
        finite = torch.stack([norm.isfinite() for norm in norms.values()]).all(0)
        passed = finite
        if self.norm_filter is not None:
            short = [self._norms[site].observe(norm, finite) <= self.norm_filter for site, norm in norms.items()]
            passed = finite & torch.stack(short).all(0)
        if self._all(passed):  # nearly always
            self._learn(norms, None)
            return None
        finite, passed = finite.cpu(), passed.cpu()
        self.dropped["nonfinite"] += int((~finite).sum())
        self.dropped["norm"] += int((finite & ~passed).sum())
        if not bool(finite.any()):
            raise NonFiniteError(f"no activation of a forward was finite at {', '.join(rows)}; try another model.dtype")
        kept = passed.nonzero().squeeze(1)
        self._learn(norms, kept)
        return kept

    def state_dict(self) -> State:
        return {
            "dropped": dict(self.dropped),
            "passed": self._passed,
            "medians": dict(self.medians),
            "max_ratios": dict(self.max_ratios),
            "norms": {site: norms.state_dict() for site, norms in self._norms.items()},
        }

    def load_state_dict(self, state: State) -> None:
        self.dropped, self._passed = dict(state["dropped"]), state["passed"]
        self.medians, self.max_ratios = dict(state["medians"]), dict(state["max_ratios"])
        for site, norms in self._norms.items():
            norms.load_state_dict(state["norms"][site])

    def _all(self, passed: Bool[Tensor, " rows"]) -> bool:
        """Whether all rows passed; medians and ratios come from the device by the same wait."""
        device, sites = passed.device, tuple(self._norms) if self.norm_filter is not None else ()
        waiting = [passed.all(), *(number for site in sites for number in self._norms[site].numbers)]
        every, *numbers = torch.stack([number.to(device, torch.float64) for number in waiting]).tolist()
        self.medians = dict(zip(sites, numbers[::2], strict=True))
        self.max_ratios = dict(zip(sites, numbers[1::2], strict=True))
        return every == 1

    def _learn(self, norms: Mapping[str, Float[Tensor, " rows"]], kept: Int[Tensor, " kept"] | None) -> None:
        if self.norm_filter is None:
            return
        for site, norm in norms.items():
            self._norms[site].add(norm if kept is None else norm[kept.to(norm.device)])
        self._passed += len(next(iter(norms.values()))) if kept is None else len(kept)
        long = self.dropped["norm"]
        if not self._said and self._passed >= MEDIAN_ROWS and long > TOO_MANY * (self._passed + long):
            self._said = True
            log.warning(
                "%.1f%% of the activations are dropped because their norm is above %g times the median; if these are "
                "not attention sinks, raise buffer.norm_filter",
                100 * long / (self._passed + long),
                self.norm_filter,
            )


class RunningMedian:
    """The median of the first 65,536 numbers that are added, and of those about to be."""

    def __init__(self) -> None:
        self.count = 0
        self._kept = torch.empty(0)
        self._median = self._largest = torch.zeros(())

    @property
    def numbers(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The median, and the largest number seen in units of it."""
        return self._median, self._largest

    def observe(self, norms: Float[Tensor, " rows"], finite: Tensor) -> Float[Tensor, " rows"]:
        """`norms` as multiples of the median, to which the finite ones of them belong as long as it still moves."""
        if self.count < MEDIAN_ROWS:
            nothing = torch.full_like(norms, torch.nan)
            new = torch.where(finite, norms, nothing)
            self._median = torch.cat([self._kept.to(new), new]).nanmedian()
        median = self._median.to(norms)
        # Where most rows are zero, as of an expert that few tokens go to, the median says nothing of the others.
        ratios = torch.where(median > 0, norms / median, torch.zeros_like(norms))
        seen = torch.where(finite, ratios, torch.zeros_like(ratios)).max()
        self._largest = torch.maximum(self._largest.to(seen), seen)
        return ratios

    def add(self, norms: Float[Tensor, " rows"]) -> None:
        room = MEDIAN_ROWS - self.count
        if room > 0 and len(norms):
            self._kept = torch.cat([self._kept.to(norms), norms[:room]])
            self.count = len(self._kept)
            self._median = self._kept.median()
            if self.count == MEDIAN_ROWS:
                self._kept = self._kept[:0]  # the median is all that is needed from here

    def state_dict(self) -> State:
        return {
            "count": self.count,
            "kept": self._kept.cpu(),
            "median": self._median.cpu(),
            "largest": self._largest.cpu(),
        }

    def load_state_dict(self, state: State) -> None:
        self.count = state["count"]
        self._kept, self._median, self._largest = (state[name].clone() for name in ("kept", "median", "largest"))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
