"""The documentation holds: Python runs as a reader would type it, YAML and commands are runs, tables are the code's."""

import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

from sae_kit import registry
from sae_kit.cli import configured
from sae_kit.config import load_tree
from sae_kit.training.config import RunConfig, expand_short_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    """Blocks of a page, each after as many empty lines as put its errors on the page's own line numbers."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def python_blocks(page: Path) -> list[str]:
    return blocks(page.relative_to(ROOT).as_posix(), "python")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page, "python")])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace; those of the README run after the demo (test_readme.py)."""
    monkeypatch.chdir(tmp_path)
    known = {name: found for name, found in registry.list_architectures().items() if name != "log_penalty"}
    monkeypatch.setattr(registry, "_REGISTRY", known)  # what a page registers ends with it
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(page, "python"):
            exec(compile(block, str(ROOT / page), "exec"), module.__dict__)


YAML = {f"{page}-{number}": block for page in PAGES for number, block in enumerate(blocks(page, "yaml"))}


@pytest.mark.parametrize("place", YAML)
def test_yaml_blocks_are_runs(place: str, tmp_path: Path) -> None:
    """What a block leaves out, its page is not about: the site and the length."""
    path = tmp_path / "run.yaml"
    path.write_text(YAML[place], encoding="utf-8")
    tree = expand_short_names(load_tree(path))
    tree["train"] = {"tokens": 1_000_000} | tree["train"]
    for entry in tree["saes"].values():
        entry.setdefault("hook", "blocks.0.hook_resid_pre")
    assert RunConfig.from_dict(tree).saes


def commands(page: str, *names: str) -> list[list[str]]:
    """The `sae-kit` lines of a page, as arguments from the command on; those whose command is named."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip().split("#")[0].replace("--dry-run", "").split() for line in text.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["sae-kit"] and words[1:2] and words[1] in names]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that import a file run in test_extending.py, those that go on in test_resuming_runs.py."""
    monkeypatch.chdir(ROOT)
    for name, *words in commands(page, "train", "cache", "pretokenize"):
        if not {"--help", "--import", "--resume"} & {*words}:
            cfg = configured(name, words)
            assert name == "pretokenize" or (cfg.saes if name == "train" else cfg.cached_sites)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_linked_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], f"{page}: #{anchor}"


def test_the_index_leads_to_every_page() -> None:
    links = re.findall(r"\]\(([^)#:]+)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    linked = {(ROOT / "docs" / target).resolve() for target in links}
    assert {page for page in (ROOT / "docs").rglob("*.md") if page.name != "index.md"} <= linked


# ---- tables ----------------------------------------------------------------------------------------------------------

MAKE_DOCS = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))
GENERATED = [page for page in PAGES if MAKE_DOCS["BLOCK"].search((ROOT / page).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", GENERATED)
def test_tables_are_what_the_code_says(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    assert MAKE_DOCS["renewed"](text, path) == text, f"{page} is not up to date: run python scripts/make_docs.py"


def test_every_architecture_and_field_has_its_row() -> None:
    assert {"README.md", "docs/architectures/index.md", "docs/dead_latents.md"} <= set(GENERATED)
    ours = {found.name: found for found in MAKE_DOCS["ours"]()}
    assert {"topk", "jumprelu", "matryoshka_batchtopk"} <= set(ours)
    for page in ("README.md", "docs/architectures/index.md"):
        rows = re.findall(r"^\| \[`(\w+)`\]", (ROOT / page).read_text(encoding="utf-8"), re.M)
        assert rows == sorted(ours)
    text = (ROOT / "docs/architectures/index.md").read_text(encoding="utf-8")
    assert "| [`batchtopk`](batchtopk.md) | `BatchTopKSAE` |" in text
    assert re.search(r"^\| \[`temporal`\].* \| no \| sae \| `temporal` \|", text, re.M)
    assert re.search(
        r"^\| \[`matryoshka_batchtopk`\].* \| yes \| all but clt \| `jumprelu` \| .*`matryoshka_widths`", text, re.M
    )
    for found in ours.values():
        page = MAKE_DOCS["home"](found)
        assert (
            page.suffix == ".py"
            or f"| `{MAKE_DOCS['own_fields'](found.config)[-1].name}` |" in page.read_text()
            or (
                found.name == "abstopk"  # has the fields of topk, whose page it shares
            )
        )


def test_a_table_that_lost_a_row_gets_it_back() -> None:
    path = ROOT / "docs" / "architectures" / "topk.md"
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    torn = "".join(line for line in lines if not line.startswith("| `selection` |"))
    assert torn != text
    assert MAKE_DOCS["renewed"](torn, path) == text
    assert MAKE_DOCS["renewed"]("no table\n", path) == "no table\n"
