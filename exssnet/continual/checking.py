"""Checks of tasks and models before training: what does not fit is told in one sentence. B a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.evaluation import evaluation
from ..tasks import Task, loader
from . import distributed


@contextmanager
def trial(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients for a trial forward pass; the random state is restored at the end."""
    with evaluation(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def check_tasks(
    tasks: Sequence[Task], model: nn.Module, batch_size: int, device: torch.device, fits: Callable[[Task, Tensor], None]
) -> None:
    """ValueError where the data, or a batch of them, do not fit the model. `fits` checks a task's batch (B, ...)."""
    processes = distributed.size()
    with trial(model, device):
        for task in tasks:
            x = sample(task, batch_size).to(device)
            fits(task, x)
            items = min(batch_size, len(task.train))
            if items < 2 * processes and lone_items_fail(model, x):
                shared = f", shared by {processes} processes" if processes > 1 else ""
                raise ValueError(
                    f"{task.name}: batch norm cannot be trained on one item, and a batch has {items} of "
                    f"{len(task.train)} training items{shared}: at least {2 * processes} are needed"
                )


def check_data(task: Task) -> None:
    """Raise ValueError for a task without training data, and for labels outside [0, classes)."""
    if len(task.train) == 0:
        raise ValueError(f"{task.name} has no training data")
    for kind, data in (("training", task.train), ("validation", task.validation), ("test", task.test)):
        if data is None or len(data) == 0:
            continue
        low, high = (int(label) for label in data.labels.aminmax())
        if low < 0 or high >= task.classes:
            raise ValueError(
                f"{task.name}: labels must be in [0, {task.classes}), those of the {kind} data are {low} to {high}"
            )


def sample(task: Task, batch_size: int) -> Tensor:
    """An unaugmented training batch (B, ...) of a task. ValueError if its items are not tensors."""
    data = task.train.unaugmented()
    first = data.select(torch.arange(min(batch_size, len(data))))
    x = next(iter(loader(first, batch_size, share=distributed.part())))[0]
    if not isinstance(x, Tensor):
        raise ValueError(f"{task.name}: items must be tensors, got {type(x).__name__}")
    return x


def check_logits(task: Task, output: Any, items: int) -> None:
    """Raise ValueError unless a model's output for B items is logits: floating point, (B, classes or more)."""
    fits = isinstance(output, Tensor) and output.is_floating_point() and output.dim() == 2
    if not fits or output.shape[0] != items or output.shape[1] < task.classes:
        raise ValueError(
            f"{task.name} has {task.classes} classes: for {items} items the model must return logits, a floating "
            f"tensor ({items}, {task.classes} or more), but it returned {_described(output)}"
        )


def _described(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"{thing.dtype} of shape {tuple(thing.shape)}"
    more = f" with {', '.join(map(str, thing))}" if isinstance(thing, dict) else ""
    return f"a {type(thing).__name__}{more}" + (" (return its logits)" if hasattr(thing, "logits") else "")


def lone_items_fail(model: nn.Module, x: Tensor) -> bool:
    """Whether a batch of one item fails in training: a batch norm gets one value per channel. x: (B, ...)."""
    few: list[bool] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        few.append(args[0].numel() <= args[0].shape[1] * len(x))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        if norms:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return any(few)


def least_items(task: Task, model: nn.Module, batch_size: int, device: torch.device) -> int:
    """The smallest number of items on which the last batch of an epoch can be trained: two per process, or one."""
    last, two_each = len(task.train) % batch_size, 2 * distributed.size()
    if not 0 < last < two_each or len(task.train) < batch_size:
        return 1
    with trial(model, device):
        return two_each if lone_items_fail(model, sample(task, batch_size).to(device)) else 1
