"""What a callback is, and the list of them that a trainer calls."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sae_kit.data.batch import State

if TYPE_CHECKING:
    from sae_kit.training.trainer import SAETrainer

log = logging.getLogger(__name__)
Metrics = Mapping[str, float | int | None]


class Callback:
    """Base with every event as a no-op; the trainer is passed for reading."""

    essential: ClassVar[bool] = False
    """whether an error of this callback ends the run; otherwise it is reported once and the callback dropped"""

    def on_start(self, trainer: SAETrainer) -> None:
        """Before the first row is asked for, after a state was loaded."""

    def on_step_start(self, trainer: SAETrainer) -> None:
        """The rows of the step are there."""

    def on_gradients(self, trainer: SAETrainer) -> None:
        """Gradients are complete, and neither projected nor clipped yet."""

    def on_step_end(self, trainer: SAETrainer) -> None:
        """The step is over, with all that is counted, logged, evaluated and saved after it."""

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        """A row of training metrics, of all steps since the last one."""

    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None:
        """A row of held-out metrics."""

    def on_checkpoint(self, trainer: SAETrainer, path: Path) -> None:
        """A checkpoint is complete, in this folder."""

    def on_exception(self, trainer: SAETrainer, error: BaseException) -> None:
        """The run ends with this error; `close` follows."""

    def on_end(self, trainer: SAETrainer) -> None:
        """Trained, evaluated and saved."""

    def close(self) -> None:
        """Release files and bars; called once, after an error too."""

    def metrics(self, trainer: SAETrainer) -> Metrics:
        """What this callback adds to the row that is about to be logged."""
        return {}

    def state_dict(self) -> State:
        """What it needs in order to go on in another process, as JSON values and tensors."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Go on from there; called before `on_start`, and not at all if nothing was saved."""


class Callbacks:
    """Calls each observer in order; one that fails is reported, closed and dropped, unless it is essential."""

    stop_reason: str | None
    """why the run is to end after this step; None = it goes on"""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.stop_reason = None
        self._callbacks = list(callbacks)
        kinds = [type(callback).__name__ for callback in callbacks]
        names = [f"{kind}.{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]
        self._named = dict(zip(names, self._callbacks, strict=True))

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    def stop(self, reason: str) -> None:
        """Ask for the run to end after this step, as if its tokens were used up."""
        self.stop_reason = self.stop_reason or reason

    def call(self, event: str, *args: Any) -> None:
        for callback in list(self._callbacks):
            self._call(callback, event, *args)

    def metrics(self, trainer: SAETrainer) -> dict[str, float | int | None]:
        """What all of them add to a row."""
        row: dict[str, float | int | None] = {}
        for callback in list(self._callbacks):
            row |= self._call(callback, "metrics", trainer) or {}
        return row

    def state_dict(self) -> State:
        """States by kind and place: `{"JSONL.0": {...}}`; callbacks without a state are left out."""
        return {
            name: state
            for name, callback in self._named.items()
            if callback in self._callbacks and (state := self._call(callback, "state_dict"))
        }

    def load_state_dict(self, state: State) -> None:
        """Give each callback its state; one that is new starts afresh, the state of one that is gone is let go."""
        for name, callback in self._named.items():
            if name in state and callback in self._callbacks:
                self._call(callback, "load_state_dict", state[name])

    def close(self) -> None:
        self.call("close")

    def _call(self, callback: Callback, event: str, *args: Any) -> Any:
        try:
            return getattr(callback, event)(*args)
        except Exception:  # whatever it is, an observer must not cost the run
            if callback.essential and event != "close":
                raise
            log.warning(
                "%s failed in %s and is switched off; the run goes on", type(callback).__name__, event, exc_info=True
            )
            self._callbacks.remove(callback)
            if event != "close":
                with contextlib.suppress(Exception):
                    callback.close()
        return None
