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
    ``MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824`` in the environment. False where memory is not
    allocated by glibc: with another C library, or with jemalloc, tcmalloc or another allocator in its place.
    """
    if not _glibc_allocates():
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 1 << 30))


_after_trim = 0  # bytes that were resident


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, where glibc allocates, if the process has grown by a tenth since last time.

    glibc keeps what lies between blocks that stay, and does not fill it with tensors again: 500 tasks of LeNet-300-100,
    18 MB, had 870 MB. `keep_freed_memory` is about the steps of one task.
    """
    global _after_trim
    if resident() > 1.1 * _after_trim and _glibc_allocates():
        ctypes.CDLL(None).malloc_trim(0)
        _after_trim = resident()


def _glibc_allocates() -> bool:
    """Whether malloc is glibc's own: another allocator that is linked or preloaded takes its place."""
    if platform.libc_ver()[0] != "glibc":
        return False
    used, own = (ctypes.cast(library.malloc, ctypes.c_void_p) for library in map(ctypes.CDLL, (None, "libc.so.6")))
    return used.value == own.value
