"""The loop of ai-safety-foundation's `Pipeline` over several components: generate, train, validate, checkpoint.

A run does the same by itself (`sae_kit.training.run.run`). Here each stage is a call, for those who write the loop.
The names of theirs and ours side by side: docs/pipeline.md.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sae_kit import config as trees
from sae_kit.atomic import write_text
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.training.building import build_saes, restored_saes
from sae_kit.training.callbacks import Callback, Metrics, configured_callbacks
from sae_kit.training.config import EvalConfig, RunConfig
from sae_kit.training.evaluating import Evaluate
from sae_kit.training.folder import make_folder, run_folder
from sae_kit.training.inputs import LiveInputs, open_inputs
from sae_kit.training.outline import announce, check_run, outline
from sae_kit.training.resume import checkpoint_to_resume, go_on, only_begun
from sae_kit.training.saving import Saving
from sae_kit.training.trainer import SAETrainer, TrainingResult

SCORE = "ce_loss_score"
"""(L_ablated − L_reconstructed) / (L_ablated − L): the reconstruction score, of sums over all tokens."""
MEAN = "mean"
"""What stands for all components, in the place of the name of one."""
AVERAGED = ("losses", "metrics", "sparsity")
"""Groups of training metrics of which means over the components are logged."""


class Pipeline:
    """The SAEs of a run, one for each component, trained stage by stage on one continuous stream.

    Each entry of `cfg.saes` is a component. `cfg.train` says how many activations there are in all, for which the
    schedules are made, and `cfg.buffer` how many are mixed. Objects that are passed take the place of what `cfg`
    names. A pipeline that was interrupted goes on from its newest checkpoint, as a run does.

    Raises:
        ConfigError: no component, one that is called `mean`, or no model and text to validate on.
    """

    def __init__(
        self,
        cfg: RunConfig,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        documents: Iterable[str] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_run(cfg)
        if MEAN in cfg.saes:
            raise ConfigError(f"saes: {MEAN!r} stands for all components: call the SAE something else")
        self.cfg, self.folder, self._documents = cfg, run_folder(cfg), documents
        found = checkpoint_to_resume(cfg, self.folder)
        make_folder(self.folder, resuming=found is not None or only_begun(cfg, self.folder))
        inputs, live = open_inputs(cfg, model, tokenizer, documents)
        if live is None:
            raise ConfigError("a pipeline validates in the model: name it and its text beside the cache")
        self._live: LiveInputs = live
        saes = build_saes(cfg, inputs) if found is None else restored_saes(cfg, found)
        self.store = inputs.open()
        for sae in saes.values():
            sae.cfg.metadata.extra.setdefault("sae_kit", {})["provenance"] = self.store.provenance
        announce(outline(cfg, self.folder, saes, inputs, self.store, live))
        self._saving = Saving(cfg.checkpoint, self.folder, self.store)
        observers = [Means(), *configured_callbacks(cfg, self.folder), *callbacks, self._saving]
        self.trainer = SAETrainer(cfg, saes, self.store, callbacks=observers, loss=live.loss(saes, self.store))
        if found is not None:
            go_on(self.trainer, self.store, found)
        self._text_ended = False
        write_text(self.folder / "run.yaml", trees.dump_yaml(cfg))

    @property
    def activations_left(self) -> int:
        """How many there are to train on; none once the text has ended, or a callback stopped the training."""
        is_over = self._text_ended or self.trainer.callbacks.stop_reason is not None
        return 0 if is_over else self.trainer.total_tokens - self.trainer.tokens

    def generate_activations(self, store_size: int) -> int:
        """Fill the buffer, from which the next `store_size` activations are drawn; how many that is in whole batches.

        Raises:
            ConfigError: less than one batch.
        """
        batch = self.cfg.train.batch_tokens
        if store_size < batch:
            raise ConfigError(f"store_size: expected at least train.batch_tokens = {batch:,}, found {store_size:,}")
        self.store.fill()
        return min(store_size // batch * batch, self.activations_left)

    def train_autoencoder(self, activations: int) -> TrainingResult:
        """Train every SAE on so many more; optimizers, schedules and resampling live through the whole pipeline."""
        wanted = min(self.trainer.tokens + activations, self.trainer.total_tokens)
        result = self.trainer.fit(activations)
        self._text_ended = self.trainer.tokens < wanted
        return result

    def validate_sae(self, validation_n_activations: int) -> dict[str, float | None]:
        """The reconstruction score of each component on so many held-out tokens, and the `mean` of those that have one.

        None where the ablation costs less than 1e-6 nats, and for an SAE that diverged or cannot be spliced in. The
        scores are a row of the metrics.
        """
        tokens, live = validation_n_activations, self._live
        wanted = EvalConfig(
            tokens=tokens, fidelity_tokens=tokens, metrics=("fidelity",), ablation=self.cfg.eval.ablation
        )
        cfg = dataclasses.replace(self.cfg, eval=wanted)
        live = LiveInputs(cfg, live.model, live.tokenizer, self._documents)
        if not live.hold_out():
            raise ConfigError("a pipeline validates on held-out text: pass documents that can be read more than once")
        evaluation = Evaluate(cfg, live, self.store, self._saving)
        row = evaluation.row(self.saes_for_use(), self.trainer)
        found = {
            name: evaluation.found.get(name, {}).get("model_performance_preservation", {}) for name in self.cfg.saes
        }
        scores = {name: metrics.get(SCORE) for name, metrics in found.items()}
        known = [score for score in scores.values() if score is not None]
        scores[MEAN] = sum(known) / len(known) if known else None
        self._tell(row | {f"{MEAN}/evals/model_performance_preservation/{SCORE}": scores[MEAN]})
        return scores

    def save_checkpoint(self, *, is_final: bool = False) -> Path | None:
        """All that is needed to go on; `is_final`: the SAEs for use, in `saes/NAME`, too. None on a full disk."""
        if is_final:
            for name, sae in self.saes_for_use().items():
                sae.save_model(self.folder / "saes" / name)
        return self._saving.save(self.trainer)

    def run_pipeline(
        self,
        max_store_size: int,
        *,
        validation_n_activations: int = 16_384,
        validate_frequency: int | None = None,
        checkpoint_frequency: int | None = None,
    ) -> dict[str, SAE]:
        """All stages in turn until the activations are used up; returns the SAEs for use.

        Frequencies are in activations; None is at the end alone.
        """
        validated = checkpointed = self.trainer.tokens
        while self.activations_left:
            self.train_autoencoder(self.generate_activations(max_store_size))
            if validate_frequency is not None and self.trainer.tokens - validated >= validate_frequency:
                self.validate_sae(validation_n_activations)
                validated = self.trainer.tokens
            if checkpoint_frequency is not None and self.trainer.tokens - checkpointed >= checkpoint_frequency:
                self.save_checkpoint()
                checkpointed = self.trainer.tokens
        if validated < self.trainer.tokens:
            self.validate_sae(validation_n_activations)
        self.save_checkpoint(is_final=True)
        self.store.close()
        return self.saes_for_use()

    def saes_for_use(self) -> dict[str, SAE]:
        """The SAEs as they are now, scales and norms folded."""
        found: dict[str, SAE] = {}
        for name, part in self.trainer.in_training.items():
            part.sae.cfg.metadata.extra["sae_kit"]["median_norms"] = self.store.medians
            found[name] = part.for_use().to_inference()
            found[name].cfg.metadata.num_dead_features = int(part.dead.mask().sum())
        return found

    def _tell(self, row: dict[str, float | None]) -> None:
        """Hand a row to the sinks, which are closed between two stages of training."""
        callbacks = self.trainer.callbacks
        callbacks.call("on_start", self.trainer)
        try:
            callbacks.call("on_eval", self.trainer, row)
        finally:
            callbacks.close()


class Means(Callback):
    """Adds to each row of training metrics their means over the components that have them: `mean/metrics/l0`."""

    def metrics(self, trainer: SAETrainer) -> Metrics:
        values: dict[str, list[float]] = defaultdict(list)
        for name in trainer.saes:
            prefix = f"{name}/" if len(trainer.saes) > 1 else ""
            for key, value in trainer.row.items():
                metric = key.removeprefix(prefix)
                if key.startswith(prefix) and metric.startswith(tuple(f"{group}/" for group in AVERAGED)):
                    values[metric].append(value)
        return {f"{MEAN}/{metric}": sum(of_all) / len(of_all) for metric, of_all in values.items()}
