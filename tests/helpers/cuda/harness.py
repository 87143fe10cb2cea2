"""Runs the CUDA kernels on the CPU: compiles csrc/cuda/<name>.cu over emulator.h, with bind_<name>.cpp for Python, and
imports the result. A module is compiled once per mode and kept in build/emulator/ until its sources change.

Modes, chosen for a process by EXSSNET_EMULATOR_MODE:
    plain     values, barriers, warp exchanges, launch limits
    sanitize  AddressSanitizer and UBSan: every load and store, alignment, shifts, overflow; an error ends the process
    race      every load and store against those of other threads; reads of shared memory that nothing was written to
A test file runs in `plain` by itself, and again in the others by `run_again`, in a process of its own.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from tiers import WHOLE

ROOT = Path(__file__).resolve().parents[3]
HERE = ROOT / "tests/helpers/cuda"
BUILD = ROOT / "build/emulator"
MODES = {
    "plain": ["-O2"],
    "sanitize": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "race": ["-O1", "-g1", "-fsanitize=thread", "-DEXSSNET_TRACED"],
}
MODE = os.environ.get("EXSSNET_EMULATOR_MODE", "plain")
ORDERS = ("ascending", "descending", "round-robin", "1", "2")
"""Values of EXSSNET_EMULATOR_ORDER that tests go through: see emulator.cpp."""
FLAGS = ["-std=c++20", "-DEXSSNET_EMULATED", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


@functools.cache
def missing() -> str | None:
    """What the emulator needs and this machine lacks."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return f"the emulator switches threads on x86-64 and Linux, this is {platform.machine()} and {sys.platform}"
    if shutil.which("g++") is None:
        return "no g++ to compile the kernels for the emulator with"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h to compile the kernels' bindings with"
    return None


def pybind11() -> Path:
    """The headers that torch brings; torch itself need not be imported for them."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    return Path(torch.origin).parent / "include"


def included(source: Path) -> dict[Path, bytes]:
    """The source and all files of the project that it includes, with their contents."""
    found: dict[Path, bytes] = {}
    pending = [source]
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found[file] = file.read_bytes()
        names = re.findall(rb'^\s*#\s*(?:include|define\s+EXSSNET_BODY)\s+"([^"]+)"', found[file], re.MULTILINE)
        places = [folder / name.decode() for name in names for folder in (file.parent, ROOT / "csrc", HERE)]
        pending += [place.resolve() for place in places if place.is_file()]
    return found


def made(command: list[str], inputs: dict[Path, bytes], name: str, suffix: str) -> Path:
    """The file that a command writes after `-o`, run unless it was already with the same inputs."""
    content = hashlib.sha256(repr(command).encode())
    for file in sorted(inputs):
        content.update(inputs[file])
    target = BUILD / f"{name}-{content.hexdigest()[:16]}" / f"{name}{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        part.rename(target)
    return target


def compiled(source: Path, flags: list[str]) -> Path:
    places = ["-I", str(ROOT / "csrc"), "-I", str(HERE)]
    command = ["g++", *FLAGS, *flags, *places, "-c", "-x", "c++", str(source)]
    return made(command, included(source), source.stem, ".o")


def linked(objects: list[Path], flags: list[str], name: str, suffix: str) -> Path:
    inputs = {file: str(file).encode() for file in objects}
    return made(["g++", "-shared", *map(str, objects), *flags], inputs, name, suffix)


def build(name: str, mode: str, folder: Path) -> Path:
    """The extension module of the kernels in <name>.cu of a folder.

    Kernels and bindings are libraries apart: the first one's thread-local memory is the shared memory of CUDA, and
    the bindings, which need no sanitizer, are compiled once for all modes.
    """
    uninstrumented = [flag for flag in MODES[mode] if flag != "-fsanitize=thread"]
    kernels = [
        compiled(folder / f"{name}.cu", [*MODES[mode], "-fno-gnu-unique"]),
        compiled(HERE / "emulator.cpp", uninstrumented),
        *([compiled(HERE / "trace.cpp", [*uninstrumented, "-O2"])] if mode == "race" else []),
    ]
    sanitizer = [flag for flag in MODES[mode] if flag == "-fsanitize=address,undefined"]
    library = linked(kernels, ["-Wl,-Bsymbolic", *sanitizer], f"lib{name}", ".so")
    headers = ["-isystem", sysconfig.get_path("include"), "-isystem", str(pybind11())]
    binding = compiled(HERE / f"bind_{name}.cpp", ["-O1", "-fvisibility=hidden", *headers])
    needs = ["-L", str(library.parent), f"-l{name}", f"-Wl,-rpath,{library.parent}"]
    return linked([binding], needs, f"{name}_emulated", sysconfig.get_config_var("EXT_SUFFIX"))


@functools.cache
def load(name: str, folder: Path = ROOT / "csrc/cuda") -> ModuleType:
    """The module <name>_emulated that bind_<name>.cpp defines over <name>.cu, in this process's mode.

    Skips the test where a compiler is missing; a source that does not compile is an error.
    """
    if (lack := missing()) is not None:
        pytest.skip(lack)
    spec = importlib.util.spec_from_file_location(f"{name}_emulated", build(name, MODE, folder))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The order in which blocks, warps and threads run. Test files import it."""
    monkeypatch.setenv("EXSSNET_EMULATOR_ORDER", request.param)
    return str(request.param)


def environment(mode: str) -> dict[str, str]:
    """Of a process that runs kernels in a mode."""
    variables = dict(os.environ, EXSSNET_EMULATOR_MODE=mode)
    if mode == "sanitize":
        commands = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so")]
        found = [subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in commands]
        if not all(Path(library).is_absolute() for library in found):
            pytest.skip("this g++ has no AddressSanitizer or no UBSan")
        variables["LD_PRELOAD"] = ":".join(found)
        variables["ASAN_OPTIONS"] = "detect_leaks=0:detect_odr_violation=0"
        variables["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return variables


other_modes = pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "plain"] if MODE == "plain" else [])
"""For the one test of a file that calls `run_again`."""


def run_again(file: str, mode: str) -> None:
    """Runs a test file in another mode, and fails with its output."""
    if (lack := missing()) is not None:
        pytest.skip(lack)
    command = [sys.executable, "-m", "pytest", *WHOLE, "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=ROOT, env=environment(mode), capture_output=True, text=True)
    assert done.returncode == 0, f"in mode {mode}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
