"""Builds the native libraries against torch's stable ABI: one wheel for every Python and every torch from 2.10 on.

There are two libraries. _native holds the kernels for CPUs. _cuda holds those for GPUs; it is built if nvcc and a torch
with CUDA are installed. It is separate because a torch without CUDA cannot load it.

If a library cannot be built, there is a warning, and the package falls back to its reference in plain PyTorch.

Environment variables (a switch is 1, true, yes or on; or 0, false, no or off):

EXSSNET_NATIVE        1: a library that does not compile is an error. 0: neither library is built.
FORCE_CUDA            1: a build without _cuda is an error. 0: _cuda is not built.
TORCH_CUDA_ARCH_LIST  GPU architectures, for example "8.0;9.0+PTX". Default: those of this machine, or all supported, as
                      far as nvcc knows them; and PTX of the oldest, which every newer chip translates for itself.
CUDA_HOME             The folder of the CUDA toolkit.
MAX_JOBS              Number of compilers that run at once.
CXX                   The C++ compiler.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
OLDEST_TORCH = "0x020a000000000000"  # 2.10: the libraries use no newer symbols
CHIPS = [80, 90, 100, 120]  # code for 8.0 also runs on 8.6 and 8.9
LAST_LINES = 5  # of what a compiler says

SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def switch(name: str) -> bool | None:
    """The value of a switch in the environment, in upper or lower case; None if it is not set."""
    value = os.environ.get(name, "").strip()
    if value and value.lower() not in SWITCH:
        raise SystemExit(f"exssnet: {name} must be one of {', '.join(SWITCH)}, got {value[:80]!r}.")
    return SWITCH.get(value.lower())


def find_torch() -> Path | None:
    """Folder of the installed torch, even if build isolation hides it from `import`."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").exists()), None)


class Wheel(bdist_wheel):
    """The libraries use no Python symbols, so the tag names only the platform. Without a library the wheel is pure."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class Modules(build_py):
    """Installs the benchmarks, but not their test files."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if not module[1].startswith("test_")]


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        """Build a library. If it is optional and fails, it is removed from the distribution."""
        asked = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not asked.isdecimal() or int(asked) < 1:
            raise SystemExit(f"exssnet: MAX_JOBS must be a number of compilers of at least 1, got {asked!r}.")
        cuda = ext.name.endswith("_cuda")
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # from an earlier build with other sources
        try:
            torch = find_torch()
            if torch is None:
                raise RuntimeError("torch >= 2.10 was not found, and its headers are needed: install torch first")
            (self.build_cuda if cuda else self.build_native)(ext, torch, int(asked))
        except Exception as error:
            what = "CUDA kernels" if cuda else "native library"
            name = "FORCE_CUDA" if cuda and switch("FORCE_CUDA") else "EXSSNET_NATIVE"
            if not ext.optional:
                raise SystemExit(f"exssnet: {name}=1, but the {what} did not compile: {error}.") from error
            print(f"exssnet: installed without the {what}, which did not compile: {error}.", file=sys.stderr)
            self.distribution.ext_modules = [e for e in self.distribution.ext_modules if e is not ext]

    def copy_extensions_to_source(self) -> None:
        """Used by editable installations. An old library is deleted even if no new one was built."""
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_native(self, ext: Extension, torch: Path, jobs: int) -> None:
        headers = str(torch / "include")
        if os.name == "nt":
            flags = ["/std:c++20", "/O2", "/EHsc", "/external:I", headers]  # not tested on Windows
        else:
            flags = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-isystem", headers]

        def compile_one(source: str) -> str:
            options = {"include_dirs": ["csrc"], "extra_postargs": flags, "depends": ext.depends}
            macros = [("TORCH_TARGET_VERSION", OLDEST_TORCH)]
            return self.compiler.compile([source], output_dir=self.build_temp, macros=macros, **options)[0]

        try:
            with ThreadPoolExecutor(jobs) as pool:
                objects = list(pool.map(compile_one, ext.sources))
            self.compiler.link_shared_object(
                objects, self.get_ext_fullpath(ext.name), libraries=["torch_cpu"], library_dirs=[str(torch / "lib")],
                target_lang="c++",
            )  # fmt: skip
        except Exception as error:
            raise RuntimeError(f"{error}; a C++20 compiler is needed (g++ >= 10, clang >= 12)") from error

    def build_cuda(self, ext: Extension, torch: Path, jobs: int) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        flags = nvcc_flags(torch)

        def compile_one(source: str, code: list[str]) -> str:
            object_file = Path(self.build_temp) / f"{source}.{'obj' if os.name == 'nt' else 'o'}"
            object_file.parent.mkdir(parents=True, exist_ok=True)
            run_nvcc(*flags, *(code if source.endswith(".cu") else []), "-c", source, "-o", str(object_file))
            return str(object_file)

        if cuda_of(torch) is None:
            raise RuntimeError(f"the torch in {torch} is built without CUDA")
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(partial(compile_one, code=chips()), ext.sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        run_nvcc("-shared", *objects, "-o", str(target), f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda")


def cuda_of(torch: Path) -> str | None:
    """The CUDA version of a torch, read from its files without an import; None for a torch without CUDA."""
    version = re.search(r"^cuda\b.*'([\d.]+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return version[1] if version else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def nvcc_flags(torch: Path) -> list[str]:
    """The options of nvcc for every source file. Those for Windows are not tested."""
    host = "/O2,/EHsc,/MD" if os.name == "nt" else "-fPIC,-fvisibility=hidden"
    return [
        "-std=c++20", "-O3", "-Icsrc", "-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        "-DUSE_CUDA", "-Xcompiler", host,
    ]  # fmt: skip


def numbers_in(pattern: str, *command: str) -> list[int]:
    """The compute capabilities, times ten, that a command prints, ascending."""
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({10 * int(major) + int(minor) for major, minor in re.findall(pattern, output, re.MULTILINE)})


def chips() -> list[str]:
    """The -gencode options of nvcc for the GPU architectures to build for.

    Code for X.0 runs on chips X.y too. PTX runs on all later chips.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:
        nvcc = str(find_nvcc())
        known = [n for n in numbers_in(r"^compute_(\d+)(\d)$", nvcc, "--list-gpu-arch") if n >= CHIPS[0]]
        if not known:
            raise ValueError(f"{nvcc} --list-gpu-arch names no compute capability from 8.0 on")
        here = numbers_in(r"^(\d+)\.(\d)$", "nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        if here and here[-1] < CHIPS[0]:
            raise ValueError(f"the CUDA kernels need chips of compute capability 8.0 or newer, got {here[-1] / 10}")
        own = (chip if chip in known else chip // 10 * 10 for chip in here or CHIPS)
        images = sorted({*own}.intersection(known))
        options = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in images]
        portable = sorted({known[0], *images[-1:]})
        return options + [f"-gencode=arch=compute_{n},code=compute_{n}" for n in portable]
    options = []
    for chip in re.split(r"[;\s]+", asked.strip()):
        known = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", chip)
        if known is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must be a list like 8.0;9.0+PTX, got {asked!r}")
        if int(known[1]) < 8:
            raise ValueError(f"the CUDA kernels need chips of compute capability 8.0 or newer, got {chip}")
        number = known[1] + known[2]
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if known[3]:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def run_nvcc(*arguments: str) -> None:
    done = subprocess.run([str(find_nvcc()), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-LAST_LINES:]
        raise RuntimeError("\n".join([f"nvcc {' '.join(arguments)} ended with", *said]))


def libraries() -> list[Extension]:
    native, cuda = switch("EXSSNET_NATIVE"), switch("FORCE_CUDA")
    if native is False:
        if cuda:
            raise SystemExit("exssnet: FORCE_CUDA=1 asks for CUDA kernels and EXSSNET_NATIVE=0 for none: unset one.")
        return []
    if cuda:  # checked before minutes of compiling
        if find_nvcc() is None:
            raise SystemExit("exssnet: FORCE_CUDA=1, but nvcc was not found; CUDA_HOME says where it is.")
        try:
            chips()
        except ValueError as error:
            raise SystemExit(f"exssnet: FORCE_CUDA=1, but {error}.") from None

    def files(*patterns: str) -> list[str]:
        return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]

    everything = files("csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.h")  # goes into a source distribution
    sources_of = [("_native", files("csrc/torch/cpu/*.cpp", "csrc/cpu/*.cpp"))]
    torch = find_torch()
    if cuda or (cuda is None and find_nvcc() is not None and torch is not None and cuda_of(torch) is not None):
        sources_of.append(("_cuda", files("csrc/torch/cuda/*.cpp", "csrc/cuda/*.cu")))
    return [
        Extension(
            f"exssnet.kernels.{name}", sources, depends=everything, language="c++",
            optional=not (native or (cuda and name == "_cuda")),
        )
        for name, sources in sources_of
    ]  # fmt: skip


extensions = libraries()
setup(
    packages=[*find_packages(include=["exssnet*"]), "exssnet.kernels", "exssnet.bench", "exssnet_console"],
    package_dir={
        "exssnet.kernels": "kernels",
        "exssnet.bench": "benchmarks",
        "exssnet_console": "exssnet/io/console",  # entry point of the command: help and version work without torch
    },
    package_data={"exssnet": ["py.typed"], "exssnet.experiments.recipes": ["*.yaml"]},
    ext_modules=extensions,
    # If torch is missing, the build frontend is asked to install it into the build environment.
    setup_requires=["torch>=2.10"] if extensions and find_torch() is None else [],
    cmdclass={"build_py": Modules} | ({"build_ext": Build, "bdist_wheel": Wheel} if extensions else {}),
)
