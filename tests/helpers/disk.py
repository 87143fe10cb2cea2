"""A layer between `exssnet.io.writing` and the system, which counts the calls of a save, and may fail or end any."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exssnet.io import writing

CHANGES = ("open", "write", "truncate", "replace", "unlink", "fsync", "close", "rmdir")
"""The calls that change what is on the disk, or that say whether it is there."""
Act = Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]


class Interposed:
    """A module whose functions are told to `act`, which may do them."""

    def __init__(self, module: ModuleType, act: Act) -> None:
        self._module, self._act = module, act

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        if not callable(real) or name in ("getpid", "fspath"):
            return real
        return lambda *arguments, **named: self._act(name, lambda: real(*arguments, **named), arguments)


class RawFile(io.FileIO):
    act: Act

    def write(self, data: Any) -> int:
        at, data = self.tell(), bytes(data)
        return int(self.act("write", lambda: super(RawFile, self).write(data), (self, at, data)))

    def write_part(self, data: bytes) -> int:
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        return int(self.act("truncate", lambda: super(RawFile, self).truncate(size), (self, size)))

    def close(self) -> None:
        if not self.closed:
            handle = self.fileno()
            self.act("close", lambda: super(RawFile, self).close(), (handle,))


@contextmanager
def between(act: Act) -> Iterator[None]:
    """Within the block, every call of the writers goes through `act`."""

    def opened(handle: Any, mode: str) -> io.BufferedRandom:
        raw = RawFile(handle, mode)
        raw.act = act
        return io.BufferedRandom(raw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "os", Interposed(os, act))
        patch.setattr(writing, "fcntl", Interposed(writing.fcntl, act))
        patch.setattr(writing, "open", opened, raising=False)
        yield


@dataclass
class At:
    """Does `spoil` at the call of one number; without a number it counts."""

    number: int = -1
    spoil: Callable[[str, Callable[[], Any], tuple[Any, ...]], Any] = lambda name, do, given: do()
    names: list[str] = field(default_factory=list)

    def __call__(self, name: str, do: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        self.names.append(name)
        return self.spoil(name, do, given) if len(self.names) - 1 == self.number else do()


# What may be done to a call


def fails(code: int) -> Act:
    """The call is not made; a file that cannot be closed is closed all the same, as on Linux."""

    def spoil(name: str, do: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        if name == "close":
            do()
        raise OSError(code, os.strerror(code))

    return spoil


def fails_late(name: str, do: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    """The call is made, or half of it, and told as failed."""
    if name == "write":
        given[0].write_part(given[2][: len(given[2]) // 2])
    elif name in ("replace", "fsync", "close", "truncate"):
        do()
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def interrupts(name: str, do: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    """Ctrl-C, heard when the call is made."""
    do()
    raise KeyboardInterrupt


def cuts_off(name: str, do: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    """Half of what is written is written, which the system may do at any time."""
    return given[0].write_part(given[2][: len(given[2]) // 2 or 1]) if name == "write" else do()


def kills(name: str, do: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    """The process ends, in the middle of a write."""
    if name == "write":
        given[0].write_part(given[2][: len(given[2]) // 2])
    os._exit(9)


# What a crash of the machine may leave


@dataclass
class Crashes:
    """What the disk may hold after a crash at any moment of a save, when only what was synced is sure to be there.

    A change of a name is there or not, each for itself, until the folder is synced. Of what was written to a file any
    part may be there until the file is synced. `without`: kinds of syncs that are left out, "file" or "folder".
    """

    path: Path
    without: str = ""
    files: dict[int, bytes] = field(default_factory=dict)  # on the disk, by inode
    writes: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)  # not on the disk for sure
    link: int | None = None  # the inode that has the path's name on the disk
    links: list[int] = field(default_factory=list)  # inodes that took the name since the folder was synced
    seen: set[bytes | None] = field(default_factory=set)  # contents at the path after a crash at any moment so far

    def __post_init__(self) -> None:
        if self.path.exists():
            self.link = self.path.stat().st_ino
            self.files[self.link] = self.path.read_bytes()

    def __call__(self, name: str, do: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        inode, folder = 0, False
        if name == "fsync":
            status = os.fstat(given[0])
            inode, folder = status.st_ino, status.st_ino == self.path.parent.stat().st_ino
            if self.without == ("folder" if folder else "file"):
                return None
        elif name == "write":
            inode = os.fstat(given[0].fileno()).st_ino
        elif name == "replace":
            inode = os.stat(given[0]).st_ino
        found = do()
        if name == "write":
            self.writes.setdefault(inode, []).append((given[1], given[2][:found]))
        elif name == "replace":
            self.links.append(inode)
        elif name == "fsync" and folder:
            self.link, self.links = (self.links or [self.link])[-1], []
        elif name == "fsync":
            self.files[inode] = self._content(inode, len(self.writes.get(inode, ())))
            self.writes.pop(inode, None)
        self.seen |= self.now()
        return found

    def _content(self, inode: int, count: int, without: int = -1) -> bytes:
        """A file's content after its first writes but one."""
        content = bytearray(self.files.get(inode, b""))
        for number, (at, data) in enumerate(self.writes.get(inode, [])[:count]):
            if number != without:
                content.extend(bytes(max(0, at + len(data) - len(content))))
                content[at : at + len(data)] = data
        return bytes(content)

    def now(self) -> set[bytes | None]:
        """What may be at the path after a crash now."""
        found: set[bytes | None] = set()
        for inode in (self.link, *self.links):
            if inode is None:
                found.add(None)
                continue
            count = len(self.writes.get(inode, ()))
            found |= {self._content(inode, n) for n in range(count + 1)}
            found |= {self._content(inode, count, n) for n in range(count)}
        return found
