"""Task-incremental streams from any labelled dataset. N items, B a batch of them, images (C, H, W)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import cos, prod, radians, sin
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..io.values import shown
from .data import Labelled, Relabelled, Transform

Augmentation: TypeAlias = Literal["crop-flip", "flip"]
AUGMENTATIONS: dict[Augmentation, int] = {"crop-flip": 4, "flip": 0}
"""Pixels of padding before the crop, by name."""


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream: the labels of its datasets restart from 0; `labels` are the original class ids."""

    name: str
    classes: int
    labels: tuple[int, ...]
    train: Relabelled
    validation: Relabelled | None
    test: Relabelled

    def __post_init__(self) -> None:
        kinds = {"train": "training", "validation": "validation", "test": "test"}
        names = {field: f"{self.name}, {kind} data" for field, kind in kinds.items()}
        for field, name in names.items():
            data = getattr(self, field)
            if data is not None and data.name not in names.values():
                object.__setattr__(self, field, replace(data, name=name))


class CropFlip:
    """Random crop after zero-padding each side, and horizontal flip with probability 1/2, for batches (B, C, H, W).

    padding: pixels on each side; 0 for flips alone.
    """

    def __init__(self, seed: int, padding: int = 4) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.padding = padding

    def restart(self) -> None:
        """Draw from the start again."""
        self.generator.manual_seed(self.generator.initial_seed())

    def __call__(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        top, left = torch.randint(2 * self.padding + 1, (2, batch, 1), generator=self.generator)
        flip = torch.randint(2, (batch, 1), generator=self.generator).bool()
        row, column = top + torch.arange(height), left + torch.arange(width)  # (B, H), (B, W)
        column = column.flip(1).where(flip, column)
        image, channel = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
        return F.pad(x, [self.padding] * 4)[image, channel, row[:, None, :, None], column[:, None, None, :]]


def _classes(labels: Tensor) -> list[int]:
    """Class ids, ascending."""
    return sorted(set(labels.tolist()))


def in_order(order: Sequence[int] | int | None, known: Sequence[int]) -> list[int]:
    """Ids in the order that is given; or all those known, shuffled by a seed, or for None as they are."""
    if isinstance(order, int):
        shuffled = torch.randperm(len(known), generator=torch.Generator().manual_seed(order))
        return [known[i] for i in shuffled.tolist()]
    return list(known if order is None else order)


def stratified_split(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices (rest, taken), ascending: of each class of n items, round(share * n) random ones are taken."""
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in _classes(labels):
        members = (labels == label).nonzero()[:, 0]
        drawn = torch.randperm(len(members), generator=generator)[: int(share * len(members) + 0.5)]
        taken[members[drawn]] = True
    return (~taken).nonzero()[:, 0], taken.nonzero()[:, 0]


def _restarted(data: Relabelled, classes: Sequence[int]) -> Relabelled:
    """The items of these classes, each label its position in `classes`."""
    found = data.labels[:, None] == torch.tensor(classes)  # (N, classes)
    index = found.any(1).nonzero()[:, 0]
    return Relabelled(data.dataset, data.index[index], found[index].int().argmax(1))


def _stream(
    train: Relabelled, test: Relabelled, groups: Sequence[Sequence[int]], validation: float, seed: int
) -> list[Task]:
    """One task per group of classes. The validation data is the same whatever the grouping of the classes."""
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be a share in [0, 1), got {validation}")
    used = torch.tensor(sorted({label for group in groups for label in group}))
    train = train.select(torch.isin(train.labels, used).nonzero()[:, 0])
    rest, taken = map(train.select, stratified_split(train.labels, validation, torch.Generator().manual_seed(seed)))
    for label in used.tolist():
        items, held_out, tested = (int((data.labels == label).sum()) for data in (train, taken, test))
        if validation > 0 and not 0 < held_out < items:
            raise ValueError(
                f"a validation share of {validation} of class {label} is {held_out} of {items} training items: "
                "use validation=0 to go without validation data"
            )
        if tested == 0:
            raise ValueError(f"class {label} has {items} training items, but no test items")
    return [
        Task(
            name=f"task {t}",
            classes=len(group),
            labels=tuple(group),
            train=_restarted(rest, group),
            validation=_restarted(taken.unaugmented(), group) if validation > 0 else None,
            test=_restarted(test, group),
        )
        for t, group in enumerate(groups)
    ]


def _images(data: Relabelled) -> Labelled:
    """The images that a dataset selects from."""
    if not isinstance(data.dataset, Labelled) or len(data.dataset.images.shape) != 4:
        raise ValueError("images (N, C, H, W) in memory are needed: give a Labelled or a TensorDataset")
    return data.dataset


def _augmented(stream: Sequence[Task], augment: bool | Augmentation, seed: int) -> list[Task]:
    """The same tasks with random changes of the training images, a generator per task; see `split_by_class`."""
    if not augment or not stream:
        return list(stream)
    shape = tuple(_images(stream[0].train).images.shape[1:])
    if augment is True:
        if shape[0] != 3:
            raise ValueError(f"augment=True is for colour images of shape (3, H, W), got {shape}")
        augment = "crop-flip" if shape[1:] == (32, 32) else "flip"
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment must be True, False or one of {', '.join(AUGMENTATIONS)}, got {shown(augment)}")
    seeds = torch.randint(2**62, (len(stream),), generator=torch.Generator().manual_seed(seed)).tolist()
    padding = AUGMENTATIONS[augment]
    return [
        replace(task, train=task.train.with_source(augment=CropFlip(s, padding)))
        for task, s in zip(stream, seeds, strict=True)
    ]


def split_by_class(
    train: Dataset[Any], test: Dataset[Any], tasks: int | Sequence[int],
    order: Sequence[int] | int | None = None, validation: float = 0.1, seed: int = 0,
    augment: bool | Augmentation = False,
) -> list[Task]:  # fmt: skip
    """Tasks of disjoint classes (Split MNIST, Split CIFAR-100, ...).

    train, test: any map-style datasets of (item, label) pairs, see `Relabelled.of`.
    tasks: their number, which must divide the number of classes; or the number of classes of each task, and classes
        left over at the end of the order are not used.
    order: class ids in the order wanted, all or some of them; or a seed to shuffle all; None: ascending.
    validation: share of each class's training data held out, in [0, 1); 0: no validation data.
    seed: draws the validation data and the augmentation.
    augment: random changes of the training images, a generator per task: "crop-flip" (of 4 pixels), "flip", or True,
        which is the former for colour images of 32 x 32 pixels and the latter for others.
    Raises ValueError where classes, data or arguments do not suffice.
    """
    train, test = Relabelled.of(train), Relabelled.of(test)
    known = _classes(train.labels)
    order = in_order(order, known)
    if not set(order) <= set(known) or len(set(order)) != len(order):
        raise ValueError(f"order must hold different ids of the {len(known)} known classes, got {shown(list(order))}")
    if isinstance(tasks, int):
        if tasks < 1 or len(order) % tasks or not order:
            raise ValueError(
                f"{len(order)} classes do not make {tasks} tasks of equal size: "
                "give a list with the number of classes of each task"
            )
        tasks = [len(order) // tasks] * tasks
    if min(tasks, default=0) < 1 or sum(tasks) > len(order):
        raise ValueError(
            f"tasks must have at least 1 class each and at most {len(order)} in all, got {shown(list(tasks))}"
        )
    groups = [group.tolist() for group in torch.split(torch.tensor(order[: sum(tasks)]), list(tasks))]
    return _augmented(_stream(train, test, groups, validation, seed), augment, seed)


def in_one_task(name: str, train: Dataset[Any], test: Dataset[Any], validation: float, seed: int) -> Task:
    """All classes of a data set as one task of this name; validation, seed and errors as in `split_by_class`."""
    train = Relabelled.of(train)
    (task,) = _stream(train, Relabelled.of(test), [_classes(train.labels)], validation, seed)
    return replace(task, name=name)


def _changed(
    train: Relabelled, test: Relabelled, changes: Sequence[Transform], validation: float, seed: int
) -> list[Task]:
    """One task per change of the images, all tasks with all classes and with the same images in memory."""
    if not changes:
        raise ValueError("a stream must have at least 1 task, got none")
    for data in (train, test):
        _images(data)

    def through(data: Relabelled, change: Transform) -> Relabelled:
        first = _images(data).transform
        return data.with_source(transform=change if first is None else lambda x: change(first(x)))

    (task,) = _stream(train, test, [_classes(train.labels)], validation, seed)
    return [
        replace(
            task,
            name=f"task {t}",
            train=through(task.train, change),
            validation=None if task.validation is None else through(task.validation, change),
            test=through(task.test, change),
        )
        for t, change in enumerate(changes)
    ]


def _permute(order: Tensor, x: Tensor) -> Tensor:
    return x.flatten(2).index_select(2, order).view(x.shape)


def permuted_pixels(
    train: Dataset[Any], test: Dataset[Any], tasks: int, validation: float = 0.1, seed: int = 0
) -> list[Task]:
    """Tasks of the same classes, each with its own random permutation of the pixels, the first too (Permuted MNIST).

    train, test: images (N, C, H, W) in memory; the channels of a pixel stay together.
    validation, seed and errors as in `split_by_class`; the seed also draws the permutations.
    """
    train, test = Relabelled.of(train), Relabelled.of(test)
    pixels = prod(_images(train).images.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    changes = [partial(_permute, torch.randperm(pixels, generator=generator)) for _ in range(tasks)]
    return _changed(train, test, changes, validation, seed)


def _rotate(degrees: float, x: Tensor) -> Tensor:
    """Images turned counterclockwise about their centre, bilinear, zero outside."""
    height, width = x.shape[2:]
    c, s = cos(radians(degrees)), sin(radians(degrees))
    turn = x.new_tensor([[[c, -s * height / width, 0], [s * width / height, c, 0]]])
    grid = F.affine_grid(turn, [1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)


def rotated(
    train: Dataset[Any], test: Dataset[Any], tasks: int | Sequence[float], validation: float = 0.1, seed: int = 0
) -> list[Task]:
    """Tasks of the same classes, each with the images turned by its own angle (Rotated MNIST).

    train, test: images (N, C, H, W) in memory.
    tasks: the angles in degrees, counterclockwise; or the number of tasks, for angles 360 t / tasks.
    validation, seed and errors as in `split_by_class`.
    """
    angles = [360 * t / tasks for t in range(tasks)] if isinstance(tasks, int) else tasks
    changes = [partial(_rotate, angle) for angle in angles]
    return _changed(Relabelled.of(train), Relabelled.of(test), changes, validation, seed)
