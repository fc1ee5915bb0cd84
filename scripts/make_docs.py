"""Write the tables of the documentation that say what the code says: run it after changing an architecture or a config.

    python scripts/make_docs.py

A table stands between two comments of a Markdown page, the first of which names it:

    <!-- architectures -->           every architecture of the package
    <!-- architectures: brief -->    the same in three columns
    <!-- fields: module:Class -->    fields of a config, each with its default and its line of documentation
    <!-- recipe: name -->            what benchmarks/ground_truth.py trains by
    <!-- end -->

A page in docs/architectures/ belongs to the architectures that its first line names in backticks.
"""

import dataclasses
import importlib
import inspect
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_kit import config as trees
from sae_kit import list_architectures
from sae_kit.registry import Architecture
from sae_kit.sae import SAE
from sae_kit.sae_config import SAEConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "architectures"
BLOCK = re.compile(
    r"(?P<start>^<!-- (?P<what>architectures|fields|recipe)(: (?P<which>[^ ]+))? -->\n).*?^<!-- end -->\n", re.M | re.S
)
RECIPES = ROOT / "benchmarks" / "ground_truth.py"
SMALL: dict[str, Any] = {"d_in": 16, "d_sae": 512}  # any architecture can be built from these two


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := renewed(text, page)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


def pages() -> list[Path]:
    """README and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str, page: Path) -> str:
    """The text of `page` with every table as the code has it."""

    def table(block: re.Match[str]) -> str:
        what, which = block["what"], block["which"]
        if what == "architectures":
            lines = brief_table(page) if which == "brief" else full_table(page)
        elif what == "recipe":
            lines = recipe(which)
        else:
            module, _, name = which.partition(":")
            lines = fields_table(getattr(importlib.import_module(module), name))
        return block["start"] + "\n" + "\n".join(lines) + "\n\n<!-- end -->\n"

    return BLOCK.sub(table, text)


# ---- architectures ---------------------------------------------------------------------------------------------------


def ours() -> list[Architecture]:
    """What is registered by the package itself, not by others that are installed."""
    return [found for found in list_architectures().values() if found.sae.__module__.startswith("sae_kit.")]


def full_table(page: Path) -> Iterator[str]:
    yield "| name | class | latents | trains | geometries | saved as | own fields |"
    yield "|---|---|---|---|---|---|---|"
    for found in ours():
        fields = ", ".join(f"`{field.name}`" for field in own_fields(found.config))
        yield (
            f"| {linked(found, page)} | `{found.sae.__name__}` | {summary(found.config)} | "
            f"{'yes' if found.sae.trainable else 'no'} | {geometries(found)} | `{saved_as(found)}` | {fields} |"
        )


def brief_table(page: Path) -> Iterator[str]:
    yield "| name | latents | config |"
    yield "|---|---|---|"
    for found in ours():
        yield f"| {linked(found, page)} | {summary(found.config)} | `{found.config.__name__}` |"


def linked(found: Architecture, page: Path) -> str:
    """The name, as a link to its page, or to its source where nobody wrote one."""
    return f"[`{found.name}`]({Path(os.path.relpath(home(found), page.parent)).as_posix()})"


def home(found: Architecture) -> Path:
    for path in sorted(PAGES.glob("*.md")):
        if f"`{found.name}`" in path.read_text(encoding="utf-8").partition("\n")[0]:
            return path
    return Path(inspect.getfile(found.sae))


def summary(cls: type) -> str:
    """The first sentence of a docstring."""
    text = " ".join((cls.__doc__ or "").split())
    return text.split(". ")[0].rstrip(".")


def geometries(found: Architecture) -> str:
    missing = SAE.geometries - found.sae.geometries
    if not missing:
        return "all"
    own, others = sorted(found.sae.geometries), sorted(missing)
    return f"all but {', '.join(others)}" if len(others) < len(own) else ", ".join(own)


def saved_as(found: Architecture) -> str:
    """The architecture of the inference form of a trained SAE."""
    sae: Any = found.config(**SMALL).build()
    if sae.selects_over_batch:
        sae.set_threshold(0.1)  # as training would have
    return sae.to_inference().cfg.architecture


# ---- fields ----------------------------------------------------------------------------------------------------------


def own_fields(cls: type[SAEConfig]) -> list[dataclasses.Field[Any]]:
    """Fields that other architectures need not have, and shared ones with a default of its own."""
    shared = {field.name: field.default for field in dataclasses.fields(SAEConfig)}
    fields = dataclasses.fields(cls)
    return [field for field in fields if field.name not in shared or field.default != shared[field.name]]


def fields_table(cls: type) -> Iterator[str]:
    docs = trees.field_docs(cls)
    fields = own_fields(cls) if issubclass(cls, SAEConfig) and cls is not SAEConfig else dataclasses.fields(cls)
    yield "| field | default | |"
    yield "|---|---|---|"
    for field in fields:
        text = docs[field.name].replace("|", r"\|")
        yield f"| `{field.name}` | {default(field)} | {text} |".replace("  ", " ")


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{trees.dump_yaml([field.default]).strip().removeprefix('- ')}`"
    return "" if field.default_factory is not dataclasses.MISSING else "required"


def recipe(name: str) -> Iterator[str]:
    """What differs from the defaults in a run of the benchmark, as YAML."""
    module = runpy.run_path(str(RECIPES))
    own, shared = module["RECIPES"][name], module["RUN"]
    sections = {section: shared.get(section, {}) | own.get(section, {}) for section in ("train", "optim", "schedule")}
    sae = {"architecture": name, "d_sae": module["D_SAE"]} | own["sae"]
    sections["train"].pop("device", None)
    yield "```yaml"
    yield from trees.dump_yaml({"sae": sae} | {key: value for key, value in sections.items() if value}).splitlines()
    yield "```"


if __name__ == "__main__":
    sys.exit(main())
