"""The configuration of a run: one frozen tree, the same from Python, YAML, JSON and the command line.

A section that belongs to one component is defined beside it (model, data, buffer, optim, schedule); this file holds the
tree and the sections of the trainer itself.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from sae_kit import config as trees
from sae_kit.config import Tokens, resolve_tokens
from sae_kit.data.buffer import BufferConfig
from sae_kit.data.cache import CacheConfig
from sae_kit.data.models import ModelConfig
from sae_kit.data.tokens import DataConfig
from sae_kit.errors import ConfigError
from sae_kit.evals import FAMILIES, check_families
from sae_kit.sae_config import SAEConfig
from sae_kit.training.callbacks.early_stop import EarlyStopConfig
from sae_kit.training.checkpoint_times import CheckpointConfig
from sae_kit.training.end_to_end import EndToEndConfig
from sae_kit.training.init import InitConfig
from sae_kit.training.optim import USED_BY, OptimConfig
from sae_kit.training.resampling import ResampleConfig
from sae_kit.training.schedules import ScheduleConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SAEEntry:
    """One SAE of a run: what it is and where it reads."""

    sae: SAEConfig
    """architecture and its own fields"""
    hook: str | tuple[str, ...]
    """site that is read, e.g. blocks.8.hook_resid_pre; several for a crosscoder or a cross-layer transcoder"""
    hook_out: str | tuple[str, ...] | None = None
    """site that is written, if it is another one: the SAE is then a transcoder"""
    start: str | None = None
    """folder of an SAE to begin from, with its weights, thresholds and statistics; None = anew"""
    lr: float | None = None
    """learning rate of this SAE; None = optim.lr"""
    optim: dict[str, Any] = field(default_factory=dict)
    """fields of optim that are others for this SAE"""
    schedule: dict[str, Any] = field(default_factory=dict)
    """fields of schedule that are others for this SAE"""
    seed: int | None = None
    """seed of the initial weights; None = from the run's seed"""
    init: InitConfig | None = None
    """fit the start to the first rows; None = as built"""
    resample: ResampleConfig | None = None
    """give dead latents new directions; None = never"""
    end_to_end: EndToEndConfig | None = None
    """train on what the model does with the reconstruction; every SAE of the run then gets whole contexts, unmixed"""
    reconstruction: float | None = None
    """coefficient of the reconstruction loss; None = 1, or 0 with end_to_end"""

    def __post_init__(self) -> None:
        if self.lr is not None and "lr" in self.optim:
            raise ConfigError("lr and optim.lr are the same field: give one of them")
        if self.start is not None and self.init is not None:
            raise ConfigError("init fits the start of a new SAE, and start names one that exists: give one of them")
        if self.reconstruction is not None and self.reconstruction < 0:
            raise ConfigError(f"reconstruction must not be negative, found {self.reconstruction}")
        if self.end_to_end is not None and not (isinstance(self.hook, str) and isinstance(self.hook_out, str | None)):
            raise ConfigError("end_to_end: only an SAE that writes one site can be put into a forward of the model")

    @property
    def reconstruction_coefficient(self) -> float:
        """Coefficient of the reconstruction loss."""
        if self.reconstruction is not None:
            return self.reconstruction
        return 1.0 if self.end_to_end is None else 0.0

    @property
    def sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Sites that are read, and sites that are written."""
        read, written = ((site,) if isinstance(site, str) else site for site in (self.hook, self.hook_out or self.hook))
        return read, written


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and on what."""

    tokens: int
    """activation rows to train on"""
    batch_tokens: int = 4096
    """rows in each step of the optimizer"""
    accumulate: int = 1
    """passes into which the rows of a step are divided, each with as much less memory; what looks at a whole batch \
sees that of a pass"""
    device: str = "auto"
    """device of the SAEs; auto = cuda where there is one, else cpu"""
    dead_after_tokens: Tokens | None = None
    """for SAEs that set none; None = the smaller of 10M and a tenth of the run"""
    density_window_tokens: int = 1_000_000
    """window of the logged firing frequencies"""
    max_pre_bytes: int | None = None
    """pre-activations held at a time while codes are sparse; None = 8 MiB on a CPU, else 1 GiB, over `accumulate`"""
    sparse_below: float | None = None
    """share of latents on below which standard, JumpReLU and gated SAEs train on sparse codes, with equal results; \
None = 3% on a CPU, else 0.8%"""

    compile: str | None = None
    """backend of torch.compile for forward pass and losses, e.g. inductor; None = off"""
    amp: Literal["auto", "bf16", "off"] = "auto"
    """bf16: products of encoder and decoder in bfloat16, all else in float32; auto = bf16 on a GPU, off on a CPU"""
    tf32: bool = True
    """on a GPU round factors of float32 products to TF32: several times as fast, three decimal digits"""
    nonfinite: Literal["auto", "stop", "freeze"] = "auto"
    """when an SAE diverges: stop the run, or freeze the SAE and go on; auto = freeze if there are several"""
    nonfinite_limit: int = 10
    """steps in a row with a loss or gradient that is not finite after which an SAE counts as diverged; such steps are \
skipped"""
    early_stop: EarlyStopConfig | None = None
    """stop where a metric no longer improves"""

    def __post_init__(self) -> None:
        if self.max_pre_bytes is not None and self.max_pre_bytes < 1:
            raise ConfigError(f"max_pre_bytes must be at least 1 or None, found {self.max_pre_bytes}")
        if self.sparse_below is not None and not 0 <= self.sparse_below <= 1:
            raise ConfigError(f"sparse_below must lie between 0 and 1, found {self.sparse_below}")
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens must be at least 1, found {self.batch_tokens}")
        if not 1 <= self.accumulate <= self.batch_tokens:
            raise ConfigError(f"accumulate must lie between 1 and batch_tokens, found {self.accumulate}")
        if self.nonfinite_limit < 1:
            raise ConfigError(f"nonfinite_limit must be at least 1, found {self.nonfinite_limit}")
        if self.tokens < self.batch_tokens:
            raise ConfigError(f"tokens must be at least one batch of {self.batch_tokens:,}, found {self.tokens:,}")
        if self.density_window_tokens < 1:
            raise ConfigError(f"density_window_tokens must be at least 1, found {self.density_window_tokens}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out text, of SAEs in the form in which they are used."""

    every_tokens: Tokens | None = "10%"
    """activation rows trained on between two evaluations; None = only at the end"""
    at_end: bool = True
    """evaluate when training is over"""
    tokens: int | None = None
    """held-out tokens; None = 0.5% of train.tokens, at least 16,384 and at most 200,000"""
    fidelity_tokens: int = 20_000
    """part of them that is run with the SAE spliced into the model"""
    metrics: tuple[str, ...] = ("fidelity", "reconstruction", "sparsity")
    """families of metrics; without fidelity no forward goes beyond the deepest site"""
    ablation: Literal["zero", "mean"] = "zero"
    """what replaces the site in the run that the CE score calls 0"""
    rows_per_forward: int | None = None
    """rows of text in a forward; None = data.rows_per_forward, or 4,096 tokens if that is None, too"""

    def __post_init__(self) -> None:
        for name in ("tokens", "fidelity_tokens", "rows_per_forward"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if not self.metrics:
            raise ConfigError(f"metrics: expected some of {', '.join(FAMILIES)}, found none")
        check_families(self.metrics)

    def interval(self, total: int) -> int | None:
        """Rows between two evaluations of a run of `total` rows; None = there is none on the way.

        Raises:
            ConfigError: less than one row.
        """
        if self.every_tokens is None:
            return None
        every = resolve_tokens(self.every_tokens, total, "eval.every_tokens")
        if every < 1:
            raise ConfigError(f"eval.every_tokens: {self.every_tokens!r} of {total:,} rows is less than one")
        return every


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """A run on Weights & Biases; without network it is kept on disk."""

    project: str
    """project"""
    entity: str | None = None
    """user or team"""
    name: str | None = None
    """name of the run; None = the run folder's"""
    group: str | None = None
    """group of runs"""
    tags: tuple[str, ...] = ()
    """tags"""
    id: str | None = None
    """id of the run; None = a new one, or that of the run which is continued"""
    resume: Literal["allow", "must", "never"] = "allow"
    """whether a run of this id may, must or must not be there already"""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline keeps everything in the run folder for `wandb sync`"""
    artifacts: bool = False
    """upload the SAEs of each checkpoint and of the end"""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is recorded, how often, and where."""

    every_tokens: int = 409_600
    """tokens between two rows of metrics"""
    console: bool = True
    """a progress bar, or a line per row of metrics where there is no terminal"""
    jsonl: bool = True
    """metrics.jsonl in the run folder"""
    csv: bool = False
    """metrics.csv in the run folder"""
    histograms: bool = False
    """send firing frequencies and decoder norms of all latents to Weights & Biases with each row"""
    wandb: WandbConfig | None = None
    """send to Weights & Biases"""

    def __post_init__(self) -> None:
        if self.every_tokens < 1:
            raise ConfigError(f"every_tokens must be at least 1, found {self.every_tokens}")
        if self.histograms and self.wandb is None:
            raise ConfigError("histograms: they are sent to Weights & Biases, so they need a section log.wandb")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: a model, its text, and one or more SAEs trained on one pass over it."""

    name: str | None = None
    """folder of the run; None = model, first SAE and 8 digits of the config's hash"""
    out: str = "runs"
    """parent folder"""
    seed: int = 0
    """root of every random generator"""
    deterministic: bool = False
    """on a GPU take kernels that give the same bits each time, where there are such; a CPU's do without it"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the language model"""
    data: DataConfig = field(default_factory=DataConfig)
    """its text"""
    buffer: BufferConfig = field(default_factory=BufferConfig)
    """where activations are mixed"""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """activations on disk"""
    saes: dict[str, SAEEntry] = field(default_factory=dict)
    """name -> SAE"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """the optimizer"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """the learning rate over time"""
    train: TrainConfig
    """length and batch"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """held-out evaluation"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """saving all of it on the way"""
    log: LogConfig = field(default_factory=LogConfig)
    """metrics"""

    def __post_init__(self) -> None:
        for where, name in [("name", self.name), *(("saes", name) for name in self.saes)]:
            if name is not None and (not name or Path(name).name != name or name == ".." or "\\" in name):
                raise ConfigError(f"{where}: {name!r} cannot be the name of one folder, which it is to become")
        for name in (None, *self.saes):
            self.optim_of(name)
            self.schedule_of(name).build(self.train.tokens)
        self.checkpoint.build(self.train.tokens, self.train.batch_tokens)
        self.eval.interval(self.train.tokens)
        if self.end_to_end:
            self._check_whole_contexts()

    def optim_of(self, name: str | None) -> OptimConfig:
        """The optimizer of one SAE; None is that of the run."""
        entry = None if name is None else self.saes.get(name)
        own = {} if entry is None else entry.optim if entry.lr is None else {**entry.optim, "lr": entry.lr}
        if own.get("name", self.optim.name) != self.optim.name:  # what only some have would be refused
            own = {f.name: f.default for f in dataclasses.fields(OptimConfig) if f.name in USED_BY} | own
        return _changed(self.optim, own, f"saes.{name}.optim")

    def schedule_of(self, name: str | None) -> ScheduleConfig:
        """The schedule of one SAE; None is that of the run."""
        entry = None if name is None else self.saes.get(name)
        return _changed(self.schedule, {} if entry is None else entry.schedule, f"saes.{name}.schedule")

    @property
    def end_to_end(self) -> dict[str, EndToEndConfig]:
        """SAEs that are trained end to end, and how."""
        return {name: entry.end_to_end for name, entry in self.saes.items() if entry.end_to_end is not None}

    def _check_whole_contexts(self) -> None:
        """Refuse what is for rows that were taken out of their contexts."""
        if self.cache.read is not None:
            raise ConfigError("end_to_end runs the model on the text of each batch: leave cache.read out")
        if self.train.accumulate > 1:
            raise ConfigError(
                "train.accumulate: with end_to_end a step is one pass over whole contexts; its memory is that of one "
                "forward, whose size is data.rows_per_forward"
            )
        for name in ("tokens", "dtype", "device", "drop_last", "prefetch"):
            if (value := getattr(self.buffer, name)) not in (getattr(BufferConfig, name), 0):
                raise ConfigError(f"buffer.{name}: with end_to_end there is no buffer, found {value!r}; leave it out")

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that some SAE reads or writes, once, sorted."""
        return tuple(sorted({site for entry in self.saes.values() for sites in entry.sites for site in sites}))

    @property
    def cached_sites(self) -> tuple[str, ...]:
        """Sites whose activations are written to a cache."""
        named = self.cache.sites
        return self.sites if named is None else (named,) if isinstance(named, str) else tuple(named)

    @classmethod
    def from_dict(cls, data: object, where: str = "") -> "RunConfig":
        """Build from plain data, in which the short names of one-SAE runs may stand for paths.

        `model` is model.name, `dataset` data.sources, `hook` and `hook_out` those of saes.sae, `sae` saes.sae.sae,
        `tokens` train.tokens. A section `sweep` becomes the entries that it stands for.

        Raises:
            ConfigError: a short name beside the field that it stands for; a sweep that makes several runs.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where or 'run'}: expected a mapping, found {data!r}")
        if "sweep" in data:
            from sae_kit.training.sweep import expand_sweep

            data, *others = expand_sweep(data)
            if others:
                raise ConfigError(
                    f"sweep: the fields that are swept make {1 + len(others)} runs, and one was expected: "
                    "sae_kit.training.sweep.train_sweep trains them one after the other"
                )
        return trees.structure_fields(cls, expand_short_names(data), where, short=SHORT_NAMES)


def _changed(section: T, own: Mapping[str, Any], where: str) -> T:
    """The section with other values of some fields."""
    return trees.structure(type(section), {**trees.unstructure(section), **own}, where) if own else section


SHORT_NAMES: Mapping[str, tuple[str, ...]] = {
    "model": ("model", "name"),
    "dataset": ("data", "sources"),
    "hook": ("saes", "sae", "hook"),
    "hook_out": ("saes", "sae", "hook_out"),
    "sae": ("saes", "sae", "sae"),
    "tokens": ("train", "tokens"),
}
"""Short names of a run of one SAE, and the paths that they stand for."""


def expand_short_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """A tree in which every short name has become its path; a mapping under `model` is that section already."""
    short = {
        key: data[key] for key in SHORT_NAMES if key in data and not (key == "model" and isinstance(data[key], Mapping))
    }
    tree: dict[str, Any] = {"train": {}} | {key: value for key, value in data.items() if key not in short}
    for name, value in short.items():
        if name == "dataset" and not isinstance(value, list | tuple):
            value = [value]
        trees.set_path(tree, SHORT_NAMES[name], value, name)
    return tree
