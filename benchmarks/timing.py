"""What the benchmarks share: medians of calls that take turns, what the machine can do, and which machine it was."""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
"""Names of precisions -> dtype of the weights; tf32 is float32 whose products are rounded on the way in (CUDA)."""
SIZES = ("256x4096", "512x8192", "768x12288")
CALLS_ON_CUDA = 10
"""Calls between two waits for the device: one alone would be the wait."""


def parser(doc: str | None, repeats: int = 9) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--repeats", type=int, default=repeats, help="rounds that are timed, after one that is not")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--json", action="store_true", help="one line of JSON per case instead of a table")
    return found


def start(args: argparse.Namespace) -> torch.device:
    """Set the threads, say which machine this is, and return the device that is measured.

    What else runs there takes more from a step than from a product: a step waits for its threads a hundred times, and
    whoever waits for a thread that has no core waits long. The load is therefore printed too.
    """
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    line = f"{machine(device)}, load before the start {os.getloadavg()[0]:.1f}\n"
    print(line, file=sys.stderr if args.json else sys.stdout, flush=True)
    return device


def machine(device: torch.device) -> str:
    """Processor, threads, version and date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}"


def parse_size(size: str) -> tuple[int, int]:
    """d_in and d_sae of "768x12288"."""
    d_in, d_sae = size.split("x")
    return int(d_in), int(d_sae)


def set_precision(precision: str) -> torch.dtype:
    """Whether products of float32 may be TF32 from now on; the dtype of the weights."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return DTYPES[precision]


def clock(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """`run` as a call that returns the seconds it took."""
    calls = CALLS_ON_CUDA if device.type == "cuda" else 1

    def seconds() -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - started) / calls

    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(clocks: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each clock. All take turns: what else the machine does meets all. The first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for repeat in range(repeats + 1):
        for name, seconds in clocks.items():
            found = seconds()
            if repeat:
                times[name].append(found)
    return {name: statistics.median(values) for name, values in times.items()}


def product(d_in: int, d_sae: int, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The unit: pre-activations of all rows, bias included."""
    weights, bias = torch.randn(d_in, d_sae).to(x), torch.randn(d_sae).to(x)
    return lambda: torch.addmm(bias, x, weights)


def copy_bandwidth(device: torch.device, repeats: int = 9) -> float:
    """Bytes per second of a large copy, those read and those written."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = medians({"copy": clock(lambda: target.copy_(source), device)}, repeats)["copy"]
    return 2 * source.numel() * source.element_size() / seconds


def least_seconds(
    product_seconds: float, bandwidth: float, batch: int, d_in: int, d_sae: int, l0: float, size: int
) -> float:
    """What a sparse step costs at least if all that it touches comes from memory at the speed of a copy.

    The product; pre-activations written and read once; decoder rows gathered for output and code gradient; Adam, which
    reads parameter, gradient and two moments and writes three of them and the gradient, of two matrices. `size` is
    the bytes of a number. A step can beat it where a cache holds much of the decoder.
    """
    moved = 2 * batch * d_sae + 4 * batch * l0 * d_in + 8 * 2 * d_in * d_sae
    return product_seconds + moved * size / bandwidth
