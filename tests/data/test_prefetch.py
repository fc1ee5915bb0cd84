"""Prefetching changes when batches are made, and nothing else."""

import copy
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kit.data.prefetch import Prefetch


class Counting(Iterator[dict[str, Tensor]]):
    """Batches 0, 1, 2, ...; counts them; may fail at one; remembers who made them."""

    def __init__(self, number: int = 1000, fails_at: int | None = None, seconds: float = 0.0) -> None:
        self.made = 0
        self.number, self.fails_at, self.seconds = number, fails_at, seconds
        self.threads: set[str] = set()
        self.closed = False

    def __next__(self) -> dict[str, Tensor]:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.made == self.number:
            raise StopIteration
        if self.made == self.fails_at:
            raise ValueError("no batch 7 today")
        self.made += 1
        return {"a": torch.full((2, 3), float(self.made - 1))}

    @property
    def counters(self) -> dict[str, int | float]:
        return {"made": self.made}

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]

    def close(self) -> None:
        self.closed = True


def numbers(batches: Iterator[dict[str, Tensor]], count: int = 10_000) -> list[int]:
    return [int(batch["a"][0, 0]) for _, batch in zip(range(count), batches, strict=False)]


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_the_same_batches_in_the_same_order(ahead: int) -> None:
    prefetch = Prefetch(Counting(40), ahead)
    assert numbers(prefetch) == list(range(40))
    assert next(prefetch, None) is None


@pytest.mark.parametrize("ahead", [0, 2])
def test_at_the_end_all_that_the_source_has_counted_is_known(ahead: int) -> None:
    source = Counting(5)
    prefetch = Prefetch(source, ahead)
    numbers(prefetch, 5)
    assert prefetch.counters == {"made": 5}
    assert next(prefetch, None) is None
    source.made = 7  # such as rows of a last batch that was not full
    assert prefetch.counters == {"made": 7}


def test_works_in_a_thread_of_its_own_from_the_first_batch_on_and_no_further_than_asked() -> None:
    source = Counting()
    prefetch = Prefetch(source, 3)
    time.sleep(0.01)
    assert not source.threads
    next(prefetch)
    wait_until(lambda: source.made == 4)
    time.sleep(0.02)
    assert source.made == 4
    assert source.threads == {"sae_kit-prefetch"}
    prefetch.close()


def test_counters_are_those_of_the_batch_handed_out() -> None:
    source = Counting()
    prefetch = Prefetch(source, 3)
    assert prefetch.counters == {"made": 0}
    for count in range(1, 6):
        next(prefetch)
        assert prefetch.counters == {"made": count}
    prefetch.close()


def test_its_error_comes_where_the_batch_is_asked_for_with_its_traceback() -> None:
    prefetch = Prefetch(Counting(fails_at=7), 3)
    assert numbers(prefetch, 7) == list(range(7))
    for _ in range(2):
        with pytest.raises(ValueError, match="no batch 7 today") as caught:
            next(prefetch)
        assert any("no batch 7" in str(entry.statement) for entry in caught.traceback)


def test_state_stands_still_until_the_next_batch_and_keeps_what_was_ready() -> None:
    source = Counting(seconds=0.001)
    prefetch = Prefetch(source, 4)
    for taken in range(1, 30):
        assert numbers(prefetch, 1) == [taken - 1]
        if taken % 3:
            continue
        state = prefetch.state_dict()
        made = source.made
        assert state["source"]["made"] == made == taken + len(state["ready"])
        time.sleep(0.005)
        assert source.made == made
        resumed = Prefetch(Counting(), taken % 5)
        resumed.load_state_dict(copy.deepcopy(state))
        assert resumed.counters == {"made": taken}
        assert numbers(resumed, 20) == list(range(taken, taken + 20))
        resumed.close()
    prefetch.close()


def test_a_stream_that_has_run_can_be_set_back() -> None:
    prefetch = Prefetch(Counting(), 3)
    numbers(prefetch, 5)
    state = copy.deepcopy(prefetch.state_dict())
    assert numbers(prefetch, 10) == list(range(5, 15))
    prefetch.load_state_dict(state)
    assert numbers(prefetch, 10) == list(range(5, 15))
    prefetch.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_stream_that_has_ended_or_failed_can_be_set_back(ahead: int) -> None:
    prefetch = Prefetch(Counting(10), ahead)
    numbers(prefetch, 5)
    state = copy.deepcopy(prefetch.state_dict())
    assert numbers(prefetch) == list(range(5, 10))
    prefetch.load_state_dict(state)
    assert numbers(prefetch) == list(range(5, 10))
    failing = Prefetch(Counting(fails_at=7), ahead)
    numbers(failing, 7)
    with pytest.raises(ValueError, match="no batch 7"):
        next(failing)
    failing.load_state_dict(state)
    assert numbers(failing, 2) == [5, 6]


def test_an_ended_stream_resumes_as_ended() -> None:
    prefetch = Prefetch(Counting(5), 2)
    assert numbers(prefetch) == list(range(5))
    resumed = Prefetch(Counting(5), 2)
    resumed.load_state_dict(prefetch.state_dict())
    assert numbers(resumed) == []


def test_closing_ends_the_thread_and_closes_the_source() -> None:
    source = Counting(seconds=0.01)
    prefetch = Prefetch(source, 3)
    next(prefetch)
    thread = prefetch._thread
    prefetch.close()
    prefetch.close()
    assert source.closed
    assert thread is not None
    assert not thread.is_alive()
    assert next(prefetch, None) is None
    Prefetch(Counting(), 3).close()


def test_a_pause_lasts_until_the_next_batch_is_asked_for() -> None:
    source = Counting(seconds=0.001)
    prefetch = Prefetch(source, 50)
    next(prefetch)
    prefetch.pause()
    made = source.made
    time.sleep(0.02)
    assert source.made == made < 51
    with prefetch.between_batches():
        next(source)  # somebody else takes one
        made = source.made
    assert prefetch.ready == made - 2
    following = numbers(prefetch, made - 1)
    assert following == [*range(1, made - 1), made]
    prefetch.close()


def test_a_state_that_is_refused_changes_nothing() -> None:
    class Picky(Counting):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise ValueError("of another stream")

    other = Prefetch(Counting(), 3)
    numbers(other, 10)
    prefetch = Prefetch(Picky(), 3)
    assert numbers(prefetch, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="another stream"):
        prefetch.load_state_dict(other.state_dict())
    assert prefetch.counters == {"made": 3}
    assert numbers(prefetch, 5) == [3, 4, 5, 6, 7]
    prefetch.close()
    other.close()


def test_closing_elsewhere_ends_waiting() -> None:
    prefetch = Prefetch(Counting(seconds=0.05), 2)
    found: list[list[int]] = []
    consumer = threading.Thread(target=lambda: found.append(numbers(prefetch)))
    consumer.start()
    time.sleep(0.12)
    prefetch.close()
    consumer.join(5)
    assert found
    assert found[0] == list(range(len(found[0])))
    assert prefetch.ready == 0
