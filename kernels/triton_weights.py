# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Masked weights of all layers in one launch, their gradients in another; definitions in kernels/reference.py.

The tensors of up to LAYERS layers are the parameters of a launch. Outputs, masks and gradients are new tensors in each
step, so a table of their addresses would have to be copied to the GPU before each launch, and a CUDA graph cannot hold
such a copy. A program handles CHUNK weights of one layer, or BLOCK free values. Layers of different dtypes need
launches of their own.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .layouts import order_of
from .triton_mask import ceil_div, kept_weight, of_layer, store_gradients

BLOCK = 1024  # weights that a program holds at a time
CHUNK = 8 * BLOCK
LAYERS = 64  # whose pointers fit into the 4 KB of a launch's parameters
Orders = tuple[tuple[int, ...], ...]
"""Channels and taps of each layer's weight that is stored channels_last; 1 and 1 of the others."""


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
def _stored(place, orders, layer):
    """Where an entry of a weight (O, C, T) is stored. orders: see `Orders`; None if all are contiguous."""
    if orders is not None:
        channels, taps = of_layer(orders[0], layer), of_layer(orders[1], layer)
        place = place.to(tl.int32)
        inner = place % (channels * taps)
        place += inner % taps * channels + inner // taps - inner
    return place


@triton.jit
def _weights_kernel(weights, masks, outputs, sizes, orders, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """orders: those of the outputs."""
    layer, begin, end = _chunk_of_program(sizes, CHUNK)
    weight, mask, output = of_layer(weights, layer), of_layer(masks, layer), of_layer(outputs, layer)
    local = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(end - begin, BLOCK)):
        base = begin + block * BLOCK
        inside = base + local < end
        value = kept_weight(weight, mask, 0, 0, base, local, inside)
        place = _stored(base + local, orders, layer)
        tl.store(output + place, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(
    grads, weights, scores, masks, grad_scores, grad_weights, sizes, orders, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """grad_scores, grad_weights: None if not asked. orders: those of grads."""
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
        place = _stored(base + local, orders, layer)
        gradient = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        store_gradients(gradient, base, local, inside, weight, score, mask, 0, 0, None, of_scores, of_weights)


@triton.jit
def _values_kernel(sources, places, targets, sizes, GATHER: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """GATHER: from the places of the sources to the targets in order; otherwise the other way round."""
    layer, begin, end = _chunk_of_program(sizes, CHUNK)
    source, where, target = of_layer(sources, layer), of_layer(places, layer), of_layer(targets, layer)
    local = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(end - begin, BLOCK)):
        index = begin + block * BLOCK + local
        inside = index < end
        place = tl.load(where + index, mask=inside, other=0)
        value = tl.load(source + (place if GATHER else index), mask=inside, other=0.0)
        tl.store(target + (index if GATHER else place), value.to(target.dtype.element_ty), mask=inside)


def _served(weights: Sequence[Tensor], scores: Sequence[Tensor], selections: Sequence[Tensor]) -> bool:
    """Whether the kernels serve these: packed masks, no float64. The reference serves the rest."""
    packed = {s.dtype for s in selections} <= {torch.uint8}
    small = all(t.numel() < 1 << 31 for t in weights)  # as many as scores
    return packed and small and torch.float64 not in {t.dtype for t in (*weights, *scores)}


def _groups(*tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """For each launch (its layers, their sizes): layers of equal dtypes that are not empty."""
    dtypes = list(zip(*([t.dtype for t in of_layers] for of_layers in tensors), strict=True))
    sizes = [t.numel() for t in tensors[0]]
    for same in dict.fromkeys(dtypes):
        layers = [i for i, dtype in enumerate(dtypes) if dtype == same and sizes[i]]
        for start in range(0, len(layers), LAYERS):
            some = layers[start : start + LAYERS]
            yield some, tuple(sizes[i] for i in some)


def _of(tensors: Sequence[Tensor], layers: list[int]) -> tuple[Tensor, ...]:
    return tuple(tensors[i].contiguous() for i in layers)


def _dense(tensors: Sequence[Tensor], layers: list[int]) -> tuple[tuple[Tensor, ...], Orders | None]:
    """The tensors, contiguous or channels_last, and their orders."""
    dense = tuple(tensors[i] if _channels_last(tensors[i]) else tensors[i].contiguous() for i in layers)
    orders = [(t.shape[1], t[0, 0].numel()) if _channels_last(t) else (1, 1) for t in dense]
    return dense, tuple(zip(*orders, strict=True)) if any(map(_channels_last, dense)) else None


def _channels_last(t: Tensor) -> bool:
    return not t.is_contiguous() and t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _grid(sizes: tuple[int, ...], chunk: int) -> tuple[int]:
    return (sum(ceil_div(n, chunk) for n in sizes),)


def supermask_weights(
    weights: list[Tensor], scores: list[Tensor], selections: list[Tensor], dtype: torch.dtype | None,
    channels_last: list[bool],
) -> list[Tensor]:  # fmt: skip
    if not _served(weights, scores, selections) or dtype == torch.float64:
        return reference.supermask_weights(weights, scores, selections, dtype, channels_last)
    of_layers = zip(weights, map(order_of, channels_last), strict=True)
    outputs = [torch.empty_like(w, dtype=dtype, memory_format=order) for w, order in of_layers]
    for layers, sizes in _groups(weights, outputs):
        stored, orders = _dense(outputs, layers)
        _weights_kernel[_grid(sizes, CHUNK)](
            _of(weights, layers), _of(selections, layers), stored, sizes, orders, BLOCK=BLOCK, CHUNK=CHUNK
        )
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
    for layers, sizes in _groups(grads, weights, scores) if any(output_mask) else ():
        stored, orders = _dense(grads, layers)
        inputs = (_of(tensors, layers) for tensors in (weights, scores, selections))
        outputs = (_of(gradients, layers) if gradients else None for gradients in (of_scores, of_weights))
        _gradients_kernel[_grid(sizes, CHUNK)](stored, *inputs, *outputs, sizes, orders, BLOCK=BLOCK, CHUNK=CHUNK)
    return of_scores, of_weights


def write_values(values: list[Tensor], places: list[Tensor], weights: list[Tensor]) -> None:
    _move([v.contiguous() for v in values], places, weights, False)


def write_values_backward(grads: list[Tensor], values: list[Tensor], places: list[Tensor]) -> list[Tensor]:
    gathered = [torch.empty_like(v) for v in values]
    _move(grads, places, gathered, True)
    return gathered


def _move(sources: list[Tensor], places: list[Tensor], targets: list[Tensor], gather: bool) -> None:
    for layers, sizes in _groups(places, sources, targets):
        tensors = (tuple(each[i] for i in layers) for each in (sources, places, targets))
        _values_kernel[_grid(sizes, BLOCK)](*tensors, sizes, GATHER=gather, BLOCK=BLOCK, CHUNK=BLOCK)
