"""Versions, hardware and kernel libraries of this installation, and the file that serves each operator."""

import argparse
import os
import platform
import shutil

import torch

from ..io.values import aligned
from ..kernels import native, triton_backend
from ..kernels.native import serving
from ..kernels.registry import OPERATORS


def _state(missing: str | None) -> str:
    return "loaded" if missing is None else f"not loaded: {missing}"


def describe() -> str:
    """The text that ``exssnet info`` prints."""
    from .. import __version__

    gpu = "none"
    if torch.cuda.is_available():
        gpu = ", ".join(
            f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
            for i in range(torch.cuda.device_count())
        )
    table = [("operator", "cpu", "cuda"), *((op, serving(op, "cpu"), serving(op, "cuda")) for op in OPERATORS)]
    lines = [
        f"exssnet {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"CPU     {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores",
        f"uses    {native.instructions()} in the native kernels, {native.onednn_instructions()} in oneDNN",
        f"GPU     {gpu} (torch built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU alone'})",
        f"native  {_state(native.missing)}",
        f"cuda    {_state(native.missing_cuda)}",
        f"triton  {_state(triton_backend.missing)}",
        "",
        *aligned(table),
        "",
    ]
    if native.missing is not None:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        advice = f"{compiler} is here" if compiler else "install one, e.g. g++ >= 10"
        lines.append(
            f"for the native CPU kernels: a C++20 compiler ({advice}), then `pip install --force-reinstall --no-deps "
            ".` without EXSSNET_NATIVE=0 or EXSSNET_BACKEND=reference"
        )
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``exssnet info`` to a parser: there are none."""


def run(arguments: argparse.Namespace) -> int:
    """Run ``exssnet info``; returns the exit status."""
    print(describe())
    return 0
