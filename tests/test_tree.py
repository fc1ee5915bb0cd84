"""Files stay small, and the README's tree is the tree."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 500


def test_no_file_is_long() -> None:
    folders = ("sae_kit", "tests", "scripts", "examples", "benchmarks")
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(lengths) > 20
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_readme_tree_names_every_room() -> None:
    rooms = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "sae_kit").iterdir()
        if (path.suffix == ".py" and not path.name.startswith("_")) or (path / "__init__.py").is_file()
    }
    assert "sae.py" in rooms
    assert "architectures/" in rooms
    blocks = re.findall(r"^```.*?\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    tree = next((block for block in blocks if block.startswith("sae_kit/\n")), "")
    named = {line.split()[0] for line in tree.splitlines() if line.strip()}
    assert rooms - named == set(), "the block of README.md that starts with 'sae_kit/' lacks these"
