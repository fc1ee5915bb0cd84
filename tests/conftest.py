"""What the whole suite shares: no network, one real run of the demo, and architectures that the command line names."""

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers import DemoRun  # importing it lists the architectures, so not before those of the command line

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a dead host costs 23 seconds of retries
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two pools of threads on one core wait


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--import-architecture",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file or module whose architectures are tested like those of the package",
    )


def pytest_configure(config: pytest.Config) -> None:
    import torch

    from sae_kit.errors import ConfigError
    from sae_kit.registry import import_architectures

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which parts of torch do, too

    for source in config.getoption("--import-architecture") or ():
        try:
            import_architectures(source)
        except ConfigError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> "DemoRun":
    """One real demo for the whole session, in a process of its own; of several workers the first to come runs it."""
    from filelock import FileLock
    from helpers import DemoRun

    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(home.with_suffix(".lock")):
        if not home.exists():
            home.mkdir()
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "sae_kit.cli", "demo"],
                cwd=home,
                capture_output=True,
                text=True,
                timeout=1500,
                check=False,
            )
            found = {"output": done.stdout, "seconds": time.perf_counter() - start, "error": done.stderr}
            (home / "done.json").write_text(json.dumps(found | {"returncode": done.returncode}))
    found = json.loads((home / "done.json").read_text())
    assert found["returncode"] == 0, found["error"]
    return DemoRun(home, found["output"], found["seconds"])
