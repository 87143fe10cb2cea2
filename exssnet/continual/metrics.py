"""Continual-learning metrics, each a pure function of accuracies.

The argument `accuracy` is a (T, T) matrix A: a tensor, an array or nested lists. A[i, j] is the test accuracy on task j
after learning task i, in [0, 1]. Entries with j > i are not read and may be NaN. Another shape or another NaN raises
ValueError. All metrics are computed in float64.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor

Accuracies: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any]


def _lower_triangle(accuracy: Accuracies) -> Tensor:
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
    """Mean test accuracy over all tasks after the last one: ``mean_j A[T-1, j]``.

    Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory", NeurIPS 2017, eq. 2.

    Args:
        accuracy: The (T, T) matrix A.

    Returns:
        The mean, in [0, 1].

    Raises:
        ValueError: For another shape, or NaN for j <= i.

    Example:
        >>> average_accuracy([[0.9, float("nan")], [0.8, 0.6]])
        0.7
    """
    return _lower_triangle(accuracy)[-1].mean().item()


def backward_transfer(accuracy: Accuracies) -> float:
    """Mean change of a task's accuracy while later tasks are learned: ``mean_{j < T-1} (A[T-1, j] - A[j, j])``.

    A negative value means forgetting.

    Source: Lopez-Paz & Ranzato, NeurIPS 2017, eq. 3.

    Args:
        accuracy: The (T, T) matrix A.

    Returns:
        The mean, in [-1, 1]; 0 if T = 1.

    Raises:
        ValueError: For another shape, or NaN for j <= i.
    """
    a = _lower_triangle(accuracy)
    return (a[-1] - a.diagonal())[:-1].mean().item() if len(a) > 1 else 0.0


def forgetting(accuracy: Accuracies) -> float:
    """Mean drop from a task's best earlier accuracy: ``mean_{j < T-1} (max_{j <= i < T-1} A[i, j] - A[T-1, j])``.

    Source: Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, section 3.

    Args:
        accuracy: The (T, T) matrix A.

    Returns:
        The mean, in [-1, 1]; 0 if T = 1.

    Raises:
        ValueError: For another shape, or NaN for j <= i.
    """
    a = _lower_triangle(accuracy)
    # The zeros above the diagonal do not change the maximum, because accuracies are not negative.
    return (a[:-1, :-1].amax(0) - a[-1, :-1]).mean().item() if len(a) > 1 else 0.0


def learning_accuracy(accuracy: Accuracies) -> float:
    """Mean accuracy on each task right after learning it: ``mean_j A[j, j]``.

    Source: Riemer et al., "Learning to Learn without Forgetting", ICLR 2019.

    Args:
        accuracy: The (T, T) matrix A.

    Returns:
        The mean, in [0, 1].

    Raises:
        ValueError: For another shape, or NaN for j <= i.
    """
    return _lower_triangle(accuracy).diagonal().mean().item()


def forward_transfer(transferred: Accuracies, random: Accuracies) -> float:
    """Mean head start that knowledge transfer gives a new task: ``mean_{j > 0} (transferred[j] - random[j])``.

    Source: after Lopez-Paz & Ranzato, NeurIPS 2017, eq. 4. KKT's initial scores take the place of the last model.

    Args:
        transferred: (T,) accuracies on task j before any training on it, with KKT's initial scores.
        random: (T,) the same accuracies with random initial scores. Entry 0 of both does not count, because the first
            task has no source.

    Returns:
        The mean, in [-1, 1]; 0 if T = 1.

    Raises:
        ValueError: If the lengths differ.
    """
    tasks = len(transferred)
    gain = _per_task("transferred", transferred, tasks) - _per_task("random", random, tasks)
    return gain[1:].mean().item() if tasks > 1 else 0.0


def learning_gain(accuracy: Accuracies, individual: Accuracies) -> float:
    """Mean lead over networks that were trained on one task alone: ``mean_j (A[j, j] - individual[j])``.

    Source: the negative of intransigence in Chaudhry et al., ECCV 2018, averaged over the tasks.

    Args:
        accuracy: The (T, T) matrix A.
        individual: (T,) test accuracies of the individual networks.

    Returns:
        The mean, in [-1, 1].

    Raises:
        ValueError: If the lengths differ, for another shape of A, or NaN for j <= i.
    """
    a = _lower_triangle(accuracy)
    return (a.diagonal() - _per_task("individual", individual, len(a))).mean().item()


def epochs_to_reach(accuracies: Sequence[float], target: float) -> int | None:
    """Number of epochs until a learning curve first reaches a target accuracy.

    Compare the number with and without KKT to see how much faster a task is learned with transfer. For seconds, add up
    the durations of these epochs.

    Args:
        accuracies: One accuracy after each epoch.
        target: The accuracy to reach, in [0, 1].

    Returns:
        The number of epochs, from 1 on; None if the curve never reaches the target.
    """
    return next((epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= target), None)
