"""Measurements of a report that a test can make fail in another process."""

import os
import time
from typing import Any


def measure(item: Any) -> dict[str, int]:
    """What the item's name says: raise, end the process, hang; else the process id."""
    if item.name == "raises":
        raise RuntimeError("out of\nmemory")
    if item.name == "dies":
        os._exit(7)
    if item.name == "hangs":
        time.sleep(600)
    return {"process": os.getpid()}
