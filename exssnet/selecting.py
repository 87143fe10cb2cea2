"""One selection for all layers of a converted model: made before each forward, or handed over by the optimizer."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import supermask_weights, topk_masks, topk_select
from .ops.library import product_dtype


class Handed(NamedTuple):
    """Selections of scores in the state that they were in."""

    state: list[tuple[int, ...]]
    selections: Sequence[Tensor]


def scored_layers(model: nn.Module) -> list[Any]:
    """The supermask layers of a converted model that have scores, in the order of its modules."""
    return [layer for layer in model._masked if layer._parameters["scores"] is not None]  # type: ignore[union-attr]


def hint_of(model: nn.Module, layers: Sequence[Any]) -> Tensor | None:
    hint = model._buffers["selection_hint"]
    return None if hint is None or len(hint) != len(layers) else hint


def hand_over(model: nn.Module, layers: Sequence[Any], selections: Sequence[Tensor], hint: Tensor) -> None:
    """Let the model's forward use selections of its scores as they are now, until these change."""
    model._handed = Handed(_state(layers), selections)  # type: ignore[assignment]
    model.selection_hint = hint


def capturing() -> bool:
    """Whether a CUDA graph is captured, whose replays change tensors that Python does not see."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def select_for_all(model: nn.Module, args: Any) -> None:
    """Before the model's forward: one selection for all layers in the mask phase."""
    layers = scored_layers(model)
    if not layers:
        model._handed = None  # type: ignore[assignment]
        return
    for layer, selection in zip(layers, _handed(model, layers) or _selected(model, layers), strict=True):
        layer.selection = selection
    written = [layer for layer in layers if layer.written]
    if written:  # in one pass for all of them
        weights, scores = [layer.weight for layer in written], [layer.scores for layer in written]
        selections = [layer.selection for layer in written]
        for layer, masked in zip(
            written, supermask_weights(weights, scores, selections, product_dtype(weights[0])), strict=True
        ):
            layer.masked = masked


def forget_selection(model: nn.Module, args: Any, output: Any) -> None:
    for layer in model._masked:  # type: ignore[union-attr]
        if layer.selection is not None:  # to set an attribute of a module is slow
            layer.selection = layer.masked = None


def _state(layers: Iterable[Any]) -> list[tuple[int, ...]]:
    """What tells whether scores have changed."""
    return [(id(layer.scores), layer.scores.data_ptr(), layer.scores._version) for layer in layers]


def _handed(model: nn.Module, layers: Sequence[Any]) -> Sequence[Tensor] | None:
    if torch.compiler.is_compiling() or model._handed is None:
        return None
    if capturing() or model._handed.state != _state(layers):  # type: ignore[union-attr]
        model._handed = None  # type: ignore[assignment]
        return None
    return model._handed.selections  # type: ignore[union-attr, return-value]


def _selected(model: nn.Module, layers: Sequence[Any]) -> Sequence[Tensor]:
    scores, k = [layer.scores for layer in layers], [layer.k for layer in layers]
    hint = hint_of(model, layers)
    if scores[0].device.type == "cpu":
        rows, model.selection_hint = topk_select(scores, k, hint)
        return rows.unbind()
    # The products of a GPU would read the scores again, and again in the backward pass: they take packed masks.
    masks, _, model.selection_hint = topk_masks(scores, k, hint, packed=True)
    return masks
