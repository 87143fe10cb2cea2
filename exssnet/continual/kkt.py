"""KNN-based knowledge transfer: which learned task's features classify a new task best, to start from its scores."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nn import evaluation
from ..ops import knn_classify
from ..tasks import stratified_split
from . import distributed, heads
from .phases import Phases

Rule = Literal["best", "always", "all", "rescaled"]
RULES: tuple[Rule, ...] = ("best", "always", "all", "rescaled")


@dataclass(frozen=True, eq=False)
class Transfer:
    """The outcome of KKT for one new task.

    accuracies: of K nearest neighbours on each learned task's features; chance: 1 / classes.
    sources: the tasks whose scores were taken (empty: none was above chance, start from random scores).
    scores: initial scores by layer name, or None.
    """

    accuracies: list[float]
    chance: float
    sources: list[int] = field(default_factory=list)
    scores: Mapping[str, Tensor] | None = None


def sample_share(images: int) -> float:
    """Share of a task's training images that KKT looks at: 20 %, at least 500 images, at most all."""
    return min(1.0, max(0.2, 500 / images))


def penultimate_features(model: nn.Module, x: Tensor, head: str | None = None) -> Tensor:
    """Penultimate activations of a batch x (B, ...), flat (B, d): the input of the head.

    head: its name; or None for ``model.penultimate(x)`` where that is defined, else for the linear layer whose output
        is the model's output.
    ValueError where there is none, and for features that are not those of B items.
    """
    penultimate: Any = getattr(model, "penultimate", None)
    if head is None and callable(penultimate):
        features = penultimate(x)
    else:
        call = heads.forward(model, x, head).head
        if call is None:
            raise ValueError(
                "KKT needs the features before the head, but no linear layer's output is the model's output: name the "
                'head, as in head="classifier", or give the model a method `penultimate(x)`'
            )
        features = call.input
    if not isinstance(features, Tensor) or features.dim() < 2 or len(features) != len(x):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"KKT needs features ({len(x)}, ...) of {len(x)} items, got {got}")
    return features.flatten(1)


def knn_accuracy(features: Tensor, labels: Tensor, classes: int, generator: torch.Generator) -> float:
    """Accuracy of K nearest neighbours: a stratified 66 % of the sample classify the other 34 %.

    K = min(200, max(1, n66 // (2 classes))): the paper's 200 where the sample is large enough for it to mean anything.
    """
    known, asked = stratified_split(labels, 0.34, generator)
    if not len(known) or not len(asked):
        raise ValueError(f"KKT needs more than one image a class, got {labels.numel()} of {classes} classes")
    k = min(200, max(1, known.numel() // (2 * classes)))
    predicted = knn_classify(features[known], labels[known], features[asked], k, classes)
    return (predicted == labels[asked]).double().mean().item()


def transfer(
    phases: Phases, x: Tensor | Callable[[], Iterable[Tensor]], labels: Tensor, classes: int, rule: Rule = "best",
    seed: int = 0, batch_size: int = 256, head: str | None = None,
) -> Transfer:  # fmt: skip
    """Choose the initial scores of a new task among those of all finished ones.

    x, labels: one fixed, unaugmented sample (n, ...) of the new task's training data, or a function that gives its
        batches, called once for each source, where the sample is too large for the memory; classes: of the new task.
    rule: "best" copies the scores of the source with the highest accuracy if that is above chance; "always" copies
        them in any case; "all" takes the mean of all sources above chance; "rescaled" copies as "best", each layer's
        scores times the power of 2 that brings their size next to that of fresh ones. The mask is the same, but trained
        scores are so large that a new task hardly moves them (docs/results). Ties go to the earlier task.
    head: name of the layer whose input the features are; None: see `penultimate_features`.
    Several processes share the sources; process 0 decides.
    Statistics, masks and scores of the sources are not touched. RuntimeError if their scores were dropped.
    Source: arXiv 2210.10209, section 3.3; "rescaled" is ours.
    """
    if rule not in RULES:
        raise ValueError(f"kkt must be one of {', '.join(RULES)}, got {rule!r}")
    if classes < 1:
        raise ValueError(f"KKT needs at least 1 class, got {classes}")
    tasks = len(phases.bank)
    if len(phases.scores) != tasks:
        raise RuntimeError(f"KKT needs the scores of {tasks} finished tasks, but keep_scores=None dropped them")
    labels = labels.cpu()
    mine = {}
    for task in range(distributed.rank(), tasks, distributed.size()):
        with phases.using(task) as model, evaluation(model):
            parts = x.split(batch_size) if isinstance(x, Tensor) else x()
            features = torch.cat([penultimate_features(model, part, head) for part in parts])
        # The same split for every source
        generator = torch.Generator().manual_seed(seed)
        mine[task] = knn_accuracy(features.float().cpu(), labels, classes, generator)
    found = {task: accuracy for part in distributed.gathered(mine) for task, accuracy in part.items()}
    accuracies = distributed.of_first([found[task] for task in range(tasks)])
    chance = 1 / classes
    above = [task for task in range(tasks) if accuracies[task] > chance]
    best = max(range(tasks), key=lambda task: accuracies[task], default=None)
    if best is None or (rule != "always" and not above):
        return Transfer(accuracies, chance)
    sources = above if rule == "all" else [best]
    scores = {
        name: torch.stack([phases.scores[task][name].float() for task in sources]).mean(0) for name in phases.layers
    }
    if rule == "rescaled":
        scores = {name: _rescaled(s) for name, s in scores.items()}
    return Transfer(accuracies, chance, sources, scores)


def _rescaled(scores: Tensor) -> Tensor:
    """Scores whose root mean square is within a factor of sqrt(2) of that of fresh ones, 1 / sqrt(3 fan_in)."""
    size, fresh = scores.square().mean().sqrt().item(), (3 * max(1, scores[:1].numel())) ** -0.5
    return scores * 2.0 ** round(math.log2(fresh / size)) if 0 < size < math.inf else scores
