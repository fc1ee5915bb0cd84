"""Write tests/golden/saelens/: small SAEs saved by SAELens, with what SAELens computes from them.

Run by an interpreter that has SAELens (README.md beside this file). Every parameter is random and non-zero, decoder
rows have different norms, so that a missing bias or a wrong norm shows. One generator draws for all cases in turn: new
ones go to the end, and the folders of the others stay as they are.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    AbsTopKSAE,
    AbsTopKSAEConfig,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "saelens"
D_IN, D_OUT, D_SAE, HEADS, ROWS = 16, 12, 64, 4, 6
UNCENTRED = {"apply_b_dec_to_input": False}
TO_ANOTHER, TO_AS_WIDE = UNCENTRED | {"d_out": D_OUT}, UNCENTRED | {"d_out": D_IN}
SMALL_ATTENTION = {"n_heads": 2, "bottleneck_factor": 8}


@dataclass
class Case:
    """One folder: a class of SAELens, its config, and the fields that differ from the defaults."""

    sae: type[SAE[Any]]
    config: Callable[..., Any]
    fields: dict[str, Any] = field(default_factory=dict)
    for_use: bool = False
    """an SAE in training, saved by SAELens for use"""


CASES = {
    "standard": Case(StandardSAE, StandardSAEConfig),
    "standard_hook_z": Case(
        StandardSAE, StandardSAEConfig, {"apply_b_dec_to_input": False, "reshape_activations": "hook_z"}
    ),
    "gated": Case(GatedSAE, GatedSAEConfig),
    "gated_training": Case(
        GatedTrainingSAE, GatedTrainingSAEConfig, {"apply_b_dec_to_input": False, "l1_coefficient": 5.0}
    ),
    "jumprelu": Case(JumpReLUSAE, JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
    "jumprelu_training": Case(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        {"l0_coefficient": 2.0, "pre_act_loss_coefficient": 3e-6, "jumprelu_ste_to_input": True},
    ),
    "topk": Case(TopKSAE, TopKSAEConfig, {"k": 5}),
    "topk_training": Case(TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 7, "apply_b_dec_to_input": False}),
    "topk_rescaled": Case(TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "abstopk": Case(AbsTopKSAE, AbsTopKSAEConfig, {"k": 5}),
    "abstopk_training": Case(AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig, {"k": 7, **UNCENTRED}),
    "matching_pursuit": Case(MatchingPursuitSAE, MatchingPursuitSAEConfig),
    "matching_pursuit_short": Case(
        MatchingPursuitSAE,
        MatchingPursuitSAEConfig,
        {"residual_threshold": 1.5, "max_iterations": 5, "stop_on_duplicate_support": False, **UNCENTRED},
    ),
    "matching_pursuit_training": Case(
        MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig, {"decoder_init_norm": 1.0}
    ),
    "temporal": Case(TemporalSAE, TemporalSAEConfig, {"kval_topk": 5, **SMALL_ATTENTION}),
    "temporal_untied": Case(
        TemporalSAE,
        TemporalSAEConfig,
        {"sae_diff_type": "relu", "tied_weights": False, "n_attn_layers": 2, **UNCENTRED, **SMALL_ATTENTION},
    ),
    "temporal_scaled": Case(
        TemporalSAE,
        TemporalSAEConfig,
        {
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": 2.5,
            **UNCENTRED,
            **SMALL_ATTENTION,
        },
    ),
    "transcoder": Case(Transcoder, TranscoderConfig, TO_ANOTHER),
    "transcoder_as_wide": Case(Transcoder, TranscoderConfig, TO_AS_WIDE),
    "skip_transcoder": Case(SkipTranscoder, SkipTranscoderConfig, TO_ANOTHER),
    "skip_transcoder_as_wide": Case(SkipTranscoder, SkipTranscoderConfig, TO_AS_WIDE),
    "jumprelu_transcoder": Case(JumpReLUTranscoder, JumpReLUTranscoderConfig, TO_ANOTHER),
    "jumprelu_transcoder_as_wide": Case(JumpReLUTranscoder, JumpReLUTranscoderConfig, TO_AS_WIDE),
    "jumprelu_skip_transcoder": Case(JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, TO_ANOTHER),
    "jumprelu_skip_transcoder_as_wide": Case(JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, TO_AS_WIDE),
    **{
        f"{name}_{mode}": Case(*classes, {"normalize_activations": mode, **fields})
        for mode, fields in (("layer_norm", {}), ("constant_norm_rescale", UNCENTRED))
        for name, classes in {
            "standard": (StandardSAE, StandardSAEConfig),
            "gated": (GatedSAE, GatedSAEConfig),
            "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
            "matching_pursuit": (MatchingPursuitSAE, MatchingPursuitSAEConfig),
        }.items()
    },
    # What a run of SAELens leaves for use: batch rules have become JumpReLU.
    "topk_inference": Case(TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 5}, for_use=True),
    "batchtopk_inference": Case(BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 5.5}, for_use=True),
    "matryoshka_batchtopk_inference": Case(
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 5, "matryoshka_widths": [8, 24, D_SAE], "rescale_acts_by_decoder_norm": False, **UNCENTRED},
        for_use=True,
    ),
}


def randomise(sae: SAE[Any], rng: torch.Generator) -> None:
    for name, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=rng) * (0.3 if parameter.ndim == 2 else 0.2)
        if name == "W_dec":
            values *= 0.5 + torch.rand(len(values), 1, generator=rng)
        parameter.copy_(values.abs() if name == "threshold" else values)
    if sae.cfg.architecture() == "matching_pursuit":
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    if "topk_threshold" in dict(sae.named_buffers()):
        sae.topk_threshold.fill_(0.9)


@torch.no_grad()
def make(name: str, case: Case, rng: torch.Generator) -> None:
    hook = "blocks.1.attn.hook_z" if name.endswith("hook_z") else "blocks.1.hook_resid_post"
    metadata = SAEMetadata(model_name="a-model", hook_name=hook, context_size=128, prepend_bos=True)
    sae = case.sae(case.config(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **case.fields))
    randomise(sae, rng)
    shape = (2, ROWS // 2, HEADS, D_IN // HEADS) if name.endswith("hook_z") else (2, ROWS // 2, D_IN)
    inputs = torch.randn(shape, generator=rng)
    if case.for_use:
        sae.save_inference_model(GOLDEN / name)
        sae = SAE.load_from_disk(GOLDEN / name)
    else:
        sae.save_model(GOLDEN / name)
    acts = sae.encode(inputs)
    recorded = {"inputs": inputs, "acts": acts, "decoded": sae.decode(acts), "output": sae(inputs)}
    save_file({key: tensor.contiguous() for key, tensor in recorded.items()}, GOLDEN / name / "recorded.safetensors")
    print(f"{name:35} L0 {(acts != 0).sum(-1).float().mean():5.1f}")


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    rng = torch.Generator().manual_seed(0)
    for name, case in CASES.items():
        make(name, case, rng)


if __name__ == "__main__":
    main()
