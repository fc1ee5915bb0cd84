"""What many tests need: every registered architecture in every geometry, with weights that hide no mistake."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sae_kit import RunConfig, SAETrainer, list_architectures
from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.sae_config import SAEConfig
from sae_kit.seeding import generator
from sae_kit.training.losses import Pass, training_pass
from sae_kit.training.schedules import StepValues

ARCHITECTURES = tuple(list_architectures())
TRAINABLE = tuple(name for name, found in list_architectures().items() if found.sae.trainable)
D_IN, D_OUT, D_SAE, SITES, BATCH = 32, 24, 96, 3, 64
SMALL = {"k": 8, "n_heads": 2, "bottleneck_factor": 8}
"""Fields whose defaults are for larger SAEs."""
GEOMETRIES: Mapping[str, Mapping[str, Any]] = {
    "sae": {},
    "skip": {"skip": True},
    "transcoder": {"out_shape": (D_OUT,)},
    "skip_transcoder": {"out_shape": (D_OUT,), "skip": True},
    "crosscoder": {"d_in": None, "in_shape": (SITES, D_IN)},
    "crosscoder_joint": {"d_in": None, "in_shape": (SITES, D_IN), "crosscoder_norm": "joint"},
    "clt": {"d_in": None, "in_shape": (SITES, D_IN), "out_shape": (SITES, D_OUT), "cross_layer": True},
    "clt_skip": {"d_in": None, "in_shape": (SITES, D_IN), "cross_layer": True, "skip": True},
}  # fmt: skip
NORMALIZATIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {"normalize_activations": "none"},
    "average": {"normalize_activations": "expected_average_only_in"},
    "rms": {"normalize_activations": "expected_average_only_in", "norm_statistic": "rms"},
    "center": {"normalize_activations": "center_and_scale"},
    "whitening": {"normalize_activations": "covariance_whitening"},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "row_norm": {"normalize_activations": "constant_norm_rescale"},
}
PER_ROW = ("layer_norm", "row_norm")


def kind_of(geometry: str) -> str:
    """The kind that a class lists in `geometries`."""
    return {"crosscoder_joint": "crosscoder", "clt_skip": "clt"}.get(geometry, geometry)


def has_form(name: str, geometry: str, normalization: str = "none") -> bool:
    """Whether the architecture has this geometry and this normalisation, and the two fit together."""
    found = list_architectures()[name]
    one_site_read_and_written = "out_shape" not in GEOMETRIES[geometry]
    return (
        kind_of(geometry) in found.sae.geometries
        and NORMALIZATIONS[normalization]["normalize_activations"] in found.config.normalizations
        and (normalization not in PER_ROW or one_site_read_and_written)
    )


FORMS = tuple((name, geometry) for name in ARCHITECTURES for geometry in GEOMETRIES if has_form(name, geometry))
TRAINABLE_FORMS = tuple(form for form in FORMS if form[0] in TRAINABLE)
every = pytest.mark.parametrize("name", ARCHITECTURES)
every_trainable = pytest.mark.parametrize("name", TRAINABLE)
every_form = pytest.mark.parametrize(("name", "geometry"), FORMS)
every_trainable_form = pytest.mark.parametrize(("name", "geometry"), TRAINABLE_FORMS)


def forms_in(*geometries: str) -> pytest.MarkDecorator:
    """Every architecture in those of these geometries that it has."""
    return pytest.mark.parametrize(("name", "geometry"), [form for form in FORMS if form[1] in geometries])


def small_fields(name: str) -> dict[str, Any]:
    """What makes an SAE of this architecture as small as the tests'."""
    cls = list_architectures()[name].config
    return {"d_in": D_IN, "d_sae": D_SAE} | {field: value for field, value in SMALL.items() if hasattr(cls, field)}


def refused(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether an architecture says that it has no such form."""
    found = list_architectures()[name]
    try:
        return found.config(**{**small_fields(name), **fields}).geometry().kind not in found.sae.geometries
    except ConfigError:
        return True


def make_config(name: str, geometry: str = "sae", **fields: Any) -> SAEConfig:
    """The default config of an architecture at the tests' size; fields that it lacks are left out."""
    return list_architectures()[name].config(**{**small_fields(name), **GEOMETRIES[geometry], **fields})


def make_sae(name: str, geometry: str = "sae", *, seed: int = 0, **fields: Any) -> SAE:
    """An SAE of non-zero parameters, unequal decoder norms, and thresholds in the range of its inputs."""
    if not refused(name, unequal := {"decoder_norm_constraint": "free"}):
        fields = unequal | fields
    sae = make_config(name, geometry, **fields).build(seed=seed)
    noises = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=noises).to(parameter.dtype)
            parameter.add_(0.15 * noise if parameter_name.startswith("W_") else 0.3 * noise)
            if parameter_name in sae.threshold_names:
                parameter.abs_()
        norms = torch.linspace(0.5, 2.0, sae.geometry.n_latents, dtype=sae.dtype)
        sae.geometry.scale_decoder(sae.W_dec, norms)
        sae.restore_constraints()
        if sae.selects_over_batch:
            average: Tensor = sae.get_buffer("threshold_average")
            average.copy_(torch.linspace(1.0, 1.4, average.numel()).reshape(average.shape))
            sae.get_buffer("threshold_weight").fill_(1.0)
    return sae


def estimated(sae: SAE, scale: float = 1.0) -> SAE:
    """The SAE with statistics of its normalisation, what is read and what is written having different ones."""
    sae.norm_in.estimate(scale * inputs(sae, 400, seed=11).float())
    if not sae.geometry.same_site:
        sae.norm_target.estimate(3 * scale * targets(sae, 400, seed=12).float() - scale)
    return sae


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations with a mean of their own, [*shape, D_IN]."""
    return _drawn((*shape, D_IN), seed).to(dtype)


def inputs(sae: SAE, *shape: int, seed: int = 0) -> Tensor:
    """What an SAE reads, [*shape, *in_shape], in its dtype."""
    return _drawn((*shape, *sae.geometry.in_shape), seed).to(sae.dtype)


def targets(sae: SAE, *shape: int, seed: int = 50) -> Tensor:
    """What it is to reproduce, [*shape, *out_shape]: its input, or other rows."""
    if sae.geometry.same_site:
        return inputs(sae, *shape, seed=seed - 50)
    return _drawn((*shape, *sae.geometry.out_shape), seed).to(sae.dtype)


def _drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-1, 1, shape[-1])


def batch(sae: SAE, size: int, seed: int = 0) -> Batch:
    """A batch of the trainer."""
    x = inputs(sae, size, seed=seed)
    return Batch(x, x if sae.geometry.same_site else targets(sae, size, seed=seed + 50))


def run_config(steps: int = 20, **sections: Any) -> RunConfig:
    """A run of `steps` batches of `BATCH` rows without console output."""
    sections.setdefault("log", {"console": False, "every_tokens": 10**9})
    sections.setdefault("optim", {"lr": 3e-3})
    train = {"tokens": steps * BATCH, "batch_tokens": BATCH, "device": "cpu", **sections.pop("train", {})}
    return RunConfig.from_dict({**sections, "train": train})


def sparse_batches(sae: SAE, steps: int, seed: int = 0, scale: float = 5.0) -> Iterator[Batch]:
    """Sparse combinations of 48 fixed directions of all that is read, and of what is written."""
    draw = generator(seed, "data")
    directions = {}
    for name, shape in (("directions", sae.geometry.in_shape), ("directions_out", sae.geometry.out_shape)):
        drawn = torch.randn(48, *shape, generator=generator(7, name))
        directions[name] = (scale * torch.nn.functional.normalize(drawn, dim=-1)).flatten(1).to(sae.dtype)
    for _ in range(steps):
        on = torch.rand(BATCH, 48, generator=draw) < 0.1
        amounts = (on * torch.rand(BATCH, 48, generator=draw)).to(sae.dtype)
        x = (amounts @ directions["directions"]).reshape(BATCH, *sae.geometry.in_shape)
        y = (amounts @ directions["directions_out"]).reshape(BATCH, *sae.geometry.out_shape)
        yield Batch(x, x if sae.geometry.same_site else y)


def fit(sae: SAE, steps: int = 20, seed: int = 0, **sections: Any) -> dict[str, float | int]:
    """Train on sparse combinations; the last row of metrics."""
    batches = sparse_batches(sae, steps, seed)
    return SAETrainer(run_config(steps, **sections), sae, batches, callbacks=[]).fit().metrics


def values_of(sae: SAE, **given: float) -> dict[str, float]:
    """The values of a step with all schedules at their end, those given replaced."""
    return StepValues(sae.cfg, 10**9).at(10**9) | given


def one_pass(sae: SAE, data: Batch, **given: float) -> Pass:
    """A pass as in a step."""
    return training_pass(sae, data, values_of(sae, **given))


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float(((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).detach())


class DemoRun(NamedTuple):
    """`sae-kit demo` as a user runs it: its folder, what it printed, and how long it took."""

    home: Path
    """where it was started; the run is in runs/demo below it"""
    output: str
    seconds: float

    @property
    def folder(self) -> Path:
        return self.home / "runs" / "demo"
