"""Files that several processes may write: each is replaced whole or stays as it was, whoever fails or is killed."""

import errno
import glob
import os
import platform
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is locked there
    fcntl = None  # type: ignore[assignment]

LOCK = "exssnet.lock"
"""The file in a folder that the process which writes there holds."""
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)
"""What a file system answers that has no locks, or that brings no folder onto the disk."""


@contextmanager
def replacing(path: Path, lasting: bool = True) -> Iterator[BinaryIO]:
    """A new file, to be written in the block. At its end it takes the place of `path`; an exception leaves the old one.

    Until then the file has a name that no other process uses. So of several processes that write the same path, each
    writes a whole file, and the last one stays. What a killed process left is removed when the path is written again.
    lasting: at the end of the block the file is on the disk, and so is its name where the file system can do that.
    OSError: the old file is whole, or the new one where only its name may not be on the disk.
    """
    if path.exists() and not path.is_file():  # such as /dev/null
        with open(path, "wb") as file:
            yield file
        return
    start = f"{path.name[:50]}."
    _remove_leftovers(path.parent, start)
    part = path.with_name(f"{start}{secrets.token_hex(8)}.part")
    try:
        with locked(part, waits=lambda: True, needed=False) as new:
            assert new is not None
            yield new
            new.flush()
            if lasting:
                os.fsync(new.fileno())
            if fcntl is None:
                new.close()  # Windows renames no open file
            os.replace(part, path)
    except BaseException:
        _try(os.unlink, part)
        raise
    if lasting:
        _sync_names(path.parent)


def write_text(path: Path, text: str, lasting: bool = True) -> None:
    """Replace a file by a text in UTF-8, as `replacing` does."""
    with replacing(path, lasting) as file:
        file.write(text.encode())


@contextmanager
def locked(path: Path, waits: Callable[[], bool] = lambda: False, needed: bool = True) -> Iterator[BinaryIO | None]:
    """The file at `path`, made if need be and locked for this process; None where another process holds it.

    waits: whether to wait on, asked again and again while another process holds it. needed: OSError where there is no
    lock to be had, as on some network file systems; else the file is then not locked. A lock ends with its process.
    """
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as file:
            while not _locks(file, needed):
                if not waits():
                    yield None
                    return
                time.sleep(0.01)
            try:
                if _is_at(file, path):  # its last holder may have removed or renamed it
                    yield file
                    return
            finally:
                _unlocks(file)  # children that were forked meanwhile would hold it


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder for this process. The folder is made if need be, and removed again where it stays empty.

    ValueError, naming the folder and its holder, where another process holds it; what a crash leaves is no obstacle.
    """
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with ExitStack() as held:
        for new in reversed(made):
            held.callback(_try, os.rmdir, new)
        try:
            file = held.enter_context(locked(lock))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warnings.warn(f"{folder} cannot be locked, so start no second run there: {error}", stacklevel=3)
        else:
            if file is None:
                raise ValueError(f"{folder} is in use by {_holder(lock)}: wait for its end, or choose another folder")
            held.callback(_try, os.unlink, lock)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
            file.flush()
        yield


# Inside


def _locks(file: BinaryIO, needed: bool) -> bool:
    """Whether this process holds the lock now: no other one does, or there is no lock to be had and none is needed."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        if needed:
            raise
    return True


def _unlocks(file: BinaryIO) -> None:
    if fcntl is not None:
        _try(fcntl.flock, file, fcntl.LOCK_UN)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_leftovers(folder: Path, start: str) -> None:
    """Remove what killed processes left: unfinished files that nobody holds."""
    pattern = f"{glob.escape(start)}{'[0-9a-f]' * 16}.part"
    for name in glob.glob(pattern, root_dir=folder) if fcntl is not None else ():
        with suppress(OSError), locked(folder / name) as file:
            if file is not None:
                os.unlink(folder / name)


def _sync_names(folder: Path) -> None:
    """Bring the names in a folder onto the disk, where the system and the file system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except PermissionError:  # a folder may be written to that may not be read
        pass
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            text = f"{error.strerror}: the file is in its place, but after a power cut the one before it may be there"
            raise OSError(error.errno, text, str(folder)) from error


def _holder(lock: Path) -> str:
    """Who holds a lock, as it says; the file may be anybody's."""
    with suppress(OSError, ValueError):
        with open(lock) as file:
            text = file.read(200)
        if re.fullmatch(r"process \d+ on [\w.-]*", text, re.ASCII):
            return text
    return "another process"


def _try(call: Callable[..., object], *arguments: object) -> None:
    with suppress(OSError):
        call(*arguments)
