"""Times variants against each other, fairly, and prints what came out."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import exssnet
from exssnet.kernels import native

Variant = Callable[[], Any]


@dataclass
class Timing:
    """Seconds of one variant: the median, and the spread, which is the width of the middle half of all rounds."""

    median: float
    spread: float


@dataclass
class Row:
    """One line of the table. rate: bytes or FLOPs, counted in the code, over the time; 0 where none are counted."""

    operator: str
    shape: str
    density: float | None
    threads: int
    timing: Timing
    rate: float = 0.0
    unit: str = ""
    baselines: dict[str, Timing] = field(default_factory=dict)

    def ratio(self, baseline: str) -> float:
        """How many times faster than a baseline."""
        return self.baselines[baseline].median / self.timing.median

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratios": {name: self.ratio(name) for name in self.baselines}}


def alternate(variants: Sequence[Variant], seconds: float) -> list[Timing]:
    """Time all variants round by round, so that a machine that drifts hits them alike; at least 5 rounds."""
    for variant in variants:
        variant()
    start = time.perf_counter()
    rounds: list[list[float]] = []
    while len(rounds) < 5 or time.perf_counter() - start < seconds:
        times = []
        for variant in variants:
            begin = time.perf_counter()
            variant()
            times.append(time.perf_counter() - begin)
        rounds.append(times)
    quartiles = torch.tensor(rounds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double(), dim=0)
    return [Timing(float(middle), float(high - low)) for low, middle, high in quartiles.t()]


class WrongResult(AssertionError):
    """A variant that must not be timed."""


def check_equal(what: str, got: Tensor, expected: Tensor) -> None:
    if not torch.equal(got, expected):
        raise WrongResult(f"{what} differs from the reference: it is not timed")


def check_accurate(what: str, got: Tensor, truth: Tensor, plain: Tensor) -> None:
    """Against a float64 truth: at most twice the error of plain PyTorch in the same dtype, or 8 ulps of the largest."""
    error, budget = ((t.detach().double() - truth).abs().max().item() for t in (got, plain))
    floor = 8 * torch.finfo(got.dtype).eps * truth.abs().max().item()
    if not error <= max(2 * budget, floor):
        raise WrongResult(f"{what} errs by {error:.3g}, plain PyTorch by {budget:.3g}: it is not timed")


def machine() -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "exssnet": exssnet.__version__,
        "kernels": "native" if native.missing is None else f"reference ({native.missing})",
    }


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; "x sort" is the median of the sort divided by ours."""
    head = ("operator", "shape", "density", "threads", "median ms", "spread ms", "rate", "times faster than")
    cells = [
        (
            row.operator,
            row.shape,
            "" if row.density is None else f"{row.density:g}",
            str(row.threads),
            _milliseconds(row.timing.median),
            _milliseconds(row.timing.spread),
            f"{row.rate:.3g} {row.unit}" if row.unit else "",
            ", ".join(f"{name} {row.ratio(name):.1f}" for name in row.baselines),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [head, tuple("-" * w for w in widths), *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, nargs="+", default=[1], help="one run for each number")
    options.add_argument("--quick", action="store_true", help="small shapes or short runs, a tenth of a second each")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")
    return options


def report(options: argparse.Namespace, measure: Callable[[int], list[Row]]) -> None:
    """Print the header and the table of what `measure` finds with each number of threads."""
    header = machine()
    print(", ".join(f"{name} {value}" for name, value in header.items()), flush=True)
    rows: list[Row] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows += measure(threads)
    print("\n" + table(rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": header, "rows": [row.as_dict() for row in rows]}, indent=1))
