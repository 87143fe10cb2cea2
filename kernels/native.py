"""Loads the compiled library; `missing` says why it is not there, or is None."""

import os
import warnings
from pathlib import Path

import torch

BACKENDS = ("reference", "native", "triton")
missing: str | None = "not loaded yet"


def load() -> None:
    """Register the compiled kernels. Without them the reference serves every operator, and one warning says so."""
    global missing
    backend = os.environ.get("EXSSNET_BACKEND", "native")
    if backend not in BACKENDS:
        raise ValueError(f"EXSSNET_BACKEND must be one of {', '.join(BACKENDS)}, got {backend}")
    if backend != "native":
        missing = f"EXSSNET_BACKEND={backend}"
        return
    libraries = sorted(Path(__file__).parent.glob("_native*"))
    if not libraries:
        missing = "the package was installed without it; reinstall with a C++20 compiler and without EXSSNET_NATIVE=0"
    else:
        try:
            torch.ops.load_library(str(libraries[0]))
            missing = None
        except OSError as error:
            missing = f"{libraries[0].name} does not load in torch {torch.__version__}: {error}"
    if missing is not None:
        warnings.warn(f"exssnet runs on its reference in plain PyTorch, native kernels: {missing}", stacklevel=2)
