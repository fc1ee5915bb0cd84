"""The README's blocks run as a reader would run them: after the demo, in its folder, in order."""

import contextlib
import io
from pathlib import Path

import pytest
from helpers import DemoRun
from test_docs import ROOT, python_blocks

from sae_kit import list_architectures
from sae_kit.cli import parse_train
from sae_kit.training.config import RunConfig

README = ROOT / "README.md"


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_python_blocks_run(demo_run: DemoRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_run.home)
    blocks = python_blocks(README)
    assert len(blocks) == 2
    namespace: dict[str, object] = {"__name__": "readme"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("'<|endoftext|>'")
    assert any(line.startswith("'import'") for line in lines)
    assert " -> " in lines[-2]
    assert lines[-1].startswith("runs/first/saes/sae 0.")


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `sae-kit train` line of the README parses into a run."""
    monkeypatch.chdir(ROOT)
    lines = [line.split("#")[0].split() for line in README.read_text().splitlines() if line.startswith("sae-kit train")]
    runs = [RunConfig.from_dict(parse_train(words[2:])) for words in lines if "--help" not in words]
    assert len(runs) == 2
    assert runs[0].train.tokens == 100_000_000
    assert runs[1].optim.lr == 1e-3


def test_the_table_of_architectures_is_the_registry() -> None:
    section = README.read_text().split("## Architectures")[1].split("##")[0]
    for name, architecture in list_architectures().items():
        assert f"| `{name}` |" in section
        assert f"`{architecture.config.__name__}`" in section
    assert section.count("\n| `") == len(list_architectures())


def test_files_that_are_linked_exist() -> None:
    import re

    for page in ("README.md", "CONTRIBUTING.md", "docs/index.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
    assert Path(ROOT / "LICENSE").exists()
