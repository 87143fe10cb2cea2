"""Triton kernels compiled for GPUs that are not there, from the calls that would launch them.

`compiled(architecture, call)` runs a function of the package on meta tensors. Each launch on the way is compiled as
Triton's just-in-time compiler would for these arguments, in every configuration of the autotuner, and nothing is run.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

try:
    import triton
except ImportError:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from exssnet.kernels import triton_product

interpreting: bool = triton.knobs.runtime.interpret
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a program can have."""
TENSOR_CORES = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA", "v_mfma": "v_mfma"}
"""Instructions of tensor cores: how the assembly of a kernel calls them (PTX, or AMD's), and their names."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one launch. spilled: bytes of registers kept in memory, with everything else there."""

    kernel: str
    configuration: str
    registers: int
    spilled: int
    shared: int
    tensor_cores: str
    launch: dict[str, Any]
    binary: bytes = field(repr=False)
    """The code: of NVIDIA's chips a binary, of AMD's the assembly."""

    def instructions(self) -> int:
        """Their number. Disassembling takes longer than compiling, so that only a table asks for it."""
        if not self.binary.startswith(b"\x7fELF"):
            return len(re.findall(rb"^\t[a-z]+_\w+", self.binary, re.MULTILINE))
        opcode = r"^ +/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?[A-Z]"
        return len(re.findall(opcode, _dumped(self.binary, "-sass"), re.MULTILINE))


class NoDevice:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.architecture]

    def get_current_device(self) -> str:
        return self.architecture  # under which a kernel keeps what was compiled for it

    def get_current_stream(self, device: str) -> int:
        return 0


def _dumped(binary: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary)
        return subprocess.run([CUOBJDUMP, option, file], check=True, capture_output=True, text=True).stdout


def _nvidia(binary: bytes) -> tuple[int, int]:
    """(registers, bytes on the stack)."""
    usage = _dumped(binary, "-res-usage")
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of private memory); scalars spill into vectors, which costs no memory."""
    registers, private, spilled = (
        int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return registers, private + 4 * spilled


def _report(name: str, kernel: Any, launch: dict[str, Any]) -> Compiled:
    nvidia = "cubin" in kernel.asm
    assembly = kernel.asm["ptx" if nvidia else "amdgcn"]
    registers, spilled = _nvidia(kernel.asm["cubin"]) if nvidia else _amd(assembly)
    used = [core for called, core in TENSOR_CORES.items() if called in assembly]
    blocks = [f"{n.removeprefix('BLOCK_')} {v}" for n, v in launch.items() if n.startswith("BLOCK")]
    configuration = ", ".join([*blocks, f"{kernel.metadata.num_warps} warps, {kernel.metadata.num_stages} stages"])
    binary = kernel.asm["cubin"] if nvidia else assembly.encode()
    return Compiled(name, configuration, registers, spilled, kernel.metadata.shared, "+".join(used), launch, binary)


@contextmanager
def _compiling(architecture: str, found: list[Compiled], most: int | None) -> Iterator[None]:
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        found.append(_report(self.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs), kwargs))

    def every_configuration(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for configuration in self.prune_configs(kwargs)[:most]:
            self.fn.run(*args, **kwargs, **configuration.all_kwargs())

    def by_the_autotuner(kernel: Autotuner, tuned: object, grid: Any, *args: Any, **kwargs: Any) -> None:
        kernel[grid](*args, **kwargs)

    hip = "7.0" if TARGETS[architecture].backend == "hip" else None
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Autotuner, "run", every_configuration),
        mock.patch.object(triton_product, "_launch", by_the_autotuner),
        mock.patch.object(driver, "_active", NoDevice(architecture)),
        mock.patch.object(torch.version, "hip", hip),
    ):
        yield


def compiled(architecture: str, call: Callable[[], object], most: int | None = None) -> list[Compiled]:
    """What every launch of a call compiles to, in at most so many configurations each."""
    found: list[Compiled] = []
    with _compiling(architecture, found, most):
        call()
    return found
