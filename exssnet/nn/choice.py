"""Chooses sparse, fused or dense kernels for a layer by timing each shape once, see `fastest`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from ..kernels import native
from ..kernels.autotune import MASKING, Key, Operand, Way, Ways, fastest, order, pinned, rounded
from ..ops import bitmap_pattern, kept_weights, masked_weight, pack_mask, sparse_pattern

Products = Literal["auto", "sparse", "dense"]
PRODUCTS: tuple[Products, ...] = ("auto", "sparse", "dense")
Call = tuple[str, torch.Size, torch.dtype, torch.device, int, str, int, tuple[int, ...], torch.dtype]
"""What a layer decided, "sparse" or "fused"; shape, dtype and device of its input, number of threads, `products` and k,
stride of the input, dtype of the products. What does not count is "", 0 or ()."""
SURE_DENSITY, SURE_WORK, SURE_SPAN = 0.11, 1 << 22, 7
"""A layer on a CPU is sparse without a measurement up to this density, from this many multiply-adds (dense) on, and if
its kernel spans at most this many pixels: sparse products were 2.5 to 20 times faster on every such shape in
docs/internals/cpu-engine.md."""
TINY_DENSITY, TINY_WEIGHTS, TINY_WORK = 0.5, 1 << 10, 1 << 18
"""So is a layer on a CPU up to these. Its steps took 0.1 to 0.7 ms, mostly PyTorch's overhead: sparse convolutions took
0.4 to 1.1 times as long as dense ones, linear layers at most 0.05 ms longer. A measurement takes 15 ms."""


def sparse_is_faster(
    x: Tensor, weight: Tensor, density: float, geometry: Sequence[Any] = (), products: Products = "auto"
) -> bool:
    """Whether a layer should multiply only the kept entries of its weight.

    The layer's crossover decides: the density at which sparse and dense products take equally long, measured when a
    shape is first met. Sizes of batches and images count as the nearest powers of two. On a CPU tiny layers, see
    `TINY_WORK`, and large ones of low density, see `SURE_WORK`, are not measured. Nothing is measured while operators
    are traced: what is known decides, and low density alone if nothing is known or if sizes are not fixed.

    Args:
        x: The layer's input, (..., I) or (N, C, ...).
        weight: The dense weight.
        density: The share of the weight that is kept.
        geometry: Stride, padding, dilation and groups of a convolution, in one dimension for x (N, C, L).
        products: "sparse" or "dense" decide alone. Over "auto", the environment's EXSSNET_PRODUCTS does.

    Returns:
        False if x's device has no kernel for sparse products, if x is empty, and if these kernels refuse the layer.
    """
    if (asked := pinned("products", PRODUCTS, products)) != "auto":
        return asked == "sparse"
    operator, on_cpu = f"sparse_{'linear' if weight.dim() == 2 else 'conv2d'}", x.device.type == "cpu"
    if not _is_served(operator, x.device.type):
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
    layer = operator, x.shape, (), x.dtype, weight.shape, x.dtype, geometry, x.device
    ways = None if traced() else lambda: sparse_ways(x, weight.shape, geometry)
    faster = _faster(("sparse", "dense"), ways, density, None, *layer)
    return faster == "sparse" or (faster is None and traced() and sure)


def fused_is_faster(
    x: Tensor, weight: Tensor, dtype: torch.dtype, geometry: Sequence[Any] = (), density: float | None = None
) -> bool:
    """Whether a dense layer on a GPU should mask tiles of its weight while it multiplies them.

    Otherwise the masked weight is written before. EXSSNET_MASKING decides, or else the time, measured when a GPU, a
    shape and dtypes are first met. Scores are fused and values written if nothing is known and nothing can be measured:
    while operators are traced or a CUDA graph is captured, and without Triton's kernels.

    Args:
        x: The layer's input, as in `sparse_is_faster`.
        weight: The dense weight.
        dtype: The dtype of the products.
        geometry: As in `sparse_is_faster`.
        density: None in the mask phase, which has scores; the density in the weight phase.
    """
    if (asked := pinned("masking", MASKING)) != "auto":
        return asked == "fused"
    unknown = density is None
    fixed = not traced() or all(map(has_static_value, x.shape))
    if not fixed or not x.numel() or not _is_served("supermask_weights" if unknown else "bitmap_linear", x.device.type):
        return unknown
    if weight.dim() == 2:
        x = x.reshape(-1, x.shape[-1])
    x, weight, geometry = _as_images(x, weight, geometry)
    operator = f"{'supermask' if unknown else 'bitmap'}_{'conv2d' if geometry else 'linear'}"
    layer = operator, x.shape, x.stride(), dtype, weight.shape, weight.dtype, geometry, x.device
    ways = None if traced() else lambda: fused_ways(x, weight, dtype, geometry, density)
    faster = _faster(("fused", "written"), ways, 1.0, density, *layer)
    return unknown if faster is None else faster == "fused"


def _span(weight: Tensor, geometry: Sequence[Any]) -> int:
    """Pixels from one end of a kernel to the other."""
    dilation = geometry[2] if geometry else ()
    return max((d * (taps - 1) + 1 for d, taps in zip(dilation, weight.shape[2:], strict=True)), default=1)


def _as_images(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> tuple[Tensor, Tensor, Sequence[Any]]:
    """A one-dimensional convolution as one of images of height 1."""
    if not weight.dim() == x.dim() == 3:
        return x, weight, geometry
    stride, padding, dilation, groups = geometry
    return x.unsqueeze(2), weight.unsqueeze(2), ((1, *stride), (0, *padding), (1, *dilation), groups)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_served(operator: str, device: str) -> bool:
    return native.is_served(operator, device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _faster(
    candidates: tuple[str, str], ways: Callable[[], Ways] | None, at: float, density: float | None, operator: str,
    x: Sequence[int], stride: Sequence[int], dtype: torch.dtype, weight: Sequence[int], weight_dtype: torch.dtype,
    geometry: Sequence[Any], device: torch.device,
) -> str | None:  # fmt: skip
    """The faster candidate, see `fastest`; None also if there is no such layer, or if its kernels refuse it."""
    operands = Operand(rounded(x), order(stride), dtype), Operand(tuple(weight), (), weight_dtype)
    key = Key.of(operator, device, *operands, *geometry, density=density)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            return fastest(key, candidates, ways, at)
        except RuntimeError:
            return None


def sparse_ways(x: Tensor, shape: Sequence[int], geometry: Sequence[Any]) -> Ways:
    """Sparse products at densities of 5 and 25 %, and dense ones; on a GPU these are written or fused.

    Output and input gradient of the weight phase; they decide for all phases.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    images, filters = (x.new_empty(size).normal_(generator=generator) for size in (x.shape, shape))
    stored = images.movedim(0, -1).contiguous().movedim(-1, 0)
    forward, backward = _raw("sparse", geometry)
    of_kernel = (list(shape[2:]), *geometry[:3]) if geometry else ()

    def sparse(density: float) -> Way:
        mask = _random_mask(shape, density, generator)
        values, pattern = filters[mask], sparse_pattern(mask, groups=geometry[3] if geometry else 1)
        arguments = values, values[:0], *pattern.tensors

        def run() -> None:
            y = forward(stored, *arguments, None, *of_kernel)
            backward(y, stored, *arguments, *of_kernel, [True, False])

        return run

    fused, written = _value_ways(images, filters, _random_mask(shape, 0.1, generator), None, geometry)
    dense = [written, fused] if native.is_served("bitmap_linear", x.device.type) else [written]
    return {density: sparse(density) for density in (0.05, 0.25)}, dense


def fused_ways(x: Tensor, weight: Tensor, dtype: torch.dtype, geometry: Sequence[Any], density: float | None) -> Ways:
    """A layer's fused products, and PyTorch's with a written weight.

    Output, input gradient, and gradient of the scores or of the free values, half of those kept. The raw operators are
    timed, without autograd, which may be the one that asks.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    of = (x, dtype), (weight, weight.dtype), (weight, torch.float32)
    images, filters, scores = (torch.empty_like(t, dtype=d).normal_(generator=generator) for t, d in of)
    mask, half = (_random_mask(weight.shape, share, generator) for share in (density or 0.1, 0.5))
    if density is None:
        fused, written = _score_ways(images, filters, scores, pack_mask(mask), geometry)
    else:
        fused, written = _value_ways(images, filters, mask, mask & half, geometry)
    return {1.0: fused}, [written]


def _random_mask(shape: Sequence[int], density: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) < density


def _score_ways(x: Tensor, weight: Tensor, scores: Tensor, bits: Tensor, geometry: Sequence[Any]) -> tuple[Way, Way]:
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


def _value_ways(
    x: Tensor, weight: Tensor, mask: Tensor, free: Tensor | None, geometry: Sequence[Any]
) -> tuple[Way, Way]:
    """With the gradient of the free values, if a free mask is given."""
    forward, backward = _raw("bitmap", geometry)
    trains, free = free is not None, mask if free is None else free
    values, frozen = weight[free], weight[mask & ~free]
    words, shape, steps = bitmap_pattern(mask, free).words, list(weight.shape), list(geometry)
    pattern = sparse_pattern(mask, free, geometry[3] if geometry else 1)
    kept = kept_weights(pattern, shape)

    def fused() -> None:
        arguments = values.to(x.dtype), frozen.to(x.dtype), words
        y = forward(x, *arguments, None, shape, *steps)
        backward(y, x, *arguments, shape, *steps, [True, trains])[1].to(weight.dtype)

    def written() -> None:
        filters = masked_weight(values, frozen, pattern, shape, kept).to(x.dtype)
        grad = _dense_step(x, filters, geometry, trains)
        if trains:  # the gradient of `masked_weight`
            grad = grad.to(weight.dtype).reshape(-1)[kept]
            torch.zeros_like(grad).index_add_(0, pattern.slot, grad)

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
