"""Write tests/golden/training/dictionary_learning/: losses and gradients of dictionary_learning's trainers.

Run by an interpreter that has dictionary-learning 0.1.0 (PyPI); made with torch 2.13.0 on a CPU. Its requirement
nnsight, of an old release and used only to read activations from models, is replaced by an empty module:

    python3 -m venv /tmp/dl && /tmp/dl/bin/pip install torch==2.13.0 numpy einops tqdm safetensors
    /tmp/dl/bin/pip install --no-deps dictionary-learning==0.1.0
    OMP_NUM_THREADS=1 /tmp/dl/bin/python tests/originals/make_dictionary_learning_golden.py

Names in a file: `in.*` (x, dead mask), `param.*`, `out.*`, `loss.*` (terms as the trainer reports them, *without*
coefficient unless named `scaled_`, and `loss.total`), `grad.<term>.<parameter>` for the total and every term but the
reconstruction (`mse_loss`, elsewhere `l2_loss`), which is the total less coefficient × the others. Any other gradient
that is not in the file is zero. Where both are there, `l2_loss` is the mean norm of the error, which is only logged.
`given.*`, `after.*` (five cases): the gradient that Adam was given and the parameters afterwards, in one whole `update`
(projection, clipping, Adam, renormalisation as the trainer does them). `inference.acts`: codes by the threshold after
two steps. Parameters have sae_kit's names and shapes (`LAYOUT` below). The metadata's one key `about` is JSON: library,
version, config, and in `differs` where sae_kit defines a term otherwise by default.

All is float64, but for what the library casts to float32 (`float32` in `about`). Decoder rows have different norms,
except where the trainer assumes unit norms and leaves them out of its loss (`decoder` there: "unit"). Crosscoders are
not in this release.
"""

import json
import shutil
import sys
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch.optim.adam import adam

sys.modules["nnsight"] = types.ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object  # pyright: ignore[reportAttributeAccessIssue]

from dictionary_learning.trainers import (  # noqa: E402
    BatchTopKTrainer,
    GatedAnnealTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    PAnnealTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "training" / "dictionary_learning"
D_IN, D_SAE, ROWS = 16, 48, 24
STEP, STEPS = 40, 100
DEAD = 10_000_000  # the library's own number of tokens
UNUSED = ("scaled_lp_loss", "min_l2_loss", "max_l2_loss")
Tensors = dict[str, torch.Tensor]
LAYOUT = {  # its name: ours, and whether its tensor is the transpose of ours
    "encoder.weight": ("W_enc", True),
    "encoder.bias": ("b_enc", False),
    "decoder.weight": ("W_dec", True),
    "bias": ("b_dec", False),
    "b_dec": ("b_dec", False),
    "decoder_bias": ("b_dec", False),
    "gate_bias": ("b_gate", False),
    "mag_bias": ("b_mag", False),
    "r_mag": ("r_mag", False),
    "W_enc": ("W_enc", False),
    "b_enc": ("b_enc", False),
    "W_dec": ("W_dec", False),
    "threshold": ("threshold", False),
}


@dataclass
class Case:
    trainer: Callable[..., Any]
    fields: dict[str, Any] = field(default_factory=dict)
    unit: bool = False
    update: bool = False  # record a whole update too
    dead: str = ""  # "silent": every latent that is not selected anywhere in x; "few": five of those
    differs: str = ""
    set_after: dict[str, Any] = field(default_factory=dict)  # attributes of the trainer that its own schedule sets


SPARSITY = {"sparsity_warmup_steps": 80}  # so at step 40 the coefficient is half its final value
AUX = "AuxK: no few-dead scale, no V_y (aux_style='openai'); its coefficient multiplies a normalised error"
AUXK_FLOAT32 = "auxk_loss and its gradient, thresholds"
FLOAT32 = {JumpReluTrainer: "the step function, so scaled_sparsity_loss and its gradient"}
THRESHOLD = "threshold: first value, then beta 0.999, in float32; -1 = unset"
TOP_K = {"k": 3, "auxk_alpha": 1 / 32, "threshold_beta": 0.75, "threshold_start_step": 5}
CASES = {
    # differs: the penalty has no decoder norms, so W_dec's gradient differs along its rows (removed by the projection)
    "standard": Case(
        StandardTrainer,
        {"l1_penalty": 1.4, **SPARSITY},
        unit=True,
        update=True,
        differs="sparsity_loss: no decoder norms (rows are unit); compare W_dec's gradient after projection",
    ),
    # differs: nothing
    "standard_april_update": Case(
        StandardTrainerAprilUpdate, {"l1_penalty": 1.4, **SPARSITY}, update=True, differs="nothing"
    ),
    # differs: the penalty has no decoder norms, so W_dec's gradient differs along its rows (removed by the projection)
    "gated": Case(
        GatedSAETrainer,
        {"l1_penalty": 1.2, **SPARSITY},
        unit=True,
        update=True,
        differs="sparsity_loss: no decoder norms (rows are unit); compare W_dec's gradient after projection",
    ),
    # differs: its step function reads codes, not pre-activations, so theta sees only the upper half of the window
    "jumprelu": Case(
        JumpReluTrainer,
        {"sparsity_penalty": 3.0, "bandwidth": 0.5, "target_l0": 7.0, **SPARSITY},
        update=True,
        differs="sparsity term: gradient of theta (codes instead of pre-activations); a = 0; lambda' = 2 L* lambda",
    ),
    # differs: AuxK (aux_style="openai"), threshold rule; more dead than k_aux = d_in // 2
    "topk": Case(
        TopKTrainer,
        TOP_K,
        update=True,
        dead="silent",
        differs=f"{AUX}; {THRESHOLD}, from the mean over rows of each row's smallest",
    ),
    # differs: AuxK (aux_style="openai"), threshold rule; five dead, which it does not scale down
    "topk_few_dead": Case(TopKTrainer, TOP_K, dead="few", differs=f"{AUX}; {THRESHOLD}"),
    # differs: AuxK (aux_style="openai"), threshold rule
    "batchtopk": Case(BatchTopKTrainer, TOP_K, dead="silent", differs=f"{AUX}; {THRESHOLD}"),
    # differs: as batchtopk, and the weighted levels are averaged once more (here: levels weigh 1/9 each)
    "matryoshka": Case(
        MatryoshkaBatchTopKTrainer,
        {**TOP_K, "group_fractions": [0.25, 0.25, 0.5]},
        dead="silent",
        differs=f"{AUX}; {THRESHOLD}; L_rec: mean over levels of weight × error, so weights of sum 1 count as sum 1/n",
    ),
    # differs: the penalty has no decoder norms and no epsilon, and keeps the root 1/p
    "p_anneal_lp": Case(
        PAnnealTrainer,
        {"initial_sparsity_penalty": 0.02, "sparsity_function": "Lp", "anneal_start": 50, **SPARSITY},
        unit=True,
        differs="lp_loss: no decoder norms, no epsilon, root 1/p",
        set_after={"p": 0.5},
    ),
    # differs: the penalty has no decoder norms and no epsilon
    "p_anneal_lp_p": Case(
        PAnnealTrainer,
        {"initial_sparsity_penalty": 0.2, "sparsity_function": "Lp^p", "anneal_start": 50, **SPARSITY},
        unit=True,
        differs="lp_loss: no decoder norms, no epsilon",
        set_after={"p": 0.5},
    ),
    # differs: the penalty has no decoder norms and no epsilon; it reads the gate's pre-activations
    "gated_anneal": Case(
        GatedAnnealTrainer,
        {"initial_sparsity_penalty": 0.2, "sparsity_function": "Lp^p", "anneal_start": 50, **SPARSITY},
        unit=True,
        differs="lp_loss: no decoder norms, no epsilon",
        set_after={"p": 0.5},
    ),
}


class Item(float):
    """What `tensor.item()` gives, with the tensor: trainers return their loss terms as numbers only."""

    tensor: torch.Tensor


def remember_item(tensor: torch.Tensor) -> Item:
    item = Item(tensor.tolist())
    item.tensor = tensor
    return item


def ours(tensors: Any) -> Tensors:
    kept: Tensors = {}
    for name, tensor in tensors:
        renamed, transposed = LAYOUT[name]
        kept[renamed] = (tensor.T if transposed else tensor).detach().clone()
    return kept


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def draw_inputs(rng: torch.Generator) -> torch.Tensor:
    mean = 0.5 * torch.randn(D_IN, generator=rng, dtype=torch.float64)
    return mean + torch.randn(ROWS, D_IN, generator=rng, dtype=torch.float64)


@torch.no_grad()
def randomise(ae: torch.nn.Module, unit: bool, rng: torch.Generator) -> None:
    for name, parameter in ae.named_parameters():
        renamed, transposed = LAYOUT[name]
        target = parameter.T if transposed else parameter
        values = torch.randn(target.shape, generator=rng, dtype=torch.float64)
        if renamed == "threshold":
            values = 0.3 + 0.6 * torch.rand(target.shape, generator=rng, dtype=torch.float64)
        elif renamed == "W_dec":
            values *= 0.3 * (0.5 + torch.rand(len(values), 1, generator=rng, dtype=torch.float64))
            if unit:
                values /= values.norm(dim=1, keepdim=True)
        else:
            values *= 0.8 if renamed == "b_enc" else 0.25
        target.copy_(values)


def build(case: Case, seed: int) -> tuple[Any, torch.Tensor]:
    """The trainer of a case with its parameters, and x. Twice the same for the same seed."""
    rng = torch.Generator().manual_seed(seed)
    trainer = case.trainer(
        steps=STEPS,
        activation_dim=D_IN,
        dict_size=D_SAE,
        layer=0,
        lm_name="none",
        warmup_steps=0,
        lr=0.01,
        device="cpu",
        seed=0,
        **case.fields,
    )
    randomise(trainer.ae.double(), case.unit, rng)
    vars(trainer).update(case.set_after)
    x = draw_inputs(rng)
    if case.dead:
        with torch.no_grad():
            silent = (trainer.ae.encode(x, use_threshold=False) == 0).all(dim=0)
        dead = silent & (silent.cumsum(0) <= 5) if case.dead == "few" else silent
        trainer.num_tokens_since_fired[dead] = DEAD
    return trainer, x


def loss_terms(trainer: Any, x: torch.Tensor) -> tuple[Tensors, Tensors]:
    """Codes and reconstruction; the loss terms that the trainer logs."""
    with patch.object(torch.Tensor, "item", remember_item):
        _, recons, acts, logged = trainer.loss(x, step=STEP, logging=True)
    found = {name: value.tensor for name, value in logged.items() if isinstance(value, Item)}
    if isinstance(trainer, PAnnealTrainer):  # logs neither the total nor the error
        found["loss"] = trainer.loss(x, step=STEP)
        found["mse_loss"] = found["loss"] - found["scaled_lp_loss"]
    elif isinstance(trainer, JumpReluTrainer):  # logs no sparsity term; here it has its coefficient
        found["scaled_sparsity_loss"] = found["loss"] - found["l2_loss"]
    elif isinstance(trainer, GatedAnnealTrainer):
        found.pop("sparsity_loss")  # lp_loss with its coefficient
    losses = {"total": found.pop("loss"), **{term: loss for term, loss in found.items() if term not in UNUSED}}
    return {"out.acts": acts, "out.recons": recons}, losses


def gradients(losses: Tensors, trainer: Any) -> Tensors:
    names, parameters = zip(*trainer.ae.named_parameters(), strict=True)
    kept: Tensors = {}
    for term, loss in losses.items():
        if loss.requires_grad and term not in ("mse_loss", "l2_loss"):
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            given = [(name, grad) for name, grad in zip(names, found, strict=True) if grad is not None and grad.any()]
            kept |= prefixed(f"grad.{term}", ours(given))
    return kept


def whole_update(case: Case, seed: int) -> Tensors:
    trainer, x = build(case, seed)
    given: Tensors = {}

    def remember_gradients(*arguments: Any, **settings: Any) -> None:
        given.update(ours((name, parameter.grad) for name, parameter in trainer.ae.named_parameters()))
        adam(*arguments, **settings)

    with patch("torch.optim.adam.adam", remember_gradients):
        trainer.update(STEP, x)
    return prefixed("given", given) | prefixed("after", ours(trainer.ae.named_parameters()))


def record(case: Case, seed: int) -> Tensors:
    trainer, x = build(case, seed)
    kept = {"in.x": x, **prefixed("param", ours(trainer.ae.named_parameters()))}
    if case.dead:
        kept["in.dead"] = trainer.num_tokens_since_fired >= DEAD
    out, losses = loss_terms(trainer, x)
    kept |= out | {f"loss.{term}": loss for term, loss in losses.items()} | gradients(losses, trainer)
    if case.dead:  # TopK family
        assert torch.equal(trainer.num_tokens_since_fired >= DEAD, kept["in.dead"])  # none of them was selected
        kept["out.threshold"] = torch.as_tensor(trainer.ae.threshold)
        with torch.no_grad():
            loss_terms(trainer, 0.9 * x)  # the first step sets the threshold, the second averages
            kept["out.threshold_after_second_batch"] = torch.as_tensor(trainer.ae.threshold)
            kept["inference.acts"] = trainer.ae.encode(x, use_threshold=True)
    return kept | (whole_update(case, seed) if case.update else {})


def record_annealing() -> Tensors:
    """The schedule of p and its coefficient: ten steps on ten batches, parameters unchanged."""
    rng = torch.Generator().manual_seed(1)
    trainer = PAnnealTrainer(
        steps=20,
        activation_dim=D_IN,
        dict_size=D_SAE,
        layer=0,
        lm_name="none",
        warmup_steps=0,
        sparsity_warmup_steps=None,
        sparsity_function="Lp^p",
        initial_sparsity_penalty=0.2,
        anneal_start=2,
        anneal_end=8,
        p_end=0.25,
        n_sparsity_updates=4,
        sparsity_queue_length=2,
        device="cpu",
    )
    randomise(trainer.ae.double(), True, rng)
    xs = torch.stack([draw_inputs(rng)[:6] for _ in range(10)])
    trace: dict[str, list[float]] = {"p": [], "next_p": [], "sparsity_coeff": [], "lp_loss": []}
    for step, x in enumerate(xs):
        logged = trainer.loss(x, step=step, logging=True)[-1]  # p is the one of the next step
        for name, values in trace.items():
            values.append(float("nan") if logged[name] is None else logged[name])
    kept = {f"trace.{name}": torch.tensor(values, dtype=torch.float64) for name, values in trace.items()}
    return {"in.xs": xs, **prefixed("param", ours(trainer.ae.named_parameters())), **kept}


def write(name: str, tensors: Tensors, **metadata: Any) -> None:
    kept = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    assert all(tensor.isfinite().all() for key, tensor in kept.items() if key != "trace.next_p"), name
    about = {
        "library": "dictionary-learning",
        "version": version("dictionary-learning"),
        "torch": version("torch"),
        "case": name,
        **metadata,
    }
    path = GOLDEN / f"{name}.safetensors"
    save_file(kept, path, {"about": json.dumps(about)})
    terms = {key: round(tensor.item(), 4) for key, tensor in kept.items() if key.startswith("loss.")}
    print(f"{name:24} {path.stat().st_size:6} bytes  dead {int(kept.get('in.dead', torch.zeros(1)).sum()):2}  {terms}")


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    for name, case in CASES.items():
        config = {"d_in": D_IN, "d_sae": D_SAE, "step": STEP, "lr": 0.01, **case.fields, **case.set_after}
        write(
            name,
            record(case, zlib.crc32(name.encode())),
            config=config,
            differs=case.differs,
            decoder="unit" if case.unit else "free",
            sparsity_scale=STEP / SPARSITY["sparsity_warmup_steps"] if "sparsity_warmup_steps" in config else 1,
            float32=FLOAT32.get(case.trainer, AUXK_FLOAT32 if case.dead else ""),
            **{"class": case.trainer.__name__},
        )
    write("p_anneal_schedule", record_annealing(), differs="p is the grid's value, from the first update on")


if __name__ == "__main__":
    main()
