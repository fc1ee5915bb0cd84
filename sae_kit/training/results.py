"""What runs found, side by side: a row per SAE, with the fields of the config in which the SAEs differ.

`results.json` of a run holds for each SAE its config, its status, token counts and the held-out evaluation. Everything
else here is made from it: `results.csv`, a table over several runs, and L0 against fidelity.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_kit import config as trees
from sae_kit.atomic import write_json, write_text
from sae_kit.errors import ConfigError, CorruptFileError, MissingDependencyError
from sae_kit.registry import list_architectures

RESULTS = "results.json"
TRAINED, FAILED = "trained", "failed"
NOT_COMPARED = ("saes", "name", "out", "log", "eval", "checkpoint")
"""sections of a run that do not change what is trained"""
L0, EV, CE = (
    "sparsity/l0",
    "reconstruction_quality/explained_variance",
    "model_performance_preservation/ce_loss_score",
)
SHOWN = {"tokens": "tokens", "dead_fraction": "dead", L0: "L0", EV: "EV", CE: "CE score"}
"""columns of the table on a terminal, and their short names"""
LABELLED = 40
"""points that a plot has room to name"""


@dataclass(frozen=True)
class Comparison:
    """SAEs side by side."""

    fields: tuple[str, ...]
    """paths in the config in which they differ"""
    metrics: tuple[str, ...]
    """tokens, tokens_per_second, dead_fraction, and `group/key` of the evaluations"""
    rows: tuple[Mapping[str, Any], ...]
    """run, sae, status, the fields and the metrics; None where an SAE has no such value"""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values of a row, in order."""
        return ("run", "sae", "status", *self.fields, *self.metrics)


def write_results(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `results.json` and `results.csv` of a run.

    `results` has for each SAE `config` (its entry), `tokens`, `tokens_per_second`, `dead_fraction`, `evals` (group ->
    key -> value, or None) and, unless it was trained to its end, `status`; what else is there is kept in the JSON.
    """
    rows = {name: {"status": TRAINED, **result} for name, result in results.items()}
    write_json(folder / RESULTS, rows)
    write_text(folder / "results.csv", as_csv(_comparison([(folder.name, rows, {})])))


def read_results(folder: Path | str) -> dict[str, dict[str, Any]]:
    """The `results.json` of a run.

    Raises:
        FileNotFoundError: there is none. CorruptFileError: it does not hold results.
    """
    path = Path(folder) / RESULTS
    try:
        data = trees.parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no results in {folder}: a run writes its {RESULTS} when it is over") from error
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}") from error
    whole = isinstance(data, dict) and all(
        isinstance(result, dict) and isinstance(result.get("config"), dict) for result in data.values()
    )
    if not whole:
        raise CorruptFileError(f"{path}: expected a result with its config for each SAE")
    return data


def compare(runs: Iterable[Path | str], *, out: Path | str | None = None, plot: Path | str | None = None) -> Comparison:
    """All SAEs of some runs; a folder that is no run stands for the runs in it.

    `out` is a folder that gets `comparison.json` and `comparison.csv`; `plot` a .png or .svg, see `pareto_plot`.

    Raises:
        FileNotFoundError: a folder without results. MissingDependencyError: a plot without matplotlib.
    """
    if plot is not None:
        _check_plot(Path(plot))
    folders = [run for given in runs for run in _runs_in(Path(given))]
    names = _names(folders)
    comparison = _comparison(
        [(name, read_results(run), _run_config(run)) for name, run in zip(names, folders, strict=True)]
    )
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", [dict(row) for row in comparison.rows])
        write_text(folder / "comparison.csv", as_csv(comparison))
    if plot is not None:
        pareto_plot(comparison, plot)
    return comparison


def as_csv(comparison: Comparison) -> str:
    """The table as CSV; what is None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, comparison.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison.rows)
    return text.getvalue()


def show(comparison: Comparison, console: Any = None) -> None:
    """Print the table, in short, to a console of rich; None = the terminal.

    Fields for which it is too narrow are named below.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    several = len({row["run"] for row in comparison.rows}) > 1
    facts = {"run": "run"} if several else {}
    facts |= {"sae": "SAE", "status": "status"}
    if all(row["status"] == TRAINED for row in comparison.rows):
        del facts["status"]
    fields = {path: path.removeprefix("sae.") for path in comparison.fields}
    metrics = {name: label for name, label in SHOWN.items() if name in comparison.metrics}
    console = console or Console()
    room = console.width - 1 - sum(_width(comparison, name, label) for name, label in (facts | metrics).items())
    left_out: list[str] = []
    for path, label in list(fields.items()):
        width = _width(comparison, path, label)
        if width <= room:
            room -= width
        else:
            left_out.append(fields.pop(path))
    wanted = facts | fields | metrics
    table = Table()
    for name, label in wanted.items():
        is_number = all(isinstance(row[name], int | float | None) for row in comparison.rows)
        table.add_column(Text(label), justify="right" if is_number else "left", no_wrap=name == "sae")
    for row in comparison.rows:
        style = "red" if row["status"] == FAILED else None
        table.add_row(*(Text(_short(row[name])) for name in wanted), style=style)
    console.print(table)
    if left_out:
        console.print(
            Text(f"No room here for {', '.join(left_out)}: see results.csv of a run, or compare with --out FOLDER")
        )


def _width(comparison: Comparison, name: str, label: str) -> int:
    """Of a column of the table, with its padding and one line."""
    return max(len(label), *(len(_short(row[name])) for row in comparison.rows)) + 3


# ---- plot ------------------------------------------------------------------------------------------------------------


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (x, y) no other one beats, with no larger x and no smaller y; by ascending x."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def pareto_plot(comparison: Comparison, path: Path | str) -> Path:
    """Draw L0 against explained variance, and against the CE score where it was measured; equal tables, equal files.

    Raises:
        ConfigError: a name that does not end in .png or .svg, or no SAE that was evaluated.
        MissingDependencyError: matplotlib is not installed.
    """
    path = Path(path)
    _check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    panels = {name: _points(comparison, name) for name in (EV, CE)}
    panels = {name: points for name, points in panels.items() if points}
    if not panels:
        raise ConfigError("there is nothing to draw: no SAE has an evaluation with its L0")
    several = len({row["run"] for row in comparison.rows}) > 1
    groups = list(dict.fromkeys(_group(row) for row in comparison.rows))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sae_kit", "font.size": 10}):
        figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
        for number, (name, points) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(1, len(panels), number, xlabel="L0", xscale="log")
            axes.set_ylabel({EV: "explained variance", CE: "CE score"}[name])
            front = [points[i] for i in pareto_front([(x, y) for x, y, _ in points])]
            axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="0.75", linewidth=1, zorder=1)
            for group in groups:
                of_group = [(x, y) for x, y, row in points if _group(row) == group]
                if of_group:
                    color = f"C{groups.index(group)}"
                    axes.scatter(*zip(*of_group, strict=True), s=28, color=color, label=group, zorder=2)
            for x, y, row in points if len(points) <= LABELLED else ():
                axes.annotate(
                    f"{row['run']}/{row['sae']}" if several else row["sae"],
                    (x, y),
                    (3, 3),
                    textcoords="offset points",
                    fontsize=7,
                    color="0.35",
                )
            ticks = sorted({float(f"{x:.3g}") for x, _, _ in points})
            if len(ticks) <= 8:
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.margins(x=0.12)
            axes.grid(color="0.92")
        if len(groups) > 1:
            figure.axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    return path


def _check_plot(path: Path) -> None:
    """What is better known before the table is made than after it."""
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"plot: expected a file that ends in .png or .svg, found {str(path)!r}")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("a plot needs matplotlib: pip install 'sae-kit[plots]'") from error


def _points(comparison: Comparison, name: str) -> list[tuple[float, float, Mapping[str, Any]]]:
    """L0 and the value of every SAE that has both; an L0 of 0 has no place on a logarithmic axis."""
    return [(row[L0], row[name], row) for row in comparison.rows if row.get(L0) and row.get(name) is not None]


def _group(row: Mapping[str, Any]) -> str:
    """What the points of one colour have in common."""
    parts = [row.get(name) for name in ("sae.architecture", "hook")]
    return ", ".join(str(part) for part in parts if part is not None)


# ---- table -----------------------------------------------------------------------------------------------------------


def _comparison(runs: Sequence[tuple[str, Mapping[str, Mapping[str, Any]], Mapping[str, Any]]]) -> Comparison:
    """From the name, the results and the config of each run."""
    found: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for run, results, config in runs:
        for name, result in results.items():
            evals = {f"{group}/{key}": value for group, keys in (result.get("evals") or {}).items()
                     for key, value in keys.items()}  # fmt: skip
            numbers = {key: result.get(key) for key in ("tokens", "tokens_per_second", "dead_fraction")}
            facts = {"run": run, "sae": name, "status": result.get("status", TRAINED)}
            own = dict(_leaves(result["config"]))
            found.append((facts, {**own, **config, **own}, numbers | evals))  # those of the SAE come first
    fields = _differing([config for _, config, _ in found])
    metrics = tuple(dict.fromkeys(name for _, _, values in found for name in values))
    rows = (
        facts | {name: config.get(name) for name in fields} | {name: values.get(name) for name in metrics}
        for facts, config, values in found
    )
    return Comparison(fields, metrics, tuple(rows))


def _differing(configs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Fields of several values, or that only some SAEs have, unless all are at the defaults of their architectures."""
    paths = dict.fromkeys(path for config in configs for path in config)
    defaults = [_defaults(config.get("sae.architecture")) for config in configs]

    def differs(path: str) -> bool:
        having = [(c[path], d.get(path)) for c, d in zip(configs, defaults, strict=True) if path in c]
        several = len(having) < len(configs) or len({json.dumps(value) for value, _ in having}) > 1
        return several and any(value != default for value, default in having)

    return tuple(path for path in paths if differs(path))


def _defaults(architecture: object) -> dict[str, Any]:
    """Fields of an architecture's config at their defaults, by path in an entry; empty if it is not registered here."""
    known = list_architectures()
    if not isinstance(architecture, str) or architecture not in known:
        return {}
    fields = dataclasses.fields(known[architecture].config)
    return {f"sae.{f.name}": trees.unstructure(f.default) for f in fields if f.default is not dataclasses.MISSING}


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted path; lists are values."""
    for key, value in tree.items():
        path = f"{above}{key}"
        if path == "sae.metadata":  # a product of the run
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _run_config(folder: Path) -> dict[str, Any]:
    """What the config of a run says about all its SAEs, by path."""
    path = folder / "run.yaml"
    tree = trees.load_tree(path) if path.is_file() else {}
    leaves = _leaves({key: value for key, value in tree.items() if key not in NOT_COMPARED})
    return {"run.seed" if name == "seed" else name: value for name, value in leaves}  # an entry has a seed of its own


def _runs_in(folder: Path) -> list[Path]:
    """The folder, if it is a run, or else the runs in it."""
    if (folder / RESULTS).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
    if not found:
        there = "it does not exist" if not folder.exists() else f"expected {RESULTS} in it, or in the folders in it"
        raise FileNotFoundError(f"no results in {folder}: {there}. A run writes its {RESULTS} when it is over")
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many of their parents as tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(folder for folder, path in zip(folders, resolved, strict=True) if resolved.count(path) > 1)
        raise ConfigError(f"{twice} is given twice: a run is compared with others, not with itself")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different parts")


def _short(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
