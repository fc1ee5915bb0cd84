"""Batches made ready ahead, by a thread of their own, while the ones before are trained on."""

import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sae_kit.data.batch import Resumable, State

JOIN_SECONDS = 5.0


@runtime_checkable
class Batches(Resumable, Protocol):
    """What hands out mixed batches: site -> [batch, width]."""

    def __next__(self) -> dict[str, Tensor]: ...

    @property
    def counters(self) -> Mapping[str, int | float]: ...


class Prefetch(Iterator[dict[str, Tensor]]):
    """The batches of `source`, up to `ahead` of them ready before they are asked for; the same with any `ahead`.

    With 0 they are made when they are asked for, and the state of one `ahead` is good for any other.

    The thread begins with the first batch that is asked for, and on a GPU works on a CUDA stream of its own. Its errors
    are raised, with their traceback, where the batch that failed is asked for. `state_dict` stops it between two
    batches and keeps those that are ready; it goes on with the next one asked for, so what the state shares with the
    stream holds until then.
    """

    def __init__(self, source: Batches, ahead: int, device: torch.device | None = None) -> None:
        """`device` is the one on which batches are made."""
        self.source, self.ahead = source, ahead
        self._ready: deque[_Ready] = deque()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._counters: Mapping[str, int | float] | None = None
        self._paused = self._closed = self._working = False
        self._error: BaseException | None = None
        self._streams = _Streams(device) if ahead and device is not None and device.type == "cuda" else None

    def __next__(self) -> dict[str, Tensor]:
        with self._change:
            if self._closed:
                raise StopIteration
            if self.ahead:
                self._resume()
            elif not self._ready:
                self._counters = None  # if this fails, or is the end: those of the source
                self._ready.append(self._make())
            while not self._ready and self._error is None and not self._closed:
                self._change.wait()
            if not self._ready:
                self._counters = None
                raise self._error or StopIteration
            ready = self._ready.popleft()
            self._change.notify_all()
        self._counters = ready.counters
        return ready.take()

    @property
    def counters(self) -> Mapping[str, int | float]:
        """Those of the source as of the last batch handed out."""
        return self.source.counters if self._counters is None else self._counters

    @property
    def ready(self) -> int:
        """Batches that were made and not yet asked for."""
        return len(self._ready)

    def pause(self) -> None:
        """Wait until the thread stands between two batches, where it stays until the next batch is asked for."""
        with self._change:
            self._paused = True
            while self._working:
                self._change.wait()
            if self._streams is not None:
                self._streams.to_consumer()

    @contextmanager
    def between_batches(self) -> Generator[None, None, None]:
        """A block that works with the source while the thread does not, and on its CUDA stream.

        So all memory of the source belongs to one stream, and none of it is used again before that is done with it.
        """
        with self._change:
            self.pause()
            with nullcontext() if self._streams is None else self._streams.in_turn():
                yield

    def state_dict(self) -> State:
        with self.between_batches():
            return {
                "source": self.source.state_dict(),
                "ready": [{"batch": ready.batch, "counters": dict(ready.counters)} for ready in self._ready],
                "counters": None if self._counters is None else dict(self._counters),
            }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state` was taken; a state that the source refuses changes nothing."""
        with self.between_batches():
            self.source.load_state_dict(state["source"])
            self._thread = None  # one that runs notices, and ends
            self._change.notify_all()
            self._ready = deque(_Ready(item["batch"], item["counters"], None) for item in state["ready"])
            self._counters, self._error = state["counters"], None

    def stop(self) -> None:
        """End the thread, after the batch that it is making; this is then at its end."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def close(self) -> None:
        """Stop, and close the source."""
        self.stop()
        self.source.close()

    def _resume(self) -> None:
        """Let the thread work on; the lock is held."""
        if self._streams is not None and (self._paused or self._thread is None):
            self._streams.to_producer()
        self._paused = False
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="sae_kit-prefetch", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _work(self) -> None:
        while self._may_work():
            try:
                with nullcontext() if self._streams is None else self._streams.producing():
                    ready = self._make()
            except BaseException as error:  # it is the consumer's, whatever it is
                with self._change:
                    self._working, self._error = False, error
                    self._change.notify_all()
                return
            with self._change:
                if not self._closed:
                    self._ready.append(ready)
                self._working = False
                self._change.notify_all()

    def _make(self) -> "_Ready":
        batch = next(self.source)
        return _Ready(batch, dict(self.source.counters), self._streams)

    def _may_work(self) -> bool:
        """Wait for room; False when this thread is to end."""
        with self._change:
            while not self._closed and self._thread is threading.current_thread():
                if not self._paused and len(self._ready) < self.ahead:
                    self._working = True
                    return True
                self._change.wait()
            return False


class _Streams:
    """The CUDA stream on which batches are made, beside the one on which they are used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = torch.cuda.Stream(device)

    def producing(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._own)

    def to_consumer(self) -> None:
        """What the producer has begun is complete before the consumer's next work."""
        torch.cuda.current_stream(self._device).wait_stream(self._own)

    def to_producer(self) -> None:
        """The other way round."""
        self._own.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def in_turn(self) -> Generator[None, None, None]:
        """A block on the producer's stream, after what the consumer has begun and before what it begins next."""
        self.to_producer()
        try:
            with self.producing():
                yield
        finally:
            self.to_consumer()

    def record(self) -> Any:
        """An event: all that the producer has begun."""
        return self._own.record_event()

    def hand_over(self, batch: Mapping[str, Tensor], complete: Any) -> None:
        """Let the consumer's stream wait for `batch`, and keep its memory until that stream is done with it."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(complete)
        for rows in batch.values():
            if rows.is_cuda:
                rows.record_stream(stream)


class _Ready:
    """A batch with the counters as they are after it."""

    def __init__(self, batch: dict[str, Tensor], counters: Mapping[str, int | float], streams: _Streams | None) -> None:
        self.batch, self.counters = batch, counters
        self._streams = streams
        self._complete = None if streams is None else streams.record()

    def take(self) -> dict[str, Tensor]:
        """The batch, for use on the stream of whoever asks."""
        if self._streams is not None and self._complete is not None:
            self._streams.hand_over(self.batch, self._complete)
        return self.batch
