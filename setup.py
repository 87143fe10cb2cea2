"""Builds the native library against torch's stable ABI: one wheel for every Python and every torch from 2.10 on.

Environment: EXSSNET_NATIVE=0 skips the compiled part; FORCE_CUDA=1 refuses a build without CUDA kernels;
MAX_JOBS limits the compilers that run at once; CXX names the compiler.
"""

import importlib.util
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
OLDEST_TORCH = "0x020a000000000000"  # 2.10: the library uses no symbol that is newer


def find_torch() -> Path | None:
    """Folder of the installed torch, also when build isolation hides it from `import`."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").exists()), None)


class Wheel(bdist_wheel):
    """No Python symbol is in the library, so the tag names the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class Modules(build_py):
    """Benchmarks ship, what pytest collects of them does not."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if not module[1].startswith("test_")]


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "exssnet: torch >= 2.10 was not found, and the native library is compiled against its headers: "
                "install torch first, or set EXSSNET_NATIVE=0 to go without."
            )
        headers = str(torch / "include")
        if os.name == "nt":
            flags = ["/std:c++20", "/O2", "/external:I", headers]
        else:
            flags = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-isystem", headers]

        def compile_one(source: str) -> str:
            options = {"include_dirs": ["csrc"], "extra_postargs": flags, "depends": ext.depends}
            macros = [("TORCH_TARGET_VERSION", OLDEST_TORCH)]
            return self.compiler.compile([source], output_dir=self.build_temp, macros=macros, **options)[0]

        asked = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not asked.isdecimal() or int(asked) < 1:
            raise SystemExit(f"exssnet: MAX_JOBS must be a number of compilers of at least 1, got {asked!r}.")
        try:
            with ThreadPoolExecutor(int(asked)) as pool:
                objects = list(pool.map(compile_one, ext.sources))
            self.compiler.link_shared_object(
                objects, self.get_ext_fullpath(ext.name), libraries=["torch_cpu"], library_dirs=[str(torch / "lib")],
                target_lang="c++",
            )  # fmt: skip
        except Exception as error:
            raise SystemExit(
                f"exssnet: the native library did not compile ({error}): a C++20 compiler is needed (g++ >= 10, "
                "clang >= 12); set EXSSNET_NATIVE=0 to install without it."
            ) from error


def native() -> list[Extension]:
    if os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit("exssnet: FORCE_CUDA=1, but csrc/cuda holds no kernels: this version has none for CUDA.")
    if os.environ.get("EXSSNET_NATIVE") == "0":
        return []
    sources = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    headers = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.h"))]
    return [Extension("exssnet.kernels._native", sources, depends=headers, language="c++")]


extensions = native()
setup(
    packages=["exssnet", "exssnet.ops", "exssnet.tasks", "exssnet.kernels", "exssnet.bench"],
    package_dir={"exssnet.kernels": "kernels", "exssnet.bench": "benchmarks"},
    package_data={"exssnet": ["py.typed"]},
    ext_modules=extensions,
    # Without a torch to compile against, the front end is asked to put one into the build environment.
    setup_requires=["torch>=2.10"] if extensions and find_torch() is None else [],
    cmdclass={"build_py": Modules} | ({"build_ext": Build, "bdist_wheel": Wheel} if extensions else {}),
)
