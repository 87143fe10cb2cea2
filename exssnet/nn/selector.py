"""One selection for all layers of a converted model: made before each forward, or handed over by the optimizer."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import supermask_weights, topk_masks, topk_select
from ..ops.library import product_dtype, transforming
from . import stale

_running = threading.local()

# Private names of torch. Where one is missing, nothing is taken from an earlier forward.
_graph_task = getattr(torch._C, "_current_graph_task_id", None)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Handed(NamedTuple):
    """Selections of scores in the state that they were in."""

    state: list[tuple[int, ...]]
    selections: Sequence[Tensor]
    scores: Sequence[Tensor]  # held, so that no others have their identity


class Selector:
    """Selects for all layers of one converted model, which owns it; it alone sets the selections of their modes.

    Args:
        layers: the supermask layers of the model, in the order of its modules.
        passed_over: why other layers have no mask, by name.

    Attributes:
        hint: what the last selection leaves to the next one, see `topk_masks`; (layers, 2), always the same tensor on
            one device.
        handed: selections that the optimizer made for the next forward, or None.
    """

    def __init__(self, layers: Sequence[Any], passed_over: Mapping[str, str]) -> None:
        self.layers = list(layers)
        self.passed_over = dict(passed_over)
        self.hint = torch.full((len(self.layers), 2), -1, dtype=torch.int64, device="cpu")  # -1: nothing known
        self.handed: Handed | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what was handed over, which is of these scores and of no copies."""
        return {**self.__dict__, "handed": None}

    def scored(self) -> list[Any]:
        """The layers that have scores, in the order of the model's modules."""
        return [layer for layer in self.layers if layer.mode.scored]

    def hint_for(self, layers: Sequence[Any]) -> Tensor | None:
        """The hint, on the device of the scores; None unless all layers have scores, and under `torch.func`."""
        if len(layers) != len(self.layers) or transforming():
            return None
        device = layers[0].scores.device
        if self.hint.device != device:
            with torch.inference_mode(False):
                self.hint = self.hint.to(device)
        return self.hint

    def hand_over(self, layers: Sequence[Any], selections: Sequence[Tensor]) -> None:
        """Let the next training forward use selections of the scores as they are now."""
        self.handed = Handed(_state(layers), selections, [layer.scores for layer in layers])

    def give(self, model: nn.Module) -> None:
        """Before a forward of the model: set the selections of all layers that have scores."""
        layers = self.scored()
        if not layers:
            self.handed = None
            return
        if _exporting():
            raise RuntimeError(
                "torch.export takes the network of a finished task: its masks are fixed, scores select anew"
            )
        handed = self._handed(model, layers)
        for layer, selection in zip(layers, self._select(layers) if handed is None else handed, strict=True):
            layer.mode.selection = selection
        written = [layer for layer in layers if layer.written]
        if written:  # in one pass for all of them
            weights, scores = [layer.dense_weight for layer in written], [layer.scores for layer in written]
            selections = [layer.mode.selection for layer in written]
            masked = supermask_weights(weights, scores, selections, product_dtype(weights[0]))
            for layer, weight in zip(written, masked, strict=True):
                layer.mode.masked = weight

    def take_back(self, recent: bool) -> None:
        """After a forward of the model; recent: whether a backward pass may compute activations again."""
        for layer in self.scored():
            mode = layer.mode
            if mode.selection is not None:
                mode.recent = mode.selection if recent else None
                mode.selection = mode.masked = None

    def _select(self, layers: Sequence[Any]) -> Sequence[Tensor]:
        """A selection for each of the layers, from their scores as they are."""
        scores, k, hint = [layer.scores for layer in layers], [layer.k for layer in layers], self.hint_for(layers)
        if scores[0].device.type == "cpu":
            rows, new = topk_select(scores, k, hint)
            found: Sequence[Tensor] = rows.unbind()
        else:  # the products of a GPU would read the scores again, and again in the backward pass: packed masks
            found, _, new = topk_masks(scores, k, hint, packed=True)
        if hint is not None:
            hint.copy_(new)
        return found

    def _handed(self, model: nn.Module, layers: Sequence[Any]) -> Sequence[Tensor] | None:
        """What the optimizer handed over, if nothing has changed since.

        A version does not tell of writes through `.data`, as averaged weights are often swapped in for evaluation:
        there the scores are always read.
        """
        if torch.compiler.is_compiling() or self.handed is None:
            return None
        if capturing() or self.handed.state != _state(layers):
            self.handed = None
        elif model.training and torch.is_grad_enabled():
            return self.handed.selections
        return None


def capturing() -> bool:
    """Whether a CUDA graph is captured, whose replays change tensors that Python does not see."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def forwards() -> int:
    """How many forwards of converted models this thread is in."""
    return getattr(_running, "forwards", 0)


def in_backward() -> bool:
    """Whether this thread runs a backward pass, in which checkpointed activations are computed again."""
    return not torch.compiler.is_compiling() and _graph_task is not None and _graph_task() != -1


def recomputable() -> bool:
    """Whether what is computed now may be computed again, or is: then it must not depend on tensors made before."""
    if torch.compiler.is_compiling():
        return False
    return _graph_task is None or _top_hooks is None or in_backward() or _top_hooks(True) is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _exporting() -> bool:
    """Whether `torch.export` traces; under the compiler of torch 2.10, `is_exporting` itself is always true."""
    return torch.compiler.is_exporting()


def select_for_all(model: nn.Module, args: Any) -> None:
    """Before the model's forward: one selection for all layers in the mask phase."""
    selector: Selector = model._selector  # type: ignore[assignment]
    if not torch.compiler.is_compiling():
        _running.forwards = forwards() + 1
        stale.check_replicas(p for layer in selector.layers for p in (layer.scores, layer.free_values) if p is not None)
    selector.give(model)


def forget_selection(model: nn.Module, args: Any, output: Any) -> None:
    """After the model's forward: what it selected is kept for its backward pass alone."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _running.forwards = max(0, forwards() - 1)
    selector: Selector = model._selector  # type: ignore[assignment]
    selector.take_back(recent=not compiling and torch.is_grad_enabled())


def _state(layers: Sequence[Any]) -> list[tuple[int, ...]]:
    """What tells whether scores have changed."""
    return [(id(layer.scores), layer.scores.data_ptr(), layer.scores._version) for layer in layers]
