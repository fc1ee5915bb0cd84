"""Train on any tensors: no language model, no text, only an iterator of rows.

    python examples/train_on_tensors.py

The rows here are sparse sums of known directions, so the result can be checked: the decoder of a good SAE holds them.
"""

from collections.abc import Iterator

import torch

from sae_kit import RunConfig, SAETrainer, TopKSAEConfig

FEATURES, WIDTH, ACTIVE, BATCH = 64, 32, 4, 1024


def rows(directions: torch.Tensor, seed: int = 0) -> Iterator[torch.Tensor]:
    """Endless batches [BATCH, WIDTH], each row the sum of about four directions."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        on = torch.rand(BATCH, FEATURES, generator=generator) < ACTIVE / FEATURES
        strength = 0.5 + torch.rand(BATCH, FEATURES, generator=generator)
        yield (on * strength) @ directions


def main() -> float:
    drawn = torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(1))
    directions = torch.nn.functional.normalize(drawn, dim=1)
    cfg = RunConfig.from_dict({"tokens": 400 * BATCH, "train": {"batch_tokens": BATCH}, "optim": {"lr": 3e-3}})
    sae = TopKSAEConfig(d_in=WIDTH, d_sae=2 * FEATURES, k=ACTIVE, normalize_activations="expected_average_only_in")
    result = SAETrainer(cfg, sae.build(), rows(directions)).fit()
    found = torch.nn.functional.normalize(result.saes["sae"].W_dec.detach(), dim=1)
    recovered = (directions @ found.T).max(dim=1).values.mean().item()
    print(f"explained variance {result.metrics['metrics/explained_variance']:.3f}")
    print(f"mean cosine between each true direction and the nearest decoder row {recovered:.3f}")
    return recovered


if __name__ == "__main__":
    main()
