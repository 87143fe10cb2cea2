"""Linear layers under a mask in Triton; definitions and legend in kernels/reference.py."""

from torch import Tensor

from .triton_layers import bitmap_backward, forward, masked_backward, or_reference, or_written, supermask_backward
from .triton_mask import given, selected
from .triton_product import LINEAR


@or_reference
def supermask_linear(
    x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, bias: Tensor | None, sparse: bool
) -> Tensor:
    return forward(x, weight, weight.shape[0], selected(scores, selection), bias, LINEAR, sparse)


@or_reference
def supermask_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, sparse: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return supermask_backward(grad, x, weight, scores, selection, LINEAR, sparse, output_mask)


@or_written
def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None) -> Tensor:
    return forward(x, weight, weight.shape[0], given(mask), bias, LINEAR)


@or_written
def masked_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    return masked_backward(grad, x, weight, mask, free_mask, LINEAR, output_mask)


@or_reference
def bitmap_linear(
    x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: Tensor, bias: Tensor | None, shape: list[int]
) -> Tensor:
    return forward(x, (free_values, frozen_values), shape[0], given(pattern), bias, LINEAR)


@or_reference
def bitmap_linear_backward(
    grad: Tensor, x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: Tensor, shape: list[int],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return bitmap_backward(grad, x, free_values, frozen_values, pattern, LINEAR, output_mask)
