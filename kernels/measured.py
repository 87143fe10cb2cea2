"""What is measured once on this machine, and kept in a file of the user's cache folder: numbers by key."""

import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exssnet.io.writing import locked, write_text

MASKING = ("auto", "fused", "written")
KERNELS_VERSION = 2  # of what is kept: raise it when products become faster
PATIENCE = 1.0
"""Seconds to wait for another process: it may itself wait for this one, which has not yet sent what a GPU expects."""

_known: dict[str, float] = {}
_measuring = threading.Lock()  # threads that meet a shape together measure it once, and choose alike


def _free_lock() -> None:
    """In a forked child, which has none of the threads that may have held the lock."""
    global _measuring
    _measuring = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_lock)


def measured(key: str, on_gpu: bool, measure: Callable[[], float]) -> float | None:
    """What was measured for a key, in this run or an earlier one, or else now; None while a CUDA graph is captured."""
    if known(key) is None:
        with _measuring:
            if on_gpu and torch.cuda.is_current_stream_capturing():
                return None
            with _alone(key):
                if known(key) is None:
                    _known[key] = measure()
                    _write()
    return _known[key]


def rounded(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape (N, C, ...) of what is multiplied, but for its channels rounded to powers of two.

    By it times are kept, so that batches and images of any sizes lead to few measurements.
    """
    return tuple(size if i == 1 else 1 << (size * size).bit_length() // 2 for i, size in enumerate(shape))


def order(stride: Sequence[int]) -> tuple[int, ...]:
    """The dimensions from the outermost in memory to the innermost."""
    return tuple(sorted(range(len(stride)), key=lambda i: -stride[i]))


def known(key: str) -> float | None:
    """What was measured for a key, in this run or an earlier one, or None."""
    if key not in _known:
        for found, value in _read().items():
            _known.setdefault(found, value)  # what this run has chosen by stays
    return _known.get(key)


def of_gpu(device: torch.device) -> tuple[str, ...]:
    """What a time on a GPU depends on beside shapes and dtypes: its name, and how float32 is multiplied."""
    precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return torch.cuda.get_device_name(device), *precision


def finish_on(device: torch.device) -> Callable[[], None]:
    """Waits until a device has done what it was told."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def asked_masking(masking: str = "auto") -> str:
    """Whether masks are "fused" with products, "written" before, or the faster: as given or, over "auto", as the
    environment's EXSSNET_MASKING says."""
    if masking == "auto":
        masking = os.environ.get("EXSSNET_MASKING", "auto")
    if masking not in MASKING:
        raise ValueError(f"masking must be one of {', '.join(MASKING)}, got {masking!r}")
    return masking


def times(finish: Callable[[], None], *ways: Callable[[], object]) -> list[float]:
    """Seconds of each until `finish` returns: the least of several rounds, for a hundredth of a second at least."""
    best = [float("inf")] * len(ways)
    for way in ways:
        way()
        finish()
    began, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - began < 0.01:
        for i, way in enumerate(ways):
            start = time.perf_counter()
            way()
            finish()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best


def _file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "exssnet" / "crossovers.json"


def cpu_model() -> str:
    """The CPU's name, as the operating system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine() -> str:
    versions = f"kernels {KERNELS_VERSION}, torch {torch.__version__}"
    return f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {versions}"


def _everything() -> dict[str, Any]:
    """What the file holds, by machine; a file that cannot be read holds nothing, and is written anew."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, RuntimeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read() -> dict[str, float]:
    """What earlier processes measured on this machine: finite numbers."""
    found = _everything().get(_machine())
    known = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in known if isinstance(value, float) and math.isfinite(value)}


def _write() -> None:
    """Keep what was measured, beside that of other machines; where nothing can be written, it is measured again."""
    with suppress(OSError, RuntimeError, ValueError):
        everything = _everything() | {_machine(): _read() | _known}
        write_text(_file(), json.dumps(everything, indent=1), lasting=False)  # nothing waits for the disk here


@contextmanager
def _alone(key: str) -> Iterator[None]:
    """Waits while another process measures, at most `PATIENCE` and until the key is known."""
    with ExitStack() as held:
        with suppress(OSError, RuntimeError):
            file = _file()
            file.parent.mkdir(parents=True, exist_ok=True)
            until = time.monotonic() + PATIENCE
            lock = file.with_suffix(".lock")
            held.enter_context(locked(lock, lambda: time.monotonic() < until and known(key) is None))
        yield
