"""The hooks of a strategy that return something, called and checked: a wrong result is told in one sentence."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..io.values import shown
from .strategy import Context, Stage, Strategy


def plan(method: Strategy, learner: Context) -> list[Stage]:
    """The stages of the open task. ValueError for an order of phases that `Phases` does not have."""
    stages: Any = method.plan(learner)
    whole = isinstance(stages, list | tuple) and all(isinstance(stage, Stage) for stage in stages)
    phases = [stage.phase for stage in stages] if whole else stages
    if not whole or (phases != ["joint"] and (phases[:1] != ["mask"] or set(phases[1:]) - {"weight"})):
        wanted = 'stages: one "mask" and then any number of "weight", or one "joint"'
        raise _wrong(method, "plan", wanted, shown(phases))
    return list(stages)


def initial_scores(method: Strategy, learner: Context) -> Mapping[str, Tensor] | None:
    """The scores that a new task starts from. ValueError unless None, or finite tensors by layer name."""
    scores: Any = method.initial_scores(learner)
    if scores is None:
        return None
    if not isinstance(scores, Mapping) or not all(isinstance(s, Tensor) for s in scores.values()):
        raise _wrong(method, "initial_scores", "None or tensors by layer name", _described(scores))
    for name, s in scores.items():
        if not bool(s.isfinite().all()):
            raise _wrong(method, "initial_scores", "finite scores", f"{int((~s.isfinite()).sum())} others in {name}")
    return scores


def free_mask(method: Strategy, learner: Context, name: str, mask: Tensor) -> Tensor:
    """Which weights of a layer train. ValueError unless a bool tensor within the mask."""
    free: Any = method.free_mask(learner, name, mask)
    wanted = f"a bool tensor {tuple(mask.shape)} within the mask of {name}"
    if not isinstance(free, Tensor) or free.dtype != torch.bool or free.shape != mask.shape:
        raise _wrong(method, "free_mask", wanted, _described(free))
    if outside := int((free & ~mask).sum()):
        raise _wrong(method, "free_mask", wanted, f"{outside} weights outside it")
    return free


def loss(method: Strategy, learner: Context, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a batch. ValueError unless it is a scalar with a gradient, beside logits of as many items."""
    result: Any = method.loss(learner, x, y)
    if isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, Tensor) for t in result):
        value, logits = result
        if value.dim() == 0 and value.requires_grad and logits.dim() == 2 and len(logits) == len(y):
            return value, logits
    raise _wrong(method, "loss", f"a scalar loss with a gradient and logits ({len(y)}, classes)", _described(result))


def _wrong(method: Strategy, hook: str, wanted: str, returned: str) -> ValueError:
    return ValueError(f"{type(method).__name__}.{hook} must return {wanted}, but it returned {returned}")


def _described(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"{result.dtype} of shape {tuple(result.shape)}{'' if result.requires_grad else ' without a gradient'}"
    if isinstance(result, tuple):
        return f"({', '.join(map(_described, result))})"
    return shown(result)
