"""A layer's tensors, and what is timed of it: forward and backward, both together or each alone, and two baselines.

A layer of bfloat16 multiplies under autocast. Its activations are stored in bfloat16, as its neighbours under autocast
store them. Its weights and scores are float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import plain
from .timing import Variant, Work, autocast, check_accurate


class Layer:
    """Tensors of a linear layer or, if `image` is not 0, of a 3 x 3 convolution of image x image pixels; seed 0.

    dtype: of the products.
    """

    def __init__(
        self, batch: int, width: int, out: int, image: int = 0, stride: int = 1, *, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        self.stride, self.is_linear, self.dtype = stride, image == 0, dtype
        x = torch.randn(batch, width) if self.is_linear else torch.randn(batch, width, image, image)
        self.weight = torch.randn(out, width) if self.is_linear else torch.randn(out, width, 3, 3)
        self.scores = torch.randn(self.weight.shape)
        self.x, self.grad = x.to(dtype), torch.randn(plain.layer(x, self.weight, stride).shape).to(dtype)
        self.geometry: dict[str, Any] = {} if self.is_linear else {"stride": stride, "padding": 1}
        size = "" if self.is_linear else f", {image}x{image}" + (f", stride {stride}" if stride > 1 else "")
        self.name = f"{batch} x {width} to {out}{size}"

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the output, x and weight, for products in this dtype."""
        return self.grad.to(dtype), self.x.to(dtype), self.weight.to(of_weights(dtype))

    def mask(self, density: float) -> Tensor:
        return plain.sort_mask(self.scores.abs(), density).bool()

    def work(self, stored: float, kept: int | None = None, products: int = 3) -> Work:
        """Work of output and gradients, with all weights or, for sparse products, with `kept` weights.

        stored: bytes of weights, masks, indices and their gradients, summed over all products.
        """
        weights = self.weight.numel() if kept is None else kept
        adds = products * weights * (self.grad.numel() // self.weight.shape[0])
        moved = products * (self.x.nbytes + self.grad.nbytes) + stored
        return Work(moved, 2 * adds, 0 if kept is None else 4 * adds, tiles=kept is None, dtype=self.dtype)


def of_weights(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights whose products are in this dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def step(function: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> Variant:
    """Forward and backward pass, in the dtype of grad. A call returns the output and the gradients of all leaves."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)

    def run() -> tuple[Tensor, ...]:
        with autocast(grad.dtype):
            output = function(*leaves)
        return output, *torch.autograd.grad(output, leaves, grad)

    return run


def accurate(
    ours: Variant, peer: Callable[[torch.dtype], Variant], dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """A check of ours against plain PyTorch in float64 and in our dtype."""

    def check() -> None:
        for i, results in enumerate(zip(ours(), peer(torch.float64)(), peer(dtype)(), strict=True)):
            check_accurate("the output" if i == 0 else f"gradient {i}", *results)

    return check


def alone(function: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> list[Variant]:
    """The parts of `step` as separate variants: the output, and each leaf's gradient from a retained graph."""

    def forward(*leaves: Tensor) -> Tensor:
        with autocast(grad.dtype):
            return function(*leaves)

    def gradient(i: int) -> Variant:
        own = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        output = forward(*own)
        return lambda: torch.autograd.grad(output, own[i], grad, retain_graph=True)[0]

    return [lambda: forward(*leaves), *map(gradient, range(len(leaves)))]


def no_mask(layer: Layer) -> Variant:
    return step(lambda x, w: plain.layer(x, w, layer.stride), layer.grad, layer.x, layer.weight)


def cached_mask(layer: Layer, mask: Tensor, dtype: torch.dtype | None = None) -> Variant:
    """Baseline for a fixed mask: the mask is stored as floats and multiplied with the weight."""
    grad, x, weight = layer.tensors(dtype or layer.dtype)
    factors = mask.to(weight.dtype)
    return step(lambda x, w: plain.layer(x, w * factors, layer.stride), grad, x, weight)
