"""Labelled texts, read from tables and from Hugging Face `datasets`."""

import csv
import gzip
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor

from .datasets import package

Column: TypeAlias = str | int

FORMATS = tuple(f"{kind}{packed}" for kind in (".tsv", ".csv", ".jsonl") for packed in ("", ".gz"))
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


def _opened(path: Path) -> IO[str]:
    """Text with the ends of its lines as they are; without a byte order mark."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="" if ".csv" in path.suffixes else "\n")  # type: ignore[no-any-return]


def rows(path: str | Path) -> Iterator[list[str]]:
    """The rows of a table, the one with the names of the columns first.

    .tsv: columns between tabs, and quotes are part of the text; .csv: quoted as in RFC 4180; .jsonl: an object a line,
    all with the keys of the first. Each of them may be gzipped.
    Raises FileNotFoundError, and ValueError, naming the line, for what is no such table.
    """
    path = Path(path)
    if not path.name.endswith(FORMATS):
        raise ValueError(f"{path} must be a table, {', '.join(FORMATS[::2])}, gzipped or not")
    number = 0
    try:
        with _opened(path) as file:
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
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, KeyError, EOFError, gzip.BadGzipFile) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} cannot be read after row {number}: {reason}") from None


def _objects(lines: Iterable[str]) -> Iterator[list[str]]:
    keys: list[str] = []
    for line in lines:
        found = json.loads(line)
        if not keys:
            keys = list(found)
            yield keys
        yield [_string(found[key]) for key in keys]


def _string(value: Any) -> str:
    return "" if value is None else str(value)


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
        raise ValueError(f"columns must be all names or all positions, got {wanted}")
    if not hasattr(source, "column_names") and Path(source).is_dir():
        source = package("datasets", "datasets").load_from_disk(str(source))
    labels: list[str] = []
    texts: list[tuple[str, ...]] = []
    if hasattr(source, "column_names"):
        if missing := [c for c in wanted if c not in source.column_names]:
            raise ValueError(f"the data set has no columns {missing}, but {source.column_names}")
        table: Iterable[Sequence[Any]] = zip(*(source[c] for c in wanted), strict=True)
        at, where = list(range(len(wanted))), "the data set"
    else:
        table, where = rows(source), str(source)
        at = [column for column in wanted if isinstance(column, int)]
        if named:
            names = next(table, [])  # type: ignore[call-overload]
            if missing := [c for c in wanted if c not in names]:
                raise ValueError(f"{where} has no columns {missing} in its first row, but {names[:20]}")
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

    Raises ValueError for test labels that no training text has.
    """
    found = set(train)
    if strange := sorted(set(test) - found):
        raise ValueError(f"test texts have labels that no training text has: {strange[:5]}")
    numbers = all(label.lstrip("-").isdecimal() for label in found)
    names = sorted(found, key=int) if numbers else sorted(found)
    ids = {name: i for i, name in enumerate(names)}
    return tuple(names), *(torch.tensor([ids[label] for label in part], dtype=torch.int64) for part in (train, test))  # type: ignore[return-value]
