"""Dense products with the compact values of a fixed mask, for GPUs whose tensor cores beat the sparse products."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.reference import bitmap_masks
from .geometry import CONV, check_bias, check_linear, conv1d_as_2d, conv_geometry, conv_shape, fake_backward, in_rows
from .library import autocast, define, differentiable, same_kind
from .selection import pack_mask
from .sparse import SparsePattern, check_masks, kept_weights

__all__ = ["BitmapPattern", "bitmap_conv1d", "bitmap_conv2d", "bitmap_linear", "bitmap_pattern"]

_VALUES = "Tensor free_values, Tensor frozen_values, Tensor pattern"


def _fake_conv2d(
    x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: Tensor, bias: Tensor | None, shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], shape[0], *conv_shape(x, shape[2:], stride, padding, dilation))


define(
    f"bitmap_linear(Tensor x, {_VALUES}, Tensor? bias, int[] shape) -> Tensor",
    lambda x, free_values, frozen_values, pattern, bias, shape: x.new_empty(x.shape[0], shape[0]),
)
define(
    f"bitmap_linear_backward(Tensor grad, Tensor x, {_VALUES}, int[] shape, bool[] output_mask) -> (Tensor, Tensor)",
    fake_backward,
)
define(f"bitmap_conv2d(Tensor x, {_VALUES}, Tensor? bias, int[] shape, {CONV}) -> Tensor", _fake_conv2d)
define(
    f"bitmap_conv2d_backward(Tensor grad, Tensor x, {_VALUES}, int[] shape, {CONV}, bool[] output_mask) -> "
    "(Tensor, Tensor)",
    fake_backward,
)


def _plain_weight(free_values: Tensor, frozen_values: Tensor, pattern: Tensor, shape: list[int]) -> Tensor:
    """The dense weight of the values, constant outside the free mask."""
    mask, free = bitmap_masks(pattern, shape)
    weight = free_values.new_zeros(math.prod(shape))
    for at, values in ((free, free_values), (mask & ~free, frozen_values.detach())):
        where = torch.nonzero_static(at.reshape(-1), size=values.numel()).squeeze(1)
        weight = weight.index_put((where,), values)
    return weight.reshape(shape)


def _plain_linear(
    x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: Tensor, bias: Tensor | None, shape: list[int]
) -> Tensor:
    return F.linear(x, _plain_weight(free_values, frozen_values, pattern, shape), bias)


def _plain_conv2d(
    x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: Tensor, bias: Tensor | None, shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    weight = _plain_weight(free_values, frozen_values, pattern, shape)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


_linear = differentiable("bitmap_linear", gradients=(0, 1), bias=4, plain=_plain_linear)
_conv2d = differentiable("bitmap_conv2d", gradients=(0, 1), bias=4, plain=_plain_conv2d)


class BitmapPattern(NamedTuple):
    """Positions of the kept weights of a layer as bits: half a byte a weight.

    Attributes:
        words: int64, (ceil(n / 32), 2) for n weights in flat order. A row describes 32 weights: column 0 by the mask,
            column 1 by the free mask. The lower 32 bits of a number are the bits of its 32 weights, least significant
            bit first. The upper 32 bits count the set bits of all rows before it.
        shape: The shape of the weight.
        kept: The number of kept weights.
        free: The number of free weights.
    """

    words: Tensor
    shape: tuple[int, ...]
    kept: int
    free: int


def bitmap_pattern(mask: Tensor, free_mask: Tensor | None = None) -> BitmapPattern:
    """The pattern of a mask for the bitmap products. Build it once per mask.

    Args:
        mask: bool, of the weight's shape.
        free_mask: Which kept weights are trainable: bool, of the mask's shape and inside it. None means all. Then
            ``weight[free_mask]`` are the free values and ``weight[mask & ~free_mask]`` the frozen values, as in
            `sparse_pattern`.

    Returns:
        The pattern, on the device of the mask.

    Raises:
        ValueError: The masks do not match, or have 2^31 weights or more.
    """
    free = mask if free_mask is None else free_mask
    check_masks("bitmap_pattern", mask, free)
    if mask.numel() >= 2**31:
        raise ValueError(f"bitmap_pattern: a pattern holds fewer than 2^31 weights, got {mask.numel()}")
    return BitmapPattern(_words(mask, free), tuple(mask.shape), int(mask.sum()), int(free.sum()))


def as_bitmap(pattern: SparsePattern, shape: Sequence[int], free: int) -> BitmapPattern:
    """The bitmap pattern of a sparse pattern with the given number of free values. Does not synchronise a GPU."""
    kept = kept_weights(pattern, shape)
    masks = torch.zeros(2, math.prod(shape), dtype=torch.bool, device=kept.device)
    masks[0].index_fill_(0, kept, True)
    masks[1].index_put_((kept,), pattern.slot < free)
    return BitmapPattern(_words(*masks), tuple(shape), kept.numel(), free)


def _words(mask: Tensor, free_mask: Tensor) -> Tensor:
    columns = []
    for kept in (mask, free_mask):
        flat = torch.nn.functional.pad(kept.reshape(-1), (0, -kept.numel() % 32))
        count = flat.reshape(-1, 32).sum(1)
        bits = pack_mask(flat).view(torch.int32).long() & 0xFFFFFFFF
        columns.append(bits | (count.cumsum(0) - count) << 32)
    return torch.stack(columns, dim=1)


def _check(operator: str, x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: BitmapPattern) -> None:
    if not (
        free_values.shape == (pattern.free,) and frozen_values.dim() == 1
        and free_values.numel() + frozen_values.numel() == pattern.kept
    ):  # fmt: skip
        raise ValueError(
            f"{operator}: the pattern keeps {pattern.kept} weights, {pattern.free} of them free, got free_values of "
            f"{tuple(free_values.shape)} and frozen_values of {tuple(frozen_values.shape)}"
        )
    if pattern.words.device != x.device:
        raise ValueError(f"{operator}: x is on {x.device} but the pattern is on {pattern.words.device}")


def bitmap_linear(
    x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: BitmapPattern, bias: Tensor | None = None
) -> Tensor:
    """Linear layer with the compact values of a fixed mask, multiplied in dense tiles.

    It computes the same function as the sparse product: gradients reach x, the bias and the *free* values; frozen
    values are constants. A GPU expands tiles of the weight from bits and values as it loads them, and stores only the
    free entries of the gradient's tiles. So neither the dense weight nor its gradient is ever in memory. The format is
    known as bitmap encoding, e.g. in SpInfer (EuroSys 2025). Source of the layer: arXiv 2210.10209, section 3, eq. 2.

    Args:
        x: (..., I), float32, bfloat16, float16 or float64.
        free_values: (F,), of x's dtype, in the order that `bitmap_pattern` describes.
        frozen_values: (K - F,), of x's dtype, in the same order.
        pattern: The `bitmap_pattern` of a mask (O, I) that keeps K weights.
        bias: (O,), of x's dtype.

    Returns:
        (..., O). It has no second derivative.

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
    """
    if len(pattern.shape) != 2:
        raise ValueError(f"bitmap_linear: the pattern must be of a weight (O, I), got {pattern.shape}")
    out_features, in_features = pattern.shape
    check_linear("bitmap_linear", x, out_features, in_features, bias)
    _check("bitmap_linear", x, free_values, frozen_values, pattern)
    x, free_values, frozen_values, bias = autocast(x, free_values, frozen_values, bias)
    same_kind("bitmap_linear", x, free_values=free_values, frozen_values=frozen_values, bias=bias)
    return in_rows(_linear, x, free_values, frozen_values, pattern.words, bias, list(pattern.shape))


def bitmap_conv2d(
    x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: BitmapPattern, bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """2-D convolution with the compact values of a fixed mask, multiplied in dense tiles.

    Args:
        x: (N, C, H, W).
        free_values: As in `bitmap_linear`.
        frozen_values: As in `bitmap_linear`.
        pattern: The `bitmap_pattern` of a mask (O, C/groups, R, S).
        bias: (O,).
        stride: One or two integers of at least 1, as in `torch.nn.functional.conv2d`.
        padding: One or two integers of at least 0.
        dilation: One or two integers of at least 1.
        groups: Divides O and C.

    Returns:
        (N, O, H', W').

    Raises:
        ValueError: As in `bitmap_linear`, or the kernel is larger than the padded image.
    """
    shape = pattern.shape
    if len(shape) != 4:
        raise ValueError(f"bitmap_conv2d: the pattern must be of a weight (O, C/groups, R, S), got {shape}")
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"bitmap_conv2d: groups must divide the {shape[0]} output channels, got {groups}")
    geometry = conv_geometry("bitmap_conv2d", x, shape[1] * groups, shape[2:], stride, padding, dilation)
    check_bias("bitmap_conv2d", bias, shape[0])
    _check("bitmap_conv2d", x, free_values, frozen_values, pattern)
    x, free_values, frozen_values, bias = autocast(x, free_values, frozen_values, bias)
    same_kind("bitmap_conv2d", x, free_values=free_values, frozen_values=frozen_values, bias=bias)
    return _conv2d(x, free_values, frozen_values, pattern.words, bias, list(shape), *geometry, groups)


def bitmap_conv1d(
    x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: BitmapPattern, bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """1-D convolution with the compact values of a fixed mask: x (N, C, L) to (N, O, L').

    Args and errors are those of `bitmap_conv2d`, with one dimension less; the mask is (O, C/groups, S).
    """
    if len(pattern.shape) != 3:
        raise ValueError(f"bitmap_conv1d: the pattern must be of a weight (O, C/groups, S), got {pattern.shape}")
    x, steps, pads, gaps = conv1d_as_2d("bitmap_conv1d", x, stride, padding, dilation)
    flat = pattern._replace(shape=(*pattern.shape[:2], 1, pattern.shape[2]))
    return bitmap_conv2d(x, free_values, frozen_values, flat, bias, steps, pads, gaps, groups).squeeze(2)
