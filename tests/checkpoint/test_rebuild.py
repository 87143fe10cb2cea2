"""`exssnet.load`: the folder of a run gives its network with all finished tasks, or one sentence says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import logits

import exssnet
from exssnet import Phases, checkpoint, convert
from exssnet.io import container
from exssnet.nn.models import MODELS

NOTES = {"model": "resnet-small", "shape": [3, 8, 8], "classes": [2, 2, 2]}


def learned(tasks: int) -> Phases:
    torch.manual_seed(0)
    phases = Phases(convert(MODELS["resnet-small"](torch.Size(NOTES["shape"]), 5), 0.2, allocation="er"))
    for _ in range(tasks):
        phases.start_task()
        phases.finish_task()
    return phases


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Phases, Path]:
    """A folder whose model is behind its checkpoint, as after a kill of a resumed run."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(learned(1), folder / "model.safetensors", NOTES | {"classes": [2]})
    phases = learned(2)
    checkpoint.save(phases, folder / "checkpoint.safetensors", NOTES)
    return phases, folder


@pytest.mark.parametrize(("name", "tasks"), [("", 2), ("checkpoint.safetensors", 2), ("model.safetensors", 1)])
def test_a_run_comes_back_with_all_that_is_finished(run: tuple[Phases, Path], name: str, tasks: int) -> None:
    phases, folder = run
    again = exssnet.load(folder / name)
    assert (len(again.bank), again.active, again.keep_scores) == (tasks, tasks - 1, torch.float32)
    assert {n: layer.k for n, layer in again.layers.items()} == {n: layer.k for n, layer in phases.layers.items()}
    x = torch.randn(5, 3, 8, 8)
    assert all(torch.equal(logits(again, task, x), logits(phases, task, x)) for task in range(tasks))
    again.start_task()
    again.finish_task()


def with_notes(notes: Any, source: Path, path: Path) -> Path:
    with container.opened(source) as file:
        meta, tensors = json.loads(file.metadata["exssnet"]), file.tensors()
    container.write(path, tensors, file.metadata | {"exssnet": json.dumps(meta | {"notes": notes})})
    return path


@pytest.mark.parametrize(
    ("notes", "sentence"),
    [
        (None, "it does not say how its network is built.*exssnet.checkpoint.load"),
        ({**NOTES, "model": "../x"}, "it does not say how its network is built"),
        ({**NOTES, "model": ["resnet-small"]}, "it does not say how its network is built"),
        ({**NOTES, "shape": "3"}, "its shape of an input must be"),
        ({**NOTES, "shape": [1 << 40, 8, 8]}, "of its network has the shape|its network cannot be built"),
        ({**NOTES, "shape": [-3, 8, 8]}, "its network cannot be built"),
        ({**NOTES, "model": "resnet18"}, "of its network has the shape .*, it holds"),
    ],
)
def test_a_network_that_cannot_be_rebuilt_is_told(
    notes: Any, sentence: str, run: tuple[Phases, Path], tmp_path: Path
) -> None:
    path = with_notes(notes, run[1] / "model.safetensors", tmp_path / "file")
    with pytest.raises(ValueError, match=f"load: {path}: .*({sentence})"):
        exssnet.load(path)


def test_a_folder_without_a_run_and_a_run_without_a_task_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors and no checkpoint\.safetensors"):
        exssnet.load(tmp_path)
    checkpoint.save(learned(0), tmp_path / "model.safetensors", NOTES)
    with pytest.raises(ValueError, match="none of its tasks is finished"):
        exssnet.load(tmp_path)
