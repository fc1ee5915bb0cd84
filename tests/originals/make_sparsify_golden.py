"""Write tests/golden/training/sparsify/: what EleutherAI's sparsify computes in a forward pass, with its gradients.

Run by an interpreter that has eai-sparsify 1.3.3 (PyPI); made with torch 2.13.0 on a CPU, where it has no Triton:

    python3 -m venv /tmp/sparsify && /tmp/sparsify/bin/pip install torch==2.13.0 numpy
    /tmp/sparsify/bin/pip install eai-sparsify==1.3.3
    OMP_NUM_THREADS=1 SPARSIFY_DISABLE_TRITON=1 /tmp/sparsify/bin/python tests/originals/make_sparsify_golden.py

Names in a file, all of it float64: `in.*` (x, y, dead mask), `param.*`, `out.*` (dense acts, recons), `loss.fvu`,
`loss.auxk_loss` and `loss.multi_topk_fvu` without coefficient, `loss.total` = fvu + auxk_alpha · auxk_loss +
multi_topk_fvu / 8 as its trainer adds them, `grad.<term>.<parameter>` for the total and every term but fvu, which is
the total less the others. Any other gradient that is not in the file is zero. `projected.W_dec`: the total's gradient
after `remove_gradient_parallel_to_decoder_directions`. Parameters have sae_kit's names and shapes: its encoder weight
is transposed. The metadata's one key `about` is JSON: library, version, config, and in `differs` where sae_kit defines
a term otherwise by default.
"""

import json
import shutil
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "training" / "sparsify"
D_IN, D_SAE, ROWS, AUXK_ALPHA = 16, 48, 24, 1 / 32
Tensors = dict[str, torch.Tensor]


@dataclass
class Case:
    fields: dict[str, Any]
    unit: bool = False
    dead: str = ""  # "silent": every latent that is selected nowhere in x; "few": five of those
    differs: str = "nothing (fvu: reconstruction_loss='fvu')"


AUX = "auxk_loss: in units of fvu (divided by V_y, not by V_e); gives the encoder no gradient"
CASES = {
    # differs: nothing
    "topk": Case({"activation": "topk", "k": 4}),
    # differs: AuxK is divided by V_y alone, and gives W_enc, b_enc no gradient; more dead than k_aux = d_in // 2
    "topk_auxk": Case({"activation": "topk", "k": 3}, unit=True, dead="silent", differs=AUX),
    # differs: AuxK is divided by V_y alone, and gives W_enc, b_enc no gradient; five dead, so the few-dead scale is 5/8
    "groupmax_auxk": Case({"activation": "groupmax", "k": 4}, dead="few", differs=AUX),
    # differs: nothing; y is another site, x is not centred, the skip is square and not symmetric
    "transcode_skip": Case({"activation": "topk", "k": 4, "transcode": True, "skip_connection": True}),
    # differs: multi_topk_fvu gives the encoder no gradient, and recons are those of 4k
    "multi_topk": Case(
        {"activation": "topk", "k": 3, "multi_topk": True},
        differs="multi_topk_fvu: gives the encoder no gradient; out.recons are those of the 4k largest",
    ),
}


def ours(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    renamed = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}.get(name, name)
    return renamed, (tensor.T if renamed == "W_enc" else tensor).detach().clone()


@torch.no_grad()
def randomise(sae: SparseCoder, unit: bool, rng: torch.Generator) -> None:
    for name, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        if name == "W_dec":
            values *= 0.3 * (0.5 + torch.rand(len(values), 1, generator=rng, dtype=torch.float64))
            if unit:
                values /= values.norm(dim=1, keepdim=True)
        else:
            values *= 0.8 if name == "encoder.bias" else 0.25
        parameter.copy_(values)


def draw(rng: torch.Generator) -> torch.Tensor:
    mean = 0.5 * torch.randn(D_IN, generator=rng, dtype=torch.float64)
    return mean + torch.randn(ROWS, D_IN, generator=rng, dtype=torch.float64)


def dense(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(ROWS, D_SAE, dtype=values.dtype).scatter(1, indices, values)


def record(case: Case, rng: torch.Generator) -> Tensors:
    cfg = SparseCoderConfig(num_latents=D_SAE, **case.fields)
    sae = SparseCoder(D_IN, cfg, dtype=torch.float64)
    randomise(sae, case.unit, rng)
    x = draw(rng)
    y = draw(rng) if cfg.transcode else None
    encoded = sae.encode(x)
    acts = dense(encoded.top_acts, encoded.top_indices)
    dead = None
    if case.dead:
        dead = (acts == 0).all(dim=0)
        if case.dead == "few":
            dead &= dead.cumsum(0) <= 5
    forward = sae(x, y, dead_mask=dead)
    total = forward.fvu + AUXK_ALPHA * forward.auxk_loss + forward.multi_topk_fvu / 8
    losses = {
        "total": total,
        "fvu": forward.fvu,
        "auxk_loss": forward.auxk_loss,
        "multi_topk_fvu": forward.multi_topk_fvu,
    }
    kept = {"in.x": x, "out.acts": acts, "out.recons": forward.sae_out}
    kept |= {"in.y": y} if y is not None else {}
    kept |= {"in.dead": dead} if dead is not None else {}
    parameters = dict(sae.named_parameters())
    for name, parameter in parameters.items():
        renamed, values = ours(name, parameter)
        kept[f"param.{renamed}"] = values
    for term, loss in losses.items():
        kept[f"loss.{term}"] = loss
        if loss.requires_grad and term != "fvu":
            found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None and gradient.any():
                    renamed, values = ours(name, gradient)
                    kept[f"grad.{term}.{renamed}"] = values
    if case.unit:
        total.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        assert sae.W_dec is not None
        assert sae.W_dec.grad is not None
        kept["projected.W_dec"] = sae.W_dec.grad
    return kept


def write(name: str, case: Case, tensors: Tensors) -> None:
    kept = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    assert all(tensor.isfinite().all() for tensor in kept.values()), name
    about = {
        "library": "eai-sparsify",
        "version": version("eai-sparsify"),
        "torch": version("torch"),
        "case": name,
        "class": "SparseCoder",
        "config": {"d_in": D_IN, "num_latents": D_SAE, "auxk_alpha": AUXK_ALPHA, **case.fields},
        "decoder": "unit" if case.unit else "free",
        "differs": case.differs,
    }
    path = GOLDEN / f"{name}.safetensors"
    save_file(kept, path, {"about": json.dumps(about)})
    terms = {key: round(tensor.item(), 4) for key, tensor in kept.items() if key.startswith("loss.")}
    l0, dead = (kept["out.acts"] != 0).sum(-1).double().mean(), kept.get("in.dead", torch.zeros(1)).sum()
    print(f"{name:16} {path.stat().st_size:6} bytes  L0 {l0:5.2f}  dead {int(dead):2}  {terms}")


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    for name, case in CASES.items():
        write(name, case, record(case, torch.Generator().manual_seed(zlib.crc32(name.encode()))))


if __name__ == "__main__":
    main()
