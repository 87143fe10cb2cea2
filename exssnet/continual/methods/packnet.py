"""PackNet: a dense network in which each task prunes and keeps a share of the weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..strategy import Context, Stage
from .sequential import Sequential


class PackNet(Sequential):
    """Trains all weights that no earlier task keeps, keeps an equal share of them, and retrains those alone.

    Task t keeps 1 / (T - t) of each layer's free weights, the largest magnitudes, and uses them together with those of
    all earlier tasks. The pruned ones start the next task from their initial values. Half of the epochs go to each
    training. Source: Mallya & Lazebnik, "PackNet", CVPR 2018, with the share chosen so that every task gets as many.

    Args:
        tasks: T, the number of tasks in the stream.
        head: See `Sequential`.
    """

    exclusive = True

    def __init__(self, *, tasks: int, head: str | None = None) -> None:
        super().__init__(head=head)
        self.tasks = tasks
        self.initial: dict[str, Tensor] = {}  # weights before the first task, by layer name

    def plan(self, learner: Context) -> Sequence[Stage]:
        masks, weights = super().plan(learner)
        epochs = weights.options.epochs
        retrained = replace(weights.options, epochs=epochs // 2)
        whole = replace(weights.options, epochs=epochs - epochs // 2)
        return masks, replace(weights, options=whole), Stage("weight", retrained, must_improve=False)

    def before_task(self, learner: Context) -> None:
        if len(learner.phases.bank) >= self.tasks:
            raise ValueError(f"PackNet was made for {self.tasks} tasks, {learner.task.name} is one more")
        if not self.initial:
            self.initial = {name: layer.dense_weight.clone() for name, layer in learner.phases.layers.items()}

    def before_phase(self, learner: Context) -> None:
        phases = learner.phases
        if learner.stage == 0:
            for name, layer in phases.layers.items():
                free = phases.bank.free(name, layer.mask())
                layer.dense_weight[free] = self.initial[name][free]
        elif learner.stage == 2:
            share = 1 / (self.tasks - len(phases.bank))
            phases.prune({name: largest(learner, name, share) for name in phases.layers})


def largest(learner: Context, name: str, share: float) -> Tensor:
    """Where a share of a layer's free weights, those of largest magnitude, lie: bool of the weight's shape."""
    layer = learner.phases.layers[name]
    keep = torch.zeros_like(layer.dense_weight, dtype=torch.bool)
    if layer.free_values is not None:
        where = learner.phases.free_mask(name).flatten().nonzero()[:, 0]
        order = layer.free_values.detach().abs().argsort(descending=True, stable=True)
        keep.view(-1)[where[order[: round(share * len(order))]]] = True
    return keep
