"""A step of Adam on the scores, fused with the next selection."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import define, refuse_derivative
from .selection import TopK, check_topk, new_hint, new_masks

__all__ = ["adam_topk"]

define(
    "adam_topk(Tensor(a!)[] scores, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] steps, Tensor(e!)[] masks, int[] k, Tensor(f!)? hint, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool maximize) -> Tensor",
    lambda scores, *_: scores[0].new_empty(len(scores), 2, dtype=torch.int64),
)
refuse_derivative("adam_topk", "it is a step of an optimizer")


def adam_topk(
    scores: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor], k: Sequence[int], hint: Tensor | None = None, *, lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, maximize: bool = False,
    packed: bool = False,
) -> TopK:  # fmt: skip
    r"""One step of Adam on the scores, in place, and `topk_masks` of the new scores.

    With the gradient g: :math:`m \leftarrow \beta_1 m + (1 - \beta_1) g`, :math:`v \leftarrow \beta_2 v +
    (1 - \beta_2) g^2`, :math:`S \leftarrow S - \eta \hat m / (\sqrt{\hat v} + \epsilon)`, the same step as that of
    `torch.optim.Adam`. On a GPU the new scores are compared with the last threshold while they are in registers, so
    they are not read again for the selection. Source: Kingma and Ba 2015, algorithm 1.

    Args:
        scores: The scores of each layer, of any shape; changed in place. float32 on GPUs, where the reference serves
            other dtypes.
        grads: The gradient of each score tensor, of its shape and dtype.
        exp_avg: The first moment m of each, of the same shape and dtype; changed in place.
        exp_avg_sq: The second moment v of each, of the same shape and dtype; changed in place.
        steps: For each layer the number of steps before this one, float32 of shape (); incremented.
        k: As in `topk_masks`.
        hint: As in `topk_masks`.
        lr: The learning rate.
        betas: The decay rates of m and v.
        eps: Added to the denominator.
        weight_decay: The L2 penalty, added to the gradient.
        maximize: Ascend instead of descending.
        packed: As in `topk_masks`.

    Returns:
        Masks, selection and hint of the new scores.

    Raises:
        ValueError: Lengths, shapes, dtypes or devices do not match. Nothing has changed then.
        RuntimeError: A score became NaN, on a CPU. The step has been made then.
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
    if hint is None:
        hint = new_hint(len(scores), scores[0].device)
    selection = torch.ops.exssnet.adam_topk(
        changed[0], [g.detach() for g in grads], *changed[1:], masks, list(k), hint, lr, *betas, eps, weight_decay,
        maximize,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # which knows it from the schema
        torch.autograd.graph.increment_version([t for tensors in changed for t in tensors])
    return TopK(masks, selection, hint)
