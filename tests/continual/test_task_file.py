"""A file per task: its network comes back bit for bit, other tasks stay as they are, and misfits are refused."""

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import cut, edited, flipped, overwritten
from learning import logits
from networks import SmallNet, changes, images, picture, small_net
from torch import Tensor, nn

from exssnet import Phases, checkpoint, convert, transfer


def train(phases: Phases, weights: bool = True, seed: int = 0, joint: bool = False) -> None:
    """Learn a task in two steps of each phase."""
    phases.seed = seed
    phases.start_task(joint=joint)
    for phase in ("mask", "weight") if weights else ("mask",):
        if phase == "weight":
            phases.start_weight_phase()
        optimizer = phases.optimizer(torch.optim.Adam, lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            phases.model.train()(images(seed=10 * seed + step)).square().mean().backward()
            optimizer.step()
    phases.finish_task()


def learned(*seeds: int, weights: bool = True) -> Phases:
    phases = Phases(small_net())
    for seed in seeds:
        train(phases, weights, seed)
    return phases


def saved(phases: Phases, folder: Path, name: str = "task") -> list[Path]:
    paths = [folder / f"{name}{task}.safetensors" for task in range(len(phases.bank))]
    for task, path in enumerate(paths):
        phases.save_task(task, path)
    return paths


def same_network(a: Phases, task: int, b: Phases, other: int) -> bool:
    return torch.equal(logits(a, task, images(9)), logits(b, other, images(9)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_tasks_of_frozen_weights_load_in_any_order_and_stay(order: tuple[int, ...], tmp_path: Path) -> None:
    sources = [learned(seed, weights=False) for seed in range(3)]  # three people with the same base weights
    phases = Phases(small_net(), keep_scores=None)
    for number, which in enumerate(order):
        sources[which].save_task(0, tmp_path / "task")
        assert phases.load_task(tmp_path / "task") == phases.active == number
        assert all(same_network(sources[w], 0, phases, n) for n, w in enumerate(order[: number + 1]))
    train(phases, seed=9)
    assert all(same_network(sources[which], 0, phases, number) for number, which in enumerate(order))
    assert all(bool(bits.any()) for bits in phases.trained.tasks[3].values())


def test_what_a_loaded_task_uses_is_not_free(tmp_path: Path) -> None:
    source, phases = learned(0), Phases(small_net())
    source.save_task(0, tmp_path / "task")
    phases.load_task(tmp_path / "task")
    phases.start_task()
    phases.start_weight_phase()
    for name in phases.layers:
        assert not bool((phases.free_mask(name) & source.bank.mask(0, name)).any())


def ssnet(phases: Phases, task: int) -> None:
    phases.seed = task
    phases.start_task()
    phases.start_weight_phase(exclusive=False)
    for values in phases.masked_parameters():
        values.data.add_(torch.randn_like(values))
    phases.finish_task()


def pruned(phases: Phases, task: int) -> None:
    """A task that prunes, and before a later one one that prunes and is abandoned, which leaves weights written."""
    for _ in range(2 if task else 1):
        phases.seed = task
        if phases.phase != "idle":
            phases.abandon_task()
        phases.start_task()
        phases.start_weight_phase()
        for values in phases.masked_parameters():
            values.data.add_(torch.randn_like(values))
        phases.prune({name: torch.rand(layer.dense_weight.shape) < 0.5 for name, layer in phases.layers.items()})
    phases.finish_task()


METHODS: dict[str, Callable[[Phases, int], None]] = {
    "exssnet": lambda phases, task: train(phases, seed=task),
    "ssnet": ssnet,
    "wsn": lambda phases, task: train(phases, weights=False, seed=task, joint=True),
    "pruned": pruned,
}


@pytest.mark.filterwarnings("ignore:finish_task")
@pytest.mark.parametrize("method", METHODS)
def test_tasks_of_every_method_come_back_bit_for_bit_in_their_order(method: str, tmp_path: Path) -> None:
    source, phases = Phases(small_net()), Phases(small_net())
    for task in range(3):
        METHODS[method](source, task)
    paths = saved(source, tmp_path)
    if method == "ssnet":  # each task overwrites the values of those before it, so the last one needs no other
        paths.reverse()
    for number, path in enumerate(paths):
        phases.load_task(path)
        for loaded in range(number + 1):
            assert same_network(source, 2 - loaded if method == "ssnet" else loaded, phases, loaded)


def test_a_task_before_those_whose_weights_it_uses_is_refused_with_their_number(tmp_path: Path) -> None:
    source, phases = learned(0, 1), Phases(small_net())
    first, second = saved(source, tmp_path)
    shared = sum(int((source.bank.mask(0, n) & source.bank.mask(1, n)).sum()) for n in source.layers)
    before = picture(phases)
    sentence = rf"load_task: .*task1.* its mask uses {shared} weights that other tasks trained \(task 0: {shared}, by "
    with pytest.raises(ValueError, match=sentence + ".*load the files of these tasks first$"):
        phases.load_task(second)
    assert changes(before, picture(phases)) == []
    assert [phases.load_task(path) for path in (first, second, first)] == [0, 1, 2]  # the same values twice are fine
    assert all(same_network(source, task % 2, phases, task) for task in range(3))


def test_tasks_that_trained_the_same_weights_are_refused_with_their_number(tmp_path: Path) -> None:
    one, other = learned(0), learned(1)
    masks = {name: one.bank.mask(0, name) & other.bank.mask(0, name) for name in one.layers}
    both = sum(
        int((mask & (one.layers[name].dense_weight != other.layers[name].dense_weight)).sum())
        for name, mask in masks.items()
    )
    other.save_task(0, tmp_path / "task")
    before = picture(one)
    assert both > 0
    with pytest.raises(ValueError, match=f"it trained {both} weights that finished tasks here use with other values"):
        one.load_task(tmp_path / "task")
    frozen = learned(1, weights=False)
    frozen.save_task(0, tmp_path / "task")
    shared = sum(int((one.bank.mask(0, n) & frozen.bank.mask(0, n)).sum()) for n in one.layers)
    with pytest.raises(ValueError, match=f"its mask uses {shared} base weights that finished tasks here have trained"):
        one.load_task(tmp_path / "task")
    assert changes(before, picture(one)) == []


def other_weights() -> nn.Module:
    model = small_net()
    model.conv.dense_weight[0, 0, 0, 0] += 1
    return model


def other_initial_norm() -> nn.Module:
    model = small_net()
    model.norm.running_var += 1
    return model


REFUSED: dict[str, Callable[[], nn.Module]] = {
    r"1 of its 3 masked layers .*: head is float32 \(4, 32\) in the file, float32 \(5, 32\)": lambda: convert(
        SmallNet(5)
    ),
    r"3 of its 3 masked .*: conv is float32 \(8, 1, 3, 3\) in the file, float64 \(8, 1, 3, 3\)": small_net().double,
    r"1 of its 3 masked layers .*: head is float32 \(4, 32\) in the file, no masked": lambda: convert(
        SmallNet(), exclude=["head"]
    ),
    "it needs the base weights with the SHA-256 [0-9a-f]{12}..., but those of the model have": other_weights,
    "per-task tensors that the task did not change .* have other initial values": other_initial_norm,
}


@pytest.mark.filterwarnings("ignore:convert")
@pytest.mark.parametrize("sentence", REFUSED)
def test_a_model_that_the_file_does_not_fit_is_told_and_left_alone(sentence: str, tmp_path: Path) -> None:
    source = Phases(small_net())
    source.start_task()
    source.finish_task()
    source.save_task(0, tmp_path / "task")
    phases = Phases(REFUSED[sentence]())
    before = picture(phases)
    with pytest.raises(ValueError, match=sentence):
        phases.load_task(tmp_path / "task")
    assert changes(before, picture(phases)) == []


def test_a_task_is_loaded_between_phases_only(tmp_path: Path) -> None:
    phases = learned(0)
    phases.start_task()
    phases.save_task(0, tmp_path / "task")
    with pytest.raises(RuntimeError, match="load_task belongs to the idle phase"):
        phases.load_task(tmp_path / "task")
    with pytest.raises(IndexError, match="task 1 is not known"):
        phases.save_task(1, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_failure_at_the_end_of_loading_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, phases = learned(0, 1), Phases(small_net())
    first, second = saved(source, tmp_path)
    phases.load_task(first)
    before, trained = picture(phases), phases.trained

    def fails(_: int) -> None:
        raise MemoryError

    monkeypatch.setattr(phases, "_activate", fails)
    with pytest.raises(MemoryError):
        phases.load_task(second)
    assert changes(before, picture(phases)) == []
    assert phases.trained is trained


@pytest.mark.parametrize("how", ["checkpoint", "state dict"])
def test_files_of_a_reloaded_model_are_the_same_bytes(how: str, tmp_path: Path) -> None:
    source, phases = learned(0, 1), Phases(convert(SmallNet(), 0.3))
    if how == "checkpoint":
        checkpoint.save(source, tmp_path / "model")
        checkpoint.load(phases, tmp_path / "model")
    else:
        phases.load_state_dict(copy.deepcopy(source.state_dict()))
    for path, again in zip(saved(source, tmp_path), saved(phases, tmp_path, "again"), strict=True):
        assert path.read_bytes() == again.read_bytes()


def test_a_state_of_an_earlier_version_does_not_say_what_was_trained(tmp_path: Path) -> None:
    state: dict[str, Any] = learned(0).state_dict()
    state["tensors"] = {n: t for n, t in state["tensors"].items() if n != "base" and not n.startswith("trained/")}
    phases = Phases(small_net())
    phases.load_state_dict(state)
    train(phases, seed=1)
    with pytest.raises(RuntimeError, match="the 2 finished tasks are from a state of an earlier exssnet"):
        phases.save_task(1, tmp_path / "task")


def test_what_an_abandoned_task_has_written_is_known_after_reloading(tmp_path: Path) -> None:
    source, phases = learned(0), Phases(small_net())
    source.start_task()
    source.start_weight_phase()
    for values in source.masked_parameters():
        values.data.add_(1.0)
    source.prune({name: torch.zeros(layer.dense_weight.shape).bool() for name, layer in source.layers.items()})
    source.abandon_task()
    phases.load_state_dict(copy.deepcopy(source.state_dict()))
    for each, name in ((source, "one"), (phases, "again")):
        train(each, weights=False, seed=2)
        each.save_task(1, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()


def test_an_open_phase_comes_back_with_what_it_has_written(tmp_path: Path) -> None:
    phases = Phases(small_net())
    phases.start_task()
    phases.start_weight_phase()
    for values in phases.masked_parameters():
        values.data.add_(1.0)
    phases.prune({name: torch.rand(layer.dense_weight.shape) < 0.5 for name, layer in phases.layers.items()})
    again = Phases(small_net())
    again.load_state_dict(copy.deepcopy(phases.state_dict()))
    for each, name in ((phases, "one"), (again, "again")):
        each.finish_task()
        each.save_task(0, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()


def test_kkt_passes_over_tasks_without_scores(tmp_path: Path) -> None:
    phases = learned(0)
    learned(1, weights=False).save_task(0, tmp_path / "task")
    other = Phases(small_net())
    other.load_task(tmp_path / "task")
    only_loaded = copy.deepcopy(other)
    train(other, weights=False, seed=0)
    x, labels = images(60), torch.arange(60) % 2
    with pytest.raises(RuntimeError, match="KKT needs the scores of 1 finished tasks"):
        transfer(only_loaded, x, labels, 2)
    assert transfer(other, x, labels, 2, rule="always").sources == [1]
    assert transfer(phases, x, labels, 2, rule="always").sources == [0]


@pytest.mark.parametrize("density", [0.05, 0.95])
def test_a_file_takes_the_entropy_of_its_mask_and_the_values(density: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    phases = Phases(convert(nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)), density))
    phases.start_task()
    phases.finish_task()
    phases.save_task(0, tmp_path / "task")
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    most = (1.06 if density == 0.05 else 1.02) * entropy * 2**20 / 8 + 1200  # of it the header
    assert (tmp_path / "task").stat().st_size < most


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("tasks")
    return [path.read_bytes() for path in saved(learned(0, 1), folder)]


def test_a_damaged_file_is_refused_in_one_sentence_or_loaded_as_it_stands(files: list[bytes], tmp_path: Path) -> None:
    path, refused = tmp_path / "file", 0
    base = Phases(small_net())
    path.write_bytes(files[0])
    base.load_task(path)
    first = logits(base, 0, images(9))
    before = picture(base)
    for number in range(300):
        draw = random.Random(number)
        spoil = draw.choice((cut, flipped, overwritten, edited, edited, edited))
        damaged = spoil(files[1], draw)
        path.write_bytes(damaged)
        try:
            base.load_task(path)
        except ValueError as error:
            refused, said = refused + 1, str(error)
            assert said.startswith(f"load_task: {path}: "), number
            assert said.isprintable(), number
            if number % 20 == 0:
                before["random state"] = torch.get_rng_state()
                assert changes(before, picture(base)) == [], number
        else:
            assert spoil is edited or damaged == files[1], number
            assert torch.equal(logits(base, 0, images(9)), first), number
            path.write_bytes(files[0])
            base = Phases(small_net())
            base.load_task(path)
            before = picture(base)
    assert refused > 150
    assert isinstance(first, Tensor)
