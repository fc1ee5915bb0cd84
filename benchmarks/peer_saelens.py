"""SAELens' own training step, on command: started by `step.py --peer-python` in an environment that has SAELens.

Each line of stdin is a command in JSON, answered by one line on stdout. A step is what `SAETrainer.fit` does with a
batch where nothing is logged to the outside: the window of the firing statistics, `SAETrainer.step`, the counter.
"""
# pyright: reportMissingImports=false

import dataclasses
import json
import sys
from importlib.metadata import version
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.sae_trainer import SAETrainer
from timing import clock, set_precision

MATRYOSHKA_SHARES = (1, 3, 7, 15, 32)  # our default widths, in 32nds of d_sae
SILENT_STEPS = 10**6
LONG = 10**9


class Case:
    """A trainer of SAELens with its rows; the learning rate is 0, so that it stays as it is."""

    def __init__(self, command: dict[str, Any]) -> None:
        architecture, _, variant = command["build"].partition("+")
        device, batch = torch.device(command["device"]), command["batch"]
        rows = torch.randn(batch, command["d_in"], generator=torch.Generator().manual_seed(0))
        self.x = rows.to(device, set_precision(command["precision"]))
        sae = self._sae(architecture, command)
        settings = {"total_training_samples": LONG, "train_batch_size_samples": batch, "device": str(device)}
        settings |= {"lr": 0.0, "lr_end": 0.0}
        self.trainer = SAETrainer(SAETrainerConfig(**settings), sae, iter(()))
        if variant == "auxk":
            with torch.no_grad():
                sae.W_enc[:, ::10] *= 0.1
            self.trainer.n_forward_passes_since_fired[::10] = SILENT_STEPS
        self.last: Any = None
        self.seconds = clock(self.step, device)

    def _sae(self, architecture: str, command: dict[str, Any]) -> Any:
        sae_class, config = SAE_TRAINING_CLASS_REGISTRY[architecture]
        own = {field.name for field in dataclasses.fields(config)}
        d_sae, k = command["d_sae"], command["k"]
        fields = {"d_in": command["d_in"], "d_sae": d_sae, "device": command["device"]}
        fields["dtype"] = str(self.x.dtype).removeprefix("torch.")
        fields |= {name: k for name in ("k", "max_iterations") if name in own}
        if "matryoshka_widths" in own:
            fields["matryoshka_widths"] = [max(d_sae * share // 32, 1) for share in MATRYOSHKA_SHARES]
        sae = sae_class(config(**fields))
        if "k" in own or "max_iterations" in own:
            return sae
        wanted = min(command["l0"], d_sae // 4) * len(self.x)
        cutoff = (self.x @ sae.W_enc.detach()).flatten().float().topk(wanted).values[-1].item()
        if "jumprelu_bandwidth" in own:
            fields |= {"jumprelu_init_threshold": cutoff, "jumprelu_bandwidth": command["bandwidth"] * cutoff}
            return sae_class(config(**fields))
        with torch.no_grad():
            for name in ("b_enc", "b_gate", "b_mag"):
                if hasattr(sae, name):
                    getattr(sae, name).fill_(-cutoff)
        return sae

    def step(self) -> None:
        """One turn of the loop in `SAETrainer.fit`."""
        self.trainer.maybe_reset_sparsity()
        self.last = self.trainer.step(self.x)
        self.trainer.n_training_steps += 1

    def l0(self) -> float:
        """Mean L0 of the last step."""
        return (self.last.feature_acts != 0).sum().item() / len(self.x)


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what SAELens prints is no answer
    case: Case | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if "threads" in command:
            torch.set_num_threads(command["threads"])
            answer = {"about": f"SAELens {version('sae-lens')}, torch {torch.__version__}"}
        elif "build" in command:
            case = None  # its memory goes first
            known = command["build"].partition("+")[0] in SAE_TRAINING_CLASS_REGISTRY
            case = Case(command) if known else None
            answer = {"known": known}
        else:
            assert case is not None
            answer = {"l0": case.l0()} if "l0" in command else {"seconds": case.seconds()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
