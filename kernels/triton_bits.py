# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Masks as bits in Triton; definitions in kernels/reference.py."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_mask import ceil_div

BLOCK = 1024  # bytes of a packed mask in one program


@triton.jit
def _entries_of_program(n, BLOCK: tl.constexpr):
    """(the first of the BLOCK entries of a program, how many of them are among the n)"""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    return first, tl.minimum(n - first, BLOCK).to(tl.int32)


@triton.jit
def _pack(mask, packed, n, BLOCK: tl.constexpr):
    first, count = _entries_of_program(n, 8 * BLOCK)
    byte, bit = tl.arange(0, BLOCK)[:, None], tl.arange(0, 8)[None, :]
    bits = tl.load(mask + first + (8 * byte + bit), mask=8 * byte + bit < count, other=0).to(tl.int32) << bit
    tl.store(packed + first // 8 + byte, tl.sum(bits, 1, keep_dims=True).to(tl.uint8), mask=8 * byte < count)


@triton.jit
def _unpack(packed, mask, n, BLOCK: tl.constexpr):
    first, count = _entries_of_program(n, 8 * BLOCK)
    byte, bit = tl.arange(0, BLOCK)[:, None], tl.arange(0, 8)[None, :]
    bits = tl.load(packed + first // 8 + byte, mask=8 * byte < count, other=0).to(tl.int32) >> bit & 1
    tl.store(mask + first + (8 * byte + bit), bits.to(tl.uint8), mask=8 * byte + bit < count)


@triton.jit
def _and_not(a, b, result, n, BLOCK: tl.constexpr):
    first, count = _entries_of_program(n, BLOCK)
    i = tl.arange(0, BLOCK)
    inside = i < count
    kept = tl.load(a + first + i, mask=inside, other=0) & ~tl.load(b + first + i, mask=inside, other=0)
    tl.store(result + first + i, kept, mask=inside)


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


def pack_mask(mask: Tensor) -> Tensor:
    n = mask.numel()
    packed = mask.new_empty(ceil_div(n, 8), dtype=torch.uint8)
    _pack[(ceil_div(n, 8 * BLOCK),)](_bytes(mask), packed, n, BLOCK=BLOCK)
    return packed


def unpack_mask(packed: Tensor, shape: list[int]) -> Tensor:
    n = math.prod(shape)
    mask = packed.new_empty(shape, dtype=torch.bool)
    _unpack[(ceil_div(n, 8 * BLOCK),)](_bytes(packed), _bytes(mask), n, BLOCK=BLOCK)
    return mask


def free_mask(mask: Tensor, used_mask: Tensor) -> Tensor:
    free = torch.empty_like(mask, memory_format=torch.contiguous_format)
    n = mask.numel()
    _and_not[(ceil_div(n, 2 * BLOCK),)](_bytes(mask), _bytes(used_mask), _bytes(free), n, BLOCK=2 * BLOCK)
    return free
