"""Thousands of damaged files: each is refused in one sentence and changes nothing, or is loaded as it stands there.

EXSSNET_DAMAGED_FILES sets their number.
"""

import copy
import hashlib
import json
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learner, outcome, watched
from networks import changes, picture, stream
from torch import Tensor

from exssnet import Learner, checkpoint
from exssnet.tasks import Task

COUNT = int(os.environ.get("EXSSNET_DAMAGED_FILES", "300"))
VALUES = [None, True, 0, -1, 1, 2, 1 << 40, 1 << 63, 10**400, 0.5, -0.0, float("nan"), float("inf"), "", "idle", "mask",
          "weight", "joint", "../../etc/passwd", "\x1b[2J", "F64", "I64", [], [0], {}, {"a": 1}]  # fmt: skip


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return stream(2)


def fresh() -> Learner:
    return learner(kkt="best")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tasks: list[Task]) -> list[bytes]:
    """A run in the mask phase, one in the weight phase, and one that is finished."""
    learned, path, found = fresh(), tmp_path_factory.mktemp("run") / "run", []

    def write(*at: object) -> None:
        if at in ((1, "mask", 4), (1, "weight", 2), ()):
            checkpoint.save_run(learned, path, {"options": {"data": "digits"}})
            found.append(path.read_bytes())

    watched(learned).at_step = write
    learned.run(tasks)
    write()
    return found


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 9))):
        # Half of the bits in the header, which is the smaller part.
        at = draw.randrange(draw.choice((len(data), 8 + int.from_bytes(data[:8], "little"))))
        spoilt[at] ^= 1 << draw.randrange(8)
    return bytes(spoilt)


def overwritten(data: bytes, draw: random.Random) -> bytes:
    at, count = draw.randrange(len(data)), draw.choice((1, 8, 100, 4096))
    part = draw.choice((bytes(count), draw.randbytes(count), data[:count], b"\xff" * count))
    return data[:at] + part + data[at + draw.choice((0, count)) :]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, v in inner for p in places(v, (*path, key))]


def edit(value: Any, draw: random.Random) -> None:
    """Change, remove, add or exchange something in a JSON object."""
    *path, last = draw.choice(places(value))
    for step in path:
        value = value[step]
    how = draw.choice(("change", "nudge", "remove", "add"))
    if how == "nudge" and type(value[last]) in (int, float):
        value[last] += draw.choice((-1, 1, 1000))
    elif how == "remove":
        del value[last]
    elif how == "add" and isinstance(value, dict):
        value[draw.choice(("more", "weight/../x", "__metadata__", "checksum", "\x1b[2J"))] = copy.deepcopy(value[last])
    else:
        value[last] = draw.choice(VALUES)


def edited(data: bytes, draw: random.Random) -> bytes:
    """Other fields or other bytes of tensors, with a checksum that fits."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    for _ in range(draw.choice((1, 1, 3))):
        what = draw.choice(("fields", "fields", "entries", "bytes"))
        if what == "fields":
            meta = json.loads(header["__metadata__"]["exssnet"])
            edit(meta, draw)
            header["__metadata__"]["exssnet"] = json.dumps(meta)
        elif what == "entries":
            edit(header, draw)
        else:
            at = draw.randrange(len(body) - 32)
            body[at : at + 4] = draw.choice((draw.randbytes(4), b"\0\0\xc0\x7f", b"\xff\xff\xff\xff"))
        if not isinstance(header.get("__metadata__"), dict) or "exssnet" not in header["__metadata__"]:
            break
        try:
            if not isinstance(json.loads(header["__metadata__"]["exssnet"]), dict):
                break
        except (TypeError, ValueError):
            break
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(body[:-32])
    return whole + hashlib.sha256(whole).digest()


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of what is not bit for bit the same."""

    def same(x: Tensor, y: Tensor) -> bool:
        return x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()

    return [n for n in sorted(a.keys() | b.keys()) if n not in a or n not in b or not same(a[n], b[n])]


def test_damaged_files_are_refused_or_loaded_as_they_are(files: list[bytes], tasks: list[Task], tmp_path: Path) -> None:
    path, target, refused, loaded = tmp_path / "file", fresh(), 0, 0
    before = picture(target.phases)
    for number in range(COUNT):
        draw = random.Random(number)
        original, spoil = draw.choice(files), draw.choice((cut, flipped, overwritten, edited, edited, edited))
        damaged = spoil(original, draw)
        path.write_bytes(damaged)
        began = time.perf_counter()
        try:
            checkpoint.load_run(target, path, tasks)
        except ValueError as error:
            refused, said = refused + 1, str(error)
        else:
            loaded, said = loaded + 1, f"load: {path}: "
            assert spoil is edited or damaged == original, number
            assert different(target.state()[0], checkpoint.read(path)[0]) == [], number
            target = fresh()
        assert said.startswith(f"load: {path}: "), number
        assert said.isprintable(), number
        with suppress(ValueError):
            assert all(line.isprintable() for line in checkpoint.describe(path).split("\n")), number
        assert time.perf_counter() - began < 20, number
        if number % 20 == 0:
            before["random state"] = torch.get_rng_state()
            assert changes(before, picture(target.phases)) == [], number
    assert list(tmp_path.iterdir()) == [path]
    print(f"{refused} of {COUNT} files refused, {loaded} loaded")
    assert refused > COUNT // 2


def test_what_was_loaded_from_an_edited_file_trains(files: list[bytes], tasks: list[Task], tmp_path: Path) -> None:
    trained, number = 0, 0
    while trained < max(3, COUNT // 100):
        draw, number = random.Random(f"train {number}"), number + 1
        learned = fresh()
        (tmp_path / "file").write_bytes(edited(draw.choice(files[:2]), draw))
        try:
            checkpoint.load_run(learned, tmp_path / "file", tasks)
        except ValueError:
            continue
        trained += 1
        try:
            learned.run(tasks)
        except FloatingPointError:
            continue
        assert len(outcome(learned)) > 0
        assert len(learned.reports) == 2
