"""pack_mask, unpack_mask, free_mask: masks as bits."""

import math

import numpy as np
import pytest
import torch
from cases import LAYOUTS
from refusals import RAW, Calls, M, W, guarded, refused
from torch import Tensor

from exssnet import ops
from exssnet.kernels import reference

shapes = pytest.mark.parametrize(
    "shape",
    [(0,), (1,), (7,), (8,), (9,), (63,), (64,), (65,), (33, 65), (4, 3, 5, 5), (100_003,), (1 << 20,)],
    ids=str,
)


def drawn(shape: tuple[int, ...], density: float = 0.3, device: str = "cpu") -> Tensor:
    return (torch.rand(shape) < density).to(device)


def test_bit_j_of_byte_i_is_entry_8i_plus_j() -> None:
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[0, 3, 8, 15, 17]] = True
    assert ops.pack_mask(mask).tolist() == [0b00001001, 0b10000001, 0b00000010]


@shapes
def test_bytes_are_those_of_numpy(shape: tuple[int, ...], threads: int) -> None:
    mask = drawn(shape)
    assert ops.pack_mask(mask).tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()


@shapes
def test_spare_bits_are_zero(shape: tuple[int, ...]) -> None:
    packed = ops.pack_mask(torch.ones(shape, dtype=torch.bool))
    assert packed.shape == (math.ceil(math.prod(shape) / 8),)
    assert sum(byte.bit_count() for byte in packed.tolist()) == math.prod(shape)


@shapes
def test_unpacked_again_is_the_mask(shape: tuple[int, ...], threads: int, device: str) -> None:
    mask = drawn(shape, device=device)
    assert torch.equal(ops.unpack_mask(ops.pack_mask(mask), shape), mask)


@pytest.mark.parametrize("density", [0, 1], ids=["empty", "full"])
@shapes
def test_empty_and_full_masks_come_back(shape: tuple[int, ...], density: float) -> None:
    mask = drawn(shape, density)
    assert torch.equal(ops.unpack_mask(ops.pack_mask(mask), shape), mask)


@shapes
def test_bitwise_the_reference(shape: tuple[int, ...], threads: int, device: str) -> None:
    mask, used = drawn(shape, device=device), drawn(shape, device=device)
    packed = ops.pack_mask(mask)
    assert torch.equal(packed, reference.pack_mask(mask))
    assert torch.equal(ops.unpack_mask(packed, shape), reference.unpack_mask(packed, list(shape)))
    assert torch.equal(ops.free_mask(mask, used), reference.free_mask(mask, used))
    assert torch.equal(
        ops.free_mask(packed, reference.pack_mask(used)), reference.free_mask(packed, reference.pack_mask(used))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_masks_are_packed_in_logical_order(layout: str) -> None:
    mask = drawn((9, 5, 3, 3))
    assert torch.equal(ops.pack_mask(LAYOUTS[layout](mask)), ops.pack_mask(mask))


def test_strided_bytes_are_unpacked_in_order() -> None:
    mask = drawn((33, 65))
    packed = torch.stack([ops.pack_mask(mask)] * 2, 1)[:, 1]
    assert torch.equal(ops.unpack_mask(packed, mask.shape), mask)


@shapes
def test_free_mask_is_mask_without_used_mask(shape: tuple[int, ...], threads: int, device: str) -> None:
    mask, used = drawn(shape, device=device), drawn(shape, device=device)
    assert torch.equal(ops.free_mask(mask, used), mask & ~used)


@shapes
def test_free_mask_of_packed_masks_is_the_packed_free_mask(shape: tuple[int, ...], threads: int) -> None:
    mask, used = drawn(shape), drawn(shape)
    packed = ops.free_mask(ops.pack_mask(mask), ops.pack_mask(used))
    assert torch.equal(packed, ops.pack_mask(ops.free_mask(mask, used)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_free_mask_of_strided_masks(layout: str) -> None:
    mask, used = drawn((9, 5, 3, 3)), drawn((9, 5, 3, 3))
    assert torch.equal(ops.free_mask(LAYOUTS[layout](mask), used), mask & ~used)


def test_opcheck() -> None:
    mask, used = drawn((5, 7)).t(), drawn((7, 5))
    packed = reference.pack_mask(mask)
    torch.library.opcheck(torch.ops.exssnet.pack_mask.default, (mask,))
    torch.library.opcheck(torch.ops.exssnet.unpack_mask.default, (packed, [7, 5]))
    torch.library.opcheck(torch.ops.exssnet.free_mask.default, (mask, used))
    torch.library.opcheck(torch.ops.exssnet.free_mask.default, (packed, packed))


def test_compiles_in_one_graph_with_the_same_bits() -> None:
    torch._dynamo.reset()
    mask, used = drawn((33, 65)), drawn((33, 65))

    def free(mask: Tensor, used: Tensor) -> Tensor:
        return ops.unpack_mask(ops.free_mask(ops.pack_mask(mask), ops.pack_mask(used)), mask.shape)

    assert torch.equal(torch.compile(free, fullgraph=True, backend="aot_eager")(mask, used), mask & ~used)


SHORT = ops.pack_mask(M)[:2]
SENTENCES: Calls = {
    "pack_mask: mask must be bool, got torch.float32": lambda: ops.pack_mask(W),
    "unpack_mask: 20 entries are 3 bytes of uint8, got torch.uint8 of (2,)": lambda: ops.unpack_mask(
        torch.zeros(2, dtype=torch.uint8), (4, 5)
    ),
    "unpack_mask: sizes must be at least 0, got (-2, -4)": lambda: ops.unpack_mask(SHORT[:1], (-2, -4)),
    "free_mask: mask and used_mask must both be bool, or both packed uint8, of one shape, got torch.bool of (4, 5) and "
    "torch.uint8 of (3,)": lambda: ops.free_mask(M, ops.pack_mask(M)),
}
test_wrong_arguments_are_refused_in_a_sentence = refused(SENTENCES)


FOREIGN_MEMORY: Calls = {
    "too few packed bytes": lambda: RAW.unpack_mask(SHORT, [4, 5]),
    "a short used mask": lambda: RAW.free_mask(ops.pack_mask(M), SHORT),
}
test_native_kernels_touch_no_foreign_memory_given = guarded(FOREIGN_MEMORY)
