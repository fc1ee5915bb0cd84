"""Which features do two models share? A crosscoder on the activations of both, and what its decoder says.

Here the "models" are two views of one dictionary: 40 features are in both, 10 in each alone. In earnest, `batches`
yields [rows, 2, d_in] from the same tokens run through a base model and its fine-tuning.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_kit import BatchTopKSAEConfig, RunConfig, SAETrainer
from sae_kit.crosscoders import decoder_statistics

WIDTH, SHARED, OWN = 32, 40, 10


def batches(seed: int = 0, batch: int = 1024) -> Iterator[Tensor]:
    """[batch, 2, WIDTH] without end."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2, SHARED + 2 * OWN, WIDTH, generator=generator), dim=-1)
    directions[0, SHARED : SHARED + OWN] = 0.0  # features of the second model alone
    directions[1, SHARED + OWN :] = 0.0  # and of the first
    while True:
        on = torch.rand(batch, SHARED + 2 * OWN, generator=generator) < 0.05
        yield torch.einsum("bf,mfd->bmd", on * (1 + 0.2 * torch.randn(on.shape, generator=generator)), directions)


def main() -> tuple[int, int, int]:
    """Latents of the first model alone, shared ones, and latents of the second alone, among those that fired."""
    crosscoder = BatchTopKSAEConfig(
        in_shape=(2, WIDTH), d_sae=80, k=3, normalize_activations="center_and_scale"
    ).build()
    cfg = RunConfig.from_dict({"tokens": 600_000, "train": {"batch_tokens": 1024}, "optim": {"lr": 3e-3}})
    SAETrainer(cfg, crosscoder, batches(), callbacks=[]).fit()
    found = decoder_statistics(crosscoder)
    alive = crosscoder.firing_count > 1e-3 * crosscoder.tokens_seen
    second = found.relative_norms[alive, 1]  # 0 = the first model alone, 1 = the second
    counts = (int((second < 0.2).sum()), int(((second > 0.3) & (second < 0.7)).sum()), int((second > 0.8).sum()))
    print("first alone {}, shared {}, second alone {}".format(*counts))
    return counts


if __name__ == "__main__":
    main()
