"""Labelled texts, read from tables and from Hugging Face `datasets`."""

import csv
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..io.values import shown
from .files import opened, package

Column: TypeAlias = str | int

FORMATS = tuple(f"{kind}{ending}" for kind in (".tsv", ".csv", ".jsonl") for ending in ("", ".gz"))
"""How the names of tables end."""


@dataclass(frozen=True, eq=False)
class Texts:
    """N texts, each of one part or, in tasks on pairs, of two; and N labels as they stand in the file."""

    texts: Sequence[tuple[str, ...]]
    labels: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"there are {len(self.texts)} texts but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Tensor) -> "Texts":
        """The texts at these indices."""
        chosen = index.tolist()
        return Texts([self.texts[i] for i in chosen], [self.labels[i] for i in chosen])


def rows(path: str | Path) -> Iterator[list[str]]:
    """The rows of a table, the one with the names of the columns first.

    .tsv: columns between tabs, and quotes are part of the text; .csv: quoted as in RFC 4180; .jsonl: an object a line,
    all with the keys of the first. Each of them may be gzipped.
    Raises FileNotFoundError, and ValueError, naming the line, for what is no such table.
    """
    path = Path(path)
    if not path.name.endswith(FORMATS):
        raise ValueError(f"{shown(path)} must be a table, {', '.join(FORMATS[::2])}, gzipped or not")
    number = 0
    try:
        # the ends of lines stay as they are; a byte order mark is left out
        with opened(path, encoding="utf-8-sig", newline="" if ".csv" in path.suffixes else "\n") as file:
            lines: Iterable[list[str]]
            if ".csv" in path.suffixes:
                lines = csv.reader(file, strict=True)
            elif ".tsv" in path.suffixes:
                lines = (line.rstrip("\r\n").split("\t") for line in file if line.strip("\r\n"))
            else:
                lines = _objects(line for line in file if line.strip())
            for number, row in enumerate(lines, 1):  # noqa: B007
                if row:
                    yield row
    except (csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} cannot be read after row {number}: {shown(error, 200)}") from None


def _objects(lines: Iterable[str]) -> Iterator[list[str]]:
    keys: list[str] = []
    for line in lines:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"an object is needed, got {shown(found)}")
        if not keys:
            keys = list(found)
            yield keys
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"there is no {shown(missing[0])}")
        row = [_string(found[key]) for key in keys]
        "".join(row).encode()  # ValueError for half a surrogate pair, which no encoder takes
        yield row


def _string(value: Any) -> str:
    return "" if value is None else str(value)


def saved(folder: str | Path) -> Any:
    """The data set of Hugging Face that `save_to_disk` wrote into a folder; ValueError, naming it, for any other."""
    library = package("datasets", "datasets")
    try:
        return library.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and json raise many kinds for damaged files
        raise ValueError(f"{shown(Path(folder))} is no saved data set: {shown(error, 200)}") from None


def read_texts(source: Any, label: Column, text: Column | Sequence[Column], pair: Column | None = None) -> Texts:
    """Labelled texts of one table or data set.

    source: a file, see `rows`; a folder that `datasets.Dataset.save_to_disk` wrote, or one split of a `DatasetDict`; or
        a `datasets.Dataset` itself.
    label, text, pair: columns by name, which the first row of a table holds; or all by position from 0, then every row
        is data. Several columns of `text` are joined by a space; `pair` is the second part of each text.
    Rows of a table with too few columns are left out, and a warning tells how many.
    Raises FileNotFoundError or ValueError, naming the file and what it lacks.
    """
    parts = [[text] if isinstance(text, str | int) else list(text)] + ([] if pair is None else [[pair]])
    wanted = [label, *(column for part in parts for column in part)]
    named = isinstance(label, str)
    if any(isinstance(column, str) != named for column in wanted):
        raise ValueError(f"columns must be all names or all positions, got {shown(wanted)}")
    if not hasattr(source, "column_names") and Path(source).is_dir():
        source = saved(source)
    labels: list[str] = []
    texts: list[tuple[str, ...]] = []
    if hasattr(source, "column_names"):
        if missing := [c for c in wanted if c not in source.column_names]:
            raise ValueError(f"the data set has no columns {missing}, but {shown(source.column_names)}")
        table: Iterable[Sequence[Any]] = zip(*(source[c] for c in wanted), strict=True)
        at, where = list(range(len(wanted))), "the data set"
    else:
        table, where = rows(source), shown(Path(source))
        at = [column for column in wanted if isinstance(column, int)]
        if named:
            names = next(table, [])  # type: ignore[call-overload]
            if missing := [c for c in wanted if c not in names]:
                raise ValueError(f"{where} has no columns {missing} in its first row, but {shown(names, 200)}")
            at = [names.index(str(column)) for column in wanted]
    left_out = 0
    for row in table:
        if len(row) <= max(at):
            left_out += 1
            continue
        values = iter([_string(row[place]) for place in at])
        labels.append(next(values))
        texts.append(tuple(" ".join(next(values) for _ in part) for part in parts))
    if left_out:
        warnings.warn(f"{where}: {left_out} rows have fewer than {max(at) + 1} columns and are left out", stacklevel=2)
    return Texts(texts, labels)


def class_ids(train: Sequence[str], test: Sequence[str]) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """The classes among the training labels, ascending (as numbers, if all are), and both splits' ids (N,) int64.

    Labels are classes as they are written: "01" and "1" are two, in this order.

    Raises ValueError for test labels that no training text has.
    """
    found = set(train)
    if strange := sorted(set(test) - found):
        raise ValueError(f"test texts have labels that no training text has: {shown(strange[:5])}")
    numbers = all(re.fullmatch(r"-?\d{1,1000}", label) for label in found)  # Python reads no longer ones
    names = sorted(found, key=lambda label: (int(label) if numbers else 0, label))
    ids = {name: i for i, name in enumerate(names)}
    return tuple(names), *(torch.tensor([ids[label] for label in part], dtype=torch.int64) for part in (train, test))  # type: ignore[return-value]
