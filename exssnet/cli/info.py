"""What this installation is made of, and which kernel serves each operator."""

import argparse
import os
import platform
import shutil

import torch

from ..kernels import OPERATORS, native, triton_backend
from ..kernels.native import serving


def _state(missing: str | None) -> str:
    return "loaded" if missing is None else f"not loaded: {missing}"


def describe() -> str:
    """The text of ``exssnet info``."""
    from .. import __version__

    gpu = "none"
    if torch.cuda.is_available():
        gpu = ", ".join(
            f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
            for i in range(torch.cuda.device_count())
        )
    lines = [
        f"exssnet {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"CPU     {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores",
        f"GPU     {gpu} (torch built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU alone'})",
        f"native  {_state(native.missing)}",
        f"cuda    {_state(native.missing_cuda)}",
        f"triton  {_state(triton_backend.missing)}",
        "",
        f"{'operator':<22}{'cpu':<24}cuda",
        *(f"{op:<22}{serving(op, 'cpu'):<24}{serving(op, 'cuda')}" for op in OPERATORS),
        "",
    ]
    wishes = []
    if native.missing is not None:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        found = f"{compiler} is here" if compiler else "install one, e.g. g++ >= 10"
        wishes.append(
            f"for the native CPU kernels: a C++20 compiler ({found}), then `pip install --force-reinstall --no-deps .` "
            "without EXSSNET_NATIVE=0 or EXSSNET_BACKEND=reference"
        )
    return "\n".join(lines + wishes)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``exssnet info`` to a parser: there are none."""


def run(arguments: argparse.Namespace) -> int:
    """Run ``exssnet info``; returns the exit status."""
    print(describe())
    return 0
