"""The plain network of a task in files of four formats: its outputs, any batch size, and what is refused."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import logits
from networks import SmallNet, changes, finish_tasks, images, picture, small_net
from safetensors.torch import load_file
from torch import Tensor, nn

from exssnet import Phases, checkpoint, convert
from exssnet.cli.commands import run
from exssnet.continual import export
from exssnet.nn.models import MODELS


@pytest.fixture
def phases() -> Phases:
    phases = Phases(small_net())
    finish_tasks(phases)
    return phases


def differs(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.filterwarnings("ignore")
def test_a_pt2_file_gives_the_logits_of_its_task_for_any_batch(phases: Phases, tmp_path: Path) -> None:
    before = picture(phases)
    worst = phases.export(0, tmp_path / "file.pt2", "pt2", images(1))
    assert changes(before, picture(phases)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt2"]
    network = torch.export.load(tmp_path / "file.pt2").module()
    for count in (1, 2, 7):
        x = images(count, seed=count)
        assert differs(network(x), logits(phases, 0, x)) <= max(worst, 1e-6)


def test_a_safetensors_file_loads_into_the_plain_network(phases: Phases, tmp_path: Path) -> None:
    assert phases.export(0, tmp_path / "file", "safetensors", [images(3)]) < 1e-6
    plain = SmallNet().eval()
    plain.load_state_dict(load_file(tmp_path / "file"))
    assert differs(plain(images(5)), logits(phases, 0, images(5))) < 1e-6


def test_an_onnx_file_gives_the_logits_of_its_task(phases: Phases, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    phases.export(0, tmp_path / "file", "onnx", {"x": images(3)})
    network = onnx.ReferenceEvaluator(str(tmp_path / "file"))
    (found,) = network.run(None, {"x": images(5).numpy()})
    assert differs(torch.from_numpy(found), logits(phases, 0, images(5))) < 1e-5


def test_a_package_that_is_missing_is_named(phases: Phases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="onnx needs onnx and onnxscript: pip install onnx onnxscript"):
        phases.export(0, tmp_path / "file", "onnx", images(2))


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
def test_an_aoti_package_gives_the_outputs_of_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    exc = pytest.importorskip("torch._inductor.exc")
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    phases = Phases(convert(nn.Sequential(nn.Linear(6, 3)), 0.5))
    finish_tasks(phases, 1)
    x = torch.randn(4, 6)
    phases.export(0, tmp_path / "file.pt2", "aoti", x)
    network = torch._inductor.aoti_load_package(str(tmp_path / "file.pt2"))
    assert differs(network(x), logits(phases, 0, x)) < 1e-6


def test_a_compiler_that_is_missing_is_told(phases: Phases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    exc = pytest.importorskip("torch._inductor.exc")

    def fails() -> None:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fails)
    with pytest.raises(RuntimeError, match="aoti needs a C\\+\\+ compiler"):
        phases.export(0, tmp_path / "file", "aoti", images(2))


def test_a_network_that_differs_too_much_is_not_written(
    phases: Phases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, off = tmp_path / "file", 1e-4

    def shifted(plain: nn.Module, args: Any, kwargs: Any, part: Path) -> export.Run:
        part.write_bytes(b"new")
        return lambda args, kwargs: [plain(*args, **kwargs) + off * plain(images(3)).abs().max()]

    monkeypatch.setattr(export, "WRITERS", {"pt2": shifted})
    assert 0 < phases.export(0, path, "pt2", images(3)) < 1
    path.write_bytes(b"old")
    off = 1e-3
    with pytest.raises(ValueError, match=r"the outputs of the pt2 file differ by up to .* more than .*; nothing was"):
        phases.export(0, path, "pt2", images(3))
    assert path.read_bytes() == b"old"


WRONG: dict[str, Callable[[Phases, Path], object]] = {
    "the format must be one of pt2, onnx, aoti, safetensors, got 'h5'": lambda p, f: p.export(0, f, "h5", images(2)),  # type: ignore[arg-type]
    r"one number of rows, at least 1, got \[\]": lambda p, f: p.export(0, f, "pt2", ()),
    r"one number of rows, at least 1, got \[2, 3\]": lambda p, f: p.export(0, f, "pt2", [images(2), images(3)]),
    "task 2 is not known": lambda p, f: p.export(2, f, "pt2", images(2)),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_argument_is_told(sentence: str, phases: Phases, tmp_path: Path) -> None:
    with pytest.raises((ValueError, IndexError), match=sentence):
        WRONG[sentence](phases, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_network_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases(convert(MODELS["lenet-300-100"](torch.Size([1, 8, 8]), 2), 0.1))
    finish_tasks(phases)
    checkpoint.save(phases, tmp_path / "model.safetensors", {"model": "lenet-300-100", "shape": [1, 8, 8]})
    assert run("export", [str(tmp_path), "--task", "1", "--format", "safetensors"]) == 0
    assert "task-1.safetensors: " in (told := capsys.readouterr().out)
    assert "its logits differ by" in told
    plain = MODELS["lenet-300-100"](torch.Size([1, 8, 8]), 2)
    plain.load_state_dict(load_file(tmp_path / "task-1.safetensors"))
    assert run("export", [str(tmp_path), "--task", "2"]) == 2
    assert "--task 2: 2 tasks are finished, numbered from 0" in capsys.readouterr().err
