"""What the process does with freed memory."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from exssnet import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
for step in range(6):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(4 << 20) for _ in range(10)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator has the thresholds")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Page faults of three steps, each of which makes and frees ten tensors of 16 MB."""

    def said(how: str) -> list[str]:
        command = [sys.executable, "-c", STEPS, how]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    could, faults = said("keep")
    assert could == "True"
    assert int(faults) < 30
    assert int(said("as it is")[0]) > 100


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from exssnet import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
