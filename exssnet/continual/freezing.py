"""Keeps entries of dense weights unchanged by every step of an optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def freeze_weights(
    optimizer: torch.optim.Optimizer, frozen: Mapping[Tensor, Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Keep entries of dense parameters bitwise at their present values through every step of an optimizer.

    A zero gradient does not freeze a weight: momentum, Adam's moments and weight decay still change it. This guard
    restores the frozen entries after each step, whatever the optimizer does. Use it to train a dense weight with the
    `masked_*` operators. `Phases` does not need it in the weight phase, because its frozen weights are no parameters.

    Args:
        optimizer: Any optimizer that holds the parameters.
        frozen: Parameter -> bool mask of its shape, True where it must not change (the used mask).

    Returns:
        A handle. Its ``remove()`` ends the guard.

    Raises:
        ValueError: If a parameter is not the optimizer's, or if a mask has another shape or dtype.

    Example:
        >>> optimizer = torch.optim.AdamW([weight])
        >>> guard = freeze_weights(optimizer, {weight: used_mask})
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held = []
    for parameter, mask in frozen.items():
        if id(parameter) not in known:
            raise ValueError(f"freeze_weights: a parameter of shape {tuple(parameter.shape)} is not the optimizer's")
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise ValueError(
                f"freeze_weights: the mask must be bool of shape {tuple(parameter.shape)}, "
                f"got {mask.dtype} of {tuple(mask.shape)}"
            )
        where = mask.reshape(-1).nonzero().squeeze(1)
        held.append((parameter, where, parameter.detach().reshape(-1)[where]))

    def restore(*_: Any) -> None:
        with torch.no_grad():
            for parameter, where, values in held:
                flat = parameter.view(-1) if parameter.is_contiguous() else parameter.reshape(-1)
                flat.index_copy_(0, where, values)
                if not parameter.is_contiguous():
                    parameter.copy_(flat.view_as(parameter))

    return optimizer.register_step_post_hook(restore)
