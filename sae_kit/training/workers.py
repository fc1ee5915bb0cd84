"""Steps of several SAEs side by side on the cores of a CPU.

A step is a hundred operations, of which some run on one core and most wait for all of their threads: one core for each
SAE, as far as there are cores, wastes neither.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch


class Workers:
    """Threads that share the threads of torch between them, for up to `tasks` tasks at a time."""

    def __init__(self, tasks: int) -> None:
        threads = torch.get_num_threads()
        self._number = max(min(tasks, threads), 1)
        self._pool = ThreadPoolExecutor(self._number, "sae")
        all_there = threading.Barrier(self._number + 1)

        def start() -> None:
            torch.set_num_threads(threads // self._number)
            torch.get_num_threads()  # a thread takes its number over when it first asks for it
            all_there.wait()

        for _ in range(self._number):
            self._pool.submit(start)
        all_there.wait()
        torch.set_num_threads(threads)  # it holds for threads to come, too, and for this one

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """All of them, each in one thread. Of their errors the first in order is raised, when all have ended."""
        futures = [self._pool.submit(task) for task in tasks]
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
