"""A joint phase trains copies: what finished tasks use is right at every moment, for every reader, and afterwards."""

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from networks import images, small_net
from torch import Tensor
from torch.nn import functional as F

from exssnet import Phases, Served
from exssnet.nn import evaluation

X = images(5, seed=9)


def step(phases: Phases, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(phases.model(images()), torch.arange(24) % 4).backward()
    optimizer.step()


def in_joint_phase(tasks: int = 1) -> tuple[Phases, list[Tensor]]:
    """A model in its joint phase, and the logits of the tasks that are finished."""
    phases = Phases(small_net())
    for _ in range(tasks):
        phases.start_task(joint=True)
        step(phases, phases.optimizer(torch.optim.SGD, lr=0.1))
        phases.finish_task()
    logits = [by_using(phases, task) for task in range(tasks)]
    phases.start_task(joint=True)
    return phases, logits


def by_using(phases: Phases, task: int) -> Tensor:
    with phases.using(task) as model, evaluation(model):
        logits: Tensor = model(X)
    return logits


def by_fold(phases: Phases, task: int) -> Tensor:
    plain = phases.fold(task).eval()
    assert all(p.is_leaf and p.grad is None for p in plain.parameters())
    with torch.no_grad():
        logits: Tensor = plain(X)
    return logits


def by_state(phases: Phases, task: int) -> Tensor:
    other = Phases(small_net())
    other.load_state_dict(phases.state_dict())
    return by_using(other, task)


READERS: dict[str, Callable[[Phases, int], Tensor]] = {
    "using": by_using,
    "Served": lambda phases, task: Served(phases)(X, [task] * len(X)),
    "fold": by_fold,
    "state_dict": by_state,
    "deepcopy": lambda phases, task: by_using(copy.deepcopy(phases), task),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_between_a_step_and_its_guard_finished_tasks_are_right_for(read: Callable[[Phases, int], Tensor]) -> None:
    phases, expected = in_joint_phase()
    idle = copy.deepcopy(phases)
    idle.abandon_task()
    optimizer, found = torch.optim.SGD(phases.parameters(), 0.1, momentum=0.9, weight_decay=0.1), []
    optimizer.register_step_post_hook(lambda *_: found.append(read(phases, 0)))
    phases.guard(optimizer)  # after the reader
    for _ in range(2):
        step(phases, optimizer)
    assert not torch.equal(phases.layers["conv"].dense_weight, idle.layers["conv"].dense_weight)
    assert len(found) == 2
    assert all(torch.equal(logits, read(idle, 0)) for logits in found)
    assert torch.equal(by_using(phases, 0), expected[0])


def without_guard(phases: Phases) -> None:
    step(phases, torch.optim.SGD(phases.parameters(), 0.1))


def averaged(phases: Phases) -> None:
    """Weights that are averaged with others than those that are held."""
    step(phases, phases.optimizer(torch.optim.SGD, lr=0.1))
    with torch.no_grad():
        for weight in phases.dense_weights():
            weight.lerp_(torch.randn_like(weight), 0.1)


@pytest.mark.parametrize("train", [without_guard, averaged])
def test_finished_tasks_stay_and_a_warning_tells_of_training(train: Callable[[Phases], None]) -> None:
    phases, expected = in_joint_phase(2)
    train(phases)
    trained = {name: layer.dense_weight.detach().clone() for name, layer in phases.layers.items()}
    used = {name: phases.bank.mask(0, name) | phases.bank.mask(1, name) for name in phases.layers}
    before = phases.weights_before()
    changed = sum(int((before[n] != trained[n])[used[n]].sum()) for n in trained)
    with pytest.warns(UserWarning, match=rf"^finish_task: {changed} weights that earlier tasks use had changed"):
        phases.finish_task()
    assert all(torch.equal(by_using(phases, task), logits) for task, logits in enumerate(expected))
    for name, layer in phases.layers.items():
        assert torch.equal(layer.dense_weight[~used[name]], trained[name][~used[name]])
        assert not layer.dense_weight.requires_grad


def test_where_warnings_are_errors_the_task_stays_open() -> None:
    phases, expected = in_joint_phase()
    without_guard(phases)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="finish_task"):
            phases.finish_task()
    assert (phases.phase, len(phases.bank)) == ("joint", 1)
    phases.finish_task()
    assert torch.equal(by_using(phases, 0), expected[0])


def test_a_guard_that_comes_late_puts_back_what_was_changed() -> None:
    phases, _ = in_joint_phase()
    without_guard(phases)
    optimizer = torch.optim.SGD(phases.parameters(), 0.1)
    with pytest.warns(UserWarning, match="^guard: [0-9]+ weights that earlier tasks use had changed"):
        phases.guard(optimizer)
    step(phases, optimizer)
    before = phases.weights_before()
    for name, layer in phases.layers.items():
        mask = phases.bank.mask(0, name)
        assert torch.equal(layer.dense_weight[mask], before[name][mask])


def test_an_optimizer_that_steps_after_the_joint_phase_reaches_no_weight() -> None:
    phases, expected = in_joint_phase()
    optimizer = phases.optimizer(torch.optim.SGD, lr=0.1)
    weights = torch.optim.SGD(phases.dense_weights(), 0.1)
    step(phases, optimizer)
    phases.finish_task()
    logits = by_using(phases, 1)
    weights.step()
    assert torch.equal(by_using(phases, 0), expected[0])
    assert torch.equal(by_using(phases, 1), logits)


def test_a_joint_phase_may_change_the_models_dtype() -> None:
    phases, _ = in_joint_phase()
    phases.model.double()
    phases.abandon_task()
    assert {layer.dense_weight.dtype for layer in phases.layers.values()} == {torch.float64}


def test_other_threads_are_answered_right_while_tasks_are_learned_jointly() -> None:
    phases, expected = in_joint_phase()
    phases.abandon_task()
    served, wrong, done = Served(phases, cache=0), [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            wrong.append(not torch.equal(served(X, [0] * len(X)), expected[0]))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(3):
            phases.start_task(joint=True)
            optimizer = phases.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
            for _ in range(30):
                step(phases, optimizer)
            phases.finish_task()
    finally:
        done.set()
        asking.join()
    assert (len(wrong) > 3, sum(wrong)) == (True, 0)
