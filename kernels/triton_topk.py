# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Exact selection of the scores of largest magnitude in Triton; definitions in kernels/reference.py.

It is a radix select on the bits of the magnitudes, from the highest digit to the lowest. A pass over the scores counts
the values of a digit among the magnitudes that match the threshold so far. Then one program a layer chooses the digit
of the threshold. Further passes count the entries equal to the threshold, find the last one that is kept, and write the
masks if asked.

All layers of one dtype share the launches. Their scores are concatenated, and each program looks up its layer in a
table. The table reaches the device in the parameters of `torch._foreach_add_`, so the host never waits, and a CUDA
graph keeps the table with the launch. A table of pointers would save the copy of the scores. But then the memory that
kernels read would have no owner that a graph, or the interpreter's guard, could see.

Launches: 2 per digit of at most 11 bits (float32 has 3 digits), 2 for the ties, and one for all packed masks or one for
each bool mask. PyTorch adds one per digit and four more. Scores are read once for the copy, once per digit, once for
the ties and once for the masks.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nan_flag import flag
from .triton_mask import ceil_div, of_layer


class Format(NamedTuple):
    """A float format: the integer of its width, the number of magnitude bits, the bits of infinity."""

    integer: torch.dtype
    bits: int
    infinity: int


FORMATS = {
    torch.float64: Format(torch.int64, 63, 0x7FF << 52),
    torch.float32: Format(torch.int32, 31, 0xFF << 23),
    torch.float16: Format(torch.int16, 15, 0x1F << 10),
    torch.bfloat16: Format(torch.int16, 15, 0xFF << 7),
}
DIGIT = 11  # bits, at most
BLOCK = 2048  # entries that a program holds at a time
CHUNK = 8 * BLOCK  # entries of one program


@triton.jit
def _magnitudes(scores, index, inside, BITS: tl.constexpr):
    """The bits of the magnitudes of scores; 0 for those not inside."""
    bits = tl.load(scores + index, mask=inside, other=0)
    return bits.to(tl.int64 if BITS == 63 else tl.int32) & ((1 << BITS) - 1)


@triton.jit
def _chunk_of_program(first_chunk, first, count, layers, LAYERS: tl.constexpr, CHUNK: tl.constexpr):
    """(layer, its first entry, begin and end of the program's chunk in it); empty layers have no chunk."""
    column = tl.arange(0, LAYERS)
    begins = tl.load(first_chunk + column, mask=column < layers, other=0x7FFFFFFFFFFFFFFF)
    layer = tl.sum((begins <= tl.program_id(0)).to(tl.int32), 0) - 1
    begin = (tl.program_id(0) - tl.load(first_chunk + layer)) * CHUNK
    return layer, tl.load(first + layer), begin, tl.minimum(begin + CHUNK, tl.load(count + layer))


@triton.jit
def _count_digit(
    scores, first_chunk, first, count, threshold, digits, nan, layers, INFINITY: tl.constexpr, BITS: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the values of bits LOW to HIGH among the magnitudes that match the threshold above bit HIGH."""
    layer, start, begin, end = _chunk_of_program(first_chunk, first, count, layers, LAYERS, CHUNK)
    VALUES: tl.constexpr = 1 << (HIGH - LOW)
    known = tl.load(threshold + layer)
    counts = tl.zeros((VALUES,), tl.int32)
    for block in range(begin, end, BLOCK):
        index = block + tl.arange(0, BLOCK)
        inside = index < end
        bits = _magnitudes(scores, start + index, inside, BITS)
        digit = ((bits >> LOW) & (VALUES - 1)).to(tl.int32)
        counts += tl.histogram(digit, VALUES, mask=inside & ((bits >> HIGH) == known))
        if HIGH == BITS:  # the first digit
            is_nan = tl.max((bits > INFINITY).to(tl.int32), 0)
            tl.atomic_max(nan, is_nan, mask=is_nan > 0, sem="relaxed")
    value = tl.arange(0, VALUES)
    tl.atomic_add(digits + layer * VALUES + value, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _choose_digit(threshold, rank, digits, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Append the digit of the entry with that rank to the threshold; then the rank counts within the digit."""
    layer = tl.program_id(0)
    VALUES: tl.constexpr = 1 << (HIGH - LOW)
    value = tl.arange(0, VALUES)
    counts = tl.load(digits + layer * VALUES + value)
    wanted = tl.load(rank + layer)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # entries with this value or a larger one
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(value > digit, counts, 0), 0)
    tl.store(threshold + layer, tl.load(threshold + layer) << (HIGH - LOW) | digit)
    tl.store(rank + layer, wanted - above)


@triton.jit
def _count_ties(
    scores, first_chunk, first, count, threshold, ties, layers, BITS: tl.constexpr, LAYERS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The number of entries equal to the threshold in each chunk."""
    layer, start, begin, end = _chunk_of_program(first_chunk, first, count, layers, LAYERS, CHUNK)
    bits = tl.load(threshold + layer)
    equal = tl.zeros((BLOCK,), tl.int32)
    for block in range(begin, end, BLOCK):
        index = block + tl.arange(0, BLOCK)
        inside = index < end
        equal += (inside & (_magnitudes(scores, start + index, inside, BITS) == bits)).to(tl.int32)
    tl.store(ties + tl.program_id(0), tl.sum(equal, 0))


@triton.jit
def _select(
    scores, first_chunk, first, count, row, threshold, rank, ties, selection, BITS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Find the last kept tie of a layer by the number of ties before it, and write the selection."""
    layer = tl.program_id(0)
    bits, wanted = tl.load(threshold + layer), tl.load(rank + layer)
    n, lane = tl.load(count + layer), tl.arange(0, BLOCK)

    before = tl.cast(0, tl.int64)  # ties in the chunks so far
    chunk, passed = before, before  # chunks that end before the last tie, and ties in them
    chunks = tl.cdiv(n, CHUNK)
    for block in range(0, chunks, BLOCK):
        inside = block + lane < chunks
        counts = tl.load(ties + tl.load(first_chunk + layer) + block + lane, mask=inside, other=0).to(tl.int64)
        ends_before = inside & (before + tl.cumsum(counts, 0) < wanted)
        chunk += tl.sum(ends_before.to(tl.int64), 0)
        passed += tl.sum(tl.where(ends_before, counts, 0), 0)
        before += tl.sum(counts, 0)

    start, begin = tl.load(first + layer), chunk * CHUNK
    end = tl.minimum(begin + CHUNK, n)
    last = begin
    for block in range(begin, end, BLOCK):
        index = block + lane
        inside = index < end
        equal = (inside & (_magnitudes(scores, start + index, inside, BITS) == bits)).to(tl.int64)
        last += tl.sum((inside & (passed + tl.cumsum(equal, 0) < wanted)).to(tl.int64), 0)
        passed += tl.sum(equal, 0)

    pair = selection + 2 * tl.load(row + layer)
    tl.store(pair, tl.where(wanted > 0, bits, 0x7FFFFFFFFFFFFFFF))
    tl.store(pair + 1, tl.where(wanted > 0, last, -1))


@triton.jit
def _write_bits(
    scores, first_chunk, first, count, row, selection, masks, layers, BITS: tl.constexpr, LAYERS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the packed masks, given as a tuple."""
    layer, start, begin, end = _chunk_of_program(first_chunk, first, count, layers, LAYERS, CHUNK)
    pair = selection + 2 * tl.load(row + layer)
    threshold, tie = tl.load(pair), tl.load(pair + 1)
    mask = of_layer(masks, layer)
    byte, bit = tl.arange(0, BLOCK // 8)[:, None], tl.arange(0, 8)[None, :]
    for block in range(begin, end, BLOCK):
        index = block + 8 * byte + bit
        bits = _magnitudes(scores, start + index, index < end, BITS)
        kept = (index < end) & ((bits > threshold) | ((bits == threshold) & (index <= tie)))
        packed = tl.sum(kept.to(tl.int32) << bit, 1, keep_dims=True)
        tl.store(mask + block // 8 + byte, packed.to(tl.uint8), mask=block + 8 * byte < end)


@triton.jit
def _write_mask(scores, selection, mask, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = _magnitudes(scores, index, index < n, BITS)
    threshold, tie = tl.load(selection), tl.load(selection + 1)
    kept = (bits > threshold) | ((bits == threshold) & (index <= tie))
    tl.store(mask + index, kept.to(tl.uint8), mask=index < n)


def _select_layers(
    scores: list[Tensor], form: Format, k: list[int], rows: list[int], selection: Tensor, packed: list[Tensor]
) -> None:
    """Write the rows of the selection for flat scores of one format, and their packed masks, unless there are none."""
    device, layers = selection.device, len(scores)
    sizes = [s.numel() for s in scores]
    *first_chunks, chunks = accumulate((ceil_div(n, CHUNK) for n in sizes), initial=0)
    table = torch.zeros(6, layers, dtype=torch.int64, device=device)
    first_chunk, first, count, row, rank, threshold = table
    values = [*first_chunks, *accumulate(sizes[:-1], initial=0), *sizes, *rows, *k]
    torch._foreach_add_(table[:5].reshape(-1).unbind(), values)

    flat = scores[0] if layers == 1 else torch.cat(scores)
    pieces = {"BITS": form.bits, "LAYERS": triton.next_power_of_2(layers), "BLOCK": BLOCK, "CHUNK": CHUNK}
    digits = ceil_div(form.bits, DIGIT)
    for high, low in pairwise(form.bits - form.bits * i // digits for i in range(digits + 1)):
        counts = torch.zeros(layers, 1 << (high - low), dtype=torch.int64, device=device)
        _count_digit[(chunks,)](
            flat, first_chunk, first, count, threshold, counts, flag(device), layers,
            INFINITY=form.infinity, HIGH=high, LOW=low, **pieces, num_warps=8,
        )  # fmt: skip
        _choose_digit[(layers,)](threshold, rank, counts, HIGH=high, LOW=low)
    ties = torch.empty(chunks, dtype=torch.int32, device=device)
    _count_ties[(chunks,)](flat, first_chunk, first, count, threshold, ties, layers, **pieces)
    _select[(layers,)](
        flat, first_chunk, first, count, row, threshold, rank, ties, selection,
        BITS=form.bits, BLOCK=BLOCK, CHUNK=CHUNK,
    )  # fmt: skip
    if packed:
        _write_bits[(chunks,)](
            flat, first_chunk, first, count, row, selection, tuple(packed), layers, **pieces, num_warps=8
        )


def topk_masks(scores: list[Tensor], k: list[int], hint: Tensor | None, masks: list[Tensor]) -> Tensor:
    """NaN scores do not raise here: they count as larger than infinity, and set the flag."""
    selection = torch.empty(len(scores), 2, dtype=torch.int64, device=scores[0].device)
    flat = [s.contiguous().view(-1).view(FORMATS[s.dtype].integer) for s in scores]
    packed = bool(masks) and masks[0].dtype == torch.uint8
    for dtype in dict.fromkeys(s.dtype for s in scores):
        rows = [row for row, s in enumerate(scores) if s.dtype == dtype]
        bits = [masks[i] for i in rows] if packed else []
        _select_layers([flat[i] for i in rows], FORMATS[dtype], [k[i] for i in rows], rows, selection, bits)
    if masks and not packed:
        for s, integers, pair, mask in zip(scores, flat, selection, masks, strict=True):
            n = s.numel()
            _write_mask[(ceil_div(n, BLOCK),)](
                integers, pair, mask.view(-1).view(torch.uint8), n, BITS=FORMATS[s.dtype].bits, BLOCK=BLOCK
            )
    if hint is not None:
        hint.copy_(selection)
    return selection
