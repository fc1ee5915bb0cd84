"""docs/parity.md has a row for every recorded case."""

import re
from pathlib import Path

import pytest
from peers import recorded_cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"


@pytest.mark.parametrize(
    ("title", "library"),
    [("SAELens", "saelens"), ("dictionary_learning", "dictionary_learning"), ("sparsify", "sparsify")],
)
def test_every_case_has_a_row(title: str, library: str) -> None:
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \|", section, re.M)
    assert rows[0] == "case"
    assert sorted(rows[1:]) == sorted(recorded_cases(library))
