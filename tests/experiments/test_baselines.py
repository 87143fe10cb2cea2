"""The dense baselines: what each shares, protects and forgets."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from learning import inputs, logits, scripted
from networks import SmallNet, changes, picture, stream
from torch.nn import functional as F

from exssnet import Learner, PhaseOptions
from exssnet.continual.methods import EWC, PackNet, Replay, Sequential
from exssnet.continual.methods.packnet import largest
from exssnet.continual.metrics import forgetting
from exssnet.continual.records import OpenTask, TaskReport
from exssnet.experiments import baselines
from exssnet.experiments.baselines import BASELINES, DENSE, PLAIN, own_outputs_loss
from exssnet.tasks import Labelled, Relabelled, Task


def baseline(name: str, epochs: int = 4, lr: float = 0.02, **more: Any) -> Any:
    torch.manual_seed(0)
    if name == "packnet":
        more["tasks"] = 3
    model = SmallNet(6 if name == "multitask" else 2)
    return baselines.baseline(name, model, PhaseOptions(epochs, lr), **{"batch_size": 20, **more})


def opened(learned: Learner, task: Task) -> Learner:
    """The learner with a task open in the weight phase, as a hook sees it."""
    learned.phases.start_task()
    learned.phases.start_weight_phase(exclusive=False)
    learned._open = OpenTask(task, TaskReport(len(learned.phases.bank), task.name, task.classes))
    return learned


@pytest.mark.parametrize("name", BASELINES)
def test_a_stream_is_learned_by(name: str) -> None:
    learned = baseline(name)
    accuracy = learned.run(stream())
    assert accuracy.shape == (3, 3)
    assert accuracy.diagonal().min() > 0.7
    assert torch.equal(accuracy.nan_to_num(-1), learned.accuracy.nan_to_num(-1))


@pytest.mark.parametrize("name", BASELINES)
def test_runs_repeat_bit_for_bit_of(name: str) -> None:
    first, second = (baseline(name, 2).run(stream()) for _ in range(2))
    assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1))


def test_individual_networks_keep_as_many_as_there_are_tasks() -> None:
    learned, one = baseline("individual", 1), baseline("sequential", 1)
    learned.run(stream())
    one.run(stream()[:1])
    assert len(learned.networks) == 3
    assert learned.nbytes == 3 * one.nbytes > 3 * 4 * sum(w.dense_weight.numel() for w in one.phases.layers.values())


@pytest.mark.parametrize("name", ["individual", "packnet", "multitask"])
def test_nothing_is_forgotten_by(name: str) -> None:
    assert forgetting(baseline(name).run(stream())) == 0


def test_everything_but_the_head_is_masked_with_all_ones() -> None:
    learned = baseline("sequential", 0)
    learned.learn(stream()[0])
    assert set(learned.phases.layers) == {"conv", "grouped"}
    assert all(bool(layer.mask().all()) for layer in learned.phases.layers.values())


def test_fine_tuning_overwrites_shared_weights_and_keeps_each_head() -> None:
    learned, tasks = baseline("sequential"), stream(validation=0)
    learned.learn(tasks[0])
    weight, head = learned.phases.layers["conv"].dense_weight.clone(), learned.phases.states[0]["head.weight"].clone()
    learned.learn(tasks[1])
    assert bool((learned.phases.layers["conv"].dense_weight != weight).any())
    assert torch.equal(learned.phases.states[0]["head.weight"], head)


# EWC


def in_float64(task: Task) -> Task:
    """The same task with images of float64."""

    def doubled(data: Relabelled) -> Relabelled:
        assert isinstance(data.dataset, Labelled)
        return data.with_source(images=data.dataset.images.double())  # type: ignore[union-attr]

    return replace(task, train=doubled(task.train), validation=None, test=doubled(task.test))


def test_the_penalty_is_the_sum_over_tasks_of_fisher_times_squared_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options = {"mask": PhaseOptions(0), "weight": PhaseOptions(1, 0.02), "batch_size": 20, "keep_scores": None}
    learned = Learner(SmallNet(2).double(), EWC(strength=3.0, samples=10), **options)  # type: ignore[arg-type]
    ewc, terms = learned.method, []
    assert isinstance(ewc, EWC)
    for task in map(in_float64, stream()[:2]):
        before = {n: f.clone() for n, f in ewc.fisher.items()}
        learned.learn(task)
        new = {n: f - before.get(n, torch.zeros_like(f)) for n, f in ewc.fisher.items()}
        terms.append((new, {n: layer.dense_weight.flatten().clone() for n, layer in learned.phases.layers.items()}))
    learned.phases.start_task()
    learned.phases.start_weight_phase(exclusive=False)
    nothing = torch.zeros((), dtype=torch.float64)
    monkeypatch.setattr(Sequential, "loss", lambda *_: (nothing, nothing))
    gaps, largest = [], 0.0
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        for layer in learned.phases.layers.values():
            assert layer.free_values is not None
            layer.free_values.data.copy_(torch.randn(layer.free_values.shape, generator=generator))
        penalty = ewc.loss(learned, nothing, nothing)[0].item()
        expected = 1.5 * sum(
            (fisher[n] * (layer.free_values.detach() - weights[n]).square()).sum().item()
            for fisher, weights in terms
            for n, layer in learned.phases.layers.items()
        )
        gaps.append(expected - penalty)
        largest = max(largest, expected)
    assert gaps[0] > 1e-6 * largest  # the constant: the weights moved between the tasks
    assert gaps[0] == pytest.approx(gaps[1], rel=0, abs=1e-12 * largest)  # float64 has sixteen digits


def test_the_fisher_information_is_the_mean_squared_gradient_of_drawn_labels() -> None:
    learned, task = baseline("ewc", 1, samples=3), stream()[0]
    learned.learn(task)
    fisher, generator = learned.method.fisher, learned._generator(0, 3)
    picked = torch.randperm(len(task.train), generator=generator)[:3]
    expected = torch.zeros_like(fisher["conv"])
    with learned.phases.using(0) as model:
        model.eval()
        for layer in learned.phases.layers.values():
            whole = torch.ones_like(layer.dense_weight, dtype=torch.bool)
            layer.use_values(whole, whole)
        for i in picked.tolist():
            x, _ = task.train[[i]]
            out = model(x)[:, :2]
            drawn = torch.multinomial(out.detach().softmax(1), 1, generator=generator)[:, 0]
            values = learned.phases.layers["conv"].free_values
            assert values is not None
            expected += torch.autograd.grad(F.cross_entropy(out, drawn), values)[0].square() / 3
    torch.testing.assert_close(fisher["conv"], expected)


def test_consolidation_leaves_model_and_tasks_alone() -> None:
    learned = opened(baseline("ewc", 1, samples=5), stream()[0])
    before = picture(learned.phases)
    learned.method.after_task(learned)
    assert learned.method.fisher.keys() == learned.phases.layers.keys()
    assert changes(before, picture(learned.phases)) == []


def test_a_strong_penalty_holds_the_weights_that_matter() -> None:
    moved = []
    for strength in (0.0, 1e5):
        learned, tasks = baseline("ewc", 2, strength=strength, samples=20), stream(validation=0)
        learned.learn(tasks[0])
        fisher, before = (
            learned.method.fisher["conv"].clone(),
            learned.phases.layers["conv"].dense_weight.flatten().clone(),
        )
        learned.learn(tasks[1])
        moved.append(float((fisher * (learned.phases.layers["conv"].dense_weight.flatten() - before).square()).sum()))
    assert moved[1] < 0.1 * moved[0]


# Replay


def test_replay_keeps_so_many_items_of_each_class_and_counts_their_bytes() -> None:
    learned, task = baseline("replay", 1, memory=3), stream()[0]
    learned.learn(task)
    items, labels, classes = learned.method.kept[0]
    assert labels.bincount().tolist() == [3, 3]
    assert classes == 2
    assert items.nbytes + labels.nbytes == 6 * 64 * 4 + 6 * 8
    assert learned.nbytes - Sequential.nbytes(learned.method, learned) == items.nbytes + labels.nbytes


def test_replay_trains_the_heads_and_norms_of_earlier_tasks() -> None:
    learned, tasks = baseline("replay", 1), stream(validation=0)
    learned.learn(tasks[0])
    before = {n: t.detach().clone() for n, t in learned.phases.states[0].items()}
    learned.learn(tasks[1])
    after = learned.phases.states[0]
    assert {n for n in before if not torch.equal(before[n], after[n])} >= {
        "head.weight",
        "norm.weight",
        "norm.running_mean",
    }


def test_an_earlier_task_whose_best_epoch_comes_back_has_its_head_of_then() -> None:
    learned, tasks = baseline("replay", 1), stream()
    learned.learn(tasks[0])
    opened(learned, tasks[1])
    kept = learned._snapshot()
    before = learned.phases.states[0]["head.weight"].detach().clone()
    with torch.no_grad():
        learned.phases.states[0]["head.weight"].add_(1)
    learned._put_back(kept)
    assert torch.equal(learned.phases.states[0]["head.weight"], before)


def test_the_loss_of_replay_is_the_mean_of_new_and_old() -> None:
    learned, tasks = baseline("replay", 1), stream()
    learned.learn(tasks[0])
    opened(learned, tasks[1])
    learned.model.eval()
    x, y = tasks[1].train[range(10)]
    draw = torch.Generator()
    draw.set_state(learned.method.draw.get_state())
    loss, _ = learned.method.loss(learned, x, y)
    torch.randint(1, (), generator=draw)
    items, labels, _ = learned.method.kept[0]
    drawn = torch.randint(len(labels), (10,), generator=draw)
    new = F.cross_entropy(learned.model(x), y)
    values = {n: layer.free_values for n, layer in learned.phases.layers.items()}
    state = {**learned.phases.states[0], **{f"{n}.free_values": v for n, v in values.items()}}
    old = F.cross_entropy(torch.func.functional_call(learned.model, state, (items[drawn],)), labels[drawn])
    torch.testing.assert_close(loss, (new + old) / 2)


# PackNet


def test_each_task_keeps_an_equal_share_and_the_last_the_rest() -> None:
    learned = baseline("packnet", 2)
    learned.run(stream())
    uses = [learned.phases.bank.use[t]["conv"] for t in range(3)]
    assert [use.free for use in uses] == [24, 24, 24]  # of 72 weights
    assert [use.kept for use in uses] == [24, 48, 72]


def test_packnet_leaves_earlier_logits_as_they_were() -> None:
    learned, tasks = baseline("packnet", 2), stream()
    learned.learn(tasks[0])
    before = logits(learned.phases, 0, inputs(tasks[0]))
    for task in tasks[1:]:
        learned.learn(task)
        assert torch.equal(logits(learned.phases, 0, inputs(tasks[0])), before)


def test_pruning_keeps_the_largest_magnitudes() -> None:
    learned, tasks = baseline("packnet", 2), stream()
    learned.phases.start_task()
    learned.phases.start_weight_phase()
    values = learned.phases.layers["conv"].free_values
    assert values is not None
    kept = largest(learned, "conv", 0.25).flatten()
    assert int(kept.sum()) == 18
    assert values.detach().abs()[kept].min() >= values.detach().abs()[~kept].max()
    assert len(tasks) == 3


def test_retraining_counts_even_if_it_is_worse_than_what_was_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, task = baseline("packnet", 4), stream()[0]
    scripted(monkeypatch, learned, [(0.99, 0.0), (0.99, 0.0), (0.5, 1.0), (0.6, 1.0)])
    pruned: dict[str, torch.Tensor] = {}
    prune = learned.phases.prune

    def watched(keep: dict[str, torch.Tensor]) -> None:
        prune(keep)
        values = learned.phases.layers["conv"].free_values
        assert values is not None
        pruned["conv"] = values.detach().clone()

    monkeypatch.setattr(learned.phases, "prune", watched)
    learned.learn(task)
    kept = learned.phases.bank.mask(0, "conv")
    assert bool((learned.phases.layers["conv"].dense_weight[kept] != pruned["conv"]).any())


def test_one_task_more_than_packnet_was_made_for_is_refused() -> None:
    learned = baseline("packnet", 1)
    tasks = stream(4)
    with pytest.raises(ValueError, match="made for 3 tasks, task 3 is one more"):
        learned.run(tasks)
    assert (learned.phases.phase, len(learned.phases.bank)) == ("idle", 3)


# Multitask


def test_the_loss_of_joint_training_sees_each_items_own_outputs() -> None:
    learned, tasks = baseline("multitask", 1), stream()
    learned.run(tasks)
    x, y = Relabelled.join([t.train for t in tasks], [0, 2, 4])[[0, 70, 150]]
    with torch.no_grad():
        learned.model.eval()
        loss, _ = own_outputs_loss(learned.model, [2, 2, 2])(x, y)
        all_outputs = learned.model(x)
        own = torch.stack(
            [
                F.cross_entropy(all_outputs[i : i + 1, 2 * t : 2 * t + 2], y[i : i + 1] - 2 * t)
                for i, t in enumerate((y // 2).tolist())
            ]
        )
    torch.testing.assert_close(loss, own.mean())


def test_joined_data_is_the_parts_one_after_another_under_shifted_labels() -> None:
    tasks = stream()
    joined = Relabelled.join([t.train for t in tasks], [0, 2, 4])
    sizes = [len(t.train) for t in tasks]
    assert len(joined) == sum(sizes)
    order = [sizes[0] + 3, 1, sizes[0] + sizes[1], 0]
    x, y = joined[order]
    wanted = [(tasks[1].train[3], 2), (tasks[0].train[1], 0), (tasks[2].train[0], 4), (tasks[0].train[0], 0)]
    assert torch.equal(x, torch.stack([item for (item, _), _ in wanted]))
    assert torch.equal(y, torch.stack([label + shift for (_, label), shift in wanted]))
    assert torch.equal(joined[1][0], tasks[0].train[1][0])


# The head


class Judged(SmallNet):
    """Another linear layer is registered last, whose output is not the model's."""

    def __init__(self) -> None:
        super().__init__(2)
        self.judge = torch.nn.Linear(32, 1)


def test_a_wrongly_guessed_head_is_refused_before_training() -> None:
    learned = Learner(Judged(), Sequential(), weight=PhaseOptions(1))
    sentence = "the last nn.Linear, 'judge', was taken for the head, but its output is not the model's, 'head' does"
    before = picture(learned.phases)
    with pytest.raises(ValueError, match=sentence):
        learned.run(stream())
    assert changes(before, picture(learned.phases)) in ([], [".selection_hint"])


@pytest.mark.parametrize("name", DENSE)
def test_a_named_head_is_each_tasks_own(name: str) -> None:
    more = {"tasks": 3} if name == "packnet" else {}
    learned = baselines.baseline(name, Judged(), PhaseOptions(1), head="head", **more)
    learned.run(stream())
    assert set(learned.phases.layers) == {"conv", "grouped", "judge"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Learner(SmallNet(), Sequential(head="hat")),
            "head='hat' is no module of the model; its linear",
        ),
        (lambda: EWC(strength=-1), "strength of at least 0 .* got -1 and 500"),
        (lambda: Replay(memory=0), "at least 1 item a class, got 0"),
        (lambda: Learner(torch.nn.Conv2d(1, 1, 1), Sequential()), "this model has no nn.Linear: name the layer"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_names_are_those_of_the_classes() -> None:
    assert {name: kind.__name__.lower() for name, kind in BASELINES.items()} == {name: name for name in BASELINES}
    assert (PackNet.exclusive, Replay.exclusive) == (True, False)


# Plain networks


@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks_are_checked_before_training(name: str) -> None:
    learned, tasks = baseline(name), stream()
    with pytest.raises(ValueError, match="must return logits, a floating tensor"):
        learned.run([*tasks[:2], replace(tasks[2], name="birds", classes=7)])
    assert (learned.reports, learned.networks) == ([], [])


@pytest.mark.parametrize("name", PLAIN)
def test_divergence_of_plain_networks_names_task_and_rate(name: str) -> None:
    with pytest.raises(FloatingPointError, match=r"^(task 0|all tasks): .* NaN|nan.*; lower the learning rate 1e\+30$"):
        baseline(name, lr=1e30).run(stream(validation=0))


def test_an_individual_network_is_trained_like_sequential_training_of_one_task() -> None:
    alone, one = baseline("individual", 2), baseline("sequential", 2)
    assert torch.equal(alone.run(stream(1)), one.run(stream(1)))
    trained = alone.networks[0].state_dict()
    assert torch.equal(trained["conv.weight"], one.phases.layers["conv"].dense_weight)
    assert all(torch.equal(trained[name], value) for name, value in one.phases.states[0].items())
