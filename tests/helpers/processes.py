"""Forked children, and what Linux's /proc tells of processes."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that any thread of a process started."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # threads end
            found += map(int, thread.read_text().split())
    return found


def in_child(call: Callable[[], bool], seconds: float = 30) -> int:
    """Forks, and returns the child's exit status: 0 if call() was true there, -9 if it did not end in time."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if call() else 1
        finally:
            os._exit(status)
    until, ended = time.monotonic() + seconds, 0
    while not ended:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
        ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status)
