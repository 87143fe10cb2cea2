"""Continual-learning metrics, each a pure function of accuracies.

`accuracy` is the (T, T) matrix A with A[i, j] the test accuracy on task j after learning task i, as a tensor, an array
or nested lists. Entries with j > i are never read and may be NaN; ValueError on any other shape, or on NaN elsewhere.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor

Accuracies: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any]


def _learned(accuracy: Accuracies) -> Tensor:
    """The lower triangle of A in float64, zeros above it."""
    a = torch.as_tensor(accuracy, dtype=torch.float64)
    if a.dim() != 2 or a.shape[0] != a.shape[1] or a.shape[0] == 0:
        raise ValueError(f"accuracy must be a (T, T) matrix, got shape {tuple(a.shape)}")
    a = a.tril()
    if bool(a.isnan().any()):
        i, j = a.isnan().nonzero()[0].tolist()
        raise ValueError(f"accuracy[{i}, {j}] is NaN: task {j} was not evaluated after learning task {i}")
    return a


def _per_task(name: str, values: Accuracies, tasks: int) -> Tensor:
    """One accuracy per task in float64."""
    v = torch.as_tensor(values, dtype=torch.float64)
    if v.shape != (tasks,):
        raise ValueError(f"{name} must hold one accuracy for each of {tasks} tasks, got shape {tuple(v.shape)}")
    return v


def average_accuracy(accuracy: Accuracies) -> float:
    """Mean test accuracy over all tasks at the end: mean_j A[T-1, j].

    Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory", NeurIPS 2017, eq. 2.
    """
    return _learned(accuracy)[-1].mean().item()


def backward_transfer(accuracy: Accuracies) -> float:
    """Mean change of a task's accuracy by learning later tasks: mean_{j < T-1} (A[T-1, j] - A[j, j]); 0 if T = 1.

    Negative values are forgetting. Source: Lopez-Paz & Ranzato, NeurIPS 2017, eq. 3.
    """
    a = _learned(accuracy)
    return (a[-1] - a.diagonal())[:-1].mean().item() if len(a) > 1 else 0.0


def forgetting(accuracy: Accuracies) -> float:
    """Mean drop from a task's best earlier accuracy: mean_{j < T-1} (max_{j <= i < T-1} A[i, j] - A[T-1, j]).

    0 if T = 1. Source: Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, section 3.
    """
    a = _learned(accuracy)
    # The zeros above the diagonal do not disturb the maximum: accuracies are not negative.
    return (a[:-1, :-1].amax(0) - a[-1, :-1]).mean().item() if len(a) > 1 else 0.0


def learning_accuracy(accuracy: Accuracies) -> float:
    """Mean accuracy on each task right after learning it: mean_j A[j, j].

    Source: Riemer et al., "Learning to Learn without Forgetting", ICLR 2019.
    """
    return _learned(accuracy).diagonal().mean().item()


def forward_transfer(transferred: Accuracies, random: Accuracies) -> float:
    """Mean head start that knowledge transfer gives a new task: mean_{j > 0} (transferred[j] - random[j]); 0 if T = 1.

    transferred, random: (T,) accuracies on task j before any training on it, with KKT's initial scores and with random
        ones. Entry 0 is not read, the first task has no source. ValueError if the lengths differ.
    Source: after Lopez-Paz & Ranzato, NeurIPS 2017, eq. 4, with KKT's initial scores in the place of the last model.
    """
    tasks = len(transferred)
    gain = _per_task("transferred", transferred, tasks) - _per_task("random", random, tasks)
    return gain[1:].mean().item() if tasks > 1 else 0.0


def learning_gain(accuracy: Accuracies, individual: Accuracies) -> float:
    """Mean lead over networks trained on one task alone: mean_j (A[j, j] - individual[j]).

    individual: (T,) test accuracies of the individual networks. ValueError if the lengths differ.
    Source: the negative of intransigence in Chaudhry et al., ECCV 2018, averaged over the tasks.
    """
    a = _learned(accuracy)
    return (a.diagonal() - _per_task("individual", individual, len(a))).mean().item()


def epochs_to_reach(accuracies: Sequence[float], target: float) -> int | None:
    """Number of epochs until a learning curve first reaches a target accuracy; None if it never does.

    accuracies: one after each epoch. With KKT and without, this tells how much faster transfer learns; for seconds,
    add up those of so many epochs.
    """
    return next((epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= target), None)
