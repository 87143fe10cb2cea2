"""How far training has come: what is told of epochs and tasks, and where an open task stands between two steps."""

import time
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..tasks import Task
from .kkt import Transfer
from .mask_bank import LayerUse

Result: TypeAlias = tuple[float, float]  # of validation: accuracy, minus the mean loss


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one phase. Accuracies are in [0, 1]; `validation` is None without a validation split."""

    task: int
    phase: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    validation: float | None
    seconds: float


@dataclass
class TaskReport:
    """What learning one task came to."""

    task: int
    name: str
    classes: int
    use: dict[str, LayerUse] = field(default_factory=dict)
    kkt: Transfer | None = None  # without the scores, from which the task started
    initial_accuracy: tuple[float, float] | None = None  # before training: with KKT's scores, with random ones
    reverted: bool = False  # the weight phase did not improve validation and was undone
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    history: list[EpochRecord] = field(default_factory=list)


class Stopwatch:
    """Seconds since it was made, and those that were spent before."""

    def __init__(self, spent: float = 0.0) -> None:
        self._began = time.perf_counter() - spent

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began


@dataclass
class Training:
    """Where the training of an open phase stands between two steps."""

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    least: int  # items of the last batch of an epoch
    sizes: list[int]  # items of each batch, over all processes
    generator: torch.Generator  # of the order of the data
    order: Tensor  # the generator's state when the epoch began
    sums: Tensor  # of the epoch so far: loss, right answers; read once an epoch, so that nothing waits for a device
    epoch: int = 0
    batch: int = 0  # batches of the epoch that are learned
    whole: bool = True  # no step, and no end of an epoch, is half done
    kept: dict[str, Any] | None = None  # snapshot of the best epoch, or of the beginning while none is better
    waited: int = 0  # epochs since the best
    clock: Stopwatch = field(default_factory=Stopwatch)
    epoch_clock: Stopwatch = field(default_factory=Stopwatch)

    def next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.order = self.generator.get_state()
        self.sums = torch.zeros_like(self.sums)
        self.epoch_clock, self.whole = Stopwatch(), True


@dataclass
class OpenTask:
    """Where an open task stands between two steps."""

    task: Task
    report: TaskReport
    best: Result | None = None
    to_beat: Result | None = None  # the mask phase's best, for the weight phase
    training: Training | None = None
