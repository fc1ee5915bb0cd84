"""What one training step holds in memory beyond the SAE and its optimizer, in units of batch × d_sae numbers.

    python benchmarks/memory.py [--architectures topk] [--sizes 768x12288] [--batch 2048] [--json]

The largest sum of bytes at any moment of a step, minus (parameters + state of the optimizer + one set of gradients +
the rows themselves), divided by batch × d_sae × 4. Gradients are released at the end of each step, so one set of them
is part of what a step allocates; the forward pass, in which there are none yet, may fill their room. `whole` makes all
pre-activations at once, `chunked` a sixteenth of them at a time (`train.max_pre_bytes`), `default` as many as a run
that does not say.

`4 passes` is what a step in four passes (`train.accumulate`) holds, as a share of one in a single pass, both by default
and with the gradients there before the step begins: the first of four passes ends with them, the others do not wait.

On the CPU the bytes are those that torch's allocator hands out and takes back (the profiler records every call); on
CUDA they are `torch.cuda.max_memory_allocated`.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from cases import Case, names, normal_rows
from timing import SIZES, parse_size, parser, start

from sae_kit.training.memory import peak_of

CHUNKS, PASSES = 16, 4
NO_LIMIT = 2**50


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--architectures", nargs="+", default=names(), choices=names(), metavar="NAME")
    options.add_argument("--sizes", nargs="+", default=list(SIZES), help="d_in x d_sae")
    options.add_argument("--batch", nargs="+", type=int, default=[2048, 4096])
    options.add_argument("--k", type=int, default=32)
    args = options.parse_args(arguments)
    device = start(args)
    for size in args.sizes:
        for batch in args.batch:
            d_in, d_sae = parse_size(size)
            unit = batch * d_sae * 4
            if not args.json:
                print(f"\n{d_in} -> {d_sae:,}, batch {batch:,}, k {args.k}; unit {unit / 2**20:.0f} MiB\n")
                print("| case | L0 | whole | default | chunked | 4 passes |\n|---|--:|--:|--:|--:|--:|")
            x = normal_rows(batch, d_in, torch.empty(0, device=device))
            for name in args.architectures:
                found: dict[str, Any] = {"size": size, "batch": batch, "case": name}
                for way, limit in (("whole", NO_LIMIT), ("default", None), ("chunked", unit // CHUNKS)):
                    needed, found["l0"] = beyond(Case(name, d_sae, x, args.k, max_pre_bytes=limit))
                    found[way] = needed / unit
                one, four = (activations(Case(name, d_sae, x, args.k, accumulate=passes)) for passes in (1, PASSES))
                found["passes"] = four / one
                if args.json:
                    print(json.dumps(found), flush=True)
                else:
                    ways = ("whole", "default", "chunked", "passes")
                    numbers = (f"{found['l0']:.1f}", *(f"{found[way]:.2f}" for way in ways))
                    print(" | ".join((f"| {name}", *numbers)) + " |", flush=True)


def beyond(case: Case) -> tuple[int, float]:
    """Bytes that a step needs for a while, beyond one set of gradients; and the mean L0."""
    case.step()  # makes the state of the optimizer
    case.step()
    gradients = sum(p.numel() * p.element_size() for p in case.part.sae.parameters())
    return peak_of(case.step, case.batch.x.device) - gradients, case.l0()


def activations(case: Case) -> int:
    """Bytes that a step needs for a while, beyond the gradients, which are there before it begins."""
    case.step()
    case.step()
    for parameter in case.part.sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return peak_of(case.step, case.batch.x.device)


if __name__ == "__main__":
    main()
