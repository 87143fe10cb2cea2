"""Installation: what is in a wheel, what happens without a compiler or the library, and which backend runs."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

import exssnet
from exssnet import bench, kernels
from exssnet.kernels import triton_backend
from exssnet.kernels.native import BACKENDS
from exssnet.kernels.registry import OPERATORS

ROOT = Path(__file__).parent.parent

USE = """
import torch, exssnet
from exssnet.kernels import native
layer = exssnet.SupermaskLinear(7, 5, density=0.3)
x = torch.randn(4, 7)
assert torch.allclose(layer(x), x @ (layer.dense_weight * layer.mask()).t(), atol=1e-6)
layer.use_values(layer.mask(), layer.mask())
layer(x).sum().backward()
print("missing:", native.missing)
"""


def execute(command: list[str], cwd: Path, path: list[Path] | None = None, **environment: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command; `path` is searched for modules before all else."""
    outside = [p for p in sys.path if p and not Path(p).is_relative_to(ROOT / "tests")]
    found = [*map(str, path or []), *outside]
    inherited = {n: v for n, v in os.environ.items() if n not in ("EXSSNET_BACKEND", "EXSSNET_NATIVE", "FORCE_CUDA")}
    environment = inherited | {"PYTHONPATH": os.pathsep.join(found)} | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def python(code: str, cwd: Path, path: list[Path] | None = None, **environment: str) -> tuple[int, str, str]:
    """The same of Python code; of all warnings it prints ours alone."""
    return execute([sys.executable, "-W", "ignore", "-W", "always:exssnet", "-c", code], cwd, path, **environment)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no native library."""
    ignored = shutil.ignore_patterns("kernels", "bench", "__pycache__")
    shutil.copytree(Path(exssnet.__file__).parent, tmp_path / "exssnet", ignore=ignored)
    ignored = shutil.ignore_patterns("_native*", "_cuda*", "__pycache__")
    for folder in (kernels, bench):
        to = tmp_path / Path(*folder.__name__.split("."))
        shutil.copytree(Path(folder.__file__).parent, to, ignore=ignored)
    return tmp_path


def copied_sources(to: Path) -> Path:
    """A copy of what is needed to build, without anything that was built."""
    try:  # not by import: setuptools takes the place of distutils in this process
        metadata.version("pip")
        setuptools = int(metadata.version("setuptools").partition(".")[0])
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"builds need pip and setuptools >= 77, {error}")
    if setuptools < 77:
        pytest.skip(f"builds need setuptools >= 77, this is {setuptools}")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    built = shutil.ignore_patterns("*.so", "*.dll", "__pycache__", "*.egg-info")
    for name in ("exssnet", "kernels", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, to / name, ignore=built, symlinks=True)
    for link in ("kernels", "bench"):
        (to / "exssnet" / link).unlink(missing_ok=True)
    return to


@pytest.fixture
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied_sources(tmp_path_factory.mktemp("sources"))


# Backends


def test_the_reference_backend_needs_no_library_and_does_not_warn(tmp_path: Path) -> None:
    status, said, errors = python(USE, tmp_path, EXSSNET_BACKEND="reference")
    assert (status, said, errors) == (0, "missing: EXSSNET_BACKEND=reference\n", "")


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    status, _, errors = python("import exssnet", tmp_path, EXSSNET_BACKEND="cuda")
    assert status == 1
    assert errors.splitlines()[-1] == f"ValueError: EXSSNET_BACKEND must be one of {', '.join(BACKENDS)}, got 'cuda'"


@pytest.mark.parametrize(
    ("interpret", "key"), [("1", "CPU"), ("True", "CPU"), ("yes", "CPU"), ("0", "CUDA"), ("OFF", "CUDA"), ("", "CUDA")]
)
def test_triton_is_interpreted_as_triton_itself_reads_it(
    monkeypatch: pytest.MonkeyPatch, interpret: str, key: str
) -> None:
    monkeypatch.setenv("EXSSNET_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert triton_backend._key() == key
    if importlib.util.find_spec("triton"):
        assert importlib.import_module("triton.knobs").runtime.interpret == (key == "CPU")


def test_an_unknown_switch_of_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXSSNET_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "perhaps")
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET must be one of 1, true, .*, n, got 'perhaps'"):
        triton_backend._key()


def test_info_is_a_module_command_too(tmp_path: Path) -> None:
    status, said, errors = execute([sys.executable, "-m", "exssnet", "info"], tmp_path, EXSSNET_BACKEND="reference")
    assert status == 0, errors
    assert said.startswith(f"exssnet {exssnet.__version__}, torch {torch.__version__}, ")
    assert "native  not loaded: EXSSNET_BACKEND=reference" in said
    assert "csrc/" not in said
    assert said.count("kernels/reference.py") == 2 * len(OPERATORS)


@pytest.mark.parametrize("library", ["absent", "damaged"])
def test_without_a_sound_library_one_warning_is_given_and_all_works(package: Path, library: str) -> None:
    if library == "damaged":
        (package / "exssnet/kernels/_native.so").write_bytes(b"no library")
    status, said, errors = python(USE + "import exssnet.cli.commands, exssnet.kernels", package, [package])
    assert status == 0, errors
    why = {"absent": "the package was installed without it; reinstall with", "damaged": "_native.so does not load in"}
    assert said.startswith(f"missing: {why[library]}")
    assert errors.count("Warning") == 1
    assert f"UserWarning: exssnet runs on its reference in plain PyTorch, native kernels: {why[library]}" in errors


def test_the_folder_of_kernels_is_no_package_of_its_own() -> None:
    status, _, errors = python("import kernels", ROOT, [ROOT])
    assert status == 1
    sentence = "this folder is the package exssnet.kernels: install exssnet and import it by that name"
    assert errors.splitlines()[-1] == f"ImportError: {sentence}"


# Builds


def build(sources: Path, to: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(to), "--build-lib", str(to)]
    return execute([*command, *arguments], sources, **environment)


def test_a_build_that_must_have_cuda_is_refused_without_nvcc(sources: Path, tmp_path: Path) -> None:
    status, said, errors = build(sources, tmp_path, FORCE_CUDA="1", CUDA_HOME="/nonexistent", EXSSNET_NATIVE="1")
    assert (status, said) == (1, "")
    assert errors == "exssnet: FORCE_CUDA=1, but nvcc was not found; CUDA_HOME says where it is.\n"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("7.5", "the CUDA kernels need chips of compute capability 8.0 or newer, got 7.5"),
        ("9.0;ten", "TORCH_CUDA_ARCH_LIST must be a list like 8.0;9.0+PTX, got '9.0;ten'"),
    ],
)
def test_chips_without_the_kernels_are_refused(sources: Path, tmp_path: Path, asked: str, sentence: str) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(0o755)
    status, said, errors = build(
        sources, tmp_path, FORCE_CUDA="1", CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST=asked, EXSSNET_NATIVE="1"
    )
    assert (status, said) == (1, "")
    assert errors == f"exssnet: FORCE_CUDA=1, but {sentence}.\n"


CHIPS_OF = """
import json, os, setuptools
setuptools.setup = lambda **_: None
found = {"__file__": "setup.py", "__name__": "setup"}
exec(open("setup.py").read(), found)
told = []
for known, here in json.loads(os.environ["CASES"]):
    os.environ["KNOWN"], os.environ["HERE"] = known, here
    try:
        told.append(" ".join(option.rpartition("code=")[2] for option in found["chips"]()))
    except ValueError as error:
        told.append(str(error))
print(json.dumps(told))
torch = found["Path"]("torch")
os.name = "nt"
print(found["nvcc_flags"](torch))
"""
ONLY_CUDA = """
import os, setuptools, sys
setup = setuptools.setup
setuptools.setup = lambda ext_modules, **options: setup(
    ext_modules=[e for e in ext_modules if e.name.endswith("_cuda")], **options
)
sys.argv = ["setup.py", "-q", "build_ext", "--build-temp", os.environ["TO"], "--build-lib", os.environ["TO"]]
exec(open("setup.py").read(), {"__file__": "setup.py", "__name__": "__main__"})
"""


def fake_tools(folder: Path, compiler: str = "") -> dict[str, str]:
    """The environment with an nvcc that lists KNOWN and else runs `compiler`, and an nvidia-smi that prints HERE."""
    lists = 'if [ "$1" = --list-gpu-arch ]; then for n in $KNOWN; do echo compute_$n; done; exit; fi'
    for name, script in (("nvcc", f"{lists}\n{compiler}"), ("nvidia-smi", "printf '%s\\n' $HERE")):
        tool = folder / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"CUDA_HOME": str(folder), "PATH": path, "TORCH_CUDA_ARCH_LIST": "", "KNOWN": "80 90", "HERE": ""}


def test_nvcc_is_asked_for_what_it_knows_and_every_chip_from_ampere_on_has_an_image(tmp_path: Path) -> None:
    cuda_13 = "75 80 86 87 88 89 90 100 110 103 120 121"
    cases = {
        (cuda_13, ""): "sm_80 sm_90 sm_100 sm_120 compute_80 compute_120",
        ("50 75 80 86 89 90", ""): "sm_80 sm_90 compute_80 compute_90",  # CUDA 12.0
        ("80 90 100 101 120", "10.3 12.1 9.0 10.3"): "sm_90 sm_100 sm_120 compute_80 compute_120",
        (cuda_13, "11.0"): "sm_110 compute_80 compute_110",
        ("80 90", "11.0"): "compute_80",
        (cuda_13, "7.0 7.5"): "the CUDA kernels need chips of compute capability 8.0 or newer, got 7.5",
        ("75", ""): f"{tmp_path}/bin/nvcc --list-gpu-arch names no compute capability from 8.0 on",
    }
    tools = fake_tools(tmp_path) | {"CASES": json.dumps([*cases]), "FORCE_CUDA": "0"}
    status, said, errors = python(CHIPS_OF, ROOT, **tools)
    assert status == 0, errors
    chips, windows = said.splitlines()
    assert json.loads(chips) == [*cases.values()]
    assert "fPIC" not in windows


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.parametrize("asked", ["", "1"])
def test_cuda_kernels_that_do_not_compile_are_told_with_the_last_lines_of_the_compiler(
    tmp_path: Path, asked: str
) -> None:
    tools = fake_tools(tmp_path, 'for line in 1 2 3 4 5 6 7; do echo "line $line" >&2; done; exit 2')
    status, _, errors = python(ONLY_CUDA, ROOT, **tools, EXSSNET_NATIVE=asked, TO=str(tmp_path))
    assert status == (1 if asked else 0)
    sentence, *lines = errors.splitlines()[-6:]
    start = "EXSSNET_NATIVE=1, but the CUDA kernels" if asked else "installed without the CUDA kernels, which"
    assert sentence.startswith(f"exssnet: {start} did not compile: nvcc -std=c++20 ")
    assert sentence.endswith(" ended with")
    assert lines == [*(f"line {n}" for n in range(3, 7)), "line 7."]


@pytest.mark.parametrize(("native", "cuda"), [("0", "1"), ("false", "yes"), (" No", "TRUE"), ("off", "on")])
def test_cuda_kernels_alone_cannot_be_asked_for(sources: Path, tmp_path: Path, native: str, cuda: str) -> None:
    status, said, errors = build(sources, tmp_path, FORCE_CUDA=cuda, EXSSNET_NATIVE=native)
    assert (status, said) == (1, "")
    assert errors == "exssnet: FORCE_CUDA=1 asks for CUDA kernels and EXSSNET_NATIVE=0 for none: unset one.\n"


@pytest.mark.parametrize("name", ["FORCE_CUDA", "EXSSNET_NATIVE"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(sources: Path, tmp_path: Path, name: str) -> None:
    status, said, errors = build(
        sources, tmp_path, **{"FORCE_CUDA": "0", "EXSSNET_NATIVE": "0"} | {name: "perhaps\x1b"}
    )
    assert (status, said) == (1, "")
    known = "1, true, yes, on, 0, false, no, off"
    assert errors == f"exssnet: {name} must be one of {known}, got 'perhaps\\x1b'.\n"


NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "FORCE_CUDA": "0"}


@pytest.mark.parametrize(
    ("asked", "status", "start"),
    [
        ({}, 0, "exssnet: installed without the native library, which did not compile: "),
        ({"EXSSNET_NATIVE": "1"}, 1, "exssnet: EXSSNET_NATIVE=1, but the native library did not compile: "),
    ],
    ids=["warned", "refused"],
)
def test_a_missing_compiler_is_told_in_one_sentence(
    sources: Path, tmp_path: Path, asked: dict[str, str], status: int, start: str
) -> None:
    found, _, errors = build(sources, tmp_path, **NO_COMPILER, **asked)
    assert found == status
    assert "Traceback" not in errors
    sentence = errors.splitlines()[-1]
    assert sentence.startswith(start)
    assert "/nonexistent/c" in sentence
    assert sentence.endswith("; a C++20 compiler is needed (g++ >= 10, clang >= 12).")
    assert not list(tmp_path.rglob("_native*"))


@pytest.mark.parametrize("arguments", [[], ["--inplace"]], ids=["apart", "inplace"])
def test_an_earlier_library_does_not_stay_where_none_was_built(
    sources: Path, tmp_path: Path, arguments: list[str]
) -> None:
    folder = sources / "kernels" if arguments else tmp_path / "exssnet/kernels"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_native.so").write_bytes(b"of other sources")
    status, _, errors = build(sources, tmp_path, *arguments, **NO_COMPILER)
    assert (status, errors.count("installed without the native library")) == (0, 1)
    assert not list(folder.glob("_native*"))


@pytest.mark.parametrize("asked", ["", "1"])
def test_without_torch_the_library_is_left_out_unless_it_was_asked_for(
    sources: Path, tmp_path: Path, asked: str
) -> None:
    """In an environment that has setuptools alone."""
    status, _, errors = execute([sys.executable, "-m", "venv", "--without-pip", "env"], tmp_path)
    assert status == 0, errors
    (tmp_path / "path").mkdir()
    site = Path(str(metadata.distribution("setuptools").locate_file("")))
    for part in [*site.glob("setuptools*"), site / "_distutils_hack"]:
        (tmp_path / "path" / part.name).symlink_to(part)
    command = [str(next(tmp_path.glob("env/*/python"))), "-c", BUILD_WHEEL, str(tmp_path)]
    status, _, errors = execute(command, sources, PYTHONPATH=str(tmp_path / "path"), EXSSNET_NATIVE=asked)
    why = "did not compile: torch >= 2.10 was not found, and its headers are needed: install torch first.\n"
    if asked:
        assert (status, list(tmp_path.glob("*.whl"))) == (1, [])
        assert errors.endswith(f"exssnet: EXSSNET_NATIVE=1, but the native library {why}")
    else:
        assert status == 0, errors
        assert f"exssnet: installed without the native library, which {why}" in errors
        assert [p.name for p in tmp_path.glob("*.whl")] == [f"exssnet-{exssnet.__version__}-py3-none-any.whl"]


BUILD_WHEEL = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def wheel(sources: Path, to: Path, **environment: str) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    status, _, errors = execute([*command, "-w", str(to), str(sources)], to, **environment)
    assert status == 0, errors
    (file,) = to.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with wheel(
        copied_sources(tmp_path_factory.mktemp("sources")), tmp_path_factory.mktemp("pure"), EXSSNET_NATIVE="0"
    ) as found:
        yield found


def test_without_the_native_part_the_wheel_is_pure(pure: zipfile.ZipFile) -> None:
    assert Path(str(pure.filename)).name == f"exssnet-{exssnet.__version__}-py3-none-any.whl"


def test_a_wheel_whose_library_did_not_compile_is_pure(sources: Path, tmp_path: Path, pure: zipfile.ZipFile) -> None:
    with wheel(sources, tmp_path, **NO_COMPILER) as found:
        assert Path(str(found.filename)).name == Path(str(pure.filename)).name
        assert found.namelist() == pure.namelist()
        (told,) = [name for name in found.namelist() if name.endswith("/WHEEL")]
        assert found.read(told) == pure.read(told)


def test_the_wheel_holds_the_whole_package_and_nothing_else(pure: zipfile.ZipFile) -> None:
    inside = {name for name in pure.namelist() if ".dist-info/" not in name}
    files = (p for kind in ("*.py", "*.yaml") for p in (ROOT / "exssnet").rglob(kind))
    expected = {f"exssnet/{p.relative_to(ROOT / 'exssnet')}" for p in files}
    expected |= {f"exssnet/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    expected |= {f"exssnet/bench/{p.name}" for p in (ROOT / "benchmarks").glob("*.py") if p.name[:5] != "test_"}
    assert {"exssnet/py.typed", "exssnet/tasks/streams.py", "exssnet/ops/sparse.py"} <= inside
    assert inside == expected | {"exssnet/py.typed", "exssnet_console/__init__.py"}


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--version"], 0), (["trian"], 2)])
def test_help_version_and_wrong_commands_need_no_torch(
    pure: zipfile.ZipFile, tmp_path: Path, arguments: list[str], status: int
) -> None:
    pure.extractall(tmp_path)
    code = f"import sys; sys.modules['torch'] = None; from exssnet_console import main; main({arguments})"
    found, said, errors = python(code, tmp_path, [tmp_path])
    assert found == status
    assert "Traceback" not in errors
    assert exssnet.__version__ in said or "reproduce" in said + errors


def test_the_wheel_installs_the_command(pure: zipfile.ZipFile) -> None:
    (entry,) = [name for name in pure.namelist() if name.endswith("entry_points.txt")]
    assert "exssnet = exssnet_console:main" in pure.read(entry).decode()
    (told,) = [name for name in pure.namelist() if name.endswith("METADATA")]
    assert "Requires-Dist: torch>=2.10" in pure.read(told).decode()
    assert any(name.endswith("LICENSE") for name in pure.namelist())


def test_the_source_distribution_holds_all_that_is_compiled(sources: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    status, said, errors = execute([sys.executable, "-c", code], sources)
    assert status == 0, errors
    shutil.unpack_archive(tmp_path / said.split()[-1], tmp_path)
    (unpacked,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    for folder in ("csrc", "kernels", "exssnet", "benchmarks"):
        there = {p.relative_to(unpacked) for p in (unpacked / folder).rglob("*") if p.is_file()}
        expected = {p.relative_to(sources) for p in (sources / folder).rglob("*") if p.is_file()}
        assert {p for p in expected if p.parts[0] != "benchmarks" or p.name[:5] != "test_"} <= there
    assert (unpacked / "setup.py").exists()


@pytest.mark.proof
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_a_native_wheel_is_for_every_python_and_its_library_loads(sources: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"  # does not optimise, which takes most of the time
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    options = {"CC": str(compiler), "CXX": str(compiler), "MAX_JOBS": "2", "FORCE_CUDA": "0"}
    with wheel(sources, tmp_path, **options) as found:
        assert re.fullmatch(r"exssnet-[\d.]+-py3-none-(?!any)\w+\.whl", Path(str(found.filename)).name)
        libraries = [name for name in found.namelist() if "_native" in name]
        assert libraries == ["exssnet/kernels/_native" + Path(libraries[0]).suffix]
        found.extractall(tmp_path / "site")
    status, said, errors = python(USE, tmp_path, [tmp_path / "site"])
    assert (status, said, errors) == (0, "missing: None\n", "")


@pytest.mark.parametrize("jobs", ["0", "x"])
def test_a_senseless_number_of_compilers_is_refused(sources: Path, tmp_path: Path, jobs: str) -> None:
    status, _, errors = build(sources, tmp_path, MAX_JOBS=jobs)
    assert status == 1
    assert errors == f"exssnet: MAX_JOBS must be a number of compilers of at least 1, got {jobs!r}.\n"
