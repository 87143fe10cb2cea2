"""The compiled CUDA kernels of topk_masks and adam_topk, which also take the device's flag for NaN scores.

NaN scores do not raise here, unlike in the reference: they count as larger than infinity, and set the flag.
"""

import torch
from torch import Tensor

from . import reference
from .nan_flag import flag

_library: torch.library.Library | None = None


def topk_masks(scores: list[Tensor], k: list[int], hint: Tensor | None, masks: list[Tensor]) -> Tensor:
    selection: Tensor = torch.ops.exssnet_cuda.topk_masks(scores, k, hint, masks, flag(scores[0].device))
    return selection


def adam_topk(
    scores: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], steps: list[Tensor],
    masks: list[Tensor], k: list[int], hint: Tensor | None, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, maximize: bool,
) -> Tensor:  # fmt: skip
    """Falls back to the reference for other dtypes than float32, and for scores or averages that are not contiguous."""
    options = masks, k, hint, lr, beta1, beta2, eps, weight_decay, maximize
    tensors = scores, exp_avg, exp_avg_sq, steps
    if any(t.dtype != torch.float32 or not t.is_contiguous() for of_kind in tensors for t in of_kind):
        return reference.adam_topk(scores, grads, exp_avg, exp_avg_sq, steps, *options)
    selection: Tensor = torch.ops.exssnet_cuda.adam_topk(
        scores, [g.contiguous() for g in grads], exp_avg, exp_avg_sq, steps, *options, flag(scores[0].device)
    )
    return selection


def register() -> None:
    """Register both for CUDA. The compiled library must be loaded."""
    global _library
    _library = torch.library.Library("exssnet", "IMPL", "CUDA")
    _library.impl("topk_masks", topk_masks)
    _library.impl("adam_topk", adam_topk)
