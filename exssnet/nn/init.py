"""How a converted model begins: the density of each layer, and weights that are signed constants."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


def allocate_density(
    shapes: Iterable[torch.Size], density: float, allocation: Literal["uniform", "er"] = "uniform"
) -> list[float]:
    """Density of each layer such that the whole keeps `density` of all weights.

    "uniform": the same everywhere. "er" (Erdős-Rényi, Mocanu et al. 2018; Evci et al. 2020): proportional to
    (O + I) / (O I R S), capped at 1; what a capped layer cannot take goes to the others.
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
    full: set[int] = set()
    while True:
        room = density * sum(sizes) - sum(sizes[i] for i in full)
        scale = room / max(1e-30, sum(shares[i] * sizes[i] for i in range(len(sizes)) if i not in full))
        over = {i for i in range(len(sizes)) if i not in full and shares[i] * scale > 1}
        if not over:
            return [1.0 if i in full else shares[i] * scale for i in range(len(sizes))]
        full |= over


def signed_constant_(weight: Tensor, density: float, init_scale: Literal["official", "density"] = "official") -> None:
    """Replace a weight (O, I, ...) in place by its signs times one constant, with the ReLU gain sqrt(2).

    "official": gain / sqrt(fan_in), whatever the density. "density": gain / sqrt(density fan_in), which keeps the
    activations' scale in networks without batch norm. Source: Ramanujan et al. 2020, section 4 ("signed constant").
    """
    if init_scale not in ("official", "density"):
        raise ValueError(f'init_scale must be "official" or "density", got {init_scale!r}')
    fan_in = max(1, weight[0].numel() if weight.shape[0] else 0)
    constant = math.sqrt(2 / (fan_in * (density if init_scale == "density" else 1)))
    with torch.no_grad():
        weight.copy_(torch.where(weight < 0, -constant, constant))
