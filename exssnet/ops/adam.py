"""Adam on the scores, with the next selection."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import define, refuse_derivative
from .selection import TopK, check_topk, new_masks

__all__ = ["adam_topk"]

define(
    "adam_topk(Tensor(a!)[] scores, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] steps, Tensor(e!)[] masks, int[] k, Tensor? hint, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool maximize) -> (Tensor, Tensor)",
    lambda scores, *_: tuple(scores[0].new_empty(len(scores), 2, dtype=torch.int64) for _ in range(2)),
)
refuse_derivative("adam_topk", "it is a step of an optimizer")


def adam_topk(
    scores: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor], k: Sequence[int], hint: Tensor | None = None, *, lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, maximize: bool = False,
    packed: bool = False,
) -> TopK:  # fmt: skip
    r"""A step of Adam that changes the scores in place, and `topk_masks` of the scores that it leaves.

    With g the gradient, :math:`m \leftarrow \beta_1 m + (1 - \beta_1) g`, :math:`v \leftarrow \beta_2 v +
    (1 - \beta_2) g^2`, :math:`S \leftarrow S - \eta \hat m / (\sqrt{\hat v} + \epsilon)`, as `torch.optim.Adam` does
    it; on a GPU the new scores are compared with the last threshold while they are in registers, and not read again.

    scores, grads, exp_avg (m), exp_avg_sq (v): of each layer, of one shape; on GPUs float32, else the reference serves.
    steps: of each layer one number, float32, the steps made before; incremented.
    k, hint, packed: as in `topk_masks`.
    ValueError on wrong shapes, before anything changes; RuntimeError where a score has become NaN, after the step.
    Source: Kingma and Ba 2015, algorithm 1.
    """
    check_topk("adam_topk", scores, k, hint)
    of_layers = {"grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "steps": steps}
    for name, tensors in of_layers.items():
        if len(tensors) != len(scores):
            raise ValueError(
                f"adam_topk: expected one of {name} per score tensor, got {len(tensors)} and {len(scores)}"
            )
        for t, s in zip(tensors, scores, strict=True):
            shape, dtype = ((), torch.float32) if name == "steps" else (s.shape, s.dtype)
            if t.shape != shape or t.dtype != dtype or t.device != s.device:
                raise ValueError(
                    f"adam_topk: {name} must be {dtype} of {tuple(shape)} on {s.device}, got {t.dtype} of "
                    f"{tuple(t.shape)} on {t.device}"
                )
    changed = [[t.detach() for t in tensors] for tensors in (scores, exp_avg, exp_avg_sq, steps)]
    masks = new_masks(scores, packed)
    selection, hint = torch.ops.exssnet.adam_topk(
        changed[0], [g.detach() for g in grads], *changed[1:], masks, list(k), hint, lr, *betas, eps, weight_decay,
        maximize,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # which knows it from the schema
        torch.autograd.graph.increment_version([t for tensors in changed for t in tensors])
    return TopK(masks, selection, hint)
