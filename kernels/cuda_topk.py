"""topk_masks by csrc/cuda_topk.cpp, which is given the flag for NaN scores."""

import torch
from torch import Tensor

from .nan_flag import flag

_library: torch.library.Library | None = None


def topk_masks(
    scores: list[Tensor], k: list[int], hint: Tensor | None, with_masks: bool, packed: bool = False
) -> tuple[list[Tensor], Tensor, Tensor]:
    """As the reference, but NaN scores do not raise: they count as more than infinity, and the flag tells of them."""
    found: tuple[list[Tensor], Tensor, Tensor] = torch.ops.exssnet_cuda.topk_masks(
        scores, k, hint, with_masks, packed, flag(scores[0].device)
    )
    return found


def register() -> None:
    """Make it the operator's kernel for CUDA; the compiled library is loaded."""
    global _library
    _library = torch.library.Library("exssnet", "IMPL", "CUDA")
    _library.impl("topk_masks", topk_masks)
