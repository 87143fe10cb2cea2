"""Exact selection of the scores of largest magnitude; masks as bits."""

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


ALIGNMENT = 128  # of packed masks, in bytes: a line of a GPU's cache


def new_masks(scores: Sequence[Tensor], packed: bool) -> list[Tensor]:
    """Memory for the masks of the given scores. Packed masks are slices of one allocation."""
    if not packed:
        return [torch.empty_like(s, dtype=torch.bool, memory_format=torch.contiguous_format) for s in scores]
    sizes = [size for s in scores for n in [-(-s.numel() // 8)] for size in (n, -n % ALIGNMENT)]
    return list(scores[0].new_empty(sum(sizes), dtype=torch.uint8).split_with_sizes(sizes)[::2])


def new_hint(layers: int, device: torch.device | str) -> Tensor:
    """A hint of `topk_masks` for the first call: -1, nothing is known."""
    return torch.full((layers, 2), -1, dtype=torch.int64, device=device)


define(
    "topk_masks(Tensor[] scores, int[] k, Tensor(a!)? hint, Tensor(b!)[] masks) -> Tensor",
    lambda scores, k, hint, masks: scores[0].new_empty(len(scores), 2, dtype=torch.int64),
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
    """The number of weights that a density keeps: ``n - int((1 - density) * n)``, as in the official implementation.

    Args:
        n: The number of weights.
        density: The fraction of weights to keep, in [0, 1].

    Returns:
        k, in [0, n].

    Raises:
        ValueError: n is negative, or the density is out of range.

    Example:
        >>> density_to_k(1000, 0.1)
        100
    """
    if n < 0:
        raise ValueError(f"density_to_k: n must be at least 0, got {n}")
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    return n - int((1 - density) * n)


class TopK(NamedTuple):
    """The result of `topk_masks`.

    Attributes:
        masks: For each layer a bool tensor of its scores' shape, or its packed form as from `pack_mask`. Packed masks
            of one call are slices of one allocation, which lives as long as any of them: clone one that is kept alone.
        selection: int64, (layers, 2): (threshold bits, tie index). Entry i of a layer is kept if the bits of its
            magnitude exceed the threshold, or equal it and i <= tie index. A kernel can compute the mask from this.
        hint: Pass it to the next call with slightly changed scores. It changes speed, never results. It is the tensor
            that the call was given, with new values, or a new one.
    """

    masks: list[Tensor]
    selection: Tensor
    hint: Tensor


def check_topk(operator: str, scores: Sequence[Tensor], k: Sequence[int], hint: Tensor | None) -> None:
    """Refuse arguments that `topk_masks` does not accept."""
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
    if hint is not None and hint.device != scores[0].device:
        raise ValueError(f"{operator}: scores are on {scores[0].device}, but hint is on {hint.device}")
    if hint is not None and 0 in hint.stride():
        raise ValueError(f"{operator}: hint is changed in place, and must not be expanded, got strides {hint.stride()}")


def _select(
    scores: Sequence[Tensor], k: Sequence[int], hint: Tensor | None, masks: list[Tensor]
) -> tuple[Tensor, Tensor]:
    if hint is None:
        hint = new_hint(len(scores), scores[0].device)
    return torch.ops.exssnet.topk_masks([s.detach() for s in scores], list(k), hint, masks), hint


def topk_masks(scores: Sequence[Tensor], k: Sequence[int], hint: Tensor | None = None, packed: bool = False) -> TopK:
    """Supermasks of all layers of a model: for each layer, exactly the k scores of largest magnitude.

    Ties go to the smaller flat index, so masks agree bit for bit on every device. Source: Ramanujan et al. 2020
    (edge-popup); arXiv 2210.10209, "Exclusive Supermask Subnetwork Training".

    Args:
        scores: The scores of each layer, of any shape and strides; float32, bfloat16, float16 or float64.
        k: For each layer the number of weights to keep, in [0, n].
        hint: The hint of the last call, int64 of (layers, 2); changed in place. See `TopK`.
        packed: Return masks of 1 bit a weight, which the supermask layers take as `selection`.

    Returns:
        Masks, selection and hint.

    Raises:
        ValueError: Lengths, dtypes or devices do not match, or a k is out of range.
        RuntimeError: A score is NaN, on a CPU. On a GPU `nan_scores_seen` tells.
    """
    check_topk("topk_masks", scores, k, hint)
    masks = new_masks(scores, packed)
    return TopK(masks, *_select(scores, k, hint, masks))


def topk_select(scores: Sequence[Tensor], k: Sequence[int], hint: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Selection and hint of `topk_masks`, without writing the masks: what the supermask layers take.

    Args:
        scores: As in `topk_masks`.
        k: As in `topk_masks`.
        hint: As in `topk_masks`.

    Returns:
        (selection, hint), see `TopK`.

    Raises:
        ValueError: As in `topk_masks`.
        RuntimeError: As in `topk_masks`.
    """
    check_topk("topk_select", scores, k, hint)
    return _select(scores, k, hint, [])


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """The mask of the k scores of largest magnitude: `topk_masks` for one tensor.

    Args:
        scores: As one of those of `topk_masks`.
        k: The number of weights to keep, in [0, n].

    Returns:
        bool, of the scores' shape.

    Raises:
        ValueError: As in `topk_masks`.
        RuntimeError: As in `topk_masks`.

    Example:
        >>> topk_mask(torch.tensor([0.1, -3.0, 2.0, 2.0]), 2)
        tensor([False,  True,  True, False])
    """
    check_topk("topk_mask", [scores], [k], None)
    masks = new_masks([scores], packed=False)
    torch.ops.exssnet.topk_masks([scores.detach()], [k], None, masks)
    return masks[0]


def nan_scores_seen(device: torch.device | str) -> bool:
    """Whether a selection on a GPU has met NaN scores since this was last called. Synchronises the GPU.

    Selections on a GPU do not raise, since each step would have to wait for the result. NaN ranks above infinity there,
    and sets a flag on the device. Call this where the host waits anyway, e.g. for the loss of an epoch.

    Args:
        device: The device of the scores.

    Returns:
        Whether NaN was met. Always False for a CPU, where selections raise.
    """
    seen: bool = nan_flag.seen(torch.device(device))
    return seen


def pack_mask(mask: Tensor) -> Tensor:
    """A mask as bits: bit j of byte i is flat entry 8 i + j, spare bits are zero.

    Args:
        mask: bool, of any shape and strides.

    Returns:
        uint8, (ceil(n / 8),).

    Raises:
        ValueError: The mask is not bool.

    Example:
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"pack_mask: mask must be bool, got {mask.dtype}")
    packed: Tensor = torch.ops.exssnet.pack_mask(mask)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of the given shape from the bits of `pack_mask`.

    Args:
        packed: uint8, (ceil(n / 8),).
        shape: The shape of the mask, of n entries.

    Returns:
        bool, of that shape.

    Raises:
        ValueError: The shape does not fit the bytes.
    """
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
    """``mask & ~used_mask``: the weights that a task alone may change.

    Args:
        mask: bool, or packed by `pack_mask`.
        used_mask: The union of the earlier tasks' masks, in the same form.

    Returns:
        The free mask, in the same form.

    Raises:
        ValueError: Dtypes or shapes do not match.
    """
    if not (
        mask.dtype in (torch.bool, torch.uint8) and mask.dtype == used_mask.dtype and mask.shape == used_mask.shape
    ):
        raise ValueError(
            f"free_mask: mask and used_mask must both be bool, or both packed uint8, of one shape, got {mask.dtype} of "
            f"{tuple(mask.shape)} and {used_mask.dtype} of {tuple(used_mask.shape)}"
        )
    free: Tensor = torch.ops.exssnet.free_mask(mask, used_mask)
    return free
