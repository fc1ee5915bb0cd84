"""Train on your own data: patches of images, mixed by the same buffer as activations.

    python examples/image_patches.py [FOLDER_OF_IMAGES] [--plot filters.png]

Without a folder the images are dead leaves: discs of random size and grey that hide each other, whose statistics are
much like those of photographs (Lee, Mumford and Huang 2001). As Olshausen and Field (1996) found for photographs, what
a sparse code of such patches learns are edges: filters that are oriented and confined to a part of the patch. Patches
of one image are alike, hence the buffer; `Patches` knows where it stands, so training on it could be resumed.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_kit import ActivationsStore, BatchTopKSAEConfig, BufferConfig, RunConfig, SAEMetadata, SAETrainer

SIDE, IMAGE, PER_IMAGE, BATCH = 12, 128, 1024, 512


class Patches:
    """Whitened patches [rows, SIDE²] of one image after another, without end."""

    def __init__(self, files: Sequence[Path] = (), seed: int = 0) -> None:
        self.files, self.seed, self.image = files, seed, 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            generator = torch.Generator().manual_seed(self.seed + self.image)
            image = read(self.files[self.image % len(self.files)]) if self.files else dead_leaves(generator)
            self.image += 1
            yield patches(flattened(image), generator)

    def state_dict(self) -> dict[str, Any]:
        return {"image": self.image}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.image = state["image"]


def dead_leaves(generator: torch.Generator, discs: int = 400) -> Tensor:
    """Discs, later ones in front; radii follow r^-3, which makes images look alike at every scale."""
    y, x = torch.meshgrid(torch.arange(IMAGE), torch.arange(IMAGE), indexing="ij")
    image = torch.zeros(IMAGE, IMAGE)
    drawn = torch.rand(discs, 4, generator=generator)
    radii = 3.0 * (1 - drawn[:, 0] * (1 - (3.0 / 60) ** 2)).rsqrt()
    for radius, (_, grey, top, left) in zip(radii, drawn, strict=True):
        image[(y - top * IMAGE) ** 2 + (x - left * IMAGE) ** 2 < radius**2] = grey
    return image


def read(file: Path) -> Tensor:
    """An image file in grey."""
    from PIL import Image

    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)) / 255


def flattened(image: Tensor) -> Tensor:
    """All frequencies of an image equally strong, up to four fifths of the highest: Olshausen and Field's filter."""
    frequency = torch.hypot(torch.fft.fftfreq(image.shape[0])[:, None], torch.fft.fftfreq(image.shape[1])[None])
    spectrum = torch.fft.fft2(image) * frequency * torch.exp(-((frequency / 0.4) ** 4))
    flat = torch.fft.ifft2(spectrum).real
    return flat / flat.std()


def patches(image: Tensor, generator: torch.Generator) -> Tensor:
    """PER_IMAGE patches at random places."""
    windows = image.unfold(0, SIDE, 1).unfold(1, SIDE, 1).reshape(-1, SIDE * SIDE)
    return windows[torch.randint(len(windows), (PER_IMAGE,), generator=generator)]


def concentration(filters: Tensor) -> Tensor:
    """Share of each filter's energy in the best quarter of the patch: about 0.3 for noise, 1 for a small edge."""
    energy = filters.reshape(-1, SIDE, SIDE) ** 2
    windows = energy.unfold(1, SIDE // 2, 1).unfold(2, SIDE // 2, 1).sum((-2, -1))
    return windows.flatten(1).max(1).values / energy.sum((1, 2))


def main(arguments: Sequence[str] | None = None, steps: int = 1500) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, help="images to read instead of making some")
    parser.add_argument("--plot", type=Path, help="write the filters as an image")
    args = parser.parse_args(arguments)
    files = sorted(path for path in args.folder.iterdir() if path.is_file()) if args.folder else ()
    tokens = steps * BATCH
    store = ActivationsStore.from_rows(
        Patches(files), BufferConfig(tokens=64 * BATCH), site="patches", batch_tokens=BATCH, train_tokens=tokens
    )
    sae = BatchTopKSAEConfig(
        d_in=SIDE * SIDE,
        d_sae=256,
        k=12,
        rescale_acts_by_decoder_norm=False,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(hook_name="patches"),
    )
    cfg = RunConfig.from_dict({"tokens": tokens, "train": {"batch_tokens": BATCH}, "optim": {"lr": 3e-3}})
    result = SAETrainer(cfg, sae.build(), store).fit()
    store.close()
    trained = result.saes["sae"]
    filters = trained.W_dec.detach()[trained.firing_count > 0]
    variance, confined = result.metrics["metrics/explained_variance"], concentration(filters).median().item()
    print(f"explained variance {variance:.3f} with 12 of 256 filters a patch")
    print(f"half of the filters have {confined:.0%} of their energy or more within a quarter of the patch")
    if args.plot is not None:
        draw(filters, args.plot)
    return float(variance), confined


def draw(filters: Tensor, path: Path) -> None:
    """The filters side by side, each from black to white."""
    from PIL import Image

    across = 16
    shown = filters[: len(filters) // across * across].reshape(-1, across, SIDE, SIDE)
    grey = 127.5 * (1 + shown / shown.abs().amax((2, 3), keepdim=True))
    tiles = torch.nn.functional.pad(grey, (1, 1, 1, 1)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1).byte()
    Image.fromarray(tiles.numpy()).resize((4 * tiles.shape[1], 4 * tiles.shape[0]), 0).save(path)


if __name__ == "__main__":
    main()
