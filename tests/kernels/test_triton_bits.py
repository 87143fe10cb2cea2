"""pack_mask, unpack_mask, free_mask in Triton, interpreted under the guard: bit for bit the reference."""

import pytest
import torch
import triton
import triton.language as tl
import triton_guard
from cases import LAYOUTS
from torch import Tensor

from exssnet.kernels import reference, triton_bits

pytestmark = pytest.mark.proof

PROGRAM = 8 * triton_bits.BLOCK  # entries
shapes = pytest.mark.parametrize(
    "shape",
    [(0,), (1,), (7,), (8,), (9,), (33, 65), (4, 3, 5, 5), (PROGRAM - 1,), (PROGRAM,), (PROGRAM + 1,), (5, PROGRAM)],
    ids=str,
)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) < 0.3


@shapes
def test_packed_mask_is_the_reference(shape: tuple[int, ...]) -> None:
    mask = drawn(shape)
    assert torch.equal(triton_bits.pack_mask(mask), reference.pack_mask(mask))


@shapes
def test_unpacked_mask_is_the_mask(shape: tuple[int, ...]) -> None:
    mask = drawn(shape)
    assert torch.equal(triton_bits.unpack_mask(reference.pack_mask(mask), list(shape)), mask)


@shapes
def test_free_mask_is_the_reference_packed_or_not(shape: tuple[int, ...]) -> None:
    masks = drawn(shape), drawn(shape)
    packed = [reference.pack_mask(mask) for mask in masks]
    assert torch.equal(triton_bits.free_mask(*masks), reference.free_mask(*masks))
    assert torch.equal(triton_bits.free_mask(*packed), reference.free_mask(*packed))


@layouts
def test_strides_change_no_bit(layout: str) -> None:
    mask, used = drawn((9, 5, 3, 3)), drawn((9, 5, 3, 3))
    assert torch.equal(triton_bits.pack_mask(LAYOUTS[layout](mask)), reference.pack_mask(mask))
    free = triton_bits.free_mask(LAYOUTS[layout](mask), LAYOUTS[layout](used))
    assert torch.equal(free, mask & ~used)
    assert free.is_contiguous()


def test_strided_bytes_are_unpacked_in_order() -> None:
    mask = drawn((33, 65))
    packed = torch.stack([reference.pack_mask(mask)] * 2, 1)[:, 1]
    assert torch.equal(triton_bits.unpack_mask(packed, [33, 65]), mask)


@pytest.mark.parametrize("value", [False, True])
def test_bytes_of_a_mask_are_zero_or_one(value: bool) -> None:
    mask = torch.full((100,), value)
    unpacked = triton_bits.unpack_mask(reference.pack_mask(mask), [100])
    free = triton_bits.free_mask(mask, torch.zeros(100, dtype=torch.bool))
    assert unpacked.view(torch.uint8).tolist() == free.view(torch.uint8).tolist() == [int(value)] * 100


@triton.jit
def note_entries(result, n):
    first, count = triton_bits._entries_of_program(n, 8)
    tl.store(result + 2 * tl.program_id(0), first)
    tl.store(result + 2 * tl.program_id(0) + 1, count)


def test_number_of_entries_may_exceed_int32() -> None:
    result = torch.zeros(2, 2, dtype=torch.int64)
    note_entries[(2,)](result, 2**33)
    assert result.tolist() == [[0, 8], [8, 8]]


triton_guard.interpret(globals())
