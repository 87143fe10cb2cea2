"""The masked weights of all layers of a model in one pass, trained through their scores, for PyTorch's products."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import bind_gradient, chosen, define, refuse_tangents
from .supermask import plain_weight

__all__ = ["supermask_weights"]


def _fresh(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in tensors]


define(
    "supermask_weights(Tensor[] weights, Tensor[] scores, Tensor[] selections, ScalarType? dtype) -> Tensor[]",
    lambda weights, scores, selections, dtype: _fresh(weights, dtype),
)
define(
    "supermask_weights_backward(Tensor[] grads, Tensor[] weights, Tensor[] scores, Tensor[] selections, "
    "bool[] output_mask) -> (Tensor[], Tensor[])",
    lambda grads, weights, scores, selections, output_mask: (
        _fresh(scores) if output_mask[0] else [],
        _fresh(weights) if output_mask[1] else [],
    ),
)


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.count = count
        ctx.save_for_backward(*tensors)
        lists = [list(tensors[i : i + count]) for i in range(0, 3 * count, count)]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.exssnet.supermask_weights(*lists, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        refuse_tangents("supermask_weights", grads)
        count, saved = ctx.count, ctx.saved_tensors
        lists = [list(saved[i : i + count]) for i in range(0, 3 * count, count)]
        of_weights, of_scores = (any(ctx.needs_input_grad[2 + i : 2 + i + count]) for i in (0, count))
        with torch._C._AutoDispatchBelowAutograd():
            gradients = torch.ops.exssnet.supermask_weights_backward(list(grads), *lists, [of_scores, of_weights])
        scores, weights = (of_kind or [None] * count for of_kind in gradients)
        return None, None, *weights, *scores, *[None] * count


def _differentiable(
    weights: list[Tensor], scores: list[Tensor], selections: list[Tensor], dtype: torch.dtype | None
) -> list[Tensor]:
    return list(_Boundary.apply(dtype, len(weights), *weights, *scores, *selections))


def _plain(
    weights: list[Tensor], scores: list[Tensor], selections: list[Tensor], dtype: torch.dtype | None
) -> list[Tensor]:
    of_layers = zip(weights, scores, selections, strict=True)
    return [plain_weight(w, s, m).to(dtype or w.dtype) for w, s, m in of_layers]


bind_gradient("supermask_weights", _Boundary, _differentiable)
_call = chosen(torch.ops.exssnet.supermask_weights.default, _differentiable, _plain)


def supermask_weights(
    weights: Sequence[Tensor], scores: Sequence[Tensor], selections: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """``weight * mask`` of each layer, in one pass for all layers.

    The gradients are those of the supermask layers. They too are computed for all layers at once, when the gradients of
    all masked weights are there; until then these stay in memory.

    Args:
        weights: The weight of each layer; float32, bfloat16, float16 or float64.
        scores: The scores of each layer, of its weight's shape.
        selections: For each layer its packed mask of `topk_masks`, or its row of `topk_select`.
        dtype: The dtype of the results. None means that of each weight.

    Returns:
        The masked weights, contiguous. They have no second derivative.

    Raises:
        ValueError: Lengths, shapes or devices do not match.
    """
    if not len(weights) == len(scores) == len(selections):
        raise ValueError(
            "supermask_weights: expected scores and a selection per weight, got "
            f"{len(weights)} weights, {len(scores)} scores and {len(selections)} selections"
        )
    for w, s, m in zip(weights, scores, selections, strict=True):
        of_row = m.dtype == torch.int64 and m.shape == (2,)
        of_bits = m.dtype == torch.uint8 and m.shape == (-(-w.numel() // 8),)
        if w.shape != s.shape or not (of_row or of_bits) or not w.device == s.device == m.device:
            raise ValueError(
                "supermask_weights: scores and selection must fit the weight, "
                f"{tuple(w.shape)} on {w.device}, got {tuple(s.shape)} on {s.device} and {m.dtype} of "
                f"{tuple(m.shape)} on {m.device}"
            )
    masked: list[Tensor] = _call(list(weights), list(scores), list(selections), dtype)
    return masked
