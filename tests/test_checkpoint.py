"""Checkpoints: everything comes back bit for bit, or one sentence says why not and nothing has changed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learning import bare_net, learner, logits, outcome
from networks import SmallNet, changes, images, picture, small_net, stream
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exssnet import Learner, Phases, checkpoint, convert

NOTES = {"classes": [2, 2], "shape": [1, 8, 8], "text": "ü", "nothing": None}


def other_net() -> nn.Module:
    """The same layers with other weights, biases and statistics."""
    torch.manual_seed(99)
    model = SmallNet()
    model.norm.running_mean += 3
    return convert(model, 0.3)


def learned(**options: object) -> Learner:
    found = learner(**options)  # type: ignore[arg-type]
    found.run(stream(2))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Learner, Path]:
    torch.manual_seed(0)
    source, path = learned(), tmp_path_factory.mktemp("saved") / "model.safetensors"
    checkpoint.save(source.phases, path, NOTES)
    return source, path


@pytest.mark.parametrize("keep", [torch.float32, torch.float16, torch.bfloat16, None], ids=str)
def test_everything_comes_back_bit_for_bit(tmp_path: Path, keep: torch.dtype | None) -> None:
    source = learned(keep_scores=keep)
    checkpoint.save(source.phases, tmp_path / "model", NOTES)
    phases = Phases(other_net(), keep)
    assert checkpoint.load(phases, tmp_path / "model") == NOTES
    different = changes(picture(source.phases), picture(phases))
    assert [n for n in different if n not in ("random state", ".selection_hint")] == []
    assert phases.active == 1
    assert len(phases.scores) == (0 if keep is None else 2)
    assert phases.bank.use == source.phases.bank.use


def test_every_task_predicts_what_it_predicted(saved: tuple[Learner, Path]) -> None:
    source, path = saved
    phases = Phases(other_net())
    checkpoint.load(phases, path)
    for task in (0, 1):
        x = images(50, seed=task)
        assert torch.equal(logits(phases, task, x), logits(source.phases, task, x))


def test_frozen_parameters_come_back(tmp_path: Path) -> None:
    source = Phases(bare_net())
    source.model.norm.weight.fill_(3)  # type: ignore[union-attr, operator]
    source.start_task()
    source.finish_task()
    checkpoint.save(source, tmp_path / "model")
    target = Phases(bare_net())
    checkpoint.load(target, tmp_path / "model")
    assert torch.equal(target.model.norm.weight, torch.full((8,), 3.0))  # type: ignore[union-attr, arg-type]


def test_training_goes_on_as_if_nothing_had_been_saved(saved: tuple[Learner, Path]) -> None:
    tasks = stream(3)
    straight = learner(kkt="best")
    for task in tasks[:2]:
        straight.learn(task)
    halted = learner(kkt="best")
    halted.model.load_state_dict(other_net().state_dict(), strict=False)
    path = saved[1].with_name("halted")
    checkpoint.save(straight.phases, path)
    checkpoint.load(halted.phases, path)
    for each in (straight, halted):
        each.learn(tasks[2])
    before, after = outcome(straight), outcome(halted)
    assert [n for n in changes(before, after) if n not in ("history", ".selection_hint")] == []
    assert straight.reports[2].history[0].loss == halted.reports[0].history[0].loss


def test_the_file_holds_packed_masks_and_plain_weights(saved: tuple[Learner, Path]) -> None:
    source, path = saved
    tensors = load_file(path)
    for name, layer in source.phases.layers.items():
        assert torch.equal(tensors[f"weight/{name}"], layer.weight)
        for task in (0, 1):
            packed = tensors[f"mask/{task}/{name}"]
            assert (packed.dtype, packed.numel()) == (torch.uint8, -(-layer.weight.numel() // 8))
    assert "state/1/norm.running_mean" in tensors
    assert [p.name for p in path.parent.iterdir() if p.name.startswith("model")] == ["model.safetensors"]


def test_an_open_task_is_not_saved(tmp_path: Path) -> None:
    phases = Phases(small_net())
    phases.start_task()
    with pytest.raises(RuntimeError, match="save: a task is open in the mask phase; finish it first"):
        checkpoint.save(phases, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
@pytest.mark.parametrize("when", ["while writing", "after writing"])
def test_an_interrupted_save_leaves_the_old_file(
    saved: tuple[Learner, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str
) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"the old file")

    def half(tensors: dict[str, Tensor], where: str | Path, metadata: dict[str, str]) -> None:
        Path(where).write_bytes(b"half of the new")
        raise error

    def never(part: str | Path, where: str | Path) -> None:
        raise error

    monkeypatch.setattr(*((checkpoint, "save_file", half) if when == "while writing" else (os, "replace", never)))
    with pytest.raises(type(error)):
        checkpoint.save(saved[0].phases, path)
    assert path.read_bytes() == b"the old file"


def test_saving_again_replaces_the_file(saved: tuple[Learner, Path], tmp_path: Path) -> None:
    path = tmp_path / "model"
    for notes in ({"run": 1}, {"run": 2}):
        checkpoint.save(saved[0].phases, path, notes)
    assert checkpoint.load(Phases(small_net()), path) == {"run": 2}
    assert list(tmp_path.iterdir()) == [path]


# Refusals


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def _newer(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path, {"format": "exssnet-9"})


WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "foreign": (_foreign, "is of format None, this version reads exssnet-1"),
    "newer": (_newer, "is of format exssnet-9, this version reads exssnet-1"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is no safetensors file or is damaged"),
    "no header": (lambda path: path.write_bytes(path.read_bytes()[:20]), "is no safetensors file or is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is no safetensors file or is damaged"),
    "text": (lambda path: path.write_text("a text of no meaning " * 9), "is no safetensors file or is damaged"),
}


@pytest.mark.parametrize(("spoil", "sentence"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_refused_and_changes_nothing(
    saved: tuple[Learner, Path], tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    path = tmp_path / "model"
    path.write_bytes(saved[1].read_bytes())
    spoil(path)
    phases = Phases(other_net())
    before = picture(phases)
    with pytest.raises(ValueError, match=sentence) as error:
        checkpoint.load(phases, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert changes(before, picture(phases)) == []


class WithoutNorm(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()  # type: ignore[assignment]


def _frozen_norm() -> nn.Module:
    model = small_net()
    model.norm.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    return model


WRONG_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "density": (lambda: small_net(0.2), r"has layers and k \{'conv': 22, .*\}, the model has \{'conv': 15, "),
    "layers": (lambda: small_net(exclude=["conv"]), r"has layers and k \{'conv': 22, .*, the model has \{'grouped'"),
    "shape": (
        lambda: convert(nn.Sequential(nn.Linear(8, 9, bias=False)), 1.0), r"has layers and k .* the model has \{'0'",
    ),
    "without the norm": (lambda: convert(WithoutNorm(), 0.3), r"holds initial/norm\.bias, .* no place in the model"),
    "frozen norm": (_frozen_norm, r"holds initial/norm\.weight, which has no place in the model"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_another_model_is_refused_and_stays_what_it_is(
    saved: tuple[Learner, Path], make: Callable[[], nn.Module], sentence: str
) -> None:
    phases = Phases(make())
    before = picture(phases)
    with pytest.raises(ValueError, match=sentence):
        checkpoint.load(phases, saved[1])
    assert changes(before, picture(phases)) == []


def test_a_layer_of_equal_k_but_another_shape_is_refused(tmp_path: Path) -> None:
    wide, tall = (convert(nn.Sequential(nn.Linear(i, o, bias=False)), 0.5) for i, o in ((6, 4), (4, 6)))
    source = Phases(wide)
    source.start_task()
    source.finish_task()
    checkpoint.save(source, tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds \(4, 6\) for weight/0, the model needs \(6, 4\)"):
        checkpoint.load(Phases(tall), tmp_path / "model")


@pytest.mark.parametrize("state", ["learned", "open"])
def test_only_a_fresh_model_takes_a_checkpoint(saved: tuple[Learner, Path], state: str) -> None:
    phases = Phases(small_net())
    phases.start_task()
    if state == "learned":
        phases.finish_task()
    before = picture(phases)
    sentence = "1 and is in the idle phase" if state == "learned" else "0 and is in the mask phase"
    with pytest.raises(RuntimeError, match=f"needs a Phases without tasks, this one has {sentence}"):
        checkpoint.load(phases, saved[1])
    assert changes(before, picture(phases)) == []


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(Phases(small_net()), tmp_path / "nothing")


def test_a_model_without_tasks_can_be_saved(tmp_path: Path) -> None:
    source = Phases(other_net())
    checkpoint.save(source, tmp_path / "model")
    target = Phases(small_net())
    checkpoint.load(target, tmp_path / "model")
    assert torch.equal(target.layers["conv"].weight, source.layers["conv"].weight)
    assert len(target.bank) == 0
