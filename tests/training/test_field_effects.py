"""Every field of a run's config does something: each is given another value, and a run on the demo model tells.

The fields of an SAE's own config are tested beside their architectures, in contracts/test_learning.py.
"""

import dataclasses
import hashlib
import json
import math
import re
import signal
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from helpers import TRAINABLE
from runs import BATCH, HOOK, config, merged, rows_of

from sae_kit import SAE, SAETrainer
from sae_kit.data.models import Compatibility
from sae_kit.demo import corpus, load_model, load_tokenizer
from sae_kit.sae_config import SAEConfig
from sae_kit.training.callbacks import Callback
from sae_kit.training.config import RunConfig
from sae_kit.training.run import run

TESTS = Path(__file__).parents[1]


class Flip(NamedTuple):
    """Another value of a field: what sees it, and what else has to be set for it to matter."""

    value: Any
    seen_in: str = "weights"
    base: Mapping[str, Any] = {}


def by(file: str, test: str) -> str:
    """A test of its own."""
    return f"{file}::test_{test}"


ENTRY = {"hook": HOOK, "sae": {"architecture": "topk", "d_sae": 64, "k": 4}}
EVAL = {"eval": {"at_end": True, "tokens": 512, "fidelity_tokens": 256}}
OFTEN = {"checkpoint": {"every_tokens": 2 * BATCH}}
FALLING = {"optim": {"lr": 1e-2}, "schedule": {"warm_up_tokens": 0}}  # the loss by 2 with each row at least
STOP = {"train": {"early_stop": {"metric": "losses/overall_loss", "patience": 2, "min_delta": 1e9}}, **FALLING}
EASILY = {"train": {"early_stop": {"metric": "losses/overall_loss", "patience": 1, "min_delta": 0.5}}, **FALLING}
RESTARTS = {"schedule": {"name": "cosine_restarts"}}
MODELS, SOURCES, ROWS = "data/test_models.py", "data/test_sources.py", "data/test_tokens.py"
WRITING, SHARING, RUNS = "data/test_cache_writing.py", "data/test_cache_sharing.py", "training/test_cached_runs.py"
INIT, RESAMPLING, RESUMING = (f"training/test_{name}.py" for name in ("init", "resampling", "resuming_runs"))
CALLBACKS, END_TO_END = "training/test_callbacks.py", "training/test_end_to_end.py"
EFFECTS: Mapping[str, Flip | str] = {
    "name": Flip("other", "files"),
    "out": Flip("other", "files"),
    "seed": Flip(1),
    "deterministic": by("test_devices.py", "a_run_has_the_kernels_of_its_config"),
    "model.name": by(MODELS, "the_demo_model_is_one_of_them"),
    "model.revision": by(MODELS, "whose_code_and_which_revision_are_said_to_whoever_reads"),
    "model.tokenizer": by(MODELS, "another_tokenizer"),
    "model.host": by(MODELS, "every_host_has_the_same_weights_and_an_untouched_tokenizer"),
    "model.dtype": by(MODELS, "every_host_in_another_precision"),
    "model.device": by(MODELS, "a_device_that_is_not_there_is_refused_before_anything_is_read"),
    "model.autocast": by(MODELS, "the_reader_of_a_config_runs_the_model_as_it_says"),
    "model.attn_implementation": by(MODELS, "arguments_of_from_pretrained_reach_it"),
    **{
        f"model.compat.{field.name}": by(MODELS, "every_way_to_process_weights_is_said_to_the_bridge")
        for field in dataclasses.fields(Compatibility)
    },
    "model.trust_remote_code": by(MODELS, "whose_code_and_which_revision_are_said_to_whoever_reads"),
    "model.kwargs": by(MODELS, "arguments_of_from_pretrained_reach_it"),
    "model.forward_kwargs": by(MODELS, "the_reader_of_a_config_runs_the_model_as_it_says"),
    "data.sources.path": by(SOURCES, "local_tables"),
    "data.sources.name": by("data/test_hub_text.py", "a_hub_dataset_is_read_and_resumed"),
    "data.sources.split": by(SOURCES, "saved_datasets_that_cannot_be_read"),
    "data.sources.revision": by("data/test_hub_text.py", "a_revision_is_what_it_was"),
    "data.sources.data_files": by(SOURCES, "local_text_files"),
    "data.sources.data_dir": by(SOURCES, "local_text_files"),
    "data.sources.kind": by(SOURCES, "rows_of_ids"),
    "data.sources.column": by(SOURCES, "a_column_that_begins_with_nothing_is_what_the_config_says"),
    "data.sources.weight": by(ROWS, "shares_of_sources_hold_to_one_row"),
    "data.sources.epochs": by(ROWS, "a_source_that_ends_leaves_its_share_to_the_rest"),
    "data.sources.streaming": by(SOURCES, "local_tables"),
    "data.context_size": Flip(16),
    "data.row_start": Flip(None),
    "data.separator": Flip(None),
    "data.doc_start": Flip(5),
    "data.pack": Flip(False),
    "data.short": Flip("pad", base={"data": {"pack": False}}),
    "data.tail": by("data/test_packing.py", "what_is_left_at_the_end"),
    "data.exclude": Flip("none"),
    "data.seq_slice": Flip([4, None, 2]),
    "data.holdout": Flip(0.5),
    "data.shuffle": Flip(False),
    "data.open_shards": by(SOURCES, "files_are_read_in_turn_in_a_new_order_each_time"),
    "data.rows_per_forward": Flip(7, "rows"),
    "data.tokenize_batch": by(ROWS, "a_batch_ends_with_its_pass_and_with_its_size"),
    "data.workers": by(ROWS, "threads_change_no_row"),
    "data.chat_kwargs": by(SOURCES, "arguments_reach_the_template"),
    "buffer.tokens": Flip(2 * BATCH),
    "buffer.dtype": Flip("bfloat16"),
    "buffer.mix": Flip("none"),
    "buffer.device": by("data/test_store.py", "wherever_model_and_buffer_are"),
    "buffer.drop_last": by("data/test_given.py", "less_than_a_batch_is_given_on_request_alone"),
    "buffer.norm_filter": Flip(1.05),
    "buffer.norm_estimate_tokens": Flip(20),
    "buffer.prefetch": by("data/test_prefetch.py", "works_in_a_thread_of_its_own_from_the_first_batch_on"),
    "cache.read": by(RUNS, "a_shuffled_cache_needs_no_model"),
    "cache.write": by(RUNS, "what_cannot_be_cached_is_said"),
    "cache.sites": by(RUNS, "what_cannot_be_cached_is_said"),
    "cache.tokens": by(RUNS, "objects_take_the_place_of_names"),
    "cache.dtype": by(RUNS, "the_command_line_writes_and_trains"),
    "cache.rows_per_shard": by(WRITING, "the_manifest_says_what_there_is"),
    "cache.order": by(RUNS, "a_run_on_the_same_rows_in_the_same_order_is_the_same_run"),
    "cache.epochs": by(RUNS, "a_shuffled_cache_needs_no_model"),
    "cache.push.repo": by(SHARING, "what_is_pushed_comes_back"),
    "cache.push.revision": by(SHARING, "branches_and_private_repositories"),
    "cache.push.private": by(SHARING, "branches_and_private_repositories"),
    "saes.hook": Flip({"sae": {**ENTRY, "hook": "blocks.0.hook_resid_post"}}),
    "saes.hook_out": by("training/test_run.py", "a_transcoder_in_one_call"),
    "saes.start": by("training/test_finetuning.py", "training_goes_on_from_there"),
    "saes.lr": Flip({"sae": {**ENTRY, "lr": 1e-4}}),
    "saes.optim": Flip({"sae": {**ENTRY, "optim": {"eps": 1e-2}}}),
    "saes.schedule": Flip({"sae": {**ENTRY, "schedule": {"name": "linear"}}}),
    "saes.seed": Flip({"sae": {**ENTRY, "seed": 5}}),
    "saes.init.b_dec": by(INIT, "b_dec_is_the_centre_of_what_is_reproduced"),
    "saes.init.decoder": by(INIT, "uniform_weights_of_a_cross_layer_transcoder"),
    "saes.init.d_active_subspace": by(INIT, "active_subspace_holds_every_decoder_row"),
    "saes.init.zero_later_layers": by(INIT, "uniform_weights_of_a_cross_layer_transcoder"),
    "saes.init.decoder_norm": by(INIT, "the_norm_of_least_error_is_given_to_decoder_and_encoder"),
    "saes.init.encoder": by(INIT, "encoder_is_the_scaled_transpose"),
    "saes.init.encoder_factor": by(INIT, "encoder_is_the_scaled_transpose"),
    "saes.init.b_enc": by(INIT, "centred_biases_give_mean_zero"),
    "saes.init.firing_rate": by(INIT, "quantile_biases_give_every_latent_the_same_firing_rate"),
    "saes.resample.interval_tokens": by(RESAMPLING, "interval_times_and_the_end_of_the_run"),
    "saes.resample.times": by(RESAMPLING, "interval_times_and_the_end_of_the_run"),
    "saes.resample.window_tokens": by(RESAMPLING, "dead_is_silent_for_the_window_not_for_the_interval"),
    "saes.resample.rows": by(RESAMPLING, "only_the_last_rows_before_the_time_are_looked_at"),
    "saes.resample.encoder_scale": by(RESAMPLING, "dead_latents_get_rows_and_nothing_else_changes"),
    "saes.resample.reset_second_moment": by(RESAMPLING, "new_latents_may_take_the_second_moment_of_the_living"),
    "saes.end_to_end.kl": by(END_TO_END, "terms_and_gradients_are_those_of_the_definition"),
    "saes.end_to_end.downstream": by(END_TO_END, "terms_and_gradients_are_those_of_the_definition"),
    "saes.end_to_end.sites": by(END_TO_END, "terms_and_gradients_are_those_of_the_definition"),
    "saes.reconstruction": by(END_TO_END, "without_end_to_end_the_coefficient_of_the_reconstruction_counts"),
    "optim.name": Flip("signum"),
    "optim.lr": Flip(1e-3),
    "optim.betas": Flip([0.5, 0.999]),
    "optim.eps": Flip(1e-2),
    "optim.amsgrad": Flip(True, base={"optim": {"betas": [0.9, 0.5]}}),
    "optim.weight_decay": Flip(0.5, base={"optim": {"name": "adamw"}}),
    "optim.momentum": Flip(0.5, base={"optim": {"name": "signum"}}),
    "optim.fused": by("training/test_optim_memory.py", "moments_from_a_file_are_laid_out_anew"),
    "optim.clip_grad_norm": Flip(1e-9),
    "optim.ema": Flip(0.5),
    "schedule.name": Flip("linear"),
    "schedule.warm_up_tokens": Flip("50%"),
    "schedule.decay_tokens": Flip("50%"),
    "schedule.end_ratio": Flip(0.5, base=RESTARTS),
    "schedule.decay_end_ratio": Flip(0.5),
    "schedule.cycles": Flip(3, base=RESTARTS),
    "train.tokens": Flip(6 * BATCH),
    "train.batch_tokens": Flip(BATCH // 2),
    "train.accumulate": Flip(2),
    "train.device": by("training/test_run.py", "bad_input_is_refused_before_training"),
    "train.dead_after_tokens": Flip(10**6, "rows"),
    "train.density_window_tokens": Flip(2 * BATCH, "rows"),
    "train.max_pre_bytes": by("training/test_accumulation.py", "slices_that_were_asked_for_stay"),
    "train.sparse_below": Flip(0.5, "settings"),
    "train.compile": by("training/test_compile.py", "compiled_code_trains_the_same"),
    "train.amp": Flip("bf16"),
    "train.tf32": by("test_devices.py", "a_run_has_the_kernels_of_its_config"),
    "train.nonfinite": by("training/test_nonfinite.py", "when_the_run_stops"),
    "train.nonfinite_limit": by("training/test_nonfinite.py", "fewer_bad_steps_in_a_row_than_the_limit_stop_nothing"),
    "train.early_stop.metric": Flip("metrics/fvu", "rows", EASILY),
    "train.early_stop.patience": Flip(3, "rows", STOP),
    "train.early_stop.min_delta": Flip(0.0, "rows", STOP),
    "train.early_stop.mode": Flip("max", "rows", EASILY),
    "eval.every_tokens": Flip(4 * BATCH, "rows", merged(EVAL, {"eval": {"every_tokens": None}})),
    "eval.at_end": Flip(False, "rows", EVAL),
    "eval.tokens": Flip(1024, "rows", EVAL),
    "eval.fidelity_tokens": Flip(128, "rows", EVAL),
    "eval.metrics": Flip(["sparsity"], "rows", EVAL),
    "eval.ablation": Flip("mean", "rows", EVAL),
    "eval.rows_per_forward": Flip(3, "forwards", EVAL),
    "checkpoint.every_tokens": Flip(3 * BATCH, "files", OFTEN),
    "checkpoint.every_minutes": Flip(1e-9, "files"),
    "checkpoint.spacing": Flip("log", "files"),
    "checkpoint.count": Flip(3, "files", {"checkpoint": {"spacing": "log", "keep": 99}}),
    "checkpoint.keep": Flip(1, "files", OFTEN),
    "checkpoint.milestones": Flip([3 * BATCH], "files", OFTEN),
    "checkpoint.buffer": Flip("drop", "files", OFTEN),
    "checkpoint.signals": Flip(["SIGTERM"], "handlers"),
    "checkpoint.resume": by(RESUMING, "what_changed_is_named_and_what_does_not_matter_may_change"),
    "checkpoint.final": Flip(True, "files", OFTEN),
    "checkpoint.best": by(RESUMING, "the_best_checkpoint_stays"),
    "log.every_tokens": Flip(2 * BATCH, "rows"),
    "log.console": by(CALLBACKS, "the_config_says_which_callbacks_there_are"),
    "log.jsonl": Flip(False, "files"),
    "log.csv": Flip(True, "files"),
    "log.histograms": by(CALLBACKS, "wandb_keeps_rows_histograms_and_saes"),
    **{
        f"log.wandb.{name}": by(CALLBACKS, "what_is_configured_reaches_wandb")
        for name in ("project", "entity", "name", "group", "tags", "resume", "mode")
    },
    "log.wandb.id": by(CALLBACKS, "wandb_keeps_its_id_when_a_run_is_continued"),
    "log.wandb.artifacts": by(CALLBACKS, "wandb_keeps_rows_histograms_and_saes"),
}  # fmt: skip
FLIPS = {path: effect for path, effect in EFFECTS.items() if isinstance(effect, Flip)}


def leaves(cls: Any, path: str = "") -> Iterator[str]:
    """Every field that is no section, by its path."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        sections = list(sections_of(hints[field.name]))
        if SAEConfig in sections:
            continue
        if not sections:
            yield path + field.name
        for section in sections:
            yield from leaves(section, f"{path}{field.name}.")


def sections_of(hint: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from sections_of(part)


@pytest.mark.parametrize("names", [TRAINABLE, ("topk",)], ids=["every architecture", "evaluated"])
def test_defaults_train(names: tuple[str, ...], tmp_path: Path) -> None:
    """What is required and nothing else, but for the evaluation at the end, which the second run shows."""
    saes = {name: {"hook": HOOK, "sae": {"architecture": name, "d_sae": 128}} for name in names}
    tree = {"model": "demo", "dataset": "demo", "tokens": 4096, "saes": saes, "out": str(tmp_path)}
    found = run(RunConfig.from_dict({**tree, **({"eval": {"at_end": False}} if len(names) > 1 else {})}))
    assert found.training.status == dict.fromkeys(names, "trained")
    assert found.training.tokens == 4096
    losses = [value for name, value in found.training.metrics.items() if name.endswith("losses/overall_loss")]
    assert len(losses) == len(names)
    assert all(map(math.isfinite, losses))
    assert list(found.evals) == ([] if len(names) > 1 else ["topk"])
    for name in names:
        assert SAE.load_from_disk(found.folder / "saes" / name).cfg.d_in == 128


def test_no_field_is_forgotten() -> None:
    assert sorted(EFFECTS) == sorted(leaves(RunConfig))


@pytest.mark.parametrize("path", [path for path in EFFECTS if path not in FLIPS])
def test_fields_with_tests_of_their_own_have_them(path: str) -> None:
    file, _, test = str(EFFECTS[path]).partition("::")
    text = (TESTS / file).read_text()
    assert f"def {test}" in text, f"{test} is not in {file}"
    assert path.startswith("model.compat.") or re.search(rf"\b{path.rpartition('.')[2]}\b", text), (
        "the file does not mention the field"
    )


class Watch(Callback):
    """What else a run does."""

    essential: ClassVar[bool] = True

    def __init__(self) -> None:
        self.handlers: list[bool] = []
        self.forwards: list[int] = []
        self.settings: list[float | None] = []

    def on_step_end(self, trainer: SAETrainer) -> None:
        if trainer.steps == 1:
            found = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            self.settings = [sae.sparse_below for sae in trainer.saes.values()]
            self.handlers = [callable(handler) and handler is not signal.default_int_handler for handler in found]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What a run with these changes leaves; each is run once."""
    model, tokenizer, documents = (
        load_model(),
        load_tokenizer(),
        [text[: 40 + 7 * (i % 40)] for i, text in enumerate(corpus().train[:300])],
    )

    def see(changes: str) -> dict[str, Any]:
        home = tmp_path_factory.mktemp("run")
        tree: dict[str, Any] = merged({"model": {"name": None}, "data": {"sources": []}}, json.loads(changes))
        out = home / tree.pop("out", "runs")
        watch = Watch()
        count = model.register_forward_pre_hook(
            lambda module, inputs, named: watch.forwards.append(len(named.get("input_ids", *inputs[:1]))),
            with_kwargs=True,
        )
        try:
            result = run(config(out, **tree), model=model, tokenizer=tokenizer, documents=documents, callbacks=[watch])
        finally:
            count.remove()
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in result.folder.glob("saes/*/*.safetensors")]
        metrics = result.folder / "metrics.jsonl"
        return {
            "weights": sorted(digests),
            "rows": rows_of(result.folder) if metrics.exists() else [],
            "files": sorted(str(path.relative_to(home)) for path in home.rglob("*")),
            "handlers": watch.handlers,
            "forwards": watch.forwards,
            "settings": watch.settings,
        }

    cached = cache(see)
    return lambda changes: cached(json.dumps(changes))


@pytest.mark.parametrize("path", FLIPS)
def test_every_field_has_an_effect(path: str, seen: Callable[..., dict[str, Any]]) -> None:
    effect = FLIPS[path]
    value = effect.value
    *sections, name = ["saes"] if path.startswith("saes.") else path.split(".")
    change: dict[str, Any] = {name: value}
    for section in reversed(sections):
        change = {section: change}
    before, after = seen(dict(effect.base)), seen(merged(effect.base, change))
    assert after[effect.seen_in] != before[effect.seen_in]
