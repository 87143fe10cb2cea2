# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The products of all layers under a mask, as tiles of one implicit matrix product; the mask is applied to tiles.

A linear layer is a 1 x 1 convolution of 1 x 1 images. Tensors (N, C, H, W) are read and written by their strides. A
tile has BLOCK_O outputs, BLOCK_K weights of each and BLOCK_P pixels, counted over all images. Sums are float32. If
there are few tiles, each sum is split into parts, which are added afterwards in a fixed order.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import precision, remember
from .triton_mask import (
    GradientParts,
    Gradients,
    Mask,
    OutputParts,
    ceil_div,
    kept_weight,
    store_gradients,
    threshold_of,
)

Weight = Tensor | tuple[Tensor, ...]  # dense, or its free and frozen values

PROGRAMS = 256  # enough to keep a large GPU busy
PART = 256  # minimum length of a part of a sum
MOST_PARTS = 64
FEW_CHANNELS = 16  # up to this many, a tile holds weights of all taps; above, of one tap


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution; the default is a linear layer."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def output_size(self, size: Sequence[int]) -> list[int]:
        """The size of the output images; empty for a linear layer."""
        windows = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=False)
        return [(n + 2 * p - d * (taps - 1) - 1) // step + 1 for n, taps, step, p, d in windows]

    def constants(self) -> dict[str, Any]:
        return {"KERNEL": self.kernel, "STRIDE": self.stride, "PADDING": self.padding, "DILATION": self.dilation}


LINEAR = Geometry()


@triton.jit
def _pixel(p, size, batch, BATCH_INNER: tl.constexpr):
    """(image, line, column) of pixels; their count runs over columns first, or over images if BATCH_INNER."""
    if BATCH_INNER:
        n, column = p % batch, p // batch % size[1]
        line = p // batch // size[1]
    else:
        column, line = p % size[1], p // size[1] % size[0]
        n = p // size[1] // size[0]
    return n.to(tl.int64), line, column


@triton.jit
def _weights_of_block(block, KERNEL: tl.constexpr, MIXED: tl.constexpr, BLOCK_K: tl.constexpr):
    """(first channel, channels, tap) of a block of BLOCK_K weights of an output.

    MIXED: the weights are consecutive, each with its own tap. Otherwise a block has consecutive channels and one tap.
    Channels advance after all taps, so that the next taps find the same memory in the caches.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    if MIXED:
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        first, channel, tap = block * BLOCK_K // TAPS, k // TAPS, k % TAPS
    else:
        first, tap = block // TAPS * BLOCK_K, block % TAPS
        channel = first + tl.arange(0, BLOCK_K)
    return first, channel, tap


@triton.jit
def _reach(
    at, tap, size, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """(position, whether it exists) of the input that a tap multiplies for a result at `at`, in one dimension."""
    if TRANSPOSED:
        steps = at + PADDING - tap * DILATION
        position = steps // STRIDE
        exists = (steps >= 0) & (steps % STRIDE == 0) & (position < size)
    else:
        position = at * STRIDE - PADDING + tap * DILATION
        exists = (position >= 0) & (position < size)
    return position, exists


@triton.jit
def _gathered(
    source, strides, size, channel, channel_exists, tap, n, line, column, pixel_exists, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """The tile (channels and taps, pixels) of inputs that the weights multiply; 0 in the padding."""
    if MIXED:
        tap = tap[:, None]
    down, right = tap // KERNEL[1], tap % KERNEL[1]
    y, y_exists = _reach(line[None, :], down, size[0], STRIDE[0], PADDING[0], DILATION[0], TRANSPOSED)
    x, x_exists = _reach(column[None, :], right, size[1], STRIDE[1], PADDING[1], DILATION[1], TRANSPOSED)
    exists = y_exists & x_exists & pixel_exists[None, :] & channel_exists[:, None]
    pixel = n[None, :] * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return tl.load(source + pixel + channel.to(tl.int64)[:, None] * strides[1], mask=exists, other=0.0)


@triton.jit
def _part(blocks):
    """(first, past the last) block of the sum that this program computes."""
    length = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.program_id(1) * length
    return first, tl.minimum(first + length, blocks)


@triton.jit
def _tile(tiles_o, others):
    """(group, tile of outputs, other tile) of this program; neighbours share both operands in the caches."""
    of_group = tiles_o * others
    group, tile = tl.program_id(0) // of_group, tl.program_id(0) % of_group
    other, tile_o = tl.swizzle2d(tile // tiles_o, tile % tiles_o, others, tiles_o, 8)
    return group, tile_o, other


Tile = tuple[int, int, int, int]  # two blocks of the result, that of the sum, warps
PRODUCT_TILES: dict[str, list[Tile]] = {
    "half": [(128, 128, 32, 8), (64, 128, 32, 4), (128, 64, 32, 4), (64, 64, 32, 4), (32, 64, 64, 8), (64, 16, 64, 4)],
    "float32": [(128, 64, 16, 8), (64, 64, 32, 8), (64, 64, 16, 4), (32, 64, 32, 8), (64, 16, 32, 4)],
}
GRADIENT_TILES: dict[str, list[Tile]] = {
    "half": [(64, 128, 32, 8), (128, 64, 32, 8), (64, 64, 32, 4), (32, 64, 64, 8), (64, 16, 64, 8)],
    "float32": [(128, 64, 16, 8), (64, 128, 16, 8), (64, 64, 16, 4), (32, 64, 32, 8), (64, 16, 32, 4), (32, 32, 16, 4)],
}
"""float32 tiles are smaller: at full precision a number takes two registers, and a product is three products."""
LARGE_FOR_VALUES = {(128, 64, 32, 4), (64, 16, 64, 4), (64, 64, 32, 8)}
"""Tiles that leave too few registers to expand a weight from its values. The other tiles get up to 255 registers for
it, because ptxas alone allots fewer and spills. Products with a dense weight keep the choice of ptxas: 255 registers
would cost occupancy."""


def _tuning(operand: str, blocks: Sequence[str], tiles: dict[str, list[Tile]], key: Sequence[str]) -> dict[str, Any]:
    """Arguments of the autotuner: all tiles, and a filter by the dtype of an operand."""

    def config(tile: Tile) -> triton.Config:
        return triton.Config(dict(zip(blocks, tile, strict=False)), num_warps=tile[3], num_stages=3)

    configs = {
        (kind, of_values): [config(tile) for tile in of_kind if not (of_values and tile in LARGE_FOR_VALUES)]
        for kind, of_kind in tiles.items()
        for of_values in (False, True)
    }

    def prune(_: list[triton.Config], arguments: dict[str, Any], **__: Any) -> list[triton.Config]:
        of_values = isinstance(arguments["weight"], tuple)
        chosen = configs["float32" if arguments[operand].dtype == torch.float32 else "half", of_values]
        for config in chosen if of_values else ():
            config.maxnreg = None if torch.version.hip else 255
        return chosen

    return {
        "configs": configs["half", False] + configs["float32", False],
        "key": list(key),
        "prune_configs_by": {"early_config_prune": prune},
        "do_bench": partial(triton.testing.do_bench, warmup=5, rep=20),  # ms; launches take a tenth of one
        "cache_results": True,  # the next process need not tune
    }


@triton.autotune(
    **_tuning(
        "source",
        ("BLOCK_O", "BLOCK_P", "BLOCK_K"),
        PRODUCT_TILES,
        ("scale", "outputs", "channels", "KERNEL", "STRIDE", "TRANSPOSED", "BATCH_INNER", "PRECISION"),
    )
)
@triton.jit(do_not_specialize=["scale"])
def product_kernel(
    source, source_strides, source_size, weight, mask, selection, bias, result, result_strides, result_size,
    batch, channels, outputs, part_stride, scale,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr, BATCH_INNER: tl.constexpr, MIXED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A layer's output; if TRANSPOSED, the gradient of its input, gathered from that of its output.

    channels, outputs: of source and result, in each group. scale: the bit length of the number of pixels, by which
    tiles are tuned. Program ids: (tile of a group, part of the sum). `result` holds the parts part_stride apart.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    pixels = batch * result_size[0] * result_size[1]
    group, tile_o, tile_p = _tile(tl.cdiv(outputs, BLOCK_O), tl.cdiv(pixels, BLOCK_P))
    output = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    n, line, column = _pixel(p, result_size, batch, BATCH_INNER)
    threshold, tie = threshold_of(selection)
    source += (group * channels).to(tl.int64) * source_strides[1]
    row = (outputs if TRANSPOSED else channels) * TAPS  # weights of one output of the layer

    total = tl.zeros([BLOCK_O, BLOCK_P], tl.float32)
    first_block, past = _part(tl.cdiv(channels * TAPS, BLOCK_K) if MIXED else tl.cdiv(channels, BLOCK_K) * TAPS)
    for block in range(first_block, past):
        first, channel, tap = _weights_of_block(block, KERNEL, MIXED, BLOCK_K)
        exists = channel < channels
        if TRANSPOSED:
            base = (group * channels + first).to(tl.int64) * row
            local = (output * TAPS)[:, None] + ((channel - first) * row + tap)[None, :]
        else:
            base = (group * outputs + tile_o * BLOCK_O).to(tl.int64) * row
            local = (tl.arange(0, BLOCK_O) * row)[:, None] + (channel * TAPS + tap)[None, :]
        inside = (output < outputs)[:, None] & exists[None, :]
        tile = kept_weight(weight, mask, threshold, tie, base, local, inside)
        gathered = _gathered(
            source, source_strides, source_size, channel, exists, tap, n, line, column, p < pixels,
            KERNEL, STRIDE, PADDING, DILATION, TRANSPOSED, MIXED,
        )  # fmt: skip
        total = tl.dot(tile, gathered, total, input_precision=PRECISION)

    output_channel = (group * outputs + output).to(tl.int64)
    if bias is not None:
        total += tl.load(bias + output_channel, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    result += tl.program_id(1).to(tl.int64) * part_stride
    pixel = n * result_strides[0] + line.to(tl.int64) * result_strides[2] + column.to(tl.int64) * result_strides[3]
    place = output_channel[:, None] * result_strides[1] + pixel[None, :]
    inside = (output < outputs)[:, None] & (p < pixels)[None, :]
    tl.store(result + place, total.to(result.dtype.element_ty), mask=inside)


@triton.autotune(
    **_tuning(
        "x",
        ("BLOCK_O", "BLOCK_K", "BLOCK_P"),
        GRADIENT_TILES,
        ("scale", "outputs", "channels", "KERNEL", "STRIDE", "BATCH_INNER", "PRECISION"),
    )
)
@triton.jit(do_not_specialize=["scale"])
def gradient_kernel(
    grad, grad_strides, grad_size, x, x_strides, x_size, parts, weight, scores, mask, selection, free_mask,
    grad_scores, grad_weight, batch, channels, outputs, part_stride, scale,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    BATCH_INNER: tl.constexpr, MIXED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradients of scores and weight, summed over all pixels; with `parts`, parts of that of the effective weight.

    Program ids: (tile of a group's weights, part of the sum).
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    row = channels * TAPS
    blocks_k = tl.cdiv(row, BLOCK_K) if MIXED else tl.cdiv(channels, BLOCK_K) * TAPS
    group, tile_o, block = _tile(tl.cdiv(outputs, BLOCK_O), blocks_k)
    output = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    _, channel, tap = _weights_of_block(block, KERNEL, MIXED, BLOCK_K)
    x += (group * channels).to(tl.int64) * x_strides[1]
    grad += (group * outputs).to(tl.int64) * grad_strides[1]
    pixels = batch * grad_size[0] * grad_size[1]

    total = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    first_block, past = _part(tl.cdiv(pixels, BLOCK_P))
    for pixel_block in range(first_block, past):
        p = pixel_block * BLOCK_P + tl.arange(0, BLOCK_P)
        n, line, column = _pixel(p, grad_size, batch, BATCH_INNER)
        pixel = n * grad_strides[0] + line.to(tl.int64) * grad_strides[2] + column.to(tl.int64) * grad_strides[3]
        place = output.to(tl.int64)[:, None] * grad_strides[1] + pixel[None, :]
        tile = tl.load(grad + place, mask=(output < outputs)[:, None] & (p < pixels)[None, :], other=0.0)
        gathered = _gathered(
            x, x_strides, x_size, channel, channel < channels, tap, n, line, column, p < pixels,
            KERNEL, STRIDE, PADDING, DILATION, False, MIXED,
        )  # fmt: skip
        total = tl.dot(tile, gathered.trans(), total, input_precision=PRECISION)

    base = (group * outputs + tile_o * BLOCK_O).to(tl.int64) * row
    local = (tl.arange(0, BLOCK_O) * row)[:, None] + (channel * TAPS + tap)[None, :]
    inside = (output < outputs)[:, None] & (channel < channels)[None, :]
    if parts is not None:
        parts += tl.program_id(1).to(tl.int64) * part_stride
        tl.store(parts + base + local, total, mask=inside)
    else:
        threshold, tie = threshold_of(selection)
        store_gradients(
            total, base, local, inside, weight, scores, mask, threshold, tie, free_mask, grad_scores, grad_weight
        )  # fmt: skip


_configurations: dict[tuple[Any, ...], dict[str, Any]] = {}
"""The tuned configuration of each kind of launch, as keyword arguments of the kernel."""
_one_at_a_time = threading.Lock()  # an autotuner holds the arguments of one launch


def _launch(kernel: Any, tuned: tuple[int, ...], grid: Any, *arguments: Any, **constants: Any) -> None:
    """Launch an autotuned kernel. A kind of launch that was tuned passes the autotuner by, whose key is slower.

    While a CUDA graph is captured, nothing can be timed. A kind that was not tuned takes its first configuration then.

    Args:
        kernel: The kernel, with its autotuner.
        tuned: The sizes that the autotuner's key depends on.
        grid: Returns the number of programs of a configuration.
        arguments: Of the kernel.
        constants: Of the kernel.
    """
    kind = kernel, *tuned, *constants.values(), *[getattr(a, "dtype", None) for a in arguments]
    if (configuration := _configurations.get(kind)) is None:
        with _one_at_a_time:
            if arguments[0].is_cuda and torch.cuda.is_current_stream_capturing():
                kernel.nargs = dict(zip(kernel.arg_names, arguments, strict=False))
                configuration = kernel.prune_configs(constants)[0].all_kwargs()
            else:
                kernel[grid](*arguments, **constants)
                remember(_configurations, kind, kernel.best_config.all_kwargs())
                return
    kernel.fn.run(*arguments, grid=grid(configuration), warmup=False, **constants, **configuration)


def _precision() -> str:
    """How float32 tiles are multiplied, by the precision that PyTorch's matrix products are set to."""
    if torch.version.hip:
        return "ieee"
    return "tf32" if precision("cuda").startswith("tf32") else "tf32x3"


def _parts(rows: int, columns: int, length: int, groups: int) -> int:
    """The number of parts into which each sum, of `length` terms, of a matrix (rows, columns) is split."""
    tiles = ceil_div(rows, 64) * ceil_div(columns, 64) * groups
    return max(1, min(PROGRAMS // tiles, length // PART, MOST_PARTS))


def _batch_inner(t: Tensor) -> bool:
    return t.shape[0] > 1 and t.stride(0) == 1


def _pixels(t: Tensor) -> int:
    return t.shape[0] * t.shape[2] * t.shape[3]


def product(
    source: Tensor, weight: Weight, mask: Mask, bias: Tensor | None, geometry: Geometry, result: Tensor,
    transposed: bool,
) -> OutputParts | None:  # fmt: skip
    """Compute a layer's output, or the gradient of its input.

    Args:
        source: x (N, C, H, W); if transposed, the gradient of the output.
        weight: (O, C/groups, R, S), or its free and frozen values.
        mask: The mask of the weight; for values the bitmap pattern.
        bias: (O,).
        geometry: Of the layer.
        result: The output (N, O, H', W'); if transposed, the gradient of x. It is dense in memory, and filled here.
        transposed: Whether the gradient of the input is computed.

    Returns:
        None, or the parts of the result, which `finish` must add up.
    """
    if result.numel() == 0:
        return None
    weight = weight.contiguous() if isinstance(weight, Tensor) else tuple(values.contiguous() for values in weight)
    groups = geometry.groups
    channels, outputs, pixels = source.shape[1] // groups, result.shape[1] // groups, _pixels(result)
    count = _parts(outputs, pixels, channels * geometry.taps, groups)
    parts = result if count == 1 else result.new_empty((count, result.numel()), dtype=torch.float32)

    def grid(tile: dict[str, Any]) -> tuple[int, int]:
        return ceil_div(outputs, tile["BLOCK_O"]) * ceil_div(pixels, tile["BLOCK_P"]) * groups, count

    scale = pixels.bit_length()
    _launch(
        product_kernel, (channels, outputs, scale), grid,
        source, source.stride(), tuple(source.shape[2:]), weight, mask.data, mask.selection,
        bias if count == 1 else None, parts, result.stride(), tuple(result.shape[2:]), result.shape[0],
        channels, outputs, result.numel(), scale,
        **geometry.constants(), TRANSPOSED=transposed, BATCH_INNER=_batch_inner(result),
        MIXED=geometry.taps > 1 and channels <= FEW_CHANNELS, PRECISION=_precision(),
    )  # fmt: skip
    return OutputParts(parts, bias, result) if count > 1 else None


def weight_gradients(grad: Tensor, x: Tensor, geometry: Geometry, gradients: Gradients) -> GradientParts | None:
    """Compute the asked gradients from grad (N, O, H', W') and x (N, C, H, W); returns None, or parts for `finish`."""
    groups = geometry.groups
    channels, outputs, pixels = x.shape[1] // groups, grad.shape[1] // groups, _pixels(grad)
    n = grad.shape[1] * channels * geometry.taps
    if n == 0 or (gradients.of_scores is None and gradients.of_weight is None):
        return None
    count = _parts(outputs, channels * geometry.taps, pixels, groups)
    parts = None if count == 1 else x.new_empty((count, n), dtype=torch.float32)
    mixed = geometry.taps > 1 and channels <= FEW_CHANNELS

    def grid(tile: dict[str, Any]) -> tuple[int, int]:
        of_taps, size = (1, channels * geometry.taps) if mixed else (geometry.taps, channels)
        blocks = of_taps * ceil_div(size, tile["BLOCK_K"])
        return ceil_div(outputs, tile["BLOCK_O"]) * blocks * groups, count

    scale = pixels.bit_length()
    _launch(
        gradient_kernel, (channels, outputs, scale), grid,
        grad, grad.stride(), tuple(grad.shape[2:]), x, x.stride(), tuple(x.shape[2:]), parts,
        *gradients.arguments(), grad.shape[0], channels, outputs, n, scale,
        **geometry.constants(), BATCH_INNER=_batch_inner(grad), MIXED=mixed, PRECISION=_precision(),
    )  # fmt: skip
    return None if parts is None else GradientParts(parts, gradients)
