"""Trains and evaluates a converted model on a stream of tasks: one loop for both phases, one for evaluation."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .kernels import nan_flag
from .kernels.native import is_served
from .kkt import RULES, Rule, Transfer, sample_share, transfer
from .masks import LayerUse
from .methods import Method, preset
from .optim import ScoreAdam
from .phases import Phases, evaluation
from .tasks import Task, loader, stratified_split

OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class PhaseOptions:
    """How one phase is trained: epochs, peak learning rate of its cosine schedule, and the optimizer."""

    epochs: int = 5
    lr: float = 1e-2
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0
    patience: int | None = None  # stop after that many epochs without a better validation result

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.lr < 0 or self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"a phase needs epochs >= 0, lr >= 0 and an optimizer of {', '.join(OPTIMIZERS)}, "
                f"got epochs={self.epochs}, lr={self.lr}, optimizer={self.optimizer!r}"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, or None, got {self.patience}")


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


class Observer(Protocol):
    """Is told how training goes; printing, saving and plotting belong to it."""

    def on_step(self, task: int, phase: str, step: int, steps: int, loss: Tensor) -> None: ...
    def on_epoch(self, record: EpochRecord) -> None: ...


@dataclass
class TaskReport:
    """What learning one task came to."""

    task: int
    name: str
    classes: int
    use: dict[str, LayerUse] = field(default_factory=dict)
    kkt: Transfer | None = None
    initial_accuracy: tuple[float, float] | None = None  # before training: with KKT's scores, with random ones
    reverted: bool = False  # the weight phase did not improve validation and was undone
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    history: list[EpochRecord] = field(default_factory=list)


class Learner:
    """Learns tasks one after another; what a method protects of earlier tasks stays bitwise what it was.

    model: converted by `convert`, with a head of at least as many outputs as the largest task has classes; labels
        restart from 0 in each task.
    method: a preset's name ("supsup", "ssnet", "exssnet", "wsn") or a `Method`.
    mask, weight: options of the two phases; for a method without weight phase the epochs of both go to the masks.
        Parameters without a mask (biases, affine norms) are trained in both, and the dense weights of a joint phase,
        at the weight phase's learning rate.
    kkt: None, or the rule by which a new task's scores start from earlier ones ("best", "always", "all").
    all_outputs: let the loss and the prediction see all outputs of the head, not only the task's own.
    keep_scores: dtype of the scores kept for KKT, or None to drop them.
    Deterministic given seed and thread count.
    """

    def __init__(
        self, model: nn.Module, method: str | Method = "exssnet", *,
        mask: PhaseOptions | None = None, weight: PhaseOptions | None = None, kkt: Rule | None = None,
        batch_size: int = 64, all_outputs: bool = False, seed: int = 0,
        keep_scores: torch.dtype | None = torch.float32, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self.method = preset(method) if isinstance(method, str) else method
        if kkt is not None and kkt not in RULES:
            raise ValueError(f"kkt must be None or one of {', '.join(RULES)}, got {kkt!r}")
        if kkt is not None and keep_scores is None:
            raise ValueError("kkt needs the scores of earlier tasks: keep_scores must be a dtype, not None")
        self.model = model
        self.phases = Phases(model, keep_scores, seed)
        self.mask, self.weight = mask or PhaseOptions(), weight or PhaseOptions()
        self.kkt = kkt
        self.batch_size = batch_size
        self.all_outputs = all_outputs
        self.seed = seed
        self.observer = observer
        self.reports: list[TaskReport] = []
        self._rows: list[list[float]] = []

    @property
    def device(self) -> torch.device:
        return next(iter(self.phases.layers.values())).weight.device

    def learn(self, task: Task) -> TaskReport:
        """Learn one task through all phases of the method; the model is its network afterwards."""
        number = len(self.phases.bank)
        self._check(task)
        report = TaskReport(number, task.name, task.classes)
        task.train.restart()
        scores = None
        if self.kkt is not None and number > 0:
            began = time.perf_counter()
            scores = self._transfer(task, report)
            report.seconds["kkt"] = time.perf_counter() - began
        mask_epochs, weight_epochs = self.method.budget(self.mask.epochs, self.weight.epochs)
        with self._divergence_told(task):
            self.phases.start_task(scores, joint=self.method.joint)
            best = self._train(task, report, self.mask, mask_epochs, None)
            if self.method.weight_phase:
                self.phases.start_weight_phase(self.method.exclusive)
                after = self._train(task, report, self.weight, weight_epochs, best)
                report.reverted = "weight" in report.seconds and task.validation is not None and after == best
            self.phases.finish_task()
        report.use = self.phases.bank.use[number]
        self.reports.append(report)
        return report

    def run(self, tasks: Sequence[Task]) -> Tensor:
        """Learn all tasks; returns accuracy (T, T), entry [i, j] on task j's test data after learning task i.

        Entries of tasks not yet learned (j > i) are NaN.
        """
        for task in tasks:
            self._check(task)
        if self.reports:
            raise RuntimeError(f"run: starts with the first task, but {len(self.reports)} tasks are learned already")
        for i, task in enumerate(tasks):
            self.learn(task)
            self._rows.append([self.evaluate(j, tasks[j].test) for j in range(i + 1)])
        return self.accuracy

    @property
    def accuracy(self) -> Tensor:
        """The accuracy matrix of `run` as far as it has come: (tasks, tasks) float64."""
        tasks = len(self._rows)
        return torch.tensor([row + [math.nan] * (tasks - len(row)) for row in self._rows], dtype=torch.float64)

    def evaluate(self, task: int, data: Dataset[Any]) -> float:
        """Accuracy in [0, 1] of a finished task's network on labelled data; the model is left as it was."""
        with self.phases.using(task):
            return self._score(data, self.reports[task].classes)[0]

    def validate(self, task: Task) -> tuple[float, float]:
        """(accuracy, mean loss) of the network as it is now on a task's validation data; NaN without any."""
        return self._score(task.validation, task.classes) if task.validation is not None else (math.nan, math.nan)

    # Inside

    def _check(self, task: Task) -> None:
        head = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        if head and head[-1].out_features < task.classes:
            raise ValueError(
                f"{task.name} has {task.classes} classes but the model's head has {head[-1].out_features} outputs"
            )
        if len(task.train) == 0:
            raise ValueError(f"{task.name} has no training data")

    @contextmanager
    def _divergence_told(self, task: Task) -> Iterator[None]:
        """Names the task and the learning rates where the selection finds NaN among the scores."""
        try:
            yield
        except RuntimeError as error:
            if all(bool(p.isfinite().all()) for p in self.phases.masked_parameters() + self.phases.dense_weights()):
                raise
            raise FloatingPointError(
                f"{task.name}: the {self.phases.phase} phase diverged ({error}); {self._lower_the_rates()}"
            ) from error

    def _lower_the_rates(self) -> str:
        return f"lower the learning rates, mask {self.mask.lr} and weight {self.weight.lr}"

    def _generator(self, task: int, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + task) * 8 + purpose)

    def _logits(self, x: Tensor, classes: int) -> Tensor:
        logits: Tensor = self.model(x.to(self.device))
        return logits if self.all_outputs else logits[:, :classes]

    def _transfer(self, task: Task, report: TaskReport) -> dict[str, Tensor] | None:
        assert self.kkt is not None
        data = task.train.unaugmented()
        _, index = stratified_split(data.labels, sample_share(len(data)), self._generator(report.task, 0))
        picked = data.select(index)
        x = torch.cat([batch for batch, _ in loader(picked, 4 * self.batch_size)]).to(self.device)
        report.kkt = transfer(self.phases, x, picked.labels, task.classes, self.kkt, self.seed, 4 * self.batch_size)
        if report.kkt.scores is None:
            return None
        scores = dict(report.kkt.scores)
        report.initial_accuracy = (
            self._initial_accuracy(task, report.kkt.sources[0], scores),
            self._initial_accuracy(task, report.kkt.sources[0], self.phases.random_scores(report.task)),
        )
        return scores

    def _initial_accuracy(self, task: Task, source: int, scores: dict[str, Tensor]) -> float:
        """Test accuracy before any training, with the given scores and the source's batch norm."""
        with self.phases.using(source):
            for name, layer in self.phases.layers.items():
                layer.use_scores(scores[name])
            return self._score(task.test, task.classes)[0]

    def _optimizer(self, options: PhaseOptions) -> torch.optim.Optimizer | None:
        groups = [
            {"params": parameters, "lr": lr}
            for parameters, lr in (
                (self.phases.masked_parameters(), options.lr),
                (self.phases.dense_weights() + self.phases.task_parameters(), self.weight.lr),
            )
            if parameters
        ]
        if not groups:
            return None
        if options.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=options.momentum, weight_decay=options.weight_decay)
        if options.optimizer == "adam" and self.phases.phase == "mask" and is_served("adam_topk", self.device.type):
            return ScoreAdam(groups, self.model, weight_decay=options.weight_decay)
        kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
        # One kernel for all parameters: a step of a small network is a third of it otherwise.
        return kind(groups, weight_decay=options.weight_decay, fused=self.device.type in ("cpu", "cuda"))

    def _train(
        self, task: Task, report: TaskReport, options: PhaseOptions, epochs: int, best: tuple[float, float] | None
    ) -> tuple[float, float] | None:
        """Train the open phase and leave it at its best epoch by validation (accuracy, then loss), or at its last.

        best: the result to beat; the phase ends where it began if no epoch does. Returns the best result.
        """
        phase, number = self.phases.phase, report.task
        optimizer = self._optimizer(options)
        if optimizer is None or epochs == 0:
            return best
        if phase == "joint":
            self.phases.guard(optimizer)
        data = loader(
            task.train, self.batch_size, shuffle=True, generator=self._generator(number, 2 if phase == "weight" else 1)
        )
        steps = epochs * len(data)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        kept = self.phases.snapshot() if best is not None else None
        began, waited = time.perf_counter(), 0
        for epoch in range(epochs):
            started = time.perf_counter()
            self.model.train()
            seen = 0
            loss_sum, right = torch.zeros(2, device=self.device).unbind()  # read once an epoch: no synchronisation
            for step, (x, y) in enumerate(data):
                y = y.to(self.device)
                logits = self._logits(x, task.classes)
                loss = F.cross_entropy(logits, y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                seen += len(y)
                loss_sum += loss.detach() * len(y)
                right += (logits.argmax(1) == y).sum()
                if self.observer is not None:
                    self.observer.on_step(number, phase, epoch * len(data) + step + 1, steps, loss.detach())
            mean_loss = loss_sum.item() / seen
            if nan_flag.seen(loss_sum.device):
                raise FloatingPointError(
                    f"{task.name}: scores became NaN in epoch {epoch + 1} of the {phase} phase; "
                    f"{self._lower_the_rates()}"
                )
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f"{task.name}: the mean loss became {mean_loss} in epoch {epoch + 1} of the {phase} phase; "
                    f"{self._lower_the_rates()}"
                )
            result = None
            if task.validation is not None:
                accuracy, validation_loss = self.validate(task)
                result = (accuracy, -validation_loss)
            record = EpochRecord(
                number, phase, epoch + 1, epochs, mean_loss, right.item() / seen, result[0] if result else None,
                time.perf_counter() - started,
            )  # fmt: skip
            report.history.append(record)
            if self.observer is not None:
                self.observer.on_epoch(record)
            if result is not None:
                if best is None or result > best:
                    best, kept, waited = result, self.phases.snapshot(), 0
                else:
                    waited += 1
                if options.patience is not None and waited >= options.patience:
                    break
        if kept is not None:
            self.phases.restore(kept)
        report.seconds[phase] = time.perf_counter() - began
        return best

    def _score(self, data: Dataset[Any], classes: int) -> tuple[float, float]:
        """(accuracy, mean loss) of the network as it is now, in evaluation mode."""
        right, loss, seen = 0, 0.0, 0
        with evaluation(self.model):
            for x, y in loader(data, 4 * self.batch_size):
                y = y.to(self.device)
                logits = self._logits(x, classes)
                right += int((logits.argmax(1) == y).sum())
                loss += F.cross_entropy(logits, y, reduction="sum").item()
                seen += len(y)
        return (right / seen, loss / seen) if seen else (math.nan, math.nan)
