"""Baselines in plain PyTorch, as a user would write them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Selection = Callable[[Tensor, float], Tensor]


def sort_mask(magnitudes: Tensor, density: float) -> Tensor:
    """Mask of zeros and ones by a full sort, as in hidden-networks, SupSup and the official ExSSNeT."""
    out = magnitudes.clone()
    _, order = magnitudes.flatten().sort()
    dropped = int((1 - density) * magnitudes.numel())
    flat = out.flatten()
    flat[order[:dropped]] = 0
    flat[order[dropped:]] = 1
    return flat.view_as(magnitudes)


def kthvalue_mask(magnitudes: Tensor, density: float) -> Tensor:
    """Mask of zeros and ones by a threshold. It keeps all ties of the threshold, so it may keep too many."""
    dropped = int((1 - density) * magnitudes.numel())
    threshold = magnitudes.flatten().kthvalue(dropped + 1).values
    return (magnitudes >= threshold).to(magnitudes.dtype)


def topk_mask(magnitudes: Tensor, density: float) -> Tensor:
    """Mask of zeros and ones by `torch.topk`. Its tie-breaking is undefined."""
    kept = magnitudes.numel() - int((1 - density) * magnitudes.numel())
    flat = torch.zeros_like(magnitudes).flatten()
    flat[magnitudes.flatten().topk(kept, sorted=False).indices] = 1
    return flat.view_as(magnitudes)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, magnitudes: Tensor, density: float, select: Selection) -> Tensor:
        return select(magnitudes, density)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None, None


def supermask_weight(weight: Tensor, scores: Tensor, density: float, select: Selection = sort_mask) -> Tensor:
    """weight * mask. In the backward pass the mask counts as abs(scores)."""
    mask: Tensor = _StraightThrough.apply(scores.abs(), density, select)
    return weight * mask


def reweight(layer: nn.Module, how: str, factors: Tensor, scores: Tensor, density: float) -> Tensor:
    """Let a layer compute with an effective weight, and return the trained tensor: its weight or its scores.

    "no mask" uses the weight, "cached mask" weight * factors, "sort" a mask selected in every forward, "given mask" the
    same with `factors` as the mask. There is no parametrization, because its property and cache cost time.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    assert layer.bias is None
    if how == "no mask":
        return weight
    trained = weight.requires_grad_(how == "cached mask")
    if how in ("sort", "given mask"):
        trained = layer.scores = nn.Parameter(scores.clone())
    select: Selection = sort_mask if how == "sort" else lambda *_: factors

    def effective() -> Tensor:
        return weight * factors if how == "cached mask" else supermask_weight(weight, trained, density, select)

    if isinstance(layer, nn.Conv2d):
        layer.forward = lambda x: layer._conv_forward(x, effective(), None)  # type: ignore
    else:
        layer.forward = lambda x: F.linear(x, effective())  # type: ignore
    return trained


def knn_classify(features: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Distances, top k and majority vote, for blocks of queries."""
    blocks = queries.split(1024)
    nearest = (torch.cdist(block, features).topk(k, largest=False).indices for block in blocks)
    return torch.cat([labels[indices].mode(1).values for indices in nearest])


def batch_norm(x: Tensor) -> Tensor:
    """Batch norm with the statistics of the batch."""
    return F.batch_norm(x, None, None, training=True)


def affine_batch_norm(x: Tensor) -> Tensor:
    """The same with weight and bias, which cuDNN's kernels need."""
    weight, bias = torch.ones(x.shape[1], device=x.device), torch.zeros(x.shape[1], device=x.device)
    return F.batch_norm(x, None, None, weight, bias, training=True)


def batch_norm_innermost(x: Tensor) -> Tensor:
    """Batch norm of a tensor with the batch innermost, viewed as one image of C channels to avoid a copy."""
    stored = x.movedim(0, -1)
    return batch_norm(stored.reshape(1, stored.shape[0], 1, -1)).reshape(stored.shape).movedim(-1, 0)


def layer(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """A linear layer if the weight is a matrix; a padded convolution if it is (O, C, R, S)."""
    return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, None, stride, weight.shape[2] // 2)
