"""The file of what was measured: shared by processes, healed where it is damaged, and never in the way."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_child

from exssnet.kernels import autotune


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty file, of which nothing is in memory; what is to be timed tells the limit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_limits", {})
    monkeypatch.setattr(autotune, "measured_limit", lambda _, ways: (ways(), True))
    (tmp_path / "exssnet").mkdir()
    return tmp_path / "exssnet" / "crossovers.json"


KEY, OTHER = (autotune.Key.of(operator, torch.device("cpu")) for operator in ("an operator", "another operator"))
NAME = json.dumps(repr(KEY))


def chosen(measure: Callable[[], float], key: autotune.Key = KEY) -> float | None:
    """The limit that is chosen by, where a measurement is `measure`."""
    autotune.fastest(key, ("first", "second"), measure)  # type: ignore[arg-type]
    return autotune._limits.get(key)


def ask(value: float = 0.3) -> float | None:
    return chosen(lambda: value)


def held(cache: Path) -> dict[str, Any]:
    """What the file holds of this machine."""
    found: dict[str, Any] = json.loads(cache.read_text())[autotune._machine()]
    return found


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', "\0", '{"x": {"key": 0.1}', '{"MACHINE": [1]}'])
def test_a_damaged_file_is_written_anew(cache: Path, content: str) -> None:
    cache.write_text(content.replace("MACHINE", autotune._machine()))
    assert ask() == 0.3
    assert held(cache) == {repr(KEY): 0.3}


@pytest.mark.parametrize(
    "number", ["9" * 400, "-" + "9" * 400, "1e999", "NaN", "-0.1", "1.1", "true", '"0.1"', "null", "[0.1]"]
)
def test_what_is_no_density_is_measured_again(cache: Path, number: str) -> None:
    cache.write_text(f'{{"{autotune._machine()}": {{{NAME}: {number}, "other": 0.7}}}}')
    assert ask() == 0.3
    assert held(cache) == {repr(KEY): 0.3, "other": 0.7}


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
        autotune._write({})
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
        cache.write_text(json.dumps({autotune._machine(): {repr(KEY): 0.1}}))
        second.join(10)
    assert found == [0.1]
    assert held(cache) == {repr(KEY): 0.1}


def test_a_process_that_never_finishes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(autotune, "PATIENCE", 0.05)
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
    chosen(measure)
    assert len(copies) == 1
    with cache.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(copies[0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("cache")
def test_a_child_measures_that_was_forked_while_another_thread_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "PATIENCE", 0.05)  # for the file's lock, which the other thread holds on
    begun, ends = threading.Event(), threading.Event()

    def slowly() -> float:
        begun.set()
        ends.wait(60)
        return 0.3

    other = threading.Thread(target=lambda: chosen(slowly, OTHER))
    other.start()
    begun.wait(60)
    status = in_child(lambda: ask() == 0.3)
    ends.set()
    other.join()
    assert status == 0


def test_sizes_are_rounded_to_powers_of_two_and_channels_are_not() -> None:
    sizes = {size: autotune.rounded((size, 7))[0] for size in range(1, 1025)}
    assert all(2 * size * size >= near * near and near * near * 2 >= size * size for size, near in sizes.items())
    assert sorted(set(sizes.values())) == [2**i for i in range(11)]
    assert autotune.rounded((3, 3, 224, 9)) == (4, 3, 256, 8)


def test_order_tells_layouts_apart_whatever_the_sizes() -> None:
    shapes = [(n, 3, 5, 4) for n in (2, 7)]
    plain = {autotune.order(torch.empty(s).stride()) for s in shapes}
    last = {autotune.order(torch.empty(s).to(memory_format=torch.channels_last).stride()) for s in shapes}
    batch = {autotune.order(torch.empty(*s[1:], s[0]).movedim(-1, 0).stride()) for s in shapes}
    assert (plain, last, batch) == ({(0, 1, 2, 3)}, {(0, 2, 3, 1)}, {(1, 2, 3, 0)})


def test_a_file_of_an_earlier_version_is_left_alone(cache: Path) -> None:
    earlier = autotune._machine().replace(f"kernels {autotune.KERNELS_VERSION}", "kernels 2")
    cache.write_text(json.dumps({earlier: {"8 20 to 10 20 1 threads torch.float32": 0.4}}))
    assert ask() == 0.3
    assert json.loads(cache.read_text())[earlier] == {"8 20 to 10 20 1 threads torch.float32": 0.4}


def test_the_memory_holds_so_many_answers_and_evicts_the_oldest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "ENTRIES", 3)
    keys = [autotune.Key.of(f"operator {number}", torch.device("cpu")) for number in range(5)]
    for number, key in enumerate(keys):
        chosen(lambda number=number: number / 10, key)  # type: ignore[misc]
    assert list(autotune._limits) == keys[2:]
    assert chosen(lambda: pytest.fail("measured"), keys[0]) == 0.0  # the file has it
    assert len(held(cache)) == 5


def test_what_a_key_is_made_of_is_measured_apart() -> None:
    def key(operator: str = "linear", threads: int = 1, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
        torch.set_num_threads(threads)
        return autotune.Key.of(operator, torch.device("cpu"), autotune.Operand((4, 3), (0, 1), dtype), **more)

    assert key() == key()
    others = key("conv2d"), key(threads=2), key(dtype=torch.bfloat16), key(density=0.1), key(density=0.11)
    assert len({key(), *others}) == len({repr(k) for k in (key(), *others)}) == 6


WAYS = "sparse at 0.1", "sparse at 0.3", "written", "fused"


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ((1, 5, 4, 3), 0.2), ((1, 5, 3, 4), 0.2), ((1, 1, 2, 2), 1.0), ((2, 4, 1, 1), 0.0), ((9, 10, 1, 1), 0.0),
        ((math.inf, math.inf, 1, 1), 0.0), ((1, 2, math.inf, math.inf), 1.0),
    ],
    ids=["fused", "written", "always", "never", "far from", "too little memory", "too little memory for dense"],
)  # fmt: skip
def test_the_limit_is_where_the_line_of_the_first_crosses_the_fastest_second(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], limit: float
) -> None:
    monkeypatch.setattr(autotune, "times", lambda _, *ways: ([seconds[WAYS.index(way)] for way in ways], True))
    ways: Any = {0.1: WAYS[0], 0.3: WAYS[1]}, WAYS[2:]
    assert autotune.measured_limit(KEY, lambda: ways)[0] == pytest.approx(limit)


@pytest.mark.parametrize(("first", "limit"), [(1, 1.0), (2, 1.0), (3, 0.0), (math.inf, 0.0)])
def test_without_density_the_first_is_faster_at_all_or_none(
    monkeypatch: pytest.MonkeyPatch, first: float, limit: float
) -> None:
    monkeypatch.setattr(autotune, "times", lambda _, *ways: (ways, True))
    ways: Any = {1.0: first}, [2]
    assert autotune.measured_limit(KEY, lambda: ways) == (limit, True)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((1.0,), (1.0, True, 3)), ((3.0, 1.0, 2.0, 1.05), (1.0, True, 4)), ((1.0, 2.0, 3.0), (1.0, False, 12)),
        ((1.0, 1e-3, 1e-3), (1e-3, True, 10)), ((1e-3, 2e-3, 2e-3), (1e-3, False, 40)),
    ],
    ids=["long", "long, disturbed", "long, never met twice", "short, disturbed", "short, never met twice"],
)  # fmt: skip
def test_a_time_is_certain_if_it_was_met_twice_and_rounds_go_on_until_it_is(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], expected: tuple[float, bool, int]
) -> None:
    """The last of the seconds repeats. Waiting for a core does not reduce the number of rounds of short calls."""
    clock = itertools.chain([9.0], seconds, itertools.repeat(seconds[-1]))  # the first call warms up
    rounds: list[float] = []
    monkeypatch.setattr(autotune, "_seconds", lambda *_: rounds.append(next(clock)) or rounds[-1])
    (shortest,), certain = autotune.times(torch.device("cpu"), lambda: None)
    assert (shortest, certain, len(rounds) - 1) == expected


def test_what_was_disturbed_decides_in_this_run_alone(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert chosen(lambda: 0.7, OTHER) == 0.7
    monkeypatch.setattr(autotune, "measured_limit", lambda _, ways: (ways(), False))
    assert ask(0.3) == ask(0.9) == 0.3
    assert held(cache) == {repr(OTHER): 0.7}
    monkeypatch.setattr(autotune, "_limits", {})  # another process
    assert ask(0.9) == 0.9


def test_what_the_memory_does_not_hold_takes_forever() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError

    (held_by, too_much), _ = autotune.times(torch.device("cpu"), lambda: None, too_large)
    assert held_by < too_much == math.inf


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("head start"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    assert autotune.times(torch.device("cuda"), lambda: calls.append("way")) == ([0.002], True)
    assert calls[:5] == ["head start", "record", "way", "record", "wait"]


@contextlib.contextmanager
def multiplying(how: str, *operations: Any) -> Iterator[None]:
    """The newer settings of torch for these operations."""
    before = [operation.fp32_precision for operation in operations]
    for operation in operations:
        operation.fp32_precision = how
    yield
    for operation, was in zip(operations, before, strict=True):
        operation.fp32_precision = was


def test_precision_is_in_the_key_by_whichever_setting_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU")
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn

    def keys() -> list[str]:
        return [repr(autotune.Key.of("linear", torch.device(device))) for device in ("cpu", "cuda")]

    assert keys() == keys()
    all_keys = [keys()]
    torch.set_float32_matmul_precision("medium")
    older = keys()
    torch.set_float32_matmul_precision("highest")
    with multiplying("tf32", cuda.matmul), multiplying("bf16", mkldnn.matmul):
        assert keys() == older  # torch refuses to tell the older setting now
    all_keys.append(older)
    with multiplying("ieee", cudnn.conv), multiplying("bf16", mkldnn.conv):
        all_keys.append(keys())
    assert [len({*keys}) for keys in zip(*all_keys, strict=True)] == [3, 3]
    with mkldnn.flags(enabled=False, allow_tf32=None):  # type: ignore[arg-type]
        assert keys()[0] not in [of_cpu for of_cpu, _ in all_keys]
