"""Another library's training step, timed in its own interpreter: this side of the pipe.

Only one of the two processes computes at a time, the other is blocked in a read.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from cases import BANDWIDTH, L0
from torch import Tensor

WORKER = Path(__file__).with_name("peer_saelens.py")


class Peer:
    """SAELens in the environment of `python`; its process ends with ours."""

    def __init__(self, python: str, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = self._ask(threads=threads)["about"]

    def build(self, name: str, d_sae: int, x: Tensor, k: int, precision: str) -> bool:
        """Make the same case there, in place of the one before; whether SAELens has it."""
        batch, d_in = x.shape
        fields = {"d_in": d_in, "d_sae": d_sae, "batch": batch, "device": str(x.device), "precision": precision}
        return self._ask(build=name, k=k, l0=L0, bandwidth=BANDWIDTH, **fields)["known"]

    def step(self) -> float:
        """Seconds of one step."""
        return self._ask(step=True)["seconds"]

    def l0(self) -> float:
        """Mean L0 of the last step."""
        return self._ask(l0=True)["l0"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WORKER.name} ended while asked {command}: its error is above")
        return json.loads(line)
