"""What tasks share, and who may change it: buffers of every kind, strangers in the model, looks at other tasks."""

import copy
import io
import threading
from typing import Any

import pytest
import torch
from networks import changes, images, picture, small_net
from remembering import X, learn, logits_of, remembering_net, train
from torch import Tensor, nn
from torch.nn import functional as F

from exssnet import checkpoint
from exssnet.continual.phases import Phases
from exssnet.continual.serving import Served
from exssnet.nn import SupermaskLayer, convert, evaluation


@pytest.fixture
def remembering() -> tuple[Phases, list[Tensor]]:
    """Two tasks learned, and their networks' logits as they were finished."""
    phases, expected = Phases(remembering_net()), []
    for task in range(2):
        learn(phases, float(task))
        with evaluation(phases.model):
            expected.append(phases.model(X))
    assert not torch.equal(*expected)
    return phases, expected


def test_buffers_of_every_kind_belong_to_their_task(remembering: tuple[Phases, list[Tensor]]) -> None:
    phases, logits = remembering
    phases.start_task()
    assert phases.model[0].last is None
    assert phases.model[0].seen.shape == (1, 6)
    train(phases, X + 7)
    for task in range(2):
        assert torch.equal(logits_of(phases, task), logits[task])
    assert phases.model[0].seen.shape == (4, 6)
    phases.abandon_task()
    for task in (0, 1, 0):
        phases.activate(task)
        with evaluation(phases.model):
            assert torch.equal(phases.model(X), logits[task])
        served = Served(phases)
        assert torch.equal(served(X, [task] * len(X)), logits[task])
        assert torch.equal(served(X, [1 - task] * len(X)), logits[1 - task])
        with evaluation(plain := phases.fold(task)):
            torch.testing.assert_close(plain(X), logits[task])


def test_buffers_of_every_kind_are_in_the_state(remembering: tuple[Phases, list[Tensor]], tmp_path: Any) -> None:
    phases, logits = remembering
    phases.start_task()
    train(phases, X + 2)
    file = io.BytesIO()
    torch.save(phases.state_dict(), file)
    file.seek(0)
    other = Phases(remembering_net())
    other.model[0](X)  # makes the buffer that the model registers late
    other.load_state_dict(torch.load(file))
    for p in (phases, other):
        p.start_weight_phase()
        train(p, X + 2)
        p.finish_task()
    logits.append(logits_of(phases, 2))
    checkpoint.save(phases, tmp_path / "model.safetensors")
    again = Phases(remembering_net())
    again.model[0](X)
    checkpoint.load(again, tmp_path / "model.safetensors")
    for task, expected in enumerate(logits):
        assert torch.equal(logits_of(other, task), expected)
        assert torch.equal(logits_of(again, task), expected)


def test_a_state_with_a_buffer_that_the_model_has_not_is_refused(
    remembering: tuple[Phases, list[Tensor]], tmp_path: Any
) -> None:
    checkpoint.save(remembering[0], tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"0/0\.late, .* no place in the model"):
        checkpoint.load(Phases(remembering_net()), tmp_path / "model.safetensors")


def test_what_was_saved_without_non_persistent_buffers_loads(tmp_path: Any) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.ones(6), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    def network() -> nn.Module:
        torch.manual_seed(0)
        return convert(nn.Sequential(Shifted(), nn.Linear(6, 3)), 0.5)

    phases = Phases(network())
    learn(phases, 0.0)
    checkpoint.save(phases, tmp_path / "model.safetensors")
    assert not any("shift" in name for name in checkpoint.read(tmp_path / "model.safetensors")[0])
    again = Phases(network())
    checkpoint.load(again, tmp_path / "model.safetensors")
    assert torch.equal(logits_of(again, 0), logits_of(phases, 0))


CALLS = {
    "start_task": lambda p: p.start_task(),
    "start_weight_phase": lambda p: p.start_weight_phase(),
    "finish_task": lambda p: p.finish_task(),
    "activate": lambda p: p.activate(0),
    "using": lambda p: p.using(0).__enter__(),
}
STRANGERS = {
    "norm": lambda m: m.insert(1, nn.BatchNorm1d(6)),
    "norm without parameters": lambda m: m.append(nn.BatchNorm1d(3, affine=False)),
    "another layer of the same shape": lambda m: m.__setitem__(3, convert(nn.Linear(16, 3), 0.4)),
    "plain layer": lambda m: m.__setitem__(1, nn.Linear(6, 16)),
    "removed": lambda m: m.__delitem__(2),
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("call", CALLS)
def test_what_was_put_into_the_model_later_is_refused(call: str, stranger: Any) -> None:
    phases = Phases(convert(nn.Sequential(nn.Identity(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), 0.4))
    learn(phases, 0.0)
    if call in ("start_weight_phase", "finish_task"):
        phases.start_task()
        train(phases, X)
    stranger(phases.model)
    before = picture(phases)
    with pytest.raises(RuntimeError, match=f"{call}: the module '.' was put in, replaced or removed"):
        CALLS[call](phases)
    assert changes(before, picture(phases)) == []


def test_a_parameter_that_trains_only_later_is_refused_when_the_task_is_finished() -> None:
    model = small_net()
    model.norm.requires_grad_(False)
    phases = Phases(model)
    phases.start_task()
    model.norm.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"finish_task: parameter norm\.weight was not trainable"):
        phases.finish_task()


def test_extra_state_that_changes_is_refused() -> None:
    class Counting(nn.Identity):
        count = torch.zeros(())

        def get_extra_state(self) -> Any:
            return {"count": self.count, "more": [1, "a"]}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    model = convert(nn.Sequential(nn.Linear(6, 3), Counting()), 0.4)
    phases = Phases(model)
    learn(phases, 0.0)
    assert torch.equal(Served(phases)(X, [0] * len(X)), logits_of(phases, 0))
    phases.fold(0).load_state_dict(phases.fold(0).state_dict())
    phases.start_task()
    model[1].count = torch.ones(())
    with pytest.raises(RuntimeError, match=r"extra state .* of module '1' has changed"):
        phases.finish_task()


# Snapshots


def test_a_snapshot_of_another_task_is_refused() -> None:
    phases = Phases(small_net())
    phases.start_task()
    kept = phases.snapshot()
    phases.finish_task()
    phases.start_task()
    before = picture(phases)
    with pytest.raises(RuntimeError, match=r"of task 0's mask phase .*, this is task 1's mask phase"):
        phases.restore(kept)
    assert changes(before, picture(phases)) == []


def test_a_snapshot_from_before_pruning_is_refused() -> None:
    phases = Phases(small_net())
    phases.start_task()
    phases.start_weight_phase()
    kept = phases.snapshot()
    keep = {name: torch.zeros_like(layer.dense_weight, dtype=torch.bool) for name, layer in phases.layers.items()}
    keep["head"].view(-1)[phases.free_mask("head").view(-1).nonzero()[0]] = True
    phases.prune(keep)
    before = picture(phases)
    with pytest.raises(RuntimeError, match="148 masked parameters, this is task 0's weight phase with 1 masked"):
        phases.restore(kept)
    assert changes(before, picture(phases)) == []


# Tasks that are adopted


def _task(phases: Phases) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    masks = {name: phases.bank.packed(0, name) for name in phases.layers}
    return masks, phases.states[0], phases.scores[0]


@pytest.fixture
def two() -> tuple[Phases, Phases]:
    """A finished task, and another `Phases` with the same weights."""
    learned, other = Phases(small_net()), Phases(small_net())
    learned.start_task()
    optimizer = learned.optimizer(torch.optim.SGD, lr=0.1)
    F.cross_entropy(learned.model(images()), torch.arange(24) % 4).backward()
    optimizer.step()
    learned.finish_task()
    return learned, other


def test_an_adopted_task_is_a_copy(two: tuple[Phases, Phases]) -> None:
    learned, other = two
    masks, state, scores = (copy.deepcopy(part) for part in _task(learned))
    other.adopt(masks, state, scores)
    before = picture(other)
    for part in (masks, state, scores):
        for tensor in part.values():
            tensor.zero_()
    assert changes(before, picture(other)) == []
    assert torch.equal(logits_of(other, 0, images()), logits_of(learned, 0, images()))


WRONG = {
    "no place": lambda masks, state, scores: (masks, {**state, "nowhere": torch.ones(2)}, scores),
    "nothing for head, the model": lambda masks, state, scores: (
        masks, state, {n: t for n, t in scores.items() if n != "head"}),
    r"\(3,\) for norm.bias": lambda masks, state, scores: (masks, {**state, "norm.bias": torch.ones(3)}, scores),
    "expected torch.float32": lambda masks, state, scores: (
        masks, {**state, "norm.bias": torch.ones(8, dtype=torch.int32)}, scores),
    "NaN": lambda masks, state, scores: (masks, state, {**scores, "head": scores["head"] * torch.nan}),
    "expected masks of the layers": lambda masks, state, scores: ({"head": masks["head"]}, state, scores),
}  # fmt: skip


@pytest.mark.parametrize(("sentence", "wrong"), WRONG.items(), ids=range(len(WRONG)))
def test_a_task_that_does_not_fit_is_not_adopted(two: tuple[Phases, Phases], sentence: str, wrong: Any) -> None:
    learned, other = two
    before = picture(other)
    with pytest.raises(ValueError, match=sentence):
        other.adopt_all([_task(learned), wrong(*_task(learned))])
    assert changes(before, picture(other)) == []


def test_scores_stay_beside_their_task(two: tuple[Phases, Phases]) -> None:
    learned, other = two
    masks, state, _ = _task(learned)
    other.adopt(masks, state, {})
    other.start_task()
    other.finish_task()
    assert (len(other.bank), other.scores[0], set(other.scores[1])) == (2, {}, set(other.layers))


# Looks at other tasks


@pytest.mark.parametrize("phase", ["idle", "mask", "weight"])
def test_inside_a_look_at_a_task_nothing_else_may_be_called(phase: str, two: tuple[Phases, Phases]) -> None:
    phases = two[0]
    if phase != "idle":
        phases.start_task()
    if phase == "weight":
        phases.start_weight_phase()
    before, state, moment = picture(phases), copy.deepcopy(phases.state_dict()), phases.snapshot()
    inside = {
        "adopt": lambda: phases.adopt(*_task(phases)), "start_task": phases.start_task,
        "activate": lambda: phases.activate(0), "finish_task": phases.finish_task, "state_dict": phases.state_dict,
        "load_state_dict": lambda: phases.load_state_dict(state), "abandon_task": phases.abandon_task,
        "optimizer": lambda: phases.optimizer(torch.optim.SGD, lr=1), "snapshot": phases.snapshot,
        "restore": lambda: phases.restore(moment),
    }  # fmt: skip
    with phases.using(0) as model:
        for call in inside:
            with pytest.raises(RuntimeError, match=f"{call}: this thread is in a block of `using`"):
                inside[call]()
        with pytest.raises(RuntimeError, match="load_state_dict: in a block of `using`"):
            model.load_state_dict(model.state_dict())
        with phases.using(0):
            phases.fold(0)
    assert changes(before, picture(phases)) == []


def test_another_thread_is_refused_while_one_looks(two: tuple[Phases, Phases]) -> None:
    phases, said = two[0], []

    def look() -> None:
        try:
            with phases.using(0):
                said.append("looked")
        except RuntimeError as error:
            said.append(str(error))

    with phases.using(0):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    assert said == ["using: another thread is in a block of `using`, which puts the model back at its end", "looked"]


@pytest.mark.parametrize("look", [False, True])
def test_a_backward_pass_may_follow_a_look_at_another_task(two: tuple[Phases, Phases], look: bool) -> None:
    """Gradients are bit for bit those without the look, batch norm's among them."""
    phases = two[0]
    phases.start_task()
    loss = F.cross_entropy(phases.model.train()(images()), torch.arange(24) % 4)
    statistics = [t.clone() for t in phases.statistics()]
    if look:
        with phases.using(0) as model:
            model(images(seed=1))  # in training mode: its statistics are its own
    loss.backward()
    assert all(map(torch.equal, phases.statistics(), statistics))
    gradients = [p.grad for p in phases.parameters()]
    if not look:
        test_a_backward_pass_may_follow_a_look_at_another_task.expected = gradients  # type: ignore[attr-defined]
    else:
        expected = test_a_backward_pass_may_follow_a_look_at_another_task.expected  # type: ignore[attr-defined]
        assert all(map(torch.equal, gradients, expected))


# Owners


def test_a_phases_of_a_model_around_it_owns_its_layers(two: tuple[Phases, Phases]) -> None:
    phases = two[0]
    Phases(nn.Sequential(phases.model))
    with pytest.raises(RuntimeError, match="activate: another Phases was made for this model since"):
        phases.activate(0)


def test_loading_a_part_of_the_model_may_not_change_finished_tasks(two: tuple[Phases, Phases]) -> None:
    phases = two[0]
    phases.model.grouped.load_state_dict(phases.model.grouped.state_dict())
    earlier = {name: t.clone() for name, t in phases.model.grouped.state_dict().items()}
    earlier["dense_weight"] += 1
    before = picture(phases)
    with pytest.raises(RuntimeError, match=r"load_state_dict: grouped\.dense_weight differs from the model's"):
        phases.model.grouped.load_state_dict(earlier)
    with pytest.raises(RuntimeError, match=r"norm\.bias differs"):
        phases.model.norm.load_state_dict({**phases.model.norm.state_dict(), "bias": torch.ones(8)})
    assert changes(before, picture(phases)) == []


def test_kept_scores_are_no_optimizers(two: tuple[Phases, Phases]) -> None:
    phases = two[0]
    phases.start_task()
    parameters = phases.masked_parameters()
    phases.finish_task()
    kept = {name: t.clone() for name, t in phases.scores[1].items()}
    with torch.no_grad():
        for p in parameters:
            p.add_(1)
    assert all(torch.equal(phases.scores[1][name], t) for name, t in kept.items())


def test_inference_mode_around_the_phases_makes_nothing_that_cannot_train() -> None:
    phases = Phases(remembering_net())
    modes = torch.inference_mode
    with modes():
        phases.start_task()
    train(phases, X)
    with modes():
        moment = phases.snapshot()
        phases.restore(moment)
        phases.start_weight_phase()
    train(phases, X)
    with modes():
        state = copy.deepcopy(phases.state_dict())
        phases.finish_task()
        expected = logits_of(phases, 0)
        phases.load_state_dict(state)
    train(phases, X)
    with modes():
        phases.abandon_task()
        phases.load_state_dict(state)
        phases.finish_task()
    assert torch.equal(logits_of(phases, 0), expected)
    phases.model(X.clone().requires_grad_()).sum().backward()
    learn(phases, 1.0)
    assert torch.equal(logits_of(phases, 0), expected)


@pytest.mark.parametrize("joint", [False, True], ids=["mask", "joint"])
@pytest.mark.parametrize("end", ["finish_task", "abandon_task"])
def test_a_task_goes_on_after_a_cast(joint: bool, end: str) -> None:
    phases = Phases(remembering_net())
    learn(phases, 0.0)
    phases.start_task(joint=joint)
    phases.model.to(torch.float64)
    before = logits_of(phases, 0, X.double())
    weights = [layer.dense_weight.detach().clone() for layer in phases.layers.values()]
    train(phases, X.double() + 1)
    live = [layer.dense_weight for layer in phases.layers.values()]
    assert any(not torch.equal(a, b) for a, b in zip(live, weights, strict=True)) == joint
    copy.deepcopy(phases.model)
    getattr(phases, end)()
    if end == "finish_task":
        with evaluation(phases.model):
            now = phases.model(X.double())
        assert torch.equal(logits_of(phases, 1, X.double()), now)
    assert torch.equal(logits_of(phases, 0, X.double()), before)


def test_what_does_not_own_the_model_saves_and_serves_nothing(two: tuple[Phases, Phases], tmp_path: Any) -> None:
    phases = two[0]
    served = Served(phases)
    Phases(phases.model)
    with pytest.raises(RuntimeError, match="save: another Phases was made"):
        checkpoint.save(phases, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="Served: another Phases was made"):
        served(images(), [0] * 24)
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_a_stranger_is_not_served(two: tuple[Phases, Phases]) -> None:
    served = Served(two[0])
    two[0].model.pool = nn.BatchNorm2d(8, affine=False)
    for serve in (lambda: served(images(), [0] * 24), lambda: Served(two[0])):
        with pytest.raises(RuntimeError, match="Served: the module 'pool' was put in"):
            serve()


def test_a_phases_that_is_made_in_a_joint_phase_has_the_weights_from_before(two: tuple[Phases, Phases]) -> None:
    phases = two[0]
    weights = {name: layer.dense_weight.clone() for name, layer in phases.layers.items()}
    phases.start_task(joint=True)
    optimizer = phases.optimizer(torch.optim.SGD, lr=0.1)
    F.cross_entropy(phases.model(images()), torch.arange(24) % 4).backward()
    optimizer.step()
    other = Phases(phases.model)
    assert all(torch.equal(layer.dense_weight, weights[name]) for name, layer in other.layers.items())
    other.start_task(joint=True)
    other.optimizer(torch.optim.SGD, lr=0.1)
    copy.deepcopy(other.model)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("call", ["activate", "start_task", "joint", "start_weight_phase", "adopt"])
def test_a_call_that_fails_on_its_way_leaves_everything(
    call: str, number: int, two: tuple[Phases, Phases], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of memory, say: at each layer."""
    phases = two[0]
    phases.adopt(*_task(phases))
    calls = {
        "activate": lambda: phases.activate(0), "start_task": phases.start_task,
        "joint": lambda: phases.start_task(joint=True),
        "start_weight_phase": phases.start_weight_phase, "adopt": lambda: phases.adopt(*_task(phases)),
    }  # fmt: skip
    if call == "start_weight_phase":
        phases.start_task()
        optimizer = phases.optimizer(torch.optim.SGD, lr=0.1)
        phases.model(images())
    before, left = picture(phases), [number]

    def failing(real: Any) -> Any:
        def fail(*arguments: Any) -> None:
            if not left[0]:
                raise MemoryError
            left[0] -= 1
            real(*arguments)

        return fail

    with monkeypatch.context() as patch:
        for name in ("use_scores", "use_values"):
            patch.setattr(SupermaskLayer, name, failing(getattr(SupermaskLayer, name)))
        with pytest.raises(MemoryError):
            calls[call]()
    assert changes(before, picture(phases)) == []
    if call == "start_weight_phase":
        F.cross_entropy(phases.model(images()), torch.arange(24) % 4).backward()
        optimizer.step()
    calls[call]()


def test_a_layer_copies_its_scores() -> None:
    layer = small_net().conv
    scores = torch.randn(layer.dense_weight.shape)
    layer.use_scores(scores)
    kept = layer.scores.detach().clone()
    scores.zero_()
    assert torch.equal(layer.scores, kept)
