"""Generate, train, validate, checkpoint: the loop of several components, stage by stage.

    python examples/pipeline.py [FOLDER]

Four SAEs, one for the input of each layer of the demo model, are trained on one stream. The reconstruction score is the
share of what the model loses without a component that it keeps with the component's SAE.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from sae_kit import RunConfig
from sae_kit.pipeline import Pipeline

SAE: dict[str, Any] = {"architecture": "standard", "d_sae": 512, "l1_coefficient": 2.0}
RESAMPLE = {"interval_tokens": "25%", "times": 2, "window_tokens": "10%"}


def config(out: Path, activations: int) -> RunConfig:
    saes = {
        f"layer_{layer}": {"hook": f"blocks.{layer}.hook_resid_pre", "sae": SAE, "resample": RESAMPLE}
        for layer in range(4)
    }
    return RunConfig.from_dict(
        {
            "model": "demo",
            "dataset": "demo",
            "data": {"context_size": 128},
            "buffer": {"tokens": 16_384},
            "train": {"tokens": activations, "batch_tokens": 1024},
            "optim": {"lr": 2e-3},
            "log": {"every_tokens": 10_240},
            "saes": saes,
            "out": str(out),
            "name": "pipeline",
        }
    )


def main(out: Path, activations: int = 102_400, validation: int = 16_384) -> dict[str, float | None]:
    pipeline = Pipeline(config(out, activations))
    scores: dict[str, float | None] = {}
    while pipeline.activations_left:
        store = pipeline.generate_activations(activations // 4)
        pipeline.train_autoencoder(store)
        scores = pipeline.validate_sae(validation)
        shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items() if score is not None)
        print(f"{pipeline.trainer.tokens:,} activations: {shown}")
        pipeline.save_checkpoint()
    pipeline.save_checkpoint(is_final=True)
    pipeline.store.close()
    print(f"the SAEs are in {pipeline.folder / 'saes'}")
    return scores


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
