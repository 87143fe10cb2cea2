"""The streams of the continual-learning literature by name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..io.values import shown
from .data import Labelled, Relabelled
from .datasets import load
from .features import Encoder, encoder, text_features
from .streams import Augmentation, Task, in_one_task, in_order, permuted_pixels, rotated, split_by_class
from .text import FORMATS, Column, Texts, class_ids, read_texts, rows, saved

Order = Sequence[int] | int | None
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """The options of `stream`; None stands for the stream's own."""

    tasks: int | Sequence[int] | None
    task_order: Order
    class_order: Order
    validation: float | None
    augment: bool | Augmentation | None
    per_class: int | None
    test_per_class: int | None
    seed: int
    encoder: Encoder | str | Path | None
    max_tokens: int
    cache: str | Path | None
    progress: Progress | None

    def chosen(self, known: int) -> list[int]:
        """The numbers of the first tasks, in the order wanted, of as many as are known."""
        order = _permutation(self.task_order, list(range(known)))
        first = len(order) if self.tasks is None else self.tasks
        if not isinstance(first, int) or not 1 <= first <= len(order):
            raise ValueError(f"tasks must be a number from 1 to {len(order)}, got {shown(first)}")
        return order[:first]


def _permutation(order: Order, known: Sequence[int]) -> list[int]:
    """Ids in the order wanted: some or all of those known, or all shuffled by a seed."""
    found = in_order(order, known)
    if isinstance(order, Sequence) and (not found or not set(found) <= set(known) or len(set(found)) != len(found)):
        raise ValueError(f"an order must hold different ids of {known[0]} to {known[-1]}, got {shown(found)}")
    return found


def _limited(labels: Tensor, per_class: int | None, seed: int) -> Tensor:
    """Indices, ascending, of at most per_class random items of each class."""
    if per_class is None:
        return torch.arange(len(labels))
    if per_class < 1:
        raise ValueError(f"at least 1 item of each class is needed, got {per_class}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(labels), generator=generator)
    members = [drawn[labels[drawn] == label][:per_class] for label in labels.unique()]
    return torch.cat([*members, drawn[:0]]).sort().values


@dataclass(frozen=True)
class _Images:
    """A stream over one set of images."""

    data: str
    tasks: int
    classes: int = 0  # of each task; 0: all of them, changed by `change`
    order: int | None = None  # the seed that draws the order of the classes
    validation: float = 0.1
    augment: bool = False
    change: Callable[..., list[Task]] = split_by_class

    def __call__(self, root: Path, options: Options) -> list[Task]:
        limits = options.per_class, options.test_per_class
        train, test = (
            whole.select(_limited(whole.labels, limit, options.seed))
            for whole, limit in zip(map(Relabelled.of, load(self.data, root)), limits, strict=True)
        )
        validation = self.validation if options.validation is None else options.validation
        augment = self.augment if options.augment is None else options.augment
        if self.classes:
            known = sorted(set(train.labels.tolist()))
            order = _permutation(self.order if options.class_order is None else options.class_order, known)
            sizes, options = self._sizes(len(order), options)
            built = split_by_class(train, test, sizes, order, validation, options.seed, augment)
        else:
            if augment or options.class_order is not None:
                raise ValueError("augment and class_order are for streams of disjoint classes, not of changed images")
            grows = self.change is permuted_pixels and isinstance(options.tasks, int)
            built = self.change(train, test, options.tasks if grows else self.tasks, validation, options.seed)
        # All tasks are built first: a task has the same data whatever the others are.
        return [replace(built[i], name=f"task {t}") for t, i in enumerate(options.chosen(len(built)))]

    def _sizes(self, classes: int, options: Options) -> tuple[list[int], Options]:
        """The number of classes of each task that there can be."""
        if options.tasks is None or isinstance(options.tasks, int):
            return [self.classes] * min(self.tasks, classes // self.classes), options
        sizes = list(options.tasks)
        if min(sizes, default=0) < 1 or sum(sizes) > classes:
            raise ValueError(f"tasks must have at least 1 class each and at most {classes} in all, got {shown(sizes)}")
        return sizes, replace(options, tasks=None)


LABELS = ("label", "labels", "gold_label", "is_duplicate", "topic", "class")
TEXTS = ("sentence", "text", "title", "question_title", "content", "question_content", "description", "best_answer")
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text_a", "text_b"),
)  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """One data set of texts, which makes one task: the names its folder may have, and whether it is of pairs."""

    name: str
    pair: bool = False
    folders: tuple[str, ...] = ()

    def read(self, root: Path, splits: Sequence[str]) -> Texts:
        """The texts of the first of these splits that is there."""
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            plain = re.sub("[^a-z0-9]", "", folder.name.lower())
            if plain.removeprefix("glue").removeprefix("web").removesuffix("csv") in (self.name, *self.folders):
                for split in splits:
                    for file in (folder / split, *(folder / f"{split}{ending}" for ending in FORMATS)):
                        if file.exists():
                            texts = read_texts(file, *self._columns(file))
                            if not len(texts):
                                raise ValueError(f"{shown(file)} holds no texts")
                            return texts
        raise FileNotFoundError(
            f"put {' or '.join(splits)} of {self.name} as a table ({', '.join(FORMATS[::2])}, gzipped or not) into "
            f"{root / self.name}, with columns label and {'text_a, text_b' if self.pair else 'text'}"
        )

    def _columns(self, file: Path) -> tuple[Column, Sequence[Column], Column | None]:
        """Label, text and pair: by the names in the first row, or where there are none by position."""
        first = saved(file).column_names if file.is_dir() else next(rows(file), [])
        label = next((name for name in LABELS if name in first), None)
        if label is None:  # the published tables without names; CoLA's are source, label, star, sentence
            if self.name == "cola" and len(first) == 4:
                return 1, [3], None
            return 0, [1] if self.pair else list(range(1, max(2, len(first)))), 2 if self.pair else None
        found = [pair for pair in PAIRS if set(pair) <= set(first)] if self.pair else []
        if self.pair and found:
            return label, [found[0][0]], found[0][1]
        texts = [name for name in TEXTS if name in first]
        if self.pair or not texts:
            expected = " or ".join(", ".join(pair) for pair in PAIRS) if self.pair else ", ".join(TEXTS)
            raise ValueError(f"{shown(file)}: no columns of text among {shown(first, 200)}; expected {expected}")
        return label, texts, None


@dataclass(frozen=True)
class _Tables:
    """A stream whose tasks are data sets of texts."""

    sets: tuple[_Table, ...]
    test: tuple[str, ...]
    validation: float
    per_class: int | None = None

    def __call__(self, root: Path, options: Options) -> list[Task]:
        if options.augment or options.class_order is not None:
            raise ValueError("augment and class_order are for streams of images, got a stream of texts")
        encode = options.encoder
        if encode is None or isinstance(encode, str | Path):
            encode = encoder(encode)
        validation = self.validation if options.validation is None else options.validation
        limit = self.per_class if options.per_class is None else options.per_class
        tables = [self.sets[i] for i in options.chosen(len(self.sets))]
        read = [(table.read(root, ("train",)), table.read(root, self.test)) for table in tables]
        stream = []
        for table, (train, test) in zip(tables, read, strict=True):
            try:
                _, y_train, y_test = class_ids(train.labels, test.labels)
            except ValueError as error:
                raise ValueError(f"{table.name} in {shown(root)}: {error}") from None
            parts = [
                self._features(f"{table.name}, {split}", texts, labels, most, encode, options)
                for split, texts, labels, most in (
                    ("train", train, y_train, limit), ("test", test, y_test, options.test_per_class),
                )
            ]  # fmt: skip
            stream.append(in_one_task(table.name, parts[0], parts[1], validation, options.seed))
        return stream

    def _features(
        self, what: str, texts: Texts, labels: Tensor, most: int | None, encode: Encoder, options: Options
    ) -> Labelled:
        index = _limited(labels, most, options.seed)
        progress = None if options.progress is None else partial(options.progress, what)
        chosen = texts.select(index).texts
        return Labelled(text_features(chosen, encode, options.max_tokens, options.cache, progress), labels[index])


_GLUE = (_Table("cola"), _Table("sst2"), *(_Table(name, pair=True) for name in ("qqp", "qnli", "mnli")))
_WEB = (
    _Table("agnews"), _Table("yelp", folders=("yelpreviewfull",)), _Table("amazon", folders=("amazonreviewfull",)),
    _Table("yahoo", folders=("yahooanswers", "yahooanswerstopics")), _Table("dbpedia", folders=("dbpedia14",)),
)  # fmt: skip

_STREAMS: dict[str, Callable[[Path, Options], list[Task]]] = {
    "split-mnist": _Images("mnist", 5, 2, order=0),
    "split-fashion-mnist": _Images("fashion-mnist", 5, 2, order=0),
    "permuted-mnist": _Images("mnist", 10, change=permuted_pixels),
    "rotated-mnist": _Images("mnist", 36, change=rotated),
    "split-cifar10": _Images("cifar10", 5, 2, augment=True),
    "split-cifar100": _Images("cifar100", 20, 5, augment=True),
    "split-tinyimagenet": _Images("tinyimagenet", 10, 20, order=0, augment=True),
    "omniglot": _Images("omniglot", 100, 16, validation=0),
    "webnlp": _Tables(_WEB, ("test",), 0.5, 4000),
    "glue": _Tables(_GLUE, ("dev", "dev_matched", "validation", "validation_matched", "test"), 0.1),
}


def streams() -> tuple[str, ...]:
    """The streams that `stream` knows by name."""
    return tuple(_STREAMS)


def stream(
    name: str, root: str | Path | None = None, *, tasks: int | Sequence[int] | None = None, task_order: Order = None,
    class_order: Order = None, validation: float | None = None, augment: bool | Augmentation | None = None,
    per_class: int | None = None, test_per_class: int | None = None, seed: int = 0,
    encoder: Encoder | str | Path | None = None, max_tokens: int = 64, cache: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Task]:  # fmt: skip
    """A stream of the literature, from files below `root` (default ./data). None stands for the stream's own options.

    ====================  =============================================  =============================================
    name                  tasks                                          files, where they are not as in `load`
    ====================  =============================================  =============================================
    split-mnist,          5 of 2 classes, in an order drawn by seed 0
    split-fashion-mnist
    permuted-mnist        10, or as many as wanted, of 10 classes        as for mnist
    rotated-mnist         36 of 10 classes, turned by 10 degrees each    as for mnist
    split-cifar10         5 of 2 classes; crop and flip
    split-cifar100        20 of 5 classes; crop and flip
    split-tinyimagenet    10 of 20 classes, drawn by seed 0; flip
    omniglot              100 of 16 classes, without validation data
    webnlp                agnews, yelp, amazon, yahoo, dbpedia; 2000     NAME/train.tsv and NAME/test.tsv
                          + 2000 validation texts of a class, or half
    glue                  cola, sst2, qqp, qnli, mnli; 90 % + 10 %       NAME/train.tsv and NAME/dev.tsv
    ====================  =============================================  =============================================

    Tables of texts may as well be .csv or .jsonl, gzipped, or splits of a saved `DatasetDict`; their folders may have
    the names of the published archives (CoLA, SST-2, ag_news_csv, ...), their columns the published names, or without
    names the order label, text (label, text_a, text_b for qqp, qnli and mnli) or the published one. For glue the
    validation data are the test data: dev, dev_matched, validation, validation_matched or, without any of them, test.

    tasks: how many, the first ones; or for disjoint classes the number of classes of each task.
    task_order, class_order: numbers of tasks, ids of classes, all or some of them; or a seed to shuffle all.
    validation, augment: as in `split_by_class`.
    per_class, test_per_class: at most so many items of each class, before validation data is held out; drawn by seed.
    seed: draws items, validation data, augmentation and permutations.
    encoder, max_tokens, cache: of texts, see `encoder` and `text_features`; items are (L, E + 1), L that of the set's
        longest text, the last feature 1 for tokens and 0 for padding.
    progress: is told (what is encoded, texts done, all texts).
    Raises FileNotFoundError, saying what to put where, ModuleNotFoundError or ValueError.
    """
    if name not in _STREAMS:
        raise ValueError(f"stream {name} is none of {', '.join(_STREAMS)}")
    options = Options(
        tasks, task_order, class_order, validation, augment, per_class, test_per_class, seed, encoder, max_tokens,
        cache, progress,
    )  # fmt: skip
    return _STREAMS[name](Path(root or "data"), options)
