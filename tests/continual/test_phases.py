"""Phases: what a task may change, and that nothing else changes, bit for bit."""

import copy
import io

import pytest
import torch
from networks import images, small_net
from torch import Tensor, nn
from torch.nn import functional as F

from exssnet.continual.phases import Phases
from exssnet.continual.stored import Pieces
from exssnet.nn import SupermaskLayer, convert

OPTIMIZERS = {
    "sgd-momentum-decay": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adam-decay": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def _steps(phases: Phases, make: object = OPTIMIZERS["adamw"], seed: int = 0, count: int = 3) -> None:
    """A few training steps on everything that the phase trains."""
    optimizer = make(phases.parameters())  # type: ignore[operator]
    if phases.phase == "joint":
        phases.guard(optimizer)
    phases.model.train()
    for step in range(count):
        x, y = images(seed=seed * 100 + step), torch.arange(24) % 4
        optimizer.zero_grad()
        F.cross_entropy(phases.model(x), y).backward()
        optimizer.step()


def _learn(phases: Phases, seed: int, make: object = OPTIMIZERS["adamw"], exclusive: bool = True) -> int:
    phases.start_task()
    _steps(phases, make, seed)
    phases.start_weight_phase(exclusive)
    _steps(phases, make, seed + 50)
    return phases.finish_task()


def _logits(phases: Phases, task: int) -> Tensor:
    with phases.using(task) as model, torch.no_grad():
        training = model.training
        model.eval()
        out: Tensor = model(images(seed=999))
        model.train(training)
    return out


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_logits_of_the_first_task_never_change_under(make: object) -> None:
    phases = Phases(small_net())
    _learn(phases, 0, make)
    before = _logits(phases, 0)
    for seed in (1, 2):
        phases.start_task()
        _steps(phases, make, seed)
        assert torch.equal(_logits(phases, 0), before)
        phases.start_weight_phase()
        _steps(phases, make, seed)
        assert torch.equal(_logits(phases, 0), before)
        phases.finish_task()
        assert torch.equal(_logits(phases, 0), before)


def test_joint_training_under_the_guard_forgets_nothing() -> None:
    phases = Phases(small_net())
    before = None
    for seed in range(3):
        phases.start_task(joint=True)
        weights = {n: layer.dense_weight.detach().clone() for n, layer in phases.layers.items()}
        _steps(phases, OPTIMIZERS["sgd-momentum-decay"], seed)
        assert any(not torch.equal(layer.dense_weight, weights[n]) for n, layer in phases.layers.items())
        phases.finish_task()
        before = _logits(phases, 0) if before is None else before
        assert torch.equal(_logits(phases, 0), before)


def test_training_the_whole_mask_does_overwrite_earlier_tasks() -> None:
    phases = Phases(small_net())
    _learn(phases, 0)
    before = _logits(phases, 0)
    _learn(phases, 1, exclusive=False)
    assert not torch.equal(_logits(phases, 0), before)


def test_the_weight_phase_changes_free_weights_only() -> None:
    phases = Phases(small_net())
    _learn(phases, 0)
    before = {n: layer.dense_weight.clone() for n, layer in phases.layers.items()}
    used = {n: phases.bank.mask(0, n) for n in phases.layers}
    _learn(phases, 1)
    for name, layer in phases.layers.items():
        changed = layer.dense_weight != before[name]
        free = phases.bank.mask(1, name) & ~used[name]
        assert torch.equal(changed, free), name


def test_free_values_are_the_only_masked_parameters_of_the_weight_phase() -> None:
    phases = Phases(small_net())
    phases.start_task()
    phases.start_weight_phase()
    kept = sum(int(layer.mask().sum()) for layer in phases.layers.values())
    assert sum(p.numel() for p in phases.masked_parameters()) == kept
    assert {n for n, _ in phases.model.named_parameters() if n.endswith((".weight", ".scores"))} == {"norm.weight"}


def test_each_task_has_its_own_biases_and_norms_from_the_same_start() -> None:
    phases = Phases(small_net())
    start = {n: t.clone() for n, t in phases.initial.items()}
    states = []
    for seed in (0, 1):
        phases.start_task()
        live = phases.model.state_dict()
        assert all(torch.equal(live[n], t) for n, t in start.items())
        _steps(phases, seed=seed)
        phases.finish_task()
        states.append({n: phases.model.state_dict()[n].clone() for n in start})
    assert not torch.equal(states[0]["head.bias"], states[1]["head.bias"])
    assert not torch.equal(states[0]["norm.running_mean"], states[1]["norm.running_mean"])
    phases.activate(0)
    assert all(torch.equal(phases.model.state_dict()[n], t) for n, t in states[0].items())


def test_parameters_frozen_beforehand_stay_frozen_and_are_not_stored() -> None:
    model = small_net()
    model.conv.bias.requires_grad_(False)
    phases = Phases(model)
    before = model.conv.bias.clone()
    _learn(phases, 0)
    assert torch.equal(model.conv.bias, before)
    assert "conv.bias" not in phases.states[0]
    assert set(phases.frozen_parameters()) == {"conv.bias"}


def test_a_shared_parameter_that_becomes_trainable_is_refused() -> None:
    model = small_net()
    model.conv.bias.requires_grad_(False)
    phases = Phases(model)
    model.conv.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"parameter conv\.bias was not trainable"):
        phases.start_task()
    assert phases.phase == "idle"


def test_calls_out_of_order_are_refused() -> None:
    phases = Phases(small_net())
    with pytest.raises(RuntimeError, match=r"finish_task belongs to the mask or joint or weight phase, but .* idle"):
        phases.finish_task()
    with pytest.raises(RuntimeError, match="start_weight_phase belongs to the mask phase, but the phase is idle"):
        phases.start_weight_phase()
    phases.start_task()
    for call in (phases.start_task, lambda: phases.activate(0)):
        with pytest.raises(RuntimeError, match="belongs to the idle phase, but the phase is mask"):
            call()
    assert phases.phase == "mask"


def test_a_converted_model_without_a_task_says_so() -> None:
    phases = Phases(small_net())
    with pytest.raises(RuntimeError, match="start a task or activate one"):
        phases.model(images())


def test_an_unknown_task_is_refused() -> None:
    phases = Phases(small_net())
    _learn(phases, 0)
    with pytest.raises(IndexError, match="task 3 is not known: 1 tasks are finished"):
        phases.activate(3)


@pytest.mark.parametrize("phase", ["mask", "weight", "joint"])
def test_abandoning_returns_to_the_finished_tasks_from_the(phase: str) -> None:
    phases = Phases(small_net())
    _learn(phases, 0)
    before, state = _logits(phases, 0), copy.deepcopy(phases.model.state_dict())
    phases.start_task(joint=phase == "joint")
    if phase == "weight":
        phases.start_weight_phase()
    _steps(phases, OPTIMIZERS["sgd-momentum-decay"])
    phases.abandon_task()
    assert (phases.phase, phases.active, len(phases.bank)) == ("idle", 0, 1)
    assert torch.equal(_logits(phases, 0), before)
    after = phases.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in state.items())
    assert phases.start_task() == 1


def test_abandoning_the_first_task_leaves_no_active_task() -> None:
    phases = Phases(small_net())
    with pytest.raises(RuntimeError, match="abandon_task belongs to"):
        phases.abandon_task()
    phases.start_task()
    _steps(phases)
    phases.abandon_task()
    assert (phases.phase, phases.active) == ("idle", None)
    live = phases.model.state_dict()
    assert all(torch.equal(live[n], t) for n, t in phases.initial.items())


def test_scores_of_the_wrong_shape_change_nothing() -> None:
    phases = Phases(small_net())
    scores = phases.random_scores(0)
    scores["head"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"scores of head must have shape \(4, 32\), got \(2, 2\)"):
        phases.start_task(scores)
    assert phases.phase == "idle"


def test_nan_scores_leave_the_mask_phase_open() -> None:
    phases = Phases(small_net())
    phases.start_task()
    layer = phases.layers["head"]
    assert layer.scores is not None
    layer.scores.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"1 of 128 entries of head\.scores are NaN"):
        phases.start_weight_phase()
    assert phases.phase == "mask"
    assert layer.scores is not None


def test_a_network_without_free_weights_is_legal() -> None:
    phases = Phases(small_net(density=1.0))
    _learn(phases, 0)
    before = _logits(phases, 0)
    phases.start_task()
    phases.start_weight_phase()
    assert phases.masked_parameters() == []
    _steps(phases, seed=1)
    phases.finish_task()
    assert phases.bank.total(1).free == 0
    assert torch.equal(_logits(phases, 0), before)


def test_a_glance_at_an_earlier_task_does_not_disturb_training() -> None:
    def run(glance: bool) -> dict[str, Tensor]:
        phases = Phases(small_net())
        _learn(phases, 0)
        phases.start_task()
        optimizer = OPTIMIZERS["adamw"](phases.parameters())
        for step in range(4):
            phases.model.train()
            optimizer.zero_grad()
            F.cross_entropy(phases.model(images(seed=step)), torch.arange(24) % 4).backward()
            optimizer.step()
            if glance:
                _logits(phases, 0)
            if step == 1:
                phases.start_weight_phase()
                optimizer = OPTIMIZERS["adamw"](phases.parameters())
        phases.finish_task()
        return copy.deepcopy(phases.model.state_dict())

    plain, glanced = run(False), run(True)
    assert plain.keys() == glanced.keys()
    assert all(torch.equal(plain[n], glanced[n]) for n in plain)


@pytest.mark.parametrize("phase", ["mask", "weight", "joint"])
def test_restore_returns_to_the_snapshot_of_the(phase: str) -> None:
    phases = Phases(small_net())
    phases.start_task(joint=phase == "joint")
    if phase == "weight":
        phases.start_weight_phase()
    _steps(phases)
    kept = phases.snapshot()
    phases.model.eval()
    before = phases.model(images()).detach()
    _steps(phases, seed=3)
    phases.model.eval()
    assert not torch.equal(phases.model(images()), before)
    phases.restore(kept)
    assert torch.equal(phases.model(images()), before)


def test_a_snapshot_of_another_phase_is_refused() -> None:
    phases = Phases(small_net())
    phases.start_task()
    kept = phases.snapshot()
    phases.start_weight_phase()
    with pytest.raises(RuntimeError, match=r"snapshot is of task 0.s mask phase .*, this is task 0.s weight phase"):
        phases.restore(kept)


def test_fold_gives_a_plain_network_of_the_task() -> None:
    phases = Phases(small_net())
    for seed in range(2):
        _learn(phases, seed)
    for task in range(2):
        plain = phases.fold(task).eval()
        assert not any(isinstance(m, SupermaskLayer) for m in plain.modules())
        assert all(type(m).__module__.startswith(("torch.", "networks")) for m in plain.modules())
        assert not plain._forward_pre_hooks
        assert not plain._forward_hooks
        out = _logits(phases, task)
        assert torch.allclose(plain(images(seed=999)), out, rtol=1e-5, atol=1e-5 * out.abs().max().item())
        sizes = [int((m.weight != 0).sum()) for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert sizes == [layer.k for layer in phases.layers.values()]
        torch.save(plain.state_dict(), io.BytesIO())
    assert phases.active == 1


def test_kept_scores_have_the_asked_dtype_and_order() -> None:
    phases = Phases(small_net(), keep_scores=torch.float16)
    phases.start_task()
    _steps(phases)
    exact = {n: layer.scores.detach().clone() for n, layer in phases.layers.items()}  # type: ignore[union-attr]
    phases.finish_task()
    for name, scores in phases.scores[0].items():
        assert torch.equal(scores, exact[name].half())
    dropped = Phases(small_net(), keep_scores=None)
    dropped.start_task()
    dropped.finish_task()
    assert dropped.scores == []


def test_random_scores_depend_on_seed_and_task_alone() -> None:
    one, two = Phases(small_net(), seed=3), Phases(small_net(), seed=3)
    _learn(one, 0)
    torch.manual_seed(99)
    for name, scores in one.random_scores(1).items():
        assert torch.equal(scores, two.random_scores(1)[name])
        assert not torch.equal(scores, two.random_scores(0)[name])


def test_random_scores_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    phases = Phases(small_net())
    with torch.device("meta"):
        drawn = phases.random_scores(0)
    for name, scores in phases.random_scores(0).items():
        assert torch.equal(drawn[name], scores)


def test_a_layer_of_zeros_whose_scores_would_get_no_gradient_is_refused() -> None:
    model = small_net()
    model.head.dense_weight.zero_()
    phases = Phases(model)
    with pytest.raises(ValueError, match="start_task: all weights of head are zero, so neither its scores"):
        phases.start_task()
    assert phases.phase == "idle"
    phases.start_task(joint=True)  # trains the weights


def test_a_weight_phase_opens_again_without_the_layers_that_the_task_never_called() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.body(x).relu())

    phases, other = (Phases(convert(TwoHeads(), 0.5)) for _ in range(2))
    phases.start_task()
    phases.model(torch.randn(4, 6)).sum().backward()
    phases.start_weight_phase()
    other.reopen("weight", Pieces({f"open/{name}": t for name, t in phases.open_tensors().items()}), True)
    kept = [int(layer.mask().sum()) for layer in other.layers.values()]
    assert kept == [int(layer.mask().sum()) for layer in phases.layers.values()] == [24, 12, 0]
