"""Exact selection of the scores of largest magnitude, and masks as bits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import nan_flag
from .library import FLOATS, define

__all__ = [
    "TopK",
    "density_to_k",
    "free_mask",
    "nan_scores_seen",
    "pack_mask",
    "topk_mask",
    "topk_masks",
    "topk_select",
    "unpack_mask",
]


def new_masks(scores: Sequence[Tensor], packed: bool) -> list[Tensor]:
    """Memory for the masks of some scores."""
    if packed:
        return [s.new_empty(-(-s.numel() // 8), dtype=torch.uint8) for s in scores]
    return [torch.empty_like(s, dtype=torch.bool, memory_format=torch.contiguous_format) for s in scores]


def _fake_topk_masks(
    scores: list[Tensor], k: list[int], hint: Tensor | None, with_masks: bool, packed: bool = False
) -> tuple[list[Tensor], Tensor, Tensor]:
    selection = scores[0].new_empty(len(scores), 2, dtype=torch.int64)
    return new_masks(scores, packed) if with_masks else [], selection, torch.empty_like(selection)


define(
    "topk_masks(Tensor[] scores, int[] k, Tensor? hint, bool with_masks, bool packed=False) "
    "-> (Tensor[], Tensor, Tensor)",
    _fake_topk_masks,
)
define("pack_mask(Tensor mask) -> Tensor", lambda mask: mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8))
define(
    "unpack_mask(Tensor packed, int[] shape) -> Tensor", lambda packed, shape: packed.new_empty(shape, dtype=torch.bool)
)
define(
    "free_mask(Tensor mask, Tensor used_mask) -> Tensor",
    lambda mask, used_mask: torch.empty_like(mask, memory_format=torch.contiguous_format),
)


def density_to_k(n: int, density: float) -> int:
    """Number of weights that a density keeps: ``n - int((1 - density) * n)``, the official rule (int truncates)."""
    if n < 0:
        raise ValueError(f"density_to_k: n must be at least 0, got {n}")
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    return n - int((1 - density) * n)


class TopK(NamedTuple):
    """What `topk_masks` returns.

    masks: one bool tensor per layer, in the shape of its scores; or packed, as `pack_mask` gives it.
    selection: (layers, 2) int64, (threshold bits, tie index): entry i of a layer is kept when the bits of its
        magnitude exceed the threshold, or equal it and i <= tie index. A mask can be computed from it inline.
    hint: pass it to the next call on slightly changed scores; it changes speed, never results.
    """

    masks: list[Tensor]
    selection: Tensor
    hint: Tensor


def check_topk(operator: str, scores: Sequence[Tensor], k: Sequence[int], hint: Tensor | None) -> None:
    """Refuse what `topk_masks` does not take."""
    if not scores:
        raise ValueError(f"{operator}: expected at least one score tensor, got none")
    if len(scores) != len(k):
        raise ValueError(f"{operator}: expected one k per score tensor, got {len(scores)} scores and {len(k)} k")
    for s, count in zip(scores, k, strict=True):
        if s.dtype not in FLOATS:
            raise ValueError(f"{operator}: scores must be float32, bfloat16, float16 or float64, got {s.dtype}")
        if not 0 <= count <= s.numel():
            raise ValueError(f"{operator}: k must be in [0, {s.numel()}], got {count}")
        if s.device != scores[0].device:
            raise ValueError(f"{operator}: scores are on two devices, {scores[0].device} and {s.device}")
    if hint is not None and not (hint.shape == (len(scores), 2) and hint.dtype == torch.int64):
        raise ValueError(
            f"{operator}: hint must be int64 of shape ({len(scores)}, 2), got {hint.dtype} of {tuple(hint.shape)}"
        )


def topk_masks(scores: Sequence[Tensor], k: Sequence[int], hint: Tensor | None = None, packed: bool = False) -> TopK:
    """Supermasks of all layers of a model: for each, the k entries of largest magnitude, exactly k.

    Of equal magnitudes the smaller flat index is kept, so masks agree bit for bit on every device. Scores of any
    shape, layout and of dtype float32, bfloat16, float16 or float64; k in [0, n]. NaN scores raise RuntimeError.
    packed: masks of one bit a weight, which the supermask layers take as `selection`.
    Source: Ramanujan et al. 2020 (edge-popup); "Exclusive Supermask Subnetwork Training", arXiv 2210.10209.
    """
    check_topk("topk_masks", scores, k, hint)
    return TopK(*torch.ops.exssnet.topk_masks([s.detach() for s in scores], list(k), hint, True, packed))


def topk_select(scores: Sequence[Tensor], k: Sequence[int], hint: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(selection, hint) of `topk_masks` without writing the masks: what the supermask layers take."""
    check_topk("topk_select", scores, k, hint)
    _, selection, hint = torch.ops.exssnet.topk_masks([s.detach() for s in scores], list(k), hint, False)
    return selection, hint


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Bool mask, in the shape of scores, of the k entries of largest magnitude: `topk_masks` for one tensor."""
    check_topk("topk_mask", [scores], [k], None)
    mask: Tensor = torch.ops.exssnet.topk_masks([scores.detach()], [k], None, True)[0][0]
    return mask


def nan_scores_seen(device: torch.device | str) -> bool:
    """Whether a selection on a GPU has met NaN scores since this was last asked; waits for the GPU.

    There selections do not raise, which would make every step wait: NaN counts as more than infinity, and raises a flag
    on the device. Ask where the host waits anyway, say for the loss of an epoch. On a CPU, where they raise, False.
    """
    seen: bool = nan_flag.seen(torch.device(device))
    return seen


def pack_mask(mask: Tensor) -> Tensor:
    """Mask as bits: uint8 of ceil(n / 8) bytes, bit j of byte i is flat entry 8 i + j, spare bits zero."""
    if mask.dtype != torch.bool:
        raise ValueError(f"pack_mask: mask must be bool, got {mask.dtype}")
    packed: Tensor = torch.ops.exssnet.pack_mask(mask)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Bool mask of the given shape from the bytes of `pack_mask`."""
    n = math.prod(shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"unpack_mask: sizes must be at least 0, got {tuple(shape)}")
    if not (packed.dtype == torch.uint8 and packed.dim() == 1 and packed.numel() == -(-n // 8)):
        raise ValueError(
            f"unpack_mask: {n} entries are {-(-n // 8)} bytes of uint8, got {packed.dtype} of {tuple(packed.shape)}"
        )
    mask: Tensor = torch.ops.exssnet.unpack_mask(packed, list(shape))
    return mask


def free_mask(mask: Tensor, used_mask: Tensor) -> Tensor:
    """``mask & ~used_mask``: the weights that a task alone may change. Both packed (uint8) or both bool."""
    if not (
        mask.dtype in (torch.bool, torch.uint8) and mask.dtype == used_mask.dtype and mask.shape == used_mask.shape
    ):
        raise ValueError(
            f"free_mask: mask and used_mask must both be bool, or both packed uint8, of one shape, got {mask.dtype} of "
            f"{tuple(mask.shape)} and {used_mask.dtype} of {tuple(used_mask.shape)}"
        )
    free: Tensor = torch.ops.exssnet.free_mask(mask, used_mask)
    return free
