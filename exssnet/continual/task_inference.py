"""Which task a batch is of, where nobody tells: SupSup's inference from a superposition of masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..nn import evaluation
from ..tasks import loader
from .phases import Phases

InferenceRule = Literal["one-shot", "binary"]
RULES: tuple[InferenceRule, ...] = ("one-shot", "binary")


class TaskInference:
    """Finds the task of a batch among the finished tasks of a model.

    All masks are superposed, ``W * sum_i alpha_i M_i`` with equal coefficients, and the batch goes through once. The
    task is that whose coefficient, if it grew, would lower the entropy H of the outputs most:
    ``g_i = dH / d alpha_i = sum over layers <dH / dW_eff, W * M_i>``, one backward pass, then a product with each mask.

    phases: a model with finished tasks; nothing in it is changed. Later tasks need a new object.
    rule: "one-shot": the smallest g. "binary": half of the tasks, those of larger g, leave, until one is left.
    samples: H is the mean over the first so many of a batch (r of the paper).
    Batch norms take the statistics of the batch and keep none. Parameters of tasks (biases, affine norms, a head of
    their own) are superposed like the weights.
    Source: Wortsman et al., "Supermasks in Superposition", NeurIPS 2020, section 3.3 and algorithms 1 and 2.
    """

    def __init__(self, phases: Phases, rule: InferenceRule = "one-shot", samples: int = 1) -> None:
        if rule not in RULES:
            raise ValueError(f"task inference: rule must be one of {', '.join(RULES)}, got {rule!r}")
        if samples < 1:
            raise ValueError(f"task inference: samples must be at least 1, got {samples}")
        if not len(phases.bank):
            raise ValueError("task inference: no task is finished")
        self.phases, self.rule, self.samples = phases, rule, samples
        self._plain = phases.fold(0)
        self._weights = {n: m for n, m in self._plain.named_modules() if n in phases.layers}
        for module in self._plain.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
        self._plain.eval().requires_grad_(False)

    def infer(self, x: Tensor) -> int:
        """The number of the task that a batch x (B, ...) is of; of equal tasks the earlier."""
        left = list(range(len(self.phases.bank)))
        while len(left) > 1:
            gradient = self._gradient(x, left)
            order = sorted(range(len(left)), key=lambda i: gradient[i])  # stable: ties stay in order
            keep = 1 if self.rule == "one-shot" else (len(left) - 1) // 2 + 1
            left = sorted(left[i] for i in order[:keep])
        return left[0]

    def _gradient(self, x: Tensor, tasks: Sequence[int]) -> list[float]:
        """dH / d alpha of the given tasks, superposed equally."""
        share, bank = 1 / len(tasks), self.phases.bank
        parameters = dict(self._plain.named_parameters())
        for name in parameters.keys() & self.phases.initial.keys():
            states = [self.phases.states[t].get(name, self.phases.initial[name]) for t in tasks]
            parameters[name].copy_(torch.stack([s.detach() for s in states]).mean(0))
        weights = self.phases.weights_before()
        for name, module in self._weights.items():
            weight = weights[name]
            times = torch.zeros_like(weight)
            for task in tasks:
                times += bank.mask(task, name).to(weight.device)
            module.weight = nn.Parameter(weight * times * share)
        try:
            with torch.enable_grad():
                p = self._plain(x)[: self.samples].float().log_softmax(1)
                entropy = -(p.exp() * p).sum(1).mean()
                gradients = torch.autograd.grad(entropy, [m.weight for m in self._weights.values()])  # type: ignore[misc]
        finally:
            for module in self._weights.values():
                module.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
        towards = {name: g * weights[name] for name, g in zip(self._weights, gradients, strict=True)}
        return [
            sum(float(t[bank.mask(task, name).to(t.device)].sum(dtype=torch.float64)) for name, t in towards.items())
            for task in tasks
        ]


@dataclass(frozen=True)
class WithoutTask:
    """Shares in [0, 1] of test items: whose task was found, and that were also classified right by its network."""

    task_accuracy: float
    accuracy: float


def evaluate_without_task(
    inference: TaskInference, data: Sequence[Dataset[Any]], classes: Sequence[int], batch_size: int = 128,
    batches: int | None = None,
) -> WithoutTask:  # fmt: skip
    """Accuracy without a task id, over the test data of all finished tasks, each batch of one task.

    data, classes: of each task, in order. batch_size: items of which the first `samples` decide for the whole batch.
    batches: look at so many batches of each task, or at all. An item of a wrongly inferred task counts as wrong.
    """
    found = right = seen = 0
    device = next(iter(inference.phases.layers.values())).dense_weight.device
    for task, (items, outputs) in enumerate(zip(data, classes, strict=True)):
        for number, (x, y) in enumerate(loader(items, batch_size)):
            if number == (math.inf if batches is None else batches):
                break
            x = x.to(device)
            seen += len(y)
            if inference.infer(x) == task:
                found += len(y)
                with inference.phases.using(task) as model, evaluation(model):
                    right += int((model(x)[:, :outputs].argmax(1).cpu() == y).sum())
    if not seen:
        raise ValueError("evaluate_without_task: the tasks have no test data")
    return WithoutTask(found / seen, right / seen)
