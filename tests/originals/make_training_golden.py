"""Write tests/golden/training/saelens/: what SAELens computes in a training step, and the gradients of its loss terms.

Run by an interpreter that has SAELens (README.md beside this file); made with sae-lens 6.54.12, torch 2.13.0 on a CPU:

    OMP_NUM_THREADS=1 /tmp/saelens/bin/python tests/originals/make_training_golden.py

One file per case, all of it float64. Names in a file: `in.*` (x, dead mask, buffers before the step), `param.*`,
`out.*` (acts, recons, buffers after the step), `loss.*` (terms as SAELens returns them, with their coefficient, and
`loss.total`, their sum), `grad.<term>.<parameter>` for the total and every term but `mse_loss`, which is the total less
the others. Any other gradient that is not in the file is zero (but the two normalised cases hold none). `folded.*`: the
SAE with its normalisation folded, on raw x. `inference.*`: the inference SAE that SAELens saves, after the step. The
metadata's one key `about` is JSON: library, version, config, and in `differs` where sae_kit defines a term otherwise by
default. (One key, because safetensors writes several in a random order.)

Every parameter is random and non-zero, decoder rows have different norms, thresholds lie among the pre-activations.
Where gradients are recorded, no selection, threshold, window or kink is within 1e-4 of flipping, so that float32 can be
compared too.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes import (
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    TemporalSAE,
    TemporalSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "training" / "saelens"
D_IN, D_OUT, D_SAE, ROWS = 16, 12, 48, 24
TEMPORAL_D_SAE = 24  # attention has d_sae × d_sae matrices
SEQUENCES, TOKENS, HEADS = 4, 6, 4  # shapes of the temporal and hook_z inputs, ROWS rows each
SHARED = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64"}
Tensors = dict[str, torch.Tensor]


@dataclass
class Case:
    """One file: a class of SAELens, its config, and what a training step is told."""

    sae: type[SAE[Any]]
    config: Any
    fields: dict[str, Any] = field(default_factory=dict)
    dead: str = ""  # "silent": all latents that fire nowhere in x; "few": five of those; "random": every fourth latent
    differs: str = ""


AUX = "AuxK: no relu, neither divided by V_e nor multiplied by V_y (aux_style='saelens')"
THRESHOLD = "threshold <- (1-lr) threshold + lr min, no bias correction; K = int(k B), not rounded"
CASES = {
    # differs: nothing for p >= 1
    "standard_l1": Case(
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        {"l1_coefficient": 0.7},
        differs="nothing",
    ),
    # differs: nothing for p >= 1
    "standard_lp2": Case(
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        {"l1_coefficient": 1.5, "lp_norm": 2.0, "apply_b_dec_to_input": False},
        differs="nothing",
    ),
    # differs: the auxiliary decoder is attached here (detach_aux_decoder=False)
    "gated": Case(
        GatedTrainingSAE,
        GatedTrainingSAEConfig,
        {"l1_coefficient": 0.6},
        differs="auxiliary_reconstruction_loss: W_dec and b_dec are attached, so they get a gradient",
    ),
    # differs: pre_act_loss has its decoder norms attached (compare W_enc, b_enc, b_dec and theta)
    "jumprelu_step": Case(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        {"l0_coefficient": 0.4, "jumprelu_bandwidth": 0.5, "pre_act_loss_coefficient": 0.3},
        dead="random",
        differs="pre_act_loss: decoder norms attached, so W_dec gets a gradient",
    ),
    # differs: nothing
    "jumprelu_step_ste_to_input": Case(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        {
            "l0_coefficient": 0.4,
            "jumprelu_bandwidth": 0.5,
            "jumprelu_ste_to_input": True,
            "apply_b_dec_to_input": False,
        },
        differs="nothing",
    ),
    # differs: pre_act_loss has its decoder norms attached (compare W_enc, b_enc, b_dec and theta)
    "jumprelu_tanh": Case(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        {
            "l0_coefficient": 1.2,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_ste_to_input": True,
            "jumprelu_tanh_scale": 1.5,
            "pre_act_loss_coefficient": 0.3,
        },
        dead="random",
        differs="pre_act_loss: decoder norms attached, so W_dec gets a gradient",
    ),
    # differs: nothing (per row, as ours)
    "jumprelu_quadratic": Case(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        {
            "l0_coefficient": 0.2,
            "jumprelu_bandwidth": 0.5,
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": 7.0,
        },
        differs="nothing",
    ),
    # differs: AuxK (aux_style="saelens"); more dead than k_aux = d_in // 2, so no few-dead scale
    "topk_rescale": Case(
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
        {"k": 3, "rescale_acts_by_decoder_norm": True, "aux_loss_coefficient": 0.5},
        dead="silent",
        differs=AUX,
    ),
    # differs: AuxK (aux_style="saelens"); five dead, so the few-dead scale is 5/8
    "topk_no_rescale": Case(
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
        {
            "k": 3,
            "rescale_acts_by_decoder_norm": False,
            "aux_loss_coefficient": 0.5,
            "apply_b_dec_to_input": False,
        },
        dead="few",
        differs=AUX,
    ),
    # differs: AuxK (aux_style="saelens", but both rank by magnitude and keep signs)
    "abstopk": Case(
        AbsTopKTrainingSAE,
        AbsTopKTrainingSAEConfig,
        {"k": 3, "aux_loss_coefficient": 0.5},
        dead="silent",
        differs="AuxK: not divided by V_e nor multiplied by V_y",
    ),
    # differs: AuxK (aux_style="saelens"); threshold average without bias correction, K = int(k B), not rounded
    "batchtopk": Case(
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        {"k": 3.3, "aux_loss_coefficient": 0.5, "topk_threshold_lr": 0.125},
        dead="few",
        differs=f"{AUX}; {THRESHOLD}",
    ),
    # differs: levels are a plain sum (ours: weights of sum 1); AuxK (aux_style="saelens"), on the full residual
    "matryoshka": Case(
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {
            "k": 3.0,
            "matryoshka_widths": [8, 20, 48],
            "aux_loss_coefficient": 0.5,
            "topk_threshold_lr": 0.125,
        },
        dead="silent",
        differs=f"{AUX}; {THRESHOLD}; L_rec: plain sum over levels (mse_loss is the last one)",
    ),
    # differs: levels are a plain sum (ours: weights of sum 1); AuxK (aux_style="saelens") of each level, a plain sum
    "matryoshka_aux_per_level": Case(
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {
            "k": 3.0,
            "matryoshka_widths": [8, 20, 48],
            "aux_loss_coefficient": 0.5,
            "topk_threshold_lr": 0.125,
            "use_matryoshka_aux_loss": True,
            "rescale_acts_by_decoder_norm": False,
        },
        dead="silent",
        differs=f"{AUX}; {THRESHOLD}; L_rec and AuxK: plain sums over levels, each with its few-dead scale",
    ),
    # differs: nothing (rows stop for all three reasons: threshold, unchanged support, max_iterations)
    "matching_pursuit": Case(
        MatchingPursuitTrainingSAE,
        MatchingPursuitTrainingSAEConfig,
        {"decoder_init_norm": 1.0, "residual_threshold": 2.0, "max_iterations": 9},
        differs="nothing",
    ),
}
INFERENCE = {
    # differs: nothing (transcoders have no training class in SAELens)
    "transcoder": Case(Transcoder, TranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    # differs: nothing without normalisation (SAELens' skip reads raw x)
    "skip_transcoder": Case(SkipTranscoder, SkipTranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    # differs: nothing
    "jumprelu_transcoder": Case(
        JumpReLUTranscoder, JumpReLUTranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}
    ),
    # differs: nothing without normalisation (SAELens' skip reads raw x)
    "jumprelu_skip_transcoder": Case(
        JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}
    ),
    # differs: nothing
    "temporal": Case(
        TemporalSAE,
        TemporalSAEConfig,
        {
            "d_sae": TEMPORAL_D_SAE,
            "n_heads": 2,
            "n_attn_layers": 2,
            "bottleneck_factor": 4,
            "kval_topk": 5,
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": 1.75,
        },
    ),
    # differs: nothing (b_dec is added back in untied SAEs even where it is not subtracted)
    "temporal_untied": Case(
        TemporalSAE,
        TemporalSAEConfig,
        {
            "d_sae": TEMPORAL_D_SAE,
            "n_heads": 2,
            "bottleneck_factor": 4,
            "tied_weights": False,
            "sae_diff_type": "relu",
            "apply_b_dec_to_input": False,
        },
    ),
    # differs: nothing in the forward (in training: losses in raw space here, in training space for us)
    "standard_layer_norm": Case(StandardSAE, StandardSAEConfig, {"normalize_activations": "layer_norm"}),
    # differs: zero rows are NaN here; in training: losses in raw space here, in training space for us
    "standard_constant_norm_rescale": Case(
        StandardSAE, StandardSAEConfig, {"normalize_activations": "constant_norm_rescale"}
    ),
    # differs: nothing
    "standard_hook_z": Case(StandardSAE, StandardSAEConfig, {"reshape_activations": "hook_z"}),
}
# differs: expected_average: nothing but how many rows are read; whitening: the epsilon is absolute, 1e-3
NORMALISED = {
    f"standard_{mode}": Case(
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        {"l1_coefficient": 0.7, "normalize_activations": mode, **more},
        differs=differs,
    )
    for mode, more, differs in (
        ("expected_average_only_in", {}, "nothing"),
        ("covariance_whitening", {"apply_b_dec_to_input": False}, "epsilon added to the eigenvalues is 1e-3, absolute"),
    )
}


def draw_inputs(rng: torch.Generator, *leading: int) -> torch.Tensor:
    mean = 0.5 * torch.randn(D_IN, generator=rng, dtype=torch.float64)
    return mean + torch.randn(*leading, D_IN, generator=rng, dtype=torch.float64)


@torch.no_grad()
def randomise(sae: SAE[Any], rng: torch.Generator) -> None:
    if isinstance(sae, JumpReLUTrainingSAE):  # SAELens keeps it in float32, where its gradient would be rounded
        sae.threshold = torch.nn.Parameter(sae.threshold.double())
    for name, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        if name == "threshold":
            values = 0.1 + 0.8 * torch.rand(parameter.shape, generator=rng, dtype=torch.float64)
        elif name == "W_dec":
            values *= 0.3 * (0.5 + torch.rand(len(values), 1, generator=rng, dtype=torch.float64))
            if isinstance(sae, MatchingPursuitTrainingSAE):
                values /= values.norm(dim=1, keepdim=True)
        elif name == "b_enc":
            values *= 0.8  # so different that many latents never win a top-k
        else:
            values *= 0.25
        parameter.copy_(values)
    if isinstance(sae, BatchTopKTrainingSAE):
        sae.topk_threshold.fill_(0.9)
    if isinstance(sae, TemporalSAE):  # its inputs are multiplied by 1 / (4 d_in)
        for name, parameter in sae.named_parameters():
            if name.startswith("W_"):
                parameter.mul_(4.0)


def build(case: Case, rng: torch.Generator) -> SAE[Any]:
    metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z") if "reshape_activations" in case.fields else SAEMetadata()
    sae = case.sae(case.config(**{**SHARED, **case.fields}, metadata=metadata))
    randomise(sae, rng)
    return sae.train()


def state(sae: SAE[Any], parameters: str, buffers: str) -> Tensors:
    kept = {f"{parameters}.{name}": tensor.detach().clone() for name, tensor in sae.named_parameters()}
    return kept | {f"{buffers}.{name}": tensor.clone() for name, tensor in sae.named_buffers()}


def coefficients(sae: TrainingSAE[Any]) -> dict[str, float]:
    """What SAELens' trainer hands to a step once every warm-up is over."""
    return {name: getattr(value, "value", value) for name, value in sae.get_coefficients().items()}


def dead_mask(case: Case, sae: SAE[Any], x: torch.Tensor) -> torch.Tensor | None:
    if not case.dead:
        return None
    if case.dead == "random":
        return torch.arange(D_SAE) % 4 == 1
    silent = (sae.encode(x) == 0).all(dim=0)
    return silent & (silent.cumsum(0) <= 5) if case.dead == "few" else silent


def gradients(losses: Tensors, sae: SAE[Any]) -> Tensors:
    parameters = dict(sae.named_parameters())
    kept: Tensors = {}
    for term, loss in losses.items():
        if loss.requires_grad and term != "mse_loss":
            found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None and gradient.any():
                    kept[f"grad.{term}.{name}"] = gradient
    return kept


def training_step(case: Case, sae: TrainingSAE[Any], x: torch.Tensor, *, scaled: bool = False) -> Tensors:
    dead = dead_mask(case, sae, x)
    step = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=coefficients(sae),
            dead_neuron_mask=dead,
            n_training_steps=7,
            is_logging_step=True,
        )
    )
    losses = {"total": step.loss, **step.losses}
    kept = {"out.acts": step.feature_acts, "out.recons": step.sae_out}
    if dead is not None:
        kept["in.dead"] = dead
    kept |= {f"loss.{term}": loss for term, loss in losses.items()}
    kept |= {f"metric.{name}": torch.as_tensor(value) for name, value in step.metrics.items()}
    kept |= {f"out.{name}": tensor for name, tensor in sae.named_buffers()}
    return kept if scaled else kept | gradients(losses, sae)


@torch.no_grad()
def inference_form(sae: TrainingSAE[Any], x: torch.Tensor) -> Tensors:
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder)
    acts = saved.encode(x)
    return {"inference.acts": acts, "inference.recons": saved.decode(acts), "inference.threshold": saved.threshold}


def record_training(case: Case, rng: torch.Generator) -> Tensors:
    sae = build(case, rng)
    assert isinstance(sae, TrainingSAE)
    x = draw_inputs(rng, ROWS)
    kept = {"in.x": x, **state(sae, "param", "in"), **training_step(case, sae, x)}
    if isinstance(sae, BatchTopKTrainingSAE):
        kept |= inference_form(sae, x)
    return kept


def record_inference(case: Case, rng: torch.Generator) -> Tensors:
    sae = build(case, rng)
    if isinstance(sae, TemporalSAE):
        x = draw_inputs(rng, SEQUENCES, TOKENS)
        novel, predicted = sae.encode_with_predictions(x)
        kept = {"out.acts": novel, "out.predicted_acts": predicted, "out.decoded_novel": sae.decode(novel)}
    else:
        x = draw_inputs(rng, ROWS)
        if "reshape_activations" in case.fields:
            x = x.reshape(2, ROWS // 2, HEADS, D_IN // HEADS)
        kept = {"out.acts": sae.encode(x)}
    return {"in.x": x, **state(sae, "param", "in"), **kept, "out.recons": sae(x)}


def record_normalised(case: Case, rng: torch.Generator) -> Tensors:
    """SAELens' trainer scales x before the SAE sees it and folds that into the weights at the end."""
    sae = build(case, rng)
    assert isinstance(sae, TrainingSAE)
    x = draw_inputs(rng, ROWS)
    if sae.cfg.normalize_activations == "covariance_whitening":
        x = x @ torch.diag(torch.linspace(0.2, 3.0, D_IN, dtype=torch.float64))
    scaler = ActivationScaler()

    def data() -> Iterator[torch.Tensor]:
        while True:
            yield x

    kept = {"in.x": x, **state(sae, "param", "in")}
    if sae.cfg.normalize_activations == "covariance_whitening":
        scaler.estimate_whitening(D_IN, data(), n_batches_for_norm_estimate=1)
        whitening = scaler.whitening
        assert whitening is not None
        found = {"mean": whitening.mean, "matrix": whitening.matrix, "inverse_matrix": whitening.inverse_matrix}
    else:
        scaler.estimate_scaling_factor(D_IN, data(), n_batches_for_norm_estimate=1)
        assert scaler.scaling_factor is not None
        found = {"scaling_factor": torch.tensor(scaler.scaling_factor, dtype=torch.float64)}
    kept |= {f"norm.{name}": tensor for name, tensor in found.items()}
    kept |= {"in.scaled_x": scaler.scale(x), **training_step(case, sae, scaler.scale(x), scaled=True)}
    kept["out.unscaled_recons"] = scaler.unscale(kept["out.recons"])
    if scaler.whitening is not None:
        sae.fold_activation_whitening(found["mean"], found["matrix"], found["inverse_matrix"])
    else:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    return {**kept, "folded.acts": sae.encode(x), "folded.recons": sae(x)}


def write(name: str, case: Case, tensors: Tensors) -> None:
    kept = {key: tensor.detach().to_dense().contiguous() for key, tensor in tensors.items()}
    assert all(tensor.isfinite().all() for tensor in kept.values()), name
    about = {
        "library": "sae-lens",
        "version": version("sae-lens"),
        "torch": version("torch"),
        "case": name,
        "class": case.sae.__name__,
        "config": {**SHARED, **case.fields},
        "dead": case.dead,
        "differs": case.differs or "nothing",
    }
    path = GOLDEN / f"{name}.safetensors"
    save_file({key: tensor.clone() for key, tensor in kept.items()}, path, {"about": json.dumps(about)})
    terms = {key: round(tensor.item(), 3) for key, tensor in kept.items() if key.startswith("loss.")}
    l0, dead = (kept["out.acts"] != 0).sum(-1).double().mean(), kept.get("in.dead", torch.zeros(1)).sum()
    print(f"{name:34} {path.stat().st_size:6} bytes  L0 {l0:5.2f}  dead {int(dead):2}  {terms}")


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    for record, cases in (
        (record_training, CASES),
        (record_inference, INFERENCE),
        (record_normalised, NORMALISED),
    ):
        for name, case in cases.items():
            write(name, case, record(case, torch.Generator().manual_seed(zlib.crc32(name.encode()))))


if __name__ == "__main__":
    main()
