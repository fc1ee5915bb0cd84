"""Write folders with our own `save_model`, and what we compute from them, for check_saelens_reads_ours.py.

Usage: python make_ours.py OUT (the interpreter of sae_kit). OUT/inference/NAME/ must open in SAELens with the outputs
in OUT/inference/NAME.safetensors; OUT/training/NAME/ holds an unfolded scale and must be refused there.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sae_kit import SAE, SAEMetadata
from sae_kit.registry import list_architectures

D_IN, D_SAE, HEADS, ROWS = 16, 64, 4, 32
SCALED = {"normalize_activations": "expected_average_only_in"}
CASES: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard_float64": {"dtype": "float64"},
    "standard_hook_z": {"apply_b_dec_to_input": False, "reshape_activations": "hook_z"},
    "gated": {},
    "gated_uncentred": {"apply_b_dec_to_input": False},
    "jumprelu": {},
    "jumprelu_uncentred": {"apply_b_dec_to_input": False},
    "topk": {"k": 5},
    "topk_unranked": {"k": 5, "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False},
}


@torch.no_grad()
def build(name: str, fields: dict[str, Any], rows: torch.Tensor, rng: torch.Generator) -> SAE:
    """An SAE in the middle of training: random parameters, unequal decoder norms, a scale, counted latents."""
    hook = "blocks.1.attn.hook_z" if name.endswith("hook_z") else "blocks.1.hook_resid_post"
    metadata = SAEMetadata(model_name="a-model", hook_name=hook, context_size=128, prepend_bos=True)
    config = list_architectures()[name.split("_")[0]].config
    sae = config(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **SCALED, **fields).build()
    for key, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=rng) * (0.3 if parameter.ndim == 2 else 0.2)
        if key == "W_dec":
            values *= 0.5 + torch.rand(D_SAE, 1, generator=rng)
        parameter.copy_(values.abs() if key == "threshold" else values)
    sae.norm_in.estimate(rows.to(sae.dtype))
    sae.firing_count += (sae.encode(rows) != 0).sum(dim=0)
    sae.tokens_seen += len(rows)
    return sae


@torch.no_grad()
def main(out: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = 10 * torch.randn(ROWS, D_IN, generator=rng) + 3
    for name, fields in CASES.items():
        sae = build(name, fields, rows, rng)
        inputs = rows.to(sae.dtype).reshape(2, ROWS // 2, D_IN)
        if name.endswith("hook_z"):
            inputs = inputs.unflatten(-1, (HEADS, D_IN // HEADS))
        sae.save_model(out / "training" / name)
        (final := sae.to_inference()).save_model(out / "inference" / name)
        acts, output = final.encode(inputs), final(inputs)
        recorded = {
            "inputs": inputs,
            "acts": acts,
            "decoded": final.decode(acts),
            "output": output,
            "trained": sae(inputs),
        }
        save_file(
            {key: tensor.contiguous() for key, tensor in recorded.items()}, out / "inference" / f"{name}.safetensors"
        )

    # An SAE that never had a scale is saved for use as it is, decoder norms included.
    plain = build("topk", {"k": 5}, rows, rng).to_inference()
    plain.W_dec.mul_(0.5 + torch.rand(D_SAE, 1, generator=rng))
    plain.cfg = dataclasses.replace(plain.cfg, rescale_acts_by_decoder_norm=True)
    plain.save_model(out / "inference" / "topk_ranked")
    acts = plain.encode(rows)
    recorded = {
        "inputs": rows,
        "acts": acts,
        "decoded": plain.decode(acts),
        "output": plain(rows),
        "trained": plain(rows),
    }
    save_file(recorded, out / "inference" / "topk_ranked.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
