"""How the kernels are loaded, and what is told when a library is missing or does not load."""

import importlib.util
from pathlib import Path

import pytest

from exssnet.kernels import native as native_library


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load` says of the libraries is put back afterwards."""
    monkeypatch.setattr(native_library, "missing", None)
    monkeypatch.setattr(native_library, "missing_cuda", native_library.missing_cuda)


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXSSNET_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^EXSSNET_BACKEND must be one of reference, native, triton, got 'fast'$"):
        native_library.load()


@pytest.mark.usefixtures("unloaded")
def test_missing_library_is_told_by_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EXSSNET_BACKEND", raising=False)
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native.py"))
    with pytest.warns(UserWarning, match=r"reference in plain PyTorch.*reinstall with a C\+\+20 compiler") as told:
        native_library.load()
    assert len(told) == 1
    assert native_library.missing is not None


@pytest.mark.usefixtures("unloaded")
def test_library_that_does_not_load_is_told_by_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EXSSNET_BACKEND", raising=False)
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "_native.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="_native.so does not load in torch") as told:
        native_library.load()
    assert len(told) == 1


@pytest.mark.usefixtures("unloaded")
def test_backend_asked_for_is_silent_about_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXSSNET_BACKEND", "reference")
    native_library.load()
    assert native_library.missing == "EXSSNET_BACKEND=reference"


def test_kernels_under_a_foreign_name_are_refused() -> None:
    spec = importlib.util.spec_from_file_location("kernels", Path(native_library.__file__).parent / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"^this folder is the package exssnet\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
