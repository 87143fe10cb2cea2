"""The rival of the fused layers: one pass writes the masked weight, PyTorch multiplies, one pass masks its gradient.

Signatures and results are those of the functions without `_dense`, so that both can be timed.
"""

from torch import Tensor
from torch.nn import functional as F

from . import reference
from .reference import _conv2d_gradients, _linear_gradients, _stored
from .triton_layers import new_gradient, or_empty, served
from .triton_mask import Mask, effective_weight, given, gradients_from_parts, selected


def _supermask_gradients(
    grad_effective: Tensor, weight: Tensor, scores: Tensor, mask: Mask, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_scores, grad_weight = new_gradient(scores, output_mask[1]), new_gradient(weight, output_mask[2])
    if output_mask[1] or output_mask[2]:
        gradients_from_parts(grad_effective.contiguous()[None], weight, mask, None, grad_scores, grad_weight)
    return or_empty(grad_scores, scores), or_empty(grad_weight, weight)


def _masked_gradient(grad_effective: Tensor, weight: Tensor, mask: Mask, free_mask: Tensor | None) -> Tensor:
    grad_weight = weight.new_empty(weight.shape)
    free = None if free_mask is None else given(free_mask)
    gradients_from_parts(grad_effective.contiguous()[None], weight, mask, free, None, grad_weight)
    return grad_weight


def supermask_linear_dense(
    x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, bias: Tensor | None, sparse: bool
) -> Tensor:
    if not served(x, weight, scores):
        return reference.supermask_linear(x, weight, scores, selection, bias, sparse)
    return _stored(F.linear(x, effective_weight(weight, selected(scores, selection)), bias), sparse)


def supermask_linear_dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, sparse: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if not served(x, weight, scores):
        return reference.supermask_linear_backward(grad, x, weight, scores, selection, sparse, output_mask)
    mask = selected(scores, selection)
    multiplied = effective_weight(weight, mask) if output_mask[0] else weight
    grad_x, effective = _linear_gradients(grad, x, multiplied, output_mask[0], output_mask[1] or output_mask[2])
    return _stored(grad_x, sparse and output_mask[0]), *_supermask_gradients(
        effective, weight, scores, mask, output_mask
    )


def supermask_conv2d_dense(
    x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, sparse: bool,
) -> Tensor:  # fmt: skip
    if not served(x, weight, scores, padding):
        return reference.supermask_conv2d(
            x, weight, scores, selection, bias, stride, padding, dilation, groups, sparse
        )  # fmt: skip
    effective = effective_weight(weight, selected(scores, selection))
    return _stored(F.conv2d(x, effective, bias, stride, padding, dilation, groups), sparse)


def supermask_conv2d_dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, sparse: bool, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not served(x, weight, scores, padding):
        return reference.supermask_conv2d_backward(
            grad, x, weight, scores, selection, stride, padding, dilation, groups, sparse, output_mask
        )  # fmt: skip
    mask = selected(scores, selection)
    multiplied = effective_weight(weight, mask) if output_mask[0] else weight
    geometry = (stride, padding, dilation, groups)
    grad_x, effective = _conv2d_gradients(
        grad, x, multiplied, geometry, output_mask[0], output_mask[1] or output_mask[2]
    )
    return _stored(grad_x, sparse and output_mask[0]), *_supermask_gradients(
        effective, weight, scores, mask, output_mask
    )


def masked_linear_dense(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    if not served(x, weight):
        return reference.masked_linear(x, weight, mask, free_mask, bias)
    return F.linear(x, effective_weight(weight, given(mask)), bias)


def masked_linear_dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    if not served(x, weight):
        return reference.masked_linear_backward(grad, x, weight, mask, free_mask, output_mask)
    kept = given(mask)
    multiplied = effective_weight(weight, kept) if output_mask[0] else weight
    grad_x, effective = _linear_gradients(grad, x, multiplied, *output_mask)
    return grad_x, _masked_gradient(effective, weight, kept, free_mask) if output_mask[1] else effective


def masked_conv2d_dense(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    if not served(x, weight, padding=padding):
        return reference.masked_conv2d(x, weight, mask, free_mask, bias, stride, padding, dilation, groups)
    return F.conv2d(x, effective_weight(weight, given(mask)), bias, stride, padding, dilation, groups).contiguous()


def masked_conv2d_dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not served(x, weight, padding=padding):
        return reference.masked_conv2d_backward(
            grad, x, weight, mask, free_mask, stride, padding, dilation, groups, output_mask
        )  # fmt: skip
    kept = given(mask)
    multiplied = effective_weight(weight, kept) if output_mask[0] else weight
    grad_x, effective = _conv2d_gradients(grad, x, multiplied, (stride, padding, dilation, groups), *output_mask)
    return grad_x, _masked_gradient(effective, weight, kept, free_mask) if output_mask[1] else effective
