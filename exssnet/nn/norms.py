"""Norms and pools that keep the layout of the sparse kernels: a batch stored innermost stays innermost."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import batch_norm_act


def batch_innermost(x: Tensor) -> bool:
    """Whether x (N, C, ...) is stored as (C, ..., N), as the sparse kernels return it, and is not contiguous too."""
    return x.stride(0) == 1 and not x.is_contiguous() and x.movedim(0, -1).is_contiguous()


class TaskBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Base of both batch norms: ``norm(x, residual, relu=True)`` is ``relu(norm(x) + residual)``.

    For a batch stored innermost, in float32 or float64, this is one operation, see `batch_norm_act`.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = False,
                 **options: Any) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        alike = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
        if alike and x.dtype in (torch.float32, torch.float64) and batch_innermost(x):
            return self._fused(x, residual, relu)
        y = super().forward(x)
        if residual is not None:
            y = y.add_(residual) if alike and y.dtype == x.dtype else y + residual
        return y.relu_() if relu else y

    def _fused(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        self._check_input_dim(x)
        track = self.training and self.track_running_stats and self.running_mean is not None
        given = (None, None) if self.training else (self.running_mean, self.running_var)
        y, mean, var = batch_norm_act(x, residual, self.weight, self.bias, *given, self.eps, relu)
        if track:
            self._update(mean, var, x.numel() // x.shape[1])
        return y

    def _update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Update the running statistics as `nn.BatchNorm2d` does: unbiased variance; a mean if momentum is None."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            step = self.momentum
        else:
            step = 1 / float(self.num_batches_tracked) if self.num_batches_tracked is not None else 0.0
        for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
            assert running is not None
            running.lerp_(new.to(running.dtype), step)


class TaskBatchNorm1d(TaskBatchNorm, nn.BatchNorm1d):
    """Batch norm for x (N, C) or (N, C, L) with per-task statistics, which `Phases` keeps.

    It is not affine by default. ``norm(x, residual, relu=True)`` returns ``relu(norm(x) + residual)`` in x's shape. A
    batch that is stored innermost keeps its layout, and norm, sum and ReLU are one operation then.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance.
        momentum: Weight of a batch's statistics in the running statistics. None means the mean over all batches.
        affine: Whether the norm has a weight and a bias, which are per-task too.
        **options: Further options of `nn.BatchNorm1d`.
    """


class TaskBatchNorm2d(TaskBatchNorm, nn.BatchNorm2d):
    """Batch norm for x (N, C, H, W) with per-task statistics, see `TaskBatchNorm1d`."""


class _PoolInPlace(nn.Module):
    """Pools a batch that is stored innermost as a channels_last tensor, with C and N exchanged."""

    def forward(self, x: Tensor) -> Any:
        if x.dim() != 4 or not batch_innermost(x):
            return super().forward(x)
        pooled = super().forward(x.transpose(0, 1))
        return tuple(p.transpose(0, 1) for p in pooled) if isinstance(pooled, tuple) else pooled.transpose(0, 1)


class _MaxPool2d(_PoolInPlace, nn.MaxPool2d):
    pass


class _AvgPool2d(_PoolInPlace, nn.AvgPool2d):
    pass


class _AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.output_size in (1, (1, 1)):  # a mean is much faster in both layouts
            return x.mean((-2, -1), keepdim=True)
        return super().forward(x)


SWAPPED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: TaskBatchNorm1d,
    nn.BatchNorm2d: TaskBatchNorm2d,
    nn.MaxPool2d: _MaxPool2d,
    nn.AvgPool2d: _AvgPool2d,
    nn.AdaptiveAvgPool2d: _AdaptiveAvgPool2d,
}
