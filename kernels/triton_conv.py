"""Convolutions under a mask in Triton; definitions and legend in kernels/reference.py."""

from torch import Tensor

from .triton_layers import forward, masked_backward, or_reference, supermask_backward
from .triton_mask import given, selected
from .triton_product import Geometry


def _geometry(weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Geometry:
    (r, s), (down, right), (above, left), (gap_h, gap_w) = weight.shape[2:], stride, padding, dilation
    return Geometry((r, s), (down, right), (above, left), (gap_h, gap_w), groups)


@or_reference
def supermask_conv2d(
    x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, sparse: bool,
) -> Tensor:  # fmt: skip
    geometry = _geometry(weight, stride, padding, dilation, groups)
    return forward(x, weight, selected(scores, selection), bias, geometry, sparse)


@or_reference
def supermask_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, sparse: bool, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(weight, stride, padding, dilation, groups)
    return supermask_backward(grad, x, weight, scores, selection, geometry, sparse, output_mask)


@or_reference
def masked_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    return forward(x, weight, given(mask), bias, _geometry(weight, stride, padding, dilation, groups))


@or_reference
def masked_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(weight, stride, padding, dilation, groups)
    return masked_backward(grad, x, weight, mask, free_mask, geometry, output_mask)
