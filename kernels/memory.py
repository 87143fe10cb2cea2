"""The resident memory of this process, its peak, and what the allocator does with freed memory."""

import ctypes
import platform
import sys
from contextlib import suppress
from pathlib import Path

# The peak is VmHWM where Linux has it: ru_maxrss of a child process starts at its parent's, and cannot be reset.


def _status(key: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return 1024 * int(line.split()[1])
    return None


def peak() -> int:
    """Peak resident memory in bytes since `restart_peak`; since the process began, where that cannot be reset."""
    size = _status("VmHWM")
    if size is None:
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return size


def resident() -> int:
    """Resident memory in bytes; the peak where it is unknown."""
    size = _status("VmRSS")
    return peak() if size is None else size


def restart_peak() -> None:
    """Reset the peak, on Linux; elsewhere it stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GB of freed memory for its next allocations.

    By default glibc returns activations to the kernel after a step. The kernel clears each page of 4 KB that the next
    step asks for, which takes about 2 us a page. The setting holds for the whole process until its end, for tensors of
    up to 32 MB. ``MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824`` in the environment does the same.

    Returns:
        Whether it was set. False if glibc does not allocate the memory, that is with another C library, or with
        jemalloc, tcmalloc or another allocator.
    """
    if not _glibc_allocates():
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 1 << 30))


_after_trim = 0  # resident bytes


def give_back_freed_memory() -> None:
    """Return freed memory to the system, if the process has grown by a tenth since the last time; needs glibc.

    glibc keeps free memory between live blocks, and does not reuse it for tensors: 500 tasks of LeNet-300-100, 18 MB,
    took 870 MB. `keep_freed_memory` is about the steps of one task.
    """
    global _after_trim
    if resident() > 1.1 * _after_trim and _glibc_allocates():
        ctypes.CDLL(None).malloc_trim(0)
        _after_trim = resident()


def _glibc_allocates() -> bool:
    """Whether malloc is glibc's own: an allocator that is linked or preloaded replaces it."""
    if platform.libc_ver()[0] != "glibc":
        return False
    used, own = (ctypes.cast(library.malloc, ctypes.c_void_p) for library in map(ctypes.CDLL, (None, "libc.so.6")))
    return used.value == own.value
