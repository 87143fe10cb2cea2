"""How much memory this process holds, and held at its peak, and what it does with freed memory."""

import ctypes
import platform
import sys
from contextlib import suppress
from pathlib import Path

# The peak is Linux's VmHWM where there is one: a child's ru_maxrss begins with its parent's, and does not go back.


def _status(key: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return 1024 * int(line.split()[1])
    return None


def peak() -> int:
    """Bytes of the largest resident memory since `restart_peak`, or since the process began where that is unknown."""
    found = _status("VmHWM")
    if found is None:
        import resource

        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found


def resident() -> int:
    """Bytes resident now; the peak where that is unknown."""
    found = _status("VmRSS")
    return peak() if found is None else found


def restart_peak() -> None:
    """Let the peak begin anew, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GB of freed memory for what it allocates next; returns whether that could be done.

    Otherwise glibc gives activations back to the kernel after a step, which clears every page of 4 KB that the next one
    asks for, at about 2 us. It is for the process and for good, in tensors of up to 32 MB, as by
    ``MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824`` in the environment. False where the C library
    is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 1 << 30))
