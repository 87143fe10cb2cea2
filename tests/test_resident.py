"""What the process does with freed memory."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys, torch
from exssnet import keep_freed_memory

c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def tensors():
    activations = [torch.ones(4 << 20) for _ in range(10)]

def blocks():  # that end the heap when they are freed
    found = [c.malloc(ctypes.c_size_t(16 << 20)) for _ in range(10)]
    for block in found:
        ctypes.memset(block, 1, 16 << 20)
    for block in found:
        c.free(block)

step, how = globals()[sys.argv[1]], sys.argv[2]
if how == "keep":
    print(keep_freed_memory())
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator has the thresholds")
@pytest.mark.parametrize("what", ["tensors", "blocks"])
def test_freed_memory_is_kept_for_the_next_step(what: str) -> None:
    """Page faults of three steps, each of which makes and frees ten tensors, or blocks of memory, of 16 MB."""

    def said(how: str) -> list[str]:
        command = [sys.executable, "-c", STEPS, what, how]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    could, faults = said("keep")
    assert could == "True"
    assert int(faults) < 30
    if what == "blocks":  # of tensors, what lies behind them in the heap may keep them there by chance
        assert int(said("as it is")[0]) > 100


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from exssnet import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
