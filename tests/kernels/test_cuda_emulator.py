"""The emulator finds what it claims to find: kernels with a planted bug, and without it, in every mode and order."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest
import torch
from cuda import harness
from cuda.harness import order as order

pytestmark = pytest.mark.proof

Values = Callable[[np.ndarray], np.ndarray]


def blocks(x: np.ndarray) -> np.ndarray:
    return x.reshape(2, 64)


def half_warps(x: np.ndarray, change: Values) -> np.ndarray:
    """x, where the first 16 lanes of each warp (-1, 32) are changed."""
    warps = x.reshape(-1, 32).copy()
    warps[:, :16] = change(warps[:, :16])
    return warps


def with_last_block(x: np.ndarray) -> np.ndarray:
    counter = np.array([2], np.int32).view(np.float32)
    return np.concatenate([[x.sum()], blocks(x).sum(1), counter]).astype(np.float32)


def every_second_vector(x: np.ndarray) -> np.ndarray:
    vectors = x.reshape(-1, 4).copy()
    vectors[1::2] = 0
    return vectors


@dataclass(frozen=True)
class Plant:
    """A kernel of planted.cu: what its right version computes from x (n), and what is said of the wrong one by mode."""

    name: str
    expected: Values
    caught: dict[str, str] = field(default_factory=dict)
    n: int = 128
    wrong_values: bool = False
    """The wrong version gives other values in some order, or poison."""


RACE = r"planted.cu:\d+: race: "
OTHER_BLOCK = RACE + "(loads|stores to) global memory that thread 0 of block [01] (stores to|loads)"
PLANTS = (
    Plant("barrier", lambda x: blocks(x)[:, ::-1], {"race": "has not written|" + RACE}, wrong_values=True),
    Plant("barrier_before_reuse", lambda x: 3 * blocks(x)[:, ::-1], {"race": RACE}, wrong_values=True),
    Plant("warp_barrier", lambda x: x.reshape(-1, 32)[:, ::-1], {"race": "has not written|" + RACE}, wrong_values=True),
    Plant("warp_barrier_after_loads", lambda x: 4 * x[::32].repeat(32), {"race": RACE}),
    Plant("divergent_barrier", lambda x: x, {"plain": "wait at the barrier of line"}),
    Plant("barrier_of_some", lambda x: x, {"plain": "waits for lanes of its mask that never come here"}),
    Plant("returned_lane", lambda x: x, {"plain": "lane 8 of the mask has returned or"}),
    Plant("lane_mask", lambda x: half_warps(x, lambda w: np.roll(w, 8, 1)), {"plain": "never come here|has returned"}),
    Plant("lane_outside_mask", lambda x: half_warps(x, lambda w: w[:, 3:4]), {"plain": "reads lane 19, which is not"}),
    Plant("read_past_end", lambda x: x + np.append(x[1:], 0), {"sanitize": "heap-buffer-overflow"}, n=100),
    Plant("write_past_end", lambda x: x, {"sanitize": "heap-buffer-overflow"}, n=100),
    Plant("shared_past_end", lambda x: np.roll(blocks(x), -1, 1), {"sanitize": "index 64 out of bounds"}),
    Plant("dynamic_shared_past_end", lambda x: np.roll(blocks(x), -1, 1), {"sanitize": "heap-buffer-overflow"}),
    Plant("uninitialised_shared", lambda x: x.reshape(-1, 2)[:, ::-1], {"race": "has not written"}, wrong_values=True),
    Plant("misaligned_vector", lambda x: x.reshape(-1, 4).sum(1), {"sanitize": "misaligned address"}),
    Plant("missing_atomic", lambda x: (blocks(x) > 0).sum(1), {"race": RACE + "loads shared memory that thread"}),
    Plant("read_beside_atomic", lambda x: blocks(x).max(1), {"race": RACE}, wrong_values=True),
    Plant("colliding_blocks", np.ones_like, {"race": RACE + "stores to global memory that thread"}),
    Plant("overflow", lambda x: np.arange(x.size), {"sanitize": "signed integer overflow"}),
    Plant("last_block_without_fence", with_last_block, {"race": OTHER_BLOCK}),
    Plant("last_block_with_early_fence", with_last_block, {"race": OTHER_BLOCK}),
    Plant("last_block_without_counter", with_last_block, {"race": OTHER_BLOCK}),
    Plant("copy_not_awaited", every_second_vector, {"plain": "ends with copies that it did not await"}),
    Plant(
        "copy_awaited_after_barrier", lambda x: blocks(x)[:, ::-1], {"race": "has not written|" + RACE},
        wrong_values=True,
    ),
    Plant("copy_begun_before_barrier", lambda x: 2 * blocks(x)[:, ::-1], {"race": RACE}),
)  # fmt: skip


def plants(chosen: Callable[[Plant], bool] = lambda plant: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("plant", [p for p in PLANTS if chosen(p)], ids=lambda plant: plant.name)


@pytest.fixture
def planted() -> ModuleType:
    return harness.load("planted", harness.HERE)


@pytest.fixture
def in_any_order(planted: ModuleType, order: str) -> ModuleType:
    return planted


def in_each_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in harness.ORDERS:
        monkeypatch.setenv("EXSSNET_EMULATOR_ORDER", name)
        yield


def inputs(plant: Plant) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x of different positive integers, y of zeros, and what y should become."""
    x = np.random.default_rng(0).permutation(plant.n).astype(np.float32) + 1
    expected = np.asarray(plant.expected(x), np.float32).reshape(-1)
    return x, np.zeros_like(expected), expected


def test_every_kernel_of_the_file_is_here(planted: ModuleType) -> None:
    assert planted.names() == [plant.name for plant in PLANTS]


def test_every_bug_is_caught_in_some_mode() -> None:
    assert [plant.name for plant in PLANTS if not plant.caught] == []


@plants()
def test_right_version_passes(planted: ModuleType, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in in_each_order(monkeypatch):
        x, y, expected = inputs(plant)
        planted.run(plant.name, True, x, y)
        assert np.array_equal(y, expected)


@plants(lambda plant: harness.MODE in plant.caught and harness.MODE != "sanitize")
def test_bug_is_an_error(planted: ModuleType, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in in_each_order(monkeypatch):
        x, y, _ = inputs(plant)
        with pytest.raises(RuntimeError, match=plant.caught[harness.MODE]):
            planted.run(plant.name, False, x, y)


@plants(lambda plant: harness.MODE == "plain" and plant.wrong_values)
def test_bug_changes_values_in_some_order(planted: ModuleType, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    right = []
    for _ in in_each_order(monkeypatch):
        x, y, expected = inputs(plant)
        planted.run(plant.name, False, x, y)
        right.append(np.array_equal(y, expected))
    assert not all(right)


@plants(lambda plant: harness.MODE == "plain" and "sanitize" in plant.caught)
def test_bug_ends_a_sanitized_process(planted: ModuleType, plant: Plant) -> None:
    x, y, _ = inputs(plant)
    program = (
        "import numpy as np; from cuda import harness;"
        "planted = harness.load('planted', harness.HERE);"
        f"planted.run({plant.name!r}, False, np.ones({x.size}, np.float32), np.zeros({y.size}, np.float32))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=harness.ROOT / "tests/helpers", env=harness.environment("sanitize"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(plant.caught["sanitize"], done.stderr), done.stderr


def computed(planted: ModuleType, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """x (128), a permutation of 1 ... 128, and what a kernel makes of it and zeros."""
    x, y = np.random.default_rng(0).permutation(128).astype(np.float32) + 1, np.zeros(size, np.float32)
    planted.run(name, True, x, y)
    return x, y


def test_shuffles(in_any_order: ModuleType) -> None:
    x, y = computed(in_any_order, "shuffles", 512)
    lane = np.arange(128) % 32
    ahead = np.arange(128) % 16 + 5 < 16
    assert np.array_equal(y[:128], np.repeat(x[3::8], 8))
    assert np.array_equal(y[128:256], np.where(lane >= 3, np.roll(x, 3), x))
    assert np.array_equal(y[256:384], np.where(ahead, np.roll(x, -5), x))
    assert np.array_equal(y[384:], x[np.arange(128) ^ 6])


def test_votes(in_any_order: ModuleType) -> None:
    x, y = computed(in_any_order, "votes", 256)
    count, any_, all_ = (np.zeros(128) for _ in range(3))
    for first in range(0, 128, 32):
        for lanes in (slice(first, first + 32, 2), slice(first + 1, first + 32, 2)):
            large = x[lanes] > 100
            count[lanes], any_[lanes], all_[lanes] = large.sum(), large.any(), (x[lanes] > 1).all()
    assert np.array_equal(y[:128], count + 100 * (x > 100))
    assert np.array_equal(y[128:], any_ + 2 * all_)


def test_votes_of_barriers(in_any_order: ModuleType) -> None:
    x, y = computed(in_any_order, "barrier_votes", 128)
    votes = [(b > 100).sum() + 1000 * (b > 127).any() + 10000 * (b > 1).all() for b in blocks(x)]
    assert np.array_equal(y, np.repeat(votes, 64))


def test_atomics(in_any_order: ModuleType) -> None:
    x, y = computed(in_any_order, "atomics", 12)
    for block, values in zip(blocks(x.astype(int)), y.reshape(2, 6), strict=True):
        bits = np.bitwise_or.reduce(block), np.bitwise_and.reduce(block | 256)
        assert values.tolist() == [block.sum(), block.min(), block.max(), *bits, 1]


def test_orders_are_what_they_are_called(planted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    came = {}
    for name in harness.ORDERS:
        monkeypatch.setenv("EXSSNET_EMULATOR_ORDER", name)
        came[name] = computed(planted, "tickets", 257)[1][:256].reshape(2, 128).astype(int)
    warp_by_warp = np.arange(4).repeat(32) * 64 + np.arange(128) % 32
    assert np.array_equal(came["ascending"][0], warp_by_warp)
    assert np.array_equal(came["descending"][0], warp_by_warp[::-1])
    first, second = came["round-robin"]
    assert first[:64].max() < second[:31].min()
    assert second[:64].max() < first[64:].min()
    assert all(np.array_equal(np.sort(tickets, axis=None), np.arange(256)) for tickets in came.values())
    assert len({tickets.tobytes() for tickets in came.values()}) == len(harness.ORDERS)


@pytest.mark.skipif(harness.MODE != "plain", reason="poison is for values; the other modes look at loads and stores")
def test_shared_memory_of_a_block_starts_as_nan(in_any_order: ModuleType) -> None:
    assert np.array_equal(computed(in_any_order, "fresh_shared", 128)[1], np.full(128, 2))


def test_unknown_orders_are_refused(planted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXSSNET_EMULATOR_ORDER", "sideways")
    with pytest.raises(RuntimeError, match="must be ascending, descending, round-robin or a number, got sideways"):
        planted.launch_nothing(1, 1, 0, 0)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ((1, 0, 0, 0), "1 to 1024 threads, at most 64 of them in z, got 0 x 1 x 1"),
        ((1, 1025, 0, 0), "1 to 1024 threads, at most 64 of them in z, got 1025 x 1 x 1"),
        ((0, 1, 0, 0), "1 to 2147483647 x 65535 x 65535 blocks, got 0 x 1 x 1"),
        ((1 << 31, 1, 0, 0), "1 to 2147483647 x 65535 x 65535 blocks, got 2147483648 x 1 x 1"),
        ((1 << 32, 1, 0, 0), "4294967296 is no 32-bit size"),
        ((1, 1, 49153, 0), "49152 bytes of dynamic shared memory, got 49153 without cudaFuncSetAttribute"),
        ((1, 1, 65537, 65536), "65536 bytes of dynamic shared memory, got 65537"),
        ((1, 1, 0, 232449), "a block has at most 232448 bytes of shared memory, got 232449"),
    ],
)
def test_launches_beyond_the_limits_are_refused(planted: ModuleType, launch: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        planted.launch_nothing(*launch)


@pytest.mark.parametrize("launch", [(1, 1024, 0, 0), (1 << 16, 1, 0, 0), (1, 1, 49152, 0), (1, 1, 232448, 232448)])
def test_launches_at_the_limits_pass(planted: ModuleType, launch: tuple[int, ...]) -> None:
    planted.launch_nothing(*launch)


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_types_round_as_torch_does(planted: ModuleType, name: str, dtype: torch.dtype) -> None:
    """All values, those halfway between two of them and beside that, and random bits."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    values, bits = np.empty(1 << 16, np.float32), np.empty(1 << 16, np.uint16)
    getattr(planted, f"from_{name}")(every.numpy(), values)
    assert torch.equal(torch.from_numpy(values).nan_to_num(1.5), every.view(dtype).float().nan_to_num(1.5))
    halfway = torch.from_numpy(values).view(torch.int32) + (1 << (12 if name == "half" else 15))
    for floats in (halfway - 1, halfway, halfway + 1, torch.randint(-(1 << 31), 1 << 31, (1 << 16,)).to(torch.int32)):
        x = floats.view(torch.float32)
        getattr(planted, f"to_{name}")(x.numpy(), bits)
        ours, theirs = torch.from_numpy(bits.view(np.int16)), x.to(dtype).view(torch.int16)
        assert torch.equal(ours[~x.isnan()], theirs[~x.isnan()])


@harness.other_modes
def test_every_kernel_in_the_other_modes(mode: str) -> None:
    harness.run_again(__file__, mode)
