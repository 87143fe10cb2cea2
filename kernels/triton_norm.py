# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Batch norm, residual and ReLU in two launches each way; definitions in kernels/reference.py.

A program has the tiles of one part of some channels: of one channel whose values lie in planes of memory, or of COLUMNS
channels that are innermost. The first launch writes sums of each part, the second adds them in a fixed order and
computes the results. Sums are float32. Nothing depends on the order of the programs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .layouts import empty_in_layout_of, is_innermost
from .reference import wide
from .triton_mask import ceil_div

TILE = 4096  # elements that a program holds at a time
COLUMNS = 16  # channels of a tile, where channels are innermost
PROGRAMS, PARTS = 512, 64  # about as many programs in all, and at most as many parts of a channel


@triton.jit
def _channels_of_program(channels, COLS: tl.constexpr, LAST: tl.constexpr):
    """(channel numbers [1, COLS], or one number for planes; which of them exist)"""
    channel = tl.program_id(0)
    if LAST:
        channel = channel * COLS + tl.arange(0, COLS)[None, :]
    return channel, channel < channels


@triton.jit
def _tile(tile, across, rows, columns, row_stride, plane, ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr):
    """(offsets of a tile's elements [ROWS, COLS], which of them exist, how many of each channel)"""
    block = tl.program_id(0)
    first_row = (tile // across) * ROWS
    first_column = block * COLS if LAST else (tile % across) * COLS
    row, column = first_row + tl.arange(0, ROWS)[:, None], first_column + tl.arange(0, COLS)[None, :]
    start = 0 if LAST else block.to(tl.int64) * plane
    count = tl.minimum(rows - first_row, ROWS) * (1 if LAST else tl.minimum(columns - first_column, COLS))
    offsets = start + row.to(tl.int64) * row_stride + column
    return offsets, (row < rows) & (column < columns), count.to(tl.float32)


@triton.jit
def _sum(values, LAST: tl.constexpr):
    """The sum for each channel of a tile: [1, COLS], or one number for planes."""
    return tl.sum(values, 0, keep_dims=True) if LAST else tl.sum(values)


@triton.jit
def _moments_kernel(
    x, parts, batches, channels, across, tiles, per_part, rows, columns, row_stride, plane,
    ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of each part: parts (3, number of parts, C)."""
    channel, inside = _channels_of_program(channels, COLS, LAST)
    part, number = tl.program_id(1), tl.num_programs(1)
    count, mean = tl.zeros((), tl.float32), tl.zeros(channel.shape, tl.float32)
    squares = mean
    for tile in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
        offsets, exists, more = _tile(tile, across, rows, columns, row_stride, plane, ROWS, COLS, LAST)
        value = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)
        of_tile = _sum(value, LAST) / more
        deviation = tl.where(exists, value - of_tile, 0.0)
        step, total = of_tile - mean, count + more  # Chan, Golub & LeVeque 1979
        mean += step * (more / total)
        squares += _sum(deviation * deviation, LAST) + step * step * (count * (more / total))
        count = total
    at = parts + part * channels + channel
    tl.store(at, count, mask=inside)
    tl.store(at + number * channels, mean, mask=inside)
    tl.store(at + 2 * number * channels, squares, mask=inside)
    if batches is not None:
        first = tl.program_id(0) + part == 0
        tl.store(batches, tl.load(batches, mask=first, other=0) + 1, mask=first)


@triton.jit
def _part(parts, which, number, channel, inside, channels, NUMBER: tl.constexpr):
    """One of the sums of all parts, (NUMBER, channels of the program)."""
    index = tl.arange(0, NUMBER)[:, None]
    return tl.load(parts + (which * number + index) * channels + channel, mask=(index < number) & inside, other=0.0)


@triton.jit
def _merged(parts, number, channel, inside, channels, NUMBER: tl.constexpr, LAST: tl.constexpr):
    """(mean, biased variance) of the program's channels."""
    counts = _part(parts, 0, number, channel, inside, channels, NUMBER)
    means = _part(parts, 1, number, channel, inside, channels, NUMBER)
    squares = _part(parts, 2, number, channel, inside, channels, NUMBER)
    total = tl.where(inside, _sum(counts, LAST), 1.0)
    first = tl.load(parts + number * channels + channel, mask=inside, other=0.0)
    mean = first + _sum(counts * (means - first), LAST) / total
    step = means - mean
    return mean, _sum(squares + counts * step * step, LAST) / total


@triton.jit
def _scale_and_shift(weight, bias, var, eps, channel, inside):
    scale = tl.rsqrt(var + eps)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.zeros(channel.shape, tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def _affine(value, mean, scale, shift):
    """The input of ReLU without a residual. The backward pass computes it again, with the same bits."""
    return tl.fma(value - mean, scale, tl.broadcast_to(shift, value.shape))


@triton.jit
def _move(running, to, step, channel, inside):
    before = tl.load(running + channel, mask=inside, other=0.0).to(tl.float32)
    after = tl.where(step < 0.5, before + step * (to - before), to - (1 - step) * (to - before))
    tl.store(running + channel, after.to(running.dtype.element_ty), mask=inside)


@triton.jit
def _normalise_kernel(
    x, residual, weight, bias, given_mean, given_var, parts, running_mean, running_var, batches, y, used_mean, used_var,
    momentum, unbiased, eps, channels, across, tiles, per_part, rows, columns, row_stride, plane,
    RELU: tl.constexpr, NUMBER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Either the given mean and variance or `parts` of the moments are used. unbiased: M / (M - 1) for M values."""
    channel, inside = _channels_of_program(channels, COLS, LAST)
    part, number = tl.program_id(1), tl.num_programs(1)
    if parts is None:
        mean = tl.load(given_mean + channel, mask=inside, other=0.0).to(tl.float32)
        var = tl.load(given_var + channel, mask=inside, other=1.0).to(tl.float32)
    else:
        mean, var = _merged(parts, number, channel, inside, channels, NUMBER, LAST)
    if part == 0:
        tl.store(used_mean + channel, mean, mask=inside)
        tl.store(used_var + channel, var, mask=inside)
        if running_mean is not None:
            step = 1.0 / tl.load(batches).to(tl.float32) if momentum is None else momentum
            _move(running_mean, mean, step, channel, inside)
            _move(running_var, var * unbiased, step, channel, inside)
    scale, shift = _scale_and_shift(weight, bias, var, eps, channel, inside)
    for tile in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
        offsets, exists, _ = _tile(tile, across, rows, columns, row_stride, plane, ROWS, COLS, LAST)
        value = _affine(tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32), mean, scale, shift)
        if residual is not None:
            value += tl.load(residual + offsets, mask=exists, other=0.0).to(tl.float32)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # NaN stays
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _before_relu(grad, value, y, offsets, exists, mean, scale, shift, RELU: tl.constexpr):
    """The gradient before ReLU. value: x in float32, or None if nobody needs it."""
    gradient = tl.load(grad + offsets, mask=exists, other=0.0)
    if RELU:
        if y is None:
            output = _affine(value, mean, scale, shift).to(grad.dtype.element_ty)
        else:
            output = tl.load(y + offsets, mask=exists, other=0.0)
        gradient = tl.where(output.to(tl.float32) <= 0, 0.0, gradient.to(tl.float32))
    return gradient.to(tl.float32)


@triton.jit
def _sums_kernel(
    grad, x, y, weight, bias, used_mean, used_var, kept, parts, eps, channels, across, tiles, per_part, rows, columns,
    row_stride, plane, RELU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient before ReLU, and of its product with x - mean: parts (2, number of parts, C).

    kept: where the gradient before ReLU is written, or None.
    """
    channel, inside = _channels_of_program(channels, COLS, LAST)
    part, number = tl.program_id(1), tl.num_programs(1)
    mean = tl.load(used_mean + channel, mask=inside, other=0.0)
    var = tl.load(used_var + channel, mask=inside, other=1.0)
    scale, shift = _scale_and_shift(weight, bias, var, eps, channel, inside)
    of_grad, of_product = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
        offsets, exists, _ = _tile(tile, across, rows, columns, row_stride, plane, ROWS, COLS, LAST)
        value = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)
        gradient = _before_relu(grad, value, y, offsets, exists, mean, scale, shift, RELU)
        of_grad += gradient
        of_product += gradient * (value - mean)
        if kept is not None:
            tl.store(kept + offsets, gradient.to(kept.dtype.element_ty), mask=exists)
    at = parts + part * channels + channel
    tl.store(at, _sum(of_grad, LAST), mask=inside)
    tl.store(at + number * channels, _sum(of_product, LAST), mask=inside)


@triton.jit
def _gradients_kernel(
    grad, x, y, weight, bias, used_mean, used_var, parts, number, grad_x, grad_weight, grad_bias, size, eps, channels,
    across, tiles, per_part, rows, columns, row_stride, plane, RELU: tl.constexpr, TRAINING: tl.constexpr,
    NUMBER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """grad_x, grad_weight, grad_bias: None if not asked. size: the number of values of a channel."""
    channel, inside = _channels_of_program(channels, COLS, LAST)
    part = tl.program_id(1)
    mean = tl.load(used_mean + channel, mask=inside, other=0.0)
    var = tl.load(used_var + channel, mask=inside, other=1.0)
    scale, shift = _scale_and_shift(weight, bias, var, eps, channel, inside)
    offset, slope = tl.zeros(channel.shape, tl.float32), tl.zeros(channel.shape, tl.float32)
    if parts is not None:
        of_grad = _sum(_part(parts, 0, number, channel, inside, channels, NUMBER), LAST)
        of_product = _sum(_part(parts, 1, number, channel, inside, channels, NUMBER), LAST)
        offset, slope = of_grad / size, of_product / (var + eps) / size
        if part == 0:
            if grad_weight is not None:
                of_weight = of_product * tl.rsqrt(var + eps)
                tl.store(grad_weight + channel, of_weight.to(grad_weight.dtype.element_ty), mask=inside)
            if grad_bias is not None:
                tl.store(grad_bias + channel, of_grad.to(grad_bias.dtype.element_ty), mask=inside)
    if grad_x is not None:
        for tile in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
            offsets, exists, _ = _tile(tile, across, rows, columns, row_stride, plane, ROWS, COLS, LAST)
            value = tl.zeros((ROWS, COLS), tl.float32)
            if TRAINING or (RELU and y is None):
                value = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)
            gradient = _before_relu(grad, value, y, offsets, exists, mean, scale, shift, RELU)
            if TRAINING:
                gradient = gradient - offset - slope * (value - mean)
            tl.store(grad_x + offsets, (scale * gradient).to(grad_x.dtype.element_ty), mask=exists)


def _plan(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """((blocks of channels, parts), the arguments that say where x is in memory and which tiles a part has)."""
    channels = x.shape[1]
    size = x.numel() // channels
    rows = x.shape[0] if x.is_contiguous() else 1
    plane = size // rows  # values of a channel without a gap
    last = is_innermost(x, 1) and (plane == 1 or not x.is_contiguous())
    if last:
        rows, columns, width, stride = size, channels, COLUMNS, channels
    else:
        columns, width, stride = plane, min(TILE, triton.next_power_of_2(plane)), channels * plane
    height = min(TILE // width, triton.next_power_of_2(rows))
    across = 1 if last else ceil_div(columns, width)
    tiles, blocks = ceil_div(rows, height) * across, ceil_div(channels, width) if last else channels
    per_part = ceil_div(tiles, max(1, min(PARTS, PROGRAMS // blocks)))
    plan = {
        "channels": channels, "across": across, "tiles": tiles, "per_part": per_part, "rows": rows, "columns": columns,
        "row_stride": stride, "plane": plane, "ROWS": height, "COLS": width, "LAST": last,
        "num_warps": 8 if height * width == TILE else 4,
    }  # fmt: skip
    return (blocks, ceil_div(tiles, per_part)), plan


def _stored_like(t: Tensor, x: Tensor) -> Tensor:
    """t, of x's shape, in x's layout."""
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def _per_channel(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if t is None else t.contiguous() for t in tensors)


def batch_norm_act(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None,
    momentum: float | None, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    strided = [t for t in (running_mean, running_var) if t is not None and not t.is_contiguous()]
    if x.dtype == torch.float64 or x.numel() == 0 or strided:
        return reference.batch_norm_act(
            x, residual, weight, bias, mean, var, running_mean, running_var, batches, momentum, eps, relu
        )
    y = empty_in_layout_of(x)
    x = _stored_like(x, y)
    residual = None if residual is None else _stored_like(residual, x)
    grid, plan = _plan(x)
    used_mean, used_var = (x.new_empty(x.shape[1], dtype=wide(x.dtype)) for _ in range(2))
    weight, bias, mean, var = _per_channel(weight, bias, mean, var)
    parts = None
    if mean is None:
        parts = used_mean.new_empty(3, grid[1], x.shape[1])
        _moments_kernel[grid](x, parts, batches, **plan)
    count = x.numel() // x.shape[1]
    _normalise_kernel[grid](
        x, residual, weight, bias, mean, var, parts, running_mean, running_var, batches, y, used_mean, used_var,
        momentum, count / max(count - 1, 1), eps, RELU=relu, NUMBER=triton.next_power_of_2(grid[1]), **plan,
    )  # fmt: skip
    return y, used_mean, used_var


def batch_norm_act_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, relu: bool, training: bool, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.batch_norm_act_backward(grad, x, y, weight, bias, mean, var, eps, relu, training, output_mask)
    x = _stored_like(x, empty_in_layout_of(x))
    grad, y = _stored_like(grad, x), None if y is None or not relu else _stored_like(y, x)
    of_channel = (mean if t is None else t for t in (weight, bias))
    results = [
        torch.empty_like(t) if asked else x.new_empty(0)
        for t, asked in zip((x, x, *of_channel), output_mask, strict=True)
    ]
    grid, plan = _plan(x)
    weight, bias = _per_channel(weight, bias)
    mean, var = mean.contiguous(), var.contiguous()
    grad_x, kept, grad_weight, grad_bias = (t if m else None for t, m in zip(results, output_mask, strict=True))
    parts = None
    if kept is not None or grad_weight is not None or grad_bias is not None or (training and grad_x is not None):
        parts = mean.new_empty(2, grid[1], x.shape[1])
        _sums_kernel[grid](grad, x, y, weight, bias, mean, var, kept, parts, eps, RELU=relu, **plan)
    if kept is not None:  # it spares reading y again
        grad, y, relu = kept, None, False
    if grad_x is not None or grad_weight is not None or grad_bias is not None:
        _gradients_kernel[grid if grad_x is not None else (grid[0], 1)](
            grad, x, y, weight, bias, mean, var, parts, grid[1], grad_x, grad_weight, grad_bias,
            float(x.numel() // x.shape[1]), eps, RELU=relu, TRAINING=training,
            NUMBER=triton.next_power_of_2(grid[1]), **plan,
        )  # fmt: skip
    return results[0], results[1], results[2], results[3]
