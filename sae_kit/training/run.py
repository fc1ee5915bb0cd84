"""A run: a config tree becomes a model, a stream, SAEs and a trainer; what they leave is a folder.

- `run.yaml`: the whole config tree
- `metrics.jsonl`: every row of metrics, the evaluation last
- `results.json`, `results.csv`: for each SAE its config, status, token counts, dead latents and the held-out evaluation
- `checkpoints/`: the whole state of training, from which a run goes on
- `saes/NAME/`: the SAE, ready for use
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sae_kit import config as trees
from sae_kit.atomic import write_text
from sae_kit.data.cache import push_cache, write_cache
from sae_kit.errors import ConfigError
from sae_kit.evals import Metrics
from sae_kit.sae import SAE
from sae_kit.sae_config import SAEConfig
from sae_kit.training.building import build_saes, restored_saes
from sae_kit.training.callbacks import Callback, configured_callbacks
from sae_kit.training.config import RunConfig
from sae_kit.training.evaluating import Evaluate, check_awaited
from sae_kit.training.folder import make_folder, run_folder
from sae_kit.training.inputs import LiveInputs, open_inputs
from sae_kit.training.optim import OptimizerFactory
from sae_kit.training.outline import announce, check_run, outline
from sae_kit.training.part import OwnLoss
from sae_kit.training.results import RESULTS, write_results
from sae_kit.training.resume import checkpoint_to_resume, go_on, only_begun
from sae_kit.training.saving import Saving
from sae_kit.training.trainer import SAETrainer, TrainingResult


@dataclass(frozen=True)
class RunResult:
    """What a run leaves in memory; the same is in `folder`."""

    folder: Path
    saes: dict[str, SAE]
    """in the form for use: scales and norms folded"""
    evals: dict[str, Metrics]
    """held-out evaluation at the end, by SAE, without those that diverged; empty if it was switched off"""
    training: TrainingResult


def train(
    *,
    model: str | nn.Module | None = None,
    dataset: str | Mapping[str, Any] | Iterable[Any] | None = None,
    hook: str | Sequence[str],
    sae: SAEConfig | Mapping[str, Any],
    tokens: int,
    hook_out: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    callbacks: Sequence[Callback] = (),
    optimizer: OptimizerFactory | None = None,
    loss: OwnLoss | None = None,
    **fields: Any,
) -> RunResult:
    """Train one SAE on one site of a model, evaluate it on held-out text and save it.

    `model` is a hub id, a folder, "demo", or a model with its `tokenizer`; `dataset` is a hub id, a file, a folder,
    "demo", or any iterable of documents; neither is needed with `cache={"read": ...}`. With `hook_out` the SAE is a
    transcoder, which writes that site; with several hooks a crosscoder, or a cross-layer transcoder if
    `sae.cross_layer` says so. `optimizer` and `loss` are those of `SAETrainer`. Every other field of the config tree
    goes by its section: `optim={"lr": 1e-4}`, `train={"batch_tokens": 2048}`.

    Raises:
        ConfigError: an unknown or impossible field. HookNotFoundError: `hook` is not in the model.
        OutputExistsError: the run folder is taken.
    """
    tree: dict[str, Any] = {**fields, "hook": hook, "sae": sae, "tokens": tokens}
    if hook_out is not None:
        tree["hook_out"] = hook_out
    documents = None
    if isinstance(model, str):
        tree["model"] = model
    if dataset is None or isinstance(dataset, str | Mapping):
        tree |= {} if dataset is None else {"dataset": dataset}
    else:
        documents = dataset
    cfg = RunConfig.from_dict(tree)
    host = model if isinstance(model, nn.Module) else None
    return run(
        cfg,
        model=host,
        tokenizer=tokenizer,
        documents=documents,
        callbacks=callbacks,
        optimizer=optimizer,
        loss=loss,
    )


def run(
    cfg: RunConfig,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    documents: Iterable[str] | None = None,
    callbacks: Sequence[Callback] = (),
    optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
    loss: OwnLoss | None = None,
    override: bool = False,
) -> RunResult:
    """Everything from config to saved SAEs. Objects that are passed take the place of what `cfg` names.

    `optimizer` and `loss` are those of `SAETrainer`; what a config cannot hold has to be passed again to go on.

    A run that was interrupted goes on from its newest checkpoint (`checkpoint.resume`); `override` accepts that its
    config has changed since.

    Raises:
        TrainingInterrupted: a signal ended it, and it is saved.
    """
    check_run(cfg)
    folder = run_folder(cfg)
    found = checkpoint_to_resume(cfg, folder, override=override)
    make_folder(folder, resuming=found is not None or only_begun(cfg, folder))
    inputs, live = open_inputs(cfg, model, tokenizer, documents)
    saes = build_saes(cfg, inputs) if found is None else restored_saes(cfg, found)
    store = inputs.open()
    for sae in saes.values():
        sae.cfg.metadata.extra.setdefault("sae_kit", {})["provenance"] = store.provenance
    saving = Saving(cfg.checkpoint, folder, store)
    evaluation = Evaluate(cfg, live, store, saving) if live is not None and live.hold_out() else None
    check_awaited(cfg, is_evaluated=evaluation is not None)
    announce(outline(cfg, folder, saes, inputs, store, live))
    watching = [] if evaluation is None else [evaluation]
    observers = [*configured_callbacks(cfg, folder), *callbacks, *watching, saving]  # what was evaluated is saved
    final: dict[str, SAE] = {}
    evals: dict[str, Metrics] = {}

    def finish() -> dict[str, float | None]:
        """Save what was trained, before the evaluation, which may fail; then evaluate and add what it found."""
        for name, sae in trainer.saes.items():
            sae.cfg.metadata.extra["sae_kit"]["median_norms"] = store.medians
            final[name] = trainer.in_training[name].for_use().to_inference()
            final[name].cfg.metadata.num_dead_features = int(trainer.in_training[name].dead.mask().sum())
            final[name].save_model(folder / "saes" / name)
        if evaluation is None or not cfg.eval.at_end:
            return {}
        row = evaluation.row(final, trainer)
        evals.update(evaluation.found)
        for name, metrics in evals.items():
            final[name].cfg.metadata.l0 = metrics.get("sparsity", {}).get("l0")
            final[name].save_model(folder / "saes" / name)
        return row

    losses = [terms for terms in (loss, None if live is None else live.loss(saes, store)) if terms is not None]
    together = _together(losses) if losses else None
    trainer = SAETrainer(cfg, saes, store, callbacks=observers, evaluate=finish, optimizer=optimizer, loss=together)
    if found is not None:
        go_on(trainer, store, found)
    (folder / RESULTS).unlink(missing_ok=True)  # a run that grows is not finished
    write_text(folder / "run.yaml", trees.dump_yaml(cfg))  # nothing stands in the way any more
    try:
        training = trainer.fit()
    finally:
        store.close()
    results = {
        name: {
            "config": trees.unstructure(cfg.saes[name]),
            "status": training.status[name],
            "tokens": training.tokens,
            "tokens_per_second": training.tokens_per_second,
            "dead_fraction": trainer.in_training[name].dead_fraction(),
            "data": dict(store.counters),
            "evals": evals.get(name),
        }
        for name in final
    }
    write_results(folder, results)
    saving.deliver()
    return RunResult(folder, final, evals, training)


def _together(losses: Sequence[OwnLoss]) -> OwnLoss:
    """The terms of all of them."""
    return lambda sae, batch, run: {name: term for loss in losses for name, term in loss(sae, batch, run).items()}


def cache_activations(
    cfg: RunConfig,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    documents: Iterable[str] | None = None,
) -> Path:
    """Write the activations that the run of `cfg` would train on to `cache.write`, and push them if it says where.

    A cache that was begun there is gone on with. Returns its folder.

    Raises:
        ConfigError: no folder to write to, or one that holds a cache of other settings. OSError: a full disk; what was
            written stays.
    """
    if cfg.cache.write is None:
        raise ConfigError("cache.write: expected a folder to write to, found None")
    if not cfg.cached_sites:
        raise ConfigError("there is no site to read: name some in cache.sites, or give entries of saes")
    source = LiveInputs(cfg, model, tokenizer, documents, sites=cfg.cached_sites).harvest()
    folder = Path(cfg.cache.write)
    try:
        write_cache(
            source,
            folder,
            tokens=cfg.cache.tokens or cfg.train.tokens,
            dtype=cfg.cache.dtype,
            rows_per_shard=cfg.cache.rows_per_shard,
        )
    finally:
        source.close()
    if (push := cfg.cache.push) is not None:
        push_cache(folder, push.repo, revision=push.revision, private=push.private)
    return folder
