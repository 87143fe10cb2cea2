"""Selects the masks of all layers of a model at once: before each forward pass, or in the optimizer's step."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import topk_masks, topk_select
from ..ops.library import product_dtype, transforming
from ..ops.weights import WrittenWeight, unchecked_weights, written_weights
from . import stale

_running = threading.local()

# Private names of torch. If one is missing, no forward pass uses tensors of an earlier one.
_graph_task = getattr(torch._C, "_current_graph_task_id", None)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Handed(NamedTuple):
    """Selections from an optimizer, and the state of the scores at that time."""

    state: list[tuple[int, ...]]
    selections: Sequence[Tensor]
    scores: Sequence[Tensor]  # references, so that no new tensor gets the same id


class Selector:
    """Selects the masks of all layers of one converted model, which owns it. Nothing else sets a mode's selection.

    Args:
        layers: The supermask layers of the model, in the order of its modules.
        passed_over: Name of each other layer -> the reason why it has no mask.

    Attributes:
        hint: Makes the next selection faster, see `topk_masks`: int64 of (layers, 2). On one device it is always the
            same tensor.
        handed: Selections from the optimizer for the next forward pass, or None.
    """

    def __init__(self, layers: Sequence[Any], passed_over: Mapping[str, str]) -> None:
        self.layers = list(layers)
        self.passed_over = dict(passed_over)
        self.hint = torch.full((len(self.layers), 2), -1, dtype=torch.int64, device="cpu")  # -1: nothing known
        self.handed: Handed | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave `handed` out: it belongs to these scores, not to copies."""
        return {**self.__dict__, "handed": None}

    def scored(self) -> list[Any]:
        """The layers that have scores, in the order of the model's modules."""
        return [layer for layer in self.layers if layer.mode.scored]

    def hint_for(self, layers: Sequence[Any]) -> Tensor | None:
        """The hint, on the device of the scores. None if a layer has no scores, and under `torch.func`."""
        if len(layers) != len(self.layers) or transforming():
            return None
        device = layers[0].scores.device
        if self.hint.device != device:
            with torch.inference_mode(False):
                self.hint = self.hint.to(device)
        return self.hint

    def hand_over(self, layers: Sequence[Any], selections: Sequence[Tensor]) -> None:
        """Let the next forward pass in training use these selections of the present scores."""
        self.handed = Handed(_state(layers), selections, [layer.scores for layer in layers])

    def give(self, model: nn.Module) -> None:
        """Set the selections of all layers with scores, before a forward pass of the model."""
        layers = self.scored()
        if not layers:
            self.handed = None
            if not torch.compiler.is_compiling() and not getattr(model, "_is_replica", False):
                self._write_values()
            return
        if _exporting():
            raise RuntimeError(
                "torch.export takes the network of a finished task: its masks are fixed, scores select anew"
            )
        handed = self._handed(model, layers)
        for layer, selection in zip(layers, self._select(layers) if handed is None else handed, strict=True):
            layer.mode.selection = selection
        written = [layer for layer in layers if layer.mode.written is not None]
        if written:  # one pass for all these layers
            weights, scores = [layer.dense_weight for layer in written], [layer.scores for layer in written]
            selections, dtype = [layer.mode.selection for layer in written], product_dtype(weights[0])
            forms = [layer.mode.written._replace(dtype=dtype) for layer in written]
            last = [form.channels_last for form in forms]
            masked = unchecked_weights(weights, scores, selections, dtype, last)  # each was checked alone before
            for layer, form, weight in zip(written, forms, masked, strict=True):
                layer.mode.masked = form, weight

    def _write_values(self) -> None:
        """Write the free values into the dense weights of all layers that keep one, in one pass for each device."""
        of_devices: dict[torch.device, dict[Any, WrittenWeight]] = {}
        for layer in self.layers:
            form = layer.mode.written
            if form is None or layer.free_values is None:
                continue
            if (weight := layer.mode.in_memory(layer, form)) is not None:
                of_devices.setdefault(weight.weight.device, {})[layer.mode] = weight
        for of_modes in of_devices.values():
            for mode, weight in zip(of_modes, written_weights(list(of_modes.values())), strict=True):
                mode.masked = mode.written, weight

    def take_back(self, recent: bool) -> None:
        """Remove the selections after a forward pass. recent: whether a backward pass may recompute activations."""
        for layer in self.layers:
            mode = layer.mode
            if mode.masked is not None:
                mode.masked = None
            if mode.scored and mode.selection is not None:
                mode.recent = mode.selection if recent else None
                mode.selection = None

    def _select(self, layers: Sequence[Any]) -> Sequence[Tensor]:
        """Select for each of the layers from its present scores."""
        scores, k, hint = [layer.scores for layer in layers], [layer.k for layer in layers], self.hint_for(layers)
        if scores[0].device.type == "cpu":
            rows, new = topk_select(scores, k, hint)
            selections: Sequence[Tensor] = rows.unbind()
        else:  # packed masks, or the products of a GPU would read the scores again, forward and backward
            selections, _, new = topk_masks(scores, k, hint, packed=True)
        if hint is not None:
            hint.copy_(new)
        return selections

    def _handed(self, model: nn.Module, layers: Sequence[Any]) -> Sequence[Tensor] | None:
        """The selections from the optimizer, unless the scores have changed since.

        A write through `.data` does not change a tensor's version. Averaged weights are often swapped in that way for
        evaluation, so an evaluation always selects anew.
        """
        if torch.compiler.is_compiling() or self.handed is None:
            return None
        if capturing() or self.handed.state != _state(layers):
            self.handed = None
        elif model.training and torch.is_grad_enabled():
            return self.handed.selections
        return None


def capturing() -> bool:
    """Whether a CUDA graph is being captured. Its replays change tensors without Python."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def forwards() -> int:
    """The number of forward passes of converted models that this thread is in."""
    return getattr(_running, "forwards", 0)


def in_backward() -> bool:
    """Whether this thread is in a backward pass, which recomputes checkpointed activations."""
    return not torch.compiler.is_compiling() and _graph_task is not None and _graph_task() != -1


def recomputable() -> bool:
    """Whether this computation is or may be recomputed. Then it must not depend on tensors from before it."""
    if torch.compiler.is_compiling():
        return False
    return _graph_task is None or _top_hooks is None or in_backward() or _top_hooks(True) is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _exporting() -> bool:
    """Whether `torch.export` traces. The compiler of torch 2.10 takes `is_exporting` itself for always true."""
    return torch.compiler.is_exporting()


def select_for_all(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of the model: select for all layers in the mask phase."""
    selector: Selector = model._selector  # type: ignore[assignment]
    if not torch.compiler.is_compiling():
        _running.forwards = forwards() + 1
        stale.check_replicas(p for layer in selector.layers for p in (layer.scores, layer.free_values) if p is not None)
    selector.give(model)


def forget_selection(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the model: keep its selections for its backward pass alone."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _running.forwards = max(0, forwards() - 1)
    selector: Selector = model._selector  # type: ignore[assignment]
    selector.take_back(recent=not compiling and torch.is_grad_enabled())


def _state(layers: Sequence[Any]) -> list[tuple[int, ...]]:
    """Identities, addresses and versions of the scores, which show whether they have changed."""
    return [(id(layer.scores), layer.scores.data_ptr(), layer.scores._version) for layer in layers]
