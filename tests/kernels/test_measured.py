"""The file of what was measured: shared by processes, healed where it is damaged, and never in the way."""

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_child

from exssnet.kernels import measured


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty file, of which nothing is in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_known", {})
    (tmp_path / "exssnet").mkdir()
    return tmp_path / "exssnet" / "crossovers.json"


def ask(value: float = 0.3) -> float | None:
    return measured.measured("key", False, lambda: value)


def held(cache: Path) -> dict[str, Any]:
    """What the file holds of this machine."""
    found: dict[str, Any] = json.loads(cache.read_text())[measured._machine()]
    return found


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', "\0", '{"x": {"key": 0.1}', '{"MACHINE": [1]}'])
def test_a_damaged_file_is_written_anew(cache: Path, content: str) -> None:
    cache.write_text(content.replace("MACHINE", measured._machine()))
    assert ask() == 0.3
    assert held(cache) == {"key": 0.3}


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "1e999", "NaN", "true", '"0.1"', "null", "[0.1]"])
def test_what_is_no_finite_number_is_measured_again(cache: Path, number: str) -> None:
    cache.write_text(f'{{"{measured._machine()}": {{"key": {number}, "other": 0.7}}}}')
    assert ask() == 0.3
    assert held(cache) == {"key": 0.3, "other": 0.7}


def test_numbers_of_other_machines_stay(cache: Path) -> None:
    cache.write_text('{"other": {"key": 0.1}}')
    assert ask() == 0.3
    assert json.loads(cache.read_text())["other"] == {"key": 0.1}


def test_processes_of_one_number_in_two_containers_write_different_files(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    parts: list[str] = []
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(os, "replace", lambda part, file: parts.append(str(part)))
    for _ in range(2):
        measured._write()
    assert len(set(parts)) == 2


def test_a_write_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(part: str, file: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert ask() == 0.3
    assert [file.name for file in cache.parent.iterdir()] == ["crossovers.lock"]


def test_who_comes_second_chooses_by_what_the_first_process_measured(cache: Path) -> None:
    found: list[float | None] = []
    with cache.with_suffix(".lock").open("w") as lock:  # another process measures
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: found.append(ask(0.9)))
        second.start()
        cache.write_text(json.dumps({measured._machine(): {"key": 0.1}}))
        second.join(10)
    assert found == [0.1]
    assert held(cache) == {"key": 0.1}


def test_a_process_that_never_finishes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(measured, "PATIENCE", 0.05)
    with cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ask() == 0.3


def test_nobody_waits_for_children_that_were_forked_during_a_measurement(cache: Path) -> None:
    def measure() -> float:  # a child has what this duplicates
        opened = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        locks = [fd for fd in opened if fd.exists() and fd.resolve().suffix == ".lock"]
        copies.extend(os.dup(int(fd.name)) for fd in locks)
        return 0.3

    copies: list[int] = []
    measured.measured("key", False, measure)
    assert len(copies) == 1
    with cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(copies[0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("cache")
def test_a_child_measures_that_was_forked_while_another_thread_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "PATIENCE", 0.05)  # for the file's lock, which the other thread holds on
    begun, ends = threading.Event(), threading.Event()

    def slowly() -> float:
        begun.set()
        ends.wait(60)
        return 0.3

    other = threading.Thread(target=lambda: measured.measured("other", False, slowly))
    other.start()
    begun.wait(60)
    status = in_child(lambda: ask() == 0.3)
    ends.set()
    other.join()
    assert status == 0


def test_sizes_are_rounded_to_powers_of_two_and_channels_are_not() -> None:
    sizes = {size: measured.rounded((size, 7))[0] for size in range(1, 1025)}
    assert all(2 * size * size >= near * near and near * near * 2 >= size * size for size, near in sizes.items())
    assert sorted(set(sizes.values())) == [2**i for i in range(11)]
    assert measured.rounded((3, 3, 224, 9)) == (4, 3, 256, 8)


def test_order_tells_layouts_apart_whatever_the_sizes() -> None:
    shapes = [(n, 3, 5, 4) for n in (2, 7)]
    plain = {measured.order(torch.empty(s).stride()) for s in shapes}
    last = {measured.order(torch.empty(s).to(memory_format=torch.channels_last).stride()) for s in shapes}
    batch = {measured.order(torch.empty(*s[1:], s[0]).movedim(-1, 0).stride()) for s in shapes}
    assert (plain, last, batch) == ({(0, 1, 2, 3)}, {(0, 2, 3, 1)}, {(1, 2, 3, 0)})
