"""What a step costs against the number of latents, everything else fixed.

    python benchmarks/width.py [--architectures topk] [--widths 4096 8192 ...] [--plot benchmarks/width.svg] [--json]

The plot has both axes logarithmic and, for each case, a line through its first point along which cost grows linearly: a
step that lies on or under it grows no faster than that.
"""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from cases import Case, names, normal_rows
from timing import clock, machine, medians, parser, product, start

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LEFT, TOP, WIDTH, HEIGHT = 70, 40, 520, 340  # the frame of the plot


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--architectures", nargs="+", default=["topk"], choices=names(), metavar="NAME")
    options.add_argument("--widths", nargs="+", type=int, default=[2**power for power in range(12, 17)])
    options.add_argument("--batch", type=int, default=2048)
    options.add_argument("--d-in", type=int, default=256)
    options.add_argument("--k", type=int, default=32)
    options.add_argument("--plot", type=Path, help="an SVG file to write")
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
        about = f"d_in {args.d_in}, batch {args.batch:,}, k {args.k}; {machine(device)}"
        args.plot.write_text(plot(args.widths, curves, about), encoding="utf-8")


def plot(widths: list[int], curves: dict[str, list[float]], about: str) -> str:
    """An SVG of milliseconds against latents."""
    steps = [seconds * 1e3 for curve in curves.values() for seconds in curve]
    ceiling = max(max(steps), max(curve[0] * 1e3 * widths[-1] / widths[0] for curve in curves.values()))
    low, high = math.floor(math.log10(min(steps))), math.ceil(math.log10(ceiling))

    def place(latents: float, milliseconds: float) -> tuple[float, float]:
        across = math.log(latents / widths[0]) / max(math.log(widths[-1] / widths[0]), 1e-9)
        up = (math.log10(milliseconds) - low) / max(high - low, 1)
        return LEFT + across * WIDTH, TOP + (1 - up) * HEIGHT

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 40}" height="{TOP + HEIGHT + 60}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 24, f"one training step, ms, against latents ({about})", "start"),
    ]
    for width in widths:
        column, _ = place(width, 10**low)
        parts += [
            _line((column, TOP), (column, TOP + HEIGHT), "#dddddd"),
            _text(column, TOP + HEIGHT + 18, f"{width:,}"),
        ]
    for power in range(low, high + 1):
        _, row = place(widths[0], 10**power)
        parts += [_line((LEFT, row), (LEFT + WIDTH, row), "#dddddd"), _text(LEFT - 8, row + 4, f"{10**power:g}", "end")]
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(width, seconds * 1e3) for width, seconds in zip(widths, curve, strict=True)]
        linear = place(widths[-1], curve[0] * 1e3 * widths[-1] / widths[0])
        parts += [_line(a, b, colour) for a, b in pairwise(points)]
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in points]
        parts += [_line(points[0], linear, colour, dashes="6 4")]
        parts += [_text(LEFT + 12, TOP + 18 + 16 * number, f"{name} (dashed: linear growth)", "start", colour)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(start: tuple[float, float], end: tuple[float, float], colour: str, dashes: str = "") -> str:
    (x1, y1), (x2, y2) = start, end
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ' stroke-width="1.5"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "black") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    main()
