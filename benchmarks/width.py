"""What a step costs against the number of latents, everything else fixed.

    python benchmarks/width.py [--architectures topk] [--widths 4096 8192 ...] [--plot benchmarks/width.svg] [--json]

The plot, SVG or PNG by its suffix, has both axes logarithmic and, for each case, a dashed line through its first point
along which cost grows linearly: a step that lies on or under it grows no faster than that. It takes matplotlib, which
the extra `dev` brings.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from cases import Case, names, normal_rows
from timing import clock, machine, medians, parser, product, start


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--architectures", nargs="+", default=["topk"], choices=names(), metavar="NAME")
    options.add_argument("--widths", nargs="+", type=int, default=[2**power for power in range(12, 17)])
    options.add_argument("--batch", type=int, default=2048)
    options.add_argument("--d-in", type=int, default=256)
    options.add_argument("--k", type=int, default=32)
    options.add_argument("--plot", type=plot_file, metavar="FILE", help="an .svg or .png to write")
    args = options.parse_args(arguments)
    device = start(args)
    x = normal_rows(args.batch, args.d_in, torch.empty(0, device=device))
    if not args.json:
        print(f"d_in {args.d_in}, batch {args.batch:,}, k {args.k}\n")
        print("| case | latents | step, ms | products | step, against linear growth |\n|---|--:|--:|--:|--:|")
    curves: dict[str, list[float]] = {}
    for name in args.architectures:
        for d_sae in args.widths:
            case = Case(name, d_sae, x, args.k)
            clocks = {"product": clock(product(args.d_in, d_sae, x), device), "step": clock(case.step, device)}
            times = medians(clocks, args.repeats)
            curve = curves.setdefault(name, [])
            curve.append(times["step"])
            products, growth = times["step"] / times["product"], curve[-1] / curve[0] * args.widths[0] / d_sae
            if args.json:
                found = {"case": name, "d_sae": d_sae, "l0": case.l0(), **times, "products": products, "growth": growth}
                print(json.dumps(found), flush=True)
            else:
                print(f"| {name} | {d_sae:,} | {times['step'] * 1e3:.1f} | {products:.2f} | {growth:.2f} |", flush=True)
    if args.plot is not None:
        about = f"d_in {args.d_in}, batch {args.batch:,}, k {args.k}\n{machine(device)}"
        plot(args.plot, args.widths, curves, about)


def plot_file(text: str) -> Path:
    """A file that can be drawn, which is better known before the measurement than after it."""
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .svg or .png, found {text!r}")
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("a plot needs matplotlib: pip install 'sae-kit[dev]'")
    return path


def plot(path: Path, widths: Sequence[int], curves: Mapping[str, Sequence[float]], about: str) -> None:
    """Draw seconds per step, a curve for each case, in milliseconds against `widths`."""
    import matplotlib  # nothing else here needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    # Text stays text, and with a salt, here, and no date, below, equal numbers make equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "width", "font.size": 11}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        figure.suptitle("One training step against the number of latents")
        axes = figure.add_subplot(xscale="log", yscale="log", xlabel="latents", ylabel="time of a step, ms")
        axes.set_title(about, fontsize=9, color="0.35")
        for number, (name, seconds) in enumerate(curves.items()):
            milliseconds = [1e3 * second for second in seconds]
            linear = [milliseconds[0] * width / widths[0] for width in widths]
            axes.plot(widths, linear, "--", color=f"C{number}", linewidth=1, alpha=0.7)
            axes.plot(widths, milliseconds, "o-", color=f"C{number}", label=name)
        axes.plot([], [], "--", color="0.5", linewidth=1, label="linear growth from the first point")
        axes.set_xticks(widths, [f"{width:,}" for width in widths])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_yticks([], minor=True)
        axes.grid(color="0.9")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
