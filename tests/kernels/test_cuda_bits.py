"""csrc/cuda/bits on the emulator: bit for bit the reference's pack_mask, unpack_mask and free_mask."""

from types import ModuleType

import numpy as np
import pytest
import torch
from cuda import harness
from cuda.harness import order as order
from torch import Tensor

from exssnet.kernels import reference

pytestmark = pytest.mark.proof

sizes = pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 15, 16, 17, 65, 4096, 33 * 65, 100_003])
offsets = pytest.mark.parametrize("offset", [0, 1, 2, 16])
"""Bytes past an address that is aligned to 64."""


@pytest.fixture
def bits(order: str) -> ModuleType:
    return harness.load("bits")


def drawn(n: int, density: float = 0.3) -> Tensor:
    return torch.rand(n) < density


def at(offset: int, values: Tensor) -> np.ndarray:
    """The values at an offset from an aligned address, and nothing behind them."""
    memory = torch.empty(offset + values.numel(), dtype=values.dtype)
    memory[offset:] = values
    return memory.numpy()[offset:]


def room(offset: int, n: int, dtype: torch.dtype) -> np.ndarray:
    return at(offset, torch.full((n,), 1 if dtype == torch.bool else 255, dtype=dtype))


@sizes
@offsets
def test_packed_bits_are_those_of_the_reference(bits: ModuleType, n: int, offset: int) -> None:
    mask = drawn(n)
    packed = room(offset, (n + 7) // 8, torch.uint8)
    bits.pack_mask(at(offset, mask), packed)
    assert torch.equal(torch.from_numpy(packed), reference.pack_mask(mask))


@sizes
@offsets
def test_unpacked_bits_are_those_of_the_reference(bits: ModuleType, n: int, offset: int) -> None:
    packed = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8)
    mask = room(offset, n, torch.bool)
    bits.unpack_mask(at(offset, packed), mask)
    assert torch.equal(torch.from_numpy(mask), reference.unpack_mask(packed, [n]))


@sizes
@offsets
def test_free_mask_is_that_of_the_reference(bits: ModuleType, n: int, offset: int) -> None:
    mask, used = drawn(n), drawn(n)
    free = room(offset, n, torch.bool)
    bits.and_not(at(offset, mask), at(0, used), free)
    assert torch.equal(torch.from_numpy(free), reference.free_mask(mask, used))


@sizes
def test_free_mask_of_bytes_is_that_of_the_reference(bits: ModuleType, n: int) -> None:
    mask, used = (torch.randint(0, 256, (n,), dtype=torch.uint8) for _ in range(2))
    free = room(0, n, torch.uint8)
    bits.and_not(mask.numpy(), used.numpy(), free)
    assert torch.equal(torch.from_numpy(free), reference.free_mask(mask, used))


@pytest.mark.parametrize("mask_offset", [0, 1])
@pytest.mark.parametrize("packed_offset", [0, 1])
def test_either_side_may_be_unaligned(bits: ModuleType, mask_offset: int, packed_offset: int) -> None:
    mask = drawn(1000)
    packed, again = room(packed_offset, 125, torch.uint8), room(mask_offset, 1000, torch.bool)
    bits.pack_mask(at(mask_offset, mask), packed)
    bits.unpack_mask(packed, again)
    assert torch.equal(torch.from_numpy(again), mask)


@pytest.mark.parametrize("unaligned", range(3))
def test_any_operand_of_free_mask_may_be_unaligned(bits: ModuleType, unaligned: int) -> None:
    mask, used = drawn(1000), drawn(1000)
    offsets = [int(operand == unaligned) for operand in range(3)]
    free = room(offsets[2], 1000, torch.bool)
    bits.and_not(at(offsets[0], mask), at(offsets[1], used), free)
    assert torch.equal(torch.from_numpy(free), reference.free_mask(mask, used))


@pytest.mark.skipif(harness.MODE == "race", reason="2^23 loads would be kept in 2 GB of memory")
def test_more_entries_than_threads_go_through_the_grid_in_strides() -> None:
    """The largest grid packs 2^24 entries in one stride where they are aligned, 2^23 where not."""
    bits = harness.load("bits")
    mask = drawn((1 << 23) + 77)
    packed = room(1, (mask.numel() + 7) // 8, torch.uint8)
    bits.pack_mask(at(1, mask), packed)
    assert torch.equal(torch.from_numpy(packed), reference.pack_mask(mask))


@harness.other_modes
def test_every_load_and_store_is_right_and_none_races(mode: str) -> None:
    harness.run_again(__file__, mode)
