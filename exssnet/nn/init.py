"""Initial state of a converted model: the density of each layer, and signed constant weights."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


def allocate_density(
    shapes: Iterable[torch.Size], density: float, allocation: Literal["uniform", "er"] = "uniform"
) -> list[float]:
    """Density of each layer such that all layers together keep the share `density` of their weights.

    Source of "er" (Erdős-Rényi): Mocanu et al. 2018; Evci et al. 2020.

    Args:
        shapes: Shape of each layer's weight: (O, I), (O, I, R) or (O, I, R, S).
        density: Share of the weights kept, in (0, 1].
        allocation: "uniform" gives every layer the same density. "er" makes it proportional to
            (O + I) / (O I R S), with 1 as the maximum. The other layers keep what a layer at the maximum cannot.

    Returns:
        The densities, in (0, 1], in the order of the shapes.

    Raises:
        ValueError: For a density outside (0, 1], or another allocation.
    """
    shapes = list(shapes)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if allocation == "uniform":
        return [density] * len(shapes)
    if allocation != "er":
        raise ValueError(f'allocation must be "uniform" or "er", got {allocation!r}')
    sizes = [math.prod(s) for s in shapes]
    shares = [(s[0] + s[1]) / n for s, n in zip(shapes, sizes, strict=True)]
    capped: set[int] = set()
    while True:
        remaining = density * sum(sizes) - sum(sizes[i] for i in capped)
        scale = remaining / max(1e-30, sum(shares[i] * sizes[i] for i in range(len(sizes)) if i not in capped))
        above = {i for i in range(len(sizes)) if i not in capped and shares[i] * scale > 1}
        if not above:
            return [1.0 if i in capped else shares[i] * scale for i in range(len(sizes))]
        capped |= above


def signed_constant_(weight: Tensor, density: float, init_scale: Literal["official", "density"] = "official") -> None:
    """Replace a weight in place by its signs times one constant.

    Source: Ramanujan et al. 2020, section 4 ("signed constant"). The gain is that of ReLU, sqrt(2).

    Args:
        weight: A floating-point tensor (O, I, ...).
        density: Share of the weights that a mask keeps, in (0, 1].
        init_scale: "official" is the constant gain / sqrt(fan_in), for any density. "density" is
            gain / sqrt(density * fan_in), which keeps the scale of the activations in networks without batch norm.

    Raises:
        ValueError: For another `init_scale`.
    """
    if init_scale not in ("official", "density"):
        raise ValueError(f'init_scale must be "official" or "density", got {init_scale!r}')
    fan_in = max(1, weight[0].numel() if weight.shape[0] else 0)
    constant = math.sqrt(2 / (fan_in * (density if init_scale == "density" else 1)))
    with torch.no_grad():
        weight.copy_(torch.where(weight < 0, -constant, constant))
