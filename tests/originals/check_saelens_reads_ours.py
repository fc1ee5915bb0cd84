"""SAELens opens the folders of make_ours.py and computes what we computed, or refuses where it could not.

Usage: python check_saelens_reads_ours.py OUT (an interpreter that has SAELens). Prints the largest differences,
relative to the largest value of each output; exits with 1 if one exceeds 1e-5 or a scaled checkpoint is accepted.
"""

import sys
from pathlib import Path

import torch
from sae_lens import SAE
from safetensors.torch import load_file

LARGEST = 1e-5


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected.reshape(found.shape)).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def check_equal(folder: Path) -> bool:
    ours = load_file(folder.with_suffix(".safetensors"))
    sae = SAE.load_from_disk(folder)
    acts = sae.encode(ours["inputs"])
    differences = {
        "encode": difference(acts, ours["acts"]),
        "decode": difference(sae.decode(ours["acts"]), ours["decoded"]),
        "forward": difference(sae(ours["inputs"]), ours["output"]),
        "before folding": difference(sae(ours["inputs"]), ours["trained"]),
    }
    facts = sae.cfg.metadata
    kept = facts.model_name == "a-model" and facts.sae_kit["format"] == 1 and facts.context_size == 128
    good = kept and bool(acts.any()) and all(value <= LARGEST for value in differences.values())
    figures = "  ".join(f"{key} {value:.1e}" for key, value in differences.items())
    print(f"{'ok    ' if good else 'FAILED'} {folder.name:20} {type(sae).__name__:12} {figures}")
    return good


def check_refused(folder: Path) -> bool:
    try:
        SAE.load_from_disk(folder)
    except RuntimeError as error:
        good = "norm_in.scale" in str(error)
        print(f"{'ok    ' if good else 'FAILED'} {folder.name:20} refused: {' '.join(str(error).split())[:110]}")
        return good
    print(f"FAILED {folder.name:20} opened although its scale is not folded")
    return False


def main(out: Path) -> int:
    inference = sorted(path for path in (out / "inference").iterdir() if path.is_dir())
    training = sorted(path for path in (out / "training").iterdir() if path.is_dir())
    results = [check_equal(folder) for folder in inference] + [check_refused(folder) for folder in training]
    print(f"{sum(results)} of {len(results)} as expected")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
