"""Registers the Triton kernels with PyTorch's dispatcher, for CUDA and ROCm, where nothing else serves an operator."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

OPERATORS = {
    "topk_masks": "triton_topk",
    "pack_mask": "triton_bits",
    "unpack_mask": "triton_bits",
    "free_mask": "triton_bits",
    "supermask_linear": "triton_linear",
    "supermask_linear_backward": "triton_linear",
    "supermask_weights": "triton_weights",
    "supermask_weights_backward": "triton_weights",
    "masked_linear": "triton_linear",
    "masked_linear_backward": "triton_linear",
    "supermask_conv2d": "triton_conv",
    "supermask_conv2d_backward": "triton_conv",
    "masked_conv2d": "triton_conv",
    "masked_conv2d_backward": "triton_conv",
    "bitmap_linear": "triton_linear",
    "bitmap_linear_backward": "triton_linear",
    "bitmap_conv2d": "triton_conv",
    "bitmap_conv2d_backward": "triton_conv",
}
"""Operator -> the module whose function of that name is its kernel."""

YES, NO = ("1", "true", "yes", "on", "y"), ("0", "false", "no", "off", "n")
"""What Triton takes for yes, and what can only be meant as no."""
missing: str | None = "not loaded yet"
_library: torch.library.Library | None = None


def _kernel(name: str) -> Callable[..., Any]:
    """An operator's function, its module imported at the first call, on the device of its first tensor."""

    @functools.cache
    def function() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f".{OPERATORS[name]}", __package__), name)
        return found

    def call(*args: Any) -> Any:
        with torch.cuda.device_of(args[0][0] if isinstance(args[0], list) else args[0]):
            return function()(*args)

    return call


def _key() -> str:
    """The dispatch key to serve: CUDA, which ROCm has too; in Triton's interpreter, when asked for Triton, the CPU."""
    if os.environ.get("EXSSNET_BACKEND") != "triton":
        return "CUDA"
    interpret = os.environ.get("TRITON_INTERPRET", "")
    if interpret.lower() not in (*YES, *NO, ""):
        raise ValueError(f"TRITON_INTERPRET must be one of {', '.join((*YES, *NO))}, got {interpret[:80]!r}")
    return "CPU" if interpret.lower() in YES else "CUDA"


def load() -> None:
    """Register the kernels; `missing` says why they are not, or is None. Operators that have a kernel keep it."""
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
        for name in OPERATORS:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"exssnet::{name}", key):
                _library.impl(name, _kernel(name))
        missing = None
