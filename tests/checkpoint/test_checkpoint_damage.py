"""Thousands of damaged files: each is refused in one sentence and changes nothing, or is loaded as it stands there.

EXSSNET_DAMAGED_FILES sets their number.
"""

import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from damage import cut, edited, flipped, overwritten
from learning import learner, outcome, watched
from networks import changes, picture, stream
from torch import Tensor

from exssnet import Learner, checkpoint
from exssnet.tasks import Task

COUNT = int(os.environ.get("EXSSNET_DAMAGED_FILES", "300"))


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
