"""Write tests/golden/saelens/: small SAEs saved by SAELens, with what SAELens computes from them.

Run by an interpreter that has SAELens (README.md beside this file). Every parameter is random and non-zero, decoder
rows have different norms, so that a missing bias or a wrong norm shows.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "saelens"
D_IN, D_SAE, HEADS, ROWS = 16, 64, 4, 6


@dataclass
class Case:
    """One folder: a class of SAELens, its config, and the fields that differ from the defaults."""

    sae: type[SAE[Any]]
    config: Callable[..., Any]
    fields: dict[str, Any] = field(default_factory=dict)


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
}


def randomise(sae: SAE[Any], rng: torch.Generator) -> None:
    for name, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=rng) * (0.3 if parameter.ndim == 2 else 0.2)
        if name == "W_dec":
            values *= 0.5 + torch.rand(len(values), 1, generator=rng)
        parameter.copy_(values.abs() if name == "threshold" else values)


@torch.no_grad()
def make(name: str, case: Case, rng: torch.Generator) -> None:
    hook = "blocks.1.attn.hook_z" if name.endswith("hook_z") else "blocks.1.hook_resid_post"
    metadata = SAEMetadata(model_name="a-model", hook_name=hook, context_size=128, prepend_bos=True)
    sae = case.sae(case.config(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **case.fields))
    randomise(sae, rng)
    shape = (2, ROWS // 2, HEADS, D_IN // HEADS) if name.endswith("hook_z") else (2, ROWS // 2, D_IN)
    inputs = torch.randn(shape, generator=rng)
    acts = sae.encode(inputs)
    recorded = {"inputs": inputs, "acts": acts, "decoded": sae.decode(acts), "output": sae(inputs)}
    sae.save_model(GOLDEN / name)
    save_file({key: tensor.contiguous() for key, tensor in recorded.items()}, GOLDEN / name / "recorded.safetensors")
    print(f"{name:20} L0 {(acts != 0).sum(-1).float().mean():5.1f}")


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    rng = torch.Generator().manual_seed(0)
    for name, case in CASES.items():
        make(name, case, rng)


if __name__ == "__main__":
    main()
