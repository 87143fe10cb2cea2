"""adam_topk by csrc/cuda_adam.cpp, which is given the flag for NaN scores."""

import torch
from torch import Tensor

from . import reference
from .nan_flag import flag

_library: torch.library.Library | None = None


def adam_topk(
    scores: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], steps: list[Tensor],
    masks: list[Tensor], k: list[int], hint: Tensor | None, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, maximize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference, but NaN scores do not raise: the flag tells of them. The reference takes other dtypes, and
    scores or averages that are not contiguous."""
    options = masks, k, hint, lr, beta1, beta2, eps, weight_decay, maximize
    tensors = scores, exp_avg, exp_avg_sq, steps
    if any(t.dtype != torch.float32 or not t.is_contiguous() for of_kind in tensors for t in of_kind):
        return reference.adam_topk(scores, grads, exp_avg, exp_avg_sq, steps, *options)
    found: tuple[Tensor, Tensor] = torch.ops.exssnet_cuda.adam_topk(
        scores, [g.contiguous() for g in grads], exp_avg, exp_avg_sq, steps, *options, flag(scores[0].device)
    )
    return found


def register() -> None:
    """Make it the operator's kernel for CUDA; the compiled library is loaded."""
    global _library
    _library = torch.library.Library("exssnet", "IMPL", "CUDA")
    _library.impl("adam_topk", adam_topk)
