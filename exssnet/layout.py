"""Norms and pools that keep the layout of the sparse products: a batch stored innermost stays so."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def batch_innermost(x: Tensor) -> bool:
    """Whether x is stored (C, ..., N), as the sparse products return it, and not in plain order as well."""
    return not x.is_contiguous() and x.movedim(0, -1).is_contiguous()


class TaskBatchNorm1d(nn.BatchNorm1d):
    """Batch norm that belongs to one task at a time: not affine by default; `Phases` keeps its statistics per task.

    x (N, C) or (N, C, L). A batch stored innermost is normalised where it lies, without a copy.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = False,
                 **options: Any) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, **options)

    def forward(self, x: Tensor) -> Tensor:
        if not batch_innermost(x):
            return super().forward(x)
        stored = x.movedim(0, -1)  # (C, ..., N)
        return super().forward(stored.flatten(1).unsqueeze(0)).reshape(stored.shape).movedim(-1, 0)


class TaskBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that belongs to one task at a time, for x (N, C, H, W); see `TaskBatchNorm1d`."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = False,
                 **options: Any) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, **options)

    def forward(self, x: Tensor) -> Tensor:
        if not batch_innermost(x):
            return super().forward(x)
        stored = x.movedim(0, -1)  # (C, H, W, N)
        return super().forward(stored.reshape(1, stored.shape[0], 1, -1)).reshape(stored.shape).movedim(-1, 0)


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
