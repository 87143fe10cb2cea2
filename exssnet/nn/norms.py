"""Norms and pools that keep the layout of the sparse kernels: a batch stored innermost stays innermost."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.layouts import is_innermost
from ..ops.norm import normalised, takes_any_layout


def batch_innermost(x: Tensor) -> bool:
    """Whether x (N, C, ...) is stored as (C, ..., N), as the sparse kernels return it, and is not contiguous too."""
    return not x.is_contiguous() and is_innermost(x, 0)


def _has_kernel(x: Tensor) -> bool:
    """Whether the kernels of `batch_norm_act` take x (N, C, ...) as it is, with more than one value per channel."""
    if batch_innermost(x) and x.dtype in (torch.float32, torch.float64):
        return True
    on_cpu = x.device.type == "cpu"
    if not (on_cpu or x.device.type in ("cuda", "meta")) or x.dim() < 2 or x.numel() <= x.shape[1]:
        return False
    dtypes = (torch.float32, torch.bfloat16) if on_cpu else (torch.float32, torch.bfloat16, torch.float16)
    if x.dtype not in dtypes or not takes_any_layout("cpu" if on_cpu else "cuda"):
        return False
    return not on_cpu if x.is_contiguous() else is_innermost(x, 1) or is_innermost(x, 0)


class TaskBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Base of both batch norms: ``norm(x, residual, relu=True)`` is ``relu(norm(x) + residual)``.

    This is one operation with a step of the running statistics, see `batch_norm_act`, where a kernel takes x: on a CPU
    for a batch stored innermost in float32, float64 or bfloat16 and for channels_last in float32 or bfloat16, on a GPU
    for every layout in float32, bfloat16 or float16.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = False,
                 **options: Any) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        alike = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
        if alike and _has_kernel(x):
            return self._fused(x, residual, relu)
        y = super().forward(x)
        if residual is not None:
            y = y.add_(residual) if alike and y.dtype == x.dtype else y + residual
        return y.relu_() if relu else y

    def _fused(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        self._check_input_dim(x)
        mean, var, batches, momentum = self.running_mean, self.running_var, self.num_batches_tracked, self.momentum
        if not self.training:
            return normalised(x, residual, self.weight, self.bias, mean, var, (None,) * 4, self.eps, relu)[0]
        if mean is None or not self.track_running_stats:
            mean = var = batches = None
        if momentum is None and batches is None:
            momentum = 0.0
        running = mean, var, batches, momentum
        return normalised(x, residual, self.weight, self.bias, None, None, running, self.eps, relu)[0]


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
        if self.output_size not in (1, (1, 1)):
            return super().forward(x)
        if x.dim() == 4 and batch_innermost(x):  # the gradient is stored so too
            return x.permute(1, 2, 3, 0).mean((1, 2), keepdim=True).permute(3, 0, 1, 2)
        return x.mean((-2, -1), keepdim=True)  # a mean is much faster in both layouts


SWAPPED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: TaskBatchNorm1d,
    nn.BatchNorm2d: TaskBatchNorm2d,
    nn.MaxPool2d: _MaxPool2d,
    nn.AvgPool2d: _AvgPool2d,
    nn.AdaptiveAvgPool2d: _AdaptiveAvgPool2d,
}
