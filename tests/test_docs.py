"""Python blocks of the documentation run, in order and in one namespace, as a reader would type them."""

import re
import sys
import types
from pathlib import Path

import pytest

from sae_kit import registry

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(page: Path) -> list[str]:
    """Blocks of a page, each after as many empty lines as put its errors on the page's own line numbers."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md"])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_blocks(ROOT / page)
    assert blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        registry, "_REGISTRY", dict(registry.list_architectures())
    )  # what a page registers ends with it
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks:
        exec(compile(block, str(ROOT / page), "exec"), module.__dict__)
