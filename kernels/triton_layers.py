"""Shared code of the Triton layers: the arguments that they support, memory of results, and gradients."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import reference
from .autotune import MASKING, Key, Operand, Ways, fastest, order, pinned, precision, remember, rounded
from .layouts import empty_batch_last
from .triton_mask import Gradients, Mask, OutputParts, finish, given, selected
from .triton_product import Geometry, Weight, product, weight_gradients


def served(x: Tensor, shape: Sequence[int], scores: Tensor | None = None, padding: Sequence[int] = ()) -> bool:
    """Whether the kernels support a layer. The reference computes the others: float64, and too large sizes.

    The kernels index pixels and the weights of a tile of outputs in int32, and elements in int64. So a padded batch
    must have fewer than 2^30 pixels, and an output must have fewer than 2^22 weights.

    Args:
        x: The input, (B, I) or (N, C, H, W).
        shape: The weight's shape.
        scores: The scores, if the layer has any.
        padding: The padding of a convolution.

    Returns:
        Whether they support it.
    """
    if x.dtype == torch.float64 or (scores is not None and scores.dtype == torch.float64):
        return False
    pixels = x.shape[0] * math.prod(size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True))
    return pixels < 1 << 30 and math.prod(shape[1:]) < 1 << 22


Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def _takes(kernel: Callable[..., Any]) -> Callable[..., bool]:
    """A function of a kernel's positional arguments that returns whether the layer is `served`."""
    names = list(inspect.signature(kernel).parameters)

    def takes(*args: Any) -> bool:
        given = dict(zip(names, args, strict=True))
        shape = given["shape"] if "shape" in given else given["weight"].shape
        return served(given["x"], shape, given.get("scores"), given.get("padding", ()))

    return takes


def or_reference(kernel: Kernel) -> Kernel:
    """Use the kernel for layers that are `served`, and the reference for others. All arguments are positional."""
    takes, otherwise = _takes(kernel), getattr(reference, kernel.__name__)

    @functools.wraps(kernel)
    def call(*args: Any) -> Any:
        return (kernel if takes(*args) else otherwise)(*args)

    return cast(Kernel, call)


_chosen: dict[tuple[Any, ...], str] = {}
"""The choice of each exact call. Such a key takes a quarter of the time that a `Key` with rounded sizes takes."""


def _exactly(argument: Any) -> Any:
    """What tells an argument apart from others, cheaply."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return tuple(argument) if isinstance(argument, list) else argument


def or_written(kernel: Kernel) -> Kernel:
    """Like `or_reference`. On a GPU, use the faster of the kernel and PyTorch's product with a masked weight."""
    names = list(inspect.signature(kernel).parameters)

    def written(*args: Any) -> Any:
        given = dict(zip(names, args, strict=True))
        for name in ("mask", "free_mask"):
            if given[name] is not None and given[name].dtype == torch.uint8:
                given[name] = torch.ops.exssnet.unpack_mask(given[name], list(given["weight"].shape))
        return getattr(reference, kernel.__name__)(*given.values())

    @functools.wraps(kernel)
    def faster(*args: Any) -> Any:
        x = args[names.index("x")]
        if (asked := pinned("masking", MASKING)) == "auto" and _can_be_timed(x):
            call = (kernel.__name__, x.device, precision(x.device.type), *map(_exactly, args))
            known = _chosen.get(call) or fastest(key(x.device, args), ("fused", "written"), lambda: ways(args))
            if known is not None:
                asked = remember(_chosen, call, known)
        return (written if asked == "written" else kernel)(*args)

    def key(device: torch.device, args: Sequence[Any]) -> Key:
        told = (
            a if not isinstance(a, Tensor)
            else Operand(rounded(a.shape), order(a.stride()), a.dtype) if name in ("x", "grad")
            else Operand(tuple(a.shape), a.stride(), a.dtype)
            for name, a in zip(names, args, strict=True)
        )  # fmt: skip
        return Key.of(kernel.__name__, device, *told)

    def ways(args: Sequence[Any]) -> Ways:
        return {1.0: lambda: kernel(*args)}, [lambda: written(*args)]

    return or_reference(cast(Kernel, faster))


def _can_be_timed(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.numel() > 0


def _images(t: Tensor) -> Tensor:
    """View (B, F) as images of one pixel with F channels: (B, F, 1, 1)."""
    return t if t.dim() == 4 else t[:, :, None, None]


def _new_result(x: Tensor, shape: Sequence[int], batch_inner: bool) -> Tensor:
    """An uninitialised result, contiguous or with the batch as the innermost dimension."""
    return empty_batch_last(x, *shape) if batch_inner else x.new_empty(shape)


def forward(
    x: Tensor, weight: Weight, outputs: int, mask: Mask, bias: Tensor | None, geometry: Geometry,
    batch_inner: bool = False,
) -> Tensor:  # fmt: skip
    result = _new_result(x, (x.shape[0], outputs, *geometry.output_size(x.shape[2:])), batch_inner)
    bias = None if bias is None else bias.contiguous()
    finish(product(_images(x), weight, mask, bias, geometry, _images(result), transposed=False), None)
    return result


def _input_gradient(
    grad: Tensor, x: Tensor, weight: Weight, mask: Mask, geometry: Geometry, batch_inner: bool, needed: bool
) -> tuple[Tensor, OutputParts | None]:
    if not needed:
        return x.new_empty(0), None
    result = _new_result(x, x.shape, batch_inner)
    return result, product(_images(grad), weight, mask, None, geometry, _images(result), transposed=True)


def new_gradient(t: Tensor, needed: bool) -> Tensor | None:
    return t.new_empty(t.shape) if needed else None


def or_empty(gradient: Tensor | None, t: Tensor) -> Tensor:
    return t.new_empty(0) if gradient is None else gradient


def supermask_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, selection: Tensor, geometry: Geometry, batch_inner: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mask = selected(scores, selection)
    grad_x, parts = _input_gradient(grad, x, weight, mask, geometry, batch_inner, output_mask[0])
    grad_scores, grad_weight = new_gradient(scores, output_mask[1]), new_gradient(weight, output_mask[2])
    gradients = Gradients(weight, scores, mask, None, grad_scores, grad_weight)
    finish(parts, weight_gradients(_images(grad), _images(x), geometry, gradients))
    return grad_x, or_empty(grad_scores, scores), or_empty(grad_weight, weight)


def masked_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, free_mask: Tensor | None, geometry: Geometry,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept = given(mask)
    grad_x, parts = _input_gradient(grad, x, weight, kept, geometry, False, output_mask[0])
    grad_weight = new_gradient(weight, output_mask[1])
    gradients = Gradients(None, None, kept, None if free_mask is None else given(free_mask), None, grad_weight)
    finish(parts, weight_gradients(_images(grad), _images(x), geometry, gradients))
    return grad_x, or_empty(grad_weight, weight)


def bitmap_backward(
    grad: Tensor, x: Tensor, free_values: Tensor, frozen_values: Tensor, pattern: Tensor, geometry: Geometry,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask = given(pattern)
    grad_x, parts = _input_gradient(grad, x, (free_values, frozen_values), mask, geometry, False, output_mask[0])
    grad_values = new_gradient(free_values, output_mask[1])
    gradients = Gradients(None, None, mask, None, None, grad_values)
    finish(parts, weight_gradients(_images(grad), _images(x), geometry, gradients))
    return grad_x, or_empty(grad_values, free_values)
