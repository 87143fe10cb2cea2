# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Masked weights of all layers in one launch, their gradients in another; definitions in kernels/reference.py.

The tensors of up to LAYERS layers are the parameters of a launch. So no table of pointers is in memory, and a CUDA
graph keeps the tensors with the launch. A program handles CHUNK weights of one layer. Layers of different dtypes need
launches of their own.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .triton_mask import ceil_div, kept_weight, of_layer, store_gradients

BLOCK = 1024  # weights that a program holds at a time
CHUNK = 8 * BLOCK
LAYERS = 64  # whose pointers fit into the 4 KB of a launch's parameters


@triton.jit
def _chunk_of_program(sizes, CHUNK: tl.constexpr):
    """(layer, begin and end of the program's chunk in it)"""
    program = tl.program_id(0)
    layer, size, first, before = 0, sizes[0], 0, 0
    for i in tl.static_range(1, len(sizes)):
        first += tl.cdiv(sizes[i - 1], CHUNK)
        reached = program >= first
        layer, size, before = (
            tl.where(reached, i, layer),
            tl.where(reached, sizes[i], size),
            tl.where(reached, first, before),
        )
    begin = (program - before).to(tl.int64) * CHUNK
    return layer, begin, tl.minimum(begin + CHUNK, size)


@triton.jit
def _weights_kernel(weights, masks, outputs, sizes, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    layer, begin, end = _chunk_of_program(sizes, CHUNK)
    weight, mask, output = of_layer(weights, layer), of_layer(masks, layer), of_layer(outputs, layer)
    local = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(end - begin, BLOCK)):
        base = begin + block * BLOCK
        inside = base + local < end
        value = kept_weight(weight, mask, 0, 0, base, local, inside)
        tl.store(output + base + local, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(
    grads, weights, scores, masks, grad_scores, grad_weights, sizes, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """grad_scores, grad_weights: None if not asked."""
    layer, begin, end = _chunk_of_program(sizes, CHUNK)
    grad, weight, score, mask = (
        of_layer(grads, layer), of_layer(weights, layer), of_layer(scores, layer), of_layer(masks, layer)
    )  # fmt: skip
    of_scores = None if grad_scores is None else of_layer(grad_scores, layer)
    of_weights = None if grad_weights is None else of_layer(grad_weights, layer)
    local = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(end - begin, BLOCK)):
        base = begin + block * BLOCK
        inside = base + local < end
        gradient = tl.load(grad + base + local, mask=inside, other=0.0).to(tl.float32)
        store_gradients(gradient, base, local, inside, weight, score, mask, 0, 0, None, of_scores, of_weights)


def _served(weights: Sequence[Tensor], scores: Sequence[Tensor], selections: Sequence[Tensor]) -> bool:
    """Whether the kernels serve these: packed masks, no float64. The reference serves the rest."""
    return all(s.dtype == torch.uint8 for s in selections) and all(
        t.dtype != torch.float64 and t.numel() < 1 << 31 for t in (*weights, *scores)
    )


def _groups(*tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], tuple[int, ...], dict[str, int]]]:
    """For each launch (its layers, their sizes, its block sizes): layers of equal dtypes that are not empty."""
    dtypes = [tuple(t.dtype for t in of_layer) for of_layer in zip(*tensors, strict=True)]
    sizes = [t.numel() for t in tensors[0]]
    for same in dict.fromkeys(dtypes):
        layers = [i for i, dtype in enumerate(dtypes) if dtype == same and sizes[i]]
        for start in range(0, len(layers), LAYERS):
            some = layers[start : start + LAYERS]
            yield some, tuple(sizes[i] for i in some), {"BLOCK": BLOCK, "CHUNK": CHUNK}


def _of(tensors: Sequence[Tensor], layers: list[int]) -> tuple[Tensor, ...]:
    return tuple(tensors[i].contiguous() for i in layers)


def supermask_weights(
    weights: list[Tensor], scores: list[Tensor], selections: list[Tensor], dtype: torch.dtype | None
) -> list[Tensor]:
    if not _served(weights, scores, selections) or dtype == torch.float64:
        return reference.supermask_weights(weights, scores, selections, dtype)
    outputs = [torch.empty_like(w, dtype=dtype, memory_format=torch.contiguous_format) for w in weights]
    for layers, sizes, blocks in _groups(weights, outputs):
        grid = (sum(ceil_div(n, CHUNK) for n in sizes),)
        _weights_kernel[grid](_of(weights, layers), _of(selections, layers), _of(outputs, layers), sizes, **blocks)
    return outputs


def supermask_weights_backward(
    grads: list[Tensor], weights: list[Tensor], scores: list[Tensor], selections: list[Tensor], output_mask: list[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    if not _served([*grads, *weights], scores, selections):
        return reference.supermask_weights_backward(grads, weights, scores, selections, output_mask)
    of_scores, of_weights = (
        [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors] if needed else []
        for tensors, needed in zip((scores, weights), output_mask, strict=True)
    )
    for layers, sizes, blocks in _groups(grads, weights, scores) if any(output_mask) else ():
        grid = (sum(ceil_div(n, CHUNK) for n in sizes),)
        inputs = (_of(tensors, layers) for tensors in (grads, weights, scores, selections))
        outputs = (_of(gradients, layers) if gradients else None for gradients in (of_scores, of_weights))
        _gradients_kernel[grid](*inputs, *outputs, sizes, **blocks)
    return of_scores, of_weights
