"""The rival of the fused layers: one pass writes the masked weight, PyTorch multiplies, one pass masks its gradient.

Names, signatures and results are those of the fused ones, so that both can be timed.
"""

from torch import Tensor
from torch.nn import functional as F

from .reference import _conv2d_gradients, _linear_gradients, _stored
from .triton_layers import new_gradient, or_empty, or_reference
from .triton_mask import GradientParts, Gradients, Mask, effective_weight, finish, given, selected


def _supermask_gradients(
    grad_effective: Tensor, weight: Tensor, scores: Tensor, mask: Mask, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_scores, grad_weight = new_gradient(scores, output_mask[1]), new_gradient(weight, output_mask[2])
    if output_mask[1] or output_mask[2]:
        gradients = Gradients(weight, scores, mask, None, grad_scores, grad_weight)
        finish(None, GradientParts(grad_effective.contiguous()[None], gradients))
    return or_empty(grad_scores, scores), or_empty(grad_weight, weight)


def _masked_gradient(grad_effective: Tensor, weight: Tensor, mask: Mask, free_mask: Tensor | None) -> Tensor:
    grad_weight = weight.new_empty(weight.shape)
    free = None if free_mask is None else given(free_mask)
    gradients = Gradients(weight, None, mask, free, None, grad_weight)
    finish(None, GradientParts(grad_effective.contiguous()[None], gradients))
    return grad_weight


@or_reference
def supermask_linear(
    x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, bias: Tensor | None, sparse: bool
) -> Tensor:
    return _stored(F.linear(x, effective_weight(weight, selected(scores, selection)), bias), sparse)


@or_reference
def supermask_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, sparse: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    mask = selected(scores, selection)
    multiplied = effective_weight(weight, mask) if output_mask[0] else weight
    grad_x, effective = _linear_gradients(grad, x, multiplied, output_mask[0], output_mask[1] or output_mask[2])
    return _stored(grad_x, sparse and output_mask[0]), *_supermask_gradients(
        effective, weight, scores, mask, output_mask
    )


@or_reference
def supermask_conv2d(
    x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, sparse: bool,
) -> Tensor:  # fmt: skip
    effective = effective_weight(weight, selected(scores, selection))
    return _stored(F.conv2d(x, effective, bias, stride, padding, dilation, groups), sparse)


@or_reference
def supermask_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, sparse: bool, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mask = selected(scores, selection)
    multiplied = effective_weight(weight, mask) if output_mask[0] else weight
    geometry = (stride, padding, dilation, groups)
    grad_x, effective = _conv2d_gradients(
        grad, x, multiplied, geometry, output_mask[0], output_mask[1] or output_mask[2]
    )
    return _stored(grad_x, sparse and output_mask[0]), *_supermask_gradients(
        effective, weight, scores, mask, output_mask
    )


@or_reference
def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, effective_weight(weight, given(mask)), bias)


@or_reference
def masked_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    kept = given(mask)
    multiplied = effective_weight(weight, kept) if output_mask[0] else weight
    grad_x, effective = _linear_gradients(grad, x, multiplied, *output_mask)
    return grad_x, _masked_gradient(effective, weight, kept, free_mask) if output_mask[1] else effective


@or_reference
def masked_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    return F.conv2d(x, effective_weight(weight, given(mask)), bias, stride, padding, dilation, groups).contiguous()


@or_reference
def masked_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept = given(mask)
    multiplied = effective_weight(weight, kept) if output_mask[0] else weight
    grad_x, effective = _conv2d_gradients(grad, x, multiplied, (stride, padding, dilation, groups), *output_mask)
    return grad_x, _masked_gradient(effective, weight, kept, free_mask) if output_mask[1] else effective
