# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Masks inside Triton kernels, and the gradients that follow from that of a masked weight.

A mask is a tensor over the flat weight; its dtype tells the kind. Scores come with a selection, int8 has a byte a
weight, uint8 a bit a weight. int64 is the bitmap pattern of a weight that is given as its free and frozen values. A
flat index is the int64 `base` of a tile plus an int32 `local` index in it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # weights, or results, of one program of an elementwise kernel


def ceil_div(a: int, b: int) -> int:
    """The same as `triton.cdiv`, which takes 2 us on the host."""
    return -(-a // b)


@dataclass(frozen=True)
class Mask:
    """The tensor of a mask, and for scores the selection."""

    data: Tensor
    selection: Tensor | None


def selected(scores: Tensor, selection: Tensor) -> Mask:
    """The mask of a selection: packed bits, or scores compared with a threshold."""
    if selection.dtype == torch.uint8:
        return given(selection)
    return Mask(scores.contiguous(), selection.contiguous())


def given(mask: Tensor) -> Mask:
    """The mask of a bool tensor, of packed bits, or of a bitmap pattern."""
    mask = mask.contiguous()
    return Mask(mask.view(torch.int8) if mask.dtype == torch.bool else mask, None)


@triton.jit
def of_layer(pointers, layer):
    """The tensor of one layer from the tuple of all layers' tensors."""
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        pointer = tl.where(layer == i, pointers[i], pointer)
    return pointer


@triton.jit
def _magnitude_bits(scores):
    if scores.dtype == tl.float32:
        bits = scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = scores.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return bits


@triton.jit
def threshold_of(selection):
    """(threshold bits, tie index) of a selection; without one (0, 0), which are not read."""
    if selection is None:
        threshold, tie = 0, 0
    else:
        threshold = tl.minimum(tl.load(selection), 0x7FFFFFFF).to(tl.int32)  # k = 0: beyond every score that is no NaN
        tie = tl.load(selection + 1)
    return threshold, tie


@triton.jit
def _entry(pattern, base, local, inside, FREE: tl.constexpr):
    """(whether the weights base + local are kept, the number of kept weights before each) by a bitmap pattern.

    FREE: the same for the free weights.
    """
    place = (base % 32).to(tl.int32) + local
    word = tl.load(pattern + (base // 32 + place // 32) * 2 + (1 if FREE else 0), mask=inside, other=0)
    bits, bit = word.to(tl.uint32), (place % 32).to(tl.uint32)
    below = bits & ((tl.full([], 1, tl.uint32) << bit) - 1)
    below -= below >> 1 & 0x55555555  # set bits of each pair of bits; then of four, of eight, of all
    below = (below & 0x33333333) + (below >> 2 & 0x33333333)
    below = below + (below >> 4) & 0x0F0F0F0F
    below += below >> 8
    count = (below + (below >> 16) & 0x3F).to(tl.int32)
    return (bits >> bit & 1) != 0, (word >> 32).to(tl.int32) + count


@triton.jit
def is_kept(mask, threshold, tie, base, local, inside):
    """Whether a mask keeps the weights base + local; undefined for those not inside."""
    if mask.dtype.element_ty.is_floating():
        bits = _magnitude_bits(tl.load(mask + base + local, mask=inside, other=0.0))
        last = tl.minimum(tl.maximum(tie - base, -1), 0x7FFFFFFF).to(tl.int32)
        kept = (bits > threshold) | ((bits == threshold) & (local <= last))
    elif mask.dtype.element_ty == tl.int8:
        kept = tl.load(mask + base + local, mask=inside, other=0) != 0
    else:
        place = (base % 8).to(tl.int32) + local
        byte = tl.load(mask + base // 8 + place // 8, mask=inside, other=0).to(tl.int32)
        kept = (byte >> place % 8 & 1) != 0
    return kept


@triton.jit
def kept_weight(weight, mask, threshold, tie, base, local, inside):
    """The weights base + local, 0 where the mask does not keep them."""
    if mask.dtype.element_ty == tl.int64:
        free_values, frozen_values = weight
        kept, place = _entry(mask, base, local, inside, False)
        free, free_place = _entry(mask, base, local, inside, True)
        value = tl.load(free_values + free_place, mask=inside & free, other=0.0)
        value += tl.load(frozen_values + (place - free_place), mask=inside & kept & (free == 0), other=0.0)
    else:
        value = tl.load(weight + base + local, mask=inside, other=0.0)
        value = tl.where(is_kept(mask, threshold, tie, base, local, inside), value, 0.0)
    return value


@triton.jit
def store_gradients(
    gradient, base, local, inside, weight, scores, mask, threshold, tie, free_mask, grad_scores, grad_weight
):  # fmt: skip
    """Store the gradients that follow from the gradient G of the effective weight.

    grad_scores: G W sign(S) (straight-through), or None. grad_weight: G inside mask and free mask, or None; for a
    bitmap pattern it holds the free values only. scores: needed for grad_scores. free_mask: None means the whole mask.
    """
    if grad_scores is not None:
        score = tl.load(scores + base + local, mask=inside, other=0.0)
        sign = (score > 0).to(tl.float32) - (score < 0).to(tl.float32)
        value = tl.load(weight + base + local, mask=inside, other=0.0).to(tl.float32)
        straight_through = gradient * value * sign
        tl.store(grad_scores + base + local, straight_through.to(grad_scores.dtype.element_ty), mask=inside)
    if grad_weight is not None and mask.dtype.element_ty == tl.int64:
        free, place = _entry(mask, base, local, inside, True)
        tl.store(grad_weight + place, gradient.to(grad_weight.dtype.element_ty), mask=inside & free)
    elif grad_weight is not None:
        kept = is_kept(mask, threshold, tie, base, local, inside)
        if free_mask is not None:
            kept &= is_kept(free_mask, 0, 0, base, local, inside)
        trained = tl.where(kept, gradient, 0.0)
        tl.store(grad_weight + base + local, trained.to(grad_weight.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_parts(parts, count, n, base, local, inside):
    """Entries base + local of `count` consecutive tensors of n entries each, summed in order."""
    total = tl.load(parts + base + local, mask=inside, other=0.0).to(tl.float32)
    for _ in range(1, count):
        parts += n
        total += tl.load(parts + base + local, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _finish_kernel(
    output_parts, output_count, output_n, bias, channels, inner, output, output_blocks,
    parts, count, n, weight, scores, mask, selection, free_mask, grad_scores, grad_weight, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first output_blocks programs fill the output, the others the gradients. Absent parts are None.

    bias[(i // inner) % channels] is added to entry i of the output's storage; bias may be None.
    """
    block = tl.program_id(0)
    if block < output_blocks:
        if output_parts is not None:
            base = block.to(tl.int64) * BLOCK
            local = tl.arange(0, BLOCK)
            inside = base + local < output_n
            total = _sum_of_parts(output_parts, output_count, output_n, base, local, inside)
            if bias is not None:
                total += tl.load(bias + (base + local) // inner % channels, mask=inside, other=0.0).to(tl.float32)
            tl.store(output + base + local, total.to(output.dtype.element_ty), mask=inside)
    else:
        if parts is not None:
            base = (block - output_blocks).to(tl.int64) * BLOCK
            local = tl.arange(0, BLOCK)
            inside = base + local < n
            gradient = _sum_of_parts(parts, count, n, base, local, inside)
            threshold, tie = threshold_of(selection)
            store_gradients(
                gradient, base, local, inside, weight, scores, mask, threshold, tie, free_mask, grad_scores, grad_weight
            )  # fmt: skip


class OutputParts(NamedTuple):
    """An output (N, O, H, W), and the parts (P, ...) of its sum, in the order of its storage."""

    parts: Tensor
    bias: Tensor | None
    output: Tensor


class Gradients(NamedTuple):
    """The gradients to compute for a layer, contiguous or None, and the tensors that they need.

    weight, scores: needed for the gradient of the scores only, else None. free_mask: None means the whole mask.
    """

    weight: Tensor | None
    scores: Tensor | None
    mask: Mask
    free_mask: Mask | None
    of_scores: Tensor | None
    of_weight: Tensor | None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The arguments of the kernels."""
        weight, scores = (None if self.of_scores is None else t for t in (self.weight, self.scores))
        return (
            None if weight is None else weight.contiguous(), None if scores is None else scores.contiguous(),
            self.mask.data, self.mask.selection, None if self.free_mask is None else self.free_mask.data,
            self.of_scores, self.of_weight,
        )  # fmt: skip


class GradientParts(NamedTuple):
    """The parts (P, weights) of the effective weight's gradient, and the gradients that follow from their sum."""

    parts: Tensor
    gradients: Gradients


def finish(of_output: OutputParts | None, of_gradients: GradientParts | None) -> None:
    """Add up the parts of an output and of a layer's gradients, in one launch."""
    first: tuple[Any, ...] = (None, 0, 0, None, 1, 1, None, 0)
    second: tuple[Any, ...] = (None, 0, 0, *[None] * 7)
    blocks = 0
    if of_output is not None:
        parts, bias, output = of_output
        blocks = ceil_div(output.numel(), BLOCK)
        first = parts, parts.shape[0], output.numel(), bias, output.shape[1], output.stride(1), output, blocks
    if of_gradients is not None:
        parts, gradients = of_gradients
        n = parts.shape[1]
        second = parts, parts.shape[0], n, *gradients.arguments()
        blocks += ceil_div(n, BLOCK)
    if blocks:
        _finish_kernel[(blocks,)](*first, *second, BLOCK=BLOCK)
