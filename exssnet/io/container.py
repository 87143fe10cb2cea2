"""Safetensors files with a checksum of all their bytes. They are replaced atomically, and refused if damaged."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from . import writing
from .values import shown, typed

CHECKSUM = "checksum"
"""Name of the last tensor: the SHA-256 of all bytes before it."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a header: the limit of safetensors


@dataclass
class Entry:
    """Type, shape and place of a tensor, as in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.data_offsets[1] - self.data_offsets[0]


class Container:
    """An open file with a valid header: `metadata`, and `entries` in the order of the tensors in the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(self._take(8), "little")
        if length > min(self.size - 8, LONGEST):
            raise ValueError(f"its {self.size} bytes hold no header of {length}")
        try:
            header = json.loads(self._take(length))
        except (ValueError, RecursionError):
            raise ValueError("its header is no JSON") from None
        header = typed(dict[str, dict], header, "its header")  # type: ignore[type-arg]
        self.metadata: dict[str, str] = typed(dict[str, str], header.pop("__metadata__", {}), "its metadata")
        entries = {key: typed(Entry, entry, f"its entry {key[:99]!r}") for key, entry in header.items()}
        self.entries: dict[str, Entry] = dict(sorted(entries.items(), key=lambda item: item[1].data_offsets))
        at = 0
        for key, entry in self.entries.items():
            if entry.dtype not in DTYPES or min(entry.shape, default=0) < 0:
                raise ValueError(f"its entry {key[:99]!r} is {entry.shape} of {entry.dtype[:99]!r}")
            end = at + math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
            if entry.data_offsets != (at, end):
                raise ValueError(f"its entry {key[:99]!r} lies at {entry.data_offsets}, not at {(at, end)}")
            at = end
        if at != self.size - 8 - length:
            raise ValueError(f"it has {self.size - 8 - length} bytes of tensors, its header tells of {at}")

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors; call it once. ValueError if the file is incomplete or its checksum, if any, is wrong."""
        tensors, before = {}, b""
        for key, entry in self.entries.items():
            before = self._hash.digest()
            flat = torch.empty(entry.size, dtype=torch.uint8)
            flat.numpy()[:] = memoryview(self._take(entry.size))
            if entry.dtype == "BOOL" and bool((flat > 1).any()):
                raise ValueError(f"its entry {key[:99]!r} holds other bytes than 0 and 1")
            tensors[key] = flat.view(DTYPES[entry.dtype]).reshape(entry.shape)
        if CHECKSUM in tensors and bytes(tensors.pop(CHECKSUM).flatten().tolist()) != before:
            raise ValueError("its checksum is wrong")
        return tensors

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError(f"it ends after {self.size} bytes")
        self._hash.update(data)
        return data


@contextmanager
def named(call: str, path: str | Path) -> Iterator[None]:
    """Put the caller's and the file's name in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{call}: {shown(Path(path))}: {shown(error, 1000)}") from error


@contextmanager
def opened(path: str | Path) -> Iterator[Container]:
    """Open a file once, so that a later replacement does not change what is read. ValueError if it is damaged."""
    with open(path, "rb") as file:
        try:
            container = Container(file)
        except ValueError as error:
            raise ValueError(f"it is no safetensors file or is damaged: {error}") from error
        yield container


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors on the CPU and a checksum, atomically (see `exssnet.io.writing.replacing`)."""
    # The widest dtypes come first, so that every tensor is aligned to the size of its elements.
    order = sorted(tensors, key=lambda key: -tensors[key].element_size())
    sizes = [tensors[key].numel() * tensors[key].element_size() for key in order]
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for key, size in zip(order, sizes, strict=True):
        entries[key] = vars(Entry(NAMES[tensors[key].dtype], list(tensors[key].shape), (at, at + size)))
        at += size
    digest = hashlib.sha256()
    entries[CHECKSUM] = vars(Entry("U8", [digest.digest_size], (at, at + digest.digest_size)))
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    parts: list[bytes | memoryview] = [len(header).to_bytes(8, "little"), header]
    parts += [tensors[key].reshape(-1).view(torch.uint8).numpy().data for key in order]
    with writing.replacing(path) as file:
        for data in parts:
            digest.update(data)
            file.write(data)
        file.write(digest.digest())
