"""Checks and shapes that linear layers and convolutions share; 1-D convolutions as 2-D ones."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .library import pair, single


def conv_geometry(
    operator: str,
    x: Tensor,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """(stride, padding, dilation), checked once a shape, two numbers each, of a convolution over x (N, C, H, W)."""
    arguments = operator, x.shape, in_channels, tuple(kernel_size), stride, padding, dilation
    if torch.compiler.is_compiling():
        return _checked.__wrapped__(*arguments)
    try:
        return _checked(*arguments)
    except TypeError:  # lists, and sizes that a trace leaves open, are no keys
        return _checked.__wrapped__(*arguments)


@functools.lru_cache(4096, typed=True)
def _checked(
    operator: str,
    shape: Sequence[int],
    in_channels: int,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    if len(shape) != 4:
        raise ValueError(f"{operator}: x must have 4 dimensions (N, C, H, W), got {len(shape)}")
    if shape[1] != in_channels:
        raise ValueError(f"{operator}: expected x with {in_channels} channels, got {shape[1]}")
    steps = tuple(pair(operator, "stride", stride, 1))
    pads = tuple(pair(operator, "padding", padding, 0))
    gaps = tuple(pair(operator, "dilation", dilation, 1))
    for size, pad, gap, taps in zip(shape[2:], pads, gaps, kernel_size, strict=True):
        reach = gap * (taps - 1) + 1
        if size + 2 * pad < reach:
            raise ValueError(
                f"{operator}: the kernel spans {reach} pixels but the padded image has only {size + 2 * pad}"
            )
    return steps, pads, gaps


def conv_shape(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """(H', W') of the output of a convolution."""
    return [
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]


CONV = "int[] stride, int[] padding, int[] dilation, int groups"


def fake_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, also: Tensor | None, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """The output's shape of a convolution with a dense weight (O, C/groups, R, S), under any mask."""
    return x.new_empty(x.shape[0], weight.shape[0], *conv_shape(x, weight.shape[2:], stride, padding, dilation))


def fake_backward(grad: Tensor, x: Tensor, trained: Tensor, *rest: object) -> tuple[Tensor, ...]:
    """Shapes of the gradients of x and of the trained tensor; empty where the output mask is False."""
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else t.new_empty(0)
        for t, needed in zip((x, trained), rest[-1], strict=True)  # type: ignore[call-overload]
    )


def conv1d_as_2d(
    operator: str,
    x: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Tensor, list[int], list[int], list[int]]:
    """x (N, C, L) as an image of height 1, with its geometry."""
    if x.dim() != 3:
        raise ValueError(f"{operator}: x must have 3 dimensions (N, C, L), got {x.dim()}")
    return (
        x.unsqueeze(2),
        [1, single(operator, "stride", stride, 1)],
        [0, single(operator, "padding", padding, 0)],
        [1, single(operator, "dilation", dilation, 1)],
    )


def check_bias(operator: str, bias: Tensor | None, out_features: int) -> None:
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{operator}: bias must have shape ({out_features},), got {tuple(bias.shape)}")


def check_groups(operator: str, weight: Tensor, groups: int) -> None:
    if weight.dim() != 4:
        raise ValueError(f"{operator}: weight must have shape (O, C/groups, R, S), got {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{operator}: groups must divide the {weight.shape[0]} output channels, got {groups}")


def check_linear(operator: str, x: Tensor, out_features: int, in_features: int, bias: Tensor | None) -> None:
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"{operator}: expected x with {in_features} features in its last dimension, got shape {tuple(x.shape)}"
        )
    check_bias(operator, bias, out_features)


def in_rows(product: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """A product that takes x (B, I), applied to x (..., I)."""
    if x.dim() == 2:  # a view of the same shape would be a node of the graph
        return product(x, *args)
    y = product(x.reshape(-1, x.shape[-1]), *args)
    return y.reshape(*x.shape[:-1], y.shape[1])
