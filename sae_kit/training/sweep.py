"""Sweeps: one config tree that stands for many SAEs, and for several runs where it has to.

    sweep:
      base: {hook: blocks.8.hook_resid_pre, sae: {architecture: topk, d_sae: 24576}}
      grid: {sae.k: [16, 32, 64], lr: [1e-4, 3e-4]}     # every combination
      zip: {hook: [a, b], seed: [0, 1]}                 # in step with one another, each step with every combination
      name: "k{sae.k}-lr{lr}-{hook}-s{seed}"

What is swept in an entry makes entries of one run, which share the forward pass of the model. A field of the run itself
(`train.batch_tokens`, or `run.seed` where an entry has a field of that name) makes runs, one after the other.
"""

import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_kit import config as trees
from sae_kit.errors import ConfigError, NonFiniteError, TrainingInterrupted, did_you_mean
from sae_kit.registry import list_architectures
from sae_kit.training.config import SHORT_NAMES, RunConfig, SAEEntry, expand_short_names
from sae_kit.training.results import RESULTS

log = logging.getLogger(__name__)

FieldPath = tuple[str, ...]
Point = dict[FieldPath, Any]
"""One combination: a value for each swept path."""

LARGEST = 4096
"""SAEs of one sweep; more are a mistake in a list"""
LONGEST_NAME = 200
"""bytes; file systems take 255, and files get names beside it while they are written"""
OF_THE_RUN = "run"
"""in front of a path, where entry and run have a field of one name"""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Entries that differ in some fields."""

    base: dict[str, Any] | None = None
    """what all entries have in common; None = the one SAE that the run has otherwise"""
    grid: dict[str, Any] = field(default_factory=dict)
    """field -> list of values; every combination of them becomes an SAE"""
    zip: dict[str, Any] = field(default_factory=dict)
    """field -> list of values, all of one length; the first ones go together, the second ones, and so on"""
    name: str | None = None
    """name of each SAE, with fields in braces; None = the last word of each swept field and its value"""


def expand_sweep(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trees of the runs that a tree with a section `sweep` stands for; without one, the tree itself.

    Raises:
        ConfigError: an unknown field, lists of unequal length, equal names, or names that cannot be folders.
    """
    if "sweep" not in tree:
        return [dict(tree)]
    rest = expand_short_names({key: value for key, value in tree.items() if key != "sweep"})
    sweep = trees.structure(SweepConfig, tree["sweep"], "sweep")
    points = _points(sweep)
    saes = dict(rest.get("saes") or {})
    if sweep.base is None:
        if len(saes) != 1:
            raise ConfigError(f"sweep: give a base, or exactly one SAE to take its place; found {_listed(saes)}")
        base = _plain(saes.popitem()[1])
    else:
        base = sweep.base
    runs: dict[str, tuple[Point, list[Point]]] = {}
    for point in points:
        outer = {path: value for path, value in point.items() if not _is_of_entry(path)}
        inner = {path: value for path, value in point.items() if _is_of_entry(path)}
        runs.setdefault(repr(outer), (outer, []))[1].append(inner)
    found = [_run(rest, saes, base, sweep, outer, inner) for outer, inner in runs.values()]
    names = [run.get("name") for run in found]
    if rest.get("name") is not None and len(set(names)) < len(names):
        swept = ", ".join("{" + ".".join(path) + "}" for path in next(iter(runs.values()))[0])
        raise ConfigError(
            f"name: {len(names)} runs would all be called {names[0]!r}: put {swept} into it, or leave it out"
        )
    return found


def run_configs(tree: Mapping[str, Any]) -> list[RunConfig]:
    """The configs of all runs that a tree stands for, each checked before the first of them begins."""
    return [RunConfig.from_dict(run) for run in expand_sweep(tree)]


def train_sweep(tree: Mapping[str, Any], **objects: Any) -> list[Path]:
    """Train the SAEs of all runs that a tree stands for, one run after the other; the folders of those with results.

    A run that is finished is left as it is, so that a sweep that was interrupted goes on when it is started again.
    One that diverges is reported, and the others follow. `objects` are those of `run`.

    Raises:
        NonFiniteError: all of them diverged.
    """
    from sae_kit.training.folder import run_folder
    from sae_kit.training.run import run

    folders: list[Path] = []
    configs = run_configs(tree)
    log.info("%d SAEs in %d runs", sum(len(cfg.saes) for cfg in configs), len(configs))
    for cfg in configs:
        folder = run_folder(cfg)
        if _is_finished(folder, cfg):
            log.info("%s is finished already", folder)
        else:
            try:
                run(cfg, **objects)
            except TrainingInterrupted:
                left = len(configs) - configs.index(cfg) - 1
                if left:
                    log.warning("the same sweep once more goes on with this run, and with the %d that follow", left)
                raise
            except NonFiniteError as error:
                if not folders and cfg is configs[-1]:
                    raise
                log.warning("%s has no results: %s", folder, error)
                continue
        folders.append(folder)
    return folders


def _is_finished(folder: Path, cfg: RunConfig) -> bool:
    """Whether the folder holds the results of this very config."""
    there = (folder / RESULTS).is_file() and (folder / "run.yaml").is_file()
    return there and RunConfig.from_dict(trees.load_tree(folder / "run.yaml")) == cfg


# ---- what is swept ---------------------------------------------------------------------------------------------------


def _points(sweep: SweepConfig) -> list[Point]:
    """Every combination, the last field of the grid changing fastest."""
    grid, zipped = (_lists(section, f"sweep.{name}") for name, section in (("grid", sweep.grid), ("zip", sweep.zip)))
    if not grid and not zipped:
        raise ConfigError("sweep: there is nothing to sweep: give fields and their values in grid or zip")
    if both := [path for path in grid if path in zipped]:
        raise ConfigError(f"sweep: {'.'.join(both[0])} is in grid and in zip: give one of them")
    lengths = {".".join(path): len(values) for path, values in zipped.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ConfigError(f"sweep.zip: expected lists of one length, found {found}")
    number = math.prod(map(len, grid.values())) * next(iter(lengths.values()), 1)
    if number > LARGEST:
        raise ConfigError(f"sweep: {number:,} combinations; at most {LARGEST:,} are trained at once")
    rows = list(zip(*zipped.values(), strict=True)) if zipped else [()]
    return [
        dict(zip((*zipped, *grid), (*row, *values), strict=True))
        for row in rows
        for values in itertools.product(*grid.values())
    ]


def _lists(section: Mapping[str, Any], where: str) -> dict[FieldPath, list[Any]]:
    """Path -> values; `{sae: {k: [...]}}` and `{sae.k: [...]}` say the same."""
    found: dict[FieldPath, list[Any]] = {}

    def collect(node: Mapping[str, Any], above: FieldPath) -> None:
        for key, value in node.items():
            path = (*above, *str(key).split("."))
            if isinstance(value, Mapping):
                collect(value, path)
            elif not isinstance(value, list | tuple) or not value:
                raise ConfigError(f"{where}.{'.'.join(path)}: expected a list of values, found {value!r}")
            elif path in found:
                raise ConfigError(f"{where}.{'.'.join(path)} is given twice")
            else:
                found[path] = list(value)

    collect(section, ())
    for path in found:
        _check_field(path, where)
    return found


def _check_field(path: FieldPath, where: str) -> None:
    """The first word names a field; the rest is checked with the entry, which knows its architecture."""
    entry, run = _fields(SAEEntry), _fields(RunConfig) - {"saes", "name", "out"}
    first, *others = path
    if first == OF_THE_RUN and others:
        first, entry = others[0], set[str]()
    if first not in entry | run:
        of_saes = {field for found in list_architectures().values() for field in _fields(found.config)}
        long = f"sae.{first}" if first in of_saes and entry else ".".join(SHORT_NAMES.get(first, ()))
        near = f" Did you mean {long!r}?" if long else did_you_mean(first, sorted(entry | run))
        raise ConfigError(
            f"{where}: unknown field {'.'.join(path)!r}.{near} "
            f"Fields of an SAE: {_listed(entry) if entry else 'none here'}; of the run: {_listed(run)}"
        )


def _is_of_entry(path: FieldPath) -> bool:
    return path[0] in _fields(SAEEntry)


def _fields(cls: type) -> set[str]:
    return {found.name for found in dataclasses.fields(cls)}


# ---- runs and entries ------------------------------------------------------------------------------------------------


def _run(
    rest: Mapping[str, Any],
    saes: Mapping[str, Any],
    base: Mapping[str, Any],
    sweep: SweepConfig,
    outer: Point,
    points: Sequence[Point],
) -> dict[str, Any]:
    """The tree of one run: that of all of them, its own fields, and an entry for each point."""
    tree: dict[str, Any] = dict(rest)
    for path, value in outer.items():
        tree = _replaced(tree, path[1:] if path[0] == OF_THE_RUN else path, value)
    if isinstance(rest.get("name"), str):
        tree["name"] = _filled(rest["name"], outer, tree, "name")
    entries = dict(saes)
    for point in points:
        entry: dict[str, Any] = dict(base)
        for path, value in point.items():
            entry = _replaced(entry, path, value)
        if sweep.name is None:
            name = _default_name(point) or "sae"
        else:
            name = _filled(sweep.name, {**outer, **point}, entry, "sweep.name")
        _check_name(name, entries)
        try:
            trees.structure(SAEEntry, entry, "sweep")
        except ConfigError as error:
            raise type(error)(f"{error} (SAE {name!r})") from error
        entries[name] = entry
    return {**tree, "saes": entries}


def _check_name(name: str, taken: Iterable[str]) -> None:
    if name in taken:
        raise ConfigError(f"sweep.name: two SAEs would be called {name!r}: put every swept field into the name")
    is_one_part = Path(name).name == name != ".." and "\\" not in name
    if not is_one_part or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"sweep.name: {name!r} cannot be the name of a folder, which it is to become: "
            f"it may hold no / and no \\ and at most {LONGEST_NAME} bytes; say in sweep.name how to call the SAEs"
        )


def _default_name(point: Point) -> str:
    """`k16-lr0.0001`; a text stands for itself."""
    words = [value if isinstance(value, str) else f"{path[-1]}{_shown(value)}" for path, value in point.items()]
    return "-".join(words)


def _filled(template: str, point: Point, tree: Mapping[str, Any], where: str) -> str:
    """The template with values in the place of `{path}`: of swept fields, and of others that are set."""
    known = {".".join(path): value for path, value in point.items()}

    def value_of(match: re.Match[str]) -> str:
        path = match[1]
        value = known[path] if path in known else trees.look_up(tree, path.split("."))
        if value is None and path not in known:
            raise ConfigError(f"{where}: {match[0]} is not swept and not set.{did_you_mean(path, known)}")
        return _shown(value)

    filled = re.sub(r"\{([^{}]*)\}", value_of, template)
    if "{" in filled or "}" in filled:
        raise ConfigError(f"{where}: expected each field between two braces, found {template!r}")
    return filled


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_shown, value))
    if isinstance(value, Mapping):
        return "+".join(f"{key}={_shown(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _replaced(tree: Mapping[str, Any], path: FieldPath, value: Any) -> dict[str, Any]:
    """The tree with another value at `path`; what it shares with others is not touched."""
    first, *others = path
    if not others:
        return {**tree, first: value}
    below = tree.get(first)
    below = {} if below is None else _plain(below)
    if not isinstance(below, Mapping):
        raise ConfigError(f"sweep: {first} is {below!r}, not a section that could hold {'.'.join(path)}")
    return {**tree, first: _replaced(below, tuple(others), value)}


def _plain(value: Any) -> Any:
    """Config objects as the mappings that they stand for."""
    return trees.unstructure(value) if dataclasses.is_dataclass(value) else value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
