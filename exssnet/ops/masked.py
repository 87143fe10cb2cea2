"""Products with a dense weight under a given mask, for users who keep their own weight and optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.reference import bool_mask
from .geometry import (
    CONV,
    check_bias,
    check_groups,
    check_linear,
    conv1d_as_2d,
    conv_geometry,
    fake_backward,
    fake_conv2d,
    in_rows,
)
from .library import autocast, define, differentiable, same_kind

__all__ = ["masked_conv1d", "masked_conv2d", "masked_linear"]

define(
    "masked_linear(Tensor x, Tensor weight, Tensor mask, Tensor? free_mask, Tensor? bias) -> Tensor",
    lambda x, weight, mask, free_mask, bias: x.new_empty(x.shape[0], weight.shape[0]),
)
define(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor mask, Tensor? free_mask, "
    "bool[] output_mask) -> (Tensor, Tensor)",
    fake_backward,
)
define(
    f"masked_conv2d(Tensor x, Tensor weight, Tensor mask, Tensor? free_mask, Tensor? bias, {CONV}) -> Tensor",
    fake_conv2d,
)
define(
    f"masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor mask, Tensor? free_mask, {CONV}, "
    "bool[] output_mask) -> (Tensor, Tensor)",
    fake_backward,
)


def _plain_weight(weight: Tensor, mask: Tensor, free_mask: Tensor | None) -> Tensor:
    """weight * mask, constant outside the free mask."""
    mask = bool_mask(mask, weight)
    free = mask if free_mask is None else mask & bool_mask(free_mask, weight)
    return weight.where(free, weight.detach().where(mask, 0))


def _plain_linear(x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, _plain_weight(weight, mask, free_mask), bias)


def _plain_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    return F.conv2d(x, _plain_weight(weight, mask, free_mask), bias, stride, padding, dilation, groups)


_linear = differentiable("masked_linear", gradients=(0, 1), bias=4, plain=_plain_linear)
_conv2d = differentiable("masked_conv2d", gradients=(0, 1), bias=4, plain=_plain_conv2d)


def _check_masks(operator: str, weight: Tensor, **masks: Tensor | None) -> None:
    n = weight.numel()
    for name, mask in masks.items():
        if mask is None:
            continue
        if not (
            (mask.dtype == torch.bool and mask.shape == weight.shape)
            or (mask.dtype == torch.uint8 and mask.shape == (-(-n // 8),))
        ):
            raise ValueError(
                f"{operator}: {name} must be bool of shape {tuple(weight.shape)} or packed uint8 of {-(-n // 8)} bytes"
                f", got {mask.dtype} of {tuple(mask.shape)}"
            )
        if mask.device != weight.device:
            raise ValueError(f"{operator}: weight is on {weight.device} but {name} on {mask.device}")


def masked_linear(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    r"""Linear layer with a masked dense weight: :math:`y = x (W \odot M)^T + b`.

    The weight's gradient has the weight's shape and is zero outside ``mask & free_mask``. A zero gradient alone does
    not freeze a weight under momentum or weight decay: see `exssnet.freeze_weights`. Source: arXiv 2210.10209,
    section 3, eq. 2.

    Args:
        x: (..., I), float32, bfloat16, float16 or float64.
        weight: (O, I), of x's dtype.
        mask: bool of the weight's shape, or packed by `pack_mask`.
        free_mask: Which kept weights are trainable, in either form. None means all.
        bias: (O,), of x's dtype.

    Returns:
        (..., O). It has no second derivative.

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
    """
    if weight.dim() != 2:
        raise ValueError(f"masked_linear: weight must have shape (O, I), got {tuple(weight.shape)}")
    check_linear("masked_linear", x, weight.shape[0], weight.shape[1], bias)
    _check_masks("masked_linear", weight, mask=mask, free_mask=free_mask)
    x, weight, bias = autocast(x, weight, bias)
    same_kind("masked_linear", x, weight=weight, bias=bias)
    return in_rows(_linear, x, weight, mask, free_mask, bias)


def masked_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None = None, bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """2-D convolution with a masked dense weight; masks and gradients as in `masked_linear`.

    Args:
        x: (N, C, H, W).
        weight: (O, C/groups, R, S).
        mask: As in `masked_linear`.
        free_mask: As in `masked_linear`.
        bias: (O,).
        stride: One or two integers of at least 1, as in `torch.nn.functional.conv2d`.
        padding: One or two integers of at least 0.
        dilation: One or two integers of at least 1.
        groups: Divides O and C.

    Returns:
        (N, O, H', W').

    Raises:
        ValueError: As in `masked_linear`, or the kernel is larger than the padded image.
    """
    check_groups("masked_conv2d", weight, groups)
    geometry = conv_geometry("masked_conv2d", x, weight.shape[1] * groups, weight.shape[2:], stride, padding, dilation)
    check_bias("masked_conv2d", bias, weight.shape[0])
    _check_masks("masked_conv2d", weight, mask=mask, free_mask=free_mask)
    x, weight, bias = autocast(x, weight, bias)
    same_kind("masked_conv2d", x, weight=weight, bias=bias)
    return _conv2d(x, weight, mask, free_mask, bias, *geometry, groups)


def masked_conv1d(
    x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None = None, bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """1-D convolution with a masked dense weight: x (N, C, L) and weight (O, C/groups, S) to (N, O, L').

    Args and errors are those of `masked_conv2d`, with one dimension less.
    """
    if weight.dim() != 3:
        raise ValueError(f"masked_conv1d: weight must have shape (O, C/groups, S), got {tuple(weight.shape)}")
    x, steps, pads, gaps = conv1d_as_2d("masked_conv1d", x, stride, padding, dilation)
    mask = mask.unsqueeze(2) if mask.dtype == torch.bool and mask.dim() == 3 else mask
    if free_mask is not None and free_mask.dtype == torch.bool and free_mask.dim() == 3:
        free_mask = free_mask.unsqueeze(2)
    return masked_conv2d(x, weight.unsqueeze(2), mask, free_mask, bias, steps, pads, gaps, groups).squeeze(2)
