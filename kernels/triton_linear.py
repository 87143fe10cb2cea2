"""Linear layers under a mask in Triton; definitions and legend in kernels/reference.py."""

from torch import Tensor

from . import reference
from .triton_layers import forward, masked_backward, served, supermask_backward
from .triton_mask import given, selected
from .triton_product import LINEAR


def supermask_linear(
    x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, bias: Tensor | None, sparse: bool
) -> Tensor:
    if not served(x, weight, scores):
        return reference.supermask_linear(x, weight, scores, selection, bias, sparse)
    return forward(x, weight, selected(scores, selection), bias, LINEAR, sparse)


def supermask_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, sparse: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if not served(x, weight, scores):
        return reference.supermask_linear_backward(grad, x, weight, scores, selection, sparse, output_mask)
    return supermask_backward(grad, x, weight, scores, selection, LINEAR, sparse, output_mask)


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None) -> Tensor:
    if not served(x, weight):
        return reference.masked_linear(x, weight, mask, free_mask, bias)
    return forward(x, weight, given(mask), bias, LINEAR)


def masked_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    if not served(x, weight):
        return reference.masked_linear_backward(grad, x, weight, mask, free_mask, output_mask)
    return masked_backward(grad, x, weight, mask, free_mask, LINEAR, output_mask)
