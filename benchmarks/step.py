"""What one training step costs, in encoder products.

    python benchmarks/step.py [--architectures topk jumprelu] [--sizes 768x12288] [--batch 2048] [--json]
    python benchmarks/step.py --peer-python VENV/bin/python     # beside SAELens, in an environment that has it

The encoder's forward product (addmm of all rows) is the part that no architecture avoids, so it is the unit: it is
timed in turn with the steps, in the same process, and ratios of medians are printed. A step is everything: forward,
losses, backward, clipping, optimizer, constraints, statistics. `cases.py` says in which state SAEs are.

`limit` is the product and all memory traffic of codes of this L0 at the speed of a copy (`timing.least_seconds`), in
products too; only a cache can beat it. `peer` is a step of SAELens' own trainer on such rows at the same settings, in
a process of its own, which waits while we compute and computes while we wait.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from cases import Case, names, normal_rows
from peer import Peer
from timing import (
    DTYPES,
    SIZES,
    clock,
    copy_bandwidth,
    least_seconds,
    medians,
    parse_size,
    parser,
    product,
    set_precision,
    start,
)

LARGE = "2304x65536"  # on CUDA, beside the other sizes
WITHOUT_LIMIT = ("matching_pursuit",)  # it has no encoder product, but one product for each latent it chooses


def main(arguments: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    options = parser(__doc__)
    options.add_argument("--architectures", nargs="+", default=names(), choices=names(), metavar="NAME")
    options.add_argument("--sizes", nargs="+", default=[*SIZES, *([LARGE] if cuda else [])], help="d_in x d_sae")
    options.add_argument("--batch", nargs="+", type=int, default=[2048, 4096])
    options.add_argument("--k", type=int, help="default: 32, and 64 from 65,536 latents on")
    options.add_argument(
        "--dtype", nargs="+", default=["tf32", "bfloat16"] if cuda else ["float32"], choices=list(DTYPES)
    )
    options.add_argument("--peer-python", help="interpreter that has SAELens: its step is timed in turn with ours")
    args = options.parse_args(arguments)
    device = start(args)
    bandwidth = copy_bandwidth(device)
    peer = Peer(args.peer_python, args.threads) if args.peer_python else None
    if not args.json:
        print(f"copy: {bandwidth / 1e9:.1f} GB/s" + (f"; peer: {peer.about}" if peer else ""))
    for size in args.sizes:
        for batch in args.batch:
            for precision in args.dtype:
                measure(args, size, batch, precision, device, bandwidth, peer)
    if peer is not None:
        peer.close()


def measure(
    args: argparse.Namespace,
    size: str,
    batch: int,
    precision: str,
    device: torch.device,
    bandwidth: float,
    peer: Peer | None,
) -> None:
    """One table."""
    d_in, d_sae = parse_size(size)
    k = args.k or (64 if d_sae >= 65536 else 32)
    x = normal_rows(batch, d_in, torch.empty(0, dtype=set_precision(precision), device=device))
    if not args.json:
        print(f"\n{d_in} -> {d_sae:,}, batch {batch:,}, k {k}, {precision}\n")
        print("| case | L0 | product, ms | step, ms | products | limit | peer, ms | its L0 | peer / ours |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in args.architectures:
        case = Case(name, d_sae, x, k)
        clocks = {"product": clock(product(d_in, d_sae, x), device), "step": clock(case.step, device)}
        if peer is not None and peer.build(name, d_sae, x, k, precision):
            clocks["peer"] = peer.step
        times = medians(clocks, args.repeats)
        found: dict[str, Any] = {"size": size, "batch": batch, "k": k, "dtype": precision, "case": name}
        found |= {"l0": case.l0(), **dict.fromkeys(("peer", "peer_l0")), **times}
        if peer is not None and "peer" in times:
            found["peer_l0"] = peer.l0()
        found["products"] = times["step"] / times["product"]
        least = least_seconds(times["product"], bandwidth, batch, d_in, d_sae, found["l0"], x.element_size())
        found["limit"] = None if name in WITHOUT_LIMIT else least / times["product"]
        print(json.dumps(found) if args.json else table_row(found), flush=True)


def table_row(found: dict[str, Any]) -> str:
    numbers = [
        f"{found['l0']:.1f}",
        f"{found['product'] * 1e3:.2f}",
        f"{found['step'] * 1e3:.2f}",
        f"{found['products']:.2f}",
        "" if found["limit"] is None else f"{found['limit']:.2f}",
    ]
    if (peer := found["peer"]) is None:
        numbers += ["", "", ""]
    else:
        numbers += [f"{peer * 1e3:.2f}", f"{found['peer_l0']:.1f}", f"{peer / found['step']:.1f}"]
    return " | ".join(("| " + found["case"], *numbers)) + " |"


if __name__ == "__main__":
    main()
