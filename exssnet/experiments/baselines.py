"""Dense networks that learn a stream without masks, under the learner's loop: what supermasks are compared with."""

import copy
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..continual import checking, heads
from ..continual.learner import Learner, PhaseOptions
from ..continual.methods import Method
from ..continual.phases import Phases
from ..continual.records import OpenTask, TaskReport
from ..nn import convert, evaluation
from ..tasks import Relabelled, Task, loader


class Sequential(Learner):
    """Fine-tunes one dense network on task after task, with a head and batch norms of its own for each task.

    model: plain torch modules. weight: options of the training. head: name of the layer that each task has its own of;
        None: the last `nn.Linear`, which must then return the model's output. The other options are those of `Learner`.
    Everything but heads and norms is shared and overwritten: it forgets.
    """

    def __init__(self, model: nn.Module, weight: PhaseOptions, *, head: str | None = None, **options: Any) -> None:
        self._guessed = head is None
        if head is None:
            linear = heads.linear_layers(model)
            if not linear:
                raise ValueError(
                    "a dense baseline gives each task a head of its own, and this model has no nn.Linear: name the "
                    'layer, as in head="classifier"'
                )
            head = linear[-1]
        heads.check_name(model, head)
        own = [name for name, m in model.get_submodule(head).named_modules(prefix=head) if m._parameters]
        if not own:
            raise ValueError(f"head={head!r} has no parameters, which each task would have its own of")
        convert(model, 1.0, exclude=own, products="dense")
        method = Method(type(self).__name__.lower(), mask_phase=False, weight_phase=True, exclusive=self._exclusive)
        super().__init__(model, method, mask=PhaseOptions(0), weight=weight, keep_scores=None, head=head, **options)

    _exclusive = False

    @property
    def nbytes(self) -> int:
        """Bytes that are kept of all tasks: weights, and each task's head and norms; masks only where they differ."""
        return self.phases.nbytes - (0 if self._exclusive else self.phases.bank.nbytes)

    def _check_model(self, task: Task, x: Tensor) -> None:
        output, call = heads.forward(self.model, x)
        checking.check_logits(task, output, len(x))
        if self._guessed and (call is None or call.name != self.head):
            found = "no linear layer does" if call is None else f"{call.name!r} does"
            raise ValueError(
                f"{task.name}: the last nn.Linear, {self.head!r}, was taken for the head, but its output is not the "
                f'model\'s, {found}: name the head, as in head="classifier"'
            )


class EWC(Sequential):
    """Fine-tunes with a quadratic penalty on weights that matter to earlier tasks (elastic weight consolidation).

    strength: lambda of the paper; samples: training items of a finished task that its Fisher information is taken over,
    one by one, in evaluation mode, their labels drawn from the network's own prediction.
    Adds ``strength / 2 * sum_i sum_j F_ij (w_j - w_ij)^2`` over earlier tasks i and shared weights j to the loss.
    Source: Kirkpatrick et al., PNAS 2017, eq. 3, with one penalty for each task.
    """

    def __init__(
        self, model: nn.Module, weight: PhaseOptions, *, strength: float = 100.0, samples: int = 500, **options: Any
    ) -> None:
        super().__init__(model, weight, **options)
        if strength < 0 or samples < 1:
            raise ValueError(f"EWC needs a strength of at least 0 and at least 1 sample, got {strength} and {samples}")
        self.strength, self.samples = strength, samples
        self._fisher: dict[str, Tensor] = {}  # summed over earlier tasks
        self._anchor: dict[str, Tensor] = {}  # mean of their weights, weighted by their Fisher information

    def learn(self, task: Task) -> TaskReport:
        report = super().learn(task)
        self._consolidate(report, task)
        return report

    def _loss(self, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        loss, logits = super()._loss(x, y, classes)
        # sum_i F_i (w - w_i)^2 is F (w - anchor)^2 plus a constant
        for name, fisher in self._fisher.items():
            values = self.phases.layers[name].free_values
            assert values is not None
            loss = loss + self.strength / 2 * (fisher * (values - self._anchor[name]).square()).sum()
        return loss, logits

    def _consolidate(self, report: TaskReport, task: Task) -> None:
        generator = self._generator(report.task, 3)
        data = task.train.unaugmented()
        data = data.select(torch.randperm(len(data), generator=generator)[: self.samples])
        with self.phases.using(report.task) as model, evaluation(model):
            for layer in self.phases.layers.values():
                whole = torch.ones_like(layer.dense_weight, dtype=torch.bool)
                layer.use_values(whole, whole)
            values = {n: p for n, layer in self.phases.layers.items() if (p := layer.free_values) is not None}
            fisher = {name: torch.zeros_like(p) for name, p in values.items()}
            with torch.enable_grad():
                for x, _ in loader(data, 1):
                    logits = self._logits(x, task.classes)
                    drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
                    loss = F.cross_entropy(logits, drawn.to(logits.device))
                    for (name, _), g in zip(
                        values.items(), torch.autograd.grad(loss, list(values.values())), strict=True
                    ):
                        fisher[name] += g.square() / len(data)
        for name, new in fisher.items():
            old = self._fisher.get(name, torch.zeros_like(new))
            total, weights = old + new, self.phases.layers[name].dense_weight.reshape(-1)
            anchor = old * self._anchor.get(name, weights) + new * weights
            self._fisher[name] = total
            self._anchor[name] = torch.where(total > 0, anchor / total, weights)


class _Rehearsed(Phases):
    """Phases in which the heads and norms of finished tasks go on learning."""

    def task_parameters(self) -> list[Tensor]:
        return super().task_parameters() + self._earlier()

    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "earlier": copy.deepcopy(self.states)}

    def restore(self, snapshot: Any) -> None:
        super().restore(snapshot)
        with torch.no_grad():
            for state, kept in zip(self.states, snapshot["earlier"], strict=True):
                for name, tensor in state.items():
                    tensor.copy_(kept[name])

    def finish_task(self) -> int:
        task = super().finish_task()
        self.states[task] = {n: self.states[task].get(n, t).clone() for n, t in self.initial.items()}
        for name in self.own.trainable:
            self.states[task][name].requires_grad_()
        return task

    def _earlier(self) -> list[Tensor]:
        return [state[name] for state in self.states for name in sorted(self.own.trainable)]


class Replay(Sequential):
    """Fine-tunes on each batch together with one of an earlier task's stored items (experience replay).

    memory: training items kept of each class. Every step takes the mean of the loss of the new batch and of a batch of
    as many items of one earlier task, drawn anew, which goes through that task's head and norms; these go on learning.
    Source: Chaudhry et al., "On tiny episodic memories", arXiv 1902.10486.
    """

    def __init__(self, model: nn.Module, weight: PhaseOptions, *, memory: int = 20, **options: Any) -> None:
        super().__init__(model, weight, **options)
        if memory < 1:
            raise ValueError(f"replay needs a memory of at least 1 item a class, got {memory}")
        self.phases = _Rehearsed(model, None, self.seed)
        self.memory = memory
        self._kept: list[tuple[Tensor, Tensor, int]] = []  # items, labels and classes of each finished task
        self._draw = torch.Generator().manual_seed(self.seed)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept of all tasks, stored items included."""
        return super().nbytes + sum(x.nbytes + y.nbytes for x, y, _ in self._kept)

    def learn(self, task: Task) -> TaskReport:
        report = super().learn(task)
        data = task.train.unaugmented()
        order = torch.randperm(len(data), generator=self._generator(report.task, 3))
        kept = torch.cat([order[data.labels[order] == label][: self.memory] for label in range(task.classes)])
        x, y = data[kept]
        self._kept.append((x.to(self.device), y.to(self.device), task.classes))
        return report

    def _loss(self, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        loss, logits = super()._loss(x, y, classes)
        if self._kept:
            task = int(torch.randint(len(self._kept), (), generator=self._draw))
            items, labels, its_classes = self._kept[task]
            drawn = torch.randint(len(labels), (len(y),), generator=self._draw)
            again = functional_call(self.model, self.phases.states[task], (items[drawn],))
            loss = (loss + F.cross_entropy(again[:, :its_classes], labels[drawn])) / 2
        return loss, logits


class PackNet(Sequential):
    """Trains all weights that no earlier task keeps, keeps an equal share of them, and retrains those alone.

    tasks: T of the stream; task t keeps 1 / (T - t) of each layer's free weights, the largest magnitudes, and uses
    them together with those of all earlier tasks. The pruned ones start the next task from their initial values. Half
    of the epochs go to each training.
    Source: Mallya & Lazebnik, "PackNet", CVPR 2018, with the share chosen so that every task finds as many.
    """

    _exclusive = True

    def __init__(self, model: nn.Module, weight: PhaseOptions, *, tasks: int, **options: Any) -> None:
        super().__init__(model, weight, **options)
        self.tasks = tasks
        self._initial = {name: layer.dense_weight.clone() for name, layer in self.phases.layers.items()}

    def _begin(self, task: Task) -> OpenTask:
        if len(self.phases.bank) >= self.tasks:
            raise ValueError(f"PackNet was made for {self.tasks} tasks, {task.name} is one more")
        open_ = super()._begin(task)
        for name, layer in self.phases.layers.items():
            free = self.phases.bank.free(name, layer.mask())
            layer.dense_weight[free] = self._initial[name][free]
        self._pruned = False
        return open_

    def _phase(self) -> tuple[PhaseOptions, int]:
        options, epochs = super()._phase()
        return options, epochs // 2 if self._pruned else epochs - epochs // 2

    def _train_weights(self, open_: OpenTask) -> None:
        if not self._pruned:
            self._train(open_)
            share = 1 / (self.tasks - open_.report.task)
            self.phases.prune({name: self._largest(name, share) for name in self.phases.layers})
            self._pruned, open_.best = True, None  # the pruned network's best epoch is another matter
        self._train(open_)

    def _largest(self, name: str, share: float) -> Tensor:
        """Where the largest free weights of a layer are, bool of its shape."""
        layer = self.phases.layers[name]
        keep = torch.zeros_like(layer.dense_weight, dtype=torch.bool)
        if layer.free_values is not None:
            free = self.phases.free_mask(name)
            where = free.flatten().nonzero()[:, 0]
            order = layer.free_values.detach().abs().argsort(descending=True, stable=True)
            keep.view(-1)[where[order[: round(share * len(order))]]] = True
        return keep


class Individual(Sequential):
    """A dense network of its own for each task: nothing is shared, nothing is transferred."""

    def __init__(self, model: nn.Module, weight: PhaseOptions, **options: Any) -> None:
        self._plain = copy.deepcopy(model)
        self._options = options
        self._bytes = 0
        super().__init__(model, weight, **options)

    @property
    def nbytes(self) -> int:
        """Bytes of all networks."""
        return self._bytes

    def run(self, tasks: Sequence[Task]) -> Tensor:
        """Learn each task with a fresh network; a row of the matrix repeats what was reached before."""
        reached: list[float] = []
        for task in tasks:
            own = Sequential(copy.deepcopy(self._plain), self.weight, **self._options)
            reached.append(own.run([task])[0, 0].item())
            self.reports += own.reports
            self._bytes += own.nbytes
            self._rows.append(list(reached))
        return self.accuracy


class Multitask(Sequential):
    """One dense network that learns all tasks at once, each with its own outputs: what sharing can reach at best.

    model: with as many outputs as all tasks have classes together. Batches mix the tasks; an item's loss and prediction
    see the outputs of its own task alone.
    """

    def run(self, tasks: Sequence[Task]) -> Tensor:
        """Learn all tasks; every row of the matrix is what is reached on each."""
        ends = list(accumulate((task.classes for task in tasks), initial=0))
        self._outputs = [slice(a, b) for a, b in pairwise(ends)]
        self._owner = torch.repeat_interleave(torch.tensor([task.classes for task in tasks]))  # (all classes,)
        self._all = tasks
        held_out = [task.validation for task in tasks if task.validation is not None]
        self.learn(
            Task(
                name="all tasks",
                classes=ends[-1],
                labels=tuple(range(ends[-1])),
                train=Relabelled.join([task.train for task in tasks], ends[:-1]),
                validation=Relabelled.join(held_out, ends[:-1]) if len(held_out) == len(tasks) else None,
                test=Relabelled.join([task.test for task in tasks], ends[:-1]),
            )
        )
        with self.phases.using(0):
            reached = [self._of(j, task.test)[0] for j, task in enumerate(tasks)]
        self._rows = [reached[: i + 1] for i in range(len(tasks))]
        return self.accuracy

    def validate(self, task: Task) -> tuple[float, float]:
        held_out = [self._of(j, t.validation) for j, t in enumerate(self._all) if t.validation is not None]
        mean = torch.tensor(held_out, dtype=torch.float64).mean(0).tolist()
        return mean[0], mean[1]

    def _of(self, task: int, data: Any) -> tuple[float, float]:
        """(accuracy, mean loss) on one task's data by its own outputs."""
        self._shown = self._outputs[task]
        return self._score(data, self._all[task].classes)

    def _logits(self, x: Tensor, classes: int) -> Tensor:
        logits: Tensor = self.model(x.to(self.device))
        return logits[:, self._shown]

    def _loss(self, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        self._shown = slice(None)
        logits = self._logits(x, classes)
        owner = self._owner.to(y.device)
        logits = logits.masked_fill(owner[y][:, None] != owner, -torch.inf)
        return F.cross_entropy(logits, y), logits


BASELINES = {
    "individual": Individual, "multitask": Multitask, "sequential": Sequential, "ewc": EWC, "replay": Replay,
    "packnet": PackNet,
}  # fmt: skip
"""The dense baselines by name."""
