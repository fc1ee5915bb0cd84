"""`sae-kit demo`: the main job on real input, with no network and no GPU.

A TopK SAE, 16 times as wide as the demo model's residual stream, is trained on the activations of the middle layer
over a million tokens of the standard library, evaluated on held-out modules, saved, and shown at work.
"""

import logging
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sae_kit import config as trees
from sae_kit.atomic import write_json
from sae_kit.data.models import load_model
from sae_kit.data.store import default_context
from sae_kit.data.tokens import held_out_rows
from sae_kit.demo.show import activations, choose_latents, describe, render
from sae_kit.errors import ConfigError, OutputExistsError
from sae_kit.training.config import RunConfig
from sae_kit.training.folder import RUN_FILES
from sae_kit.training.run import RunResult, run

log = logging.getLogger(__name__)

HOOK = "blocks.2.hook_resid_pre"
METRICS = "metrics.json"
SHOWN_ROWS, SHOWN_LATENTS = 400, 10
CONFIG = {
    "model": "demo",
    "dataset": "demo",
    "hook": HOOK,
    "sae": {"architecture": "topk", "d_sae": 2048, "k": 32},
    "tokens": 1_024_000,
    "train": {"batch_tokens": 1024},
    "optim": {"lr": 2e-3},
    "log": {"every_tokens": 51_200},
    "eval": {"every_tokens": None, "tokens": 65_536, "fidelity_tokens": 65_536},
}
"""The demo is an ordinary run: `sae-kit train` accepts the same tree from a file."""


def demo(out: Path, *, seed: int = 0, console: Console | None = None) -> RunResult:
    """Train, evaluate, save into `out`, and print what was learned.

    A former demo in `out` is replaced, and that is said; anything else is left alone.

    Raises:
        OutputExistsError: `out` holds something that is not a demo's run.
    """
    console = console or Console()
    out = out.absolute()
    make_room(out)
    tree = {**CONFIG, "out": str(out.parent), "name": out.name, "seed": seed}
    cfg = RunConfig.from_dict(tree)
    model, tokenizer = load_model(cfg.model, cfg.sites)
    result = run(cfg, model=model, tokenizer=tokenizer)
    metrics = headline(result)
    write_json(out / METRICS, metrics)
    console.print(_table_of_metrics(metrics, result))
    rows = held_out_rows(cfg.data, tokenizer, SHOWN_ROWS, context_size=default_context(model), seed=seed)
    found = activations(result.saes["sae"], model, rows)
    console.print()
    console.print("Ten latents and where they are strongest in held-out modules:", style="bold")
    latents = [describe(found, index) for index in choose_latents(found, SHOWN_LATENTS)]
    console.print(render(latents, tokenizer, colour=console.color_system is not None))
    console.print(f"The SAE is in {out / 'saes' / 'sae'}; open it with SAE.load_from_disk.", highlight=False)
    return result


def headline(result: RunResult) -> dict[str, float | int | None]:
    """The figures of `metrics.json`: held-out quality, dead latents at the end of training, speed."""
    evals = result.evals["sae"]
    return {
        "explained_variance": evals["reconstruction_quality"]["explained_variance"],
        "l0": evals["sparsity"]["l0"],
        "ce_loss_score": evals["model_performance_preservation"]["ce_loss_score"],
        "dead_fraction": result.training.metrics["sparsity/dead_fraction"],
        "tokens_per_second": round(result.training.tokens_per_second, 1),
        "train_tokens": result.training.tokens,
    }


def make_room(out: Path) -> None:
    """Remove a former demo's run, whatever its version and however far it came, and say so.

    Raises:
        OutputExistsError: the folder holds anything else. ConfigError: it cannot be read or removed.
    """
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not _is_demo(out):
            raise OutputExistsError(
                f"{out} exists and is not the run of a demo; nothing was changed. Choose another --out, or remove it"
            )
        log.info("replacing the former demo in %s", out)
        shutil.rmtree(out)
    except PermissionError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}") from error


def _is_demo(folder: Path) -> bool:
    """Whether a demo made this folder, of whatever version and however far it came, and nobody has put files there."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - RUN_FILES - {METRICS}:
        return False
    if (folder / "results.json").exists() and not (folder / METRICS).exists():
        return False  # a finished run of somebody's own
    try:
        tree = trees.load_tree(folder / "run.yaml")
    except ConfigError:
        return False
    return trees.look_up(tree, ("model", "name")) == "demo" and trees.look_up(tree, ("saes", "sae", "hook")) == HOOK


def _table_of_metrics(metrics: dict[str, float | int | None], result: RunResult) -> Table:
    evals = result.evals["sae"]
    table = Table(title=f"TopK SAE on {HOOK} of the demo model", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    fidelity = evals["model_performance_preservation"]
    ce = [f"{fidelity[f'ce_loss_{key}']:.3f}" for key in ("without_sae", "with_sae", "with_ablation")]
    rows = [
        ("explained variance", f"{metrics['explained_variance']:.3f}", "held-out modules; 1 is exact"),
        ("L0", f"{metrics['l0']:.1f}", "latents on per token, of 2,048"),
        (
            "CE score",
            f"{metrics['ce_loss_score']:.3f}",
            f"loss {ce[0]} nats, {ce[1]} with the SAE, {ce[2]} without the site",
        ),
        ("dead latents", f"{metrics['dead_fraction']:.1%}", "silent for the last tenth of training"),
        (
            "trained on",
            f"{metrics['train_tokens']:,} tokens",
            f"{metrics['tokens_per_second']:,.0f} tokens/s, model included",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table
