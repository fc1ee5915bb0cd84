"""Steps of several SAEs side by side on the cores of a CPU.

A step is a hundred operations, of which some run on one core and most wait for all of their threads: one core for each
SAE, as far as there are cores, wastes neither.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch


def at_a_time(tasks: int, device: torch.device) -> int:
    """How many of so many SAEs make their steps side by side: one, but on a CPU as many as it has threads for."""
    return max(min(tasks, torch.get_num_threads()), 1) if device.type == "cpu" else 1


class Workers:
    """`number` threads, which share those of torch between them."""

    def __init__(self, number: int) -> None:
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(number, "sae")
        all_there = threading.Barrier(number + 1)

        def start() -> None:
            torch.set_num_threads(max(threads // number, 1))
            torch.get_num_threads()  # a thread takes its number over when it first asks for it
            all_there.wait()

        for _ in range(number):
            self._pool.submit(start)
        all_there.wait()
        torch.set_num_threads(threads)  # it holds for threads to come, too, and for this one

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """All of them, each in one thread. Of their errors the first in order is raised, when all have ended."""
        futures = [self._pool.submit(task) for task in tasks]
        try:
            wait(futures)
        finally:
            wait(futures)  # who is told of an interrupt, and may save, finds them at rest
        for future in futures:
            future.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
