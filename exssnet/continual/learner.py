"""Trains and evaluates a converted model on a stream of tasks: one loop for both phases, one for evaluation."""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..kernels import nan_flag
from ..kernels.native import is_served
from ..nn import evaluation
from ..nn.optim import ScoreAdam
from ..tasks import Task, batch_sizes, loader, stratified_split
from . import checking, distributed, heads, state, stored
from .kkt import RULES, Rule, sample_share, transfer
from .methods import Method, preset
from .phases import PHASES, Phases
from .records import EpochRecord, OpenTask, Stopwatch, TaskReport, Training

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


class Observer(Protocol):
    """Is told how training goes; printing, saving and plotting belong to it."""

    def on_step(self, task: int, phase: str, step: int, steps: int, loss: Tensor) -> None: ...
    def on_epoch(self, record: EpochRecord) -> None: ...


class Learner:
    """Learns tasks one after another; what a method protects of earlier tasks stays bitwise what it was.

    model: converted by `convert`; returns logits, at least as many as the largest task has classes. Labels restart
        from 0 in each task.
    method: a preset's name ("supsup", "ssnet", "exssnet", "wsn") or a `Method`.
    mask, weight: options of the two phases; for a method without weight phase the epochs of both go to the masks.
        Parameters without a mask (biases, affine norms) are trained in both, and the dense weights of a joint phase,
        at the weight phase's learning rate.
    kkt: None, or the rule by which a new task's scores start from earlier ones ("best", "always", "all", "rescaled").
    all_outputs: let the loss and the prediction see all outputs of the head, not only the task's own.
    keep_scores: dtype of the scores kept for KKT, or None to drop them.
    head: name of the layer whose input KKT compares; None: see `exssnet.continual.kkt.penultimate_features`.
    A last batch of one item joins the one before it if a batch norm could not be trained on it.
    Deterministic given seed and thread count.
    After an exception finished tasks are as before, and the task at hand is open. If no step is half done, as after an
    error of the data or the observer, `state` can be taken, and `learn` or `run` goes on with the next step. Otherwise
    both refuse until `phases.abandon_task()`; then the task is learned anew.
    """

    def __init__(
        self, model: nn.Module, method: str | Method = "exssnet", *,
        mask: PhaseOptions | None = None, weight: PhaseOptions | None = None, kkt: Rule | None = None,
        batch_size: int = 64, all_outputs: bool = False, seed: int = 0,
        keep_scores: torch.dtype | None = torch.float32, observer: Observer | None = None, head: str | None = None,
    ) -> None:  # fmt: skip
        self.method = preset(method) if isinstance(method, str) else method
        if kkt is not None and kkt not in RULES:
            raise ValueError(f"kkt must be None or one of {', '.join(RULES)}, got {kkt!r}")
        if kkt is not None and keep_scores is None:
            raise ValueError("kkt needs the scores of earlier tasks: keep_scores must be a dtype, not None")
        if batch_size < 1:
            raise ValueError(f"a batch needs at least 1 item, got batch_size={batch_size}")
        if head is not None:
            heads.check_name(model, head)
        self.model = model
        self.phases = Phases(model, keep_scores, seed)
        self.mask, self.weight = mask or PhaseOptions(), weight or PhaseOptions()
        self.kkt = kkt
        self.batch_size = batch_size
        self.all_outputs = all_outputs
        self.seed = seed
        self.observer = observer
        self.head = head
        self.reports: list[TaskReport] = []
        self._rows: list[list[float]] = []
        self._stream: list[str] = []  # a fingerprint of each task that was begun
        self._open: OpenTask | None = None
        self._goes_on = False  # a state was restored, or an exception ended `run`
        self._checked: Sequence[Task] = ()  # of the run at hand

    @property
    def device(self) -> torch.device:
        return next(iter(self.phases.layers.values())).dense_weight.device

    def learn(self, task: Task) -> TaskReport:
        """Learn one task through all phases of the method; the model is its network afterwards.

        After `restore`, or an exception between two steps, goes on with the open task: ValueError for another one.
        """
        self._refuse_left_open()
        if self._open is not None and self._open.task is not task:
            raise ValueError(
                f"{task.name} cannot be learned while {self._open.task.name} is open: learn that one first, or drop it "
                "with learner.phases.abandon_task()"
            )
        if not any(checked is task for checked in self._checked):
            self._check([task])
        try:
            with self._divergence_told(task):
                report = self._learn(self._open or self._begin(task))
        except BaseException as error:
            whole = self._open is not None and self._open.training is not None and self._open.training.whole
            if not whole or isinstance(error, FloatingPointError) or not isinstance(error, Exception):
                self._open = None
            raise
        self._open = None
        self.reports.append(report)
        return report

    def run(self, tasks: Sequence[Task]) -> Tensor:
        """Learn all tasks; returns accuracy (T, T), entry [i, j] on task j's test data after learning task i.

        Entries of tasks not yet learned (j > i) are NaN. After `restore` or an exception, goes on from where it was;
        ValueError where a task is not the one that was learned.
        """
        self._refuse_left_open()
        done = len(self.reports)
        if done and not (self._goes_on and done - len(self._rows) <= 1):
            raise RuntimeError(f"run: starts with the first task, but {done} tasks are learned already")
        state.check_stream(tasks, self._stream[: done + (self._open is not None)])
        self._check(tasks)
        self._goes_on, self._checked = True, tasks
        try:
            for i in range(len(self._rows), len(tasks)):
                if i == len(self.reports):
                    self.learn(tasks[i])
                self._rows.append([self.evaluate(j, tasks[j].test) for j in range(i + 1)])
        finally:
            self._checked = ()
        self._goes_on = False
        return self.accuracy

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that training goes on from, as named tensors and an object that JSON can hold: see `restore`.

        RuntimeError unless `whole`: between tasks, whenever the observer is called, and after an error between two
        steps. The tensors are those of the model: write or copy them before training goes on.
        """
        phases, open_ = self.phases, self._open
        phases.require("state", *PHASES)
        tensors, meta = stored.finished(phases) | state.random_states(), None
        if phases.phase != "idle":
            if open_ is None or open_.training is None:
                raise RuntimeError(f"state: a task is open in the {phases.phase} phase, but not by this learner")
            more, meta = state.opened(phases, open_, open_.training)
            tensors |= more
        found = state.LearnerMeta(
            len(phases.bank), stored.kept(phases), self._settings(),
            self._stream[: len(phases.bank) + bool(meta)], self.reports, self._rows, state.choices(phases), meta,
        )  # fmt: skip
        return tensors, found.as_json()

    @property
    def whole(self) -> bool:
        """Whether `state` can be taken."""
        return self.phases.phase == "idle" or getattr(self._open, "training", None) is not None

    def restore(self, tensors: Mapping[str, Tensor], meta: Any, tasks: Sequence[Task]) -> None:
        """Return to a `state` of a learner with the same options and model; `run` then goes on, bit for bit.

        tasks: the stream, made anew from the same data. Also sets torch's random state. RuntimeError if tasks are
        learned or open already; ValueError, before anything is changed, for a state of another learner, model or
        stream, and for one that is damaged.
        """
        trial = copy.copy(self)
        trial.phases = copy.deepcopy(self.phases)
        trial.model = trial.phases.model
        trial._put(tensors, meta, tasks)  # whatever is wrong shows here and not in this learner
        random = self._put(tensors, meta, tasks)
        state.set_random(random, None if self._open is None else self._open.task.train.random)
        self._goes_on = True

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

    def _refuse_left_open(self) -> None:
        """RuntimeError for a task that an exception left open; what of it is learned may be half a step."""
        if self.phases.phase == "idle":
            self._open = None  # also where a restored one was abandoned
        elif self._open is None:
            raise RuntimeError(
                f"task {len(self.phases.bank)} is still open in the {self.phases.phase} phase, from a call that did "
                "not end: drop it with learner.phases.abandon_task()"
            )

    def _check(self, tasks: Sequence[Task]) -> None:
        """ValueError where data or model do not fit, before anything changes."""
        for task in tasks:
            checking.check_data(task)
        bare = self.phases.phase == "idle" and self.phases.active is None
        if bare:  # no layer has a mask yet
            self.phases.start_task({name: torch.zeros(shape) for name, shape in self.phases.bank.shapes.items()})
        try:
            with checking.trial(self.model, self.device):
                for task in tasks:
                    x, processes = checking.sample(task, self.batch_size).to(self.device), distributed.size()
                    self._check_model(task, x)
                    if (items := min(self.batch_size, len(task.train))) < 2 * processes:
                        checking.check_batch(task, self.model, x, items, processes)
        finally:
            if bare:
                self.phases.abandon_task()

    def _check_model(self, task: Task, x: Tensor) -> None:
        """ValueError where the model cannot learn a task of which x is a batch."""
        checking.check_logits(task, self.model(x), len(x))

    @contextmanager
    def _divergence_told(self, task: Task) -> Iterator[None]:
        """Names the task and the learning rates where training, or the selection, finds NaN or infinity."""
        try:
            yield
        except (RuntimeError, FloatingPointError) as error:
            trained, told = self.phases.masked_parameters() + self.phases.dense_weights(), str(error)
            if isinstance(error, RuntimeError):
                if "NaN" not in told or all(bool(p.isfinite().all()) for p in trained):
                    raise
                told = f"the {self.phases.phase} phase diverged ({told})"
            rates = f"lower the learning rates, mask {self.mask.lr} and weight {self.weight.lr}"
            raise FloatingPointError(f"{task.name}: {told}; {rates}") from error

    def _generator(self, task: int, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + task) * 8 + purpose)

    def _logits(self, x: Tensor, classes: int) -> Tensor:
        logits: Tensor = self.model(x.to(self.device))
        return logits if self.all_outputs else logits[:, :classes]

    def _loss(self, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """(loss, logits) of a training batch."""
        logits = self._logits(x, classes)
        return F.cross_entropy(logits, y), logits

    def _begin(self, task: Task) -> OpenTask:
        """Open the mask phase of a new task, with KKT's scores where there are any."""
        report = TaskReport(len(self.phases.bank), task.name, task.classes)
        task.train.restart()
        scores = None
        if self.kkt is not None and report.task > 0:
            clock = Stopwatch()
            scores = self._transfer(task, report)
            report.seconds["kkt"] = clock.seconds
        self.phases.start_task(scores, joint=self.method.joint)
        self._stream = [*self._stream[: report.task], state.fingerprint(task)]
        self._open = OpenTask(task, report)
        return self._open

    def _learn(self, open_: OpenTask) -> TaskReport:
        """Train the phases of an open task that are left, and close it."""
        report, task = open_.report, open_.task
        if self.phases.phase != "weight":
            self._train(open_)
            if self.method.weight_phase:
                self.phases.start_weight_phase(self.method.exclusive)
                open_.to_beat = open_.best
        if self.phases.phase == "weight":
            self._train_weights(open_)
            unbeaten = task.validation is not None and open_.best == open_.to_beat
            report.reverted = "weight" in report.seconds and unbeaten
        self.phases.finish_task()
        report.use = self.phases.bank.use[report.task]
        return report

    def _train_weights(self, open_: OpenTask) -> None:
        self._train(open_)

    def _transfer(self, task: Task, report: TaskReport) -> dict[str, Tensor] | None:
        assert self.kkt is not None
        data = task.train.unaugmented()
        _, index = stratified_split(data.labels, sample_share(len(data)), self._generator(report.task, 0))
        picked = data.select(index)

        def batches() -> Iterator[Tensor]:
            return (x.to(self.device) for x, _ in loader(picked, 4 * self.batch_size))

        found = transfer(self.phases, batches, picked.labels, task.classes, self.kkt, self.seed, head=self.head)
        report.kkt = replace(found, scores=None)
        if found.scores is None:
            return None
        scores = dict(found.scores)
        starts = scores, self.phases.random_scores(report.task)
        learned, random = (self._initial_accuracy(task, report.kkt.sources[0], start) for start in starts)
        report.initial_accuracy = learned, random
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
            if any(p.numel() for p in parameters)
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

    def _settings(self) -> dict[str, Any]:
        """What decides how training goes, as JSON has it."""
        found = {
            "method": asdict(self.method), "mask": asdict(self.mask), "weight": asdict(self.weight), "kkt": self.kkt,
            "batch_size": self.batch_size, "all_outputs": self.all_outputs, "seed": self.seed,
            "keep_scores": None if self.phases.keep_scores is None else str(self.phases.keep_scores), "head": self.head,
        }  # fmt: skip
        return dict(json.loads(json.dumps(found)))

    def _put(self, tensors: Mapping[str, Tensor], meta: Any, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """Take a state over, except for random states; returns the global ones."""
        phases, pieces = self.phases, stored.Pieces(tensors)
        found = state.parse(meta, self._settings(), phases, tasks)
        random = state.take_random(pieces)
        stored.put_finished(phases, pieces, found.tasks)
        state.put_choices(phases, found.choices)
        self._stream, self._rows = found.stream, found.rows
        self.reports = [replace(r, use=use) for r, use in zip(found.reports, phases.bank.use, strict=True)]
        if found.open is not None:
            task, method = tasks[found.tasks], self.method
            names = ["joint"] if method.joint else ["mask", "weight"][: 1 + method.weight_phase]
            state.reopen(phases, pieces, found.open, names, method.exclusive)
            order = state.generator_state(pieces, "epoch/order")
            training = self._training(task, order, found.open.batch)
            if training is None:
                raise ValueError(f"the state's {found.open.phase} phase trains, but here there is nothing to train")
            state.put_training(phases, pieces, found.open, training, self._phase()[1])
            self._open = OpenTask(task, found.open.report, found.open.best, found.open.to_beat, training)
            if task.train.random is not None:
                random["random/augmentation"] = state.generator_state(pieces, "random/augmentation")
        pieces.end()
        return random

    def _phase(self) -> tuple[PhaseOptions, int]:
        """Options and epochs of the open phase."""
        mask_epochs, weight_epochs = self.method.budget(self.mask.epochs, self.weight.epochs)
        return (self.weight, weight_epochs) if self.phases.phase == "weight" else (self.mask, mask_epochs)

    def _training(self, task: Task, order: Tensor | None = None, skip: int = 0) -> Training | None:
        """The open phase's training at its first step; None where there is nothing to train.

        order, skip: state of the data's generator when an epoch began, and how many batches of it are learned.
        """
        options, epochs = self._phase()
        optimizer = self._optimizer(options)
        if optimizer is None or epochs == 0:
            return None
        if self.phases.phase == "joint":
            self.phases.guard(optimizer)
        generator = self._generator(len(self.phases.bank), 2 if self.phases.phase == "weight" else 1)
        if order is not None:
            generator.set_state(order)
        least = checking.least_items(task, self.model, self.batch_size, self.device)
        sizes, sums = batch_sizes(len(task.train), self.batch_size, least), torch.zeros(2, device=self.device)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(sizes))
        return Training(optimizer, schedule, least, sizes, generator, generator.get_state(), sums, batch=skip)

    def _train(self, open_: OpenTask) -> None:
        """Train the open phase and leave it at its best epoch by validation (accuracy, then loss), or at its last.

        With a result to beat, the phase ends where it began if no epoch does.
        """
        task, phase, (options, epochs) = open_.task, self.phases.phase, self._phase()
        if open_.training is None:
            open_.training = self._training(task)
            if open_.training is not None and open_.best is not None:
                open_.training.kept = self.phases.snapshot()
        training = open_.training
        if training is None:
            return
        optimizer, schedule, steps = training.optimizer, training.schedule, epochs * len(training.sizes)
        training.generator.set_state(training.order)
        data = loader(
            task.train, self.batch_size, shuffle=True, generator=training.generator, skip=training.batch,
            share=distributed.part(), least=training.least,
        )  # fmt: skip
        while training.epoch < epochs and (options.patience is None or training.waited < options.patience):
            self.model.train()
            for x, y in data:
                training.whole = False
                y = y.to(self.device)
                batch, processes = training.sizes[training.batch], distributed.size()
                own = distributed.share(batch)
                loss, logits = self._loss(x, y, task.classes)
                if processes > 1:
                    loss = loss * (own * processes / batch)  # so that the mean over processes is that of the batch
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                sums = torch.stack([loss.detach() * batch / processes, (logits.argmax(1) == y)[:own].sum()])
                if processes > 1:
                    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
                    distributed.average([*(g for g in gradients if g is not None), *self.phases.statistics(), sums])
                optimizer.step()
                schedule.step()
                training.sums += sums * processes
                training.batch, training.whole = training.batch + 1, True
                if self.observer is not None:
                    step = training.epoch * len(training.sizes) + training.batch
                    self.observer.on_step(open_.report.task, phase, step, steps, sums[0] * processes / batch)
            self._end_epoch(open_, training, epochs)
        if training.kept is not None:
            self.phases.restore(training.kept)
        open_.report.seconds[phase] = open_.report.seconds.get(phase, 0.0) + training.clock.seconds
        open_.training = None

    def _end_epoch(self, open_: OpenTask, training: Training, epochs: int) -> None:
        """Validate, record and tell an epoch, and keep it if it is the best so far."""
        task, phase, number = open_.task, self.phases.phase, training.epoch + 1
        mean_loss, accuracy = (total / len(task.train) for total in training.sums.tolist())
        if nan_flag.seen(training.sums.device):
            raise FloatingPointError(f"scores became NaN in epoch {number} of the {phase} phase")
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the mean loss became {mean_loss} in epoch {number} of the {phase} phase")
        result = None
        if task.validation is not None:
            validated, validation_loss = self.validate(task)
            result = distributed.of_first((validated, -validation_loss))
        record = EpochRecord(
            open_.report.task, phase, number, epochs, mean_loss, accuracy, result[0] if result else None,
            training.epoch_clock.seconds,
        )  # fmt: skip
        training.whole = False
        open_.report.history.append(record)
        if result is not None:
            if open_.best is None or result > open_.best:
                open_.best, training.kept, training.waited = result, self.phases.snapshot(), 0
            else:
                training.waited += 1
        training.next_epoch()
        if self.observer is not None:
            self.observer.on_epoch(record)

    def _score(self, data: Dataset[Any], classes: int) -> tuple[float, float]:
        """(accuracy, mean loss) of the network as it is now, in evaluation mode."""
        right, loss, seen, size = 0, 0.0, 0, 4 * self.batch_size
        with evaluation(self.model):
            batches = loader(data, size, share=distributed.part())
            for (x, y), batch in zip(batches, batch_sizes(len(data), size), strict=True):  # type: ignore[arg-type]
                own = distributed.share(batch)
                y = y.to(self.device)[:own]
                logits = self._logits(x, classes)[:own]
                right += int((logits.argmax(1) == y).sum())
                loss += F.cross_entropy(logits, y, reduction="sum").item()
                seen += len(y)
        rights, losses, items = distributed.total((right, loss, seen), self.device)
        return (rights / items, losses / items) if items else (math.nan, math.nan)
