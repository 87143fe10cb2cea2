"""The number of threads of `exssnet train`: chosen from measured times, told, recorded, and put back at the end."""

import copy
import json
import os
import re
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from learning import Watching, acting
from torch import Tensor, nn

from exssnet import Learner, PhaseOptions, convert
from exssnet.cli import reproduce, resume, terminal, threads
from exssnet.cli.commands import main
from exssnet.tasks import Labelled, Relabelled, Task


@pytest.fixture
def number(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Torch's number of threads, in a list. All work with one thread, so that these tests wait for no busy core."""
    now = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    monkeypatch.setattr(threads, "cores", lambda: 2)
    return now


# The choice, from times alone


@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        ({1: 1.0, 2: 0.92}, 1),
        ({1: 1.0, 2: 0.9}, 2),
        ({1: 1.0, 2: 7.0}, 1),
        ({1: 1.0, 2: 0.92, 4: 0.85}, 4),
        ({1: 1.0, 2: 0.5, 4: 0.46}, 2),
        ({4: 1.0}, 4),
    ],
    ids=str,
)
def test_more_threads_are_taken_only_if_they_are_clearly_faster(seconds: dict[int, float], number: int) -> None:
    assert threads.clearly_fastest(seconds) == number


def test_a_phase_counts_by_its_epochs_and_its_median_step() -> None:
    mask = {2: [1.0, 9.0, 2.0], 1: [3.0, 3.0, 50.0]}
    weight = {4: [1.0], 2: [5.0], 1: [4.0]}
    assert threads.whole([(10, mask), (3, {}), (1, weight)]) == {1: 34.0, 2: 25.0}
    assert threads.whole([(10, {}), (3, {})]) == {}


def taken(most: int, steps: int, *seconds: dict[int, float]) -> list[int]:
    """The numbers of threads that have a turn if steps take these seconds, the last ones from then on."""
    order: list[int] = []
    plan = threads.turns({}, most, steps)
    number = next(plan)
    while True:
        order.append(number)
        try:
            number = plan.send(seconds[min(len(order), len(seconds)) - 1][number])
        except StopIteration:
            return order


def test_quick_steps_take_turns_with_each_number_nine_times() -> None:
    assert taken(6, 100, {6: 0.001, 4: 0.001, 2: 0.001, 1: 0.001}) == [6, 4, 2, 1] * 9


@pytest.mark.parametrize(
    ("most", "steps", "seconds", "order"),
    [
        (2, 10_000, {2: 1.0, 1: 1.5}, [2, 1] * 3),
        (2, 10_000, {2: 0.07, 1: 0.001}, [2, 1, 2]),
        (8, 10_000, {8: 1.0, 4: 1.5, 2: 3.0}, [8, 4, 2, 8, 4, 8, 4]),
        (2, 240, {2: 1.0, 1: 1.5}, [2, 1]),
        (2, 10, {2: 0.5, 1: 0.001}, [2, 1]),
        (2, 300, {2: 1.0, 1: 1.5}, [2, 1, 2]),
    ],
    ids=[
        "three rounds",
        "a busy core",
        "hopeless numbers are left out",
        "a short run",
        "a short run beside a busy core",
        "2 % of the run",
    ],
)
def test_long_steps_are_few(most: int, steps: int, seconds: dict[int, float], order: list[int]) -> None:
    assert taken(most, steps, seconds) == order


@pytest.mark.parametrize(("quota", "number"), [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), (None, 6)])
def test_cores_are_those_of_the_affinity_and_of_the_containers_quota(
    monkeypatch: pytest.MonkeyPatch, quota: str | None, number: int
) -> None:
    def read(path: Path) -> str:
        assert path == Path("/sys/fs/cgroup/cpu.max")
        if quota is None:
            raise FileNotFoundError
        return quota + "\n"

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(Path, "read_text", read)
    assert threads.cores() == number


# The measurement


def small() -> tuple[Learner, list[Task]]:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4))
    data = Relabelled.of(Labelled(torch.randn(60, 8), torch.arange(60) % 4))
    options = PhaseOptions(20)
    learner = Learner(convert(net, 0.5, weights="signed_constant"), mask=options, weight=options, batch_size=20)
    return learner, [Task("a", 4, (0, 1, 2, 3), data, data, data)]


def test_the_measurement_leaves_the_run_as_it_was(number: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    plain, tasks = small()
    measured = copy.deepcopy(plain)
    losses = []
    for learner in (plain, measured):
        torch.manual_seed(3)
        number[0] = 2
        if learner is measured:
            assert threads.chosen(learner, tasks) == number[0]
            assert capsys.readouterr().out.startswith("CPU threads: ")
        assert [layer.choices for layer in learner.phases.layers.values()] == [{}, {}]
        number[0] = 1
        learner.observer = watching = Watching()
        learner.run(tasks)
        losses.append(torch.stack(watching.losses))
    assert torch.equal(*losses)


def test_both_phases_are_timed_with_each_number(monkeypatch: pytest.MonkeyPatch, number: list[int]) -> None:
    seen: list[tuple[str, int]] = []
    clocked = threads._Clock.on_step

    def on_step(clock: threads._Clock, task: int, phase: str, step: int, steps: int, loss: Tensor) -> None:
        seen.append((phase, number[0]))
        clocked(clock, task, phase, step, steps, loss)

    monkeypatch.setattr(threads._Clock, "on_step", on_step)
    monkeypatch.setattr(threads, "SECONDS", 60)
    threads.chosen(*small())
    assert seen == [(phase, n) for phase in ("mask", "weight") for _ in range(9) for n in (2, 2, 1, 1)]


@pytest.mark.parametrize("before", [1, 3])
def test_on_one_core_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: list[int], before: int
) -> None:
    monkeypatch.setattr(Learner, "learn", lambda *_: pytest.fail("a step was timed"))
    monkeypatch.setattr(threads, "cores", lambda: 1)
    number[0] = before
    assert threads.chosen(*small()) == number[0] == 1
    assert capsys.readouterr().out == ""


def test_an_error_in_the_measurement_is_left_to_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: list[int]
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("items must be tensors")

    monkeypatch.setattr(Learner, "learn", fails)
    assert threads.chosen(*small()) is None
    assert number == [3]
    assert capsys.readouterr().out == ""


# The command

RUN = ["train", "--data", "digits", "--tasks", "1", "--epochs", "1", "--weight-epochs", "1", "--batch-size", "128"]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, number: list[int]) -> None:
    """Two threads are chosen, whatever the times are."""
    pytest.importorskip("sklearn", reason="the runs here learn scikit-learn's digits")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(threads, "SECONDS", 60)
    monkeypatch.setattr(threads, "clearly_fastest", max)


@pytest.mark.usefixtures("chosen")
def test_the_number_is_printed_and_recorded_and_given_again_makes_the_same_run(
    number: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*RUN, "--out", str(one)]) == 0
    assert re.fullmatch(r"CPU threads: 2 \(1: \d+\.\d\d times as fast\)", capsys.readouterr().out.splitlines()[0])
    assert number == [3]
    assert main([*RUN, "--threads", "2", "--out", str(two)]) == 0
    assert "CPU threads" not in capsys.readouterr().out
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    results = [json.loads((out / "result.json").read_text()) for out in (one, two)]
    assert [(result["threads"], result["options"]["threads"]) for result in results] == [(2, 2)] * 2


@pytest.mark.usefixtures("chosen")
def test_threads_that_are_given_decide_and_are_put_back_at_the_end(
    number: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(threads, "chosen", lambda *_: pytest.fail("threads were given"))
    monkeypatch.setattr(terminal, "observer", acting(0, "mask", 2, lambda: seen.append(number[0])))
    assert main([*RUN, "--threads", "1", "--out", str(tmp_path)]) == 0
    assert (seen, number) == ([1], [3])


@pytest.mark.usefixtures("chosen")
def test_a_resumed_run_keeps_its_number_and_tells_of_fewer_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--every", "1000", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(threads, "chosen", lambda *_: pytest.fail("the run has a number"))
    monkeypatch.setattr(resume, "cores", lambda: 1)
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["threads"] == 2
    assert capsys.readouterr().err == (
        "exssnet: the run has 2 threads for 1 CPU cores: --threads 1 may be faster, but results may differ in "
        "rounding\n"
    )


def test_a_recipe_has_as_many_processes_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "cores", lambda: 5)
    parser = ArgumentParser()
    reproduce.add_options(parser)
    assert parser.parse_args(["split-mnist"]).processes == 5
