"""Convolutions under a mask in Triton; definitions and legend in kernels/reference.py."""

from collections.abc import Sequence

from torch import Tensor

from .triton_layers import bitmap_backward, forward, masked_backward, or_reference, or_written, supermask_backward
from .triton_mask import given, selected
from .triton_product import Geometry


def _geometry(
    shape: Sequence[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Geometry:
    (r, s), (down, right), (above, left), (gap_h, gap_w) = shape[2:], stride, padding, dilation
    return Geometry((r, s), (down, right), (above, left), (gap_h, gap_w), groups)


@or_reference
def supermask_conv2d(
    x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, sparse: bool,
) -> Tensor:  # fmt: skip
    geometry = _geometry(weight.shape, stride, padding, dilation, groups)
    return forward(x, weight, weight.shape[0], selected(scores, selection), bias, geometry, sparse)


@or_reference
def supermask_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, sparse: bool, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(weight.shape, stride, padding, dilation, groups)
    return supermask_backward(grad, x, weight, scores, selection, geometry, sparse, output_mask)


@or_written
def masked_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    geometry = _geometry(weight.shape, stride, padding, dilation, groups)
    return forward(x, weight, weight.shape[0], given(mask), bias, geometry)


@or_written
def masked_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(weight.shape, stride, padding, dilation, groups)
    return masked_backward(grad, x, weight, mask, free_mask, geometry, output_mask)


@or_reference
def bitmap_conv2d(
    x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: Tensor, bias: Tensor | None, shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    geometry = _geometry(shape, stride, padding, dilation, groups)
    return forward(x, (free_values, frozen_values), shape[0], given(pattern), bias, geometry)


@or_reference
def bitmap_conv2d_backward(
    grad: Tensor, x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: Tensor, shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(shape, stride, padding, dilation, groups)
    return bitmap_backward(grad, x, free_values, frozen_values, pattern, geometry, output_mask)
