"""What storing activations in fewer bits costs an SAE: the demo's, trained on caches of its first million activations.

    python benchmarks/cache_dtypes.py [--tokens 1024000] [--seeds 0 1] [--dtypes float32 bf16 fp16 int8] [--json]

One cache for each precision, of the same rows; from each the demo's TopK SAE, in the same global order and with the
same seeds, evaluated on the same held-out text with the model in float32. Differences to float32 are therefore those
of the stored numbers alone; those between seeds are printed beside them.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import parser

from sae_kit import RunConfig, cache_activations
from sae_kit.demo.run import CONFIG
from sae_kit.training.run import run


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--tokens", type=int, default=CONFIG["tokens"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options.add_argument("--dtypes", nargs="+", default=["float32", "bf16", "fp16", "int8"])
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    found: dict[str, list[float]] = {}
    if not args.json:
        print("| stored as | bytes an activation | explained variance | less than float32 |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtypes:
            tree = {**CONFIG, "tokens": args.tokens, "out": folder, "log": {"console": False}}
            cache = Path(folder) / dtype
            cache_activations(RunConfig.from_dict({**tree, "cache": {"write": str(cache), "dtype": dtype}}))
            size = sum(file.stat().st_size for file in cache.glob("*.safetensors")) / args.tokens
            found[dtype] = [_explained(tree, cache, dtype, seed) for seed in args.seeds]
            mean = statistics.mean(found[dtype])
            less = 1 - mean / statistics.mean(found[args.dtypes[0]])
            if args.json:
                print(json.dumps({"dtype": dtype, "bytes": size, "explained": found[dtype], "less": less}), flush=True)
            else:
                each = ", ".join(f"{value:.4f}" for value in found[dtype])
                print(f"| {dtype} | {size:.0f} | {mean:.4f} ({each}) | {less:.3%} |", flush=True)


def _explained(tree: dict[str, Any], cache: Path, dtype: str, seed: int) -> float:
    evaluated = {**tree["eval"], "fidelity_tokens": 256}
    changes = {"name": f"{dtype}-{seed}", "seed": seed, "cache": {"read": str(cache)}, "eval": evaluated}
    evals = run(RunConfig.from_dict({**tree, **changes})).evals["sae"]
    return float(evals["reconstruction_quality"]["explained_variance"] or float("nan"))


if __name__ == "__main__":
    main()
