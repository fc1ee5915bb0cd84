"""What the whole suite shares: no network, and one real run of the demo."""

import os
import subprocess
import sys
import time

import pytest
from helpers import DemoRun

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a dead host costs 23 seconds of retries


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
