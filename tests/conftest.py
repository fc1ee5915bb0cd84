"""What the whole suite shares: no network, and one real run of the demo."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a dead host costs 23 seconds of retries


class DemoRun(NamedTuple):
    """`sae-kit demo` as a user runs it: its folder, what it printed, and how long it took."""

    home: Path
    """where it was started; the run is in runs/demo below it"""
    output: str
    seconds: float

    @property
    def folder(self) -> Path:
        return self.home / "runs" / "demo"


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """One real demo for the whole session, in a process of its own."""
    home = tmp_path_factory.mktemp("demo")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "sae_kit.cli", "demo"],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return DemoRun(home, done.stdout, time.perf_counter() - start)
