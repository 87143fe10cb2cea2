"""What the process does with freed memory."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from exssnet import Phases, convert
from exssnet.kernels import memory

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator keeps freed memory")
def test_a_finished_task_gives_freed_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks of 100 kB every tenth stays, so that the others lie between."""
    c = ctypes.CDLL(None)
    c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    phases = Phases(convert(nn.Sequential(nn.Linear(4, 3)), 0.5))
    phases.start_task()
    blocks = [c.malloc(ctypes.c_size_t(100 << 10)) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, 100 << 10)
    for number, block in enumerate(blocks):
        if number % 10:
            c.free(block)
    before = memory.resident()
    monkeypatch.setattr(memory, "_after_trim", 0)
    phases.finish_task()
    assert before - memory.resident() > 100 << 20
    for block in blocks[::10]:
        c.free(block)


PRELOADED = """
#include <stddef.h>
extern void *__libc_malloc(size_t);
void *malloc(size_t size) { return __libc_malloc(size); }
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc loads allocators in place of its own")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_another_allocator_is_told(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text(PRELOADED)
    subprocess.run(["cc", "-shared", "-fPIC", "other.c", "-o", "other.so"], cwd=tmp_path, check=True)
    script = f"import runpy; print(runpy.run_path({memory.__file__!r})['keep_freed_memory']())"

    def said(**environment: str) -> str:
        command = [sys.executable, "-c", script]
        env = os.environ | environment
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.strip()

    assert said() == "True"
    assert said(LD_PRELOAD=str(tmp_path / "other.so")) == "False"


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from exssnet import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
