"""Avalanche: a plugin and a strategy learn experiences as tasks of `Phases`, and benchmarks become task streams."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from ..continual.phases import Phases
from ..tasks import Relabelled, Task, in_one_task
from .task_run import TaskRun

MakeOptimizer = Callable[[Phases], torch.optim.Optimizer]


class SupermaskPlugin(SupervisedPlugin):
    """Makes an Avalanche strategy learn each experience in a mask phase and a weight phase.

    It replaces the strategy's optimizer when a phase begins. Evaluation of an experience that was trained is by the
    network of its task, so the experience must be known (task-incremental learning). Other experiences are evaluated by
    the model as it is.

    Args:
        phases: The phases of the converted model, which must be the strategy's model.
        make_optimizer: Makes the optimizer of a phase.
        mask_epochs: Epochs of the mask phase; the others belong to the weight phase. None means all.

    Attributes:
        tasks: Number of each trained experience -> number of its task in `phases`.

    Raises:
        ValueError: If `mask_epochs` is negative.
    """

    def __init__(self, phases: Phases, make_optimizer: MakeOptimizer, mask_epochs: int | None = None) -> None:
        super().__init__()
        self.phases, self.make_optimizer, self.run = phases, make_optimizer, TaskRun(phases, mask_epochs)
        self.tasks: dict[int, int] = {}
        self._shown = ExitStack()

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start the first experience's task, because Avalanche may evaluate the model next."""
        self._shown.close()
        if strategy.model is not self.phases.model:
            raise ValueError("SupermaskPlugin: the strategy must have the model of the phases")
        self.run.begin()

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start the experience's task. Avalanche looks at the optimizer after this hook."""
        self.run.begin()
        self._new_optimizer(strategy)

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start the weight phase if it is time."""
        if self.run.enter_epoch(strategy.clock.train_exp_epochs):
            self._new_optimizer(strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Finish the experience's task."""
        self.run.end()
        self.tasks[strategy.experience.current_experience] = len(self.phases.bank) - 1

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Show the network of the experience's task."""
        self._shown.close()
        task = self.tasks.get(strategy.experience.current_experience)
        if task is not None:
            self._shown.enter_context(self.phases.using(task))

    def after_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Put the model back."""
        self._shown.close()

    def _new_optimizer(self, strategy: Any) -> None:
        strategy.optimizer = self.make_optimizer(self.phases)
        strategy.optimized_param_id = dict(strategy.model.named_parameters())  # so Avalanche adds none to it


class Supermask(SupervisedTemplate):
    """ExSSNeT as a strategy of Avalanche: a template with a `SupermaskPlugin`.

    Args:
        phases: See `SupermaskPlugin`.
        make_optimizer: See `SupermaskPlugin`.
        mask_epochs: See `SupermaskPlugin`.
        plugins: Further plugins.
        kwargs: Those of Avalanche's `SupervisedTemplate`, except `model` and `optimizer`.

    Raises:
        ValueError: If `mask_epochs` is negative.

    Example::

        phases = exssnet.Phases(exssnet.convert(model, density=0.1))
        strategy = Supermask(
            phases, lambda phases: phases.optimizer(torch.optim.AdamW, lr=1e-2), mask_epochs=2, train_epochs=4
        )
        for experience in benchmark.train_stream:
            strategy.train(experience)
            strategy.eval(benchmark.test_stream)
    """

    def __init__(
        self, phases: Phases, make_optimizer: MakeOptimizer, mask_epochs: int | None = None,
        plugins: Sequence[Any] = (), **kwargs: Any,
    ) -> None:  # fmt: skip
        own = SupermaskPlugin(phases, make_optimizer, mask_epochs)
        replaced = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)  # Avalanche needs one before the first task
        super().__init__(model=phases.model, optimizer=replaced, plugins=[own, *plugins], **kwargs)


def tasks(benchmark: Any, validation: float = 0.0, seed: int = 0) -> list[Task]:
    """Make the tasks of a benchmark, for `exssnet.Learner` with any of its methods.

    Args:
        benchmark: A benchmark of Avalanche with a train and a test stream of as many experiences.
        validation: Share of each class's training data that is held out, in [0, 1).
        seed: Draws the validation data.

    Returns:
        One task per experience. Its classes are those of the experience's training data, numbered from 0 in order.

    Raises:
        ValueError: If `validation` is invalid, or a class has too few items.
    """

    def labelled(experience: Any) -> Relabelled:
        data = experience.dataset
        return Relabelled(data, torch.arange(len(data)), torch.tensor(list(data.targets)))

    streams = zip(benchmark.train_stream, benchmark.test_stream, strict=True)
    return [
        in_one_task(f"experience {number}", labelled(train), labelled(test), validation, seed)
        for number, (train, test) in enumerate(streams)
    ]
