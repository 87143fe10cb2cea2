"""Speed of whole training steps of LeNet-300-100 in both phases, against the same steps in plain PyTorch.

    python benchmarks/training.py [--threads 1 2] [--densities 0.1 0.02] [--quick] [--json FILE]

A step is forward, cross-entropy, backward and Adam on a batch of 64: 784-300-100-10, no biases. "sort" selects every
layer's weights by a full sort in every forward, as the official code does in both phases; "cached mask" multiplies the
weights with a mask kept as floats; "no mask" trains the plain network. Gradients are checked before anything is timed.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import plain
import torch
from timing import Row, alternate, check_accurate, parser, report
from torch import Tensor
from torch.nn import functional as F

from exssnet import Phases, convert
from exssnet.models import LeNet300100

Phase = Literal["mask", "weight"]
BATCH, FEATURES, CLASSES, LEARNING_RATE = 64, 784, 10, 1e-2


class Training:
    """One way to train: a network as a function of x, and what Adam trains."""

    def __init__(self, network: Callable[[Tensor], Tensor], trained: list[Tensor]) -> None:
        self.network, self.trained = network, trained
        self.optimizer = torch.optim.Adam(trained, LEARNING_RATE)

    def gradients(self, x: Tensor, y: Tensor) -> list[Tensor]:
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(x), y).backward()
        return [t.grad for t in self.trained if t.grad is not None]

    def steps(self, data: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """A function that makes one training step a call."""

        def step() -> None:
            self.gradients(*next(data))
            self.optimizer.step()

        return step


class Start:
    """The weights, scores and masks from which every way of training starts."""

    def __init__(self, density: float) -> None:
        torch.manual_seed(0)
        self.density = density
        self.model = convert(LeNet300100(FEATURES, CLASSES), density, weights="signed_constant")
        self.phases = Phases(self.model)
        self.phases.start_task()
        layers = self.phases.layers.values()
        self.weights = [layer.weight.clone() for layer in layers]
        self.scores = [layer.scores.detach().clone() for layer in layers if layer.scores is not None]
        self.masks = [layer.mask() for layer in layers]

    def ours(self, phase: Phase) -> Training:
        if phase == "weight":
            self.phases.start_weight_phase()
        return Training(self.model, list(self.phases.parameters()))

    def in_plain_pytorch(self, phase: Phase, how: str, dtype: torch.dtype = torch.float32) -> Training:
        trained = [t.to(dtype, copy=True).requires_grad_() for t in (self.scores if phase == "mask" else self.weights)]
        weights, scores = ([t.to(dtype) for t in tensors] for tensors in (self.weights, self.scores))
        masks = [mask.to(dtype) for mask in self.masks]

        def effective(i: int) -> Tensor:
            if how == "no mask":
                return trained[i]
            if how == "cached mask":
                return trained[i] * masks[i]
            if phase == "mask":
                return plain.supermask_weight(weights[i], trained[i], self.density)
            return plain.supermask_weight(trained[i], scores[i], self.density)

        def network(x: Tensor) -> Tensor:
            x = F.relu(F.linear(x.to(dtype), effective(0)))
            return F.linear(F.relu(F.linear(x, effective(1))), effective(2))

        return Training(network, trained)


def check(start: Start, phase: Phase, ours: Training, x: Tensor, y: Tensor) -> None:
    """Our gradients of one batch against the sorting network's, in float64 and in float32."""
    truth, peer = (start.in_plain_pytorch(phase, "sort", d).gradients(x, y) for d in (torch.float64, torch.float32))
    if phase == "weight":
        truth, peer = ([g[mask] for g, mask in zip(gradients, start.masks, strict=True)] for gradients in (truth, peer))
    for layer, gradients in enumerate(zip(ours.gradients(x, y), truth, peer, strict=True)):
        check_accurate(f"{phase} phase: the gradient of layer {layer}", *gradients)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, so many that no way of training learns them by heart while it is timed."""
    torch.manual_seed(1)
    return itertools.cycle([(torch.randn(BATCH, FEATURES), torch.randint(CLASSES, (BATCH,))) for _ in range(100)])


def row(phase: Phase, density: float, threads: int, seconds: float) -> Row:
    start = Start(density)
    ours = start.ours(phase)
    check(start, phase, ours, *next(batches()))
    names = ["sort", "no mask"] if phase == "mask" else ["sort", "cached mask", "no mask"]
    ways = [ours, *(start.in_plain_pytorch(phase, name) for name in names)]
    timings = alternate([way.steps(batches()) for way in ways], seconds)
    baselines = dict(zip(names, timings[1:], strict=True))
    return Row(f"{phase} phase", f"LeNet-300-100, batch {BATCH}", density, threads, timings[0], baselines=baselines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.05, 0.02])
    arguments = options.parse_args()

    def measure(threads: int) -> list[Row]:
        rows = []
        for phase in ("mask", "weight"):
            for density in arguments.densities:
                rows.append(row(phase, density, threads, 0.1 if arguments.quick else 5.0))
                print(".", end="", flush=True, file=sys.stderr)
        return rows

    report(arguments, measure)


if __name__ == "__main__":
    main()
