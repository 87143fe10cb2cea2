"""Which products a layer is made of: measured once on this machine, where two can serve.

Sparse or dense ones: the density up to which a layer's sparse ones are faster. Dense ones on a GPU: fused with their
masks, or PyTorch's own with a masked weight that is written before: the ratio of their times.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from ..kernels import native
from ..kernels.measured import asked_masking, finish_on, known, measured, of_gpu, order, rounded, times
from ..ops import bitmap_pattern, kept_weights, masked_weight, pack_mask, sparse_pattern

Products = Literal["auto", "sparse", "dense"]
PRODUCTS: tuple[Products, ...] = ("auto", "sparse", "dense")
Masking = Literal["auto", "fused", "written"]
SURE_DENSITY, SURE_WORK, SURE_SPAN = 0.11, 1 << 22, 7
"""Up to this density a layer of at least so many multiply-adds (dense), whose kernel spans at most so many pixels, is
not measured on a CPU: sparse products were 2.5 to 20 times faster on every such shape in docs/cpu-engine.md."""
TINY_DENSITY, TINY_WEIGHTS, TINY_WORK = 0.5, 1 << 10, 1 << 18
"""Up to these a layer is not measured on a CPU either, and is sparse. Its steps took 0.1 to 0.7 ms, mostly PyTorch's
overhead: sparse convolutions 0.4 to 1.1 times as long as dense ones, linear layers at most 0.05 ms longer. To measure
takes 15 ms."""


def sparse_is_faster(
    x: Tensor, weight: Tensor, density: float, geometry: Sequence[Any] = (), products: Products = "auto"
) -> bool:
    """Whether a layer over x should multiply only the kept entries of its weight.

    x: (..., I) or (N, C, ...).
    geometry: (stride, padding, dilation, groups) of a convolution, in one dimension for x (N, C, L).
    products: "sparse" or "dense" decide alone, and so does the environment's EXSSNET_PRODUCTS over "auto". Otherwise
        the layer's crossover decides: the density at which output and input gradient cost the same either way,
        measured when a shape is first met, and kept in a file of the user's cache folder. Sizes of batches and images
        count there as the nearest powers of two.
    Dense without a kernel for the sparse products on x's device, for an empty x, and where these refuse the layer.
    On a CPU tiny layers, see `TINY_WORK`, and large ones of low density, see `SURE_WORK`, are sparse without a
    measurement. While operators are traced nothing is measured: what is known decides; where nothing is, or sizes
    are not fixed, low density alone.
    """
    if products == "auto":
        products = os.environ.get("EXSSNET_PRODUCTS", "auto")  # type: ignore[assignment]
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    if products != "auto":
        return products == "sparse"
    on_cpu = x.device.type == "cpu"
    if not _is_served(f"sparse_{'linear' if weight.dim() == 2 else 'conv2d'}", x.device.type):
        return False
    sure = on_cpu and density <= SURE_DENSITY and _span(weight, geometry) <= SURE_SPAN
    if traced() and (any(isinstance(n, Tensor) for n in x.shape) or not all(map(has_static_value, x.shape))):
        return sure  # sizes that a trace keeps open
    if not x.numel():
        return False
    if weight.dim() == 2 and x.dim() not in (0, 2):
        x = x.reshape(-1, x.shape[-1])
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1] * (geometry[3] if geometry else 1):
        return True  # the operators tell what is wrong
    x, weight, geometry = _as_images(x, weight, geometry)
    weights, work = weight.numel(), x.numel() // x.shape[1] * weight.numel()
    tiny = weights <= TINY_WEIGHTS and work <= TINY_WORK and density <= TINY_DENSITY
    if on_cpu and (tiny or (sure and work >= SURE_WORK)):
        return True
    layer = x.shape, weight.shape, geometry, x.dtype, x.device
    if traced():
        crossed = _known_crossover(*layer)
        return sure if crossed is None else density <= crossed
    try:
        crossed = measured(_crossover_key(*layer), not on_cpu, lambda: crossover(*layer))
    except RuntimeError:  # there is no such layer, as PyTorch will tell, or the sparse products refuse it
        return False
    return crossed is not None and density <= crossed


def _span(weight: Tensor, geometry: Sequence[Any]) -> int:
    """Pixels from one end of a kernel to the other."""
    dilation = geometry[2] if geometry else ()
    return max((d * (taps - 1) + 1 for d, taps in zip(dilation, weight.shape[2:], strict=True)), default=1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_served(operator: str, device: str) -> bool:
    served: bool = native.is_served(operator, device)
    return served


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _known_crossover(*layer: Any) -> float | None:
    crossed: float | None = known(_crossover_key(*layer))
    return crossed


def _crossover_key(
    x: Sequence[int], weight: Sequence[int], geometry: Sequence[Any], dtype: torch.dtype, device: torch.device
) -> str:
    on_cpu = device.type == "cpu"
    where = f"{torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name(device)
    return " ".join(map(str, (*rounded(x), "to", *weight, *geometry, where, dtype)))


def _as_images(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> tuple[Tensor, Tensor, Sequence[Any]]:
    """A one-dimensional convolution as one of images of height 1."""
    if not weight.dim() == x.dim() == 3:
        return x, weight, geometry
    stride, padding, dilation, groups = geometry
    return x.unsqueeze(2), weight.unsqueeze(2), ((1, *stride), (0, *padding), (1, *dilation), groups)


def fused_is_faster(
    x: Tensor, weight: Tensor, dtype: torch.dtype, geometry: Sequence[Any] = (), density: float | None = None,
    masking: Masking = "auto",
) -> bool:  # fmt: skip
    """Whether a dense layer over x, on a GPU, should mask tiles of its weight while it multiplies them.

    Otherwise the masked weight is written, and PyTorch's products take it.
    x, geometry: as in `sparse_is_faster`; dtype: in which x is multiplied.
    density: in the weight phase, which has `bitmap_linear` and the like or `masked_weight`; None in the mask phase,
        which has `supermask_linear` and the like or `supermask_weights`.
    masking: "fused" or "written" decide alone, and so does the environment's EXSSNET_MASKING over "auto". Otherwise the
        ratio of their times decides, which is measured when a GPU, a shape and dtypes are first met, and kept in the
        file of `sparse_is_faster`. Where it is not known and cannot be measured, while operators are traced or a CUDA
        graph is captured, or without Triton's kernels, scores are fused and values written.
    """
    if (asked := asked_masking(masking)) != "auto":
        return bool(asked == "fused")
    unknown = density is None
    operator = "supermask_weights" if unknown else "bitmap_linear"
    fixed = not traced() or all(map(has_static_value, x.shape))
    if not fixed or not x.numel() or not _is_served(operator, x.device.type):
        return unknown
    if weight.dim() == 2:
        x = x.reshape(-1, x.shape[-1])
    x, weight, geometry = _as_images(x, weight, geometry)
    what = "masking" if density is None else f"values {density:.3f}"
    layer = what, x.device, x.shape, x.stride(), "to", weight.dtype, *weight.shape, *geometry, dtype
    try:
        if traced():
            ratio = _known_ratio(*layer)
        else:
            ratio = measured(_ratio_key(*layer), True, lambda: fused_over_written(x, weight, dtype, geometry, density))
    except RuntimeError:  # no such layer: the operators tell what is wrong
        return unknown
    return unknown if ratio is None else ratio <= 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _known_ratio(*layer: Any) -> float | None:
    ratio: float | None = known(_ratio_key(*layer))
    return ratio


def _ratio_key(what: str, device: torch.device, x: Sequence[int], stride: Sequence[int], *layer: Any) -> str:
    return " ".join(map(str, (what, *rounded(x), order(stride), *layer, *of_gpu(device))))


def fused_over_written(
    x: Tensor, weight: Tensor, dtype: torch.dtype, geometry: Sequence[Any], density: float | None
) -> float:
    """The time of a layer's fused products over that of PyTorch's with a written weight, measured now.

    Output, input gradient, and gradient of the scores or of the free values, half of those kept. The raw operators are
    timed, without autograd, which may be the one that asks.
    """
    generator = torch.Generator(x.device).manual_seed(0)

    def normal(t: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(t, dtype=dtype).normal_(generator=generator)

    def random_mask(share: float) -> Tensor:
        return torch.rand(weight.shape, generator=generator, device=weight.device) < share

    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        images, filters, mask = normal(x, dtype), normal(weight, weight.dtype), random_mask(density or 0.1)
        if density is None:
            ways = _ways_of_scores(images, filters, normal(weight, torch.float32), pack_mask(mask), geometry)
        else:
            ways = _ways_of_values(images, filters, mask, mask & random_mask(0.5), geometry)
        of_fused, of_written = times(finish_on(x.device), *ways)
    return float(of_fused / of_written)


Ways = tuple[Callable[[], object], Callable[[], object]]


def _ways_of_scores(x: Tensor, weight: Tensor, scores: Tensor, bits: Tensor, geometry: Sequence[Any]) -> Ways:
    forward, backward = _raw("supermask", geometry)
    steps, ops = list(geometry), torch.ops.exssnet

    def fused() -> None:
        filters = weight.to(x.dtype)
        y = forward(x, filters, scores, bits, None, *steps, False)
        backward(y, x, filters, scores, bits, *steps, False, [True, True, False])

    def written() -> None:
        grad = _dense_step(x, ops.supermask_weights([weight], [scores], [bits], x.dtype)[0], geometry)
        ops.supermask_weights_backward([grad], [weight], [scores], [bits], [True, False])

    return fused, written


def _ways_of_values(x: Tensor, weight: Tensor, mask: Tensor, free: Tensor, geometry: Sequence[Any]) -> Ways:
    forward, backward = _raw("bitmap", geometry)
    values, frozen = weight[free], weight[mask & ~free]
    words, shape, steps = bitmap_pattern(mask, free).words, list(weight.shape), list(geometry)
    pattern = sparse_pattern(mask, free, geometry[3] if geometry else 1)
    kept = kept_weights(pattern, shape)

    def fused() -> None:
        arguments = values.to(x.dtype), frozen.to(x.dtype), words
        y = forward(x, *arguments, None, shape, *steps)
        backward(y, x, *arguments, shape, *steps, [True, True])[1].to(weight.dtype)

    def written() -> None:
        made = masked_weight(values, frozen, pattern, shape, kept).to(x.dtype)
        grad = _dense_step(x, made, geometry).to(weight.dtype).reshape(-1)[kept]
        torch.zeros_like(grad).index_add_(0, pattern.slot, grad)  # what autograd makes of `masked_weight`

    return fused, written


def _raw(family: str, geometry: Sequence[Any]) -> tuple[Any, Any]:
    name = f"{family}_{'conv2d' if geometry else 'linear'}"
    return getattr(torch.ops.exssnet, name), getattr(torch.ops.exssnet, f"{name}_backward")


def _dense_step(x: Tensor, weight: Tensor, geometry: Sequence[Any], weight_gradient: bool = True) -> Any:
    """The gradient of a dense weight, or None, after output and input gradient."""
    if not geometry:
        y = torch.nn.functional.linear(x, weight)
        torch.mm(y, weight)
        return torch.mm(y.t(), x) if weight_gradient else None
    stride, padding, dilation, groups = geometry
    ops: Any = torch.ops.aten
    y = ops.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)
    return ops.convolution_backward(
        y, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, weight_gradient, False]
    )[1]


def traced() -> bool:
    """Whether operators are being recorded, so that a measurement would be recorded as well."""
    return recorded() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None


def recorded() -> bool:
    """Whether a graph is made, by the compiler or by `torch.jit.trace`."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


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
    steps, shape, groups = list(geometry), list(weight), geometry[3] if geometry else 1

    mask = random_mask(0.1)
    kept_values, where, bitmap = filters[mask], sparse_pattern(mask, groups=groups), bitmap_pattern(mask)
    kept = kept_weights(where, shape)

    def dense() -> None:
        _dense_step(images, masked_weight(kept_values, kept_values[:0], where, shape, kept), geometry, False)

    def fused() -> None:
        forward, backward = _raw("bitmap", geometry)
        arguments = kept_values, kept_values[:0], bitmap.words
        y = forward(images, *arguments, None, shape, *steps)
        backward(y, images, *arguments, shape, *steps, [True, False])

    def sparse(density: float) -> Callable[[], None]:
        mask = random_mask(density)
        pattern, values = sparse_pattern(mask, groups=groups), filters[mask]
        arguments = (values, values[:0], *pattern.tensors)
        of_kernel = (shape[2:], *steps[:3]) if geometry else ()
        stored = images.movedim(0, -1).contiguous().movedim(-1, 0)
        forward, backward = _raw("sparse", geometry)

        def run() -> None:
            y = forward(stored, *arguments, None, *of_kernel)
            backward(y, stored, *arguments, *of_kernel, [True, False])

        return run

    low, high = 0.05, 0.25
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        of_dense = [dense, fused] if native.is_served("bitmap_linear", device.type) else [dense]
        at_low, at_high, *whole = times(finish_on(device), sparse(low), sparse(high), *of_dense)
    slope = max((at_high - at_low) / (high - low), 1e-12)
    crossed: float = low + (min(whole) - at_low) / slope
    return min(1.0, max(0.0, crossed))
