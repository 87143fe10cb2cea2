"""Norms and pools that keep the layout of the sparse products: a batch stored innermost stays so."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import batch_norm_act


def batch_innermost(x: Tensor) -> bool:
    """Whether x is stored (C, ..., N), as the sparse products return it, and not in plain order as well."""
    return not x.is_contiguous() and x.movedim(0, -1).is_contiguous()


class TaskBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What both batch norms share: ``norm(x, residual, relu=True)`` is ``relu(norm(x) + residual)``.

    Of a batch stored innermost, in float32 or float64, that is one operation, see `batch_norm_act`.
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
        """The running statistics, as `nn.BatchNorm2d` keeps them: unbiased, and with momentum None their mean."""
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
    """Batch norm that belongs to one task at a time: not affine by default; `Phases` keeps its statistics per task.

    x (N, C) or (N, C, L); a batch stored innermost is normalised where it lies. residual, of x's shape, is added and
    ReLU taken in the same pass.
    """


class TaskBatchNorm2d(TaskBatchNorm, nn.BatchNorm2d):
    """Batch norm that belongs to one task at a time, for x (N, C, H, W); see `TaskBatchNorm1d`."""


class _PoolInPlace(nn.Module):
    """Pools a batch that is stored innermost: with C and N exchanged it is an ordinary channels_last tensor."""

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
        if self.output_size in (1, (1, 1)):  # the mean of a whole image is much faster in either layout
            return x.mean((-2, -1), keepdim=True)
        return super().forward(x)


SWAPPED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: TaskBatchNorm1d,
    nn.BatchNorm2d: TaskBatchNorm2d,
    nn.MaxPool2d: _MaxPool2d,
    nn.AvgPool2d: _AvgPool2d,
    nn.AdaptiveAvgPool2d: _AdaptiveAvgPool2d,
}
