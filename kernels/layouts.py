"""The orders in which tensors are stored: contiguous, channels_last, and with the batch innermost."""

import torch
from torch import Tensor


def empty_batch_last(x: Tensor, *shape: int) -> Tensor:
    """A new tensor of the given shape, stored with the batch, dimension 0, innermost: (N, C, H, W) as (C, H, W, N).

    It is not a view. Autograd forbids in-place changes, such as those of ReLU, of a view that a Function returned.
    """
    return x.new_empty_strided(shape, torch.empty(*shape[1:], shape[0], device="meta").movedim(-1, 0).stride())


def batch_last(x: Tensor) -> Tensor:
    """A copy with the batch, dimension 0, stored innermost."""
    return empty_batch_last(x, *x.shape).copy_(x)


def is_innermost(x: Tensor, dim: int) -> bool:
    """Whether ``x.movedim(dim, -1)`` is contiguous. It dispatches no operator."""
    step = 1
    for d in (dim, *(d for d in range(x.dim() - 1, -1, -1) if d != dim)):
        if x.shape[d] != 1 and x.stride(d) != step:
            return x.numel() == 0
        step *= x.shape[d]
    return True


def empty_in_layout_of(x: Tensor) -> Tensor:
    """A new tensor like x (N, C, ...). Where x is neither contiguous nor has C innermost, the batch is innermost."""
    return torch.empty_like(x) if x.is_contiguous() or is_innermost(x, 1) else empty_batch_last(x, *x.shape)


def order_of(channels_last: bool) -> torch.memory_format:
    """The memory format of a weight."""
    return torch.channels_last if channels_last else torch.contiguous_format
