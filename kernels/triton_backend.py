"""Registers the Triton kernels with PyTorch's dispatcher, for operators without a compiled kernel on CUDA or ROCm."""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .registry import OPERATORS

YES, NO = ("1", "true", "yes", "on", "y"), ("0", "false", "no", "off", "n")
"""What Triton accepts as yes in TRITON_INTERPRET, and what can only mean no."""
missing: str | None = "not loaded yet"
"""Why the Triton kernels are unavailable, or None."""
_library: torch.library.Library | None = None


def kernels() -> dict[str, str]:
    """The operators with a Triton kernel, including backward operators, and the module that holds its function."""
    defined = torch.ops.exssnet
    return {
        name: Path(row.triton).stem
        for operator, row in OPERATORS.items()
        if row.triton is not None
        for name in (operator, f"{operator}_backward")
        if hasattr(defined, name)
    }


def _kernel(name: str, module: str) -> Callable[..., Any]:
    """A function of a module that is imported at the first call; it runs on the device of its first tensor."""

    @functools.cache
    def function() -> Callable[..., Any]:
        kernel: Callable[..., Any] = getattr(importlib.import_module(f".{module}", __package__), name)
        return kernel

    def call(*args: Any) -> Any:
        with torch.cuda.device_of(args[0][0] if isinstance(args[0], list) else args[0]):
            return function()(*args)

    return call


def _key() -> str:
    """The dispatch key to register for: CUDA, also on ROCm; CPU if EXSSNET_BACKEND=triton runs in the interpreter."""
    if os.environ.get("EXSSNET_BACKEND") != "triton":
        return "CUDA"
    interpret = os.environ.get("TRITON_INTERPRET", "")
    if interpret.lower() not in (*YES, *NO, ""):
        raise ValueError(f"TRITON_INTERPRET must be one of {', '.join((*YES, *NO))}, got {interpret[:80]!r}")
    return "CPU" if interpret.lower() in YES else "CUDA"


def load() -> None:
    """Register the kernels, or set `missing` to the reason why not. Operators that have a kernel keep it."""
    global missing, _library
    key = _key()
    if os.environ.get("EXSSNET_BACKEND") == "reference":
        missing = "EXSSNET_BACKEND=reference"
    elif importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif key == "CUDA" and torch.version.cuda is None and torch.version.hip is None:
        missing = "this torch has neither CUDA nor ROCm"
    else:
        _library = torch.library.Library("exssnet", "IMPL", key)
        for name, module in kernels().items():
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"exssnet::{name}", key):
                _library.impl(name, _kernel(name, module))
        missing = None
