"""Optimizers, schedulers and replicas of an ended phase, and optimizers that train nothing: told at the first step."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from networks import SmallNet, changes, images, picture, small_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from exssnet import Phases, ScoreAdam, convert

ENDED = "its step would train nothing. Make a new one for each phase: phases.optimizer"


def _loss(phases: Phases) -> torch.Tensor:
    return phases.model(images()).square().mean()


def _step(phases: Phases, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    _loss(phases).backward()
    optimizer.step()


MOVES = {
    "into the weight phase": lambda p: p.start_weight_phase(),
    "to the end of the task": lambda p: p.finish_task(),
    "to the next task": lambda p: (p.finish_task(), p.start_task()),
    "by abandoning the task": lambda p: p.abandon_task(),
    "by loading a state": lambda p: p.load_state_dict(copy.deepcopy(p.state_dict())),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.AdamW(p.model.parameters(), 0.01), lambda p: ScoreAdam(p.parameters(), p.model)],
    ids=["AdamW", "ScoreAdam"],
)
def test_an_optimizer_kept_across_a_phase_is_refused_at_its_first_step(make: object, move: object) -> None:
    phases = Phases(small_net())
    phases.start_task()
    optimizer = make(phases)  # type: ignore[operator]
    _step(phases, optimizer)
    _loss(phases).backward()
    move(phases)  # type: ignore[operator]
    before = picture(phases)
    with pytest.raises(RuntimeError, match=ENDED):
        optimizer.step()
    assert changes(before, picture(phases)) == []


@pytest.mark.parametrize("since", ["convert", "Phases", "pruning"])
def test_an_optimizer_from_before_is_refused(since: str) -> None:
    model = SmallNet()
    if since != "convert":
        convert(model, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if since == "convert":
        convert(model, 0.3)
    phases = Phases(model)
    phases.start_task()
    if since == "pruning":
        phases.start_weight_phase()
        optimizer = phases.optimizer(torch.optim.SGD, lr=0.1)
        phases.prune({name: torch.ones_like(layer.mask()) for name, layer in phases.layers.items()})
    with pytest.raises(RuntimeError, match=ENDED):
        optimizer.step()


def test_an_optimizer_that_holds_no_masked_parameter_is_warned_of_at_its_second_step() -> None:
    model = small_net()
    phases = Phases(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)  # biases and norms: no task is open
    phases.start_task()
    _step(phases, optimizer)
    with pytest.warns(UserWarning, match="no optimizer has trained the 3 masked parameters since the phase began"):
        _step(phases, optimizer)
    _step(phases, optimizer)  # said once


def test_nothing_is_said_of_masked_parameters_that_have_no_gradients() -> None:
    model = small_net()
    phases = Phases(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    phases.start_task()
    for _ in range(2):
        _loss(phases).backward()
        for parameter in phases.masked_parameters():
            parameter.grad = None
        optimizer.step()


def test_gradients_go_with_the_phase() -> None:
    phases = Phases(small_net())
    phases.start_task()
    _loss(phases).backward()
    scores = phases.masked_parameters()
    phases.start_weight_phase()
    assert [s.grad for s in scores] == [None] * 3


def test_two_optimizers_may_share_the_work() -> None:
    phases = Phases(small_net())
    phases.start_task()
    both = torch.optim.SGD(phases.task_parameters(), 0.1), torch.optim.SGD(phases.masked_parameters(), 0.1)
    for _ in range(3):
        for optimizer in both:
            optimizer.zero_grad()
        _loss(phases).backward()
        for optimizer in both:
            optimizer.step()


def test_an_optimizer_of_another_model_is_left_alone() -> None:
    other = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(3):
        phases = Phases(small_net())
        phases.start_task()
        other(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.2


def test_a_scheduler_of_an_ended_phase_is_warned_of() -> None:
    phases = Phases(small_net())
    phases.start_task()
    optimizer = phases.optimizer(torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    _step(phases, optimizer)
    scheduler.step()
    phases.start_weight_phase()
    with pytest.warns(UserWarning, match="lr of an optimizer was set whose phase has ended"):
        scheduler.step()


@pytest.mark.parametrize("phase", ["mask", "weight", "joint"])
def test_the_optimizer_of_a_phase_trains_all_that_the_phase_trains(phase: str) -> None:
    phases = Phases(small_net())
    phases.start_task(joint=phase == "joint")
    phases.finish_task()
    phases.start_task(joint=phase == "joint")
    if phase == "weight":
        phases.start_weight_phase()
    optimizer = phases.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    before = [p.detach().clone() for p in phases.parameters()]
    used = {n: phases.bank.mask(0, n) for n in phases.layers}
    weights = {n: layer.dense_weight.detach().clone() for n, layer in phases.layers.items()}
    _step(phases, optimizer)
    assert not any(torch.equal(p, was) for p, was in zip(phases.parameters(), before, strict=True))
    for name, layer in phases.layers.items():
        assert torch.equal(layer.dense_weight[used[name]], weights[name][used[name]])


def test_between_tasks_there_is_no_optimizer() -> None:
    with pytest.raises(RuntimeError, match="optimizer belongs to the mask or joint or weight phase, but"):
        Phases(small_net()).optimizer(torch.optim.SGD, lr=0.1)


def test_a_loop_runs_through_a_weight_phase_in_which_nothing_is_free() -> None:
    phases = Phases(convert(nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False)), 1.0))
    for products in ("sparse", "dense"):
        for layer in phases.layers.values():
            layer.products = products  # type: ignore[assignment]
        phases.start_task()
        phases.start_weight_phase()
        optimizer = phases.optimizer(torch.optim.AdamW, lr=0.1)
        before = {n: layer.dense_weight.clone() for n, layer in phases.layers.items()}
        for _ in range(2):
            _step(phases, optimizer)
        phases.finish_task()
        if len(phases.bank) > 1:
            assert all(torch.equal(layer.dense_weight, before[n]) for n, layer in phases.layers.items())


@pytest.fixture
def process_group() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unused", [True, False])
def test_replicas_of_an_earlier_phase_are_refused_at_the_first_training_forward(unused: bool) -> None:
    phases = Phases(small_net())
    phases.start_task()
    replicas = DistributedDataParallel(phases.model, find_unused_parameters=unused)
    replicas(images()).sum().backward()
    phases.start_weight_phase()
    with pytest.raises(RuntimeError, match="made before this phase: it does not know 3 of the parameters"):
        replicas(images())
    with torch.no_grad():
        replicas(images())  # evaluation needs no gradients of others
    replicas = DistributedDataParallel(phases.model, find_unused_parameters=unused)
    replicas(images()).sum().backward()
    assert all(p.grad is not None for p in phases.parameters())
