"""Avalanche's own strategies and benchmarks learn experiences as tasks of `Phases`."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exssnet

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche and its dependencies warn of their own
benchmarks = pytest.importorskip("avalanche.benchmarks")
from avalanche.training.supervised import Naive  # noqa: E402

from exssnet.compat.avalanche import Supermask, SupermaskPlugin, tasks  # noqa: E402
from exssnet.continual.methods import EWC, PackNet, Replay, Sequential  # noqa: E402

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"train_epochs": 4, "train_mb_size": 16, "eval_mb_size": 64, "evaluator": None}


class Recorded(SupermaskPlugin):
    """Records the phases in which it made optimizers, and the phase of each step."""

    def __init__(self, phases: exssnet.Phases) -> None:
        super().__init__(phases, self.make, mask_epochs=2)
        self.made: list[str] = []
        self.steps: list[str] = []

    def make(self, phases: exssnet.Phases) -> torch.optim.Optimizer:
        self.made.append(phases.phase)
        return phases.optimizer(torch.optim.AdamW, lr=1e-2)

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        held = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in self.phases.parameters()}
        self.steps.append(self.phases.phase)


class Evaluated(SupermaskPlugin):
    """Records the logits of each evaluated experience."""

    logits: dict[int, Tensor]

    def after_eval_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.logits[strategy.experience.current_experience] = strategy.mb_output.clone()


def benchmark() -> Any:
    data = [(X, (X[:, task] > 0).long()) for task in range(2)]
    return benchmarks.tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=[0, 1])


def phases() -> exssnet.Phases:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    return exssnet.Phases(exssnet.convert(model, density=0.3))


def named(method: Any) -> str:
    return method if isinstance(method, str) else type(method).__name__


def naive(owner: exssnet.Phases, plugin: SupermaskPlugin) -> Any:
    first = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    return Naive(model=owner.model, optimizer=first, plugins=[plugin], **OPTIONS)


def test_each_experience_is_a_task_in_two_phases() -> None:
    owner = phases()
    plugin = Recorded(owner)
    strategy = naive(owner, plugin)
    for experience in benchmark().train_stream:
        strategy.train(experience)
    assert plugin.made == ["mask", "weight"] * 2
    assert plugin.steps == (["mask"] * 8 + ["weight"] * 8) * 2
    assert plugin.tasks == {0: 0, 1: 1}
    assert len(owner.bank) == 2


def test_evaluation_is_by_the_network_of_the_experience_and_nothing_is_forgotten() -> None:
    owner, stream = phases(), benchmark()
    plugin = Evaluated(owner, lambda p: p.optimizer(torch.optim.AdamW, lr=1e-2), mask_epochs=2)
    plugin.logits = {}
    strategy = naive(owner, plugin)
    strategy.train(stream.train_stream[0])
    strategy.eval(stream.test_stream)
    before = dict(plugin.logits)
    strategy.train(stream.train_stream[1])
    strategy.eval(stream.test_stream)
    assert torch.equal(plugin.logits[0], before[0])
    assert not torch.equal(plugin.logits[1], before[1])
    for task in range(2):
        with owner.using(task) as network, torch.no_grad():
            assert torch.equal(plugin.logits[task], network.eval()(X))


def test_evaluation_during_training_leaves_the_open_task_alone() -> None:
    stream, ends = benchmark(), []
    for every in (-1, 1):
        owner = phases()
        options = OPTIONS | {"eval_every": every, "mask_epochs": 2}
        strategy = Supermask(owner, lambda p: p.optimizer(torch.optim.SGD, lr=0.1), **options)
        torch.manual_seed(3)
        strategy.train(stream.train_stream, eval_streams=[stream.test_stream], shuffle=False)
        ends.append(owner.state_dict()["tensors"])
    assert [n for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])] == []


@pytest.mark.parametrize("method", [*exssnet.METHODS, EWC(), Replay(), PackNet(tasks=2), Sequential()], ids=named)
def test_every_method_learns_a_benchmark_with_labels_from_anywhere(method: Any) -> None:
    data = [(X, (X[:, task] > 0).long() + 3 + 2 * task) for task in range(2)]
    source = benchmarks.tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=[0, 1])
    stream = tasks(source, validation=0.25)
    assert [task.labels for task in stream] == [(3, 4), (5, 6)]
    assert [(len(task.train) + len(task.validation), len(task.test)) for task in stream] == [(64, 64)] * 2
    item, label = stream[1].test[5]
    assert torch.equal(item, X[5])
    assert label == (X[5, 1] > 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    masked = isinstance(method, str)
    options = exssnet.PhaseOptions(2, 0.03)
    model = exssnet.convert(model, density=0.3) if masked else model
    learner = exssnet.Learner(model, method, mask=options, weight=options, batch_size=16)
    learner.run(stream)
    assert learner.accuracy.shape == (2, 2)


def test_another_model_is_refused() -> None:
    owner = phases()
    strategy = naive(owner, SupermaskPlugin(owner, lambda p: p.optimizer(torch.optim.SGD, lr=0.1)))
    strategy.model = nn.Linear(8, 2)
    with pytest.raises(ValueError, match="the strategy must have the model of the phases"):
        strategy.train(benchmark().train_stream[0])
    assert owner.phase == "idle"


def test_example_runs_and_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parents[2] / "examples/frameworks/avalanche_strategy.py"
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(example))
    assert len(names["phases"].bank) == 2
    assert [v for n, v in names["accuracies"].items() if n.startswith("Top1_Acc_Exp")] == pytest.approx([1, 1], abs=0.3)
    assert len(example.read_text().splitlines()) <= 30
