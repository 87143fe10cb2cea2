"""What nvcc makes of csrc/cuda: no warning, no spilled register, no stack, and no more registers and shared memory than
budgets.json allows, beside the emulator. As a script, `--write` writes it and `--table` prints a table for the docs.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda import harness

pytestmark = pytest.mark.proof

SOURCES = sorted((harness.ROOT / "csrc/cuda").glob("*.cu"))
BUDGETS = harness.HERE / "budgets.json"
FLAGS = ["-std=c++20", "-O3", "-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    name: str
    shared: int
    """Bytes; a block takes 1 KB more than it asks for."""
    warps: int = 64
    blocks: int = 32
    registers: int = 1 << 16


CHIPS = {
    "sm_80": Chip("A100", 164 << 10),
    "sm_90": Chip("H100", 228 << 10),
    "sm_100": Chip("B200", 228 << 10),
}


@dataclass(frozen=True)
class Usage:
    """Of one kernel: registers a thread, bytes of static shared memory, bytes of stack and spills, threads a block."""

    registers: int
    shared: int
    stack: int
    spills: int
    threads: int


def rounded(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(chip: Chip, usage: Usage, dynamic_shared: int = 0) -> float:
    """Warps that a multiprocessor holds over those it could, as CUDA's occupancy calculator counts them.

    Registers are given to warps in units of 256, to four partitions of the chip; shared memory in units of 128 bytes.
    """
    warps = rounded(usage.threads, 32) // 32
    by_registers = chip.registers // 4 // rounded(usage.registers * 32, 256) * 4 // warps
    by_shared = chip.shared // rounded(usage.shared + dynamic_shared + 1024, 128)
    return min(chip.warps // warps, chip.blocks, by_registers, by_shared) * warps / chip.warps


@functools.cache
def nvcc() -> str:
    """Its path; skips the test where there is none, or one that does not know the chips."""
    found = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("CUDA_HOME", "") + "/bin", os.environ["PATH"]]))
    if found is None:
        pytest.skip("no nvcc to compile the CUDA kernels with")
    known = subprocess.run([found, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if lack := set(CHIPS) - set(known):
        pytest.skip(f"this nvcc knows no {', '.join(sorted(lack))}")
    return found


@functools.cache
def release() -> str:
    output = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release ([\d.]+)", output)
    assert version is not None
    return version[1]


def short(names: list[str]) -> list[str]:
    """`scan<float, 4>` for the mangled name of exssnet::cuda::(anonymous namespace)::scan<float, 4>(...)."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    noise = re.compile(r"\(anonymous namespace\)::|exssnet::\w+::|\([\w: ]+\)(?=-?\d)|^void ")
    return [re.sub(r"\(.*\)$", "", noise.sub("", name)) for name in done.stdout.splitlines()]


@functools.cache
def compiled(source: Path) -> str:
    """ptxas' report on all kernels for all chips, then their PTX for the first one; kept until sources change."""
    chips = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in CHIPS]
    command = [nvcc(), *FLAGS, *chips, "-I", str(harness.ROOT / "csrc")]
    content = hashlib.sha256(repr((command, release())).encode())
    for _, text in sorted(harness.included(source).items()):
        content.update(text)
    kept = harness.ROOT / "build/ptxas" / f"{source.stem}-{content.hexdigest()[:16]}.txt"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            keep = ["-keep", "-keep-dir", folder, "-c", "-o", f"{folder}/object.o"]
            done = subprocess.run([*command, *keep, str(source)], capture_output=True, text=True)
            assert done.returncode == 0, f"nvcc on {source.name}:\n{done.stdout}{done.stderr}"
            ptx = "".join(file.read_text() for file in sorted(Path(folder).glob(f"{source.stem}*.ptx"))[:1])
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(done.stderr + ptx)
        part.rename(kept)
    return kept.read_text()


def usage_of(source: Path) -> dict[str, dict[str, Usage]]:
    """By kernel and chip."""
    text = compiled(source)
    threads = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", text))
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    rows = re.findall(pattern, text, re.DOTALL)
    names = dict(zip([row[0] for row in rows], short([row[0] for row in rows]), strict=True)) if rows else {}
    assert len(set(names.values())) == len(names), f"kernels of one name in {source.name}: {sorted(names.values())}"
    result: dict[str, dict[str, Usage]] = {name: {} for name in sorted(names.values())}
    for mangled, chip, stack, stores, loads, registers, rest in rows:
        assert mangled in threads, f"{names[mangled]} in {source.name} has no __launch_bounds__"
        shared = re.search(r"(\d+) bytes smem", rest)
        result[names[mangled]][chip] = Usage(
            int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads), int(threads[mangled])
        )
    return result


@pytest.mark.parametrize(
    ("registers", "static", "threads", "dynamic", "warps"),
    [
        (32, 0, 256, 0, (64, 64, 64)),
        (40, 0, 256, 0, (48, 48, 48)),
        (33, 0, 1024, 0, (32, 32, 32)),
        (128, 4096, 256, 0, (16, 16, 16)),
        (168, 0, 128, 0, (12, 12, 12)),
        (255, 0, 64, 0, (8, 8, 8)),
        (40, 49152, 256, 0, (24, 32, 32)),
        (40, 20000, 128, 30000, (12, 16, 16)),
        (72, 1000, 96, 0, (27, 27, 27)),
        (16, 0, 32, 0, (32, 32, 32)),
    ],
)
def test_occupancy_is_that_of_cuda(
    registers: int, static: int, threads: int, dynamic: int, warps: tuple[int, ...]
) -> None:
    """The expected warps are those of cuda_occupancy.h of CUDA 13.0."""
    usage = Usage(registers, static, 0, 0, threads)
    assert [occupancy(chip, usage, dynamic) * chip.warps for chip in CHIPS.values()] == list(warps)


sources = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


@sources
def test_compiles_without_warnings_for_every_chip(source: Path) -> None:
    kernels = usage_of(source)
    assert kernels
    assert all(set(by_chip) == set(CHIPS) for by_chip in kernels.values())


@sources
def test_no_kernel_spills_or_has_a_stack(source: Path) -> None:
    spilling = {
        (name, chip): f"{usage.stack} bytes of stack, {usage.spills} of spills"
        for name, by_chip in usage_of(source).items()
        for chip, usage in by_chip.items()
        if usage.stack or usage.spills
    }
    assert spilling == {}


@sources
def test_registers_and_shared_memory_keep_to_the_budgets(source: Path) -> None:
    budgets = json.loads(BUDGETS.read_text())
    if release() != budgets["nvcc"]:
        pytest.skip(f"the budgets are those of nvcc {budgets['nvcc']}, this is {release()}")
    allowed = budgets["kernels"].get(source.stem, {})
    write = f"PYTHONPATH=tests/helpers python tests/kernels/{Path(__file__).name} --write"
    kernels = usage_of(source)
    assert set(kernels) == set(allowed), f"kernels that came or went; if that is right, run {write}"
    beyond = [
        f"{name} on {chip}: {what} {getattr(usage, what)}, allowed are {allowed[name][chip][what]}"
        for name, by_chip in kernels.items()
        for chip, usage in by_chip.items()
        for what in ("registers", "shared")
        if getattr(usage, what) > allowed[name][chip][what]
    ]
    assert beyond == [], f"if that is worth it, run {write}"


def test_vectors_are_loaded_whole() -> None:
    """Where nvcc does not see their alignment, it loads them byte by byte."""
    assert re.findall(r"\bld\.(?!param)\S*\.[us]8\b", compiled(harness.ROOT / "csrc/cuda/sparse.cu")) == []


def test_budgets_are_for_files_that_exist() -> None:
    assert set(json.loads(BUDGETS.read_text())["kernels"]) <= {source.stem for source in SOURCES}


def write() -> None:
    files = []
    for source in SOURCES:
        rows = []
        for name, by_chip in usage_of(source).items():
            row = {chip: {what: getattr(by_chip[chip], what) for what in ("registers", "shared")} for chip in CHIPS}
            rows.append(f"      {json.dumps(name)}: {json.dumps(row)}")
        files.append(f"    {json.dumps(source.stem)}: {{\n" + ",\n".join(rows) + "\n    }")
    kernels = "{\n" + ",\n".join(files) + "\n  }"
    BUDGETS.write_text(f'{{\n  "nvcc": "{release()}",\n  "kernels": {kernels}\n}}\n')


def table() -> None:
    print(f"nvcc {release()}: registers of a thread, static shared memory of a block, occupancy with no dynamic one.\n")
    print("| kernel | threads |", " | ".join(f"{arch} ({chip.name})" for arch, chip in CHIPS.items()), "|")
    print("|---|---|" + "---|" * len(CHIPS))
    for source in SOURCES:
        for name, by_chip in usage_of(source).items():
            usages = [(chip, by_chip[arch]) for arch, chip in CHIPS.items()]
            cells = [f"{u.registers} reg, {u.shared} B, {occupancy(chip, u):.0%}" for chip, u in usages]
            print(f"| {source.stem}: `{name}` | {usages[0][1].threads} |", " | ".join(cells), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write budgets.json from what nvcc reports")
    parser.add_argument("--table", action="store_true", help="print registers, shared memory and occupancy")
    chosen = parser.parse_args()
    if chosen.write:
        write()
    if chosen.table:
        table()
