"""`exssnet bench`. Each kind of benchmark is a module with options and a `run` that prints and returns its numbers."""

import argparse
import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from exssnet import keep_freed_memory
from exssnet.io.writing import write_text

from . import ceilings, memory, ops, report, serving, sweep, timing, training

KINDS: dict[str, Any] = {
    "ops": ops, "training": training, "sweep": sweep, "memory": memory, "serving": serving, "report": report,
}  # fmt: skip
SELECTION = {
    "ops": ["--only", *ops.SELECTION, "--densities", "0.1"],
    "training": ["--cases", "weight/resnet18-20", "weight/lenet-300-100", "--densities", "0.1", "0.02"],
    "memory": ["--networks", "resnet18-20"],
}
"""Arguments of the selection that runs if no kind is given. It takes minutes, not an hour."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `exssnet bench` and of its kinds. Shared options may stand before or after the kind."""
    _shared(parser, [1], ["float32"], "cpu", False, None)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", help="default: a selection of all, in a few minutes")
    for name, module in KINDS.items():
        description = (module.__doc__ or "").strip()
        kind = kinds.add_parser(
            name, help=description.partition("\n")[0], description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        _shared(kind, *[argparse.SUPPRESS] * 5)
        module.add_options(kind)


def _shared(parser: argparse.ArgumentParser, threads: Any, dtype: Any, device: Any, quick: Any, file: Any) -> None:
    parser.add_argument("--threads", type=int, nargs="+", default=threads, help="one run for each number (default: 1)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=dtype,
        help="of the products, ours and the baselines', by autocast (default: float32)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="what is measured (default: cpu)")
    parser.add_argument("--quick", action="store_true", default=quick, help="tiny shapes and short runs: a smoke test")
    parser.add_argument("--json", type=Path, metavar="FILE", default=file, help="also write all numbers to FILE")


def run(options: argparse.Namespace) -> int:
    """Run the benchmarks, print the results and return the exit status. Raises WrongResult if a result is wrong."""
    if min(options.threads) < 1:
        raise ValueError(f"threads must be at least 1, got {min(options.threads)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda needs a GPU, and torch {torch.__version__} finds none")
    if options.device == "cuda" and options.kind == "memory":
        raise ValueError("memory is measured on the CPU alone, got --device cuda")
    if options.dtype != ["float32"] and options.kind in ("memory", "report"):
        of = "memory is measured in float32 alone" if options.kind == "memory" else "a report is made in every dtype"
        raise ValueError(f"{of}, got --dtype {' '.join(options.dtype)}")
    with _stoppable() as stopped:
        if options.kind == "report":  # it measures in a process of its own
            numbers = report.run(options)
            if options.json:
                write_text(options.json.resolve(), json.dumps(numbers, indent=1))
            return 0
        keep_freed_memory()  # as in `exssnet train`; the baselines profit as well
        # No device context on the CPU: with such a context, every call of torch takes a detour through Python.
        device = torch.device(options.device) if options.device != "cpu" else nullcontext()
        with device, ceilings.cudnn_as_precise_as_products():
            return _run(options, stopped)


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Let SIGTERM, which a time limit sends, end the present kind as Ctrl-C does: finished rows are shown and written.

    Yields a list that holds the signal once it came.
    """
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace, stopped: list[int]) -> int:
    results: dict[str, Any] = {"machine": timing.machine(), "ceilings": []}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    if options.quick:
        print("a smoke test: its numbers mean nothing")
    threads_before = torch.get_num_threads()
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            peak = ceilings.machine_peak(options.quick)
            # JSON has no infinity, which stands for rates that a CPU does not have.
            rates = {name: rate for name, rate in asdict(peak).items() if 0 < rate < math.inf}
            results["ceilings"].append({"threads": threads} | rates)
            print(f"ceilings with {threads} thread{'s' * (threads > 1)}: {peak}", flush=True)
        for kind, given in [(options.kind, options)] if options.kind else _selection(options):
            if stopped:
                break
            before = os.times()
            results[kind] = KINDS[kind].run(given)
            results[kind]["cpu"] = share = _cpu_share(before, os.times())
            if share < 0.9 and options.device == "cpu":
                print(f"\nThe machine was busy: this run had {share:.2f} of a core. Compare the ratios alone.")
            if options.json:
                write_text(options.json.resolve(), json.dumps(results, indent=1))
    finally:
        torch.set_num_threads(threads_before)
    return 0


def _cpu_share(before: os.times_result, after: os.times_result) -> float:
    """CPU time of this process and its children, divided by the elapsed time."""
    *used, elapsed = (b - a for a, b in zip(before, after, strict=True))
    return sum(used) / elapsed if elapsed else 1.0


def _selection(options: argparse.Namespace) -> list[tuple[str, argparse.Namespace]]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    chosen = {kind: [] if options.quick else arguments for kind, arguments in SELECTION.items()}
    if options.device == "cuda" or "float32" not in options.dtype:
        del chosen["memory"]
    asked = [(kind, parser.parse_args([kind, *arguments])) for kind, arguments in chosen.items()]
    for _, given in asked:
        given.threads, given.dtype = options.threads, options.dtype
        given.device, given.quick = options.device, options.quick
    return asked
