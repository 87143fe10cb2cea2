"""Layers of scores to select from, and the hints that a selection may be given."""

from collections.abc import Callable, Iterable

import torch
from cases import SIZES, scores_of
from torch import Tensor

from exssnet import ops
from exssnet.ops.selection import new_masks

MODERATE = tuple(n for n in SIZES if n < 10_000)


def drawn(
    pattern: str, dtype: torch.dtype, device: str = "cpu", sizes: Iterable[int] = MODERATE
) -> tuple[list[Tensor], list[int]]:
    """Scores and k of every (size, k) of the cases, as the layers of one model."""
    pairs = [(s, k) for n in sizes for s in [scores_of(pattern, n, dtype, device)] for k in SIZES[n]]
    return [s for s, _ in pairs], [k for _, k in pairs]


def selected(
    select: Callable[[list[Tensor], list[int], Tensor | None, list[Tensor]], Tensor], scores: list[Tensor],
    k: list[int], packed: bool = False, hint: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """The masks and the selection of a kernel of `topk_masks`, or of its reference."""
    masks = new_masks(scores, packed)
    return masks, select(scores, k, hint, masks)


HINTED = (65, 1000, 33 * 65, 100_003)


def garbage(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape)


def other_selection(dtype: torch.dtype) -> Tensor:
    """The hint of entirely different scores."""
    return ops.topk_masks(*drawn("all-exponents", dtype, sizes=HINTED)).hint


def around(below: int, above: int) -> Callable[[list[Tensor], list[int]], Tensor]:
    """The hint that the threshold's bits lie in [threshold + below, threshold + above], true or not."""

    def hint(scores: list[Tensor], k: list[int]) -> Tensor:
        threshold = ops.topk_select(scores, k)[0][:, 0].clamp(0, 2**62)
        return torch.stack([threshold + below, threshold + above], 1)

    return hint


HINTS = {
    "right": lambda scores, k: ops.topk_masks(scores, k).hint,
    "stale": lambda scores, k: ops.topk_masks([s * 1.01 for s in scores], k).hint,
    "of-other-k": lambda scores, k: (
        ops.topk_masks(scores, [s.numel() - c for s, c in zip(scores, k, strict=True)]).hint
    ),
    "of-other-scores": lambda scores, k: other_selection(scores[0].dtype),
    "selection": lambda scores, k: ops.topk_masks(scores, k).selection,
    "interval-around": around(-1000, 1000),
    "interval-far-too-wide": around(-(2**62), 2**62),
    "interval-ending-below": around(-1000, -1),
    "interval-beginning-above": around(1, 1000),
    "interval-ending-at": around(-3, 0),
    "interval-beginning-at": around(0, 3),
    "interval-upside-down": around(3, -3),
    "zeros": lambda scores, k: torch.zeros(len(scores), 2, dtype=torch.int64),
    "largest": lambda scores, k: torch.full((len(scores), 2), 2**63 - 1),
    "smallest": lambda scores, k: torch.full((len(scores), 2), -(2**63)),
    "garbage": lambda scores, k: garbage((len(scores), 2)),
    "garbage-small": lambda scores, k: garbage((len(scores), 2)) >> 33,
    "garbage-strided": lambda scores, k: garbage((2, len(scores))).t(),
}
