"""Which products a layer is made of: measured once on this machine, where two can serve.

Sparse or dense ones: the density up to which a layer's sparse ones are faster. Dense ones on a GPU: fused with their
masks, or PyTorch's own with a masked weight that is written before: the ratio of their times.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .kernels import native
from .kernels.measured import asked_masking, measured, times
from .ops import (
    kept_weights,
    masked_weight,
    pack_mask,
    packed_conv2d,
    packed_linear,
    packed_pattern,
    sparse_pattern,
    supermask_conv2d,
    supermask_linear,
    supermask_weights,
)

Products = Literal["auto", "sparse", "dense"]
PRODUCTS: tuple[Products, ...] = ("auto", "sparse", "dense")
Masking = Literal["auto", "fused", "written"]
SURE_DENSITY, SURE_WORK = 0.11, 1 << 22
"""Up to this density a layer of at least so many multiply-adds (dense) is not measured on a CPU: sparse products were
2.5 to 20 times faster on every such shape in docs/cpu-engine.md."""


def sparse_is_faster(
    x: Tensor, weight: Tensor, density: float, geometry: Sequence[Any] = (), products: Products = "auto"
) -> bool:
    """Whether a layer over x should multiply only the kept entries of its weight.

    x: (..., I) or (N, C, ...).
    geometry: (stride, padding, dilation, groups) of a convolution, in one dimension for x (N, C, L).
    products: "sparse" or "dense" decide alone, and so does the environment's EXSSNET_PRODUCTS over "auto". Otherwise
        the layer's crossover decides: the density at which output and input gradient cost the same either way,
        measured when a shape is first met, and kept in a file of the user's cache folder.
    Without a kernel for the sparse products on x's device, and while operators are traced or a CUDA graph is captured,
    nothing is measured.
    """
    if products == "auto":
        products = os.environ.get("EXSSNET_PRODUCTS", "auto")  # type: ignore[assignment]
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    if products != "auto":
        return products == "sparse"
    kind = x.device.type
    if not native.is_served(f"sparse_{'linear' if weight.dim() == 2 else 'conv2d'}", kind):
        return False
    if weight.dim() == 2 and x.dim() not in (0, 2):
        x = x.reshape(-1, x.shape[-1])
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1] * (geometry[3] if geometry else 1) or not x.numel():
        return True  # nothing to measure; the operators tell what is wrong
    x, weight, geometry = _as_images(x, weight, geometry)
    work = x.numel() // max(1, x.shape[1]) * weight.numel()
    if traced() or (kind == "cpu" and density <= SURE_DENSITY and work >= SURE_WORK):
        return kind == "cpu" and density <= SURE_DENSITY
    where = f"{torch.get_num_threads()} threads" if kind == "cpu" else torch.cuda.get_device_name(x.device)
    key = " ".join(map(str, (*x.shape, "to", *weight.shape, *geometry, where, x.dtype)))
    try:
        crossed = measured(key, kind == "cuda", lambda: crossover(x.shape, weight.shape, geometry, x.dtype, x.device))
    except RuntimeError:  # no such layer: the operators tell what is wrong
        return True
    return crossed is not None and density <= crossed


def _as_images(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> tuple[Tensor, Tensor, Sequence[Any]]:
    """A one-dimensional convolution as one of images of height 1."""
    if not weight.dim() == x.dim() == 3:
        return x, weight, geometry
    stride, padding, dilation, groups = geometry
    return x.unsqueeze(2), weight.unsqueeze(2), ((1, *stride), (0, *padding), (1, *dilation), groups)


def fused_is_faster(
    x: Tensor, weight: Tensor, dtype: torch.dtype, geometry: Sequence[Any] = (), values: bool = False,
    masking: Masking = "auto",
) -> bool:  # fmt: skip
    """Whether a dense layer over x, on a GPU, should mask tiles of its weight while it multiplies them.

    Otherwise the masked weight is written, and PyTorch's products take it.
    x, geometry: as in `sparse_is_faster`; dtype: in which x is multiplied.
    values: of the weight phase, `packed_linear` and the like or `masked_weight`; else of the mask phase,
        `supermask_linear` and the like or `supermask_weights`.
    masking: "fused" or "written" decide alone, and so does the environment's EXSSNET_MASKING over "auto". Otherwise the
        ratio of their times decides, which is measured when a GPU, a shape and a dtype are first met, and kept in the
        file of `sparse_is_faster`. Where it is not known and cannot be measured, while operators are traced or a CUDA
        graph is captured, or without Triton's kernels, scores are fused and values written.
    """
    if (asked := asked_masking(masking)) != "auto":
        return bool(asked == "fused")
    operator = "packed_linear" if values else "supermask_weights"
    if traced() or not x.numel() or not native.is_served(operator, x.device.type):
        return not values
    if weight.dim() == 2:
        x = x.reshape(-1, x.shape[-1])
    x, weight, geometry = _as_images(x, weight, geometry)
    where, precision = torch.cuda.get_device_name(x.device), torch.get_float32_matmul_precision()
    what = "values" if values else "masking"
    key = " ".join(map(str, (what, *x.shape, x.stride(), "to", *weight.shape, *geometry, where, dtype, precision)))
    try:
        ratio = measured(key, True, lambda: fused_over_written(x, weight, dtype, geometry, values))
    except RuntimeError:  # no such layer: the operators tell what is wrong
        return not values
    return not values if ratio is None else ratio <= 1


def fused_over_written(x: Tensor, weight: Tensor, dtype: torch.dtype, geometry: Sequence[Any], values: bool) -> float:
    """The time of a layer's fused products over that of PyTorch's with a written weight, measured now.

    Output, input gradient, and gradient of the scores or of the free values.
    """
    images = torch.randn_like(x, dtype=dtype).requires_grad_()
    filters, mask = torch.randn_like(weight, dtype=dtype), torch.rand_like(weight, dtype=torch.float32) < 0.1
    make = _ways_with_values if values else _ways_with_scores
    trained, *ways = make(filters, mask, geometry)

    def step(way: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        grad = torch.ones_like(way(images))
        return lambda: torch.autograd.grad(way(images), (images, trained), grad)

    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        finish = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
        of_fused, of_written = times(finish, *map(step, ways))
    return float(of_fused / of_written)


Ways = tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _ways_with_scores(weight: Tensor, mask: Tensor, geometry: Sequence[Any]) -> Ways:
    """(scores, the fused and the written layer) of the mask phase."""
    scores, bits = torch.randn_like(weight, dtype=torch.float32).requires_grad_(), pack_mask(mask)
    layer = supermask_conv2d if geometry else supermask_linear
    return (
        scores,
        lambda x: layer(x, weight, scores, None, None, *geometry, selection=bits),
        lambda x: _dense(x, supermask_weights([weight], [scores], [bits], weight.dtype)[0], geometry),
    )


def _ways_with_values(weight: Tensor, mask: Tensor, geometry: Sequence[Any]) -> Ways:
    """(free values, the fused and the written layer) of the weight phase; half of the kept weights are free."""
    free = mask & (torch.rand_like(mask, dtype=torch.float32) < 0.5)
    values, frozen = weight[free].requires_grad_(), weight[mask & ~free]
    packed, pattern = packed_pattern(mask, free), sparse_pattern(mask, free, geometry[3] if geometry else 1)
    kept = kept_weights(pattern, weight.shape)
    layer = packed_conv2d if geometry else packed_linear
    return (
        values,
        lambda x: layer(x, values, frozen, packed, None, *geometry),
        lambda x: _dense(x, masked_weight(values, frozen, pattern, weight.shape, kept), geometry),
    )


def _dense(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    if geometry:
        return torch.nn.functional.conv2d(x, weight, None, *geometry)
    return torch.nn.functional.linear(x, weight)


def traced() -> bool:
    """Whether operators are being recorded, so that a measurement would be recorded as well."""
    return torch.compiler.is_compiling() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None


def crossover(
    x: Sequence[int], weight: Sequence[int], geometry: Sequence[Any], dtype: torch.dtype, device: torch.device
) -> float:
    """The density in [0, 1] at which a layer's sparse products take as long as its dense ones, measured now.

    Output and input gradient of the weight phase, with the making of the dense weight; it decides for all phases. On a
    GPU the dense ones are the faster of written and fused ones.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    def random_mask(density: float) -> Tensor:
        return (torch.rand(*weight, generator=generator, device="cpu") < density).to(device)

    images, filters = random(*x), random(*weight)
    stride, padding, dilation, groups = geometry if geometry else ([1], [0], [1], 1)
    ops: Any = torch.ops

    mask = random_mask(0.1)
    values, pattern, packed = filters[mask], sparse_pattern(mask, groups=groups), packed_pattern(mask)
    kept = kept_weights(pattern, weight)
    kind = "linear" if len(weight) == 2 else "conv2d"

    def dense() -> None:
        made = masked_weight(values, values[:0], pattern, weight, kept)
        if len(weight) == 2:
            torch.mm(torch.nn.functional.linear(images, made), made)
        else:
            y = ops.aten.convolution(images, made, None, stride, padding, dilation, False, [0, 0], groups)
            ops.aten.convolution_backward(
                y, images, made, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
            )

    def fused() -> None:
        forward, backward = (getattr(ops.exssnet, f"packed_{kind}{end}") for end in ("", "_backward"))
        arguments, steps = (values, values[:0], packed.words), (list(weight), *geometry)
        backward(forward(images, *arguments, None, *steps), images, *arguments, *steps, [True, False])

    def sparse(density: float) -> Callable[[], None]:
        mask = random_mask(density)
        pattern, values = sparse_pattern(mask, groups=groups), filters[mask]
        arguments = (values, values[:0], *pattern.tensors)
        steps = () if kind == "linear" else (list(weight[2:]), stride, padding, dilation)
        stored = images.movedim(0, -1).contiguous().movedim(-1, 0)
        forward, backward = (getattr(ops.exssnet, f"sparse_{kind}{end}") for end in ("", "_backward"))

        def run() -> None:
            y = forward(stored, *arguments, None, *steps)
            backward(y, stored, *arguments, *steps, [True, False])

        return run

    low, high = 0.05, 0.25
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        of_dense = [dense, fused] if native.is_served(f"packed_{kind}", device.type) else [dense]
        at_low, at_high, *whole = times(finish, sparse(low), sparse(high), *of_dense)
    slope = max((at_high - at_low) / (high - low), 1e-12)
    crossed: float = low + (min(whole) - at_low) / slope
    return min(1.0, max(0.0, crossed))
