"""How much memory this process holds, and held at its peak."""

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
