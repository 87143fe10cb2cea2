"""The masked weights of all layers of a model in one pass, trained through their scores, for PyTorch's products."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.layouts import order_of
from .library import bind_gradient, chosen, define, refuse_derivative, refuse_tangents
from .supermask import plain_weight

__all__ = ["supermask_weights"]


def _fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


define(
    "supermask_weights(Tensor[] weights, Tensor[] scores, Tensor[] selections, ScalarType? dtype, "
    "bool[] channels_last) -> Tensor[]",
    lambda weights, scores, selections, dtype, channels_last: [
        torch.empty_like(w, dtype=dtype, memory_format=order_of(last))
        for w, last in zip(weights, channels_last, strict=True)
    ],
)
define(
    "supermask_weights_backward(Tensor[] grads, Tensor[] weights, Tensor[] scores, Tensor[] selections, "
    "bool[] output_mask) -> (Tensor[], Tensor[])",
    lambda grads, weights, scores, selections, output_mask: (
        _fresh(scores) if output_mask[0] else [],
        _fresh(weights) if output_mask[1] else [],
    ),
)


define("write_values(Tensor[] values, Tensor[] places, Tensor(a!)[] weights) -> ()", lambda *_: None)
define(
    "write_values_backward(Tensor[] grads, Tensor[] values, Tensor[] places) -> Tensor[]",
    lambda grads, values, places: _fresh(values),
)
refuse_derivative("write_values", "it writes into memory; `written_weights` has the gradient")
refuse_derivative("write_values_backward", "the reference has it")


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, dtype: torch.dtype | None, channels_last: list[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.count = count = len(channels_last)
        ctx.save_for_backward(*tensors)
        lists = [list(tensors[i : i + count]) for i in range(0, 3 * count, count)]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.exssnet.supermask_weights(*lists, dtype, channels_last))

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
    weights: list[Tensor], scores: list[Tensor], selections: list[Tensor], dtype: torch.dtype | None,
    channels_last: list[bool],
) -> list[Tensor]:  # fmt: skip
    return list(_Boundary.apply(dtype, channels_last, *weights, *scores, *selections))


def _plain(
    weights: list[Tensor], scores: list[Tensor], selections: list[Tensor], dtype: torch.dtype | None,
    channels_last: list[bool],
) -> list[Tensor]:  # fmt: skip
    of_layers = zip(weights, scores, selections, strict=True)
    return [plain_weight(w, s, m).to(dtype or w.dtype) for w, s, m in of_layers]


bind_gradient("supermask_weights", _Boundary, _differentiable)
unchecked_weights = chosen(torch.ops.exssnet.supermask_weights.default, _differentiable, _plain)
"""`supermask_weights` of lists of tensors that fit each other, with all its arguments."""


def supermask_weights(
    weights: Sequence[Tensor], scores: Sequence[Tensor], selections: Sequence[Tensor], dtype: torch.dtype | None = None,
    channels_last: Sequence[bool] | None = None,
) -> list[Tensor]:  # fmt: skip
    """``weight * mask`` of each layer, in one pass for all layers.

    The gradients are those of the supermask layers. They too are computed for all layers at once, when the gradients of
    all masked weights are there; until then these stay in memory.

    Args:
        weights: The weight of each layer; float32, bfloat16, float16 or float64.
        scores: The scores of each layer, of its weight's shape.
        selections: For each layer its packed mask of `topk_masks`, or its row of `topk_select`.
        dtype: The dtype of the results. None means that of each weight.
        channels_last: For each layer whether its result, (O, C, R, S), is stored channels_last. None means that all are
            contiguous.

    Returns:
        The masked weights. They have no second derivative.

    Raises:
        ValueError: Lengths, shapes or devices do not match.
    """
    last = [False] * len(weights) if channels_last is None else list(channels_last)
    if not len(weights) == len(scores) == len(selections) == len(last):
        raise ValueError(
            "supermask_weights: expected scores, a selection and a layout per weight, got "
            f"{len(weights)} weights, {len(scores)} scores, {len(selections)} selections and {len(last)} layouts"
        )
    for w, s, m, is_last in zip(weights, scores, selections, last, strict=True):
        of_row = m.dtype == torch.int64 and m.shape == (2,)
        of_bits = m.dtype == torch.uint8 and m.shape == (-(-w.numel() // 8),)
        if w.shape != s.shape or not (of_row or of_bits) or not w.device == s.device == m.device:
            raise ValueError(
                "supermask_weights: scores and selection must fit the weight, "
                f"{tuple(w.shape)} on {w.device}, got {tuple(s.shape)} on {s.device} and {m.dtype} of "
                f"{tuple(m.shape)} on {m.device}"
            )
        if is_last and w.dim() != 4:
            raise ValueError(f"supermask_weights: channels_last needs a weight (O, C, R, S), got {tuple(w.shape)}")
    masked: list[Tensor] = unchecked_weights(list(weights), list(scores), list(selections), dtype, last)
    return masked


class WrittenWeight:
    """The masked weight of a layer, dense, that stays in memory. Its free values are written into it before each use.

    To autograd it is like a parameter: a write of changed values is a change in place, a write of the same values is
    none.

    Args:
        weight: The masked weight, which this object owns: (O, I), (O, C, S) or (O, C, R, S), contiguous or
            channels_last.
        values: The free values, (F,).
        places: int32, (F,): the place of each free value in the memory of the weight.
    """

    def __init__(self, weight: Tensor, values: Tensor, places: Tensor) -> None:
        self.weight, self.values, self.places = weight, values, places
        self.order = order_of(not weight.is_contiguous())
        self._memory = weight.data  # has a version of its own, so that writes through it are no changes
        self._version = values._version

    def _changed(self) -> bool:
        """Whether the values have changed since the last call, as far as their version tells."""
        before, self._version = self._version, self.values._version
        return before != self._version


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, written: Sequence[WrittenWeight], *values: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.written = written
        ctx.set_materialize_grads(False)
        return tuple(w.weight.detach() for w in written)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        refuse_tangents("write_values", grads)
        of_values: list[Tensor | None] = [None] * len(grads)
        asked = {i: g for i, g in enumerate(grads) if g is not None and ctx.needs_input_grad[1 + i]}
        if asked:
            written = [ctx.written[i] for i in asked]
            stored = [g.contiguous(memory_format=w.order) for g, w in zip(asked.values(), written, strict=True)]
            arguments = stored, [w.values for w in written], [w.places for w in written]
            if torch.is_grad_enabled():  # for a second derivative
                gathered = reference.write_values_backward(*arguments)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    gathered = torch.ops.exssnet.write_values_backward(*arguments)
            for i, gradient in zip(asked, gathered, strict=True):
                of_values[i] = gradient
        return None, *of_values


def written_weights(written: Sequence[WrittenWeight]) -> list[Tensor]:
    """The masked weights with the present free values in them, written in one pass for all layers.

    The gradients of the values are gathered in one pass too, when those of all weights are there. The values are
    written each time: a change through `.data` does not show in a tensor's version, and a CUDA graph repeats the write.

    Args:
        written: The weights of the layers. They are on one device.

    Returns:
        Their weights, (O, I), (O, C, S) or (O, C, R, S), which share the memory of `written`.
    """
    values = [w.values for w in written]
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.exssnet.write_values(values, [w.places for w in written], [w._memory for w in written])
    torch.autograd.graph.increment_version([w.weight for w in written if w._changed()])
    if torch.is_grad_enabled() and any(v.requires_grad for v in values):
        return list(_Values.apply(written, *values))
    return [w.weight for w in written]
